"""What may be done to a model and its optimizer while it trains? Run by `test_keras.py`."""

import math
from typing import Any

import keras
import numpy as np
import pytest

import optimisers as opt

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((32, 4)).astype(np.float32), RNG.standard_normal((32, 1)).astype(np.float32)
TORCH = keras.config.backend() == "torch"


def model() -> Any:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [layers.Input((4,)), layers.Dense(3, name="first"), layers.Dense(1, name="second")], name="net"
    )


def compiled(rule: Any) -> Any:
    made = model()
    made.compile(optimizer=opt.KerasOptimizer(rule), loss="mse")
    return made


def fit(made: Any) -> list[Any]:
    """The weights after two more steps."""
    made.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    return made.get_weights()


def test_globs_and_selectors_go_over_the_paths_of_variables() -> None:
    made = compiled({"**.bias": None, "net.first.*": opt.Descent(0.0), opt.matrices: opt.Descent(0.1)})
    before, after = made.get_weights(), fit(made)

    moved = [bool((a != b).any()) for a, b in zip(before, after, strict=True)]
    assert moved == [False, False, True, False]
    with pytest.raises(opt.NoMatch, match=r"net\.first\.kernel"):
        fit(compiled({"**.kernels": opt.Adam(), "**": opt.Adam()}))


def test_embeddings_are_no_hidden_matrices() -> None:
    layers = keras.layers
    made = keras.Sequential([layers.Input((4,)), layers.Embedding(5, 3), layers.Dense(2), layers.Flatten()])
    optimizer = opt.KerasOptimizer({opt.hidden_matrices: opt.Muon(layout="columns"), "**": opt.AdamW()})
    optimizer.build(made.trainable_variables)

    rules = [type(rule) for rule in opt.current(optimizer.tree).values()]
    assert rules == [opt.AdamW, opt.Muon, opt.AdamW]


def test_variables_of_one_path_are_told_apart() -> None:
    optimizer = opt.KerasOptimizer(opt.Momentum(1.0))
    a, b = (keras.Variable(np.zeros(n, np.float32), name="w") for n in (2, 3))
    optimizer.apply([keras.ops.ones(2), keras.ops.ones(3)], [a, b])

    assert list(opt.current(optimizer.tree)) == ["w", "w_2"]
    assert [float(np.array(v).sum()) for v in (a, b)] == [-2, -3]


def test_a_frozen_layer_stays_and_goes_on_where_the_optimizer_is_new() -> None:
    made = compiled(opt.Adam(0.1))
    made.get_layer("first").trainable = False
    made.compile(optimizer=opt.KerasOptimizer(opt.Adam(0.1)), loss="mse")
    before, after = made.get_weights(), fit(made)

    assert [bool((a != b).any()) for a, b in zip(before, after, strict=True)] == [False, False, True, True]
    made.get_layer("first").trainable = True
    made.compile(optimizer=opt.KerasOptimizer(opt.Adam(0.1)), loss="mse")
    assert all((a != b).any() for a, b in zip(after, fit(made), strict=True))


def test_training_goes_on_at_a_second_fit_and_when_it_is_compiled_again() -> None:
    made, other = compiled(opt.Adam(0.1)), compiled(opt.Adam(0.1))
    fit(made)
    made.compile(optimizer=made.optimizer, loss="mse", metrics=["mae"])
    other.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)

    for a, b in zip(fit(made), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_constraints_hold_after_a_step_and_count_in_the_next() -> None:
    weight = keras.Variable(np.array([1.0, -1.0], np.float32))
    weight.constraint = keras.constraints.NonNeg()
    optimizer = opt.KerasOptimizer(opt.Momentum(0.5, 0.5))
    for _ in range(2):
        optimizer.apply([keras.ops.convert_to_tensor(np.array([1.0, -1.0], np.float32))], [weight])

    np.testing.assert_allclose(np.array(weight), [0.0, 0.75])


def test_the_loss_is_given_to_rules_that_ask_for_it() -> None:
    def stepped(loss: Any) -> float:
        w = keras.Variable(np.array([1.0], np.float32))
        optimizer = opt.KerasOptimizer(opt.PolyakSPS(most=100.0))
        optimizer.apply([keras.ops.convert_to_tensor(np.array([2.0], np.float32))], [w], loss=loss)
        return float(np.array(w)[0])

    assert stepped(keras.ops.convert_to_tensor(6.0)) == pytest.approx(1 - 6 / 4 * 2)
    with pytest.raises(opt.BadState, match="asks for the loss"):
        stepped(None)


@pytest.mark.skipif(not TORCH, reason="the trainer of JAX hands it to no optimizer")
def test_fit_gives_the_loss_with_torch() -> None:
    made, other = compiled(opt.PolyakSPS(most=100.0)), model()
    loss = keras.ops.mean((other(X) - keras.ops.convert_to_tensor(Y)) ** 2)
    loss.backward()
    w, g = other.get_weights(), [v.value.grad.numpy() for v in other.trainable_variables]
    rate = float(loss.detach()) / sum((each**2).sum() for each in g)
    made.fit(X, Y, batch_size=32, verbose=0)

    for new, old, slope in zip(made.get_weights(), w, g, strict=True):
        np.testing.assert_allclose(new, old - rate * slope, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(TORCH, reason="the trainer of torch hands it over")
def test_fit_says_with_jax_how_the_loss_is_given() -> None:
    with pytest.raises(opt.BadState, match=r"or stateless_apply\(..., loss=value\) in a train_step"):
        fit(compiled(opt.MoMo()))


def test_a_step_that_raises_has_changed_nothing() -> None:
    made = compiled(opt.Chain(opt.ClipGlobalNorm(1.0), opt.Adam(0.1)))
    fit(made)
    before = made.get_weights() + [np.array(v) for v in made.optimizer.variables]
    bad = [
        keras.ops.convert_to_tensor(np.full(v.shape, math.inf, np.float32)) for v in made.trainable_variables
    ]
    with pytest.raises(opt.DomainError):
        made.optimizer.apply(bad, made.trainable_variables)

    for a, b in zip(
        before, made.get_weights() + [np.array(v) for v in made.optimizer.variables], strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_what_no_rule_steps_is_refused_by_name() -> None:
    w = keras.Variable(np.ones((2, 2), np.float32), name="w")
    with pytest.raises(opt.BadSetting, match="asks for second gradients, which Keras does not work out"):
        opt.KerasOptimizer(opt.Sophia()).build([w])
    with pytest.raises(opt.BadSetting, match=r"^v: .*Muon"):
        opt.KerasOptimizer(opt.Muon()).build([keras.Variable(np.ones(2, np.float32), name="v")])
    with pytest.raises(opt.BadState, match=r"KerasOptimizer was given .*Adam.* where the rule goes"):
        opt.KerasOptimizer(opt.Adam)
    with pytest.raises(opt.BadState, match="the gradient of w is a"):
        opt.KerasOptimizer(opt.Adam()).apply([sparse()], [w])


def sparse() -> Any:
    """A gradient that is no dense array."""
    if TORCH:
        return object()
    from jax.experimental import sparse as of_jax

    return of_jax.BCOO.fromdense(np.eye(2, dtype=np.float32))


def test_the_state_of_a_small_model_is_stepped_where_it_lies() -> None:
    made = compiled(opt.Adam(0.1))
    fit(made)
    values = [v.value for v in (*made.trainable_variables, *made.optimizer.variables)]
    fit(made)

    stays = [
        a is b.value
        for a, b in zip(values, (*made.trainable_variables, *made.optimizer.variables), strict=True)
    ]
    assert all(stays) if TORCH else not any(stays)
