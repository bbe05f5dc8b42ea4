"""How fast are steps of the rules that people train with today? `python -m benchmarks.modern [--models small
gpt2] [--rules NAdamW Lion ...] [--seconds 6]`.

Float32 tensors on the CPU; ours by `update_`, each peer as its package steps it (Optax inside one jit, which
gives new parameters back). Peers that are not installed are left out. A step of ours moves so many bytes a
parameter (`explain` says them); the limit is what a kernel takes that only reads and writes as many arrays as
the rule has, in the same rounds, and the share is how near the step is to moving its bytes at that speed.
"""

import argparse
import functools
import gc
import importlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import optimisers as opt
from benchmarks import shapes
from benchmarks.limit import limit_of
from benchmarks.printing import show
from benchmarks.timing import Timings, interleaved
from optimisers.state.leaf import parts

ETA = 1e-3
SHARE, FASTER = 0.9, 4.0
"""The targets: of the limit on GPT-2 small, and times as fast as the best peer."""

Step = Callable[[], object]


class Row(NamedTuple):
    """A rule, and who else has it."""

    rule: opt.Rule
    peers: dict[str, dict[str, Any]]
    """Path of a class or function -> its settings."""
    loss: bool = False
    elementwise: bool = True
    """Whether each element is stepped by itself, in one pass."""


TIMM, PO = "timm.optim.", "pytorch_optimizer."
FOREACH = {"foreach": True, "triton": False}

ROWS = {
    "NAdamW": Row(opt.NAdamW(ETA), {TIMM + "NAdamW": {}, "optax.nadamw": {}}),
    "Adan": Row(
        opt.Adan(ETA),
        {TIMM + "Adan": {}, "optimi.Adan": FOREACH, "optax.adan": {}},
    ),
    "ADOPT": Row(opt.ADOPT(ETA), {TIMM + "Adopt": {}, "optax.contrib.adopt": {}}),
    "AdEMAMix": Row(opt.AdEMAMix(ETA), {PO + "AdEMAMix": {}, "optax.contrib.ademamix": {}}),
    "SimplifiedAdEMAMix": Row(
        opt.SimplifiedAdEMAMix(ETA), {PO + "SimplifiedAdEMAMix": {}, "optax.contrib.simplified_ademamix": {}}
    ),
    "StableAdamW": Row(
        opt.StableAdamW(ETA),
        {PO + "StableAdamW": {}, "optimi.StableAdamW": FOREACH},
        elementwise=False,
    ),
    "LaProp": Row(opt.LaProp(ETA), {TIMM + "LaProp": {}, PO + "LaProp": {}}),
    "Yogi": Row(opt.Yogi(ETA), {PO + "Yogi": {}, "optax.yogi": {}}),
    "QHAdam": Row(opt.QHAdam(ETA), {PO + "QHAdam": {}}),
    "MADGRAD": Row(opt.MADGRAD(ETA), {TIMM + "MADGRAD": {}, PO + "MADGRAD": {}}),
    "AdamP": Row(opt.AdamP(ETA), {TIMM + "AdamP": {}, PO + "AdamP": {}}, elementwise=False),
    "SGDP": Row(opt.SGDP(ETA), {TIMM + "SGDP": {}, PO + "SGDP": {}}, elementwise=False),
    "AdamAtan2": Row(opt.AdamAtan2(ETA), {}),
    "ASGD": Row(opt.ASGD(ETA), {"torch.optim.ASGD": {}}),
    "SignDescent": Row(opt.SignDescent(ETA), {"optax.sign_sgd": {}}),
    "Signum": Row(opt.Signum(ETA), {PO + "SignSGD": {}, "optax.signum": {}}),
    "Lion": Row(opt.Lion(ETA), {TIMM + "Lion": {}, PO + "Lion": {}, "optax.lion": {}}),
    "Grams": Row(opt.Grams(ETA), {PO + "Grams": {}}),
    "MARS": Row(opt.MARS(ETA), {TIMM + "Mars": {}, PO + "MARS": {}}, elementwise=False),
    "LARS": Row(opt.LARS(ETA), {TIMM + "Lars": {}, PO + "LARS": {}, "optax.lars": {}}, elementwise=False),
    "LAMB": Row(opt.LAMB(ETA), {TIMM + "Lamb": {}, PO + "Lamb": {}, "optax.lamb": {}}, elementwise=False),
    "NovoGrad": Row(
        opt.NovoGrad(ETA),
        {TIMM + "NvNovoGrad": {}, PO + "NovoGrad": {}, "optax.novograd": {}},
        elementwise=False,
    ),
    "Prodigy": Row(
        opt.Prodigy(), {"prodigyopt.Prodigy": {"lr": 1.0}, "optax.contrib.prodigy": {}}, elementwise=False
    ),
    "DAdaptAdam": Row(
        opt.DAdaptAdam(),
        {"dadaptation.DAdaptAdam": {"lr": 1.0}, "optax.contrib.dadapt_adamw": {}},
        elementwise=False,
    ),
    "DoG": Row(opt.DoG(), {"optax.contrib.dog": {}}, elementwise=False),
    "MoMoAdam": Row(opt.MoMoAdam(), {"optax.contrib.momo_adam": {}}, loss=True, elementwise=False),
    "ScheduleFree": Row(
        opt.ScheduleFree(opt.Descent(ETA)),
        {"schedulefree.SGDScheduleFree": {"lr": ETA}},
    ),
    "Cautious AdamW": Row(
        opt.Cautious(opt.Adam(ETA)), {TIMM + "AdamWLegacy": {"caution": True}}, elementwise=False
    ),
    "Lookahead Adam": Row(opt.Lookahead(opt.Adam(ETA)), {}),
    "GPA": Row(opt.GPA(opt.Descent(ETA)), {}),
}
"""The rules; those with a norm, a mean or a total take two passes or more."""


# -- ours and theirs -----------------------------------------------------------------------------------------


def tensors(sizes: list[shapes.Shape]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, gradients) by name."""
    import torch

    rng = np.random.default_rng(0)
    made = [{f"p{i}": 0.02 * torch.from_numpy(normal(rng, s)) for i, s in enumerate(sizes)} for _ in range(2)]
    return made[0], made[1]


def normal(rng: np.random.Generator, shape: shapes.Shape) -> Any:
    return rng.standard_normal(shape, np.float32)


def ours(row: Row, sizes: list[shapes.Shape]) -> tuple[Step, Step, float, int]:
    """(our step, the limit of as many arrays, times that its bytes are ours, our passes)."""
    model, grads = tensors(sizes)
    state = opt.setup(row.rule, model)
    loss = 1.0 if row.loss else None
    said = opt.explain(state).groups
    count = sum(g.parameters for g in said)
    moved = sum(g.bytes_per_parameter * g.parameters for g in said) / count
    (group, *_) = parts(state)[0].groups
    full = [pack for pack in group.slots if len(pack) and tuple(pack[0].shape) == sizes[group.leaves[0]]]
    like = [{k: np.zeros(x.shape, np.float32) for k, x in model.items()} for _ in full]
    bare, other = ({k: x.numpy() for k, x in tensors(sizes)[n].items()} for n in (0, 1))
    least = 4 * (3 + 2 * len(full))  # reads x, dx and state, writes x and state
    step = functools.partial(opt.update_, state, model, grads, loss=loss)
    return step, limit_of(bare, other, like), moved / least, max(g.passes for g in said)


def peer(path: str, settings: dict[str, Any], sizes: list[shapes.Shape], *, loss: bool) -> Step:
    """The step of a package; raises what it raises where it is not there."""
    module, name = path.rsplit(".", 1)
    made = getattr(importlib.import_module(module), name)
    if path.startswith("optax"):
        return of_optax(made, settings, sizes, loss=loss)
    import torch

    model, grads = tensors(sizes)
    parameters = [torch.nn.Parameter(x) for x in model.values()]
    for p, g in zip(parameters, grads.values(), strict=True):
        p.grad = g
    optimizer = made(parameters, **({"lr": ETA} | settings))
    getattr(optimizer, "train", lambda: None)()
    return optimizer.step


def of_optax(
    made: Callable[..., Any], settings: dict[str, Any], sizes: list[shapes.Shape], *, loss: bool
) -> Step:
    """The same of Optax, update and application in one jit whose arguments are given up."""
    import jax
    import optax

    model, grads = ({k: jax.numpy.asarray(x.numpy()) for k, x in each.items()} for each in tensors(sizes))
    name = getattr(made, "func", made).__name__  # some are partial applications
    own = any(word in name for word in ("prodigy", "dadapt", "momo", "dog"))
    rate = {} if own else {"learning_rate": ETA}
    rule = made(**(rate | settings))
    further = {"value": 1.0} if loss else {}

    def step(state: Any, x: Any, grads: Any) -> Any:
        updates, state = rule.update(grads, state, x, **further)
        return state, optax.apply_updates(x, updates)

    held = [rule.init(model), jax.tree.map(jax.numpy.copy, model)]
    jitted = jax.jit(step, donate_argnums=(0, 1))

    def stepped() -> None:
        held[:] = jax.block_until_ready(jitted(*held, grads))

    return stepped


# -- the tables ----------------------------------------------------------------------------------------------


def measured(row: Row, sizes: list[shapes.Shape], seconds: float) -> tuple[Timings, float, int, list[str]]:
    """(timings of `ours`, `limit` and the peers, times that our bytes are the limit's, our passes, who is
    left out).
    """
    step, bound, times, passes = ours(row, sizes)
    candidates: dict[str, Step] = {"ours": step, "limit": bound}
    missing: list[str] = []
    for path, settings in row.peers.items():
        try:
            step = peer(path, settings, sizes, loss=row.loss)
            step()
            candidates[path] = step
        except Exception as error:  # noqa: BLE001 whatever a package of others does, the others are timed
            missing.append(f"{path}: {error!r:.90}")
    found = interleaved(candidates, seconds=seconds)
    candidates.clear()
    gc.collect()  # optimizers hold themselves, and a few of GPT-2 small fill the memory
    return found, times, passes, missing


def table(model: str, names: list[str], seconds: float) -> None:
    """Print how fast each rule is on a model."""
    sizes = list(shapes.ALL[model]())
    lines: list[list[str]] = []
    left_out: list[str] = []
    shares: list[float] = []
    for name in names:
        row = ROWS[name]
        timings, times, passes, missing = measured(row, sizes, seconds)
        left_out += missing
        share = times * timings.median("limit") / timings.median("ours")
        by_minimum = times * timings.minimum("limit") / timings.minimum("ours")
        if row.elementwise:
            shares.append(share)
        others = [p for p in timings.names if p not in ("ours", "limit")]
        best = min(others, key=timings.median, default=None)
        lines.append(
            [
                name,
                f"{1e3 * timings.median('ours'):.2f}",
                str(passes),
                f"{share:.0%} ({by_minimum:.0%})",
                best or "-",
                f"{1e3 * timings.median(best):.2f}" if best else "-",
                f"{timings.ratio(best, 'ours'):.1f} x" if best else "-",
            ]
        )
        print(*lines[-1], sep="\t", flush=True)
    head = ["rule", "ms", "passes", "of the limit (minima)", "best peer", "its ms", "faster"]
    show(f"{shapes.TITLES.get(model, model)}, float32: medians of interleaved rounds", head, lines)
    print(f"the best peer is to take {FASTER:g} times as long, where it is not fused")
    if shares:
        middle = statistics.median(shares)
        print(f"element by element, share of the limit: median {middle:.0%}, target {SHARE:.0%}")
    for line in left_out:
        print("left out:", line)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modern", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(shapes.ALL), default=["small", "gpt2"])
    parser.add_argument("--rules", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=6, help="time for the rounds of each rule")
    arguments = parser.parse_args()
    for model in arguments.models:
        table(model, arguments.rules, arguments.seconds)


if __name__ == "__main__":
    main()
