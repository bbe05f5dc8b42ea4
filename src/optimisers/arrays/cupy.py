"""Arrays of CuPy: NumPy's functions, on the memory of GPUs; nothing goes to the host unless it is asked."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import numpy as host
from optimisers.arrays import numpylike
from optimisers.arrays.layout import axes_in_memory, contiguous_strides, dense_like, overlaps_itself

cp: Any = importlib.import_module("cupy")
"""CuPy declares no types, and need not be there where types are checked."""

Array = Any

NAME = "cupy"

HOST_NUMBERS = True
"""Whether the numbers of a state are worked out on the host, as long as nobody follows them."""

REPLACES = False
"""Whether arrays cannot be written, so that a step in place replaces them."""

SORTS = False
"""Whether the library hands dicts on with their keys sorted."""

CAPTURABLE = False
"""Whether the numbers of a state may live on a device, for graphs that are captured."""


def there(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run on the GPU of its first array: CuPy makes new arrays on the current one, whatever
    arrays they are made of.
    """

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        x = _first(args)
        if x is None:
            return function(*args, **options)
        with x.device:
            return function(*args, **options)

    return run


def _first(values: Sequence[Any]) -> Array | None:
    """The first array among some values, or in a list among them."""
    for v in values:
        found = _first(v) if isinstance(v, list) else v
        if isinstance(found, cp.ndarray):
            return found
    return None


# -- what an array is ----------------------------------------------------------------------------------------


def is_array_type(kind: type) -> bool:
    return issubclass(kind, cp.ndarray)


is_inexact = host.is_inexact
is_trainable = host.is_inexact
is_numbers = host.is_numbers
is_complex = host.is_complex


def is_writable(x: Array) -> bool:
    """Arrays in which two elements share one place (broadcast views) are not; no others are read-only."""
    return not overlaps_itself(x.shape, x.strides)


is_loose = host.is_loose
may_bundle = host.may_bundle
follows = host.follows
unready = host.unready
size = host.size
dtype_name = host.dtype_name
type_name = host.type_name


def device(x: Array) -> str:
    """The GPU, by its number."""
    return f"cuda:{x.device.id}"


def _gpu(name: str) -> Any:
    """The GPU of a name."""
    return cp.cuda.Device(int(name.removeprefix("cuda:")))


def memory(x: Array) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """(address, bytes per element, sorted (stride, size) of the axes): equal for an array and its transposed
    views. All GPUs share one space of addresses.
    """
    return address(x), x.itemsize, axes_in_memory(x.shape, x.strides)


def address(x: Array) -> int:
    """Where the first element lies."""
    return x.data.ptr


def bounds(x: Array) -> tuple[int, int]:
    """The first address of the elements, and the first behind them."""
    reach = [(n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)] if x.size else []
    low = address(x) + sum(r for r in reach if r < 0)
    high = address(x) + sum(r for r in reach if r > 0)
    return low, high + (x.itemsize if x.size else 0)


def shares(x: Any, others: list[Array]) -> bool:
    """Whether `x` may lie in the memory of one of the others."""
    if not isinstance(x, cp.ndarray):
        return False
    low, high = bounds(x)
    return any(a < high and low < b for a, b in map(bounds, others))


layout = host.layout
is_contiguous = host.is_contiguous


def is_dense_memory(x: Array, where: str, *, write: bool) -> bool:
    """Whether kernels on a device may use the array where it lies, if its layout is the right one."""
    return device(x) == where and address(x) % x.itemsize == 0 and (not write or is_writable(x))


def same_array(a: Array, b: Array) -> bool:
    """Whether two arrays are views of the same elements in the same order."""
    return memory(a) == memory(b) and a.shape == b.shape and axes_between(a, b) is None


axes_between = host.axes_between
permuted = host.permuted


# -- making arrays -------------------------------------------------------------------------------------------

arithmetic = host.arithmetic
promoted = host.promoted
real_of = host.real_of


@there
def full_like(x: Array, value: Any, *, real: bool = False, dtype: Any = None) -> Array:
    """One number in the shape of `x`, which is kept once: the array is a broadcast view."""
    dtype = arithmetic(x.dtype) if dtype is None else np.dtype(dtype)
    return _spread(cp.full((), value, real_of(dtype) if real else dtype), x.shape)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    return cp.broadcast_to(x, shape)


def _is_spread(x: Array) -> bool:
    """Whether one number stands for all elements."""
    return x.size > 1 and not any(s for s, n in zip(x.strides, x.shape, strict=True) if n > 1)


def widened(x: Array) -> Array:
    """A copy in the type of the arithmetic, laid out like `x`."""
    return copied(x, arithmetic(x.dtype))


def stand_in(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of this shape and type that takes the memory of one element, to be looked at only; it can be
    read, for a rule may sum up the array that its state begins with.
    """
    return _spread(cp.zeros((), dtype), shape) if 0 not in shape else _nowhere(shape, dtype)


def _nowhere(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array without elements, for which no memory is asked: it can be made where there is no GPU."""
    null = cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(0, 0, None, 0), 0)
    return cp.ndarray(shape, dtype, null)


def scalar_array(value: object) -> Array | None:
    """Nothing but an array is one: those of 0 axes stay arrays here."""
    return None


@there
def any_set(x: Array) -> bool:
    """Whether some element is not zero; of one number that stands for all, only that is read."""
    return x.size > 0 and bool((x[(0,) * x.ndim] if _is_spread(x) else x).any())


def zeros(n: int, dtype: Any, device: str) -> Array:
    with _gpu(device):
        return cp.zeros(n, dtype)


def empty(n: int, dtype: Any, device: str) -> Array:
    with _gpu(device):
        return cp.empty(n, dtype)


@there
def seen(x: Array, *, read_only: bool) -> Array:
    """A view for somebody to look at and to write into; a copy, if other states share it."""
    return x.copy() if read_only else x


def view(buffer: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """An array of this shape inside a flat buffer; offset and strides in elements."""
    size = buffer.itemsize
    return cp.ndarray(shape, buffer.dtype, buffer.data + offset * size, tuple(s * size for s in strides))


def dense_strides(x: Array) -> tuple[int, ...]:
    """The strides, in elements, of a dense array with the axes of `x` in the same order."""
    return contiguous_strides(x.shape) if is_contiguous(x) else dense_like(x.shape, x.strides)


@there
def copied(x: Array, dtype: Any) -> Array:
    """A copy in this type; of one number that stands for all, only that."""
    if _is_spread(x):
        return _spread(x[(0,) * x.ndim].astype(dtype), x.shape)
    return x.astype(dtype)


@there
def duplicate(x: Any) -> Any:
    """A copy of an array; anything else as it is."""
    return x.copy() if isinstance(x, cp.ndarray) else x


def fresh(shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None, device: str) -> Array:
    """An array not yet written, with these dense strides (in elements); None for contiguous ones."""
    with _gpu(device):
        new = cp.empty(shape, dtype)
    return new if strides is None else view(new, 0, shape, strides)


def laid_out(x: Any, dtype: Any, strides: tuple[int, ...] | None, device: str) -> Array:
    """A copy of `x` in this type with these dense strides (in elements); None for contiguous ones."""
    new = fresh(x.shape if isinstance(x, cp.ndarray) else np.shape(x), dtype, strides, device)
    assign(new, x)
    return new


dense = host.dense
has_rows = host.has_rows


@there
def assign(target: Array, value: Any) -> None:
    """Write `value` into `target`, rounding once to its type."""
    cp.copyto(target, value, casting="unsafe")


@there
def flattened(arrays: list[Array]) -> Array:
    """All elements in one new vector, in the type to which those of the arrays promote."""
    return cp.concatenate([x.ravel() for x in arrays])


pieces = there(host.pieces)


@there
def stored(x: Array, value: Any, *, inplace: bool) -> Array:
    """`value` rounded to the type of `x`: in `x` itself where that may be written, else in a new array of its
    shape.
    """
    target = x if inplace and is_writable(x) else cp.empty_like(x)
    assign(target, value)
    return target


def rounded(old: Array, value: Any) -> Array:
    """An array of the type and shape of an old one that holds `value`."""
    return stored(old, value, inplace=False)


def like(x: Array, new: Array) -> Array:
    return new


is_part = host.is_part
across = host.across
touched = host.touched


@there
def cast(x: Any, dtype: Any) -> Any:
    return x.astype(dtype, copy=False) if isinstance(x, cp.ndarray) else number(x, dtype)


number = host.number


def to_host(x: Any) -> Any:
    """The value of a 0-d array; numbers as they are."""
    return x.item() if isinstance(x, cp.ndarray) else x


def to_numpy(x: Array) -> Any:
    """The elements as an array of NumPy, for somebody to look at."""
    return cp.asnumpy(x)


@there
def broadcast(x: Any, shape: tuple[int, ...]) -> Array:
    """`x` in this shape; raises ValueError if it does not broadcast."""
    return cp.broadcast_to(cp.asarray(x), shape)


# -- tables of numbers: those of a state are on the host, where NumPy keeps them -----------------------------

is_fixed = host.is_fixed
table = host.table
constant = host.constant


on_device = host.on_device


def capturing(device: str) -> bool:
    """Whether what is launched now is noted in a graph, to be replayed."""
    return cp.cuda.get_current_stream(_gpu(device).id).is_capturing()


def stream(device: str) -> int | None:
    """The handle of the stream on which arrays of a device are computed; None for that of PyTorch."""
    return cp.cuda.get_current_stream(_gpu(device).id).ptr


ticked = host.ticked


def stacked(values: Sequence[Any]) -> Any:
    """A vector of these numbers."""
    return host.stacked([to_host(v) for v in values])


joined = host.joined
columns = host.columns
placed = host.placed


# -- the words -----------------------------------------------------------------------------------------------

ON_DEVICE: dict[str, Callable[..., Any]] = numpylike.words(cp)
"""The words, said by CuPy on its current GPU: to arrays, or to what stands for them while CuPy fuses."""


def _word(name: str) -> Callable[..., Any]:
    """A word said to arrays on the GPU of the first of them; NumPy says it to numbers alone."""
    on_device, on_host = there(ON_DEVICE[name]), host.WORDS[name]
    return lambda *args, **options: (on_host if _first(args) is None else on_device)(*args, **options)


def _where(condition: Any, a: Any, b: Any) -> Any:
    """CuPy asks a condition for its type, which Python's have not."""
    return _choose(np.bool_(condition) if isinstance(condition, bool) else condition, a, b)


_choose = _word("where")

WORDS: dict[str, Callable[..., Any]] = {name: _word(name) for name in ON_DEVICE} | {"where": _where}
