"""Does a state of JAX go from one device to eight and back, by files of ours and by Orbax? The eight are in a
process of their own: `python -m tests.checkpoint.test_devices folder`.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optimisers as opt

RULES: dict[str, Any] = {
    "rows of scalars": opt.Chain(opt.ClipGlobalNorm(0.5), opt.Prodigy()),
    "stacked matrices": {opt.matrices: opt.Muon(0.02), "**": opt.AdamW(opt.Cosine(0.1, 9))},
    "masters": opt.MixedPrecision(opt.AdamW(0.01)),
    "averages": opt.EMA(opt.Momentum(0.1)),
}

TYPES = {"masters": jnp.bfloat16}

AXES = {"v": ("a",), "w": ("a", "b"), "x": ("a", "b"), "s": ()}


def drawn(name: str, seed: int) -> dict[str, Any]:
    """Arrays on one device, or on all eight."""
    rng = np.random.default_rng(seed)
    sizes = {"v": (8,), "w": (8, 4), "x": (8, 4), "s": ()}
    made = {k: jnp.asarray(rng.standard_normal(s), TYPES.get(name, jnp.float32)) for k, s in sizes.items()}
    if jax.device_count() < 8:
        return made
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return {k: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*AXES[k]))) for k, x in made.items()}


def step_of(state: Any, model: Any, name: str, seed: int) -> tuple[Any, Any]:
    return jax.jit(opt.update)(state, model, drawn(name, seed))


def put_away(folder: Path, name: str, state: Any, model: Any) -> None:
    opt.save(folder / f"{name}.safetensors", state, model)
    with ocp.StandardCheckpointer() as files:
        files.save(folder / f"{name} of Orbax", {"state": state, "model": model})


def found_in(folder: Path, name: str) -> tuple[Any, Any]:
    """What both kinds of files hold, which is the same, where the arrays of a new model lie."""
    model = drawn(name, 9)
    fresh: Any = opt.setup(RULES[name], model)
    state, loaded = opt.load(folder / f"{name}.safetensors", fresh, model)
    with ocp.StandardCheckpointer() as files:
        theirs = files.restore(folder / f"{name} of Orbax", {"state": fresh, "model": model})
    ours = opt.arrays(state, loaded)
    for k, x in opt.arrays(theirs["state"], theirs["model"]).items():
        np.testing.assert_array_equal(ours[k], x, err_msg=k)
    new = jax.tree.leaves((state, loaded))
    for x, restored, was in zip(
        new, jax.tree.leaves((theirs["state"], theirs["model"])), jax.tree.leaves((fresh, model)), strict=True
    ):
        assert x.sharding.is_equivalent_to(was.sharding, x.ndim)
        assert x.dtype == restored.dtype == was.dtype
    return state, loaded


@pytest.mark.slow
def test_a_state_goes_from_one_device_to_eight_and_back(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {}
    for name, rule in RULES.items():
        model = drawn(name, 0)
        state, model = step_of(opt.setup(rule, model), model, name, 1)
        put_away(tmp_path, name, state, model)
        for seed in (2, 3):
            state, model = step_of(state, model, name, seed)
        wanted[name] = opt.arrays(state, model)
    there = tmp_path / "eight"
    there.mkdir()
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.test_devices", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, arrays in wanted.items():
        state, model = step_of(*found_in(there, name), name, 3)
        near = 2e-2 if name in TYPES else 1e-5
        for k, x in opt.arrays(state, model).items():
            np.testing.assert_allclose(
                np.asarray(x, np.float64),
                np.asarray(arrays[k], np.float64),
                near,
                near,
                err_msg=f"{name} {k}",
            )


if __name__ == "__main__":
    assert jax.device_count() == 8
    folder = Path(sys.argv[1])
    for which in RULES:
        before = found_in(folder, which)
        assert all(len(x.devices()) == 8 for x in jax.tree.leaves(before[1]))
        put_away(folder / "eight", which, *step_of(*before, which, 2))
