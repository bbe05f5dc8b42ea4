"""The state of a rule inside Optax has the form of Optax's own states, and is read and changed as any state
of ours.
"""

import copy
import importlib
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec

import optimisers as opt

optax: Any = importlib.import_module("optax")
"""Its own types are narrower than what it takes."""
as_optax: Any = opt.as_optax

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
ONES = jax.tree.map(jnp.ones_like, PARAMS)


@pytest.fixture(autouse=True)
def single() -> Any:
    with jax.enable_x64(False):
        yield


def rate_of(tx: Any, state: Any, params: Any = PARAMS) -> float:
    """The rate with which gradients of 1 are multiplied."""
    return -float(tx.update(jax.tree.map(jnp.ones_like, params), state, params)[0]["w"].ravel()[0])


# -- by whom a setting is written ----------------------------------------------------------------------------


def test_a_setting_counts_as_the_last_one_wrote_it() -> None:
    tx = as_optax(opt.Descent(0.5))
    state = tx.init(PARAMS)
    assert rate_of(tx, state) == 0.5
    _, state = tx.update(ONES, opt.adjust(state, 0.25), PARAMS)
    assert rate_of(tx, state) == 0.25  # the transformation has not changed
    other = as_optax(opt.Descent(0.125))
    assert rate_of(other, state) == 0.125
    _, state = other.update(ONES, state, PARAMS)
    assert rate_of(other, opt.adjust(state, 1.0)) == 1.0


def test_a_traced_rate_of_the_transformation_reaches_the_rule_and_has_a_slope() -> None:
    state = as_optax(opt.Momentum(0.5, 0.9)).init(PARAMS)

    @jax.jit
    def first(rate: Any) -> Any:
        return as_optax(opt.Momentum(rate, 0.9)).update(ONES, state, PARAMS)[0]["w"][0, 0]

    assert float(first(0.25)) == -0.25
    assert float(jax.grad(first)(0.25)) == -1.0
    np.testing.assert_allclose(jax.vmap(first)(jnp.array([0.1, 0.2])), [-0.1, -0.2], rtol=1e-6)


def test_rules_of_globs_take_their_own_new_settings() -> None:
    first, second = (
        as_optax({"w": opt.Descent(a), "b": opt.Descent(b)}) for a, b in ((0.5, 0.5), (0.25, 0.125))
    )
    state = first.init(PARAMS)
    updates, state = second.update(ONES, state, PARAMS)
    assert (float(updates["w"][0, 0]), float(updates["b"][0])) == (-0.25, -0.125)
    updates, _ = second.update(ONES, opt.adjust(state, 1.0, where="b"), PARAMS)
    assert (float(updates["w"][0, 0]), float(updates["b"][0])) == (-0.25, -1.0)


def test_a_schedule_of_an_injected_rate_is_followed() -> None:
    injected = optax.inject_hyperparams(lambda rate: as_optax(opt.Descent(rate)))
    tx = injected(rate=lambda count: 0.5 / (count + 1))
    state, seen = tx.init(PARAMS), list[float]()
    for _ in range(3):
        updates, state = jax.jit(tx.update)(ONES, state, PARAMS)
        seen.append(float(updates["b"][0]))
    np.testing.assert_allclose(seen, [-0.5, -0.25, -0.5 / 3], rtol=1e-6)


def test_a_state_of_another_rule_is_refused() -> None:
    state = as_optax(opt.Adam()).init(PARAMS)
    with pytest.raises(opt.BadState, match=r"the state is that of Adam.*and the transformation has Momentum"):
        as_optax(opt.Momentum()).update(ONES, state, PARAMS)
    with pytest.raises(opt.BadState, match=re.escape("write tx.init(params)")):
        as_optax(opt.Adam()).update(ONES, optax.adam(0.1).init(PARAMS), PARAMS)


# -- its form ------------------------------------------------------------------------------------------------


def test_optax_reads_and_writes_it_by_name() -> None:
    tx = optax.chain(optax.clip(1.0), as_optax(opt.Adam(0.25)))
    state = tx.init(PARAMS)
    _, state = tx.update(ONES, state, PARAMS)

    assert int(optax.tree.get(state, "count")) == 1
    assert float(optax.tree.get(state, "learning_rate")) == 0.25
    np.testing.assert_allclose(optax.tree.get(state, "m")["w"], 0.1 * np.ones((2, 3)), rtol=1e-6)
    late = optax.tree.set(state, learning_rate=0.5)
    np.testing.assert_allclose(
        tx.update(ONES, late, PARAMS)[0]["w"], 2 * tx.update(ONES, state, PARAMS)[0]["w"], rtol=1e-6
    )


def test_what_is_known_of_parameters_is_said_of_its_arrays() -> None:
    """As trainers infer how a state is shared out."""
    specs = {"w": PartitionSpec("x", "y"), "b": PartitionSpec("y")}
    tx = as_optax(opt.AdamW())
    found = optax.tree_map_params(
        tx, lambda x, spec: (x.ndim, len(spec)), tx.init(PARAMS), specs, transform_non_params=lambda _: None
    )
    pairs = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2)
    assert sorted(pairs) == [(1, 1), (1, 1), (2, 2), (2, 2)]


def test_arrays_that_only_some_rules_keep_are_found_too() -> None:
    tx = as_optax({"w": opt.Adam(), "**": opt.Momentum()})
    found = optax.tree_map_params(tx, lambda x: x + 7, tx.init(PARAMS))
    assert sum(bool((x == 7).all()) for x in jax.tree.leaves(found)) == 3


@pytest.mark.slow
def test_boxes_of_linen_keep_the_names_of_their_axes() -> None:
    dense = linen.Dense(
        4, kernel_init=linen.with_partitioning(linen.initializers.lecun_normal(), ("in", "out"))
    )
    params = dense.init(jax.random.key(0), jnp.ones((1, 3)))
    for tx in (optax.adam(0.1), as_optax(opt.Adam(0.1))):
        specs = jax.tree.leaves(
            linen.get_partition_spec(tx.init(params)), is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
        assert specs.count(PartitionSpec("in", "out")) == 2
    got, wanted = (
        tx.update(params, tx.init(params), params)[0] for tx in (as_optax(opt.Adam(0.1)), optax.adam(0.1))
    )
    assert jax.tree.structure(got) == jax.tree.structure(wanted)


def test_it_is_copied_pickled_and_shown() -> None:
    tx = as_optax(opt.Momentum(0.1))
    _, state = tx.update(ONES, tx.init(PARAMS), PARAMS)
    for again in (copy.copy(state), copy.deepcopy(state), jax.tree.map(lambda x: x, state)):
        assert again == state
        assert jax.tree.structure(again) == jax.tree.structure(state)
    assert pickle.loads(pickle.dumps(tx.init(PARAMS)["w"])) == tx.init(PARAMS)["w"]
    assert "Momentum(eta=0.1, rho=0.9)" in repr(state)
    assert repr(jax.tree.map(lambda x: x.dtype.name, state)).startswith("<state with")


def test_numbers_among_the_parameters_are_left_alone() -> None:
    params = {"w": jnp.ones(2), "n": jnp.array(3)}
    tx = as_optax(opt.Adam(0.1))
    updates, state = tx.update({"w": jnp.ones(2), "n": jnp.array(0)}, tx.init(params), params)
    assert int(updates["n"]) == 0
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_a_model_without_arrays_has_a_state() -> None:
    tx = as_optax(opt.Adam(0.1))
    for params in ({}, (), [{}]):
        updates, state = tx.update(params, tx.init(params), params)
        assert updates == params
        assert int(optax.tree.get(state, "count")) == 1


def test_parameters_are_needed_only_by_rules_that_read_them() -> None:
    tx = as_optax(opt.Adam(0.1))
    alone, _ = tx.update(ONES, tx.init(PARAMS))
    beside, _ = tx.update(ONES, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(alone["w"], beside["w"])
    with pytest.raises(opt.BadState, match="needs the parameters"):
        as_optax(opt.AdamW(lam=0.1)).update(ONES, as_optax(opt.AdamW(lam=0.1)).init(PARAMS))


# -- in the optimiser of NNX ---------------------------------------------------------------------------------


def ascent(optimizer: Any, module: Any) -> float:
    """How far the bias moves in a step whose gradient there is 1."""
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(module)
    before = float(module.bias[...][0])
    optimizer.update(module, grads)
    return float(module.bias[...][0]) - before


@pytest.mark.parametrize("inplace", [True, False])
def test_the_state_in_an_optimiser_of_nnx_is_adjusted(inplace: bool) -> None:
    module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, as_optax(opt.Descent(0.125)), wrt=nnx.Param)
    assert ascent(optimizer, module) == pytest.approx(-0.125)
    if inplace:
        opt.adjust_(optimizer.opt_state, 0.5)
    else:
        optimizer.opt_state = opt.adjust(optimizer.opt_state, 0.5)
    assert ascent(optimizer, module) == pytest.approx(-0.5)
    assert opt.hyperparameters(optimizer.opt_state) == {"eta": 0.5}

    opt.freeze_(optimizer.opt_state, where="bias")
    assert ascent(optimizer, module) == 0
    opt.thaw_(optimizer.opt_state)
    assert nnx.jit(lambda o, m: o.update(m, nnx.state(m, nnx.Param)))(optimizer, module) is not None


def test_variables_of_nnx_say_how_the_state_is_shared_out() -> None:
    kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
    with jax.set_mesh(jax.make_mesh((1, 1), ("in", "out"))):
        module = nnx.Linear(2, 4, kernel_init=kernel, rngs=nnx.Rngs(0))
        found = [
            jax.tree.leaves(
                nnx.get_partition_spec(nnx.state(nnx.Optimizer(module, tx, wrt=nnx.Param))),
                is_leaf=lambda x: isinstance(x, PartitionSpec),
            ).count(PartitionSpec("in", "out"))
            for tx in (optax.adam(0.1), as_optax(opt.Adam(0.1)))
        ]
    assert found == [2, 2]
