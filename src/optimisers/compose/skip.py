"""No step at all where something is wrong with a gradient."""

from typing import Any, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import isfinite, total, under, when, where
from optimisers.rule import Rule, a_rule, stepped


class SkipState(NamedTuple):
    skipped: Any
    """How many steps were skipped."""
    inner: Any


class SkipNonFinite(Rule):
    """Takes no step, in any leaf, where any element of any gradient is infinite or NaN, and counts such
    steps.

    The gradients are those of all leaves stepped together whose rules are such; the state of the rule inside
    stays as it was. As dynamic loss scaling does it: Micikevicius et al., arXiv:1710.03740, section 3.2.
    """

    rule: Rule

    def check(self) -> None:
        a_rule(self, self.rule)

    def init(self, x: Array) -> SkipState:
        return SkipState(0, self.rule.init(x))

    def apply(self, state: SkipState, x: Array, dx: Array, *more: Array) -> Any:
        bad = total(ops.sum(where(isfinite(dx), 0.0, 1.0)))
        skipped = state.skipped + where(bad > 0, 1, 0)
        sound = when(bad == 0, dx)
        if sound is None:
            return SkipState(skipped, state.inner), None
        with under(sound):
            inner, step = stepped(self.rule, state.inner, x, sound, more)
        return SkipState(skipped, inner), step

    def evaluate(self, state: SkipState, x: Array) -> Any:
        return self.rule.evaluate(state.inner, x)
