"""Which of several functions is faster? Time them in turn, in one process, so that all meet the same machine.

A machine shared with others is slow for a while, then fast again. Two candidates timed one after the other
may meet different machines; in turn, round by round, they meet the same one. Compare medians of such rounds.
"""

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of every candidate, round by round."""

    seconds: dict[str, list[float]]

    @property
    def names(self) -> list[str]:
        """The candidates, in the order they were given."""
        return list(self.seconds)

    def median(self, name: str) -> float:
        """The middle of all rounds."""
        return statistics.median(self.seconds[name])

    def minimum(self, name: str) -> float:
        """The best round: what the machine can do undisturbed."""
        return min(self.seconds[name])

    def slowest(self, name: str) -> float:
        """The worst round."""
        return max(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """How many times as long as `other` a candidate takes: the ratio of the medians."""
        return self.median(name) / self.median(other)

    def ratio_of_minima(self, name: str, other: str) -> float:
        """The same of the best rounds."""
        return self.minimum(name) / self.minimum(other)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 10.0,
    least: int = 7,
    most: int = 300,
    warmup: int = 2,
    before: Callable[[str], object] | None = None,
    clock: Callable[[Any], float] | None = None,
) -> Timings:
    """Time the candidates in turn for about so many seconds, warm-up apart.

    Every round calls each candidate once, in another order, so that none always follows the same one. What a
    candidate returns is dropped outside the timing, and `before`, which is given its name, is called outside
    it too. `clock` says how many seconds a candidate takes, where one call does not say it. The
    garbage collector runs between rounds only.
    """
    names = list(candidates)
    shuffle = random.Random(0).shuffle  # noqa: S311 an order, no secret
    prepare, seconds_of = before or str, clock or timed
    for _ in range(warmup):
        for name in names:
            prepare(name)
            candidates[name]()
    found: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    end = time.perf_counter() + seconds
    rounds = 0
    try:
        while rounds < least or (rounds < most and time.perf_counter() < end):
            gc.disable()
            shuffle(names)
            for name in names:
                prepare(name)
                found[name].append(seconds_of(candidates[name]))
            if collecting:
                gc.enable()
                gc.collect(0)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return Timings(found)


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, without the freeing of its result."""
    begin = time.perf_counter()
    result = function()
    end = time.perf_counter()
    del result
    return end - begin


def judged(by_median: float, by_minimum: float, least: float) -> str:
    """Whether a target is met by both figures, by one, or by none."""
    if min(by_median, by_minimum) >= least:
        return "met"
    if max(by_median, by_minimum) < least:
        return "missed"
    return "met by medians" if by_median >= least else "met by minima"
