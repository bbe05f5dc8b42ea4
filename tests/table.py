"""One row per rule: the rule, what it cannot do, and which engine steps it. Properties are loops over these
rows.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

import optimisers as opt

REAL = ("float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
DTYPES = (*REAL, *COMPLEX)


# -- rules that a user might write ---------------------------------------------------------------------------


class DecayDescent(opt.Rule):
    """Descent whose rate falls with the square root of the step; the state is a bare number."""

    eta: float = 0.1

    def init(self, x: Any) -> Any:
        return 1

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state + 1, (self.eta / opt.sqrt(state)) * dx


class DictMomentum(opt.Rule):
    """Momentum that keeps its velocity in a dict, beside how often it stepped."""

    eta: float = 0.05
    rho: float = 0.9

    def init(self, x: Any) -> Any:
        return {"velocity": opt.zeros_like(x), "steps": 0}

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        v = self.rho * state["velocity"] + dx
        return {"velocity": v, "steps": state["steps"] + 1}, self.eta * v


class LongestSeen(opt.Rule):
    """Divides by the longest gradient that the array has seen: a number that comes from a sum over it."""

    eta: float = 0.05

    def init(self, x: Any) -> Any:
        return {"longest": 0.0}

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        longest = opt.maximum(state["longest"], opt.norm(dx))
        return {"longest": longest}, self.eta * dx / (longest + 1e-6)


class Sketched(opt.Rule):
    """Steps along dx dx^T dx, scaled by its own size: a matrix product."""

    eta: float = 0.05

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        product = dx @ (opt.ops.transpose(dx) @ dx)
        return state, self.eta * product / (1 + opt.sqrt(opt.ops.sum(opt.abs2(dx))))


class RowScaled(opt.Rule):
    """Divides each row by its length: a sum along an axis."""

    eta: float = 0.05

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        lengths = opt.sqrt(opt.ops.sum(opt.abs2(dx), axis=-1, keepdims=True))
        return state, self.eta * dx / (lengths + 0.5)


class RowMoments(opt.Rule):
    """Keeps one second moment per row: a state array of another shape than x."""

    eta: float = 0.05
    rho: float = 0.9

    def init(self, x: Any) -> Any:
        return (opt.ops.sum(opt.zeros_like(x), axis=-1, keepdims=True),)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        (v,) = state
        v = opt.ema(self.rho, v, opt.ops.sum(dx * dx, axis=-1, keepdims=True))
        return (v,), self.eta * dx / (opt.sqrt(v) + 0.1)


class Pair(NamedTuple):
    """The state of `Averaged`."""

    mean: Any
    inner: Any


class Averaged(opt.Rule):
    """Wraps a rule and keeps a moving average of the parameters: nested state, and state that starts at x."""

    rule: opt.Rule = opt.Momentum(0.02, 0.5)
    rho: float = 0.75

    def init(self, x: Any) -> Any:
        return Pair(opt.copy(x), self.rule.init(x))

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        inner, step = self.rule.apply(state.inner, x, dx)
        return Pair(opt.ema(self.rho, state.mean, x - step), inner), step


class EverySecond(opt.Rule):
    """Steps at every second gradient only, and forgets the others."""

    eta: float = 0.1

    def init(self, x: Any) -> Any:
        return 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return 1 - state, opt.when(state == 1, self.eta * dx)


# -- the table -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A rule and its declared limits."""

    name: str
    rule: opt.Rule
    types: tuple[str, ...] = DTYPES
    """The element types that it steps."""
    matrix: bool = False
    """Whether it takes arrays of two axes only."""
    engine: str = "numba"
    """The engine of real parameters."""
    engine_complex: str = "numba"
    """The engine of complex parameters."""
    passes: int = 1
    """How often a step reads through memory, for real parameters."""
    captured: bool = True
    """Whether its steps may be captured: they all do the same."""

    def takes(self, dtype: str) -> bool:
        return dtype in self.types

    @property
    def single(self) -> str:
        """float32, or the one type that the rule takes."""
        return "float32" if self.takes("float32") else self.types[0]

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes that the rule takes."""
        return ((3, 4), (1, 7), (5, 5)) if self.matrix else ((3, 4), (7,), (), (2, 1, 3), (0, 2))

    def engine_for(self, dtype: str) -> str:
        return self.engine_complex if dtype.startswith("complex") else self.engine


def label(p: float) -> str:
    return f"{p:g}".replace("-", "minus")


def _clip_norm(p: float) -> Row:
    return Row(
        f"ClipNorm-{label(p)}",
        opt.Chain(opt.ClipNorm(0.5, p), opt.Descent(0.1)),
        passes={0: 1, 1: 2, 2: 2, math.inf: 2, -math.inf: 2}.get(p, 3),
    )


NORMS = (-math.inf, -3.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf)

TABLE: tuple[Row, ...] = (
    Row("Descent", opt.Descent(0.1)),
    Row("Momentum", opt.Momentum(0.05, 0.8)),
    Row("Nesterov", opt.Nesterov(0.05, 0.8)),
    Row("SGD", opt.SGD(0.05, 0.8, 0.3)),
    Row("SGD-nesterov", opt.SGD(0.05, 0.8, nesterov=True)),
    Row("SGD-still", opt.SGD(0.05)),
    Row("Adam", opt.Adam(0.05, (0.8, 0.95), 1e-6)),
    Row("AdamW", opt.AdamW(0.05, (0.8, 0.95), 0.1, 1e-6)),
    Row("AdamW-apart", opt.AdamW(0.05, (0.8, 0.95), 0.02, 1e-6, couple=False)),
    Row("WeightDecay", opt.Chain(opt.WeightDecay(0.1), opt.Descent(0.1))),
    Row("SignDecay", opt.Chain(opt.SignDecay(0.1), opt.Descent(0.1))),
    Row("ClipGrad", opt.Chain(opt.ClipGrad(0.4), opt.Descent(0.1))),
    *map(_clip_norm, NORMS),
    Row("ClipGlobalNorm", opt.Chain(opt.ClipGlobalNorm(0.5), opt.Descent(0.1)), passes=2),
    Row("AccumGrad", opt.Chain(opt.AccumGrad(2), opt.Descent(0.1))),
    Row("Chain-empty", opt.Chain()),
    Row("Chain", opt.Chain(opt.SignDecay(0.01), opt.WeightDecay(0.03), opt.Adam(0.05))),
    Row(
        "Chain-nested",
        opt.Chain(opt.Chain(opt.WeightDecay(0.1), opt.Chain(opt.Momentum(0.3))), opt.Descent(0.3)),
    ),
    Row(
        "Chain-accumulate-clip-AdamW",
        opt.Chain(opt.AccumGrad(3), opt.ClipNorm(0.5), opt.AdamW(0.05, lam=0.1)),
        passes=2,
    ),
    Row(
        "Chain-global-AdamW",
        opt.Chain(opt.ClipGlobalNorm(0.5), opt.WeightDecay(0.01), opt.AdamW(0.05, lam=0.1)),
        passes=2,
    ),
    Row(
        "Chain-accumulate-twice", opt.Chain(opt.AccumGrad(2), opt.Chain(opt.AccumGrad(2), opt.Momentum(0.1)))
    ),
    Row("RMSProp", opt.RMSProp(0.05, 0.8, 1e-6)),
    Row("RMSProp-centred", opt.RMSProp(0.05, 0.8, 1e-3, centred=True)),
    Row("Rprop", opt.Rprop(0.05, (0.5, 1.2), (1e-3, 0.2))),
    Row("Lion", opt.Lion(0.05, (0.8, 0.9))),
    Row("RAdam", opt.RAdam(0.05, (0.8, 0.8), 1e-6)),
    Row("RAdam-torch", opt.TorchRAdam(0.05, (0.8, 0.8), 1e-6)),
    Row("AdaMax", opt.AdaMax(0.05, (0.8, 0.9), 1e-6)),
    Row("OAdam", opt.OAdam(0.05, (0.6, 0.9), 1e-6)),
    Row("AdaGrad", opt.AdaGrad(0.1, 1e-3)),
    Row("AdaGrad-torch", opt.TorchAdaGrad(0.1, 1e-3)),
    Row("AdaGrad-torch-decay", opt.TorchAdaGrad(0.1, 1e-3, 0.2, 0.3)),
    Row("AdaDelta", opt.AdaDelta(0.8, 1e-3)),
    Row("RMSProp-torch", opt.TorchRMSProp(0.05, 0.8, 0.7, 1e-3)),
    Row("RMSProp-torch-centred", opt.TorchRMSProp(0.05, 0.8, 0.7, 1e-3, centred=True)),
    Row("AdaMax-torch", opt.TorchAdaMax(0.05, (0.8, 0.9), 1e-3)),
    Row("ASGD", opt.ASGD(0.05, 0.1, 0.75, 2.0)),
    Row("SparseAdam", opt.SparseAdam(0.05, (0.8, 0.9), 1e-3)),
    Row("AMSGrad", opt.AMSGrad(0.05, (0.8, 0.9), 1e-3)),
    Row("AMSGrad-torch", opt.TorchAMSGrad(0.05, (0.8, 0.9), 1e-3)),
    Row("NAdam", opt.NAdam(0.05, (0.8, 0.9), 1e-6)),
    Row("NAdam-torch", opt.TorchNAdam(0.05, (0.8, 0.9), 1e-6)),
    Row("AdaBelief", opt.AdaBelief(0.05, (0.8, 0.9), 1e-6)),
    Row("DecoupledDecay", opt.Chain(opt.Momentum(0.1), opt.DecoupledDecay(0.01))),
    Row(
        "DecoupledDecay-coupled",
        opt.Chain(opt.Maximise(), opt.Lion(0.05, (0.8, 0.9)), opt.DecoupledDecay(0.1, couple=True)),
    ),
    Row("EMA", opt.EMA(opt.Momentum(0.1), 0.75)),
    Row("EMA-chain", opt.EMA(opt.Chain(opt.AccumGrad(2), opt.ClipNorm(0.5), opt.Adam(0.05)), 0.75), passes=2),
    Row("SkipNonFinite", opt.SkipNonFinite(opt.Momentum(0.1)), passes=2),
    Row(
        "SkipNonFinite-accumulate",
        opt.SkipNonFinite(opt.Chain(opt.AccumGrad(2), opt.AdamW(0.05, lam=0.1))),
        passes=2,
    ),
    Row(
        "MixedPrecision",
        opt.MixedPrecision(opt.Chain(opt.ClipNorm(0.5), opt.Momentum(0.1))),
        types=("float16", "bfloat16", "float32"),
        passes=2,
    ),
    Row("MixedPrecision-double", opt.MixedPrecision(opt.Momentum(0.1), "float64"), types=REAL),
    Row("MixedPrecision-split", opt.SplitPrecision(opt.Momentum(0.1)), types=("bfloat16",)),
    Row(
        "EMA-MixedPrecision",
        opt.EMA(opt.MixedPrecision(opt.Adam(0.05)), 0.75),
        types=("float16", "bfloat16", "float32"),
    ),
    Row("DecayDescent", DecayDescent(0.1)),
    Row("DictMomentum", DictMomentum()),
    Row("LongestSeen", LongestSeen(), passes=2),
    Row("Sketched", Sketched(), matrix=True, passes=3),
    Row("RowScaled", RowScaled(), matrix=True, passes=2),
    Row("RowMoments", RowMoments(), matrix=True, passes=2, types=REAL),
    Row("Averaged", Averaged()),
    Row("EverySecond", EverySecond()),
)


MODERN: tuple[Row, ...] = (
    Row("NAdamW", opt.NAdamW(0.05, (0.8, 0.95), 0.1, 1e-06)),
    Row("Adan", opt.Adan(0.05, (0.9, 0.8, 0.95), 0.1, 1e-06)),
    Row("ADOPT", opt.ADOPT(0.05, (0.8, 0.95), 0.1), types=REAL),
    Row("ADOPT-free", opt.ADOPT(0.05, (0.8, 0.95), 0.1, clip=None)),
    Row("AdEMAMix", opt.AdEMAMix(0.05, (0.8, 0.95, 0.99), 3.0, 0.1, 1e-06, 5)),
    Row("SimplifiedAdEMAMix", opt.SimplifiedAdEMAMix(0.01, (0.8, 0.9), 3.0, 0.1, 1e-06)),
    Row("LaProp", opt.LaProp(0.05, (0.8, 0.95), 0.1, 1e-06)),
    Row("QHM", opt.QHM(0.1, 0.8, 0.5)),
    Row("QHAdam", opt.QHAdam(0.05, (0.8, 0.95), (0.5, 0.8), 1e-06)),
    Row("StableAdamW", opt.StableAdamW(0.05, (0.8, 0.95), 0.3, 0.001), passes=2),
    Row("Yogi", opt.Yogi(0.05, (0.8, 0.95), 0.1, 0.01)),
    Row("AdamAtan2", opt.AdamAtan2(0.05, (0.8, 0.95), 0.1)),
    Row("MADGRAD", opt.MADGRAD(0.1, 0.7, 0.1)),
    Row("FTRL", opt.FTRL(0.1, 1.0, 0.1, 0.2), types=REAL),
    Row("LARS", opt.LARS(3.0, 0.8, 0.1, 0.01, 0.001, nesterov=True), passes=2),
    Row("LARS-apart", opt.LARS(3.0, 0.8, 0.1, 0.01, 0.001, apart=True), passes=2),
    Row("LAMB", opt.LAMB(0.05, (0.8, 0.95), 0.1, 0.001), passes=2),
    Row("NovoGrad", opt.NovoGrad(0.05, (0.8, 0.9), 0.1), passes=2),
    Row("SignDescent", opt.SignDescent(0.05)),
    Row("Signum", opt.Signum(0.05, 0.7, 0.1)),
    Row("Grams", opt.Grams(0.05, (0.8, 0.95), 0.1)),
    Row("MARS", opt.MARS(0.05, (0.8, 0.9), 0.1, 0.1), passes=2),
    Row("MARSLion", opt.MARSLion(0.05, (0.8, 0.9), 0.1, 0.1), passes=2),
    Row(
        "Prodigy",
        opt.Prodigy(0.7, (0.8, 0.95), 0.1, d0=0.01, d_coef=0.8, debias=True, safeguard=True),
        types=REAL,
        passes=2,
    ),
    Row("Muon", opt.Muon(0.05, 0.8, 0.1), passes=3, matrix=True),
    Row("Muon-flat", opt.Muon(0.05, 0.8, 0.1, nesterov=False, scale="rms", steps=2), passes=3, matrix=True),
    Row(
        "Muon-stack", opt.Muon(0.05, 0.8, coefficients="you", layout="columns", axes=2), passes=2, matrix=True
    ),
    Row("NorMuon", opt.NorMuon(0.05, 0.8, 0.9, 0.1), passes=3, matrix=True),
    Row("NorMuon-columns", opt.NorMuon(0.05, scale="rms", layout="columns"), passes=3, matrix=True),
    Row("AdaMuon", opt.AdaMuon(0.05, (0.8, 0.9), 0.1), passes=4, matrix=True),
    Row("Scion", opt.Scion(0.05, 2.0, 0.3), passes=3),
    Row("Scion-sign", opt.Scion(0.05, 2.0, 0.3, constrained=False, norm="sign")),
    Row("Scion-rows", opt.Scion(0.05, 2.0, 0.3, norm="rows"), passes=2),
    Row("Adafactor", opt.Adafactor(0.5, -0.6, 0.1, scale_epsilon=0.5), passes=3),
    Row(
        "Adafactor-momentum",
        opt.Adafactor(
            0.05, lam=0.1, cap=0.9, clip=None, rho=0.8, relative=False, scaled=False, factor="largest"
        ),
        passes=2,
    ),
    Row("CAME", opt.CAME(0.05, (0.8, 0.9, 0.95), 0.1, 0.7), passes=4),
    Row("SM3", opt.SM3(0.05, 0.8, 1e-3), passes=2),
    Row("AdamMini", opt.AdamMini(0.05, (0.8, 0.95), 0.1, 1e-3), passes=2),
    Row("AdamMini-rows", opt.AdamMini(0.05, (0.8, 0.95), 0.1, 1e-3, "rows"), passes=2),
    Row("APOLLO", opt.APOLLO(0.05, (0.8, 0.95), 0.1, 1e-3, rank=2, every=2), passes=4, captured=False),
    Row("APOLLO-mini", opt.APOLLO(0.05, scale=9.0, rank=1, per="array"), passes=4, captured=False),
    Row("Adafactor-torch", opt.TorchAdafactor(0.5, -0.6, 1.5, 0.1, 0.5, 1e-3), passes=3),
    Row("Prodigy-plain", opt.Prodigy(d0=0.001, lam=0.1, couple=True, growth=1.5), types=REAL, passes=2),
    Row("DAdaptAdam", opt.DAdaptAdam(0.7, (0.8, 0.95), 0.1, d0=0.01, debias=True), types=REAL, passes=2),
    Row("DAdaptSGD", opt.DAdaptSGD(0.7, 0.9, 0.1, 0.01), types=REAL, passes=2),
    Row("DAdaptLion", opt.DAdaptLion(0.7, (0.8, 0.95), 0.1, 0.01), types=REAL, passes=2),
    Row("DoG", opt.DoG(0.7, 0.01, 0.1), passes=2),
    Row("LDoG", opt.LDoG(0.7, 0.01, 0.1), passes=2),
    Row("DoWG", opt.DoWG(0.7, 0.01), passes=2),
    Row("AdaptiveClip", opt.Chain(opt.AdaptiveClip(0.3, 0.1), opt.Descent(0.5)), matrix=True),
    Row("Centralize", opt.Chain(opt.Centralize(), opt.Descent(0.1)), matrix=True),
    Row("ZeroNonFinite", opt.Chain(opt.ZeroNonFinite(), opt.Descent(0.1))),
    Row("ClipRMS", opt.Chain(opt.ClipRMS(0.3), opt.Descent(0.1)), passes=2),
    Row("NormalizeGrad", opt.Chain(opt.NormalizeGrad(0.3, 0.01), opt.Descent(1.0)), passes=2),
    Row("GrokFast", opt.Chain(opt.GrokFast(0.7, 3.0), opt.Descent(0.1))),
    Row("OrthoGrad", opt.Chain(opt.OrthoGrad(), opt.Descent(0.1)), passes=3, engine_complex="interpret"),
    Row("ZClip", opt.Chain(opt.ZClip(0.7, 0.1, math.inf, 2), opt.Descent(0.1)), passes=2),
    Row("NormGrowthCap", opt.Chain(opt.NormGrowthCap(1.1), opt.Descent(0.1)), passes=2),
    Row("AdamP", opt.AdamP(0.05, (0.8, 0.95), 0.1, delta=2.0, nesterov=True), types=REAL, matrix=True),
    Row("SGDP", opt.SGDP(0.05, 0.8, 0.1, delta=2.0), types=REAL, matrix=True),
    Row(
        "Cautious",
        opt.Chain(opt.Cautious(opt.Adam(0.05, (0.8, 0.95), 1e-06)), opt.DecoupledDecay(0.1, couple=True)),
        passes=2,
    ),
    Row("CautiousDecay", opt.Chain(opt.Adam(0.05, (0.8, 0.95), 1e-06), opt.CautiousDecay(0.1))),
    Row(
        "CorrectedDecay",
        opt.Chain(opt.Adam(opt.Cosine(0.05, 20, warmup=3), (0.8, 0.95), 1e-06), opt.CorrectedDecay(0.3)),
    ),
    Row("ScheduleFree", opt.ScheduleFree(opt.AdamW(0.1, (0.0, 0.95), 0.1, 0.001), 0.8, warmup=4, r=0.5)),
    Row("GPA", opt.GPA(opt.Adam(0.1, (0.8, 0.95), 0.001), 0.8, 0.9)),
    Row("Lookahead", opt.Lookahead(opt.Momentum(0.1), 3, 0.8)),
    Row("SWA", opt.SWA(opt.Momentum(0.1), 2, 2)),
    Row("AddNoise", opt.Chain(opt.AddNoise(0.1, 0.5, 3), opt.Descent(0.1))),
    Row("SGLD", opt.SGLD(0.05, 0.1, 3)),
    Row("Mechanic", opt.Mechanic(opt.Momentum(0.3), 0.01, 0.05, betas=4), types=REAL, passes=3),
)
"""Rules that came later: each is walked through every engine once, in `rules/test_modern.py`; the laws are
those of the rows above.
"""


GIVEN_MORE = ("AdaHessian", "MoMo", "MoMoAdam", "PolyakSPS", "PrivateAggregate", "Sophia", "SophiaG")
"""Rules that are given second gradients or the loss: no rows, since rows are stepped by gradients alone."""

FACTORISED: dict[str, opt.Rule] = {
    "Shampoo": opt.Shampoo(0.05, (0.8, 0.9), 0.1, 1e-6, every=3),
    "Shampoo-sum": opt.Shampoo(0.05, (0.0, 1.0), epsilon=1e-4, graft=None, every=2),
    "Shampoo-blocks": opt.Shampoo(0.05, (0.8, 0.9), 0.1, 1e-6, every=3, block=3),
    "SOAP": opt.SOAP(0.05, (0.8, 0.9), 0.1, every=2),
    "SOAP-blocks": opt.SOAP(0.05, (0.8, 0.9), 0.1, every=2, block=3),
    "SPlus": opt.SPlus(0.3, (0.8, 0.9), 0.1, 0.7, every=2),
    "Kron": opt.Kron(0.05, 0.8, 0.1, seed=3),
    "GaLore": opt.GaLore(0.05, (0.8, 0.9), 0.1, rank=2, every=3),
    "Dion": opt.Dion(0.05, 0.8, 0.1, rank=3),
    "PolarGrad": opt.PolarGrad(0.05, 0.8, 0.1),
}
"""Rules whose steps follow from eigenvectors and their like, which are anything where gradients leave them
open, as they do for the shapes of the rows: so there are none for these.
"""

LITTLE: dict[str, opt.Rule] = {
    "Adafactor": opt.Adafactor(0.05, lam=0.1),
    "CAME": opt.CAME(0.05, (0.8, 0.9, 0.95), lam=0.1),
    "SM3": opt.SM3(0.05, 0.8),
    "APOLLO": opt.APOLLO(0.05, (0.8, 0.9), lam=0.1, rank=2, every=3),
}
"""Rules of little memory, whose state has other shapes than the parameters too."""


def name(row: Row) -> str:
    """For `pytest.mark.parametrize(..., ids=name)`."""
    return row.name


def dtype_of(text: str) -> Any:
    """The NumPy type of this name, bfloat16 included."""
    if text == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(text)


def numbers(rng: "np.random.Generator", shape: tuple[int, ...], dtype: str) -> Any:
    """Random parameters or gradients of this type."""
    a = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        a = a + 1j * rng.standard_normal(shape)
    return np.asarray(a).astype(dtype_of(dtype))
