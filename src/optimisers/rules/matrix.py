"""Rules that see an array as a matrix: steps made orthogonal, and second moments kept as rows and columns."""

from typing import Any, Literal, NamedTuple

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import ema, orthogonal, zeros_like
from optimisers.ops.matrices import NEWTON_SCHULZ, Coefficients, coefficients_of
from optimisers.rule import (
    Rule,
    Setting,
    at_least_one,
    in_unit_interval,
    not_negative,
    one_of,
    setting,
    static,
)

SCALES = ("original", "rms", "spectral", "max")


def as_matrix(shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    """(rows, columns) of an array as a matrix: the first axis against all others, or all others against the
    last.
    """
    others = 1
    for n in shape[1:] if layout == "rows" else shape[:-1]:
        others *= n
    return (shape[0], others) if layout == "rows" else (others, shape[-1])


def scale_of(scale: str, rows: int, columns: int) -> float:
    """How many times as long the step is as the orthogonal matrix, for `rows` outputs and `columns`
    inputs.
    """
    if scale == "original":
        return max(1.0, rows / columns) ** 0.5
    if scale == "spectral":
        return (rows / columns) ** 0.5
    return (0.2 if scale == "rms" else 1.0) * max(rows, columns) ** 0.5


class MuonState(NamedTuple):
    m: Any
    """The mean of dx, decaying with rho."""


class Muon(Rule):
    """Momentum of matrices, made orthogonal: m = rho m + (1 - rho) dx; o = NS(rho m + (1 - rho) dx); dx' =
    eta (scale o + lam x), NS `steps` steps of Newton-Schulz.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, and Liu et al., "Muon is
    scalable for LLM training", 2025, arXiv:2502.16982. `nesterov=False` makes m itself orthogonal. The scale
    follows from the rows, which are outputs, and the columns: `original` is sqrt(max(1, rows / columns));
    `rms`, 0.2 sqrt(max(rows, columns)), gives steps as long as those of AdamW, whose eta and lam serve then;
    `spectral` is sqrt(rows / columns), `max` sqrt(max(rows, columns)).

    An array of more axes is the matrix of its first axis against all others, (out, in, ...) as PyTorch keeps
    it; with `layout="columns"` of all others against the last, (in, ..., out), as Flax does. Arrays of fewer
    axes are refused: give them, embeddings and heads to AdamW. `coefficients` are triples, the last one
    repeated. Products are taken in bfloat16 where a device has units for it, and else in the type of the
    arithmetic, where torch.optim.Muon always takes bfloat16.
    """

    eta: Setting = setting(0.02)
    rho: Setting = setting(0.95)
    lam: Setting = setting(0.0)
    epsilon: Setting = setting(1e-7)
    nesterov: bool = static(True)
    scale: Literal["original", "rms", "spectral", "max"] = static("original")
    steps: int = static(5)
    coefficients: Coefficients = static(NEWTON_SCHULZ["jordan"][0])
    layout: Literal["rows", "columns"] = static("rows")

    def check(self) -> None:
        in_unit_interval(self, "rho")
        not_negative(self, "lam", "epsilon")
        at_least_one(self, "steps")
        one_of(self, "scale", SCALES)
        one_of(self, "layout", ("rows", "columns"))
        coefficients_of(self.coefficients, "Muon.coefficients")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise BadSetting(
                f"Muon steps matrices, and this array has shape {shape}; give it another "
                'rule: write {opt.hidden_matrices: Muon(), "**": AdamW()} where the rule goes'
            )

    def init(self, x: Array) -> MuonState:
        return MuonState(zeros_like(x))

    def apply(self, state: MuonState, x: Array, dx: Array) -> Any:
        rows, columns = as_matrix(x.shape, self.layout)
        outputs, inputs = (rows, columns) if self.layout == "rows" else (columns, rows)
        m = ema(self.rho, state.m, dx)
        w = ema(self.rho, m, dx) if self.nesterov else m
        flat = w if x.ndim == 2 else ops.reshape(w, (rows, columns))
        o = orthogonal(flat, self.coefficients, self.steps, self.epsilon)
        o = o if x.ndim == 2 else ops.reshape(o, x.shape)
        return MuonState(m), self.eta * (scale_of(self.scale, outputs, inputs) * o + self.lam * x)
