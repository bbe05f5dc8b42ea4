"""Decay beside the step of the rule before, by its rate and by more than that."""

from typing import Any, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.ops import conj, maximum, real, where
from optimisers.rule import Rule, Setting, not_negative, rate_before, setting


class CautiousDecay(Rule):
    """Decay beside the step only where it pulls the same way: dx' = dx + eta lam x where dx x >= 0, else dx.

    Chen et al., "Cautious weight decay", 2025, arXiv:2510.12402. It stands behind the rule that steps, whose
    rate eta is, and which has no decay of its own: Chain(Adam(), CautiousDecay(0.01)).
    """

    lam: Setting = setting(0.01)

    def check(self) -> None:
        not_negative(self, "lam")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        pull = rate_before(self) * self.lam * x
        return state, dx + where(real(conj(dx) * x) >= 0, pull, 0)


class CorrectedState(NamedTuple):
    top: Any
    """The largest rate so far."""


class CorrectedDecay(Rule):
    """Decay beside the step by the square of the rate: dx' = dx + eta^2 / most lam x, so that the size of
    weights does not follow the schedule.

    Defazio, "Why gradients rapidly increase near the end of training", 2025, arXiv:2506.02285, section 4:
    behind Adam it is AdamC, Chain(Adam(), CorrectedDecay(0.01)). eta is the rate of the rule before, which
    has no decay of its own; `most` is the largest rate of the run, or 0 for the largest so far. For weights
    that a normalisation follows; the others take DecoupledDecay(couple=True).
    """

    lam: Setting = setting(0.01)
    most: Setting = setting(0.0)

    def check(self) -> None:
        not_negative(self, "lam", "most")

    def init(self, x: Array) -> CorrectedState:
        return CorrectedState(0.0)

    def apply(self, state: CorrectedState, x: Array, dx: Array) -> Any:
        eta = rate_before(self)
        top = maximum(state.top, eta)
        most = where(self.most > 0, self.most, top)
        rate = where(most > 0, eta * eta / where(most > 0, most, 1), 0)
        return CorrectedState(top), dx + rate * self.lam * x
