"""Rules that see an array as a matrix, or as several, whose step is made orthogonal."""

from math import prod
from typing import Any, Literal, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import (
    abs2,
    conj,
    ema,
    norm,
    norm2,
    orthogonal,
    real,
    real_zeros_like,
    sign,
    sqrt,
    zeros_like,
)
from optimisers.ops.derived import rms
from optimisers.ops.matrices import PRODUCTS, Coefficients, coefficients_of
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
from optimisers.rules.adam import AdamState, adam_state, weights

Scale = Literal["original", "rms", "spectral", "max"]
Layout = Literal["rows", "columns"]
Product = Literal["bfloat16", "float32"] | None

TINY = 1e-10
"""Is added to what divides the rows of orthogonal matrices."""

# -- arrays as matrices --------------------------------------------------------------------------------------


class Matrices(NamedTuple):
    """How an array is seen as matrices of outputs and inputs, which are the last two axes."""

    whole: tuple[int, ...]
    """The shape of the array."""
    laid: tuple[int, ...]
    """The same elements as matrices."""
    shape: tuple[int, ...]
    """Those matrices with their outputs divided into blocks, each a matrix of its own."""
    outputs: int
    inputs: int
    outputs_axis: int
    """Which axis of `shape` runs over outputs, -2 or -1."""
    turned: bool
    """Whether matrices are transposed before they are divided, so that outputs come first."""

    @property
    def inputs_axis(self) -> int:
        return -3 - self.outputs_axis

    def of(self, w: Array) -> Any:
        """An array as these matrices."""
        w = w if self.laid == self.whole else ops.reshape(w, self.laid)
        w = ops.transpose(w) if self.turned else w
        return w if self.shape == self.laid else ops.reshape(w, self.shape)

    def back(self, o: Array) -> Any:
        """These matrices as the array."""
        if self.shape != self.laid:
            *outer, rows, columns = self.laid
            o = ops.reshape(o, (*outer, columns, rows) if self.turned else self.laid)
        o = ops.transpose(o) if self.turned else o
        return o if self.laid == self.whole else ops.reshape(o, self.whole)

    def norms(self, w: Array) -> Any:
        """The norm of each of these matrices."""
        return norm(w) if len(self.shape) == 2 else norm2(w, axis=(-2, -1), keepdims=True)


def matrices_of(shape: tuple[int, ...], layout: str, axes: int | None = None, blocks: int = 1) -> Matrices:
    """The matrices of an array: those of its last two axes with `axes` of 2, else the one of its first axis,
    the outputs, against all others, or in layout columns of all others against the last, which is outputs.
    """
    at = len(shape) - 1 if layout == "columns" else 1
    outer, rows, columns = (
        (shape[:-2], *shape[-2:]) if axes == 2 else ((), prod(shape[:at]), prod(shape[at:]))
    )
    outputs, inputs = (rows, columns) if layout == "rows" else (columns, rows)
    laid = (*outer, rows, columns)
    if blocks == 1:
        return Matrices(shape, laid, laid, outputs, inputs, -2 if layout == "rows" else -1, False)
    divided = (*outer, blocks, outputs // blocks, inputs)
    return Matrices(shape, laid, divided, outputs // blocks, inputs, -2, layout == "columns")


def scale_of(scale: str, seen: Matrices) -> float:
    """How many times as long the step is as the orthogonal matrix."""
    rows, columns = seen.outputs, seen.inputs
    if scale == "original":
        return max(1.0, rows / columns) ** 0.5
    if scale == "spectral":
        return (rows / columns) ** 0.5
    return (0.2 if scale == "rms" else 1.0) * max(rows, columns) ** 0.5


# -- what these rules have in common -------------------------------------------------------------------------


def check_orthogonal(rule: "Muon | NorMuon | AdaMuon | Scion | PolarGrad") -> None:
    """Raise BadSetting where settings that all these rules have are out of range."""
    not_negative(rule, "epsilon")
    at_least_one(rule, "steps")
    one_of(rule, "layout", ("rows", "columns"))
    name = type(rule).__name__
    if rule.axes not in (None, 2):
        raise BadSetting(f"{name}.axes is {rule.axes!r}; it takes None or 2")
    if rule.dtype not in (None, *PRODUCTS):
        raise BadSetting(f"{name}.dtype is {rule.dtype!r}; it takes None, 'bfloat16' or 'float32'")
    coefficients_of(rule.coefficients or "exact", f"{name}.coefficients")


def check_scaled(rule: "Muon | NorMuon | AdaMuon") -> None:
    """The same, where there are a decay, a scale and blocks."""
    check_orthogonal(rule)
    not_negative(rule, "lam")
    at_least_one(rule, "blocks")
    one_of(rule, "scale", ("original", "rms", "spectral", "max"))


def no_matrix(rule: Rule, shape: tuple[int, ...]) -> BadSetting:
    """What a rule of matrices says of an array that is none."""
    name = type(rule).__name__
    return BadSetting(
        f"{name} steps matrices, and this array has shape {shape}; give it another rule: "
        f'write {{opt.hidden_matrices: {name}(), "**": AdamW()}} where the rule goes'
    )


def seen_by(rule: "Muon | NorMuon | AdaMuon | PolarGrad", shape: tuple[int, ...]) -> Matrices:
    """The matrices of an array; raises BadSetting for one that has none, or whose outputs do not divide into
    blocks.
    """
    if len(shape) < 2:
        raise no_matrix(rule, shape)
    whole = matrices_of(shape, rule.layout, rule.axes)
    if rule.blocks == 1:
        return whole
    if whole.outputs % rule.blocks:
        raise BadSetting(
            f"{type(rule).__name__} divides outputs into {rule.blocks} blocks, and an array of shape "
            f"{shape} has {whole.outputs} of them"
        )
    return matrices_of(shape, rule.layout, rule.axes, rule.blocks)


def made_orthogonal(rule: "Muon | NorMuon | AdaMuon | Scion | PolarGrad", seen: Matrices, w: Array) -> Any:
    """NS of an array, as matrices."""
    return orthogonal(seen.of(w), rule.coefficients or "exact", rule.steps, rule.epsilon, rule.dtype)


def direction(rule: "Muon | NorMuon", old: Array, dx: Array) -> tuple[Any, Any]:
    """(the momentum, what is made orthogonal)."""
    m = ema(rule.rho, old, dx)
    return m, ema(rule.rho, m, dx) if rule.nesterov else m


# -- the rules -----------------------------------------------------------------------------------------------


class MuonState(NamedTuple):
    m: Any
    """The mean of dx, decaying with rho."""


class Muon(Rule):
    """Momentum of matrices, made orthogonal: m = rho m + (1 - rho) dx; o = NS(rho m + (1 - rho) dx); dx' =
    eta (scale o + lam x), NS the steps of Newton-Schulz.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, and Liu et al., "Muon is
    scalable for LLM training", 2025, arXiv:2502.16982. `nesterov=False` makes m itself orthogonal. The scale
    follows from the outputs, rows of a matrix, and the inputs, its columns: `original` is sqrt(max(1, rows /
    columns)); `rms`, 0.2 sqrt(max(rows, columns)), gives steps as long as those of AdamW, whose eta and lam
    serve then; `spectral` is sqrt(rows / columns), `max` sqrt(max(rows, columns)).

    `coefficients` and `steps` are those of `ops.orthogonal`: `jordan`, `you`, `polar_express`, `exact`, or
    triples, the last one repeated. Products are taken in bfloat16 where a device has units for it, and else
    in the type of the arithmetic, or always in `dtype`; torch.optim.Muon always takes bfloat16.

    An array of more axes is the matrix of its first axis against all others, (out, in, ...) as PyTorch keeps
    it; with `layout="columns"` of all others against the last, (in, ..., out), as Flax does. With `axes=2`
    the axes before the last two count matrices: stacked heads, layers or experts. `blocks` divides outputs
    into so many matrices: 3 where query, key and value are one. Arrays of fewer axes are refused: give them,
    embeddings and heads to AdamW.
    """

    eta: Setting = setting(0.02)
    rho: Setting = setting(0.95)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-7)
    nesterov: bool = static(True)
    scale: Scale = static("original")
    steps: int | None = static(None)
    coefficients: str | Coefficients = static("jordan")
    layout: Layout = static("rows")
    axes: Literal[2] | None = static(None)
    blocks: int = static(1)
    dtype: Product = static(None)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        check_scaled(self)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        seen_by(self, shape)

    def init(self, x: Array) -> MuonState:
        return MuonState(zeros_like(x))

    def apply(self, state: MuonState, x: Array, dx: Array) -> Any:
        seen = seen_by(self, x.shape)
        m, w = direction(self, state.m, dx)
        o = seen.back(made_orthogonal(self, seen, w))
        return MuonState(m), self.eta * (scale_of(self.scale, seen) * o + self.lam * x)


class NorMuonState(NamedTuple):
    m: Any
    """The mean of dx, decaying with rho."""
    v: Any
    """The mean of |o|^2 of each output, decaying with beta."""


class NorMuon(Rule):
    """Muon whose outputs take steps of one size: o as there; v = beta v + (1 - beta) (mean of |o|^2 over the
    inputs); p = o / sqrt(v); dx' = eta (scale |o| p / |p| + lam x).

    Li et al., "NorMuon: making Muon more efficient and scalable", 2025, arXiv:2510.05491, algorithm 1. v is
    one number for each output, and no bias is corrected, since |p| makes it up. With `scale="rms"` the step
    has root mean square 0.2 eta. All else is as in `Muon`.
    """

    eta: Setting = setting(0.02)
    rho: Setting = setting(0.95)
    beta: Setting = setting(0.95)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-7)
    nesterov: bool = static(True)
    scale: Scale = static("original")
    steps: int | None = static(None)
    coefficients: str | Coefficients = static("jordan")
    layout: Layout = static("rows")
    axes: Literal[2] | None = static(None)
    blocks: int = static(1)
    dtype: Product = static(None)

    def check(self) -> None:
        in_unit_interval(self, "rho", "beta")
        check_scaled(self)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        seen_by(self, shape)

    def init(self, x: Array) -> NorMuonState:
        seen = seen_by(self, x.shape)
        zeros = seen.of(real_zeros_like(x))
        return NorMuonState(zeros_like(x), ops.sum(zeros, axis=seen.inputs_axis, keepdims=True))

    def apply(self, state: NorMuonState, x: Array, dx: Array) -> Any:
        seen = seen_by(self, x.shape)
        m, w = direction(self, state.m, dx)
        o = made_orthogonal(self, seen, w)
        square = ops.sum(abs2(o), axis=seen.inputs_axis, keepdims=True)
        v = ema(self.beta, state.v, square / seen.inputs)
        root = sqrt(v) + TINY
        before, after = (
            sqrt(ops.sum(s, axis=seen.outputs_axis, keepdims=True)) for s in (square, square / root / root)
        )
        long = 0.2 * (seen.outputs * seen.inputs) ** 0.5 if self.scale == "rms" else before
        by = 1.0 if self.scale == "rms" else scale_of(self.scale, seen)
        p = seen.back(o * (long / (after + TINY) / root))
        return NorMuonState(m, v), self.eta * (by * p + self.lam * x)


class AdaMuon(Rule):
    """Muon whose elements are scaled as Adam scales them: m = beta[0] m + (1 - beta[0]) dx; o = NS(m); v =
    beta[1] v + (1 - beta[1]) |o|^2; w = o / sqrt(v), v without bias; dx' = eta (scale sqrt(min(rows,
    columns)) w / |w| + lam x).

    Si et al., "AdaMuon: adaptive Muon optimizer", 2025, arXiv:2507.11005, algorithm 1, with NS of m, where
    the authors take that of its sign. All else is as in `Muon`.
    """

    eta: Setting = setting(0.02)
    beta: Pair = setting((0.9, 0.95))
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-7)
    scale: Scale = static("rms")
    steps: int | None = static(None)
    coefficients: str | Coefficients = static("jordan")
    layout: Layout = static("rows")
    axes: Literal[2] | None = static(None)
    blocks: int = static(1)
    dtype: Product = static(None)

    def check(self) -> None:
        in_unit_interval(self, "beta")
        check_scaled(self)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        seen_by(self, shape)

    def init(self, x: Array) -> AdamState:
        return adam_state(x)

    def apply(self, state: AdamState, x: Array, dx: Array) -> Any:
        seen = seen_by(self, x.shape)
        m = ema(self.beta[0], state.m, dx)
        o = seen.back(made_orthogonal(self, seen, m))
        v = ema(self.beta[1], state.v, abs2(o))
        weight = weights(self.beta, state.weight)
        w = seen.of(o / (sqrt(v * (1 / weight[1])) + TINY))
        long = scale_of(self.scale, seen) * min(seen.outputs, seen.inputs) ** 0.5
        step = seen.back(w * (long / (seen.norms(w) + TINY)))
        return AdamState(m, v, weight), self.eta * (step + self.lam * x)


class Scion(Rule):
    """Steps of one size in a norm of the layer: m = (1 - alpha) m + alpha dx; dx' = eta (rho lmo(m) + x), lmo
    the step of norm 1 that goes furthest along m; without `constrained` the x is left out.

    Pethick et al., "Training deep learning models with norm-constrained LMOs", 2025, arXiv:2502.07529,
    algorithms 1 and 2. The norm `spectral` of a matrix gives sqrt(outputs / inputs) NS(m), of a kernel the
    same over the number of its elements; arrays of one axis or none become m over its root mean square.
    `sign` is sign(m) / inputs, for heads; `columns` makes what belongs to one input of root mean square 1,
    `rows` what belongs to one output of norm 1 / sqrt(inputs), both for embeddings. `rho` is the radius: 50
    for hidden layers, 3000 for the head in the authors' runs. With `constrained` x stays in the ball of this
    radius, once it is there, for eta up to 1. `coefficients`, `steps`, `layout` and `axes` are as in `Muon`.
    """

    eta: Setting = setting(3e-4)
    rho: Setting = setting(50.0)
    alpha: Setting = setting(0.1)
    epsilon: Setting = setting(1e-7)
    constrained: bool = static(True)
    norm: Literal["spectral", "sign", "columns", "rows"] = static("spectral")
    steps: int | None = static(None)
    coefficients: str | Coefficients = static("jordan")
    layout: Layout = static("rows")
    axes: Literal[2] | None = static(None)
    dtype: Product = static(None)

    def check(self) -> None:
        check_orthogonal(self)
        not_negative(self, "rho")
        one_of(self, "norm", ("spectral", "sign", "columns", "rows"))
        if isinstance(self.alpha, float) and not 0 < self.alpha <= 1:
            raise BadSetting(f"Scion.alpha is {self.alpha!r}; it takes numbers above 0, up to 1")

    def init(self, x: Array) -> MuonState:
        return MuonState(zeros_like(x))

    def apply(self, state: MuonState, x: Array, dx: Array) -> Any:
        m = (1 - self.alpha) * state.m + self.alpha * dx
        step = self.rho * self.lmo(m, x.shape)
        return MuonState(m), self.eta * (step + x if self.constrained else step)

    def lmo(self, m: Array, shape: tuple[int, ...]) -> Any:
        """The step of norm 1 that goes furthest along m."""
        if len(shape) < 2:
            return sign(m) if self.norm == "sign" else m / (rms(m) + SMALL)
        seen = matrices_of(shape, self.layout, self.axes)
        kernel = () if self.axes == 2 else shape[2:] if self.layout == "rows" else shape[:-2]
        inputs = seen.inputs // max(prod(kernel), 1)
        if self.norm == "sign":
            return sign(m) / inputs
        if self.norm == "spectral":
            y = made_orthogonal(self, seen, m) * ((seen.outputs / inputs) ** 0.5 / prod(kernel))
        elif self.norm == "columns":
            y = seen.of(m)
            y = y / (norm2(y, axis=seen.outputs_axis, keepdims=True) / seen.outputs**0.5 + SMALL)
        else:
            y = seen.of(m)
            y = y / (norm2(y, axis=seen.inputs_axis, keepdims=True) * seen.inputs**0.5 + SMALL)
        return seen.back(y)


SMALL = 1e-8
"""Is added to the sizes by which `Scion` divides."""


class PolarGrad(Rule):
    """Steepest descent in the spectral norm: m = rho m + (1 - rho) dx; dx' = eta (|m|_* o + lam x), o the
    polar factor of m and |m|_* its nuclear norm, the sum of its singular values.

    Lau, Long & Su, "PolarGrad: a class of matrix-gradient optimizers from a unifying preconditioning
    perspective", 2025, arXiv:2505.21799, algorithm 1. The factor is that of a singular value decomposition,
    or with `coefficients` and `steps` what Newton-Schulz makes of m, as in `Muon`; |m|_* is the product of o
    and m then. Unlike those of Muon, steps fall with the gradient. `layout` and `axes` are as there.
    """

    eta: Setting = setting(0.02)
    rho: Setting = setting(0.95)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-7)
    steps: int | None = static(None)
    coefficients: str | Coefficients | None = static(None)
    layout: Layout = static("rows")
    axes: Literal[2] | None = static(None)
    blocks: int = static(1)
    dtype: Product = static(None)

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam")
        at_least_one(self, "blocks")
        check_orthogonal(self)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        seen_by(self, shape)

    def init(self, x: Array) -> MuonState:
        return MuonState(zeros_like(x))

    def apply(self, state: MuonState, x: Array, dx: Array) -> Any:
        seen = seen_by(self, x.shape)
        m = ema(self.rho, state.m, dx)
        w = seen.of(m)
        if self.coefficients is None:
            u, s, vh = ops.svd(w)
            o, size = u @ vh, ops.sum(s, axis=-1, keepdims=True)
            size = ops.reshape(size, (*seen.shape[:-2], 1, 1))
        else:
            o = made_orthogonal(self, seen, m)
            size = ops.sum(real(conj(o) * w), axis=(-2, -1), keepdims=True)
        return MuonState(m), self.eta * (seen.back(size * o) + self.lam * x)
