"""Where do generated kernels live? In importable files in the user's private cache directory.

Numba's disk cache needs a real file beside which it keeps the compiled code. Loading that code executes it,
so the directory and all in it must belong to this user and be writable by nobody else; else kernels are
compiled in memory.
"""

import hashlib
import importlib.util
import linecache
import os
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

from optimisers.errors import CacheRefused

PREFIX = "optimisers_kernels_"

_loaded: dict[str, ModuleType] = {}


def directory() -> Path:
    """The cache directory of this user."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("optimisers", appauthor=False)) / "kernels"


def load(source: str, where: Path | None = None) -> ModuleType:
    """The module of this source text, compiled code included if it was compiled before.

    The file is named by a hash of its text and holds exactly that text, or it is written again.
    """
    name = PREFIX + hashlib.sha256(source.encode()).hexdigest()[:24]
    if name not in _loaded:
        _loaded[name] = _from_disk(name, source, directory() if where is None else where)
    return _loaded[name]


def _from_disk(name: str, source: str, where: Path) -> ModuleType:
    try:
        refusal = prepared(where)
        path = where / f"{name}.py"
        if refusal is None:
            if not path.exists() or path.read_text() != source:
                _write(path, source)
            refusal = untrusted(path) or untrusted(where / "__pycache__") or _untrusted_below(where, name)
    except OSError as error:
        refusal = str(error)
        path = where
    if refusal is not None:
        warnings.warn(f"{refusal}; kernels are compiled anew in each process", CacheRefused, stacklevel=2)
        return _in_memory(name, source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Numba's cache finds the module of a kernel by name
    code = compile(source, str(path), "exec")  # the text in hand, whatever has happened to the file since
    exec(code, vars(module))  # noqa: S102 generated above, by this package
    return module


def _in_memory(name: str, source: str) -> ModuleType:
    module = ModuleType(name)
    module.__file__ = f"<{name}>"
    sys.modules[name] = module
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
    exec(compile(source.replace("cache=True", "cache=False"), module.__file__, "exec"), vars(module))  # noqa: S102 generated above, by this package
    return module


def _write(path: Path, source: str) -> None:
    """Write whole or not at all, for other processes may be reading."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(source)
    Path(temporary).replace(path)


# -- whom to trust -------------------------------------------------------------------------------------------


def prepared(where: Path) -> str | None:
    """Make the directory, for this user alone; a sentence that says why not, if it cannot be trusted."""
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    refusal = untrusted(where)
    if refusal is None and stat.S_IMODE(where.stat().st_mode) != 0o700:
        where.chmod(0o700)
    return refusal


def untrusted(path: Path) -> str | None:
    """Why nothing should be executed from `path`; None if it may, or is not there."""
    if os.name != "posix":
        return None
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link; the kernel cache takes only what this user wrote"
    if found.st_uid != os.getuid():
        return f"{path} belongs to user {found.st_uid}; the kernel cache takes only what this user wrote"
    if found.st_mode & 0o022:
        return (
            f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):o}); write chmod go-w {path}"
        )
    return None


def _untrusted_below(where: Path, name: str) -> str | None:
    """The same for the compiled files of one module."""
    compiled = where / "__pycache__"
    for path in compiled.glob(f"{name}*") if compiled.is_dir() else ():
        if (refusal := untrusted(path)) is not None:
            return refusal
    return None
