"""Which operations must an engine know? These; what a rule may say beside them is written with them.

The names are those that users write, and hide some of Python's own, of which nothing is used here.
"""

from collections.abc import Callable
from typing import Any

from optimisers.arrays.protocol import Operand, Shape
from optimisers.ops.dispatch import primitive

# -- arithmetic; the operators + - * / ** < & ... of a symbol are these --------------------------------------


@primitive()
def add(a: Operand, b: Operand) -> Any:
    """a + b."""


@primitive()
def subtract(a: Operand, b: Operand) -> Any:
    """a - b."""


@primitive()
def multiply(a: Operand, b: Operand) -> Any:
    """a * b."""


@primitive()
def divide(a: Operand, b: Operand) -> Any:
    """a / b."""


@primitive()
def power(a: Operand, b: Operand) -> Any:
    """a ** b."""


@primitive()
def negative(x: Operand) -> Any:
    """-x."""


@primitive(gives="bool")
def less(a: Operand, b: Operand) -> Any:
    """a < b."""


@primitive(gives="bool")
def less_equal(a: Operand, b: Operand) -> Any:
    """a <= b."""


@primitive(gives="bool")
def greater(a: Operand, b: Operand) -> Any:
    """a > b."""


@primitive(gives="bool")
def greater_equal(a: Operand, b: Operand) -> Any:
    """a >= b."""


@primitive(gives="bool")
def equal(a: Operand, b: Operand) -> Any:
    """a == b, element by element."""


@primitive(gives="bool")
def not_equal(a: Operand, b: Operand) -> Any:
    """a != b, element by element."""


@primitive(gives="bool")
def logical_and(a: Operand, b: Operand) -> Any:
    """a & b of conditions."""


@primitive(gives="bool")
def logical_or(a: Operand, b: Operand) -> Any:
    """a | b of conditions."""


@primitive(gives="bool")
def logical_not(a: Operand) -> Any:
    """~a of a condition."""


# -- functions of one element --------------------------------------------------------------------------------


@primitive()
def sqrt(x: Operand) -> Any:
    """Square root; where an engine differentiates, its derivative at 0 is 0."""


@primitive()
def exp(x: Operand) -> Any:
    """e to the power x."""


@primitive()
def expm1(x: Operand) -> Any:
    """exp(x) - 1 without cancellation near 0."""


@primitive()
def log(x: Operand) -> Any:
    """Natural logarithm."""


@primitive()
def log1p(x: Operand) -> Any:
    """log(1 + x) without cancellation near 0."""


@primitive()
def sin(x: Operand) -> Any:
    """Sine of x in radians."""


@primitive()
def cos(x: Operand) -> Any:
    """Cosine of x in radians."""


@primitive()
def tanh(x: Operand) -> Any:
    """Hyperbolic tangent."""


@primitive()
def arctan(x: Operand) -> Any:
    """Inverse tangent, in radians."""


@primitive()
def floor(x: Operand) -> Any:
    """The largest whole number not above x."""


@primitive()
def ceil(x: Operand) -> Any:
    """The smallest whole number not below x."""


@primitive()
def sign(x: Operand) -> Any:
    """-1, 0 or 1; z/|z| for complex z; NaN stays NaN."""


@primitive(gives="real")
def abs(x: Operand) -> Any:
    """|x|, real also for complex x."""


@primitive(gives="real")
def abs2(x: Operand) -> Any:
    """|x|^2, real also for complex x."""


@primitive(gives="real")
def real(x: Operand) -> Any:
    """The real part."""


@primitive(gives="real")
def imag(x: Operand) -> Any:
    """The imaginary part."""


@primitive()
def conj(x: Operand) -> Any:
    """The complex conjugate."""


@primitive(gives="bool")
def isfinite(x: Operand) -> Any:
    """Whether x is neither infinite nor NaN."""


@primitive(gives="bool")
def isnan(x: Operand) -> Any:
    """Whether x is NaN."""


@primitive()
def maximum(a: Operand, b: Operand) -> Any:
    """The larger of a and b, element by element; NaN if one of them is NaN."""


@primitive()
def minimum(a: Operand, b: Operand) -> Any:
    """The smaller of a and b, element by element; NaN if one of them is NaN."""


@primitive(gives="branch")
def where(condition: Operand, a: Operand, b: Operand) -> Any:
    """a where the condition holds, else b; the one not taken may hold anything, NaN included."""


@primitive(gives="real")
def join_bits(high: Operand, low: Operand) -> Any:
    """The float32 whose bits are those of `high`, a bfloat16, plus the whole number `low`."""


@primitive(gives="real")
def high_bits(x: Operand) -> Any:
    """The bfloat16 nearest to a float32, halves rounded up; with `low_bits` it keeps all of x."""


@primitive(gives="real")
def low_bits(x: Operand) -> Any:
    """What `high_bits` leaves of the bits of a float32: a whole number in [-32768, 32767]."""


@primitive()
def to_float16(x: Operand) -> Any:
    """x as it comes back from an array of float16: rounded to the nearest, halves to even, and read again."""


@primitive()
def to_bfloat16(x: Operand) -> Any:
    """x as it comes back from an array of bfloat16."""


@primitive()
def to_float32(x: Operand) -> Any:
    """x as it comes back from an array of float32."""


@primitive("random", gives="real")
def random_word(
    x: Operand,
    seed: Operand,
    step: Operand,
    first: Operand,
    last: Operand,
    *,
    draw: int,
    part: int,
    bits: int,
) -> Any:
    """Random bits for every element of `x` as whole numbers in [0, 2^bits), or which of a pair it is, by
    `arrays.philox`; `first` and `last` are the number of the array. In a lowered graph it takes the four
    scalars alone.
    """


# -- reductions: of a whole array to one number (these stay fused), or along an axis -------------------------


@primitive("reduce")
def sum(x: Operand, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """The sum over all elements of this array, in float64 inside fused kernels; or along `axis`."""


@primitive("reduce", gives="real")
def norm2(x: Operand, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """The root of the sum of |x|^2 over all elements of this array, right also where the squares are too
    large or too small for their type; or along `axis`.
    """


@primitive("reduce")
def max(x: Operand, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """The largest element of this array (NaN if there is one); or along `axis`."""


@primitive("reduce")
def min(x: Operand, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """The smallest element of this array (NaN if there is one); or along `axis`."""


# -- what the array library does itself: right, though not fused ---------------------------------------------


@primitive("shape")
def matmul(a: Operand, b: Operand, *, dtype: str | None = None) -> Any:
    """The matrix product a @ b.

    `dtype` is the type in which it is taken of real matrices: `bfloat16`, `float32`, or `fast`, which is
    bfloat16 where matrices are float32 and the device has units for it (CUDA from compute capability 8.0 on,
    what JAX runs on that is no CPU); None is that of the arithmetic. NumPy and CuPy do not multiply bfloat16,
    and take float32.
    """


@primitive("shape")
def transpose(x: Operand) -> Any:
    """The array with its last two axes exchanged."""


@primitive("shape")
def reshape(x: Operand, shape: Shape) -> Any:
    """The same elements in another shape."""


@primitive("shape")
def call(function: Callable[..., Any], *args: object) -> Any:
    """`function(*arrays)`: any function of the array library, on whole arrays; it must be pure."""


ROUNDINGS = ("to_float16", "to_bfloat16", "to_float32")
"""Operations that store and read again."""
