"""Steps scaled by estimates of the diagonal of the second derivative."""

from typing import Any, ClassVar, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import abs2, clip, ema, maximum, minimum, sign, where, zeros_like
from optimisers.rule import Pair, Rule, Setting, not_negative, setting, static
from optimisers.rules.adam import AdamState, adam_state, check_decaying


class SophiaState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    h: Any
    """The mean of the estimates of the diagonal, decaying with beta[1] at each of them."""
    weight: Any
    """The sum of the weights in m, 1 - beta[0]^t."""


class Sophia(Rule):
    """Steps by the mean gradient over the diagonal of the Hessian, each element by eta at most: dx' = eta
    (clip(m / max(rho h, epsilon), -1, 1) + lam x).

    Liu et al., "Sophia: a scalable stochastic second-order optimizer for language model pre-training", 2023,
    arXiv:2305.14342, algorithm 3. Every ten steps or so the estimates come as second gradients,
    `update(state, model, grads, hessians)`; with None in their place h stays. Where h is negative the step is
    that of the sign. `debias=True` corrects m as Adam does, and `late=True` lets an estimate count from the
    step after on: with both it is optax.contrib.sophia. For real parameters.
    """

    second_order: ClassVar[bool] = True

    eta: Setting = setting(1e-4)
    beta: Pair = setting((0.965, 0.99))
    rho: Setting = setting(0.04)
    lam: Setting = setting(0.1)
    epsilon: Setting = setting(1e-12)
    debias: bool = static(False)
    late: bool = static(False)

    def check(self) -> None:
        check_decaying(self)
        not_negative(self, "rho")

    def init(self, x: Array) -> SophiaState:
        return SophiaState(zeros_like(x), zeros_like(x), 0.0)

    def apply(self, state: SophiaState, x: Array, dx: Array, hessian: Array | None = None) -> Any:
        m, weight = ema(self.beta[0], state.m, dx), ema(self.beta[0], state.weight, 1)
        h = state.h if hessian is None else ema(self.beta[1], state.h, hessian)
        toward = m * (1 / weight) if self.debias else m
        size = maximum(self.rho * (state.h if self.late else h), self.epsilon)
        return SophiaState(m, h, weight), self.eta * (clip(toward / size, -1, 1) + self.lam * x)


class SophiaG(Rule):
    """Sophia with the Gauss-Newton-Bartlett estimate, as its authors wrote it: dx' = eta (min(|m| / (rho
    batch h + epsilon), 1) sign(m) + lam x).

    Liu et al., "Sophia: a scalable stochastic second-order optimizer for language model pre-training", 2023,
    arXiv:2305.14342, algorithm 2 and the authors' code. The estimates, squares of the mean gradient with
    labels that are drawn from the model, come as second gradients, every ten steps or so; `batch` is the
    number of samples, or tokens, behind each. The squares of the training gradients are none. For real
    parameters.
    """

    second_order: ClassVar[bool] = True

    eta: Setting = setting(1e-4)
    beta: Pair = setting((0.965, 0.99))
    rho: Setting = setting(0.04)
    lam: Setting = setting(0.1)
    batch: Setting = setting(1.0)
    epsilon: Setting = setting(1e-15)

    def check(self) -> None:
        check_decaying(self)
        not_negative(self, "rho", "batch")

    def init(self, x: Array) -> SophiaState:
        return SophiaState(zeros_like(x), zeros_like(x), 0.0)

    def apply(self, state: SophiaState, x: Array, dx: Array, hessian: Array | None = None) -> Any:
        m, weight = ema(self.beta[0], state.m, dx), ema(self.beta[0], state.weight, 1)
        h = state.h if hessian is None else ema(self.beta[1], state.h, hessian)
        ratio = minimum(ops.abs(m) / (self.rho * self.batch * h + self.epsilon), 1)
        return SophiaState(m, h, weight), self.eta * (sign(m) * ratio + self.lam * x)


class AdaHessian(Rule):
    """Adam whose mean square is that of estimates of the diagonal of the Hessian: dx' = eta (m / (v^(power /
    2) + epsilon) + lam x), m and v without bias.

    Yao et al., "AdaHessian: an adaptive second order optimizer for machine learning", 2021, arXiv:2006.00719,
    algorithm 1, without the mean over each kernel. The estimates come as second gradients, `update(state,
    model, grads, hessians)`; at a step with None in their place v stays, and before the first of them x does:
    there is no size yet to divide by.
    """

    second_order: ClassVar[bool] = True

    eta: Setting = setting(0.1)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    power: float = static(1.0)

    def check(self) -> None:
        check_decaying(self)
        if not isinstance(self.power, int | float):
            raise BadSetting(
                f"AdaHessian.power is {self.power!r}; it takes one number, the same at every step"
            )

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array, hessian: Array | None = None) -> Any:
        m, weight = ema(self.beta[0], state.m, dx), ema(self.beta[0], state.weight[0], 1)
        if hessian is None:
            v, known = state.v, state.weight[1]
            waits = where(known > 0, 0, 1)
            eta, total, epsilon = self.eta * (1 - waits), known + waits, self.epsilon + waits
        else:
            v, known = ema(self.beta[1], state.v, abs2(hessian)), ema(self.beta[1], state.weight[1], 1)
            eta, total, epsilon = self.eta, known, self.epsilon
        step = m * (1 / weight) / ((v * (1 / total)) ** (self.power / 2) + epsilon)
        return AdamState(m, v, (weight, known)), eta * (step + self.lam * x)
