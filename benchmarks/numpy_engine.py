"""How fast are steps on NumPy arrays, what do they cost beside time, and where does the time go?

    python -m benchmarks.numpy_engine [--models small resnet18 gpt2] [--seconds 10]

It prints tables and never asserts: a machine is as fast as it is. What needs a fresh process (memory, first
steps, imports) runs this module again, with `--child`.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes
from benchmarks.printing import child, show, verdict
from benchmarks.timing import Timings, interleaved

ETA, BETA, LAM, EPSILON = 1e-3, (0.9, 0.999), 0.01, 1e-8

OURS, PURE, RECIPE = "update_", "update", "update_, clipped"
PLAIN, BUFFERED, LIMIT = "NumPy expressions", "NumPy in place", "limit of the machine"


# -- what is compared ----------------------------------------------------------------------------------------


class PlainAdamW:
    """AdamW as a careful user of NumPy writes it."""

    def __init__(self, model: dict[str, Any]) -> None:
        self.m = {k: np.zeros_like(x) for k, x in model.items()}
        self.v = {k: np.zeros_like(x) for k, x in model.items()}
        self.t = 0

    def corrections(self) -> tuple[float, float]:
        self.t += 1
        return 1 - BETA[0] ** self.t, 1 - BETA[1] ** self.t

    def expressions(self, model: dict[str, Any], grads: dict[str, Any]) -> None:
        """Formulas, with new arrays for what they need."""
        b1, b2 = BETA
        c1, c2 = self.corrections()
        for k, x in model.items():
            dx = grads[k]
            m = self.m[k] = b1 * self.m[k] + (1 - b1) * dx
            v = self.v[k] = b2 * self.v[k] + (1 - b2) * dx * dx
            step = ETA * (m / c1 / (np.sqrt(v / c2) + EPSILON) + LAM * x)
            np.subtract(x, step, out=x)

    def buffered(self, model: dict[str, Any], grads: dict[str, Any], scratch: dict[str, Any]) -> None:
        """The same with `out=` everywhere and room for one array made beforehand."""
        b1, b2 = BETA
        c1, c2 = self.corrections()
        for k, x in model.items():
            dx, m, v, s = grads[k], self.m[k], self.v[k], scratch[k]
            np.multiply(m, b1, out=m)
            np.multiply(dx, 1 - b1, out=s)
            np.add(m, s, out=m)
            np.multiply(v, b2, out=v)
            np.multiply(dx, dx, out=s)
            np.multiply(s, 1 - b2, out=s)
            np.add(v, s, out=v)
            np.divide(v, c2, out=s)
            np.sqrt(s, out=s)
            np.add(s, EPSILON, out=s)
            np.divide(m, s, out=s)
            np.multiply(s, ETA / c1, out=s)
            np.multiply(x, 1 - ETA * LAM, out=x)
            np.subtract(x, s, out=x)


def adamw() -> Any:
    """Our AdamW, with the settings of the others."""
    import optimisers as opt

    return opt.AdamW(eta=ETA, beta=BETA, lam=LAM, epsilon=EPSILON)


def recipe() -> Any:
    """Our AdamW behind the clipping of the global norm."""
    import optimisers as opt

    return opt.Chain(opt.ClipGlobalNorm(1.0), adamw())


def candidates(name: str) -> tuple[dict[str, Callable[[], object]], Any]:
    """(what is timed, the state of ours): all on the same parameters and gradients."""
    import optimisers as opt
    from benchmarks.limit import limit

    model, grads = shapes.arrays(name, 1), shapes.arrays(name, 2)
    state, clipped = opt.setup(adamw(), model), opt.setup(recipe(), model)
    plain = PlainAdamW(model)
    biggest = np.empty(max(x.size for x in model.values()), np.float32)
    scratch = {k: biggest[: x.size].reshape(x.shape) for k, x in model.items()}
    opt.update_(state, model, grads)  # touches all pages of the state before the limit reads them
    found: dict[str, Callable[[], object]] = {
        LIMIT: limit(state, model, grads),
        OURS: lambda: opt.update_(state, model, grads),
        PURE: lambda: opt.update(state, model, grads),
        RECIPE: lambda: opt.update_(clipped, model, grads),
        BUFFERED: lambda: plain.buffered(model, grads, scratch),
        PLAIN: lambda: plain.expressions(model, grads),
    }
    return found, state


# -- where the time of update_ goes --------------------------------------------------------------------------


PIECES = [
    ("walk: model and gradients", "optimisers.step.update", "flatten_up_to"),
    ("walk: model and gradients", "optimisers.step.update", "gradients_up_to"),
    ("which leaves are stepped", "optimisers.step.update", "_active"),
    ("checks: shapes, types, addresses", "optimisers.engines.addressed.pointers", "Form.addresses"),
    ("checks: gradients in memory that is written", "optimisers.engines.cpu.task", "Fused.separate"),
    ("address tables", "optimisers.engines.cpu.task", "Fused.rows"),
    ("scalars of the step", "optimisers.graph.scalars", "Scalars.table"),
    ("scalars of the step", "optimisers.engines.cpu.task", "Fused.counters"),
    ("kernel, threads included", "optimisers.engines.cpu.threads", "together"),
]
"""Title of a piece, module, function: none of them calls another, as long as nothing is copied."""

REST = "all else"


@contextlib.contextmanager
def clocked(spent: dict[str, float]) -> Iterator[None]:
    """Add the time spent in each of the pieces to `spent`."""
    import importlib

    undo: list[tuple[Any, str, Any]] = []
    clock = time.perf_counter

    def wrapped(title: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begin = clock()
            try:
                return function(*args, **options)
            finally:
                spent[title] += clock() - begin

        return call

    for title, module, path in PIECES:
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part, None)
        function = getattr(owner, name, None)
        if function is not None:
            spent.setdefault(title, 0.0)
            undo.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, wrapped(title, function))
    try:
        yield
    finally:
        for owner, name, old in undo:
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)


def split(step: Callable[[], object], rounds: int = 300) -> dict[str, list[float]]:
    """The seconds of each piece of a step, and of the whole step, round by round."""
    spent: dict[str, float] = {}
    runs: dict[str, list[float]] = {}
    with clocked(spent):
        for _ in range(rounds):
            for title in spent:
                spent[title] = 0.0
            begin = time.perf_counter()
            step()
            whole = time.perf_counter() - begin
            for title, value in (*spent.items(), (REST, whole - sum(spent.values())), ("step", whole)):
                runs.setdefault(title, []).append(value)
    return runs


# -- what needs a process of its own -------------------------------------------------------------------------


def import_time() -> dict[str, Any]:
    """Seconds of `import optimisers` after NumPy, and what it should not have loaded."""
    before = set(sys.modules)
    begin = time.perf_counter()
    import optimisers  # noqa: F401

    seconds = time.perf_counter() - begin
    heavy = {"numba", "llvmlite", "torch", "jax", "cupy", "scipy"} & (set(sys.modules) - before)
    return {"import": seconds, "loaded": sorted(heavy)}


def first_steps(before: str = "") -> dict[str, Any]:
    """Seconds of the import of Numba, and of setup and first step of three rules, one after the other.

    With `before="another"` a trivial function is compiled first, as another library would: Numba ends its own
    start-up only then.
    """
    import optimisers as opt

    model, grads = shapes.arrays("small", 1), shapes.arrays("small", 2)

    class Own(opt.Rule):
        """A rule that nobody has compiled: Adam with a mean of |dx| in the place of the root."""

        eta: float = 0.001
        beta: tuple[float, float] = (0.9, 0.99)

        def init(self, x: Any) -> Any:
            return opt.zeros_like(x), opt.zeros_like(x)

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            m = opt.ema(self.beta[0], state[0], dx)
            a = opt.ema(self.beta[1], state[1], opt.ops.abs(dx))
            return (m, a), self.eta * m / (a + 1e-8)

    begin = time.perf_counter()
    import numba

    found: dict[str, Any] = {"import numba": time.perf_counter() - begin}
    begin = time.perf_counter()
    if before:
        numba.njit(lambda x: x + 1.0)(1.0)
        found["trivial"] = time.perf_counter() - begin
    for name, rule in (("AdamW", adamw()), ("clipped", recipe()), ("own", Own())):
        begin = time.perf_counter()
        state = opt.setup(rule, model)
        middle = time.perf_counter()
        opt.update_(state, model, grads)
        end = time.perf_counter()
        found[name] = end - begin
        found[f"{name} setup"] = middle - begin
    return found


def memory(name: str) -> dict[str, Any]:
    """Bytes that a step needs beside model, gradients and state: those NumPy asks for, and those resident."""
    import tracemalloc

    import psutil

    import optimisers as opt

    model, grads = shapes.arrays(name, 1), shapes.arrays(name, 2)
    state = opt.setup(adamw(), model)
    for _ in range(5):
        opt.update_(state, model, grads)
    tracemalloc.start()
    peaks: list[int] = []
    for _ in range(5):
        opt.update_(state, model, grads)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        opt.update_(state, model, grads)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    process = psutil.Process()
    for _ in range(5):
        opt.update_(state, model, grads)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = process.memory_info().rss
    for _ in range(20 if name == "gpt2" else 200):
        opt.update_(state, model, grads)
    whole = sum(x.nbytes for x in model.values())
    return {
        "model": whole,
        "numpy": max(peaks),
        "rss": max(0, peak_rss(process) - before),
    }


def peak_rss(process: Any) -> int:
    """The most memory that was resident since the peak was last set back."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return process.memory_info().rss


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "import": import_time,
    "first": first_steps,
    "memory": memory,
}


# -- printing ------------------------------------------------------------------------------------------------


def show_steps(name: str, timings: Timings, bytes_of: dict[str, int], note: str = "in turn") -> None:
    """The table of one model."""
    parameters = shapes.count(name)
    rows: list[list[str]] = []
    for c in timings.names:
        moved = bytes_of.get(c)
        speed = f"{moved * parameters / timings.median(c) / 1e9:.1f}" if moved else ""
        rows.append(
            [
                c,
                f"{timings.median(c) * 1e3:.3f}",
                f"{timings.minimum(c) * 1e3:.3f}",
                str(moved or ""),
                speed,
                f"{timings.ratio(LIMIT, c):.0%}",
                f"{timings.ratio_of_minima(LIMIT, c):.0%}",
                f"{timings.ratio(PLAIN, c):.1f}x" if PLAIN in timings.seconds else "",
            ]
        )
    head = ["AdamW, float32", "ms", "min", "bytes", "GB/s", "of limit", "of min", "NumPy/this"]
    rounds = len(timings.seconds[LIMIT])
    title = f"{shapes.TITLES[name]}, {parameters / 1e6:.1f} M parameters: medians of {rounds} rounds, {note}"
    show(title, head, rows)


def show_split(runs: dict[str, list[float]]) -> None:
    """The table of the pieces of a step."""
    whole = statistics.median(runs["step"])
    rows: list[list[str]] = []
    for title, seconds in runs.items():
        middle = statistics.median(seconds)
        rows.append([title, f"{middle * 1e6:.0f}", f"{min(seconds) * 1e6:.0f}", f"{middle / whole:.0%}"])
    show("Where update_ on the small model spends its time", ["piece", "us", "min", "share"], rows)


def measure_steps(names: Sequence[str], seconds: float) -> list[list[str]]:
    """Time the steps of these models and print a table for each; rows for the table of targets."""
    import optimisers as opt

    targets: list[list[str]] = []
    for name in names:
        found, state = candidates(name)
        (cost,) = opt.explain(state).groups
        bytes_of = dict.fromkeys((LIMIT, OURS, PURE), cost.bytes_per_parameter)
        bytes_of[RECIPE] = cost.bytes_per_parameter + np.dtype(np.float32).itemsize
        timings = interleaved(found, seconds=seconds, warmup=3)
        show_steps(name, timings, bytes_of)
        pair = interleaved({c: found[c] for c in (LIMIT, OURS)}, seconds=seconds / 2, least=15, most=1000)
        show_steps(name, pair, bytes_of, "these two alone")
        if name == "gpt2":
            share = pair.ratio(LIMIT, OURS)
            targets.append(
                ["gpt2: share of the limit", f"{share:.0%}", ">= 90 %", verdict(share, 0.9, least=True)]
            )
        if name == "small":
            figures = {
                "median among the others": timings.median(OURS),
                "median beside the limit alone": pair.median(OURS),
                "best beside the limit alone": pair.minimum(OURS),
            }
            for what, value in figures.items():
                ms = value * 1e3
                targets.append([f"small: ms per step, {what}", f"{ms:.3f}", "<= 0.7", verdict(ms, 0.7)])
            show_split(split(found[OURS]))
        del found, state
    return targets


def measure_memory(names: Sequence[str]) -> list[list[str]]:
    """Rows on the memory that a step needs."""
    rows: list[list[str]] = []
    for name in names:
        found = child("memory", name)
        for key, what in (("numpy", "allocated"), ("rss", "growth of the process")):
            share = found[key] / found["model"]
            text = f"{found[key] / 1024:.0f} KB, {share:.2%}"
            rows.append([f"{name}: {what} in a step", text, "< 1 %", verdict(share, 0.01)])
    return rows


def measure_starts(repeats: int = 3) -> list[list[str]]:
    """Rows on imports and first steps; the best of several fresh processes."""
    rows: list[list[str]] = []
    imports = [child("import") for _ in range(2 * repeats)]
    seconds = min(i["import"] for i in imports)
    loaded = ", ".join(imports[0]["loaded"])
    rows.append(["import optimisers, after NumPy: s", f"{seconds:.3f}", "<= 0.1", verdict(seconds, 0.1)])
    rows.append(
        ["  of Numba and frameworks, it loads", loaded or "none", "none", "missed" if loaded else "met"]
    )
    cold: list[dict[str, Any]] = []
    warm: list[dict[str, Any]] = []
    third: list[dict[str, Any]] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(child("first", cache=cache))
            warm.append(child("first", cache=cache))
            third.append(child("first", "another", cache=cache))

    def best(runs: list[dict[str, Any]], key: str) -> float:
        return min(r[key] for r in runs)

    rows.append(["import numba: s", f"{best(warm, 'import numba'):.2f}", "", ""])
    rows.append(
        [
            "  and the first function that it compiles, a trivial one: s",
            f"{best(third, 'trivial'):.2f}",
            "",
            "",
        ]
    )
    titles = {
        "AdamW": "setup and first step",
        "clipped": "then with ClipGlobalNorm",
        "own": "then a rule of one's own",
    }
    later = "second process, after a trivial function"
    for title, runs, bound in (
        ("empty cache", cold, 2.0),
        ("second process", warm, 0.3),
        (later, third, 0.3),
    ):
        for key, what in titles.items():
            if runs is third and key != "AdamW":
                continue
            value = best(runs, key)
            text = f"{value:.2f}, {best(runs, key + ' setup'):.2f} in setup"
            rows.append([f"{title}: {what}: s", text, f"<= {bound}", verdict(value, bound)])
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numpy_engine", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(shapes.MODELS), default=list(shapes.MODELS))
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the rounds of each model")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(args)
    if chosen.child:
        print(json.dumps(CHILDREN[chosen.child[0]](*chosen.child[1:])))
        return
    from optimisers.engines.cpu import threads

    sys.stdout.reconfigure(line_buffering=True)
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{platform.machine()}, {threads.available()} cores, {load}, NumPy {np.__version__}")
    rows = measure_steps(chosen.models, chosen.seconds)
    rows += measure_memory(chosen.models)
    rows += measure_starts()
    show("Targets", ["what", "found", "target", ""], rows)


if __name__ == "__main__":
    main()
