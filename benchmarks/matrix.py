"""How fast are the rules that multiply, factorise or sum along matrices? `python -m benchmarks.matrix
[--rules Muon SOAP ...] [--sizes gpt2 24x256 ...] [--worlds torch numpy jax] [--seconds 10]
[--processor] [--out FILE]`.

Float32 on the CPU: the hidden matrices of four layers of GPT-2 small, the kernels of ResNet-18, 24 and 200
matrices of 256 x 256 and 1,000 of 64 x 64. Ours by `update_` (under `jit` by `update`), each peer as its
package steps it; a peer that is not installed, or does not take the shapes, is named and left out. Every rule
and size has a process of its own, in which all take turns; figures are medians of rounds.

The limit is what cannot be saved: the bare batched products of the library (Muon, NorMuon, Scion), those and
the factorisations of a period divided by its length (SOAP, Shampoo, SPlus), those and two triangular solves
(Kron), or reading and writing the arrays once (Adafactor, CAME, SM3). Rules with factorisations renew them
every ten steps, ours and all others, and a round is ten steps. With `--processor` figures are seconds of the
processor, of all threads: with one thread (OMP_NUM_THREADS=1) they can be compared where others work too.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import optimisers as opt
from benchmarks import matrix_limits as limits
from benchmarks import shapes
from benchmarks.limit import limit_of
from benchmarks.matrix_peers import PEERS, PERIOD, Shape, Step, arrays, step_of
from benchmarks.printing import child
from benchmarks.timing import Timings, interleaved

LAYER = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]

MAX_DIM = 1024
"""Axes above have no Gram matrix, here and in peers that can be told so: an eigendecomposition of 3,072 rows
takes seconds."""

SIZES: dict[str, tuple[str, list[Shape]]] = {
    "gpt2": ("4 layers of GPT-2 small", [s for _ in range(4) for s in LAYER]),
    "resnet18": ("kernels of ResNet-18", [s for s in shapes.resnet18() if len(s) == 4]),
    "24x256": ("24 x (256, 256)", [(256, 256)] * 24),
    "200x256": ("200 x (256, 256)", [(256, 256)] * 200),
    "1000x64": ("1,000 x (64, 64)", [(64, 64)] * 1000),
}


class Row(NamedTuple):
    """A rule, and the most times of its limit that it may take; none where there is no target."""

    rule: opt.Rule
    target: float | None = None


ROWS = {
    "Muon": Row(opt.Muon(0.02), 1.15),
    "NorMuon": Row(opt.NorMuon(0.02), 1.3),
    "Scion": Row(opt.Scion(0.01), 1.15),
    "SOAP": Row(opt.SOAP(every=PERIOD, max_dim=MAX_DIM), 1.3),
    "Shampoo": Row(opt.Shampoo(every=PERIOD, max_dim=MAX_DIM), 1.3),
    "SPlus": Row(opt.SPlus(every=PERIOD, max_dim=MAX_DIM)),
    "Kron": Row(opt.Kron()),
    "Adafactor": Row(opt.Adafactor()),
    "CAME": Row(opt.CAME()),
    "SM3": Row(opt.SM3()),
}

ORTHOGONAL = ("Muon", "NorMuon", "Scion")

FASTER = 2.0
"""How many times as long the best peer is to take on many small matrices."""

SMALL = ("200x256", "1000x64")

# -- who takes turns -----------------------------------------------------------------------------------------


def ours(rule: opt.Rule, sizes: list[Shape], world: str) -> Step:
    """Our step in a library."""
    model, grads = arrays(sizes, 0), arrays(sizes, 1)
    if world == "jax":
        jax: Any = importlib.import_module("jax")
        start = list(map(jax.numpy.array, model))
        held, slopes = [opt.setup(rule, start), start], list(map(jax.numpy.asarray, grads))
        step = jax.jit(opt.update, donate_argnums=(0, 1))

        def run() -> None:
            held[:] = step(*held, slopes)
            jax.block_until_ready(held[1])

        return run
    if world == "torch":
        model, grads = (list(map(torch.from_numpy, xs)) for xs in (model, grads))
    state = opt.setup(rule, model)
    return lambda: opt.update_(state, model, grads)


def bare(name: str, sizes: list[Shape], world: str) -> dict[str, Step]:
    """The parts of the limit."""
    if name in ORTHOGONAL:
        return {"limit": getattr(limits, f"orthogonal_{world}")(sizes)}
    if name in limits.AXES:
        flat = [s for s in sizes if name != "SPlus" or (len(s) == 2 and max(s) <= MAX_DIM)]
        products, factorisations = limits.along_axes(name, flat, MAX_DIM)
        return {"limit": repeated(products), "factorisations": factorisations}
    if name == "Kron":
        return {"limit": limits.kron(sizes)}
    model, grads = ({str(i): x for i, x in enumerate(arrays(sizes, k))} for k in (0, 1))
    full = {k: np.zeros_like(x) for k, x in model.items()}
    return {"limit": limit_of(model, grads, [full] if name in ("CAME", "SM3") else [])}


def of_processor(step: Step) -> float:
    """Seconds of the processor, of all threads."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def once(step: Step) -> Step:
    """One step."""
    return step


def repeated(step: Step) -> Step:
    """The steps of a period."""

    def run() -> None:
        for _ in range(PERIOD):
            step()

    return run


def measured(name: str, size: str, world: str, seconds: float, *, processor: bool) -> dict[str, Any]:
    """Milliseconds a step of everyone, and who is left out."""
    sizes, found = SIZES[size][1], dict[str, Step]()
    begin = bare(name, sizes, world)
    often = repeated if name in limits.AXES else once
    found = {**begin, "ours": often(ours(ROWS[name].rule, sizes, world))}
    missing: list[str] = []
    for peer in PEERS[name] if world == "torch" else ():
        label = f"{peer.path} {peer.note}".strip()
        try:
            step = step_of(peer, sizes)
            step()
            found[label] = often(step)
        except Exception as error:  # noqa: BLE001 whatever a package of others does, the others are timed
            missing.append(f"{label}: {type(error).__name__}: {error!s:.90}")
    clock = of_processor if processor else None
    taken = interleaved(found, seconds=seconds, least=2, warmup=1, clock=clock)
    return {"ms": milliseconds(taken, name), "missing": missing, "rounds": len(taken.seconds["ours"])}


def milliseconds(taken: Timings, name: str) -> dict[str, tuple[float, float]]:
    """(median, minimum) a step of everyone, the limit first and as one."""
    part = PERIOD if name in limits.AXES else 1
    both = [taken.median, taken.minimum]
    found = {n: (1e3 * both[0](n) / part, 1e3 * both[1](n) / part) for n in taken.names}
    extra = found.pop("factorisations", (0.0, 0.0))
    found["limit"] = found["limit"][0] + extra[0], found["limit"][1] + extra[1]
    return found


# -- the table -----------------------------------------------------------------------------------------------


def lines_of(name: str, size: str, world: str, answer: dict[str, Any]) -> list[str]:
    """A row of the table for everyone."""
    ms = answer["ms"]
    whole = f"{name}, {SIZES[size][0]}" + ("" if world == "torch" else f", {world}")
    found = [f"| **{whole}** | | | | |"]
    for who, (median, minimum) in ms.items():
        times = [(median / ms[o][0], minimum / ms[o][1]) for o in ("limit", "ours")]
        ratios = (f"{a:.2f} ({b:.2f})" for a, b in times)
        found.append(f"| {who} | {median:.1f} | {minimum:.1f} | {' | '.join(ratios)} |")
    found += [f"| left out: {what} | | | | |" for what in answer["missing"]]
    return found


def verdict(name: str, size: str, world: str, answer: dict[str, Any]) -> str:
    """What was asked of a rule, and what is; peers in bfloat16 do other work."""
    ms, target = answer["ms"], ROWS[name].target
    said: list[str] = []
    ratio = min(ms["ours"][k] / ms["limit"][k] for k in (0, 1))
    if target is not None:
        said.append(f"{ratio:.2f} x its limit (at most {target:g}: {'met' if ratio <= target else 'missed'})")
    others = {who: v for who, v in ms.items() if who not in ("ours", "limit") and "bfloat16" not in who}
    if others:
        best = min(others, key=lambda who: others[who][0])
        times, least = others[best][0] / ms["ours"][0], FASTER if size in SMALL else 1.0
        said.append(f"{times:.1f} x as fast as {best} (at least {least:g}: {judge(times >= least)})")
    return f"{name}, {SIZES[size][0]}, {world}: {'; '.join(said)}" if said else ""


def judge(met: bool) -> str:
    return "met" if met else "missed"


def machine() -> str:
    """The machine and what is installed, in words."""
    packages = ["torch", "numpy", "jax", "optax", "heavyball", "pytorch_optimizer", "timm", "came_pytorch"]
    found: list[str] = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    system = f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}, {', '.join(found)}"
    return f"{system}, {torch.get_num_threads()} threads; {versions}; {time.strftime('%Y-%m-%d')}."


HEAD = """\
# Rules of matrices on the CPU

{machine}

Float32. Milliseconds {kind} a step: the median and the least of rounds in which all took turns, and
how many times the limit and ours that is (of the least in brackets).

| | median | least | x limit | x ours |
|---|---:|---:|---:|---:|
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--rules", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--worlds", nargs="+", choices=["torch", "numpy", "jax"], default=["torch"])
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each process measures")
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, not of the clock")
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        asked = given.rules[0], given.sizes[0], given.worlds[0], given.seconds
        print(json.dumps(measured(*asked, processor=given.processor)))
        return
    rows, said = list[str](), list[str]()
    for name in given.rules:
        for size in given.sizes:
            for world in given.worlds:
                if world != "torch" and name not in ORTHOGONAL:
                    continue
                print(f"{name}, {SIZES[size][0]}, {world} ...", file=sys.stderr, flush=True)
                words = ["--rules", name, "--sizes", size, "--worlds", world, "--seconds", str(given.seconds)]
                words += ["--processor"] * given.processor
                try:
                    answer = child(*words, module="benchmarks.matrix")
                except RuntimeError as error:
                    print(f"left out: {error!s:.2000}", file=sys.stderr, flush=True)
                    continue
                new, what = lines_of(name, size, world, answer), verdict(name, size, world, answer)
                print("\n".join([*new, what]), flush=True)
                rows, said = [*rows, *new], [*said, *([f"- {what}"] if what else [])]
    if given.out:
        kind = "of the processor" if given.processor else "of the clock"
        text = [HEAD.format(machine=machine(), kind=kind) + "\n".join(rows), "", "What was asked:", "", *said]
        given.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
