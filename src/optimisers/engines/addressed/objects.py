"""Addresses of arrays, read from the objects of NumPy, PyTorch and CPython where these keep them.

The fastest road, and one that no library promises: it is taken with the versions that it was tested with and
tried on a handful of arrays in every process. OPTIMISERS_RAW_READS=0 switches it off, 1 takes it with any
version. The layout of NumPy's arrays is part of its stable C interface (`PyArrayObject_fields` in
`ndarraytypes.h`), that of lists and tuples of CPython's. PyTorch promises none; where its tensors keep what
is looked for is found out by looking at a few whose contents are known.
"""

import ctypes
import functools
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from optimisers.engines import cache
from optimisers.state.buffers import Indices

SWITCH = "OPTIMISERS_RAW_READS"

TESTED = {"python": r"3\.1[123]\.", "numpy": r"2\.", "torch": r"2\.1[34]\."}
"""Versions whose objects were looked into, as patterns of their beginnings."""


class Tables(Protocol):
    """Shapes and strides of a list of arrays."""

    contiguous: Indices
    begin: Indices
    shape: Indices
    stride: Indices


Look = Callable[..., int]
"""(tables, address of the first reference, element type, addresses to fill in, misfits to fill in, write=) ->
how many do not fit.
"""


@functools.cache
def switch() -> str | None:
    """What the environment says, read once."""
    return os.environ.get(SWITCH)


def refusal(library: str) -> str | None:
    """Why objects of a library are not looked into; None if they may be."""
    if switch() == "0":
        return f"{SWITCH}=0"
    if sys.implementation.name != "cpython" or sys.maxsize != 2**63 - 1:
        return "another Python than CPython of 64 bits"
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "a Python without its lock"
    if reason := cache.switched_off():
        return reason
    return untested(library) if switch() != "1" else None


def untested(library: str) -> str | None:
    """The version that was not looked into; None if all were."""
    for name in ("python", library):
        found = sys.version.split()[0] if name == "python" else importlib.metadata.version(name)
        if re.match(TESTED[name], found) is None:
            return f"{name} {found} is not a tested version; {SWITCH}=1 tries it"
    return None


def first_item(arrays: Sequence[object]) -> int:
    """The address of the first reference in a list or tuple."""
    inline = id(arrays) + ITEMS
    return inline if type(arrays) is tuple else ctypes.c_int64.from_address(inline).value


ITEMS = 24
"""Where a tuple has its first reference, and a list the address of its first (`ob_item`)."""

# -- arrays of NumPy -----------------------------------------------------------------------------------------

ALIGNED, WRITEABLE = 0x100, 0x400

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


def numpy_look(_device: str) -> Look:
    """The compiled look at arrays of NumPy."""
    compiled = cache.lasting(LOOK).look

    def look(form: Tables, items: int, dtype: Any, at: Indices, misfit: Indices, *, write: bool) -> int:
        flags = ALIGNED | WRITEABLE if write else ALIGNED
        tables = form.contiguous, form.begin, form.shape, form.stride
        return compiled(items, id(np.ndarray), id(dtype), dtype.itemsize, flags, *tables, at, misfit)

    return look


# -- tensors -------------------------------------------------------------------------------------------------

FIELDS = """
TENSOR, PARAMETER = 0, 1  # two types
IMPL = 2  # where in a tensor's object its implementation stands; in that:
KEYS, PLAIN = 3, 4  # where its dispatch keys are; those of a plain tensor
TYPE, WHOLE = 5, 12  # where its element type is; which bits of that word are the type
NDIM, SHAPE, STRIDES, OFFSET, STORAGE = 6, 7, 8, 11, 9
DATA, BYTES = 10, 13  # in the storage: where its elements lie, how many bytes it has
"""
"""What stands where in the table of a device."""

LOOK_TORCH = (
    '''"""Reads the addresses of tensors from their objects; counts those not as expected."""
from numba import njit

from optimisers.engines.cpu.intrinsics import peek32, peek64
'''
    + FIELDS
    + """

@njit("i8(i8, i8[::1], i8, i8, i8[::1], i8[::1], i8[::1], i8[::1], i8[::1])",
      error_model="numpy", cache=True)
def look(items, where, dtype, itemsize, begin, shape, stride, at, misfit):
    count = 0
    for k in range(at.size):
        tensor = peek64(items + 8 * k)
        kind = peek64(tensor + 8)
        fits = kind == where[TENSOR] or kind == where[PARAMETER]
        if fits:
            impl = peek64(tensor + where[IMPL])
            ndim = begin[k + 1] - begin[k]
            fits = peek64(impl + where[KEYS]) == where[PLAIN] and peek64(impl + where[NDIM]) == ndim
            fits = fits and (peek32(impl + where[TYPE]) & where[WHOLE]) == dtype
            if fits:
                sizes, strides = impl + where[SHAPE], impl + where[STRIDES]
                if ndim > 5:
                    sizes = peek64(sizes)
                    strides = sizes + 8 * ndim
                last = peek64(impl + where[OFFSET])
                for d in range(ndim):
                    n = shape[begin[k] + d]
                    last = -1 if n == 0 or last < 0 else last + (n - 1) * stride[begin[k] + d]
                    fits = fits and peek64(sizes + 8 * d) == n
                    fits = fits and (n == 1 or peek64(strides + 8 * d) == stride[begin[k] + d])
            if fits:
                storage = peek64(impl + where[STORAGE])
                at[k] = peek64(storage + where[DATA]) + itemsize * peek64(impl + where[OFFSET])
                fits = at[k] % itemsize == 0 and itemsize * (last + 1) <= peek64(storage + where[BYTES])
        if not fits:
            misfit[count] = k
            count += 1
    return count
"""
)


def torch_look(device: str) -> Look | None:
    """The compiled look at plain tensors on a device; None where tensors keep things elsewhere."""
    import torch

    if (where := _inside_tensors(torch, device)) is None:
        return None
    compiled = cache.lasting(LOOK_TORCH).look
    table, codes = where

    def look(form: Tables, items: int, dtype: Any, at: Indices, misfit: Indices, **_: bool) -> int:
        tables = form.begin, form.shape, form.stride
        return compiled(items, table, codes[dtype], dtype.itemsize, *tables, at, misfit)

    return look


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
            first(words(storage._cdata, 12), [storage.nbytes()]),
        ]
    except (StopIteration, AttributeError, RuntimeError):
        return None
    return np.array(table, np.int64), codes
