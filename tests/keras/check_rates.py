"""Is the learning rate of Keras that of our rules? Run by `test_keras.py`."""

import math
from typing import Any

import keras
import numpy as np
import pytest

import optimisers as opt

X = np.ones((8, 2), np.float32)
TWO = {opt.matrices: opt.Descent(0.1), "**": opt.Descent(0.01)}


def model() -> Any:
    """A line, whose gradient of `sum` is 8 times the number of steps of one batch."""
    layers = keras.layers
    return keras.Sequential([layers.Input((2,)), layers.Dense(1, kernel_initializer="zeros")])


def loss(_: Any, y: Any) -> Any:
    """Its gradient is 1 for kernel and bias."""
    return keras.ops.mean(y, axis=-1)


def fitted(optimizer: Any, epochs: int, *callbacks: Any) -> tuple[Any, Any]:
    """(model, history) after epochs of one step."""
    made = model()
    made.compile(optimizer=optimizer, loss=loss)
    history = made.fit(X, X[:, :1], epochs=epochs, batch_size=8, verbose=0, callbacks=list(callbacks))
    return made, history.history


def walked(made: Any) -> list[float]:
    """How far kernel and bias have come: the sums of the rates of all steps."""
    kernel, bias = made.get_weights()
    return [-float(kernel[0, 0]), -float(bias[0])]


def test_the_rate_is_that_of_the_rule() -> None:
    made, history = fitted(opt.KerasOptimizer(opt.Descent(0.25)), 3)

    assert float(made.optimizer.learning_rate) == 0.25
    assert walked(made) == pytest.approx([0.75, 0.75])
    assert "learning_rate" not in history


@pytest.mark.parametrize("rate", [0.5, opt.Constant(0.5)], ids=repr)
def test_a_number_or_a_schedule_of_ours_is_given_to_the_rule(rate: Any) -> None:
    assert walked(fitted(opt.KerasOptimizer(opt.Descent(), rate), 3)[0]) == pytest.approx([1.5, 1.5])


def test_a_rate_that_is_assigned_counts_from_the_next_step_on() -> None:
    made, _ = fitted(opt.KerasOptimizer(opt.Descent(0.25)), 2)
    made.optimizer.learning_rate = 0.5
    made.fit(X, X[:, :1], batch_size=8, verbose=0)

    assert walked(made) == pytest.approx([1.0, 1.0])
    assert opt.current(made.optimizer.tree)[made.trainable_variables[1].path.replace("/", ".")].eta == 0.5


def test_a_schedule_of_keras_is_followed() -> None:
    decay = keras.optimizers.schedules.PiecewiseConstantDecay([0, 2], [1.0, 0.5, 0.25])
    made, _ = fitted(opt.KerasOptimizer(opt.Descent(), decay), 4)

    assert walked(made) == pytest.approx([1 + 0.5 + 0.5 + 0.25] * 2)


def test_a_function_of_keras_is_called_at_every_step() -> None:
    made, _ = fitted(opt.KerasOptimizer(opt.Descent(), lambda: 0.125), 2)

    assert walked(made) == pytest.approx([0.25, 0.25])


def test_a_schedule_of_ours_stands_in_the_rule_and_the_rate_is_a_factor() -> None:
    optimizer = opt.KerasOptimizer(opt.Descent(opt.Cosine(1.0, 4)))
    made, _ = fitted(optimizer, 2)
    curve = [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]

    assert float(optimizer.learning_rate) == 1
    assert walked(made) == pytest.approx([sum(curve[:2])] * 2)
    optimizer.learning_rate = 0.5
    made.fit(X, X[:, :1], epochs=2, batch_size=8, verbose=0)
    assert walked(made) == pytest.approx([sum(curve[:2]) + sum(curve[2:]) / 2] * 2)


def test_where_rates_differ_the_rate_is_a_factor_on_all() -> None:
    decay = keras.optimizers.schedules.PiecewiseConstantDecay([0], [1.0, 0.5])

    assert walked(fitted(opt.KerasOptimizer(TWO), 2)[0]) == pytest.approx([0.2, 0.02])
    assert walked(fitted(opt.KerasOptimizer(TWO, decay), 2)[0]) == pytest.approx([0.15, 0.015])


def test_rates_by_depth_are_governed_too() -> None:
    rule = opt.layer_decay(opt.Descent(0.1), 0.5, layer=lambda path: int("bias" in str(path)))

    assert walked(fitted(opt.KerasOptimizer(rule), 2)[0]) == pytest.approx([0.1, 0.2])


def test_every_rate_of_a_chain_is_the_one() -> None:
    made, _ = fitted(opt.KerasOptimizer(opt.Chain(opt.Descent(0.1), opt.Descent(0.1))), 1)
    made.optimizer.learning_rate = 0.3
    made.fit(X, X[:, :1], batch_size=8, verbose=0)

    assert walked(made) == pytest.approx([0.1**2 + 0.3**2] * 2)


def test_callbacks_of_keras_set_the_rate() -> None:
    halved = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    made, history = fitted(opt.KerasOptimizer(opt.Descent(1.0)), 3, halved)

    assert history["learning_rate"] == pytest.approx([0.5, 0.25, 0.125])
    assert walked(made) == pytest.approx([0.875, 0.875])


def test_a_plateau_lowers_the_rate() -> None:
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.1, patience=1, min_delta=1e9)
    made, _ = fitted(opt.KerasOptimizer(opt.Descent(1.0)), 3, plateau)

    assert float(made.optimizer.learning_rate) == pytest.approx(0.01)


def test_what_is_no_rate_is_refused() -> None:
    with pytest.raises(opt.BadSetting, match="beside several rules; give each its own rate"):
        opt.KerasOptimizer(TWO, 0.1)
    with pytest.raises(opt.BadSetting, match=r"learning_rate=0\.1 was given, and Chain\(\) has no rate eta"):
        opt.KerasOptimizer(opt.Chain(), 0.1)
    with pytest.raises(opt.BadSetting, match="no rate eta"):
        opt.KerasOptimizer(opt.Chain(), keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5))
    with pytest.raises(opt.BadSetting, match="of Keras is times the learning rate"):
        opt.KerasOptimizer(TWO, weight_decay=0.1)
    with pytest.raises(opt.BadSetting, match="no rate eta"):
        opt.KerasOptimizer(opt.Chain()).learning_rate = 0.1
    with pytest.raises(opt.BadSetting, match="belongs into the rule"):
        opt.KerasOptimizer(opt.Adam()).learning_rate = opt.Cosine(0.1, 10)
