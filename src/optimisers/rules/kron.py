"""Preconditioners that are fitted step by step: PSGD with one triangular factor for each side of a matrix."""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import abs2, ema, exp, floor, maximum, mean, minimum, normal, zeros_like
from optimisers.ops.derived import is_complex, over, rms
from optimisers.rule import (
    Pair,
    Rule,
    Setting,
    a_seed,
    at_least_one,
    in_unit_interval,
    not_negative,
    setting,
    static,
)

NOISE = 2.0**-11.5
"""How much of its own size is added to a gradient before its factors are fitted: the root of 2^-23."""


def folded(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of an array as the matrix that is nearest to a square, of equal ones the widest."""
    cuts = range(1, max(2, len(shape)))
    sizes = [(prod(shape[:cut]), prod(shape[cut:])) for cut in cuts]
    return min(sizes, key=lambda size: abs(size[0] - size[1]))


def side(q: Array) -> bool:
    """Whether a factor is a triangular matrix; else it is a diagonal, along its longer axis."""
    return q.shape[0] == q.shape[1]


def stretched(q: Array, y: Array, axis: int) -> Any:
    """A factor times y along an axis."""
    if not side(q):
        return q * y
    return ops.matmul(q, y) if axis == 0 else ops.matmul(y, ops.transpose(q))


def stretched_back(q: Array, y: Array, axis: int) -> Any:
    """The transpose of a factor times y along an axis."""
    return stretched(ops.transpose(q) if side(q) else q, y, axis)


def shrunk(q: Array, y: Array, axis: int) -> Any:
    """The inverse of the transpose of a factor times y along an axis."""
    if not side(q):
        return y / q
    if axis == 0:
        return ops.solve_triangular(q, y, transposed=True)
    return ops.transpose(ops.solve_triangular(q, ops.transpose(y), transposed=True))


def bound(s: Array) -> Any:
    """A lower bound of the largest eigenvalue of a symmetric matrix, near to it: one step of power iteration
    from its longest column.
    """
    largest = ops.max(ops.abs(s))
    s = over(s, largest)
    order = ops.argsort(ops.sum(abs2(s), axis=-2))
    longest = ops.take(s, ops.take(order, np.array([s.shape[-1] - 1])), axis=-1)
    y = s @ longest
    return largest * ops.norm(s @ over(y, ops.norm(y)))


class KronState(NamedTuple):
    m: Any
    """The mean gradient, decaying."""
    weight: Any
    """The sum of the weights in it."""
    factors: tuple[Any, ...]
    """An upper triangular matrix for each side, a column or a row where it is a diagonal."""
    credit: Any
    """How many renewals were due so far."""
    t: Any
    """How many steps were taken."""


class Kron(Rule):
    """PSGD with Kronecker factors: u = Q1^T Q1 m Q2^T Q2, shortened to root mean square 1.1; dx' = eta (u +
    lam x). The factors are fitted so that the mean of |Q1 m Q2^T|^2 + |Q1^-T v Q2^-1|^2 falls, v normal.

    Li, "Preconditioned stochastic gradient descent", 2018, arXiv:1512.04202, in the form with triangular
    factors. m is the mean of dx without bias. A step fits with probability falling from `often[0]` to
    `often[1]`, e^(-0.001 (t - 500)) between them, spread evenly; `precond_eta` is the rate of the fit,
    `start` the first value of the product of the factors, `seed` that of v. An array of more axes is the
    matrix nearest to a square; sides longer than `max_dim` and vectors have diagonal factors. Vectors do not
    decay. Complex arrays are refused.
    """

    eta: Setting = setting(3e-4)
    rho: Setting = setting(0.9)
    lam: Setting = setting(0.0)
    precond_eta: Setting = setting(0.1)
    often: Pair = setting((1.0, 0.03))
    start: Setting = setting(1.0)
    seed: Setting = setting(0)
    max_dim: int = static(8192)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam", "precond_eta", "often")
        a_seed(self)
        at_least_one(self, "max_dim")

    def init(self, x: Array) -> KronState:
        if is_complex(x):
            raise BadSetting("Kron fits factors of real arrays; give complex ones another rule")
        sizes = (prod(x.shape),) if len(x.shape) < 2 else folded(x.shape)
        first = self.start ** (1 / len(sizes))
        factors = tuple(first * self.identity(n, axis, len(sizes), x) for axis, n in enumerate(sizes))
        return KronState(zeros_like(x), 0.0, factors, 0.0, 0)

    def identity(self, n: int, axis: int, sides: int, x: Array) -> Any:
        """A factor before it is fitted."""
        if sides == 2 and n <= self.max_dim:
            return ops.eye(n, like=x)
        return ops.zeros((n, 1) if axis == 0 else (1, n), like=x) + 1

    def apply(self, state: KronState, x: Array, dx: Array) -> Any:
        shape, factors = x.shape, state.factors
        if 0 in shape:
            return state, dx
        m, weight = ema(self.rho, state.m, dx), ema(self.rho, state.weight, 1)
        size = folded(shape) if len(shape) > 1 else (prod(shape), 1)
        w = ops.reshape(m * (1 / weight), size)
        chance = minimum(self.often[0], maximum(self.often[1], exp(-0.001 * (state.t - 500))))
        credit = state.credit + chance
        due = floor(credit) > floor(state.credit)
        v = normal(dx, self.seed)
        factors = ops.every(due, lambda: self.fitted(factors, w, ops.reshape(v, size)), factors)
        u = w
        for axis, q in enumerate(factors):
            u = stretched_back(q, stretched(q, u, axis), axis)
        u = ops.reshape(u * minimum(1, 1.1 / (rms(u) + 1e-12)), shape)
        step = self.eta * (u + self.lam * x) if len(shape) > 1 else self.eta * u
        return KronState(m, weight, factors, credit, state.t + 1), step

    def fitted(self, factors: tuple[Any, ...], w: Array, v: Array) -> tuple[Any, ...]:
        """The factors after a step of their own."""
        a, b = w + NOISE * mean(ops.abs(w)) * v, v
        for axis, q in enumerate(factors):
            a, b = stretched(q, a, axis), shrunk(q, b, axis)
        return tuple(self.fitted_one(q, a, b, axis) for axis, q in enumerate(factors))

    def fitted_one(self, q: Array, a: Array, b: Array, axis: int) -> Any:
        """One factor after a step along its own gradient, as long as its curvature allows."""
        if side(q):
            aa, bb = (y @ ops.transpose(y) if axis == 0 else ops.transpose(y) @ y for y in (a, b))
            return q - self.precond_eta * over(1, bound(aa + bb)) * (ops.triu(aa - bb) @ q)
        aa, bb = (ops.sum(abs2(y), axis=1 - axis, keepdims=True) for y in (a, b))
        return q - self.precond_eta * over(1, ops.max(aa + bb)) * ((aa - bb) * q)
