"""Is every rule right on the device? Held against the same rule in float64."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import optimisers as opt
from benchmarks.cuda.cases import CASES, LATER, REAL, Case
from benchmarks.cuda.place import Place, said
from benchmarks.printing import Report, child
from benchmarks.torch_cpu import quiet
from optimisers.nest import flatten, unflatten

# -- every rule against float64 -----------------------------------------------------------------------------
ALL = (*CASES, *LATER)


ON_DEVICE = "float32, numbers on the device"


KINDS = (*REAL, ON_DEVICE)


ULPS = {"float32": 16.0, "float64": 64.0, "bfloat16": 1.0, "float16": 1.0}
"""How far a stored number may be from that of float64, in units in its last place: one rounding where the
maths is wider than the type, and what words and sums lose where it is not.
"""


SMALLEST = 2.0**-5
"""Units in the last place are those of this number at least: what cancels has the error of what it was."""


STEPS, EXAMPLES = 3, 2


@dataclasses.dataclass
class Errors:
    """The largest errors of a rule in one type, in units in the last place."""

    name: str
    kind: str
    x: float = 0.0
    state: float = 0.0
    why: str = ""
    """What went wrong; empty if nothing did."""
    slack: float = 1.0
    """Times the error that is let pass."""

    def noted(self, found: torch.Tensor, expected: Any, before: Any) -> float:
        """The largest error of an array, which must be small enough."""
        dtype = str(found.dtype).removeprefix("torch.")
        far = units(found, expected, before)
        most = self.slack * ULPS[dtype]
        if not far <= most:
            self.why = self.why or f"{far:.3g} units in the last place of {dtype}; at most {most:g}"
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
    errors = Errors(case.name, kind, slack=case.slack)
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
    sizes, steps = (
        ([s for s in case.sizes if math.prod(s) < 4000], 2) if place.rehearse else (case.sizes, STEPS)
    )
    front = (EXAMPLES,) if case.given == "examples" else ()
    loss = 1.5 if case.given == "loss" else None

    def drawn(*front: int) -> list[torch.Tensor]:
        arrays = [torch.from_numpy(np.asarray(rng.standard_normal((*front, *s)))) for s in sizes]
        return [a.to(place.name, stored) for a in arrays]

    xs = drawn()
    with quiet():
        state = opt.setup(case.rule, xs, engine=place.engine, capturable=kind == ON_DEVICE)
        exact = opt.setup(case.exact or case.rule, [host(x) for x in xs], engine="interpret")
    engine = opt.explain(state).groups[0].engine
    assert engine == "triton", f"the engine is {engine}"
    model = [host(x) for x in xs]
    for n in range(steps):
        gs, further = drawn(*front), [drawn()] if case.given == "hessians" else []
        if case.infinite and n == 1:
            gs[0][0, 0] = math.inf
        if case.exact is None:
            model = [host(x) for x in xs]
            for to, leaf in zip(exact, state, strict=True):
                to.state = unflatten(to.state, iter([host(v) for _, v in flatten(leaf.state)]))
        old, before = exact, model
        exact, model = opt.update(
            exact, model, *([host(g) for g in each] for each in (gs, *further)), loss=loss
        )
        opt.update_(state, xs, gs, *further, loss=loss)
        if case.exact is None:
            for leaf, of_exact, was in zip(state, exact, old, strict=True):
                errors.note_state(leaf.state, of_exact.state, was.state)
        for x, y, was in zip(xs, model, before, strict=True) if case.exact is None or n == steps - 1 else ():
            errors.x = max(errors.x, errors.noted(x, y, was))


def kinds_of(case: Case) -> list[str]:
    """The ways to check a rule: its types, and numbers on the device."""
    return [k for k in KINDS if type_of(k) in case.types and (case.captured or k != ON_DEVICE)]


def check_rules(place: Place, workers: int) -> list[Errors]:
    """Check every rule in every type, in several processes that compile; in a rehearsal, of each way to check
    some rules in one type.
    """
    if place.rehearse:
        kinds = [kinds_of(c) for c in ALL]
        return [
            check_rule(c, k[i % len(k)], place)
            for i, (c, k) in enumerate(zip(ALL, kinds, strict=True))
            if i % (5 if c in CASES else 15) == 0 or (c in CASES and (c.exact is not None or c.infinite))
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
    todo = [(c, k) for c in ALL for k in kinds_of(c)]
    return [check_rule(c, k, place) for c, k in todo[begin::step]]


def show_errors(found: Sequence[Errors], report: Report) -> bool:
    """The table of errors; whether all is well."""
    cells = {(e.name, e.kind): "FAILED" if e.why else f"{e.x:.2f}, {e.state:.2f}" for e in found}
    rows = [[c.name, *(cells.get((c.name, kind), "") for kind in KINDS)] for c in ALL]
    title = (
        "Every rule against float64: largest error of parameters, of state, in units in the last place; at "
        f"most {', '.join(f'{n:g} for {t}' for t, n in ULPS.items())}, and more where matrices are multiplied"
    )
    report.table(title, ["rule", *REAL, "on device"], rows)
    for e in found:
        if e.why:
            report.line(f"FAILED  {e.name}, {e.kind}: {e.why}")
    return not any(e.why for e in found)
