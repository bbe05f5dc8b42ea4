"""NumPy arrays, including those of the half-precision types of ml_dtypes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import numpylike
from optimisers.arrays.layout import axes_in_memory, contiguous_strides, overlaps_itself, permutation

Array = np.ndarray[Any, np.dtype[Any]]

NAME = "numpy"

HOST_NUMBERS = True
"""Whether the numbers of a state are worked out on the host, as long as nobody follows them."""

REPLACES = False
"""Whether arrays cannot be written, so that a step in place replaces them."""

SORTS = False
"""Whether the library hands dicts on with their keys sorted."""

CAPTURABLE = False
"""Whether the numbers of a state may live on a device, for graphs that are captured."""


# -- what an array is ----------------------------------------------------------------------------------------


def is_array_type(kind: type) -> bool:
    return issubclass(kind, np.ndarray)


def is_inexact(x: Array) -> bool:
    return x.dtype.kind in "fc" or x.dtype.name == "bfloat16"


is_trainable = is_inexact


def is_numbers(x: Array) -> bool:
    return x.dtype.kind in "biufc" or is_inexact(x)


def is_complex(x: Array) -> bool:
    return x.dtype.kind == "c"


def is_writable(x: Array) -> bool:
    """Read-only arrays are not, and neither are those in which two elements share one place (broadcast
    views).
    """
    return x.flags.writeable and not overlaps_itself(x.shape, x.strides)


def is_loose(x: Array) -> bool:
    """No array of NumPy keeps its state elsewhere than in packed buffers."""
    return False


def may_bundle(x: Array) -> bool:
    """Whether state of small arrays may share a vector: only what is whole, on one device."""
    return False


def follows(xs: Sequence[Any], gradients: Sequence[Sequence[Any]], *, inplace: bool) -> bool:
    """Nobody differentiates what NumPy computes."""
    return False


def unready(x: Array) -> str:
    """What must be done before this can be trained; empty if nothing."""
    return ""


def size(x: Array) -> int:
    return x.size


def dtype_name(x: Array) -> str:
    return type_name(x.dtype)


def type_name(dtype: Any) -> str:
    """The name of an element type; byte-swapped ones say so."""
    return dtype.name if dtype.isnative else f"byte-swapped {dtype.name}"


def device(_: Array) -> str:
    return "cpu"


def memory(x: Array) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """(address, bytes per element, sorted (stride, size) of the axes): equal for an array and its transposed
    views.
    """
    return address(x), x.itemsize, axes_in_memory(x.shape, x.strides)


def address(x: Array) -> int:
    """Where the first element lies."""
    return x.__array_interface__["data"][0]


def shares(x: Any, others: list[Array]) -> bool:
    """Whether `x` may lie in the memory of one of the others."""
    return isinstance(x, np.ndarray) and any(np.may_share_memory(x, other) for other in others)


def bounds(x: Array) -> tuple[int, int]:
    """The first address of the elements, and the first behind them."""
    return np.lib.array_utils.byte_bounds(x) if x.size else (address(x), address(x))


def layout(x: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides in bytes)."""
    return x.shape, x.strides


def is_contiguous(x: Array) -> bool:
    return x.flags.c_contiguous


def is_dense_memory(x: Array, where: str, *, write: bool) -> bool:
    """Whether kernels on a device may use the array where it lies, if its layout is the right one."""
    return type(x) is np.ndarray and x.dtype.isnative and x.flags.aligned and (x.flags.writeable or not write)


def same_array(a: Array, b: Array) -> bool:
    """Whether two arrays are views of the same elements in the same order."""
    return memory(a) == memory(b) and a.shape == b.shape and axes_between(a, b) is None


def axes_between(first: Array, other: Array) -> tuple[int, ...] | None:
    """The permutation with `first.transpose(p)` laid out like `other`, for two views of one memory; None if
    equal.
    """
    return permutation(first.shape, first.strides, other.shape, other.strides)


def permuted(x: Array, axes: tuple[int, ...]) -> Array:
    return x.transpose(axes)


# -- making arrays -------------------------------------------------------------------------------------------


def arithmetic(dtype: "np.dtype[Any]") -> "np.dtype[Any]":
    """The type in which the maths is done: that of the parameter, but float32 at least."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype.newbyteorder("=")


def promoted(dtype: "np.dtype[Any]", others: list[str]) -> "np.dtype[Any]":
    """The type to which this one and floating point types of these names promote, real or complex as it
    is.
    """
    wide = np.result_type(dtype, *(np.dtype(n) for n in others if n.startswith(("float", "complex"))))
    return wide if dtype.kind == "c" else real_of(wide)


def real_of(dtype: "np.dtype[Any]") -> "np.dtype[Any]":
    return np.real(np.empty(0, dtype)).dtype


def full_like(x: Array, value: Any, *, real: bool = False, dtype: Any = None) -> Array:
    dtype = arithmetic(x.dtype) if dtype is None else dtype
    dtype = real_of(dtype) if real else dtype
    return np.zeros_like(x, dtype, subok=False) if value == 0 else np.full_like(x, value, dtype, subok=False)


def widened(x: Array) -> Array:
    """A copy in the type of the arithmetic, laid out like `x`."""
    return np.array(x, arithmetic(x.dtype), order="K")


def stand_in(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of this shape and type that takes no memory, to be looked at only."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def scalar_array(value: object) -> Array | None:
    """A NumPy number as a 0-d array; None for anything else: a Python number is no array."""
    return np.asarray(value) if isinstance(value, np.generic) else None


def any_set(x: Array) -> bool:
    """Whether some element is not zero."""
    return bool(x.any())


def zeros(n: int, dtype: Any, device: str) -> Array:
    return np.zeros(n, dtype)


def empty(n: int, dtype: Any, device: str) -> Array:
    return np.empty(n, dtype)


def seen(x: Array, *, read_only: bool) -> Array:
    """A view for somebody to look at, and to write into unless it is read-only."""
    x.flags.writeable = not read_only
    return x


def view(buffer: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """An array of this shape inside a flat buffer; offset and strides in elements."""
    size = buffer.itemsize
    return np.ndarray(shape, buffer.dtype, buffer, offset * size, tuple(s * size for s in strides))


def dense_strides(x: Array) -> tuple[int, ...]:
    """The strides, in elements, of a dense array with the axes of `x` in the same order."""
    if x.flags.c_contiguous:
        return contiguous_strides(x.shape)
    return tuple(s // x.itemsize for s in np.empty_like(x, subok=False).strides)


def copied(x: Array, dtype: Any) -> Array:
    """A copy in this type."""
    return np.array(x, dtype, order="K")


def duplicate(x: Any) -> Any:
    """A copy of an array; anything else as it is."""
    return x.copy() if isinstance(x, np.ndarray) else x


def fresh(shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None, device: str) -> Array:
    """An array not yet written, with these dense strides (in elements); None for contiguous ones."""
    if strides is None:
        return np.empty(shape, dtype)
    axes = sorted(range(len(shape)), key=lambda a: -strides[a])
    return np.empty([shape[a] for a in axes], dtype).transpose(np.argsort(axes))


def laid_out(x: Any, dtype: Any, strides: tuple[int, ...] | None, device: str) -> Array:
    """A copy of `x` in this type with these dense strides (in elements); None for contiguous ones."""
    new = fresh(np.shape(x), dtype, strides, device)
    np.copyto(new, x, casting="unsafe")
    return new


def dense(x: Array) -> Array:
    """The array with every element there."""
    return x


def has_rows(x: Any) -> bool:
    """No array of NumPy holds some rows only."""
    return False


def assign(target: Array, value: Array) -> None:
    """Write `value` into `target`, rounding once to its type."""
    np.copyto(target, value, casting="unsafe")


def flattened(arrays: list[Array]) -> Array:
    """All elements in one new vector, in the type to which those of the arrays promote."""
    return np.concatenate([x.ravel() for x in arrays]) if arrays else np.zeros(0, bool)


def pieces(flat: Array, runs: list[tuple[slice, int, tuple[int, ...], Any]], *, copy: bool) -> list[Array]:
    """The arrays of runs (place, count, shape, type) of a vector; views where they can be and no copy is
    wanted.
    """
    out: list[Array] = []
    if copy and any(flat.dtype == dtype for dtype in {run[3] for run in runs}):
        flat = flat.copy()  # at one stroke; the arrays are views of the copy
    own = flat.dtype
    for place, count, shape, dtype in runs:
        part = flat[place]
        if dtype is not own and dtype != own:
            part = np.real(part) if flat.dtype.kind == "c" and np.dtype(dtype).kind != "c" else part
            part = part.astype(dtype)
        if count == 1:
            out.append(part.reshape(shape))
        elif shape:
            out.extend(part.reshape(count, *shape))
        else:
            out.extend(part[i : i + 1].reshape(()) for i in range(count))
    return out


def stored(x: Array, value: Any, *, inplace: bool) -> Array:
    """`value` rounded to the type of `x`: in `x` itself where that may be written, else in a new array of its
    kind.
    """
    target = x if inplace and is_writable(x) else np.empty_like(x)
    np.copyto(target, value, casting="unsafe")
    return target if target is x else like(x, target)


def rounded(old: Array, value: Any) -> Array:
    """An array of the type and shape of an old one that holds `value`."""
    new = np.empty_like(old)
    np.copyto(new, value, casting="unsafe")
    return new


def like(x: Array, new: Array) -> Array:
    """`new`, read-only if `x` is, and of the subclass of `x`."""
    if type(x) is not np.ndarray and type(new) is np.ndarray:
        new = new.view(type(x))
        new.__array_finalize__(x)
    if not x.flags.writeable:
        new.flags.writeable = False
    return new


def is_part(x: Array) -> bool:
    """Whether this is one device's part of a larger array."""
    return False


def across(op: str, value: Any, x: Array) -> Any:
    """A reduction of a whole array: no part of it lies elsewhere."""
    return value


def touched(arrays: Sequence[Array]) -> None:
    """Nobody wants to know that these were written."""


def cast(x: Any, dtype: Any) -> Any:
    return np.asanyarray(x).astype(dtype, copy=False)


def number(value: Any, dtype: Any) -> Any:
    """A number of the host beside arrays of a type, rounded to theirs."""
    return np.asanyarray(value).astype(dtype)[()]


def to_host(x: Any) -> Any:
    """The value of a 0-d array; numbers as they are."""
    return x


def to_numpy(x: Array) -> Array:
    """The elements as an array of NumPy, for somebody to look at."""
    return x


def broadcast(x: Any, shape: tuple[int, ...]) -> Array:
    """`x` in this shape; raises ValueError if it does not broadcast."""
    return np.broadcast_to(x, shape)


# -- tables of numbers ---------------------------------------------------------------------------------------


def is_fixed(x: Any) -> bool:
    """Whether a number may be read once and for all: nobody follows what becomes of it."""
    return True


def table(rows: Any) -> Array:
    """A table of numbers in float64."""
    return np.array([[float(v) for v in row] for row in rows], np.float64)


def constant(values: Any, beside: Array) -> Any:
    """Numbers of the host beside a table of them."""
    return float(values) if isinstance(values, int) else values


def on_device(numbers: Any, device: str) -> Any:
    """Numbers of the host stay there."""
    return numbers


def capturing(device: str) -> bool:
    """Whether what is launched now is noted in a graph, to be replayed."""
    return False


def stream(device: str) -> int | None:
    """The handle of the stream on which arrays of a device are computed; None for that of PyTorch."""
    return None


def ticked(clock: Any, skipped: Any) -> Any:
    """A clock after an update."""
    return clock + 1


def stacked(values: Sequence[Any]) -> Array:
    """A vector of these numbers."""
    return np.array(values)


def joined(vectors: list[Array]) -> Array:
    """One vector after the other."""
    return np.concatenate(vectors)


def columns(values: Sequence[Any], rows: int) -> Array:
    """A table of these columns, each a value for every row or one for all."""
    return np.stack([np.broadcast_to(v, (rows,)) for v in values], 1)


def placed(x: Array, index: Any, values: Any) -> Array:
    """The array with values written at an index; perhaps the same."""
    x[index] = values
    return x


# -- the words -----------------------------------------------------------------------------------------------

WORDS: dict[str, Callable[..., Any]] = numpylike.words(np)
