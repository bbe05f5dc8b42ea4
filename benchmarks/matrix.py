"""How fast are the rules that multiply, factorise or sum along matrices?

    python -m benchmarks.matrix [--rules Muon SOAP ...] [--sizes gpt2 24x256 ...] [--worlds torch numpy jax]
                                [--seconds 10] [--cpu] [--without heavyball ...] [--again | --show]
                                [--note TEXT] [--keep FILE.jsonl] [--out FILE.md]

Every row is kept in a file as soon as it is there (build/matrix-cpu.jsonl), and all rows of that file that
were measured by the chosen clock go into the table (benchmarks/results/matrix-cpu.md): a run that was stopped
goes on, and one of a few rules or sizes adds to the table. `--again` measures the chosen ones once more, and
`--show` none.

Float32 on the CPU: the hidden matrices of four layers of GPT-2 small, the kernels of ResNet-18, 24 and 200
matrices of 256 x 256 and 1,000 of 64 x 64. Ours by `update_` (under `jit` by `update`), each peer as its
package steps it; a peer that is not installed, or does not take the shapes, is named and left out. Every rule
and size has a process of its own, in which all take turns; figures are medians of rounds.

The limit is what cannot be saved: the bare batched products of the library (Muon, NorMuon, Scion), those and
the factorisations of a period divided by its length (SOAP, Shampoo, SPlus), those and two triangular solves
(Kron), or reading and writing the arrays once (Adafactor, CAME, SM3). Rules with factorisations renew them
every ten steps, ours and all others, and a round is ten steps. With `--cpu` figures are seconds of the
processor, of all threads: with one thread (OMP_NUM_THREADS=1) they can be compared where others work too.
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import optimisers as opt
from benchmarks import matrix_limits as limits
from benchmarks import shapes
from benchmarks.kept import CLOCKS, Found, What, add_options, header, kept_rows, parsed, rows, seconds_by
from benchmarks.limit import limit_of
from benchmarks.matrix_peers import PEERS, PERIOD, Shape, Step, arrays, step_of
from benchmarks.printing import ROOT
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


ASKED = ("gpt2", "resnet18", "200x256", "1000x64")
"""Sizes that are measured unless others are named."""

KEEP, OUT = ROOT / "build" / "matrix-cpu.jsonl", ROOT / "benchmarks" / "results" / "matrix-cpu.md"

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


def once(step: Step) -> Step:
    """One step."""
    return step


def repeated(step: Step) -> Step:
    """The steps of a period."""

    def run() -> None:
        for _ in range(PERIOD):
            step()

    return run


def measured(
    name: str, size: str, world: str, seconds: float, *, clock: str, without: Sequence[str] = ()
) -> Found:
    """Milliseconds a step of everyone, and who is left out; peers of some packages are."""
    sizes, found = SIZES[size][1], dict[str, Step]()
    begin = bare(name, sizes, world)
    often = repeated if name in limits.AXES else once
    found = {**begin, "ours": often(ours(ROWS[name].rule, sizes, world))}
    missing: list[str] = []
    for peer in PEERS[name] if world == "torch" else ():
        label = f"{peer.path} {peer.note}".strip()
        if peer.path.partition(".")[0] in without:
            continue
        try:
            step = step_of(peer, sizes)
            step()
            found[label] = often(step)
        except Exception as error:  # noqa: BLE001 whatever a package of others does, the others are timed
            missing.append(f"{label}: {type(error).__name__}: {error!s:.90}")
    taken = interleaved(found, seconds=seconds, least=2, warmup=1, clock=seconds_by(clock))
    return {"ms": milliseconds(taken, name), "missing": missing, "threads": torch.get_num_threads()}


def milliseconds(taken: Timings, name: str) -> dict[str, tuple[float, float]]:
    """(median, minimum) a step of everyone, the limit first and as one."""
    part = PERIOD if name in limits.AXES else 1
    both = [taken.median, taken.minimum]
    found = {n: (1e3 * both[0](n) / part, 1e3 * both[1](n) / part) for n in taken.names}
    extra = found.pop("factorisations", (0.0, 0.0))
    found["limit"] = found["limit"][0] + extra[0], found["limit"][1] + extra[1]
    return found


# -- the table -----------------------------------------------------------------------------------------------


def of(found: Found) -> str:
    """What a row is about, for the reader."""
    return f"{found['rule']}, {SIZES[found['size']][0]}" + (
        "" if found["world"] == "torch" else f", {found['world']}"
    )


def lines_of(found: Found) -> list[str]:
    """A row of the table for everyone."""
    ms = found["ms"]
    lines = [f"| **{of(found)}** | | | | |"]
    for who, (median, minimum) in ms.items():
        times = [(median / ms[o][0], minimum / ms[o][1]) for o in ("limit", "ours")]
        ratios = (f"{a:.2f} ({b:.2f})" for a, b in times)
        lines.append(f"| {who} | {median:.1f} | {minimum:.1f} | {' | '.join(ratios)} |")
    return lines + [f"| left out: {what} | | | | |" for what in found["missing"]]


def verdict(found: Found) -> str:
    """What was asked of a rule, and what is; peers in bfloat16 do other work."""
    ms, target = found["ms"], ROWS[found["rule"]].target
    said: list[str] = []
    ratio = min(ms["ours"][k] / ms["limit"][k] for k in (0, 1))
    if target is not None:
        said.append(f"{ratio:.2f} x its limit (at most {target:g}: {judge(ratio <= target)})")
    others = {who: v for who, v in ms.items() if who not in ("ours", "limit") and "bfloat16" not in who}
    if others:
        best = min(others, key=lambda who: others[who][0])
        times, least = others[best][0] / ms["ours"][0], FASTER if found["size"] in SMALL else 1.0
        said.append(f"{times:.1f} x as fast as {best} (at least {least:g}: {judge(times >= least)})")
    return f"{of(found)}: {'; '.join(said)}" if said else ""


def briefly(found: Found) -> list[str]:
    """A row while it is measured."""
    if "failed" in found:
        return [of(found), "FAILED", found["failed"]]
    return [*(f"{who} {median:.1f} ms" for who, (median, _) in found["ms"].items()), verdict(found)]


def judge(met: bool) -> str:
    return "met" if met else "missed"


HEAD = """\
# Rules of matrices on the CPU

{with_}

Float32. Milliseconds of the {clock} a step: the median and the least of rounds in which all took turns, and
how many times the limit and ours that is (of the least in brackets).{note}

| | median | least | x limit | x ours |
|---|---:|---:|---:|---:|
"""

WORLDS = ("torch", "numpy", "jax")


def table(found: Sequence[Found], clock: str, note: str) -> str:
    """All rows, rule by rule and size by size, and what was asked."""
    order = [*ROWS], [*SIZES], [*WORLDS]
    place = {w: i for names in order for i, w in enumerate(names)}
    known = sorted(found, key=lambda f: [place[f[n]] for n in NAMES])
    threads = sorted({f["threads"] for f in known})
    count = " or ".join(map(str, threads)) + (" thread." if threads == [1] else " threads.")
    head = HEAD.format(with_=" ".join([*header(known), count]), clock=clock, note=note and f" {note}")
    said = [f"- {what}" for f in known if (what := verdict(f))]
    rest = "\n".join(line for f in known for line in lines_of(f))
    return head + "\n".join([rest, "", "What was asked:", "", *said, ""])


NAMES = ("rule", "size", "world")
"""What tells rows apart."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rules", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(ASKED))
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=["torch"])
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each process measures")
    add_options(parser, out=OUT, keep=KEEP)
    chosen = parsed(parser)
    if chosen.child:
        name, size, world, seconds, clock, without = chosen.child
        answer = measured(name, size, world, float(seconds), clock=clock, without=without.split(","))
        print(json.dumps(answer))
        return
    todo: list[What] = [
        {"rule": name, "size": size, "world": world}
        for name in chosen.rules
        for size in chosen.sizes
        for world in (chosen.worlds if name in ORTHOGONAL else ["torch"])
    ]
    clock = CLOCKS[chosen.cpu]
    for _ in rows(chosen, todo, "benchmarks.matrix", briefly):
        written(chosen, clock)
    written(chosen, clock)
    print(chosen.out)


def written(chosen: argparse.Namespace, clock: str) -> None:
    """Write the table of all rows that are kept."""
    if found := list(kept_rows(chosen.keep, clock, NAMES).values()):
        chosen.out.write_text(table(found, clock, chosen.note))


if __name__ == "__main__":
    main()
