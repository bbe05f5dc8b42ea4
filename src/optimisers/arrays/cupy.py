"""Arrays of CuPy: NumPy's functions, on the memory of GPUs; nothing goes to the host unless it is asked."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast, final

import numpy as np

from optimisers.arrays.layout import contiguous_strides, dense_like, overlaps_itself
from optimisers.arrays.numpy import library as host
from optimisers.arrays.numpylike import Dtype, NumpyLike, NumpyLikeMemory, NumpyLikeStacks, operations
from optimisers.arrays.parts import Graphs, Strides
from optimisers.arrays.protocol import HostArray, Run, Scalar, Shape

cp: Any = importlib.import_module("cupy")
"""CuPy declares no types, and need not be there where types are checked."""


def there(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run on the GPU of its first array: CuPy makes new arrays on the current one, whatever
    arrays they are made of.
    """

    @functools.wraps(function)
    def run(*args: object, **options: object) -> Any:
        x = _first(args)
        if x is None:
            return function(*args, **options)
        with x.device:
            return function(*args, **options)

    return run


def _first(values: Sequence[Any]) -> Any:
    """The first array among some values, or in a list among them."""
    for v in values:
        found = _first(v) if isinstance(v, list) else v
        if isinstance(found, cp.ndarray):
            return found
    return None


def _gpu(name: str) -> Any:
    """The GPU of a name."""
    return cp.cuda.Device(int(name.removeprefix("cuda:")))


def _spread(x: HostArray, shape: tuple[int, ...]) -> HostArray:
    return cp.broadcast_to(x, shape)


def _is_spread(x: HostArray) -> bool:
    """Whether one number stands for all elements."""
    return x.size > 1 and not any(s for s, n in zip(x.strides, x.shape, strict=True) if n > 1)


def _nowhere(shape: tuple[int, ...], dtype: object) -> HostArray:
    """An array without elements, for which no memory is asked: it can be made where there is no GPU."""
    null = cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(0, 0, None, 0), 0)
    return cp.ndarray(shape, dtype, null)


def _is_ours(x: object) -> TypeGuard[HostArray]:
    return isinstance(x, cp.ndarray)


# -- operations --------------------------------------------------------------------------------------------

ON_DEVICE: dict[str, Callable[..., Any]] = operations(cp)
"""The operations of CuPy on its current GPU: of arrays, or of what stands for them while CuPy fuses."""


def _operation(name: str) -> Callable[..., Any]:
    """An operation on arrays, on the GPU of the first of them; NumPy computes it of numbers alone."""
    on_device, on_host = there(ON_DEVICE[name]), host.operations[name]
    return lambda *args, **options: (on_host if _first(args) is None else on_device)(*args, **options)


def _where(condition: object, a: object, b: object) -> Any:
    """CuPy asks a condition for its type, which Python's have not."""
    return _choose(np.bool_(condition) if isinstance(condition, bool) else condition, a, b)


_choose = _operation("where")

OPERATIONS: dict[str, Callable[..., Any]] = {name: _operation(name) for name in ON_DEVICE} | {"where": _where}


def _device(x: HostArray) -> str:
    where: Any = x.device
    return f"cuda:{where.id}"


def _is_writable(x: HostArray) -> bool:
    return not overlaps_itself(x.shape, x.strides)


@final
class CupyMemory(NumpyLikeMemory):
    """Where elements of CuPy's arrays lie."""

    def address(self, x: HostArray) -> int:
        start: Any = x.data
        return start.ptr

    def is_dense(self, x: HostArray, where: str, *, write: bool) -> bool:
        return _device(x) == where and self.address(x) % x.itemsize == 0 and (not write or _is_writable(x))

    def dense_strides(self, x: HostArray) -> tuple[int, ...]:
        return contiguous_strides(x.shape) if x.flags.c_contiguous else dense_like(x.shape, x.strides)

    def zeros(self, n: int, dtype: Dtype, device: str) -> HostArray:
        with _gpu(device):
            return cp.zeros(n, dtype)

    def empty(self, n: int, dtype: Dtype, device: str) -> HostArray:
        with _gpu(device):
            return cp.empty(n, dtype)

    def view(self, buffer: HostArray, offset: int, shape: Shape, strides: Strides) -> HostArray:
        size, start = buffer.itemsize, cast("Any", buffer.data)
        return cp.ndarray(shape, buffer.dtype, start + offset * size, tuple(s * size for s in strides))

    def fresh(self, shape: Shape, dtype: Dtype, strides: Strides | None, device: str) -> HostArray:
        with _gpu(device):
            new = cp.empty(shape, dtype)
        return new if strides is None else self.view(new, 0, shape, strides)


@final
class CupyStacks(NumpyLikeStacks):
    """Stacks in CuPy."""

    def stack(self, arrays: Sequence[Any]) -> Any:
        return cp.stack(list(arrays))


@final
class CupyGraphs(Graphs):
    """Graphs of the streams of CuPy."""

    def capturing(self, device: str) -> bool:
        return cp.cuda.get_current_stream(_gpu(device).id).is_capturing()

    def stream(self, device: str) -> int | None:
        return cp.cuda.get_current_stream(_gpu(device).id).ptr


@final
class CupyLibrary(NumpyLike):
    """CuPy."""

    name = "cupy"
    operations = OPERATIONS
    memory = CupyMemory()
    stacks = CupyStacks()
    graphs = CupyGraphs()

    # -- what an array is -----------------------------------------------------------------------------------

    def is_array_type(self, kind: type) -> bool:
        return issubclass(kind, cp.ndarray)

    def is_writable(self, x: HostArray) -> bool:
        return _is_writable(x)

    def is_opaque(self, x: HostArray) -> bool:
        return False

    def device(self, x: HostArray) -> str:
        return _device(x)

    # -- making arrays --------------------------------------------------------------------------------------

    @there
    def full_like(self, x: HostArray, value: Scalar, dtype: Dtype | str) -> HostArray:
        """One number in the shape of `x`, which is kept once: the array is a broadcast view."""
        return _spread(cp.full((), value, np.dtype(dtype)), x.shape)

    @there
    def copied(self, x: HostArray, dtype: Dtype | str) -> HostArray:
        """A copy in this type; of one number that stands for all, only that."""
        if _is_spread(x):
            return _spread(x[(0,) * x.ndim].astype(dtype), x.shape)
        return x.astype(dtype)

    @there
    def cast(self, x: HostArray | Scalar, dtype: Dtype) -> Any:
        return x.astype(dtype, copy=False) if _is_ours(x) else self.scalars.number(cast("Scalar", x), dtype)

    @there
    def broadcast(self, x: HostArray | Scalar, shape: Shape) -> HostArray:
        return cp.broadcast_to(cp.asarray(x), shape)

    @there
    def flattened(self, arrays: list[HostArray]) -> HostArray:
        return cp.concatenate([x.ravel() for x in arrays])

    @there
    def pieces(self, flat: HostArray, runs: list[Run], *, copy: bool) -> list[HostArray]:
        return NumpyLike.pieces(self, flat, runs, copy=copy)

    @there
    def assign(self, target: HostArray, value: HostArray | Scalar) -> None:
        cp.copyto(target, value, casting="unsafe")

    def to_numpy(self, x: HostArray) -> HostArray:
        return cp.asnumpy(x)

    def to_host(self, x: HostArray | Scalar) -> Any:
        return x.item() if _is_ours(x) else x

    def stand_in(self, shape: Shape, dtype: Dtype) -> HostArray:
        """An array of this shape and type that takes the memory of one element, to be looked at only; it can
        be read, for a rule may sum up the array that its state begins with.
        """
        return _spread(cp.zeros((), dtype), shape) if 0 not in shape else _nowhere(shape, dtype)

    @there
    def any_set(self, x: HostArray) -> bool:
        """Whether some element is not zero; of one number that stands for all, only that is read."""
        return x.size > 0 and bool((x[(0,) * x.ndim] if _is_spread(x) else x).any())

    @there
    def seen(self, x: HostArray, *, read_only: bool) -> HostArray:
        return x.copy() if read_only else x

    @there
    def duplicate(self, x: object) -> Any:
        return x.copy() if _is_ours(x) else x

    @there
    def rounded(self, old: HostArray, value: HostArray | Scalar) -> HostArray:
        new = cp.empty_like(old)
        self.assign(new, cp.asarray(value) if isinstance(value, np.ndarray) else value)
        return new

    # -- scalars --------------------------------------------------------------------------------------------

    def stacked(self, values: Sequence[HostArray | Scalar]) -> Any:
        return np.array([self.to_host(v) for v in values])


library = CupyLibrary()
