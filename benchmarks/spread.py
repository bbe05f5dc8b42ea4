"""How fast are steps where two processes hold half of every parameter each, as FSDP2 spreads them?

    python -m benchmarks.spread [--model gpt2] [--rounds 15] [--width 384] [--layers 6]

Two processes of gloo, a thread each. A round steps every candidate once, in turn, on all processes at once;
its time is that of the slower process. Muon steps the matrices of a decoder of so many layers of a width. It
prints tables and never asserts.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import optimisers as opt
from benchmarks.matrix_peers import patched, torch_formula
from benchmarks.printing import show
from benchmarks.torch_peers import Build, Step, of_torch, torch_recipe
from benchmarks.torch_ways import Layer, adamw, as_torch, recipe_as_torch, shapes

PROCESSES = 2

OURS, FUSED, FOREACH = "TorchOptimizer.step", "torch fused", "torch foreach"

ADAMW: dict[str, Build] = {
    OURS: as_torch(adamw()),
    FUSED: of_torch(fused=True),
    FOREACH: of_torch(foreach=True),
}

RECIPE: dict[str, Build] = {
    OURS: recipe_as_torch(to_none=False),
    FUSED: torch_recipe(to_none=False, fused=True),
    FOREACH: torch_recipe(to_none=False, foreach=True),
}


def muon(module: torch.nn.Module) -> Step:
    """A step of PyTorch's own, products in bfloat16."""
    return torch.optim.Muon(module.parameters(), 0.02, weight_decay=0.0).step


MUON: dict[str, Build] = {
    OURS: as_torch(opt.Muon(0.02)),
    "TorchOptimizer.step, bfloat16": as_torch(opt.Muon(0.02, dtype="bfloat16")),
    "torch.optim.Muon, float32": lambda module: patched(
        "torch.optim._muon", "_zeropower_via_newtonschulz", torch_formula, muon(module)
    ),
    "torch.optim.Muon, bfloat16": muon,
}


class Layers(torch.nn.ModuleList):
    """A module that FSDP2 takes: it has a way forward."""

    def forward(self) -> None:
        """Nothing is computed: the gradients are given."""


def model(name: str) -> torch.nn.Module:
    """The model, in shards, with gradients."""
    module = shards(torch.from_numpy(w) for w in shapes.arrays(name, 1).values())
    for p in module.parameters():
        p.grad = torch.full_like(p.detach(), 0.005)
    return module


def matrices(width: int, layers: int) -> torch.nn.Module:
    """The matrices of a decoder, in shards, with gradients."""
    torch.manual_seed(0)
    kinds = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
    module = shards(torch.randn(kind) for kind in kinds)
    for p in module.parameters():
        p.grad = torch.randn_like(p.detach())
    return module


def shards(arrays: Iterable[torch.Tensor]) -> torch.nn.Module:
    """A module of some arrays, spread over the processes."""
    module = Layers(map(Layer, arrays))
    fully_shard(module)
    assert all(isinstance(p, DTensor) for p in module.parameters())
    return module


def timed(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(rounds + 2):
        for name, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            step()
            taken = torch.tensor(1e3 * (time.perf_counter() - begin))
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if n >= 2:
                found[name].append(float(taken))
    return found


def measured(
    title: str, builds: dict[str, Callable[[Any], Step]], made: Callable[[], torch.nn.Module], rounds: int
) -> None:
    """A table of some ways to take the same step."""
    times = timed({way: build(made()) for way, build in builds.items()}, rounds)
    if dist.get_rank():
        return
    middle, best = {w: statistics.median(t) for w, t in times.items()}, {w: min(t) for w, t in times.items()}
    rows = [
        [way, f"{middle[way]:.2f}", f"{best[way]:.2f}", f"{middle[way] / middle[OURS]:.2f}x"] for way in times
    ]
    show(f"{title}, {PROCESSES} processes", ["way", "median ms", "least ms", "to ours"], rows)


def main(rank: int, meeting: str, given: argparse.Namespace) -> None:
    """All tables, as one of the processes."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    made, title = functools.partial(model, given.model), shapes.TITLES[given.model]
    measured(f"AdamW, {title}", ADAMW, made, given.rounds)
    measured(f"Clip, AdamW, average, no gradients, {title}", RECIPE, made, given.rounds)
    made = functools.partial(matrices, given.width, given.layers)
    measured(f"Muon, {given.layers} layers of width {given.width}", MUON, made, given.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2", choices=list(shapes.ALL))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, (os.path.join(folder, "meeting"), parsed), nprocs=PROCESSES)  # noqa: PTH118
