"""Steps among other transforms: inside wrappers of Optax, loops, branches, populations and derivatives.

The right value comes from Optax under the same wrapper, from NumPy, or from finite differences.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import optimisers as opt

Tree = dict[str, jax.Array]


def drawn(seed: int, dtype: Any = jnp.float32) -> Tree:
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(rng.normal(size=(3, 4)), dtype), "b": jnp.asarray(rng.normal(size=4), dtype)}


MODEL, SLOPES = drawn(0), [drawn(seed) for seed in range(1, 7)]
STACK = jax.tree.map(lambda *gs: jnp.stack(gs), *SLOPES)


def close(got: Any, wanted: Any, rtol: float = 2e-4) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=3e-6), got, wanted)


def trained(rule: Any, model: Any, slopes: Any) -> Any:
    state = opt.setup(rule, model)
    for g in slopes:
        state, model = opt.update(state, model, g)
    return model


def of_numpy(rule: Any, model: Any = MODEL, slopes: Any = SLOPES) -> Any:
    return trained(rule, *jax.tree.map(np.asarray, (model, slopes)))


def scanned(rule: Any) -> Any:
    state = opt.setup(rule, MODEL)
    both = jax.jit(lambda *c: lax.scan(lambda c, g: (opt.update(*c, g), None), c, STACK)[0])
    return both(state, MODEL)[1]


def by_optax(tx: Any, params: Any = MODEL, slopes: Any = SLOPES) -> Any:
    state = tx.init(params)
    for g in slopes:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def in_pairs(tx: Any) -> Any:
    return by_optax(optax.lookahead(tx, 3, 0.5), optax.LookaheadParams.init_synced(MODEL))


def injected(make: Callable[..., Any], **settings: Any) -> Any:
    tx = optax.inject_hyperparams(make)(optax.linear_schedule(0.1, 0.0, 4), **settings)

    def body(carry: Any, g: Tree) -> Any:
        state, params = carry
        updates, state = tx.update(g, state, params)
        return (state, optax.apply_updates(params, updates)), None

    return jax.jit(lambda params: lax.scan(body, (tx.init(params), params), STACK)[0][1])(MODEL)


def of_complex(tx: Any) -> Any:
    params = {"z": jnp.array([1 + 2j, -1j], jnp.complex64)}
    slopes = [{"z": g["b"][:2] + 1j * g["b"][2:]} for g in SLOPES]
    return by_optax(optax.contrib.split_real_and_imaginary(tx), params, slopes)


def ours_injected(learning_rate: Any, b1: Any) -> Any:
    return opt.as_optax(opt.Adam(learning_rate, (b1, 0.999)))


AROUND: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "lookahead": (lambda: in_pairs(opt.as_optax(opt.Momentum(0.1))), lambda: in_pairs(optax.sgd(0.1, 0.9))),
    "schedule_free": (
        lambda: by_optax(optax.contrib.schedule_free(opt.as_optax(opt.Descent(0.1)), 0.1)),
        lambda: by_optax(optax.contrib.schedule_free(optax.sgd(0.1), 0.1)),
    ),
    "split_real_and_imaginary": (
        lambda: of_complex(opt.as_optax(opt.Adam(0.1))),
        lambda: of_complex(optax.adam(0.1)),
    ),
    "inject_hyperparams in a scan": (
        lambda: injected(
            lambda learning_rate, b1: opt.as_optax(opt.Adam(learning_rate, (b1, 0.999))), b1=0.8
        ),
        lambda: injected(optax.adam, b1=0.8),
    ),
    "before and behind": (
        lambda: by_optax(
            optax.chain(optax.clip_by_global_norm(0.5), opt.as_optax(opt.Adam(1.0)), optax.scale(0.1))
        ),
        lambda: by_optax(optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), AROUND.values(), ids=AROUND)
def test_a_wrapper_of_optax_trains_as_around_optax(ours: Any, theirs: Any) -> None:
    close(ours(), theirs())


@pytest.mark.parametrize(
    "rule",
    [
        opt.SOAP(0.01, every=2),
        {opt.matrices: opt.Muon(0.02), "**": opt.Adam(0.01)},
        opt.Prodigy(),
        opt.ScheduleFree(opt.AdamW(0.01)),
        opt.EMA(opt.Chain(opt.AccumGrad(2), opt.ClipGlobalNorm(0.5), opt.Adafactor(0.01))),
    ],
    ids=["SOAP", "Muon", "Prodigy", "ScheduleFree", "EMA"],
)
def test_a_scan_trains_as_numpy_does(rule: Any) -> None:
    close(scanned(rule), of_numpy(rule), 1e-3)


def test_a_scan_of_low_precision_trains_as_float32_but_for_rounding() -> None:
    model, slopes = drawn(0, jnp.bfloat16), [drawn(seed, jnp.bfloat16) for seed in range(1, 5)]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (model, slopes))
    found = jax.jit(lambda m: trained(opt.MixedPrecision(opt.Adam(0.01)), m, slopes))(model)

    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"bfloat16"}
    close(jax.tree.map(lambda x: x.astype(jnp.float32), found), of_numpy(opt.Adam(0.01), *wide), 5e-3)


def test_members_made_by_vmap_train_as_alone() -> None:
    models = jax.tree.map(lambda x: jnp.stack([x, x + 1, 2 * x]), MODEL)
    states = jax.vmap(lambda m: opt.setup(opt.Adam(0.1), m))(models)
    step = jax.jit(jax.vmap(opt.update, in_axes=(0, 0, None)))
    found = models
    for g in SLOPES[:3]:
        states, found = step(states, found, g)
    for i in range(3):
        alone = jax.tree.map(lambda x, i=i: x[i], models)
        close(jax.tree.map(lambda x, i=i: x[i], found), of_numpy(opt.Adam(0.1), alone, SLOPES[:3]))


def test_gradients_averaged_over_an_axis_of_vmap_step_all_members_alike() -> None:
    def step(state: Any, model: Any, g: Any) -> Any:
        return opt.update(state, model, lax.pmean(g, "data"))[1]

    state, parts = opt.setup(opt.Adam(0.1), MODEL), jax.tree.map(lambda x: x[:2], STACK)
    found = jax.vmap(step, in_axes=(None, None, 0), axis_name="data")(state, MODEL, parts)
    wanted = of_numpy(opt.Adam(0.1), MODEL, [jax.tree.map(lambda x: x.mean(0), parts)])
    for i in range(2):
        close(jax.tree.map(lambda x, i=i: x[i], found), wanted)


def test_derivatives_through_rematerialised_steps_are_finite_differences() -> None:
    def loss(eta: Any, rho: Any) -> Any:
        state, model = opt.setup(opt.Momentum(eta, rho), MODEL), MODEL
        step = jax.checkpoint(lambda s, m: opt.update(s, m, jax.tree.map(lambda x: x**2, m)))
        for _ in range(3):
            state, model = step(state, model)
        return sum(jnp.sum(x**2) for x in model.values())

    with jax.enable_x64(True):
        h, at = 1e-4, (jnp.float64(0.05), jnp.float64(0.5))
        eta, rho = jax.jit(jax.grad(loss, (0, 1)))(*at)
        ends = [
            loss(at[0] + h, at[1]) - loss(at[0] - h, at[1]),
            loss(at[0], at[1] + h) - loss(at[0], at[1] - h),
        ]
        np.testing.assert_allclose([eta, rho], np.array(ends) / (2 * h), rtol=2e-3)


def test_a_module_written_inside_jit_keeps_the_step() -> None:
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    before, state = np.asarray(module.kernel[...]), opt.setup(opt.Descent(0.1), module)

    @nnx.jit
    def step(module: Any, state: Any) -> Any:
        g = nnx.grad(lambda m: m(jnp.ones((1, 3))).sum())(module)
        return opt.update_(state, module, g)[0]

    for _ in range(2):
        state = step(module, state)
    np.testing.assert_allclose(module.kernel[...], before - 0.2, rtol=1e-6, atol=1e-7)


def test_another_schedule_of_the_same_kind_traces_nothing_again() -> None:
    traced: list[None] = []

    @jax.jit
    def step(state: Any, model: Any, g: Any) -> Any:
        traced.append(None)
        return opt.update(state, model, g)

    state, model = opt.setup(opt.Adam(opt.Cosine(0.1, 10)), MODEL), MODEL
    for g in SLOPES:
        state, model = step(state, model, g)
    step(opt.adjust(state, opt.Cosine(0.2, 20)), model, SLOPES[0])

    assert len(traced) == 1
