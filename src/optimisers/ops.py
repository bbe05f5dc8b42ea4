"""Which words may a rule use? These, and arithmetic; each asks its argument who it is.

A word called on a NumPy array computes with NumPy, on a tensor with torch, and on a traced symbol it writes
itself into the graph. So a rule is written once. `WORDS` is the whole vocabulary that an engine must know;
what stands below it is said with these words.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optimisers.arrays import registry
from optimisers.arrays.protocol import Array, Operand, Scalar, Shape
from optimisers.errors import DomainError, TraceError


@dataclass(frozen=True)
class Word:
    """One word: its name, what it does to shapes, and the type of what it gives."""

    name: str
    family: str
    """`elementwise`; `reduce` (to one number, or along an axis); `shape` (free in its shape: closes a
    phase).
    """
    gives: str
    """`same` as the arguments, `real`, `bool`, or `branch`: the type of its arguments after the first."""


WORDS: dict[str, Word] = {}


def _word(
    family: str = "elementwise", gives: str = "same"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(declaration: Callable[..., Any]) -> Callable[..., Any]:
        name = declaration.__name__
        WORDS[name] = Word(name, family, gives)

        @functools.wraps(declaration)
        def say(*args: object, **options: object) -> Any:
            return speak(name, args, options)

        return say

    return register


def speak(name: str, args: tuple[object, ...], options: dict[str, object]) -> Any:
    """The value of a word: written into the graph if an argument is a symbol, else computed by its array
    library.
    """
    for a in args:
        if (write := getattr(type(a), "__word__", None)) is not None:
            return write(name, args, options)
    return registry.library(*args).operations[name](*args, **options)


# -- arithmetic; the operators + - * / ** < & ... of a symbol are these --------------------------------------


@_word()
def add(a: Operand, b: Operand) -> Any:
    """a + b."""


@_word()
def subtract(a: Operand, b: Operand) -> Any:
    """a - b."""


@_word()
def multiply(a: Operand, b: Operand) -> Any:
    """a * b."""


@_word()
def divide(a: Operand, b: Operand) -> Any:
    """a / b."""


@_word()
def power(a: Operand, b: Operand) -> Any:
    """a ** b."""


@_word()
def negative(x: Operand) -> Any:
    """-x."""


@_word(gives="bool")
def less(a: Operand, b: Operand) -> Any:
    """a < b."""


@_word(gives="bool")
def less_equal(a: Operand, b: Operand) -> Any:
    """a <= b."""


@_word(gives="bool")
def greater(a: Operand, b: Operand) -> Any:
    """a > b."""


@_word(gives="bool")
def greater_equal(a: Operand, b: Operand) -> Any:
    """a >= b."""


@_word(gives="bool")
def equal(a: Operand, b: Operand) -> Any:
    """a == b, element by element."""


@_word(gives="bool")
def not_equal(a: Operand, b: Operand) -> Any:
    """a != b, element by element."""


@_word(gives="bool")
def logical_and(a: Operand, b: Operand) -> Any:
    """a & b of conditions."""


@_word(gives="bool")
def logical_or(a: Operand, b: Operand) -> Any:
    """a | b of conditions."""


@_word(gives="bool")
def logical_not(a: Operand) -> Any:
    """~a of a condition."""


# -- functions of one element --------------------------------------------------------------------------------


@_word()
def sqrt(x: Operand) -> Any:
    """Square root; where an engine differentiates, its derivative at 0 is 0."""


@_word()
def exp(x: Operand) -> Any:
    """e to the power x."""


@_word()
def expm1(x: Operand) -> Any:
    """exp(x) - 1 without cancellation near 0."""


@_word()
def log(x: Operand) -> Any:
    """Natural logarithm."""


@_word()
def log1p(x: Operand) -> Any:
    """log(1 + x) without cancellation near 0."""


@_word()
def sin(x: Operand) -> Any:
    """Sine of x in radians."""


@_word()
def cos(x: Operand) -> Any:
    """Cosine of x in radians."""


@_word()
def tanh(x: Operand) -> Any:
    """Hyperbolic tangent."""


@_word()
def arctan(x: Operand) -> Any:
    """Inverse tangent, in radians."""


@_word()
def floor(x: Operand) -> Any:
    """The largest whole number not above x."""


@_word()
def ceil(x: Operand) -> Any:
    """The smallest whole number not below x."""


@_word()
def sign(x: Operand) -> Any:
    """-1, 0 or 1; z/|z| for complex z; NaN stays NaN."""


@_word(gives="real")
def abs(x: Operand) -> Any:
    """|x|, real also for complex x."""


@_word(gives="real")
def abs2(x: Operand) -> Any:
    """|x|^2, real also for complex x."""


@_word(gives="real")
def real(x: Operand) -> Any:
    """The real part."""


@_word(gives="real")
def imag(x: Operand) -> Any:
    """The imaginary part."""


@_word()
def conj(x: Operand) -> Any:
    """The complex conjugate."""


@_word(gives="bool")
def isfinite(x: Operand) -> Any:
    """Whether x is neither infinite nor NaN."""


@_word(gives="bool")
def isnan(x: Operand) -> Any:
    """Whether x is NaN."""


@_word()
def maximum(a: Operand, b: Operand) -> Any:
    """The larger of a and b, element by element; NaN if one of them is NaN."""


@_word()
def minimum(a: Operand, b: Operand) -> Any:
    """The smaller of a and b, element by element; NaN if one of them is NaN."""


@_word(gives="branch")
def where(condition: Operand, a: Operand, b: Operand) -> Any:
    """a where the condition holds, else b; the one not taken may hold anything, NaN included."""


@_word(gives="real")
def join_bits(high: Operand, low: Operand) -> Any:
    """The float32 whose bits are those of `high`, a bfloat16, plus the whole number `low`."""


@_word(gives="real")
def high_bits(x: Operand) -> Any:
    """The bfloat16 nearest to a float32, halves rounded up; with `low_bits` it keeps all of x."""


@_word(gives="real")
def low_bits(x: Operand) -> Any:
    """What `high_bits` leaves of the bits of a float32: a whole number in [-32768, 32767]."""


@_word()
def to_float16(x: Operand) -> Any:
    """x as it comes back from an array of float16: rounded to the nearest, halves to even, and read again."""


@_word()
def to_bfloat16(x: Operand) -> Any:
    """x as it comes back from an array of bfloat16."""


@_word()
def to_float32(x: Operand) -> Any:
    """x as it comes back from an array of float32."""


# -- reductions: of a whole array to one number (these stay fused), or along an axis -------------------------


@_word("reduce")
def sum(x: Operand, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """The sum over all elements of this array, in float64 inside fused kernels; or along `axis`."""


@_word("reduce", gives="real")
def norm2(x: Operand, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """The root of the sum of |x|^2 over all elements of this array, right also where the squares are too
    large or too small for their type; or along `axis`.
    """


@_word("reduce")
def max(x: Operand, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """The largest element of this array (NaN if there is one); or along `axis`."""


@_word("reduce")
def min(x: Operand, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """The smallest element of this array (NaN if there is one); or along `axis`."""


# -- what the array library does itself: right, though not fused ---------------------------------------------


@_word("shape")
def matmul(a: Operand, b: Operand) -> Any:
    """The matrix product a @ b."""


@_word("shape")
def transpose(x: Operand) -> Any:
    """The array with its last two axes exchanged."""


@_word("shape")
def reshape(x: Operand, shape: Shape) -> Any:
    """The same elements in another shape."""


@_word("shape")
def call(function: Callable[..., Any], *args: object) -> Any:
    """`function(*arrays)`: any function of the array library, on whole arrays; it must be pure."""


# -- the tree ------------------------------------------------------------------------------------------------


def total(s: Operand, p: int = 1) -> Any:
    """The sum of the scalar `s` over all leaves stepped together whose rule asks for it too; with p = 2 the
    root of the sum of its squares: `total(norm(dx), p=2)` is the norm of all gradients together.

    The first total of a type of rule is one sum, whatever stands before and behind that rule and whatever its
    settings are; its second total is another. Called on a plain number, outside any update, there is one
    leaf, and the total is `s` itself.
    """
    if p not in (1, 2):
        raise TraceError(
            f"total(..., p={p!r}); it takes 1 for the sum, or 2 for the root of the sum of squares"
        )
    write = getattr(type(s), "__total__", None)
    if write is None and getattr(s, "shape", ()) != ():
        raise TraceError("total() was given an array; it takes a scalar: total(sum(...))")
    if write is None:
        return s if p == 1 else abs(s)
    return write(s, p)


def when(condition: Operand, dx: Operand) -> Any:
    """The answer of a rule that steps only where the scalar condition holds.

    Elsewhere the rest of the chain does not run, its state stays, and so does the parameter. Inside a trace
    the result is a symbol; for plain values it is `dx` itself, or None, which means "no step".
    """
    for a in (condition, dx):
        if (write := getattr(type(a), "__when__", None)) is not None:
            return write(condition, dx)
    if getattr(condition, "shape", ()) != ():
        raise TraceError(
            "when() was given a condition for each element; it takes a scalar one: use where() for single "
            "elements"
        )
    return dx if condition else None


def clock(dx: Any, otherwise: Any) -> Any:
    """How many updates have covered the array whose gradient is `dx`; behind a rule that answers `when`, how
    many steps were taken there. Where `apply` is called outside any update, nobody counts: `otherwise`.
    """
    read = getattr(type(dx), "__clock__", None)
    return otherwise if read is None else read()


@dataclass(frozen=True)
class Becomes:
    """The answer of a rule that knows the new value of x, not the step to it; x is that value, rounded
    once.
    """

    value: Any
    exact: Any = None
    """The value before it was rounded, for those who keep averages; None for the value itself."""


def landing(x: Operand, dx: Operand) -> Any:
    """The new value of x after a rule answered `dx`, as exactly as it is known."""
    if isinstance(dx, Becomes):
        return dx.value if dx.exact is None else dx.exact
    return x - dx


def rounded(x: Array, dtype: str) -> Any:
    """x as it comes back from an array of this type, where that is narrower than some arithmetic."""
    return speak(f"to_{dtype}", (x,), {}) if f"to_{dtype}" in ROUNDINGS else x


ROUNDINGS = ("to_float16", "to_bfloat16", "to_float32")


def stored_as(x: Array, value: Array) -> Any:
    """`value` as it comes back from where `x` is stored: an array of parameters, or of the state."""
    read = getattr(type(x), "__stored_type__", None)
    return rounded(value, registry.library(x).dtype_name(x) if read is None else read(x))


def under(dx: Operand) -> contextlib.AbstractContextManager[Any]:
    """The scope in which the rest of a chain runs after a rule answered `dx`: what is made in it holds only
    with it.
    """
    enter = getattr(type(dx), "__under__", None)
    return contextlib.nullcontext() if enter is None else enter(dx)


def check(condition: Operand, message: str, *values: Operand) -> None:
    """Raise DomainError where the scalar condition fails, before anything of the step is written.

    `message` is a format string for `values`, which are scalars too; the path of the leaf is added to it.
    """
    for a in (condition, *values):
        if (write := getattr(type(a), "__check__", None)) is not None:
            write(condition, message, values)
            return
    if not condition:
        raise DomainError(message.format(*values))


# -- making state --------------------------------------------------------------------------------------------


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
    return registry.library(x).full_like(x, value) if write is None else write(x, value)


def typed_zeros_like(x: Array, dtype: str) -> Any:
    """Zeros in the shape and layout of `x`, in a type of their own."""
    return registry.library(x).full_like(x, 0, dtype=dtype)


def real_zeros_like(x: Array) -> Any:
    """Real zeros in the shape of `x`, also for complex `x`: for state such as a mean of |dx|^2."""
    write = getattr(type(x), "__full_like__", None)
    return registry.library(x).full_like(x, 0, real=True) if write is None else write(x, 0)


def copy(x: Array, dtype: str | None = None) -> Any:
    """A copy of `x`, for state that starts at the parameters; in the type of the arithmetic, or in
    `dtype`.
    """
    library = registry.library(x)
    return library.widened(x) if dtype is None else library.copied(x, dtype)


# -- said with these words -----------------------------------------------------------------------------------


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
    return one.type == "complex" if hasattr(type(x), "__word__") else registry.library(x).is_complex(one)


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
    return one.size if hasattr(type(x), "__word__") else registry.library(one).size(one)


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
    powers = sum(where(zero, 0.0 if p > 0 else float("inf"), where(zero, 1.0, size) ** p))
    nothing = equal(powers, 0) | equal(powers, 0.0 if p > 0 else float("inf"))
    return where(nothing, 0.0, where(nothing, 1.0, powers) ** (1 / p))


__all__ = [
    "Becomes",
    "abs",
    "abs2",
    "add",
    "arctan",
    "call",
    "ceil",
    "check",
    "clip",
    "conj",
    "copy",
    "cos",
    "divide",
    "dot",
    "ema",
    "equal",
    "exp",
    "expm1",
    "floor",
    "full_like",
    "greater",
    "greater_equal",
    "high_bits",
    "imag",
    "isfinite",
    "isnan",
    "join_bits",
    "landing",
    "less",
    "less_equal",
    "log",
    "log1p",
    "logical_and",
    "logical_not",
    "logical_or",
    "low_bits",
    "matmul",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "multiply",
    "negative",
    "norm",
    "norm2",
    "not_equal",
    "ones_like",
    "power",
    "real",
    "real_zeros_like",
    "reshape",
    "sign",
    "sin",
    "sqrt",
    "square",
    "subtract",
    "sum",
    "tanh",
    "total",
    "transpose",
    "typed_zeros_like",
    "under",
    "when",
    "where",
    "zeros_like",
]
