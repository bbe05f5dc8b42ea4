"""The ten laws, one section each: every sentence of a law has a test that could refute it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import optimisers as opt
from optimisers.engines import cache
from optimisers.engines.cpu import threads
from optimisers.settings import parts
from tests.table import (
    DTYPES,
    FACTORISED,
    GIVEN_MORE,
    MODERN,
    TABLE,
    Averaged,
    DecayDescent,
    DictMomentum,
    EverySecond,
    Row,
    dtype_of,
    name,
    numbers,
)
from tests.worlds import (
    COMPLEX_PAIRS,
    ENGINES,
    arrays_of,
    bits,
    close,
    gradients_of,
    leaves,
    numbers_in,
    trained,
)


def accumulates(row: Row) -> bool:
    """Whether a rule has windows of updates, which close for all arrays at once, whichever had a gradient."""
    return any(isinstance(part, opt.AccumGrad) for part in parts(row.rule))


every_row = pytest.mark.parametrize("row", TABLE, ids=name)
every_double_row = pytest.mark.parametrize("row", [r for r in TABLE if r.takes("float64")], ids=name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
both_engines = pytest.mark.parametrize("engine", ENGINES)
both_updates = pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)

NARROW_BY_TURNS = pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}")
        for i, row in enumerate(TABLE)
        for others in [[t for t in ("float16", "bfloat16", "complex64") if row.takes(t) and t != row.single]]
        for dtype in (row.single, *others[i % max(1, len(others)) :][:1])
    ],
)
"""Single precision, and one other narrow type; law 1 has double precision of every row by both engines."""

DOUBLE_BY_BOTH = pytest.mark.parametrize(
    ("row", "dtype", "step"),
    [
        pytest.param(row, dtype, step, id=f"{row.name}-{dtype}-{step.__name__}")
        for row in TABLE
        for dtype, step in (("float64", opt.update), ("float64", opt.update_), ("complex128", opt.update_))
        if row.takes(dtype)
    ],
)
"""The pure update of complex numbers is left to law 9: every other case is a kernel to compile."""

PAIRS = pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}")
        for row in TABLE
        for dtype in (row.single, "complex64")
        if row.takes(dtype) and (dtype != "complex64" or row.name in COMPLEX_PAIRS)
    ],
)


# -- what the tests share ------------------------------------------------------------------------------------


def snapshot(state: Any) -> Any:
    """Everything that a step may change of a state, by its bytes."""
    inside = [
        (repr(leaf.rule), leaf.frozen, [bits(np.asarray(v)) for v in numbers_in(leaf.state)])
        for leaf in leaves(state)
    ]
    return opt.explain(state).clock, inside


def directly(rule: opt.Rule, x: Any, gradients: Any) -> Any:
    """The parameters after some steps, by calling the rule on one array: no tracing, no engine."""
    state = rule.init(x)
    for dx in gradients:
        with np.errstate(all="ignore"):  # what `where` does not take may hold anything
            state, dx = rule.apply(state, x, dx)  # noqa: PLW2901 what comes out is the step
        x = x if dx is None else dx.value if isinstance(dx, opt.ops.Becomes) else x - dx
    return x, state


# -- 1. a rule sees one array --------------------------------------------------------------------------------


def sums_over_all(row: Row) -> bool:
    return "Global" in repr(row.rule)


@DOUBLE_BY_BOTH
@both_engines
def test_the_new_value_is_x_minus_what_apply_returns_and_the_state_what_it_returned(
    row: Row, dtype: str, engine: str, step: Callable[..., Any]
) -> None:
    model, gradients = arrays_of(row, dtype), gradients_of(row, dtype)
    if sums_over_all(row):  # alone, so that its total is its own sum
        model, gradients = model[:1], [g[:1] for g in gradients]
    state, got = trained(row.rule, model, gradients, step, engine)
    for i, x in enumerate(model):
        with np.errstate(all="ignore"):
            wanted, kept = directly(row.rule, x, [g[i] for g in gradients])
        np.testing.assert_allclose(got[i], wanted, rtol=1e-11, atol=1e-12)

        assert type(state[i].state) is type(kept)
        for a, b in zip(numbers_in(state[i].state), numbers_in(kept), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@every_row
@both_engines
def test_update_leaves_the_old_model_and_state_as_they_were(row: Row, engine: str) -> None:
    model = arrays_of(row, row.single)
    state = opt.setup(row.rule, model, engine=engine)
    for grads in gradients_of(row, row.single, 3):
        before = snapshot(state), [bits(x) for x in model], [bits(g) for g in grads]
        new_state, new_model = opt.update(state, model, grads)

        assert (snapshot(state), [bits(x) for x in model], [bits(g) for g in grads]) == before
        state, model = new_state, new_model


@every_row
@both_engines
def test_update_in_place_writes_into_the_arrays_that_are_there(row: Row, engine: str) -> None:
    model = arrays_of(row, row.single)
    ids = [id(x) for x in model]
    state = opt.setup(row.rule, model, engine=engine)
    for grads in gradients_of(row, row.single, 4):
        new_state, model = opt.update_(state, model, grads)

        assert new_state is state
        assert [id(x) for x in model] == ids


@both_engines
def test_update_never_writes_into_the_gradients(engine: str) -> None:
    model, grads = [np.ones((2, 3)), np.ones((2, 3)).T], [np.full((2, 3), 2.0), np.full((3, 2), 3.0)]
    trained(opt.Chain(opt.ClipNorm(0.5), opt.Adam()), model, [grads] * 3, opt.update_, engine)

    assert (grads[0] == 2).all()
    assert (grads[1] == 3).all()


def test_built_in_state_explains_itself() -> None:
    state, _ = trained(
        opt.Chain(opt.WeightDecay(), opt.Adam(beta=(0.5, 0.75))), np.ones(2), [np.full(2, 4.0)]
    )
    _, adam = state.state
    np.testing.assert_allclose(adam.m, (4 + 5e-4) / 2)
    np.testing.assert_allclose(adam.v, (4 + 5e-4) ** 2 / 4)


def test_state_may_be_a_dict_a_named_tuple_or_a_bare_number() -> None:
    grads = [np.full(2, 1.0)] * 3
    as_dict, _ = trained(DictMomentum(eta=0.1, rho=0.5), np.zeros(2), grads)
    nested, _ = trained(Averaged(opt.Momentum(0.1, 0.5), 0.5), np.zeros(2), grads)
    bare, _ = trained(DecayDescent(), np.zeros(2), grads)
    np.testing.assert_allclose(as_dict.state["velocity"], 1 + 0.5 + 0.25)
    np.testing.assert_allclose(nested.state.inner.v, 0.1 * (1 + 0.5 + 0.25))

    assert as_dict.state["steps"] == 3
    assert bare.state == 4


def test_a_rule_that_writes_into_an_array_cannot_be_set_up() -> None:
    class Writes(opt.Rule):
        def init(self, x: Any) -> Any:
            return (opt.zeros_like(x),)

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            state[0][...] = dx
            return state, dx

    with pytest.raises(opt.TraceError, match="wrote into an array"):
        opt.setup(Writes(), np.ones(3))


def test_every_built_in_rule_is_in_the_table() -> None:
    """Those that are given more than gradients are walked in rules/test_modern alone."""
    shown = " ".join(map(repr, (*(row.rule for row in (*TABLE, *MODERN)), *FACTORISED.values())))
    public = [n for n in opt.__all__ if isinstance(v := getattr(opt, n), type) and issubclass(v, opt.Rule)]

    assert {n for n in public if f"{n}(" not in shown} == {"Rule", *GIVEN_MORE}


@both_engines
def test_what_is_done_to_the_new_state_does_not_reach_the_old_one(engine: str) -> None:
    model = {"a": np.ones(2), "b": np.ones(2)}
    old = opt.setup(opt.Momentum(0.1), model, engine=engine)
    before = snapshot(old)
    new, _ = opt.update(old, model, {"a": np.ones(2), "b": None})
    opt.freeze_(new)
    opt.adjust_(new, 0.5)
    new.a.state = new.a.state._replace(v=np.full(2, 7.0))
    new.b.rule = opt.Momentum(0.7, 0.7)

    assert snapshot(old) == before


# -- 2. None is not zero -------------------------------------------------------------------------------------


def two(value: float = 1.0) -> dict[str, Any]:
    return {"a": np.full(2, value), "b": np.full(2, value)}


@both_engines
@both_updates
def test_none_keeps_the_state_and_zero_does_not(engine: str, step: Callable[..., Any]) -> None:
    """Documentation of Optimisers.jl, "Incomplete or nothing gradients": Adam(0.1) after a gradient of
    one.
    """
    model = two()
    state = opt.setup(opt.Adam(0.1), model, engine=engine)
    state, model = step(state, model, two())
    kept = model["b"].copy()
    state, model = step(state, model, {"a": np.zeros(2), "b": None})
    np.testing.assert_allclose(state.a.state.m, 0.09, rtol=1e-14)
    np.testing.assert_allclose(state.a.state.v, 0.000999, rtol=1e-12)
    np.testing.assert_allclose(state.a.state.weight, (1 - 0.81, 1 - 0.998001), rtol=1e-12)
    np.testing.assert_allclose(state.b.state.m, 0.1, rtol=1e-14)
    np.testing.assert_allclose(state.b.state.v, 0.001, rtol=1e-12)
    np.testing.assert_allclose(state.b.state.weight, (0.1, 0.001), rtol=1e-12)

    assert (model["a"] != kept).all()
    assert (model["b"] == kept).all()


@pytest.mark.parametrize("row", [r for r in TABLE if r.takes("float64") and not accumulates(r)], ids=name)
@both_engines
@both_updates
def test_a_leaf_without_gradient_changes_nothing_and_the_others_step(
    row: Row, engine: str, step: Callable[..., Any]
) -> None:
    x, first, second = (arrays_of(row, "float64", seed)[0] for seed in (0, 1, 2))
    if sums_over_all(row):
        first, second = 0.01 * first, 0.01 * second  # too short to be clipped, alone or together
    model = {"a": x.copy(), "b": x.copy()}
    state = opt.setup(row.rule, model, engine=engine)
    state, model = step(state, model, {"a": first, "b": None})
    state, model = step(state, model, {"a": None, "b": first})
    state, model = step(state, model, {"a": second, "b": second})
    with np.errstate(all="ignore"):
        wanted, _ = directly(row.rule, x, [first, second])
    np.testing.assert_allclose(model["a"], wanted, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(model["b"], wanted, rtol=1e-11, atol=1e-12)

    assert state.a == state.b


@both_engines
@both_updates
@pytest.mark.parametrize("empty", [None, {"w": None, "b": None}], ids=["branch", "leaves"])
def test_none_at_a_branch_holds_for_all_below(engine: str, step: Callable[..., Any], empty: Any) -> None:
    model = {"layer": {"w": np.ones(2), "b": np.ones(2)}, "head": np.ones(2)}
    state = opt.setup(opt.Momentum(0.1), model, engine=engine)
    state, model = step(state, model, {"layer": empty, "head": np.ones(2)})
    np.testing.assert_allclose(model["head"], 0.9)

    assert (model["layer"]["w"] == 1).all()
    assert (model["layer"]["b"] == 1).all()
    assert (state.layer.w.state.v == 0).all()


@both_updates
def test_none_for_everything_changes_nothing_but_the_clock(step: Callable[..., Any]) -> None:
    model = two()
    state = opt.setup(opt.Adam(), model)
    state, model = step(state, model, two())
    before = snapshot(state)
    state, model = step(state, model, None)

    assert snapshot(state) == (before[0] + 1, before[1])


def test_update_shares_what_takes_no_step_with_the_old_model() -> None:
    model = {"a": np.ones(2), "b": {"c": np.ones(2)}}
    state = opt.setup(opt.Adam(), model)
    _, new = opt.update(state, model, {"a": np.ones(2), "b": None})

    assert new["b"] is model["b"]


# -- 3. ties -------------------------------------------------------------------------------------------------


class Tied(NamedTuple):
    """One array at two places."""

    first: Any
    second: Any


MATRIX = np.arange(6.0).reshape(2, 3)


def same_object() -> Tied:
    x = MATRIX.copy()
    return Tied(x, x)


def equal_views() -> Tied:
    x = MATRIX.copy()
    return Tied(x[:], x.reshape(2, 3))


def transposed() -> Tied:
    x = MATRIX.copy()
    return Tied(x, x.T)


def transposed_first() -> Tied:
    x = MATRIX.copy()
    return Tied(x.T, x)


TIES = pytest.mark.parametrize(
    "tie", [same_object, equal_views, transposed, transposed_first], ids=lambda f: f.__name__
)


def as_first(model: Tied, g: Any) -> Any:
    """A gradient of the second place as the first one sees it."""
    return g if g.shape == model.first.shape and model.first.strides == model.second.strides else g.T


@TIES
def test_tied_arrays_have_one_leaf(tie: Callable[[], Tied]) -> None:
    state = opt.setup(opt.Momentum(), tie())

    assert state.first is state.second
    assert opt.explain(state).groups[0].parameters == MATRIX.size


@TIES
@both_engines
@both_updates
def test_gradients_of_a_tie_are_summed_before_the_rule_runs_once(
    tie: Callable[[], Tied], engine: str, step: Callable[..., Any]
) -> None:
    """The rule is not linear, so neither two runs nor a sum afterwards give the same."""
    rng = np.random.default_rng(1)
    rule = opt.Chain(opt.ClipGrad(0.8), opt.Adam(0.1), opt.ClipGrad(0.07))
    model = tie()
    grads = [Tied(rng.standard_normal(model[0].shape), rng.standard_normal(model[1].shape)) for _ in range(4)]
    wanted, _ = directly(rule, model.first.copy(), [g.first + as_first(model, g.second) for g in grads])
    state = opt.setup(rule, model, engine=engine)
    for g in grads:
        state, model = step(state, model, g)
    np.testing.assert_allclose(model.first, wanted, rtol=1e-12)
    np.testing.assert_allclose(as_first(model, model.second), wanted, rtol=1e-12)


@TIES
@both_engines
@both_updates
def test_a_tie_still_holds_in_the_result(
    tie: Callable[[], Tied], engine: str, step: Callable[..., Any]
) -> None:
    model = tie()
    state = opt.setup(opt.Momentum(0.1), model, engine=engine)
    _, model = step(state, model, Tied(np.ones(model[0].shape), np.ones(model[1].shape)))
    model.first[...] = 7

    assert (model.second == 7).all()
    assert np.shares_memory(model.first, model.second)


@both_updates
def test_the_same_object_twice_stays_one_object(step: Callable[..., Any]) -> None:
    model = same_object()
    _, model = step(opt.setup(opt.Adam(), model), model, Tied(MATRIX, MATRIX + 1))

    assert model.first is model.second


@pytest.mark.parametrize("tie", [same_object, equal_views], ids=lambda f: f.__name__)
@both_engines
@both_updates
def test_the_same_gradient_object_counts_once(
    tie: Callable[[], Tied], engine: str, step: Callable[..., Any]
) -> None:
    model, g = tie(), MATRIX + 1
    state = opt.setup(opt.Descent(1.0), model, engine=engine)
    _, model = step(state, model, Tied(g, g))
    np.testing.assert_array_equal(model.first, MATRIX - g)


@both_updates
def test_equal_gradients_that_are_different_objects_count_twice(step: Callable[..., Any]) -> None:
    model, g = same_object(), MATRIX + 1
    _, model = step(opt.setup(opt.Descent(1.0), model), model, Tied(g, g.copy()))
    np.testing.assert_array_equal(model.first, MATRIX - 2 * g)


@both_engines
@both_updates
def test_the_gradients_of_a_tie_are_summed_in_the_type_of_the_arithmetic(
    engine: str, step: Callable[..., Any]
) -> None:
    """Their sum is 120000, beyond the largest float16 (65504)."""
    x = np.full(2, 1000, np.float16)
    g = np.full(2, 60000, np.float16)
    model = Tied(x, x)
    _, model = step(opt.setup(opt.Descent(1e-3), model, engine=engine), model, Tied(g, g.copy()))
    np.testing.assert_array_equal(model.first, 880)


@TIES
@both_updates
@pytest.mark.parametrize("present", [0, 1])
def test_places_without_gradient_add_nothing(
    tie: Callable[[], Tied], step: Callable[..., Any], present: int
) -> None:
    model = tie()
    g = np.arange(6.0).reshape(model[present].shape) + 1
    wanted = model[present] - g
    grads = Tied(g, None) if present == 0 else Tied(None, g)
    _, model = step(opt.setup(opt.Descent(1.0), model), model, grads)
    np.testing.assert_array_equal(model[present], wanted)

    assert np.shares_memory(model.first, model.second)


@pytest.mark.parametrize("axes", [(1, 2, 0), (2, 0, 1), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("turned_first", [False, True])
@both_engines
@both_updates
def test_a_tie_may_turn_three_axes(
    axes: tuple[int, ...], turned_first: bool, engine: str, step: Callable[..., Any]
) -> None:
    """Other than for two axes, a permutation and its inverse differ."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4))
    g, turned = rng.standard_normal(x.shape), rng.standard_normal(x.transpose(axes).shape)
    wanted, _ = directly(opt.Adam(0.1), x.copy(), [g + turned.transpose(np.argsort(axes))] * 2)
    model, grads = Tied(x, x.transpose(axes)), Tied(g, turned)
    if turned_first:
        model, grads = Tied(*model[::-1]), Tied(*grads[::-1])
    state = opt.setup(opt.Adam(0.1), model, engine=engine)
    for _ in range(2):
        state, model = step(state, model, grads)
    np.testing.assert_allclose(model[turned_first], wanted, rtol=1e-12)
    np.testing.assert_allclose(model[not turned_first], wanted.transpose(axes), rtol=1e-12)


@both_engines
def test_three_places_in_different_containers_are_one_leaf(engine: str) -> None:
    x = np.array([1.0, 2.0])
    model = {"a": x, "b": [x, (np.ones(2), x)]}
    state = opt.setup(opt.Momentum(0.1), model, engine=engine)
    _, new = opt.update(state, model, {"a": np.full(2, 1.0), "b": [np.full(2, 2.0), (None, np.full(2, 4.0))]})
    np.testing.assert_allclose(new["a"], x - 0.7)

    assert new["a"] is new["b"][0] is new["b"][1][1]
    assert new["b"][1][0] is model["b"][1][0]


@both_engines
def test_a_tie_without_any_gradient_is_not_stepped(engine: str) -> None:
    model = same_object()
    state = opt.setup(opt.Momentum(0.1), model, engine=engine)
    state, model = opt.update_(state, model, Tied(MATRIX, None))
    velocity = state.first.state.v.copy()
    state, model = opt.update_(state, model, Tied(None, None))
    np.testing.assert_array_equal(state.first.state.v, velocity)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3)], ids=str)
@both_engines
@both_updates
def test_a_part_with_only_the_transposed_place_of_a_tie_steps_the_same_array(
    shape: tuple[int, ...], engine: str, step: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape)
    first, second = rng.standard_normal(shape), rng.standard_normal(shape[::-1])
    wanted, _ = directly(opt.Adam(0.1), x.copy(), [first, second.T])
    model = {"a": x, "b": {"c": x.T}}
    state = opt.setup(opt.Adam(0.1), model, engine=engine)
    opt.update_(state.a, x, first)
    _, part = step(state.b, model["b"], {"c": second})
    np.testing.assert_allclose(part["c"], wanted.T, rtol=1e-12)


def test_equal_values_do_not_tie() -> None:
    state = opt.setup(opt.Momentum(), Tied(MATRIX.copy(), MATRIX.copy()))

    assert state.first is not state.second


def test_freezing_one_place_of_a_tie_freezes_the_array() -> None:
    model = transposed()
    state = opt.setup(opt.Descent(1.0), model)
    opt.freeze_(state.second)
    _, new = opt.update(state, model, Tied(np.ones((2, 3)), np.ones((3, 2))))
    np.testing.assert_array_equal(new.first, MATRIX)


def test_a_container_that_stands_twice_is_shared_in_the_result() -> None:
    layer = {"w": np.ones(2)}
    model = {"a": layer, "b": layer}
    _, new = opt.update(
        opt.setup(opt.Descent(), model), model, {"a": {"w": np.ones(2)}, "b": {"w": np.ones(2)}}
    )
    np.testing.assert_allclose(new["a"]["w"], 0.8)

    assert new["a"] is new["b"]
    assert new["a"] is not layer


def test_a_tie_that_was_cut_is_noticed() -> None:
    model = same_object()
    state = opt.setup(opt.Descent(), model)
    with pytest.raises(opt.TreeMismatch, match="were one array at `setup` and are not now"):
        opt.update(state, Tied(model.first, model.first.copy()), Tied(MATRIX, MATRIX))


# -- 4. dtype follows the parameter --------------------------------------------------------------------------


WIDE = {"float16": "float32", "bfloat16": "float32"}
REAL_OF = {"complex64": "float32", "complex128": "float64"}


@every_dtype
@both_engines
@both_updates
def test_state_is_of_the_type_of_the_arithmetic(dtype: str, engine: str, step: Callable[..., Any]) -> None:
    """That is float32 at least; a mean of squares is real."""
    x = numbers(np.random.default_rng(0), (3, 4), dtype)
    state, _ = trained(opt.Adam(), x, [x] * 2, step, engine)
    wide = WIDE.get(dtype, dtype)

    assert state.state.m.dtype == wide
    assert state.state.v.dtype == REAL_OF.get(wide, wide)


@every_dtype
@both_engines
@pytest.mark.parametrize("eta", [np.float64(0.05), np.float32(0.05), np.array(0.05), 1], ids=repr)
def test_the_dtype_of_a_setting_means_nothing(dtype: str, engine: str, eta: Any) -> None:
    x = numbers(np.random.default_rng(0), (5,), dtype)
    _, new = trained(opt.Momentum(eta), x, [x] * 2, opt.update, engine)

    assert new.dtype == dtype_of(dtype)


@both_engines
@both_updates
def test_gradients_of_another_dtype_do_not_change_that_of_the_parameters(
    engine: str, step: Callable[..., Any]
) -> None:
    _, new = trained(opt.Adam(0.1), np.ones(4, np.float32), [np.ones(4, np.float64)] * 2, step, engine)

    assert new.dtype == np.float32


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("beta", [(0.9, 0.999), (0.5, 0.9999), (0.99, 0.9)], ids=repr)
@pytest.mark.parametrize("rule", [opt.Adam, opt.AdamW])
@both_engines
def test_the_first_adam_step_has_size_eta_in_single_precision(
    engine: str, rule: Callable[..., opt.Rule], beta: Any, size: float
) -> None:
    """Kingma & Ba, section 2.1: at the first step m / sqrt(v) without bias is the sign of the gradient."""
    g = (size * np.array([1.0, -0.5, 0.25, -2.0])).astype(np.float32)
    _, x = trained(rule(1.0, beta, epsilon=0.0), np.zeros(4, np.float32), [g], engine=engine)
    np.testing.assert_allclose(x, -np.sign(g), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "ulp"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
@both_engines
def test_the_first_adam_step_has_size_eta_in_half_precision(engine: str, dtype: str, ulp: float) -> None:
    """To the precision of the store: half a unit in the last place."""
    g = np.array([1.0, -0.5, 0.25, -2.0]).astype(dtype_of(dtype))
    for eta in (1e-4, 0.3, 1.0, 100.0):
        _, x = trained(opt.Adam(eta), np.zeros(4, dtype_of(dtype)), [g], engine=engine)
        np.testing.assert_allclose(x.astype(float), -eta * np.sign(g.astype(float)), rtol=ulp)


@both_engines
@both_updates
def test_a_half_precision_adam_step_of_rate_1e_4_moves_by_1e_4(engine: str, step: Callable[..., Any]) -> None:
    """85. Optimisers.jl moves the first weight by 1.26 here."""
    x = np.array([0.579, -0.729, 0.5493], np.float16)
    g = np.array([-0.001497, 0.0001875, -0.013176], np.float16)
    _, new = trained(opt.Adam(1e-4), x, [g], step, engine)
    exact = x.astype(float) - 1e-4 * g.astype(float) / (np.abs(g.astype(float)) + 1e-8)
    unit = np.spacing(np.abs(x)).astype(float)

    assert (np.abs(new.astype(float) - exact) <= 0.5001 * unit).all()


@both_engines
def test_half_precision_is_rounded_once_at_the_store(engine: str) -> None:
    """dx + lam x is 120000, beyond the largest float16 (65504); the new value 59880 is not, and lies nearest
    59872.
    """
    x = np.full(3, 60000, np.float16)
    _, new = trained(opt.Chain(opt.WeightDecay(1.0), opt.Descent(1e-3)), x, [x], engine=engine)
    np.testing.assert_array_equal(new, np.float16(59872))


@both_engines
def test_sums_in_half_precision_lose_nothing(engine: str) -> None:
    """4096 gradients of 1/4096 of a unit sum to one; in float16 arithmetic the sum would stop at 1/2."""
    rule = opt.Chain(opt.AccumGrad(4096), opt.Descent(1.0))
    g = np.full(2, 2.0**-12, np.float16)
    state = opt.setup(rule, x := np.zeros(2, np.float16), engine=engine)
    for _ in range(4095):
        state, x = opt.update_(state, x, g)
    np.testing.assert_array_equal(state.state[0].sum, 4095 * 2.0**-12)


@both_engines
def test_bias_correction_keeps_its_digits_over_a_thousand_steps(engine: str) -> None:
    """With a constant gradient every step of Adam is eta sign(g), whatever t is."""
    state = opt.setup(opt.Adam(1e-3, epsilon=0.0), x := np.zeros(2, np.float64), engine=engine)
    for _ in range(1000):
        state, x = opt.update_(state, x, np.array([3.0, -0.1]))
    np.testing.assert_allclose(x, [-1.0, 1.0], rtol=1e-12)


# -- 5. no step is not a zero step ---------------------------------------------------------------------------


@both_engines
@both_updates
def test_accumulation_steps_by_the_mean_at_every_nth_update(engine: str, step: Callable[..., Any]) -> None:
    model = np.zeros(2)
    state = opt.setup(opt.Chain(opt.AccumGrad(3), opt.Descent(1.0)), model, engine=engine)
    seen = []
    for g in (1.0, 2.0, 6.0, 10.0, 20.0, 30.0, 5.0):
        state, model = step(state, model, np.full(2, g))
        seen.append(float(model[0]))

    assert seen == [0, 0, -3, -3, -3, -23, -23]


@both_engines
@both_updates
def test_decay_behind_an_accumulation_is_seen_once(engine: str, step: Callable[..., Any]) -> None:
    """107. Documentation of Optimisers.jl, AccumGrad."""
    model = {"x": np.ones(1), "y": np.ones(1) * 2}
    rule = opt.Chain(opt.AccumGrad(2), opt.WeightDecay(0.01), opt.Descent(0.1))
    state = opt.setup(rule, model, engine=engine)
    state, model = step(state, model, {"x": np.array([33.0]), "y": np.array([0.0])})
    state, model = step(state, model, {"x": np.array([0.0]), "y": np.array([444.0])})
    np.testing.assert_allclose(model["x"], 1 - 0.1 * (16.5 + 0.01))
    np.testing.assert_allclose(model["y"], 2 - 0.1 * (222 + 0.02))


@both_engines
@both_updates
def test_rules_behind_a_condition_that_fails_keep_their_state(engine: str, step: Callable[..., Any]) -> None:
    model = np.ones(2)
    state = opt.setup(opt.Chain(EverySecond(1.0), opt.WeightDecay(0.5), opt.Adam()), model, engine=engine)
    for n in range(1, 6):
        state, model = step(state, model, np.ones(2))
        steps = n // 2
        np.testing.assert_allclose(state.state[2].weight[0], 1 - 0.9**steps, rtol=1e-12)

        assert state.state[0] == n % 2


@both_engines
@both_updates
def test_the_condition_is_asked_for_each_array_alone(engine: str, step: Callable[..., Any]) -> None:
    class LongOnly(opt.Rule):
        """Counts, and steps where the gradient is longer than 1."""

        def init(self, x: Any) -> Any:
            return (opt.zeros_like(x), 0)

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return (state[0] + dx, state[1] + 1), opt.when(opt.norm(dx) > 1, dx)

    model = [np.zeros(3), np.zeros(3), np.zeros(2), np.zeros(5)]
    state = opt.setup(opt.Chain(LongOnly(), opt.Momentum(1.0, 0.5)), model, engine=engine)
    long, short = 2.0, 0.1
    for sizes in ((long, short, long, short), (long, long, short, short)):
        state, model = step(state, model, [np.full(x.shape, s) for x, s in zip(model, sizes, strict=True)])
    np.testing.assert_allclose([x[0] for x in model], [-5, -2, -2, 0])  # a: 2, then 0.5 * 2 + 2
    np.testing.assert_allclose([leaf.state[1].v[0] for leaf in state], [3, 2, 2, 0])
    np.testing.assert_allclose([leaf.state[0][0][0] for leaf in state], [4, 2.1, 2.1, 0.2])

    assert [leaf.state[0][1] for leaf in state] == [2, 2, 2, 2]


@both_engines
@both_updates
def test_what_is_not_stepped_is_not_touched_by_nan(engine: str, step: Callable[..., Any]) -> None:
    class Careful(opt.Rule):
        """Steps by finite gradients only."""

        def init(self, x: Any) -> Any:
            return ()

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, opt.when(opt.ops.isfinite(opt.ops.sum(dx)), dx)

    model = [np.ones(2), np.ones(2)]
    state = opt.setup(opt.Chain(Careful(), opt.Momentum(1.0)), model, engine=engine)
    state, model = step(state, model, [np.array([np.nan, 1]), np.ones(2)])
    np.testing.assert_array_equal(model[0], 1)
    np.testing.assert_array_equal(state[0].state[1].v, 0)
    np.testing.assert_array_equal(model[1], 0)


@both_engines
def test_a_check_behind_a_condition_that_fails_does_not_raise(engine: str) -> None:
    model = np.ones(2)
    state = opt.setup(opt.Chain(opt.AccumGrad(2), opt.ClipNorm(1.0), opt.Descent()), model, engine=engine)
    state, model = opt.update_(state, model, np.array([np.inf, 0]))
    np.testing.assert_array_equal(model, 1)
    with pytest.raises(opt.DomainError, match="gradient has 2-norm inf"):
        opt.update_(state, model, np.zeros(2))


@both_engines
def test_conditions_may_be_nested(engine: str) -> None:
    rule = opt.Chain(opt.AccumGrad(2), opt.AccumGrad(3), opt.Descent(1.0))
    state = opt.setup(rule, x := np.zeros(1), engine=engine)
    seen = []
    for g in range(1, 13):
        state, x = opt.update_(state, x, np.array([float(g)]))
        seen.append(float(x[0]))

    assert seen == [0] * 5 + [-3.5] * 6 + [-3.5 - 9.5]


def test_when_answers_none_or_the_step_for_plain_numbers() -> None:
    assert opt.when(condition=True, dx=3.0) == 3.0
    assert opt.when(condition=False, dx=3.0) is None


@both_engines
@both_updates
def test_a_rule_may_answer_none(engine: str, step: Callable[..., Any]) -> None:
    class Never(opt.Rule):
        def init(self, x: Any) -> Any:
            return 0

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state + 1, None

    state, model = trained(opt.Chain(Never(), opt.Momentum()), np.ones(2), [np.ones(2)] * 3, step, engine)
    np.testing.assert_array_equal(model, 1)
    np.testing.assert_array_equal(state.state[1].v, 0)

    assert state.state[0] == 3


# -- 6. total ------------------------------------------------------------------------------------------------


class Shortened(opt.Rule):
    """The line of the design: scales by the global norm."""

    omega: float = 1.0

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, dx * opt.minimum(1, self.omega / opt.sqrt(opt.total(opt.ops.sum(opt.abs2(dx)))))


def mixed_model() -> dict[str, Any]:
    return {
        "a": np.zeros(3, np.float32),
        "b": np.zeros((2, 2), np.float64),
        "c": np.zeros(2, np.complex128),
        "d": np.zeros(4, np.float16),
        "e": np.zeros(5, np.float32),
    }


MIXED_GRADIENTS = {
    "a": np.array([3, 0, 4], np.float32),
    "b": np.array([[1.0, 2.0], [2.0, 4.0]]),
    "c": np.array([3 + 4j, 12j]),
    "d": np.array([1, 1, 1, 1], np.float16),
    "e": np.full(5, 2, np.float32),
}
SQUARES = {"a": 25.0, "b": 25.0, "c": 169.0, "d": 4.0, "e": 20.0}


def factor(names: str, omega: float = 1.0) -> float:
    return omega / math.sqrt(sum(SQUARES[n] for n in names))


def stepped_by(model: dict[str, Any], factors: dict[str, float]) -> None:
    for key, x in model.items():
        np.testing.assert_allclose(x, -factors[key] * MIXED_GRADIENTS[key], rtol=2e-3 if key == "d" else 1e-6)


@both_engines
@both_updates
@pytest.mark.parametrize("clip", [opt.ClipGlobalNorm(1.0), Shortened(1.0)], ids=lambda r: type(r).__name__)
def test_a_total_goes_over_groups_of_every_type(
    engine: str, step: Callable[..., Any], clip: opt.Rule
) -> None:
    _, model = trained(opt.Chain(clip, opt.Descent(1.0)), mixed_model(), [MIXED_GRADIENTS], step, engine)
    stepped_by(model, dict.fromkeys("abcde", factor("abcde")))


@both_engines
@both_updates
def test_a_total_goes_over_all_rules_that_ask_for_it(engine: str, step: Callable[..., Any]) -> None:
    clip = opt.ClipGlobalNorm(1.0)
    rules = {
        "a": opt.Chain(clip, opt.Descent(1.0)),
        "b": opt.Chain(opt.Chain(clip), opt.Momentum(1.0)),
        "c": opt.Chain(opt.ClipGlobalNorm(2.0), opt.WeightDecay(0.5), opt.Descent(1.0)),
        "**": opt.Descent(1.0),
    }
    _, model = trained(rules, mixed_model(), [MIXED_GRADIENTS], step, engine)
    stepped_by(model, {"a": factor("abc"), "b": factor("abc"), "c": factor("abc", 2.0), "d": 1, "e": 1})


@both_engines
@both_updates
def test_a_total_goes_over_the_leaves_stepped_together_alone(engine: str, step: Callable[..., Any]) -> None:
    model = mixed_model()
    state = opt.setup(opt.Chain(opt.ClipGlobalNorm(1.0), opt.Descent(1.0)), model, engine=engine)
    opt.freeze_(state.a)
    state, model = step(state, model, MIXED_GRADIENTS | {"b": None})
    stepped_by(model, dict.fromkeys("cde", factor("cde")) | {"a": 0, "b": 0})


def test_a_total_goes_over_the_part_that_is_updated() -> None:
    model = {"left": {"a": np.zeros(3)}, "right": {"b": np.zeros(3)}}
    state = opt.setup(opt.Chain(opt.ClipGlobalNorm(1.0), opt.Descent(1.0)), model)
    _, left = opt.update_(state.left, model["left"], {"a": np.array([3.0, 0, 4])})
    np.testing.assert_allclose(left["a"], [-0.6, 0, -0.8])


@both_engines
@both_updates
def test_a_tie_counts_once_in_a_total_with_its_summed_gradient(engine: str, step: Callable[..., Any]) -> None:
    x = np.zeros(2)
    model = {"a": x, "b": x, "c": np.zeros(1)}
    grads = {"a": np.array([1.0, 0]), "b": np.array([2.0, 4]), "c": np.array([12.0])}
    _, new = trained(opt.Chain(opt.ClipGlobalNorm(1.0), opt.Descent(1.0)), model, [grads], step, engine)
    np.testing.assert_allclose(new["a"], np.array([-3.0, -4.0]) / 13)
    np.testing.assert_allclose(new["c"], -12 / 13)


@both_engines
@both_updates
def test_only_arrays_whose_condition_holds_count_in_a_total(engine: str, step: Callable[..., Any]) -> None:
    rule = opt.Chain(EverySecond(1.0), opt.ClipGlobalNorm(1.0), opt.Descent(1.0))
    model = {"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2)}
    state = opt.setup(rule, model, engine=engine)
    g = np.array([3.0, 4.0])
    state, model = step(state, model, {"a": g, "b": g, "c": None})
    state, model = step(state, model, {"a": g, "b": None, "c": g})  # a steps alone
    np.testing.assert_allclose(model["a"], [-0.6, -0.8])
    state, model = step(state, model, {"a": None, "b": g, "c": 2 * g})  # b and c step
    np.testing.assert_allclose(model["b"], -g / math.sqrt(25 + 100))
    np.testing.assert_allclose(model["c"], -2 * g / math.sqrt(25 + 100))


@both_engines
def test_totals_may_depend_on_totals(engine: str) -> None:
    class Centred(opt.Rule):
        """Takes the mean of all gradients away, then scales by the global norm of what is left."""

        def init(self, x: Any) -> Any:
            return ()

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            mean = opt.total(opt.ops.sum(dx)) / opt.total(dx.size)
            return state, (dx - mean) / opt.sqrt(opt.total(opt.ops.sum(opt.abs2(dx - mean))))

    model = [np.zeros(2), np.zeros(1), np.zeros(3, np.float32)]
    grads = [np.array([1.0, 2]), np.array([3.0]), np.array([4, 5, 9], np.float32)]
    _, new = trained(Centred(), model, [grads], engine=engine)
    flat = np.concatenate(grads)
    centred = flat - flat.mean()
    np.testing.assert_allclose(np.concatenate(new), -centred / np.linalg.norm(centred), rtol=1e-6)


def test_the_total_of_a_plain_number_is_the_number() -> None:
    assert opt.total(3.5) == 3.5


@both_engines
def test_zero_gradients_have_norm_zero_and_pass_a_clip(engine: str) -> None:
    rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.ClipNorm(1.0), opt.Descent())
    _, new = trained(rule, [np.ones(2), np.ones((0, 3))], [[np.zeros(2), np.ones((0, 3))]], engine=engine)
    np.testing.assert_array_equal(new[0], 1)


# -- 7. one clock, counters of one's own, no recompilation ---------------------------------------------------


def by_clock(clock: Any) -> Any:
    """1, 2, 4, 8, ...: the sum of the rates tells which clocks were seen."""
    return 2.0**clock


@both_engines
@both_updates
def test_a_schedule_reads_the_clock_which_starts_at_zero(engine: str, step: Callable[..., Any]) -> None:
    _, x = trained(opt.Descent(by_clock), np.zeros(2), [np.ones(2)] * 5, step, engine)
    np.testing.assert_array_equal(x, -(1 + 2 + 4 + 8 + 16))


@both_engines
@both_updates
def test_the_clock_is_one_for_all_and_goes_on_for_skipped_leaves(
    engine: str, step: Callable[..., Any]
) -> None:
    model = two(0.0)
    state = opt.setup(opt.Descent(by_clock), model, engine=engine)
    ones = two()
    state, model = step(state, model, ones)
    state, model = step(state, model, {"a": np.ones(2), "b": None})
    opt.freeze_(state.a)
    state, model = step(state, model, ones)
    opt.thaw_(state.a)
    state, model = step(state, model, ones)
    np.testing.assert_array_equal(model["a"], -(1 + 2 + 8))
    np.testing.assert_array_equal(model["b"], -(1 + 4 + 8))


def test_the_clock_of_a_leaf_ticks_for_updates_that_cover_it() -> None:
    model = {"a": {"x": np.zeros(2)}, "b": np.zeros(2), "c": np.zeros(2)}
    state = opt.setup(opt.Descent(by_clock), model)
    opt.update_(state.a, model["a"], {"x": np.ones(2)})
    opt.update_(state.b, model["b"], np.ones(2))
    opt.update_(state, model, {"a": None, "b": np.ones(2), "c": np.ones(2)})
    np.testing.assert_array_equal(model["a"]["x"], -1)
    np.testing.assert_array_equal(model["b"], -(1 + 2))
    np.testing.assert_array_equal(model["c"], -1)

    assert opt.explain(state).clock == 2
    assert opt.explain(state.c).clock == 1


@both_engines
@both_updates
def test_every_leaf_counts_its_own_steps(engine: str, step: Callable[..., Any]) -> None:
    model = {k: np.zeros(2) for k in "abc"}
    state = opt.setup(
        {"a": DecayDescent(1.0), "**": opt.Chain(opt.AccumGrad(2), DecayDescent(1.0))}, model, engine=engine
    )
    g = np.ones(2)
    for grads in ({"a": g, "b": g, "c": None}, {"a": None, "b": g, "c": g}, {"a": g, "b": g, "c": g}):
        state, model = step(state, model, grads)

    assert state.a.state == 3
    assert (state.b.state[0].taken, state.b.state[1]) == (1, 2)
    assert (state.c.state[0].taken, state.c.state[1]) == (1, 2)  # the second update closed its window too
    np.testing.assert_allclose(model["a"], -1 - 1 / math.sqrt(2))


@both_engines
@both_updates
def test_leaves_that_parted_and_met_again_step_by_their_own_numbers(
    engine: str, step: Callable[..., Any]
) -> None:
    """Rows of one table are split and joined on the way; nobody may notice."""
    rng = np.random.default_rng(5)
    model = {k: np.zeros(3) for k in "abcde"}
    state = opt.setup(opt.Adam(0.1), model, engine=engine)
    given: dict[str, list[Any]] = {k: [] for k in model}
    for n in range(8):
        grads: dict[str, Any] = {
            k: rng.standard_normal(3) if (n + i) % 3 else None for i, k in enumerate(model)
        }
        for k, g in grads.items():
            given[k] += [] if g is None else [g]
        state, model = step(state, model, grads)
    for k, x in model.items():
        wanted, (_m, _v, weight) = directly(opt.Adam(0.1), np.zeros(3), given[k])
        np.testing.assert_allclose(x, wanted, rtol=1e-12)
        np.testing.assert_allclose(state[k].state.weight, weight, rtol=1e-12)


def test_adjusting_beta_keeps_the_weights_gathered_so_far() -> None:
    """131. The bias is corrected by what was summed, not by a power of the new beta."""
    state, x = trained(opt.Adam(0.1), np.zeros(2), [np.ones(2)] * 2)
    opt.adjust_(state, beta=(0.5, 0.5))
    state, x = opt.update(state, x, np.ones(2))
    np.testing.assert_allclose(state.state.weight, (0.5 * 0.19 + 0.5, 0.5 * (1 - 0.999**2) + 0.5))


def test_adjust_keeps_the_momentum() -> None:
    """122. Documentation of Optimisers.jl, adjust!: Nesterov keeps its state."""
    model = {"vec": np.array([1.0, 2.0])}
    state = opt.setup(opt.Nesterov(), model)
    state, model = opt.update(state, model, {"vec": np.array([16.0, 88.0])})
    opt.adjust_(state, 0.123)
    np.testing.assert_allclose(state.vec.state.v, [-0.016, -0.088])

    assert state.vec.rule == opt.Nesterov(0.123)


def compiled() -> int:
    """How many kernels were compiled and are there."""
    return len(cache._loaded)


def test_nothing_is_compiled_after_the_first_step_whatever_is_adjusted() -> None:
    """179. Rates, other numbers, schedules; on all leaves and on one."""
    model = {k: np.ones(3, np.float32) for k in "abc"}
    rule = opt.Chain(
        opt.WeightDecay(0.5), opt.ClipGlobalNorm(1.0), opt.AdamW(opt.Linear(0.1, 0.0, 10), lam=0.1)
    )
    state = opt.setup(rule, model)
    grads = {k: np.ones(3, np.float32) for k in "abc"}
    state, model = opt.update_(state, model, grads)
    before = compiled()
    for n in range(4):
        opt.adjust_(state, lam=0.01 * n)
        opt.adjust_(state.a, omega=1.0 + n, beta=(0.5, 0.6))
        opt.adjust_(state, opt.Linear(0.2, 0.01 * n, 5 + n), where="b")
        state, model = opt.update_(state, model, grads | {"c": None if n % 2 else grads["c"]})
        opt.freeze_(state.b) if n % 2 else opt.thaw_(state.b)

    assert compiled() == before


WAVE: Any = opt.Cosine(0.1, 5)


@pytest.mark.parametrize(
    "rule", [opt.RAdam(), opt.NAdam(), opt.Chain(opt.AccumGrad(3), opt.Adam()), opt.Adam(WAVE)], ids=repr
)
@both_updates
def test_a_count_of_steps_compiles_nothing(rule: opt.Rule, step: Callable[..., Any]) -> None:
    """180. Nor does the fifth step of RAdam, which is the first one that is rectified."""
    model = np.ones(3, np.float32)
    state = opt.setup(rule, model)
    for _ in range(3 if "AccumGrad" in repr(rule) else 1):
        state, model = step(state, model, np.ones(3, np.float32))
    before = compiled()
    for _ in range(9):
        state, model = step(state, model, np.ones(3, np.float32))

    assert compiled() == before
    assert {g.engine for g in opt.explain(state).groups} == {"numba"}


def test_exchanging_a_number_for_a_schedule_compiles_nothing() -> None:
    model = np.ones(3, np.float32)
    state = opt.setup(opt.Momentum(0.75, 0.5), model)
    state, model = opt.update_(state, model, model.copy())
    before = compiled()
    opt.adjust_(state, opt.Linear(0.5, 0.1, 7))
    state, model = opt.update_(state, model, model.copy())
    opt.adjust_(state, by_clock)
    state, model = opt.update_(state, model, model.copy())
    opt.adjust_(state, 0.01)
    state, model = opt.update_(state, model, model.copy())

    assert compiled() == before


def test_arrays_of_other_shapes_use_the_same_kernels() -> None:
    rule = opt.Chain(opt.ClipNorm(2.0), opt.Momentum(0.3))
    trained(rule, np.ones(3, np.float32), [np.ones(3, np.float32)], opt.update_)
    before = compiled()
    for shape in ((), (0,), (2, 3), (1, 1, 70000)):
        trained(rule, np.ones(shape, np.float32), [np.ones(shape, np.float32)] * 2, opt.update_)

    assert compiled() == before


@both_engines
def test_adjust_reaches_the_next_step(engine: str) -> None:
    """179. By any engine."""
    model = two(0.0)
    state = opt.setup(opt.Descent(1.0), model, engine=engine)
    state, model = opt.update_(state, model, two())
    opt.adjust_(state.b, 0.5)
    state, model = opt.update_(state, model, two())
    np.testing.assert_array_equal(model["a"], -2)
    np.testing.assert_array_equal(model["b"], -1.5)


# -- 8. nothing is ignored in silence ------------------------------------------------------------------------

MODEL = {"layers": [{"w": np.ones((2, 3))}], "b": np.ones(3)}


def changed(**other: Any) -> dict[str, Any]:
    return {"layers": [{"w": np.ones((2, 3))}], "b": np.ones(3)} | other


def updated(grads: Any, model: Any = None) -> Any:
    return lambda: opt.update_(opt.setup(opt.Adam(), changed()), changed() if model is None else model, grads)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an unknown setting": (
        lambda: opt.adjust_(opt.setup(opt.Adam(), MODEL), lr=0.1),
        opt.UnknownField,
        "no setting lr",
    ),
    "a selector that matches nothing": (
        lambda: opt.adjust_(opt.setup(opt.Adam(), MODEL), 0.1, where="**.bias"),
        opt.NoMatch,
        r"\*\*\.bias.*layers\.0\.w, b",
    ),
    "a glob of setup that matches nothing": (
        lambda: opt.setup({"**.bias": opt.Adam(), "**": opt.Descent()}, MODEL),
        opt.NoMatch,
        r"'\*\*\.bias'",
    ),
    "a parameter without a rule": (
        lambda: opt.setup({"b": opt.Adam()}, MODEL),
        opt.NoMatch,
        r"model\['layers'\]\[0\]\['w'\]",
    ),
    "missing gradients": (
        lambda: opt.update(opt.setup(opt.Adam(), MODEL), MODEL),
        opt.BadState,
        "gradients are missing",
    ),
    "a rule where the state goes": (
        lambda: opt.update(opt.Adam(), MODEL, MODEL),
        opt.BadState,
        r"the rule Adam\(",
    ),
    "a model where the state goes": (lambda: opt.freeze_(MODEL), opt.BadState, "state"),
    "a state where the model goes": (
        lambda: opt.setup(opt.Adam(), opt.setup(opt.Adam(), MODEL)),
        opt.BadState,
        "state where the model goes",
    ),
    "another structure": (
        updated({"layers": [{"w": np.ones((2, 3))}]}),
        opt.TreeMismatch,
        "grads has no 'b'",
    ),
    "a gradient too much": (updated(changed(c=np.ones(3))), opt.TreeMismatch, "grads has 'c'"),
    "another shape": (
        updated(changed(layers=[{"w": np.ones((3, 2))}])),
        opt.TreeMismatch,
        r"shape \(3, 2\) for .* shape \(2, 3\), at grads\['layers'\]\[0\]\['w'\]",
    ),
    "a shape that would broadcast": (
        updated(changed(b=np.ones(()))),
        opt.TreeMismatch,
        r"shape \(\) for .* shape \(3,\), at grads\['b'\]",
    ),
    "a float for an array": (updated(changed(b=1.0)), opt.TreeMismatch, r"grads\['b'\] is .* 1\.0"),
    "a list for an array": (updated(changed(b=[1.0, 2.0, 3.0])), opt.TreeMismatch, r"grads\['b'\] is .*list"),
    "a complex gradient for real parameters": (
        updated(changed(b=np.ones(3, complex))),
        opt.TreeMismatch,
        r"grads\['b'\] is complex",
    ),
    "text for numbers": (updated(changed(b=np.array(list("abc")))), opt.TreeMismatch, r"grads\['b'\]"),
    "another model": (
        updated(changed(), changed(b=np.ones(4))),
        opt.TreeMismatch,
        r"model\['b'\] has shape \(4,\).*\(3,\)",
    ),
    "another dtype": (
        updated(changed(), changed(b=np.ones(3, np.float32))),
        opt.TreeMismatch,
        r"model\['b'\] has type float32.*float64",
    ),
    "a negative rate": (lambda: opt.Descent(-0.1), opt.BadSetting, "negative"),
    "a number for a pair": (lambda: opt.Adam(beta=0.9), opt.BadSetting, r"Adam\.beta is 0\.9"),
    "text for a number": (lambda: opt.Adam("0.1"), opt.BadSetting, r"Adam\.eta is '0\.1'"),
    "a fraction for a count": (lambda: opt.AccumGrad(2.5), opt.BadSetting, "whole number"),
    "no accumulation": (lambda: opt.AccumGrad(0), opt.BadSetting, "1 or more"),
    "a branch on an array": (
        lambda: opt.setup(Branching(), MODEL),
        opt.TraceError,
        r"`where\(condition, a, b\)`",
    ),
    "an engine nobody knows": (
        lambda: opt.setup(opt.Adam(), MODEL, engine="cuda"),
        opt.BadSetting,
        "engine='cuda'",
    ),
}


class Branching(opt.Rule):
    """A rule that cannot be traced."""

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, dx if opt.ops.sum(dx) > 0 else x


@pytest.mark.parametrize("what", WRONG)
def test_an_error_says_where_and_what(what: str) -> None:
    call, error, text = WRONG[what]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("p", [-math.inf, -1.0, 0.5, 1.0, 2.0, 3.0, math.inf])
@both_engines
def test_a_nan_norm_raises_and_names_the_leaf(p: float, engine: str) -> None:
    """101, 181. Compiled or not; compiled clips are silent there."""
    model = {"a": np.ones(2), "b": np.ones(2)}
    state = opt.setup(opt.Chain(opt.ClipNorm(1.0, p), opt.Descent()), model, engine=engine)
    with pytest.raises(opt.DomainError, match=rf"gradient has {p:g}-norm nan; .*, at grads\['b'\]"):
        opt.update_(state, model, {"a": np.ones(2), "b": np.array([1, np.nan])})


@both_engines
def test_a_norm_that_may_pass_spreads(engine: str) -> None:
    """102. 0 * inf is NaN, the finite elements do not move."""
    rule = opt.Chain(opt.ClipNorm(1.0, throw=False), opt.Descent(1.0))
    _, x = trained(rule, np.zeros(3), [np.array([1, 10, np.inf])], engine=engine)
    np.testing.assert_array_equal(x, [0, 0, np.nan])


def test_a_float_in_a_model_is_pointed_out() -> None:
    with pytest.warns(opt.FloatParameter, match=r"model\['scale'\] is .* 2\.0"):
        opt.setup(opt.Adam(), {"w": np.ones(2), "scale": 2.0})


def test_a_model_without_parameters_is_pointed_out() -> None:
    with pytest.warns(opt.NoParameters, match="nothing will be trained"):
        opt.setup(opt.Adam(), {"n": np.arange(3)})


# -- 9. same numbers everywhere ------------------------------------------------------------------------------


@NARROW_BY_TURNS
def test_the_fused_engine_agrees_with_the_interpreter_and_both_keep_the_dtype(row: Row, dtype: str) -> None:
    model, gradients = arrays_of(row, dtype), gradients_of(row, dtype, 3)
    _, interpreted = trained(row.rule, model, gradients, opt.update_, "interpret")
    state, got = trained(row.rule, model, gradients, opt.update_)

    assert {g.engine for g in opt.explain(state).groups} == {row.engine_for(dtype)}
    assert [close(a, b, dtype) for a, b in zip(got, interpreted, strict=True)] == [True] * len(model)
    assert {x.dtype for x in (*got, *interpreted)} == {dtype_of(dtype)}


@PAIRS
@both_engines
def test_update_equals_update_in_place_and_a_second_run_exactly(row: Row, dtype: str, engine: str) -> None:
    model, gradients = arrays_of(row, dtype), gradients_of(row, dtype)
    state, inplace = trained(row.rule, model, gradients, opt.update_, engine)
    for step in (opt.update, opt.update_):
        other, again = trained(row.rule, model, gradients, step, engine)

        assert [bits(x) for x in again] == [bits(x) for x in inplace]
        assert snapshot(other) == snapshot(state)


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
@both_updates
def test_the_number_of_threads_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: str, step: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(0)
    sizes = (700_001, 3, 65_536, 65_537, 400_000, 0)
    model, grads = ([numbers(rng, (n,), dtype) for n in sizes] for _ in range(2))
    rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.ClipNorm(0.5), opt.AdamW(0.1, lam=0.1))
    found = []
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(threads, "available", lambda count=count: count)
        state, new = trained(rule, model, [grads] * 2, step, "numba")
        found.append(([bits(x) for x in new], snapshot(state)))

    assert [f == found[0] for f in found] == [True] * 4


def test_several_threads_do_work_on_a_large_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would compare one thread with itself."""
    counts = []

    def seen(count: int, grow: Callable[..., Any] = threads._pool.grow) -> Any:
        counts.append(count)
        return grow(count)

    monkeypatch.setattr(threads, "available", lambda: 3)
    monkeypatch.setattr(threads._pool, "grow", seen)
    x = np.ones(1_200_000, np.float32)
    trained(opt.Descent(), x, [x], opt.update_, "numba")

    assert counts == [2]


@both_engines
def test_a_model_in_one_piece_equals_the_model_in_many(engine: str) -> None:
    """Elementwise rules give the same bits wherever an element stands: in one array or in many small ones."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal(1003).astype(np.float32), rng.standard_normal(1003).astype(np.float32)
    _, whole = trained(opt.Adam(0.1), x, [g] * 3, opt.update_, engine)
    cuts = [1, 2, 100, 101, 517]
    _, parts = trained(opt.Adam(0.1), np.split(x, cuts), [np.split(g, cuts)] * 3, opt.update_, engine)
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=3e-7)


# -- 10. a step that raises has changed nothing --------------------------------------------------------------


def fails(x: Any) -> Any:
    """Raises where an array has five elements."""
    if x.size == 5:
        raise RuntimeError("the library failed")
    return x


class Calls(opt.Rule):
    """Descent whose gradient goes through a function of the library, which fails at arrays of five
    elements.
    """

    eta: float = 0.1

    def init(self, x: Any) -> Any:
        return (opt.zeros_like(x), 0)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return (state[0] + dx, state[1] + 1), self.eta * opt.ops.call(fails, dx) + 0 * x


def failing_model() -> dict[str, Any]:
    """Several groups; the last leaf of the last one is where it fails."""
    return {
        "a": np.ones(3),
        "b": np.ones((2, 3), np.float32),
        "c": np.ones(7, np.complex64),
        "d": [np.ones(4), np.ones(4)],
        "z": np.ones(5),
    }


def good_gradients() -> dict[str, Any]:
    return {
        "a": np.full(3, 0.5),
        "b": np.full((2, 3), 0.5, np.float32),
        "c": np.full(7, 0.5j, np.complex64),
        "d": [np.full(4, 0.25), np.full(4, 0.5)],
        "z": np.full(5, 0.5),
    }


def nan_gradient() -> Any:
    return np.array([1, 1, 1, 1, np.nan])


FAILURES: dict[str, tuple[opt.Rule, Any, type[Exception]]] = {
    "a NaN norm in the last leaf": (
        opt.Chain(opt.ClipNorm(1.0), opt.Adam(0.1)),
        nan_gradient,
        opt.DomainError,
    ),
    "a NaN global norm": (
        opt.Chain(opt.ClipGlobalNorm(1.0), opt.Momentum(0.1)),
        nan_gradient,
        opt.DomainError,
    ),
    "a wrong shape in the last leaf": (opt.Adam(0.1), lambda: np.ones((5, 1)), opt.TreeMismatch),
    "a list in the last leaf": (opt.Adam(0.1), lambda: [1.0] * 5, opt.TreeMismatch),
    "a wrong type in the last leaf": (opt.Adam(0.1), lambda: np.ones(5, complex), opt.TreeMismatch),
    "a function that raises at the last leaf": (
        opt.Chain(Calls(), opt.Adam()),
        lambda: np.ones(5),
        RuntimeError,
    ),
    "a norm behind an accumulation": (
        opt.Chain(opt.AccumGrad(1), opt.ClipNorm(1.0), opt.Adam(0.1)),
        nan_gradient,
        opt.DomainError,
    ),
}


@pytest.mark.parametrize("what", FAILURES)
@both_engines
@both_updates
def test_a_step_that_raises_has_changed_nothing(what: str, engine: str, step: Callable[..., Any]) -> None:
    rule, bad, error = FAILURES[what]
    model = failing_model()
    state = opt.setup(rule, model, engine=engine)
    if rule != FAILURES["a function that raises at the last leaf"][0]:
        state, model = step(state, model, good_gradients())
    before = snapshot(state), [bits(x) for x in opt.trainables(model)]
    for _ in range(2):
        with pytest.raises(error):
            step(state, model, good_gradients() | {"z": bad()})

        assert (snapshot(state), [bits(x) for x in opt.trainables(model)]) == before


@pytest.mark.parametrize("what", FAILURES)
@both_engines
@both_updates
def test_training_goes_on_after_a_failed_step_as_if_it_had_not_been(
    what: str, engine: str, step: Callable[..., Any]
) -> None:
    rule, bad, error = FAILURES[what]
    good = good_gradients() if error is not RuntimeError else good_gradients() | {"z": None}
    plain_state, plain = trained(rule, failing_model(), [good] * 3, step, engine)
    model = failing_model()
    state = opt.setup(rule, model, engine=engine)
    for _ in range(3):
        with pytest.raises(error):
            step(state, model, good | {"z": bad()})
        state, model = step(state, model, good)

    assert [bits(x) for x in opt.trainables(model)] == [bits(x) for x in opt.trainables(plain)]
    assert snapshot(state) == snapshot(plain_state)


@both_engines
def test_an_adjustment_that_raises_has_changed_nothing(engine: str) -> None:
    model = {"a": np.ones(2), "b": np.ones(2)}
    state = opt.setup({"a": opt.Descent(), "b": opt.Adam()}, model, engine=engine)
    before = snapshot(state)
    with pytest.raises(opt.BadSetting):
        opt.adjust_(state, 0.5, beta=(0.9, 1.5))

    assert snapshot(state) == before


@both_engines
def test_a_failed_step_leaves_no_tie_half_stepped(engine: str) -> None:
    x = np.ones(4)
    model = {"a": x, "b": x, "z": np.ones(5)}
    state = opt.setup(opt.Chain(opt.ClipNorm(1.0), opt.Momentum()), model, engine=engine)
    before = snapshot(state)
    with pytest.raises(opt.DomainError):
        opt.update_(state, model, {"a": np.ones(4), "b": np.ones(4), "z": nan_gradient()})
    np.testing.assert_array_equal(x, 1)

    assert snapshot(state) == before
