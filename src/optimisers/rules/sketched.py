"""Rules that learn of a gradient in a few random directions."""

from typing import Any, Literal, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import norm2, normal, sqrt
from optimisers.ops.matrices import adjoint
from optimisers.rule import (
    Pair,
    Rule,
    Setting,
    a_seed,
    at_least_one,
    not_negative,
    one_of,
    setting,
    static,
)
from optimisers.rules.adam import AdamState, adam_state, check_decaying, moments
from optimisers.rules.direction import grown
from optimisers.rules.lowrank import before_projecting, leading, projected, within


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether there are rows and columns."""
    return len(shape) == 2 and 0 not in shape


class APOLLOState(NamedTuple):
    adam: AdamState
    """The moments of the projected gradient; for arrays that are no matrices of the gradient."""
    basis: Any
    """The random directions of the shorter side, as columns; nothing but for matrices."""
    size: Any
    """The norm of the scaled gradient at the step before; 0 before the first."""
    t: Any
    """How many steps were taken."""


class APOLLO(Rule):
    """The gradient, scaled by what Adam does to it in some random directions: R = P^T dx, P of normal
    numbers of variance 1 / rank; w = dx |A(R)| / |R| column by column, A the step of Adam; dx' = eta
    (sqrt(scale) w + lam x).

    Zhu et al., "APOLLO: SGD-like memory, AdamW-level performance", 2024, arXiv:2412.05270, algorithm 1. P
    stands at the shorter side: R = dx P, and row by row, where there are more rows. It is drawn anew from
    `seed` every `every` steps, from the first one on; the moments are kept as they are then. The norm of w
    grows by 1% a step at most, as in `NormGrowthCap`. With `per="array"` the quotient is that of whole norms:
    APOLLO-Mini is `APOLLO(rank=1, scale=128.0, per="array")`. Arrays that are not matrices step by Adam,
    without the scale.
    """

    eta: Setting = setting(0.01)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-6)
    scale: Setting = setting(1.0)
    seed: Setting = setting(0)
    rank: int = static(256)
    every: int = static(200)
    per: Literal["channel", "array"] = static("channel")

    def check(self) -> None:
        check_decaying(self)
        not_negative(self, "scale")
        a_seed(self)
        at_least_one(self, "rank")
        at_least_one(self, "every")
        one_of(self, "per", ("channel", "array"))

    def init(self, x: Array) -> APOLLOState:
        if not is_matrix(x.shape):
            return APOLLOState(adam_state(x), None, 0.0, 0)
        return APOLLOState(*before_projecting(x, self.rank, tall=x.shape[0] > x.shape[1]), 0.0, 0)

    def apply(self, state: APOLLOState, x: Array, dx: Array) -> Any:
        basis, r, size = state.basis, dx, state.size
        tall = is_matrix(x.shape) and x.shape[0] > x.shape[1]
        if basis is not None:
            basis = ops.every(state.t % self.every == 0, lambda: self.drawn(dx, tall=tall), basis)
            r = projected(dx, basis, tall=tall)
        adam, m, v = moments(self.beta, state.adam, r)
        u = m / (sqrt(v) + self.epsilon)
        if basis is None:
            w = u
        else:
            across = (-2, -1) if self.per == "array" else -1 if tall else -2
            long, before = (norm2(y, axis=across, keepdims=True) for y in (u, r))
            size, w = grown(GROWTH, size, dx * (long / (before + 1e-8)))
            w = sqrt(self.scale) * w
        return APOLLOState(adam, basis, size, state.t + 1), self.eta * (w + self.lam * x)

    def drawn(self, dx: Array, *, tall: bool) -> Any:
        """New random directions of the shorter side."""
        rank = within(self.rank, dx.shape)
        numbers = normal(dx, self.seed)
        first = leading(adjoint(numbers) if tall else numbers, rank)
        return first * rank**-0.5


GROWTH = 1.01
"""How much longer a step of `APOLLO` may be than the one before."""
