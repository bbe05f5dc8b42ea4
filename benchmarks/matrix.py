"""How fast is a rule that multiplies matrices? `python -m benchmarks.matrix [--peers] [WORLD ...]`.

Muon as a user writes it (see `benchmarks.muon`), in float32: five Newton-Schulz steps on the hidden matrices
of four layers of GPT-2 small, on 24 and 200 matrices of 256 x 256 and on 1,000 of 64 x 64, for tensors on the
CPU, for NumPy, and under `jit`. The limit is the bare products, fifteen for every stack of equal shape, by
the batched product of the library. Beside it stand torch.optim.Muon, in bfloat16 as it comes and with its
formula in float32, and optax.contrib.muon under `jit`; with `--peers`, the Muon of pytorch_optimizer, in both
types too, and of HeavyBall, which works in bfloat16, where they are installed. All take turns in one process;
ratios are of medians.
"""

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import optimisers as opt
from benchmarks.muon import QUINTIC, STEPS, Muon, stepped
from benchmarks.timing import Timings, interleaved

Shapes = list[tuple[int, int]]
Candidate = Callable[[], object]

LAYER = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]

SIZES: dict[str, Shapes] = {
    "4 layers of GPT-2 small": LAYER * 4,
    "24 x (256, 256)": [(256, 256)] * 24,
    "200 x (256, 256)": [(256, 256)] * 200,
    "1,000 x (64, 64)": [(64, 64)] * 1000,
}

TARGET = 1.15
"""How many times as long as the bare products the whole rule may take."""


def arrays(shapes: Shapes, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(np.float32) / 16 for s in shapes]


def stacks(shapes: Shapes) -> list[tuple[int, int, int]]:
    """(how many, short side, long side) of every stack of equal shape."""
    short = [(min(s), max(s)) for s in shapes]
    return [(short.count(s), *s) for s in dict.fromkeys(short)]


# -- the limit -----------------------------------------------------------------------------------------------


def bare_torch(shapes: Shapes) -> Candidate:
    """The products of all stacks by torch.bmm."""
    held = [
        (torch.randn(b, n, m) / 16, torch.empty(b, n, n), torch.empty(b, n, n), torch.empty(b, n, m))
        for b, n, m in stacks(shapes)
    ]

    def products() -> None:
        for x, g, h, y in held:
            for _ in range(STEPS):
                torch.bmm(x, x.mT, out=g)
                torch.bmm(g, g, out=h)
                torch.bmm(h, x, out=y)

    return products


def bare_numpy(shapes: Shapes) -> Candidate:
    """The same by numpy.matmul."""
    rng = np.random.default_rng(0)
    held = [
        (
            rng.standard_normal((b, n, m), np.float32) / 16,
            *(np.empty((b, n, k), np.float32) for k in (n, n, m)),
        )
        for b, n, m in stacks(shapes)
    ]

    def products() -> None:
        for x, g, h, y in held:
            for _ in range(STEPS):
                np.matmul(x, x.swapaxes(1, 2), out=g)
                np.matmul(g, g, out=h)
                np.matmul(h, x, out=y)

    return products


def bare_jax(shapes: Shapes) -> Candidate:
    """The same under `jit`; each product is made of the one before, so that none is left out."""
    jax: Any = importlib.import_module("jax")
    held = [jax.numpy.ones((b, n, m)) / 16 for b, n, m in stacks(shapes)]

    @jax.jit
    def products(held: list[Any]) -> list[Any]:
        for _ in range(STEPS):
            grams = [x @ x.mT for x in held]
            held = [(g @ g) @ x for g, x in zip(grams, held, strict=True)]
        return held

    return lambda: jax.block_until_ready(products(held))


# -- the rule ------------------------------------------------------------------------------------------------


def ours_in_place(model: list[Any], grads: list[Any]) -> Candidate:
    state = opt.setup(Muon(), model)
    return lambda: opt.update_(state, model, grads)


def ours_jitted(model: list[Any], grads: list[Any]) -> Candidate:
    jax: Any = importlib.import_module("jax")
    held = [opt.setup(Muon(), model), model]
    step = jax.jit(opt.update, donate_argnums=(0, 1))

    def run() -> None:
        held[:] = step(*held, grads)
        jax.block_until_ready(held[1])

    return run


def checked(name: str, step: Candidate, model: Callable[[], list[Any]], shapes: Shapes) -> None:
    """Raise AssertionError unless the first step is that of plain NumPy in float64."""
    xs, grads = arrays(shapes, 0), arrays(shapes, 1)
    step()
    for i in {shape: i for i, shape in enumerate(shapes)}.values():
        want, _ = stepped(xs[i], 0 * xs[i], grads[i], Muon())
        error = np.abs(np.asarray(model()[i]) - want).max()
        assert error < 1e-5, f"{name}: wrong by {error} at {shapes[i]}"


# -- peers ---------------------------------------------------------------------------------------------------


def torch_formula(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """The Newton-Schulz steps of torch.optim.Muon, in the type of the gradient."""
    a, b, c = QUINTIC
    y = x.mT if x.size(0) > x.size(1) else x
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        g = y @ y.mT
        y = torch.addmm(y, torch.addmm(g, g, g, beta=b, alpha=c), y, beta=a)
    return y.mT if x.size(0) > x.size(1) else y


def parameters(shapes: Shapes) -> list[torch.nn.Parameter]:
    held = [torch.nn.Parameter(torch.from_numpy(x)) for x in arrays(shapes, 0)]
    for p, g in zip(held, arrays(shapes, 1), strict=True):
        p.grad = torch.from_numpy(g)
    return held


def torch_muon(shapes: Shapes, *, wide: bool) -> Candidate:
    """torch.optim.Muon, which works in bfloat16; `wide` puts the same formula in float32 in its place."""
    own: Any = importlib.import_module("torch.optim._muon")
    there = own._zeropower_via_newtonschulz
    stepper = torch.optim.Muon(parameters(shapes), lr=0.02, weight_decay=0.0)

    def step() -> None:
        own._zeropower_via_newtonschulz = torch_formula if wide else there
        try:
            stepper.step()
        finally:
            own._zeropower_via_newtonschulz = there

    return step


def in_type(kind: torch.dtype, step: Candidate) -> Candidate:
    """A step of pytorch_optimizer's Muon, whose iteration takes its type as an argument that nobody gives."""
    own: Any = importlib.import_module("pytorch_optimizer.optimizer.muon.base")
    there = own.zero_power_via_newton_schulz_5

    def run() -> None:
        own.zero_power_via_newton_schulz_5 = functools.partial(there, dtype=kind)
        try:
            step()
        finally:
            own.zero_power_via_newton_schulz_5 = there

    return run


def torch_peers(shapes: Shapes, *, more: bool) -> dict[str, Candidate]:
    found = {
        "torch.optim.Muon, float32 formula": torch_muon(shapes, wide=True),
        "torch.optim.Muon, bfloat16": torch_muon(shapes, wide=False),
    }
    if more and importlib.util.find_spec("pytorch_optimizer"):
        module: Any = importlib.import_module("pytorch_optimizer")
        for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            held = [{"params": parameters(shapes), "use_muon": True}]
            step = module.Muon(held, lr=0.02).step
            found[f"pytorch_optimizer Muon, {name}"] = in_type(kind, step)
    if more and importlib.util.find_spec("heavyball"):
        module = importlib.import_module("heavyball")
        stepper = module.Muon(parameters(shapes), lr=0.02, consume_grad=False)
        found["HeavyBall Muon, bfloat16"] = stepper.step
    return found


def optax_muon(shapes: Shapes) -> dict[str, Candidate]:
    if importlib.util.find_spec("optax") is None:
        return {}
    jax: Any = importlib.import_module("jax")
    optax: Any = importlib.import_module("optax")
    tx = optax.contrib.muon(0.02, ns_coeffs=QUINTIC, ns_steps=STEPS)
    model, grads = (list(map(jax.numpy.asarray, arrays(shapes, k))) for k in (0, 1))

    def step(state: Any, model: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, model)
        return state, optax.apply_updates(model, updates)

    jitted = jax.jit(step, donate_argnums=(0, 1))
    held = [tx.init(model), model]

    def run() -> None:
        held[:] = jitted(*held, grads)
        jax.block_until_ready(held[1])

    return {"optax.contrib.muon, jitted": run}


# -- worlds --------------------------------------------------------------------------------------------------


def candidates(world: str, shapes: Shapes, *, peers: bool) -> dict[str, Candidate]:
    """What is timed for one library: the limit first, then the rule, then peers."""
    model, grads = arrays(shapes, 0), arrays(shapes, 1)
    if world == "torch":
        tensors, slopes = ([torch.from_numpy(x) for x in xs] for xs in (model, grads))
        ours = ours_in_place(tensors, slopes)
        checked(world, ours, lambda: tensors, shapes)
        return {"bare": bare_torch(shapes), "ours": ours, **torch_peers(shapes, more=peers)}
    if world == "numpy":
        ours = ours_in_place(model, grads)
        checked(world, ours, lambda: model, shapes)
        return {"bare": bare_numpy(shapes), "ours": ours}
    jax: Any = importlib.import_module("jax")
    ours = ours_jitted(list(map(jax.numpy.array, model)), list(map(jax.numpy.asarray, grads)))
    return {"bare": bare_jax(shapes), "ours": ours, **optax_muon(shapes)}


def table(title: str, times: Timings) -> str:
    lines = [title]
    for name in times.names:
        ratio = times.ratio(name, "bare")
        lines.append(f"  {name:36}{1e3 * times.median(name):10.1f} ms{ratio:8.2f} x the bare products")
    least = "ours" if times.ratio("ours", "bare") <= TARGET else "missed"
    return "\n".join([*lines, f"  target {TARGET}: {'met' if least == 'ours' else least}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("worlds", nargs="*", default=[], help="torch, numpy, jax; all of them unless given")
    parser.add_argument("--peers", action="store_true", help="HeavyBall and pytorch_optimizer too")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each table takes")
    parser.add_argument("--only", default="", help="sizes whose name has this in it")
    given = parser.parse_args()
    for size, shapes in SIZES.items():
        for world in given.worlds or ("torch", "numpy", "jax"):
            if given.only in size:
                todo = candidates(world, shapes, peers=given.peers)
                times = interleaved(todo, seconds=given.seconds, least=3, warmup=1)
                print(table(f"{size}, {world}, float32", times), flush=True)


if __name__ == "__main__":
    main()
