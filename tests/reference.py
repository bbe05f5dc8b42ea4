"""What training means, in plain Python: no graph, no groups, no engine. Every array is stepped alone, by its
rule.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import optimisers as opt

Path = tuple[Any, ...]


@dataclasses.dataclass
class Entry:
    """One array: its parameters, its rule as a function of its settings, its state."""

    x: Any
    make: Callable[..., opt.Rule]
    settings: dict[str, Any]
    """The settings of the rule; `omega` is the longest global norm, and is applied here."""
    state: Any = None
    frozen: bool = False
    clock: int = 0
    """Updates that covered it, with or without a gradient, frozen or not."""
    steps: int = 0
    """Steps taken behind an accumulation, which are what its schedules count."""

    def __post_init__(self) -> None:
        self.state = self.rule(0).init(self.x)

    def rule(self, clock: int) -> opt.Rule:
        """The rule with the numbers that its schedules have at this clock."""
        now = {k: v(clock) if callable(v) else v for k, v in self.settings.items() if k != "omega"}
        return self.make(**now)

    def step(self, g: Any) -> None:
        """One step by a gradient."""
        if "n" in self.settings:
            self.accumulate(g)
            return
        self.state, dx = self.rule(self.clock).apply(self.state, self.x, g)
        self.x = self.x if dx is None else self.x - dx

    def accumulate(self, g: Any) -> None:
        """The mean of a window of updates goes on to decay and momentum, at the window's last update."""
        gathered, decay, momentum = self.state
        held, taken = g + (gathered.sum if gathered.taken else 0), gathered.taken + 1
        rule = self.rule(self.steps)
        n = rule.rules[0].n
        if (self.clock + 1) % n:
            self.state = (gathered._replace(sum=held, taken=taken), decay, momentum)
            return
        _, dx = rule.rules[1].apply((), self.x, held / max(taken, n))
        momentum, dx = rule.rules[2].apply(momentum, self.x, dx)
        self.state = (gathered._replace(sum=held, taken=0), decay, momentum)
        self.x = self.x - dx
        self.steps += 1


@dataclasses.dataclass
class Reference:
    """A model as a table of places, several of which may be one entry, seen through a transposition."""

    places: dict[Path, tuple[int, bool]]
    """Path -> (entry, whether it is transposed there)."""
    entries: list[Entry]

    def below(self, path: Path) -> set[int]:
        return {n for p, (n, _) in self.places.items() if p[: len(path)] == path}

    def update(self, grads: dict[Path, Any], covered: Path = ()) -> None:
        """One step of what is below a path, by the gradients of some places; a place that is absent or None
        has none.
        """
        found: dict[int, list[Any]] = {}
        for path, g in grads.items():
            n, turned = self.places[path]
            if g is not None and not any(g is seen for seen, _ in found.get(n, [])):
                found.setdefault(n, []).append((g, g.T if turned else g))
        summed = {n: sum(g for _, g in gs) for n, gs in found.items() if not self.entries[n].frozen}
        clipped = [n for n in summed if "omega" in self.entries[n].settings]
        norm = math.sqrt(sum(float(np.sum(np.abs(summed[n]) ** 2)) for n in clipped))
        for n in clipped:
            summed[n] = summed[n] * min(1.0, self.entries[n].settings["omega"] / norm if norm else 1.0)
        for n, g in summed.items():
            self.entries[n].step(g)
        for n in self.below(covered):
            self.entries[n].clock += 1

    def freeze(self, path: Path, *, frozen: bool) -> None:
        for n in self.below(path):
            self.entries[n].frozen = frozen

    def adjust(self, path: Path, **changes: Any) -> None:
        """Change the settings that an entry has."""
        for n in self.below(path):
            entry = self.entries[n]
            entry.settings = entry.settings | {k: v for k, v in changes.items() if k in entry.settings}

    def at(self, path: Path) -> Any:
        """The parameters at a place."""
        n, turned = self.places[path]
        return self.entries[n].x.T if turned else self.entries[n].x

    def copy(self) -> "Reference":
        return copy.deepcopy(self)
