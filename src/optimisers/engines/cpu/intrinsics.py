"""What generated kernels are made of: reading and writing elements at addresses, and a few words of LLVM.

Numba knows no pointers made of integers, no bfloat16 and no arithmetic in float16; these intrinsics give it
all three. Each array of a kernel has an alias scope of its own, which spares LLVM its overlap checks.
"""

import functools
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()

MEMORY: dict[str, Any] = {
    **dict.fromkeys(("int16", "float16", "bfloat16"), I16),
    **dict.fromkeys(("float32", "complex64"), F32),
    **dict.fromkeys(("float64", "complex128"), F64),
}
"""Element type -> LLVM type in memory, of each part of a complex number."""


def _scopes(module: Any, slot: int, slots: int) -> Any:
    domain = module.add_metadata(["optimisers"])
    scopes = [module.add_metadata([f"array {i}", domain]) for i in range(slots)]
    others = [s for i, s in enumerate(scopes) if i != slot]
    return module.add_metadata([scopes[slot]]), module.add_metadata(others)


def _mark(instruction: Any, module: Any, slot: int, slots: int) -> Any:
    mine, others = _scopes(module, slot, slots)
    instruction.set_metadata("alias.scope", mine)
    instruction.set_metadata("noalias", others)
    return instruction


NUMBERS = {
    ("float32", 1): types.float32,
    ("float64", 1): types.float64,
    ("float32", 2): types.complex64,
    ("float64", 2): types.complex128,
}
"""(real type of the arithmetic, 2 for complex numbers) -> type of a number."""


def _between(b: ir.IRBuilder, v: ir.Value, *, have: bool, want: bool) -> Any:
    """A real number in single or double precision, of which each is said by whether it is double."""
    if have == want:
        return v
    return b.fpext(v, F64) if want else b.fptrunc(v, F32)


@functools.cache
def loader(kind: str, slot: int, slots: int, real: str) -> Any:
    """`load(address, i)`: element i of an array of this kind, array `slot` of `slots`, in the type of the
    arithmetic, whose real numbers are `real`.
    """
    memory = MEMORY[kind]
    parts = 2 if kind.startswith("complex") else 1
    number = NUMBERS[real, parts]
    widen = WIDENING.get(kind, lambda _, v: v)

    def emit(context: Any, b: Any, signature: Any, args: Sequence[ir.Value]) -> Any:
        base = b.inttoptr(args[0], memory.as_pointer())
        index = args[1] if parts == 1 else b.mul(args[1], ir.Constant(I64, 2))
        found = [
            _mark(b.load(b.gep(base, [b.add(index, ir.Constant(I64, p))])), b.module, slot, slots)
            for p in range(parts)
        ]
        found = [_between(b, widen(b, v), have=memory == F64, want=real == "float64") for v in found]
        if parts == 1:
            return found[0]
        z = context.make_complex(b, signature.return_type)
        z.real, z.imag = found
        return z._getvalue()  # noqa: SLF001 Numba's own way to read a struct proxy

    @intrinsic
    def load(typingctx: object, address: object, i: Any) -> Any:
        return number(types.int64, types.int64), emit

    return load


@functools.cache
def storer(kind: str, slot: int, slots: int, real: str) -> Any:
    """`store(address, i, value)`: write element i, given in the type of the arithmetic, rounded to this kind
    (to nearest, ties to even).
    """
    memory = MEMORY[kind]
    parts = 2 if kind.startswith("complex") else 1
    number = NUMBERS[real, parts]
    narrow = ROUNDING.get(kind, lambda _, v: v)

    def emit(context: Any, b: Any, signature: Any, args: Sequence[ir.Value]) -> Any:
        base = b.inttoptr(args[0], memory.as_pointer())
        found, index = [args[2]], args[1]
        if parts == 2:
            z = context.make_complex(b, signature.args[2], value=args[2])
            found, index = [z.real, z.imag], b.mul(args[1], ir.Constant(I64, 2))
        for p, part in enumerate(found):
            value = narrow(b, _between(b, part, have=real == "float64", want=memory == F64))
            _mark(b.store(value, b.gep(base, [b.add(index, ir.Constant(I64, p))])), b.module, slot, slots)
        return context.get_dummy_value()

    @intrinsic
    def store(typingctx: object, address: object, i: Any, value: object) -> Any:
        return types.void(types.int64, types.int64, number), emit

    return store


# -- half precision by its bits: the same on every processor, and it vectorises ------------------------------


def widen_half(b: ir.IRBuilder, h: ir.Value) -> Any:
    """float16 -> float32: shift the bits into place and set the exponent right; subnormal numbers, infinities
    and NaN apart. No float32 on the way is subnormal: threads of XLA take such for 0.
    """
    u = b.zext(h, I32)
    size = b.shl(b.and_(u, ir.Constant(I32, 0x7FFF)), ir.Constant(I32, 13))
    least = ir.Constant(I32, 113 << 23)
    small = b.fsub(b.bitcast(b.add(size, least), F32), b.bitcast(least, F32))
    normal = b.add(size, ir.Constant(I32, 112 << 23))
    bits = b.select(b.icmp_unsigned("<", size, ir.Constant(I32, 1 << 23)), b.bitcast(small, I32), normal)
    special = b.icmp_unsigned(">=", size, ir.Constant(I32, 0x0F800000))
    bits = b.select(special, b.or_(size, ir.Constant(I32, 0x7F800000)), bits)
    sign = b.shl(b.and_(u, ir.Constant(I32, 0x8000)), ir.Constant(I32, 16))
    return b.bitcast(b.or_(bits, sign), F32)


def widen_brain(b: ir.IRBuilder, h: ir.Value) -> Any:
    """bfloat16 -> float32: the upper half of its bits."""
    return b.bitcast(b.shl(b.zext(h, I32), ir.Constant(I32, 16)), F32)


def widen_int(b: ir.IRBuilder, i: Any) -> Any:
    """int16 -> float32."""
    return b.sitofp(i, F32)


def narrow_half(b: ir.IRBuilder, v: ir.Value) -> Any:
    """float32 -> float16, to nearest, ties to even: three ranges (too large, subnormal, normal), by their
    bits.
    """
    u = b.bitcast(v, I32)
    sign = b.and_(u, ir.Constant(I32, 0x80000000))
    u = b.xor(u, sign)
    nan = b.icmp_unsigned(">", u, ir.Constant(I32, 255 << 23))
    large = b.select(nan, ir.Constant(I32, 0x7E00), ir.Constant(I32, 0x7C00))
    magic = ir.Constant(I32, 126 << 23)
    small = b.sub(b.bitcast(b.fadd(b.bitcast(u, F32), b.bitcast(magic, F32)), I32), magic)
    odd = b.and_(b.lshr(u, ir.Constant(I32, 13)), ir.Constant(I32, 1))
    shifted = b.add(u, ir.Constant(I32, (((15 - 127) << 23) + 0xFFF) & 0xFFFFFFFF))
    normal = b.lshr(b.add(shifted, odd), ir.Constant(I32, 13))
    bits = b.select(b.icmp_unsigned("<", u, ir.Constant(I32, 113 << 23)), small, normal)
    bits = b.select(b.icmp_unsigned(">=", u, ir.Constant(I32, 143 << 23)), large, bits)
    return b.trunc(b.or_(bits, b.lshr(sign, ir.Constant(I32, 16))), I16)


def narrow_brain(b: ir.IRBuilder, v: ir.Value) -> Any:
    """float32 -> bfloat16, to nearest, ties to even; NaN stays NaN."""
    u = b.bitcast(v, I32)
    odd = b.and_(b.lshr(u, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = b.lshr(b.add(b.add(u, ir.Constant(I32, 0x7FFF)), odd), ir.Constant(I32, 16))
    quiet = b.or_(b.lshr(u, ir.Constant(I32, 16)), ir.Constant(I32, 0x40))
    return b.trunc(b.select(b.fcmp_unordered("uno", v, v), quiet, rounded), I16)


def narrow_int(b: ir.IRBuilder, v: ir.Value) -> Any:
    """A whole number in float32 -> int16."""
    return b.trunc(b.fptosi(v, I32), I16)


WIDENING = {"bfloat16": widen_brain, "float16": widen_half, "int16": widen_int}

ROUNDING = {"bfloat16": narrow_brain, "float16": narrow_half, "int16": narrow_int}

# -- words ---------------------------------------------------------------------------------------------------


@intrinsic
def select(typingctx: object, condition: object, a: Any, b: Any) -> Any:
    """a if the condition holds, else b, without a branch."""

    def emit(_: object, builder: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
        return builder.select(args[0], args[1], args[2])

    return a(types.boolean, a, a), emit


@intrinsic
def complex_of(typingctx: object, re: Any, im: Any) -> Any:
    """The complex number of two reals, no wider than they are."""
    kind = types.complex64 if re == types.float32 else types.complex128

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
        z = context.make_complex(builder, signature.return_type)
        z.real, z.imag = args
        return z._getvalue()  # noqa: SLF001 Numba's own way to read a struct proxy

    return kind(re, re), emit


LEAST, MOST, UP, DOWN = 2.0**-900, 2.0**1000, 2.0**600, 2.0**-600
"""Between which sums of squares are trusted as they are; by what elements are multiplied below and above."""


@intrinsic
def refit(typingctx: object, total: object) -> Any:
    """By what to multiply elements whose squares sum to `total`: 1 where that is neither too large nor too
    small to be right.
    """

    def emit(_: object, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
        small = b.fcmp_ordered("<", args[0], ir.Constant(F64, LEAST))
        large = b.fcmp_unordered(">", args[0], ir.Constant(F64, MOST))
        by = b.select(large, ir.Constant(F64, DOWN), ir.Constant(F64, 1.0))
        return b.select(small, ir.Constant(F64, UP), by)

    return types.float64(types.float64), emit


@intrinsic
def square(typingctx: object, x: object, by: object) -> Any:
    """(x by)^2, multiplied in this order: each half is in range, by^2 and x^2 need not be."""

    def emit(_: object, b: Any, __: object, args: Sequence[ir.Value]) -> Any:
        fitted = b.fmul(args[0], args[1], flags=("nsz",))  # flags of its own: not those of the kernel
        return b.fmul(fitted, fitted, flags=("nsz",))

    return types.float64(types.float64, types.float64), emit


@intrinsic
def claim(typingctx: object, counter: object) -> Any:
    """The number at the address `counter`, which is raised by one in the same instant: the next span to work
    on.
    """

    def emit(_: object, builder: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64), emit


def _ranked(*, nan_last: bool) -> Any:
    """A float as an integer of the same order, NaN above or below all: integer maxima vectorise, float ones
    do not.
    """

    @intrinsic
    def rank(typingctx: object, x: Any) -> Any:
        bits, result = (I32, types.int32) if x == types.float32 else (I64, types.int64)
        top = (1 << (bits.width - 1)) - 1

        def emit(_: object, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
            i = b.bitcast(args[0], bits)
            flipped = b.xor(i, b.and_(b.ashr(i, ir.Constant(bits, bits.width - 1)), ir.Constant(bits, top)))
            edge = ir.Constant(bits, top if nan_last else -top - 1)
            return b.select(b.fcmp_unordered("uno", args[0], args[0]), edge, flipped)

        return result(x), emit

    return rank


rank_max = _ranked(nan_last=True)
rank_min = _ranked(nan_last=False)


@intrinsic
def unrank(typingctx: object, i: Any) -> Any:
    """The float of a rank; the bits of both edges are those of a NaN."""
    bits, number, result = (I32, F32, types.float32) if i == types.int32 else (I64, F64, types.float64)
    top = (1 << (bits.width - 1)) - 1

    def emit(_: object, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
        mask = b.and_(b.ashr(args[0], ir.Constant(bits, bits.width - 1)), ir.Constant(bits, top))
        return b.bitcast(b.xor(args[0], mask), number)

    return result(i), emit


# -- looking at Python objects -------------------------------------------------------------------------------


def _peek(bits: Any, result: Any) -> Any:
    @intrinsic
    def peek(typingctx: object, address: object) -> Any:
        def emit(_: object, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
            return b.load(b.inttoptr(args[0], bits.as_pointer()))

        return result(types.int64), emit

    return peek


peek64 = _peek(I64, types.int64)
peek32 = _peek(I32, types.int32)


# -- calling compiled kernels --------------------------------------------------------------------------------


@intrinsic
def address_of(typingctx: object, array: Any) -> Any:
    """Where the elements of an array of NumPy lie."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
        found = context.make_array(signature.args[0])(context, b, args[0])
        return b.ptrtoint(found.data, I64)

    return types.int64(array), emit


@intrinsic
def run(
    typingctx: object,
    kernel: object,
    counter: object,
    spans: object,
    bounds: object,
    chunks: object,
    addresses: object,
    leaves: object,
    table: object,
    scalars: object,
    row: object,
    partial: object,
    pieces: object,
) -> Any:
    """Call a compiled kernel, which takes these words (see `compiler`)."""

    def emit(context: Any, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(args[1:]))
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), emit


# -- the bits of a float32 -----------------------------------------------------------------------------------


def _word(emit: Any, *, two: bool = False) -> Any:
    """An intrinsic on one float32, or two, that gives a float32."""
    if two:

        @intrinsic
        def word2(typingctx: object, x: Any, y: object) -> Any:
            return types.float32(types.float32, types.float32), lambda _, b, __, args: emit(b, *args)

        return word2

    @intrinsic
    def word1(typingctx: object, x: Any) -> Any:
        return types.float32(types.float32), lambda _, b, __, args: emit(b, *args)

    return word1


def _high(b: ir.IRBuilder, x: ir.Value) -> Any:
    rounded = b.and_(b.add(b.bitcast(x, I32), ir.Constant(I32, 0x8000)), ir.Constant(I32, 0xFFFF0000))
    return b.select(b.fcmp_unordered("uno", x, x), ir.Constant(F32, float("nan")), b.bitcast(rounded, F32))


def _low(b: ir.IRBuilder, x: ir.Value) -> Any:
    rest = b.sitofp(b.sub(b.bitcast(x, I32), b.bitcast(_high(b, x), I32)), F32)
    return b.select(b.fcmp_unordered("uno", x, x), ir.Constant(F32, 0.0), rest)


def _join(b: ir.IRBuilder, high: ir.Value, low: ir.Value) -> Any:
    return b.bitcast(b.add(b.bitcast(high, I32), b.fptosi(low, I32)), F32)


join_bits = _word(_join, two=True)
high_bits = _word(_high)
low_bits = _word(_low)


# -- numbers as they come back from an array of a narrower type ----------------------------------------------


def _rounding(emit32: Any) -> Any:
    """An intrinsic that rounds a float32, or a float64 by way of one, as `storer` does."""

    @intrinsic
    def word(typingctx: object, x: Any) -> Any:
        def emit(_: object, b: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
            double = signature.args[0] == types.float64
            found = emit32(b, b.fptrunc(args[0], F32) if double else args[0])
            return b.fpext(found, F64) if double else found

        return x(x), emit

    return word


def _nearest(b: ir.IRBuilder, u: Any, bits: int) -> Any:
    """The bits of a float32 without the last `bits`, rounded to nearest, ties to even."""
    odd = b.and_(b.lshr(u, ir.Constant(I32, bits)), ir.Constant(I32, 1))
    sum_ = b.add(b.add(u, ir.Constant(I32, (1 << (bits - 1)) - 1)), odd)
    return b.and_(sum_, ir.Constant(I32, 0x100000000 - (1 << bits)))


def _as_brain(b: ir.IRBuilder, v: ir.Value) -> Any:
    return b.select(b.fcmp_unordered("uno", v, v), v, b.bitcast(_nearest(b, b.bitcast(v, I32), 16), F32))


def _as_half(b: ir.IRBuilder, v: ir.Value) -> Any:
    """The ranges of `narrow_half`, without leaving float32."""
    u = b.bitcast(v, I32)
    sign = b.and_(u, ir.Constant(I32, 0x80000000))
    size = b.xor(u, sign)
    magic = ir.Constant(I32, 126 << 23)
    small = b.sub(b.bitcast(b.fadd(b.bitcast(size, F32), b.bitcast(magic, F32)), I32), magic)
    small = b.bitcast(b.fmul(b.sitofp(small, F32), ir.Constant(F32, 2.0**-24)), I32)
    found = b.select(b.icmp_unsigned("<", size, ir.Constant(I32, 113 << 23)), small, _nearest(b, size, 13))
    large = b.icmp_unsigned(">=", found, ir.Constant(I32, 143 << 23))
    found = b.select(large, ir.Constant(I32, 0x7F800000), found)
    return b.select(b.fcmp_unordered("uno", v, v), v, b.bitcast(b.or_(found, sign), F32))


to_bfloat16 = _rounding(_as_brain)
to_float16 = _rounding(_as_half)
to_float32 = _rounding(lambda _, v: v)
