"""Formulas of torch.optim that are written nowhere else."""

from typing import Any, ClassVar, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import abs2, copy, ema, maximum, real_zeros_like, sqrt, updated, where, zeros_like
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, not_negative, setting, static
from optimisers.rules.adam import AdaMaxState, AdamState, adam_state, check_moments, moments


class TorchRMSPropState(NamedTuple):
    q: Any
    """The mean of |dx|^2, decaying with rho."""
    v: Any
    """The velocity, in units of a scaled gradient."""


class TorchCentredState(NamedTuple):
    q: Any
    """The mean of |dx|^2, decaying with rho."""
    v: Any
    """The velocity, in units of a scaled gradient."""
    mean: Any
    """The mean of dx, decaying with rho."""


class TorchRMSProp(Rule):
    """RMSProp with momentum as torch.optim.RMSprop has it: v = mu v + dx / (sqrt(q) + epsilon); dx' = eta v.

    Graves, "Generating sequences with recurrent neural networks", 2013, arXiv:1308.0850, eq. 38-45, whose
    epsilon stands within the root. `rho` is called alpha in torch, `mu` momentum; `centred` subtracts the
    square of the mean gradient from q. Rounding may not carry that variance below 0, as in torch it may.
    `RMSProp` is the same without momentum.
    """

    eta: Setting = setting(0.01)
    rho: Setting = setting(0.99)
    mu: Setting = setting(0.9)
    epsilon: Setting = setting(1e-8)
    centred: bool = static(False)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "mu", "epsilon")

    def init(self, x: Array) -> TorchCentredState | TorchRMSPropState:
        plain = TorchRMSPropState(real_zeros_like(x), zeros_like(x))
        return TorchCentredState(*plain, zeros_like(x)) if self.centred else plain

    def apply(self, state: TorchCentredState | TorchRMSPropState, x: Array, dx: Array) -> Any:
        q = ema(self.rho, state.q, abs2(dx))
        if isinstance(state, TorchRMSPropState):
            v = self.mu * state.v + dx / (sqrt(q) + self.epsilon)
            return TorchRMSPropState(q, v), self.eta * v
        mean = ema(self.rho, state.mean, dx)
        v = self.mu * state.v + dx / (sqrt(maximum(q - abs2(mean), 0)) + self.epsilon)
        return TorchCentredState(q, v, mean), self.eta * v


class TorchAdaMax(Rule):
    """AdaMax as torch.optim.Adamax has it: u = max(beta u, |dx| + epsilon); dx' = eta m / u, m without bias.

    Kingma & Ba, "Adam: a method for stochastic optimization", 2015, arXiv:1412.6980, algorithm 2, which has
    no epsilon; `AdaMax` adds it to u.
    """

    eta: Setting = setting(0.002)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> AdaMaxState:
        return AdaMaxState(zeros_like(x), real_zeros_like(x), 0.0)

    def apply(self, state: AdaMaxState, x: Array, dx: Array) -> Any:
        m, u = ema(self.beta[0], state.m, dx), maximum(self.beta[1] * state.u, ops.abs(dx) + self.epsilon)
        weight = ema(self.beta[0], state.weight, 1)
        return AdaMaxState(m, u, weight), self.eta / weight * m / u


class SparseAdam(Rule):
    """Adam for sparse gradients, as torch.optim.SparseAdam has it: rows that a gradient does not hold take no
    step, and their moments stay.

    Kingma & Ba, "Adam: a method for stochastic optimization", 2015, arXiv:1412.6980, algorithm 1, with the
    biases of all rows corrected by the steps that the array has taken, and epsilon added to the root of the
    biased mean square. A dense gradient steps every row.
    """

    lazy = True

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        new, _, _ = moments(self.beta, state, dx)
        rate = self.eta * sqrt(new.weight[1]) / new.weight[0]
        return new, rate * new.m / (sqrt(new.v) + self.epsilon)


class ASGDState(NamedTuple):
    average: Any
    """The mean of the parameters since step t0."""
    t: Any
    """How many steps were taken."""
    rate: Any
    """The rate of the next step, made after the last one."""
    share: Any
    """How much of the mean the next place is, made with it; -1 before the first step."""


class ASGD(Rule):
    """Descent whose rate falls by itself, with decay, and the mean of where it led: dx' = r (dx + lambd x),
    r = eta / (1 + lambd eta t)^alpha.

    Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", 1992, as torch.optim.ASGD: the
    rate of a step is made after the step before, so a new eta counts one step late. The mean begins after
    step `t0`; `averaged(state, model)` is the model with it. In a chain it stands last.
    """

    last: ClassVar[bool] = True

    eta: Setting = setting(0.01)
    lambd: Setting = setting(1e-4)
    alpha: Setting = setting(0.75)
    t0: Setting = setting(1e6)

    def init(self, x: Array) -> ASGDState:
        return ASGDState(copy(x), 0, 0.0, -1.0)

    def apply(self, state: ASGDState, x: Array, dx: Array) -> Any:
        first = state.share < 0
        rate, share = where(first, self.eta, state.rate), where(first, 1, state.share)
        step = rate * (dx + self.lambd * x)
        average = ema(1 - share, state.average, updated(x, step))
        t = state.t + 1
        rate = self.eta / (1 + self.lambd * self.eta * t) ** self.alpha
        return ASGDState(average, t, rate, 1 / maximum(t - self.t0, 1)), step

    def evaluate(self, state: ASGDState, x: Array) -> Any:
        return state.average
