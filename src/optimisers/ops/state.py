"""Of what does a rule make its state? Of arrays like a given one, in the type of the arithmetic or in one of
their own.
"""

from typing import Any

from optimisers.arrays import registry
from optimisers.arrays.protocol import Array, Scalar, Shape
from optimisers.arrays.types import arithmetic, real_of
from optimisers.ops.dispatch import OPERATIONS, Primitive, dispatch
from optimisers.ops.primitives import ROUNDINGS


def zeros_like(x: Array) -> Any:
    """Zeros in the shape of `x`, in the type of the arithmetic: that of `x`, but float32 at least.

    A mean or a sum kept in half precision would lose its small terms (0.999 is 1 in bfloat16), so state for
    float16 and bfloat16 parameters is float32.
    """
    return full_like(x, 0)


def ones_like(x: Array) -> Any:
    """Ones in the shape of `x`, in the type of the arithmetic (see `zeros_like`)."""
    return full_like(x, 1)


def full_like(x: Array, value: Scalar) -> Any:
    """An array in the shape of `x` filled with `value`, in the type of the arithmetic (see `zeros_like`)."""
    write = getattr(type(x), "__full_like__", None)
    if write is not None:
        return write(x, value)
    library = registry.library(x)
    return library.full_like(x, value, arithmetic(library, x.dtype))


def zeros(shape: Shape, like: Array, dtype: str | None = None) -> Any:
    """Zeros of this shape beside `like`, in the type of the arithmetic (see `zeros_like`) or in one of their
    own: for state of another shape than the parameters.
    """
    return _made("zeros", like, dtype, shape=tuple(shape))


def eye(n: int, like: Array, dtype: str | None = None) -> Any:
    """The identity matrix of n rows beside `like`, in the type of the arithmetic (see `zeros_like`) or in one
    of its own.
    """
    return _made("eye", like, dtype, n=n)


MADE = ("zeros", "eye")
"""Operations that make an array beside another one, of which they read nothing."""

OPERATIONS.update((name, Primitive(name, "made", "real")) for name in MADE)


def _made(name: str, like: Array, dtype: str | None, **options: Any) -> Any:
    """An array beside another one; written into the graph if that is a symbol."""
    if hasattr(type(like), "__operation__"):
        return dispatch(name, (like,), options)
    library = registry.library(like)
    kind = arithmetic(library, like.dtype) if dtype is None else library.dtype(dtype)
    return library.operations[name](like, dtype=kind, **options)


def typed_zeros_like(x: Array, dtype: str) -> Any:
    """Zeros in the shape and layout of `x`, in a type of their own."""
    return registry.library(x).full_like(x, 0, dtype)


def real_zeros_like(x: Array) -> Any:
    """Real zeros in the shape of `x`, also for complex `x`: for state such as a mean of |dx|^2."""
    write = getattr(type(x), "__full_like__", None)
    if write is not None:
        return write(x, 0)
    library = registry.library(x)
    return library.full_like(x, 0, real_of(library, arithmetic(library, x.dtype)))


def copy(x: Array, dtype: str | None = None) -> Any:
    """A copy of `x`, for state that starts at the parameters; in the type of the arithmetic, or in
    `dtype`.
    """
    if hasattr(type(x), "__operation__"):
        return x if dtype is None else rounded(x, dtype)
    library = registry.library(x)
    return library.copied(x, arithmetic(library, x.dtype) if dtype is None else dtype)


def widened(x: Array) -> Any:
    """`x` in the type of the arithmetic; perhaps the same."""
    if hasattr(type(x), "__operation__"):
        return x
    library = registry.library(x)
    return library.cast(x, arithmetic(library, x.dtype))


def rounded(x: Array, dtype: str) -> Any:
    """x as it comes back from an array of this type, where that is narrower than some arithmetic."""
    return dispatch(f"to_{dtype}", (x,), {}) if f"to_{dtype}" in ROUNDINGS else x


def stored_as(x: Array, value: Array) -> Any:
    """`value` as it comes back from where `x` is stored: an array of parameters, or of the state."""
    return rounded(value, _type_of(x))


def resolution(x: Array) -> float:
    """The distance from 1 to the next number in the type of the arithmetic for `x`."""
    return 2.0**-52 if _type_of(x) in ("float64", "complex128") else 2.0**-23


def summable(x: Array) -> float:
    """A large number in the type of the arithmetic for `x`; the sum of a hundred million of it is finite."""
    return 2.0**996 if _type_of(x) in ("float64", "complex128") else 2.0**100


def _type_of(x: Array) -> str:
    """The name of the type in which `x` is stored."""
    read = getattr(type(x), "__stored_type__", None)
    return registry.type_name(x) if read is None else read(x)
