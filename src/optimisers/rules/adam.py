"""Adam and its kin: steps scaled by running moments of the gradient."""

from typing import Any, NamedTuple

from optimisers.ops import abs2, ema, real_zeros_like, sqrt, zeros_like
from optimisers.rule import Rule, in_unit_interval, not_negative, static


class AdamState(NamedTuple):
    m: Any
    """The mean gradient, decaying with beta[0]."""
    v: Any
    """The mean of |dx|^2, decaying with beta[1]; real also for complex parameters."""
    weight: tuple[Any, Any]
    """The sum of the weights in m and in v so far, 1 - beta^t; m and v divided by it are unbiased.

    Kept as an average of ones: 1 - beta**t would lose half of its digits at the first step.
    """


def moments(beta: Any, state: AdamState, dx: Any) -> tuple[AdamState, Any, Any]:
    """(new state, m and v without bias): Kingma & Ba, algorithm 1."""
    m, v = ema(beta[0], state.m, dx), ema(beta[1], state.v, abs2(dx))
    weight = (ema(beta[0], state.weight[0], 1), ema(beta[1], state.weight[1], 1))
    return AdamState(m, v, weight), m / weight[0], v / weight[1]


class Adam(Rule):
    """Steps of about eta, whatever the scale of the gradient: dx' = eta m / (sqrt(v) + epsilon), m and v
    without bias.

    Kingma & Ba, "Adam: a method for stochastic optimization", 2015, arXiv:1412.6980, algorithm 1. `beta`:
    decay of the mean gradient and of its mean square; `epsilon` stands outside the root, as in
    torch.optim.Adam.
    """

    eta: float = 0.001
    beta: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def check(self) -> None:
        in_unit_interval(self, "beta")
        not_negative(self, "epsilon")

    def init(self, x: Any) -> Any:
        return AdamState(zeros_like(x), real_zeros_like(x), (0.0, 0.0))

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        state, m, v = moments(self.beta, state, dx)
        return state, self.eta * m / (sqrt(v) + self.epsilon)


class AdamW(Rule):
    """Adam with weight decay beside the step: dx' = eta (m / (sqrt(v) + epsilon) + lam x).

    Loshchilov & Hutter, "Decoupled weight decay regularization", 2019, arXiv:1711.05101, algorithm 2. `lam`:
    strength of the decay. `couple=True` multiplies it by eta, as torch.optim.AdamW does; `couple=False` is
    the paper's, where the decay is lam x whatever eta is.
    """

    eta: float = 0.001
    beta: tuple[float, float] = (0.9, 0.999)
    lam: float = 0.0
    epsilon: float = 1e-8
    couple: bool = static(True)  # noqa: FBT003 the value of a field

    def check(self) -> None:
        in_unit_interval(self, "beta")
        not_negative(self, "epsilon", "lam")

    def init(self, x: Any) -> Any:
        return AdamState(zeros_like(x), real_zeros_like(x), (0.0, 0.0))

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        state, m, v = moments(self.beta, state, dx)
        step = m / (sqrt(v) + self.epsilon)
        return state, self.eta * (step + self.lam * x) if self.couple else self.eta * step + self.lam * x
