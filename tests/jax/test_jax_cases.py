"""Twenty things at which Optax 0.2.8 was seen to fail, and what happens here instead."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import optimisers as opt


def fresh() -> Any:
    """A jitted `update` with a cache of its own."""

    def step(state: Any, model: Any, grads: Any) -> Any:
        return opt.update(state, model, grads)

    return jax.jit(step)


def steps(rule: Any, x: Any, g: Any, n: int) -> Any:
    """(state, x) after n jitted steps by one gradient."""

    def step(carry: Any, _: Any) -> Any:
        return opt.update(*carry, g), None

    return jax.lax.scan(step, (opt.setup(rule, x), x), length=n)[0]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=str)
def test_case_1_adam_takes_no_step_by_a_gradient_of_zero_in_half_precision(dtype: Any) -> None:
    x = jnp.ones(3, dtype)
    _, new = opt.update(opt.setup(opt.Adam(), x), x, jnp.zeros(3, dtype))

    np.testing.assert_array_equal(new, x)


def test_case_2_settings_keep_their_digits_beside_bfloat16() -> None:
    x = jnp.ones(3, jnp.bfloat16)
    state = opt.adjust(opt.setup(opt.AdamW(), x), 1e-3)
    h = opt.hyperparameters(state)

    assert h["beta[1]"] == np.float32(0.999)
    assert h["eta"] == np.float32(1e-3)
    _, new = opt.update(state, x, jnp.ones(3, jnp.bfloat16))
    assert bool(jnp.isfinite(new).all())


def test_case_3_setup_may_be_jitted_with_settings_that_may_be_adjusted() -> None:
    model = {"w": jnp.ones((2, 3))}
    rule = opt.EMA(opt.Chain(opt.ClipGlobalNorm(1.0), opt.AMSGrad(0.1)))
    state = jax.jit(lambda m: opt.setup(rule, m))(model)
    opt.adjust_(state, 0.25)
    _, new = opt.update(state, model, model)

    assert bool(jnp.isfinite(new["w"]).all())


def test_case_4_a_second_learning_rate_compiles_nothing() -> None:
    x, step = jnp.ones(3), fresh()
    for rate in (0.1, 0.2, 1, np.float32(0.3)):
        _, new = step(opt.setup(opt.Descent(rate), x), x, x)
        np.testing.assert_allclose(new, 1 - float(rate), rtol=1e-6)

    assert step._cache_size() == 1


def test_case_5_float32_gradients_of_bfloat16_parameters_compile_once_and_no_type_changes() -> None:
    x, step = jnp.ones(3, jnp.bfloat16), fresh()
    state, sizes = opt.setup(opt.AdamW(), x), list[int]()
    types = [v.dtype for v in jax.tree.leaves(state)]
    for _ in range(3):
        state, x = step(state, x, jnp.ones(3, jnp.float32))
        sizes.append(step._cache_size())

    assert sizes == [1, 1, 1]
    assert [v.dtype for v in jax.tree.leaves(state)] == types
    assert x.dtype == jnp.bfloat16


@pytest.mark.parametrize("split", [False, True], ids=["masters", "split"])
def test_case_6_small_steps_of_bfloat16_add_up_in_a_master(split: bool) -> None:
    x = jnp.ones(3, jnp.bfloat16)
    _, alone = steps(opt.Adam(1e-4), x, jnp.ones(3, jnp.bfloat16), 100)
    _, new = steps(
        (opt.SplitPrecision if split else opt.MixedPrecision)(opt.Adam(1e-4)),
        x,
        jnp.ones(3, jnp.bfloat16),
        100,
    )

    assert (alone == 1).all()
    np.testing.assert_allclose(np.asarray(new, "f4"), 1 - 100 * 1e-4, atol=2.0**-9)


def test_case_7_the_second_moment_of_bfloat16_does_not_stick_at_a_half() -> None:
    x = jnp.ones(3, jnp.bfloat16)
    state, _ = steps(opt.Adam(beta=(0.9, 0.999)), x, x, 1000)

    np.testing.assert_allclose(state.state.v, 1 - 0.999**1000, rtol=1e-4)


@pytest.mark.parametrize("rule", [opt.RMSProp(), opt.AdaGrad(), opt.AdaDelta(), opt.RAdam(), opt.NAdam()])
def test_case_8_the_first_steps_are_finite(rule: Any) -> None:
    """There are no factored moments here; no rule divides by a weight of 0 at its start."""
    x = jnp.asarray([1.0, 0.0])
    _, new = steps(rule, x, jnp.asarray([0.0, 1.0]), 3)

    assert bool(jnp.isfinite(new).all())


@pytest.mark.parametrize("omega", [0.0, 1.0])
@pytest.mark.parametrize("clip", [opt.ClipGlobalNorm, opt.ClipNorm])
def test_case_9_clipping_gradients_of_zero_gives_zero(clip: Any, omega: float) -> None:
    x = jnp.ones(3)
    _, new = opt.update(opt.setup(opt.Chain(clip(omega), opt.Descent(0.1)), x), x, jnp.zeros(3))

    np.testing.assert_array_equal(new, x)


POLICIES: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "spread": (
        opt.Chain(opt.ClipGlobalNorm(throw=False), opt.Descent(0.1)),
        lambda new: bool(jnp.isnan(new["a"]).all() and jnp.isnan(new["b"]).all()),
    ),
    "keep to itself": (
        opt.Chain(opt.ClipNorm(throw=False), opt.Descent(0.1)),
        lambda new: bool(jnp.isnan(new["a"]).all() and (new["b"] < 1).all()),
    ),
    "skip": (
        opt.SkipNonFinite(opt.Chain(opt.ClipGlobalNorm(), opt.Descent(0.1))),
        lambda new: bool((new["a"] == 1).all() and (new["b"] == 1).all()),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "right"), POLICIES.values(), ids=POLICIES)
def test_case_10_what_a_gradient_of_nan_does_is_a_choice(rule: Any, right: Callable[[Any], bool]) -> None:
    model = {"a": jnp.ones(2), "b": jnp.ones(3)}
    grads = {"a": jnp.full(2, jnp.nan), "b": jnp.ones(3)}
    for step in (opt.update, jax.jit(opt.update)):
        _, new = step(opt.setup(rule, model), model, grads)
        assert right(new)


def test_case_11_what_has_no_rule_is_not_touched() -> None:
    model = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = opt.setup({"a": opt.Descent(0.1), "**": None}, model)
    _, new = jax.jit(opt.update)(state, model, model)

    np.testing.assert_allclose(new["a"], 0.9)
    np.testing.assert_array_equal(new["b"], 1)
    assert opt.update(state, model, model)[1]["b"] is model["b"]


def test_case_12_a_leaf_without_gradient_is_passed_by() -> None:
    model = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = opt.setup(opt.AdamW(0.1, lam=0.5), model)
    state, new = jax.jit(opt.update)(state, model, {"a": jnp.ones(2), "b": None})

    np.testing.assert_array_equal(new["b"], 1)
    assert (state.b.state.m == 0).all()
    assert bool((new["a"] < 1).all())


def test_case_13_an_average_of_the_weights_stands_beside_them() -> None:
    """Optax asks for another kind of parameters; here a rule around a rule takes those there are."""
    model = {"a": jnp.ones(2)}
    state = opt.setup(opt.EMA(opt.Descent(0.5), 0.5), model)
    for _ in range(2):
        state, model = opt.update(state, model, {"a": jnp.ones(2)})

    np.testing.assert_allclose(model["a"], 0.0)
    np.testing.assert_allclose(opt.averaged(state, model)["a"], 0.5 * (0.5 * 1 + 0.5 * 0.5) + 0.5 * 0.0)


@pytest.mark.parametrize(
    "rule", [opt.EMA(opt.Adam()), opt.MixedPrecision(opt.Adam()), opt.AMSGrad(epsilon=0.0)], ids=repr
)
def test_case_14_parameters_and_a_fresh_state_may_be_donated_together(rule: Any) -> None:
    """Also where the state starts as a copy of the parameters."""
    model = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.zeros(2), "c": jnp.zeros(2)}
    step = jax.jit(lambda s, m: opt.update(s, m, m), donate_argnums=(0, 1))
    state, new = step(opt.setup(rule, model), model)
    _, new = step(state, new)

    assert bool(jnp.isfinite(new["a"]).all())


@pytest.mark.parametrize("rule", [opt.Adam(), opt.EMA(opt.Adam()), opt.AMSGrad()], ids=repr)
def test_case_15_the_state_of_shapes_is_one_of_shapes(rule: Any) -> None:
    model = {"w": jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)}
    found = jax.tree.leaves(opt.setup(rule, model))
    real = jax.tree.leaves(opt.setup(rule, {"w": jnp.ones((256, 256), jnp.bfloat16)}))

    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in real]
    assert [type(x) for x in found if x.shape == (256, 256)] == [jax.ShapeDtypeStruct] * (len(found) - 2)


def test_case_16_tied_leaves_have_one_state_which_may_be_donated() -> None:
    """Inside a transform the two places are two arrays, which stay equal; outside they are one. Two gradients
    are summed.
    """
    x = jnp.asarray([1.0, 2.0])
    model = {"a": x, "b": x}
    state = opt.setup(opt.Momentum(0.1), model, ties=[("a", "b")])
    grads = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state, model = opt.update(state, model, grads)

    assert model["a"] is model["b"]
    state, model = jax.jit(opt.update, donate_argnums=0)(state, model, grads)
    np.testing.assert_array_equal(model["a"], model["b"])
    np.testing.assert_allclose(model["a"], x - 0.2 - (0.9 * 0.2 + 0.2), rtol=1e-6)


@pytest.mark.slow
def test_case_17_slopes_through_adam_are_finite_at_a_gradient_of_zero() -> None:
    x = jnp.asarray([1.0, -1.0])
    state = opt.setup(opt.Adam(0.1), x)

    def after(eta: Any, g: Any) -> Any:
        return jnp.sum(opt.update(opt.adjust(state, eta), x, g)[1])

    by_rate, by_gradient = jax.grad(after, argnums=(0, 1))(jnp.float32(0.1), jnp.asarray([0.0, 2.0]))

    np.testing.assert_allclose(by_rate, -1.0, rtol=1e-4)
    assert bool(jnp.isfinite(by_gradient).all())


def test_case_18_several_schedules_share_the_clock_of_their_array() -> None:
    model = {"w": jnp.ones(3)}
    rule = opt.Chain(
        opt.WeightDecay(opt.Linear(0.1, 0.0, 9)), opt.AdamW(opt.Cosine(0.1, 9), lam=opt.Linear(0.1, 0.0, 9))
    )
    state, _ = steps(rule, model, model, 3)
    found = jax.tree.leaves(state)
    whole = [x for x in found if jnp.issubdtype(x.dtype, jnp.integer)]

    assert [x.tolist() for x in whole] == [[3]]


def test_case_19_a_state_is_restored_after_the_clip_was_taken_out_of_the_chain() -> None:
    model = {"b": jnp.ones(3), "w": jnp.ones((2, 3))}
    old = opt.setup(opt.Chain(opt.ClipGlobalNorm(0.5), opt.Adam(0.25)), model)
    old, model = opt.update(old, model, model)
    saved = serialization.to_bytes(old)
    new = serialization.from_bytes(opt.setup(opt.Adam(0.125), model), saved)
    for name in model:
        np.testing.assert_array_equal(new[name].state.m, old[name].state[1].m)
        np.testing.assert_array_equal(new[name].state.v, old[name].state[1].v)
        assert new[name].state.weight == old[name].state[1].weight
    moved = opt.setup(opt.Adam(0.125), model)  # the same by hand, leaf by leaf
    for name in model:
        moved[name].state = old[name].state[1]
    assert opt.adjust(moved, 0.5) == opt.adjust(new, 0.5)


def test_case_20_clipping_by_the_global_norm_takes_no_copy_of_the_gradients() -> None:
    """What XLA sets aside beside its arguments and results, against Optax on the same model."""
    model = {str(i): jnp.ones((256, 256)) for i in range(8)}
    of_model = 8 * 256 * 256 * 4
    rule = opt.Chain(opt.ClipGlobalNorm(0.5), opt.AdamW(1e-3, lam=0.1))
    state = opt.setup(rule, model)
    ours = jax.jit(opt.update, donate_argnums=(0, 1)).lower(state, model, model).compile()
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3, weight_decay=0.1))

    def step(state: Any, model: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, model)
        return state, optax.apply_updates(model, updates)

    theirs = jax.jit(step, donate_argnums=(0, 1)).lower(tx.init(model), model, model).compile()
    used = [c.memory_analysis().temp_size_in_bytes for c in (ours, theirs)]

    assert used[1] > 0.5 * of_model
    assert used[0] < 0.01 * of_model
