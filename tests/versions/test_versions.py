"""Does every road work with the versions that are installed? Needs NumPy alone, and takes what is there.

The oldest versions are tried by this file alone (`make test-oldest`): the libraries that other tests need do
not go so far back. Expected numbers are those of a few lines of NumPy.
"""

import importlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.versions import bounds

ETA, BETA, LAM, EPSILON, OMEGA, STEPS = 0.05, (0.9, 0.99), 0.1, 1e-8, 1.5, 5
RULE = opt.Chain(opt.ClipNorm(OMEGA), opt.AdamW(ETA, BETA, LAM, EPSILON))
SHAPES = {"w": (7, 5), "b": (3,), "deep": (2, 3, 4)}

HERE = [name for name in ("numpy", "torch", "jax") if find_spec(name) is not None]


def numbers(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def by_hand() -> dict[str, Any]:
    """Adam with decay beside it (Loshchilov and Hutter, algorithm 2); gradients have norm `OMEGA` at most."""
    xs = {name: x.astype(np.float64) for name, x in numbers(0).items()}
    m = {name: np.zeros_like(x) for name, x in xs.items()}
    v = {name: np.zeros_like(x) for name, x in xs.items()}
    for t in range(1, STEPS + 1):
        for name, dx in numbers(t).items():
            g = dx * min(1, OMEGA / np.sqrt(np.sum(dx.astype(np.float64) ** 2)))
            m[name] = BETA[0] * m[name] + (1 - BETA[0]) * g
            v[name] = BETA[1] * v[name] + (1 - BETA[1]) * g**2
            mean, square = m[name] / (1 - BETA[0] ** t), v[name] / (1 - BETA[1] ** t)
            xs[name] = xs[name] - ETA * (mean / (np.sqrt(square) + EPSILON) + LAM * xs[name])
    return xs


def to(library: str) -> Callable[[Any], Any]:
    """What makes an array of a library; it is a copy."""
    module: Any = importlib.import_module(library)
    return {"numpy": np.copy, "torch": getattr(module, "tensor", None)}.get(library) or module.numpy.asarray


def model(library: str, seed: int) -> dict[str, Any]:
    return {name: to(library)(x) for name, x in numbers(seed).items()}


def agree(found: dict[str, Any]) -> None:
    for name, x in by_hand().items():
        np.testing.assert_allclose(np.asarray(found[name]), x, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("library", HERE)
def test_pure_steps_follow_the_formula(library: str) -> None:
    xs = model(library, 0)
    state = opt.setup(RULE, xs)
    for t in range(1, STEPS + 1):
        state, xs = opt.update(state, xs, model(library, t))
    agree(xs)


@pytest.mark.parametrize("library", [name for name in HERE if name != "jax"])
def test_steps_in_place_follow_the_formula(library: str) -> None:
    xs = model(library, 0)
    state = opt.setup(RULE, xs)
    for t in range(1, STEPS + 1):
        opt.update_(state, xs, model(library, t))
    agree(xs)
    assert opt.explain(state)


@pytest.mark.parametrize("library", HERE)
def test_a_state_is_saved_and_goes_on(library: str, tmp_path: Path) -> None:
    xs = model(library, 0)
    state = opt.setup(RULE, xs)
    for t in range(1, STEPS + 1):
        if t == 3:
            opt.save(tmp_path / "run.safetensors", state, xs)
            state, xs = opt.load(
                tmp_path / "run.safetensors", opt.setup(RULE, model(library, 0)), model(library, 0)
            )[:2]
            state = pickle.loads(pickle.dumps(state))
        state, xs = opt.update(state, xs, model(library, t))
    agree(xs)


@pytest.mark.skipif("jax" not in HERE, reason="JAX is not installed")
def test_jit_scan_and_vmap_follow_the_formula() -> None:
    import jax

    xs = model("jax", 0)
    state = opt.setup(RULE, xs)
    grads = [model("jax", t) for t in range(1, STEPS + 1)]
    jitted = jax.jit(opt.update)
    now = state, xs
    for dx in grads:
        now = jitted(*now, dx)
    agree(now[1])

    stacked = jax.tree.map(lambda *rows: jax.numpy.stack(rows), *grads)

    def run(x: Any) -> Any:
        return jax.lax.scan(lambda both, dx: (opt.update(*both, dx), None), (state, x), stacked)[0][1]

    agree(jax.jit(run)(xs))
    several = jax.vmap(run)(jax.tree.map(lambda x: jax.numpy.stack([x, x]), xs))
    agree({name: x[1] for name, x in several.items()})


@pytest.mark.skipif("torch" not in HERE, reason="PyTorch is not installed")
def test_the_optimizer_of_torch_follows_torchs_own_and_its_schedulers() -> None:
    import torch

    def trained(make: Callable[[Any], Any]) -> dict[str, Any]:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        optimizer = make(module)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        x = torch.linspace(-1, 1, 15).reshape(3, 5)
        for _ in range(STEPS):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
            scheduler.step()
        again = make(module)
        again.load_state_dict(optimizer.state_dict())
        again.step()
        return module.state_dict()

    theirs = trained(lambda module: torch.optim.AdamW(module.parameters(), lr=ETA, weight_decay=LAM))
    ours = trained(lambda module: opt.TorchOptimizer(module, opt.AdamW(ETA, lam=LAM)))
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(find_spec("optax") is None, reason="Optax is not installed")
def test_as_optax_follows_the_formula() -> None:
    import optax

    xs = model("jax", 0)
    transformation = opt.as_optax(RULE)
    state = transformation.init(xs)
    for t in range(1, STEPS + 1):
        updates, state = transformation.update(model("jax", t), state, xs)
        xs = optax.apply_updates(xs, updates)
    agree(xs)


def test_the_doctor_finds_all_well() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "optimisers", "doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_oldest_are_exact_and_the_newest_have_no_bound() -> None:
    oldest = bounds.wanted("oldest", {"torch"})
    assert {"numpy", "numba", "platformdirs", "jax"} == {name.partition("==")[0] for name in oldest}
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", name) for name in oldest)

    newest = bounds.wanted("newest", set())
    assert {"numpy", "numba", "torch", "jax", "optax", "flax", "pytest", "matplotlib"} <= set(newest)
    assert not {name for name in newest if name.startswith(("ruff", "pyright", "optimisers"))}
