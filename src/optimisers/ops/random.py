"""Which random numbers may a rule use? Those of a counter: the same for one seed, array, step and element.

Nothing is stored and nothing is advanced, so a run repeats, and neither threads, devices and shards nor the
order of the arrays, or whether one is frozen, change a number.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

from optimisers.arrays import philox, registry
from optimisers.arrays.protocol import Array, Operand
from optimisers.arrays.types import arithmetic, real_of
from optimisers.errors import BadSetting, TraceError
from optimisers.ops.derived import is_complex
from optimisers.ops.primitives import abs, log, minimum, random_word, sqrt, where

SEEDS = 1 << 24
"""Seeds are whole numbers below this, which every engine holds."""

DRAWS = 16
"""How many arrays of numbers one rule may draw with one seed at one step."""


def normal(
    x: Array, seed: Operand, *, draw: int = 0, step: Operand | None = None, leaf: Iterable[object] = ()
) -> Any:
    """Independent normal numbers of mean 0 and variance 1 in the shape of `x`; complex for complex `x`, whose
    real and imaginary parts have variance 1/2 each.

    They follow from `seed`, a whole number in [0, 2^24), from `draw`, a number below 16 that tells several
    arrays of one rule apart, and from the array, the step and the element; two rules of a chain have numbers
    of their own. In an update the array and the step are known: the path of the array, and its clock, which
    behind a rule that answers `when` counts the steps taken (in float32 exact up to 2^24). Elsewhere they are
    `leaf`, the keys of the path, and `step`, 0 if it is not given. `x` itself is not read. Numbers of two
    engines differ by roundings.

    By Philox 4x32-10 (Salmon et al., 2011, doi:10.1145/2063384.2063405) and the transform of Box and Muller.
    """
    return drawn("normal", x, seed, draw, step, leaf)


def uniform(
    x: Array, seed: Operand, *, draw: int = 0, step: Operand | None = None, leaf: Iterable[object] = ()
) -> Any:
    """Independent numbers in (0, 1], equally likely, in the shape of `x`; real for complex `x`. The
    arguments are those of `normal`, of whose numbers these are independent.
    """
    return drawn("uniform", x, seed, draw, step, leaf)


def rademacher(
    x: Array, seed: Operand, *, draw: int = 0, step: Operand | None = None, leaf: Iterable[object] = ()
) -> Any:
    """Independent signs, -1 or 1, equally likely, in the shape of `x`; real for complex `x`. The arguments
    are those of `normal`, of whose numbers these are independent.
    """
    return drawn("rademacher", x, seed, draw, step, leaf)


def drawn(kind: str, x: Any, seed: Operand, draw: int, step: Operand | None, leaf: Iterable[object]) -> Any:
    """Random numbers of a kind; written into the graph if `x` is a symbol."""
    if not 0 <= draw < DRAWS:
        raise TraceError(f"{kind}(..., draw={draw!r}); it takes a whole number from 0 to {DRAWS - 1}")
    if isinstance(seed, int) and not 0 <= seed < SEEDS:
        raise BadSetting(f"{kind}(x, {seed!r}); a seed is a whole number from 0 to {SEEDS - 1}")
    write = getattr(type(x), "__random__", None)
    if write is not None:
        if step is not None or leaf != ():
            raise TraceError(f"a rule says no step and no leaf; write {kind}(x, seed)")
        return write(kind, x, seed, draw)
    first, last = number_of_leaf(leaf)
    library = registry.library(x)
    real = real_of(library, arithmetic(library, x.dtype))

    def word(draw: int, part: int, bits: int) -> Any:
        found = random_word(x, seed, step or 0, first, last, draw=draw, part=part, bits=bits)
        return library.cast(found, real)

    return of_words(kind, draw, word, whole=is_complex(x))


KINDS = ("normal", "uniform", "rademacher")
"""Each of them, and complex normal numbers behind them, have draws of their own."""


def of_words(kind: str, draw: int, word: Callable[[int, int, int], Any], *, whole: bool) -> Any:
    """Random numbers of a kind from random whole numbers: `word(draw, part, bits)` is one in [0, 2^bits), of
    the words that an element has or shares; `whole` ones are complex. Two real normal numbers are the two
    coordinates of one point.
    """
    pair = kind == "normal"
    draw += DRAWS * (len(KINDS) if pair and whole else KINDS.index(kind))
    if not pair:
        bits = word(draw, philox.OWN, 1 if kind == "rademacher" else 32)
        return 2 * bits - 1 if kind == "rademacher" else _fraction(bits)
    one, two = (philox.FIRST, philox.SECOND) if whole else (philox.EVEN, philox.ODD)
    energy = -log(_fraction(word(draw, one, 32)))
    turn = _fraction(word(draw, two, 32)) - 0.5
    if not whole:
        off = abs(turn - 0.25 * word(draw, philox.PARITY, 1))
        return sqrt(2 * energy) * _sine(minimum(off, 1 - off) - 0.25)
    size = _sine(minimum(abs(turn), 0.5 - abs(turn)))
    return sqrt(energy) * (_sine(abs(turn) - 0.25) + 1j * where(turn < 0, size, -size))


def _fraction(word: Any) -> Any:
    """A number in (0, 1] from a whole one of 32 bits; 1 only where it is rounded to that."""
    return (word + 0.5) * 2.0**-32


SERIES = tuple((-1) ** k * (2 * math.pi) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(11))
"""Of sin(2 pi z); in a quarter of a turn, what is left out is below 2e-18."""


def _sine(z: Any) -> Any:
    """sin(2 pi z) for z in [-1/4, 1/4]: arithmetic that every engine does alike, and kernels side by side."""
    found: Any = SERIES[-1]
    for c in reversed(SERIES[:-1]):
        found = found * (z * z) + c
    return found * z


def number_of_leaf(keys: Iterable[object]) -> tuple[int, int]:
    """The number of an array, from the keys of its path, in two halves below 2^24: of a model's arrays no two
    have the same, up to one chance in 10^8 for a thousand of them.
    """
    text = "\0".join(map(str, keys)).encode()
    found = int.from_bytes(hashlib.sha256(text).digest()[:6], "little")
    return found % SEEDS, found // SEEDS
