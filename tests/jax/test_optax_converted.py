"""Does a run of Optax go on here, and one of ours in Optax, with the same steps?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimisers as opt

PAIRS = {
    "adam": (optax.adam(0.1), opt.Adam(0.1)),
    "adamw": (optax.adamw(0.1, weight_decay=0.1), opt.AdamW(0.1, lam=0.1)),
    "lion": (optax.lion(0.1, weight_decay=0.0), opt.Lion(0.1)),
    "sgd": (optax.sgd(0.1, momentum=0.9), opt.SGD(0.1, 0.9)),
    "momentum": (optax.sgd(0.1, momentum=0.9), opt.Momentum(0.1, 0.9)),
    "clipped": (
        optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
        opt.Chain(opt.ClipGlobalNorm(0.5), opt.Adam(0.1)),
    ),
    "scheduled": (optax.adam(optax.cosine_decay_schedule(0.1, 10)), opt.Adam(opt.Cosine(0.1, 10))),
}


def slopes(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {"enc": {"w": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)}, "b": jnp.ones(2) * seed}


def with_optax(tx: Any, state: Any, model: Any, seed: int) -> Any:
    steps, state = tx.update(slopes(seed), state, model)
    return state, optax.apply_updates(model, steps)


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), a, b)


@pytest.mark.parametrize(("tx", "rule"), PAIRS.values(), ids=PAIRS)
def test_a_run_goes_from_optax_to_here_and_back(tx: Any, rule: opt.Rule) -> None:
    model: Any = slopes(9)
    theirs = tx.init(model)
    for seed in (1, 2, 3):
        theirs, model = with_optax(tx, theirs, model, seed)
    fresh = opt.setup(rule, model)
    ours = opt.from_optax_state(fresh, theirs)
    assert fresh == opt.setup(rule, model)
    back = opt.to_optax_state(ours, tx.init(model))
    assert jax.tree.structure(back) == jax.tree.structure(theirs)
    assert_same(back, theirs)

    theirs, wanted = with_optax(tx, theirs, model, 4)
    ours, found = opt.update(ours, model, slopes(4))
    assert_same(found, wanted)
    assert_same(opt.to_optax_state(ours, tx.init(model)), theirs)


def test_numpy_goes_on_with_what_optax_has_learnt() -> None:
    tx, rule = PAIRS["adam"]
    theirs, model = with_optax(tx, tx.init(slopes(9)), slopes(9), 1)
    host = jax.tree.map(np.array, model)
    ours: Any = opt.from_optax_state(opt.setup(rule, host), theirs)
    np.testing.assert_array_equal(ours["enc"]["w"].state.m, theirs[0].mu["enc"]["w"])
    _, wanted = with_optax(tx, theirs, model, 2)
    _, found = opt.update(ours, host, jax.tree.map(np.array, slopes(2)))
    assert_same(found, wanted)


def test_what_is_not_shared_is_refused() -> None:
    model = slopes(1)
    adam = optax.adam(0.1).init(model)
    with pytest.raises(
        opt.BadState, match=r"trained by SOAP.*which is not one of those that Optax keeps alike"
    ):
        opt.from_optax_state(opt.setup(opt.SOAP(), model), adam)
    with pytest.raises(opt.TreeMismatch, match=r"no 'trace' of shape \(2,\) for b"):
        opt.from_optax_state(opt.setup(opt.SGD(0.1, 0.9), model), adam)
    with pytest.raises(opt.BadState, match="whose velocity holds rates of other steps"):
        opt.from_optax_state(opt.setup(opt.Momentum(opt.Cosine(0.1, 9)), model), adam)
    state: Any = opt.setup(opt.Adam(), model)
    apart, _ = opt.update(state, model, slopes(2))
    part, _ = opt.update(apart["b"], model["b"], model["b"])
    with pytest.raises(opt.BadState, match=r"have taken \[1, 2\] steps"):
        opt.to_optax_state(_whole(part, state), adam)


def _whole(part: Any, like: Any) -> Any:
    """The state that a part belongs to."""
    from optimisers.state.leaf import handle, parts

    return handle(parts(part)[0], parts(like)[1], parts(like)[2])
