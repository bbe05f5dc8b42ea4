"""Numba's decorators for our own kernels, with a cache beside their file.

Numba chooses where compiled code is kept by its configuration, which is the whole process's, and makes its
files by the umask. Here the place is known, trusted (see `cache`), and its files are this user's alone; what
NUMBA_CACHE_DIR says is for the kernels of others, and their compilations go on meanwhile.
"""

# Numba promises nothing about its caches; `tests/engines/test_kernel_cache.py` holds what is used of them.
# pyright: reportPrivateUsage=false

import contextlib
import hashlib
import logging
import os
import sys
import uuid
from collections.abc import Callable, Generator
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numba
from numba.core import sigutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock

from optimisers.engines.trust import Untrusted, untrusted

LOG = logging.getLogger("optimisers")

lock: Any = global_compiler_lock
"""Held by whoever compiles, ours or others': one lock, so that there is no deadlock."""

if hasattr(os, "register_at_fork"):  # a child would wait for ever for a thread that it does not have
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


class Files(IndexDataCacheFile):
    """The files of one function: read where this user alone could write them, and written whole, by this user
    alone, whatever the umask.
    """

    def _load_index(self) -> dict[Any, str]:
        _trusted(self._index_path)
        return super()._load_index()

    def _load_data(self, name: str) -> Any:
        _trusted(self._data_path(name))
        return super()._load_data(name)

    @contextlib.contextmanager
    def _open_for_write(self, filepath: str) -> Generator[BufferedWriter]:
        temporary = Path(f"{filepath}.tmp.{uuid.uuid4().hex[:16]}")
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                yield file
            temporary.replace(filepath)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _trusted(path: str) -> None:
    if (refusal := untrusted(Path(path))) is not None:
        raise Untrusted(refusal)


class Beside:
    """Where Numba keeps the code of a function: beside its file, as long as that has the same bytes. Numba's
    own class has changed its name.
    """

    def __init__(self, path: Path, line: int) -> None:
        self._py_file, self.line = path, line

    def get_cache_path(self) -> str:
        """The folder."""
        return str(self._py_file.parent / "__pycache__")

    def ensure_cache_path(self) -> None:
        """Make the folder; raises OSError where it cannot be made."""
        Path(self.get_cache_path()).mkdir(parents=True, exist_ok=True)

    def get_disambiguator(self) -> str:
        """Differs between functions of one name."""
        return str(self.line)

    def get_source_stamp(self) -> str:
        """Differs where the text of the function does."""
        return hashlib.sha256(self._py_file.read_bytes()).hexdigest()


class Form(CompileResultCacheImpl):
    """How compiled code becomes bytes; it lies beside the file of its function."""

    def __init__(self, function: Any) -> None:
        path = Path(function.__code__.co_filename)
        self._lineno = function.__code__.co_firstlineno
        self._locator = Beside(path, self._lineno)
        name = f"{path.stem}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, getattr(sys, "abiflags", ""))


class Kept(FunctionCache):
    """The compiled code of one function, on disk."""

    _impl_class = Form

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled."""
        LOG.info("kernel %s was compiled, and is kept in %s", self._name, self._cache_path)
        super().save_overload(sig, data)


def kept(function: Any) -> Kept:
    """The cache of one function, whose files are ours."""
    found: Any = Kept(function)
    found._cache_file = Files(
        found._cache_path, found._impl.filename_base, found._impl.locator.get_source_stamp()
    )
    return found


def njit(signature: str | None = None, *, cache: bool = False, **options: Any) -> Callable[[Any], Any]:
    """As `numba.njit`."""

    def decorated(function: Any) -> Any:
        made: Any = numba.njit(**options)(function)
        if cache:
            made._cache = kept(function)
        if signature is not None:
            made.compile(signature)
            made.disable_compile()
        return made

    return decorated


def cfunc(signature: str, *, cache: bool = False, **options: Any) -> Callable[[Any], Any]:
    """As `numba.cfunc`."""

    def decorated(function: Any) -> Any:
        made: Any = CFunc(function, sigutils.normalize_signature(signature), {}, options)
        if cache:
            made._cache = kept(function)
        made.compile()
        return made

    return decorated
