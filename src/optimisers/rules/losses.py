"""Steps whose length follows from the loss itself: how far its value is above the best that there can be."""

from typing import Any, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array, Operand
from optimisers.ops import abs2, ema, loss, maximum, minimum, real_zeros_like, sqrt, total, where, zeros_like
from optimisers.ops.derived import over
from optimisers.ops.steps import latest
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, not_negative, setting, static
from optimisers.rules.adam import check_decaying, weights


def inner(a: Operand, b: Any) -> Any:
    """The sum of a b over all elements of all arrays, of real ones."""
    return total(ops.sum(a * b))


class MoMoState(NamedTuple):
    m: Any
    """The mean gradient, decaying with rho; it starts at the first one."""
    f: Any
    """The mean loss, likewise."""
    c: Any
    """The mean of <dx, x> over all arrays, likewise."""
    t: Any
    """How many steps were taken, with this array or without it."""


class MoMo(Rule):
    """Descent with momentum as far as the model of the loss reaches down: x becomes x - min(eta, h / |m|^2)
    m, h = F - lower - c + <m, x>, all means with `rho`.

    Schaipp et al., "MoMo: momentum models for adaptive learning rates", 2023, arXiv:2305.07583, algorithm 1.
    eta is an upper bound; `lower` is a lower bound of the loss. `update(state, model, grads, loss=value)`
    gives the loss of the batch. The decay lam is proximal, x / (1 + eta lam), and is taken into account in h;
    `proximal=False` divides only x, as Optax does. For real parameters.
    """

    eta: Setting = setting(1.0)
    rho: Setting = setting(0.9)
    lam: Setting = setting(0.0)
    lower: Setting = setting(0.0)
    proximal: bool = static(True)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam")

    def init(self, x: Array) -> MoMoState:
        return MoMoState(zeros_like(x), 0.0, 0.0, 0)

    def apply(self, state: MoMoState, x: Array, dx: Array) -> Any:
        along = inner(dx, x)
        t, f, c = latest(state.t, state.f, state.c)
        m = where(state.t == 0, dx, ema(self.rho, state.m, dx))
        f = where(t == 0, loss(dx), ema(self.rho, f, loss(dx)))
        c = where(t == 0, along, ema(self.rho, c, along))
        shrink = 1 + self.eta * self.lam
        above = maximum(shrink * (f - self.lower - c) + inner(m, x), 0)
        step = minimum(self.eta, over(above, inner(m, m))) * m
        return MoMoState(m, f, c, t + 1), shrunk(x, step, shrink, self.proximal)


def shrunk(x: Array, step: Any, shrink: Any, proximal: bool) -> Any:
    """The step that also divides x, with the step or alone, by a number above 1."""
    return x - (x - step) / shrink if proximal else x - x / shrink + step


class MoMoAdamState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    v: Any
    """The mean of |dx|^2, decaying with beta[1]."""
    f: Any
    """The mean loss, decaying with beta[0]."""
    c: Any
    """The mean of <dx, x> over all arrays, decaying with beta[0]."""
    weight: tuple[Any, Any]
    """The sums of the weights in m and v so far, 1 - beta^t."""
    known: Any
    """The sum of the weights in f and c so far."""
    t: Any
    """How many steps were taken, with this array or without it."""


class MoMoAdam(Rule):
    """MoMo with Adam's scaling: norms and steps are measured by D = sqrt(v) + epsilon, v without bias.

    Schaipp et al., "MoMo: momentum models for adaptive learning rates", 2023, arXiv:2305.07583, algorithm 2.
    eta is an upper bound, as it is for Adam. Loss, lower bound, decay and `proximal` as in `MoMo`. For real
    parameters.
    """

    eta: Setting = setting(0.01)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    lower: Setting = setting(0.0)
    proximal: bool = static(True)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> MoMoAdamState:
        return MoMoAdamState(zeros_like(x), real_zeros_like(x), 0.0, 0.0, (0.0, 0.0), 0.0, 0)

    def apply(self, state: MoMoAdamState, x: Array, dx: Array) -> Any:
        rho = self.beta[0]
        weight = weights(self.beta, state.weight)
        m, v = ema(rho, state.m, dx), ema(self.beta[1], state.v, abs2(dx))
        t, f, c, known = latest(state.t, state.f, state.c, state.known)
        f, c, known = ema(rho, f, loss(dx)), ema(rho, c, inner(dx, x)), ema(rho, known, 1)
        scaled = m / (sqrt(v * (1 / weight[1])) + self.epsilon)
        shrink = 1 + self.eta * self.lam
        above = maximum(shrink * (f - self.lower * known - c) + inner(m, x), 0)
        step = minimum(self.eta / weight[0], over(above, inner(m, scaled))) * scaled
        return MoMoAdamState(m, v, f, c, weight, known, t + 1), shrunk(x, step, shrink, self.proximal)


class PolyakSPS(Rule):
    """Descent by the step that would bring a linear loss down to its lower bound: dx' = min((f - lower) /
    (|g|^2 + epsilon), most) g, where g = scaling dx and the norm goes over all arrays.

    Loizou et al., "Stochastic Polyak step-size for SGD", 2020, arXiv:2002.10542, eq. 2 and 3, as in Optax.
    `update(state, model, grads, loss=value)` gives the loss f of the batch. `positive=True` takes no step
    below the lower bound.
    """

    most: Setting = setting(1.0)
    scaling: Setting = setting(1.0)
    lower: Setting = setting(0.0)
    epsilon: Setting = setting(0.0)
    positive: bool = static(False)

    def check(self) -> None:
        not_negative(self, "most", "scaling", "epsilon")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        g = self.scaling * dx
        square = total(ops.sum(abs2(g)))
        above = loss(dx) - self.lower
        above = maximum(above, 0) if self.positive else above
        rate = where(square == 0, 0, minimum(over(above, square + self.epsilon), self.most))
        return state, rate * g
