"""Steps scaled element by element, in other ways than Adam's quotient."""

from typing import Any, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import (
    abs2,
    arctan,
    copy,
    full_like,
    maximum,
    mean,
    real_zeros_like,
    sign,
    sqrt,
    where,
    zeros_like,
)
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, not_negative, setting
from optimisers.rules.adam import AdamState, adam_state, check_decaying, ema, moments, weights


class StableAdamW(Rule):
    """AdamW whose rate falls where the mean square lags behind the gradient: eta / max(1, rms), rms^2 the
    mean of |dx|^2 / max(v, epsilon^2) over the array.

    Wortsman et al., "Stable and low-precision training for large-scale vision-language models", 2023,
    arXiv:2304.13013, algorithm 2. The decay is scaled with the step.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.99))
    lam: Setting = setting(0.01)
    epsilon: Setting = setting(1e-6)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        state, m, v = moments(self.beta, state, dx)
        surprise = sqrt(mean(abs2(dx) / maximum(v, self.epsilon**2)))
        rate = self.eta / maximum(surprise, 1)
        return state, rate * (m / (sqrt(v) + self.epsilon) + self.lam * x)


class Yogi(Rule):
    """Adam whose mean square moves by steps of one size: v = v - (1 - beta[1]) sign(v - |dx|^2) |dx|^2; dx' =
    eta (m / (sqrt(v) + epsilon) + lam x), m and v without bias.

    Zaheer et al., "Adaptive methods for nonconvex optimization", 2018, algorithm 2. m and v start at 1e-6, as
    in Optax; their bias is corrected as if they started at 0.
    """

    eta: Setting = setting(0.01)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-3)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> AdamState:
        return AdamState(full_like(x, 1e-6), full_like(real_zeros_like(x), 1e-6), (0.0, 0.0))

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        square = abs2(dx)
        m = ema(self.beta[0], state.m, dx)
        v = state.v - (1 - self.beta[1]) * sign(state.v - square) * square
        weight = weights(self.beta, state.weight)
        step = m * (1 / weight[0]) / (sqrt(v * (1 / weight[1])) + self.epsilon)
        return AdamState(m, v, weight), self.eta * (step + self.lam * x)


class AdamAtan2(Rule):
    """AdamW with an angle in place of the quotient: dx' = eta (alpha arctan2(m, sqrt(v)) + lam x), m and v
    without bias; there is no epsilon, and the scale of the gradient does not matter at all.

    Everett et al., "Scaling exponents across parameterizations and optimizers", 2024, arXiv:2407.05872,
    section 4.3. alpha = 1.27 = 4 / pi makes a steady gradient step by eta. 0 where m and v are 0. For real
    parameters.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    alpha: Setting = setting(1.27)

    def check(self) -> None:
        in_unit_interval(self, "beta")
        not_negative(self, "lam")

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        state, m, v = moments(self.beta, state, dx)
        root = sqrt(v)
        angle = where(root == 0, HALF_PI, arctan(ops.abs(m) / where(root == 0, 1, root)))
        return state, self.eta * (self.alpha * angle * sign(m) + self.lam * x)


HALF_PI = 1.5707963267948966


class MADGRADState(NamedTuple):
    start: Any
    """The parameters before the first step."""
    s: Any
    """The sum of the gradients, each times eta sqrt(t)."""
    v: Any
    """The sum of their |dx|^2, each times eta sqrt(t)."""
    t: Any
    """How many steps were taken."""


class MADGRAD(Rule):
    """Dual averaging with a cube root: x becomes rho x + (1 - rho) (x0 - s / (cbrt(v) + epsilon)), where s
    and v sum the gradients and their squares, each times (eta + epsilon) sqrt(t).

    Defazio & Jelassi, "Adaptivity without compromise: a momentumized, adaptive, dual averaged gradient method
    for stochastic optimization", 2021, arXiv:2101.11075, algorithm 1. `rho` is the paper's 1 - c. `lam` is
    added to the gradient, lam x, not to the step.
    """

    eta: Setting = setting(0.01)
    rho: Setting = setting(0.9)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-6)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam", "epsilon")

    def init(self, x: Array) -> MADGRADState:
        return MADGRADState(copy(x), zeros_like(x), real_zeros_like(x), 0)

    def apply(self, state: MADGRADState, x: Array, dx: Array) -> Any:
        t = state.t + 1
        k = (self.eta + self.epsilon) * sqrt(t)
        g = dx + self.lam * x
        s, v = state.s + k * g, state.v + k * abs2(g)
        root = v ** (1 / 3) + self.epsilon
        averaged = state.start - where(root == 0, 0, s / root)
        return MADGRADState(state.start, s, v, t), (1 - self.rho) * (x - averaged)


class FTRLState(NamedTuple):
    z: Any
    """The sum of the gradients, less what the changing rate has made of x."""
    n: Any
    """The sum of dx^2."""


class FTRL(Rule):
    """Follows the regularised leader: x is made anew of the sum z of the gradients, and is exactly 0 where
    |z| <= l1.

    McMahan et al., "Ad click prediction: a view from the trenches", 2013, algorithm 1: n = n + dx^2; z = z +
    dx - (sqrt(n) - sqrt(n before)) / eta x; x becomes -(z - l1 sign(z)) / ((beta + sqrt(n)) / eta + l2). What
    x was before the first step is forgotten. For real, sparse features.
    """

    eta: Setting = setting(0.001)
    beta: Setting = setting(0.0)
    l1: Setting = setting(0.0)
    l2: Setting = setting(0.0)

    def check(self) -> None:
        not_negative(self, "beta", "l1", "l2")

    def init(self, x: Array) -> FTRLState:
        return FTRLState(zeros_like(x), zeros_like(x))

    def apply(self, state: FTRLState, x: Array, dx: Array) -> Any:
        n, slow = state.n + dx * dx, 1 / self.eta
        z = state.z + dx - (sqrt(n) - sqrt(state.n)) * slow * x
        short = maximum(z, -z) <= self.l1
        stiff = (self.beta + sqrt(n)) * slow + self.l2
        new = where(short, 0, (self.l1 * sign(z) - z) / where(short, 1, stiff))
        return FTRLState(z, n), x - new
