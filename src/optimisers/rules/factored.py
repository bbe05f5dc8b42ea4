"""Rules of little memory: second moments of rows and columns, of axes or of blocks in place of elements."""

from functools import reduce
from math import prod
from typing import Any, Literal, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import abs2, ema, maximum, mean, minimum, real_zeros_like, sqrt, where, zeros_like
from optimisers.ops.derived import rms
from optimisers.ops.state import resolution, summable
from optimisers.rule import (
    Pair,
    Rule,
    Setting,
    at_least_one,
    in_unit_interval,
    not_negative,
    one_of,
    setting,
    static,
)
from optimisers.rules.adam import AdamState, check_decaying, moments

Axes = tuple[int, int]
"""Two axes of an array, counted from its end: the one that counts rows, and the one that counts columns."""


class Factors(NamedTuple):
    rows: Any
    """The mean of the squares in every row, decaying."""
    columns: Any
    """The mean of the squares in every column, decaying."""


def factored_axes(shape: tuple[int, ...], factor: str = "last", least: int = 0) -> Axes | None:
    """The two axes over which second moments are factored: the last two, or the two longest, of equal ones
    the later; None where there are fewer, one of them is shorter than `least`, or there are no elements.
    """
    order = range(-len(shape), 0)
    by_length = sorted(order, key=lambda i: shape[i]) if factor == "largest" else order
    found = sorted(by_length[-2:])
    if len(found) < 2 or 0 in shape or min(shape[i] for i in found) < least:
        return None
    return found[0], found[1]


def squares_of(x: Array, axes: Axes | None) -> Any:
    """The second moments before the first step, factored over two axes, or of every element."""
    zeros = real_zeros_like(x)
    if axes is None:
        return zeros
    return Factors(*(ops.sum(zeros, axis=axis, keepdims=True) for axis in reversed(axes)))


def mean_along(square: Array, axis: int, shape: tuple[int, ...]) -> Any:
    """The mean along an axis, which stays, of squares for an array of this shape."""
    return ops.sum(square, axis=axis, keepdims=True) / shape[axis]


def averaged_squares(beta: Any, old: Any, square: Array, shape: tuple[int, ...], axes: Axes | None) -> Any:
    """The second moments after one more array of squares of this shape. Factors stay finite, whatever the
    squares are.
    """
    if axes is None:
        return ema(beta, old, square)
    most = summable(old.rows)
    new = (minimum(mean_along(square, axis, shape), most) for axis in reversed(axes))
    return Factors(*(ema(beta, v, s) for v, s in zip(old, new, strict=True)))


def over_root(y: Array, squares: Any, shape: tuple[int, ...], axes: Axes | None) -> Any:
    """y over the root of second moments; of factors, v = rows columns / (mean of rows), first by columns and
    then by rows: their product may vanish where neither does, and would be as large as y.
    """
    if axes is None:
        return y / sqrt(squares)
    rows, columns = squares
    return y * sqrt(mean_along(rows, axes[0], shape) / columns) * (1 / sqrt(rows))


def limited(u: Array, clip: Any) -> Any:
    """u, shortened to root mean square `clip` where it is longer."""
    return u / maximum(rms(u) / clip, 1)


class AdafactorState(NamedTuple):
    v: Any
    """The mean of |dx|^2, decaying; factored or of every element."""
    m: Any
    """The mean of the steps, decaying with rho; nothing without momentum."""
    t: Any
    """How many steps were taken."""


class Adafactor(Rule):
    """Adam's scaling with the memory of a row and a column: u = dx / sqrt(v), v made of the means of |dx|^2
    along rows and columns; dx' = a (u / max(1, rms(u) / clip) + lam x), a = min(eta, 1 / sqrt(t))
    max(scale_epsilon, rms(x)).

    Shazeer & Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018, arXiv:1804.04235,
    algorithm 4 for matrices, 5 for vectors. The means decay with 1 - t^decay, `cap` at most, and `epsilon` is
    added to |dx|^2. `relative=False` leaves out the 1 / sqrt(t), `scaled=False` the factor of x, `clip=None`
    the limit; with `rho` dx' is averaged, its decay apart, which costs an array as large as x. Arrays of more
    axes are factored over the last two, or with `factor="largest"` over the two longest, as Optax does;
    arrays whose factored axes are shorter than `factor_from` keep v as it is. `TorchAdafactor` is the formula
    of torch.optim.
    """

    eta: Setting = setting(0.01)
    decay: Setting = setting(-0.8)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-30)
    scale_epsilon: Setting = setting(1e-3)
    cap: Setting = setting(1.0)
    clip: float | None = static(1.0)
    rho: float | None = static(None)
    relative: bool = static(True)
    scaled: bool = static(True)
    factor: Literal["last", "largest"] = static("last")
    factor_from: int = static(0)

    def check(self) -> None:
        not_negative(self, "lam", "epsilon", "scale_epsilon", "factor_from")
        falling(self)
        one_of(self, "factor", ("last", "largest"))
        if self.rho is not None:
            in_unit_interval(self, "rho")
        if self.clip is not None and not self.clip > 0:
            raise BadSetting(f"Adafactor.clip is {self.clip!r}; it takes numbers above 0, or None")

    def init(self, x: Array) -> AdafactorState:
        axes = factored_axes(x.shape, self.factor, self.factor_from)
        return AdafactorState(squares_of(x, axes), () if self.rho is None else zeros_like(x), 0)

    def apply(self, state: AdafactorState, x: Array, dx: Array) -> Any:
        axes = factored_axes(x.shape, self.factor, self.factor_from)
        t = state.t + 1
        beta = minimum(1 - t**self.decay, self.cap)
        v = averaged_squares(beta, state.v, abs2(dx) + self.epsilon, x.shape, axes)
        u = over_root(dx, v, x.shape, axes)
        rate = minimum(self.eta, 1 / sqrt(t)) if self.relative else self.eta
        rate = rate * maximum(rms(x), self.scale_epsilon) if self.scaled else rate
        step = rate * (u if self.clip is None else limited(u, self.clip))
        m = () if self.rho is None else ema(self.rho, state.m, step)
        return AdafactorState(v, m, t), (step if self.rho is None else m) + rate * self.lam * x


def falling(rule: Any) -> None:
    """Raise BadSetting unless the power of t in a decay is negative."""
    if isinstance(rule.decay, float) and not rule.decay <= 0:
        raise BadSetting(
            f"{type(rule).__name__}.decay is {rule.decay!r}; it takes numbers up to 0, such as -0.8"
        )


class FactoredState(NamedTuple):
    rows: Any
    """The mean of |dx|^2 along the last axis, decaying."""
    columns: Any
    """The mean of |dx|^2 along the axis before it, decaying."""
    t: Any
    """How many steps were taken."""


class UnfactoredState(NamedTuple):
    v: Any
    """The mean of |dx|^2, decaying."""
    t: Any
    """How many steps were taken."""


class TorchAdafactor(Rule):
    """Adafactor as torch.optim.Adafactor has it: u = dx / sqrt(v), v made of the means of |dx|^2 along rows
    and columns; dx' = a u / max(1, rms(u) / clip) + eta lam x, a = min(eta, 1 / sqrt(t)) max(scale_epsilon,
    rms(x)).

    Shazeer & Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018, arXiv:1804.04235,
    algorithm 4 with relative steps, over the last two axes; arrays of fewer keep v as it is. The means decay
    with 1 - t^decay, `beta2_decay` in torch, and `clip` is `d` there. `epsilon` bounds the mean of the rows
    from below, and its square v, where `Adafactor` adds it to |dx|^2; None is the distance from 1 to the next
    number of the arithmetic, 2^-52 or 2^-23.
    """

    eta: Setting = setting(0.01)
    decay: Setting = setting(-0.8)
    clip: Setting = setting(1.0)
    lam: Setting = setting(0.0)
    scale_epsilon: Setting = setting(1e-3)
    epsilon: float | None = static(None)

    def check(self) -> None:
        not_negative(self, "lam", "scale_epsilon", "epsilon")
        falling(self)
        if isinstance(self.clip, float) and not self.clip >= 1:
            raise BadSetting(f"TorchAdafactor.clip is {self.clip!r}; it takes numbers from 1 on")

    def init(self, x: Array) -> FactoredState | UnfactoredState:
        axes = factored_axes(x.shape)
        squares = squares_of(x, axes)
        return (
            UnfactoredState(squares, 0) if axes is None else FactoredState(squares.rows, squares.columns, 0)
        )

    def apply(self, state: FactoredState | UnfactoredState, x: Array, dx: Array) -> Any:
        axes, t = factored_axes(x.shape), state.t + 1
        beta, least = 1 - t**self.decay, self.epsilon
        if least is None:
            least = resolution(state[0])
        if isinstance(state, UnfactoredState):
            v = averaged_squares(beta, state.v, abs2(dx), x.shape, None)
            new: FactoredState | UnfactoredState = UnfactoredState(v, t)
        else:
            assert axes is not None
            old = Factors(state.rows, state.columns)
            rows, columns = averaged_squares(beta, old, abs2(dx), x.shape, axes)
            v = rows / maximum(mean_along(rows, axes[0], x.shape), least) * columns
            new = FactoredState(rows, columns, t)
        u = dx / sqrt(maximum(v, least**2))
        rate = minimum(self.eta, 1 / sqrt(t)) * maximum(rms(x), self.scale_epsilon)
        return new, rate * limited(u, self.clip) + self.eta * self.lam * x


class CAMEState(NamedTuple):
    v: Any
    """The mean of |dx|^2, decaying with beta[1]; factored or of every element."""
    m: Any
    """The mean of the scaled gradients, decaying with beta[0]."""
    s: Any
    """The mean of |u - m|^2, factored, decaying with beta[2]; nothing for arrays of fewer than two axes."""


class CAME(Rule):
    """Adafactor with momentum, whose step is scaled by how sure it is: u = dx / sqrt(v), of root mean square
    clip at most; m = beta[0] m + (1 - beta[0]) u; dx' = eta (m / sqrt(s) + lam x), v and s made of the means
    of |dx|^2 and of |u - m|^2 along rows and columns.

    Luo et al., "CAME: confidence-guided adaptive memory efficient optimization", 2023, arXiv:2307.02047,
    algorithm 2. v decays with beta[1], s with beta[2]; epsilon[0] and epsilon[1] are added to the squares.
    Over the last two axes; arrays of fewer keep v as it is, and step by eta m.
    """

    eta: Setting = setting(2e-4)
    beta: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    lam: Setting = setting(0.0)
    clip: Setting = setting(1.0)
    epsilon: Pair = setting((1e-30, 1e-16))

    def check(self) -> None:
        in_unit_interval(self, "beta")
        not_negative(self, "lam")
        if isinstance(self.clip, float) and not self.clip > 0:
            raise BadSetting(f"CAME.clip is {self.clip!r}; it takes numbers above 0")

    def init(self, x: Array) -> CAMEState:
        axes = factored_axes(x.shape)
        return CAMEState(squares_of(x, axes), zeros_like(x), () if axes is None else squares_of(x, axes))

    def apply(self, state: CAMEState, x: Array, dx: Array) -> Any:
        axes, beta = factored_axes(x.shape), self.beta
        v = averaged_squares(beta[1], state.v, abs2(dx) + self.epsilon[0], x.shape, axes)
        u = limited(over_root(dx, v, x.shape, axes), self.clip)
        m = ema(beta[0], state.m, u)
        if axes is None:
            return CAMEState(v, m, ()), self.eta * (m + self.lam * x)
        s = averaged_squares(beta[2], state.s, abs2(u - m) + self.epsilon[1], x.shape, axes)
        return CAMEState(v, m, s), self.eta * (over_root(m, s, x.shape, axes) + self.lam * x)


class SM3State(NamedTuple):
    m: Any
    """The mean of the scaled gradients, decaying with rho."""
    covers: tuple[Any, ...]
    """For each axis, the largest sum of |dx|^2 that may stand in each of its slices."""


class SM3(Rule):
    """AdaGrad with the memory of one array for each axis: v = min of the covers + |dx|^2; u = dx / sqrt(v +
    epsilon); m = rho m + (1 - rho) u; dx' = eta m. The cover of an axis is the largest v in each of its
    slices.

    Anil et al., "Memory-efficient adaptive optimization", 2019, arXiv:1901.11150, algorithm SM3-II. u is 0
    where v is. For arrays of fewer than two axes it is AdaGrad with momentum.
    """

    eta: Setting = setting(0.1)
    rho: Setting = setting(0.9)
    epsilon: Setting = setting(1e-8)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "epsilon")

    def init(self, x: Array) -> SM3State:
        return SM3State(zeros_like(x), covers_of(real_zeros_like(x), x.shape))

    def apply(self, state: SM3State, x: Array, dx: Array) -> Any:
        v = reduce(minimum, [cover + abs2(dx) for cover in state.covers])
        u = dx / where(v > 0, sqrt(v + self.epsilon), 1)
        m = ema(self.rho, state.m, u)
        return SM3State(m, covers_of(v, x.shape)), self.eta * m


def covers_of(v: Array, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """For each axis of an array of this shape, the largest element in each slice; the array itself where it
    has no matrix.
    """
    axes = range(-len(shape), 0)
    if len(shape) < 2 or 0 in shape:
        return (v,)
    if len(shape) == 2:
        return ops.max(v, axis=-1, keepdims=True), ops.max(v, axis=-2, keepdims=True)
    return tuple(ops.max(v, axis=tuple(j for j in axes if j != i), keepdims=True) for i in axes)


class AdamMini(Rule):
    """Adam with one second moment for each block of an array: v = beta[1] v + (1 - beta[1]) (mean of |dx|^2
    in the block); dx' = eta (m / (sqrt(v) + epsilon) + lam x), m and v without bias.

    Zhang et al., "Adam-mini: use fewer learning rates to gain more", 2024, arXiv:2406.16793, algorithm 1.
    `blocks` is "array" for one block, "rows" for one of each output, or how many blocks the outputs are
    divided into: the heads of a query or key. Outputs are the first axis, (out, in, ...), as PyTorch keeps
    weights, or with `layout="columns"` the last, as Flax does; of an embedding they are its tokens. The
    authors choose by names: heads for query and key, rows for value, output, embedding and head, the array
    for all else; here a dict of rules does.
    """

    eta: Setting = setting(0.001)
    beta: Pair = setting((0.9, 0.999))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-8)
    blocks: Literal["array", "rows"] | int = static("array")
    layout: Literal["rows", "columns"] = static("rows")

    def check(self) -> None:
        check_decaying(self)
        one_of(self, "layout", ("rows", "columns"))
        if isinstance(self.blocks, str | bool):
            one_of(self, "blocks", ("array", "rows"))
        at_least_one(self, "blocks")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        outputs = prod(self.outputs_of(shape))
        if not isinstance(self.blocks, str) and outputs % self.blocks:
            raise BadSetting(
                f"AdamMini divides outputs into {self.blocks} blocks, and an array of shape {shape} has "
                f"{outputs} of them"
            )

    def outputs_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one number for each output."""
        at = len(shape) - 1 if self.layout == "columns" else 0
        return tuple(n if i == at else 1 for i, n in enumerate(shape))

    def init(self, x: Array) -> AdamState:
        rows = None if self.blocks == "array" else self.by_output(real_zeros_like(x), x.shape)
        return AdamState(zeros_like(x), 0.0 if rows is None else self.joined(rows, x.shape), (0.0, 0.0))

    def by_output(self, square: Array, shape: tuple[int, ...]) -> Any:
        """The mean of squares of each output."""
        outputs = self.outputs_of(shape)
        axes = tuple(i for i, n in enumerate(shape) if n != outputs[i])
        rows = ops.sum(square, axis=axes, keepdims=True) if axes else square
        return rows / max(prod(shape) // max(prod(outputs), 1), 1)

    def joined(self, rows: Array, shape: tuple[int, ...]) -> Any:
        """The mean of the outputs in every block."""
        if isinstance(self.blocks, str):
            return rows
        size = prod(self.outputs_of(shape)) // self.blocks
        return ops.sum(ops.reshape(rows, (self.blocks, size)), axis=1, keepdims=True) / max(size, 1)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        rows = mean(abs2(dx)) if self.blocks == "array" else self.by_output(abs2(dx), x.shape)
        state, m, v = moments(self.beta, state, dx, self.joined(rows, x.shape))
        if not isinstance(self.blocks, str):  # as many as there are outputs
            outputs = self.outputs_of(x.shape)
            each = ops.zeros((self.blocks, prod(outputs) // self.blocks), like=x)
            v = ops.reshape(v + each, outputs)
        return state, self.eta * (m / (sqrt(v) + self.epsilon) + self.lam * x)
