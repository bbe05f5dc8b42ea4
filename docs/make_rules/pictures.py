"""Which way does a rule go? Its path on a curved valley, as a picture."""

import dataclasses
import io
import textwrap
from typing import Any

import numpy as np

import optimisers as opt
from docs.make_rules.texts import example
from optimisers.rule import further
from optimisers.settings import parts

START = (-1.2, 1.0)
VALLEY = 10.0
STEPS = 150


def loss(x: Any, y: Any) -> Any:
    """Rosenbrock's valley, not quite as steep as his; its minimum is at (1, 1)."""
    return (1 - x) ** 2 + VALLEY * (y - x * x) ** 2


def gradient(p: Any) -> Any:
    x, y = (float(v) for v in p)
    return np.array([-2 * (1 - x) - 4 * VALLEY * x * (y - x * x), 2 * VALLEY * (y - x * x)])


def curvature(p: Any) -> Any:
    """The diagonal of the second derivative."""
    x, y = (float(v) for v in p)
    return np.array([2 - 4 * VALLEY * (y - 3 * x * x), 2 * VALLEY])


def needs_more(rule: opt.Rule) -> bool:
    """Whether a rule takes second gradients."""
    return further(type(rule))[1] == 1


EXAMPLES = 8
"""Of how many examples a gradient is, for rules that take each for itself."""


def by_example(rule: opt.Rule) -> bool:
    """Whether a rule takes the gradients of single examples."""
    return any(isinstance(part, opt.Rule) and part.per_example for part in parts(rule))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a picture shows."""

    rule: opt.Rule
    other: opt.Rule | None = None
    """A second path, in grey, to compare with."""
    says: str = ""
    """What the second path is."""
    noise: float = 0.0
    dtype: str = "float64"
    spoilt: int = 0
    """Every how many steps a gradient is infinite."""
    average: bool = False
    """Whether the second path is the average that the rule keeps."""
    steps: int = STEPS
    matrix: bool = False
    """Whether the two parameters are a matrix of one row."""


PLAIN = opt.Descent(0.01)
PATHS: dict[str, Drawn] = {
    "Descent": Drawn(opt.Descent(0.01)),
    "Momentum": Drawn(opt.Momentum(0.005, 0.9)),
    "Nesterov": Drawn(opt.Nesterov(0.005, 0.9)),
    "SGD": Drawn(opt.SGD(0.005, 0.9)),
    "TorchRMSProp": Drawn(opt.TorchRMSProp(0.005, 0.9)),
    "TorchAdaMax": Drawn(opt.TorchAdaMax(0.3)),
    "ASGD": Drawn(opt.ASGD(0.01, 1e-4)),
    "SparseAdam": Drawn(opt.SparseAdam(0.1)),
    "Maximise": Drawn(opt.Chain(opt.Maximise(), opt.Descent(0.0005)), PLAIN, "the way down", steps=60),
    "RMSProp": Drawn(opt.RMSProp(0.03)),
    "Rprop": Drawn(opt.Rprop(0.05)),
    "AdaGrad": Drawn(opt.AdaGrad(0.4)),
    "TorchAdaGrad": Drawn(opt.TorchAdaGrad(0.4)),
    "AdaDelta": Drawn(opt.AdaDelta(0.9, 1e-4), steps=300),
    "Adam": Drawn(opt.Adam(0.1)),
    "AdamW": Drawn(opt.AdamW(0.1, lam=0.3), opt.Adam(0.1), "Adam, without decay"),
    "RAdam": Drawn(opt.RAdam(0.015, (0.9, 0.99)), steps=300),
    "TorchRAdam": Drawn(opt.TorchRAdam(0.015, (0.9, 0.99)), steps=300),
    "AdaMax": Drawn(opt.AdaMax(0.3)),
    "OAdam": Drawn(opt.OAdam(0.05)),
    "AMSGrad": Drawn(opt.AMSGrad(0.1, (0.9, 0.99))),
    "TorchAMSGrad": Drawn(opt.TorchAMSGrad(0.1, (0.9, 0.99))),
    "NAdam": Drawn(opt.NAdam(0.1)),
    "TorchNAdam": Drawn(opt.TorchNAdam(0.1)),
    "AdaBelief": Drawn(opt.AdaBelief(0.1)),
    "Lion": Drawn(opt.Lion(0.03)),
    "WeightDecay": Drawn(opt.Chain(opt.WeightDecay(0.5), PLAIN), PLAIN, "without decay", steps=600),
    "DecoupledDecay": Drawn(
        opt.Chain(opt.Adam(0.1), opt.DecoupledDecay(0.02)), opt.Adam(0.1), "without decay"
    ),
    "SignDecay": Drawn(opt.Chain(opt.SignDecay(0.5), PLAIN), PLAIN, "without decay", steps=600),
    "ClipGrad": Drawn(opt.Chain(opt.ClipGrad(2.0), opt.Descent(0.03)), opt.Descent(0.03), "without clipping"),
    "ClipNorm": Drawn(opt.Chain(opt.ClipNorm(2.0), opt.Descent(0.03)), opt.Descent(0.03), "without clipping"),
    "ClipGlobalNorm": Drawn(
        opt.Chain(opt.ClipGlobalNorm(2.0), opt.Descent(0.03)), opt.Descent(0.03), "without clipping"
    ),
    "AccumGrad": Drawn(
        opt.Chain(opt.AccumGrad(8), opt.Descent(0.03)),
        opt.Descent(0.03),
        "every gradient by itself",
        noise=3.0,
        steps=400,
    ),
    "EMA": Drawn(opt.EMA(opt.RMSProp(0.1), 0.95), None, "the average", average=True),
    "Chain": Drawn(
        opt.Chain(opt.ClipNorm(2.0), opt.WeightDecay(0.1), opt.Momentum(0.02)),
        opt.Momentum(0.02),
        "Momentum alone",
    ),
    "MixedPrecision": Drawn(
        opt.MixedPrecision(opt.Descent(0.001)),
        opt.Descent(0.001),
        "without masters",
        dtype="float16",
        steps=4000,
    ),
    "SplitPrecision": Drawn(
        opt.SplitPrecision(opt.Descent(0.001)),
        opt.Descent(0.001),
        "without masters",
        dtype="bfloat16",
        steps=4000,
    ),
    "SkipNonFinite": Drawn(opt.SkipNonFinite(opt.Momentum(0.005)), spoilt=10),
    "NAdamW": Drawn(opt.NAdamW(0.1, lam=0.0)),
    "Adan": Drawn(opt.Adan(0.03)),
    "ADOPT": Drawn(opt.ADOPT(0.1, (0.9, 0.99))),
    "AdEMAMix": Drawn(opt.AdEMAMix(0.02, (0.9, 0.999, 0.99))),
    "SimplifiedAdEMAMix": Drawn(opt.SimplifiedAdEMAMix(0.005, (0.9, 0.95))),
    "LaProp": Drawn(opt.LaProp(0.1)),
    "QHM": Drawn(opt.QHM(0.02, 0.9)),
    "QHAdam": Drawn(opt.QHAdam(0.1)),
    "StableAdamW": Drawn(opt.StableAdamW(0.1, lam=0.0)),
    "Yogi": Drawn(opt.Yogi(0.1)),
    "AdamAtan2": Drawn(opt.AdamAtan2(0.1)),
    "MADGRAD": Drawn(opt.MADGRAD(0.1)),
    "FTRL": Drawn(opt.FTRL(0.4, 1.0)),
    "LARS": Drawn(opt.LARS(20.0), steps=300),
    "LAMB": Drawn(opt.LAMB(0.05)),
    "Muon": Drawn(opt.Muon(opt.Linear(0.1, 0.0, STEPS), 0.9), matrix=True),
    "NorMuon": Drawn(opt.NorMuon(opt.Linear(0.1, 0.0, STEPS), 0.9), matrix=True),
    "AdaMuon": Drawn(opt.AdaMuon(opt.Linear(0.2, 0.0, STEPS)), matrix=True),
    "Scion": Drawn(opt.Scion(opt.Linear(0.1, 0.0, STEPS), 1.0, constrained=False), matrix=True),
    "APOLLO": Drawn(opt.APOLLO(0.1, rank=1, every=10), matrix=True),
    "PolarGrad": Drawn(opt.PolarGrad(0.02, 0.9), matrix=True),
    "SOAP": Drawn(opt.SOAP(0.1), matrix=True),
    "Shampoo": Drawn(opt.Shampoo(0.1), matrix=True),
    "SPlus": Drawn(opt.SPlus(opt.Linear(0.15, 0.0, STEPS)), matrix=True),
    "Kron": Drawn(opt.Kron(0.05), matrix=True),
    "GaLore": Drawn(opt.GaLore(0.1, scale=1.0, rank=1), matrix=True),
    "Dion": Drawn(opt.Dion(opt.Linear(0.1, 0.0, STEPS), 0.9, rank=1), matrix=True),
    "Adafactor": Drawn(opt.Adafactor(0.5)),
    "TorchAdafactor": Drawn(opt.TorchAdafactor(0.5)),
    "CAME": Drawn(opt.CAME(0.1)),
    "SM3": Drawn(opt.SM3(0.4)),
    "AdamMini": Drawn(opt.AdamMini(0.1)),
    "NovoGrad": Drawn(opt.NovoGrad(0.01)),
    "SignDescent": Drawn(opt.SignDescent(0.03)),
    "Signum": Drawn(opt.Signum(0.03)),
    "Grams": Drawn(opt.Grams(0.05)),
    "MARS": Drawn(opt.MARS(0.1, (0.9, 0.99))),
    "MARSLion": Drawn(opt.MARSLion(0.03, (0.9, 0.99))),
    "Prodigy": Drawn(opt.Prodigy(d0=0.001), steps=300),
    "DAdaptAdam": Drawn(opt.DAdaptAdam(d0=0.001), steps=300),
    "DAdaptSGD": Drawn(opt.DAdaptSGD(rho=0.9, d0=0.001), steps=300),
    "DAdaptLion": Drawn(opt.DAdaptLion(d0=0.001), steps=300),
    "DoG": Drawn(opt.DoG(reps=0.01), steps=300),
    "LDoG": Drawn(opt.LDoG(reps=0.01), steps=300),
    "DoWG": Drawn(opt.DoWG(), steps=300),
    "AdaptiveClip": Drawn(
        opt.Chain(opt.AdaptiveClip(2.0), opt.Descent(0.03)), opt.Descent(0.03), "without clipping"
    ),
    "Centralize": Drawn(opt.Chain(opt.Centralize(), opt.Descent(0.01))),
    "ZeroNonFinite": Drawn(opt.Chain(opt.ZeroNonFinite(), opt.Momentum(0.005)), spoilt=10),
    "ClipRMS": Drawn(opt.Chain(opt.ClipRMS(2.0), opt.Descent(0.03)), opt.Descent(0.03), "without clipping"),
    "NormalizeGrad": Drawn(opt.Chain(opt.NormalizeGrad(), opt.Descent(0.05)), PLAIN, "without it"),
    "NormGrowthCap": Drawn(
        opt.Chain(opt.NormGrowthCap(), opt.Descent(0.03)), opt.Descent(0.03), "without it"
    ),
    "GrokFast": Drawn(opt.Chain(opt.GrokFast(0.9), opt.Descent(0.005)), opt.Descent(0.005), "without it"),
    "OrthoGrad": Drawn(opt.Chain(opt.OrthoGrad(), opt.Descent(0.01)), PLAIN, "without it"),
    "ZClip": Drawn(opt.Chain(opt.ZClip(omega=2.0), opt.Descent(0.03)), opt.Descent(0.03), "without clipping"),
    "AdamP": Drawn(opt.AdamP(0.1)),
    "SGDP": Drawn(opt.SGDP(0.005)),
    "Sophia": Drawn(opt.Sophia(0.05, rho=1.0, lam=0.0)),
    "SophiaG": Drawn(opt.SophiaG(0.05, rho=1.0, lam=0.0)),
    "AdaHessian": Drawn(opt.AdaHessian(0.3)),
    "AddNoise": Drawn(opt.Chain(opt.AddNoise(100.0), opt.Descent(0.01)), PLAIN, "without noise"),
    "SGLD": Drawn(opt.SGLD(0.005, 0.5), steps=600),
    "PrivateAggregate": Drawn(
        opt.Chain(opt.PrivateAggregate(5.0, 2.0), opt.Descent(0.03)), PLAIN, "without it", noise=2.0
    ),
    "MoMo": Drawn(opt.MoMo(0.05)),
    "MoMoAdam": Drawn(opt.MoMoAdam(0.3)),
    "PolyakSPS": Drawn(opt.PolyakSPS()),
    "CautiousDecay": Drawn(opt.Chain(opt.Adam(0.1), opt.CautiousDecay(0.3)), opt.Adam(0.1), "without decay"),
    "CorrectedDecay": Drawn(
        opt.Chain(opt.Adam(opt.Cosine(0.1, 150)), opt.CorrectedDecay(0.3)),
        opt.Adam(opt.Cosine(0.1, 150)),
        "without decay",
    ),
    "Cautious": Drawn(opt.Cautious(opt.Momentum(0.005, 0.95)), opt.Momentum(0.005, 0.95), "without it"),
    "ScheduleFree": Drawn(opt.ScheduleFree(opt.Descent(0.03)), None, "the average", average=True, steps=300),
    "GPA": Drawn(opt.GPA(opt.Descent(0.03), mu_x=0.95), None, "the average", average=True),
    "Lookahead": Drawn(opt.Lookahead(opt.Momentum(0.01)), opt.Momentum(0.01), "without it"),
    "SWA": Drawn(opt.SWA(opt.RMSProp(0.1), 50), None, "the mean", average=True),
    "Mechanic": Drawn(opt.Mechanic(opt.Descent(0.01), 0.01), steps=300),
}
"""The path of each rule, at a rate that shows its character; a rule that is not listed takes its defaults."""


def path_of(drawn: Drawn, rule: opt.Rule) -> tuple[Any, Any]:
    """(the points of a rule, those of its average), start included, until it is far outside."""
    rng = np.random.default_rng(0)
    p = np.array([START] if drawn.matrix else START, drawn.dtype)
    state = opt.setup(rule, p, engine="interpret")
    points, averages = [np.array(START)], [np.array(START)]
    for i in range(drawn.steps):
        examples = (EXAMPLES, 2) if by_example(rule) else (2,)
        g = gradient(p.ravel()) + drawn.noise * rng.standard_normal(examples)
        if drawn.spoilt and i % drawn.spoilt == drawn.spoilt - 1:
            g[0] = np.inf
        g = g.astype(drawn.dtype).reshape((*examples[:-1], *p.shape))
        curved = [curvature(p)] if needs_more(drawn.rule) else []
        state, p = opt.update(state, p, g, *curved, loss=loss(*map(float, p.ravel())))
        points.append(np.array(p, float).ravel())
        if drawn.average:
            averages.append(np.array(opt.averaged(state, p), float))
        if not np.abs(p).max() < 10:
            break
    return np.array(points), np.array(averages)


def picture(cls: type[opt.Rule]) -> bytes:
    """The path of a rule, as a PNG of few colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = PATHS.get(cls.__name__) or Drawn(example(cls))
    points, averages = path_of(drawn, drawn.rule)
    figure = Figure(figsize=(5.2, 4.1), dpi=88, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x, y = np.meshgrid(np.linspace(-1.8, 1.8, 181), np.linspace(-0.7, 2.1, 141))
    levels = np.geomspace(0.1, 110, 8)
    axes.contour(x, y, loss(x, y), levels, colors="#b9c4cf", linewidths=0.8)
    if drawn.other is not None or drawn.average:
        second = averages if drawn.average else path_of(drawn, drawn.other or drawn.rule)[0]
        colour = "#D55E00" if drawn.average else "#7a7a7a"
        axes.plot(
            *second.T, "-", color=colour, linewidth=1.0, label=drawn.says, zorder=4 if drawn.average else 2
        )
        axes.plot(*second[-1], "s", color=colour, markersize=6, zorder=5)
    many = len(points) > 1000
    hard = f", every {drawn.spoilt}th gradient infinite" if drawn.spoilt else ""
    hard = ", noisy gradients" if drawn.noise else hard
    axes.plot(*points.T, "-" if many else ".-", color="#0072B2", linewidth=1.3, markersize=4, zorder=3)
    axes.plot(*points[0], "o", color="black", markersize=7, label="start", zorder=6)
    axes.plot(
        *points[-1], "s", color="#0072B2", markersize=7, label=f"after {len(points) - 1} updates", zorder=6
    )
    axes.plot(1, 1, "*", color="#c03030", markersize=12, label="minimum", zorder=5)
    axes.set(
        xlim=(-1.8, 1.8),
        ylim=(-0.7, 2.1),
        xlabel="first parameter",
        ylabel="second parameter",
        aspect="equal",
    )
    axes.set_title(textwrap.fill(title_of(drawn.rule) + hard, 60), fontsize=9)
    axes.legend(loc="lower center", ncols=2, fontsize=8, framealpha=0.9)
    return png(figure)


def png(figure: Any, colours: int = 12) -> bytes:
    """A figure of Matplotlib as a PNG of few colours, which is small."""
    from PIL import Image

    buffer, out = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    image = Image.open(buffer).convert("RGB")
    few = image.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(out, format="png", optimize=True)
    return out.getvalue()


def title_of(rule: opt.Rule) -> str:
    """The rule as it is written, without what stands at its default."""
    if isinstance(rule, opt.Chain):
        return f"Chain({', '.join(map(title_of, rule.rules))})"
    said: list[str] = []
    for field in dataclasses.fields(rule):
        value, default = getattr(rule, field.name), getattr(type(rule), field.name, None)
        if isinstance(value, opt.Rule):
            said.append(title_of(value))
        elif value != default or field.name == "eta":
            said.append(f"{field.name}={value!r}")
    return f"{type(rule).__name__}({', '.join(said)})"
