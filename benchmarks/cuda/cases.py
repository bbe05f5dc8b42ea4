"""The rules that are checked on a device, old and new, and how each is checked."""

import dataclasses
import math
from typing import Any, Literal

import optimisers as opt
from benchmarks.torch_peers import BELIEF, BETA, ETA


class Belief(opt.Rule):
    """AdaBelief as a user writes it."""

    eta: float = ETA
    beta: tuple[float, float] = BETA
    epsilon: float = BELIEF

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x), opt.zeros_like(x), 0.0, 0.0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        (b1, b2), (m, s, w1, w2) = self.beta, state
        m, w1 = opt.ema(b1, m, dx), opt.ema(b1, w1, 1)
        s, w2 = opt.ema(b2, s, (dx - m) ** 2) + self.epsilon, opt.ema(b2, w2, 1)
        return (m, s, w1, w2), self.eta / w1 * m / (opt.sqrt(s) / opt.sqrt(w2) + self.epsilon)


REAL = ("float32", "bfloat16", "float16", "float64")


SIZES = ((33, 65), (7,), (), (2, 1, 3), (4097,))


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule, and how it is checked."""

    name: str
    rule: opt.Rule
    types: tuple[str, ...] = REAL
    exact: opt.Rule | None = None
    """What it computes in float64, for rules that make parameters more exact than they are stored; then only
    parameters are compared, after all steps.
    """
    infinite: bool = False
    """Whether the second gradient has an infinite element."""
    sizes: tuple[tuple[int, ...], ...] = SIZES
    given: Literal["", "loss", "hessians", "examples"] = ""
    """What a step is given beside the gradients, or in their place: those of each of two examples."""
    captured: bool = True
    """Whether its numbers may lie on the device."""
    slack: float = 1.0
    """Times the error that is let pass elsewhere, for sums of products and what is iterated."""


def then_descent(rule: opt.Rule) -> opt.Rule:
    return opt.Chain(rule, opt.Descent(0.1))


NARROW = ("float32", "bfloat16", "float16")


MOMENTUM, ADAM = opt.Momentum(0.1), opt.Adam(0.05, (0.8, 0.95), 1e-6)

CASES = (
    Case("Descent", opt.Descent(0.1)),
    Case("Momentum", opt.Momentum(0.05, 0.8)),
    Case("Nesterov", opt.Nesterov(0.05, 0.8)),
    Case("SGD", opt.SGD(0.05, 0.8, 0.3)),
    Case("SGD, nesterov", opt.SGD(0.05, 0.8, nesterov=True)),
    Case("Adam", ADAM),
    Case("ASGD", opt.ASGD(0.05, 0.1, 0.75, 1.0)),
    Case("SparseAdam", opt.SparseAdam(0.05, (0.8, 0.95), 1e-3)),
    Case("AdamW", opt.AdamW(0.05, (0.8, 0.95), 0.1, 1e-6)),
    Case("AdamW, apart", opt.AdamW(0.05, (0.8, 0.95), 0.02, 1e-6, couple=False)),
    Case("RAdam", opt.RAdam(0.05, (0.8, 0.8), 1e-6)),
    Case("RAdam, torch", opt.TorchRAdam(0.05, (0.8, 0.8), 1e-6)),
    Case("AdaMax", opt.AdaMax(0.05, (0.8, 0.9), 1e-6)),
    Case("AdaMax, torch", opt.TorchAdaMax(0.05, (0.8, 0.9), 1e-3)),
    Case("OAdam", opt.OAdam(0.05, (0.6, 0.9), 1e-6)),
    Case("NAdam", opt.NAdam(0.05, (0.8, 0.9), 1e-6)),
    Case("NAdam, torch", opt.TorchNAdam(0.05, (0.8, 0.9), 1e-6)),
    Case("AMSGrad", opt.AMSGrad(0.05, (0.8, 0.9), 1e-3)),
    Case("AMSGrad, torch", opt.TorchAMSGrad(0.05, (0.8, 0.9), 1e-3)),
    Case("AdaBelief", opt.AdaBelief(0.05, (0.8, 0.9), 1e-6)),
    Case("AdaGrad", opt.AdaGrad(0.1, 1e-3)),
    Case("AdaGrad, torch", opt.TorchAdaGrad(0.1, 1e-3)),
    Case("AdaGrad, torch, decay", opt.TorchAdaGrad(0.1, 1e-3, 0.2, 0.3)),
    Case("AdaDelta", opt.AdaDelta(0.8, 1e-3)),
    Case("RMSProp", opt.RMSProp(0.05, 0.8, 1e-6)),
    Case("RMSProp, centred", opt.RMSProp(0.05, 0.8, 1e-3, centred=True)),
    Case("RMSProp, torch", opt.TorchRMSProp(0.05, 0.8, 0.7, 1e-3)),
    Case("RMSProp, torch, centred", opt.TorchRMSProp(0.05, 0.8, 0.7, 1e-3, centred=True)),
    Case("Rprop", opt.Rprop(0.05, (0.5, 1.2), (1e-3, 0.2))),
    Case("Lion", opt.Lion(0.05, (0.7919, 0.9037))),
    Case("WeightDecay", then_descent(opt.WeightDecay(0.1))),
    Case("SignDecay", then_descent(opt.SignDecay(0.1))),
    Case("DecoupledDecay", opt.Chain(opt.Momentum(0.1), opt.DecoupledDecay(0.01))),
    Case("DecoupledDecay, coupled", opt.Chain(MOMENTUM, opt.DecoupledDecay(0.1, couple=True))),
    Case("Maximise", then_descent(opt.Maximise())),
    Case("ClipGrad", then_descent(opt.ClipGrad(0.4))),
    Case("ClipNorm", then_descent(opt.ClipNorm(0.5))),
    Case("ClipNorm, p = 3", then_descent(opt.ClipNorm(0.5, 3.0))),
    Case("ClipNorm, p = inf", then_descent(opt.ClipNorm(0.5, math.inf))),
    Case("ClipGlobalNorm", then_descent(opt.ClipGlobalNorm(0.5))),
    Case("AccumGrad", then_descent(opt.AccumGrad(2))),
    Case("EMA", opt.EMA(opt.Chain(opt.ClipGlobalNorm(0.5), ADAM), 0.75)),
    Case("SkipNonFinite", opt.SkipNonFinite(MOMENTUM), infinite=True),
    Case("MixedPrecision", opt.MixedPrecision(ADAM), NARROW, exact=ADAM),
    Case("MixedPrecision, split", opt.SplitPrecision(ADAM), ("bfloat16",), exact=ADAM),
    Case("MixedPrecision(EMA)", opt.MixedPrecision(opt.EMA(MOMENTUM, 0.75)), NARROW, exact=MOMENTUM),
    Case("a rule of one's own", Belief(0.05, (0.8, 0.9), 1e-6)),
)


MATRICES = ((33, 65), (16, 16), (20, 20), (7, 40))
FULL = ((4, 4), (5, 4), (4, 5))
"""No axis is so long that gradients leave a part of it out: eigenvectors there are anything."""

FLOAT, BETAS = ("float32",), (0.8, 0.95)


def late(name: str, rule: opt.Rule, types: tuple[str, ...] = ("float32", "float64"), **how: Any) -> Case:
    """A rule that people train with today."""
    return Case(name, rule, types, **how)


def factorised(name: str, rule: opt.Rule) -> Case:
    """One whose state follows from eigenvectors and their like: only where it leads is compared."""
    return Case(name, rule, FLOAT, exact=rule, sizes=FULL, slack=64.0, captured=False)


LATER = (
    late("NAdamW", opt.NAdamW(0.05, BETAS, 0.1, 1e-6)),
    late("Adan", opt.Adan(0.05, (0.9, 0.8, 0.95), 0.1, 1e-6)),
    late("ADOPT", opt.ADOPT(0.05, BETAS, 0.1)),
    late("AdEMAMix", opt.AdEMAMix(0.05, (0.8, 0.95, 0.99), 3.0, 0.1, 1e-6, 5)),
    late("SimplifiedAdEMAMix", opt.SimplifiedAdEMAMix(0.01, (0.8, 0.9), 3.0, 0.1, 1e-6)),
    late("LaProp", opt.LaProp(0.05, BETAS, 0.1, 1e-6)),
    late("QHM", opt.QHM(0.1, 0.8, 0.5)),
    late("QHAdam", opt.QHAdam(0.05, BETAS, (0.5, 0.8), 1e-6)),
    late("StableAdamW", opt.StableAdamW(0.05, BETAS, 0.3, 1e-3)),
    late("Yogi", opt.Yogi(0.05, BETAS, 0.1, 0.01)),
    late("AdamAtan2", opt.AdamAtan2(0.05, BETAS, 0.1)),
    late("MADGRAD", opt.MADGRAD(0.1, 0.7, 0.1)),
    late("FTRL", opt.FTRL(0.1, 1.0, 0.1, 0.2)),
    late("AdamP", opt.AdamP(0.05, BETAS, 0.1, delta=2.0, nesterov=True), sizes=MATRICES),
    late("SGDP", opt.SGDP(0.05, 0.8, 0.1, delta=2.0), sizes=MATRICES),
    late("CorrectedDecay", opt.Chain(opt.Adam(opt.Cosine(0.05, 20), BETAS, 1e-6), opt.CorrectedDecay(0.3))),
    late("SignDescent", opt.SignDescent(0.05)),
    late("Signum", opt.Signum(0.05, 0.7, 0.1)),
    late("Grams", opt.Grams(0.05, BETAS, 0.1)),
    late("MARS", opt.MARS(0.05, (0.8, 0.9), 0.1, 0.1)),
    late("MARSLion", opt.MARSLion(0.05, (0.8, 0.9), 0.1, 0.1)),
    late("LARS", opt.LARS(3.0, 0.8, 0.1, 0.01, 1e-3, nesterov=True)),
    late("LAMB", opt.LAMB(0.05, BETAS, 0.1, 1e-3)),
    late("NovoGrad", opt.NovoGrad(0.05, (0.8, 0.9), 0.1)),
    late("Prodigy", opt.Prodigy(0.7, BETAS, 0.1, d0=0.01)),
    late("DAdaptAdam", opt.DAdaptAdam(0.7, BETAS, 0.1, d0=0.01, debias=True)),
    late("DAdaptSGD", opt.DAdaptSGD(0.7, 0.9, 0.1, 0.01)),
    late("DAdaptLion", opt.DAdaptLion(0.7, BETAS, 0.1, 0.01)),
    late("DoG", opt.DoG(0.7, 0.01, 0.1)),
    late("LDoG", opt.LDoG(0.7, 0.01, 0.1)),
    late("DoWG", opt.DoWG(0.7, 0.01)),
    late("Mechanic", opt.Mechanic(opt.Momentum(0.3), 0.01, 0.05, betas=4)),
    late("MoMo", opt.MoMo(), given="loss"),
    late("MoMoAdam", opt.MoMoAdam(), given="loss"),
    late("PolyakSPS", opt.PolyakSPS(), given="loss"),
    late("Sophia", opt.Sophia(0.05), given="hessians"),
    late("SophiaG", opt.SophiaG(0.05), given="hessians", slack=64.0),
    late("AdaHessian", opt.AdaHessian(0.05), given="hessians"),
    late("ScheduleFree", opt.ScheduleFree(opt.AdamW(0.1, (0.0, 0.95), 0.1, 1e-3), 0.8, warmup=4, r=0.5)),
    late("GPA", opt.GPA(opt.Adam(0.1, BETAS, 1e-3), 0.8, 0.9)),
    late("Lookahead", opt.Lookahead(opt.Momentum(0.1), 3, 0.8)),
    late("SWA", opt.SWA(opt.Momentum(0.1), 2, 2)),
    late("Cautious", opt.Cautious(ADAM)),
    late("CautiousDecay", opt.Chain(ADAM, opt.CautiousDecay(0.1))),
    late("AdaptiveClip", then_descent(opt.AdaptiveClip(0.3, 0.1)), sizes=MATRICES),
    late("Centralize", then_descent(opt.Centralize()), sizes=MATRICES),
    late("ZeroNonFinite", then_descent(opt.ZeroNonFinite()), infinite=True),
    late("ClipRMS", then_descent(opt.ClipRMS(0.3))),
    late("NormalizeGrad", then_descent(opt.NormalizeGrad(0.3, 0.01))),
    late("NormGrowthCap", then_descent(opt.NormGrowthCap(1.1))),
    late("GrokFast", then_descent(opt.GrokFast(0.7, 3.0))),
    late("OrthoGrad", then_descent(opt.OrthoGrad())),
    late("ZClip", then_descent(opt.ZClip(0.7, 0.1, math.inf, 2))),
    late("AddNoise", then_descent(opt.AddNoise(0.1, 0.5, 3))),
    late("SGLD", opt.SGLD(0.05, 0.1, 3)),
    late(
        "PrivateAggregate", then_descent(opt.PrivateAggregate(1.0, 0.5, 3)), given="examples", captured=False
    ),
    late("Muon", opt.Muon(0.05, 0.8, 0.1), FLOAT, sizes=MATRICES, slack=64.0),
    late("NorMuon", opt.NorMuon(0.05, 0.8, 0.9, 0.1), FLOAT, sizes=MATRICES, slack=64.0),
    late("AdaMuon", opt.AdaMuon(0.05, (0.8, 0.9), 0.1), FLOAT, sizes=MATRICES, slack=64.0),
    late("Scion", opt.Scion(0.05, 2.0, 0.3), FLOAT, sizes=MATRICES, slack=64.0),
    late("Adafactor", opt.Adafactor(0.5, -0.6, 0.1, scale_epsilon=0.5), FLOAT, sizes=MATRICES),
    late("Adafactor, torch", opt.TorchAdafactor(0.5, -0.6, 1.5, 0.1, 0.5, 1e-3), FLOAT, sizes=MATRICES),
    late("CAME", opt.CAME(0.05, (0.8, 0.9, 0.95), 0.1, 0.7), FLOAT, sizes=MATRICES),
    late("SM3", opt.SM3(0.05, 0.8, 1e-3), FLOAT, sizes=MATRICES),
    late("AdamMini", opt.AdamMini(0.05, BETAS, 0.1, 1e-3, "rows"), FLOAT, sizes=MATRICES),
    late(
        "APOLLO",
        opt.APOLLO(0.05, BETAS, 0.1, 1e-3, rank=2, every=2),
        FLOAT,
        sizes=MATRICES,
        slack=64.0,
        captured=False,
    ),
    factorised("Shampoo", opt.Shampoo(0.05, (0.8, 0.9), 0.1, 0.1, every=3)),
    factorised("SOAP", opt.SOAP(0.05, (0.8, 0.9), 0.1, every=2)),
    factorised("SPlus", opt.SPlus(0.3, (0.8, 0.9), 0.1, 0.7, every=2)),
    factorised("Kron", opt.Kron(0.05, 0.8, 0.1, seed=3)),
    factorised("GaLore", opt.GaLore(0.05, (0.8, 0.9), 0.1, rank=2, every=3)),
    factorised("Dion", opt.Dion(0.05, 0.8, 0.1, rank=3)),
    factorised("PolarGrad", opt.PolarGrad(0.05, 0.8, 0.1)),
)
"""The rules that came later, each in one or two types; the types are those of the kernels, which the cases
above have met.
"""
