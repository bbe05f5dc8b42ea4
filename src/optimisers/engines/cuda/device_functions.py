"""What the text of Triton kernels calls: loads and stores, precise functions, and reductions over one block.

Under TRITON_INTERPRET=1, which must be set before Triton is imported, the same kernels run on the CPU, by
NumPy: there the functions of NVIDIA's libdevice are NumPy's own.
"""

# The language of kernels has the grammar of Python, not its types.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportOperatorIssue=false

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret) and type(tl.sum).__name__ == "InterpretedFunction"
"""Whether kernels of this process run on the CPU; for Triton's own functions that was settled when it was
imported.
"""


def _precise(name: str, on_host: Callable[..., Any]) -> Any:
    """A function of libdevice, precise to a unit or two in the last place."""
    if not INTERPRETED:
        from triton.language.extra import libdevice

        return getattr(libdevice, name)
    from triton.runtime.interpreter import TensorHandle

    def function(*args: Any) -> Any:
        found = on_host(*(a.handle.data for a in args))
        like = max(args, key=lambda a: len(a.shape))
        return tl.core.tensor(TensorHandle(found.astype(like.handle.data.dtype), like.dtype), like.type)

    return function


exp = _precise("exp", np.exp)
expm1 = _precise("expm1", np.expm1)
log = _precise("log", np.log)
log1p = _precise("log1p", np.log1p)
sin = _precise("sin", np.sin)
cos = _precise("cos", np.cos)
tanh = _precise("tanh", np.tanh)
arctan = _precise("atan", np.arctan)
power = _precise("pow", np.power)


# -- arrays --------------------------------------------------------------------------------------------------


@triton.jit
def load(at, i, n, full: tl.constexpr):
    """Elements i of an array; those from n on are not read."""
    if full:
        return tl.load(at + i)
    else:
        return tl.load(at + i, mask=i < n, other=0)


@triton.jit
def store(at, i, n, value, full: tl.constexpr):
    """Write elements i of an array; those from n on are not written."""
    if full:
        tl.store(at + i, value)
    else:
        tl.store(at + i, value, mask=i < n)


@triton.jit
def live(value, i, n, other, full: tl.constexpr):
    """Values of elements; `other` for those from n on."""
    if full:
        return value
    else:
        return tl.where(i < n, value, other)


@triton.jit
def widened(x):
    """bfloat16 as float32; Triton's interpreter would lose the smallest numbers."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def bfloat16_of(x):
    """float32 as bfloat16, to the nearest, halves to even: Triton's interpreter would cut it off."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    kept = tl.where(x != x, 0x7FC0, rounded).to(tl.int16)
    return kept.to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bfloat16(x):
    """A number as it comes back from an array of bfloat16."""
    return widened(bfloat16_of(x)).to(x.dtype)


@triton.jit
def to_float16(x):
    """A number as it comes back from an array of float16."""
    return x.to(tl.float32).to(tl.float16).to(x.dtype)


@triton.jit
def to_float32(x):
    """A number as it comes back from an array of float32."""
    return x.to(tl.float32).to(x.dtype)


# -- precise functions ---------------------------------------------------------------------------------------


@triton.jit
def divide(a, b):
    """The quotient, rounded to nearest; `/` of float32 is off by two units."""
    if a.dtype == tl.float32:
        return tl.math.div_rn(a, b)
    else:
        return a / b


@triton.jit
def root(x):
    """The square root, rounded to nearest."""
    if x.dtype == tl.float32:
        return tl.math.sqrt_rn(x)
    else:
        return tl.math.sqrt(x)


@triton.jit
def larger(a, b):
    """The larger number; NaN if one of them is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    """The smaller number; NaN if one of them is."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def join_bits(high, low):
    return (high.to(tl.int32, bitcast=True) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _rounded_bits(x):
    return (x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000


@triton.jit
def high_bits(x):
    """The nearest bfloat16, halves up, as a float32."""
    return tl.where(x != x, float("nan"), _rounded_bits(x).to(tl.float32, bitcast=True))


@triton.jit
def low_bits(x):
    """What `high_bits` leaves, as a whole number."""
    return tl.where(x != x, 0.0, (x.to(tl.int32, bitcast=True) - _rounded_bits(x)).to(tl.float32))


# -- random bits: `arrays.philox` --------------------------------------------------------------------------


@triton.jit
def random_word(seed, step, first, last, at, DRAW: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr):
    """What an element takes (see `arrays.philox`), as a whole number of 32 bits without sign."""
    lane = ((at >> 6) & 3).to(tl.uint32)
    if PART == 3:
        found = lane & 1
    elif PART > 3:
        a, b, c, d = words(seed, step, first, last, at, DRAW)
        found = (a if PART == 4 else b) >> (32 - BITS)
    else:
        a, b, c, d = words(seed, step, first, last, ((at >> 2) & -64) | (at & 63), DRAW)
        even, odd = tl.where((lane & 2) != 0, c, a), tl.where((lane & 2) != 0, d, b)
        if PART == 0:
            found = tl.where((lane & 1) != 0, odd, even) >> (32 - BITS)
        else:
            found = (even if PART == 1 else odd) >> (32 - BITS)
    return found


@triton.jit
def words(seed, step, first, last, place, DRAW: tl.constexpr):
    """The four words of a place."""
    a, b = (place & 0xFFFFFFFF).to(tl.uint32), (place >> 32).to(tl.uint32)
    c = a * 0 + step.to(tl.int64).to(tl.uint32)
    d = a * 0 + (last.to(tl.int64) + (DRAW << 24)).to(tl.uint32)
    k, m = a * 0 + seed.to(tl.int64).to(tl.uint32), a * 0 + first.to(tl.int64).to(tl.uint32)
    by, by2 = tl.full([], 0xD2511F53, tl.uint32), tl.full([], 0xCD9E8D57, tl.uint32)
    more, more2 = tl.full([], 0x9E3779B9, tl.uint32), tl.full([], 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues] unrolled
        high, low = tl.umulhi(a, by), a * by
        high2, low2 = tl.umulhi(c, by2), c * by2
        a, b, c, d = high2 ^ b ^ k, low2, high ^ d ^ m, low
        k, m = k + more, m + more2
    return a, b, c, d


# -- reductions ----------------------------------------------------------------------------------------------


@triton.jit
def sum_over(values):
    """The sum over a block, always by the same tree."""
    return tl.sum(values)


@triton.jit
def max_over(values):
    """The maximum over a block; NaN if one is."""
    known = tl.max(tl.where(values != values, float("-inf"), values))
    return tl.where(tl.max((values != values).to(tl.int32)) != 0, float("nan"), known)


@triton.jit
def min_over(values):
    """The minimum over a block; NaN if one is."""
    known = tl.min(tl.where(values != values, float("inf"), values))
    return tl.where(tl.max((values != values).to(tl.int32)) != 0, float("nan"), known)


@triton.jit
def refit(total):
    """By what to multiply elements whose squares sum to `total`: 1 where that is neither too large nor too
    small to be right.
    """
    return tl.where(total < 2.0**-900, 2.0**600, tl.where(total <= 2.0**1000, 1.0, 2.0**-600))


@triton.jit
def scale_of(largest):
    """By what to divide numbers before they are squared."""
    return tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)


@triton.jit
def _norm(partial, start, end, BLOCK: tl.constexpr):
    """The root of the sum of squares of some numbers, always in the same order."""
    most = tl.zeros([BLOCK], tl.float64)
    for s in range(start, end, BLOCK):
        i = s + tl.arange(0, BLOCK)
        most = larger(most, tl.load(partial + i, mask=i < end, other=0))
    scale = scale_of(max_over(most))
    found = tl.zeros([BLOCK], tl.float64)
    for s in range(start, end, BLOCK):
        i = s + tl.arange(0, BLOCK)
        value = tl.load(partial + i, mask=i < end, other=0) / scale
        found += value * value
    return root(sum_over(found)) * scale


@triton.jit
def _extreme_of(partial, start, end, OP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest or the smallest of some numbers; NaN if one is."""
    none = float("-inf") if OP == "max" else float("inf")
    found = tl.full([BLOCK], none, tl.float64)
    for s in range(start, end, BLOCK):
        i = s + tl.arange(0, BLOCK)
        value = tl.load(partial + i, mask=i < end, other=none)
        found = larger(found, value) if OP == "max" else smaller(found, value)
    return max_over(found) if OP == "max" else min_over(found)


@triton.jit
def _sum(partial, start, end, BLOCK: tl.constexpr):
    """The sum of some numbers, always in the same order."""
    found = tl.zeros([BLOCK], tl.float64)
    for s in range(start, end, BLOCK):
        i = s + tl.arange(0, BLOCK)
        found += tl.load(partial + i, mask=i < end, other=0)
    return sum_over(found)


@triton.jit
def _of_all(partial, start, end, OP: tl.constexpr, BLOCK: tl.constexpr):
    if OP == "sum":
        return _sum(partial, start, end, BLOCK)
    elif OP == "norm2":
        return _norm(partial, start, end, BLOCK)
    else:
        return _extreme_of(partial, start, end, OP, BLOCK)


@triton.jit
def gather(partial, begin, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    """The reduction of every leaf from those of its chunks, always in the same order; a program takes one
    leaf.
    """
    k = tl.program_id(0)
    tl.store(out + k, _of_all(partial, tl.load(begin + k), tl.load(begin + k + 1), OP, BLOCK))


@triton.jit(do_not_specialize=["count"])
def add_up(partial, count, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    """The sum or the norm over all chunks, always in the same order; one program."""
    tl.store(out, _of_all(partial, 0, count, OP, BLOCK))
