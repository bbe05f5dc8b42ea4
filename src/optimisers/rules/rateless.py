"""Rules that find the size of their steps by themselves, from how far the parameters have come."""

import math
from typing import Any, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array, Operand
from optimisers.ops import (
    abs2,
    copy,
    ema,
    maximum,
    minimum,
    norm,
    real_zeros_like,
    sign,
    sqrt,
    total,
    where,
    zeros_like,
)
from optimisers.ops.derived import hypot, nonzero, over, scaled_to
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, not_negative, setting, static
from optimisers.rules.adam import check_moments, weights
from optimisers.rules.gradient import decayed


def inner(a: Array, b: Array) -> Any:
    """The sum over all elements of a b, of real arrays."""
    return ops.sum(a * b)


def shared(estimate: Operand) -> Any:
    """The estimate of all arrays, which never falls: one that had no gradient for a while is behind. It is
    known before the sums of a step: what they sum is multiplied by it, so that one pass takes them all.
    """
    return total(estimate, p=math.inf)


def unbiased(beta: tuple[float, float], old: tuple[Any, Any], debias: bool) -> tuple[Any, Any]:
    """(the sums of the weights after this step, the factor that corrects both biases, or 1)."""
    weight = weights(beta, old)
    return weight, sqrt(weight[1]) / weight[0] if debias else 1


class ProdigyState(NamedTuple):
    m: Any
    """The mean of d dx, decaying with beta[0]."""
    v: Any
    """The mean of d^2 dx^2, decaying with beta[1]."""
    s: Any
    """The decaying sum of the gradients, weighted as in r."""
    start: Any
    """The parameters before the first step."""
    r: Any
    """The decaying sum of <dx, start - x> of this array; the sum over all arrays counts."""
    d: Any
    """The estimate of the distance to the solution; one number for all arrays."""
    top: Any
    """The largest estimate so far."""
    weight: tuple[Any, Any]
    """The sums of the weights in m and v so far, 1 - beta^t."""


class Prodigy(Rule):
    """AdamW that estimates its rate from the distance it has come: eta stays 1.

    Mishchenko & Defazio, "Prodigy: an expeditiously adaptive parameter-free learner", 2023, arXiv:2306.06101,
    algorithm 4. All arrays stepped together share the estimate d, which starts at `d0` and grows at most by
    the factor `growth` a step; `d_coef` scales it. `debias` corrects the moments as Adam does; `safeguard`
    weights the sum of the gradients without eta, for warm-ups. `couple=True` adds lam x to the gradient
    instead of decaying beside the step. For real parameters.
    """

    eta: Setting = setting(1.0)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    d0: Setting = setting(1e-6)
    d_coef: Setting = setting(1.0)
    growth: Setting = setting(math.inf)
    debias: bool = static(False)
    safeguard: bool = static(False)
    couple: bool = static(False)

    def check(self) -> None:
        check_moments(self)
        not_negative(self, "lam", "d0", "d_coef", "growth")

    def init(self, x: Array) -> ProdigyState:
        zeros = zeros_like(x)
        return ProdigyState(zeros, real_zeros_like(x), zeros_like(x), copy(x), 0.0, 0.0, 0.0, (0.0, 0.0))

    def apply(self, state: ProdigyState, x: Array, dx: Array) -> Any:
        new = state.weight[0] == 0
        d, top = shared(where(new, self.d0, state.d)), shared(where(new, self.d0, state.top))
        g = decayed(self.lam, x, dx) if self.couple else dx
        weight, correction = unbiased(self.beta, state.weight, self.debias)
        k, keep = d * self.eta * correction, sqrt(self.beta[1])
        r = keep * state.r + inner(d / self.d0 * k * g, state.start - x)
        m = self.beta[0] * state.m + (1 - self.beta[0]) * d * g
        v = self.beta[1] * state.v + (1 - self.beta[1]) * d * d * abs2(g)
        s = keep * state.s + d / self.d0 * (d if self.safeguard else k) * g
        length = total(ops.sum(ops.abs(s)))
        hat = self.d_coef * total(r) / where(length == 0, 1, length)
        top = maximum(top, hat)
        found = minimum(top, self.growth * where(d == self.d0, maximum(d, hat), d))
        found = where(length == 0, d, found)
        step = m / (sqrt(v) + found * self.epsilon)
        step = step if self.couple else decayed(self.lam, x, step)
        state = ProdigyState(m, v, s, state.start, r, found, top, weight)
        return state, where(length == 0, 0, k * step)


class DAdaptAdamState(NamedTuple):
    m: Any
    """The mean of d eta dx, decaying with beta[0]."""
    v: Any
    """The mean of dx^2, decaying with beta[1]."""
    s: Any
    """The mean of d eta dx, decaying with sqrt(beta[1])."""
    r: Any
    """The decaying mean of d eta <dx, s / (sqrt(v) + epsilon)> of this array; the sum over all arrays counts.
    """
    d: Any
    """The estimate of the distance to the solution; one number for all arrays."""
    weight: tuple[Any, Any]
    """The sums of the weights in m and v so far, 1 - beta^t."""


class DAdaptAdam(Rule):
    """AdamW that estimates its rate from correlations of its gradients: eta stays 1.

    Defazio & Mishchenko, "Learning-rate-free learning by D-adaptation", 2023, arXiv:2301.07733, algorithm 5.
    All arrays stepped together share the estimate d, which starts at `d0`, never falls, and grows at most by
    the factor `growth` a step. `debias` and `couple` as in `Prodigy`, which is the better of the two by its
    authors' experiments. For real parameters.
    """

    eta: Setting = setting(1.0)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    d0: Setting = setting(1e-6)
    growth: Setting = setting(math.inf)
    debias: bool = static(False)
    couple: bool = static(False)

    def check(self) -> None:
        check_moments(self)
        not_negative(self, "lam", "d0", "growth")

    def init(self, x: Array) -> DAdaptAdamState:
        return DAdaptAdamState(zeros_like(x), real_zeros_like(x), zeros_like(x), 0.0, 0.0, (0.0, 0.0))

    def apply(self, state: DAdaptAdamState, x: Array, dx: Array) -> Any:
        d = shared(where(state.weight[0] == 0, self.d0, state.d))
        g = decayed(self.lam, x, dx) if self.couple else dx
        weight, correction = unbiased(self.beta, state.weight, self.debias)
        k, keep = d * self.eta * correction, sqrt(self.beta[1])
        r = ema(keep, state.r, inner(k * g, state.s / (sqrt(state.v) + self.epsilon)))
        m = self.beta[0] * state.m + (1 - self.beta[0]) * k * g
        v = ema(self.beta[1], state.v, abs2(g))
        s = keep * state.s + (1 - keep) * k * g
        found = grown(d, total(r), (1 - keep) * total(ops.sum(ops.abs(s))))
        found = minimum(found, self.growth * d)
        step = m / (sqrt(v) + self.epsilon)
        step = step if self.couple else step + k * self.lam * x
        return DAdaptAdamState(m, v, s, r, found, weight), step


def grown(d: Operand, r: Operand, length: Operand) -> Any:
    """The larger of d and r / length; d where nothing has moved."""
    return maximum(d, over(r, length))


class DAdaptSGDState(NamedTuple):
    start: Any
    """The parameters before the first step."""
    s: Any
    """The sum of the gradients, each times d eta / g0."""
    r: Any
    """The sum of <dx, s> of this array, weighted so; the sum over all arrays counts."""
    d: Any
    """The estimate of the distance to the solution; one number for all arrays."""
    g0: Any
    """The norm of all gradients at the first step."""


class DAdaptSGD(Rule):
    """Descent with momentum that estimates its rate: x becomes rho x + (1 - rho) (x0 - s), where s sums the
    gradients, each times d eta / |g0|.

    Defazio & Mishchenko, "Learning-rate-free learning by D-adaptation", 2023, arXiv:2301.07733, algorithm 4.
    `lam` is added to the gradient, lam x; `growth` as in `DAdaptAdam`. For real parameters.
    """

    eta: Setting = setting(1.0)
    rho: Setting = setting(0.0)
    lam: Setting = setting(0.0)
    d0: Setting = setting(1e-6)
    growth: Setting = setting(math.inf)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam", "d0", "growth")

    def init(self, x: Array) -> DAdaptSGDState:
        return DAdaptSGDState(copy(x), zeros_like(x), 0.0, 0.0, 0.0)

    def apply(self, state: DAdaptSGDState, x: Array, dx: Array) -> Any:
        g = decayed(self.lam, x, dx)
        first = total(norm(dx), p=2)
        before = shared(state.g0)
        g0 = where(before == 0, first, before)
        d = shared(where(state.d == 0, self.d0, state.d))
        rate, most = d * self.eta, nonzero(g0)
        pull = scaled_to(inner(g, state.s), rate, most)
        r, s = state.r + pull, state.s + scaled_to(g, rate, most)
        step = scaled_to(total(norm(g), p=2), rate, most)
        length = total(norm(state.s), p=2)  # of s, without another pass: nothing cancels where r > 0
        length = sqrt(maximum(length * length + 2 * total(pull) + step * step, 0))
        found = minimum(grown(d, 2 * total(r), length), self.growth * d)
        return DAdaptSGDState(state.start, s, r, found, g0), (1 - self.rho) * (x - state.start + s)


class DAdaptLionState(NamedTuple):
    m: Any
    """The mean of d eta dx, decaying with beta[1]."""
    s: Any
    """The mean of d eta times the steps' signs, decaying with sqrt(beta[1])."""
    r: Any
    """The decaying mean of d eta <sign, s> of this array; the sum over all arrays counts."""
    d: Any
    """The estimate of the distance to the solution; one number for all arrays."""


class DAdaptLion(Rule):
    """Lion that estimates its rate: u = sign(beta[0] m + (1 - beta[0]) dx); dx' = d eta (u + lam x).

    Defazio & Mishchenko, "Learning-rate-free learning by D-adaptation", 2023, arXiv:2301.07733, applied to
    Chen et al., arXiv:2302.06675, as in the authors' package. For real parameters.
    """

    eta: Setting = setting(1.0)
    beta: Pair = setting((0.9, 0.99))
    lam: Setting = setting(0.0)
    d0: Setting = setting(1e-6)

    def check(self) -> None:
        in_unit_interval(self, "beta")
        not_negative(self, "lam", "d0")

    def init(self, x: Array) -> DAdaptLionState:
        return DAdaptLionState(zeros_like(x), zeros_like(x), 0.0, 0.0)

    def apply(self, state: DAdaptLionState, x: Array, dx: Array) -> Any:
        d = shared(where(state.d == 0, self.d0, state.d))
        k, keep = d * self.eta, sqrt(self.beta[1])
        u = sign(ema(self.beta[0], state.m, dx))
        m = ema(self.beta[1], state.m, k * dx)
        r = ema(keep, state.r, inner(k * u, state.s))
        s = keep * state.s + (1 - keep) * k * u
        found = grown(d, total(r), (1 - keep) * total(ops.sum(ops.abs(s))))
        return DAdaptLionState(m, s, r, found), k * decayed(self.lam, x, u)


class DistanceState(NamedTuple):
    start: Any
    """The parameters before the first step."""
    r: Any
    """The largest distance from the start so far."""
    root: Any
    """The root of the sum of |dx|^2, weighted as the rule says."""


class DoG(Rule):
    """Descent whose rate is the distance come over the root of all squared gradients: dx' = eta r / sqrt(G)
    dx, r the largest |x - x0| and G the sum of |dx|^2, over all arrays.

    Ivgi, Hinder & Carmon, "DoG is SGD's best friend: a parameter-free dynamic step size schedule", 2023,
    arXiv:2302.12022, algorithm 1. r starts at `reps` (1 + |x0|). `lam` is added to the gradient, lam x.
    Evaluate with averages: EMA(DoG()).
    """

    eta: Setting = setting(1.0)
    reps: Setting = setting(1e-6)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        not_negative(self, "reps", "lam", "epsilon")

    def init(self, x: Array) -> DistanceState:
        return DistanceState(copy(x), 0.0, 0.0)

    def apply(self, state: DistanceState, x: Array, dx: Array) -> Any:
        state = state._replace(r=shared(state.r), root=shared(state.root))
        return by_distance(self, state, x, decayed(self.lam, x, dx), lambda size: total(size, p=2))


class LDoG(Rule):
    """DoG array by array: each has a distance and a sum of its own.

    Ivgi, Hinder & Carmon, "DoG is SGD's best friend: a parameter-free dynamic step size schedule", 2023,
    arXiv:2302.12022, section 3.3.
    """

    eta: Setting = setting(1.0)
    reps: Setting = setting(1e-6)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        not_negative(self, "reps", "lam", "epsilon")

    def init(self, x: Array) -> DistanceState:
        return DistanceState(copy(x), 0.0, 0.0)

    def apply(self, state: DistanceState, x: Array, dx: Array) -> Any:
        return by_distance(self, state, x, decayed(self.lam, x, dx), lambda size: size)


def by_distance(rule: "DoG | LDoG", state: DistanceState, x: Array, g: Array, join: Any) -> Any:
    """(new state, step) of DoG, whose norms are joined by `join`."""
    new = state.r == 0
    come = where(new, join(norm(x)), join(norm(x - state.start)))  # in one pass, whatever `new` is known by
    r = where(new, rule.reps * (1 + come), maximum(state.r, come))
    root = hypot(where(new, sqrt(rule.epsilon), state.root), join(norm(g)))
    return DistanceState(state.start, r, root), scaled_to(g, rule.eta * r, nonzero(root))


class DoWG(Rule):
    """DoG with weighted gradients: r = max(r, |x - x0|); v = v + r^2 |dx|^2; dx' = eta r^2 / (sqrt(v) +
    epsilon) dx, over all arrays.

    Khaled, Mishchenko & Jin, "DoWG unleashed: an efficient universal parameter-free gradient descent method",
    2023, arXiv:2305.16284, algorithm 1. r starts at sqrt(epsilon).
    """

    eta: Setting = setting(1.0)
    epsilon: Setting = setting(1e-4)

    def check(self) -> None:
        not_negative(self, "epsilon")

    def init(self, x: Array) -> DistanceState:
        return DistanceState(copy(x), 0.0, 0.0)

    def apply(self, state: DistanceState, x: Array, dx: Array) -> Any:
        come, before = total(norm(x - state.start), p=2), shared(state.r)
        r = maximum(where(before == 0, sqrt(self.epsilon), before), come)
        root = hypot(shared(state.root), r * total(norm(dx), p=2))
        step = scaled_to(dx, self.eta * r * r, nonzero(root + self.epsilon))
        return DistanceState(state.start, r, root), step
