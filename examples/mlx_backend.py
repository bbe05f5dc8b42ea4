"""MLX for optimisers: import this file once, and arrays of MLX are trained as those of any library are.

A back end is a subclass of `Library` that says what arrays are and how they are made, a table of operations,
and a record that names it. Steps run through MLX's own lazy functions; factorisations and random bits are
computed by NumPy, on the host. Copy the file beside your own.
"""

import functools
from collections.abc import Callable
from typing import Any, final

import mlx.core as mx
import numpy as np

import optimisers as opt
from optimisers.arrays.norms import norm2
from optimisers.arrays.numpylike import operations as numpy_operations
from optimisers.arrays.parts import Scalars
from optimisers.arrays.protocol import HostArray, Library, Run, Scalar, Shape

Axis = int | tuple[int, ...] | None


def to_numpy(x: Any) -> Any:
    """The elements in NumPy, which has no bfloat16: that comes as float32. Numbers stay as they are."""
    if not isinstance(x, mx.array):
        return x
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def from_numpy(x: Any, like: Any) -> Any:
    """An array of NumPy as one of MLX, in the type of another; numbers in the width that MLX has."""
    return mx.array(np.asarray(x)).astype(like) if like is not None else mx.array(np.asarray(x))


# -- operations --------------------------------------------------------------------------------------------

BY_NUMPY = numpy_operations(np)


def by_numpy(name: str, kind: Any = None) -> Callable[..., Any]:
    """An operation that NumPy computes: what MLX has not, or has on the host alone."""

    def run(*args: Any, **options: Any) -> Any:
        own = next((a.dtype for a in args if isinstance(a, mx.array)), kind)
        found = BY_NUMPY[name](*map(to_numpy, args), **options)
        if isinstance(found, tuple):
            return tuple(from_numpy(f, own) for f in found)
        return from_numpy(found, kind or own)

    return run


def reduced(function: Callable[..., Any], empty: float) -> Callable[..., Any]:
    """A reduction; MLX refuses one over no elements."""

    def run(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
        x = mx.array(x) if not isinstance(x, mx.array) else x
        return function(x, axis=axis, keepdims=keepdims) if x.size or axis is not None else mx.array(empty)

    return run


def abs2(x: Any) -> Any:
    """The squared absolute value, which is real."""
    return mx.real(x) ** 2 + mx.imag(x) ** 2 if is_complex(x) else x * x


def is_complex(x: Any) -> bool:
    """Whether an array's elements are complex."""
    return isinstance(x, mx.array) and x.dtype == mx.complex64


def matmul(a: Any, b: Any, dtype: str | None = None) -> Any:
    """The product of (stacks of) matrices, taken in another type if one is named.

    `fast` would be bfloat16 on a device with units for it: here it is the type of the matrices.
    """
    kind = a.dtype if dtype in (None, "fast") else getattr(mx, str(dtype))
    return mx.matmul(a.astype(kind), b.astype(kind)).astype(a.dtype)


def there_and_back(kind: mx.Dtype) -> Callable[..., Any]:
    """Rounds to a narrower type, and keeps the wider."""
    return lambda x: x.astype(kind).astype(x.dtype)


ALIKE = (
    *("add", "subtract", "multiply", "divide", "power", "negative", "less", "less_equal", "greater"),
    *("greater_equal", "equal", "not_equal", "logical_and", "logical_or", "logical_not", "sqrt", "exp"),
    *("expm1", "log", "log1p", "sin", "cos", "tanh", "arctan", "floor", "ceil", "sign", "abs", "isfinite"),
    *("isnan", "maximum", "minimum", "where", "reshape", "real", "imag"),
)
"""Operations that MLX has by the same name."""

OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: by_numpy(name) for name in BY_NUMPY},
    **{name: getattr(mx, name) for name in ALIKE},
    "conj": mx.conjugate,
    "abs2": abs2,
    "matmul": matmul,
    "transpose": lambda x: mx.swapaxes(x, -1, -2),
    "sum": reduced(mx.sum, 0.0),
    "max": reduced(mx.max, -np.inf),
    "min": reduced(mx.min, np.inf),
    "to_float16": there_and_back(mx.float16),
    "to_bfloat16": there_and_back(mx.bfloat16),
    "to_float32": there_and_back(mx.float32),
    "random_word": by_numpy("random_word", mx.uint32),
    "zeros": lambda _, shape, dtype: mx.zeros(shape, dtype),
    "eye": lambda _, n, dtype: mx.eye(n, dtype=dtype),
    "item": lambda found, index: found[index],
    "every": lambda condition, new, old: new() if condition else old(),
    "call": lambda function, *args: function(*args),
}
OPERATIONS["norm2"] = norm2(OPERATIONS, lambda x: float(mx.finfo(x.dtype).smallest_normal))


# -- arrays ------------------------------------------------------------------------------------------------


@final
class PlainNumbers(Scalars):
    """Scalars of states are Python's numbers beside arrays: NumPy's would make arrays of NumPy of them."""

    def number(self, value: Any, dtype: Any) -> Any:
        return np.asarray(value).item()


@final
class MLXLibrary(Library[mx.array, mx.Dtype]):
    """What arrays of MLX answer."""

    name = "mlx"
    operations = OPERATIONS
    scalars = PlainNumbers()

    def is_array_type(self, kind: type) -> bool:
        return issubclass(kind, mx.array)

    def type_name(self, dtype: mx.Dtype) -> str:
        return _name(dtype)

    def dtype(self, name: str) -> mx.Dtype:
        # No GPU of MLX's computes in float64, and complex numbers have one width.
        return getattr(mx, {"float64": "float32", "complex128": "complex64", "bool": "bool_"}.get(name, name))

    def device(self, x: mx.array) -> str:
        return "unified"

    def full_like(self, x: mx.array, value: Scalar, dtype: mx.Dtype | str) -> mx.array:
        return mx.full(x.shape, value, self._kind(dtype))

    def copied(self, x: mx.array, dtype: mx.Dtype | str) -> mx.array:
        return mx.array(x, self._kind(dtype))

    def cast(self, x: mx.array | Scalar, dtype: mx.Dtype) -> Any:
        return x.astype(dtype) if isinstance(x, mx.array) else mx.array(x, dtype)

    def broadcast(self, x: mx.array | Scalar, shape: Shape) -> mx.array:
        return mx.broadcast_to(x, shape)

    def permuted(self, x: mx.array, axes: tuple[int, ...]) -> mx.array:
        return mx.transpose(x, axes)

    def flattened(self, arrays: list[mx.array]) -> mx.array:
        return mx.concatenate([mx.flatten(x) for x in arrays])

    def pieces(self, flat: mx.array, runs: list[Run], *, copy: bool) -> list[mx.array]:
        found: list[mx.array] = []
        for place, count, shape, dtype in runs:
            found += list(flat[place].astype(dtype).reshape(count, *shape))
        return found

    def assign(self, target: mx.array, value: mx.array | Scalar) -> None:
        target[...] = self.cast(value, target.dtype)

    def to_numpy(self, x: mx.array) -> HostArray:
        return to_numpy(x)

    def to_host(self, x: mx.array | Scalar) -> Any:
        return x.item() if isinstance(x, mx.array) else x

    def stand_in(self, shape: Shape, dtype: mx.Dtype) -> mx.array:
        return mx.zeros(shape, dtype)  # lazy: no memory until somebody looks

    def rounded(self, old: mx.array, value: mx.array | HostArray | Scalar) -> mx.array:
        new = value if isinstance(value, mx.array) else mx.array(value)
        return mx.broadcast_to(new.astype(old.dtype), old.shape)

    def _kind(self, dtype: mx.Dtype | str) -> mx.Dtype:
        return self.dtype(dtype) if isinstance(dtype, str) else dtype


@functools.cache
def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


opt.register_backend(opt.Backend("mlx", ("mlx",), MLXLibrary()))
