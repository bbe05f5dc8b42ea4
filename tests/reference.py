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

    def __post_init__(self) -> None:
        self.state = self.rule(0).init(self.x)

    def rule(self, clock: int) -> opt.Rule:
        """The rule with the numbers that its schedules have at this clock."""
        now = {k: v(clock) if callable(v) else v for k, v in self.settings.items() if k != "omega"}
        return self.make(**now)


@dataclasses.dataclass
class Reference:
    """A model as a table of places, several of which may be one entry, seen through a transposition."""

    places: dict[Path, tuple[int, bool]]
    """Path -> (entry, whether it is transposed there)."""
    entries: list[Entry]
    clock: int = 0

    def below(self, path: Path) -> set[int]:
        return {n for p, (n, _) in self.places.items() if p[: len(path)] == path}

    def update(self, grads: dict[Path, Any]) -> None:
        """One step by the gradients of some places; a place that is absent or None has none."""
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
            entry = self.entries[n]
            entry.state, dx = entry.rule(self.clock).apply(entry.state, entry.x, g)
            entry.x = entry.x if dx is None else entry.x - dx
        self.clock += 1

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
