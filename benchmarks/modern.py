"""How fast are steps of the rules that people train with today?

    python -m benchmarks.modern [--models small gpt2] [--rules NAdamW Lion ...] [--seconds 6] [--cpu]
                                [--without optax ...] [--keep FILE.jsonl] [--again | --show]
                                [--note TEXT] [--out FILE.md]

Float32 tensors on the CPU; ours by `update_`, each peer as its package steps it (Optax inside one jit, which
gives new parameters back). The packages: torch.optim, optax, timm, pytorch_optimizer, optimi, schedulefree,
prodigyopt and dadaptation; what is not installed is left out, with a line. HeavyBall compiles each rule for
minutes and stands in `benchmarks.torch_cpu --slow`.

Each rule is measured in a process of its own, and meets its peers there one after the other, so that no more
than one of them is in memory. With `--keep` every row is written to a file at once, with what it was measured
by, and rows that stand there are not measured again: a run that was stopped goes on. `--again` measures the
chosen rules once more, and `--show` none: it makes the tables of the rows that are kept.

A step of ours moves so many bytes a parameter (`explain` says them); the limit is what a kernel takes that
only reads and writes as many arrays as the rule has, in the same rounds, and the share is how near the step
is to moving its bytes at that speed. Minima say what the machine does undisturbed; with `--cpu` times are
those of the processor, of all threads together: on a machine that others keep busy they still tell what a
step costs. Peers of Optax are fused by XLA; those of other packages are a call an operation.
"""

import argparse
import functools
import gc
import importlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import optimisers as opt
from benchmarks import shapes
from benchmarks.kept import CLOCKS, Found, add_options, header, parsed, rows, seconds_by
from benchmarks.limit import limit_of
from benchmarks.modern_rows import ETA, OVER, ROWS, THEN, Row
from benchmarks.printing import Report
from benchmarks.timing import Timings, interleaved
from optimisers.state.leaf import parts

SHARE, FASTER = 0.9, 4.0
"""The targets: of the limit on GPT-2 small, and times as fast as the best peer."""

EXAMPLES = 2
"""Of how many examples gradients are, where a rule takes those of each."""

Step = Callable[[], object]

# -- ours and theirs -----------------------------------------------------------------------------------------


def tensors(sizes: list[shapes.Shape], given: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, gradients) by name."""
    import torch

    front = (EXAMPLES,) if given == "examples" else ()
    rng = np.random.default_rng(0)
    pools = [0.02 * rng.standard_normal(POOL, np.float32) for _ in range(2)]
    return tuple(
        {f"p{i}": torch.from_numpy(repeated(pool, i, (*before, *s))) for i, s in enumerate(sizes)}
        for pool, before in zip(pools, ((), front), strict=True)
    )


POOL = 1_000_003
"""So many normal numbers are drawn, and repeated."""


def repeated(pool: Any, i: int, shape: shapes.Shape) -> Any:
    """Array i: these numbers one after the other, from another one on than the arrays beside it."""
    return np.resize(np.roll(pool, 7919 * i)[: math.prod(shape)], shape)


def ours(row: Row, sizes: list[shapes.Shape]) -> tuple[Step, Step, Found]:
    """(our step, the limit, what `explain` says of it, with how many times the limit's bytes are ours)."""
    model, grads = tensors(sizes, row.given)
    state = opt.setup(row.rule, model)
    further = [{k: x.abs() for k, x in grads.items()}] if row.given == "second" else []
    step = functools.partial(
        opt.update_, state, model, grads, *further, loss=1.0 if row.given == "loss" else None
    )
    said = opt.explain(state).groups
    count = sum(g.parameters for g in said)
    moved = sum(g.bytes_per_parameter * g.parameters for g in said) / count
    moved += 8 * len(further)  # read, and their mean written: explain tells of a step without
    if row.given == "examples":  # read for their norms and for their sum, which is written
        moved += 4 * (2 * EXAMPLES + 1)
    (group, *_) = parts(state)[0].groups
    full = [pack for pack in group.slots if len(pack) and tuple(pack[0].shape) == sizes[group.leaves[0]]]
    like = [{k: np.zeros(x.shape, np.float32) for k, x in model.items()} for _ in full]
    bare, other = ({k: x.numpy() for k, x in each.items()} for each in tensors(sizes))
    least = 4 * (3 + 2 * len(full))  # reads x, dx and state, writes x and state
    about = {"passes": max(g.passes for g in said), "bytes": moved, "times": moved / least}
    return step, limit_of(bare, other, like), about


def named(path: str) -> Any:
    """What a package has by this name."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def peer(path: str, settings: dict[str, Any], sizes: list[shapes.Shape], given: str) -> Step:
    """The step of a package; raises what it raises where it is not there."""
    if path.startswith("optax"):
        return of_optax(path, settings, sizes, given)
    import torch

    model, grads = tensors(sizes)
    parameters = [torch.nn.Parameter(x) for x in model.values()]
    for p, g in zip(parameters, grads.values(), strict=True):
        p.grad = g
    own = {k: v for k, v in settings.items() if k != OVER}
    if OVER in settings:
        optimizer = named(path)(named(settings[OVER])(parameters, lr=ETA), **own)
    else:
        optimizer = named(path)(parameters, **({"lr": ETA} | own))
    getattr(optimizer, "train", lambda: None)()
    if given == "second":
        return functools.partial(optimizer.step, hessian=[g.abs() for g in grads.values()])
    return optimizer.step


def of_optax(path: str, settings: dict[str, Any], sizes: list[shapes.Shape], given: str) -> Step:
    """The same of Optax, update and application in one jit whose arguments are given up."""
    import jax
    import optax

    model, grads = ({k: jax.numpy.asarray(x.numpy()) for k, x in d.items()} for d in tensors(sizes, given))
    made = named(path)
    own = {k: v for k, v in settings.items() if k not in (OVER, THEN)}
    if OVER in settings:
        rule = made(named(settings[OVER])(ETA), **own)
    elif THEN in settings:
        rule = optax.chain(made(**own), named(settings[THEN])(ETA))
    else:
        name = getattr(made, "func", made).__name__  # some are partial applications
        rateless = any(word in name for word in ("prodigy", "dadapt", "momo", "dog", "dowg", "polyak"))
        rule = made(**(({} if rateless else {"learning_rate": ETA}) | own))
    further = {"value": 1.0} if given == "loss" else {}

    def step(state: Any, x: Any, grads: Any) -> Any:
        updates, state = rule.update(grads, state, x, **further)
        return state, optax.apply_updates(x, updates)

    held = [rule.init(model), jax.tree.map(jax.numpy.copy, model)]
    jitted = jax.jit(step, donate_argnums=(0, 1))

    def stepped() -> None:
        held[:] = jax.block_until_ready(jitted(*held, grads))

    return stepped


# -- one rule ------------------------------------------------------------------------------------------------


def measured(name: str, model: str, seconds: float, *, clock: str, without: Sequence[str] = ()) -> Found:
    """Time a rule beside the limit and each of its peers in turn: medians and minima in seconds, ratios to
    ours, what is left out; peers of some packages are.
    """
    row, sizes = ROWS[name], list(shapes.ALL[model]())
    by = seconds_by(clock)
    step, bound, found = ours(row, sizes)
    rounds: list[Timings] = []
    peers: list[Found] = []
    missing: list[str] = []
    chosen = {path: own for path, own in row.peers.items() if path.partition(".")[0] not in without}
    for path, settings in chosen.items():
        try:
            theirs = peer(path, settings, sizes, row.given)
            theirs()
        except Exception as error:  # noqa: BLE001 whatever a package of others does, the others are timed
            missing.append(f"{name}: {path}: {error!r:.90}")
            continue
        timings = interleaved(
            {"ours": step, "limit": bound, "peer": theirs},
            seconds=seconds / len(chosen),
            least=3,
            warmup=1,
            clock=by,
        )
        ratios = timings.ratio("peer", "ours"), timings.ratio_of_minima("peer", "ours")
        peers.append({"path": path, "seconds": timings.median("peer"), "faster": ratios})
        rounds.append(timings)
        del theirs
        gc.collect()  # optimizers hold themselves
    if not rounds:
        rounds.append(interleaved({"ours": step, "limit": bound}, seconds=seconds, clock=by))
    all_ = Timings({n: [s for t in rounds for s in t.seconds[n]] for n in ("ours", "limit")})
    share = (
        found["times"] * all_.ratio("limit", "ours"),
        found["times"] * all_.ratio_of_minima("limit", "ours"),
    )
    times = {"median": all_.median("ours"), "minimum": all_.minimum("ours"), "share": share}
    return found | times | {"peers": peers, "missing": missing}


# -- all -----------------------------------------------------------------------------------------------------


def by_time(peer: Found) -> float:
    """For `min`."""
    return peer["seconds"]


HEAD = ["rule", "ms", "passes", "bytes", "of limit (minima)", "best peer", "its ms", "faster (minima)"]


def line(found: Found) -> list[str]:
    """The cells of a rule."""
    if "failed" in found:
        return [found["rule"], "FAILED", "", "", found["failed"], "", "", ""]
    best = min(found["peers"], key=by_time, default=None)
    share, least = found["share"]
    return [
        found["rule"],
        f"{1e3 * found['median']:.2f}",
        str(found["passes"]),
        f"{found['bytes']:.0f}",
        f"{share:.0%} ({least:.0%})",
        f"{best['path'].partition('.')[0]} {best['path'].rpartition('.')[2]}" if best else "-",
        f"{1e3 * best['seconds']:.2f}" if best else "-",
        "{:.1f} x ({:.1f})".format(*best["faster"]) if best else "-",
    ]


def show(report: Report, model: str, found: Sequence[Found], clock: str) -> None:
    """The table of a model, and what the targets say of it."""
    title = f"{shapes.TITLES[model]}, float32: medians of interleaved rounds, by the {clock}"
    report.table(title, HEAD, [line(f) for f in found])
    well = [f for f in found if "failed" not in f]
    apart = {f["rule"]: [p for p in f["peers"] if not p["path"].startswith("optax")] for f in well}
    best = {name: min(peers, key=by_time)["faster"] for name, peers in apart.items() if peers}
    slow = ", ".join(f"{name} {max(faster):.1f}" for name, faster in best.items() if max(faster) < FASTER)
    report.line(f"Less than {FASTER:g} times as fast as the best peer that is not fused: {slow or 'none'}.")
    shares = {f["rule"]: max(f["share"]) for f in well if ROWS[f["rule"]].elementwise}
    if shares and model == "gpt2":
        below = ", ".join(f"{rule} {share:.0%}" for rule, share in shares.items() if share < SHARE)
        report.line(
            f"Element by element, share of the limit: median {statistics.median(shares.values()):.0%}; below "
            f"{SHARE:.0%}: {below or 'none'}."
        )
    for missing in [m for f in well for m in f["missing"]]:
        report.line(f"Left out: {missing}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modern",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=list(shapes.ALL), default=["small", "gpt2"])
    parser.add_argument("--rules", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=6, help="time for the rounds of each rule")
    add_options(parser)
    chosen = parsed(parser)
    if chosen.child:
        model, name, seconds, clock, without = chosen.child
        print(json.dumps(measured(name, model, float(seconds), clock=clock, without=without.split(","))))
        return
    clock = CLOCKS[chosen.cpu]
    todo = [{"model": model, "rule": name} for model in chosen.models for name in chosen.rules]
    found = list(rows(chosen, todo, "benchmarks.modern", lambda row: [row["model"], *line(row)]))
    report = Report(chosen.out)
    report.keep("# Modern rules on a CPU\n\n")
    for text in (*header(found), *filter(None, [chosen.note])):
        report.line(text)
    for model in chosen.models:
        of_model = [f for f in found if f["model"] == model]
        if of_model:
            show(report, model, of_model, clock)


if __name__ == "__main__":
    main()
