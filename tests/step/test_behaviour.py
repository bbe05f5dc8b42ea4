"""What Optimisers.jl promises, line by line: the numbers are those of the table in docs/coming-from-julia.md.

Each test begins with its number; some of them are in the files of what they are about. `UNTESTED` says of all
other numbers why there is no test.
"""

import ast
import itertools
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import optimisers as opt
from optimisers import (
    AccumGrad,
    Adam,
    AdamW,
    BadSetting,
    BadState,
    Chain,
    ClipGrad,
    ClipNorm,
    Descent,
    DomainError,
    Leaf,
    Momentum,
    Nesterov,
    RAdam,
    Rule,
    SignDecay,
    TraceError,
    TreeMismatch,
    UnknownField,
    WeightDecay,
    adjust,
    adjust_,
    freeze,
    freeze_,
    setup,
    thaw_,
    trainables,
    update,
    update_,
)
from optimisers.settings import settings

UNTESTED = {
    5: "apply is pure here; which buffers are used again is the business of the engine",
    8: "a macro of Julia; whether an array may be written is asked by maywrite",
    9: "lazy broadcasting of Julia; rules are traced and fused instead",
    11: "a macro of Julia",
    20: "names that were already old there: ADAM, NADAM, ...",
    33: "a state is copied and pickled as a whole, and its arrays stay where they are",
    42: "there are no lazy gradients here; a transposed tie takes every gradient (see 64)",
    59: "None is the only way to say that there is no gradient",
    68: "ties of immutable arrays need no help here: read-only arrays are objects with identity",
    75: "an old form of `trainable` that Julia still accepts with a warning",
    76: "advice, not behaviour",
    124: "a method for rules that keep their rate elsewhere; here every field goes by its name",
    126: "an old name of a setting that Julia still accepts",
    171: "there are no pairs of a model and its gradient that could stand deep in a model",
    177: "there is nothing to wrap: the settings of every rule are numbers of the step (see 174)",
    178: "for the same reason `setup` wraps nothing",
    184: "the loop and the loss are the user's; of the rest see 101, and SkipNonFinite",
    186: "the loss is the user's, and so is what it returns beside",
}

both_engines = pytest.mark.parametrize("engine", ["interpret", "numba"])
both_updates = pytest.mark.parametrize("step", [update, update_], ids=lambda f: f.__name__)

RULES = [
    Descent(),
    Momentum(),
    Nesterov(),
    Adam(),
    AdamW(lam=0.1),
    AdamW(lam=0.01, couple=False),
    Chain(SignDecay(), Adam()),
    Chain(ClipNorm(0.5), Adam()),
    Chain(ClipGrad(0.5), Momentum()),
    Chain(WeightDecay(), AccumGrad(3), Nesterov(), ClipGrad(1)),
]


def vector(*values: float) -> Any:
    return np.array(values, float)


def stepped(rule: Any, x: Any, dx: Any) -> Any:
    """The parameters after one step from a fresh state."""
    return update(setup(rule, x), x, dx)[1]


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


class Point(NamedTuple):
    """A model with three parts."""

    x: Any
    y: Any = None
    z: Any = None


# -- 1.1 the contract ----------------------------------------------------------------------------------------


class DecayDescent(Rule):
    """Descent whose rate falls with the square root of the step."""

    eta: float = 0.1

    def init(self, _x: Any) -> Any:
        return 1

    def apply(self, state: Any, _x: Any, dx: Any) -> Any:
        return state + 1, (self.eta / opt.sqrt(state)) * dx


def test_a_rule_is_init_and_apply_and_nothing_else() -> None:
    """1. A subclass with `init` and `apply` trains."""
    close(stepped(DecayDescent(0.5), vector(1), vector(1)), [0.5])


def test_what_apply_returns_is_subtracted() -> None:
    """2. The new parameters are x - dx'."""

    class Given(Rule):
        def init(self, _x: Any) -> Any:
            return ()

        def apply(self, state: Any, _x: Any, dx: Any) -> Any:
            return state, dx

    close(stepped(Given(), vector(5), vector(2)), [3])


def test_state_lives_outside_the_rule() -> None:
    """3. A rule is a frozen value, equal on all leaves, and the same after a step."""
    rule, model = Adam(), [vector(1), vector(2)]
    state, _ = update(setup(rule, model), model, model)
    assert state[0].rule == state[1].rule == rule == Adam()
    with pytest.raises(AttributeError):
        rule.eta = 0.1


def test_descent_has_no_state_and_momentum_zeros() -> None:
    """4. `init` gives the state for one array; no state is ()."""
    assert Descent().init(vector(1, 2)) == ()
    close(Momentum().init(vector(1, 2)).v, [0, 0])


def test_apply_can_be_called_by_hand() -> None:
    """6. `Descent(0.1).apply(state, x, dx)` is 0.1 dx, in the type of the arrays."""
    _, dx = Descent(0.1).apply((), np.ones(3, "f4"), np.array([4, 5, 6], "f4"))
    assert dx.dtype == np.float32
    np.testing.assert_allclose(dx, [0.4, 0.5, 0.6], rtol=1e-6)


def test_the_example_of_the_guide_steps_by_eta_over_the_root_of_the_step() -> None:
    """7. DecayDescent starts at 1; step k is eta / sqrt(k)."""
    model: Any = vector(0)
    state = setup(DecayDescent(1.0), model)
    for k in range(1, 5):
        assert state.state == k
        state, new = update(state, model, vector(1))
        close(model - new, [1 / np.sqrt(k)])
        model = new


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_both_forms_of_update_agree_to_the_last_bit(rule: Any) -> None:
    """10. Thirteen random steps of `update` and `update_` are equal."""
    random = np.random.default_rng(0)
    pure: Any = {"w": random.normal(size=(3, 4)), "b": random.normal(size=4)}
    inplace: Any = {k: v.copy() for k, v in pure.items()}
    a, b = setup(rule, pure), setup(rule, inplace)
    for _ in range(13):
        grads = {k: random.normal(size=v.shape) for k, v in pure.items()}
        a, pure = update(a, pure, grads)
        b, inplace = update_(b, inplace, grads)
    for k in pure:
        np.testing.assert_array_equal(pure[k], inplace[k])
    assert a == b


# -- 1.2 making rules ----------------------------------------------------------------------------------------


def test_settings_go_by_place_and_by_name() -> None:
    """12. Both ways make equal rules."""
    assert Nesterov(rho=0.8, eta=0.1) == Nesterov(0.1, 0.8)
    assert AdamW(lam=0.3, eta=0.1) == AdamW(0.1, (0.9, 0.999), 0.3, 1e-8)


def test_a_whole_number_becomes_a_float_where_the_default_is_one() -> None:
    """13. The kind of the default decides."""

    class Two(Rule):
        a: float = 0.1
        b: int = 1

        def init(self, _x: Any) -> Any:
            return ()

        def apply(self, state: Any, _x: Any, dx: Any) -> Any:
            return state, self.a * dx

    rule = Two(2, 3)
    assert (type(rule.a), rule.a) == (float, 2.0)
    assert (type(rule.b), rule.b) == (int, 3)


@pytest.mark.parametrize(
    "make",
    [lambda: Adam(1j), lambda: Adam("fast"), lambda: Adam(beta=0.9), lambda: Adam(beta=(0.9, 1j))],
    ids=["complex", "a name", "a number for a tuple", "complex in a tuple"],
)
def test_a_setting_of_the_wrong_kind_is_refused(make: Any) -> None:
    """14. Complex, strings, a number for a tuple: BadSetting."""
    with pytest.raises(BadSetting):
        make()


def test_adjusting_runs_the_checks_of_the_constructor_again() -> None:
    """15. A number for a tuple is refused there too."""
    with pytest.raises(BadSetting, match=re.escape("Adam.beta is 0.9; it takes a tuple of 2 numbers")):
        adjust(Adam(), beta=0.9)


@pytest.mark.parametrize("rule", [Descent, Momentum, Nesterov, Adam, AdamW], ids=lambda r: r.__name__)
def test_a_negative_learning_rate_is_refused(rule: Any) -> None:
    """16. Of Descent too, unlike there."""
    with pytest.raises(BadSetting, match="the learning rate cannot be negative"):
        rule(-0.1)


def test_a_learning_rate_of_a_whole_zero_works() -> None:
    """17. Adam(0) steps by nothing."""
    close(stepped(Adam(0), vector(1, 2), vector(3, 4)), [1, 2])


def test_a_bound_given_as_a_whole_number_can_be_adjusted_to_a_fraction() -> None:
    """18. ClipGrad(2) holds 2.0."""
    assert type(ClipGrad(2).delta) is float
    assert adjust(ClipGrad(2), delta=2.5) == ClipGrad(2.5)


def test_rules_print_as_the_code_that_makes_them() -> None:
    """19. Names and values; a chain prints its rules."""
    assert repr(Adam()) == "Adam(eta=0.001, beta=(0.9, 0.999), epsilon=1e-08)"
    assert repr(Chain(ClipGrad(), Descent())) == "Chain(ClipGrad(delta=10.0), Descent(eta=0.1))"


# -- 1.3 setup -----------------------------------------------------------------------------------------------


def test_the_state_has_the_names_of_the_model_and_nothing_where_nothing_trains() -> None:
    """21. One Leaf for each array, () for the rest."""
    state = setup(Momentum(), Point(x=vector(1, 2, 3), y=(True, False), z=np.tanh))
    close(state.x.state.v, [0, 0, 0])
    assert (state.y, state.z) == ((), ())


def test_parameters_are_arrays_of_reals_or_complex_numbers() -> None:
    """22. Not arrays of integers or bools, nor functions, strings, None."""
    model = [np.ones(2, "f2"), np.ones(2, "c16"), np.arange(2), np.ones(2, bool), 3, np.tanh, "a", None]
    assert [isinstance(part, Leaf) for part in setup(Descent(), model)] == [True, True] + [False] * 6


def test_a_float_is_no_parameter() -> None:
    """23. It is (), and here a warning says so."""
    with pytest.warns(opt.FloatParameter):
        state = setup(Descent(), (vector(1), 2.0))
    assert state[1] == ()


def test_a_class_that_nobody_has_registered_is_refused_if_it_holds_arrays() -> None:
    """24. Dataclasses are walked; other classes are registered first."""

    class Layer:
        def __init__(self) -> None:
            self.w = vector(1)

    with pytest.raises(TreeMismatch, match=r"opt\.register\(Layer\)"):
        setup(Descent(), [Layer()])
    opt.register(Layer)
    assert isinstance(setup(Descent(), [Layer()])[0].w, Leaf)


def test_a_model_without_parameters_makes_a_warning() -> None:
    """25. And a state all the same."""
    with pytest.warns(opt.NoParameters):
        assert setup(Descent(), {"n": 3}) == ()


def test_a_model_of_immutable_arrays_makes_no_warning() -> None:
    """26. Read-only arrays are parameters."""
    x = vector(1)
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(setup(Descent(), [x])[0], Leaf)


def test_the_same_array_at_several_places_has_the_same_leaf() -> None:
    """27. Its state is made once."""
    x = vector(1)
    state = setup(Momentum(), {"a": x, "b": (x, [x])})
    assert state.a is state.b[0] is state.b[1][0]


def test_equal_arrays_are_not_the_same() -> None:
    """28. Equality does not tie."""
    state = setup(Momentum(), [vector(1), vector(1)])
    assert state[0] is not state[1]


def test_containers_nest() -> None:
    """29. Tuples, named tuples, lists, dicts, in each other."""
    state = setup(Descent(), ({"a": [Point(vector(1))]},))
    assert isinstance(state[0]["a"][0].x, Leaf)


def test_a_single_array_gets_a_bare_leaf() -> None:
    """30. `setup(rule, x)` is a Leaf."""
    assert isinstance(setup(Descent(), vector(1)), Leaf)


def test_a_leaf_has_a_rule_a_state_and_a_flag_that_can_be_set() -> None:
    """31. It prints them; the flag only where it is set."""
    leaf = setup(Descent(), vector(1))
    assert (leaf.rule, leaf.state, leaf.frozen) == (Descent(), (), False)
    assert repr(leaf) == "Leaf(Descent(eta=0.1), ())"
    leaf.frozen = True
    assert repr(leaf) == "Leaf(Descent(eta=0.1), (), frozen=True)"


def test_leaves_are_equal_by_what_they_hold() -> None:
    """32. Rule, state and flag, not identity."""
    a, b = setup(Momentum(), vector(1)), setup(Momentum(), vector(2))
    assert a == b
    assert freeze(a) != b


# -- 1.4 update and update_ ----------------------------------------------------------------------------------


def test_update_leaves_the_old_model_and_the_old_state_as_they_were() -> None:
    """34. Both are untouched."""
    model = [vector(1, 2)]
    state = setup(Momentum(), model)
    update(state, model, [vector(3, 4)])
    close(model[0], [1, 2])
    close(state[0].state.v, [0, 0])


def test_update_in_place_returns_the_very_arrays_and_the_very_state() -> None:
    """35. Where arrays may be written."""
    x = vector(1, 2)
    model = [x]
    state = setup(Momentum(), model)
    leaf, v = state[0], state[0].state.v
    new_state, new = update_(state, model, [vector(3, 4)])
    assert new[0] is x
    assert new_state[0] is leaf
    assert np.shares_memory(new_state[0].state.v, v)


def test_update_in_place_replaces_what_may_not_be_written() -> None:
    """36, 183. The numbers of the example there: one array is written, the other is only in the new model.

    `Flux.setup` refuses such models.
    """
    y = vector(4, 5)
    y.flags.writeable = False
    model = {"x": vector(1, 2), "y": y}
    state = setup(Momentum(1 / 30, 0.9), model)
    _, new = update_(state, model, {"x": vector(10, 14), "y": vector(10, 14)})
    np.testing.assert_allclose(model["x"], [0.6666666, 1.5333333], atol=1e-7)
    np.testing.assert_allclose(new["y"], [3.6666667, 4.5333333], atol=1e-7)
    close(model["y"], [4, 5])


def test_update_in_place_changes_the_state_it_was_given() -> None:
    """37. It returns that very state."""
    x = vector(1)
    state = setup(Momentum(), x)
    assert update_(state, x, vector(1))[0] is state
    close(state.state.v, [0.01])


def test_what_is_no_parameter_passes_through() -> None:
    """38. Descent(0.1) from 1, 2, 3 with gradient 1: 0.9, 1.9, 2.9, and tanh is tanh."""
    model = (np.array([1, 2, 3], "f4"), np.tanh)
    new = stepped(Descent(0.1), model, (np.ones(3, "f4"), None))
    np.testing.assert_allclose(new[0], [0.9, 1.9, 2.9], rtol=1e-6)
    assert new[0].dtype == np.float32
    assert new[1] is np.tanh


def test_the_first_steps_of_descent_and_momentum() -> None:
    """39. [1, 2] - 0.1 [25, 33], and a first velocity of [2.5, 3.3]."""
    x, dx = vector(1, 2), vector(25, 33)
    close(stepped(Descent(0.1), x, dx), [1 - 2.5, 2 - 3.3])
    state, new = update(setup(Momentum(0.1), x), x, dx)
    close(state.state.v, [2.5, 3.3])
    close(new, [1 - 2.5, 2 - 3.3])


def test_a_gradient_may_be_a_tuple_in_the_order_of_the_fields() -> None:
    """40. For a named tuple, say."""
    new = stepped(Descent(0.1), Point(vector(1), (vector(2), np.tanh)), (vector(1), (vector(1), None), None))
    close(new.x, [0.9])
    close(new.y[0], [1.9])


@pytest.mark.parametrize(
    "dx", [np.array([1, 1]), np.broadcast_to(1.0, (2,)), np.ones(4)[::2], np.ones(2, "f4")], ids=repr
)
def test_a_gradient_may_be_any_array_of_numbers(dx: Any) -> None:
    """41. Whole numbers, one number spread out, every second element, another precision."""
    close(stepped(Descent(0.5), vector(1, 2), dx), [0.5, 1.5])


def test_the_model_keeps_its_types() -> None:
    """43. A named tuple stays one."""
    assert type(stepped(Descent(), Point(vector(1)), Point(vector(1)))) is Point


@pytest.mark.parametrize("step", [update, update_])
@pytest.mark.parametrize("model", [vector(1), [vector(1)]], ids=["a leaf", "a tree"])
def test_a_forgotten_gradient_is_an_error(step: Any, model: Any) -> None:
    """44. For a leaf and for a tree."""
    with pytest.raises(BadState, match="the gradients are missing"):
        step(setup(Descent(), model), model)


@pytest.mark.parametrize("step", [update, update_])
def test_a_read_only_array_is_answered_with_a_read_only_array(step: Any) -> None:
    """45. Immutable arrays stay so."""
    x = vector(1)
    x.flags.writeable = False
    _, new = step(setup(Descent(), x), x, vector(1))
    assert not new.flags.writeable


def test_a_gradient_that_would_broadcast_is_refused() -> None:
    """46. It is broadcast in silence there."""
    with pytest.raises(TreeMismatch, match=re.escape("gradient of shape (1,) for parameters of shape (2,)")):
        stepped(Descent(), vector(1, 2), vector(1))


@pytest.mark.parametrize("step", [update, update_])
def test_where_a_rule_answers_none_the_array_stays_the_same_object(step: Any) -> None:
    """47. No step is not a zero step."""

    class Never(Rule):
        def init(self, _x: Any) -> Any:
            return 0

        def apply(self, state: Any, _x: Any, _dx: Any) -> Any:
            return state + 1, None

    x = vector(1)
    state, new = step(setup(Never(), x), x, vector(1))
    assert new is x
    assert state.state == 1


class Higher(Rule):
    """A rule of second order that counts in two arrays."""

    def init(self, x: Any) -> Any:
        return opt.ops.ones_like(x), opt.zeros_like(x)

    def apply(self, state: Any, _x: Any, dx: Any, dx2: Any) -> Any:
        a, b = state
        return (a + 1, b + 1), a * dx + b * dx2


def test_further_gradients_are_ignored_by_rules_that_do_not_ask() -> None:
    """48. The result is the same with or without."""
    x, state = vector(1), setup(Adam(), vector(1))
    np.testing.assert_array_equal(update(state, x, vector(1))[1], update(state, x, vector(1), vector(9))[1])


def test_a_rule_of_second_order_asks_for_its_second_gradient() -> None:
    """49. Without it, an error says what to write."""
    with pytest.raises(TraceError, match=re.escape("update(state, model, grads, grads2)")):
        update(setup(Higher(), vector(1)), vector(1), vector(1))


def test_an_error_of_a_rule_reaches_the_caller() -> None:
    """50. A rule that refuses unequal gradients, with `check`."""

    class Equal(Rule):
        def init(self, _x: Any) -> Any:
            return ()

        def apply(self, state: Any, _x: Any, dx: Any, dx2: Any) -> Any:
            opt.ops.check(opt.ops.sum(opt.abs2(dx - dx2)) == 0, "the gradients differ")
            return state, dx

    state = setup(Equal(), vector(1))
    close(update(state, vector(1), vector(1), vector(1))[1], [0])
    with pytest.raises(DomainError, match="the gradients differ"):
        update(state, vector(1), vector(1), vector(2))


def test_rules_of_both_orders_join_in_a_chain() -> None:
    """51. Descent(0.1) scales the first gradient only."""
    x, rule = vector(5), Chain(Descent(0.1), Higher())
    state, x = update(setup(rule, x), x, vector(1), vector(1))
    close(x, [4.9])
    _, x = update(state, x, vector(1), vector(1))
    close(x, [4.9 - (2 * 0.1 + 1)])


def test_a_rule_of_second_order_steps_by_both_gradients() -> None:
    """52. x - (a dx + b dx2), with a = 1, 2, ... and b = 0, 1, ..."""
    x: Any = vector(10)
    state, x = update(setup(Higher(), x), x, vector(2), vector(3))
    close(x, [8])
    state, x = update(state, x, vector(2), vector(3))
    close(x, [8 - (2 * 2 + 1 * 3)])
    close(state.state[0], [3])


# -- 1.5 missing gradients -----------------------------------------------------------------------------------


def test_none_at_a_leaf_is_no_step_and_leaves_the_state() -> None:
    """53. Neither is touched."""
    model = [vector(1), vector(2)]
    state, new = update(setup(Momentum(), model), model, [None, vector(1)])
    assert new[0] is model[0]
    close(state[0].state.v, [0])


def test_none_at_a_branch_prunes_it() -> None:
    """54. The whole of it."""
    model = [{"a": vector(1), "b": [vector(2)]}, vector(3)]
    new = stepped(Descent(0.1), model, [None, vector(1)])
    assert new[0] is model[0]
    close(new[1], [2.9])


def test_no_gradient_is_not_a_zero_gradient() -> None:
    """55. Adam(0.1) after a gradient of 1, then 0 at one leaf and None at the other."""
    model: Any = [vector(1), vector(1)]
    state, model = update(setup(Adam(0.1), model), model, [vector(1), vector(1)])
    state, model = update(state, model, [vector(0), None])
    zero, none = state[0].state, state[1].state
    close(zero.m, [0.09])
    close(zero.v, [0.000999])
    close(zero.weight, [1 - 0.81, 1 - 0.998001])
    close(none.m, [0.1])
    close(none.v, [0.001])
    close(none.weight, [1 - 0.9, 1 - 0.999])


def test_gradients_of_what_does_not_train_are_ignored() -> None:
    """56. An entry for a whole number."""
    new = stepped(Descent(0.1), {"a": vector(1), "c": 1}, {"a": vector(1), "c": 1})
    close(new["a"], [0.9])
    assert new["c"] == 1


def test_missing_branches_mix_with_fields_that_do_not_train() -> None:
    """57. At every depth."""
    model = Point((vector(1), 3), Point(np.tanh, vector(2)), vector(3))
    new = stepped(Descent(0.1), model, Point((vector(1), None), Point(None, vector(1)), None))
    close(new.x[0], [0.9])
    close(new.y.y, [1.9])
    assert new.z is model.z


def test_behind_a_rule_that_makes_no_step_the_chain_does_not_run() -> None:
    """58. The state of what is behind stays."""
    x = vector(1)
    state, _ = update(setup(Chain(AccumGrad(2), Adam()), x), x, vector(1))
    close(state.state[1].m, [0])
    close(state.state[1].weight, [0, 0])


# -- 1.6 ties ------------------------------------------------------------------------------------------------


def test_gradients_of_a_tie_are_summed_and_the_rule_runs_once() -> None:
    """60. With Adam the two orders differ: a step of eta, not of two."""
    x = vector(1, 2)
    new = stepped(Adam(0.1), [x, [x]], [vector(1, 1), [vector(4, 5)]])
    np.testing.assert_allclose(new[0], [0.9, 1.9], rtol=1e-8)


def test_after_an_update_the_tie_holds() -> None:
    """61. One object at both places."""
    x = vector(1, 2)
    new = stepped(Momentum(0.1), [x, (np.tanh, x)], [vector(1, 1), (None, vector(2, 2))])
    assert new[1][1] is new[0]
    close(new[0], [0.7, 1.7])


@pytest.mark.parametrize(
    ("grads", "total"),
    [([vector(3, 3), None], 3), ([None, (None, vector(7, 7))], 7)],
    ids=["at the first place", "at the second"],
)
def test_the_gradients_that_are_there_are_summed(grads: Any, total: float) -> None:
    """62. [1, 2] - 0.1 [3, 3], [1, 2] - 0.1 [7, 7]; the tie holds."""
    x = vector(1, 2)
    new = stepped(Descent(0.1), [x, (np.tanh, x)], grads)
    close(new[0], vector(1, 2) - 0.1 * total)
    assert new[1][1] is new[0]


def test_ties_reach_across_containers() -> None:
    """63. Three places, one of them in a branch without gradient."""
    x = vector(1)
    model = {"a": Point(x), "b": [x, (x, vector(5))]}
    new = stepped(Descent(0.1), model, {"a": Point(vector(1)), "b": [vector(2), None]})
    close(new["a"].x, [0.7])
    assert new["a"].x is new["b"][0] is new["b"][1][0]


def test_a_transposed_tie_is_seen_through() -> None:
    """64. m - 0.1 (g.m + g.t transposed); the tie holds."""
    m = np.arange(6.0).reshape(2, 3)
    gm, gt = np.full((2, 3), 2.0), np.arange(6.0).reshape(3, 2)
    state = setup(Descent(0.1), {"m": m, "t": m.T})
    assert state.m is state.t
    _, new = update(state, {"m": m, "t": m.T}, {"m": gm, "t": gt})
    close(new["m"], m - 0.1 * (gm + gt.T))
    close(new["t"], new["m"].T)
    assert np.shares_memory(new["t"], new["m"])


def test_a_chain_clips_the_sum_of_a_tie() -> None:
    """65. ClipGrad(10) acts on 6 + 6 and 20 - 15."""
    m = np.zeros((1, 2))
    rule = Chain(ClipGrad(10), Descent(0.1), ClipGrad(10))
    new = stepped(rule, {"m": m, "t": m.T}, {"m": np.array([[6.0, 20.0]]), "t": np.array([[6.0], [-15.0]])})
    close(new["m"], [[-1.0, -0.5]])


def test_the_first_place_of_a_tie_may_be_the_transposed_one() -> None:
    """66. And there may be three."""
    m = np.arange(6.0).reshape(2, 3)
    model = {"t": m.T, "m": m, "again": m.T}
    g = np.arange(6.0).reshape(3, 2)
    new = stepped(Descent(0.1), model, {"t": g, "m": np.ones((2, 3)), "again": None})
    close(new["m"], m - 0.1 * (1 + g.T))
    assert np.shares_memory(new["t"], new["m"])
    assert np.shares_memory(new["again"], new["m"])


def test_a_reshaped_view_is_refused() -> None:
    """67. It would be stepped twice there; here it is an error, and a transposed view is a tie."""
    x = np.ones(6)
    with pytest.raises(TreeMismatch, match="share memory without being the same array"):
        setup(Descent(), [x, x.reshape(2, 3)])


def test_a_shared_container_stays_shared_and_two_alike_stay_two() -> None:
    """69. Whatever arrays they hold."""
    x = vector(1)
    shared = [x]
    new = stepped(Descent(), {"a": shared, "b": shared, "c": [x]}, {"a": [vector(1)], "b": None, "c": None})
    assert new["a"] is new["b"]
    assert new["a"] is not new["c"]
    assert new["a"][0] is new["c"][0]


def test_freezing_or_adjusting_one_place_of_a_tie_does_so_at_all() -> None:
    """70. They have one Leaf."""
    x = vector(1)
    state = setup(Descent(), {"a": x, "b": x})
    freeze_(state.a)
    adjust_(state.b, 0.5)
    assert state.b.frozen
    assert state.a.rule == Descent(0.5)


def test_a_state_is_moved_to_a_device_with_its_ties() -> None:
    """72. As a pytree of JAX; moves of a Leaf break them there."""
    import jax

    x = jax.numpy.asarray([1.0, 2.0])
    model = {"a": x, "b": x}
    state = jax.device_put(setup(Momentum(0.1), model, ties=[("a", "b")]), jax.devices()[0])
    assert state["a"] is state["b"]

    state, model = update(state, model, {"a": x, "b": 2 * x})
    np.testing.assert_array_equal(model["a"], model["b"])
    np.testing.assert_allclose(model["a"], [0.7, 1.4], rtol=1e-6)


def test_one_gradient_object_at_both_places_of_a_tie_counts_once() -> None:
    """71. It is added twice there."""
    x, g = vector(1), vector(1)
    close(stepped(Descent(0.1), [x, x], [g, g])[0], [0.9])


# -- 1.7 what may be trained ---------------------------------------------------------------------------------


def test_only_the_trainable_children_of_a_class_get_leaves() -> None:
    """73. The rest are ()."""

    @opt.register(children=("x", "y"), trainable=("y",))
    class Foo:
        def __init__(self) -> None:
            self.x, self.y = vector(1), vector(2)

    state = setup(Descent(), Foo())
    assert state.x == ()
    assert isinstance(state.y, Leaf)


def test_what_is_no_child_is_never_visited_and_survives() -> None:
    """74. a = [0.8, 1.6], b = [3, 4], c = [5, 6]: only a trains."""

    @opt.register(children=("a", "c"), trainable=("a",))
    class TwoThirds:
        def __init__(self) -> None:
            self.a, self.b, self.c = vector(1, 2), vector(3, 4), vector(5, 6)

    model = TwoThirds()
    new = stepped(Descent(0.1), model, {"a": vector(2, 4), "c": vector(9, 9)})
    close(new.a, [0.8, 1.6])
    assert new.b is model.b
    assert new.c is model.c


# -- 1.8 dicts -----------------------------------------------------------------------------------------------


def test_a_dict_gives_a_dict() -> None:
    """77. AdamW(0.1) on the sum of squares of a: a = [0.9, 1.9], b and c as they were."""
    model = {"a": vector(1, 2), "b": vector(3, 4), "c": 1}
    state = setup(AdamW(0.1), model)
    assert state["c"] == ()
    _, new = update(state, model, {"a": 2 * model["a"], "b": None, "c": None})
    assert type(new) is dict
    np.testing.assert_allclose(new["a"], [0.9, 1.9], rtol=1e-7)
    assert new["b"] is model["b"]
    assert new["c"] == 1


def test_a_dict_may_have_whole_numbers_and_strings_for_keys() -> None:
    """78. Nested, with a named tuple inside: [2.9, 3.9]."""
    model = {1: vector(1, 2), 2: {"a": Point(x=vector(3, 4))}}
    new = stepped(AdamW(0.1), model, {1: None, 2: {"a": {"x": 2 * vector(3, 4)}}})
    np.testing.assert_allclose(new[2]["a"].x, [2.9, 3.9], rtol=1e-7)


def test_the_trainables_of_a_dict_are_its_arrays() -> None:
    """79. In the order of insertion."""
    found = trainables({"b": vector(1), "a": vector(2)})
    assert [float(x[0]) for x in found] == [1, 2]


def test_dicts_can_be_frozen_thawed_and_adjusted() -> None:
    """80. It fails there."""
    state = setup(Descent(), {"a": {"b": vector(1)}})
    freeze_(state)
    adjust_(state["a"], 0.5)
    assert state["a"]["b"].frozen
    thaw_(state["a"])
    assert state["a"]["b"] == setup(Descent(0.5), vector(1))


# -- 1.9 element types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_parameters_keep_their_element_type(rule: Any, dtype: str) -> None:
    """81. Whatever that of the gradient is."""
    x = np.ones(3, dtype)
    state, model = setup(rule, x), x
    for _ in range(3):
        state, model = update(state, model, vector(1, 2, 3))
    assert model.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_state_has_the_element_type_of_the_parameters_but_float32_at_least(dtype: str, kept: str) -> None:
    """82. State for half precision is float16 there."""
    x = np.ones(3, dtype)
    state, _ = update(setup(Adam(), x), x, vector(1, 2, 3))
    assert state.state.m.dtype == state.state.v.dtype == kept


def test_settings_never_widen_the_parameters() -> None:
    """83. A setting in double precision is rounded where it is used."""
    assert stepped(Descent(np.float64(0.1)), np.ones(1, "f4"), np.ones(1, "f4")).dtype == np.float32


def test_the_default_rate_of_descent_is_a_tenth() -> None:
    """84. There it is the float32 0.10000000149."""
    assert stepped(Descent(), vector(0), vector(1))[0] == -0.1


def test_the_first_step_of_adam_in_half_precision_has_the_size_of_eta() -> None:
    """85. Here arithmetic is in float32; there these numbers move by more than 1."""
    x = np.array([0.579, -0.729, 0.5493], "f2")
    dx = np.array([-0.001497, 0.0001875, -0.013176], "f2")
    exact = x.astype(float) + np.array([1e-4, -1e-4, 1e-4])
    np.testing.assert_allclose(stepped(Adam(1e-4), x, dx), exact.astype("f2"), rtol=0)


def test_the_first_step_of_adamw_in_half_precision_is_finite_and_right() -> None:
    """86. It is infinite there; a zero gradient makes no step."""
    x = np.array([0.5, 0.5], "f2")
    new = stepped(AdamW(0.01), x, np.array([1e-7, 0.0], "f2"))
    np.testing.assert_allclose(new.astype(float), [0.5 - 0.01 / (1 + 1e-8 / 1.19e-7), 0.5], rtol=1e-3)


COMPLEX_RULES = [
    Descent(0.05),
    Momentum(0.01),
    Nesterov(0.01),
    Adam(0.01),
    AdamW(0.01, lam=0.01),
    Chain(ClipNorm(1.0), Adam(0.01)),
    Chain(WeightDecay(), Descent(0.05)),
]


@pytest.mark.parametrize("rule", COMPLEX_RULES, ids=repr)
def test_complex_parameters_descend(rule: Any) -> None:
    """87. The loss |w|^2 falls at every step, from 2 to below 1.9 within ten."""
    w: Any = np.array([1 + 1j])
    state, losses = setup(rule, w), [2.0]
    for _ in range(10):
        state, w = update(state, w, 2 * w)
        losses.append(float(np.abs(w[0]) ** 2))
    assert all(b < a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 1.9


def test_second_moments_of_complex_gradients_are_real() -> None:
    """87. They take |dx|^2: with dx = 3 + 4i, v is 0.025 and the step has size eta."""
    w = np.array([0j])
    state, new = update(setup(Adam(0.1), w), w, np.array([3 + 4j]))
    close(state.state.v, [25 * 0.001])
    assert state.state.v.dtype == np.float64
    np.testing.assert_allclose(new, [-0.1 * (0.6 + 0.8j)], rtol=1e-8)


def test_rules_without_a_complex_meaning_say_so() -> None:
    """88. ADOPT limits elements, and complex numbers have no order; ClipGrad limits both parts apart."""
    with pytest.raises(TraceError, match="complex numbers"):
        setup(opt.ADOPT(), np.array([1j]))
    _, new = update(setup(ClipGrad(1.0), np.array([0j])), np.array([0j]), np.array([3 + 0.5j]))
    close(new, [-1 - 0.5j])


# -- 1.10 chains ---------------------------------------------------------------------------------------------

X, DX = vector(1, 10, 100), vector(1, 2, 3)


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (WeightDecay(0.1), [-0.1, 7, 87]),
        (SignDecay(0.1), [-0.1, 7.9, 96.9]),
        (ClipGrad(2), [0, 8, 98]),
        (Chain(ClipGrad(2), WeightDecay(0.1)), [-0.1, 7, 88]),
    ],
    ids=repr,
)
def test_a_chain_applies_its_rules_in_order(rule: Any, want: Any) -> None:
    """89. On x = [1, 10, 100] and dx = [1, 2, 3]."""
    close(stepped(rule, X, DX), want)


@pytest.mark.parametrize(
    "rule",
    [
        Chain(Chain(ClipGrad(2), WeightDecay(0.1))),
        Chain(Chain(ClipGrad(2)), Chain(), WeightDecay(0.1)),
        Chain(ClipGrad(2), Chain(Chain(WeightDecay(0.1)))),
    ],
    ids=repr,
)
def test_chains_in_chains_give_the_same(rule: Any) -> None:
    """90. However they are nested."""
    close(stepped(rule, X, DX), [-0.1, 7, 88])


def test_the_order_in_a_chain_matters() -> None:
    """91. Decay before clipping: dx + x / 10 is clipped to 2."""
    close(stepped(Chain(WeightDecay(0.1), ClipGrad(2)), X, DX), [-0.1, 8, 98])


def test_a_chain_of_one_is_the_rule_and_an_empty_one_passes_the_gradient_on() -> None:
    """92. The empty one is Descent(1)."""
    close(stepped(Chain(SignDecay(0.1)), X, DX), [-0.1, 7.9, 96.9])
    close(stepped(Chain(), X, DX), X - DX)


def test_sign_decay_follows_the_sign_of_the_parameters() -> None:
    """93. x = [1, -10, 100], dx = [3, 2, -1]: [-2.1, -11.9, 100.9]."""
    close(stepped(SignDecay(0.1), vector(1, -10, 100), vector(3, 2, -1)), [-2.1, -11.9, 100.9])


def test_the_state_of_a_chain_is_the_tuple_of_theirs() -> None:
    """94. () for ClipGrad, two moments and two weights for Adam."""
    clip, adam = setup(Chain(ClipGrad(), Adam()), vector(0)).state
    assert clip == ()
    assert adam._fields == ("m", "v", "weight")


def test_clipping_before_descent() -> None:
    """95. ClipGrad(1), Descent(0.1) on zeros with [0.3, 1, 7]: [-0.03, -0.1, -0.1]."""
    close(stepped(Chain(ClipGrad(1), Descent(0.1)), vector(0, 0, 0), vector(0.3, 1, 7)), [-0.03, -0.1, -0.1])


def test_decay_first_in_a_chain_is_a_penalty_on_the_loss() -> None:
    """97. SignDecay(0.012), WeightDecay(0.034) are the gradients of 0.012 |x|_1 and 0.017 |x|^2."""
    random = np.random.default_rng(1)
    a = b = random.normal(size=5)
    decayed, plain = setup(Chain(SignDecay(0.012), WeightDecay(0.034), Adam()), a), setup(Adam(), b)
    for _ in range(5):
        dx = random.normal(size=5)
        decayed, a = update(decayed, a, dx)
        plain, b = update(plain, b, dx + 0.012 * np.sign(b) + 2 * 0.017 * b)
    close(a, b)


# -- 1.11 clipping -------------------------------------------------------------------------------------------


def change(rule: Any, dx: Any) -> Any:
    """The step that a rule makes of a gradient."""
    return -stepped(rule, np.zeros_like(dx), dx)


def test_clip_grad_limits_every_component() -> None:
    """98. [1, 10, 13] of [1, 10, 100] at delta = 13; delta is 10 by default."""
    close(change(ClipGrad(13), vector(1, 10, 100)), [1, 10, 13])
    close(change(ClipGrad(), vector(-11, 11)), [-10, 10])


def test_clip_norm_goes_by_array_and_only_shortens() -> None:
    """99. One array has a norm above 10, the other passes."""
    model = [vector(0, 0), vector(0)]
    new = stepped(ClipNorm(10), model, [vector(30, 40), vector(0.1)])
    close(new[0], [-6, -8])
    close(new[1], [-0.1])


def test_clip_norm_may_clip_the_one_norm() -> None:
    """100. ClipNorm(5, 1) leaves a 1-norm of 5."""
    close(change(ClipNorm(5, 1), vector(1, -9)), [0.5, -4.5])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_norm_that_is_not_finite_is_an_error_and_changes_nothing(bad: float) -> None:
    """101. Unless `throw` is false."""
    x = vector(1, 2)
    state = setup(Chain(ClipNorm(), Momentum()), x)
    with pytest.raises(DomainError, match=rf"2-norm {bad:g}"):
        update_(state, x, vector(1, bad))
    close(x, [1, 2])
    close(state.state[1].v, [0, 0])


def test_without_throwing_an_infinite_norm_spreads() -> None:
    """102. [1, 10, inf] gives no step, no step, NaN; a NaN norm makes everything NaN."""
    np.testing.assert_array_equal(change(ClipNorm(throw=False), vector(1, 10, np.inf)), [0, 0, np.nan])
    np.testing.assert_array_equal(change(ClipNorm(throw=False), vector(1, np.nan)), [np.nan, np.nan])


PS = (-np.inf, -3, -1, 0.5, 1, 1.5, 2, 3, np.inf)


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_norms_agree_with_linear_algebra(p: float, dtype: str) -> None:
    """103. Of a matrix as one vector, whatever p is, by hand and in a rule."""
    dx = np.array([[1, -2, 3], [4, 5, -6]], dtype)
    want = np.linalg.norm(dx.ravel().astype(float), p)
    np.testing.assert_allclose(opt.norm(dx, p), want, rtol=1e-6)
    clipped = change(ClipNorm(0.01, p), dx)
    assert clipped.dtype == dtype
    np.testing.assert_allclose(clipped, 0.01 / want * dx, rtol=1e-5)


def test_a_count_of_elements_is_not_scaled() -> None:
    """104. With p = 0 nothing is; there the gradient is, though its count cannot fall."""
    close(change(ClipNorm(1, 0), vector(3, 0, 5)), [3, 0, 5])
    assert opt.norm(vector(3, 0, 5), 0) == 2


@pytest.mark.parametrize("p", [*PS, 0])
def test_a_zero_gradient_stays_zero(p: float) -> None:
    """105. omega / 0 is no NaN."""
    close(change(ClipNorm(1, p), np.zeros(3)), [0, 0, 0])


# -- 1.12 accumulation ---------------------------------------------------------------------------------------


def test_accumulation_steps_by_the_mean_of_n_gradients() -> None:
    """106. Twice nothing, then the mean, then it starts again."""
    x: Any = vector(10)
    state = setup(Chain(AccumGrad(3), Descent(1.0)), x)
    path = []
    for g in (1, 2, 6, 9, 9, 9):
        state, x = update(state, x, vector(g))
        path.append(float(x[0]))
    close(path, [10, 10, 7, 7, 7, -2])


def test_decay_behind_accumulation_is_seen_once() -> None:
    """107. Gradients 33, 0 then 0, 444 give -0.651 and -20.202002."""
    x: Any = vector(1, 2)
    state = setup(Chain(AccumGrad(2), WeightDecay(0.01), Descent(0.1)), x)
    state, x = update(state, x, vector(33, 0))
    _, x = update(state, x, vector(0, 444))
    close(x, [1 - 0.1 * (16.5 + 0.01), 2 - 0.1 * (222 + 0.02)])
    np.testing.assert_allclose(x, [-0.651, -20.202], atol=1e-4)


def test_the_state_of_accumulation_is_a_sum_and_a_count() -> None:
    """108. The count is of gradients in the sum: 0, 1, 0 for n = 2 (there 1, 2, 1)."""
    x = vector(0)
    state = setup(AccumGrad(2), x)
    counts = [state.state[1]]
    for _ in range(2):
        state, x = update(state, x, vector(1))
        counts.append(state.state[1])
    assert counts == [0, 1, 0]


def test_accumulating_no_gradients_is_refused() -> None:
    """109. AccumGrad(0)."""
    with pytest.raises(BadSetting):
        AccumGrad(0)


def test_the_first_gradient_of_a_round_replaces_the_sum() -> None:
    """110. So the buffer needs no zeroing, and a NaN of the last round is forgotten; in both forms."""
    for step in (update, update_):
        x: Any = vector(0)
        state = setup(Chain(AccumGrad(2), ClipNorm(1, throw=False), Descent(0.0)), x)
        for g in (np.nan, 1, 2):
            state, x = step(state, x, vector(g))
        close(state.state[0].sum, [2])


# -- 1.14 adjust ---------------------------------------------------------------------------------------------


def test_adjust_changes_eta_everywhere_and_keeps_the_state() -> None:
    """117. The pure form returns a new state, the other one changes it."""
    model = [vector(1), [vector(2)]]
    state, _ = update(setup(Momentum(), model), model, model)
    new = adjust(state, 0.3)
    assert (new[0].rule, new[1][0].rule) == (Momentum(0.3), Momentum(0.3))
    assert state[0].rule == Momentum()
    close(new[1][0].state.v, [0.02])
    adjust_(state, 0.4)
    assert state[0].rule == Momentum(0.4)


def test_adjust_changes_settings_by_name() -> None:
    """118. Several at once."""
    assert adjust(setup(Momentum(), vector(1)), eta=0.3, rho=0.7).rule == Momentum(0.3, 0.7)


def test_an_unknown_name_is_an_error() -> None:
    """119. It is ignored in silence there."""
    with pytest.raises(UnknownField, match="Momentum has no setting zeta; it has eta, rho"):
        adjust(setup(Momentum(), vector(1)), zeta=1.0)


def test_in_a_chain_each_setting_goes_to_the_rules_that_have_it() -> None:
    """120. eta to Adam, delta to ClipGrad."""
    state = adjust(adjust(setup(Chain(ClipGrad(), Adam()), vector(1)), 0.2), delta=3)
    assert state.rule == Chain(ClipGrad(3.0), Adam(0.2))


def test_settings_of_several_rules_of_a_chain_are_adjusted_together() -> None:
    """121. beta=(0.777, 0.909), delta=11.1."""
    state = adjust(setup(Chain(ClipGrad(), Adam()), vector(1)), beta=(0.777, 0.909), delta=11.1)
    assert state.rule == Chain(ClipGrad(11.1), Adam(beta=(0.777, 0.909)))


def test_a_velocity_survives_a_change_of_the_rate() -> None:
    """122. [-0.016, -0.088] of Nesterov."""
    x = vector(1, 2)
    state, x = update(setup(Nesterov(), x), x, vector(16, 88))
    adjust_(state, 0.123)
    assert state.rule == Nesterov(0.123)
    close(state.state.v, [-0.016, -0.088])


def test_adjust_acts_on_a_part_when_given_one() -> None:
    """123. `adjust_(state.layers[3], 0.04)`."""
    state = setup(Descent(), {"layers": [vector(i) for i in range(5)]})
    adjust_(state.layers[3], 0.04)
    assert [leaf.rule.eta for leaf in state.layers] == [0.1, 0.1, 0.1, 0.04, 0.1]


def test_what_changes_the_form_of_the_state_cannot_be_adjusted() -> None:
    """125. Structure is structure: `couple` of AdamW."""
    with pytest.raises(UnknownField, match=r"AdamW\.couple belongs to the structure of the rule"):
        adjust(AdamW(), couple=False)


def test_adjusting_nothing_is_an_error() -> None:
    """127. It says what to write."""
    with pytest.raises(UnknownField, match="adjust was given nothing to change"):
        adjust(setup(Descent(), vector(1)))


def test_adjust_keeps_the_frozen_flag() -> None:
    """128. In both forms."""
    state = freeze(setup(Descent(), vector(1)))
    adjust_(state, 0.2)
    assert adjust(state, 0.3).frozen


def test_adjusting_a_bare_leaf_shares_nothing_with_the_old_one() -> None:
    """129. There it shares the arrays of the state."""
    x = vector(1)
    state = setup(Momentum(), x)
    new = adjust(state, 0.3)
    update_(new, x, vector(1))
    close(state.state.v, [0])
    close(new.state.v, [0.3])


def test_rules_without_a_rate_are_passed_by_where_others_have_one() -> None:
    """130. Where none has one, it is an error; there it does nothing."""
    state = setup({"a": WeightDecay(), "b": Descent()}, {"a": vector(1), "b": vector(2)})
    adjust_(state, 0.5)
    assert (state.a.rule, state.b.rule) == (WeightDecay(), Descent(0.5))
    with pytest.raises(UnknownField, match="WeightDecay has no setting eta; it has lam"):
        adjust_(state.a, 0.5)


def test_a_change_of_beta_leaves_the_weights_of_the_past() -> None:
    """131. 1 - 0.9 stays, and the next step goes on from there with the new beta."""
    x: Any = vector(1)
    state, x = update(setup(Adam(), x), x, vector(1))
    adjust_(state, beta=(0.5, 0.5))
    close(state.state.weight, [0.1, 0.001])
    state, _ = update(state, x, vector(1))
    close(state.state.weight, [0.5 * 0.1 + 0.5, 0.5 * 0.001 + 0.5])


# -- 1.15 freeze and thaw ------------------------------------------------------------------------------------


def test_what_is_frozen_takes_no_step_and_keeps_its_state() -> None:
    """132. The other moves: 3 - 0.01 * 100 pi, with a velocity of pi."""
    model = Point(x=(vector(2),), y=vector(3))
    state = setup(Momentum(), model)
    freeze_(state.x)
    state, new = update(state, model, Point(x=(vector(100 * np.pi),), y=vector(100 * np.pi)))
    assert new.x[0] is model.x[0]
    close(state.x[0].state.v, [0])
    np.testing.assert_allclose(new.y, [-0.14159265358979312], rtol=1e-14)
    close(state.y.state.v, [np.pi])


def test_thawing_goes_on_where_freezing_stopped() -> None:
    """133. 3 - 0.2 * 100 and 4 - 0.2 * 1000."""
    model: Any = [vector(1, 2), vector(3, 4)]
    state = setup(Descent(0.1), model)
    freeze_(state[1])
    adjust_(state, 0.2)
    state, model = update(state, model, [vector(1, 10), vector(100, 1000)])
    close(model[0], [0.8, 0])
    close(model[1], [3, 4])
    thaw_(state)
    state, model = update(state, model, [vector(1, 10), vector(100, 1000)])
    close(model[1], [-17, -196])


def test_freezing_a_model_is_refused() -> None:
    """134. Only a state can be frozen."""
    with pytest.raises(BadState, match="a state is what `setup"):
        freeze_(Point(vector(1)))


def test_freezing_in_place_returns_nothing() -> None:
    """135. The pure form returns the state."""
    state = setup(Descent(), [vector(1)])
    assert freeze_(state) is None
    assert thaw_(state) is None
    assert freeze(state)[0].frozen


# -- 1.18 convergence ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [r for r in RULES if "Decay" not in repr(r) and "lam" not in repr(r)], ids=repr
)
def test_five_thousand_steps_find_a_linear_map(rule: Any) -> None:
    """Much as in lines 164 to 168, with the rules as they are by default."""
    random = np.random.default_rng(84)
    want = random.normal(size=(10, 10))
    w = want + random.uniform(-0.5, 0.5, (10, 10))
    state = setup(rule, w)
    for x in random.normal(size=(5000, 10)):
        update_(state, w, np.outer(2 * (w - want) @ x, x) / 10)
    assert np.mean(((w - want) @ random.normal(size=(10, 1000))) ** 2) < 0.001


# -- 1.19 a model and its gradient in one --------------------------------------------------------------------


def test_update_in_place_writes_the_parameters_and_the_state_and_never_the_gradient() -> None:
    """169. Momentum(1/9) in half precision; the state is of single precision here."""
    x, dx = np.array([1, 2, 3], "f2"), np.array([1, 0, -4], "f2")
    state = setup(Momentum(1 / 9), x)
    assert update_(state, x, dx)[1] is x
    np.testing.assert_array_equal(x, np.array([0.8887, 2.0, 3.445], "f2"))
    np.testing.assert_allclose(state.state.v, [1 / 9, 0, -4 / 9], rtol=1e-6)
    np.testing.assert_array_equal(dx, [1, 0, -4])


@both_updates
def test_a_tie_whose_gradient_is_summed_already_moves_once(step: Any) -> None:
    """170. [1] - 0.1 [1], where both places have the very same gradient."""
    x, dx = vector(1), vector(1)
    model = {"a": x, "b": (x, np.tanh)}
    _, new = step(setup(Descent(0.1), model), model, {"a": dx, "b": (dx, None)})
    close(new["a"], [0.9])
    assert new["b"][0] is new["a"]


def test_a_class_may_have_nothing_to_train() -> None:
    """172. Whatever it holds gets no state and stays."""

    @opt.register(trainable=())
    class Const:
        def __init__(self, val: Any) -> None:
            self.val = val

    model = [Const([vector(1)]), vector(2)]
    assert opt.trainable(model[0]) == {}
    assert setup(Descent(), model)[0] == ()
    assert stepped(Descent(), model, [Const([vector(9)]), vector(1)])[0] is model[0]


# -- 1.20 compiled steps -------------------------------------------------------------------------------------


@both_engines
def test_the_sign_of_a_scheduled_rate_is_not_checked(engine: str) -> None:
    """173. It is known only when the step runs: rates of 0.1, 0, -0.1."""
    rate: Any = opt.Linear(0.1, -0.1, 2)
    x: Any = vector(1)
    state = setup(Descent(rate), x, engine=engine)
    path = []
    for _ in range(3):
        state, x = update(state, x, vector(1))
        path.append(float(x[0]))
    close(path, [0.9, 0.9, 1.0])


@pytest.mark.parametrize("rule", [Descent, Momentum, Adam, AdamW, RAdam], ids=lambda r: r.__name__)
@pytest.mark.parametrize("inplace", [True, False], ids=["update_", "update"])
def test_no_rate_stands_in_a_compiled_kernel(rule: Any, inplace: bool) -> None:
    """174. 0.011 does not occur, and another rate has the very same kernel."""
    text = opt.kernel(rule(0.011), inplace=inplace)
    assert "def kernel(" in text
    assert "0.011" not in text
    assert text == opt.kernel(rule(0.5), inplace=inplace)


@both_engines
@both_updates
def test_both_arms_of_radam_are_those_of_its_formula(engine: str, step: Any) -> None:
    """175. Eight steps in single precision: four of momentum, then four that are rectified."""
    random = np.random.default_rng(175)
    wanted, m, v = random.normal(size=5), np.zeros(5), np.zeros(5)
    x: Any = wanted.astype("f4")
    state = setup(RAdam(0.1), x, engine=engine)
    bound, rectified = 2 / (1 - 0.999) - 1, 0
    for t in range(1, 9):
        g = random.normal(size=5)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rho = bound - 2 * t * 0.999**t / (1 - 0.999**t)
        dx = 0.1 * m / (1 - 0.9**t)
        if rho > 4:
            r = np.sqrt((rho - 4) * (rho - 2) * bound / ((bound - 4) * (bound - 2) * rho))
            dx = dx * r / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            rectified += 1
        wanted = wanted - dx
        state, x = step(state, x, g.astype("f4"))
        np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-6)
    assert rectified == 4


@both_engines
@both_updates
def test_every_engine_accumulates_alike(engine: str, step: Any) -> None:
    """176. Nothing, then the mean. In between the rules behind do not run; compiled ones do there."""
    x: Any = vector(10)
    state = setup(Chain(AccumGrad(2), Momentum(1.0, 0.5)), x, engine=engine)
    seen = []
    for g in (1, 3, 5, 7):
        state, x = step(state, x, vector(g))
        (_, count), (v,) = state.state
        seen.append((count, float(v[0]), float(x[0])))
    assert seen == [(1, 0, 10), (0, 2, 8), (1, 2, 8), (0, 7, 1)]


# -- 1.21 what a layer above adds ----------------------------------------------------------------------------


@both_updates
def test_a_rule_in_place_of_a_state_is_an_error_that_says_what_to_write(step: Any) -> None:
    """185. So is a tuple of one gradient, which is how some libraries return it."""
    model = {"a": vector(1)}
    with pytest.raises(BadState, match=r"write state = setup\(Descent\(eta=0\.1\), model\)"):
        step(Descent(), model, model)
    for there in (model, [vector(1)], Point(vector(1)), vector(1)):
        with pytest.raises(TreeMismatch, match="grads"):
            step(setup(Descent(), there), there, (there,))


# -- the whole list ------------------------------------------------------------------------------------------


def numbers_of(text: str) -> set[int]:
    """The numbers with which docstrings of tests begin, as in `64. The tie ...` or `34, 35. ...`."""
    tests = [f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")]
    begun = [re.match(r"(\d+(?:, \d+)*)\. ", ast.get_docstring(f) or "") for f in tests]
    return {int(n) for m in begun if m for n in m[1].split(", ")}


def numbers_tested() -> set[int]:
    """The numbers of all files of tests."""
    return set().union(*(numbers_of(f.read_text()) for f in Path(__file__).parents[1].rglob("test_*.py")))


def test_only_tests_can_have_numbers() -> None:
    text = """
def test_a(): "1. One."
def test_b(): "2, 3. Two."
def test_c(): "Four is 4. Or 5."
def test_d(): "6 and 7"
def a(): "8. No test."
"""
    assert numbers_of(text) == {1, 2, 3}


def test_every_number_is_tested_or_explained() -> None:
    assert numbers_tested() | set(UNTESTED) == set(range(1, 187))


def test_no_number_is_both_tested_and_explained_away() -> None:
    assert not numbers_tested() & set(UNTESTED)


def test_a_rule_made_from_another_may_give_its_settings_other_defaults() -> None:
    class Fast(Adam):
        eta = 0.5
        beta = (0.5, 0.6)

    assert settings(Fast()) == [("eta", 0.5), ("beta", (0.5, 0.6)), ("epsilon", 1e-8)]
    assert Fast(0.1).adjust(0.2).eta == 0.2
    assert Adam().eta == 0.001
