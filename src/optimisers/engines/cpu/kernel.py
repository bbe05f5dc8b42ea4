"""What is a compiled kernel? Object code beside its text, and how it is called."""

import ast
import functools
import hashlib
import linecache
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from optimisers.engines import cache
from optimisers.engines.cpu import machine
from optimisers.engines.cpu.compiler import Compiler, Unknown
from optimisers.engines.trust import Untrusted, untrusted

LOG = logging.getLogger("optimisers")

LAUNCH = '''"""Calls a compiled kernel with its tables."""
from numba import njit

from optimisers.engines.cpu.intrinsics import address_of, run


@njit("void(i8, i8, i8[::1], i8[:,::1], i8[:,::1], f8[:,::1], i8[::1], f8[:,::1])",
      nogil=True, error_model="numpy", cache=True)
def launch(kernel, counter, spans, chunks, addresses, table, row, partial):
    run(kernel, counter, address_of(spans), spans.size, address_of(chunks), address_of(addresses),
        addresses.shape[1], address_of(table), table.shape[1], address_of(row), address_of(partial),
        partial.shape[1])
'''
"""What calls every kernel, without the lock of Python."""


@final
class Kernel:
    """A compiled kernel. Its code lives as long as it does."""

    def __init__(self, data: bytes) -> None:
        self.code = machine.Code(data, "kernel")
        self.address = self.code.address
        self.run: Callable[..., None] = functools.partial(cache.lasting(LAUNCH).launch, self.address)
        """Works on spans until none is left: (address of the number of the next span, spans, chunks,
        addresses, table, row, partial sums, an empty array where there are none).
        """


def compiled(*flags: str, kept: bool = False, wide: int = 0) -> Callable[[Any], Kernel]:
    """Compile a kernel, the last function of its file. `flags`: what LLVM may do with its arithmetic;
    `kept`: keep its code beside the file; `wide`: fill the widest vectors with numbers of so many bytes.
    """

    def decorated(function: Any) -> Kernel:
        path = Path(function.__code__.co_filename)
        place = path.parent / "__pycache__" / f"{path.stem}.{machine.edition()}.o" if kept else None
        data = None if place is None else read(place)
        if data is None:
            data = code_of(function, set(flags), machine.vector() // wide if wide else 0)
            if place is not None:
                keep(place, data)
                LOG.info("kernel %s was compiled, and is kept in %s", path.stem, place.parent)
        return Kernel(data)

    return decorated


def code_of(function: Any, flags: set[str], lanes: int = 0) -> bytes:
    """The object code of a function, from the text that it was made of (see `Compiler`)."""
    lines = linecache.getlines(function.__code__.co_filename)
    (tree,) = ast.parse("".join(lines[function.__code__.co_firstlineno - 1 :])).body
    if not isinstance(tree, ast.FunctionDef):
        raise Unknown(ast.unparse(tree))
    return machine.object_code(Compiler(tree, function.__globals__, flags, lanes).module)


def read(path: Path) -> bytes | None:
    """The code that is kept in a file; None if it is not there. Raises ValueError where it is broken."""
    if (refusal := untrusted(path)) is not None:
        raise Untrusted(refusal)
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, data = found[:DIGEST], found[DIGEST:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{path} is not what was written")
    return data


def keep(path: Path, data: bytes) -> None:
    """Write code where `read` looks for it."""
    cache.write(path, hashlib.sha256(data).digest() + data)


DIGEST = 32
"""Bytes that the hash of kept code takes before it."""
