"""Steps of one size in every element: only the sign of something counts."""

from typing import Any, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.ops import ema, sign, zeros_like
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, setting


class LionState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[1]."""


class Lion(Rule):
    """Steps by the sign of a momentum that leans towards the new gradient.

    Chen et al., "Symbolic discovery of optimization algorithms", 2023, arXiv:2302.06675, algorithm 2:
    dx' = eta sign(beta[0] m + (1 - beta[0]) dx), then m = beta[1] m + (1 - beta[1]) dx. Optimisers.jl 0.4.8
    has the betas the other way round, which makes it sign descent.
    """

    eta: Setting = setting(1e-4)
    beta: Pair = setting((0.9, 0.99))

    def check(self) -> None:
        in_unit_interval(self, "beta")

    def init(self, x: Array) -> LionState:
        return LionState(zeros_like(x))

    def apply(self, state: LionState, x: Array, dx: Array) -> Any:
        toward = ema(self.beta[0], state.m, dx)
        return LionState(ema(self.beta[1], state.m, dx)), self.eta * sign(toward)
