"""Steps whose length follows from norms of whole arrays."""

from typing import Any, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import abs2, ema, norm, sqrt, where, zeros_like
from optimisers.ops.derived import over
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, not_negative, setting, static
from optimisers.rules.adam import AdamState, adam_state, check_decaying, moments


def trusted(along: Array, against: Array) -> Any:
    """|x| / |step|, the trust ratio of a layer; 1 where one of them is 0, so that what starts at 0 can leave
    it.
    """
    usable = (along > 0) & (against > 0)
    return where(usable, along / where(usable, against, 1), 1)


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
        ratio = where(usable, self.trust * long / where(usable, against + self.epsilon, 1), 1)
        pull = self.eta * ratio * q
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
        return state, self.eta * trusted(norm(x), norm(q)) * q


class NovoGradState(NamedTuple):
    m: Any
    """The momentum of the gradients, each divided by its norm."""
    v: Any
    """The mean of |dx|^2 of the whole array, decaying with beta[1]; one number."""
    t: Any
    """How many steps were taken."""


class NovoGrad(Rule):
    """Momentum of gradients that are divided by the norm of their array: v = beta[1] v + (1 - beta[1])
    |dx|^2; m = beta[0] m + dx / (sqrt(v) + epsilon) + lam x; dx' = eta m.

    Ginsburg et al., "Stochastic gradient methods with layer-wise adaptive moments for training of deep
    networks", 2019, arXiv:1905.11286, algorithm 1. v starts at the first |dx|^2; it is one number for each
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
        square = ops.sum(abs2(dx))
        v = where(state.t == 0, square, ema(self.beta[1], state.v, square))
        root = sqrt(v) + self.epsilon
        m = self.beta[0] * state.m + over(1, root) * dx + self.lam * x
        return NovoGradState(m, v, state.t + 1), self.eta * m
