"""Training without a schedule, and averages that are trained with: the model holds other parameters than it
is evaluated with.
"""

from typing import Any, ClassVar, Literal, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.nest import unflatten, values
from optimisers.ops import copy, ema, floor, maximum, under, updated, where
from optimisers.ops.derived import over
from optimisers.rule import (
    Rule,
    Setting,
    a_rule,
    at_least_one,
    in_unit_interval,
    not_negative,
    one_of,
    rate_of,
    setting,
    static,
    stepped,
)
from optimisers.settings import adjusted


class ScheduleFreeState(NamedTuple):
    z: Any
    """The parameters as the rule inside alone would step them."""
    x: Any
    """Their average; nothing where it is worked out from z and the model."""
    weight: Any
    """The sum of the weights of the average so far."""
    top: Any
    """The largest rate so far."""
    t: Any
    """How many steps were taken."""
    inner: Any


class ScheduleFree(Rule):
    """Trains by a constant rate as well as by a schedule: gradients are taken at y = rho x + (1 - rho) z,
    where z is stepped by the rule inside and x is the average of z.

    Defazio et al., "The road less scheduled", 2024, arXiv:2405.15682, eq. 4 to 6. The model holds y;
    `averaged(state, model)` is x, with which to evaluate and what to save. The rule inside has no momentum of
    its own: `ScheduleFree(Descent(1.0))`, `ScheduleFree(AdamW(0.0025, (0.0, 0.999)))`; its decay is taken at
    y, or with `decay_at="z"` at z. The weight of a step in the average is t^r times the largest rate so far
    to `power`; the rate grows linearly over the first `warmup` steps. x is worked out from y and z, which
    loses digits where parameters are halves or rho is near 0; `store="x"` keeps it, in one more array.
    Statistics of batches belong to y: compute them anew for x. It must wrap a whole chain.
    """

    whole: ClassVar[bool] = True

    rule: Rule
    rho: Setting = setting(0.9)
    power: Setting = setting(2.0)
    r: Setting = setting(0.0)
    warmup: int = 0
    decay_at: Literal["y", "z"] = static("y")
    store: Literal["z", "x"] = static("z")

    def check(self) -> None:
        a_rule(self, self.rule)
        rate_of(self.rule)
        in_unit_interval(self, "rho")
        one_of(self, "decay_at", ("y", "z"))
        one_of(self, "store", ("z", "x"))
        if self.rho == 0 and self.store == "z":
            raise BadSetting(
                'ScheduleFree.rho is 0, where y tells nothing of x; write store="x", or a rho above 0'
            )
        not_negative(self, "power", "r")

    def init(self, x: Array) -> ScheduleFreeState:
        average = copy(x) if self.store == "x" else None
        return ScheduleFreeState(copy(x), average, 0.0, 0.0, 0, self.rule.init(x))

    def apply(self, state: ScheduleFreeState, x: Array, dx: Array, *more: Array) -> Any:
        t = state.t + 1
        eta = rate_of(self.rule) * where(self.warmup > t, t / maximum(self.warmup, 1), 1)
        at = state.z if self.decay_at == "z" else x
        inner, along = stepped(adjusted(self.rule, {"eta": 1.0}), state.inner, at, dx, more)
        if along is None:
            return state._replace(inner=inner), None
        with under(along):
            top = maximum(state.top, eta)
            weight = t**self.r * top**self.power
            so_far = state.weight + weight
            part = over(weight, so_far)
            z = state.z - eta * along
            average = ema(1 - part, self.average(state, x), z)
            y = ema(self.rho, average, z)
        kept = average if self.store == "x" else None
        return ScheduleFreeState(z, kept, so_far, top, t, inner), x - y

    def average(self, state: ScheduleFreeState, y: Array) -> Any:
        """The average that belongs to the y that the model holds."""
        if self.store == "x":
            return state.x
        return (y - (1 - self.rho) * state.z) / self.rho

    def evaluate(self, state: ScheduleFreeState, x: Array) -> Any:
        return self.average(state, x)


class GPAState(NamedTuple):
    z: Any
    """The parameters as the rule inside steps them."""
    average: Any
    """Their moving average."""
    inner: Any


class GPA(Rule):
    """Trains at a point between the parameters of another rule and their moving average: x = mu_x x + (1 -
    mu_x) z; the model holds y = mu_y x + (1 - mu_y) z, where gradients are taken.

    Meta, "Smoothing DiLoCo with primal averaging for faster training of LLMs", 2025: generalized primal
    averaging, ScheduleFree with two constants. `averaged(state, model)` is x. The decay of the rule inside is
    that of z. It must wrap a whole chain.
    """

    whole: ClassVar[bool] = True

    rule: Rule
    mu_y: Setting = setting(0.7)
    mu_x: Setting = setting(0.9967)

    def check(self) -> None:
        a_rule(self, self.rule)
        in_unit_interval(self, "mu_y", "mu_x")

    def init(self, x: Array) -> GPAState:
        return GPAState(copy(x), copy(x), self.rule.init(x))

    def apply(self, state: GPAState, x: Array, dx: Array, *more: Array) -> Any:
        inner, step = stepped(self.rule, state.inner, state.z, dx, more)
        if step is None:
            return state._replace(inner=inner), None
        with under(step):
            z = updated(state.z, step)
            average = ema(self.mu_x, state.average, z)
            y = ema(self.mu_y, average, z)
        return GPAState(z, average, inner), x - y

    def evaluate(self, state: GPAState, x: Array) -> Any:
        return state.average


class LookaheadState(NamedTuple):
    slow: Any
    """The slow parameters."""
    t: Any
    """How many steps were taken."""
    inner: Any


class Lookahead(Rule):
    """Every `every` steps goes back a part of the way to where it was then: slow = slow + alpha (x - slow), x
    = slow.

    Zhang et al., "Lookahead optimizer: k steps forward, 1 step back", 2019, arXiv:1907.08610, algorithm 1.
    The state of the rule inside goes on, or with `reset` starts anew from there. `averaged(state, model)`
    holds the slow parameters. It must wrap a whole chain.
    """

    whole: ClassVar[bool] = True

    rule: Rule
    every: int = 5
    alpha: Setting = setting(0.5)
    reset: bool = static(False)

    def check(self) -> None:
        a_rule(self, self.rule)
        at_least_one(self, "every")

    def init(self, x: Array) -> LookaheadState:
        return LookaheadState(copy(x), 0, self.rule.init(x))

    def apply(self, state: LookaheadState, x: Array, dx: Array, *more: Array) -> Any:
        inner, step = stepped(self.rule, state.inner, x, dx, more)
        if step is None:
            return state._replace(inner=inner), None
        with under(step):
            t, fast = state.t + 1, updated(x, step)
            back = divides(self.every, t)
            slow = where(back, state.slow + self.alpha * (fast - state.slow), state.slow)
            if self.reset:
                inner = chosen(back, self.rule.init(slow), inner)
        return LookaheadState(slow, t, inner), x - where(back, slow, fast)

    def evaluate(self, state: LookaheadState, x: Array) -> Any:
        return state.slow


class SWAState(NamedTuple):
    mean: Any
    """The mean of the parameters taken so far."""
    n: Any
    """How many were taken."""
    t: Any
    """How many steps were taken."""
    inner: Any


class SWA(Rule):
    """Steps by another rule and keeps the plain mean of where it led, from step `start` on, every `every`
    steps.

    Izmailov et al., "Averaging weights leads to wider optima and better generalization", 2018,
    arXiv:1803.05407, algorithm 1. `averaged(state, model)` is the model with the means, once there are any.
    Statistics of batches are to be computed anew for them. It must wrap a whole chain.
    """

    whole: ClassVar[bool] = True

    rule: Rule
    start: int = 0
    every: int = 1

    def check(self) -> None:
        a_rule(self, self.rule)
        at_least_one(self, "every")

    def init(self, x: Array) -> SWAState:
        return SWAState(copy(x), 0, 0, self.rule.init(x))

    def apply(self, state: SWAState, x: Array, dx: Array, *more: Array) -> Any:
        inner, step = stepped(self.rule, state.inner, x, dx, more)
        if step is None:
            return state._replace(inner=inner), None
        with under(step):
            t = state.t + 1
            take = (t > self.start) & divides(self.every, t - self.start)
            n = state.n + where(take, 1, 0)
            away = updated(x, step) - state.mean
            mean = state.mean + where(take, 1 / maximum(n, 1), 0) * away
        return SWAState(mean, n, t, inner), step

    def evaluate(self, state: SWAState, x: Array) -> Any:
        return where(state.n == 0, x, state.mean)


def chosen(condition: Any, new: Any, old: Any) -> Any:
    """One of two states of a rule."""
    pairs = zip(values(new), values(old), strict=True)
    return unflatten(old, iter([where(condition, a, b) for a, b in pairs]))


def divides(every: Any, t: Any) -> Any:
    """Whether t is a multiple of `every`."""
    return floor(t / every) * every == t
