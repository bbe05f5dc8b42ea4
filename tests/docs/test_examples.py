"""Every example runs as it stands, and reaches what it promises."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.installed import NEEDS_KERAS, from_outside, needs

SHORTER: dict[str, dict[str, Any]] = {"06_transformer": {"steps": 2, "factors": (1.0,), "seeds": (0,)}}
"""Examples that train for minutes, and how they do for seconds."""

SLOW = ("resnet18", "jax_resnet18", "transformer")

HELD = ("keras", "mlx", "gpt_two_ways", "trainer", "lightning", "lora", "partial_fit", "skorch", "scipy")
"""Examples that a test of their own runs, and holds to what they promise."""

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))


def example(name: str) -> ModuleType:
    (path,) = (p for p in EXAMPLES if p.stem == name)
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem[3:] in SLOW))
        for p in EXAMPLES
        if p.stem[3:] not in HELD
    ],
)
def test_every_example_runs_and_says_something(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example(path.stem).main(**SHORTER.get(path.stem, {}))
    assert capsys.readouterr().out


def test_the_own_rule_finds_the_line_of_least_squares() -> None:
    model = example("01_own_rule").main()
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, 200)
    slope, offset = np.polyfit(inputs, 3 * inputs - 1 + 0.1 * rng.standard_normal(200), 1)
    np.testing.assert_allclose([model["slope"][0], model["offset"][0]], [slope, offset], atol=5e-3)


def test_lbfgs_fits_the_sine() -> None:
    assert example("02_lbfgs").main() < 1e-4


@pytest.mark.slow
def test_a_solver_for_whole_vectors_fits_the_sine() -> None:
    assert example("05_whole_vector").main() < 1e-6


def test_the_gradient_by_hand_is_that_of_finite_differences() -> None:
    module = example("02_lbfgs")
    rng = np.random.default_rng(1)
    model = {
        "in": rng.standard_normal((1, 3)),
        "bias": rng.standard_normal(3),
        "out": rng.standard_normal((3, 1)),
    }
    _, grads = module.loss_and_gradient(model)
    for name, x in model.items():
        for i in np.ndindex(x.shape):
            plus, minus = (
                {
                    **model,
                    name: x
                    + s * 1e-6 * (np.arange(x.size) == np.ravel_multi_index(i, x.shape)).reshape(x.shape),
                }
                for s in (1, -1)
            )
            slope = (module.loss_and_gradient(plus)[0] - module.loss_and_gradient(minus)[0]) / 2e-6
            np.testing.assert_allclose(grads[name][i], slope, rtol=1e-5, atol=1e-8)


@needs("mlx")
def test_mlx_fits_a_sine_by_a_back_end_from_outside() -> None:
    with from_outside():
        first, last = example("15_mlx").main()

    assert last < first / 50


@pytest.mark.slow
@NEEDS_KERAS
def test_both_backends_of_keras_train_alike() -> None:
    losses = example("07_keras").main()

    np.testing.assert_allclose(losses["torch"], losses["jax"], rtol=0.02)
    assert losses["jax"][-1] < losses["jax"][0] / 4


@pytest.mark.slow
def test_a_gpt_in_torch_and_in_jax_has_the_same_losses() -> None:
    losses = example("08_gpt_two_ways").main(steps=30)

    np.testing.assert_allclose(losses["torch"], losses["jax"], rtol=1e-3)
    assert losses["jax"][-1] < losses["jax"][0] - 1


@pytest.mark.slow
def test_the_trainer_fine_tunes_with_muon_and_adamw(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("09_trainer").main()

    assert losses[-1] < losses[0] / 2
    muon, adamw = capsys.readouterr().out.split("AdamW(eta", 1)
    assert "c_attn.weight" in muon
    assert "wte.weight" in adamw


@pytest.mark.slow
def test_lightning_goes_on_from_a_checkpoint_as_if_it_had_never_stopped() -> None:
    whole, halves = example("10_lightning").main()

    assert halves == whole
    assert whole[-1] < whole[0] / 4


@pytest.mark.slow
@needs("peft")
def test_lora_trains_the_small_matrices_alone() -> None:
    first, last = example("11_lora").main()

    assert last < first / 2


def test_an_estimator_that_learns_by_batches_is_as_good_as_scikit_learn_s() -> None:
    right = example("12_partial_fit").main()

    own = right.pop("scikit-learn's own")
    assert min(right.values()) > own - 0.02


@pytest.mark.slow
@needs("skorch")
def test_skorch_trains_with_a_rule() -> None:
    assert example("13_skorch").main() > 0.9


def test_scipy_finishes_what_adam_began() -> None:
    after_adam, after_lbfgs = example("14_scipy").main()

    assert after_lbfgs < after_adam / 100


def test_every_example_is_in_the_list_of_examples() -> None:
    listed = re.findall(r"`(\d\d_\w+)\.py`", (Path(__file__).parents[2] / "docs" / "examples.md").read_text())

    assert listed == [p.stem for p in EXAMPLES]
