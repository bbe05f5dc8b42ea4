"""How fast are steps on PyTorch tensors on the CPU, beside the optimisers that PyTorch users have?

    python -m benchmarks.torch_cpu [--models small resnet18 gpt2] [--seconds 10] [--slow]

It prints tables and never asserts. Every row of optimisers steps the same parameters with the same gradients,
in turn, in one process. `--slow` adds those that compile for minutes: torch.compile around the step, and
HeavyBall if it is installed. What needs a fresh process (memory) runs this module again, with `--child`.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import optimisers as opt
from benchmarks import shapes
from benchmarks.numpy_engine import peak_rss
from benchmarks.printing import child, show, verdict
from benchmarks.timing import Timings, interleaved, judged
from benchmarks.torch_peers import (
    BETA,
    DECAY,
    ETA,
    Build,
    Step,
    belief_foreach,
    belief_loop,
    compiled,
    descent_foreach,
    descent_loop,
    of_heavyball,
    of_optimi,
    of_torch,
    torch_recipe,
)
from benchmarks.torch_ways import (
    DecayDescent,
    adamw,
    as_torch,
    as_tree,
    model,
    recipe_as_torch,
    recipe_as_tree,
)

OURS, TREE = "TorchOptimizer.step", "update_"
FUSED, FOREACH, LOOP = "torch fused", "torch foreach", "torch loop"

CHECKED = 3
"""Steps after which all must have the same parameters."""


# -- models --------------------------------------------------------------------------------------------------


# -- ours ----------------------------------------------------------------------------------------------------


# -- the peers -----------------------------------------------------------------------------------------------


# -- rows ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """Ways to take the same step."""

    title: str
    dtype: torch.dtype
    ours: dict[str, Build]
    peers: dict[str, Build]
    slow: dict[str, Build] = dataclasses.field(default_factory=dict[str, Build])
    restore: str = ""
    """What a step does to the gradients, to be undone outside the timing: "dropped", "zeroed" or nothing."""

    def builds(self, *, slow: bool) -> dict[str, Build]:
        return self.ours | self.peers | (self.slow if slow else {})


STATE, STATE_TREE = "TorchOptimizer.step, float32 state", "update_, float32 state"
MASTERS, MASTERS_TREE = "TorchOptimizer.step, exact masters", "update_, exact masters"

OPTIMI = {"optimi foreach": of_optimi(foreach=True), "optimi loop": of_optimi(foreach=False)}

TORCH = {FUSED: of_torch(fused=True), FOREACH: of_torch(foreach=True), LOOP: of_torch()}

SLOW = {"torch.compile": compiled(foreach=True), "HeavyBall": of_heavyball}


def fused_rows(*, to_none: bool) -> dict[str, dict[str, Build]]:
    return {
        "ours": {OURS: recipe_as_torch(to_none=to_none), TREE: recipe_as_tree(to_none=to_none)},
        "peers": {
            FUSED: torch_recipe(to_none=to_none, fused=True),
            FOREACH: torch_recipe(to_none=to_none, foreach=True),
            LOOP: torch_recipe(to_none=to_none),
        },
    }


ROWS = {
    "adamw": Row(
        "AdamW, float32",
        torch.float32,
        {OURS: as_torch(adamw()), TREE: as_tree(adamw())},
        TORCH | OPTIMI,
        SLOW,
    ),
    "bfloat16": Row(
        "AdamW, bfloat16",
        torch.bfloat16,
        {
            STATE: as_torch(adamw()),
            STATE_TREE: as_tree(adamw()),
            MASTERS: as_torch(opt.SplitPrecision(adamw())),
            MASTERS_TREE: as_tree(opt.SplitPrecision(adamw())),
        },
        TORCH | OPTIMI,
        SLOW,
    ),
    "recipe": Row(
        "clip, AdamW, average, gradients dropped; float32",
        torch.float32,
        **fused_rows(to_none=True),
        restore="dropped",
    ),
    "zeroing": Row(
        "clip, AdamW, average, gradients filled with zeros; float32",
        torch.float32,
        **fused_rows(to_none=False),
        restore="zeroed",
    ),
    "belief": Row(
        "AdaBelief, float32",
        torch.float32,
        {OURS: as_torch(opt.AdaBelief(ETA, BETA)), TREE: as_tree(opt.AdaBelief(ETA, BETA))},
        {"by hand, foreach": belief_foreach, "by hand, loop": belief_loop},
    ),
    "descent": Row(
        "WeightDecay and DecayDescent, float32",
        torch.float32,
        {
            OURS: as_torch(opt.Chain(opt.WeightDecay(DECAY), DecayDescent(ETA))),
            TREE: as_tree(opt.Chain(opt.WeightDecay(DECAY), DecayDescent(ETA))),
        },
        {"by hand, foreach": descent_foreach, "by hand, loop": descent_loop},
    ),
}


def restoring(row: Row, module: torch.nn.Module) -> Callable[[str], None] | None:
    """What gives the parameters their gradients back before every step."""
    parameters = list(module.parameters())
    grads = [p.grad for p in parameters]
    if row.restore == "dropped":

        def give(_: str) -> None:
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g

        return give
    if row.restore == "zeroed":
        kept = [g.clone() for g in grads]
        return lambda _: torch._foreach_copy_(grads, kept)
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of peers; they are theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def unlike(row: Row, build: Build) -> float:
    """How far the parameters of a way are from those of the first peer after a few steps on the small model:
    the mean difference over the mean size of a parameter.
    """
    ends: list[list[torch.Tensor]] = []
    for way in (build, *list(row.peers.values())[:1]):
        module = model("small", row.dtype)
        restore, step = restoring(row, module), way(module)
        for _ in range(CHECKED):
            if restore is not None:
                restore("")
            step()
        ends.append([p.detach().double() for p in module.parameters()])
    difference = sum(float((a - b).abs().sum()) for a, b in zip(*ends, strict=True))
    return difference / sum(float(b.abs().sum()) for b in ends[1])


def agreement(keys: Sequence[str], *, slow: bool) -> dict[str, set[str]]:
    """Print whether all ways of each row compute the same numbers; by row, those that do not."""
    table: list[list[str]] = []
    others: dict[str, set[str]] = {key: set() for key in keys}
    for key in keys:
        row = ROWS[key]
        # In bfloat16 some round to 8 bits in places where others do not; elsewhere only orders differ.
        bound = 2**-7 if row.dtype is torch.bfloat16 else 1e-5
        for name, build in row.builds(slow=slow).items():
            try:
                with quiet():
                    far = unlike(row, build)
            except ImportError as error:
                table.append([row.title, name, f"{error}", "left out"])
                continue
            if far > bound:
                others[key].add(name)
            table.append([row.title, name, f"{far:.1e}", "same" if far <= bound else "other"])
    title = (
        f"Same numbers? Mean difference from the first peer after {CHECKED} steps on the small model; what "
        "computes others is timed, but is not called the best peer"
    )
    show(title, ["row", "way", "difference", ""], table)
    return others


# -- steps ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """The timings of a row on a model."""

    row: Row
    timings: Timings
    others: set[str]
    """Ways that compute other numbers."""
    order: str
    """What each follows."""

    def best(self, measure: Callable[[str], float]) -> str:
        """The fastest peer."""
        return min(
            (n for n in self.timings.names if n not in self.row.ours.keys() | self.others), key=measure
        )

    def faster(self, name: str, peer: str | None = None) -> tuple[float, float]:
        """How many times as fast a way is as a peer, the best if none is named: by medians, by minima."""
        t = self.timings
        by_median, by_minimum = peer or self.best(t.median), peer or self.best(t.minimum)
        return t.ratio(by_median, name), t.ratio_of_minima(by_minimum, name)


def measure(key: str, name: str, seconds: float, others: set[str], *, slow: bool) -> Iterator[Found]:
    """Time the ways of a row on a model, each after another; the small model also each after itself.

    What follows another finds its arrays and code out of the caches, and the threads of torch still spinning
    on the other core. A training loop is between the two.
    """
    row = ROWS[key]
    module = model(name, row.dtype)
    restore = restoring(row, module) or str
    steps: dict[str, Step] = {}
    for title, build in row.builds(slow=slow).items():
        with contextlib.suppress(ImportError):
            steps[title] = build(module)

    def itself(way: str) -> None:
        restore(way)
        steps[way]()
        restore(way)

    with quiet():
        yield Found(row, interleaved(steps, seconds=seconds, warmup=3, before=restore), others, "another")
        if name == "small":
            yield Found(row, interleaved(steps, seconds=seconds, before=itself), others, "itself")


def show_found(name: str, found: Found) -> None:
    """The table of one row on one model."""
    t = found.timings
    rows: list[list[str]] = []
    for way in t.names:
        by_median, by_minimum = found.faster(way)
        rows.append(
            [
                way,
                f"{t.median(way) * 1e3:.2f}",
                f"{t.minimum(way) * 1e3:.2f}",
                f"{by_median:.2f}x",
                f"{by_minimum:.2f}x",
            ]
        )
    rounds = len(t.seconds[t.names[0]])
    title = f"{shapes.TITLES[name]}, {found.row.title}: medians of {rounds} rounds, each after {found.order}"
    show(title, ["way", "ms", "min", "best peer/this", "of min"], rows)


def targets(key: str, name: str, found: Found) -> list[list[str]]:
    """A line for every target of a row on a model."""

    def line(way: str, least: float, peer: str | None = None) -> list[str]:
        ratios = found.faster(way, peer)
        than = peer or f"the best peer, {found.best(found.timings.median)}"
        return [
            f"{name}: {found.row.title}: {way}, times as fast as {than}; each after {found.order}",
            f"{ratios[0]:.2f}, {ratios[1]:.2f}",
            f">= {least:g}",
            judged(*ratios, least),
        ]

    if key == "adamw" and name == "small":
        return [line(OURS, 10), line(TREE, 6)]
    if key == "adamw" and name == "gpt2":
        return [line(OURS, 1, FUSED)]
    if key == "bfloat16":
        return [line(STATE, 1, FUSED), line(MASTERS, 1, FUSED)]
    if key in {"recipe", "zeroing"}:
        return [line(OURS, 10 if name == "small" else 1.5)]
    if key in {"belief", "descent"}:
        return [line(way, 4, "by hand, foreach") for way in (OURS, TREE)]
    return []


# -- what needs a process of its own -------------------------------------------------------------------------


def memory(key: str, name: str, way: str) -> dict[str, Any]:
    """Bytes by which the process grows in a step, beside model, gradients and state, and those of the
    model.
    """
    import psutil

    row = ROWS[key]
    module = model(name, row.dtype)
    restore = restoring(row, module)
    step = row.builds(slow=False)[way](module)
    process = psutil.Process()
    most = 0
    for attempt in range(4):
        if restore is not None:
            restore("")
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # Linux: what was freed must not hide what is needed again
            Path("/proc/self/clear_refs").write_text("5")  # and the peak begins anew
        before = process.memory_info().rss
        step()
        if attempt > 1:  # the state is there, and the threads are
            most = max(most, peak_rss(process) - before)
    return {"model": sum(p.nbytes for p in module.parameters()), "rss": max(0, most)}


def measure_memory(names: Sequence[str], keys: Sequence[str]) -> list[list[str]]:
    """Rows on the memory that a step needs; those of peers have no target."""
    rows: list[list[str]] = []
    for key, way in (
        ("adamw", OURS),
        ("adamw", TREE),
        ("recipe", OURS),
        ("adamw", FUSED),
        ("adamw", FOREACH),
        ("recipe", FUSED),
    ):
        for name in names if key in keys else []:
            found = child("memory", key, name, way, module="benchmarks.torch_cpu")
            share = found["rss"] / found["model"]
            ours = way in ROWS[key].ours
            rows.append(
                [
                    f"{name}: growth in a step of {way}, {ROWS[key].title}",
                    f"{found['rss'] / 1024:.0f} KB, {share:.2%}",
                    "< 1 %" if ours else "",
                    verdict(share, 0.01) if ours else "",
                ]
            )
    return rows


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """One core kept busy by another process."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    pin = "" if core is None else f"import os; os.sched_setaffinity(0, {{{core}}})\n"
    process = subprocess.Popen([sys.executable, "-c", f"{pin}while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def measure_busy(steps: int = 300, most: float = 60.0) -> list[list[str]]:
    """Rows on the slowest of many steps of the small model while one core is busy."""
    rows: list[list[str]] = []
    for way, build in {**ROWS["adamw"].ours, FUSED: TORCH[FUSED]}.items():
        step = build(model("small", torch.float32))
        for _ in range(5):
            step()
        taken: list[float] = []
        with busy_core():
            end = time.perf_counter() + most
            while len(taken) < steps and time.perf_counter() < end:
                begin = time.perf_counter()
                step()
                taken.append(time.perf_counter() - begin)
        taken.sort()
        slowest, middle = taken[-1] * 1e3, taken[len(taken) // 2] * 1e3
        rows.append(
            [
                f"small, one core busy: slowest of {len(taken)} steps of {way}",
                f"{slowest:.1f} ms (median {middle:.1f})",
                "" if way == FUSED else "<= 20 ms",
                "" if way == FUSED else verdict(slowest, 20),
            ]
        )
    return rows


# -- all -----------------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_cpu", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(shapes.MODELS), default=list(shapes.MODELS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--slow", action="store_true", help="peers too that compile for minutes")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the rounds of each table")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(args)
    if chosen.child:
        print(json.dumps({"memory": memory}[chosen.child[0]](*chosen.child[1:])))
        return
    sys.stdout.reconfigure(line_buffering=True)
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {load}, torch {torch.__version__}")
    others = agreement(chosen.rows, slow=chosen.slow)
    lines: list[list[str]] = []
    for name in chosen.models:
        for key in chosen.rows:
            for found in measure(key, name, chosen.seconds, others[key], slow=chosen.slow):
                show_found(name, found)
                lines += targets(key, name, found)
            gc.collect()
    lines += measure_memory(chosen.models, chosen.rows)
    if "small" in chosen.models and "adamw" in chosen.rows:
        lines += measure_busy()
    show("Targets", ["what", "found", "target", ""], lines)


if __name__ == "__main__":
    main()
