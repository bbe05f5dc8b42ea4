"""Rules that step in a few directions of a matrix: GaLore, Dion."""

from typing import Any, Literal, NamedTuple

import numpy as np

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import normal, sqrt, zeros_like
from optimisers.ops.matrices import adjoint
from optimisers.rule import (
    Pair,
    Rule,
    Setting,
    a_seed,
    at_least_one,
    in_unit_interval,
    not_negative,
    one_of,
    setting,
    static,
)
from optimisers.rules.adam import AdamState, adam_state, check_decaying, moments
from optimisers.rules.matrix import no_matrix


def leading(y: Array, count: int) -> Any:
    """The first columns of a matrix."""
    return ops.take(y, np.arange(count), axis=-1)


def within(rank: int, shape: tuple[int, ...]) -> int:
    """A rank that matrices of this shape have."""
    return min(rank, *shape)


def before_projecting(x: Array, rank: int, *, tall: bool) -> tuple[AdamState, Any]:
    """(moments of the projected gradient, directions of the shorter side) of a matrix before the first step;
    what is `tall` is multiplied by its directions from the right.
    """
    rank = within(rank, x.shape)
    kept = (x.shape[0], rank) if tall else (rank, x.shape[1])
    basis = ops.zeros((min(x.shape), rank), like=x)
    return adam_state(ops.zeros(kept, like=x)), basis


def projected(dx: Array, basis: Array, *, tall: bool) -> Any:
    """A matrix in the directions of its shorter side."""
    return ops.matmul(dx, basis) if tall else ops.matmul(adjoint(basis), dx)


# -- GaLore --------------------------------------------------------------------------------------------------


class GaLoreState(NamedTuple):
    adam: AdamState
    """The moments of the projected gradient."""
    basis: Any
    """The leading singular vectors of the shorter side, as columns; nothing but for matrices."""
    t: Any
    """How many steps were taken."""


class GaLore(Rule):
    """Adam on the leading singular vectors of the gradient: R = dx P, P its `rank` first right singular
    vectors (left ones, R = P^T dx, where rows are fewer); dx' = eta (scale A(R) P^T + lam x), A the step of
    Adam.

    Zhao et al., "GaLore: memory-efficient LLM training by gradient low-rank projection", 2024,
    arXiv:2403.03507, algorithm 2. P is renewed every `every` steps, from the first one on; the moments are
    kept as they are then. `epsilon` stands beside the root before the bias is taken away, as in the authors'
    code. Arrays that are not matrices step by Adam, without the scale.
    """

    eta: Setting = setting(1e-3)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-6)
    scale: Setting = setting(0.25)
    rank: int = static(128)
    every: int = static(200)

    def check(self) -> None:
        check_decaying(self)
        not_negative(self, "scale")
        at_least_one(self, "rank")
        at_least_one(self, "every")

    def init(self, x: Array) -> GaLoreState:
        if x.ndim != 2:
            return GaLoreState(adam_state(x), None, 0)
        return GaLoreState(*before_projecting(x, self.rank, tall=x.shape[0] >= x.shape[1]), 0)

    def apply(self, state: GaLoreState, x: Array, dx: Array) -> Any:
        basis, scale, tall = state.basis, 1.0, len(x.shape) == 2 and x.shape[0] >= x.shape[1]
        g = dx
        if basis is not None:

            def renewed() -> Any:
                u, _, vh = ops.svd(dx)
                return leading(adjoint(vh) if tall else u, within(self.rank, x.shape))

            basis = ops.every(state.t % self.every == 0, renewed, basis)
            g, scale = projected(dx, basis, tall=tall), self.scale
        adam, _, _ = moments(self.beta, state.adam, g)
        mass, energy = adam.weight
        step = sqrt(energy) / mass * (adam.m / (sqrt(adam.v) + self.epsilon))
        if basis is not None:
            step = step @ adjoint(basis) if tall else basis @ step
        return GaLoreState(adam, basis, state.t + 1), self.eta * (scale * step + self.lam * x)


# -- Dion ----------------------------------------------------------------------------------------------------


class DionState(NamedTuple):
    m: Any
    """The momentum that the steps so far have left over."""
    q: Any
    """The right side of the last step, columns of length 1."""
    t: Any
    """How many steps were taken."""


class Dion(Rule):
    """Orthogonal steps of low rank: B = m + dx; P = qr(B Q); R = B^T P; m = B - (1 - rho) P R^T; Q the
    columns of R at length 1; dx' = eta (sqrt(rows / columns) P Q^T + lam x).

    Ahn et al., "Dion: distributed orthonormalized updates", 2025, arXiv:2504.05295, algorithm 1. One step of
    power iteration from the Q before stands for the decomposition. Q starts with normal numbers of `seed`, or
    with the columns of the identity. It takes matrices alone.
    """

    eta: Setting = setting(0.01)
    rho: Setting = setting(0.95)
    lam: Setting = setting(0.01)
    seed: Setting = setting(0)
    rank: int = static(128)
    start: Literal["normal", "identity"] = static("normal")

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam")
        a_seed(self)
        at_least_one(self, "rank")
        one_of(self, "start", ("normal", "identity"))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise no_matrix(self, shape)

    def init(self, x: Array) -> DionState:
        return DionState(zeros_like(x), self.identity(x), 0)

    def identity(self, x: Array) -> Any:
        return leading(ops.eye(x.shape[1], like=x), within(self.rank, x.shape))

    def apply(self, state: DionState, x: Array, dx: Array) -> Any:
        q = state.q
        if self.start == "normal":
            q = ops.every(state.t == 0, lambda: self.random(dx), q)
        b = state.m + dx
        p, _ = ops.qr(b @ q)
        r = adjoint(adjoint(p) @ b)
        m = b - (1 - self.rho) * p @ adjoint(r)
        q = r / (sqrt(ops.sum(ops.abs2(r), axis=-2, keepdims=True)) + 1e-8)
        rows, columns = x.shape
        step = self.eta * ((rows / columns) ** 0.5 * (p @ adjoint(q)) + self.lam * x)
        return DionState(m, q, state.t + 1), step

    def random(self, dx: Array) -> Any:
        return leading(adjoint(normal(dx, self.seed)), within(self.rank, dx.shape))
