"""Do states go through edits, gaps and types alike in every library, by every engine, in place or not?

Each story is told by the interpreter of NumPy too, and ends there as it does everywhere else.
"""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.table import dtype_of, numbers
from tests.worlds import (
    RULES,
    SCHEDULES,
    WORLDS,
    World,
    by_engine,
    leaves,
    plain_model,
    same_story,
    with_none,
    worlds,
    worlds_with,
)

everywhere = worlds(*WORLDS)
where_arrays_are_written = worlds(*(w for w in WORLDS if w.writable))
on_the_host = worlds(*(w for w in WORLDS if not w.capturable))
IN_PLACE = [w for w in WORLDS if w.step is opt.update_]
"""For stories that take both kinds of steps."""

HALVES = [dict([*RULES.items()][n::2]) for n in range(2)]
"""Of the rules: every set of leaves that step together is a program that XLA compiles, so there each of two
stories about such sets is told of one half.
"""


def told_of(half: int) -> Callable[[Any], Any]:
    """Every rule in every world, and under JAX those of one half."""
    order = WORLDS[
        :: 1 - 2 * half
    ]  # numbers that are on the host in one story are on the device in the other
    host = worlds_with("rule", RULES, *by_engine([w for w in order if w.library != "jax"]))
    traced = worlds_with("rule", HALVES[half], *by_engine([w for w in order if w.library == "jax"]))
    return pytest.mark.parametrize(host.args[0], [*host.args[1], *traced.args[1]])


# -- gaps and edits ------------------------------------------------------------------------------------------


@told_of(0)
def test_leaves_without_gradient_take_no_step(world: World, rule: opt.Rule) -> None:
    """Their rows of scalars part from the others, and the branches of a rule come to differ by leaf."""

    def story(world: World) -> Any:
        model = world.model()
        state = world.setup(rule, model)
        for n, without in enumerate(["b", "", "ad", "abcde", "be"]):
            state, model = world.step(state, model, with_none(world.model(seed=n + 1), without))
        return state, model

    same_story(story, world)


@told_of(1)
def test_frozen_leaves_take_no_step(world: World, rule: opt.Rule) -> None:
    def story(world: World) -> Any:
        model = world.model()
        state = world.setup(rule, model)
        opt.freeze_(state.b)
        state, model = world.step(state, model, world.model(seed=1))
        state = opt.freeze(opt.thaw(state), ["a", "d"])
        for n in range(2, 4):
            state, model = world.step(state, model, world.model(seed=n))
        opt.thaw_(state)
        return world.step(state, model, world.model(seed=4))

    same_story(story, world)


@everywhere
def test_settings_are_adjusted_for_all_or_for_some(world: World) -> None:
    def story(world: World) -> Any:
        model = world.model()
        state = world.setup(opt.Chain(opt.ClipNorm(0.5), opt.AdamW(0.1)), model)
        state, model = world.step(state, model, world.model(seed=1))
        opt.adjust_(state, 0.03)
        state, model = world.step(state, model, world.model(seed=2))
        opt.adjust_(state.c, beta=(0.5, 0.6))
        state = opt.adjust(state, 0.2, where=["a", "e"])
        state = opt.adjust(state, omega=0.1, where="b")
        state, model = world.step(state, model, with_none(world.model(seed=3), "d"))
        return world.step(state, model, world.model(seed=4))

    same_story(story, world)


@everywhere
def test_an_edit_leaves_the_old_state_as_it_was(world: World) -> None:
    with world.open():
        model = world.model()
        state, model = world.step(world.setup(opt.AdamW(0.1), model), model, world.model(seed=1))
        before = world.snapshot(state, model)
        other = opt.freeze(opt.adjust(state, 0.5), "a")
        other, _ = opt.update(other, model, world.model(seed=2))
        other.b.state = other.c.state

        assert world.snapshot(state, model) == before


@everywhere
def test_a_state_may_be_assigned(world: World) -> None:
    def story(world: World) -> Any:
        model = world.model()
        state = world.setup(opt.AdamW(0.1), model)
        state, model = world.step(state, model, world.model(seed=1))
        state.b.state = state.b.state._replace(m=world.put(np.full((5, 3), 0.25)), weight=(0.3, 0.2))
        state.a.rule = opt.AdamW(0.7)
        return world.step(state, model, world.model(seed=2))

    same_story(story, world)


@everywhere
def test_a_rule_of_another_structure_moves_a_leaf_to_another_group(world: World) -> None:
    def story(world: World) -> Any:
        model = world.model()
        state = world.setup(opt.Momentum(0.1, 0.5), model)
        state, model = world.step(state, model, world.model(seed=1))
        state.b.rule = opt.Nesterov(0.1, 0.5)
        state.d.rule = opt.Momentum(opt.Linear(0.1, 0.3, 4), 0.5)
        for n in range(2, 4):
            state, model = world.step(state, model, world.model(seed=n))
        return state, model

    same_story(story, world)


@worlds_with("schedule", SCHEDULES, *by_engine(WORLDS))
def test_a_setting_may_follow_the_clock(world: World, schedule: Any) -> None:
    def story(world: World) -> Any:
        model = world.model()
        state = world.setup(opt.Chain(opt.ClipNorm(0.5), opt.AdamW(schedule)), model)
        for n in range(6):
            grads = world.model(seed=n + 1)
            state, model = world.step(state, model, with_none(grads, "c") if n == 2 else grads)
        return state, model

    same_story(story, world)


@everywhere
def test_a_schedule_may_take_the_place_of_a_number(world: World) -> None:
    def story(world: World) -> Any:
        model = world.model()
        state = world.setup(opt.AdamW(0.1), model)
        state, model = world.step(state, model, world.model(seed=1))
        opt.adjust_(state, opt.Linear(0.0, 0.8, 8))
        state, model = world.step(state, model, world.model(seed=2))
        return world.step(state, model, world.model(seed=3))

    same_story(story, world)


@everywhere
def test_leaves_out_of_step_take_branches_of_their_own(world: World) -> None:
    def story(world: World) -> Any:
        model = world.model()
        rule = opt.Chain(opt.AccumGrad(3), opt.ClipNorm(0.5), opt.AdamW(0.1))
        state = world.setup(rule, model)
        for n, without in enumerate(["ab", "a", "", "e", "", "cd"]):
            state, model = world.step(state, model, with_none(world.model(seed=n + 1), without))
        assert len({repr(leaf.state[0]) for leaf in leaves(state)}) > 1
        return state, model

    same_story(story, world)


# -- ties, and gradients of every type -----------------------------------------------------------------------


@where_arrays_are_written
def test_tied_leaves_are_stepped_once(world: World) -> None:
    def story(world: World) -> Any:
        shared, other = (world.put(np.random.default_rng(n).standard_normal((3, 3))) for n in range(2))
        model = {"in": shared, "mid": other, "out": shared.T}
        state = world.setup(opt.AdamW(0.1), model)
        assert state["in"] is state["out"]
        for n in range(3):
            rng = np.random.default_rng(10 + n)
            grads = {key: world.put(rng.standard_normal((3, 3))) for key in model}
            state, model = world.step(state, model, grads | {"in": None} if n == 1 else grads)
        return state, model

    same_story(story, world)


TYPES = {
    f"{dtype}-{gradient}": (dtype, gradient)
    for dtype, gradient in (
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("bfloat16", "float16"),
        ("float32", "bfloat16"),
        ("float32", "float64"),
        ("float64", "float32"),
        ("float64", "bfloat16"),
        ("float32", "int64"),
        ("float32", "uint8"),
    )
}
"""Types of parameters and of their gradients."""


@worlds_with("types", TYPES, *by_engine(WORLDS))
def test_gradients_may_be_of_another_type(world: World, types: tuple[str, str]) -> None:
    dtype, gradient = types

    def story(world: World) -> Any:
        model = world.model(dtype)
        state = world.setup(opt.Chain(opt.ClipNorm(0.5), opt.AdamW(0.1)), model)
        for n in range(2):
            plain = plain_model(dtype, n)
            grads = {k: world.put(np.abs(3 * g).astype(dtype_of(gradient))) for k, g in plain.items()}
            state, model = world.step(state, model, grads)
        return state, model

    same_story(story, world, dtype)


@everywhere
def test_gradients_of_one_model_may_be_of_several_types(world: World) -> None:
    def story(world: World) -> Any:
        model = world.model("float32", n=4)
        state = world.setup(opt.Momentum(0.1, 0.5), model)
        for n in range(2):
            kinds = ("float32", "float16", "bfloat16", "float64")
            pairs = zip(plain_model("float64", n + 1, 4).items(), kinds, strict=True)
            state, model = world.step(
                state, model, {k: world.put(g.astype(dtype_of(kind))) for (k, g), kind in pairs}
            )
        return state, model

    same_story(story, world, "float32")


# -- gradients that are parameters or state ------------------------------------------------------------------


@worlds_with("rule", RULES, *by_engine([w for w in WORLDS if w.writable]))
def test_parameters_may_be_each_others_gradients(world: World, rule: opt.Rule) -> None:
    def story(world: World) -> Any:
        line = world.put(np.arange(1.0, 9.0))
        model = world.model(n=2) | {"line": line[:6], "square": world.put(np.arange(9.0).reshape(3, 3))}
        state = world.setup(rule, model)
        for _ in range(2):
            grads = {"a": model["b"], "b": model["a"], "square": model["square"].T, "line": line[2:]}
            state, model = world.step(state, model, grads)
        return state, model

    same_story(story, world)


@everywhere
def test_a_gradient_may_be_a_view_of_state(world: World) -> None:
    def story(world: World) -> Any:
        model = world.model(n=2)
        state = world.setup(opt.Momentum(1.0, 0.5), model)
        state, model = world.step(state, model, world.model(seed=1, n=2))
        return world.step(state, model, {"a": state.b.state.v, "b": state.a.state.v})

    same_story(story, world)


# -- conditions, checks, totals ------------------------------------------------------------------------------


@everywhere
def test_a_gradient_that_is_not_finite_is_skipped_by_its_leaf(world: World) -> None:
    def story(world: World) -> Any:
        model = world.model()
        state = world.setup(opt.SkipNonFinite(opt.Chain(opt.AccumGrad(2), opt.Adam(0.1))), model)
        for n, value in enumerate((math.inf, math.nan, -math.inf, 1.0)):
            grads = plain_model(seed=n + 1)
            grads["bcd"[n % 3]][2, 1] = value
            state, model = world.step(state, model, world.put(grads))
        return state, model

    same_story(story, world)


@on_the_host
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", [opt.ClipNorm(0.5), opt.ClipGlobalNorm(0.5)], ids=repr)
def test_a_norm_that_is_not_finite_is_refused_and_nothing_has_changed(
    world: World, rule: opt.Rule, value: float
) -> None:
    texts = []
    for where in (world, World("numpy", "interpret", world.step)):
        with where.open(), np.errstate(all="ignore"):
            model = where.model()
            rules = {"a": opt.Adam(), "b": opt.Adam(), "*": opt.Chain(rule, opt.AdamW(0.1))}
            state = where.setup(rules, model)
            grads = plain_model(seed=1)
            grads["d"][0, 0] = value
            before = where.snapshot(state, model)
            with pytest.raises(opt.DomainError) as error:
                where.step(state, model, where.put(grads))
            texts.append(str(error.value))

            assert where.snapshot(state, model) == before
    assert texts[0] == texts[1]


@everywhere
def test_a_total_goes_over_all_groups(world: World) -> None:
    """Leaves of several element types and rules under one global norm, one of them without a gradient."""
    kinds = {"a": "float32", "b": "bfloat16", "c": "bfloat16", "d": "float64", "e": "float64"}

    def story(world: World) -> Any:
        rng = np.random.default_rng(0)
        model = {k: world.put(numbers(rng, (5, 3), kind)) for k, kind in kinds.items()}
        clip = opt.ClipGlobalNorm(0.5)
        rules = {
            "a": opt.Chain(clip, opt.Adam(0.1)),
            "*": opt.Chain(opt.WeightDecay(0.1), clip, opt.Descent(0.1)),
        }
        state = world.setup(rules, model)
        for n in range(3):
            grads = {k: world.put(numbers(rng, (5, 3), kind)) for k, kind in kinds.items()}
            state, model = world.step(state, model, grads | ({"c": None, "d": None} if n == 1 else {}))
        return state, {k: world.put(world.get(x).astype("float32")) for k, x in model.items()}

    same_story(story, world, "bfloat16")


# -- states are values ---------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickled": lambda state: pickle.loads(pickle.dumps(state)),
    "deep": copy.deepcopy,
    "shallow": copy.copy,
}


@worlds_with(
    "copied",
    {
        f"{name}-{kind}": (rule, COPIES[kind])
        for i, (name, rule) in enumerate(RULES.items())
        for kind in (("pickled", "deep"), ("shallow", "pickled"))[i % 2]
    },
    *by_engine(IN_PLACE),
)
def test_a_copy_of_a_state_goes_its_own_way(
    world: World, copied: tuple[opt.Rule, Callable[[Any], Any]]
) -> None:
    rule, copy_of = copied
    with world.open():
        model = world.model()
        state = world.setup(rule, model)
        state, model = world.step(state, model, world.model(seed=1))
        other, twin = copy_of(state), world.put({k: world.get(x) for k, x in model.items()})

        assert world.snapshot(other, twin) == world.snapshot(state, model)

        before = world.snapshot(other, twin)
        grads = world.model(seed=2)
        state, model = opt.update_(state, model, grads)
        opt.adjust_(state, 0.7)

        assert world.snapshot(other, twin) == before

        other, twin = opt.update_(other, twin, grads)
        opt.adjust_(other, 0.7)

        assert world.snapshot(other, twin) == world.snapshot(state, model)


@worlds_with("rule", RULES, *by_engine(IN_PLACE))
def test_an_old_state_may_be_stepped_again(world: World, rule: opt.Rule) -> None:
    with world.open():
        model, grads = world.model(), [world.model(seed=n) for n in range(1, 5)]
        state, model = opt.update(world.setup(rule, model), model, grads[0])
        before = world.snapshot(state, model)
        first = opt.update(state, model, grads[1])
        seen = world.snapshot(*first)
        other = opt.update(state, model, with_none(grads[2], "b"))
        again = opt.update(state, model, grads[1])

        assert (world.snapshot(state, model), world.snapshot(*first), world.snapshot(*again)) == (
            before,
            seen,
            seen,
        )

        opt.update_(other[0], copy.deepcopy(other[1]), grads[3])  # its b is the old one
        opt.update_(*again, grads[3])

        assert (world.snapshot(state, model), world.snapshot(*first)) == (before, seen)


class OneOfTwo(opt.Rule):
    """Chooses between two numbers that it has written down, which no array gives a type."""

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, opt.where(dx > 0, 0.1, opt.where(dx < -1, 0.7, 0.3)) * dx


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@everywhere
def test_a_choice_between_two_numbers_has_the_type_of_the_arithmetic(world: World, dtype: str) -> None:
    x, dx = np.array([1.0, 2.0, 3.0], dtype), np.array([1.0, -0.5, -3.0], dtype)
    share = np.array([0.1, 0.3, 0.7], dtype)
    with world.open():
        model = {"a": world.put(x)}
        _, model = world.step(world.setup(OneOfTwo(), model), model, {"a": world.put(dx)})
        got = world.get(model["a"])

    assert got.dtype == dtype
    np.testing.assert_array_max_ulp(got, x - share * dx, maxulp=1)
