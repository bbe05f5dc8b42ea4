"""Large arrays of the CPU on pages of two megabytes, where Linux gives them to those who ask.

NumPy asks for its own, PyTorch does not. A step reads and writes every page of parameters and state: of small
pages there are more than the processor remembers addresses of, and how far apart they lie is luck.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any

LARGE = 1 << 22
"""Bytes from which it is worth a call; NumPy has the same bound."""


@functools.cache
def _advise() -> Callable[..., Any] | None:
    """The function of the system; None where it has no such pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


def on_large_pages(address: int, nbytes: int) -> None:
    """Ask for large pages for memory that was not touched yet; the system may refuse."""
    if nbytes < LARGE or (advise := _advise()) is None:
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    advise(start, end - start, mmap.MADV_HUGEPAGE)
