"""A rate on top of any rule, tuned while it trains."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import clip, copy, maximum, norm, sqrt, total, under, updated
from optimisers.ops.steps import latest
from optimisers.rule import Rule, Setting, a_rule, not_negative, setting, static, stepped


class MechanicState(NamedTuple):
    start: Any
    """The parameters before the first step."""
    m: tuple[Any, ...]
    """For each decay, the largest |h| of late."""
    v: tuple[Any, ...]
    """For each decay, the decaying sum of h^2."""
    r: tuple[Any, ...]
    """For each decay, the decaying reward."""
    s: tuple[Any, ...]
    """For each decay, its share in the scale, as it was when this array was stepped last."""
    t: Any
    """How many steps were taken, with this array or without it."""
    inner: Any


class Mechanic(Rule):
    """Scales the whole way that another rule has gone from the start: x becomes x0 - S (D + u), D the sum of
    its steps and u its next one; S is learnt from how well D would have done.

    Cutkosky, Defazio & Mehta, "Mechanic: a learning rate tuner", 2023, arXiv:2306.00144, algorithm 1. All
    arrays stepped together share S, which is a sum of `betas` shares with the decays 1 - 10^-i; it starts
    from `s0`. `lam` pulls towards 0 as strongly as the gradient is. The rule inside keeps its rate, or its
    schedule. For real parameters. It must wrap a whole chain.
    """

    whole: ClassVar[bool] = True

    rule: Rule
    s0: Setting = setting(1e-6)
    lam: Setting = setting(0.01)
    epsilon: Setting = setting(1e-8)
    betas: int = static(6)

    def check(self) -> None:
        a_rule(self, self.rule)
        not_negative(self, "s0", "lam", "epsilon")
        if not isinstance(self.betas, int) or self.betas < 1:
            raise BadSetting(f"Mechanic.betas is {self.betas!r}; it takes a whole number, 1 or more")

    def init(self, x: Array) -> MechanicState:
        none = (0.0,) * self.betas
        return MechanicState(copy(x), none, none, none, none, 0, self.rule.init(x))

    def apply(self, state: MechanicState, x: Array, dx: Array, *more: Array) -> Any:
        inner, step = stepped(self.rule, state.inner, x, dx, more)
        if step is None:
            return state._replace(inner=inner), None
        with under(step):
            scale = sum(state.s)
            way = (state.start - x) / (scale + self.epsilon)
            long, steep = total(norm(x), p=2), total(norm(dx), p=2)
            pull = self.lam * scale * steep / (long + self.epsilon)
            h = total(ops.sum((dx + pull * x) * way))
            t, *known = latest(state.t, *state.m, *state.v, *state.r, *state.s)
            shares = [self.share(i, known[i :: self.betas], h) for i in range(self.betas)]
            m, v, r, s = (tuple(column) for column in zip(*shares, strict=True))
            u = x - updated(x, step)
            new = state.start - sum(s) * (way + u)
        return MechanicState(state.start, m, v, r, s, t + 1, inner), x - new

    def share(self, i: int, known: Sequence[Any], h: Any) -> tuple[Any, Any, Any, Any]:
        """(m, v, r, s) of one decay, from those before a step that would have earned h a unit of scale."""
        keep, (before, v, r, s) = 1 - 0.1 ** (i + 1), known
        m = maximum(keep * before, ops.abs(h) + self.epsilon)
        v = keep**2 * v + h * h
        r = keep * r + clip(h, -before, before) * s
        wealth = self.s0 / self.betas * m + maximum(r, 0)
        return m, v, r, wealth / (sqrt(v) + self.epsilon)
