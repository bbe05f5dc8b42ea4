"""Arrays of JAX take the very steps that those of NumPy take, and every transform takes their states."""

import contextlib
import copy
import functools
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

import optimisers as opt
from optimisers.jax import pytree as pytrees
from optimisers.state.leaf import parts
from optimisers.state.structure import structure_of
from optimisers.tree.path import KeyPath
from tests.goldens import PRESENT, REDUCING, array_of, names_of, rule_of, title_of
from tests.table import DTYPES, TABLE, Row, dtype_of
from tests.worlds import COMPLEX_PAIRS, arrays_of, close, gradients_of, leaves, numbers_in, trained

STEPS = (opt.update, opt.update_)

both_updates = pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
every_row = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


@pytest.fixture
def x64() -> Iterator[None]:
    """64 bits, for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _single_precision_before_and_after() -> Iterator[None]:
    assert not jax.config.jax_enable_x64
    yield
    assert not jax.config.jax_enable_x64


# -- what the tests share ------------------------------------------------------------------------------------


COMPILED: list[str] = []


def _note(event: str, _: float, **_details: Any) -> None:
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that holds, in the end, an entry for everything that XLA has compiled meanwhile."""
    found: list[str] = []
    before = len(COMPILED)
    yield found
    found += COMPILED[before:]


def test_the_counter_of_these_tests_sees_compilations() -> None:
    f = jax.jit(lambda x: x * 3 + 1)
    with compilations() as first:
        f(np.ones(3, "f4"))
    with compilations() as again:
        f(np.zeros(3, "f4"))
    with compilations() as other:
        f(np.ones(4, "f4"))

    assert (len(first), len(again), len(other)) == (1, 0, 1)


def fresh(**options: Any) -> Any:
    """A jitted `update` with a cache of its own: that of JAX goes by function."""

    def step(state: Any, model: Any, grads: Any) -> Any:
        return opt.update(state, model, grads)

    return jax.jit(step, **options)


def on_jax(nest: Any) -> Any:
    """A nest of arrays of NumPy as one of JAX, None and all."""
    if isinstance(nest, list):
        return [on_jax(n) for n in nest]
    if isinstance(nest, dict):
        return {k: on_jax(n) for k, n in nest.items()}
    return None if nest is None else jnp.asarray(nest)


def two() -> dict[str, Any]:
    """A small model, its names in the order of JAX."""
    rng = np.random.default_rng(0)
    return on_jax({"b": rng.standard_normal(3).astype("f4"), "w": rng.standard_normal((2, 3)).astype("f4")})


def like(model: Any, value: float) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, value, x.dtype)), model)


def avals(tree: Any) -> list[Any]:
    """Shape, type and weakness of all arrays of a tree."""
    return [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in jax.tree.leaves(tree)]


def same_trees(a: Any, b: Any, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def of_numpy(rule: Any, model: Any, gradients: Any) -> Any:
    """(state, model) of NumPy, by the interpreter: what is right."""
    return trained(rule, jax.tree.map(np.asarray, model), gradients, opt.update, "interpret")


# -- every rule: the same numbers ----------------------------------------------------------------------------

HALVES = ("AdamW", "Lion", "ClipGlobalNorm", "MixedPrecision")
"""Rows that are tried in float16 and bfloat16 too."""

WIDE = (
    *HALVES,
    "Chain-accumulate-clip-AdamW",
    "SkipNonFinite",
    "EMA",
    "MixedPrecision-double",
    "LongestSeen",
)
"""Rows whose steps keep their form in float64 too; the loops of the golden paths show it of every rule."""

ROWS_AND_DTYPES = [
    (row, dtype)
    for row in TABLE
    for dtype in DTYPES
    if row.takes(dtype)
    and dtype not in ("float64", "complex128")
    and (
        dtype == row.single
        or (dtype in ("float16", "bfloat16") and row.name in HALVES)
        or (dtype == "complex64" and row.name in COMPLEX_PAIRS)
    )
]


def some(arrays: list[Any]) -> list[Any]:
    """Every other array of a model: every shape that is odd is among them."""
    return arrays[::2]


def of_jax(row: Row, dtype: str, step: Callable[..., Any]) -> Any:
    model = on_jax(some(arrays_of(row, dtype)))
    state = opt.setup(row.rule, model)
    for grads in gradients_of(row, dtype, 4):
        state, model = step(state, model, on_jax(some(grads)))
    return state, model


@pytest.mark.parametrize(
    ("row", "dtype"), [pytest.param(row, dtype, id=f"{row.name}-{dtype}") for row, dtype in ROWS_AND_DTYPES]
)
def test_arrays_of_jax_are_stepped_as_those_of_numpy_are(row: Row, dtype: str) -> None:
    """Parameters, state and rules; `update` and `update_` share what is compiled."""
    if "float64" in repr(row.rule):
        pytest.skip("needs 64 bits: see the golden paths, and the mistakes")
    model, gradients = arrays_of(row, dtype), gradients_of(row, dtype, 4)
    wanted_state, wanted = trained(
        row.rule, some(model), [some(g) for g in gradients], opt.update, "interpret"
    )
    for step in STEPS:
        state, model = of_jax(row, dtype, step)
        for a, b in zip(model, wanted, strict=True):
            assert str(a.dtype) == dtype
            assert close(a, b, dtype)
        for leaf, other in zip(leaves(state), leaves(wanted_state), strict=True):
            assert leaf.rule == other.rule
            for a, b in zip(numbers_in(leaf.state), numbers_in(other.state), strict=True):
                if isinstance(a, jax.Array):
                    assert a.dtype == b.dtype
                if np.asarray(a).dtype == np.int16:  # the lower half of a float32
                    assert (np.abs(np.asarray(a, int) - np.asarray(b, int)) <= 16).all()
                else:
                    assert close(a, b, "float32" if dtype in ("float16", "bfloat16") else dtype)


@jax.jit
def walked(state: Any, x: Any, gradients: Any) -> Any:
    """The parameters after every step, in one loop."""

    def step(carry: Any, g: Any) -> Any:
        state, x = opt.update(*carry, g)
        return (state, x), x

    return lax.scan(step, (state, x), gradients)[1]


REAL_ROWS = [row for row in PRESENT if row["dtype"] == "float64"]


def golden(row: dict[str, Any], dtype: Any) -> tuple[Any, Any, Any]:
    """(start, gradients, path) of a row, in this type."""
    x, gradients = (array_of(row[k], row["dtype"]).astype(dtype) for k in ("x", "gradients"))
    return jnp.asarray(x), jnp.asarray(gradients), array_of(row["path"], row["dtype"])


@pytest.mark.parametrize("row", REAL_ROWS, ids=title_of)
@pytest.mark.usefixtures("x64")
def test_a_jitted_loop_walks_the_golden_path(row: dict[str, Any]) -> None:
    tolerance = 1e-10 if REDUCING & set(names_of(row)) else 1e-12
    x, gradients, wanted = golden(row, row["dtype"])
    got = walked(opt.setup(rule_of(row), x), x, gradients)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def test_float32_beside_switched_on_64_bits_stays_float32() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(np.array([1.0, -2.0], "f4"))
        state, new = opt.update(opt.setup(opt.Adam(0.1), x), x, x)

        assert (new.dtype, state.state.m.dtype, state.state.v.dtype) == ("float32",) * 3
        np.testing.assert_allclose(new, [0.9, -1.9], rtol=1e-6)


@pytest.mark.parametrize("beta", [(0.9, 0.999), (0.9, 0.9999), (0.99, 0.99999), (0.0, 0.999999)])
@pytest.mark.parametrize("rule", [opt.Adam, opt.AdamW, opt.RAdam, opt.NAdam], ids=lambda r: r.__name__)
def test_bias_correction_is_right_to_1e_6_at_the_first_steps(rule: Any, beta: Any) -> None:
    """Optax loses 5e-5 here in float32: 1 - beta**t cancels."""
    grads = np.array([1e-3, -0.5, 7.0, 300.0], "f4")
    x, exact = jnp.zeros(4), np.zeros(4)
    state, wanted = opt.setup(rule(0.1, beta, epsilon=1e-12), x), exact
    other = opt.setup(rule(0.1, beta, epsilon=1e-12), exact, engine="interpret")
    for _ in range(3):
        state, x = opt.update(state, x, jnp.asarray(grads))
        other, wanted = opt.update(other, wanted, grads.astype(float))
        np.testing.assert_allclose(x, wanted, rtol=1e-6 if rule in (opt.Adam, opt.AdamW) else 3e-6)


@pytest.mark.parametrize("beta", [(0.9, 0.999), (0.9, 0.9999), (0.99, 0.99999)])
def test_the_first_step_of_adam_has_the_size_of_eta_to_1e_6(beta: Any) -> None:
    x = jnp.zeros(4)
    _, new = opt.update(opt.setup(opt.Adam(0.1, beta), x), x, jnp.asarray([0.3, -1.0, 7.0, 300.0]))
    np.testing.assert_allclose(np.abs(new), 0.1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_step_is_rounded_once(dtype: str) -> None:
    kind = dtype_of(dtype)
    x = np.array([0.579, -0.729, 0.5493]).astype(kind)
    g = np.array([-0.001497, 0.0001875, -0.013176]).astype(kind)
    exact = x.astype(float) - 0.01 * g.astype(float) / (np.abs(g.astype(float)) + 1e-8)
    unit = np.abs(np.nextafter(x, kind.type(2)) - x).astype(float) if dtype == "float16" else 2.0**-8
    state, new = opt.update(opt.setup(opt.Adam(0.01), jnp.asarray(x)), jnp.asarray(x), jnp.asarray(g))

    assert (np.abs(np.asarray(new).astype(float) - exact) <= 0.5001 * unit).all()
    assert new.dtype == kind
    assert (state.state.m.dtype, state.state.v.dtype) == ("float32", "float32")


@pytest.mark.parametrize("row", PRESENT[:1] + PRESENT[20:21], ids=title_of)
def test_without_any_jit_the_numbers_are_the_same(row: dict[str, Any]) -> None:
    x, gradients, wanted = golden(row, "float32")
    state = opt.setup(rule_of(row), x)
    with jax.disable_jit():
        for g in gradients[:3]:
            state, x = opt.update(state, x, g)
    np.testing.assert_allclose(x, wanted[2], rtol=1e-5)


# -- random models -------------------------------------------------------------------------------------------

arrays = st.tuples(st.sampled_from([(), (2,), (2, 3), (0,)]), st.sampled_from(["float32", "complex64"]))
nests = st.recursive(
    arrays,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "b", "weight"]), inner, min_size=1, max_size=2)
    ),
    max_leaves=4,
)


def filled(nest: Any, rng: Any, *, wide: bool) -> Any:
    """A nest of shapes and types as a nest of arrays of NumPy."""
    if isinstance(nest, list):
        return [filled(n, rng, wide=wide) for n in nest]
    if isinstance(nest, dict):
        return {k: filled(n, rng, wide=wide) for k, n in nest.items()}
    dtype = {"float32": "float64", "complex64": "complex128"}[nest[1]] if wide else nest[1]
    return np.asarray(rng.standard_normal(nest[0])).astype(dtype)


def thinned(grads: Any, rng: Any) -> Any:
    """The same gradients with None at some places."""
    if rng.random() < 0.15:
        return None
    if isinstance(grads, list):
        return [thinned(g, rng) for g in grads]
    return {k: thinned(g, rng) for k, g in grads.items()} if isinstance(grads, dict) else grads


@pytest.mark.slow
@given(
    nest=nests, seed=st.integers(0, 99), wide=st.booleans(), jitted=st.booleans(), step=st.sampled_from(STEPS)
)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_random_nests_train_like_those_of_numpy(
    nest: Any, seed: int, wide: bool, jitted: bool, step: Callable[..., Any]
) -> None:
    with jax.enable_x64(wide):
        rng = np.random.default_rng(seed)
        rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.Momentum(0.1))
        model = filled(nest, rng, wide=wide)
        other = on_jax(model)
        state, ours = opt.setup(rule, model, engine="interpret"), opt.setup(rule, other)
        for n in range(3):
            grads = filled(nest, rng, wide=wide)
            if n == 1:
                grads = thinned(grads, rng)
                opt.adjust_(state, 0.3)
                opt.adjust_(ours, 0.3)
            state, model = opt.update(state, model, grads)
            ours, other = (jax.jit(step) if jitted else step)(ours, other, on_jax(grads))
            if jitted and n == 1:  # every other way through a transform keeps what there is
                ours = jax.tree.unflatten(jax.tree.structure(ours), jax.tree.leaves(ours))
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(model), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-12 if wide else 2e-6, atol=1e-7)


# -- states are pytrees --------------------------------------------------------------------------------------


def test_the_children_of_a_state_are_its_arrays_a_table_for_each_group_and_the_clock() -> None:
    model = {str(i): jnp.ones(2) for i in range(50)}
    state = opt.setup(opt.Adam(), model)
    found = jax.tree.leaves(state)

    assert all(isinstance(x, jax.Array) for x in found)
    assert len(found) <= 2 * 50 + 2
    assert [x.tolist() for x in found if x.dtype == jnp.int32] == [[0]]
    assert sum(x.size for x in found) == 2 * 2 * 50 + 4 + 2 + 1


def test_the_keys_of_a_state_name_the_path_of_the_leaf_and_the_part_of_its_state() -> None:
    large = jnp.ones((256, 256))  # small ones may stand together
    state = opt.setup(opt.Chain(opt.WeightDecay(), opt.Adam()), {"net": [large, 2 * large]})
    found = [jax.tree_util.keystr(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(state)]

    assert len(found) == len(set(found))
    for leaf in ("net.0", "net.1"):
        assert sum(leaf in name and name.split(":")[1].endswith(("m']", "v']")) for name in found) == 2
    assert sum("numbers" in name for name in found) == 1
    assert sum("clock" in name for name in found) == 1


def test_the_keys_of_two_states_of_one_kind_are_equal() -> None:
    def names(state: Any) -> Any:
        return [keys for keys, _ in jax.tree_util.tree_leaves_with_path(state)]

    model = two()
    state = opt.setup(opt.Adam(), model)
    assert names(state) == names(opt.update(state, model, model)[0]) == names(opt.setup(opt.Adam(2), model))


@every_row
def test_flattening_and_back_keeps_a_state(row: Row) -> None:
    if "float64" in repr(row.rule):
        pytest.skip("needs 64 bits")
    state = opt.setup(row.rule, on_jax(arrays_of(row, row.single)))
    children, form = jax.tree.flatten(state)
    back = jax.tree.unflatten(form, children)

    assert back == state
    assert type(back) is type(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), children, strict=True))
    assert [leaf.path for leaf in leaves(back)] == [leaf.path for leaf in leaves(state)]


def test_states_of_one_rule_and_model_have_equal_forms_whatever_their_numbers() -> None:
    model = two()
    form = jax.tree.structure(opt.setup(opt.Adam(0.1), model))
    same = [
        opt.setup(opt.Adam(0.7, (0.1, 0.2)), like(model, 3)),
        opt.update(opt.setup(opt.Adam(), model), model, model)[0],
        opt.adjust(opt.setup(opt.Adam(), model), 0.3),
        copy.deepcopy(opt.setup(opt.Adam(), model)),
        pickle.loads(pickle.dumps(opt.setup(opt.Adam(), model))),
    ]
    others = [
        opt.setup(opt.AdamW(0.1), model),
        opt.freeze(opt.setup(opt.Adam(0.1), model), "w"),
        opt.setup(opt.Adam(0.1), {"w": model["w"]}),
        opt.setup(opt.Adam(0.1), like(model, 1) | {"b": jnp.ones(4)}),
        opt.setup(opt.Adam(0.1), jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)),
        opt.setup(opt.Adam(opt.Cosine(0.1, 9)), model),
        opt.setup(opt.Adam(0.1), model)["w"],
    ]

    assert [jax.tree.structure(s) == form for s in same] == [True] * len(same)
    assert {hash(jax.tree.structure(s)) for s in same} == {hash(form)}
    assert [jax.tree.structure(s) == form for s in others] == [False] * len(others)


def test_the_order_of_a_dict_does_not_matter_as_it_does_not_to_jax() -> None:
    """Every transform sorts the keys; a state that was saved by order must not change hands."""
    model = two()
    turned = {"w": model["w"], "b": model["b"]}
    assert jax.tree.structure(turned) == jax.tree.structure(model)
    states = [
        opt.setup(opt.Adam(), turned),
        opt.setup(opt.Adam(), model),
        jax.jit(lambda m: opt.setup(opt.Adam(), m))(turned),
    ]

    assert [jax.tree.structure(s) == jax.tree.structure(states[0]) for s in states] == [True] * 3
    assert avals(states[1]) == avals(states[0])


def test_a_state_takes_placeholders_of_every_kind() -> None:
    state = opt.setup(opt.Adam(), two())
    form = jax.tree.structure(state)
    given = [object() for _ in range(form.num_leaves)]
    back = jax.tree.leaves(jax.tree.unflatten(form, given))

    assert all(a is b for a, b in zip(back, given, strict=True))
    assert jax.tree.leaves(jax.tree.map(lambda _: None, state)) == []
    assert jax.tree.structure(jax.tree.map(lambda _: 0, state)) == form


def test_a_state_full_of_placeholders_can_be_printed() -> None:
    """JAX prints trees in its messages, and so do debuggers."""
    model = two()
    state = opt.setup(opt.Adam(), model)
    axes = opt.vmap_axes(state, "eta")
    population = jax.vmap(lambda e: opt.adjust(state, e), out_axes=axes)(jnp.array([0.1, 0.2]))
    for tree in (axes, population, jax.eval_shape(lambda: state), jax.tree.map(lambda _: None, state)):
        assert isinstance(repr(tree), str)


def test_a_part_of_a_state_is_a_pytree_too() -> None:
    model = two()
    state = opt.setup(opt.Momentum(0.5), model)
    part, new = jax.jit(opt.update)(state.w, model["w"], jnp.ones((2, 3)))

    assert isinstance(part, opt.Leaf)
    np.testing.assert_allclose(new, model["w"] - 0.5)
    np.testing.assert_allclose(part.state.v, 0.5)


def test_ties_survive_flattening_and_transforms() -> None:
    x = jnp.asarray([1.0, 2.0])
    model = {"embed": x, "head": x, "b": jnp.zeros(2)}
    state = opt.setup(opt.Momentum(0.1), model, ties=[("embed", "head")])
    grads = {"embed": jnp.ones(2), "head": jnp.full(2, 2.0), "b": jnp.ones(2)}

    assert sum(v.size for v in jax.tree.leaves(state)) == 2 * 2 + 2 + 1
    for turn in (lambda s: jax.tree.map(lambda v: v, s), jax.jit(lambda s: s), copy.deepcopy):
        back = turn(state)
        assert back["embed"] is back["head"]
        _, new = opt.update(back, model, grads)
        assert new["embed"] is new["head"]
        np.testing.assert_allclose(new["embed"], x - 0.1 * 3, rtol=1e-6)
    new_state, new = jax.jit(opt.update)(state, model, grads)
    np.testing.assert_allclose(new["embed"], x - 0.3, rtol=1e-6)
    np.testing.assert_array_equal(new["embed"], new["head"])
    assert new_state["embed"] is new_state["head"]


def test_a_rule_that_is_shared_is_still_one_row_of_numbers_after_transforms() -> None:
    model = {str(i): jnp.ones(2) for i in range(5)}
    state, _ = jax.jit(opt.update)(opt.setup(opt.Adam(0.1), model), model, model)
    rows = [x for keys, x in jax.tree_util.tree_leaves_with_path(state) if "numbers" in str(keys)]
    opt.adjust_(state, 0.7)

    assert [x.shape[0] for x in rows] == [1]
    assert {leaf.rule.eta for leaf in leaves(state)} == {0.7}


def test_what_comes_out_of_a_transform_can_be_adjusted_frozen_and_assigned() -> None:
    model = two()
    state, _ = jax.jit(opt.update)(opt.setup(opt.Momentum(0.1), model), model, model)
    new = opt.adjust(opt.freeze(state, "b"), rho=0.5)
    new.w.state = new.w.state._replace(v=jnp.full((2, 3), 7.0))

    assert (new.w.rule, new.b.frozen) == (opt.Momentum(0.1, 0.5), True)
    assert (new.w.state.v == 7).all()
    assert (state.w.rule, state.b.frozen) == (opt.Momentum(0.1, 0.9), False)
    np.testing.assert_allclose(state.w.state.v, 0.1 * model["w"], rtol=1e-6)


def test_settings_may_be_read_and_changed_inside_a_transform() -> None:
    model = two()
    state = opt.setup(opt.Momentum(0.25, 0.5), model)

    @jax.jit
    def halved(state: Any) -> Any:
        return opt.adjust(state, state.w.rule.eta / 2), state.w.rule.eta

    new, eta = halved(state)

    assert float(eta) == 0.25
    assert new.w.rule == opt.Momentum(0.125, 0.5)


@pytest.mark.parametrize(
    "copied",
    [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
def test_a_copied_state_is_equal_and_stepped_apart(copied: Callable[[Any], Any]) -> None:
    model = two()
    state, model = jax.jit(opt.update)(opt.setup(opt.Momentum(0.1), model), model, model)
    other = copied(state)

    assert other == state
    assert jax.tree.structure(other) == jax.tree.structure(state)
    opt.update_(other, dict(model), like(model, 1))
    assert other != state


def test_explain_tells_what_a_step_of_jax_costs() -> None:
    model = two()
    state = opt.setup(opt.Adam(), model)
    for now in (state, opt.update(state, model, model)[0]):
        found = opt.explain(now)
        assert [(g.leaves, g.parameters) for g in found.groups] == [(2, 9)]
        assert isinstance(str(found), str)
    assert int(found.clock) == 1


# -- dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}")
        for row in TABLE
        for dtype in ("bfloat16", "float32", "float64", "complex64")
        if row.takes(dtype)
        and (dtype == row.single or row.name in HALVES or (dtype == "float64" and row.name in WIDE))
    ],
)
def test_a_step_keeps_the_form_and_the_types_of_state_and_model(row: Row, dtype: str) -> None:
    """So it may be the body of a loop; nothing is compiled for this test."""
    with jax.enable_x64(dtype in ("float64", "complex128") or "float64" in repr(row.rule)):
        model = [jax.ShapeDtypeStruct(s, dtype_of(dtype)) for s in row.shapes()]
        state = opt.setup(row.rule, on_jax(arrays_of(row, dtype)))
        before = state, model
        after = jax.eval_shape(opt.update, state, model, model)

        assert jax.tree.structure(after) == jax.tree.structure(before)
        assert avals(after) == avals(before)
        assert not any(weak for _, _, weak in avals(after))


@pytest.mark.parametrize("rate", [0.1, 1, np.float16(0.1)], ids=repr)
def test_numbers_of_a_state_have_one_type_whatever_they_were(rate: Any) -> None:
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), two())
    for state in (opt.setup(opt.AdamW(rate), model), opt.adjust(opt.setup(opt.AdamW(), model), rate)):
        assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "int32"}
        assert not any(x.weak_type for x in jax.tree.leaves(state))
        new_state, new = opt.update(state, model, jax.tree.map(lambda x: x.astype(jnp.float32), model))
        assert {str(x.dtype) for x in new.values()} == {"bfloat16"}
        assert avals(new_state) == avals(state)


@pytest.mark.usefixtures("x64")
def test_numbers_beside_float64_are_float64() -> None:
    model = {"w": jnp.asarray([1.0, 2.0])}
    state = opt.setup(opt.Adam(0.1), model)
    h = opt.hyperparameters(state)

    assert model["w"].dtype == h["eta"].dtype == "float64"
    assert float(h["eta"]) == 0.1


# -- transforms ----------------------------------------------------------------------------------------------

RULES = [
    opt.Adam(0.1),
    opt.Chain(opt.ClipGlobalNorm(0.5), opt.AdamW(0.1, lam=0.1)),
    opt.Chain(opt.AccumGrad(2), opt.Nesterov(0.1)),
    opt.SkipNonFinite(opt.EMA(opt.Lion(0.01))),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=["Adam", "clip-AdamW", "accumulate", "skip-EMA"])


def slopes(n: int) -> list[Any]:
    rng = np.random.default_rng(5)
    return [{k: rng.standard_normal(v.shape).astype("f4") for k, v in two().items()} for _ in range(n)]


@every_rule
def test_eager_jitted_scanned_and_in_place_steps_are_those_of_numpy(rule: Any) -> None:
    model, gradients = two(), slopes(4)
    wanted_state, wanted = of_numpy(rule, model, gradients)
    state, x = opt.setup(rule, model), model
    in_place, y = opt.setup(rule, model), dict(model)
    jitted, z = opt.setup(rule, model), model
    step = fresh()
    for g in gradients:
        state, x = opt.update(state, x, on_jax(g))
        in_place, y = opt.update_(in_place, y, on_jax(g))
        jitted, z = step(jitted, z, on_jax(g))
    stack = jax.tree.map(lambda *gs: jnp.stack(gs), *gradients)

    def body(carry: Any, g: Any) -> Any:
        return opt.update(*carry, g), None

    looped, u = lax.scan(body, (opt.setup(rule, model), model), stack)[0]

    for got_state, got in ((state, x), (in_place, y), (jitted, z), (looped, u)):
        for name in model:
            np.testing.assert_allclose(got[name], wanted[name], rtol=2e-5, atol=1e-6)
            for a, b in zip(
                numbers_in(got_state[name].state), numbers_in(wanted_state[name].state), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    assert step._cache_size() == 1
    assert set(np.ravel(jax.tree.leaves(looped)[-1]).tolist()) == {4}  # the clock of every leaf


def test_other_loops_carry_a_state() -> None:
    model = two()
    state = opt.setup(opt.Momentum(0.1, 0.5), model)
    _, wanted = of_numpy(opt.Momentum(0.1, 0.5), model, [jax.tree.map(np.ones_like, model)] * 3)
    _, a = lax.fori_loop(0, 3, lambda _, c: opt.update(*c, like(model, 1)), (state, model))
    _, b = lax.while_loop(
        lambda c: jax.tree.leaves(c[0])[-1][0] < 3, lambda c: opt.update(*c, like(model, 1)), (state, model)
    )
    for name in model:
        np.testing.assert_allclose(a[name], wanted[name], rtol=1e-6)
        np.testing.assert_allclose(b[name], wanted[name], rtol=1e-6)


def test_one_arm_of_a_condition_may_step() -> None:
    model = two()
    state = opt.setup(opt.Adam(0.1), model)

    @jax.jit
    def step(state: Any, model: Any, on: Any) -> Any:
        return lax.cond(on, lambda c: opt.update(*c, like(model, 1)), lambda c: c, (state, model))

    _, off = step(state, model, False)
    _, on = step(state, model, True)
    same_trees(off, model)
    np.testing.assert_allclose(on["b"], model["b"] - 0.1, rtol=1e-5)


@every_row
def test_no_two_arrays_of_a_fresh_state_share_memory_with_each_other_or_with_the_model(row: Row) -> None:
    """Or they could not be donated."""
    if "float64" in repr(row.rule):
        pytest.skip("needs 64 bits")
    model = on_jax(arrays_of(row, row.single))
    held = [x for x in jax.tree.leaves((opt.setup(row.rule, model), model)) if x.size]
    places = [x.unsafe_buffer_pointer() for x in held]

    assert len(set(places)) == len(places)


DONATED = [*RULES, opt.MixedPrecision(opt.Adam()), opt.AMSGrad(), opt.Chain(opt.ClipNorm(), opt.Descent())]


@pytest.mark.parametrize("rule", DONATED, ids=repr)
def test_state_and_model_may_be_donated(rule: Any) -> None:
    """No warning, no copy left over, and the numbers of a step that was given nothing."""
    model, gradients = two(), slopes(3)
    step = fresh(donate_argnums=(0, 1))
    state, x = opt.setup(rule, model), jax.tree.map(jnp.copy, model)
    _, wanted = of_numpy(rule, model, gradients)
    for g in gradients:
        old = jax.tree.leaves((state, x))
        state, x = step(state, x, on_jax(g))
        used = old[:-2] if isinstance(rule, opt.MixedPrecision) else old  # the masters are what is read
        assert [v.is_deleted() for v in used] == [True] * len(used)
    for name in model:
        np.testing.assert_allclose(x[name], wanted[name], rtol=2e-5, atol=1e-6)
    assert step._cache_size() == 1


def test_shapes_of_a_step_are_found_without_any_array() -> None:
    model = jax.eval_shape(two)
    state = jax.eval_shape(lambda m: opt.setup(opt.Adam(), m), model)
    new, x = jax.eval_shape(opt.update, state, model, model)

    assert jax.tree.structure(state) == jax.tree.structure(opt.setup(opt.Adam(), two()))
    assert avals(new) == avals(opt.setup(opt.Adam(), two()))
    assert avals(x) == avals(model)


def test_setup_takes_shapes_and_gives_shapes() -> None:
    model = jax.eval_shape(two)
    state = opt.setup(opt.Adam(), model)

    assert jax.tree.structure(state) == jax.tree.structure(opt.setup(opt.Adam(), two()))
    assert avals(state) == avals(opt.setup(opt.Adam(), two()))
    assert isinstance(jax.tree.leaves(state)[0], jax.ShapeDtypeStruct)


@pytest.mark.slow
def test_setup_may_be_jitted_and_mapped() -> None:
    model = two()
    same_trees(jax.jit(lambda m: opt.setup(opt.Adam(0.1), m))(model), opt.setup(opt.Adam(0.1), model))
    ensemble = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), model)
    states = jax.vmap(lambda m: opt.setup(opt.EMA(opt.Momentum(0.1)), m))(ensemble)
    states, new = jax.vmap(opt.update)(states, ensemble, ensemble)
    for i in range(3):
        np.testing.assert_allclose(new["b"][i], 0.9 * ensemble["b"][i], rtol=1e-6)


# -- what is compiled, and when ------------------------------------------------------------------------------

RATES = [0.2, 1, np.float32(0.3), np.float64(0.4), np.array(0.5), np.int64(2), jnp.float32(0.6)]
RATES += [jnp.asarray(0.7), jnp.asarray(2), jnp.bfloat16(0.25), True + 1]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "jitted"])
def test_a_rate_of_any_kind_compiles_no_step(eager: bool) -> None:
    model, step = two(), fresh()
    take = opt.update if eager else step
    ones = like(model, 1)
    state, _ = take(opt.setup(opt.Adam(0.1), model), model, ones)
    for rate in RATES:
        for other in (opt.adjust(state, rate), opt.setup(opt.Adam(rate), model)):
            with compilations() as found:
                _, new = take(other, model, ones)
            assert found == [], rate
    np.testing.assert_allclose(new["b"], model["b"] - 2, rtol=1e-6)
    assert eager or step._cache_size() == 1


def test_adjusting_again_compiles_nothing_at_all() -> None:
    model = two()
    state, model = opt.update(opt.setup(opt.Chain(opt.ClipNorm(1.0), opt.Adam(0.1)), model), model, model)
    opt.adjust_(state, 0.2, omega=0.5)
    with compilations() as found:
        for rate in (0.3, 0.4):
            opt.adjust_(state, rate, omega=rate)
            state, model = opt.update(state, model, model)

    assert found == []


def test_a_setting_of_one_leaf_is_adjusted_at_the_cost_of_one_compilation_at_most() -> None:
    model, step = two(), fresh()
    state, _ = step(opt.setup(opt.Adam(0.1), model), model, model)
    sizes: list[int] = []
    for rate in (0.2, 0.3, 0.4):
        opt.adjust_(state.w, rate)
        state, _ = step(state, model, model)
        sizes.append(step._cache_size())

    assert sizes[0] <= 2
    assert sizes == [sizes[0]] * 3


@pytest.mark.parametrize(
    "schedule",
    [
        opt.Cosine(0.1, 10, warmup=2),
        opt.Linear(0.1, 0.0, 5).then(opt.Constant(0.3), 3),
        lambda clock: 0.1 / (clock + 1),
    ],
    ids=["Cosine", "Join", "a function"],
)
def test_a_schedule_ticks_without_compiling(schedule: Any) -> None:
    model, step = two(), fresh()
    rule = opt.Chain(opt.WeightDecay(0.0), opt.Descent(schedule))
    state, x = opt.setup(rule, model), model
    for t in range(6):
        state, new = step(state, x, like(model, 1))
        np.testing.assert_allclose(x["b"] - new["b"], float(schedule(t)), rtol=1e-4, atol=1e-6)
        x = new

    assert step._cache_size() == 1


def test_numbers_of_a_schedule_are_adjusted_without_compiling() -> None:
    model, step = two(), fresh()
    state = opt.setup(opt.Descent(opt.Cosine(0.1, 10)), model)
    step(state, model, model)
    other = opt.adjust(state, opt.Cosine(0.7, 25))
    _, new = step(other, model, like(model, 1))
    np.testing.assert_allclose(new["b"], model["b"] - 0.7, rtol=1e-6)

    assert step._cache_size() == 1


def test_freezing_compiles_once_and_thawing_or_freezing_again_does_not() -> None:
    model, step = two(), fresh()
    state = opt.setup(opt.Adam(0.1), model)
    frozen = opt.freeze(state, "w")
    sizes: list[int] = []
    for now in (state, frozen, opt.thaw(frozen), opt.freeze(opt.thaw(frozen), "w")):
        step(now, model, model)
        sizes.append(step._cache_size())

    assert sizes == [1, 2, 3, 3]


def test_freezing_and_thawing_in_the_course_of_training_compiles_once() -> None:
    model, step = two(), fresh()
    state, sizes = opt.setup(opt.Adam(0.1), model), list[int]()
    state, model = step(state, model, model)
    for turn in (opt.freeze_, opt.thaw_, opt.freeze_, opt.thaw_):
        turn(state.w)
        state, model = step(state, model, model)
        sizes.append(step._cache_size())

    assert sizes == [2, 3, 3, 3]


def test_an_eager_step_compiles_once_for_a_structure() -> None:
    model = on_jax({f"layer{i}": np.ones((3, i + 1), "f4") for i in range(6)})
    state = opt.setup(opt.Nesterov(0.1), model)
    run = pytrees.jitted(structure_of(parts(state)[0]), KeyPath(), False, None)
    before = run._cache_size()
    for _ in range(3):
        state, model = opt.update(state, model, model)
    other = opt.setup(opt.Nesterov(0.7, 0.1), model)
    opt.update_(other, dict(model), model)

    assert pytrees.jitted(structure_of(parts(other)[0]), KeyPath(), False, None) is run
    assert (before, run._cache_size()) == (0, 1)


def literals(jaxpr: Any) -> set[float]:
    """Every number that stands in a program, or in one inside it."""
    found = {float(v) for c in jaxpr.consts if np.ndim(c) < 2 for v in np.ravel(np.asarray(c)).tolist()}
    open_ = [jaxpr.jaxpr]
    while open_:
        for eqn in open_.pop().eqns:
            found |= {float(v.val) for v in eqn.invars if hasattr(v, "val")}
            inner = [x for p in eqn.params.values() for x in (p if isinstance(p, tuple) else (p,))]
            open_ += [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    return found


def test_no_setting_is_a_literal_in_the_program_of_a_step() -> None:
    model = two()
    rule = opt.Chain(
        opt.ClipGlobalNorm(0.7654), opt.AdamW(opt.Cosine(0.1234, 77), (0.8765, 0.9876), 0.0543, 3e-7)
    )
    program = jax.make_jaxpr(opt.update)(opt.setup(rule, model), model, model)
    known = literals(program)
    given = [0.7654, 0.1234, 77, 0.8765, 0.9876, 0.0543, 3e-7, 1 - 0.8765, 1 - 0.9876]

    assert [g for g in given if any(abs(k - g) <= 1e-6 * g for k in known)] == []


def test_the_search_for_literals_finds_one_in_an_inner_program() -> None:
    program = jax.make_jaxpr(lambda x: jax.jit(lambda y: y * 0.1234)(x) + 0.5)(1.0)

    assert {0.1234, 0.5} <= {round(v, 6) for v in literals(program)}


# -- populations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "name", "values"),
    [
        (opt.Adam(0.1), "eta", (0.1, 0.2, 0.4)),
        (opt.Chain(opt.ClipGlobalNorm(0.5), opt.AdamW(0.1, lam=0.1)), "lam", (0.0, 0.1, 0.5)),
        (opt.Chain(opt.AccumGrad(2), opt.Momentum(0.1)), "rho", (0.1, 0.5, 0.9)),
    ],
    ids=["eta", "lam", "rho"],
)
def test_a_population_trains_as_single_runs_do(rule: Any, name: str, values: Any) -> None:
    model, gradients = two(), slopes(3)
    state = opt.setup(rule, model)
    axes = opt.vmap_axes(state, name)
    states = jax.vmap(lambda v: opt.adjust(state, **{name: v}), out_axes=axes)(jnp.asarray(values))
    stack = jax.tree.map(lambda *gs: jnp.stack(gs), *gradients)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(axes, None))
    def train(state: Any, model: Any) -> Any:
        return lax.scan(lambda c, g: (opt.update(*c, g), None), (state, model), stack)[0]

    trained_states, models = train(states, model)
    for i, value in enumerate(values):
        _, wanted = of_numpy(rule.adjust(**{name: value}), model, gradients)
        for k in model:
            np.testing.assert_allclose(models[k][i], wanted[k], rtol=2e-5, atol=1e-6)
        (one,) = {leaf.rule for leaf in leaves(jax.tree.map(lambda x, i=i: x[i], trained_states))}
        assert math.isclose(dict(_settings(one))[name], value, rel_tol=1e-6)


def _settings(rule: Any) -> Iterator[tuple[str, Any]]:
    parts = rule.rules if isinstance(rule, opt.Chain) else (rule,)
    return ((f, getattr(part, f)) for part in parts for f in type(part)._fields)


def test_vmap_axes_maps_only_the_tables_that_hold_the_name() -> None:
    model = two()
    state = opt.setup({"w": opt.Momentum(0.1), "**": opt.Descent(0.1)}, model)
    form = jax.tree.structure(state)

    def of(*names: str) -> list[Any]:
        axes = opt.vmap_axes(state, *names)
        return form.flatten_up_to(axes)

    assert of("rho").count(0) == 1
    assert of("eta").count(0) == 2
    assert of("rho", "eta").count(0) == 2
    assert of().count(0) == 0


def test_vmap_axes_names_what_there_is_for_an_unknown_name() -> None:
    state = opt.setup(opt.Adam(), two())
    with pytest.raises(opt.UnknownField) as caught:
        opt.vmap_axes(state, "lr")

    assert str(caught.value) == "no rule here has 'lr'; there are beta, epsilon, eta"


# -- gradients of hyper-parameters ---------------------------------------------------------------------------


class Held(NamedTuple):
    """A rule, and the settings that count and so have no slope."""

    rule: opt.Rule
    skip: tuple[str, ...] = ()


FOLLOWED = {
    "Nesterov": Held(opt.Nesterov(0.05, 0.8)),
    "Adam": Held(opt.Adam(0.05, (0.8, 0.95), 1e-3)),
    "RMSProp": Held(opt.RMSProp(0.05, 0.8, 1e-3)),
    "AdaGrad": Held(opt.AdaGrad(0.1, 1e-3)),
    "AdaDelta": Held(opt.AdaDelta(0.8, 1e-3)),
    "AdaBelief": Held(opt.AdaBelief(0.05, (0.8, 0.9), 1e-3)),
    "NAdam": Held(opt.NAdam(0.05, (0.8, 0.9), 1e-3)),
    "decay-clip-AdamW": Held(
        opt.Chain(opt.WeightDecay(0.1), opt.ClipGlobalNorm(0.5), opt.AdamW(0.05, (0.8, 0.95), 0.1, 1e-3))
    ),
    "schedule": Held(opt.Momentum(opt.Exponential(0.1, 0.5, 3), 0.5), ("steps",)),
}

ZERO = np.array([0.0, 1.0, 1.0, 1.0])
"""The first element has no gradient, ever."""


def loss_of_numpy(rule: opt.Rule, changes: dict[str, float], steps: int = 10) -> float:
    """sum(x^2) after ten steps down sum(x^4) / 4, by the interpreter of NumPy."""
    x = np.array([0.5, 1.0, -0.7, 0.3])
    state = opt.with_hyperparameters(opt.setup(rule, x, engine="interpret"), changes)
    for _ in range(steps):
        state, x = opt.update(state, x, ZERO * x**3)
    return float(np.sum(x**2))


@pytest.mark.slow
@pytest.mark.parametrize("held", FOLLOWED.values(), ids=FOLLOWED)
@pytest.mark.usefixtures("x64")
def test_gradients_through_ten_steps_agree_with_central_differences(held: Held) -> None:
    x = jnp.asarray([0.5, 1.0, -0.7, 0.3])
    state = opt.setup(held.rule, x)
    h = opt.hyperparameters(state)

    @jax.jit
    @jax.grad
    def slope(h: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            return opt.update(*carry, ZERO * carry[1] ** 3), None

        _, y = lax.scan(step, (opt.with_hyperparameters(state, h), x), length=10)[0]
        return jnp.sum(y**2)

    got = slope(h)

    assert set(got) == set(h)
    for name, value in h.items():
        if name in held.skip:
            continue
        width = 1e-5 * max(abs(float(value)), 1e-2)
        ends = [loss_of_numpy(held.rule, {name: float(value) + s * width}) for s in (1, -1)]
        wanted = (ends[0] - ends[1]) / (2 * width)
        np.testing.assert_allclose(got[name], wanted, rtol=2e-4, atol=1e-6, err_msg=name)


def test_hyperparameters_are_arrays_by_name_and_go_back() -> None:
    model = two()
    state = opt.setup(opt.Chain(opt.WeightDecay(0.25), opt.Adam(0.5, (0.75, 0.875))), model)
    h = opt.hyperparameters(state)

    assert set(h) == {"lam", "eta", "beta[0]", "beta[1]", "epsilon"}
    assert all(v.shape == () and v.dtype == jnp.float32 and not v.weak_type for v in h.values())
    assert (float(h["lam"]), float(h["eta"]), float(h["beta[1]"])) == (0.25, 0.5, 0.875)
    assert opt.with_hyperparameters(state, h) == state
    new = opt.with_hyperparameters(state, {"eta": jnp.float32(0.125)})
    assert new.w.rule == opt.Chain(opt.WeightDecay(0.25), opt.Adam(0.125, (0.75, 0.875)))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert avals(new) == avals(state)


def test_hyperparameters_that_differ_are_vectors_and_of_two_rules_have_their_place() -> None:
    model = two()
    state = opt.setup(opt.Chain(opt.Momentum(0.5), opt.Descent(0.25)), model)

    assert {k: float(v) for k, v in opt.hyperparameters(state).items()} == {
        "rules.0.eta": 0.5,
        "rho": pytest.approx(0.9),
        "rules.1.eta": 0.25,
    }
    parted = opt.setup({"w": opt.Descent(0.5), "b": opt.Descent(0.25)}, model)
    h = opt.hyperparameters(parted)
    assert sorted(h["eta"].tolist()) == [0.25, 0.5]
    assert opt.with_hyperparameters(parted, h) == parted
    assert opt.hyperparameters(parted.w)["eta"].tolist() == 0.5


def test_a_rate_that_is_learned_by_its_own_gradient_falls_into_place() -> None:
    """Online: one program, in which the rate moves by its slope at every step."""
    x = jnp.asarray([1.0, -2.0])
    state = opt.setup(opt.Descent(0.01), x)

    @jax.jit
    def step(state: Any, x: Any) -> Any:
        def after(h: Any) -> Any:
            new, y = opt.update(opt.with_hyperparameters(state, h), x, 2 * x)
            return jnp.sum(y**2), (new, y)

        (_, (new, y)), slope = jax.value_and_grad(after, has_aux=True)(opt.hyperparameters(state))
        h = opt.hyperparameters(new)
        return opt.with_hyperparameters(new, {"eta": h["eta"] - 0.01 * slope["eta"]}), y

    losses: list[float] = []
    for _ in range(10):
        state, x = step(state, x)
        losses.append(float(jnp.sum(x**2)))

    assert losses[-1] < 1e-2
    assert step._cache_size() == 1
    assert 0.3 < state.rule.eta < 0.7


@pytest.mark.slow
def test_a_step_may_be_differentiated_forwards_and_backwards_and_twice() -> None:
    """Descent on x^3: y = x - eta x^3."""
    x = jnp.asarray([0.5, -1.5])
    state = opt.setup(opt.Descent(0.1), x)

    def f(x: Any) -> Any:
        return opt.update(state, x, x**3)[1]

    np.testing.assert_allclose(jax.jacfwd(f)(x), np.diag(1 - 0.3 * np.asarray(x) ** 2), rtol=1e-6)
    np.testing.assert_allclose(jax.jacrev(f)(x), np.diag(1 - 0.3 * np.asarray(x) ** 2), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda y: jax.grad(lambda z: f(z).sum())(y).sum())(x), -0.6 * x)
    y, dy = jax.jvp(f, (x,), (jnp.ones(2),))
    np.testing.assert_allclose(y, x - 0.1 * x**3, rtol=1e-6)
    np.testing.assert_allclose(dy, 1 - 0.3 * x**2, rtol=1e-6)


# -- None and float0 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("grads", [{"w": None, "b": 1.0}, {"w": None}], ids=["a leaf", "what is left out"])
def test_none_is_no_step(jitted: bool, grads: Any) -> None:
    model = two()
    state = opt.setup(opt.Adam(0.1), model)
    given = {k: None if v is None else jnp.ones(3) for k, v in grads.items()}
    step = jax.jit(opt.update) if jitted else opt.update
    if "b" not in given:
        with pytest.raises(opt.TreeMismatch, match="no 'b'"):
            step(state, model, given)
        return
    new_state, new = step(state, model, given)
    np.testing.assert_array_equal(new["w"], model["w"])
    np.testing.assert_allclose(new["b"], model["b"] - 0.1, rtol=1e-5)
    assert bool(new_state.w == state.w)
    assert jitted or new["w"] is model["w"]
    later, _ = step(new_state, new, like(model, 1))
    np.testing.assert_allclose(later.w.state.weight, (0.1, 0.001), rtol=1e-4)
    np.testing.assert_allclose(later.b.state.weight, (0.19, 0.001999), rtol=1e-4)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
def test_gradients_of_no_type_are_no_steps(jitted: bool) -> None:
    """JAX gives float0 for whole numbers, which are not trained."""
    model = {"w": jnp.asarray([1.0, 2.0]), "n": jnp.arange(3), "on": jnp.asarray(True)}

    def loss(m: Any) -> Any:
        return jnp.sum(m["w"] ** 2)

    grads = jax.grad(loss, allow_int=True)(model)
    assert grads["n"].dtype == jax.dtypes.float0
    state = opt.setup(opt.Descent(0.25), model)
    _, new = (jax.jit(opt.update) if jitted else opt.update)(state, model, grads)
    np.testing.assert_allclose(new["w"], [0.5, 1.0])
    np.testing.assert_array_equal(new["n"], model["n"])


def test_weak_parameters_become_strong_ones() -> None:
    """`jnp.full` makes arrays of a weak type."""
    model = {"w": jnp.full(3, 1.0)}
    assert model["w"].weak_type
    state = opt.setup(opt.EMA(opt.Adam()), model)
    new_state, new = opt.update(state, model, model)

    assert not any(x.weak_type for x in jax.tree.leaves((state, new_state, new)))


# -- in place ------------------------------------------------------------------------------------------------


def test_update_in_place_changes_the_state_and_replaces_the_arrays() -> None:
    model = two()
    given = dict(model)
    state = opt.setup(opt.Momentum(0.5), model)
    same, new = opt.update_(state, given, like(model, 1))

    assert same is state
    np.testing.assert_allclose(new["b"], model["b"] - 0.5)
    np.testing.assert_allclose(state.b.state.v, 0.5)


def test_update_leaves_the_old_state_as_it_was() -> None:
    model = two()
    state = opt.setup(opt.Momentum(0.5), model)
    before = [np.array(x) for x in jax.tree.leaves(state)]
    new, _ = opt.update(state, model, model)
    opt.adjust_(new, 0.1)
    opt.freeze_(new)

    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(state), strict=True))
    assert (state.w.rule.eta, state.w.frozen) == (0.5, False)


@pytest.mark.parametrize("rule", RULES[1:2], ids=["clip-AdamW"])
def test_the_same_run_twice_is_identical_to_the_last_bit(rule: Any) -> None:
    def run() -> Any:
        state, model = opt.setup(rule, two()), two()
        for g in slopes(3):
            state, model = opt.update(state, model, on_jax(g))
        return jax.tree.leaves((state, model))

    assert all(np.array_equal(a, b) for a, b in zip(run(), run(), strict=True))


# -- one vector ----------------------------------------------------------------------------------------------


def cubic(model: Any) -> Any:
    return jnp.sum(model["w"] ** 3) + jnp.sum(model["b"] ** 2) * model["w"][0, 0]


@pytest.mark.slow
def test_destructure_goes_there_and_back_under_every_transform() -> None:
    """Expected from the formula: d/dw = 3 w^2 (+ sum b^2 at one place), d/db = 2 b w00."""
    model = two()
    flat, re = opt.destructure(model)
    w, b = np.asarray(model["w"]), np.asarray(model["b"])
    dw = 3 * w**2
    dw[0, 0] += np.sum(b**2)
    order = [str(p) for p, _ in opt.trainables(model, path=True)]
    parts = {"w": dw.ravel(), "b": 2 * b * w[0, 0]}
    wanted = np.concatenate([parts[name] for name in order])

    def f(v: Any) -> Any:
        return cubic(re(v))

    assert isinstance(flat, jax.Array)
    same_trees(re(flat), model)
    np.testing.assert_allclose(jax.jit(jax.grad(f))(flat), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jacfwd(f)(flat), wanted, rtol=1e-5)
    np.testing.assert_allclose(
        jax.jvp(f, (flat,), (jnp.ones_like(flat),))[1], wanted.sum(), rtol=1e-5, atol=1e-5
    )
    several = jnp.stack([flat, 2 * flat])
    np.testing.assert_allclose(jax.vmap(f)(several), [f(flat), f(2 * flat)], rtol=1e-5)
    assert jax.vmap(re)(several)["w"].shape == (2, 2, 3)
    hessian = jax.jit(jax.hessian(f))(flat)
    np.testing.assert_allclose(hessian, np.asarray(hessian).T)
    start = {"w": slice(0, 6), "b": slice(6, 9)} if order[0] == "w" else {"b": slice(0, 3), "w": slice(3, 9)}
    np.testing.assert_allclose(hessian[start["w"], start["w"]], np.diag(6 * w.ravel()), rtol=1e-5)
    np.testing.assert_allclose(hessian[start["b"], start["b"]], 2 * w[0, 0] * np.eye(3), rtol=1e-5)


def test_destructure_may_itself_be_differentiated_and_ties_count_once() -> None:
    x = jnp.asarray([1.0, 2.0])

    def norm(x: Any) -> Any:
        flat, _ = opt.destructure({"a": x, "b": 3 * x})
        return jnp.sum(flat**2)

    np.testing.assert_allclose(jax.grad(norm)(x), 20 * x)
    flat, re = opt.destructure({"a": x, "b": x}, ties=[("a", "b")])
    assert flat.shape == (2,)
    back = re(2 * flat)
    assert back["a"] is back["b"]
    np.testing.assert_allclose(jax.grad(lambda v: jnp.sum(re(v)["a"] * re(v)["b"]))(flat), 2 * x)


def test_destructure_keeps_types_and_what_is_not_trained() -> None:
    model = {
        "h": jnp.ones(2, jnp.bfloat16),
        "f": jnp.ones(1),
        "c": jnp.ones(1, jnp.complex64),
        "n": jnp.arange(2),
    }
    flat, re = opt.destructure(model)
    back = re(flat)

    assert flat.dtype == jnp.complex64
    assert {k: str(v.dtype) for k, v in back.items()} == {k: str(v.dtype) for k, v in model.items()}
    assert back["n"] is model["n"]


@pytest.mark.slow
def test_a_solver_for_whole_vectors_trains_a_model_through_destructure() -> None:
    import optimistix

    model = {"w": jnp.asarray([[0.0, 0.0]]), "b": jnp.asarray([0.0])}
    flat, re = opt.destructure(model)
    data = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]])
    goal = data @ jnp.asarray([2.0, -3.0]) + 0.5

    def residuals(v: Any, _: Any) -> Any:
        m = re(v)
        return data @ m["w"][0] + m["b"] - goal

    found = optimistix.least_squares(residuals, optimistix.LevenbergMarquardt(1e-6, 1e-6), flat)
    solved = re(found.value)
    np.testing.assert_allclose(solved["w"], [[2, -3]], atol=1e-4)
    np.testing.assert_allclose(solved["b"], [0.5], atol=1e-4)


# -- several devices -----------------------------------------------------------------------------------------

SHARDED = """
import json, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import optimisers as opt

mesh = Mesh(np.array(jax.devices()), ("d",))
rows, all_ = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
rng = np.random.default_rng(0)
host = {"w": rng.standard_normal((8, 3)).astype("f4"), "b": rng.standard_normal(3).astype("f4")}
slopes = [{k: rng.standard_normal(v.shape).astype("f4") for k, v in host.items()} for _ in range(3)]
place = lambda m: {"w": jax.device_put(m["w"], rows), "b": jax.device_put(m["b"], all_)}
rule = opt.Chain(opt.ClipGlobalNorm(0.5), opt.Adam(0.1))

state, wanted = opt.setup(rule, host, engine="interpret"), host
for g in slopes:
    state, wanted = opt.update(state, wanted, g)

def off(model):
    return max(float(np.abs(np.asarray(model[k]) - wanted[k]).max()) for k in wanted)

out = {"devices": len(jax.devices())}
model = place(host)
state = opt.setup(rule, model)
out["fresh"] = [state.w.state[1].m.sharding == rows, state.w.state[1].v.sharding == rows]
for name, step in (("eager", opt.update), ("in place", opt.update_), ("jitted", jax.jit(opt.update))):
    s, m = opt.setup(rule, model), dict(model)
    for g in slopes:
        s, m = step(s, m, place(g))
    out[name] = off(m)
    out[name + " kept"] = [m["w"].sharding == model["w"].sharding,
                           s.w.state[1].m.sharding.is_equivalent_to(rows, 2)]
donated = jax.jit(lambda *a: opt.update(*a), donate_argnums=(0, 1))
s, m = opt.setup(rule, model), place(host)
for g in slopes:
    s, m = donated(s, m, place(g))
out["donated"] = off(m)

plain = opt.Adam(0.1)
state, wanted = opt.setup(plain, host, engine="interpret"), host
for g in slopes:
    state, wanted = opt.update(state, wanted, g)
same = jax.jit(jax.shard_map(lambda s, m, g: opt.update(s, m, jax.lax.pmean(g, "d")), mesh=mesh,
                             in_specs=(P(), P(), P()), out_specs=P()))
s, m = opt.setup(plain, jax.device_put(host, all_)), jax.device_put(host, all_)
for g in slopes:
    s, m = same(s, m, jax.device_put(g, all_))
out["replicated"] = off(m)
text = jax.jit(opt.update).lower(opt.setup(plain, model), model, place(slopes[0])).compile().as_text()
out["gathers"] = text.count("all-gather")
shard = jax.tree.map(lambda x: all_, opt.setup(plain, model))
moved = jax.device_put(opt.setup(plain, model), shard)
out["device_put"] = all(x.sharding == all_ for x in jax.tree.leaves(moved))
print(json.dumps(out), flush=True)
s, m = opt.setup(plain, model), model
of_state = jax.tree.map(lambda x: P("d") if x.shape == (8, 3) else P(), s)
of_model = {"w": P("d"), "b": P()}
mapped = jax.jit(jax.shard_map(opt.update, mesh=mesh, in_specs=(of_state, of_model, of_model),
                               out_specs=(of_state, of_model)))
for g in slopes:
    s, m = mapped(s, m, place(g))
out["shard_map"] = off(m)
print(json.dumps(out), flush=True)

spec = {"w": P("d"), "b": P()}
off_by = []
clips = (opt.ClipGlobalNorm(0.5), opt.ClipNorm(0.5), opt.ClipNorm(0.5, float("inf")))
grads = {k: 5 * x for k, x in slopes[0].items()}
for rule in (*(opt.Chain(c, opt.Descent(0.1)) for c in clips), opt.Chain(clips[0], opt.Adam(0.1))):
    state = opt.setup(rule, model)
    of = jax.tree.map(lambda a: P("d") if a.shape[:1] == (8,) else P(), state)
    step = jax.shard_map(
        lambda *a: opt.update(*a), mesh=mesh, in_specs=(of, spec, spec), out_specs=(of, spec)
    )
    _, new = jax.jit(step)(state, model, place(grads))
    _, wanted = opt.update(opt.setup(rule, host, engine="interpret"), host, grads)
    off_by += [float(np.abs(np.asarray(new[k]) - wanted[k]).max()) for k in host]
out["norms"] = max(off_by)
print(json.dumps(out))
"""


@functools.cache
def on_four_devices() -> dict[str, Any]:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"error": done.stderr[-1500:]}


@pytest.mark.slow
def test_state_arrays_lie_where_the_parameters_lie() -> None:
    found = on_four_devices()

    assert found["devices"] == 4
    assert found["fresh"] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "in place", "jitted"])
def test_sharded_arrays_are_stepped_as_whole_ones_and_stay_sharded(how: str) -> None:
    found = on_four_devices()

    assert found[how] < 2e-6
    assert found[f"{how} kept"] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["donated", "replicated"])
def test_arrays_on_several_devices_may_be_donated_and_mapped(how: str) -> None:
    assert on_four_devices()[how] < 2e-6


@pytest.mark.slow
def test_shard_map_steps_every_shard_of_a_state() -> None:
    found = on_four_devices()

    assert found.get("shard_map", found["error"]) == pytest.approx(0, abs=2e-6)


@pytest.mark.slow
def test_norms_inside_a_shard_map_go_over_all_shards() -> None:
    found = on_four_devices()

    assert found.get("norms", found["error"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_sharded_step_gathers_nothing() -> None:
    found = on_four_devices()

    assert found["gathers"] == 0
    assert found["device_put"]


# -- mistakes ------------------------------------------------------------------------------------------------


def text_of(kind: type[BaseException], mistake: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        mistake()
    return str(caught.value)


both = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])


def taken(state: Any, model: Any, grads: Any, *, jitted: bool) -> Any:
    return (jax.jit(opt.update) if jitted else opt.update)(state, model, grads)


@both
def test_a_gradient_of_the_wrong_shape_is_named(jitted: bool) -> None:
    model = two()
    state = opt.setup(opt.Adam(), model)
    grads = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
    text = text_of(opt.TreeMismatch, lambda: taken(state, model, grads, jitted=jitted))

    assert text == "gradient of shape (3, 2) for parameters of shape (2, 3), at grads['w']"
    assert set(np.ravel(jax.tree.leaves(state)[-1]).tolist()) == {0}


@both
def test_a_gradient_is_never_broadcast(jitted: bool) -> None:
    model = {"net": [jnp.ones((2, 3))]}
    state = opt.setup(opt.Adam(), model)
    for g in (jnp.ones(()), jnp.ones(3), jnp.ones((1, 3))):
        text = text_of(opt.TreeMismatch, lambda g=g: taken(state, model, {"net": [g]}, jitted=jitted))
        assert text.endswith("for parameters of shape (2, 3), at grads['net'][0]")


def test_gradients_of_numpy_are_refused() -> None:
    model = two()
    state = opt.setup(opt.Adam(), model)
    grads = jax.tree.map(np.asarray, model)
    text = text_of(opt.TreeMismatch, lambda: jax.jit(lambda s, m: opt.update(s, m, grads))(state, model))

    assert text == "grads['b'] is of type ndarray; the parameters are arrays of jax"
    assert text_of(opt.TreeMismatch, lambda: opt.update(state, model, grads)) == text


@both
def test_a_python_number_is_no_gradient(jitted: bool) -> None:
    model = two()
    state = opt.setup(opt.Adam(), model)
    text = text_of(opt.TreeMismatch, lambda: taken(state, model, {"b": 1.0, "w": 1.0}, jitted=jitted))

    assert "grads['b']" in text


@both
def test_a_state_of_another_model_is_refused(jitted: bool) -> None:
    model = two()
    other = opt.setup(opt.Adam(), {"w": model["w"], "c": model["b"]})
    text = text_of(opt.TreeMismatch, lambda: taken(other, model, model, jitted=jitted))

    assert text == "model has no 'c', which `setup` saw; call `setup` again for another model"


@both
def test_parameters_of_another_type_are_refused(jitted: bool) -> None:
    model = two()
    state = opt.setup(opt.Adam(), model)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    text = text_of(opt.TreeMismatch, lambda: taken(state, half, model, jitted=jitted))

    assert text.endswith("has type bfloat16; `setup` saw float32; call `setup` again for another model")


@both
def test_a_complex_gradient_of_real_parameters_is_refused(jitted: bool) -> None:
    model = two()
    state = opt.setup(opt.Adam(), model)
    grads = jax.tree.map(lambda x: x + 1j, model)
    text = text_of(opt.TreeMismatch, lambda: taken(state, model, grads, jitted=jitted))

    assert text.endswith("is complex for real parameters; take its real part")


def test_a_rule_in_place_of_a_state_says_what_to_write() -> None:
    model = two()
    text = text_of(opt.BadState, lambda: opt.update(opt.Adam(), model, model))

    assert "write state = setup(Adam(" in text


def test_a_rule_that_branches_on_a_value_says_what_to_write() -> None:
    class Branches(opt.Rule):
        def init(self, x: Any) -> Any:
            return ()

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, dx if opt.ops.sum(dx) > 0 else -dx

    text = text_of(opt.TraceError, lambda: opt.setup(Branches(), two()))

    assert "where" in text


@pytest.mark.parametrize("rule", [opt.ClipNorm(), opt.ClipGlobalNorm()], ids=["ClipNorm", "ClipGlobalNorm"])
def test_an_eager_step_refuses_a_norm_that_is_not_finite_and_changes_nothing(rule: Any) -> None:
    model = two()
    given = dict(model)
    state = opt.setup(opt.Chain(rule, opt.Momentum(0.1)), model)
    grads = {"w": jnp.full((2, 3), jnp.nan), "b": jnp.ones(3)}
    for step in STEPS:
        text = text_of(opt.DomainError, lambda step=step: step(state, given, grads))
        assert "nan" in text
        assert "throw=False" in text
    assert all(given[k] is model[k] for k in model)
    assert (state.b.state[1].v == 0).all()
    assert set(np.ravel(jax.tree.leaves(state)[-1]).tolist()) == {0}


@pytest.mark.parametrize("rule", [opt.ClipNorm(), opt.ClipGlobalNorm()], ids=["ClipNorm", "ClipGlobalNorm"])
def test_inside_a_transform_a_norm_that_is_not_finite_spreads(rule: Any) -> None:
    """Nothing can be raised there."""
    model = two()
    state = opt.setup(opt.Chain(rule, opt.Descent(0.1)), model)
    _, new = jax.jit(opt.update)(state, model, like(model, np.nan))

    assert bool(jnp.isnan(new["b"]).all())


def test_masters_of_float64_need_64_bits() -> None:
    text = text_of(
        opt.BadSetting,
        lambda: opt.setup(opt.MixedPrecision(opt.Adam(), "float64"), jnp.ones(3)),
    )

    assert "64" in text


def test_another_name_of_a_hyperparameter_is_refused() -> None:
    state = opt.setup(opt.Adam(), two())
    text = text_of(opt.UnknownField, lambda: opt.with_hyperparameters(state, {"lr": 0.1}))

    assert text == "there is no hyper-parameter 'lr'; there are eta, beta[0], beta[1], epsilon"


def test_a_model_of_whole_numbers_has_nothing_to_train() -> None:
    with pytest.warns(opt.NoParameters):
        assert opt.setup(opt.Adam(), {"n": jnp.arange(3)}) == ()


def test_a_model_of_several_libraries_is_stepped_part_by_part() -> None:
    model = {"a": jnp.ones(2), "b": np.ones(2)}
    state = opt.setup(opt.Momentum(0.5), model)
    _, new = opt.update(state, model, {"a": jnp.ones(2), "b": np.ones(2)})

    assert (isinstance(new["a"], jax.Array), isinstance(new["b"], np.ndarray)) == (True, True)
    np.testing.assert_allclose(new["a"], 0.5)
    np.testing.assert_allclose(new["b"], 0.5)


@pytest.mark.slow
def test_jax_is_not_imported_for_models_of_numpy() -> None:
    script = (
        "import sys, numpy as np, optimisers as opt\n"
        "x = np.ones(3); opt.update(opt.setup(opt.Adam(), x, engine='interpret'), x, x)\n"
        "assert not {'jax', 'optax', 'flax', 'equinox'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# -- what a review has found ---------------------------------------------------------------------------------


class NormOfState(opt.Rule):
    """Reduces its state and the parameters, but not the gradient."""

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state + dx, dx / (opt.norm(state + x) + 1.0)


@pytest.mark.slow
def test_a_reduction_that_reads_no_gradient_is_mapped_and_differentiated() -> None:
    def stepped(scale: Any, engine: str | None = None) -> Any:
        model = {"w": jnp.arange(1.0, 4.0), "b": jnp.ones(2)}
        state = opt.setup(NormOfState(), model, engine=engine)
        for _ in range(2):
            state, model = opt.update(state, model, jax.tree.map(lambda x: x * scale, model))
        return model["w"].sum() + model["b"].sum()

    scales = jnp.array([0.1, 0.5])
    wanted = [float(stepped(s, "interpret")) for s in scales]
    np.testing.assert_allclose(jax.vmap(stepped)(scales), wanted, rtol=1e-6)
    slopes = jax.vmap(jax.grad(stepped))(scales)
    central = [(stepped(s + 1e-2) - stepped(s - 1e-2)) / 2e-2 for s in scales]
    np.testing.assert_allclose(slopes, central, rtol=1e-2)


def test_arrays_that_were_untied_are_refused() -> None:
    shared = jnp.zeros(3)
    model = {"a": shared, "b": shared}
    state = opt.setup(opt.Descent(0.1), model, ties=[("a", "b")])
    model["b"] = jnp.full(3, 7.0)
    with pytest.raises(opt.TreeMismatch, match="were one array at `setup` and are not now"):
        opt.update(state, model, model)
