"""Checkpoints: how fast, beside torch.save and safetensors; and what is lost when writers are killed and
files are damaged.

    python -m benchmarks.checkpoints                 GPT-2 small with AdamW; 1,000 small arrays
    python -m benchmarks.checkpoints kills 1000      writers killed with SIGKILL, each at another instant
    python -m benchmarks.checkpoints damage 100000   files flipped, cut, grown, forged
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import optimisers as opt
from benchmarks.timing import interleaved
from tests import damage

GPT2 = {"wte": (50257, 768), "wpe": (1024, 768)} | {
    f"h.{i}.{name}": shape
    for i in range(12)
    for name, shape in {
        "ln_1.weight": (768,),
        "ln_1.bias": (768,),
        "attn.c_attn.weight": (768, 2304),
        "attn.c_attn.bias": (2304,),
        "attn.c_proj.weight": (768, 768),
        "attn.c_proj.bias": (768,),
        "ln_2.weight": (768,),
        "ln_2.bias": (768,),
        "mlp.c_fc.weight": (768, 3072),
        "mlp.c_fc.bias": (3072,),
        "mlp.c_proj.weight": (3072, 768),
        "mlp.c_proj.bias": (768,),
    }.items()
}
"""GPT-2 small: 124 million parameters."""


def trained(shapes: dict[str, tuple[int, ...]]) -> tuple[Any, Any]:
    """A model of these shapes, and its state after one step of AdamW."""
    torch.manual_seed(0)
    model: Any = {name: torch.randn(shape) for name, shape in shapes.items()}
    return opt.update_(opt.setup(opt.AdamW(1e-4), model), model, model)


def synced(write: Callable[[Path], object], file: Path) -> Callable[[], None]:
    """A way to write a file, and to wait until it is on the disk, as `opt.save` does."""

    def run() -> None:
        write(file)
        with file.open("rb") as written:
            os.fsync(written.fileno())

    return run


def raw(data: bytes) -> Callable[[Path], object]:
    """The disk itself: one write of so many bytes."""
    return lambda file: file.write_bytes(data)


def compare(
    title: str, shapes: dict[str, tuple[int, ...]], here: Path, seconds: float, *, disk: bool
) -> None:
    """Time saving and loading of a model and its state."""
    state, model = trained(shapes)
    kept = opt.arrays(state, model)
    size = sum(x.nbytes for x in kept.values())
    ours, torchs, theirs = here / "ours", here / "torch", here / "safetensors"
    saves = {
        "opt.save": lambda: opt.save(ours, state, model),
        "torch.save": synced(lambda file: torch.save(kept, file), torchs),
        "safetensors": synced(lambda file: safetensors.torch.save_file(kept, file), theirs),
    }
    if disk:
        saves["the disk alone"] = synced(raw(bytes(size)), here / "raw")
    loads = {
        "opt.load": lambda: opt.load(ours, state, model),
        "torch.load and from_arrays": lambda: opt.from_arrays(state, torch.load(torchs), model),
        "safetensors and from_arrays": lambda: opt.from_arrays(
            state, safetensors.torch.load_file(theirs), model
        ),
    }
    print(f"{title}: {size / 1e6:,.1f} MB in {len(kept):,} arrays")
    for ways in (saves, loads):
        found = interleaved(ways, seconds=seconds, least=3, warmup=1)
        first = found.names[0]
        for name in found.names:
            took = found.median(name)
            ratio = f"{found.ratio(first, name):5.2f} of it: {first}" if name != first else ""
            print(f"  {name:28s} {1000 * took:9,.1f} ms  {size / took / 1e6:8,.0f} MB/s  {ratio}")


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; how many checkpoints were lost."""
    with tempfile.TemporaryDirectory() as here:
        if arguments[:1] == ["kills"]:
            times = int(arguments[1])
            lost = damage.killed(here, times) + damage.killed(here, times, shards=True)
            print(f"{times:,} kills in one file and {times:,} in several, {lost} checkpoints lost")
            return lost
        if arguments[:1] == ["damage"]:
            lost = damage.damaged(Path(here), int(arguments[1]), time.time_ns())
            print(f"{int(arguments[1]):,} damaged files, {lost} taken for checkpoints or half loaded")
            return lost
        small = {f"layer.{i}.weight": (64,) for i in range(1000)}
        compare("1,000 small arrays with AdamW", small, Path(here), 10, disk=False)
        compare("GPT-2 small with AdamW", GPT2, Path(here), 60, disk=True)
    return 0


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
