"""Rules that change the gradient on its way to another rule: by units, by averages, by what it was before."""

from math import inf
from typing import Any, Literal, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.ops import (
    dot,
    ema,
    isfinite,
    isnan,
    maximum,
    minimum,
    norm,
    norm2,
    real,
    sqrt,
    total,
    where,
    zeros_like,
)
from optimisers.ops.derived import hypot, nonzero, rms, scaled_to
from optimisers.ops.steps import latest
from optimisers.rule import Rule, Setting, in_unit_interval, not_negative, one_of, setting, static
from optimisers.rules.gradient import shrunk


def other_axes(x: Array, layout: str) -> tuple[int, ...]:
    """The axes that a unit spans: all but the first of arrays in layout rows, (out, in, ...); all but the
    last of arrays in layout columns, (in, ..., out).
    """
    return tuple(range(1, x.ndim)) if layout == "rows" else tuple(range(x.ndim - 1))


class AdaptiveClip(Rule):
    """Scales the gradient of each unit down to a part of the unit's own norm: where |dx| > omega max(|x|,
    epsilon).

    Brock et al., "High-performance large-scale image recognition without normalization", 2021,
    arXiv:2102.06171, eq. 3. A unit is a row, all axes but the first of a weight (out, in, ...) as PyTorch
    keeps it; with `layout="columns"` all but the last, (in, ..., out), as Flax and Keras do; an array of one
    axis is one unit. Leave the last layer out.
    """

    omega: Setting = setting(0.01)
    epsilon: Setting = setting(1e-3)
    layout: Literal["rows", "columns"] = static("rows")

    def check(self) -> None:
        not_negative(self, "omega", "epsilon")
        one_of(self, "layout", ("rows", "columns"))

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        axes = other_axes(x, self.layout) if x.ndim > 1 else None
        keep = axes is not None
        long, size = (norm2(y, axis=axes, keepdims=keep) for y in (x, dx))
        return state, shrunk(dx, self.omega * maximum(long, self.epsilon), size)


class Centralize(Rule):
    """Takes the mean of each unit off its gradient; arrays of fewer than two axes stay as they are.

    Yong et al., "Gradient centralization: a new optimization technique for deep neural networks", 2020,
    arXiv:2004.01461, eq. 1. Units and `layout` as in `AdaptiveClip`.
    """

    layout: Literal["rows", "columns"] = static("rows")

    def check(self) -> None:
        one_of(self, "layout", ("rows", "columns"))

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        if x.ndim < 2:
            return state, dx
        axes = other_axes(x, self.layout)
        count = 1
        for axis in axes:
            count *= x.shape[axis]
        return state, dx - ops.sum(dx, axis=axes, keepdims=True) / max(count, 1)


class ZeroNonFinite(Rule):
    """Elements of the gradient that are infinite or NaN become 0; with `nan_only`, those that are NaN.

    As optax.zero_nans, which takes NaN alone. To take no step at all, write SkipNonFinite(rule).
    """

    nan_only: bool = static(False)

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, where(isnan(dx), 0, dx) if self.nan_only else where(isfinite(dx), dx, 0)


class ClipRMS(Rule):
    """Scales the gradient of each array down to root mean square omega, where it is larger.

    Shazeer & Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018, arXiv:1804.04235,
    section 6.
    """

    omega: Setting = setting(1.0)

    def check(self) -> None:
        not_negative(self, "omega")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, shrunk(dx, self.omega, rms(dx))


class NormalizeGrad(Rule):
    """Brings all gradients together to norm `scale`: dx' = scale dx / (|dx| + epsilon), the norm over all
    arrays.
    """

    scale: Setting = setting(1.0)
    epsilon: Setting = setting(1e-6)

    def check(self) -> None:
        not_negative(self, "scale", "epsilon")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, scaled_to(dx, self.scale, nonzero(total(norm(dx), p=2) + self.epsilon))


class GrowthState(NamedTuple):
    size: Any
    """The norm of what went on at the step before; 0 before the first."""


def grown(omega: float, before: float, dx: Array) -> tuple[Any, Any]:
    """(the norm of what goes on, dx scaled to it): at most omega times the norm of the step before."""
    size, most = norm(dx), omega * before
    let = where(before > 1e-7, minimum(size, most), size)
    return let, scaled_to(dx, let, nonzero(size))


class NormGrowthCap(Rule):
    """Lets the norm of an array's gradient grow by the factor omega a step at most.

    Chen et al., "Fira: can we achieve full-rank training of LLMs under low-rank constraint?", 2024,
    arXiv:2410.01623, section 4.2. Nothing is scaled at the first step, or after one whose norm was below
    1e-7.
    """

    omega: Setting = setting(1.01)

    def check(self) -> None:
        not_negative(self, "omega")

    def init(self, x: Array) -> GrowthState:
        return GrowthState(0.0)

    def apply(self, state: GrowthState, x: Array, dx: Array) -> Any:
        size, dx = grown(self.omega, state.size, dx)
        return GrowthState(size), dx


class GrokFastState(NamedTuple):
    mean: Any
    """The mean gradient, decaying with rho; it starts at the first one."""
    t: Any
    """How many gradients came."""


class GrokFast(Rule):
    """Adds the slow part of the gradient: f = rho f + (1 - rho) dx; dx' = dx + gain f.

    Lee et al., "Grokfast: accelerated grokking by amplifying slow gradients", 2024, arXiv:2405.20233,
    algorithm 2.
    """

    rho: Setting = setting(0.98)
    gain: Setting = setting(2.0)

    def check(self) -> None:
        in_unit_interval(self, "rho")

    def init(self, x: Array) -> GrokFastState:
        return GrokFastState(zeros_like(x), 0)

    def apply(self, state: GrokFastState, x: Array, dx: Array) -> Any:
        slow = where(state.t == 0, dx, ema(self.rho, state.mean, dx))
        return GrokFastState(slow, state.t + 1), dx + self.gain * slow


class OrthoGrad(Rule):
    """Takes the part along x off the gradient of each array, and keeps its norm.

    Prieto et al., "Grokking at the edge of numerical stability", 2025, arXiv:2501.04697, section 5.2. A
    gradient along x becomes 0.
    """

    epsilon: Setting = setting(1e-30)

    def check(self) -> None:
        not_negative(self, "epsilon")

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        long = real(dot(x, x)) + self.epsilon
        rest = dx - dot(x, dx) / where(long == 0, 1, long) * x
        size, left = norm(dx), norm(rest)
        scale = where(left > ALONG * size, size / (where(left > 0, left, 1) + self.epsilon), 0)
        return state, rest * scale


ALONG = 1e-6
"""What is left of a gradient along x is rounding: below this part of its norm it counts as nothing."""


class ZClipState(NamedTuple):
    mean: Any
    """The mean of the norms; during warm-up of those so far, then decaying with rho."""
    deviation: Any
    """Their standard deviation, likewise."""
    t: Any
    """How many steps were seen, with this array or without it."""


class ZClip(Rule):
    """Scales all gradients down where their norm is an outlier: z = (norm - mean) / std > `z` brings the norm
    to mean + z^2 std / z-score.

    Kumar et al., "ZClip: adaptive spike mitigation for LLM pre-training", 2025, arXiv:2504.02507, algorithm
    1. Mean and variance are those of the first `warmup` norms, and decay with `rho` from then on, taking in
    the norm after clipping. `omega` is the largest norm that is let through at any time; inf for none.
    """

    rho: Setting = setting(0.97)
    z: Setting = setting(2.5)
    omega: Setting = setting(1.0)
    warmup: int = 25

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "z", "omega")

    def init(self, x: Array) -> ZClipState:
        return ZClipState(0.0, 0.0, 0)

    def apply(self, state: ZClipState, x: Array, dx: Array) -> Any:
        size = total(norm(dx), p=2)
        before, mean, deviation = latest(state.t, state.mean, state.deviation)
        t, warming, off = before + 1, before < self.warmup, size - mean
        score = off / (deviation + 1e-6)
        high = (score > self.z) & (before >= self.warmup)
        target = where(high, mean + self.z**2 * deviation / where(high, score, 1), size)
        m = where(warming, mean + off / t, ema(self.rho, mean, target))
        early = sqrt(1 - 1 / t) * hypot(deviation, ops.abs(off) / sqrt(t))
        late = hypot(sqrt(self.rho) * deviation, sqrt(1 - self.rho) * ops.abs(target - m))
        most = minimum(where(high, target, inf), self.omega)
        return ZClipState(m, where(warming, early, late), t), shrunk(dx, most, size + 1e-6)
