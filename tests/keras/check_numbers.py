"""Does a model train by our rules as by the optimizers that Keras has of its own? Run by `test_keras.py`."""

from typing import Any

import keras
import numpy as np
import pytest

import optimisers as opt

EVERY = 1 if keras.config.backend() == "torch" else 3
"""JAX compiles each model anew, and tries every third case."""

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((48, 5)).astype(np.float32), RNG.standard_normal((48, 2)).astype(np.float32)


def model(seed: int = 0) -> Any:
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential([layers.Input((5,)), layers.Dense(7, activation="tanh"), layers.Dense(2)])


def trained(optimizer: Any, epochs: int = 4, **how: Any) -> list[Any]:
    """The weights of the model after some epochs of three batches."""
    made = model()
    made.compile(optimizer=optimizer, loss="mse", **how)
    made.fit(X, Y, epochs=epochs, batch_size=16, shuffle=False, verbose=0)
    return made.get_weights()


def same(a: list[Any], b: list[Any], within: float = 1e-6) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=within)


def pairs() -> dict[str, tuple[Any, Any]]:
    """Optimizers of Keras and rules that compute the same. Keras adds epsilon before it corrects the bias, so
    it is small here.
    """
    k, tiny = keras.optimizers, 1e-12
    return {
        "SGD": (k.SGD(0.05), opt.Descent(0.05)),
        "momentum": (k.SGD(0.05, momentum=0.9), opt.Momentum(0.05, 0.9)),
        "Nesterov": (k.SGD(0.05, momentum=0.9, nesterov=True), opt.Nesterov(0.05, 0.9)),
        "Adam": (k.Adam(0.01, epsilon=tiny), opt.Adam(0.01, epsilon=tiny)),
        "AdamW": (
            k.AdamW(0.01, weight_decay=0.1, epsilon=tiny),
            opt.AdamW(0.01, lam=0.1, epsilon=tiny),
        ),
        "Lion": (k.Lion(1e-3), opt.Lion(1e-3)),
        "Adamax": (k.Adamax(0.01, epsilon=tiny), opt.AdaMax(0.01, epsilon=tiny)),
    }


@pytest.mark.parametrize("name", ["Adam", "SGD", "momentum", "AdamW", "Nesterov", "Lion", "Adamax"][::EVERY])
def test_twelve_steps_are_those_of_keras(name: str) -> None:
    theirs, rule = pairs()[name]

    same(trained(opt.KerasOptimizer(rule)), trained(theirs))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"global_clipnorm": 0.1},
        {"clipvalue": 0.01},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        {"clipnorm": 0.1},
        {"loss_scale_factor": 8.0},
        {"weight_decay": 0.1},
    ][::EVERY],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_every_optimizer_of_keras_hold(settings: dict[str, Any]) -> None:
    theirs = keras.optimizers.SGD(0.05, momentum=0.9, **settings)

    same(trained(opt.KerasOptimizer(opt.Momentum(0.05, 0.9), **settings)), trained(theirs))


def test_steps_by_hand_are_those_of_fit() -> None:
    made, optimizer = model(), opt.KerasOptimizer(opt.Adam(0.01))
    made.compile(optimizer=optimizer, loss="mse")
    for _ in range(4):
        for start in (0, 16, 32):
            made.train_on_batch(X[start : start + 16], Y[start : start + 16])

    same(made.get_weights(), trained(opt.KerasOptimizer(opt.Adam(0.01))))
    assert int(optimizer.iterations) == 12


def test_apply_gradients_steps_some_variables_and_leaves_the_others() -> None:
    a, b = keras.Variable(np.ones(3, np.float32)), keras.Variable(np.ones(2, np.float32))
    optimizer = opt.KerasOptimizer(opt.Momentum(0.5, 0.5))
    optimizer.build([a, b])
    g = keras.ops.ones(3)
    optimizer.apply_gradients([(g, a)])
    optimizer.apply_gradients([(keras.ops.ones(2), b)])
    count = optimizer.apply_gradients([(g, a)])

    same([np.array(a), np.array(b)], [np.full(3, 1 - 0.5 - 0.75), np.full(2, 0.5)])
    assert int(count) == 3


def test_a_step_without_state_writes_nothing_and_gives_the_same() -> None:
    made, optimizer = model(), opt.KerasOptimizer(opt.Adam(0.01))
    optimizer.build(made.trainable_variables)
    values = [keras.ops.copy(v.value) for v in made.trainable_variables]
    state = [keras.ops.copy(v.value) for v in optimizer.variables]
    grads = [keras.ops.ones_like(v) for v in values]
    for _ in range(3):
        values, state = optimizer.stateless_apply(state, grads, values)

    assert int(optimizer.iterations) == 0
    same(model().get_weights(), made.get_weights(), 0)
    for _ in range(3):
        optimizer.apply(grads, made.trainable_variables)
    same([keras.ops.convert_to_numpy(v) for v in values], made.get_weights(), 1e-7)
    for new, kept in zip(state, optimizer.variables, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(new), np.array(kept), rtol=1e-6, atol=1e-7)


def test_mixed_precision_puts_a_scale_around_it_and_skips_what_is_not_finite() -> None:
    made, optimizer = model(), opt.KerasOptimizer(opt.Adam(0.01))
    scaled = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256.0)
    made.compile(optimizer=scaled, loss="mse")
    made.fit(X, Y, epochs=4, batch_size=16, shuffle=False, verbose=0)

    same(made.get_weights(), trained(opt.KerasOptimizer(opt.Adam(0.01))), 1e-5)
    before = made.get_weights()
    made.fit(np.full_like(X, np.inf), Y, batch_size=16, verbose=0)
    same(made.get_weights(), before, 0)
    assert int(optimizer.iterations) == 12


def test_float16_layers_train() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        made = model()
    finally:
        keras.config.set_dtype_policy("float32")
    made.compile(optimizer=opt.KerasOptimizer(opt.Adam(0.01)), loss="mse")
    losses = made.fit(X, Y, epochs=5, batch_size=16, verbose=0).history["loss"]

    assert type(made.optimizer) is keras.optimizers.LossScaleOptimizer
    assert losses[-1] < losses[0]


@pytest.mark.skipif(keras.config.backend() == "torch", reason="torch.compile takes half a minute")
def test_a_compiled_step_gives_the_same() -> None:
    rules = {opt.matrices: opt.Muon(0.02, layout="columns"), "**": opt.AdamW(1e-3)}

    same(*(trained(opt.KerasOptimizer(rules), 1, jit_compile=jit) for jit in (False, True)))
