"""Steps whose length follows from norms of whole arrays."""

from typing import Any, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.ops import norm, sqrt, where, zeros_like
from optimisers.ops.derived import hypot, nonzero, scaled_to
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, not_negative, setting, static
from optimisers.rules.adam import AdamState, adam_state, check_decaying, moments


def trusted(eta: float, x: Array, q: Array) -> Any:
    """A step as long as eta |x| along q, by the trust ratio |x| / |q| of a layer; the ratio is 1 where one of
    them is 0, so that what starts at 0 can leave it.
    """
    along, against = norm(x), norm(q)
    usable = (along > 0) & (against > 0)
    return scaled_to(q, where(usable, eta * along, eta), where(usable, against, 1))


class LARSState(NamedTuple):
    v: Any
    """The velocity, in units of a step."""


class LARS(Rule):
    """Momentum whose rate is scaled array by array: q = dx + lam x; v = rho v + eta trust |x| / (|q| +
    epsilon) q; dx' = v.

    You, Gitman & Ginsburg, "Large batch training of convolutional networks", 2017, arXiv:1708.03888,
    algorithm 1, as in Optax. `apart=True` divides by |dx| + lam |x|, as the paper writes it. There is no
    ratio, as if it were 1, where |x| or the gradient is 0. Leave biases and the scales of norms to another
    rule.
    """

    eta: Setting = setting(1.0)
    rho: Setting = setting(0.9)
    lam: Setting = setting(0.0)
    trust: Setting = setting(1e-3)
    epsilon: Setting = setting(0.0)
    nesterov: bool = static(False)
    apart: bool = static(False)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam", "trust", "epsilon")

    def init(self, x: Array) -> LARSState:
        return LARSState(zeros_like(x))

    def apply(self, state: LARSState, x: Array, dx: Array) -> Any:
        q = dx + self.lam * x
        long, steep = norm(x), norm(dx if self.apart else q)
        usable = (long > 0) & (steep > 0)
        against = steep + self.lam * long if self.apart else steep
        most = where(usable, self.eta * self.trust * long, self.eta)
        pull = scaled_to(q, most, where(usable, against + self.epsilon, 1))
        v = self.rho * state.v + pull
        return LARSState(v), self.rho * v + pull if self.nesterov else v


class LAMB(Rule):
    """AdamW whose step is as long as the array: q = m / (sqrt(v) + epsilon) + lam x; dx' = eta |x| / |q| q, m
    and v without bias.

    You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", 2019,
    arXiv:1904.00962, algorithm 2. The ratio is 1 where |x| or |q| is 0. For the variant that clips first,
    write Chain(ClipGlobalNorm(1.0), LAMB()).
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
        q = m / (sqrt(v) + self.epsilon) + self.lam * x
        return state, trusted(self.eta, x, q)


class NovoGradState(NamedTuple):
    m: Any
    """The momentum of the gradients, each divided by its norm."""
    v: Any
    """The root of the mean of |dx|^2 of the whole array, decaying with beta[1]; one number."""
    t: Any
    """How many steps were taken."""


class NovoGrad(Rule):
    """Momentum of gradients that are divided by the norm of their array: v^2 = beta[1] v^2 + (1 - beta[1])
    |dx|^2; m = beta[0] m + dx / (v + epsilon) + lam x; dx' = eta m.

    Ginsburg et al., "Stochastic gradient methods with layer-wise adaptive moments for training of deep
    networks", 2019, arXiv:1905.11286, algorithm 1. v starts at the first |dx|; it is one number for each
    array.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.95, 0.98))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> NovoGradState:
        return NovoGradState(zeros_like(x), 0.0, 0)

    def apply(self, state: NovoGradState, x: Array, dx: Array) -> Any:
        size, keep = norm(dx), self.beta[1]
        v = where(state.t == 0, size, hypot(sqrt(keep) * state.v, sqrt(1 - keep) * size))
        m = self.beta[0] * state.m + scaled_to(dx, 1, nonzero(v + self.epsilon)) + self.lam * x
        return NovoGradState(m, v, state.t + 1), self.eta * m
