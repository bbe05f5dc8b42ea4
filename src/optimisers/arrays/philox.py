"""Which random bits has a counter? Philox 4x32-10, for any array library: of a seed, an array, a step and
an element, always the same.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, doi:10.1145/2063384.2063405. The key is
(seed, first half of the array's number), the counter (place, low and high, step, second half + 2^24 draw):
each of these halves is below 2^24, so that a float32 holds it.

Four elements share the four words of a place: one of each quarter of 256 elements, so that a loop over places
reads and writes four arrays side by side.
"""

from collections.abc import Callable, Sequence
from typing import Any

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
"""What the first and the third word of a counter are multiplied by."""

STEPS = 0x9E3779B9, 0xBB67AE85
"""What each word of the key grows by from round to round."""

ROUNDS = 10

MASK = 0xFFFFFFFF

LANES = 64
"""How many elements follow each other before they take the next word of the same places."""

OWN, EVEN, ODD, PARITY, FIRST, SECOND = range(6)
"""Which bits an element takes: its own word; the first or the second word of its pair, or which of the two is
its own; or, with four words for itself, the first or the second.
"""


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
    part: int,
    bits: int,
) -> Any:
    """The first `bits` of a word, or the parity, as a whole number, for elements (low word, high word) of an
    array.
    """
    low, high = element
    lane = (low // made(LANES)) & made(3)
    if part == PARITY:
        return lane & made(1)
    if part not in (FIRST, SECOND):
        above = ((low >> made(2)) + (high << made(30))) & made(MASK - LANES + 1)
        low, high = above + (low & made(LANES - 1)), high >> made(2)
    a, b, c, d = words((low, high, step, leaf[1] + made(draw << 24)), (seed, leaf[0]), made)
    if part in (FIRST, SECOND):
        return (a if part == FIRST else b) >> made(32 - bits)

    def chosen(one: Any, other: Any, bit: Any) -> Any:
        return one ^ ((one ^ other) & (made(0) - bit))

    even, odd = chosen(a, c, lane >> made(1)), chosen(b, d, lane >> made(1))
    found = chosen(even, odd, lane & made(1)) if part == OWN else even if part == EVEN else odd
    return found >> made(32 - bits)
