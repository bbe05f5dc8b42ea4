"""Random bits in kernels of the CPU: `arrays.philox` in words of LLVM, where a product of 32 bits has 64."""

import functools
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from optimisers.arrays import philox
from optimisers.engines.cpu.intrinsics import F32, F64, I32, I64


def _words(b: ir.IRBuilder, counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, ...]:
    """The four words, of which the lower 32 bits count: products read no others, so none are cut off."""

    def of(number: int) -> ir.Constant:
        return ir.Constant(I64, number)

    a, second, c, d = counter
    k, m = key
    for _ in range(philox.ROUNDS):
        one, two = (
            b.mul(b.and_(x, of(philox.MASK)), of(by))
            for x, by in zip((a, c), philox.MULTIPLIERS, strict=True)
        )
        a, second = b.xor(b.xor(b.lshr(two, of(32)), second), k), two
        c, d = b.xor(b.xor(b.lshr(one, of(32)), d), m), one
        k, m = (b.add(x, of(by)) for x, by in zip((k, m), philox.STEPS, strict=True))
    return a, second, c, d


def _place(b: ir.IRBuilder, element: Any) -> tuple[Any, Any]:
    """(the place whose words an element shares, which of four it is)."""
    low = ir.Constant(I64, philox.LANES - 1)
    above = b.and_(b.lshr(element, ir.Constant(I64, 2)), b.not_(low))
    lane = b.and_(b.udiv(element, ir.Constant(I64, philox.LANES)), ir.Constant(I64, 3))
    return b.or_(above, b.and_(element, low)), lane


def _bit(b: ir.IRBuilder, lane: Any, which: int) -> Any:
    return b.icmp_unsigned("!=", b.and_(lane, ir.Constant(I64, which)), ir.Constant(I64, 0))


def _chosen(b: ir.IRBuilder, four: Sequence[Any], lane: Any, part: int) -> Any:
    """The word that an element takes, of the four of its place."""
    upper = _bit(b, lane, 2)
    even, odd = (b.select(upper, four[i + 2], four[i]) for i in range(2))
    if part == philox.OWN:
        return b.select(_bit(b, lane, 1), odd, even)
    return even if part == philox.EVEN else odd


@functools.cache
def random_word(draw: int, part: int, bits: int, real: str, which: int | None = None) -> Any:
    """`word(seed, step, first, last, element)`: what an element takes (see `arrays.philox`), as a whole
    number in the type of the arithmetic. With `which` it is that word of a place.
    """
    number, kind = (types.float32, F32) if real == "float32" else (types.float64, F64)

    def emit(_: object, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
        seed, step, first, last = (b.fptosi(x, I64) for x in args[:4])
        at, lane = (args[4], None) if which is not None else _place(b, args[4])
        if part == philox.PARITY:
            return b.uitofp(b.and_(lane, ir.Constant(I64, 1)), kind)
        alone = {philox.FIRST: 0, philox.SECOND: 1}.get(part, which)
        place = args[4] if part in (philox.FIRST, philox.SECOND) else at
        counter = place, b.lshr(place, ir.Constant(I64, 32)), step, b.add(last, ir.Constant(I64, draw << 24))
        four = _words(b, counter, (seed, first))
        found = b.trunc(_chosen(b, four, lane, part) if alone is None else four[alone], I32)
        return b.uitofp(b.lshr(found, ir.Constant(I32, 32 - bits)), kind)

    @intrinsic
    def word(
        typingctx: object, seed: object, step: object, first: object, last: object, element: object
    ) -> Any:
        return number(number, number, number, number, types.int64), emit

    return word
