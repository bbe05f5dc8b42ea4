"""Is every rule right on the device? Held against the same rule in float64."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import optimisers as opt
from benchmarks.cuda.place import Place, Report, said
from benchmarks.printing import child
from benchmarks.torch_cpu import quiet
from benchmarks.torch_peers import BELIEF, BETA, ETA
from optimisers.nest import flatten, unflatten


# -- every rule against float64 ------------------------------------------------------------------------------
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


ON_DEVICE = "float32, numbers on the device"


KINDS = (*REAL, ON_DEVICE)


ULPS = {"float32": 16.0, "float64": 64.0, "bfloat16": 1.0, "float16": 1.0}
"""How far a stored number may be from that of float64, in units in its last place: one rounding where the
maths is wider than the type, and what words and sums lose where it is not.
"""


SMALLEST = 2.0**-5
"""Units in the last place are those of this number at least: what cancels has the error of what it was."""


STEPS = 3


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


@dataclasses.dataclass
class Errors:
    """The largest errors of a rule in one type, in units in the last place."""

    name: str
    kind: str
    x: float = 0.0
    state: float = 0.0
    why: str = ""
    """What went wrong; empty if nothing did."""

    def noted(self, found: torch.Tensor, expected: Any, before: Any) -> float:
        """The largest error of an array, which must be small enough."""
        dtype = str(found.dtype).removeprefix("torch.")
        far = units(found, expected, before)
        if not far <= ULPS[dtype]:
            self.why = self.why or f"{far:.3g} units in the last place of {dtype}; at most {ULPS[dtype]:g}"
        return far

    def note_state(self, found: Any, expected: Any, before: Any) -> None:
        """The same of the arrays of a state; its numbers must be right."""
        for (path, a), (_, b), (_, was) in zip(*map(flatten, (found, expected, before)), strict=True):
            if isinstance(b, np.ndarray):
                self.state = max(self.state, self.noted(a, b, was))
            elif not np.isclose(host(a), host(b), rtol=1e-6, atol=0):
                self.why = self.why or f"{path} of the state is {host(a)}, not {host(b)}"


def units(found: torch.Tensor, expected: Any, before: Any) -> float:
    """The largest error of an array in units in the last place of its type, at the larger of what it was and
    what it should be.
    """
    expected = np.asarray(expected, float)
    got = host(found)
    scale = np.maximum(np.maximum(np.abs(expected), np.abs(np.asarray(before, float))), SMALLEST)
    unit = torch.finfo(found.dtype).eps * np.exp2(np.floor(np.log2(np.where(np.isfinite(scale), scale, 1.0))))
    far = np.where(got == expected, 0.0, np.abs(got - expected) / unit)
    return float(np.max(np.where(np.isnan(far), np.inf, far), initial=0.0))


def host(value: Any) -> Any:
    return value.detach().double().cpu().numpy() if isinstance(value, torch.Tensor) else float(value)


def check_rule(case: Case, kind: str, place: Place) -> Errors:
    """Step a rule on the device and in float64 by NumPy."""
    errors = Errors(case.name, kind)
    try:
        compare(case, kind, place, errors)
    except Exception as error:  # noqa: BLE001 the table says what went wrong, and the others are still checked
        errors.why = errors.why or said(error)
    return errors


def type_of(kind: str) -> str:
    return kind.partition(",")[0]


def compare(case: Case, kind: str, place: Place, errors: Errors) -> None:
    """Take the steps and note the errors. Where numbers are kept as they are computed, each step begins with
    those of the device.
    """
    rng, stored = np.random.default_rng(0), getattr(torch, type_of(kind))
    sizes, steps = (SIZES[:-1], 2) if place.rehearse else (SIZES, STEPS)

    def drawn() -> list[torch.Tensor]:
        arrays = [torch.from_numpy(np.asarray(rng.standard_normal(s))) for s in sizes]
        return [a.to(place.name, stored) for a in arrays]

    xs = drawn()
    with quiet():
        state = opt.setup(case.rule, xs, engine=place.engine, capturable=kind == ON_DEVICE)
        exact = opt.setup(case.exact or case.rule, [host(x) for x in xs], engine="interpret")
    engine = opt.explain(state).groups[0].engine
    assert engine == "triton", f"the engine is {engine}"
    model = [host(x) for x in xs]
    for n in range(steps):
        gs = drawn()
        if case.infinite and n == 1:
            gs[0][0, 0] = math.inf
        if case.exact is None:
            model = [host(x) for x in xs]
            for to, leaf in zip(exact, state, strict=True):
                to.state = unflatten(to.state, iter([host(v) for _, v in flatten(leaf.state)]))
        old, before = exact, model
        exact, model = opt.update(exact, model, [host(g) for g in gs])
        opt.update_(state, xs, gs)
        if case.exact is None:
            for leaf, of_exact, was in zip(state, exact, old, strict=True):
                errors.note_state(leaf.state, of_exact.state, was.state)
        for x, y, was in zip(xs, model, before, strict=True) if case.exact is None or n == steps - 1 else ():
            errors.x = max(errors.x, errors.noted(x, y, was))


def check_rules(place: Place, workers: int) -> list[Errors]:
    """Check every rule in every type, in several processes that compile; in a rehearsal, of each way to check
    some rules in one type.
    """
    if place.rehearse:
        kinds = [[k for k in KINDS if type_of(k) in c.types] for c in CASES]
        return [
            check_rule(c, k[i % len(k)], place)
            for i, (c, k) in enumerate(zip(CASES, kinds, strict=True))
            if i % 5 == 0 or c.exact is not None or c.infinite
        ]
    try:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            parts = [f"{i}/{workers}" for i in range(workers)]
            found = list(pool.map(lambda part: child("check", part, module="benchmarks.cuda"), parts))
        return [Errors(**e) for f in found for e in f["errors"]]
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        print(f"the checks run in this process, since another one failed: {str(error).splitlines()[-1]}")
        return checked("0/1", place)


def checked(part: str, place: Place) -> list[Errors]:
    """Check one part of all rules."""
    begin, step = map(int, part.split("/"))
    todo = [(c, k) for c in CASES for k in KINDS if type_of(k) in c.types]
    return [check_rule(c, k, place) for c, k in todo[begin::step]]


def show_errors(found: Sequence[Errors], report: Report) -> bool:
    """The table of errors; whether all is well."""
    cells = {(e.name, e.kind): "FAILED" if e.why else f"{e.x:.2f}, {e.state:.2f}" for e in found}
    rows = [[c.name, *(cells.get((c.name, kind), "") for kind in KINDS)] for c in CASES]
    title = (
        "Every rule against float64: largest error of parameters, of state, in units in the last place; at "
        f"most {', '.join(f'{n:g} for {t}' for t, n in ULPS.items())}"
    )
    report.table(title, ["rule", *REAL, "on device"], rows)
    for e in found:
        if e.why:
            report.line(f"FAILED  {e.name}, {e.kind}: {e.why}")
    return not any(e.why for e in found)
