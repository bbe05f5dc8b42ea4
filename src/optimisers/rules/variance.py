"""Gradients corrected by how they changed, so that their noise partly cancels."""

from typing import Any, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.ops import copy, ema, maximum, norm, sign, sqrt, where, zeros_like
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, not_negative, setting, static
from optimisers.rules.adam import AdamState, adam_state, check_decaying, moments


class MARSState(NamedTuple):
    adam: AdamState
    before: Any
    """The gradient before."""


def corrected(rho: float, gamma: float, from_zero: bool, new: Any, before: Array, dx: Array) -> Any:
    """The gradient and a part of its change, brought down to norm 1 (Yuan et al., eq. 8 and 9); at the first
    step (`new`) nothing is known of a change.
    """
    change = dx - before if from_zero else where(new, 0, dx - before)
    c = dx + gamma * rho / (1 - rho) * change
    return c / maximum(norm(c), 1)


class MARS(Rule):
    """AdamW of gradients with less variance: c = dx + gamma beta[0] / (1 - beta[0]) (dx - before), divided by
    its norm where that is above 1.

    Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
    arXiv:2411.10438, algorithm 2 with the gradient of the step before. It is made for arrays of two axes and
    more; give vectors to AdamW. `from_zero=True` takes the gradient before the first as 0, as the authors'
    code does.
    """

    eta: Setting = setting(0.003)
    beta: Pair = setting((0.95, 0.99))
    gamma: Setting = setting(0.025)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    from_zero: bool = static(False)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> MARSState:
        return MARSState(adam_state(x), zeros_like(x))

    def apply(self, state: MARSState, x: Array, dx: Array) -> Any:
        new = state.adam.weight[0] == 0
        c = corrected(self.beta[0], self.gamma, self.from_zero, new, state.before, dx)
        adam, m, v = moments(self.beta, state.adam, c)
        step = self.eta * (m / (sqrt(v) + self.epsilon) + self.lam * x)
        return MARSState(adam, copy(dx)), step


class MARSLionState(NamedTuple):
    m: Any
    """The mean of the corrected gradients, decaying with beta[0]."""
    before: Any
    """The gradient before."""
    t: Any
    """How many steps were taken."""


class MARSLion(Rule):
    """Steps by the sign of a mean of gradients with less variance: dx' = eta (sign(m) + lam x), m the mean of
    the corrected gradients of `MARS`.

    Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
    arXiv:2411.10438, algorithm 3 with the gradient of the step before.
    """

    eta: Setting = setting(0.003)
    beta: Pair = setting((0.95, 0.99))
    gamma: Setting = setting(0.025)
    lam: Setting = setting(0.0)
    from_zero: bool = static(False)

    def check(self) -> None:
        in_unit_interval(self, "beta")
        not_negative(self, "lam")

    def init(self, x: Array) -> MARSLionState:
        return MARSLionState(zeros_like(x), zeros_like(x), 0)

    def apply(self, state: MARSLionState, x: Array, dx: Array) -> Any:
        c = corrected(self.beta[0], self.gamma, self.from_zero, state.t == 0, state.before, dx)
        m = ema(self.beta[0], state.m, c)
        return MARSLionState(m, copy(dx), state.t + 1), self.eta * (sign(m) + self.lam * x)
