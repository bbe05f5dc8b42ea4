"""How does a setting change in the course of training? By a schedule, a function of the clock.

The clock is 0 at the first update of a `setup` and ticks by one at every update: it counts from 0, as in
Optax and torch, and not from 1 as in ParameterSchedulers.jl. All lengths are in updates, not epochs.

Any function of the clock that is written with arithmetic and operations of `optimisers.ops` is a schedule.
Those below are values besides: they print, compare, and every number in them can change without a new
compilation. In all of them

    eta     is the rate, or whatever other setting is scheduled: its highest value, from which it falls
    start   is the value at clock 0, and `end` the last one
    steps   is the length: at clock `steps` the value is the last one, and it stays so for ever

so the last of `steps` updates, at clock `steps - 1`, is made just before the end, as in Optax and torch.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

from optimisers.errors import BadSetting
from optimisers.ops import clip, cos, floor, maximum, minimum, power, sqrt, where
from optimisers.settings import Value, number, settings, static


class Schedule(Value):
    """A number as a function of the clock; subclass it, list its numbers as fields, write `__call__`.

    The clock and the fields may be traced, so the body uses arithmetic and operations of `optimisers.ops`,
    never `if`. The clock may also be an array: `schedule(np.arange(1000))` is the whole curve.
    """

    def __call__(self, clock: float) -> Any:
        """The value at this clock."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__(self, clock)")

    def then(self, schedule: Callable[[Any], Any], after: int) -> "Join":
        """First this schedule; from clock `after` on the other one, whose own clock is 0 there."""
        return Join((self, schedule), (after,))

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value in settings(self):
            _refuse_schedule(_name(self, field), value)


class Constant(Schedule):
    """eta, always.

    Optax: `constant_schedule`.
    """

    eta: float

    def __call__(self, clock: float) -> Any:
        return self.eta + 0 * clock  # takes the shape of the clock


class Linear(Schedule):
    """From `start` to `end` on a straight line.

    start + (end - start) min(clock / steps, 1).

    Optax: `linear_schedule`. torch: `LinearLR`, whose factors are relative to the rate of the optimiser.
    """

    start: float
    end: float
    steps: int

    def __call__(self, clock: float) -> Any:
        return _between(self.start, self.end, _passed(clock, 0, self.steps))

    def check(self) -> None:
        _at_least(self, "steps", 1)


class Polynomial(Schedule):
    """From `start` to `end` as a power of the time that is left.

    end + (start - end) (1 - min(clock / steps, 1))^power.

    Optax: `polynomial_schedule`. torch: `PolynomialLR`, where `end` is 0.
    """

    start: float
    end: float
    steps: int
    power: float = 1.0

    def __call__(self, clock: float) -> Any:
        left = 1 - _passed(clock, 0, self.steps)
        return _between(self.end, self.start, power(left, self.power))

    def check(self) -> None:
        _at_least(self, "steps", 1)
        _above(self, "power", 0)


class Cosine(Schedule):
    """Half a cosine from `eta` down to `end`, after a linear warm-up, with or without restarts.

    end + (eta - end) (1 + cos(pi p)) / 2, where p runs from 0 to 1: Loshchilov & Hutter, "SGDR: stochastic
    gradient descent with warm restarts", 2017, arXiv:1608.03983, equation 5. The paper has no warm-up; here
    it is a straight line from `start` at clock 0 to `eta` at clock `warmup`.

    There are `cycles` cycles, and after the last one the value stays at `end`. `steps` is the length of the
    first, warm-up included. At each restart the peak is multiplied by `eta_factor`, and the length by
    `steps_factor`, rounded to whole updates; there is no second warm-up. `cycles` is structure: it cannot be
    adjusted, and each cycle costs a few operations on scalars.

    Optax: `cosine_decay_schedule` (its alpha is end / eta) and `warmup_cosine_decay_schedule`. torch:
    `CosineAnnealingLR`, which rises again after its T_max, and `CosineAnnealingWarmRestarts`, which never
    stops.
    """

    eta: float
    steps: int
    warmup: int = 0
    end: float = 0.0
    start: float = 0.0
    cycles: int = static(1)
    steps_factor: float = 1.0
    eta_factor: float = 1.0

    def __call__(self, clock: float) -> Any:
        begin, stop, eta = 0, self.steps, self.eta
        for _ in range(self.cycles - 1):
            restarted = clock >= stop
            length = floor((stop - begin) * self.steps_factor + 0.5)
            begin = where(restarted, stop, begin)
            stop = where(restarted, stop + length, stop)
            eta = where(restarted, eta * self.eta_factor, eta)
        p = _passed(clock, maximum(begin, self.warmup), stop)
        return _warmed_up(self, clock, _between(eta, self.end, _half_cosine(p)))

    def check(self) -> None:
        _at_least(self, "steps", 1)
        _at_least(self, "warmup", 0)
        _at_least(self, "steps_factor", 1)
        _above(self, "eta_factor", 0)
        cycles: Any = self.cycles
        if not isinstance(cycles, Integral) or cycles < 1:
            raise BadSetting(f"{_name(self, 'cycles')} is {cycles!r}; it takes a whole number, not below 1")
        if _known(self.warmup, self.steps) and self.warmup >= self.steps:
            raise BadSetting(
                f"{_name(self, 'warmup')} is {self.warmup!r}; it takes a number below steps, which is "
                f"{self.steps!r}"
            )


class Exponential(Schedule):
    """`eta`, multiplied by `factor` every `steps` updates: smoothly, or at once if `staircase`.

    max(end, eta factor^(clock / steps)), with the exponent rounded down if `staircase`. It never goes below
    `end`, and with a factor above 1 it grows without bound.

    Optax: `exponential_decay`. torch: `ExponentialLR`, and `StepLR` for the staircase, if counted in updates.
    """

    eta: float
    factor: float
    steps: int = 1
    end: float = 0.0
    staircase: bool = static(default=False)

    def __call__(self, clock: float) -> Any:
        # + 0.5 keeps the floor right where an engine multiplies by 1 / steps instead of dividing
        times = floor((clock + 0.5) / self.steps) if self.staircase else clock / self.steps
        return maximum(self.end, self.eta * power(self.factor, times))

    def check(self) -> None:
        _above(self, "factor", 0)
        _at_least(self, "steps", 1)
        if _known(self.end, self.eta) and not self.end <= self.eta:
            raise BadSetting(
                f"{_name(self, 'end')} is {self.end!r}; it takes a number not above eta, which is "
                f"{self.eta!r}"
            )


class Step(Schedule):
    """`eta`, multiplied by one more of the `factors` at each of the `boundaries`.

    eta times the product of all factors[i] with clock >= boundaries[i].

    Optax: `piecewise_constant_schedule`. torch: `MultiStepLR`, where all factors are its gamma. For values
    instead of factors, `Join` constants.
    """

    eta: float
    boundaries: Sequence[int]
    factors: Sequence[float]

    def __call__(self, clock: float) -> Any:
        value = self.eta
        for boundary, factor in zip(self.boundaries, self.factors, strict=True):
            value = value * where(clock >= boundary, factor, 1.0)
        return value

    def __post_init__(self) -> None:
        _set_tuple(self, "boundaries", int)
        _set_tuple(self, "factors", float)
        super().__post_init__()

    def check(self) -> None:
        _rising(self, self.boundaries)
        if not self.boundaries:
            raise BadSetting(
                f"{_name(self, 'boundaries')} is (); it takes one clock at least, or write Constant"
            )
        if len(self.factors) != len(self.boundaries):
            raise BadSetting(
                f"{_name(self, 'factors')} is {self.factors!r}; it takes one number per boundary, and there "
                f"are {len(self.boundaries)}"
            )


class OneCycle(Schedule):
    """Half a cosine from eta / div_factor up to eta, then another down to 1 / final_div_factor of the start.

    The peak is at clock `pct_start * steps`, which need not be whole; `pct_start` is a part of 1. After Smith
    & Topin, "Super-convergence", 2018, arXiv:1708.07120, in the form of fast.ai: cosines, and two phases
    where the paper has straight lines and three. The momentum that falls from 0.95 to 0.85 and rises again is
    `OneCycle(0.85, steps, div_factor=0.85 / 0.95, final_div_factor=1)`.

    Optax: `cosine_onecycle_schedule`, which rounds the clock of the peak down. torch: `OneCycleLR`, which has
    its peak and its end one update earlier: at `pct_start * total_steps - 1` and `total_steps - 1`.
    """

    eta: float
    steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __call__(self, clock: float) -> Any:
        peak = self.pct_start * self.steps
        start = self.eta / self.div_factor
        up = _between(start, self.eta, _half_cosine(_passed(clock, 0, peak)))
        end = start / self.final_div_factor
        down = _between(self.eta, end, _half_cosine(_passed(clock, peak, self.steps)))
        return where(clock < peak, up, down)

    def check(self) -> None:
        _at_least(self, "steps", 1)
        _above(self, "div_factor", 0)
        _above(self, "final_div_factor", 0)
        if _known(self.pct_start) and not 0 < self.pct_start < 1:
            raise BadSetting(
                f"{_name(self, 'pct_start')} is {self.pct_start!r}; it takes a number between 0 and 1"
            )


class InverseSqrt(Schedule):
    """A linear warm-up from `start` to `eta`, then a fall with the square root of the clock, without an end.

    eta sqrt(warmup / clock) from clock `warmup` on. Vaswani et al., "Attention is all you need", 2017,
    arXiv:1706.03762, section 5.3, where eta is 1 / sqrt(d_model warmup). With `start` equal to `eta` the
    warm-up is flat, as for T5 (Raffel et al., 2020, arXiv:1910.10683, section 3.1.2).

    Optax and torch have none; Transformers: `get_inverse_sqrt_schedule`.
    """

    eta: float
    warmup: int
    start: float = 0.0

    def __call__(self, clock: float) -> Any:
        return _warmed_up(self, clock, self.eta * sqrt(self.warmup / maximum(clock, self.warmup)))

    def check(self) -> None:
        _at_least(self, "warmup", 1)


class WarmupStableDecay(Schedule):
    """A linear warm-up from `start` to `eta`, then `eta`, then a fall to `end` in the last `decay` updates.

    `steps` is the length of the whole, and the constant stretch is what `warmup` and `decay` leave of it.

    The fall is eta + (end - eta) p^power, where p runs from 0 to 1: with power 1 a straight line, so that the
    whole is a trapezoid, and with power 0.5 the "1-sqrt" of Hägele et al. The name is from Hu et al.,
    "MiniCPM", 2024, arXiv:2404.06395; the shapes are from Hägele et al., "Scaling laws and compute-optimal
    training beyond fixed training durations", 2024, arXiv:2405.18392.

    Optax and torch have none; Transformers: `get_wsd_schedule`, whose `decay_type` is "linear" or "1-sqrt".
    """

    eta: float
    steps: int
    warmup: int
    decay: int
    end: float = 0.0
    start: float = 0.0
    power: float = 1.0

    def __call__(self, clock: float) -> Any:
        p = _passed(clock, self.steps - self.decay, self.steps)
        return _warmed_up(self, clock, _between(self.eta, self.end, power(p, self.power)))

    def check(self) -> None:
        _at_least(self, "warmup", 0)
        _at_least(self, "decay", 1)
        _above(self, "power", 0)
        if _known(self.steps, self.warmup, self.decay) and self.steps < self.warmup + self.decay:
            raise BadSetting(
                f"{_name(self, 'steps')} is {self.steps!r}; it takes a number not below warmup + decay, "
                f"which is {self.warmup + self.decay!r}"
            )


class Join(Schedule):
    """One schedule after another: `schedules[i + 1]` begins at clock `boundaries[i]`, its own clock 0 there.

    The schedules may be any functions of the clock. They need not meet at the boundaries.

    Optax: `join_schedules`. torch: `SequentialLR`.
    """

    schedules: Sequence[Callable[[Any], Any]]
    boundaries: Sequence[int]

    def __call__(self, clock: float) -> Any:
        # each sees a clock within its own stretch only, so that none overflows where its value is not used
        *stretches, last = zip(self.schedules, (0, *self.boundaries), strict=True)
        pieces = [
            (stop, schedule(clip(clock - begin, 0, stop - begin)))
            for (schedule, begin), stop in zip(stretches, self.boundaries, strict=True)
        ]
        schedule, begin = last
        value = schedule(maximum(clock - begin, 0))
        for stop, piece in reversed(pieces):
            value = where(clock < stop, piece, value)
        return value

    def then(self, schedule: Callable[[Any], Any], after: int) -> "Join":
        return Join((*self.schedules, schedule), (*self.boundaries, after))

    def __post_init__(self) -> None:
        _set_tuple(self, "schedules", None)
        _set_tuple(self, "boundaries", int)
        super().__post_init__()

    def check(self) -> None:
        for i, schedule in enumerate(self.schedules):
            if not callable(schedule) or isinstance(schedule, type):
                raise BadSetting(
                    f"{_name(self, f'schedules[{i}]')} is {schedule!r}; it takes a schedule, such as "
                    "Constant(0.1)"
                )
        if not self.schedules:
            raise BadSetting(f"{_name(self, 'schedules')} is (); it takes one schedule at least")
        if len(self.boundaries) != len(self.schedules) - 1:
            raise BadSetting(
                f"{_name(self, 'boundaries')} is {self.boundaries!r}; it takes the clock at which each "
                f"schedule after the first begins, and there are {len(self.schedules) - 1} of those"
            )
        _rising(self, self.boundaries)


class Scaled(Schedule):
    """factor times another schedule, which may be any function of the clock: `layer_decay` makes it of rates.

    Optax: `scale_by_learning_rate` behind another. torch: `LambdaLR` over a schedule.
    """

    schedule: Callable[[Any], Any]
    factor: float = 1.0

    def __call__(self, clock: float) -> Any:
        return self.factor * self.schedule(clock)

    def __post_init__(self) -> None:
        Value.__post_init__(self)
        _refuse_schedule(_name(self, "factor"), self.factor)

    def check(self) -> None:
        if not callable(self.schedule) or isinstance(self.schedule, type):
            raise BadSetting(
                f"{_name(self, 'schedule')} is {self.schedule!r}; it takes a schedule, such as Constant(0.1)"
            )


# -- pieces of curves ----------------------------------------------------------------------------------------


def _passed(clock: float, begin: float, stop: float) -> Any:
    """The part of the stretch from `begin` to `stop` that is over: from 0 to 1, and never outside."""
    return clip((clock - begin) / (stop - begin), 0.0, 1.0)


def _between(a: float, b: float, part: float) -> Any:
    """From a to b on a straight line; in this form exactly a at part 0 and exactly b at part 1."""
    return (1 - part) * a + part * b


def _half_cosine(p: float) -> Any:
    """From 0 to 1 with a flat beginning and a flat end."""
    return (1 - cos(math.pi * p)) / 2


def _warmed_up(schedule: "Cosine | InverseSqrt | WarmupStableDecay", clock: float, value: object) -> Any:
    """`value`, but up to clock `warmup` a straight line from `start` to `eta`."""
    part = minimum(clock / maximum(schedule.warmup, 1), 1.0)
    return where(clock < schedule.warmup, _between(schedule.start, schedule.eta, part), value)


# -- what the settings may be; numbers that are arrays or symbols pass ---------------------------------------


def _known(*values: object) -> bool:
    return all(isinstance(v, int | float) for v in values)


def _name(schedule: Schedule, field: str) -> str:
    return f"{type(schedule).__name__}.{field}"


def _refuse_schedule(name: str, value: object) -> None:
    if callable(value):
        raise BadSetting(
            f"{name} is {value!r}; it takes a number: to use two schedules write Join, or a function of the "
            "clock that calls both"
        )


def _at_least(schedule: Schedule, field: str, least: int) -> None:
    value = getattr(schedule, field)
    if _known(value) and not value >= least:
        raise BadSetting(f"{_name(schedule, field)} is {value!r}; it takes a number not below {least}")


def _above(schedule: Schedule, field: str, bound: int) -> None:
    value = getattr(schedule, field)
    if _known(value) and not value > bound:
        raise BadSetting(f"{_name(schedule, field)} is {value!r}; it takes a number above {bound}")


def _rising(schedule: Schedule, boundaries: Sequence[Any]) -> None:
    known = [b for b in (0, *boundaries) if _known(b)]
    if any(b <= a for a, b in pairwise(known)):
        raise BadSetting(
            f"{_name(schedule, 'boundaries')} is {boundaries!r}; it takes whole numbers above 0 in rising "
            "order"
        )


def _set_tuple(schedule: Schedule, field: str, kind: type | None) -> None:
    """Make a tuple of the items of a field, and of each the number that a field of this kind holds."""
    items: Any = getattr(schedule, field)
    name = _name(schedule, field)
    if not isinstance(items, tuple | list):
        what = "schedules" if kind is None else "numbers"
        raise BadSetting(f"{name} is {items!r}; it takes a tuple of {what}")
    new: list[Any] = list(items)
    if kind is not None:
        new = [number(f"{name}[{i}]", kind, v) for i, v in enumerate(new)]
        for i, v in enumerate(new):
            _refuse_schedule(f"{name}[{i}]", v)
    object.__setattr__(schedule, field, tuple(new))
