"""Adam's frame with other momenta: looking ahead, differences of gradients, a slow mean beside it."""

from typing import Any, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.ops import (
    abs2,
    copy,
    ema,
    exp,
    log,
    maximum,
    minimum,
    real_zeros_like,
    sqrt,
    where,
    zeros_like,
)
from optimisers.rule import Pair, Rule, Setting, in_unit_interval, setting, static
from optimisers.rules.adam import AdamState, adam_state, check_decaying, check_moments, moments


class NAdamW(Rule):
    """AdamW that looks ahead by Nesterov's momentum: dx' = eta (w / (sqrt(v) + epsilon) + lam x), where w =
    beta[0] m / (1 - beta[0]^(t + 1)) + (1 - beta[0]) dx / (1 - beta[0]^t), and v is without bias.

    Dozat, "Incorporating Nesterov momentum into Adam", 2016, with the decay of Loshchilov & Hutter,
    arXiv:1711.05101, as optax.adamw(nesterov=True). `NAdam` without decay has a factor beta[1] at v, as in
    Optimisers.jl.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.01)
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        state, _, v = moments(self.beta, state, dx)
        rho, weight = self.beta[0], state.weight[0]
        ahead = rho / ema(rho, weight, 1) * state.m + (1 - rho) / weight * dx
        return state, self.eta * (ahead / (sqrt(v) + self.epsilon) + self.lam * x)


class AdanState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    difference: Any
    """The mean difference of two gradients, decaying with beta[1]."""
    n: Any
    """The mean of |dx + beta[1] (dx - before)|^2, decaying with beta[2]."""
    before: Any
    """The gradient before."""
    weight: tuple[Any, Any, Any]
    """The sums of the weights in m, in the difference and in n so far, 1 - beta^t."""


class Adan(Rule):
    """Adam with a momentum of the difference of gradients: u = (m + beta[1] d) / (sqrt(n) + epsilon), all
    without bias; x becomes (x - eta u) / (1 + eta lam).

    Xie et al., "Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models", 2022,
    arXiv:2208.06677, algorithm 1. `beta` are the parts that are kept; the paper's are 1 - beta. The
    difference is 0 at the first step. `proximal=False` takes the decay beside the step, eta (u + lam x).
    """

    eta: Setting = setting(0.001)
    beta: tuple[float, float, float] = (0.98, 0.92, 0.99)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    proximal: bool = static(True)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> AdanState:
        return AdanState(zeros_like(x), zeros_like(x), real_zeros_like(x), zeros_like(x), (0.0, 0.0, 0.0))

    def apply(self, state: AdanState, x: Array, dx: Array) -> Any:
        weight = tuple(ema(b, w, 1) for b, w in zip(self.beta, state.weight, strict=True))
        y = where(state.weight[0] == 0, 0, dx - state.before)
        m, d = ema(self.beta[0], state.m, dx), ema(self.beta[1], state.difference, y)
        n = ema(self.beta[2], state.n, abs2(dx + self.beta[1] * y))
        ahead = m * (1 / weight[0]) + self.beta[1] / weight[1] * d
        step = self.eta * (ahead / (sqrt(n * (1 / weight[2])) + self.epsilon) + self.lam * x)
        scale = 1 / (1 + self.eta * self.lam) if self.proximal else 1
        return AdanState(m, d, n, copy(dx), weight), scale * step


class ADOPTState(NamedTuple):
    m: Any
    """The mean of the scaled gradients, decaying with beta[0]."""
    v: Any
    """The mean of |dx|^2, decaying with beta[1], without the gradient of this step."""
    t: Any
    """How many gradients came."""


class ADOPT(Rule):
    """Scales each gradient by the mean square of those before it: u = dx / max(sqrt(v), epsilon); m = beta[0]
    m + (1 - beta[0]) u; dx' = eta (m + lam x); then v takes |dx|^2 in.

    Taniguchi et al., "ADOPT: modified Adam can converge with any beta2 with the optimal rate", 2024,
    arXiv:2411.02853, algorithm 2. The first gradient only makes v = |dx|^2: no step. u is limited to +-(t -
    1)^clip where t gradients came; `clip=None` leaves that out, which complex parameters need.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.9999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-6)
    clip: float | None = static(0.25)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> ADOPTState:
        return ADOPTState(zeros_like(x), real_zeros_like(x), 0)

    def apply(self, state: ADOPTState, x: Array, dx: Array) -> Any:
        first = state.t == 0
        u = dx / maximum(sqrt(state.v), self.epsilon)
        if self.clip is not None:
            most = state.t**self.clip
            u = minimum(maximum(u, -most), most)
        m = where(first, 0, ema(self.beta[0], state.m, u))
        v = where(first, abs2(dx), ema(self.beta[1], state.v, abs2(dx)))
        return ADOPTState(m, v, state.t + 1), where(first, 0, self.eta * (m + self.lam * x))


class AdEMAMixState(NamedTuple):
    adam: AdamState
    slow: Any
    """The slow mean gradient, decaying with beta[2]; never corrected."""
    t: Any
    """How many steps were taken."""


class AdEMAMix(Rule):
    """AdamW with a second, slow mean of the gradient: dx' = eta ((m + alpha slow) / (sqrt(v) + epsilon) + lam
    x), m and v without bias.

    Pagliardini, Ablin & Grangier, "The AdEMAMix optimizer: better, faster, older", 2024, arXiv:2409.03137,
    algorithm 1. Over the first `warmup` steps alpha grows linearly from 0, and beta[2] from beta[0] so that
    its half-life grows linearly; 0 means no warm-up. Take the length of the run.
    """

    eta: Setting = setting(0.001)
    beta: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    alpha: Setting = setting(5.0)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    warmup: int = 0

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> AdEMAMixState:
        return AdEMAMixState(adam_state(x), zeros_like(x), 0)

    def apply(self, state: AdEMAMixState, x: Array, dx: Array) -> Any:
        adam, m, v = moments(self.beta[:2], state.adam, dx)
        t = state.t + 1
        done = where(self.warmup > t, t / maximum(self.warmup, 1), 1)
        fast, slowest = log(self.beta[0]), log(self.beta[2])
        warm = exp(fast * slowest / ((1 - done) * slowest + done * fast))
        slow = ema(where(done < 1, minimum(warm, self.beta[2]), self.beta[2]), state.slow, dx)
        step = (m + done * self.alpha * slow) / (sqrt(v) + self.epsilon)
        return AdEMAMixState(adam, slow, t), self.eta * (step + self.lam * x)


class SimplifiedAdEMAMix(Rule):
    """Adam with a sum of gradients in place of the mean, and a part of the gradient itself: m = beta[0] m +
    dx; dx' = eta ((m + alpha dx) / (sqrt(v) + epsilon) + lam x), v without bias.

    Morwani et al., "Connections between schedule-free optimizers, AdEMAMix, and accelerated SGD variants",
    2025, arXiv:2502.02431. The sum is some 1 / (1 - beta[0]) times a mean: take a rate smaller by as much.
    """

    eta: Setting = setting(1e-4)
    beta: Pair = setting((0.99, 0.95))
    alpha: Setting = setting(0.0)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        new, _, v = moments(self.beta, state, dx)
        m = self.beta[0] * state.m + dx
        step = (m + self.alpha * dx) / (sqrt(v) + self.epsilon)
        return new._replace(m=m), self.eta * (step + self.lam * x)


class LaProp(Rule):
    """Adam the other way round: the gradient is scaled first, then averaged. m = beta[0] m + (1 - beta[0]) dx
    / (sqrt(v) + epsilon); dx' = eta (m + lam x), m and v without bias.

    Ziyin, Wang & Ueda, "LaProp: separating momentum and adaptivity in Adam", 2020, arXiv:2002.04839,
    algorithm 1, with the rate outside the mean.
    """

    eta: Setting = setting(4e-4)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-15)

    def check(self) -> None:
        check_decaying(self)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        new, _, v = moments(self.beta, state, dx)
        root = sqrt(v) + self.epsilon
        m = ema(self.beta[0], state.m, where(root == 0, 0, dx / root))
        return new._replace(m=m), self.eta * (m * (1 / new.weight[0]) + self.lam * x)


class QHMState(NamedTuple):
    m: Any
    """The mean gradient, decaying with rho."""


class QHM(Rule):
    """Descent along a mixture of the gradient and its mean: dx' = eta (nu m + (1 - nu) dx).

    Ma & Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", 2018, arXiv:1810.06801, eq. 3 and 4.
    """

    eta: Setting = setting(0.001)
    rho: Setting = setting(0.999)
    nu: Setting = setting(0.7)

    def check(self) -> None:
        in_unit_interval(self, "rho")

    def init(self, x: Array) -> QHMState:
        return QHMState(zeros_like(x))

    def apply(self, state: QHMState, x: Array, dx: Array) -> Any:
        m = ema(self.rho, state.m, dx)
        return QHMState(m), self.eta * (self.nu * m + (1 - self.nu) * dx)


class QHAdam(Rule):
    """Adam along mixtures: dx' = eta (nu[0] m + (1 - nu[0]) dx) / (sqrt(nu[1] v + (1 - nu[1]) |dx|^2) +
    epsilon), m and v without bias.

    Ma & Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", 2018, arXiv:1810.06801, eq. 20 and
    21.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    nu: Pair = setting((0.7, 1.0))
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        check_moments(self)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        state, m, v = moments(self.beta, state, dx)
        toward = self.nu[0] * m + (1 - self.nu[0]) * dx
        size = self.nu[1] * v + (1 - self.nu[1]) * abs2(dx)
        return state, self.eta * toward / (sqrt(size) + self.epsilon)
