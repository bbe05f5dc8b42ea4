"""Does a run that began in one framework go on in another, with the same next step?"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import optimisers as opt
from optimisers.checkpoint.turned import turned
from tests.table import TABLE, Row
from tests.worlds import World, arrays_of, close

TORCH, NUMPY, JAX = (
    World(name, engine) for name, engine in (("torch", "interpret"), ("numpy", "interpret"), ("jax", None))
)


def started(world: World, row: Row) -> tuple[Any, Any]:
    model = world.put(arrays_of(row, row.single))
    return world.setup(row.rule, model), model


def stepped(world: World, state: Any, model: Any, row: Row, seed: int) -> tuple[Any, Any]:
    with np.errstate(all="ignore"):
        return world.step(state, model, world.put(arrays_of(row, row.single, seed)))


def host(world: World, arrays: dict[str, Any]) -> dict[str, bytes]:
    return {name: np.ascontiguousarray(world.get(x)).tobytes() for name, x in arrays.items()}


def assert_alike(a: World, model: Any, b: World, other: Any, dtype: str) -> None:
    for x, y in zip(model, other, strict=True):
        found, wanted = a.get(x), b.get(y)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        assert close(np.nan_to_num(found), np.nan_to_num(wanted), dtype)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_rule_goes_on_elsewhere_and_comes_back(row: Row, tmp_path: Path) -> None:
    state, model = started(TORCH, row)
    for seed in (1, 2):
        state, model = stepped(TORCH, state, model, row, seed)
    opt.save(tmp_path / "torch", state, model)
    there = opt.load(tmp_path / "torch", *started(NUMPY, row))
    assert host(NUMPY, opt.arrays(*there)) == host(TORCH, opt.arrays(state, model))
    opt.save(tmp_path / "numpy", *there)
    back = opt.load(tmp_path / "numpy", *started(TORCH, row))
    assert host(TORCH, opt.arrays(*back)) == host(TORCH, opt.arrays(state, model))

    wanted = stepped(TORCH, state, model, row, 3)[1]
    assert_alike(NUMPY, stepped(NUMPY, *there, row, 3)[1], TORCH, wanted, row.single)
    assert_alike(TORCH, stepped(TORCH, *back, row, 3)[1], TORCH, wanted, row.single)


OVER_JAX = [row for row in TABLE if row.takes("float32")][::4]
"""Every step in JAX is compiled, so some rows stand for all: what is loaded is the same for each."""


@pytest.mark.parametrize("row", OVER_JAX, ids=lambda row: row.name)
def test_jax_goes_on_with_what_torch_has_begun_and_back(row: Row, tmp_path: Path) -> None:
    state, model = started(TORCH, row)
    for seed in (1, 2):
        state, model = stepped(TORCH, state, model, row, seed)
    opt.save(tmp_path / "torch", state, model)
    there = opt.load(tmp_path / "torch", *started(JAX, row))
    opt.save(tmp_path / "jax", *there)
    back = opt.load(tmp_path / "jax", *started(TORCH, row))

    wanted = stepped(TORCH, state, model, row, 3)[1]
    assert_alike(JAX, stepped(JAX, *there, row, 3)[1], TORCH, wanted, row.single)
    assert_alike(TORCH, stepped(TORCH, *back, row, 3)[1], TORCH, wanted, row.single)


# -- names and layouts ---------------------------------------------------------------------------------------


class InTorch(torch.nn.Module):
    """A layer of each kind whose parameters are laid out otherwise in Flax."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(7, 4)
        self.conv = torch.nn.Conv2d(3, 5, (2, 3))
        self.norm = torch.nn.BatchNorm2d(5)
        self.dense = torch.nn.Linear(4, 6)


class InFlax(nnx.Module):
    """The same model."""

    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.words = nnx.Embed(7, 4, rngs=rngs)
        self.conv = nnx.Conv(3, 5, (2, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dense = nnx.Linear(4, 6, rngs=rngs)


AXES = {"conv.weight": (2, 3, 1, 0), "dense.weight": (1, 0)}

FLAX = {
    "words.weight": "words.embedding",
    "conv.weight": "conv.kernel",
    "norm.weight": "norm.scale",
    "dense.weight": "dense.kernel",
}

TURNED = {
    "Adam": opt.Adam(0.1),
    "SM3": opt.SM3(0.1),
    "SOAP": opt.SOAP(0.1, every=2),
}


def counted(module: Any) -> Any:
    """The names of a module of torch, without the counter that Flax does not keep."""
    del module.norm.num_batches_tracked
    module.norm.register_buffer("num_batches_tracked", None)
    return module


def slopes(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {name: tuple(p.shape) for name, p in InTorch().named_parameters()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def in_flax(grads: dict[str, Any], model: Any) -> Any:
    """Gradients of the module of torch as those of the model of Flax."""
    found: Any = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    for name, g in grads.items():
        value = found
        *above, last = FLAX.get(name, name).split(".")
        for key in above:
            value = value[key]
        value[last][...] = jnp.asarray(g.transpose(AXES.get(name, range(g.ndim))))
    return found


def assert_same_model(module: Any, model: Any) -> None:
    for name, p in module.named_parameters():
        value = model
        for key in FLAX.get(name, name).split("."):
            value = getattr(value, key)
        turned_there = p.detach().numpy().transpose(AXES.get(name, range(p.ndim)))
        np.testing.assert_allclose(value[...], turned_there, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("rule", TURNED.values(), ids=TURNED)
def test_a_model_of_flax_goes_on_with_what_torch_has_begun_and_back(rule: opt.Rule, tmp_path: Path) -> None:
    module = counted(InTorch())
    state: Any = opt.setup(rule, module)
    for seed in (1, 2, 3):
        grads = {name: torch.from_numpy(g) for name, g in slopes(seed).items()}
        opt.update_(state, module, grads)
    opt.save(tmp_path / "torch", state, module)
    model = InFlax(0)
    there, model = opt.load(tmp_path / "torch", opt.setup(rule, model), model, names=opt.from_torch)
    assert_same_model(module, model)
    opt.save(tmp_path / "flax", there, model)
    again = counted(InTorch())
    back, _ = opt.load(tmp_path / "flax", opt.setup(rule, again), again, names=opt.from_flax)
    found, wanted = opt.arrays(back, again), opt.arrays(state, module)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():  # numbers of a state are in single precision in JAX
        near = 1e-6 if x.dtype == torch.float64 else 0.0
        torch.testing.assert_close(found[name], x, rtol=near, atol=0)

    grads = {name: torch.from_numpy(g) for name, g in slopes(4).items()}
    opt.update_(state, module, grads)
    opt.update_(there, model, in_flax(slopes(4), model))
    assert_same_model(module, model)


def test_a_rule_that_tells_rows_from_columns_is_refused_by_name(tmp_path: Path) -> None:
    for rule, text in (
        (opt.Muon(), "'w' cannot be turned: Muon.*steps an array whose axes are permuted another way"),
        (opt.SGLD(0.1), None),
        (opt.NorMuon(), "'w' cannot be turned: NorMuon"),
    ):
        model = {"w": np.ones((4, 6))}
        state: Any = opt.setup(rule, model)
        opt.save(tmp_path / "run", state, model)
        other = {"w": np.ones((6, 4))}
        fresh: Any = opt.setup(rule, other)
        if text is None:  # it keeps nothing, so there is nothing to turn
            opt.load(tmp_path / "run", fresh, other, names={"w": ("w", (1, 0))})
            continue
        with pytest.raises(opt.TreeMismatch, match=text):
            opt.load(tmp_path / "run", fresh, other, names={"w": ("w", (1, 0))})


def test_what_a_rule_keeps_is_turned_as_the_rule_says() -> None:
    swapped = {"v.rows": ("v.columns", (1, 0)), "v.columns": ("v.rows", (1, 0))}
    assert turned(opt.Adafactor(), (40, 60), (1, 0)).entries == swapped
    entries = turned(opt.SOAP(), (40, 60), (1, 0)).entries
    assert entries["bases.0"] == ("bases.1", (0, 1))
    assert entries["adam.m" if "adam.m" in entries else "m"][1] == (1, 0)
    assert turned(opt.SM3(), (8, 3, 5), (2, 0, 1)).entries["covers.0"][0] == "covers.2"
    assert "permuted another way" in turned(opt.AddNoise(), (4, 6), (1, 0)).reason


def test_a_table_of_names_is_checked(tmp_path: Path) -> None:
    model = {"a": np.ones((2, 3)), "b": np.ones((2, 3))}
    opt.save(tmp_path / "run", opt.setup(opt.Adam(), model), model)
    with pytest.raises(opt.BadSetting, match="names calls both 'a' and 'b' 'b'"):
        opt.load(tmp_path / "run", opt.setup(opt.Adam(), model), model, names={"a": "b"})
    with pytest.raises(opt.BadSetting, match=r"names gives 'a', of shape \(2, 3\), the axes \(0, 0\)"):
        opt.load(tmp_path / "run", opt.setup(opt.Adam(), model), model, names={"a": ("a", (0, 0))})
    other = {"c": np.zeros((3, 2)), "b": np.zeros((2, 3))}
    state: Any = opt.setup(opt.Adam(), other)
    opt.load(tmp_path / "run", state, other, names={"a": ("c", (1, 0))})
    assert other["c"].all()
