"""Where do a thousand arrays lie, laid out as expected? Asked anew at every step, in microseconds.

Addresses are never kept: arrays are replaced, resized and freed behind one's back. Reading the address of one
array in Python costs a microsecond, as much as stepping it; so a compiled function reads them from the array
objects. The layout of NumPy's is part of its stable C interface (`PyArrayObject_fields` in `ndarraytypes.h`),
that of lists and tuples of CPython's. PyTorch promises none; where its tensors keep what is looked for is
found out by looking at a few whose contents are known. Whether all that works is tried once in every process;
where it does not, Python asks each array.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.engines import cache
from optimisers.state.buffers import Indices

CHUNK = 1 << 16
"""Elements of one chunk: large enough that its set-up costs nothing, small enough to share out."""

SPAN = 1 << 14
"""Elements that a thread claims at least: several small leaves at once."""


class Chunks:
    """The chunk table for leaves of these sizes, and the spans of chunks that threads claim."""

    def __init__(self, sizes: Indices, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        pieces = -(-sizes // chunk)
        leaf = np.repeat(np.arange(len(sizes)), pieces)
        first = (np.arange(len(leaf)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * chunk
        length = np.minimum(chunk, sizes[leaf] - first)
        self.leaf: Indices = leaf
        self.table: Indices = np.stack([leaf, first, length], axis=1).astype(np.int64)
        self.begin: Indices = np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64)
        """Of each leaf: its first chunk; then how many there are."""
        self.elements = int(sizes.sum())
        self.placed: dict[Any, Any] = {}
        """What engines have made of these tables elsewhere."""
        group = (np.cumsum(length) - length) // SPAN
        self.spans: Indices = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(leaf)).astype(
            np.int64
        )


class Scratch(threading.local):
    """Small tables that every step needs again; each thread has its own."""

    def __init__(self) -> None:
        self.arrays: dict[Any, Any] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array to be filled; the one of the last call by this name, if it has this shape."""
        found = self.arrays.get(name)
        if found is None or found.shape != shape:
            found = self.arrays[name] = np.empty(shape, dtype)
        return found

    def kept(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` made when this was first asked for."""
        if name not in self.arrays:
            self.arrays[name] = make()
        return self.arrays[name]


class Form:
    """Shapes and strides of a list of arrays of one library, as tables for the compiled look."""

    def __init__(
        self,
        library: str,
        device: str,
        shapes: list[tuple[int, ...]],
        strides: list[tuple[int, ...]],
        contiguous: list[bool],
    ) -> None:
        self.library, self.device = library, device
        self.shapes, self.strides, self.flat = shapes, strides, contiguous
        self.contiguous = np.array(contiguous, np.int64)
        self.begin = np.concatenate([[0], np.cumsum([len(s) for s in shapes])]).astype(np.int64)
        self.shape = np.array([n for s in shapes for n in s], np.int64)
        self.stride = np.array([n for s in strides for n in s], np.int64)

    def addresses(
        self, arrays: Sequence[Any], dtype: Any, at: Indices, misfit: Indices, *, write: bool
    ) -> tuple[Indices, Indices]:
        """(the address of each array, the numbers of those that are not as expected: their address means
        nothing).
        """
        look = LOOKS[self.library](self.device) if self.library in LOOKS else None
        if look is None or type(arrays) not in (list, tuple):
            return self.asked(arrays, dtype, write=write)
        count = look(self, _items(arrays), dtype, at, misfit, write=write)
        return at, misfit[:count]

    def asked(self, arrays: Sequence[Any], dtype: Any, *, write: bool) -> tuple[Indices, Indices]:
        """The same, asking every array in Python."""
        library = registry.named(self.library)
        fits = [self.fits(i, a, dtype, write=write) for i, a in enumerate(arrays)]
        at = np.array(
            [library.address(a) if fit else 0 for a, fit in zip(arrays, fits, strict=True)], np.int64
        )
        return at, np.flatnonzero(~np.array(fits, bool))

    def fits(self, i: int, a: Any, dtype: Any, *, write: bool) -> bool:
        library = registry.named(self.library)
        if registry.library_of(type(a)) is not library or not library.is_dense_memory(
            a, self.device, write=write
        ):
            return False
        shape, strides = library.layout(a)
        wanted = tuple(s * dtype.itemsize for s in self.strides[i])
        return (
            a.dtype == dtype
            and shape == self.shapes[i]
            and (strides == wanted or (self.flat[i] and library.is_contiguous(a)))
        )


LOOK = '''"""Reads the addresses of arrays from their objects, and counts those not laid out as expected."""
from numba import njit

from optimisers.engines.cpu.intrinsics import peek32, peek64


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
    inline = id(arrays) + 24
    return inline if type(arrays) is tuple else ctypes.c_int64.from_address(inline).value


def _looks_work() -> bool:
    """Whether objects lie in memory as CPython has them."""
    return (
        sys.implementation.name == "cpython"
        and sys.maxsize == 2**63 - 1
        and getattr(sys, "_is_gil_enabled", lambda: True)()
    )


def _agrees(look: Any, form: Form, arrays: list[Any], dtype: Any) -> bool:
    """Whether a compiled look says of some arrays what Python says."""
    for given in (arrays, tuple(arrays)):
        at, misfit = np.empty(len(given), np.int64), np.empty(len(given), np.int64)
        misfits = misfit[: look(form, _items(given), dtype, at, misfit, write=True)]
        expected_at, expected = form.asked(given, dtype, write=True)
        fitting = np.setdiff1d(np.arange(len(given)), expected)
        if not np.array_equal(misfits, expected) or not np.array_equal(at[fitting], expected_at[fitting]):
            return False
    return True


@functools.cache
def look_at_numpy(device: str) -> Any:
    """The compiled look at arrays of NumPy, if it agrees with Python on a handful; else None."""
    if not _looks_work():
        return None
    compiled = cache.load(LOOK).look

    def look(form: Form, items: int, dtype: Any, at: Indices, misfit: Indices, *, write: bool) -> int:
        return compiled(
            items,
            id(np.ndarray),
            id(dtype),
            dtype.itemsize,
            0x500 if write else 0x100,
            form.contiguous,
            form.begin,
            form.shape,
            form.stride,
            at,
            misfit,
        )

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
    form = Form("numpy", device, shapes, strides, [True] * 7)
    return look if _agrees(look, form, arrays, np.dtype(np.float32)) else None


# -- tensors -------------------------------------------------------------------------------------------------

LOOK_TORCH = '''"""Reads the addresses of tensors from their objects; counts those not as expected."""
from numba import njit

from optimisers.engines.cpu.intrinsics import peek32, peek64


@njit("i8(i8, i8[::1], i8, i8, i8[::1], i8[::1], i8[::1], i8[::1], i8[::1])",
      error_model="numpy", cache=True)
def look(items, where, dtype, itemsize, begin, shape, stride, at, misfit):
    count = 0
    for k in range(at.size):
        tensor = peek64(items + 8 * k)
        kind = peek64(tensor + 8)
        fits = kind == where[0] or kind == where[1]
        if fits:
            impl = peek64(tensor + where[2])
            ndim = begin[k + 1] - begin[k]
            fits = (peek64(impl + where[3]) == where[4] and (peek32(impl + where[5]) & where[12]) == dtype
                    and peek64(impl + where[6]) == ndim)
            if fits:
                sizes, strides = impl + where[7], impl + where[8]
                if ndim > 5:
                    sizes = peek64(sizes)
                    strides = sizes + 8 * ndim
                for d in range(ndim):
                    n = shape[begin[k] + d]
                    fits = fits and peek64(sizes + 8 * d) == n
                    fits = fits and (n == 1 or peek64(strides + 8 * d) == stride[begin[k] + d])
            if fits:
                at[k] = peek64(peek64(impl + where[9]) + where[10]) + itemsize * peek64(impl + where[11])
                fits = at[k] % itemsize == 0
        if not fits:
            misfit[count] = k
            count += 1
    return count
'''


@functools.cache
def look_at_torch(device: str) -> Any:
    """The compiled look at plain tensors on a device, if it agrees with Python on a handful; else None."""
    import torch

    if not _looks_work() or (where := _inside_tensors(torch, device)) is None:
        return None
    compiled = cache.load(LOOK_TORCH).look
    table, codes = where

    def look(form: Form, items: int, dtype: Any, at: Indices, misfit: Indices, **_: bool) -> int:
        return compiled(
            items,
            table,
            codes[dtype],
            dtype.itemsize,
            form.begin,
            form.shape,
            form.stride,
            at,
            misfit,
        )

    zeros = functools.partial(torch.zeros, device=device)
    deep = zeros(1, 2, 1, 3, 1, 2, 2)
    arrays = [
        zeros(2, 3),
        torch.nn.Parameter(zeros(2, 3)),
        zeros(3, 2).T,
        zeros(2, 3, dtype=torch.float64),
        zeros(4, 3)[::2],
        zeros(4, 3)[1:3],
        zeros(3, 3),
        zeros(()),
        zeros(5)[3],
        deep,
        zeros(2, 3, dtype=torch.complex64).imag,
        zeros(2, 3).to_sparse(),
        *(torch.zeros(2, 3, device=other) for other in ("cpu", "meta") if other != device),
    ]
    shapes = [(2, 3)] * 7 + [(), (), tuple(deep.shape)] + [(2, 3)] * (len(arrays) - 10)
    strides = [(3, 1)] * 7 + [(), (), deep.stride()] + [(3, 1)] * (len(arrays) - 10)
    form = Form("torch", device, shapes, strides, [True] * len(arrays))
    return look if _agrees(look, form, arrays, torch.float32) else None


def _inside_tensors(torch: Any, device: str) -> Any:
    """(where a plain tensor keeps what, the code of every element type): found by looking at tensors whose
    contents are known; None if something is not where it could be expected.
    """
    zeros = functools.partial(torch.zeros, device=device)
    base = zeros(4000)
    whole = 0xFFFF if device == "cpu" else 0xFFFFFFFF  # behind the type stands the device
    probe = base.as_strided((3, 5, 7), (701, 103, 2), 13)
    other = zeros((3, 5, 7), dtype=torch.float64)

    def words(at: int, count: int) -> list[int]:
        return list((ctypes.c_int64 * count).from_address(at))

    def first(found: list[int], wanted: list[int]) -> int:
        """Where in the words these stand, in bytes."""
        return 8 * next(i for i in range(len(found)) if found[i : i + len(wanted)] == wanted)

    try:
        impl = words(probe._cdata, 26)
        storage = probe.untyped_storage()
        of_sizes = first(impl, [3, 3, 5, 7])
        sparse = words(zeros(2, 3).to_sparse()._cdata, 26)
        plain = words(zeros(2, 3)._cdata, 26)
        double = words(other._cdata, 26)
        of_offset = first(impl, [13, 105])  # the offset, then how many elements there are
        of_type = next(
            8 * i
            for i in range(of_offset // 8, 26)
            if (impl[i] ^ plain[i]) & 0xFFFF == 0 and (impl[i] ^ double[i]) & 0xFFFF == 6 ^ 7
        )
        of_keys = next(
            8 * i
            for i in range(of_type // 8 + 1, 26)
            if impl[i] == plain[i] == double[i] and impl[i] != sparse[i] and impl[i] > 0
        )
        codes: dict[Any, int] = {}
        for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "int16"):
            dtype = getattr(torch, name)
            codes[dtype] = words(zeros(1, dtype=dtype)._cdata, 26)[of_type // 8] & whole
        table = [
            id(torch.Tensor),
            id(torch.nn.Parameter),
            first(words(id(probe), 6), [probe._cdata]),
            of_keys,
            plain[of_keys // 8],
            of_type,
            of_sizes,
            of_sizes + 8,
            first(impl, [701, 103, 2]),
            first(impl, [storage._cdata]),
            first(words(storage._cdata, 8), [storage.data_ptr()]),
            of_offset,
            whole,
        ]
    except (StopIteration, AttributeError, RuntimeError):
        return None
    return np.array(table, np.int64), codes


LOOKS = {"numpy": look_at_numpy, "torch": look_at_torch}
"""The compiled look at the arrays of each library that has one."""
