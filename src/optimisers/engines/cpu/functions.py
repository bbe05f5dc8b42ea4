"""What processors have no instruction for, as arithmetic that vectorises: logarithms, powers, angles.

The language would call a function of its library for each element, which takes three to ten times as long as
reading it. Of a float32 these are made of sums and products; powers and exponentials in double precision, so
that a float32 is off by its own rounding and little more. Of a float64 they are the library's own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from optimisers.engines.cpu.intrinsics import F32, F64, I32, I64


class Builder(Protocol):
    """Writes instructions of LLVM, and gives the value of each."""

    module: Any

    def __getattr__(self, name: str) -> Callable[..., Any]: ...


INFINITY, NAN = float("inf"), float("nan")

FUSED = ("contract",)
"""Lets a product and a sum be one instruction; nothing may be put in another order."""


def _of(number: float, beside: Any) -> ir.Constant:
    """A number in the type of a value."""
    return ir.Constant(beside.type, number)


def _polynomial(b: Builder, x: ir.Value, coefficients: Sequence[float]) -> Any:
    """The sum of c[k] x^k."""
    found: Any = _of(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        found = b.fadd(b.fmul(found, x, flags=FUSED), _of(c, x), flags=FUSED)
    return found


def _is(b: Builder, x: ir.Value, op: str, number: float) -> Any:
    """A comparison that does not hold of NaN."""
    return b.fcmp_ordered(op, x, _of(number, x))


def _nan(b: Builder, x: ir.Value) -> Any:
    return b.fcmp_unordered("uno", x, x)


def _absolute(b: Builder, x: ir.Value) -> Any:
    return b.bitcast(b.and_(b.bitcast(x, I32), ir.Constant(I32, 0x7FFFFFFF)), F32)


def _signed(b: Builder, size: ir.Value, x: ir.Value) -> Any:
    """A float32 that is not negative, with the sign of x."""
    sign = b.and_(b.bitcast(x, I32), ir.Constant(I32, 0x80000000))
    return b.bitcast(b.or_(b.bitcast(size, I32), sign), F32)


# -- logarithms ----------------------------------------------------------------------------------------------

LOG_SERIES = (
    *(0.33333331180030046, -0.24999996957950882, 0.200007157488921, -0.16667802319501254),
    *(0.1424905764569748, -0.12425687331451106, 0.1168541992348674, -0.11479733846637635),
    0.06971611471451176,
)
"""log(1 + f) = f - f^2 / 2 + f^3 (these, of f): the polynomial through the Chebyshev nodes between the roots
of 1/2 and 2; it is off by 3e-9 of the logarithm at most.
"""

LN2_HIGH, LN2_LOW = 0.693359375, -2.1219444005469058e-4
"""The logarithm of 2 as a number of few bits, and the rest."""


def _log(b: Builder, x: ir.Value) -> Any:
    """The logarithm of a float32: by exponent, and by a polynomial between the roots of 1/2 and 2."""

    def real(value: float) -> Any:
        return ir.Constant(F32, value)

    def whole(value: int) -> Any:
        return ir.Constant(I32, value)

    tiny = b.fcmp_ordered("<", x, real(2.0**-126))
    scaled = b.select(tiny, b.fmul(x, real(2.0**32)), x)
    bits = b.sub(b.bitcast(scaled, I32), whole(0x3F3504F3))
    exponent = b.sub(b.ashr(bits, whole(23)), b.select(tiny, whole(32), whole(0)))
    mantissa = b.bitcast(b.add(b.and_(bits, whole(0x7FFFFF)), whole(0x3F3504F3)), F32)
    f, e = b.fsub(mantissa, real(1.0)), b.sitofp(exponent, F32)
    found = real(LOG_SERIES[-1])
    for c in reversed(LOG_SERIES[:-1]):
        found = b.fadd(b.fmul(found, f), real(c))
    square = b.fmul(f, f)
    found = b.fadd(b.fmul(b.fmul(found, f), square), b.fmul(e, real(LN2_LOW)))
    found = b.fadd(found, b.fmul(square, real(-0.5)))
    found = b.fadd(b.fadd(f, found), b.fmul(e, real(LN2_HIGH)))
    found = b.select(b.fcmp_unordered("==", x, real(INFINITY)), x, found)
    found = b.select(b.fcmp_ordered("==", x, real(0.0)), real(-INFINITY), found)
    return b.select(b.fcmp_unordered("<", x, real(0.0)), real(NAN), found)


ROOT_HALF = 0x3FE6A09E667F3BCD
"""The bits of the root of 1/2."""

ATANH_SERIES = tuple(1 / (2 * k + 1) for k in range(7))
"""atanh(s) = s (these, of s^2); s is at most 0.172, where what is left out is 2e-12 of it."""


def _log2(b: Builder, x: ir.Value) -> Any:
    """The binary logarithm of a positive double that is not subnormal: 2^e m, log2 m = 2 atanh((m - 1) /
    (m + 1)) / ln 2.
    """
    one, low = ir.Constant(I64, 0x3FF0000000000000), ir.Constant(I64, ROOT_HALF)
    bits = b.sub(b.bitcast(x, I64), low)
    biased = b.lshr(b.add(bits, one), ir.Constant(I64, 52))
    e = b.sitofp(b.sub(b.trunc(biased, I32), ir.Constant(I32, 1023)), F64)
    m = b.bitcast(b.add(b.and_(bits, ir.Constant(I64, (1 << 52) - 1)), low), F64)
    s = b.fdiv(b.fsub(m, _of(1.0, m)), b.fadd(m, _of(1.0, m)))
    atanh = b.fmul(s, _polynomial(b, b.fmul(s, s), ATANH_SERIES))
    return b.fadd(e, b.fmul(atanh, _of(2 / math.log(2), s), flags=FUSED), flags=FUSED)


def _log1p(b: Builder, x: ir.Value) -> Any:
    """log(1 + x) of a float32, in double precision; near 0 by its series."""
    wide = b.fpext(x, F64)
    u = b.fadd(wide, _of(1.0, wide))
    inside = b.select(_is(b, u, ">", 0.0), u, _of(1.0, u))
    found = b.fmul(_log2(b, inside), _of(math.log(2), u))
    series = b.fmul(wide, _polynomial(b, wide, (1.0, -1 / 2, 1 / 3, -1 / 4)))
    small = b.fcmp_ordered("<", b.fmul(wide, wide), _of(1e-8, wide))
    found = b.fptrunc(b.select(small, series, found), F32)
    found = b.select(_is(b, x, "==", INFINITY), x, found)
    found = b.select(_is(b, x, "==", 0.0), x, found)
    found = b.select(_is(b, x, "==", -1.0), _of(-INFINITY, x), found)
    return b.select(b.fcmp_unordered("<", x, _of(-1.0, x)), _of(NAN, x), found)


# -- exponentials --------------------------------------------------------------------------------------------

EXP2_SERIES = tuple(math.log(2) ** k / math.factorial(k) for k in range(10))
"""2^r = these, of r; r is at most 1/2, where what is left out is 7e-12 of it."""

FAR = 300.0
"""Beyond 2^FAR and 2^-FAR a float32 is infinite, or 0."""

ROUND = 1.5 * 2.0**52
"""Added to a double and taken off again, it leaves the nearest whole number; it stands in the lowest bits."""


def _exp2(b: Builder, t: ir.Value) -> Any:
    """2^t of a double within FAR; of NaN something."""
    high = b.select(_is(b, t, "<", FAR), t, _of(FAR, t))
    t = b.select(_is(b, high, ">", -FAR), high, _of(-FAR, t))
    shifted = b.fadd(t, _of(ROUND, t))
    r = b.fsub(t, b.fsub(shifted, _of(ROUND, t)))
    raised = b.shl(b.bitcast(shifted, I64), ir.Constant(I64, 52))
    return b.bitcast(b.add(b.bitcast(_polynomial(b, r, EXP2_SERIES), I64), raised), F64)


def _natural(b: Builder, wide: ir.Value) -> Any:
    """e^x of a double."""
    return _exp2(b, b.fmul(wide, _of(1 / math.log(2), wide)))


def _exp(b: Builder, x: ir.Value) -> Any:
    return b.select(_nan(b, x), x, b.fptrunc(_natural(b, b.fpext(x, F64)), F32))


def _expm1(b: Builder, x: ir.Value) -> Any:
    """e^x - 1; near 0 by its series."""
    wide = b.fpext(x, F64)
    found = b.fsub(_natural(b, wide), _of(1.0, wide))
    series = b.fmul(wide, _polynomial(b, wide, (1.0, 1 / 2, 1 / 6, 1 / 24)))
    small = b.fcmp_ordered("<", b.fmul(wide, wide), _of(1e-6, wide))
    found = b.fptrunc(b.select(small, series, found), F32)
    return b.select(b.or_(_nan(b, x), _is(b, x, "==", 0.0)), x, found)


def _tanh(b: Builder, x: ir.Value) -> Any:
    """(1 - q) / (1 + q), q = e^(-2 |x|); near 0 by its series."""
    size = b.fpext(_absolute(b, x), F64)
    q = _natural(b, b.fmul(size, _of(-2.0, size)))
    found = b.fdiv(b.fsub(_of(1.0, q), q), b.fadd(_of(1.0, q), q))
    square = b.fmul(size, size)
    series = b.fmul(size, _polynomial(b, square, (1.0, -1 / 3, 2 / 15)))
    found = b.fptrunc(b.select(b.fcmp_ordered("<", square, _of(1e-5, square)), series, found), F32)
    return b.select(_nan(b, x), x, _signed(b, found, x))


# -- powers --------------------------------------------------------------------------------------------------


def _floor(b: Builder, x: Any) -> Any:
    return b.call(b.module.declare_intrinsic("llvm.floor", [x.type]), [x])


def _power(b: Builder, x: ir.Value, y: ir.Value) -> Any:
    """x^y of float32: 2^(y log2 |x|); of a negative x where y is whole, with its sign where y is odd. x^0 and
    1^y are 1 for NaN too, as in C.
    """
    size = _absolute(b, x)
    inside = b.and_(_is(b, size, ">", 0.0), _is(b, size, "<", INFINITY))
    log = _log2(b, b.fpext(b.select(inside, size, _of(1.0, x)), F64))
    log = b.select(_is(b, size, "==", 0.0), _of(-INFINITY, log), log)
    log = b.select(_is(b, size, "==", INFINITY), _of(INFINITY, log), log)
    found = b.fptrunc(_exp2(b, b.fmul(b.fpext(y, F64), log)), F32)
    half = b.fmul(y, _of(0.5, y))
    whole = b.fcmp_ordered("==", _floor(b, y), y)
    odd = b.and_(whole, b.fcmp_ordered("one", _floor(b, half), half))
    found = b.select(odd, _signed(b, found, x), found)
    below = b.and_(_is(b, x, "<", 0.0), _is(b, x, ">", -INFINITY))
    found = b.select(b.and_(below, b.not_(whole)), _of(NAN, x), found)
    found = b.select(b.fcmp_unordered("uno", x, y), _of(NAN, x), found)
    still = b.and_(_is(b, size, "==", 1.0), _is(b, _absolute(b, y), "==", INFINITY))
    one = b.or_(b.or_(_is(b, x, "==", 1.0), _is(b, y, "==", 0.0)), still)
    return b.select(one, _of(1.0, x), found)


THIRD_BITS = 1419900316
"""The bits of a float32 to the power -1/3 and a third of its own sum to these, within 4 of a hundred."""

THIRD_SERIES = 0.9999999891201892, 0.33469065275142795, 0.22335792913708086
"""(1 - h)^(-1/3) = these, of h: the polynomial through the Chebyshev nodes for |h| <= 0.102; it is off by
5e-5 at most.
"""


def _cube_root(b: Builder, x: ir.Value) -> Any:
    """x^(1/3) of a float32 that is not negative, without a division: r = x y^2 of y near x^(-1/3), which
    comes from a third of the bits; then a step of Newton's, r - (r^3 - x) y^2 / 3.
    """
    tiny = _is(b, x, "<", 2.0**-100)
    a = b.select(tiny, b.fmul(x, _of(2.0**48, x)), x)
    third = b.fmul(b.sitofp(b.bitcast(a, I32), F32), _of(-1 / 3, x))
    y: Any = b.bitcast(b.add(b.fptosi(third, I32), ir.Constant(I32, THIRD_BITS)), F32)
    h = b.fsub(_of(1.0, x), b.fmul(b.fmul(a, y), b.fmul(y, y)), flags=FUSED)
    y = b.fmul(y, _polynomial(b, h, THIRD_SERIES))
    square = b.fmul(y, y)
    r = b.fmul(a, square)
    over = b.fsub(b.fmul(b.fmul(r, r), r), a, flags=FUSED)
    r = b.fsub(r, b.fmul(over, b.fmul(square, _of(1 / 3, x))), flags=FUSED)
    r = b.select(tiny, b.fmul(r, _of(2.0**-16, x)), r)
    r = b.select(_is(b, x, "<", 0.0), _of(NAN, x), r)
    ends = b.or_(_is(b, x, "==", 0.0), _is(b, _absolute(b, x), "==", INFINITY))
    return b.select(ends, b.fmul(x, x), r)


# -- angles --------------------------------------------------------------------------------------------------

ATAN_SERIES = (
    *(1.0, -0.33333322488911593, 0.19999558100363982, -0.14278576024807985, 0.1105077127584966),
    *(-0.08785043282362845, 0.06685281517877423, -0.04392841073326746, 0.021912945865448386),
    *(-0.0070306694704242115, 0.0010576074380572419),
)
"""atan(z) = z (these, of z^2): the polynomial through the Chebyshev nodes between 0 and 1; it is off by 5e-10
of the angle at most.
"""

HALF_PI_HIGH, HALF_PI_LOW = 1.57079637050628662109375, -4.37113900018624283e-8
"""A right angle as a float32, and the rest."""


def _arctan(b: Builder, x: ir.Value) -> Any:
    return _slope(b, x, _of(1.0, x))


def _slope(b: Builder, y: ir.Value, x: ir.Value) -> Any:
    """The angle of y / x of float32, by one division: the smaller of the two by the larger."""
    rise, run = _absolute(b, y), _absolute(b, x)
    above = b.fcmp_ordered(">", rise, run)
    z = b.fdiv(b.select(above, run, rise), b.select(above, rise, run))
    found = b.fmul(z, _polynomial(b, b.fmul(z, z), ATAN_SERIES))
    rest = b.fsub(found, _of(HALF_PI_LOW, x))
    found = b.select(above, b.fsub(_of(HALF_PI_HIGH, x), rest), found)
    sign = b.bitcast(b.xor(b.bitcast(y, I32), b.bitcast(x, I32)), F32)
    return _signed(b, found, sign)


# -- what kernels call ---------------------------------------------------------------------------------------


def _function(emit: Callable[..., Any], library: str) -> Any:
    """An intrinsic on float32 numbers; on float64 the function `library` of LLVM or of C."""

    def emitted(_: object, b: Any, signature: Any, args: Sequence[ir.Value]) -> Any:
        if signature.args[0] == types.float32:
            return emit(b, *args)
        if library.startswith("llvm."):
            function = b.module.declare_intrinsic(library, [F64])
        else:
            kind = ir.FunctionType(F64, [F64] * len(args))
            function = b.module.globals.get(library) or ir.Function(b.module, kind, library)
        return b.call(function, args)

    return emitted


def _unary(emit: Callable[..., Any], library: str) -> Any:
    @intrinsic
    def function(typingctx: object, x: Any) -> Any:
        return x(x), _function(emit, library)

    return function


exponential = _unary(_exp, "llvm.exp")
logarithm = _unary(_log, "llvm.log")
log1p = _unary(_log1p, "log1p")
expm1 = _unary(_expm1, "expm1")
tanh = _unary(_tanh, "tanh")
arctan = _unary(_arctan, "atan")


@intrinsic
def arctan_of(typingctx: object, y: Any, x: Any) -> Any:
    """The arctan of y / x."""

    def emit(_: object, b: Any, signature: Any, args: Sequence[ir.Value]) -> Any:
        if signature.args[0] == types.float32:
            return _slope(b, *args)
        return _function(_arctan, "atan")(_, b, signature, [b.fdiv(*args)])

    return x(y, x), emit


def _third(b: Builder, x: ir.Value) -> Any:
    """x^(1/3) of a float64."""
    function = b.module.declare_intrinsic("llvm.pow", [F64])
    return b.call(function, [x, _of(1 / 3, x)])


@intrinsic
def cube_root(typingctx: object, x: Any) -> Any:
    """x^(1/3)."""

    def emit(_: object, b: Any, signature: Any, args: Sequence[ir.Value]) -> Any:
        return (_cube_root if signature.args[0] == types.float32 else _third)(b, *args)

    return x(x), emit


@intrinsic
def power(typingctx: object, x: Any, y: Any) -> Any:
    """x^y."""
    return x(x, x), _function(_power, "llvm.pow")
