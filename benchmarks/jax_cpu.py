"""How fast are jitted steps of JAX on the CPU beside Optax, what do they take to compile, and what memory?

    python -m benchmarks.jax_cpu [--models small resnet18 gpt2] [--seconds 10]

It prints tables and never asserts. Every row steps the same parameters with the same gradients, in turn, in
one process: with our CPU kernel, with XLA alone, and with Optax; parameters and state are given away at every
step. Rows of many small arrays have both again with `packed=True`. What needs a fresh process (tracing,
compiling, kernels that are not yet on disk) runs this module again, with `--child`.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optimisers as opt
from benchmarks import shapes
from benchmarks.printing import child, show, verdict
from benchmarks.timing import Timings, interleaved, judged
from optimisers.engines.xla import call as ffi

ETA, LAM, NORM = 1e-3, 1e-4, 1.0

Arrays = dict[str, Any]

OURS, XLA, OPTAX = "kernel", "XLA alone", "Optax"
PACKED, XLA_PACKED = "kernel, packed", "XLA alone, packed"
WAYS = (OURS, PACKED, XLA, XLA_PACKED, OPTAX)
KERNEL, ALONE, PACKS = (OURS, PACKED), (XLA, XLA_PACKED), (PACKED, XLA_PACKED)
SLOPES = "gradients alone"

CHECKED = 3
"""Steps after which all must have the same parameters."""

ROUNDS = 3
"""Fresh processes in which each way is compiled."""

LAYERS, BATCH = 400, 32
"""Of the network whose whole train step is timed: each layer has two weights of 32 x 32."""


# -- models --------------------------------------------------------------------------------------------------


def arrays(name: str, seed: int) -> Arrays:
    """A dict model in [0, 0.01); "hwio" is ResNet-18 with the axes of its kernels as Flax has them."""
    found = shapes.arrays("resnet18" if name == "hwio" else name, seed)
    if name == "hwio":
        found = {k: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T for k, x in found.items()}
    return {k: jnp.array(x) for k, x in found.items()}


def weights() -> Arrays:
    """The parameters of the residual network."""
    keys = jax.random.split(jax.random.key(0), 2 * LAYERS)
    draw = jax.vmap(lambda key: jax.random.normal(key, (32, 32)) / math.sqrt(32 * LAYERS))
    return {f"p{i}": x for i, x in enumerate(draw(keys))}


def loss(model: Arrays, inputs: Any) -> Any:
    """Of the residual network, which should give its inputs times two."""
    x = inputs
    for i in range(0, 2 * LAYERS, 2):
        x = x + jnp.tanh(x @ model[f"p{i}"]) @ model[f"p{i + 1}"]
    return jnp.mean((x - 2 * inputs) ** 2)


TITLES = {
    "small": shapes.TITLES["small"],
    "resnet18": "ResNet-18, OIHW",
    "hwio": "ResNet-18, HWIO",
    "gpt2": shapes.TITLES["gpt2"],
    "train": "whole train step, 800 arrays",
}

OF = {"small": ("small", "train"), "resnet18": ("resnet18", "hwio"), "gpt2": ("gpt2",)}
"""What is timed for each of the names that may be asked for."""


def ways(name: str) -> tuple[str, ...]:
    """The ways to step a model: `packed=True` only where there are many small arrays."""
    return WAYS if name in OF["small"] else (OURS, XLA, OPTAX)


# -- steps ---------------------------------------------------------------------------------------------------


def rule(*, clip: bool) -> opt.Rule:
    adamw = opt.AdamW(ETA, lam=LAM)
    return opt.Chain(opt.ClipGlobalNorm(NORM), adamw) if clip else adamw


def transformation(*, clip: bool) -> Any:
    adamw = optax.adamw(ETA, weight_decay=LAM)
    return optax.chain(optax.clip_by_global_norm(NORM), adamw) if clip else adamw


@contextlib.contextmanager
def without_kernel(way: str) -> Iterator[None]:
    """What is traced and set up here for XLA alone finds no kernel."""
    if way not in ALONE:
        yield
        return
    available = ffi.available
    ffi.available = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        ffi.available = available


def begin(way: str, params: Arrays, *, clip: bool) -> Any:
    """The state before the first step."""
    with without_kernel(way):
        if way == OPTAX:
            return transformation(clip=clip).init(params)
        return opt.setup(rule(clip=clip), params, packed=way in PACKS)


def stepper(way: str, *, clip: bool, train: bool) -> Any:
    """The jitted step (params, state, given) -> (params, state).

    What is given are gradients, or inputs to train on.
    """
    tx = transformation(clip=clip)

    def step(params: Arrays, state: Any, given: Any) -> Any:
        grads = jax.grad(loss)(params, given) if train else given
        if way == OPTAX:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state
        state, params = opt.update(state, params, grads)
        return params, state

    return jax.jit(step, donate_argnums=(0, 1))


def problem(name: str) -> tuple[Arrays, Any]:
    """(parameters, what a step is given)."""
    if name == "train":
        return weights(), jax.random.normal(jax.random.key(1), (BATCH, 32))
    return arrays(name, 1), arrays(name, 2)


class Run:
    """A training that goes on step by step, on parameters of its own; one step is taken."""

    def __init__(self, way: str, name: str, given: Any, *, clip: bool) -> None:
        self.given = given
        self.params = problem(name)[0]
        self.state = begin(way, self.params, clip=clip)
        self.step = stepper(way, clip=clip, train=name == "train")
        with without_kernel(way):
            self()  # here it is traced

    def __call__(self) -> None:
        self.params, self.state = self.step(self.params, self.state, self.given)
        jax.block_until_ready((self.params, self.state))


def slopes(given: Any) -> Callable[[], Any]:
    """What is left of the train step without a step: the gradients, in new arrays."""
    params, of = weights(), jax.jit(jax.grad(loss))
    return lambda: jax.block_until_ready(of(params, given))


# -- the same numbers ----------------------------------------------------------------------------------------


def agreement() -> None:
    """Print whether all ways compute the same numbers."""
    start, given = problem("small")
    rows: list[list[str]] = []
    for clip in (False, True):
        ends: dict[str, Arrays] = {}
        for way in WAYS:
            run = Run(way, "small", given, clip=clip)
            for _ in range(CHECKED - 1):
                run()
            ends[way] = run.params
        moved = sum(float(jnp.abs(ends[OPTAX][k] - x).sum()) for k, x in start.items())
        for way in WAYS[:-1]:
            far = sum(float(jnp.abs(ends[OPTAX][k] - ends[way][k]).sum()) for k in start) / moved
            # Optax works out 1 - beta**t in float32, and loses some of its digits.
            rows.append([title_of(clip=clip), way, f"{far:.1e}", "same" if far <= 1e-4 else "other"])
    title = f"Same numbers? Mean difference from Optax after {CHECKED} steps, as a share of the way"
    show(title, ["row", "way", "difference", ""], rows)


def title_of(*, clip: bool) -> str:
    return "clip by global norm + AdamW" if clip else "AdamW"


# -- what needs a process of its own -------------------------------------------------------------------------


def compilation(name: str, way: str, clip: str) -> dict[str, Any]:
    """Seconds to trace and to compile a step, those of our kernels apart, and XLA's temporary memory."""
    params, given = problem(name)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))  # what JAX loads at its first compilation
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent += time.perf_counter() - start

        return call

    ffi.target = timed(ffi.target)
    if way in KERNEL:
        timed(ffi.available)()
    state = begin(way, params, clip=bool(clip))
    step = stepper(way, clip=bool(clip), train=name == "train")
    with without_kernel(way):
        own, start = spent, time.perf_counter()
        lowered = step.trace(params, state, given).lower()
        middle, inside = time.perf_counter(), spent - own
        compiled = lowered.compile()
    return {
        "trace": middle - start - inside,
        "compile": time.perf_counter() - middle,
        "kernels": spent,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "parameters": sum(x.nbytes for x in params.values()),
    }


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a step of one way took to compile, and takes in memory."""

    trace: float
    compile: float
    kernels: float
    """Loading our kernels from disk, once in a process."""
    first: float
    """Compiling them, once on a machine."""
    share: float
    """Temporary memory over that of the parameters."""

    @property
    def both(self) -> float:
        return self.trace + self.compile


def measured(name: str, *, clip: bool) -> dict[str, Compiled]:
    """The compilations of all ways in fresh processes, in turn; of each the one that took the middle time."""
    run = functools.partial(child, module="benchmarks.jax_cpu")
    args = [("compilation", name, way, "clip" if clip else "") for way in ways(name)]
    first = dict.fromkeys(ways(name), 0.0)
    for way, call in zip(ways(name), args, strict=True):
        if way in KERNEL:
            with tempfile.TemporaryDirectory() as cache:  # with nothing on disk
                first[way] = run(*call, cache=cache)["kernels"]
    found: dict[str, list[Compiled]] = {way: [] for way in ways(name)}
    for _ in range(ROUNDS):
        for way, call in zip(ways(name), args, strict=True):
            c = run(*call)
            share = c["temporary"] / c["parameters"]
            found[way].append(Compiled(c["trace"], c["compile"], c["kernels"], first[way], share))
    return {way: sorted(every, key=lambda c: c.both)[ROUNDS // 2] for way, every in found.items()}


# -- tables --------------------------------------------------------------------------------------------------


def show_steps(name: str, t: Timings, *, clip: bool) -> None:
    rows = [
        [
            way,
            f"{t.median(way) * 1e3:.2f}",
            f"{t.minimum(way) * 1e3:.2f}",
            f"{t.ratio(OPTAX, way):.2f}x",
            f"{t.ratio_of_minima(OPTAX, way):.2f}x",
        ]
        for way in t.names
    ]
    title = f"{TITLES[name]}, {title_of(clip=clip)}: medians of {len(t.seconds[OPTAX])} rounds"
    show(title, ["way", "ms", "min", "Optax/this", "of min"], rows)


def show_compiled(name: str, found: dict[str, Compiled], *, clip: bool) -> None:
    optax_ = found[OPTAX].both
    rows = [
        [
            way,
            f"{c.trace:.2f}",
            f"{c.compile:.2f}",
            f"{optax_ / c.both:.1f}x",
            f"{c.kernels:.2f}" if c.kernels else "",
            f"{c.first:.1f}" if c.first else "",
            f"{c.share:.2%}",
        ]
        for way, c in found.items()
    ]
    show(
        f"{TITLES[name]}, {title_of(clip=clip)}: seconds in a fresh process, and temporary memory",
        ["way", "trace", "compile", "Optax/this", "kernels: load", "first ever", "of parameters"],
        rows,
    )


def targets(name: str, t: Timings, found: dict[str, Compiled], *, clip: bool) -> list[list[str]]:
    """A line for every target of a row on a model."""
    title = f"{name}: {title_of(clip=clip)}"

    def faster(way: str, least: float) -> list[str]:
        ratios = t.ratio(OPTAX, way), t.ratio_of_minima(OPTAX, way)
        return [
            f"{title}, {way}: times as fast as Optax",
            f"{ratios[0]:.2f}, {ratios[1]:.2f}",
            f">= {least:g}",
            judged(*ratios, least),
        ]

    lines: list[list[str]] = []
    least = {"gpt2": 2.3 if clip else 1.5, "resnet18": 4.0, "small": 2.0, "train": 1.8}.get(name)
    if least is not None:
        lines.append(faster(OURS, least))
    if name != "train":
        lines.append(faster(XLA, 1.6 if name == "small" else 1.0))
    if name == "small":
        shorter = found[OPTAX].both / found[OURS].both
        lines.append(
            [
                f"{title}, {OURS}: trace + compile, times as short as Optax",
                f"{shorter:.1f}",
                ">= 7",
                verdict(shorter, 7, least=True),
            ]
        )
    memory = [
        [
            f"{title}, {way}: temporary memory, share of the parameters",
            f"{found[way].share:.2%}",
            "< 1 %",
            verdict(found[way].share, 0.01),
        ]
        for way in (OURS, XLA)
    ]
    return lines + (memory if name != "train" else [])


# -- all -----------------------------------------------------------------------------------------------------


def measure(name: str, seconds: float, *, clip: bool) -> list[list[str]]:
    """Time a row on a model in this process, compile it in others, print both; the lines of its targets."""
    given = problem(name)[1]
    runs: dict[str, Callable[[], object]] = {way: Run(way, name, given, clip=clip) for way in ways(name)}
    if name == "train":
        runs[SLOPES] = slopes(given)
    t = interleaved(runs, seconds=seconds, warmup=3)
    show_steps(name, t, clip=clip)
    del runs, given
    gc.collect()
    found = measured(name, clip=clip)
    show_compiled(name, found, clip=clip)
    return targets(name, t, found, clip=clip)


def main(args: Sequence[str] | None = None) -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jax_cpu", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(OF), default=list(OF))
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the rounds of each table")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(args)
    if chosen.child:
        print(json.dumps({"compilation": compilation}[chosen.child[0]](*chosen.child[1:])))
        return
    sys.stdout.reconfigure(line_buffering=True)
    load = f"load {os.getloadavg()[0]:.1f}, " if hasattr(os, "getloadavg") else ""
    kernels = "kernels in XLA" if ffi.available() else "no kernels: XLA alone twice"
    versions = f"jax {jax.__version__}, optax {optax.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {load}{versions}, {kernels}")
    agreement()
    lines: list[list[str]] = []
    for model in chosen.models:
        for name in OF[model]:
            for clip in (False, True):
                lines += measure(name, chosen.seconds, clip=clip)
    show("Targets", ["what", "found", "target", ""], lines)


if __name__ == "__main__":
    main()
