"""Random bits in kernels of the CPU: `arrays.philox` in words of LLVM, where a product of 32 bits has 64."""

import functools
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from optimisers.arrays import philox
from optimisers.engines.cpu.intrinsics import F32, F64, I32, I64


def _product(b: ir.IRBuilder, x: Any, by: int) -> tuple[Any, Any]:
    whole = b.mul(b.zext(x, I64), ir.Constant(I64, by))
    return b.trunc(b.lshr(whole, ir.Constant(I64, 32)), I32), b.trunc(whole, I32)


def _words(b: ir.IRBuilder, counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, ...]:
    a, second, c, d = counter
    k, m = key
    for _ in range(philox.ROUNDS):
        (high, low), (high2, low2) = (
            _product(b, x, by) for x, by in zip((a, c), philox.MULTIPLIERS, strict=True)
        )
        a, second, c, d = b.xor(b.xor(high2, second), k), low2, b.xor(b.xor(high, d), m), low
        k, m = (b.add(x, ir.Constant(I32, by)) for x, by in zip((k, m), philox.STEPS, strict=True))
    return a, second, c, d


@functools.cache
def random_word(draw: int, which: int, bits: int, real: str) -> Any:
    """`word(seed, step, first, last, element)`: the first bits of one of the four words of an element, as a
    whole number in the type of the arithmetic.
    """
    number, kind = (types.float32, F32) if real == "float32" else (types.float64, F64)

    def emit(_: object, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
        seed, step, first, last = (b.trunc(b.fptosi(x, I64), I32) for x in args[:4])
        low, high = b.trunc(args[4], I32), b.trunc(b.lshr(args[4], ir.Constant(I64, 32)), I32)
        last = b.add(last, ir.Constant(I32, draw << 24))
        found = _words(b, (low, high, step, last), (seed, first))[which]
        return b.uitofp(b.lshr(found, ir.Constant(I32, 32 - bits)), kind)

    @intrinsic
    def word(
        typingctx: object, seed: object, step: object, first: object, last: object, element: object
    ) -> Any:
        return number(number, number, number, number, types.int64), emit

    return word
