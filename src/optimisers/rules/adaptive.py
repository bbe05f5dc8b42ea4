"""Steps scaled element by element by what the gradient was before."""

from typing import Any, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import (
    abs2,
    clip,
    ema,
    full_like,
    maximum,
    real_zeros_like,
    sign,
    sqrt,
    where,
    zeros_like,
)
from optimisers.ops.derived import by_parts, is_complex
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
from optimisers.settings import is_number


class RMSPropState(NamedTuple):
    q: Any
    """The mean of |dx|^2, decaying with rho."""


class CentredState(NamedTuple):
    q: Any
    """The mean of |dx|^2, decaying with rho."""
    mean: Any
    """The mean of dx, decaying with rho."""


class RMSProp(Rule):
    """Steps scaled by a running root mean square: q = rho q + (1 - rho) |dx|^2; dx' = eta dx / (sqrt(q) +
    epsilon).

    Hinton, "Neural networks for machine learning", lecture 6e, 2012. `centred` subtracts the square of the
    mean gradient from q (Graves, arXiv:1308.0850, eq. 38-43); rounding may not carry that variance below 0.
    As torch.optim.RMSprop with alpha = rho, whose own defaults are lr 0.01 and alpha 0.99; `TorchRMSProp` has
    its momentum too.
    """

    eta: Setting = setting(0.001)
    rho: Setting = setting(0.9)
    epsilon: Setting = setting(1e-8)
    centred: bool = static(False)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "epsilon")

    def init(self, x: Array) -> CentredState | RMSPropState:
        return (
            CentredState(real_zeros_like(x), zeros_like(x))
            if self.centred
            else RMSPropState(real_zeros_like(x))
        )

    def apply(self, state: CentredState | RMSPropState, x: Array, dx: Array) -> Any:
        q = ema(self.rho, state.q, abs2(dx))
        if isinstance(state, RMSPropState):
            return RMSPropState(q), self.eta * dx / (sqrt(q) + self.epsilon)
        mean = ema(self.rho, state.mean, dx)
        variance = maximum(q - abs2(mean), 0)
        return CentredState(q, mean), self.eta * dx / (sqrt(variance) + self.epsilon)


class RpropState(NamedTuple):
    g: Any
    """The gradient before, 0 where its sign had just changed."""
    eta: Any
    """The step size of each element."""


class Rprop(Rule):
    """Steps by the sign of the gradient, each element at a size of its own, which grows while the sign stays.

    Riedmiller & Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm",
    1993, without weight back-tracking, as torch.optim.Rprop. `eta`: the size at the start, read by `setup`
    alone; `ell`: its factors after a change of sign and without; `gamma`: its least and largest value. The
    real and the imaginary parts of complex elements are stepped each for itself. For full batches.
    """

    eta: float = static(1e-3)
    ell: Pair = setting((0.5, 1.2))
    gamma: Pair = setting((1e-6, 50.0))

    def check(self) -> None:
        if callable(self.eta):
            raise BadSetting(
                "Rprop.eta is a schedule; it is the step size at the start alone: write a number"
            )
        if not is_number(self.eta):
            raise BadSetting(f"Rprop.eta is {self.eta!r}; it takes a number")
        for name, (low, high) in (("ell", self.ell), ("gamma", self.gamma)):
            known = isinstance(low, float) and isinstance(high, float)
            middle = 1.0 if name == "ell" else low
            if known and not 0 < low <= middle <= high:
                wanted = "0 < shrink <= 1 <= grow" if name == "ell" else "0 < least <= most"
                raise BadSetting(f"Rprop.{name} is {(low, high)!r}; it takes {wanted}")

    def init(self, x: Array) -> RpropState:
        start = complex(self.eta, self.eta) if is_complex(x) else self.eta
        return RpropState(zeros_like(x), full_like(x, start))

    def apply(self, state: RpropState, x: Array, dx: Array) -> Any:
        g, size, step = by_parts(self._sized, state.g, state.eta, dx)
        return RpropState(g, size), step

    def _sized(self, before: Array, eta: Array, dx: Array) -> tuple[Any, Any, Any]:
        """(gradient to keep, size, step) of real elements."""
        (shrink, grow), (least, most) = self.ell, self.gamma
        agreement = before * dx
        factor = where(agreement > 0, grow, where(agreement < 0, shrink, 1))
        size = clip(eta * factor, least, most)
        g = where(agreement < 0, 0, dx)
        return g, size, size * sign(g)


class AdaGradState(NamedTuple):
    sum: Any
    """The sum of |dx|^2 since the start."""


class AdaGrad(Rule):
    """Steps that shrink with all gradients seen: a = a + |dx|^2; dx' = eta dx / (sqrt(a) + epsilon).

    Duchi, Hazan & Singer, "Adaptive subgradient methods for online learning and stochastic optimization",
    2011. a starts at epsilon, as in Optimisers.jl; that of `TorchAdaGrad` at 0.
    """

    lazy = True

    eta: Setting = setting(0.1)
    epsilon: Setting = setting(1e-8)

    @classmethod
    def formerly(cls, given: tuple[Any, ...], settings: dict[str, Any]) -> Rule | None:
        return instead_of_variant(cls, TorchAdaGrad, given, settings)

    def check(self) -> None:
        not_negative(self, "epsilon")

    def init(self, x: Array) -> AdaGradState:
        return AdaGradState(full_like(real_zeros_like(x), self.epsilon))

    def apply(self, state: AdaGradState, x: Array, dx: Array) -> Any:
        a, step = summed(self.eta, self.epsilon, state.sum, dx)
        return AdaGradState(a), step


class TorchAdaGradState(NamedTuple):
    sum: Any
    """The sum of |dx|^2 since the start."""
    t: Any
    """How many steps were taken."""


class TorchAdaGrad(Rule):
    """AdaGrad as torch.optim.Adagrad has it: the sum of squares starts at `start`, by default 0, and not at
    epsilon; the rate of step t is eta / (1 + (t - 1) decay).

    Duchi, Hazan & Singer, "Adaptive subgradient methods for online learning and stochastic optimization",
    2011. `decay` is called lr_decay there; `start`, initial_accumulator_value, is read by `setup` alone.
    """

    lazy = True

    eta: Setting = setting(0.1)
    epsilon: Setting = setting(1e-8)
    decay: Setting = setting(0.0)
    start: float = static(0.0)

    def check(self) -> None:
        not_negative(self, "epsilon", "decay", "start")

    def init(self, x: Array) -> TorchAdaGradState:
        return TorchAdaGradState(full_like(real_zeros_like(x), self.start), 0)

    def apply(self, state: TorchAdaGradState, x: Array, dx: Array) -> Any:
        a, step = summed(self.eta / (1 + state.t * self.decay), self.epsilon, state.sum, dx)
        return TorchAdaGradState(a, state.t + 1), step


def summed(eta: float, epsilon: float, before: Array, dx: Array) -> Any:
    """(sum, step) of AdaGrad, wherever its sum began."""
    a = before + abs2(dx)
    return a, eta * dx / (sqrt(a) + epsilon)


class AdaDeltaState(NamedTuple):
    a: Any
    """The mean of |dx|^2."""
    d: Any
    """The mean of |u|^2, of the steps before eta."""


class AdaDelta(Rule):
    """Steps in the unit of x: u = dx sqrt(d + epsilon) / sqrt(a + epsilon); dx' = eta u.

    a = rho a + (1 - rho) |dx|^2, and d likewise of |u|^2, with the old d in the step. Zeiler, "ADADELTA: an
    adaptive learning rate method", 2012, arXiv:1212.5701, algorithm 1, where eta is 1. A small `epsilon`
    makes the start very slow: torch.optim.Adadelta has the same formula with 1e-6.
    """

    rho: Setting = setting(0.9)
    epsilon: Setting = setting(1e-8)
    eta: Setting = setting(1.0)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "epsilon")

    def init(self, x: Array) -> AdaDeltaState:
        return AdaDeltaState(real_zeros_like(x), real_zeros_like(x))

    def apply(self, state: AdaDeltaState, x: Array, dx: Array) -> Any:
        a = ema(self.rho, state.a, abs2(dx))
        unit = dx * sqrt(state.d + self.epsilon) / sqrt(a + self.epsilon)
        return AdaDeltaState(a, ema(self.rho, state.d, abs2(unit))), self.eta * unit
