"""Rules that change the gradient on its way to another rule: decay, clipping, its sign."""

from typing import Any

from optimisers.arrays.protocol import Array, Operand
from optimisers.errors import BadSetting
from optimisers.ops import check, clip, isfinite, minimum, norm, sign, total, where
from optimisers.ops.derived import by_parts, nonzero, scaled_to
from optimisers.rule import Rule, Setting, not_negative, rate_before, setting, static


def decayed(lam: float, x: Array, dx: Array) -> Any:
    """A gradient or a step that also pulls x towards 0."""
    return dx + lam * x


class WeightDecay(Rule):
    """Adds lam x to the gradient: an L2 penalty of lam/2 |x|^2 on the loss, where it comes before the other
    rules.
    """

    lam: Setting = setting(5e-4)

    def check(self) -> None:
        not_negative(self, "lam")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, decayed(self.lam, x, dx)


class DecoupledDecay(Rule):
    """Adds lam x to the step of the rule before it: decay beside the step, for the place after any rule.

    Loshchilov & Hutter, "Decoupled weight decay regularization", 2019, arXiv:1711.05101. With `couple=True`
    it is multiplied by eta, that of the last rule before it in the chain that has one, at its present value:
    Chain(Adam(eta), DecoupledDecay(lam, couple=True)) is AdamW(eta, lam=lam), and Chain(Lion(eta),
    DecoupledDecay(lam, couple=True)) is Lion with the decay of its paper. With `couple=False` it is lam x
    whatever eta is, as the paper of AdamW has it.
    """

    lam: Setting = setting(1e-5)
    couple: bool = static(False)

    def check(self) -> None:
        not_negative(self, "lam")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, decayed(self.lam * rate_before(self) if self.couple else self.lam, x, dx)


class SignDecay(Rule):
    """Adds lam sign(x) to the gradient: an L1 penalty of lam |x| on the loss, where it comes before the other
    rules.
    """

    lam: Setting = setting(1e-3)

    def check(self) -> None:
        not_negative(self, "lam")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, dx + self.lam * sign(x)


class Maximise(Rule):
    """Turns the gradient round, dx' = -dx, so that the rules behind it climb: `maximize=True` of torch.optim.

    It stands first: decay that comes after it still pulls towards 0.
    """

    lazy = True

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, -dx


class ClipGrad(Rule):
    """Limits every element of the gradient to [-delta, delta]; of a complex one its real and its imaginary
    part.
    """

    lazy = True

    delta: Setting = setting(10.0)

    def check(self) -> None:
        not_negative(self, "delta")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        (clipped,) = by_parts(lambda part: (clip(part, -self.delta, self.delta),), dx)
        return state, clipped


class ClipNorm(Rule):
    """Scales the gradient of each array down to p-norm omega, where it is longer (`ClipGlobalNorm`: of all
    arrays).

    `p` may be any number or +-inf; with p = 0, which counts the elements that are not zero, nothing is
    scaled. With `throw`, a norm that is not finite raises DomainError before anything is changed; without, it
    spreads.
    """

    omega: Setting = setting(10.0)
    p: float = static(2.0)
    throw: bool = static(True)

    def check(self) -> None:
        not_negative(self, "omega")
        if not isinstance(self.p, int | float) or isinstance(self.p, bool) or self.p != self.p:
            raise BadSetting(f"ClipNorm.p is {self.p!r}; it takes a number, inf or -inf")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        if self.p == 0:
            return state, dx
        size = norm(dx, self.p)
        if self.throw:
            check(
                isfinite(size),
                f"gradient has {self.p:g}-norm {{}}; ClipNorm takes finite ones, ClipNorm(..., throw=False) "
                "lets others pass",
                size,
            )
        most = where(size == 0, 1, self.omega) if self.p < 0 else self.omega  # the least element may be 0
        return state, shrunk(dx, most, size)


class ClipGlobalNorm(Rule):
    """Scales all gradients down by one factor, so that together they have 2-norm omega at most.

    Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, arXiv:1211.5063,
    algorithm 1, as torch.nn.utils.clip_grad_norm_ does it. The norm goes over all leaves stepped together
    whose rules clip by it. With `throw`, a norm that is not finite raises DomainError before anything is
    changed; without, it spreads.
    """

    lazy = True

    omega: Setting = setting(1.0)
    throw: bool = static(True)

    def check(self) -> None:
        not_negative(self, "omega")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        own = norm(dx)
        size = total(own, p=2)
        if self.throw:
            message = (
                "the gradients have global norm {}; ClipGlobalNorm takes finite ones, ClipGlobalNorm(..., "
                "throw=False) lets others pass"
            )
            check(isfinite(own), message, size)  # names the leaf at fault, if it is one
            check(isfinite(size), message, size)
        return state, shrunk(dx, self.omega, size)


def shrunk(dx: Array, omega: Operand, size: Operand) -> Any:
    """A gradient of norm `size` brought down to norm omega, where it is longer."""
    some = nonzero(size)
    return scaled_to(dx, minimum(omega, some), some)
