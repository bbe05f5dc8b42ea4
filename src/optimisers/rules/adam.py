"""Adam and its kin: steps scaled by running moments of the gradient."""

from typing import Any, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import abs2, ema, full_like, maximum, real_zeros_like, sqrt, where, zeros_like
from optimisers.rule import (
    Pair,
    Rule,
    Setting,
    in_unit_interval,
    instead_of_variant,
    not_negative,
    setting,
    static,
)


class AdamState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    v: Any
    """The mean of |dx|^2, decaying with beta[1]; real also for complex parameters."""
    weight: tuple[Any, Any]
    """The sum of the weights in m and in v so far, 1 - beta^t; m and v divided by it are unbiased.

    Kept as an average of ones: 1 - beta**t would lose half of its digits at the first step.
    """


def adam_state(x: Array) -> AdamState:
    """The moments before the first step."""
    return AdamState(zeros_like(x), real_zeros_like(x), (0.0, 0.0))


def check_moments(rule: Rule) -> None:
    """Raise BadSetting where the settings that all these rules have are out of range."""
    in_unit_interval(rule, "beta")
    not_negative(rule, "epsilon")


def check_decaying(rule: Rule) -> None:
    """Raise BadSetting where moments, or a decay beside the step, are out of range."""
    check_moments(rule)
    not_negative(rule, "lam")


def weights(beta: tuple[float, float], old: tuple[Any, Any]) -> tuple[Any, Any]:
    """The sums of the weights in two averages after one more step: averages of ones."""
    return ema(beta[0], old[0], 1), ema(beta[1], old[1], 1)


def moments(
    beta: tuple[float, float], state: AdamState, dx: Array, square: Array | None = None
) -> tuple[AdamState, Any, Any]:
    """(new state, m and v without bias): Kingma & Ba, algorithm 1. `square` is what v is the mean of, |dx|^2
    if it is not given.
    """
    m = ema(beta[0], state.m, dx)
    v = ema(beta[1], state.v, abs2(dx) if square is None else square)
    weight = weights(beta, state.weight)
    return AdamState(m, v, weight), m * (1 / weight[0]), v * (1 / weight[1])


class Adam(Rule):
    """Steps of about eta, whatever the scale of the gradient: dx' = eta m / (sqrt(v) + epsilon), m and v
    without bias.

    Kingma & Ba, "Adam: a method for stochastic optimization", 2015, arXiv:1412.6980, algorithm 1. `beta`:
    decay of the mean gradient and of its mean square; `epsilon` stands outside the root, as in
    torch.optim.Adam.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        state, m, v = moments(self.beta, state, dx)
        return state, self.eta * m / (sqrt(v) + self.epsilon)


class AdamW(Rule):
    """Adam with weight decay beside the step: dx' = eta (m / (sqrt(v) + epsilon) + lam x).

    Loshchilov & Hutter, "Decoupled weight decay regularization", 2019, arXiv:1711.05101, algorithm 2. `lam`:
    strength of the decay. `couple=True` multiplies it by eta, as torch.optim.AdamW does; `couple=False` is
    the paper's, where the decay is lam x whatever eta is.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    couple: bool = static(True)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        state, m, v = moments(self.beta, state, dx)
        step = m / (sqrt(v) + self.epsilon)
        return state, self.eta * (step + self.lam * x) if self.couple else self.eta * step + self.lam * x


class RAdamState(NamedTuple):
    adam: AdamState
    t: Any
    """How many steps were taken."""


class RAdam(Rule):
    """Adam whose scaling waits until the variance of the mean square is bounded, and is rectified from then
    on.

    Liu et al., "On the variance of the adaptive learning rate and beyond", 2020, arXiv:1908.03265, algorithm
    2. Where rho_t <= 4 the step is eta m. `TorchRAdam` is the formula of torch.optim.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)

    @classmethod
    def formerly(cls, given: tuple[Any, ...], settings: dict[str, Any]) -> Rule | None:
        return instead_of_variant(cls, TorchRAdam, given, settings)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> RAdamState:
        return RAdamState(adam_state(x), 0)

    def apply(self, state: RAdamState, x: Array, dx: Array) -> Any:
        adam, m, v = moments(self.beta, state.adam, dx)
        t = state.t + 1
        scale = 1 / (sqrt(v) + self.epsilon)
        return RAdamState(adam, t), self.eta * rectified(self.beta, t, adam.weight[1], 4, m, scale)


class TorchRAdam(Rule):
    """RAdam as torch.optim.RAdam has it: it scales from rho_t > 5 on, and adds epsilon to the root of the
    biased mean square.

    Liu et al., "On the variance of the adaptive learning rate and beyond", 2020, arXiv:1908.03265, algorithm
    2, where the scaling begins at rho_t > 4; `RAdam` is the paper's.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> RAdamState:
        return RAdamState(adam_state(x), 0)

    def apply(self, state: RAdamState, x: Array, dx: Array) -> Any:
        adam, m, _ = moments(self.beta, state.adam, dx)
        t, weight = state.t + 1, adam.weight[1]
        scale = sqrt(weight) / (sqrt(adam.v) + self.epsilon)
        return RAdamState(adam, t), self.eta * rectified(self.beta, t, weight, 5, m, scale)


def rectified(beta: tuple[float, float], t: Any, weight: Any, threshold: int, m: Array, scale: Array) -> Any:
    """The step of Liu et al., algorithm 2: m by `scale` and the rectification where rho_t is beyond the
    threshold, m alone before.
    """
    bound = 2 / (1 - beta[1]) - 1
    rho = bound - 2 * t * (1 - weight) / weight
    bounded = rho > threshold
    size = where(bounded, (bound - 4) * (bound - 2) * rho, 1)
    factor = sqrt(maximum((rho - 4) * (rho - 2) * bound / size, 0))
    return where(bounded, factor * m * scale, m)


class AdaMaxState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    u: Any
    """The largest |dx|, decaying with beta[1]."""
    weight: Any
    """The sum of the weights in m, 1 - beta[0]^t."""


class AdaMax(Rule):
    """Adam with the largest gradient in place of the root mean square: u = max(beta u, |dx|); dx' = eta m /
    (u + epsilon).

    Kingma & Ba, "Adam: a method for stochastic optimization", 2015, arXiv:1412.6980, algorithm 2.
    `TorchAdaMax` adds epsilon to |dx| within the maximum, as torch.optim.Adamax does.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> AdaMaxState:
        return AdaMaxState(zeros_like(x), real_zeros_like(x), 0.0)

    def apply(self, state: AdaMaxState, x: Array, dx: Array) -> Any:
        m, u = ema(self.beta[0], state.m, dx), maximum(self.beta[1] * state.u, ops.abs(dx))
        weight = ema(self.beta[0], state.weight, 1)
        return AdaMaxState(m, u, weight), self.eta / weight * m / (u + self.epsilon)


class OAdamState(NamedTuple):
    adam: AdamState
    term: Any
    """The step of Adam the time before."""


class OAdam(Rule):
    """Optimistic Adam, for games: twice the step of Adam minus the one before.

    Daskalakis et al., "Training GANs with optimism", 2018, arXiv:1711.00141, algorithm 1.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.5, 0.9))
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> OAdamState:
        return OAdamState(adam_state(x), zeros_like(x))

    def apply(self, state: OAdamState, x: Array, dx: Array) -> Any:
        adam, m, v = moments(self.beta, state.adam, dx)
        term = self.eta * m / (sqrt(v) + self.epsilon)
        return OAdamState(adam, term), 2 * term - state.term


class AMSGradState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    v: Any
    """The mean of |dx|^2, decaying with beta[1]."""
    most: Any
    """The largest v so far."""
    weight: tuple[Any, Any]
    """The sums of the weights in m and in v, 1 - beta^t."""


class AMSGrad(Rule):
    """Adam whose scaling never falls: dx' = eta m / (sqrt(max over time of v) + epsilon), without bias
    correction.

    Reddi, Kale & Kumar, "On the convergence of Adam and beyond", 2018, arXiv:1904.09237, algorithm 2. m, v
    and the maximum start at epsilon, as in Optimisers.jl. `TorchAMSGrad` corrects the bias.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)

    @classmethod
    def formerly(cls, given: tuple[Any, ...], settings: dict[str, Any]) -> Rule | None:
        return instead_of_variant(cls, TorchAMSGrad, given, settings)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> AMSGradState:
        return amsgrad_state(x, self.epsilon)

    def apply(self, state: AMSGradState, x: Array, dx: Array) -> Any:
        new = largest(self.beta, state, dx)
        return new, self.eta * new.m / (sqrt(new.most) + self.epsilon)


class TorchAMSGrad(Rule):
    """AMSGrad as torch.optim.Adam(amsgrad=True) has it: zeros at the start, m and the maximum corrected for
    their bias.

    Reddi, Kale & Kumar, "On the convergence of Adam and beyond", 2018, arXiv:1904.09237, algorithm 2, which
    corrects nothing; `AMSGrad` is the paper's.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> AMSGradState:
        return amsgrad_state(x, 0.0)

    def apply(self, state: AMSGradState, x: Array, dx: Array) -> Any:
        new = largest(self.beta, state, dx)
        root = sqrt(new.most * (1 / new.weight[1]))
        return new, self.eta / new.weight[0] * new.m / (root + self.epsilon)


def amsgrad_state(x: Array, start: float) -> AMSGradState:
    """Moments and maximum that all start at one number."""
    return AMSGradState(
        full_like(x, start),
        full_like(real_zeros_like(x), start),
        full_like(real_zeros_like(x), start),
        (0.0, 0.0),
    )


def largest(beta: tuple[float, float], state: AMSGradState, dx: Array) -> AMSGradState:
    """The moments and the largest mean square after one more step: Reddi, Kale & Kumar, algorithm 2."""
    m, v = ema(beta[0], state.m, dx), ema(beta[1], state.v, abs2(dx))
    return AMSGradState(m, v, maximum(state.most, v), weights(beta, state.weight))


class NAdamState(NamedTuple):
    adam: AdamState
    t: Any
    """How many steps were taken."""
    product: Any
    """The product of the momenta so far."""


class NAdam(Rule):
    """Adam with Nesterov's look ahead.

    Dozat, "Incorporating Nesterov momentum into Adam", 2016 (OpenReview OM0jvwB8jIp57ZJjtNEZ), algorithm 2,
    with its additional beta[1] on the mean square and a constant momentum. `TorchNAdam` is the formula of
    torch.optim.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)

    @classmethod
    def formerly(cls, given: tuple[Any, ...], settings: dict[str, Any]) -> Rule | None:
        return instead_of_variant(cls, TorchNAdam, given, settings)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> NAdamState:
        return NAdamState(adam_state(x), 0, 1.0)

    def apply(self, state: NAdamState, x: Array, dx: Array) -> Any:
        adam, _, v = moments(self.beta, state.adam, dx)
        beta = self.beta[0]
        ahead, here = beta / ema(beta, adam.weight[0], 1), (1 - beta) / adam.weight[0]
        step = self.eta * (ahead * adam.m + here * dx) / (sqrt(self.beta[1] * v) + self.epsilon)
        return NAdamState(adam, state.t + 1, state.product * beta), step


class TorchNAdam(Rule):
    """NAdam as torch.optim.NAdam has it: a momentum of beta[0] (1 - 0.96^(t psi) / 2).

    Dozat, "Incorporating Nesterov momentum into Adam", 2016 (OpenReview OM0jvwB8jIp57ZJjtNEZ), algorithm 2,
    with its schedule of the momentum, and without its beta[1] on the mean square, which `NAdam` has. `psi` is
    called momentum_decay in torch.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-8)
    psi: Setting = setting(0.004)

    def check(self) -> None:
        check_moments(self)
        not_negative(self, "psi")

    def init(self, x: Array) -> NAdamState:
        return NAdamState(adam_state(x), 0, 1.0)

    def apply(self, state: NAdamState, x: Array, dx: Array) -> Any:
        adam, _, v = moments(self.beta, state.adam, dx)
        t = state.t + 1
        now, after = (self.beta[0] * (1 - 0.5 * 0.96 ** (self.psi * k)) for k in (t, t + 1))
        product = state.product * now
        ahead, here = after / (1 - product * after), (1 - now) / (1 - product)
        step = self.eta * (ahead * adam.m + here * dx) / (sqrt(v) + self.epsilon)
        return NAdamState(adam, t, product), step


class AdaBeliefState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    s: Any
    """The mean of |dx - m|^2 + epsilon, decaying with beta[1]."""
    weight: tuple[Any, Any]
    """The sums of the weights in m and in s, 1 - beta^t."""


class AdaBelief(Rule):
    """Adam scaled by how far the gradient is from what was expected: s = beta s + (1 - beta) |dx - m|^2 +
    epsilon.

    Zhuang et al., "AdaBelief optimizer: adapting stepsizes by the belief in observed gradients", 2020,
    arXiv:2010.07468, algorithm 2: dx' = eta m / (sqrt(s) + epsilon), m and s without bias; epsilon is added
    in s at every step.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    epsilon: Setting = setting(1e-16)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> AdaBeliefState:
        return AdaBeliefState(zeros_like(x), real_zeros_like(x), (0.0, 0.0))

    def apply(self, state: AdaBeliefState, x: Array, dx: Array) -> Any:
        m = ema(self.beta[0], state.m, dx)
        s = ema(self.beta[1], state.s, abs2(dx - m)) + self.epsilon
        weight = weights(self.beta, state.weight)
        step = self.eta / weight[0] * m / (sqrt(s * (1 / weight[1])) + self.epsilon)
        return AdaBeliefState(m, s, weight), step
