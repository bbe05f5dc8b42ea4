"""A moving average of the parameters beside the parameters."""

from typing import Any, ClassVar, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.ops import copy, ema, under, updated
from optimisers.rule import Rule, Setting, a_rule, in_unit_interval, setting, stepped


class AverageState(NamedTuple):
    average: Any
    """The average of the parameters so far; it starts at the first ones."""
    inner: Any


class EMA(Rule):
    """Steps by another rule and keeps a moving average of where it led: a = rho a + (1 - rho) x, with the new
    x.

    Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", 1992, with exponential
    weights. `averaged(state, model)` is the model with the averages in place of its parameters. It must wrap
    a whole chain.
    """

    whole: ClassVar[bool] = True

    rule: Rule
    rho: Setting = setting(0.999)

    def check(self) -> None:
        a_rule(self, self.rule)
        in_unit_interval(self, "rho")

    def init(self, x: Array) -> AverageState:
        return AverageState(copy(x), self.rule.init(x))

    def apply(self, state: AverageState, x: Array, dx: Array, *more: Array) -> Any:
        inner, step = stepped(self.rule, state.inner, x, dx, more)
        if step is None:
            return AverageState(state.average, inner), None
        with under(step):
            average = ema(self.rho, state.average, updated(x, step))
        return AverageState(average, inner), step

    def evaluate(self, state: AverageState, x: Array) -> Any:
        return state.average
