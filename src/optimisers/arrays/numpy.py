"""NumPy arrays, including those of the half-precision types of ml_dtypes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np

from optimisers.arrays.layout import contiguous_strides, overlaps_itself
from optimisers.arrays.numpylike import Dtype, NumpyLike, NumpyLikeMemory, NumpyLikeStacks, operations
from optimisers.arrays.parts import Strides
from optimisers.arrays.protocol import HostArray, Scalar, Shape


@final
class NumpyMemory(NumpyLikeMemory):
    """Where elements of NumPy's arrays lie."""

    def address(self, x: HostArray) -> int:
        return x.__array_interface__["data"][0]

    def is_dense(self, x: HostArray, where: str, *, write: bool) -> bool:
        return (
            type(x) is np.ndarray
            and x.dtype.isnative
            and x.flags.aligned
            and (x.flags.writeable or not write)
        )

    def dense_strides(self, x: HostArray) -> tuple[int, ...]:
        if x.flags.c_contiguous:
            return contiguous_strides(x.shape)
        return tuple(s // x.itemsize for s in np.empty_like(x, subok=False).strides)

    def zeros(self, n: int, dtype: Dtype, device: str) -> HostArray:
        return np.zeros(n, dtype)

    def empty(self, n: int, dtype: Dtype, device: str) -> HostArray:
        return np.empty(n, dtype)

    def view(self, buffer: HostArray, offset: int, shape: Shape, strides: Strides) -> HostArray:
        size = buffer.itemsize
        return np.ndarray(shape, buffer.dtype, buffer, offset * size, tuple(s * size for s in strides))

    def fresh(self, shape: Shape, dtype: Dtype, strides: Strides | None, device: str) -> HostArray:
        if strides is None:
            return np.empty(shape, dtype)
        axes = sorted(range(len(shape)), key=lambda a: -strides[a])
        return np.empty([shape[a] for a in axes], dtype).transpose(np.argsort(axes))


def product(
    a: HostArray,
    b: HostArray,
    target: HostArray | None,
    c: HostArray | None,
    alpha: Any,
    beta: Any,
    spare: Callable[[], HostArray | None],
) -> HostArray:
    found: HostArray = np.matmul(a, b) if target is None else np.matmul(a, b, out=target)
    if np.ndim(alpha) or alpha != 1:
        found *= np.asarray(alpha, found.dtype)
    if c is None:
        return found
    if np.ndim(beta) or beta != 1:
        c = np.multiply(c, np.asarray(beta, found.dtype), out=spare())
    found += c
    return found


@final
class NumpyStacks(NumpyLikeStacks):
    """Stacks in NumPy."""

    into: Mapping[str, Callable[..., Any]] = {
        "add": np.add,
        "subtract": np.subtract,
        "multiply": np.multiply,
        "divide": np.divide,
        "negative": np.negative,
    }
    product = staticmethod(product)

    def stack(self, arrays: Sequence[HostArray]) -> HostArray:
        return np.stack(arrays)


@final
class NumpyLibrary(NumpyLike):
    """NumPy."""

    name = "numpy"
    operations = operations(np) | {
        "zeros": lambda like, shape, dtype: np.zeros(shape, dtype, like=like),
        "eye": lambda like, n, dtype: np.eye(n, dtype=dtype, like=like),
    }
    memory = NumpyMemory()
    stacks = NumpyStacks()

    # -- what an array is -----------------------------------------------------------------------------------

    def is_array_type(self, kind: type) -> bool:
        return issubclass(kind, np.ndarray)

    def is_writable(self, x: HostArray) -> bool:
        return x.flags.writeable and not overlaps_itself(x.shape, x.strides)

    def is_opaque(self, x: HostArray) -> bool:
        return False

    # -- making arrays --------------------------------------------------------------------------------------

    def full_like(self, x: HostArray, value: Scalar, dtype: Dtype | str) -> HostArray:
        if value == 0:
            return np.zeros_like(x, dtype, subok=False)
        return np.full_like(x, value, dtype, subok=False)

    def copied(self, x: HostArray, dtype: Dtype | str) -> HostArray:
        return x.astype(dtype, order="K", subok=False)

    def cast(self, x: HostArray | Scalar, dtype: Dtype) -> Any:
        return np.asanyarray(x).astype(dtype, copy=False)

    def broadcast(self, x: HostArray | Scalar, shape: Shape) -> HostArray:
        return np.broadcast_to(x, shape)

    def flattened(self, arrays: list[HostArray]) -> HostArray:
        return np.concatenate([x.ravel() for x in arrays]) if arrays else np.zeros(0, bool)

    def assign(self, target: HostArray, value: HostArray | Scalar) -> None:
        np.copyto(target, value, casting="unsafe")

    def to_numpy(self, x: HostArray) -> HostArray:
        return x

    def stand_in(self, shape: Shape, dtype: Dtype) -> HostArray:
        return np.broadcast_to(np.zeros((), dtype), shape)

    def scalar_array(self, value: object) -> HostArray | None:
        return np.asarray(value) if isinstance(value, np.generic) else None

    def any_set(self, x: HostArray) -> bool:
        return bool(x.any())

    guards = True

    def seen(self, x: HostArray, *, read_only: bool) -> HostArray:
        x.flags.writeable = not read_only
        return x

    def duplicate(self, x: object) -> Any:
        return x.copy() if isinstance(x, np.ndarray) else x

    def rounded(self, old: HostArray, value: HostArray | Scalar) -> HostArray:
        new = np.empty_like(old)
        np.copyto(new, value, casting="unsafe")
        return new

    def like(self, x: HostArray, new: HostArray) -> HostArray:
        if type(x) is not np.ndarray and type(new) is np.ndarray:
            new = new.view(type(x))
            new.__array_finalize__(x)
        if not x.flags.writeable:
            new.flags.writeable = False
        return new

    # -- scalars --------------------------------------------------------------------------------------------

    def stacked(self, values: Sequence[HostArray | Scalar]) -> HostArray:
        return np.array(values)


library = NumpyLibrary()
