"""The golden trajectories of the modern rules: which rule of ours walks each case, and where it leads.

A case has the form of `golden/modern_rules.json`: `rule_settings` (the rule and its settings in the words of
the formulas), `x0`, `grads`, `inputs` where the rule takes more than gradients, and what a package made of
them. `run(case, library)` walks it by our rule; a case that shows a mistake of a package, or a rule that is
not here, gives a sentence instead.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import optimisers as opt

Settings = dict[str, Any]

LIBRARIES = ("numpy", "torch", "jax")

CASES: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("golden").joinpath("modern_rules.json").read_text()
)


def run(
    case: Mapping[str, Any], library: str, engine: str | None = None
) -> "tuple[list[list[Any]], list[list[Any]] | None] | str":
    """(parameters after each step, those to evaluate with after each step or None where they are the same),
    as NumPy arrays; or why our rules do not walk this case.
    """
    rule = chosen(case)
    if isinstance(rule, str):
        return rule
    with precise(library):
        return walked(rule, case, FACES[library], engine)


def chosen(case: Mapping[str, Any]) -> Any:
    """Our rule for a case, or a dict of them by name of the array; or why there is none."""
    given = case.get("rule_settings")
    if given is None:
        return case.get("note") or "it has no settings in the words of the formulas"
    return rule_of(given, [np.shape(x) for x in case["x0"]])


def walked(
    rule: Any, case: Mapping[str, Any], face: "Face", engine: str | None
) -> "tuple[list[list[Any]], list[list[Any]] | None]":
    """The same, by one rule in one library."""
    dtype = case.get("dtype", "float64")
    names = [f"x{i}" for i in range(len(case["x0"]))]

    def tree(values: list[Any]) -> dict[str, Any]:
        return dict(zip(names, (face.array(np.array(v, dtype)) for v in values), strict=True))

    model = tree(case["x0"])
    state, step = opt.setup(rule, model, engine=engine), face.step()
    further = hessians(case)
    xs: list[list[Any]] = []
    evaluated: list[list[Any]] = []
    losses = case.get("inputs", {}).get("losses", [None] * len(further))
    for grads, more, loss in zip(case["grads"], further, losses, strict=True):
        state, model = step(state, model, tree(grads), *(h and tree(h) for h in more), loss=loss)
        xs.append([face.numpy(model[n]) for n in names])
        if "eval_xs" in case:
            shown = opt.averaged(state, model)
            evaluated.append([face.numpy(shown[n]) for n in names])
    return xs, evaluated or None


def hessians(case: Mapping[str, Any]) -> list[list[Any]]:
    """The second gradients of each step, where the case has them: one set, or None at a step without an
    estimate.
    """
    given = case.get("inputs", {}).get("hessians")
    if given is None:
        return [[] for _ in case["grads"]]
    every = case["rule_settings"].get("every", 1)
    return [[h if t % every == 0 else None] for t, h in enumerate(given)]


# -- libraries -----------------------------------------------------------------------------------------------


class Face:
    """How arrays enter a library and come back, and what steps them: under JAX inside a `jit` of its own."""

    def __init__(
        self,
        array: Callable[[Any], Any],
        numpy: Callable[[Any], Any],
        step: Callable[[], Callable[..., Any]] = lambda: opt.update,
    ) -> None:
        self.array, self.numpy, self.step = array, numpy, step


def _torch(a: Any) -> Any:
    import torch

    return torch.from_numpy(a.copy())


def _jax(a: Any) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(a)


def _jitted() -> Any:
    import jax

    return jax.jit(opt.update)


FACES = {
    "numpy": Face(np.array, np.array),
    "torch": Face(_torch, lambda x: x.detach().numpy().copy()),
    "jax": Face(_jax, np.asarray, _jitted),
}


def precise(library: str) -> Any:
    """A scope in which the library keeps float64."""
    if library != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


# -- rules ---------------------------------------------------------------------------------------------------


def rule_of(given: Mapping[str, Any], shapes: list[tuple[int, ...]]) -> Any:
    """Our rule for settings in the words of the formulas, or why there is none."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "rule"}
    name, fields = given["rule"], getattr(getattr(opt, given["rule"], None), "_fields", ())
    if "couple" not in fields and settings.pop("couple", False):
        rest = {k: v for k, v in given.items() if k not in ("couple", "lam")}
        rule = rule_of({**rest, "lam": 0.0} if "lam" in fields else rest, shapes)
        return rule if isinstance(rule, str) else opt.Chain(opt.WeightDecay(settings["lam"]), rule)
    if name in BUILT:
        return BUILT[name](settings, shapes)
    if not fields:
        return f"{name} is not among the rules of the library"
    return plain(getattr(opt, name), settings)


def plain(cls: Any, settings: Settings, **names: str) -> Any:
    """A rule whose settings are those of the formula, some under other names."""
    renamed = {names.get(k, k): v for k, v in settings.items()}
    unknown = [k for k in renamed if k not in cls._fields]
    return f"{cls.__name__} has no {', '.join(unknown)}" if unknown else cls(**renamed)


def before(cls: Any, **names: str) -> Callable[[Settings, Any], Any]:
    """A rule that changes the gradient, before plain descent."""

    def make(settings: Settings, _: Any) -> Any:
        rate = settings.pop("eta", 1.0)
        rule = plain(cls, settings, **names)
        return rule if isinstance(rule, str) else opt.Chain(rule, opt.Descent(rate))

    return make


def refused(
    why: str, *unless: str
) -> Callable[[Callable[[Settings, Any], Any]], Callable[[Settings, Any], Any]]:
    """A builder that answers `why` where one of some settings is there and true."""

    def around(make: Callable[[Settings, Any], Any]) -> Callable[[Settings, Any], Any]:
        def checked(settings: Settings, shapes: Any) -> Any:
            if any(settings.pop(name, False) for name in unless):
                return why
            return make(settings, shapes)

        return checked

    return around


def simply(cls: Any, **names: str) -> Callable[[Settings, Any], Any]:
    return lambda settings, _: plain(cls, settings, **names)


def prodigy(settings: Settings, _: Any) -> Any:
    if settings.pop("clamp", None) == "max" and settings.get("growth", math.inf) != math.inf:
        return "the estimate is not bounded by its growth"
    return plain(opt.Prodigy, settings)


def ademamix(settings: Settings, _: Any) -> Any:
    settings["warmup"] = settings.get("warmup") or 0
    return plain(opt.AdEMAMix, settings)


def stable(settings: Settings, _: Any) -> Any:
    floor, epsilon = settings.pop("floor", None), settings.get("epsilon", 1e-6)
    if floor is not None and not math.isclose(floor, epsilon**2):
        return "the mean square is bounded by another number than epsilon^2"
    return plain(opt.StableAdamW, settings)


def mars(settings: Settings, shapes: list[tuple[int, ...]]) -> Any:
    variant, first = settings.pop("variant", "adamw"), settings.pop("first", "zero")
    everything = settings.pop("one_d", False)
    vector = {k: settings.pop(f"{k}_1d", v) for k, v in (("eta", 0.003), ("beta", (0.9, 0.95)), ("lam", 0.1))}
    cls = {"adamw": opt.MARS, "lion": opt.MARSLion}[variant]
    rule = plain(cls, {**settings, "from_zero": first == "zero"})
    if everything or all(len(shape) > 1 for shape in shapes):
        return rule
    other = opt.AdamW(vector["eta"], vector["beta"], vector["lam"])
    return {f"x{i}": rule if len(shape) > 1 else other for i, shape in enumerate(shapes)}


def lars(settings: Settings, _: Any) -> Any:
    always = settings.pop("always", False)
    if settings.pop("variant", None) in ("timm", "paper"):
        if not settings.get("lam") and not always:
            return "without decay there is no trust ratio: that is SGD"
        settings["apart"] = True
    return plain(opt.LARS, settings)


def lamb(settings: Settings, _: Any) -> Any:
    if settings.pop("debias", True) is False or settings.pop("limit", None) is not None:
        return "without bias correction, and with |x| limited to 10: a misreading of the first version"
    most, always = settings.pop("max_norm", None), settings.pop("always", True)
    if not always and not settings.get("lam"):
        kept = {k: v for k, v in settings.items() if k != "lam"}
        rule = plain(opt.Adam, {"epsilon": 1e-6, **kept})
    else:
        rule = plain(opt.LAMB, settings)
    return rule if most is None or isinstance(rule, str) else opt.Chain(opt.ClipGlobalNorm(most), rule)


def adamc(settings: Settings, _: Any) -> Any:
    eta, falls, most = settings.pop("eta"), settings.pop("falls", 0.0), settings.pop("most")
    lam = settings.pop("lam", 0.0)
    rate = (lambda clock: eta * (1 - falls * clock)) if falls else eta
    rule = plain(opt.Adam, {"eta": rate, **settings})
    return rule if isinstance(rule, str) else opt.Chain(rule, opt.CorrectedDecay(lam, most))


def asgd(settings: Settings, _: Any) -> Any:
    lam = settings.pop("lam", 0.0)
    rule = plain(opt.ASGD, settings, decay="lambd")
    return rule if isinstance(rule, str) or not lam else opt.Chain(opt.WeightDecay(lam), rule)


def by_loss(cls: Any) -> Callable[[Settings, Any], Any]:
    return lambda settings, _: plain(cls, {"proximal": False, **settings})


def sophia(settings: Settings, _: Any) -> Any:
    settings.pop("every", None)
    variant = settings.pop("variant", None)
    if variant == "G":
        return plain(opt.SophiaG, settings)
    if variant == "H":
        settings |= {"debias": True, "late": True}
    return plain(opt.Sophia, settings)


def laprop(settings: Settings, _: Any) -> Any:
    if settings.pop("decay_first", True) is False and settings.get("lam"):
        return "the decay comes after the step"
    return plain(opt.LaProp, settings)


def zclip(settings: Settings, shapes: Any) -> Any:
    if "omega" in settings and settings["omega"] is None:
        settings["omega"] = math.inf
    return before(opt.ZClip, beta="rho")(settings, shapes)


def base_of(given: Mapping[str, Any], eta: float, lam: float) -> Any:
    """The rule inside a wrapper, with the rate and decay of the case."""
    name, eta = given["rule"], given.get("eta", eta)
    beta, epsilon = tuple(given.get("beta", ())), given.get("epsilon", 1e-8)
    built: dict[str, Callable[[], Any]] = {
        "SGD": lambda: opt.Chain(opt.WeightDecay(lam), opt.Descent(eta)) if lam else opt.Descent(eta),
        "RMS": lambda: opt.AdamW(eta, (0.0, given["beta2"]), lam, epsilon),
        "Adam": lambda: opt.AdamW(eta, beta, lam, epsilon),
        "Lion": lambda: opt.Lion(eta, beta),
        "Adam outside": lambda: EARLY,
        "NAdamW_timm": lambda: "one bias correction serves both momenta",
    }
    if name in built:
        return built[name]()
    fields = getattr(getattr(opt, name, None), "_fields", ())
    return rule_of({k: v for k, v in {"eta": eta, "lam": lam}.items() if k in fields} | {**given}, [])


def cautious(settings: Settings, _: Any) -> Any:
    if settings.get("fill", "mean") != "mean":
        return "the mask is made up for otherwise than by its mean"
    base = base_of(settings["base"], settings["eta"], 0.0)
    if isinstance(base, str):
        return base
    return opt.Chain(opt.Cautious(base), opt.DecoupledDecay(settings.get("lam", 0.0), couple=True))


def around(cls: Any) -> Callable[[Settings, Any], Any]:
    """A wrapper whose case names the rule inside, and its rate and decay beside it."""

    def make(settings: Settings, _: Any) -> Any:
        base = base_of(settings.pop("base"), settings.pop("eta", 1.0), settings.pop("lam", 0.0))
        if isinstance(base, str):
            return base
        unknown = [k for k in settings if k not in cls._fields]
        return f"{cls.__name__} has no {', '.join(unknown)}" if unknown else cls(base, **settings)

    return make


def mechanic(settings: Settings, _: Any) -> Any:
    base = base_of(settings.pop("base"), 1.0, 0.0)
    return base if isinstance(base, str) else opt.Mechanic(base, **settings)


def orthogonal(cls: Any, **at_first: Any) -> Callable[[Settings, Any], Any]:
    """A rule that makes matrices orthogonal, and its settings where a case has none."""

    def make(settings: Settings, _: Any) -> Any:
        if settings.pop("add", False):
            return "epsilon is added to the norm, where ours bounds it"
        given = settings.get("coefficients", "")
        if not isinstance(given, str):
            settings["coefficients"] = (given,) if isinstance(given[0], float) else tuple(map(tuple, given))
        return plain(cls, at_first | settings, beta2="beta")

    return make


class Late(opt.Rule):
    """A rule whose decay comes after the step, as some packages have it: x = (x - dx') (1 - rate lam)."""

    whole = True

    rule: opt.Rule
    rate: float = 0.0
    scale: Callable[[tuple[int, ...]], float] = opt.static(lambda _: 1.0)
    """By what the rate is multiplied for arrays of a shape."""
    lam: float = 0.0
    from_: int = opt.static(0)
    """How many gradients are not followed by a decay."""

    def init(self, x: Any) -> Any:
        return self.rule.init(x), 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        inner, step = self.rule.apply(state[0], x, dx)
        part = opt.where(state[1] >= self.from_, self.scale(x.shape) * self.rate * self.lam, 0.0)
        return (inner, state[1] + 1), step + part * (x - step)

    def evaluate(self, state: Any, x: Any) -> Any:
        return self.rule.evaluate(state[0], x) if hasattr(self.rule, "evaluate") else x


def soap(settings: Settings, _: Any) -> Any:
    lam = settings.pop("lam", 0.0)
    rule = plain(opt.SOAP, settings | {"lam": 0.0}, one_d="vectors")
    return rule if isinstance(rule, str) else Late(rule, settings["eta"], lam=lam, from_=1)


def splus(settings: Settings, _: Any) -> Any:
    eta, lam = settings["eta"], settings.pop("lam", 0.01)
    rule = plain(opt.SPlus, settings | {"lam": 0.0}, ema="rho")
    if isinstance(rule, str):
        return rule
    return Late(rule, eta, lambda shape: 2 / sum(shape) if len(shape) == 2 else 1e-3, lam)


def galore(settings: Settings, _: Any) -> Any:
    lam = settings.pop("lam", 0.0)
    rule = plain(opt.GaLore, settings)
    return rule if isinstance(rule, str) else Late(rule, settings["eta"], lam=lam)


def shampoo(settings: Settings, _: Any) -> Any:
    lam = settings.pop("lam", 0.0)
    if settings.pop("debias", False):
        beta = settings.pop("beta1"), settings.pop("beta2")
        return plain(opt.Shampoo, {"beta": beta, "lam": lam, "every": 1} | settings)
    sums = {"beta": (0.0, 1.0), "epsilon": 1e-6, "graft": None, "every": 1}
    rule = plain(opt.Shampoo, sums | settings)
    return rule if isinstance(rule, str) or not lam else opt.Chain(opt.WeightDecay(lam), rule)


def dion(settings: Settings, _: Any) -> Any:
    return plain(opt.Dion, {"start": "identity"} | settings)


def adafactor(settings: Settings, _: Any) -> Any:
    cls = opt.TorchAdafactor if settings.pop("variant", None) == "torch" else opt.Adafactor
    if "decay" in settings:
        settings["decay"] = -settings["decay"]
    return plain(cls, settings, scale="scaled", beta1="rho", beta2_cap="cap", axes="factor")


EARLY = "epsilon is added before the bias correction"

BUILT: dict[str, Callable[[Settings, Any], Any]] = {
    "Muon": orthogonal(opt.Muon),
    "NorMuon": orthogonal(opt.NorMuon),
    "AdaMuon": orthogonal(opt.AdaMuon),
    "Scion": orthogonal(opt.Scion, rho=1.0, constrained=False),
    "SOAP": soap,
    "SPlus": splus,
    "Shampoo": shampoo,
    "GaLore": galore,
    "Dion": dion,
    "Kron": refused("the noise that keeps the factors regular stays in the step", "noisy_step")(
        simply(opt.Kron)
    ),
    "Adafactor": adafactor,
    "Prodigy": prodigy,
    "AdEMAMix": ademamix,
    "StableAdamW": stable,
    "MARS": mars,
    "LARS": lars,
    "LAMB": lamb,
    "AdamC": adamc,
    "ASGD": asgd,
    "MoMo": by_loss(opt.MoMo),
    "MoMoAdam": by_loss(opt.MoMoAdam),
    "Sophia": sophia,
    "LaProp": laprop,
    "ZClip": zclip,
    "Cautious": cautious,
    "ScheduleFree": around(opt.ScheduleFree),
    "GPA": around(opt.GPA),
    "Lookahead": around(opt.Lookahead),
    "SWA": around(opt.SWA),
    "Mechanic": mechanic,
    "Grams": refused(EARLY, "outside")(simply(opt.Grams)),
    "SGDP": refused("its projection changes the momentum too", "in_place")(simply(opt.SGDP)),
    "Adan_optax": lambda *_: "1 - beta[1] stands where the paper has beta[1]",
    "NAdamW_timm": lambda *_: "one bias correction serves both momenta",
    "AdaptiveClip": before(opt.AdaptiveClip, clip="omega"),
    "Centralize": before(opt.Centralize),
    "ClipRMS": before(opt.ClipRMS),
    "NormalizeGrad": before(opt.NormalizeGrad),
    "GrokFast": before(opt.GrokFast, beta="rho"),
    "OrthoGrad": before(opt.OrthoGrad),
}
