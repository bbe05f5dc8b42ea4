"""Descent and momentum."""

from typing import Any, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.ops import zeros_like
from optimisers.rule import Rule, in_unit_interval


class Descent(Rule):
    """Gradient descent: dx' = eta dx.

    `eta`: learning rate. No state.
    """

    lazy = True

    eta: float = 0.1

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, self.eta * dx


class MomentumState(NamedTuple):
    v: Any
    """The velocity, in units of a step."""


class Momentum(Rule):
    """Gradient descent with heavy-ball momentum: v = rho v + eta dx; dx' = v.

    Polyak, "Some methods of speeding up the convergence of iteration methods", 1964. `eta`: learning rate;
    `rho`: decay of the velocity. `torch.optim.SGD` keeps eta outside v: the same path while eta stays
    constant.
    """

    eta: float = 0.01
    rho: float = 0.9

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
    -dx.
    """

    eta: float = 0.001
    rho: float = 0.9

    def check(self) -> None:
        in_unit_interval(self, "rho")

    def init(self, x: Array) -> MomentumState:
        return MomentumState(zeros_like(x))

    def apply(self, state: MomentumState, x: Array, dx: Array) -> Any:
        v = state.v
        step = (1 + self.rho) * self.eta * dx - self.rho**2 * v
        return MomentumState(self.rho * v - self.eta * dx), step
