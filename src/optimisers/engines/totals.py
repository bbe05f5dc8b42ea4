"""What do leaves of several groups sum to?"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Stage
from optimisers.graph.trace import total_join, total_key


class Totals:
    """Sums over all leaves stepped together, across steps: known once everyone who asks for one has given his
    part.
    """

    def __init__(self, stages: Sequence[tuple[Stage, ...]], *, traced: bool) -> None:
        self.traced = traced
        self.askers: dict[str, int] = {}
        for one in stages:
            for stage in one:
                for t in stage.totals:
                    self.askers[total_key(t)] = self.askers.get(total_key(t), 0) + 1
        self.parts: dict[str, list[Any]] = {}

    def give(self, total: Expr, part: Any) -> None:
        """Add the part of one step."""
        self.parts.setdefault(total_key(total), []).append(part)

    def known(self, total: Expr) -> Any:
        """The sum of all parts; None while one is missing."""
        key = total_key(total)
        parts = self.parts.get(key, [])
        if len(parts) < self.askers[key]:
            return None
        if len({str(getattr(part, "device", "host")) for part in parts}) > 1 and not self.traced:
            parts = [on_host(part) for part in parts]
        join = total_join(total)
        if join == "sum" or len(parts) == 1:
            return functools.reduce(operator.add, parts)
        if not any(map(registry.isarray, parts)):
            return math.hypot(*parts) if join == "norm2" else float(np.max(parts))
        library = registry.library(*parts)
        return library.operations[join](library.stacked(parts))


def on_host(value: Any) -> Any:
    """A total as a number of the host."""
    return registry.library(value).to_host(value) if registry.isarray(value) else value
