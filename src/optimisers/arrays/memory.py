"""Which arrays share memory? Said with the address and the layout that their library answers."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from optimisers.arrays.layout import axes_in_memory, is_contiguous, permutation
from optimisers.arrays.protocol import Array, DType, HostArray, Library
from optimisers.arrays.registry import library, library_of


def memory_of(x: Array) -> tuple[object, ...]:
    """What is equal for an array and its transposed views; the object itself where it is no plain memory."""
    own = library(x)
    if own.is_opaque(x):
        return ("object", id(x))
    return (
        own.name,
        own.device(x),
        own.memory.address(x),
        x.dtype.itemsize,
        axes_in_memory(*own.memory.layout(x)),
    )


def bounds(x: Array) -> tuple[int, int]:
    """The first address of the elements, and the first behind them; (0, 0) where it is no plain memory."""
    own = library(x)
    if own.is_opaque(x):
        return 0, 0
    start, (shape, strides) = own.memory.address(x), own.memory.layout(x)
    if is_contiguous(shape, strides, x.dtype.itemsize):
        return start, start + math.prod(shape) * x.dtype.itemsize
    if 0 in shape:
        return start, start
    reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    last = sum(r for r in reach if r > 0)
    return start + sum(reach) - last, start + last + x.dtype.itemsize


class _Lent:
    """Memory of an array, to an array of NumPy, which keeps it alive."""

    def __init__(self, x: Array, interface: dict[str, object]) -> None:
        self.x, self.__array_interface__ = x, interface


def on_host(x: Array) -> HostArray | None:
    """The elements where they lie, as an array of NumPy that writes into `x`; bfloat16 as its bits. None
    where they are not in plain memory of the host.
    """
    own = library(x)
    kind = own.type_name(x.dtype).replace("bfloat16", "uint16")
    if own.is_opaque(x) or own.device(x) != "cpu" or kind not in np.sctypeDict:
        return None
    shape, strides = own.memory.layout(x)
    if 0 in shape:
        return np.empty(shape, kind)
    where: dict[str, object] = {"data": (own.memory.address(x), False), "typestr": np.dtype(kind).str}
    return np.asarray(_Lent(x, where | {"shape": shape, "strides": strides, "version": 3}))


def shares(x: object, others: Sequence[Any]) -> bool:
    """Whether a value may lie in the memory of one of some arrays; a number does not."""
    if isinstance(x, np.ndarray):
        return any(np.may_share_memory(x, other) for other in others)  # ten times as fast as by its address
    own = library_of(type(x))
    if own is None or own.is_opaque(cast("Array", x)):
        return any(x is other for other in others)
    low, high = bounds(cast("Array", x))
    return any(a < high and low < b for a, b in map(bounds, others))


def laid_out(own: Library, x: Any, dtype: DType, strides: tuple[int, ...] | None, device: str) -> Array:
    """A copy of an array or a number in this type with these dense strides (in elements); None for contiguous
    ones.
    """
    new = own.memory.fresh(tuple(np.shape(x)), dtype, strides, device)
    own.assign(new, x)
    return new


def axes_between(first: Array, other: Array) -> tuple[int, ...] | None:
    """The permutation of the axes of `first` that lays it out like `other`, for two views of one memory; None
    if they are equal.
    """
    own = library(first)
    return None if first is other else permutation(*own.memory.layout(first), *own.memory.layout(other))


def same_array(a: Array, b: Array) -> bool:
    """Whether two arrays are one: views of the same elements in the same order, or where arrays cannot be
    written the same numbers.
    """
    if library(a).immutable:
        return library(a).holds_same(a, b)
    return memory_of(a) == memory_of(b) and a.shape == b.shape and axes_between(a, b) is None
