"""What Optax asks of its own transformations holds for `as_optax` of every rule: they find a bottom, keep
types and trees, and may be chained, masked, grouped, wrapped and injected.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimisers as opt
from optimisers.settings import adjustable
from tests.table import TABLE, Row, name

optax: Any = importlib.import_module("optax")
"""Its own types are narrower than what it takes."""
as_optax: Any = opt.as_optax

ROWS = [row for row in TABLE if row.takes("float32") and row.name != "MixedPrecision-double"]


@pytest.fixture(autouse=True)
def single() -> Any:
    with jax.enable_x64(False):
        yield


def parameters(dtype: str = "float32") -> dict[str, Any]:
    """Two matrices, which every rule takes."""
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.standard_normal((3, 4)), dtype) for k in ("b", "w")}


def slopes(n: int, dtype: str = "float32") -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [{k: jnp.asarray(rng.standard_normal((3, 4)), dtype) for k in ("b", "w")} for _ in range(n)]


def stepped(tx: Any, grads: list[Any], params: Any) -> tuple[Any, Any, Any]:
    """(the last updates, state, parameters) after a step for each gradient."""
    state, updates = tx.init(params), None
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return updates, state, params


def near(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=rtol, atol=atol)


def forms(tree: Any) -> list[Any]:
    return [(x.shape, x.dtype, bool(getattr(x, "weak_type", False))) for x in jax.tree.leaves(tree)]


# -- every rule, operation by operation ----------------------------------------------------------------------


def own_steps(rule: opt.Rule, params: Any, grads: list[Any], rates: Sequence[float | None]) -> Any:
    """(state, parameters) of the interpreter of NumPy, after a step for each gradient and rate."""
    params, grads = jax.tree.map(np.array, (params, grads))
    state = opt.setup(rule, params, engine="interpret")
    for g, rate in zip(grads, rates, strict=True):
        state = state if rate is None else opt.adjust(state, rate)
        state, params = opt.update(state, params, g)
    return state, params


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=name)
def test_the_updates_of_a_rule_lead_where_its_own_steps_lead(row: Row) -> None:
    """And what comes after it gets its step, not a difference of parameters: of parameters of 1e4 and steps
    of 1e-6 that would be 0.
    """
    with jax.disable_jit():
        params, grads = parameters(), slopes(4)
        tx = as_optax(row.rule)
        first, state, got = stepped(tx, grads[:1], params)
        chained, _, _ = stepped(optax.chain(tx, optax.scale(1e5)), grads[:1], params)
        for g in grads[1:]:
            updates, state = tx.update(g, state, got)
            got = optax.apply_updates(got, updates)
            assert forms(updates) == forms(params)
    own, wanted = own_steps(row.rule, params, grads, [None] * 4)

    near(chained, jax.tree.map(lambda u: 1e5 * u, first), rtol=1e-6, atol=0)
    near(got, wanted)
    for key in params:
        near(jax.tree.leaves(state[key].state), jax.tree.leaves(own[key].state))


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_the_state_of_a_rule_keeps_its_tree_whoever_makes_it(row: Row) -> None:
    """So it may be the carry of a loop, and restored into what `init` gives."""
    tx, params, g = as_optax(row.rule), parameters(), slopes(1)[0]
    made = tx.init(params)
    shaped = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, g, made, params)

    assert jax.tree.structure(shaped) == jax.tree.structure(made) == jax.tree.structure(after)
    assert forms(shaped) == forms(made) == forms(after)


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_optax_finds_its_way_in_the_state_of_a_rule(row: Row) -> None:
    params = parameters()
    tx = as_optax(row.rule)
    state = tx.init(params)
    marked = optax.tree_map_params(tx, lambda x: jnp.full_like(x, 7), state)
    same = jax.tree.map(lambda m, x: bool((m == 7).all()) and not bool((x == 7).all()), marked, state)
    beside = [x for key in params for x in jax.tree.leaves(state[key].state) if hasattr(x, "shape")]

    assert sum(jax.tree.leaves(same)) == len(beside)
    assert (optax.tree.get(state, "count") == 0).all()
    for x in jax.tree.leaves(optax.tree.get(optax.tree.set(state, count=jnp.int32(7)), "count")):
        assert x == 7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_updates_have_the_type_of_parameters_for_every_rule(dtype: str) -> None:
    for row in TABLE:
        if row.takes(dtype) and row.name != "MixedPrecision-double":
            params, g = parameters(dtype), slopes(1, dtype)[0]
            tx = as_optax(row.rule)
            updates, _ = jax.eval_shape(tx.update, g, tx.init(params), params)
            assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.dtype(dtype)] * 2, row.name


# -- wrapped ------------------------------------------------------------------------------------------------


WRAPPERS = ("a group", "apply_if_finite", "MultiSteps")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "wrapper"),
    [
        pytest.param(row, wrapper, id=f"{row.name}-{wrapper}")
        for i, row in enumerate(ROWS)
        for wrapper in [WRAPPERS[i % len(WRAPPERS)]]
    ],
)
def test_a_rule_steps_the_same_inside_wrappers(row: Row, wrapper: str) -> None:
    """`w` alone is the rule's, and a group of it has no parameter. Gradients that come twice are one mean."""
    tx = as_optax(row.rule)
    with jax.disable_jit():
        params, g = parameters(), slopes(1)[0]
        mine, slope = {"w": params["w"]}, {"w": g["w"]}
        _, _, wanted = stepped(tx, [slope], mine)
        if wrapper == "a group":
            groups = {"ours": tx, "rest": optax.sgd(0.1), "none": tx}
            grouped = optax.partition(groups, {"b": "rest", "w": "ours"})
            got = {"w": stepped(grouped, [g], params)[2]["w"]}
        elif wrapper == "apply_if_finite":
            got = stepped(optax.apply_if_finite(tx, 2), [slope, {"w": slope["w"] * jnp.nan}], mine)[2]
        else:
            got = stepped(optax.MultiSteps(tx, 2), [slope, slope], mine)[2]

        near(got, wanted)


RATED = [row for row in ROWS if "eta" in adjustable(row.rule)][::2]
"""Every other one: how a rate gets into a rule is asked of each in `state/`; here, how Optax's gets there."""


@pytest.mark.parametrize("row", RATED, ids=name)
def test_an_injected_rate_reaches_a_rule(row: Row) -> None:
    """As much as `adjust` of its own state does."""
    injected = optax.inject_hyperparams(lambda rate: as_optax(row.rule.adjust(rate)))
    with jax.disable_jit():
        params, grads = parameters(), slopes(3)
        tx = injected(rate=0.03)
        state, new, rates = tx.init(params), params, (0.03, 0.5, 0.25)
        for g, rate in zip(grads, rates, strict=True):
            state.hyperparams["rate"] = jnp.asarray(rate)
            updates, state = tx.update(g, state, new)
            new = optax.apply_updates(new, updates)

    near(new, own_steps(row.rule, params, grads, rates)[1])


# -- a bottom is found ---------------------------------------------------------------------------------------


def rosenbrock(x: Any) -> Any:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def parabola(x: Any) -> Any:
    return jnp.sum((x - jnp.array([1.0, -1.0, 1.0])) ** 2)


STEPS = 8000
Cosine: Any = opt.Cosine
FALLING: Any = Cosine(0.02, STEPS)
FINDERS: dict[str, Any] = {
    "Descent": opt.Descent(1e-3),
    "Momentum": opt.Momentum(5e-4, 0.9),
    "Nesterov": opt.Nesterov(5e-4, 0.9),
    "SGD": opt.SGD(5e-4, 0.9),
    "Adam": opt.Adam(FALLING),
    "AdamW": opt.AdamW(FALLING),
    "AMSGrad": opt.AMSGrad(FALLING),
    "NAdam": opt.NAdam(FALLING),
    "RAdam": opt.RAdam(FALLING),
    "OAdam": opt.OAdam(FALLING),
    "AdaMax": opt.AdaMax(FALLING),
    "AdaBelief": opt.AdaBelief(FALLING),
    "AdaGrad": opt.AdaGrad(1.0),
    "AdaDelta": opt.AdaDelta(0.9, 1e-6, Cosine(1.0, STEPS)),
    "RMSProp": opt.RMSProp(FALLING),
    "Rprop": opt.Rprop(0.01),
    "Lion": opt.Lion(Cosine(3e-3, STEPS)),
    "ClipNorm": opt.Chain(opt.ClipNorm(1.0), opt.Adam(FALLING)),
    "ClipGlobalNorm": opt.Chain(opt.ClipGlobalNorm(1.0), opt.Adam(FALLING)),
    "AccumGrad": opt.Chain(opt.AccumGrad(2), opt.Adam(FALLING)),
    "SkipNonFinite": opt.SkipNonFinite(opt.Adam(FALLING)),
    "EMA": opt.EMA(opt.Adam(FALLING)),
    "MixedPrecision": opt.MixedPrecision(opt.Adam(FALLING)),
}


@pytest.mark.parametrize("rule", FINDERS.values(), ids=FINDERS)
def test_a_rule_finds_the_bottom_of_a_parabola_and_of_rosenbrocks_valley(rule: Any) -> None:
    tx = as_optax(rule)

    def loss(params: Any) -> Any:
        return parabola(params["parabola"]) + rosenbrock(params["valley"])

    @jax.jit
    def trained(params: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, STEPS, body, (params, tx.init(params)))[0]

    params = trained({"parabola": jnp.array([-1.0, 10.0, 1.0]), "valley": jnp.zeros(2)})
    np.testing.assert_allclose(params["parabola"], [1, -1, 1], atol=0.03)
    np.testing.assert_allclose(params["valley"], [1, 1], atol=0.06)
