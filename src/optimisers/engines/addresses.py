"""Where do a thousand NumPy arrays lie, and are they laid out as expected? Asked anew at every step, in
microseconds.

Addresses are never kept: arrays are replaced, resized and freed behind one's back. Reading the address of one
array in Python costs a microsecond, as much as stepping it; so a compiled function reads them from the array
objects (their layout is part of NumPy's stable C interface: `PyArrayObject_fields` in `ndarraytypes.h`; that
of lists and tuples, of CPython's). Whether that works is tried once in every process; where it does not,
Python asks each array.
"""

import functools
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from optimisers.arrays.pack import Indices
from optimisers.engines import cache

CHUNK = 1 << 16
"""Elements of one chunk: large enough that its set-up costs nothing, small enough to share out."""

SPAN = 1 << 14
"""Elements that a thread claims at least: several small leaves at once."""


class Chunks:
    """The chunk table for leaves of these sizes, and the spans of chunks that threads claim."""

    def __init__(self, sizes: Indices) -> None:
        pieces = -(-sizes // CHUNK)
        leaf = np.repeat(np.arange(len(sizes)), pieces)
        first = (np.arange(len(leaf)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * CHUNK
        length = np.minimum(CHUNK, sizes[leaf] - first)
        self.leaf: Indices = leaf
        self.table: Indices = np.stack([leaf, first, length], axis=1).astype(np.int64)
        self.elements = int(sizes.sum())
        group = (np.cumsum(length) - length) // SPAN
        self.spans: Indices = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(leaf)).astype(
            np.int64
        )


class Scratch(threading.local):
    """Small tables that every step needs again; each thread has its own."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array to be filled; the one of the last call by this name, if it has this shape."""
        found = self.arrays.get(name)
        if found is None or found.shape != shape:
            found = self.arrays[name] = np.empty(shape, dtype)
        return found


class Form:
    """Shapes and strides of a list of arrays, as tables for the compiled look."""

    def __init__(
        self, shapes: list[tuple[int, ...]], strides: list[tuple[int, ...]], contiguous: list[bool]
    ) -> None:
        self.shapes, self.strides, self.flat = shapes, strides, contiguous
        self.contiguous = np.array(contiguous, np.int64)
        self.begin = np.concatenate([[0], np.cumsum([len(s) for s in shapes])]).astype(np.int64)
        self.shape = np.array([n for s in shapes for n in s], np.int64)
        self.stride = np.array([n for s in strides for n in s], np.int64)

    def addresses(
        self, arrays: Sequence[Any], dtype: "np.dtype[Any]", at: Indices, misfit: Indices, *, write: bool
    ) -> tuple[Indices, Indices]:
        """(the address of each array, the numbers of those that are not as expected: their address means
        nothing).
        """
        look = compiled_look()
        if look is None or type(arrays) not in (list, tuple):
            return self.asked(arrays, dtype, write=write)
        count = look(
            _items(arrays),
            id(np.ndarray),
            id(dtype),
            dtype.itemsize,
            0x500 if write else 0x100,
            self.contiguous,
            self.begin,
            self.shape,
            self.stride,
            at,
            misfit,
        )
        return at, misfit[:count]

    def asked(self, arrays: Sequence[Any], dtype: "np.dtype[Any]", *, write: bool) -> tuple[Indices, Indices]:
        """The same, asking every array in Python."""
        at = np.array([a.__array_interface__["data"][0] for a in arrays], np.int64)
        fits = [self.fits(i, a, dtype, write=write) for i, a in enumerate(arrays)]
        return at, np.flatnonzero(~np.array(fits, bool))

    def fits(self, i: int, a: Any, dtype: "np.dtype[Any]", *, write: bool) -> bool:
        laid = a.flags.c_contiguous if self.contiguous[i] else False
        strides = tuple(s * dtype.itemsize for s in self.strides[i])
        return (
            type(a) is np.ndarray
            and a.dtype == dtype
            and a.dtype.isnative
            and a.shape == self.shapes[i]
            and (laid or a.strides == strides)
            and a.flags.aligned
            and (a.flags.writeable or not write)
        )


LOOK = '''"""Reads the addresses of arrays from their objects, and counts those not laid out as expected."""
from numba import njit

from optimisers.engines.support import peek32, peek64


@njit("i8(i8, i8, i8, i8, i8, i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1])",
      error_model="numpy", cache=True)
def look(items, array_type, dtype, itemsize, flags, contiguous, begin, shape, stride, at, misfit):
    count = 0
    for k in range(at.size):
        array = peek64(items + 8 * k)
        fits = peek64(array + 8) == array_type
        if fits:
            ndim = begin[k + 1] - begin[k]
            found = peek32(array + 64)
            fits = peek32(array + 24) == ndim and peek64(array + 56) == dtype and (found & flags) == flags
            if fits:
                laid = contiguous[k] == 1 and (found & 1) == 1
                for d in range(ndim):
                    fits = fits and peek64(peek64(array + 32) + 8 * d) == shape[begin[k] + d]
                    step = itemsize * stride[begin[k] + d]
                    fits = fits and (laid or peek64(peek64(array + 40) + 8 * d) == step)
            at[k] = peek64(array + 16)
        if not fits:
            misfit[count] = k
            count += 1
    return count
'''


def _items(arrays: Sequence[Any]) -> int:
    """The address of the first reference in a list or tuple."""
    import ctypes

    inline = id(arrays) + 24
    return inline if type(arrays) is tuple else ctypes.c_int64.from_address(inline).value


@functools.cache
def compiled_look() -> Any:
    """The compiled look, if it agrees with Python on a handful of arrays; else None."""
    if (
        sys.implementation.name != "cpython"
        or sys.maxsize != 2**63 - 1
        or not getattr(sys, "_is_gil_enabled", lambda: True)()
    ):
        return None
    look = cache.load(LOOK).look
    single = np.dtype(np.float32)
    arrays = [
        np.zeros((2, 3), np.float32),
        np.zeros((3, 2), np.float32).T,
        np.zeros((2, 3)),
        np.zeros((4, 3), np.float32)[::2],
        np.zeros((3, 3), np.float32),
        np.zeros((), np.float32),
        np.zeros((1, 3), np.float32),
    ]
    shapes = [(2, 3)] * 5 + [(), (1, 3)]
    strides = [(3, 1)] * 5 + [(), (3, 1)]
    arrays[4].flags.writeable = False
    form = Form(shapes, strides, [True] * 7)
    for given in (arrays, tuple(arrays)):
        at, misfit = np.empty(7, np.int64), np.empty(7, np.int64)
        count = look(
            _items(given),
            id(np.ndarray),
            id(single),
            4,
            0x500,
            form.contiguous,
            form.begin,
            form.shape,
            form.stride,
            at,
            misfit,
        )
        expected_at, expected = form.asked(given, single, write=True)
        if not np.array_equal(at, expected_at) or not np.array_equal(misfit[:count], expected):
            return None
    return look
