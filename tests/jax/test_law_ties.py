"""Ties: found by memory where arrays are written, declared where they are not.

Wanted numbers come from a plain model of one array: x - eta (g1 + g2).
"""

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import optimisers as opt

X, ONE, TWO = np.array([1.0, 2.0], np.float32), np.ones(2, np.float32), np.full(2, 2.0, np.float32)
TIES = [("a", "b.c")]
KINDS: dict[str, Callable[[Any], Any]] = {"numpy": np.array, "torch": torch.tensor, "jax": jnp.asarray}

steps = pytest.mark.parametrize(
    "step", [opt.update, opt.update_, jax.jit(opt.update)], ids=["update", "update_", "jit"]
)


def tree(a: Any, c: Any) -> Any:
    return {"a": a, "b": {"c": c}}


def seen(model: Any) -> list[Any]:
    return [np.asarray(model["a"]).tolist(), np.asarray(model["b"]["c"]).tolist()]


def along(*gradients: Any) -> list[Any]:
    """One array after steps of 0.5 times these gradients, at both places."""
    x = (X - 0.5 * sum(gradients)).tolist()
    return [x, x]


# -- declared ties -------------------------------------------------------------------------------------------


@steps
def test_a_declared_tie_adds_gradients_and_steps_once(step: Callable[..., Any]) -> None:
    model = tree(jnp.asarray(X), jnp.asarray(X))  # two arrays: only the declaration ties them
    state = opt.setup(opt.Descent(0.5), model, ties=TIES)
    for _ in range(2):
        state, model = step(state, model, tree(jnp.asarray(ONE), jnp.asarray(TWO)))

    assert seen(model) == along(ONE, TWO, ONE, TWO)
    assert len(jax.tree.leaves(opt.trainables(model, ties=TIES))) == 1


@steps
def test_arrays_of_jax_that_are_one_object_are_two_parameters(step: Callable[..., Any]) -> None:
    """As inside jit, and as with Optax, whatever they start from."""
    x = jnp.asarray(X)
    model = tree(x, x)
    _, new = step(opt.setup(opt.Descent(0.5), model), model, tree(jnp.asarray(ONE), jnp.asarray(TWO)))

    assert seen(new) == [(X - 0.5 * ONE).tolist(), (X - 0.5 * TWO).tolist()]
    assert len(opt.trainables(model)) == 2
    assert opt.destructure(model)[0].shape == (4,)


def test_a_container_that_is_one_object_is_two_as_well() -> None:
    """An online and a target network that start from one dict."""
    start = {"w": jnp.asarray(X)}
    model = {"online": start, "target": start}
    state = opt.setup(opt.Descent(0.5), model)
    _, new = opt.update(state, model, {"online": {"w": jnp.asarray(ONE)}, "target": None})
    np.testing.assert_array_equal(new["online"]["w"], X - 0.5 * ONE)
    np.testing.assert_array_equal(new["target"]["w"], X)


def test_the_same_program_trains_the_same_with_and_without_jit() -> None:
    def trained(jit: Callable[[Any], Any], ties: Any) -> Any:
        def run(x: Any) -> Any:
            model = tree(x, x)
            state = opt.setup(opt.Momentum(0.5), model, ties=ties)
            for g in (1.0, 2.0):
                state, model = opt.update(state, model, tree(g * x, x))
            return model

        return seen(jit(run)(jnp.asarray(X)))

    for ties in ((), TIES):
        np.testing.assert_allclose(trained(jax.jit, ties), trained(lambda f: f, ties), rtol=1e-6)


def test_one_gradient_object_at_both_places_counts_once() -> None:
    model, g = tree(jnp.asarray(X), jnp.asarray(X)), jnp.asarray(ONE)
    for step in (opt.update, opt.update_):
        state = opt.setup(opt.Descent(0.5), model, ties=TIES)
        assert seen(step(state, model, tree(g, g))[1]) == along(ONE)


def test_a_tied_model_is_trained_a_second_time_in_one_process() -> None:
    for _ in range(2):
        model = {"x": {"a": jnp.asarray(X)}, "y": {"b": jnp.asarray(X), "c": jnp.zeros(3)}}
        state = opt.setup(opt.Descent(0.5), model, ties=[("x.a", "y.b")])
        for _ in range(2):
            grads = {"x": {"a": jnp.asarray(ONE)}, "y": {"b": jnp.asarray(TWO), "c": jnp.ones(3)}}
            state, model = opt.update(state, model, grads)
        np.testing.assert_array_equal(model["x"]["a"], X - 3)
        np.testing.assert_array_equal(model["y"]["b"], X - 3)
        np.testing.assert_array_equal(model["y"]["c"], -np.ones(3))


def test_declared_ties_hold_after_vmap_device_put_and_restore() -> None:
    model = tree(jnp.asarray(X), jnp.asarray(X))
    grads = tree(jnp.asarray(ONE), jnp.asarray(TWO))
    state = opt.setup(opt.Descent(0.5), model, ties=TIES)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), (state, model, grads))
    _, new = jax.vmap(opt.update)(*many)
    np.testing.assert_array_equal(new["b"]["c"], [X - 1.5, X - 1.5])
    for turn in (lambda s: jax.device_put(s), lambda s: pickle.loads(pickle.dumps(s))):  # noqa: PLW0108 ours
        kept, there = turn((state, model))
        assert seen(opt.update(kept, there, grads)[1]) == along(ONE, TWO)


def test_an_nnx_variable_at_two_places_is_a_tie_and_two_variables_of_one_array_are_none() -> None:
    class Net(nnx.Module):
        def __init__(self, *, tied: bool) -> None:
            self.a = nnx.Param(jnp.asarray(X))
            self.b = self.a if tied else nnx.Param(self.a[...])

    for tied, wanted in ((True, 1), (False, 2)):
        net = Net(tied=tied)
        assert len(opt.trainables(net)) == wanted
        state = opt.setup(opt.Descent(0.5), net)
        _, new = opt.update(state, net, {"a": jnp.asarray(ONE), "b": None})
        assert (new.a is new.b) is tied
        np.testing.assert_array_equal(new.b[...], X - 0.5 * ONE if tied else X)


def test_optax_in_our_place_steps_equal_starts_apart_as_well() -> None:
    x = jnp.asarray(X)
    params, grads = tree(x, x), tree(jnp.asarray(ONE), -jnp.asarray(ONE))
    for init in (lambda tx: tx.init, lambda tx: jax.jit(tx.init)):
        found = [
            tx.update(grads, init(tx)(params), params)[0]
            for tx in (optax.sgd(0.5), opt.as_optax(opt.Descent(0.5)))
        ]
        assert seen(found[0]) == seen(found[1])


def test_a_vector_of_a_tied_model_has_its_numbers_once() -> None:
    model = tree(jnp.asarray(X), jnp.asarray(X))
    flat, re = opt.destructure(model, ties=TIES)

    assert flat.shape == (2,)
    assert seen(re(2 * flat)) == [(2 * X).tolist()] * 2


# -- arrays that are written ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_ties_of_arrays_that_are_written_are_in_memory(kind: str) -> None:
    """Declaring what is so is no error; what is not so is refused."""
    x = KINDS[kind](X)
    model = tree(x, x)
    state = opt.setup(opt.Descent(0.5), model, ties=TIES)
    _, new = opt.update(state, model, tree(KINDS[kind](ONE), KINDS[kind](TWO)))

    assert seen(new) == along(ONE, TWO)
    apart = tree(KINDS[kind](X), KINDS[kind](X))
    for function in (
        lambda: opt.setup(opt.Descent(), apart, ties=TIES),
        lambda: opt.trainables(apart, ties=TIES),
    ):
        with pytest.raises(
            opt.TreeMismatch, match=r"two arrays in memory; .*: model\['b'\]\['c'\] = model\['a'\]"
        ):
            function()


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ties", "error", "text"),
    [
        (
            [("a", "b.d")],
            opt.NoMatch,
            "'b.d' in ties matches no parameter; it takes the path of one; there are a, b.c",
        ),
        ([("**", "a")], opt.NoMatch, r"'\*\*' in ties matches a, b.c"),
        (
            [("a",)],
            opt.BadSetting,
            r'it takes tuples of paths, such as ties=\[\("encoder.w", "decoder.w"\)\]',
        ),
        ("a b", opt.BadSetting, "it takes tuples of paths"),
        ([("a", 1)], opt.BadSetting, "it takes tuples of paths"),
    ],
)
def test_a_tie_that_names_no_two_places_is_refused(ties: Any, error: type[Exception], text: str) -> None:
    model = tree(jnp.asarray(X), jnp.asarray(X))
    for function in (
        lambda: opt.setup(opt.Adam(), model, ties=ties),
        lambda: opt.destructure(model, ties=ties),
    ):
        with pytest.raises(error, match=text):
            function()


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            np.zeros((2, 1), np.float32),
            r"are tied, and hold arrays of float32, \(2,\) and of float32, \(2, 1\)",
        ),
        (np.zeros(2, np.float16), r"of float32, \(2,\) and of float16, \(2,\)"),
        (np.zeros(2, np.float32), "hold different numbers; put one array at both places first"),
    ],
)
def test_arrays_that_cannot_be_one_are_refused(other: Any, text: str) -> None:
    with pytest.raises(opt.TreeMismatch, match=text):
        opt.setup(opt.Adam(), tree(jnp.asarray(X), jnp.asarray(other)), ties=TIES)
