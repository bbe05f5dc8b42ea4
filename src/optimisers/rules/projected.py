"""Steps without the part along the weights, for weights whose scale does not matter."""

from typing import Any, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import ema, sqrt, where, zeros_like
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, not_negative, setting, static
from optimisers.rules.adam import AdamState, adam_state, check_decaying, moments


def tangent(delta: float, ratio: float, x: Array, dx: Array, step: Array) -> tuple[Any, Any]:
    """(the step, without its part along x where x and the gradient are nearly orthogonal; the factor of the
    decay).

    Heo et al., algorithms 1 and 2: row by row first (all axes but the first), else for the whole array, whose
    sums are those of its rows.
    """
    if 0 in x.shape:
        return step, 1
    axes = tuple(range(1, x.ndim))
    columns = 1
    for n in x.shape[1:]:
        columns *= n
    rows = [ops.sum(a * b, axis=axes, keepdims=True) for a, b in ((x, x), (dx, dx), (x, dx), (x, step))]
    by_row, of_row = along(delta, columns, *rows)
    whole, of_whole = along(delta, columns * x.shape[0], *map(ops.sum, rows))
    projected = step - where(by_row, of_row, of_whole) * x
    return where(by_row | whole, projected, step), where(by_row | whole, ratio, 1)


def along(delta: float, size: int, xx: Any, gg: Any, xg: Any, xs: Any) -> tuple[Any, Any]:
    """(whether every unit is nearly orthogonal to its gradient, how much of x is in its step), of the inner
    products of parameters x, gradients g and steps s of each unit.
    """
    long, steep = sqrt(xx) + TINY, sqrt(gg) + TINY
    return ops.max(ops.abs(xg) / (long * steep)) < delta / max(size, 1) ** 0.5, xs / long / long


TINY = 1e-8


class AdamP(Rule):
    """AdamW without the part of the step along x, where x and the gradient are nearly orthogonal: there the
    scale of x does not matter, and the step would only let it grow.

    Heo et al., "AdamP: slowing down the slowdown for momentum optimizers on scale-invariant weights", 2020,
    arXiv:2006.08217, algorithm 2. Nearly orthogonal is |cos| < `delta` / sqrt(columns) in every row, or in
    the whole array; the decay is times `ratio` there. Arrays of fewer than two axes take AdamW's step. For
    real parameters.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    delta: Setting = setting(0.1)
    ratio: Setting = setting(0.1)
    nesterov: bool = static(False)

    def check(self) -> None:
        check_decaying(self)
        not_negative(self, "delta", "ratio")

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        state, m, v = moments(self.beta, state, dx)
        toward = ema(self.beta[0], state.m, dx) / state.weight[0] if self.nesterov else m
        step, factor = toward / (sqrt(v) + self.epsilon), 1
        if x.ndim > 1:
            step, factor = tangent(self.delta, self.ratio, x, dx, step)
        return state, self.eta * (step + self.lam * factor * x)


class SGDPState(NamedTuple):
    m: Any
    """The decaying sum of the gradients."""


class SGDP(Rule):
    """Descent with momentum, without the part of the step along x, where x and the gradient are nearly
    orthogonal.

    Heo et al., "AdamP: slowing down the slowdown for momentum optimizers on scale-invariant weights", 2020,
    arXiv:2006.08217, algorithm 1: m = rho m + dx; dx' = eta times m (nesterov: dx + rho m), projected as in
    `AdamP`; the decay is eta lam / (1 - rho) x. For real parameters.
    """

    eta: Setting = setting(0.1)
    rho: Setting = setting(0.9)
    lam: Setting = setting(0.0)
    delta: Setting = setting(0.1)
    ratio: Setting = setting(0.1)
    nesterov: bool = static(False)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam", "delta", "ratio")

    def init(self, x: Array) -> SGDPState:
        return SGDPState(zeros_like(x))

    def apply(self, state: SGDPState, x: Array, dx: Array) -> Any:
        m = self.rho * state.m + dx
        step, factor = dx + self.rho * m if self.nesterov else m, 1
        if x.ndim > 1:
            step, factor = tangent(self.delta, self.ratio, x, dx, step)
        return SGDPState(m), self.eta * (step + self.lam / (1 - self.rho) * factor * x)
