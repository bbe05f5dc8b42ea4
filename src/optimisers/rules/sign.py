"""Steps of one size in every element: only the sign of something counts."""

from typing import Any, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import ema, sign, sqrt, zeros_like
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, not_negative, setting
from optimisers.rules.adam import AdamState, adam_state, check_decaying, moments


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


class SignDescent(Rule):
    """Every element moves by eta: dx' = eta sign(dx).

    Bernstein et al., "signSGD: compressed optimisation for non-convex problems", 2018, arXiv:1802.04434,
    algorithm 1. An element whose gradient is 0 stays. No state.
    """

    lazy = True

    eta: Setting = setting(1e-4)

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, self.eta * sign(dx)


class SignumState(NamedTuple):
    m: Any
    """The mean gradient, decaying with rho."""


class Signum(Rule):
    """Every element moves by eta along the sign of the mean gradient: m = rho m + (1 - rho) dx; dx' = eta
    (sign(m) + lam x).

    Bernstein et al., "signSGD: compressed optimisation for non-convex problems", 2018, arXiv:1802.04434,
    algorithm 2. With rho 0.965 and lam 0.01 it is Tiger.
    """

    eta: Setting = setting(1e-4)
    rho: Setting = setting(0.9)
    lam: Setting = setting(0.0)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam")

    def init(self, x: Array) -> SignumState:
        return SignumState(zeros_like(x))

    def apply(self, state: SignumState, x: Array, dx: Array) -> Any:
        m = ema(self.rho, state.m, dx)
        return SignumState(m), self.eta * (sign(m) + self.lam * x)


class Grams(Rule):
    """The size of Adam's step along the sign of the gradient: dx' = eta (sign(dx) |m| / (sqrt(v) + epsilon) +
    lam x), m and v without bias.

    Cao, Li & Song, "Grams: gradient descent with adaptive momentum scaling", 2024, arXiv:2412.17107,
    algorithm 1.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-6)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        state, m, v = moments(self.beta, state, dx)
        return state, self.eta * (sign(dx) * ops.abs(m) / (sqrt(v) + self.epsilon) + self.lam * x)
