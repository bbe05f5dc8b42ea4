"""Rules that learn how gradients are correlated along each axis, and step in its eigenvectors: Shampoo,
SOAP, SPlus.

Axis i of n elements has a Gram matrix (n, n), the mean of G G^T, where G is the gradient with that axis as
rows and all others as columns. An axis longer than `max_dim` has none, and is left as it is. One longer than
`block` is cut into pieces, and the array into blocks, each an array of its own.
"""

from typing import Any, ClassVar, Literal, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import (
    abs2,
    conj,
    ema,
    maximum,
    real_zeros_like,
    sign,
    sqrt,
    updated,
    where,
    zeros_like,
)
from optimisers.ops.derived import over
from optimisers.ops.matrices import adjoint
from optimisers.rule import Pair, Rule, Setting, at_least_one, in_unit_interval, not_negative, setting, static
from optimisers.rules.adam import AdamState, adam_state, check_decaying, moments
from optimisers.rules.axes import (
    Blocks,
    along,
    blocks_of,
    check_axes,
    each,
    gram,
    grams_of,
    identities_of,
    mean_grams,
    rotated,
    rotated_back,
)

# -- SOAP ----------------------------------------------------------------------------------------------------


def eigenvectors(c: Array) -> Any:
    """The eigenvectors of a Gram matrix, those of the largest eigenvalues first."""
    w, q = ops.eigh(c)
    return ops.take(q, ops.argsort(-w), axis=-1)


class SOAPState(NamedTuple):
    adam: AdamState
    """The mean gradient in the space of x, and the mean square in the bases."""
    grams: tuple[Any, ...]
    """The mean Gram matrix of every axis."""
    bases: tuple[Any, ...]
    """What its eigenvectors are nearly, as columns."""
    t: Any
    """How many gradients there were."""


class SOAP(Rule):
    """Adam in the eigenvectors of Shampoo: dx' = eta (c R'(R(m) / (sqrt(v) + epsilon)) + lam x), where R
    turns each axis into its basis, R' turns it back, m is the mean of dx, v that of |R(dx)|^2, and c takes
    their bias away.

    Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam", 2024, arXiv:2409.11321, algorithm 3.
    The first gradient only makes the bases, without a step. Gram matrices decay with `shampoo_beta`, beta[1]
    if it is None; `every` so many steps one step of power iteration and a QR decomposition renew the bases,
    and v is put in their order. Axes longer than `max_dim`, and all of an array with fewer than two unless
    `vectors`, keep their basis: that is Adam. `merge` joins neighbouring axes while their product is at most
    `max_dim`, for kernels of convolutions; small matrices become vectors with one basis. `block` cuts axes
    that are longer into as few equal pieces as will do, the array into blocks, and each of these is stepped
    as an array of its own: 768 x 3072 with a block of 1024 is three matrices 768 x 1024. The decay is taken
    beside the step, where the authors' code takes it after.
    """

    eta: Setting = setting(3e-3)
    beta: Pair = setting((0.95, 0.95))
    lam: Setting = setting(0.01)
    epsilon: Setting = setting(1e-8)
    every: int = static(10)
    shampoo_beta: float | None = static(None)
    max_dim: int = static(10000)
    vectors: bool = static(False)
    merge: bool = static(False)
    block: int | None = static(None)

    def check(self) -> None:
        check_decaying(self)
        check_axes(self, self.block)

    def cut(self, shape: tuple[int, ...]) -> Blocks:
        """The blocks whose axes have bases."""
        return blocks_of(shape, self.max_dim, self.block, merge=self.merge)

    def init(self, x: Array) -> SOAPState:
        least = 1 if self.vectors or len(x.shape) > 1 else 2
        cut = self.cut(x.shape)
        grams = grams_of(cut, x, self.max_dim, least)
        bases = identities_of(cut, x, self.max_dim, least)
        return SOAPState(adam_state(cut.of(x)), grams, bases, 0)

    def apply(self, state: SOAPState, x: Array, dx: Array) -> Any:
        first, bases, cut = state.t == 0, state.bases, self.cut(x.shape)
        dx = cut.of(dx)
        square = where(first, 0, abs2(rotated(dx, bases)))
        adam, _, _ = moments(self.beta, state.adam, where(first, 0, dx), square)
        step = rotated_back(rotated(adam.m, bases) / (sqrt(adam.v) + self.epsilon), bases)
        mass, energy = adam.weight
        grams = mean_grams(self.beta[1] if self.shampoo_beta is None else self.shampoo_beta, state.grams, dx)
        bases = ops.every(first, lambda: each(eigenvectors, grams), bases)
        due = (state.t % self.every == 0) & (state.t > 0)
        v, bases = ops.every(due, lambda: renewed(adam.v, grams, bases), (adam.v, bases))
        new = AdamState(adam.m, v, (where(first, 0.0, mass), where(first, 0.0, energy)))
        step = sqrt(energy) / mass * cut.back(step) + self.lam * x
        step = where(first, 0.0, self.eta) * step
        return SOAPState(new, grams, bases, state.t + 1), step


def renewed(v: Array, grams: tuple[Any, ...], bases: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """v and the bases after a step of power iteration, in the order of what they are near to, the largest
    eigenvalues first.
    """
    new: list[Any] = []
    for axis, (c, q) in enumerate(zip(grams, bases, strict=True)):
        if q is None:
            new.append(None)
            continue
        power = c @ q
        order = ops.argsort(-ops.real(ops.sum(conj(q) * power, axis=-2)))
        v = ops.take(v, order, axis=len(c.shape) - 2 + axis)
        new.append(ops.qr(ops.take(power, order, axis=-1))[0])
    return v, tuple(new)


# -- Shampoo -------------------------------------------------------------------------------------------------


class ShampooState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    grams: tuple[Any, ...]
    """The mean Gram matrix of every axis, decaying with beta[1]; the sum where that is 1."""
    roots: tuple[Any, ...]
    """The inverse roots of these, as they were renewed last."""
    v: Any
    """The mean of |dx|^2, decaying with graft_beta; nothing where it is not needed."""
    weight: tuple[Any, Any, Any]
    """The sums of the weights in m, in the Gram matrices and in v."""
    t: Any
    """How many steps were taken."""


class Shampoo(Rule):
    """Steps in inverse roots of the correlations along each axis: u = P_1 ... P_d m, P_i = (C_i + epsilon
    I)^(-1 / (2 d)), C_i the mean of G_i G_i^T; dx' = eta (u |h| / |u| + lam x), h the step of Adam.

    Gupta, Koren & Singer, "Shampoo: preconditioned stochastic tensor optimization", 2018, arXiv:1802.09568,
    with momentum, means and grafting as Anil et al., 2020, arXiv:2002.09018, and Shi et al., 2023,
    arXiv:2309.06497. The roots are renewed every `every` steps, from the first one on, by eigenvalues, of
    which negative ones count as 0. With beta[1] = 1 Gram matrices are sums. `graft=None` steps by u itself.
    d counts the axes up to `max_dim` long; an array without any steps by Adam. `merge` as in `SOAP`: with a
    max_dim and a `block` of 1024 it is what Shi et al. do, but that they cut whole blocks off and leave the
    rest. Each block has its own |h| / |u|.
    """

    eta: Setting = setting(0.01)
    beta: Pair = setting((0.9, 0.99))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-12)
    graft_beta: Setting = setting(0.99)
    graft_epsilon: Setting = setting(1e-8)
    graft: Literal["adam"] | None = static("adam")
    every: int = static(10)
    max_dim: int = static(8192)
    merge: bool = static(False)
    block: int | None = static(None)

    def check(self) -> None:
        in_unit_interval(self, "graft_beta")
        not_negative(self, "lam", "epsilon", "graft_epsilon")
        first, second = self.beta
        if (isinstance(first, float) and not 0 <= first < 1) or (
            isinstance(second, float) and not 0 <= second <= 1
        ):
            raise BadSetting(f"Shampoo.beta is {self.beta!r}; it takes two numbers, in [0, 1) and [0, 1]")
        check_axes(self, self.block)
        if self.graft not in ("adam", None):
            raise BadSetting(f"Shampoo.graft is {self.graft!r}; it takes 'adam' or None")

    def cut(self, shape: tuple[int, ...]) -> Blocks:
        """The blocks whose axes have Gram matrices."""
        return blocks_of(shape, self.max_dim, self.block, merge=self.merge)

    def init(self, x: Array) -> ShampooState:
        cut = self.cut(x.shape)
        grams = grams_of(cut, x, self.max_dim, 1)
        apart = self.graft is None and any(c is not None for c in grams)
        roots = identities_of(cut, x, self.max_dim, 1)
        v = None if apart else real_zeros_like(x)
        return ShampooState(zeros_like(x), grams, roots, v, (0.0, 0.0, 0.0), 0)

    def apply(self, state: ShampooState, x: Array, dx: Array) -> Any:
        decays = (self.beta[0], self.beta[1], self.graft_beta)
        weight = tuple(ema(b, w, 1) for b, w in zip(decays, state.weight, strict=True))
        m = ema(self.beta[0], state.m, dx)
        sums = self.beta[1] == 1
        part = where(sums, 1, 1 - self.beta[1])
        cut = self.cut(x.shape)
        g = cut.of(dx)
        grams = tuple(
            None if c is None else self.beta[1] * c + part * gram(g, i, cut.outer)
            for i, c in enumerate(state.grams)
        )
        power = -1 / (2 * max(1, sum(c is not None for c in grams)))
        whole = where(sums, 1, weight[1])
        roots = ops.every(
            state.t % self.every == 0,
            lambda: each(lambda c: matrix_power(c * (1 / whole), power, self.epsilon), grams),
            state.roots,
        )
        w = m * (1 / weight[0])
        u, v = cut.of(w), state.v
        for axis, p in enumerate(roots):
            u = u if p is None else along(p, u, axis)
        if v is not None:
            v = ema(self.graft_beta, v, abs2(dx))
            h = w / (sqrt(v * (1 / weight[2])) + self.graft_epsilon)
            if all(p is None for p in roots):
                return ShampooState(m, grams, roots, v, weight, state.t + 1), self.eta * (h + self.lam * x)
            u = u * (cut.norms(cut.of(h)) / (cut.norms(u) + 1e-16))
        u = cut.back(u)
        return ShampooState(m, grams, roots, v, weight, state.t + 1), self.eta * (u + self.lam * x)


def matrix_power(c: Array, power: float, epsilon: Any) -> Any:
    """(c + epsilon I)^power of a Gram matrix, of which rounding may have made eigenvalues negative."""
    w, q = ops.eigh(c)
    scaled = (maximum(w, 0) + epsilon) ** power
    return (q * ops.reshape(scaled, (*c.shape[:-2], 1, c.shape[-1]))) @ adjoint(q)


# -- SPlus ---------------------------------------------------------------------------------------------------


class SPlusState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    grams: tuple[Any, ...]
    """The mean Gram matrices, decaying with beta[1]; none but for matrices."""
    bases: tuple[Any, ...]
    """Their eigenvectors, as columns."""
    average: Any
    """The mean of the parameters, decaying with rho."""
    weight: Any
    """The sum of the weights in it."""
    t: Any
    """How many steps were taken."""


class SPlus(Rule):
    """Signs in the eigenvectors of Shampoo: dx' = 2 eta / (rows + columns) (q1 sign(q1^T m q2) q2^T + lam x);
    of other arrays than matrices 0.001 eta (sign(m) + lam x).

    Frans, Levine & Abbeel, "A stable whitening optimizer for efficient neural network training", 2025,
    arXiv:2506.07254. The bases are renewed after the first step and every `every` steps. `averaged(state,
    model)` holds the mean of the parameters, without bias, which the authors evaluate with. The decay is
    taken beside the step, where their code takes it after. Matrices with an axis longer than `max_dim` step
    by signs of m.
    """

    whole: ClassVar[bool] = True

    eta: Setting = setting(0.1)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.01)
    rho: Setting = setting(0.999)
    every: int = static(100)
    max_dim: int = static(10000)

    def check(self) -> None:
        in_unit_interval(self, "beta", "rho")
        not_negative(self, "lam")
        at_least_one(self, "every")
        at_least_one(self, "max_dim")

    def init(self, x: Array) -> SPlusState:
        most = self.max_dim if x.ndim == 2 and max(x.shape) <= self.max_dim else 0
        cut = blocks_of(x.shape, most, None, merge=False)
        grams, bases = grams_of(cut, x, most), identities_of(cut, x, most)
        return SPlusState(zeros_like(x), grams, bases, zeros_like(x), 0.0, 0)

    def apply(self, state: SPlusState, x: Array, dx: Array) -> Any:
        t, bases = state.t + 1, state.bases
        m = ema(self.beta[0], state.m, dx)
        u = rotated_back(sign(rotated(m, bases)), bases)
        scale = 2 / sum(x.shape) if any(q is not None for q in bases) else 1e-3
        grams = mean_grams(self.beta[1], state.grams, dx)
        due = (t % self.every == 0) | (t == 1)
        bases = ops.every(due, lambda: each(lambda c: ops.eigh(c)[1], grams), bases)
        step = self.eta * scale * (u + self.lam * x)
        average = ema(self.rho, state.average, updated(x, step))
        return SPlusState(m, grams, bases, average, ema(self.rho, state.weight, 1), t), step

    def evaluate(self, state: SPlusState, x: Array) -> Any:
        return where(state.weight == 0, x, over(state.average, state.weight))
