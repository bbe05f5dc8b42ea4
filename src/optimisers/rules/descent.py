"""Descent and momentum."""

from typing import Any, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import where, zeros_like
from optimisers.rule import Rule, Setting, in_unit_interval, not_negative, setting, static


class Descent(Rule):
    """Gradient descent: dx' = eta dx.

    `eta`: learning rate. No state.
    """

    lazy = True

    eta: Setting = setting(0.1)

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, self.eta * dx


class MomentumState(NamedTuple):
    v: Any
    """The velocity, in units of a step."""


class Momentum(Rule):
    """Gradient descent with heavy-ball momentum: v = rho v + eta dx; dx' = v.

    Polyak, "Some methods of speeding up the convergence of iteration methods", 1964. `eta`: learning rate;
    `rho`: decay of the velocity. The rate stands inside v: after eta has changed, v still holds steps of the
    old size. `SGD` keeps it outside, as torch.optim does: the same path while eta stays constant, another one
    under a schedule.
    """

    eta: Setting = setting(0.01)
    rho: Setting = setting(0.9)

    def check(self) -> None:
        in_unit_interval(self, "rho")

    def init(self, x: Array) -> MomentumState:
        return MomentumState(zeros_like(x))

    def apply(self, state: MomentumState, x: Array, dx: Array) -> Any:
        v = self.rho * state.v + self.eta * dx
        return MomentumState(v), v


class Nesterov(Rule):
    """Momentum that looks ahead: v' = rho v - eta dx; dx' = -rho^2 v + (1 + rho) eta dx, with the old v.

    Nesterov, "A method of solving a convex programming problem with convergence rate O(1/k^2)", 1983, in the
    form of Bengio et al., arXiv:1212.0901, eq. 7. The velocity points where x goes, so its sign is that of
    -dx. The rate stands inside v: after eta has changed, v still holds steps of the old size.
    `SGD(nesterov=True)` keeps it outside, as torch.optim does: the same path while eta stays constant,
    another one under a schedule.
    """

    eta: Setting = setting(0.001)
    rho: Setting = setting(0.9)

    def check(self) -> None:
        in_unit_interval(self, "rho")

    def init(self, x: Array) -> MomentumState:
        return MomentumState(zeros_like(x))

    def apply(self, state: MomentumState, x: Array, dx: Array) -> Any:
        v = state.v
        step = (1 + self.rho) * self.eta * dx - self.rho**2 * v
        return MomentumState(self.rho * v - self.eta * dx), step


class SGDState(NamedTuple):
    v: Any
    """The velocity, in units of the gradient."""
    started: Any
    """Whether v holds a gradient: 0 before the first one, then 1."""


class SGD(Rule):
    """Descent with momentum as torch.optim.SGD has it: v = rho v + (1 - dampening) dx, at the first step v =
    dx; dx' = eta v.

    The rate stands outside the velocity, so a new eta counts for the whole step at once: Sutskever et al.,
    "On the importance of initialization and momentum in deep learning", 2013, compare both. With
    `nesterov=True` the step is eta (dx + rho v), without dampening. Where rho is 0 the step is eta dx, and v
    is left alone; `Descent` does that without a velocity.
    """

    eta: Setting = setting(0.001)
    rho: Setting = setting(0.0)
    dampening: Setting = setting(0.0)
    nesterov: bool = static(False)

    def check(self) -> None:
        not_negative(self, "rho")
        if self.nesterov and (self.rho == 0 or self.dampening != 0):
            raise BadSetting(
                f"SGD has nesterov=True with rho={self.rho!r} and dampening={self.dampening!r}; it takes a "
                "rho above 0 and no dampening: write SGD(eta, 0.9, nesterov=True)"
            )

    def init(self, x: Array) -> SGDState:
        return SGDState(zeros_like(x), 0)

    def apply(self, state: SGDState, x: Array, dx: Array) -> Any:
        still = self.rho == 0
        share = where(state.started == 0, 1, 1 - self.dampening)
        v = where(still, 1, self.rho) * state.v + where(still, 0, share) * dx
        step = dx + self.rho * v if self.nesterov else where(still, dx, v)
        return SGDState(v, where(still, state.started, 1)), self.eta * step
