"""Rules that live on second gradients: without any they raise, with None in their place they wait."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt

ASKING = [
    opt.AdaHessian(0.1),
    opt.Sophia(0.1),
    opt.SophiaG(0.1),
    opt.Chain(opt.ClipNorm(1.0), opt.Sophia(0.1)),
    opt.EMA(opt.AdaHessian(0.1)),
    opt.SkipNonFinite(opt.SophiaG(0.1)),
]
ASKS = (
    r"(AdaHessian|SophiaG?) asks for second gradients; write update\(state, model, grads, hessians\), with"
    r" None in their place.*; opt\.hutchinson\(loss, model, seed\) makes them"
)

LIBRARIES = pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
WAYS = pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)


def put(library: str) -> Callable[[Any], Any]:
    module = pytest.importorskip({"jax": "jax.numpy"}.get(library, library))
    made = module.tensor if library == "torch" else module.asarray
    return lambda values: made(np.array(values, np.float32))


@LIBRARIES
@WAYS
@pytest.mark.parametrize("rule", ASKING, ids=lambda r: type(r).__name__)
def test_none_at_all_are_asked_for_and_nothing_is_stepped(library: str, step: Any, rule: opt.Rule) -> None:
    array = put(library)
    x = {"a": array([1.0, -2.0])}
    state = opt.setup(rule, x)
    with pytest.raises(opt.BadState, match=ASKS):
        step(state, x, {"a": array([1.0, 1.0])})

    assert np.asarray(x["a"]).tolist() == [1.0, -2.0]
    state, x = step(state, x, {"a": array([1.0, 1.0])}, {"a": array([2.0, 2.0])})
    assert np.isfinite(np.asarray(x["a"])).all()
    assert (np.asarray(x["a"]) < [1.0, -2.0]).all()


@LIBRARIES
@WAYS
def test_adahessian_waits_for_its_first_estimate(library: str, step: Any) -> None:
    """With decay, which waits too; what the gradients were counts then: m = 0.09 g + 0.1 g over 0.19."""
    array = put(library)
    x = {"a": array([1.0, -2.0]), "b": array([3.0])}
    state = opt.setup(opt.AdaHessian(0.1, (0.9, 0.99), lam=0.5), x)
    grads = {"a": array([1.0, -4.0]), "b": array([2.0])}
    state, x = step(state, x, grads, None)
    assert np.asarray(x["a"]).tolist() == [1.0, -2.0]
    assert np.asarray(x["b"]).tolist() == [3.0]

    state, x = step(state, x, grads, {"a": array([2.0, -8.0]), "b": None})
    wanted = np.array([1.0, -2.0]) - 0.1 * (np.array([1.0, -4.0]) / [2.0, 8.0] + 0.5 * np.array([1.0, -2.0]))
    np.testing.assert_allclose(np.asarray(x["a"]), wanted, rtol=1e-6)
    assert np.asarray(x["b"]).tolist() == [3.0]

    before = np.asarray(x["a"]).copy()
    state, x = step(state, x, grads, None)
    wanted = before - 0.1 * (np.array([1.0, -4.0]) / [2.0, 8.0] + 0.5 * before)
    np.testing.assert_allclose(np.asarray(x["a"]), wanted, rtol=1e-6)


def test_a_rule_beside_them_or_with_a_choice_is_not_asked() -> None:
    x = {"w": np.ones((2, 2)), "b": np.ones(2)}
    state = opt.setup({opt.vectors: opt.Descent(0.1), "**": opt.Sophia(0.1)}, x)
    with pytest.raises(opt.BadState, match="Sophia asks"):
        opt.update(state, x, x)
    opt.freeze_(state["w"])
    _, new = opt.update(state, x, x)
    np.testing.assert_allclose(new["b"], 0.9)
    _, new = opt.update(opt.thaw(state), x, {"w": None, "b": x["b"]})
    assert (new["w"] == 1).all()


def test_transformations_of_jax_raise_too() -> None:
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    x = {"a": jax.numpy.ones(3)}
    with pytest.raises(opt.BadState, match=ASKS):
        jax.jit(opt.update)(opt.setup(opt.AdaHessian(), x), x, x)
    tx = opt.as_optax(opt.Sophia())
    with pytest.raises(opt.BadState, match=r"as_optax tx\.update\(\.\.\., hessian="):
        tx.update(x, tx.init(x), x)

    _, new = jax.jit(opt.update)(opt.setup(opt.AdaHessian(), x), x, x, None)
    assert new["a"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("rule", ASKING[:4], ids=lambda r: type(r).__name__)
def test_optax_hands_them_on_as_update_does(rule: opt.Rule, jitted: bool) -> None:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    jnp = jax.numpy
    x = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array([[3.0]])}}
    grads, second = jax.tree.map(jnp.cos, x), jax.tree.map(lambda v: 1 + v**2, x)
    tx = opt.as_optax(rule)
    run = jax.jit(tx.update) if jitted else tx.update
    kept, p = tx.init(x), x
    state, q = opt.setup(rule, x), x
    for hessian in (second, None, second, None):
        steps, kept = run(grads, kept, p, hessian=hessian)
        p = optax.apply_updates(p, steps)
        state, q = opt.update(state, q, grads, hessian)

    for got, wanted in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_a_race_gives_them_every_tenth_step(library: str) -> None:
    """The winner's losses are those of a loop of one's own."""
    array = put(library)

    def loss(model: Any, batch: Any) -> Any:
        return ((model["a"] ** 4 * batch).sum() + (model["b"] ** 2).sum()) / 7

    differentiated = functools.partial(opt.value_and_grad, loss)
    if library == "jax":
        differentiated = pytest.importorskip("jax").value_and_grad(loss)
    model = {"a": array([1.0, -2.0]), "b": array([3.0])}
    batches, steps = [array([1.0, 2.0])], 12
    found = opt.race({"s": opt.Sophia(0.05)}, loss, model, batches, seeds=(0,), factors=(1,), steps=steps)
    state, losses = opt.setup(opt.Sophia(0.05), model), []
    for n in range(steps):
        value, grads = differentiated(model, batches[0])
        second = opt.hutchinson(loss, model, n, batches[0]) if n % 10 == 0 else None
        losses.append(float(value))
        state, model = opt.update(state, model, grads, second)

    np.testing.assert_allclose(found.trials[0].losses, losses, rtol=1e-5)
