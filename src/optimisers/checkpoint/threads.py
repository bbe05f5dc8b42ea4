"""How are large files read: by several threads, each from a place of its own. The checksums of runs of bytes
are joined into that of all.
"""

import functools
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import TypeVar

from optimisers.engines.cpu.limits import get_num_threads
from optimisers.errors import BadFile

T = TypeVar("T")
R = TypeVar("R")

SHARE = 1 << 24
"""Bytes that are worth a thread."""

CHUNK = 1 << 20
"""Bytes that a thread reads at once where it only looks through them: they stay in its cache."""


def side_by_side(function: Callable[[T], R], items: Sequence[T], size: int) -> list[R]:
    """What a function gives for each item, by as many threads as `size` bytes are worth."""
    threads = min(get_num_threads(), len(items), size // SHARE)
    if threads < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def read_into(file: FileIO, target: memoryview, at: int) -> None:
    """Fill memory with the bytes of a file from a place on; raises BadFile where there are too few."""
    while target.nbytes:
        got = _read_at(file, target, at)
        if not got:
            raise BadFile("it was cut while it was read; read it again")
        target, at = target[got:], at + got


_one_by_one = threading.Lock()


def _read_at(file: FileIO, target: memoryview, at: int) -> int:
    """Read from a place of a file, in any thread; how many bytes there were."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [target], at)
    with _one_by_one:
        file.seek(at)
        return file.readinto(target) or 0


# -- checksums -----------------------------------------------------------------------------------------------

POLYNOMIAL = 0xEDB88320
"""That of CRC-32 without its power of 32, the lowest power in the highest bit."""


def checksum_of(file: FileIO, start: int, end: int, before: int) -> int:
    """The checksum of what has `before`, and of a run of bytes of a file behind it."""
    runs = [(at, min(at + SHARE, end)) for at in range(start, end, SHARE)]
    for (at, stop), own in zip(
        runs, side_by_side(lambda run: _checksum(file, *run), runs, end - start), strict=True
    ):
        before = joined(before, own, stop - at)
    return before


def _checksum(file: FileIO, start: int, end: int) -> int:
    room, found = memoryview(bytearray(min(CHUNK, end - start))), 0
    for at in range(start, end, CHUNK):
        part = room[: end - at]
        read_into(file, part, at)
        found = zlib.crc32(part, found)
    return found


def joined(first: int, second: int, length: int) -> int:
    """The checksum of two runs of bytes, of the checksums of both and the length of the second.

    The first is multiplied by x to the power of the bits that follow it, modulo the polynomial.
    """
    return _product(_power(length), first) ^ second


@functools.lru_cache(1000)
def _power(length: int) -> int:
    """x to the power of the bits of so many bytes."""
    power, square = 1 << 31, 1 << 23  # x**0, x**8
    while length:
        if length & 1:
            power = _product(power, square)
        square = _product(square, square)
        length >>= 1
    return power


def _product(a: int, b: int) -> int:
    """Of two polynomials, modulo that of CRC-32."""
    found = 0
    for power in range(31, -1, -1):
        if a >> power & 1:
            found ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return found
