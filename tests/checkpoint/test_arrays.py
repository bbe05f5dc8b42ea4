"""Does a state go into plain arrays and come back whole, in every library and through every format?"""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import optimisers as opt

LIBRARIES = {"numpy": np.array, "torch": torch.from_numpy, "jax": jnp.asarray}

RULES = {
    "AdamW": opt.AdamW(opt.Cosine(0.1, 10, warmup=2), lam=0.1),
    "chain": opt.Chain(opt.AccumGrad(2), opt.ClipGlobalNorm(1.0), opt.Momentum(opt.Linear(0.1, 0.2, 9))),
    "skip": opt.SkipNonFinite(opt.EMA(opt.RAdam(0.1))),
    "descent": opt.Descent(0.1),
}


def arrays(library: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    made = {"w": rng.standard_normal((4, 3)), "b": rng.standard_normal(3)}
    return {name: LIBRARIES[library](a.astype(np.float32)) for name, a in made.items()}


def trained(rule: opt.Rule, library: str, steps: int = 3) -> tuple[Any, Any]:
    model = arrays(library, 0)
    state: Any = opt.setup(rule, model)
    for n in range(steps):
        state, model = opt.update(state, model, arrays(library, n + 1))
    state = opt.freeze(opt.adjust(state, 0.05, where="w") if rule == RULES["descent"] else state, where="b")
    return state, model


def seen(model: dict[str, Any]) -> list[Any]:
    return [np.asarray(x) for x in model.values()]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_state_that_was_written_and_read_goes_on_to_the_bit(rule: opt.Rule, library: str) -> None:
    state, model = trained(rule, library)
    fresh: Any = opt.setup(rule, arrays(library, 0))
    again = opt.from_arrays(fresh, opt.arrays(state))

    assert again == state
    assert opt.current(again) == opt.current(state)
    assert not fresh["b"].frozen
    for n in range(3):
        one, other = (opt.update(opt.thaw(s), model, arrays(library, n))[1] for s in (state, again))
        for a, b in zip(seen(one), seen(other), strict=True):
            np.testing.assert_array_equal(a, b)
        state, again = (opt.update(s, model, arrays(library, n))[0] for s in (state, again))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_compiled_step_takes_a_state_that_was_read_for_a_new_one(rule: opt.Rule) -> None:
    model = arrays("jax", 0)
    state: Any = opt.setup(rule, model)
    for n in range(3):
        state, model = opt.update(state, model, arrays("jax", n + 1))
    again = opt.from_arrays(opt.setup(rule, arrays("jax", 0)), opt.arrays(state))

    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert list(map(jax.typeof, jax.tree.leaves(again))) == list(map(jax.typeof, jax.tree.leaves(state)))


def test_the_safe_loader_of_torch_takes_it() -> None:
    state, _ = trained(RULES["AdamW"], "torch")
    file = io.BytesIO()
    torch.save(opt.arrays(state), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)

    assert opt.from_arrays(opt.setup(RULES["AdamW"], arrays("torch", 0)), read) == state


def test_safetensors_takes_it_and_numpy_goes_on_with_what_torch_has_saved(tmp_path: Path) -> None:
    state, model = trained(RULES["AdamW"], "torch")
    safetensors.torch.save_file(opt.arrays(state), tmp_path / "state.safetensors")
    read = safetensors.numpy.load_file(tmp_path / "state.safetensors")
    there = opt.from_arrays(opt.setup(RULES["AdamW"], arrays("numpy", 0)), read)

    host = {name: x.numpy() for name, x in model.items()}
    wanted = opt.update(state, model, arrays("torch", 7))[1]
    found = opt.update(there, host, arrays("numpy", 7))[1]
    for a, b in zip(seen(wanted), seen(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-7)


def test_numpys_own_format_takes_it_and_jax_goes_on(tmp_path: Path) -> None:
    state, _ = trained(RULES["chain"], "numpy")
    np.savez(tmp_path / "state.npz", **opt.arrays(state))
    there: Any = opt.from_arrays(
        opt.setup(RULES["chain"], arrays("jax", 0)), dict(np.load(tmp_path / "state.npz"))
    )

    assert isinstance(there["w"].state[-1].v, jax.Array)
    np.testing.assert_array_equal(there["w"].state[-1].v, state["w"].state[-1].v)


def test_arrays_that_lie_side_by_side_or_transposed_are_written_each_for_itself() -> None:
    model = {"w": np.ones((4, 3), np.float32).T, "b": np.ones(3, np.float32)}
    saved = opt.arrays(opt.setup(opt.Adam(), model))

    assert saved["w/m"].flags.c_contiguous
    assert saved["w/m"].shape == (3, 4)
    assert saved["w/m"].base is None or saved["w/m"].base.nbytes == saved["w/m"].nbytes
    assert safetensors.numpy.load(safetensors.numpy.save(saved)).keys() == saved.keys()


def test_a_part_of_a_state_is_written_and_read_alone() -> None:
    state, _ = trained(RULES["descent"], "numpy")
    saved = opt.arrays(state["w"])

    assert sorted(saved) == ["w@frozen", "w@settings", "w@step"]
    fresh: Any = opt.setup(RULES["descent"], arrays("numpy", 0))
    assert opt.from_arrays(fresh["w"], saved).rule.eta == 0.05


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("w/m"), "there is no 'w/m' in what was saved; load into"),
        (lambda d: d.update(x=np.ones(3)), "'x' was saved, and is not here"),
        (
            lambda d: d.update({"w/m": np.ones((2, 2))}),
            r"'w/m' has shape \(2, 2\); this state takes \(4, 3\)",
        ),
        (lambda d: d.update({"w/m": np.ones((4, 3), complex)}), "'w/m' is complex; this state takes real"),
        (lambda d: d.update({"w@settings": np.ones(2)}), r"w@settings has 2 numbers; AdamW\(.*takes"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change: Any, text: str) -> None:
    state, _ = trained(RULES["AdamW"], "numpy")
    saved = opt.arrays(state)
    change(saved)
    fresh: Any = opt.setup(RULES["AdamW"], arrays("numpy", 0))
    with pytest.raises(opt.TreeMismatch, match=text):
        opt.from_arrays(fresh, saved)

    assert fresh == opt.setup(RULES["AdamW"], arrays("numpy", 0))
