"""How fast are steps on a CUDA device, beside torch.optim and Optax, and are they right there?

    PYTHONPATH=src python -m benchmarks.cuda [--only gpt2 xl small resnet18] [--rows adamw recipe own]
                                             [--out FILE]

It first checks every rule against float64, and what only a device can show: CUDA graphs, a GradScaler, steps
that wait for nobody; a failure ends it. Then it times, in turn and in one process, and judges targets.
`--compile` adds peers that compile for minutes, `--tune` tries other sizes of blocks. `--rehearse` runs the
same code on the CPU, by Triton's interpreter and on six small arrays: nothing that it prints is a
measurement.

ms: several steps one after the other, from an idle device until it is idle again, over their number.
device ms: one step that stands in the queue before the device comes to it, by CUDA events.
of copy: the bytes that our step moves, over ms, as a share of what copying a large array moves in that time.
host us: until the call of one step returns.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime as dt
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import optimisers as opt
from benchmarks import shapes
from benchmarks.numpy_engine import child, show, verdict
from benchmarks.timing import Timings, interleaved, judged
from benchmarks.torch_cpu import (
    BELIEF,
    BETA,
    EPSILON,
    ETA,
    LAM,
    NORM,
    RHO,
    belief_foreach,
    quiet,
    torch_adamw,
)
from optimisers.nest import flatten, unflatten
from optimisers.step.update import update_scaled

Step = Callable[[], object]
Table = list[list[str]]

SCALE = 1024.0
"""By which the gradients of the recipe are too large."""

CHECKED = 4
"""Steps after which all ways must have the same numbers."""

WARM = 3
"""Steps before a step is noted in a CUDA graph."""

NEEDS = "needs a device"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where tensors lie: on a device, or on the CPU in a rehearsal."""

    name: str

    @property
    def rehearse(self) -> bool:
        return self.name == "cpu"

    @property
    def engine(self) -> str | None:
        """What `setup` is asked for; a device has the kernels without asking."""
        return "triton" if self.rehearse else None

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    def wait(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def free(self) -> float:
        """Bytes of memory that nobody has."""
        if self.rehearse:
            return math.inf
        gc.collect()
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])

    @contextlib.contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Here torch raises for whatever waits for the device."""
        if self.rehearse:
            yield
            return
        self.wait()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Report:
    """What is printed, and written as Markdown too if a file is named."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.text = out, ""

    def line(self, text: str) -> None:
        print(text)
        self.keep(text + "\n\n")

    def table(self, title: str, head: Sequence[str], rows: Table) -> None:
        show(title, head, rows)
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
        self.keep(f"**{title}**\n\n" + "\n".join(lines) + "\n\n")

    def keep(self, text: str) -> None:
        self.text += text
        if self.out is not None:  # a run that is cut short leaves what it has
            self.out.write_text(self.text)


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
    Case("Adam", ADAM),
    Case("AdamW", opt.AdamW(0.05, (0.8, 0.95), 0.1, 1e-6)),
    Case("AdamW, apart", opt.AdamW(0.05, (0.8, 0.95), 0.02, 1e-6, couple=False)),
    Case("RAdam", opt.RAdam(0.05, (0.8, 0.8), 1e-6)),
    Case("RAdam, torch", opt.RAdam(0.05, (0.8, 0.8), 1e-6, variant="torch")),
    Case("AdaMax", opt.AdaMax(0.05, (0.8, 0.9), 1e-6)),
    Case("OAdam", opt.OAdam(0.05, (0.6, 0.9), 1e-6)),
    Case("NAdam", opt.NAdam(0.05, (0.8, 0.9), 1e-6)),
    Case("NAdam, torch", opt.NAdam(0.05, (0.8, 0.9), 1e-6, variant="torch")),
    Case("AMSGrad", opt.AMSGrad(0.05, (0.8, 0.9), 1e-3)),
    Case("AMSGrad, torch", opt.AMSGrad(0.05, (0.8, 0.9), 1e-3, variant="torch")),
    Case("AdaBelief", opt.AdaBelief(0.05, (0.8, 0.9), 1e-6)),
    Case("AdaGrad", opt.AdaGrad(0.1, 1e-3)),
    Case("AdaGrad, torch", opt.AdaGrad(0.1, 1e-3, variant="torch")),
    Case("AdaDelta", opt.AdaDelta(0.8, 1e-3)),
    Case("RMSProp", opt.RMSProp(0.05, 0.8, 1e-6)),
    Case("RMSProp, centred", opt.RMSProp(0.05, 0.8, 1e-3, centred=True)),
    Case("Rprop", opt.Rprop(0.05, (0.5, 1.2), (1e-3, 0.2))),
    Case("Lion", opt.Lion(0.05, (0.7919, 0.9037))),
    Case("WeightDecay", then_descent(opt.WeightDecay(0.1))),
    Case("SignDecay", then_descent(opt.SignDecay(0.1))),
    Case("DecoupledDecay", opt.Chain(opt.Momentum(0.1), opt.DecoupledDecay(0.01))),
    Case("ClipGrad", then_descent(opt.ClipGrad(0.4))),
    Case("ClipNorm", then_descent(opt.ClipNorm(0.5))),
    Case("ClipNorm, p = 3", then_descent(opt.ClipNorm(0.5, 3.0))),
    Case("ClipNorm, p = inf", then_descent(opt.ClipNorm(0.5, math.inf))),
    Case("ClipGlobalNorm", then_descent(opt.ClipGlobalNorm(0.5))),
    Case("AccumGrad", then_descent(opt.AccumGrad(2))),
    Case("EMA", opt.EMA(opt.Chain(opt.ClipGlobalNorm(0.5), ADAM), 0.75)),
    Case("SkipNonFinite", opt.SkipNonFinite(MOMENTUM), infinite=True),
    Case("MixedPrecision", opt.MixedPrecision(ADAM), NARROW, exact=ADAM),
    Case("MixedPrecision, split", opt.MixedPrecision(ADAM, split=True), ("bfloat16",), exact=ADAM),
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


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]


def check_rules(place: Place, workers: int) -> list[Errors]:
    """Check every rule in every type, in several processes that compile; in a rehearsal, in one type."""
    if place.rehearse:
        kinds = [[k for k in KINDS if type_of(k) in c.types] for c in CASES]
        return [
            check_rule(c, k[i % len(k)], place) for i, (c, k) in enumerate(zip(CASES, kinds, strict=True))
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


# -- what only a device can show -----------------------------------------------------------------------------


def graphed(step: Step, place: Place) -> Step:
    """A replay of the step in a CUDA graph, after `WARM` steps without; in a rehearsal, the step."""
    if place.rehearse:
        for _ in range(WARM):
            step()
        return step
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other libraries have threads too
        step()
    return graph.replay


class Lesson:
    """A small network, and what it is to learn."""

    def __init__(self, place: Place) -> None:
        torch.manual_seed(0)
        layers = torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4)
        self.module = torch.nn.Sequential(*layers).to(place.name)
        self.inputs, self.wanted = (torch.randn(64, n, device=place.name) for n in (16, 4))

    def loss(self) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.module(self.inputs), self.wanted)

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.module.parameters()]


def near(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], atol: float = 1e-4) -> None:
    """What a small gradient loses by another order of sums, a moment makes large: so much is let pass."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def clipped(eta: float = 1e-2) -> opt.Rule:
    return opt.Chain(opt.ClipGlobalNorm(0.5, throw=False), opt.AdamW(eta, lam=LAM))


def graph_of_train_step(place: Place) -> None:
    captured, eager = Lesson(place), Lesson(place)
    states = {
        captured: opt.setup(clipped(), captured.module, engine=place.engine, capturable=True),
        eager: opt.setup(clipped(), eager.module, engine=place.engine),
    }

    def train(lesson: Lesson) -> None:
        lesson.module.zero_grad(set_to_none=True)
        lesson.loss().backward()
        opt.update_(states[lesson], lesson.module, opt.gradients(lesson.module))

    replay = graphed(lambda: train(captured), place)
    for _ in range(WARM):
        train(eager)
    for eta in (1e-3, 1e-2, 1e-4):
        for state in states.values():
            opt.adjust_(state, eta)
        before = captured.values()
        for _ in range(3):
            replay()
            train(eager)
        near(captured.values(), eager.values())
        moved = max(float((a - b).abs().max()) for a, b in zip(captured.values(), before, strict=True))
        assert eta / 10 < moved < 10 * eta, f"with a rate of {eta} the replays moved by {moved:.1e}"


def scaler_skips_without_waiting(place: Place) -> None:
    scaled, plain = Lesson(place), Lesson(place)
    optimizer = opt.TorchOptimizer(scaled.module, clipped(), engine=place.engine, capturable=True)
    other = opt.TorchOptimizer(plain.module, clipped(), engine=place.engine)
    scaler = torch.amp.GradScaler(place.kind, init_scale=SCALE)
    for n in range(5):
        optimizer.zero_grad()
        other.zero_grad()
        scaler.scale(scaled.loss()).backward()
        infinite = n == 3
        if infinite:
            next(iter(scaled.module.parameters())).grad.fill_(math.inf)
        before = [*scaled.values(), *states_of(optimizer)]
        with place.unsynchronised() if n > 1 else contextlib.nullcontext():
            scaler.step(optimizer)
            scaler.update()
        if infinite:
            after = [*scaled.values(), *states_of(optimizer)]
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert same, "an infinite gradient moved parameters or state"
            assert scaler.get_scale() == SCALE / 2, "the scaler did not hear of the infinite gradient"
        else:
            plain.loss().backward()
            other.step()
            near(scaled.values(), plain.values())


def states_of(optimizer: opt.TorchOptimizer) -> list[torch.Tensor]:
    """All arrays and numbers of the state."""
    leaves = [optimizer.tree[name].state for name in optimizer.parameters]
    found = [v for state in leaves for _, v in flatten(state)]
    return [torch.as_tensor(v).detach().clone() for v in found]


def misaligned(place: Place) -> None:
    sizes = (4097, 1024, 3, 5000)

    def placed(offset: int, seed: int) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        arrays = [torch.randn(n, generator=draw) for n in sizes]
        room = [torch.zeros(n + 8, device=place.name) for n in sizes]
        found = [r[offset : offset + n] for r, n in zip(room, sizes, strict=True)]
        for to, a in zip(found, arrays, strict=True):
            to.copy_(a)
        return found

    ends: list[list[torch.Tensor]] = []
    for of_x, of_dx in ((0, 0), (1, 0), (0, 3), (2, 1)):
        xs = placed(of_x, 0)
        state = opt.setup(clipped(), xs, engine=place.engine)
        for n in range(2):
            opt.update_(state, xs, placed(of_dx, n + 1))
        ends.append(xs)
    for xs in ends[1:]:
        near(xs, ends[0], 1e-6)


def waits_for_nobody(rule: opt.Rule, *, capturable: bool) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        xs = [torch.ones(s, device=place.name) for s in ((33, 65), (7,), (4097,))]
        state = opt.setup(rule, xs, engine=place.engine, capturable=capturable)
        for n in range(5):
            gs = [torch.rand_like(x) for x in xs]
            kept = [*xs, *gs]  # the next gradients lie elsewhere
            with place.unsynchronised() if n > 1 else contextlib.nullcontext():
                opt.update_(state, xs, gs)
            assert all(bool(v.isfinite().all()) for v in kept)

    return check


CHECKS: dict[str, tuple[Callable[[Place], None], bool]] = {
    "a CUDA graph of a whole train step, adjusted between replays": (graph_of_train_step, True),
    "a GradScaler: an infinite gradient moves nothing, nobody waits": (scaler_skips_without_waiting, True),
    "tensors that are not aligned": (misaligned, False),
    "AdamW waits for nobody": (waits_for_nobody(opt.AdamW(), capturable=False), True),
    "AdamW with a schedule waits for nobody": (
        waits_for_nobody(opt.AdamW(opt.Cosine(1e-3, 100)), capturable=False),
        True,
    ),
    "ClipGlobalNorm(throw=False) waits for nobody": (waits_for_nobody(clipped(), capturable=False), True),
    "the same with its numbers on the device": (waits_for_nobody(clipped(), capturable=True), True),
}
"""Title -> (check, whether a rehearsal says nothing about it)."""


def check_device(place: Place, report: Report) -> bool:
    """Print a line for each check; whether all is well."""
    well = True
    for title, (check, needs) in CHECKS.items():
        try:
            check(place)
            word = f"{NEEDS}; its code ran on the CPU" if place.rehearse and needs else "ok"
        except Exception as error:  # noqa: BLE001 the line says what went wrong, and the others are still run
            word, well = f"FAILED {said(error)}", False
        report.line(f"{title}: {word}")
    return well


# -- what is timed -------------------------------------------------------------------------------------------


class Given:
    """The parameters of a model with their gradients, all in [0, 0.01); those of a recipe times `SCALE`."""

    def __init__(self, name: str, dtype: torch.dtype, place: Place, scale: float = 1.0) -> None:
        draw = torch.Generator(place.name).manual_seed(0)

        def drawn(size: float) -> list[torch.Tensor]:
            new = (torch.rand(s, generator=draw, device=place.name) for s in shapes.ALL[name]())
            return [a.mul_(size).to(dtype) for a in new]

        self.place, self.xs, self.dxs = place, drawn(0.01), drawn(0.01 * scale)
        self.count = sum(x.numel() for x in self.xs)
        self.module = torch.nn.ParameterList(self.xs)
        self.masters: Any = None
        """Those of torch, once they are made."""
        for p, g in zip(self.module.parameters(), self.dxs, strict=True):
            p.grad = g

    def setup(self, rule: opt.Rule, **how: Any) -> Any:
        return opt.setup(rule, self.xs, engine=self.place.engine, **how)


@dataclasses.dataclass
class Running:
    """A way to step, on its arrays."""

    step: Step
    wait: Step
    of_torch: bool = True
    """Whether CUDA events of torch see it."""
    taken: int = 0
    """Steps that were taken while it was built."""
    results: Callable[[], list[torch.Tensor]] | None = None
    """What must be the same for all ways; the parameters, if nothing is said."""
    state: Any = None
    """Ours, for `explain`."""
    held: Any = None
    """What must not be freed while a graph writes to it."""
    repeats: int = 1
    """Steps in a burst."""
    host: float = 0.0
    """Seconds until a call returns."""

    def __call__(self) -> None:
        self.step()

    def burst(self) -> float:
        """Seconds of a step among several."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(self.repeats):
            self.step()
        self.wait()
        return (time.perf_counter() - begin) / self.repeats

    def call(self) -> float:
        """Seconds until a call returns, with nothing before it in the queue."""
        self.wait()
        begin = time.perf_counter()
        self.step()
        end = time.perf_counter()
        self.wait()
        return end - begin

    def on_device(self) -> float:
        """Seconds of the device for a step that the host has put into its queue beforehand."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        torch.cuda._sleep(int(2e9 * (2 * self.host + 1e-4)))
        begin.record()
        self.step()
        end.record()
        self.wait()
        return begin.elapsed_time(end) * 1e-3


Build = Callable[[Given], Running]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to take the step of a row."""

    build: Build
    keeps: int
    """Bytes per parameter that it needs beside parameters and gradients."""
    spare: int = 0
    """And those that it needs only while it steps."""
    ours: bool = False
    compiles: bool = False
    """Whether torch.compile has its time first; not for many tensors, unless asked for."""
    traces: bool = False
    """Whether XLA has its time first."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Ways to take the same step."""

    title: str
    dtype: torch.dtype
    scale: float
    judged: str
    """Which of ours the targets are about."""
    ways: dict[str, Way]


def running(given: Given, step: Step, **more: Any) -> Running:
    return Running(step, given.place.wait, **more)


def in_graph(given: Given, step: Step, **more: Any) -> Running:
    return running(given, graphed(step, given.place), taken=WARM, held=step, **more)


def ours(rule: opt.Rule, *, capturable: bool = False, graph: bool = False) -> Build:
    """`update_` on lists of tensors."""

    def build(given: Given) -> Running:
        state = given.setup(rule, capturable=capturable)
        make = in_graph if graph else running
        return make(given, lambda: opt.update_(state, given.xs, given.dxs), state=state)

    return build


def as_torch(rule: opt.Rule) -> Build:
    def build(given: Given) -> Running:
        return running(given, opt.TorchOptimizer(given.module, rule, engine=given.place.engine).step)

    return build


def of_torch(*, graph: bool = False, **how: Any) -> Build:
    def build(given: Given) -> Running:
        return (in_graph if graph else running)(given, torch_adamw(given.module, **how).step)

    return build


def of_optax(given: Given) -> Running:
    """Jitted Optax on the same device, its parameters and state given away at every step."""
    import jax
    import optax

    device = jax.devices("cpu" if given.place.rehearse else "gpu")[0]
    tx = optax.adamw(ETA, *BETA, eps=EPSILON, weight_decay=LAM)
    x, dx = ([jax.device_put(a.cpu().numpy(), device) for a in arrays] for arrays in (given.xs, given.dxs))
    kept: dict[str, Any] = {"x": x, "dx": dx, "state": tx.init(x)}

    def one(x: Any, state: Any, dx: Any) -> Any:
        updates, state = tx.update(dx, state, x)
        return optax.apply_updates(x, updates), state

    jitted = jax.jit(one, donate_argnums=(0, 1))

    def step() -> None:
        kept["x"], kept["state"] = jitted(kept["x"], kept["state"], kept["dx"])

    return Running(
        step,
        lambda: jax.block_until_ready(kept["x"]),
        of_torch=False,
        results=lambda: [torch.tensor(np.asarray(x)) for x in kept["x"]],
    )


# -- the recipe ----------------------------------------------------------------------------------------------


def adamw() -> opt.Rule:
    return opt.AdamW(ETA, BETA, LAM, EPSILON)


def recipe(*, skips: bool) -> opt.Rule:
    """Float32 masters and their average behind bfloat16 parameters; with `skips` the rule itself looks for
    what is not finite.
    """
    inner = opt.Chain(opt.ClipGlobalNorm(NORM, throw=False), adamw())
    return opt.MixedPrecision(opt.EMA(opt.SkipNonFinite(inner) if skips else inner, RHO))


def masters(states: Sequence[Any], given: Given) -> list[torch.Tensor]:
    """Masters, averages and parameters."""
    return [*(s.master for s in states), *(s.inner.average for s in states), *given.xs]


def scaled(*, skips: bool, graph: bool = False) -> Build:
    """The whole recipe in one call, which divides by a scale on the device."""

    def build(given: Given) -> Running:
        state = given.setup(recipe(skips=skips), capturable=True)
        scale, found = (torch.full((1,), v, device=given.place.name) for v in (SCALE, 0.0))
        return (in_graph if graph else running)(
            given,
            lambda: update_scaled(state, given.xs, given.dxs, (scale, found)),
            state=state,
            results=lambda: masters([state[i].state for i in range(len(given.xs))], given),
        )

    return build


def under_scaler(given: Given) -> Running:
    """The recipe as an optimiser of torch under a GradScaler, which reads and writes the gradients too."""
    optimizer = opt.TorchOptimizer(
        given.module, recipe(skips=False), engine=given.place.engine, capturable=True
    )
    scaler = torch.amp.GradScaler(given.place.kind, init_scale=SCALE, growth_interval=10**6)
    scaler.scale(torch.ones((), device=given.place.name))

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    def results() -> list[torch.Tensor]:
        return masters([optimizer.tree[name].state for name in optimizer.parameters], given)

    return running(given, step, results=results)


class TorchRecipe:
    """The recipe by torch's own calls for many tensors."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self.masters = torch.nn.ParameterList([x.float() for x in given.xs])
        self.parameters = list(self.masters.parameters())
        self.averages = [p.detach().clone() for p in self.parameters]
        self.slopes = [torch.empty_like(p) for p in self.averages]
        for p, g in zip(self.parameters, self.slopes, strict=True):
            p.grad = g
        self.optimizer: Any = torch_adamw(self.masters, fused=True)
        device = given.place.name
        self.inverse, self.found = torch.tensor(1 / SCALE, device=device), torch.zeros((), device=device)

    def results(self) -> list[torch.Tensor]:
        return [*(p.detach() for p in self.parameters), *self.averages, *self.given.xs]

    @torch.no_grad()
    def call_by_call(self) -> None:
        """As a train loop has it: each call reads and writes all."""
        torch._foreach_copy_(self.slopes, self.given.dxs)
        self.found.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(self.slopes, self.found, self.inverse)
        torch.nn.utils.clip_grad_norm_(self.parameters, NORM, foreach=True)
        self.finish(None)

    @torch.no_grad()
    def folded(self) -> None:
        """As an expert may have it: scale and clipping go into the fused step, as the scale of a GradScaler;
        the norm says whether all is finite.
        """
        torch._foreach_copy_(self.slopes, self.given.dxs)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.given.dxs, 2, torch.float32)))
        self.found.copy_(~norm.isfinite())
        self.finish(((norm * self.inverse + 1e-6) / NORM).clamp_(min=1.0) / self.inverse)

    def finish(self, scale: Any) -> None:
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, self.found
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, self.parameters, 1 - RHO)
        torch._foreach_copy_(self.given.xs, self.parameters)


def torch_recipe(name: str) -> Build:
    """One of the two; both step the same masters, for which a large model has room only once."""

    def build(given: Given) -> Running:
        made = given.masters = given.masters or TorchRecipe(given)
        return running(given, getattr(made, name), results=made.results)

    return build


def recipe_compiled(given: Given) -> Running:
    """The recipe in functions of many tensors, for torch.compile to fuse."""
    made = TorchRecipe(given)
    made.slopes.clear()
    for p in made.parameters:
        p.grad = None
    xs = [p.detach() for p in made.parameters]
    ms, vs = ([torch.zeros_like(x) for x in xs] for _ in range(2))
    t = torch.zeros((), device=given.place.name)

    @torch.compile
    def step(xs: Any, ms: Any, vs: Any, averages: Any, stored: Any, slopes: Any, t: Any) -> None:
        t.add_(1)
        gs = torch._foreach_mul([g.float() for g in slopes], 1 / SCALE)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gs)))
        gs = torch._foreach_mul(gs, (NORM / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_lerp_(ms, gs, 1 - BETA[0])
        torch._foreach_mul_(vs, BETA[1])
        torch._foreach_addcmul_(vs, gs, gs, 1 - BETA[1])
        roots = torch._foreach_div(torch._foreach_sqrt(vs), (1 - BETA[1] ** t).sqrt())
        torch._foreach_add_(roots, EPSILON)
        steps = torch._foreach_mul(torch._foreach_div(ms, roots), -ETA / (1 - BETA[0] ** t))
        torch._foreach_mul_(xs, 1 - ETA * LAM)
        torch._foreach_add_(xs, steps)
        torch._foreach_lerp_(averages, xs, 1 - RHO)
        torch._foreach_copy_(stored, xs)

    def call() -> None:
        with torch.no_grad():
            step(xs, ms, vs, made.averages, given.xs, given.dxs, t)

    return running(given, call, results=made.results)


# -- an own rule ---------------------------------------------------------------------------------------------


def belief(given: Given) -> Running:
    return running(given, belief_foreach(given.module))


def belief_compiled(given: Given) -> Running:
    """The same for torch.compile, with the count of steps on the device: a number would be compiled anew."""
    ms, ss = ([torch.zeros_like(x) for x in given.xs] for _ in range(2))
    t = torch.zeros((), device=given.place.name)

    @torch.compile
    def step(xs: Any, ms: Any, ss: Any, gs: Any, t: Any) -> None:
        t.add_(1)
        torch._foreach_lerp_(ms, gs, 1 - BETA[0])
        far = torch._foreach_sub(gs, ms)
        torch._foreach_mul_(ss, BETA[1])
        torch._foreach_addcmul_(ss, far, far, 1 - BETA[1])
        torch._foreach_add_(ss, BELIEF)
        roots = torch._foreach_div(torch._foreach_sqrt(ss), (1 - BETA[1] ** t).sqrt())
        torch._foreach_add_(roots, BELIEF)
        steps = torch._foreach_mul(torch._foreach_div(ms, roots), -ETA / (1 - BETA[0] ** t))
        torch._foreach_add_(xs, steps)

    def call() -> None:
        with torch.no_grad():
            step(given.xs, ms, ss, given.dxs, t)

    return running(given, call)


UPDATE, WHOLE, FUSED = "update_", "update_scaled and skip", "torch fused"

ROWS = {
    "adamw": Row(
        "AdamW, float32",
        torch.float32,
        1.0,
        UPDATE,
        {
            UPDATE: Way(ours(adamw()), 8, ours=True),
            FUSED: Way(of_torch(fused=True), 8),
            "torch foreach": Way(of_torch(foreach=True), 8, 8),
            "TorchOptimizer.step": Way(as_torch(adamw()), 8, ours=True),
            "update_ in a graph": Way(ours(adamw(), capturable=True, graph=True), 8, ours=True),
            "update_, capturable": Way(ours(adamw(), capturable=True), 8, ours=True),
            "torch fused in a graph": Way(of_torch(fused=True, capturable=True, graph=True), 8),
            "torch.compile": Way(
                lambda given: running(
                    given, torch.compile(torch_adamw(given.module, foreach=True, capturable=True).step)
                ),
                8,
                4,
                compiles=True,
            ),
            "Optax, jitted": Way(of_optax, 16, 4, traces=True),
        },
    ),
    "recipe": Row(
        "unscale, clip, AdamW, average, float32 masters",
        torch.bfloat16,
        SCALE,
        WHOLE,
        {
            WHOLE: Way(scaled(skips=True), 16, ours=True),
            "torch, call by call": Way(torch_recipe("call_by_call"), 20, 4),
            "torch, folded into fused": Way(torch_recipe("folded"), 0, 4),
            "update_scaled, no look": Way(scaled(skips=False), 16, ours=True),
            "TorchOptimizer, GradScaler": Way(under_scaler, 16, ours=True),
            "update_scaled in a graph": Way(scaled(skips=True, graph=True), 16, ours=True),
            "torch.compile": Way(recipe_compiled, 20, 8, compiles=True),
        },
    ),
    "own": Row(
        "an own rule, AdaBelief, float32",
        torch.float32,
        1.0,
        UPDATE,
        {
            UPDATE: Way(ours(Belief()), 8, ours=True),
            "foreach": Way(belief, 8, 12),
            "update_ in a graph": Way(ours(Belief(), capturable=True, graph=True), 8, ours=True),
            "torch.compile": Way(belief_compiled, 8, 4, compiles=True),
        },
    ),
}

MANY = 200
"""Tensors from which on torch.compile takes minutes."""


# -- building and measuring ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Session:
    """One run of this command."""

    place: Place
    report: Report
    seconds: float
    compile: bool
    end: float
    bandwidth: float = 0.0
    """The best bytes per second of a copy so far."""
    failures: list[str] = dataclasses.field(default_factory=list[str])
    others: dict[str, set[str]] = dataclasses.field(default_factory=dict[str, set[str]])
    """Of each row, the ways that compute other numbers."""

    def left(self) -> float:
        return self.end - time.perf_counter()

    def copied(self) -> None:
        """Copy 1 GiB back and forth, and note the best speed."""
        n = 2**20 if self.place.rehearse else 2**28
        a, b = (torch.zeros(n, device=self.place.name) for _ in range(2))
        run = Running(lambda: b.copy_(a), self.place.wait, host=1e-5)
        found = interleaved({"copy": run}, seconds=1.0, least=10, most=30, clock=self.by_device)
        self.bandwidth = max(self.bandwidth, 2 * a.nbytes / found.minimum("copy"))

    def by_device(self, run: Running) -> float:
        return run.burst() if self.place.rehearse else run.on_device()


def refused(way: Way, given: Given, session: Session, spare: float) -> str:
    """Why a way is not built; empty if it is."""
    if way.compiles and len(given.xs) > MANY and not session.compile:
        return "it compiles for minutes; write --compile"
    if way.compiles and session.place.rehearse and not session.compile:
        return NEEDS
    hurried = session.left() < 120 and not (session.compile or session.place.rehearse)
    if hurried and (way.compiles or way.traces):
        return "no time is left for it to compile"
    need = given.count * way.keeps + max(spare, given.count * way.spare)
    free = 0.95 * session.place.free()
    if need > free:
        return f"it takes {need / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
    return ""


def built(row: Row, given: Given, session: Session, *, among: Sequence[str]) -> dict[str, Running]:
    """The ways of a row that run here, after their first steps; what is left out is printed."""
    found: dict[str, Running] = {}
    spare = 0.0
    for title in among:
        way = row.ways[title]
        why = refused(way, given, session, spare)
        if not why:
            begin = time.perf_counter()
            try:
                with quiet():
                    if way.compiles:
                        torch.compiler.reset()  # else it takes the shapes of the last model for changing ones
                    run = way.build(given)
                    run.step()
                    run.wait()
            except Exception as error:  # noqa: BLE001 the others are still timed
                why = said(error)
                if way.ours:
                    session.failures.append(f"{row.title}, {title}: {why}")
            else:
                run.taken += 1
                found[title] = run
                spare = max(spare, given.count * way.spare)
                if way.compiles or way.traces:
                    session.report.line(f"  {title}: first step after {time.perf_counter() - begin:.1f} s")
        if why:
            session.report.line(f"  left out: {title}: {why}")
    return found


def agreement(key: str, session: Session) -> Table:
    """Lines on whether all ways of a row compute the same numbers as the first peer, on six arrays."""
    row = ROWS[key]
    first = next(title for title, way in row.ways.items() if not way.ours)
    ends: dict[str, list[torch.Tensor]] = {}
    for title in (first, *(t for t in row.ways if t != first)):
        given = Given("tiny", row.dtype, session.place, row.scale)
        start = [x.double().cpu() for x in given.xs]
        for run in built(row, given, session, among=[title]).values():
            with quiet():
                for _ in range(CHECKED - run.taken):
                    run()
            run.wait()
            found = given.xs if run.results is None else run.results()
            ends[title] = [v.detach().double().cpu() for v in found]
        if first not in ends:
            return []
    way = sum(float((a - b).abs().sum()) for a, b in zip(ends[first], start, strict=False))
    lines: Table = []
    for title, end in ends.items():
        pairs = list(zip(end, ends[first], strict=True))
        far = sum(float((a - b).abs().sum()) for a, b in pairs) / way
        same = far <= 1e-3  # Optax works out 1 - beta**t in float32, a bfloat16 may be rounded the other way
        if not same:
            session.others.setdefault(key, set()).add(title)
            if row.ways[title].ours:
                session.failures.append(f"{row.title}, {title}: other numbers than {first}")
        lines.append([key, title, f"{far:.1e}", "same" if same else "other"])
    return lines


def launches(run: Running, place: Place) -> str:
    """How many kernels a step launches, and copies and fills beside them."""
    if place.rehearse:
        return ""
    from torch.profiler import ProfilerActivity, profile

    try:
        run.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            run()
            run.wait()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(path))
            kinds = [e.get("cat") for e in json.loads(path.read_text())["traceEvents"]]
    except Exception as error:  # noqa: BLE001 without a profiler there is no count
        return said(error)[:12]
    kernels, copies = kinds.count("kernel"), kinds.count("gpu_memcpy") + kinds.count("gpu_memset")
    return f"{kernels} + {copies}" if copies else str(kernels)


@dataclasses.dataclass
class Measured:
    """The timings of a row on a model."""

    row: Row
    ms: Timings
    device: dict[str, float]
    host: dict[str, float]
    launches: dict[str, str]
    share: dict[str, float]
    same: list[str]
    """Peers that compute the same numbers."""

    @property
    def best(self) -> str:
        """The fastest of them; empty if there is none."""
        return min(self.same, key=self.ms.median, default="")

    def faster(self, way: str, peer: str) -> tuple[float, float]:
        """How many times as fast as a peer: by medians, by minima."""
        return self.ms.ratio(peer, way), self.ms.ratio_of_minima(peer, way)


def measure(key: str, name: str, session: Session) -> Measured | None:
    """Time the ways of a row on a model and print their table."""
    row, place = ROWS[key], session.place
    session.copied()
    stand_in = "tiny" if place.rehearse else name
    title = f"{shapes.TITLES[name]}, {row.title}"
    session.report.line(title + (": six arrays stand in for it" if place.rehearse else ""))
    n, size = shapes.count(stand_in), row.dtype.itemsize
    first = next(iter(row.ways.values()))
    if n * (2 * size + first.keeps) > 0.95 * place.free():
        session.report.line("  left out: it does not fit the memory of this device")
        return None
    given = Given(stand_in, row.dtype, place, row.scale)
    with quiet():
        runs = built(row, given, session, among=list(row.ways))
        if row.judged not in runs:
            return None
        measured = timed_ways(row, runs, session)
    moved = sum(g.bytes_per_parameter * g.parameters for g in opt.explain(runs[row.judged].state).groups)
    measured.share = {t: moved / measured.ms.median(t) / session.bandwidth for t in runs}
    measured.same = [t for t in runs if not row.ways[t].ours and t not in session.others.get(key, set())]
    show_measured(title, measured, moved, n, session)
    return measured


def timed_ways(row: Row, runs: Mapping[str, Running], session: Session) -> Measured:
    """Bursts, single calls and the device's own time of all ways, each in turn."""
    rehearse, s = session.place.rehearse, session.seconds
    for run in () if rehearse else runs.values():
        run.burst()
        run.repeats = min(30, max(3, int(0.03 / run.burst())))
    how = {"least": 1, "most": 1, "warmup": 0} if rehearse else {"least": 7, "most": 100, "warmup": 1}
    host = interleaved(runs, seconds=s / 4, clock=Running.call, **how)
    for title, run in runs.items():
        run.host = host.median(title)
    ms = interleaved(runs, seconds=s / 2, clock=Running.burst, **how)
    seen = {t: r for t, r in runs.items() if r.of_torch}
    device = interleaved(seen, seconds=s / 4, clock=session.by_device, **how)
    return Measured(
        row,
        ms,
        {t: device.median(t) for t in seen},
        {t: host.median(t) for t in runs},
        {t: launches(r, session.place) for t, r in runs.items()},
        {},
        [],
    )


def show_measured(title: str, m: Measured, moved: int, n: int, session: Session) -> None:
    """The table of one row on one model."""
    rows = [
        [
            t,
            f"{m.ms.median(t) * 1e3:.3f}",
            f"{m.ms.minimum(t) * 1e3:.3f}",
            f"{m.device[t] * 1e3:.3f}" if t in m.device else "",
            f"{m.share[t]:.0%}",
            m.launches[t],
            f"{m.host[t] * 1e6:.0f}",
            f"{m.faster(t, m.best)[0]:.2f}x" if m.best else "",
        ]
        for t in m.ms.names
    ]
    if session.place.rehearse:
        note = "; no measurement"
    else:
        note = "; all of it fits the cache" if moved < cache_of_device() else ""
    report_title = (
        f"{title}: {n / 1e6:.1f} M parameters, {moved / n:.0f} bytes each{note}; medians of "
        f"{len(m.ms.seconds[m.ms.names[0]])} bursts"
    )
    head = ["way", "ms", "min", "device", "of copy", "launches", "host us", "best peer/this"]
    session.report.table(report_title, head, rows)


def cache_of_device() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


# -- targets -------------------------------------------------------------------------------------------------


def targets(key: str, name: str, m: Measured) -> Table:
    """Lines for a row on a model: what, what was measured, what is asked for if anything is, verdict."""
    way, t = m.row.judged, m.ms

    def faster(least: float, peer: str) -> list[str]:
        what = f"{name}: {key}: times as fast as {peer or 'torch'}"
        asked = f">= {least:g}" if least else ""
        if peer not in t.names:
            return [what, "not measured", asked, ""]
        by_median, by_minimum = m.faster(way, peer)
        met = judged(by_median, by_minimum, least) if least else ""
        return [what, f"{by_median:.2f}, {by_minimum:.2f}", asked, met]

    calls = [p for p in m.same if not m.row.ways[p].compiles]
    by_calls = min(calls, key=t.median, default="")
    compiled = [p for p in m.same if p not in calls]
    if key == "adamw":
        lines = [faster(3 if name == "small" else 1, FUSED)]
        if name in ("gpt2", "xl"):
            share = m.share[way]
            best = share * t.median(way) / t.minimum(way)
            found = f"{share:.1%}, {best:.1%}"
            lines.append([f"{name}: {key}: share of a copy", found, ">= 92 %", judged(share, best, 0.92)])
        if name == "gpt2":
            us = m.host[way] * 1e6
            lines.append([f"{name}: {key}: host us of a step", f"{us:.0f}", "<= 100", verdict(us, 100)])
        return lines
    least = 1.7 if key == "recipe" else 0.0
    return [faster(least, peer) for peer in (by_calls, *compiled)]


# -- other sizes of blocks -----------------------------------------------------------------------------------


def tune(session: Session) -> None:
    """Print the time of a step on GPT-2 for other constants of the engine: in float32, and with bfloat16
    parameters beside float32 state, whose kernels take more registers.
    """
    from optimisers.engines.cuda import task as engine

    place = session.place
    before = engine.Fused.chunk, engine.BLOCK, engine.OPTIONS, engine.NARROW
    for dtype in (torch.float32, torch.bfloat16):
        given = Given("tiny" if place.rehearse else "gpt2", dtype, place)
        rows: Table = []
        try:
            for chunk, block, warps in itertools.product(
                (2048, 4096, 8192, 16384, 65536), (512, 1024, 2048, 4096), (4, 8)
            ):
                if block > chunk or (place.rehearse and chunk > 2048):
                    continue
                engine.Fused.chunk, engine.BLOCK = chunk, block
                engine.OPTIONS = before[2] | {"num_warps": warps}
                engine.NARROW = before[3] | {"num_warps": warps}
                run = ours(adamw())(given)
                run.repeats = 1 if place.rehearse else 5
                found = interleaved({"step": run}, seconds=0.1, least=3, most=30, clock=Running.burst)
                own = (chunk, block, warps) == (*before[:2], before[2]["num_warps"])
                rows.append(
                    [
                        f"{chunk}{' (as it is)' if own else ''}",
                        str(block),
                        str(warps),
                        f"{found.median('step') * 1e3:.3f}",
                        f"{found.minimum('step') * 1e3:.3f}",
                    ]
                )
        finally:
            engine.Fused.chunk, engine.BLOCK, engine.OPTIONS, engine.NARROW = before
        rows.sort(key=lambda r: float(r[3]))
        title = f"AdamW on GPT-2 small, {str(dtype).removeprefix('torch.')}"
        session.report.table(title, ["chunk", "block", "warps", "ms", "min"], rows)


# -- all -----------------------------------------------------------------------------------------------------


def header(place: Place) -> list[str]:
    """What was measured with, and when."""
    versions = ["torch", "triton", "jax", "optax", "numpy"]
    found: list[str] = []
    for name in versions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    where = "the CPU" if place.rehearse else torch.cuda.get_device_name(0)
    if not place.rehearse:
        memory = torch.cuda.get_device_properties(0).total_memory
        where += f", {memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    when = dt.datetime.now(dt.UTC).date().isoformat()
    return [
        f"{where}; {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {when}",
        ", ".join(found),
    ]


def run(chosen: argparse.Namespace) -> list[str]:
    """Check, time and judge; what failed."""
    place = Place("cpu" if chosen.rehearse else "cuda:0")
    session = Session(
        place,
        Report(chosen.out),
        chosen.seconds,
        chosen.compile,
        time.perf_counter() + 60 * chosen.minutes,
    )
    report = session.report
    for line in header(place):
        report.line(line)
    if place.rehearse:
        report.line("A rehearsal on the CPU, by Triton's interpreter: nothing here is a measurement.")
    begin = time.perf_counter()
    rules_are_right = show_errors(check_rules(place, chosen.workers), report)
    device_is_right = check_device(place, report)
    if not (rules_are_right and device_is_right):
        session.failures.append("a check, see above")
        if not chosen.keep_going:
            return session.failures
    report.line(f"checked in {time.perf_counter() - begin:.0f} s")
    if chosen.tune:
        tune(session)
        return session.failures
    lines = [line for key in chosen.rows for line in agreement(key, session)]
    title = f"Same numbers? Mean difference from the first peer after {CHECKED} steps, as a share of the way"
    report.table(title, ["row", "way", "difference", ""], lines)
    judgements: Table = []
    for name, key in itertools.product(chosen.only, chosen.rows):
        if session.left() < 2 * chosen.seconds and not place.rehearse:
            report.line(f"left out: {shapes.TITLES[name]}, {ROWS[key].title}: no time is left")
            continue
        m = measure(key, name, session)
        if m is not None:
            judgements += targets(key, name, m)
        del m
        place.free()
    report.line(f"Bandwidth of a copy: {session.bandwidth / 1e9:.0f} GB/s")
    if place.rehearse:
        judgements = [[what, "no measurement", asked, "not judged"] for what, _, asked, _ in judgements]
    report.table(
        "Targets, and other ratios: by medians, by minima", ["what", "measured", "target", ""], judgements
    )
    return session.failures


def main(args: Sequence[str] | None = None) -> None:
    """Check and measure what was asked for and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = ("gpt2", "xl", "small", "resnet18")
    parser.add_argument("--only", nargs="+", choices=models, default=models, help="models")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the rounds of each table")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no table is begun")
    parser.add_argument("--workers", type=int, default=8, help="processes that check the rules")
    parser.add_argument("--compile", action="store_true", help="peers too that compile for minutes")
    parser.add_argument("--tune", action="store_true", help="after the checks, only try other blocks")
    parser.add_argument("--keep-going", action="store_true", help="time what has failed its checks")
    parser.add_argument("--rehearse", action="store_true", help="run the same code on the CPU")
    parser.add_argument("--out", type=Path, help="a file for the tables, as Markdown")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(args)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX is imported
    if chosen.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device was found, and this measures on one; write --rehearse to try its code")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    sys.stdout.reconfigure(line_buffering=True)
    if chosen.child:
        errors = checked(chosen.child[1], Place("cuda:0"))
        print(json.dumps({"errors": [dataclasses.asdict(e) for e in errors]}))
        return
    failures = run(chosen)
    for why in failures:
        print(f"FAILED  {why}")
    if failures and not chosen.keep_going:
        sys.exit(1)


if __name__ == "__main__":
    main()
