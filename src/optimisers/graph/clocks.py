"""Which clock does a schedule read? That of its scope: behind a `when`, the steps that were taken.

Outside every condition the clock counts the updates that covered a leaf. Under a condition, a counter that no
rule sees counts the steps for which it held.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import TraceError
from optimisers.graph.symbol import Guard, Symbol, lift, make, scoped
from optimisers.rule import Rule
from optimisers.settings import Value, parts, schedules

UPDATES = -1
"""Stands for the clock that counts updates."""


class Clocks:
    """The clocks of one trace. Called with a rule that is about to be stepped, it gives that rule with its
    schedules at the clock of the scope.
    """

    def __init__(self, root: Rule, first: int) -> None:
        self.updates = Symbol("clock")
        self.first = first
        """The place of the first hidden counter among the scalars."""
        self.scopes: dict[tuple[int, ...], tuple[int, Guard, Symbol]] = {}
        self.originals: dict[int, tuple[Value, Value]] = {}
        """Rule with its schedules resolved, by id -> (itself, the one it was made of)."""
        self.place = {id(part): i for i, part in enumerate(parts(root))}
        self.read = [UPDATES] * len(self.place)
        """Which clock each part of the root reads: UPDATES, or the number of a hidden counter."""
        self.root = root

    def __call__(self, rule: Rule) -> Rule:
        _, original = self.originals.get(id(rule), (rule, rule))
        number, clock = self.here()
        resolved = schedules(original, functools.partial(_scheduled, clock))
        for new, old in zip(parts(resolved), parts(original), strict=True):
            self.originals[id(new)] = new, old
            if id(old) in self.place:
                self.read[self.place[id(old)]] = number
        return resolved

    def now(self) -> Symbol:
        """The clock of the scope."""
        return self.here()[1]

    def here(self) -> tuple[int, Symbol]:
        """(number, symbol) of the clock of the scope."""
        guard = scoped()
        if not guard:
            return UPDATES, self.updates
        key = tuple(sorted(id(g) for g in guard))
        if key not in self.scopes:
            n = len(self.scopes)
            self.scopes[key] = n, guard, Symbol("number", value=self.first + n, options=(("name", _name(n)),))
        number, _, symbol = self.scopes[key]
        return number, symbol

    def counters(self) -> tuple[list[str], list[Symbol], list[Symbol]]:
        """(names, symbols, new values) of the hidden counters."""
        new: list[Symbol] = []
        for _, guard, symbol in self.scopes.values():
            e = make("add", (symbol, lift(1)))
            for condition in guard:
                e = make("where", (condition, e, symbol))
            new.append(e)
        symbols = [symbol for _, _, symbol in self.scopes.values()]
        return [_name(n) for n in range(len(symbols))], symbols, new


def _name(n: int) -> str:
    return "steps_taken" if n == 0 else f"steps_taken_{n + 1}"


def _scheduled(clock: Symbol, name: str, schedule: Callable[[Any], object], _: Value) -> Symbol:
    """The value of a schedule at a symbolic clock; one that computes with a library of arrays is called when
    the step runs.
    """
    try:
        value = lift(schedule(clock))
    except (TypeError, ValueError, AttributeError) as error:  # those of a library that met a symbol, or ours
        if _gives_array(schedule):
            return make("scheduled", (clock,), options=(("function", schedule),))
        if not isinstance(error, TraceError):
            raise
        raise TraceError(
            f"the schedule of {name}: {str(error).replace('a rule', 'a schedule', 1)}"
        ) from error
    if value.domain != "scalar" or value.type == "complex":
        raise TraceError(f"the schedule of {name} gives no real number for the clock")
    return make("scheduled", (value,))


def _gives_array(schedule: Callable[[Any], object]) -> bool:
    """Whether a schedule gives an array of a library for a plain number: a scalar one."""
    try:
        found: Any = schedule(0)
    except Exception:  # noqa: BLE001 whatever it is, it is no such schedule
        return False
    return registry.isarray(found) and not isinstance(found, np.generic) and np.shape(found) == ()
