"""Which random bits has a counter? Philox 4x32-10, for any array library: of a seed, an array, a step and
an element, always the same.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, doi:10.1145/2063384.2063405. The key is
(seed, first half of the array's number), the counter (element, low and high, step, second half + 2^24 draw):
each of these halves is below 2^24, so that a float32 holds it.
"""

from collections.abc import Callable, Sequence
from typing import Any

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
"""What the first and the third word of a counter are multiplied by."""

STEPS = 0x9E3779B9, 0xBB67AE85
"""What each word of the key grows by from round to round."""

ROUNDS = 10

MASK = 0xFFFFFFFF


def words(
    counter: Sequence[Any], key: Sequence[Any], made: Callable[[int], Any]
) -> tuple[Any, Any, Any, Any]:
    """Four words of 32 random bits for each element: of counters and keys in arrays that broadcast, of
    unsigned whole numbers of 32 bits, or signed ones of 64. `made` makes a constant of their type.
    """
    a, b, c, d = counter
    k, m = key
    mask = made(MASK)
    for _ in range(ROUNDS):
        (high, low), (high2, low2) = _product(a, MULTIPLIERS[0], made), _product(c, MULTIPLIERS[1], made)
        a, b, c, d = high2 ^ b ^ k, low2, high ^ d ^ m, low
        k, m = (k + made(STEPS[0])) & mask, (m + made(STEPS[1])) & mask
    return a, b, c, d


def _product(a: Any, by: int, made: Callable[[int], Any]) -> tuple[Any, Any]:
    """(the upper, the lower 32 bits) of a product; no part of it leaves 32 bits."""
    half, sixteen = made(0xFFFF), made(16)
    first, last = made(by >> 16), made(by & 0xFFFF)
    x, y = a >> sixteen, a & half
    one, two = y * first, x * last
    middle = ((y * last) >> sixteen) + (one & half) + (two & half)
    upper = x * first + (one >> sixteen) + (two >> sixteen) + (middle >> sixteen)
    return upper, (a * made(by)) & made(MASK)


def word(
    element: tuple[Any, Any],
    seed: Any,
    step: Any,
    leaf: tuple[Any, Any],
    made: Callable[[int], Any],
    *,
    draw: int,
    which: int,
    bits: int,
) -> Any:
    """The first `bits` of one of the four words, as a whole number, for elements (low word, high word) of an
    array.
    """
    counter = (*element, step, leaf[1] + made(draw << 24))
    return words(counter, (seed, leaf[0]), made)[which] >> made(32 - bits)
