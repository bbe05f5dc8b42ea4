"""What else may a rule say? What is written with the primitive operations, and computed as they are."""

import math
from collections.abc import Callable
from typing import Any

from optimisers.arrays import registry
from optimisers.arrays.protocol import Operand
from optimisers.ops.primitives import (
    abs,
    conj,
    equal,
    imag,
    max,
    maximum,
    min,
    minimum,
    norm2,
    not_equal,
    real,
    sqrt,
    sum,
    where,
)


def square(x: Operand) -> Any:
    """x * x, complex for complex x (`abs2` is the real one)."""
    return x * x


def ema(beta: Operand, m: Operand, x: Operand) -> Any:
    """One step of an exponential moving average: beta m + (1 - beta) x."""
    return beta * m + (1 - beta) * x


def clip(x: Operand, low: Operand, high: Operand) -> Any:
    """x limited to the interval [low, high]."""
    return minimum(maximum(x, low), high)


def is_complex(x: Operand) -> bool:
    """Whether an array, or a symbol that stands for one, has complex elements."""
    one: Any = x
    return one.type == "complex" if hasattr(type(x), "__operation__") else registry.iscomplex(one)


def by_parts(function: Callable[..., tuple[Any, ...]], *arrays: Any) -> tuple[Any, ...]:
    """`function(*arrays)`, several arrays; of complex ones the real and the imaginary parts, each for
    itself.
    """
    if not any(map(is_complex, arrays)):
        return function(*arrays)
    halves = (function(*map(real, arrays)), function(*map(imag, arrays)))
    return tuple(a + 1j * b for a, b in zip(*halves, strict=True))


def size_of(x: Operand) -> Any:
    """The number of elements; a symbol in a trace."""
    one: Any = x
    return one.size if hasattr(type(x), "__operation__") else math.prod(one.shape)


def mean(x: Operand) -> Any:
    """The mean over all elements of this array."""
    return sum(x) / size_of(x)


def dot(a: Operand, b: Operand) -> Any:
    """The sum over all elements of conj(a) * b."""
    return sum(conj(a) * b)


def norm(x: Operand, p: float = 2.0) -> Any:
    """The p-norm of all elements of this array; p = 0 counts those that are not zero, -inf takes the
    least.
    """
    if p == 2:
        return norm2(x)
    size = abs(x)
    if p == 1:
        return sum(size)
    if p == float("inf"):
        return where(equal(size_of(x), 0), 0.0, max(size))
    if p == -float("inf"):
        return where(equal(size_of(x), 0), 0.0, min(size))
    if p == 0:
        return sum(where(not_equal(size, 0), 1.0, 0.0))
    zero = equal(size, 0)  # of which neither power nor root is differentiated
    absent = 0.0 if p > 0 else float("inf")
    edge = norm(x, float("inf") if p > 0 else -float("inf"))  # its power might be no number
    nothing = equal(edge, 0) | equal(edge, float("inf"))
    edge = where(nothing, 1.0, edge)
    powers = sum(where(zero, absent, where(zero, 1.0, size / edge) ** p))
    nothing = equal(powers, 0) | equal(powers, absent)
    return where(nothing, 0.0, where(nothing, 1.0, powers) ** (1 / p)) * edge


def rms(x: Operand) -> Any:
    """The root of the mean square of all elements, right also where squares are too large for their type."""
    return norm2(x) / sqrt(size_of(x))


def scaled_to(x: Operand, to: Operand, size: Operand) -> Any:
    """x times `to / size`, where size is not 0: what has norm `size` brought to norm `to`.

    In two steps, since the quotient may be no float32, or have few digits there; elsewhere the second is 1.
    """
    near = clip(size, to / FAR, to * FAR + 1 / FAR)
    return x * (to / near) * (near / size)


FAR = 2.0**100


def hypot(a: Operand, b: Operand) -> Any:
    """sqrt(a^2 + b^2) of numbers that are not negative, also where their squares are no numbers."""
    top = maximum(a, b)
    return top * sqrt(1 + square(over(minimum(a, b), top)))


def over(a: Operand, b: Operand) -> Any:
    """a / b, 0 where b is 0."""
    return where(b == 0, 0, a / nonzero(b))


def nonzero(x: Operand) -> Any:
    """x, 1 where it is 0."""
    return where(equal(x, 0), 1, x)
