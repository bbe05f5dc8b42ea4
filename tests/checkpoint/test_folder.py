"""Does a run that was interrupted go on from the newest whole checkpoint as if it had not been?"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optimisers as opt

RULE = opt.Chain(opt.AddNoise(0.1, seed=3), opt.AdamW(opt.Cosine(0.1, 40)))
PUT = {"numpy": np.array, "torch": torch.tensor, "jax": jnp.array}


def run(folder: Path, library: str, until: int, **options: Any) -> tuple[Any, list[float]]:
    """Train from wherever the folder is up to a step; gradients are drawn from a generator that is saved."""
    model: Any = {"w": PUT[library]([1.0, 2.0, 3.0])}
    rng, seen = np.random.default_rng(0), list[float]()
    kept = opt.Checkpoints(folder, **options)
    state, model, start, more = kept.resume(opt.setup(RULE, model), model)
    if more:
        rng.bit_generator.state, seen = more["rng"], more["seen"]
    for step in range(start + 1, until + 1):
        state, model = opt.update_(state, model, {"w": PUT[library](rng.standard_normal(3).tolist())})
        seen.append(float(model["w"][0]))
        kept.after(step, state, model, rng=rng.bit_generator.state, seen=seen)
    return model, seen


@pytest.mark.parametrize("library", PUT)
def test_a_run_goes_on_to_the_bit(library: str, tmp_path: Path) -> None:
    whole, seen = run(tmp_path / "whole", library, 12, keep=2, every=5)
    run(tmp_path / "parts", library, 7, keep=2, every=5)
    found, seen_too = run(tmp_path / "parts", library, 12, keep=2, every=5)

    np.testing.assert_array_equal(np.asarray(found["w"]), np.asarray(whole["w"]))
    assert seen_too == seen


def test_the_last_ones_are_kept_and_parts_go_with_them(tmp_path: Path) -> None:
    run(tmp_path, "numpy", 9, keep=3, every=2, max_shard_size=100)
    kept = opt.Checkpoints(tmp_path)

    assert list(kept.files) == [4, 6, 8]
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("step-0000000002")]) == 0
    assert opt.saved(kept.files[8]).more["step"] == 8


def test_a_damaged_one_is_passed_by(tmp_path: Path) -> None:
    _, seen = run(tmp_path, "numpy", 9, keep=3, every=2)
    newest = opt.Checkpoints(tmp_path).files[8]
    newest.write_bytes(newest.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="step-0000000008.*an older checkpoint is taken"):
        _, again = run(tmp_path, "numpy", 9, keep=3, every=2)

    assert again == seen
    assert opt.saved(newest).more["step"] == 8


def test_where_nothing_was_saved_the_run_begins(tmp_path: Path) -> None:
    model = {"w": np.ones(2)}
    state = opt.setup(opt.Adam(), model)
    kept = opt.Checkpoints(tmp_path / "none")

    assert kept.resume(state, model) == (state, model, 0, {})
    assert kept.after(3, state, every_other=1) == tmp_path / "none" / "step-0000000003.safetensors"
    resumed = kept.resume(state)
    assert resumed.state is state
    assert (resumed.model, resumed.step, resumed.more) == (None, 3, {"every_other": 1})


def test_an_optimiser_of_torch_is_resumed_in_place(tmp_path: Path) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        return net, opt.TorchOptimizer(net, opt.AdamW(0.1))

    def train(net: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        net(torch.ones(3)).sum().backward()
        optimizer.step()

    net, optimizer = made()
    train(net, optimizer)
    opt.Checkpoints(tmp_path).save(1, optimizer, net)
    net2, optimizer2 = made()
    resumed = opt.Checkpoints(tmp_path).resume(optimizer2, net2)
    train(net, optimizer)
    train(net2, optimizer2)

    assert resumed[:3] == (optimizer2, net2, 1)
    assert torch.equal(net.weight, net2.weight)


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"every": -1}, {"every": 1.5}, {"keep": True}, {"max_shard_size": 0}]
)
def test_numbers_are_checked(tmp_path: Path, options: Any) -> None:
    with pytest.raises(opt.BadSetting, match=next(iter(options))):
        opt.Checkpoints(tmp_path, **options)
