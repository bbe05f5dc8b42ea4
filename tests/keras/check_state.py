"""Is the state saved, loaded, looked at and edited as Keras and we do it? Run by `test_keras.py`."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import optimisers as opt

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((32, 5)).astype(np.float32), RNG.standard_normal((32, 2)).astype(np.float32)

RULES: dict[str, Any] = {
    "several": {
        opt.matrices & ~opt.by_path("**.head.**"): opt.Muon(0.02, layout="columns"),
        "**": opt.Adam(),
    },
    "schedule": opt.Chain(opt.ClipGlobalNorm(1.0), opt.Lion(opt.Cosine(1e-3, 20, warmup=2))),
    "average": opt.EMA(opt.ScheduleFree(opt.Descent(0.1))),
    "decay": opt.layer_decay(opt.AdamW(1e-3), 0.5),
    "AdamW": opt.AdamW(1 / 3e3),
    "nothing": {"**.bias": None, "**": opt.Adam(0.01)},
}


@keras.saving.register_keras_serializable("tests")
def falling(clock: Any) -> Any:
    return 0.1 / (1 + clock)


class Halved(opt.Rule):
    eta: float = 0.5

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, self.eta / 2 * dx


def model() -> Any:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((5,)),
            layers.Dense(7, activation="tanh", name="dense_1"),
            layers.Dense(6, name="dense_2"),
            layers.Dense(2, name="head"),
        ],
        name="net",
    )


def trained(made: Any, epochs: int = 2) -> Any:
    made.fit(X, Y, epochs=epochs, batch_size=16, shuffle=False, verbose=0)
    return made


def compiled(rule: Any, **settings: Any) -> Any:
    made = model()
    made.compile(optimizer=opt.KerasOptimizer(rule, **settings), loss="mse")
    return made


def same(a: Any, b: Any) -> None:
    for x, y in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", list(RULES)[:: 1 if keras.config.backend() == "torch" else 3])
def test_a_model_that_was_saved_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    made = trained(compiled(RULES[name], clipnorm=10.0))
    made.save(tmp_path / "whole.keras")
    loaded = keras.models.load_model(tmp_path / "whole.keras")

    assert loaded.optimizer.get_config() == made.optimizer.get_config()
    same(trained(loaded), trained(made))


def test_weights_bring_the_state_into_a_model_that_was_made_anew(tmp_path: Path) -> None:
    made = compiled(opt.AdamW(1 / 3))
    made.optimizer.learning_rate = 0.01
    trained(made).save_weights(tmp_path / "whole.weights.h5")
    again = compiled(opt.AdamW(1e-3))
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "whole.weights.h5")

    assert float(again.optimizer.learning_rate) == pytest.approx(0.01)
    same(trained(again), trained(made))


def test_set_weights_does_the_same() -> None:
    made, again = trained(compiled(opt.AdamW(1e-3))), compiled(opt.AdamW(1e-3))
    again.set_weights(made.get_weights())
    again.optimizer.build(again.trainable_variables)
    again.optimizer.set_weights([np.array(v) for v in made.optimizer.variables])

    same(trained(again), trained(made))


def test_rules_and_functions_of_users_are_found_by_name(tmp_path: Path) -> None:
    made = trained(compiled({"**.bias": Halved(), "**": opt.Descent(falling)}))
    made.save(tmp_path / "whole.keras")
    with pytest.raises(TypeError, match=r'custom_objects=\{"Halved": Halved\}'):
        keras.models.load_model(tmp_path / "whole.keras")
    loaded = keras.models.load_model(tmp_path / "whole.keras", custom_objects={"Halved": Halved})

    same(trained(loaded), trained(made))


def test_a_function_without_a_name_is_refused_where_it_would_be_saved(tmp_path: Path) -> None:
    made = trained(compiled(opt.Descent(lambda clock: 0.1 / (1 + clock))))
    with pytest.raises(opt.BadState, match="has no name by which it could be loaded; write a schedule"):
        made.save(tmp_path / "whole.keras")


def test_variables_are_named_after_parameters_and_state() -> None:
    made = trained(compiled(opt.Momentum(0.1)))
    names = [v.name for v in made.optimizer.variables]

    assert names[:2] == ["iteration", "learning_rate"]
    assert names[2:4] == ["net_dense_1_kernel_v", "net_dense_1_bias_v"]
    assert names[-2:] == ["numbers_0", "clock_0"]


def test_the_tree_shows_the_state_by_path() -> None:
    made = trained(compiled(opt.AdamW(1e-3)))
    tree = made.optimizer.tree
    at = next(i for i, v in enumerate(made.optimizer.variables) if v.name == "net_head_kernel_m")

    assert opt.current(tree)["net.head.kernel"] == opt.AdamW(1e-3)
    np.testing.assert_array_equal(
        np.asarray(tree["net.head.kernel"].state[0]), np.array(made.optimizer.variables[at])
    )
    assert "AdamW" in str(opt.explain(tree))


def test_a_tree_that_was_changed_is_taken_back() -> None:
    made, other = trained(compiled(opt.AdamW(1e-3, lam=0.5))), trained(compiled(opt.AdamW(1e-3, lam=0.5)))
    made.optimizer.tree = opt.adjust(made.optimizer.tree, eta=0.25, lam=0.0)
    other.optimizer.tree = other.optimizer.tree
    before = made.get_weights()
    trained(made, 1)

    assert float(made.optimizer.learning_rate) == 0.25
    assert {r.lam for r in opt.current(made.optimizer.tree).values()} == {0.0}
    assert max(np.abs(a - b).max() for a, b in zip(before, made.get_weights(), strict=True)) > 0.1
    same(trained(other), trained(compiled(opt.AdamW(1e-3, lam=0.5)), 4))


def test_a_tree_that_does_not_fit_is_refused() -> None:
    made = trained(compiled(opt.AdamW(1e-3)))
    tree = made.optimizer.tree
    for changed, error, message in (
        (opt.freeze(tree), opt.BadState, "write layer.trainable = False"),
        (opt.adjust(tree, 0.5, where="**.bias"), opt.BadSetting, "give KerasOptimizer a dict of rules"),
        (opt.setup(opt.Descent(), {"a": np.ones(3)}), opt.BadState, "another model"),
    ):
        with pytest.raises(error, match=message):
            made.optimizer.tree = changed
    with pytest.raises(opt.BadState, match="no state yet"):
        _ = opt.KerasOptimizer(opt.Adam()).tree


def test_averages_stand_in_the_model_for_a_while() -> None:
    made = trained(compiled(opt.EMA(opt.Descent(0.1), 0.5)))
    before, expected = made.get_weights(), opt.averaged(made.optimizer.tree, parameters(made))
    with made.optimizer.averaged():
        inside = parameters(made)
        with pytest.raises(opt.BadState, match="inside averaged"):
            made.optimizer.apply([keras.ops.zeros_like(v.value) for v in made.trainable_variables])

    for name, value in inside.items():
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(value), keras.ops.convert_to_numpy(expected[name])
        )
    assert any((a != b).any() for a, b in zip(before, map(np.asarray, inside.values()), strict=True))
    for a, b in zip(before, made.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with (
        pytest.raises(opt.NoMatch, match="keeps an average"),
        trained(compiled(opt.Adam())).optimizer.averaged(),
    ):
        pass


def parameters(made: Any) -> dict[str, Any]:
    """The values of the trained variables by their paths, copied."""
    return {
        v.path.replace("/", "."): keras.ops.convert_to_tensor(np.array(v)) for v in made.trainable_variables
    }
