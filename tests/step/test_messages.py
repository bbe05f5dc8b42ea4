"""Every mistake that a newcomer can make, and the whole text that answers it.

A text says where, what was there, what is accepted and what to write, as far as they are known.
"""

import builtins
import collections
import math
import warnings
from collections.abc import Callable
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
    ClipGlobalNorm,
    ClipGrad,
    ClipNorm,
    Descent,
    DomainError,
    FloatParameter,
    KeyPath,
    Momentum,
    NoMatch,
    NoParameters,
    Rule,
    TraceError,
    TreeMismatch,
    UnknownField,
    WeightDecay,
    adjust,
    adjust_,
    destructure,
    freeze_,
    setup,
    trainables,
    update,
    update_,
)

ADAM = "Adam(eta=0.001, beta=(0.9, 0.999), epsilon=1e-08)"


# -- the table -----------------------------------------------------------------------------------------------

MISTAKES: list[Any] = []
WARNINGS: list[Any] = []


def answers(kind: type[BaseException], text: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """The decorated function makes a mistake; this is the error, and its whole text."""

    def note(mistake: Callable[[], object]) -> Callable[[], object]:
        MISTAKES.append(pytest.param(mistake, kind, text, id=mistake.__name__))
        return mistake

    return note


def warns(kind: type[Warning], text: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """The decorated function does what one hardly means; this is the warning, and its whole text."""

    def note(doubt: Callable[[], object]) -> Callable[[], object]:
        WARNINGS.append(pytest.param(doubt, kind, text, id=doubt.__name__))
        return doubt

    return note


def model() -> dict[str, Any]:
    return {"w": np.ones((3, 4)), "b": np.zeros(4)}


def grads() -> dict[str, Any]:
    return {"w": np.ones((3, 4)), "b": np.ones(4)}


def state(rule: Any = None) -> Any:
    return setup(Adam() if rule is None else rule, model())


def step_with(*, model: Any = None, grads: Any = None, rule: Any = None) -> object:
    """One step of the usual model, with one thing wrong."""
    good = {"w": np.ones((3, 4)), "b": np.zeros(4)}
    return update(state(rule), good if model is None else model, {**good} if grads is None else grads)


def traced(apply: Any, init: Any = lambda _self, _x: (), x: Any = None) -> object:
    """The set-up of a rule `Mine` with this `apply` (and `init`)."""
    return setup(mine(apply, init), np.ones((2, 3)) if x is None else x)


def mine(apply: Any, init: Any = lambda _self, _x: ()) -> Any:
    return type("Mine", (Rule,), {"init": init, "apply": apply})()


def zeros(_self: Any, x: Any) -> Any:
    return opt.zeros_like(x)


# -- making rules --------------------------------------------------------------------------------------------


@answers(UnknownField, "Adam has no setting lr; it has eta, beta, epsilon; write eta=")
def a_rule_made_with_an_unknown_setting() -> None:
    Adam(lr=0.1)


INSTEAD_OF_DECAY = "or Chain({0}(...), DecoupledDecay(lam)), as AdamW is for Adam"


@answers(
    UnknownField,
    "Adam has no setting weight_decay; it has eta, beta, epsilon; write Chain(WeightDecay(lam), Adam(...)), "
    + INSTEAD_OF_DECAY.format("Adam"),
)
def decay_for_a_rule_that_has_none() -> None:
    Adam(1e-3, weight_decay=0.1)


@answers(
    UnknownField,
    "Lion has no setting lam; it has eta, beta; write Chain(WeightDecay(lam), Lion(...)), "
    + INSTEAD_OF_DECAY.format("Lion"),
)
def decay_by_our_name_for_a_rule_that_has_none() -> None:
    opt.Lion(lam=0.1)


@answers(
    UnknownField, "Adam has no setting amsgrad; it has eta, beta, epsilon; take TorchAMSGrad, or AMSGrad"
)
def a_flag_that_is_a_rule_of_its_own() -> None:
    Adam(amsgrad=True)


@answers(UnknownField, "Adam has no setting b1; it has eta, beta, epsilon; write beta=")
def one_of_two_factors_by_the_name_of_optax() -> None:
    Adam(b1=0.9)


@answers(UnknownField, "EMA has no setting decay; it has rule, rho; write rho=")
def the_decay_of_an_average() -> None:
    opt.EMA(Adam(), decay=0.99)


COSINE = "it has eta, steps, warmup, end, start, cycles, steps_factor, eta_factor"


@answers(UnknownField, f"Cosine has no setting T_max; {COSINE}; write steps=")
def the_length_of_a_schedule_by_the_name_of_torch() -> None:
    opt.Cosine(0.1, T_max=3)


@answers(UnknownField, f"Cosine has no setting warmup_steps; {COSINE}; write warmup=")
def the_warm_up_of_a_schedule_by_the_name_of_optax() -> None:
    opt.Cosine(0.1, 100, warmup_steps=3)


@answers(BadSetting, "Adam.eta is -1.0; the learning rate cannot be negative")
def a_negative_learning_rate() -> None:
    Adam(-1)


@answers(BadSetting, "Descent.eta is -0.1; the learning rate cannot be negative")
def a_negative_learning_rate_of_descent() -> None:
    Descent(-0.1)


@answers(BadSetting, "Adam.eta is nan; it takes a number")
def a_learning_rate_that_is_not_a_number() -> None:
    Adam(float("nan"))


@answers(BadSetting, "Adam.eta is 1j; it takes a real number, or a schedule of it")
def a_complex_learning_rate() -> None:
    Adam(1j)


@answers(BadSetting, "Adam.eta is True; it takes a real number, or a schedule of it")
def a_bool_for_a_number() -> None:
    Adam(True)


@answers(BadSetting, "Adam.eta is '0.1'; it takes a real number, or a schedule of it")
def a_string_for_a_number() -> None:
    Adam("0.1")


@answers(BadSetting, "Adam.eta is None; it takes a real number, or a schedule of it")
def nothing_for_a_number() -> None:
    Adam(None)


@answers(BadSetting, "Momentum.eta is array([0.1]); it takes a real number, or a schedule of it")
def an_array_for_a_number() -> None:
    Momentum(np.array([0.1]))


@answers(BadSetting, "Adam.beta is 0.9; it takes a tuple of 2 numbers")
def a_number_for_a_tuple() -> None:
    Adam(beta=0.9)


@answers(BadSetting, "Adam.beta is (0.9, 0.99, 0.999); it takes a tuple of 2 numbers")
def a_tuple_that_is_too_long() -> None:
    Adam(beta=(0.9, 0.99, 0.999))


@answers(BadSetting, "Adam.beta[1] is 1j; it takes a real number, or a schedule of it")
def a_complex_number_in_a_tuple() -> None:
    Adam(beta=(0.9, 1j))


@answers(
    BadSetting,
    "Adam.beta is one schedule, Constant(eta=0.9); it has 2 numbers: write a tuple of 2, "
    "each a number or a schedule",
)
def one_schedule_for_a_tuple() -> None:
    Adam(beta=opt.Constant(0.9))


@answers(
    BadSetting,
    "Adam.eta is <class 'optimisers.schedules.Cosine'>; it takes a real number, or a schedule of it",
)
def a_class_for_a_schedule() -> None:
    Adam(opt.Cosine)


@answers(BadSetting, "Adam.beta is (0.9, 1.0); it takes numbers in [0, 1)")
def a_decay_of_one() -> None:
    Adam(beta=(0.9, 1))


@answers(BadSetting, "Momentum.rho is 1.0; it takes numbers in [0, 1)")
def a_momentum_of_one() -> None:
    Momentum(rho=1.0)


@answers(BadSetting, "Adam.epsilon is -1.0; it cannot be negative")
def a_negative_epsilon() -> None:
    Adam(epsilon=-1.0)


@answers(BadSetting, "WeightDecay.lam is -1.0; it cannot be negative")
def a_negative_decay() -> None:
    WeightDecay(-1)


@answers(BadSetting, "ClipNorm.omega is -1.0; it cannot be negative")
def a_negative_norm() -> None:
    ClipNorm(-1)


@answers(BadSetting, "ClipNorm.p is '2'; it takes a number, inf or -inf")
def a_string_for_the_p_of_a_norm() -> None:
    ClipNorm(1.0, "2")


@answers(BadSetting, "ClipNorm.throw is 'no'; it takes True or False")
def a_string_for_a_switch() -> None:
    ClipNorm(throw="no")


@answers(BadSetting, "AccumGrad.n is 0; it takes a whole number, 1 or more")
def accumulating_nothing() -> None:
    AccumGrad(0)


@answers(BadSetting, "AccumGrad.n is 1.5; it takes a whole number")
def accumulating_a_part() -> None:
    AccumGrad(1.5)


@answers(
    BadSetting,
    "Chain was given <class 'optimisers.rules.adam.Adam'>; it takes rules, such as "
    "Chain(ClipGrad(), Adam()); "
    "write Adam()",
)
def a_class_in_a_chain() -> None:
    Chain(Adam)


@answers(
    BadSetting,
    "Chain was given [Descent(eta=0.1)]; it takes rules, such as Chain(ClipGrad(), Adam()); write "
    "Chain(*rules)",
)
def a_list_in_a_chain() -> None:
    Chain([Descent()])


@answers(BadSetting, "Chain was given 3; it takes rules, such as Chain(ClipGrad(), Adam())")
def a_number_in_a_chain() -> None:
    Chain(Adam(), 3)


@answers(UnknownField, "Chain has no setting rules; its rules go by place, such as Chain(ClipGrad(), Adam())")
def the_rules_of_a_chain_by_name() -> None:
    Chain(rules=(Adam(),))


# -- setup ---------------------------------------------------------------------------------------------------


@answers(
    BadSetting,
    "model['b']: Muon steps matrices, and this array has shape (4,); give it another rule: write "
    '{opt.hidden_matrices: Muon(), "**": AdamW()} where the rule goes',
)
def a_rule_of_matrices_for_a_vector() -> None:
    setup(opt.Muon(), model())


@answers(BadState, "setup was given <class 'optimisers.rules.adam.Adam'> where the rule goes; write Adam()")
def a_class_for_a_rule() -> None:
    setup(Adam, model())


@answers(BadState, "setup was given 'adam' where the rule goes; write setup(Adam(), model)")
def a_name_for_a_rule() -> None:
    setup("adam", model())


@answers(BadState, f"setup was given the rule {ADAM} where the model goes; write setup(rule, model)")
def a_rule_for_a_model() -> None:
    setup(model(), Adam())


@answers(BadState, "setup was given a state where the model goes; write setup(rule, model)")
def a_state_for_a_model() -> None:
    setup(Adam(), state())


@answers(
    BadState,
    "the rule for model['w'] is <class 'optimisers.rules.adam.Adam'>; it takes a rule, such as "
    "Adam(); write Adam()",
)
def a_class_for_the_rule_of_a_part() -> None:
    setup({"**": Adam}, model())


@answers(BadState, "the rule for model['w'] is 'adam'; it takes a rule, such as Adam()")
def a_function_that_gives_a_name() -> None:
    setup(lambda _path, _x: "adam", model())


@answers(
    NoMatch,
    "no rule for model['b']; the keys are 'w'; add \"**\" for the rest, with None as its rule to "
    "train nothing there",
)
def a_parameter_that_no_glob_matches() -> None:
    setup({"w": Adam()}, model())


@answers(NoMatch, "'bias' matches no parameter; there are w, b")
def a_glob_that_matches_no_parameter() -> None:
    setup({"bias": Adam(), "**": Adam()}, model())


@answers(NoMatch, "'w' takes no parameter, since keys before it take all that it picks; put it first")
def a_glob_that_never_wins() -> None:
    setup({"**": Adam(), "w": Descent()}, model())


@answers(
    NoMatch,
    "3 is no selector; a dict of rules takes globs, such as '**.bias', and selectors, such as opt.matrices",
)
def a_number_for_a_glob() -> None:
    setup({3: Adam()}, model())


@answers(BadSetting, "engine='cuda'; it takes 'numba', 'triton', 'interpret', or None to choose")
def an_unknown_engine() -> None:
    setup(Adam(), model(), engine="cuda")


@answers(TreeMismatch, "the model is the Python number 3.0; write np.array(3.0) to train it")
def a_python_number_for_a_model() -> None:
    setup(Adam(), 3.0)


class Box:
    """Holds an array, and nobody knows."""

    def __init__(self) -> None:
        self.w = np.ones(2)


class Slotted:
    """Holds an array in a slot."""

    __slots__ = ("w",)

    def __init__(self) -> None:
        self.w = np.ones(2)


class Layers:
    """Holds arrays in a list."""

    def __init__(self) -> None:
        self.layers = [np.ones(2)]


@answers(
    TreeMismatch,
    "model['net'][0] is a Box, which holds an array in model['net'][0].w but is no container known "
    "here; "
    "write opt.register(Box), or make it a dataclass",
)
def a_class_that_is_not_registered() -> None:
    setup(Adam(), {"net": [Box()], "w": np.ones(2)})


@answers(
    TreeMismatch,
    "model['net'] is a Slotted, which holds an array in model['net'].w but is no container known "
    "here; "
    "write opt.register(Slotted), or make it a dataclass",
)
def a_class_with_slots_that_is_not_registered() -> None:
    setup(Adam(), {"net": Slotted(), "w": np.ones(2)})


@answers(
    TreeMismatch,
    "model['net'] is a Layers, which holds an array in model['net'].layers but is no container "
    "known here; "
    "write opt.register(Layers), or make it a dataclass",
)
def a_class_that_hides_arrays_in_a_list() -> None:
    setup(Adam(), {"net": Layers(), "w": np.ones(2)})


@answers(
    TreeMismatch,
    "model['net'] is a deque, which holds an array but is no container known here; "
    "make it a list, a tuple or a dict",
)
def a_collection_that_is_no_container() -> None:
    setup(Adam(), {"net": collections.deque([np.ones(2)]), "w": np.ones(2)})


@answers(TreeMismatch, "model['x'][1] holds itself; a model is a tree")
def a_model_that_holds_itself() -> None:
    m: dict[str, Any] = {"x": [np.ones(2)]}
    m["x"].append(m)
    setup(Adam(), m)


OVERLAP = "share memory without being the same array or its transpose; train one of them, or copy"


@answers(TreeMismatch, f"model['a'] and model['b'] {OVERLAP}")
def parameters_that_overlap() -> None:
    z = np.ones(6)
    setup(Adam(), {"a": z[:4], "b": z[2:]})


@answers(TreeMismatch, f"model['a'] and model['b'] {OVERLAP}")
def a_parameter_and_its_reshaped_view() -> None:
    z = np.ones(6)
    setup(Adam(), {"a": z, "b": z.reshape(2, 3)})


@answers(
    TreeMismatch,
    "Net was registered with trainable 'c', which is not among its children a, b",
)
def a_registered_class_with_an_unknown_trainable() -> None:
    @opt.register(children=("a", "b"), trainable=("c",))
    class Net:
        a = b = np.ones(2)

    setup(Adam(), Net())


@answers(TreeMismatch, "model lacks 'q', with which Net was registered as a child")
def a_registered_class_without_its_child() -> None:
    @opt.register(children=("q",))
    class Net:
        pass

    setup(Adam(), Net())


@answers(TypeError, "register takes a class; 3 is not one")
def registering_what_is_no_class() -> None:
    opt.register(3)


@warns(
    NoParameters,
    "the model has no array of floating point or complex numbers: nothing will be trained",
)
def a_model_of_whole_numbers() -> None:
    setup(Adam(), {"a": np.arange(3), "b": "text"})


@warns(
    NoParameters,
    "the model has no array of floating point or complex numbers: nothing will be trained",
)
def an_empty_model() -> None:
    setup(Adam(), {})


@warns(FloatParameter, "model['a'] is the number 2.5, which does not train; write np.array(2.5) to train it")
def a_python_float_beside_arrays() -> None:
    setup(Adam(), {"w": np.ones(2), "a": 2.5})


@warns(FloatParameter, "model['a'] is the number 2.5, which does not train; write np.array(2.5) to train it")
def a_numpy_number_beside_arrays() -> None:
    setup(Adam(), {"w": np.ones(2), "a": np.float64(2.5)})


@warns(FloatParameter, "model['a'] is the number 2.5, which does not train; write np.array(2.5) to train it")
def a_narrow_numpy_number_beside_arrays() -> None:
    setup(Adam(), {"w": np.ones(2), "a": np.float32(2.5)})


# -- update: what is given for what --------------------------------------------------------------------------


@answers(BadState, "the gradients are missing; write state, model = update(state, model, grads)")
def an_update_without_gradients() -> None:
    update(state(), model())


@answers(BadState, "the gradients are missing; write state, model = update_(state, model, grads)")
def an_update_in_place_without_gradients() -> None:
    update_(state(), model())


@answers(BadState, f"a state was wanted and the rule {ADAM} came; write state = setup({ADAM}, model)")
def a_rule_for_a_state() -> None:
    update(Adam(), model(), grads())


@answers(
    BadState,
    "a state was wanted and the rule <class 'optimisers.rules.adam.Adam'> came; write state = "
    "setup(Adam(), model)",
)
def a_rule_class_for_a_state() -> None:
    update(Adam, model(), grads())


@answers(BadState, "the second argument is a state; the order is update(state, model, grads)")
def state_and_model_swapped() -> None:
    update(model(), state(), grads())


NO_STATE = "a state was wanted and a dict came; a state is what `setup(rule, model)` returns, or a part of it"


@answers(BadState, NO_STATE)
def a_model_for_a_state() -> None:
    update(model(), model(), grads())


@answers(BadState, NO_STATE)
def freezing_a_model() -> None:
    freeze_(model())


@answers(BadState, NO_STATE)
def thawing_a_model() -> None:
    opt.thaw_(model())


@answers(BadState, NO_STATE)
def adjusting_a_model() -> None:
    adjust_(model(), 0.1)


@answers(BadState, NO_STATE)
def reading_the_settings_of_a_model() -> None:
    opt.current(model())


@answers(BadState, NO_STATE)
def explaining_a_model() -> None:
    opt.explain(model())


@answers(
    BadState,
    "a state was wanted and () came: nothing is trained there; a state is what `setup(rule, model)` "
    "returns, or a part of it, where the model has arrays of floating point or complex numbers",
)
def freezing_what_is_not_trained() -> None:
    freeze_(setup(Adam(), {"w": np.ones(2), "n": 3})["n"])


@answers(
    BadState,
    "a state was wanted and a ndarray came; a state is what `setup(rule, model)` returns, or a part of it",
)
def freezing_an_array() -> None:
    freeze_(np.ones(2))


# -- what newcomers write ------------------------------------------------------------------------------------


def net() -> Any:
    return {"blocks": [{"w": np.ones(3)}, {"w": np.ones(3)}]}


STAR = "`*` is one key, `**` any number of keys: write"


@answers(
    NoMatch, f"where='blocks.*' matches no parameter; there are blocks.0.w, blocks.1.w; {STAR} 'blocks.**'"
)
def one_star_for_many_keys() -> None:
    freeze_(setup(Adam(), net()), where="blocks.*")


@answers(
    NoMatch, f"where='blocks.1' matches no parameter; there are blocks.0.w, blocks.1.w; {STAR} 'blocks.1.**'"
)
def a_container_for_its_arrays() -> None:
    freeze_(setup(Adam(), net()), where="blocks.1")


@answers(NoMatch, f"'w' matches no parameter; there are blocks.0.w, blocks.1.w; {STAR} '**.w'")
def a_name_for_a_path() -> None:
    setup({"w": Adam(), "**": Descent()}, net())


@answers(
    NoMatch,
    "where='model.blocks.0.w' matches no parameter; there are blocks.0.w, blocks.1.w; write 'blocks.0.w'",
)
def a_path_that_begins_with_the_name_of_the_model() -> None:
    freeze_(setup(Adam(), net()), where="model.blocks.0.w")


@answers(
    NoMatch, "where='blocks.2.w' matches no parameter; there are blocks.0.w, blocks.1.w; write 'blocks.1.w'"
)
def a_path_that_is_nearly_one() -> None:
    freeze_(setup(Adam(), net()), where="blocks.2.w")


BELONGS = "settings belong to rules: write"


@answers(BadState, f"a state has no parts to replace; {BELONGS} opt.adjust_(state, eta=0.01)")
def a_rate_assigned_to_a_state() -> None:
    state().eta = 0.01


@answers(BadState, f"a state has no parts to replace; {BELONGS} opt.adjust_(state['blocks'][1], eta=0.01)")
def a_rate_by_another_name_assigned_to_a_part() -> None:
    setup(Adam(), net())["blocks"][1].lr = 0.01


@answers(BadState, "a state has no parts to replace; assign state['w'].rule or .state of a leaf")
def an_item_assigned_to_a_state() -> None:
    state()["w"] = Adam()


@answers(
    BadState,
    f"state['w'] is a Leaf, with rule, state and frozen; {BELONGS} opt.adjust_(state['w'], beta=(0.8, 0.9))",
)
def a_setting_assigned_to_a_leaf() -> None:
    state()["w"].beta = (0.8, 0.9)


@answers(BadState, "state['w'] is a Leaf, with rule, state and frozen")
def anything_else_assigned_to_a_leaf() -> None:
    state()["w"].m = np.zeros(3)


@answers(AttributeError, f"state has no eta; it has w, b; {BELONGS} opt.current(state)")
def a_rate_read_from_a_state() -> None:
    _ = state().eta


@answers(
    AttributeError,
    f"state['w'] has no eta; it is a Leaf, with rule, state and frozen; {BELONGS} state['w'].rule.eta",
)
def a_rate_read_from_a_leaf() -> None:
    _ = state()["w"].eta


@answers(KeyError, "state['w'] has no 'm'; it is a Leaf, with rule, state and frozen")
def an_item_of_a_leaf() -> None:
    _ = state()["w"]["m"]


class Unannotated(Rule):
    eta = 0.1

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, self.eta * dx


CONSTANT = "eta = 0.1 has no annotation: write eta: float = 0.1"


@answers(UnknownField, f"Unannotated takes 0 settings and was given 1; it has none; {CONSTANT}")
def a_setting_without_annotation_given_by_place() -> None:
    Unannotated(0.2)


@answers(UnknownField, f"Unannotated has no setting eta; it has none; {CONSTANT}")
def a_setting_without_annotation_given_by_name() -> None:
    Unannotated(eta=0.2)


@answers(UnknownField, f"Unannotated has no setting eta; it has none; {CONSTANT}")
def a_setting_without_annotation_adjusted() -> None:
    adjust_(state(Unannotated()), 0.2)


@answers(UnknownField, "Adam takes 3 settings and was given 4; it has eta, beta, epsilon")
def more_settings_than_a_rule_has() -> None:
    Adam(0.1, (0.9, 0.99), 1e-8, 0.01)


@answers(
    BadSetting,
    "Odd.eta is a function or a property in the place of a setting; give it a number, or another name",
)
def a_method_in_the_place_of_a_setting() -> None:
    type("Odd", (Descent,), {"eta": lambda _self: 0.1})


ONE_ARRAY = "a rule sees one array; for a model write opt.setup(rule, model)"


@answers(TypeError, f"no array among dict; {ONE_ARRAY}")
def init_of_a_rule_given_a_model() -> None:
    Adam().init(model())


@answers(TypeError, f"no array among list; {ONE_ARRAY}")
def an_operation_given_a_list() -> None:
    opt.sqrt([1.0, 2.0])


class array:  # noqa: N801 as MLX calls it
    """What stands for an array of a library that nobody registered."""

    __module__ = "mlx.core"
    shape, dtype = (3,), np.dtype(np.float32)

    def __add__(self, other: object) -> Any:
        return self


NOT_KNOWN = (
    "an array of mlx.core, a library that is not known here, as numpy, torch, jax, cupy are; "
    "opt.register_backend teaches it"
)


@answers(TreeMismatch, f"model['w'] is {NOT_KNOWN}")
def a_model_of_an_unknown_library() -> None:
    setup(Adam(), {"w": array(), "b": np.ones(3)})


@answers(TreeMismatch, f"model is {NOT_KNOWN}")
def a_vector_of_an_unknown_library() -> None:
    destructure(array())


@answers(TypeError, f"no array among array; it is {NOT_KNOWN}")
def an_operation_given_an_array_of_an_unknown_library() -> None:
    opt.sqrt(array())


@answers(
    BadState,
    "a state was wanted and (state, model) came, as an update gives them; write state, model = "
    "update(state, model, grads)",
)
def what_an_update_gives_kept_as_the_state() -> None:
    kept = update_(state(), model(), grads())
    update_(kept, model(), grads())


@answers(
    BadState,
    "the function that chooses rules is called with (path, array), which it does not take; write "
    "lambda path, x: Adam()",
)
def a_function_of_one_argument_for_the_rules() -> None:
    setup(lambda _x: Adam(), model())


CLOCK = (
    "is a function that cannot be called with one argument; a schedule is a function of the clock: write "
    "lambda clock: 0.1 / (1 + clock)"
)


@answers(BadSetting, f"Adam.eta {CLOCK}")
def a_schedule_of_two_arguments() -> None:
    Adam(lambda _epoch, _step: 0.1)


@answers(BadSetting, f"Adam.beta[0] {CLOCK}")
def a_schedule_without_argument_in_a_tuple() -> None:
    Adam(beta=(lambda: 0.9, 0.999))


@answers(
    TraceError,
    "the state of Mine has another shape than x in init and the shape of x in apply; let init return "
    "zeros_like(x)",
)
def a_state_of_a_fixed_shape() -> None:
    traced(lambda _self, s, _x, dx: (s + dx, dx), lambda _self, _x: np.zeros(5), np.ones(4))


# -- update: the model is not that of setup ------------------------------------------------------------------


ANOTHER = "call `setup` again for another model"


@answers(TreeMismatch, f"model is a list; `setup` saw a dict; {ANOTHER}")
def a_model_of_another_kind() -> None:
    step_with(model=[np.ones(2)])


@answers(TreeMismatch, f"model has no 'b', which `setup` saw; {ANOTHER}")
def a_model_without_a_key() -> None:
    step_with(model={"w": np.ones((3, 4))})


@answers(TreeMismatch, f"model has 'c', which `setup` did not see; {ANOTHER}")
def a_model_with_another_key() -> None:
    step_with(model={**model(), "c": np.ones(2)})


@answers(TreeMismatch, f"model['layers'] has 3 entries; `setup` saw 2; {ANOTHER}")
def a_model_with_another_layer() -> None:
    s = setup(Adam(), {"layers": [np.ones(2), np.ones(2)]})
    m = {"layers": [np.ones(2), np.ones(2), np.ones(2)]}
    update(s, m, m)


@answers(TreeMismatch, f"model['layers'] has 1 entry; `setup` saw 2; {ANOTHER}")
def a_model_without_a_layer() -> None:
    s = setup(Adam(), {"layers": [np.ones(2), np.ones(2)]})
    m = {"layers": [np.ones(2)]}
    update(s, m, m)


@answers(TreeMismatch, f"model['b'] has shape (5,); `setup` saw (4,); {ANOTHER}")
def a_parameter_of_another_shape() -> None:
    step_with(model={**model(), "b": np.zeros(5)})


@answers(TreeMismatch, f"model['b'] has type float32; `setup` saw float64; {ANOTHER}")
def a_parameter_of_another_type() -> None:
    step_with(model={**model(), "b": np.zeros(4, np.float32)})


@answers(TreeMismatch, "model['b'] is of type NoneType; `setup` saw an array of numpy")
def a_parameter_that_is_gone() -> None:
    step_with(model={**model(), "b": None})


@answers(TreeMismatch, "model['b'] is the Python float 0.0; `setup` saw an array of numpy")
def a_parameter_that_has_become_a_number() -> None:
    step_with(model={**model(), "b": 0.0})


BROKEN = "were one array at `setup` and are not now; tie them again, or call `setup` again"


@answers(TreeMismatch, f"model['a'] and model['b'][0] {BROKEN}")
def a_broken_tie() -> None:
    z = np.ones(3)
    s = setup(Adam(), {"a": z, "b": [z]})
    m = {"a": z, "b": [z.copy()]}
    update(s, m, m)


@answers(TreeMismatch, f"model['a'] and model['b'] {BROKEN}")
def a_tie_that_is_transposed_now() -> None:
    z = np.ones((3, 3))
    s = setup(Adam(), {"a": z, "b": z})
    m = {"a": z, "b": z.T}
    update(s, m, {"a": z, "b": None})


# -- update: the gradient does not fit -----------------------------------------------------------------------


STRUCTURE = "it takes the structure of the model, with w, b"


@answers(TreeMismatch, f"grads has no 'b' (None means no step there); {STRUCTURE}")
def a_gradient_without_a_key() -> None:
    step_with(grads={"w": np.ones((3, 4))})


@answers(TreeMismatch, f"grads has 'c', which is not in the model; {STRUCTURE}")
def a_gradient_with_another_key() -> None:
    step_with(grads={**grads(), "c": np.ones(2)})


@answers(
    TreeMismatch,
    "grads['a'][0] has 'v', which is not in the model; it takes the structure of the model, with w",
)
def a_gradient_with_another_key_deep_inside() -> None:
    m = {"a": [{"w": np.ones(2)}]}
    update(setup(Adam(), m), m, {"a": [{"v": np.ones(2)}]})


@answers(TreeMismatch, "grads['a'] has 1 entry, not 2; it takes the structure of the model, with 0, 1")
def a_gradient_that_is_too_short() -> None:
    m = {"a": [np.ones(2), np.ones(2)]}
    update(setup(Adam(), m), m, {"a": [np.ones(2)]})


@answers(TreeMismatch, "grads is an array of shape (2,); the model has a dict there")
def an_array_for_the_gradient_of_a_branch() -> None:
    step_with(grads=np.ones(2))


@answers(TreeMismatch, f"grads has a float where a container stands; {STRUCTURE}")
def a_number_for_the_gradient_of_a_branch() -> None:
    step_with(grads=1.0)


@answers(TreeMismatch, "gradient of shape (4, 3) for parameters of shape (3, 4), at grads['w']")
def a_transposed_gradient() -> None:
    step_with(grads={"w": np.ones((4, 3)), "b": np.ones(4)})


@answers(TreeMismatch, "gradient of shape (1, 4) for parameters of shape (3, 4), at grads['w']")
def a_gradient_that_would_broadcast_along_an_axis() -> None:
    step_with(grads={"w": np.ones((1, 4)), "b": np.ones(4)})


@answers(TreeMismatch, "gradient of shape (4,) for parameters of shape (3, 4), at grads['w']")
def a_gradient_that_would_broadcast_over_rows() -> None:
    step_with(grads={"w": np.ones(4), "b": np.ones(4)})


@answers(TreeMismatch, "gradient of shape () for parameters of shape (3, 4), at grads['w']")
def a_gradient_that_would_broadcast_everywhere() -> None:
    step_with(grads={"w": np.ones(()), "b": np.ones(4)})


@answers(TreeMismatch, "gradient of shape (4,) for parameters of shape (3,), at grads")
def a_gradient_of_a_bare_array_of_another_shape() -> None:
    update(setup(Adam(), np.ones(3)), np.ones(3), np.ones(4))


@answers(
    TreeMismatch, "grads['b'] is the Python float 0.0; it takes an array of shape (4,), or None for no step"
)
def a_python_float_for_a_gradient() -> None:
    step_with(grads={**grads(), "b": 0.0})


@answers(TreeMismatch, "grads['b'] is the number 0.0; it takes an array of shape (4,), or None for no step")
def a_numpy_number_for_a_gradient() -> None:
    step_with(grads={**grads(), "b": np.float64(0.0)})


@answers(TreeMismatch, "grads['b'] is of type list; it takes an array of shape (4,), or None for no step")
def a_list_for_a_gradient() -> None:
    step_with(grads={**grads(), "b": [0.0] * 4})


@answers(TreeMismatch, "grads['b'] is complex for real parameters; take its real part")
def a_complex_gradient_for_real_parameters() -> None:
    step_with(grads={**grads(), "b": np.ones(4, complex)})


@answers(TreeMismatch, "grads['b'] has elements of type object; it takes numbers, or None for no step")
def a_gradient_of_objects() -> None:
    step_with(grads={**grads(), "b": np.ones(4, object)})


@answers(TreeMismatch, "gradients of shapes (3, 2) and (2, 3) for one array, at grads['a'] and grads['b']")
def gradients_of_a_tie_of_two_shapes() -> None:
    z = np.ones((3, 2))
    m = {"a": z, "b": z}
    update(setup(Adam(), m), m, {"a": np.ones((3, 2)), "b": np.ones((2, 3))})


@answers(TreeMismatch, "grads['b'] is a float; it takes an array, or None for no step")
def a_number_for_the_gradient_of_a_tie() -> None:
    z = np.ones(2)
    m = {"a": z, "b": z}
    update(setup(Adam(), m), m, {"a": np.ones(2), "b": 1.0})


def nan_gradient(value: float = math.nan) -> dict[str, Any]:
    return {"w": np.ones((3, 4)), "b": np.array([1.0, value, 0.0, 0.0])}


@answers(
    DomainError,
    "gradient has 2-norm nan; ClipNorm takes finite ones, ClipNorm(..., throw=False) lets others "
    "pass, at grads['b']",
)
def a_gradient_with_nan_under_clip_norm() -> None:
    step_with(rule=ClipNorm(), grads=nan_gradient())


@answers(
    DomainError,
    "gradient has 1-norm inf; ClipNorm takes finite ones, ClipNorm(..., throw=False) lets others "
    "pass, at grads['b']",
)
def a_gradient_with_infinity_under_clip_norm_in_a_chain() -> None:
    step_with(rule=Chain(ClipNorm(1.0, 1), Adam()), grads=nan_gradient(math.inf))


@answers(
    DomainError,
    "the gradients have global norm nan; ClipGlobalNorm takes finite ones, ClipGlobalNorm(..., "
    "throw=False) lets "
    "others pass, at grads['b']",
)
def a_gradient_with_nan_under_clip_global_norm() -> None:
    step_with(rule=ClipGlobalNorm(), grads=nan_gradient())


# -- adjust --------------------------------------------------------------------------------------------------


@answers(UnknownField, "Adam has no setting lr; it has eta, beta, epsilon; write eta=")
def adjusting_an_unknown_setting() -> None:
    adjust(state(), lr=0.1)


@answers(UnknownField, "Adam has no setting lr; it has eta, beta, epsilon; write eta=")
def adjusting_an_unknown_setting_in_place() -> None:
    adjust_(state(), lr=0.1)


@answers(UnknownField, "Adam has no setting lr; it has eta, beta, epsilon; write eta=")
def adjusting_an_unknown_setting_of_a_rule() -> None:
    Adam().adjust(lr=0.1)


@answers(UnknownField, "Chain has no setting lr; it has delta, eta, beta, epsilon; write eta=")
def adjusting_an_unknown_setting_of_a_chain() -> None:
    adjust_(state(Chain(ClipGrad(), Adam())), lr=0.1)


@answers(UnknownField, "WeightDecay has no setting eta; it has lam")
def adjusting_a_learning_rate_that_is_not_there() -> None:
    adjust_(state(WeightDecay()), 0.1)


FIXED = (
    "belongs to the structure of the rule and cannot be adjusted; make a new rule and call `setup` with it"
)


@answers(UnknownField, f"AdamW.couple {FIXED}")
def adjusting_the_structure_of_a_rule() -> None:
    adjust_(state(AdamW()), couple=False)


@answers(UnknownField, f"ClipNorm.p {FIXED}")
def adjusting_the_structure_of_a_rule_in_a_chain() -> None:
    adjust_(state(Chain(ClipNorm(), Adam())), p=3)


@answers(
    UnknownField, "adjust was given nothing to change; write adjust(state, 0.01) or adjust(state, rho=0.9)"
)
def adjusting_nothing() -> None:
    adjust_(state())


@answers(BadSetting, "Adam.eta is -1.0; the learning rate cannot be negative")
def adjusting_to_a_negative_learning_rate() -> None:
    adjust_(state(), -1)


@answers(BadSetting, "Adam.beta is 0.9; it takes a tuple of 2 numbers")
def adjusting_a_tuple_to_a_number() -> None:
    adjust_(state(), beta=0.9)


@answers(BadState, "a rule has no parts for `where` to pick from; adjust the state")
def adjusting_a_part_of_a_rule() -> None:
    adjust(Adam(), 0.1, where="w")


# -- selectors -----------------------------------------------------------------------------------------------


@answers(NoMatch, "where='**.bias' matches no parameter; there are w, b")
def a_selector_that_matches_nothing() -> None:
    freeze_(state(), "**.bias")


@answers(NoMatch, "where='c' matches no parameter; there are w, b")
def one_of_a_list_of_selectors_that_matches_nothing() -> None:
    freeze_(state(), ["w", "c"])


@answers(NoMatch, "where=[] picks nothing; leave it out to pick everything")
def an_empty_list_of_selectors() -> None:
    freeze_(state(), [])


@answers(NoMatch, "where=<class 'optimisers.rules.descent.Momentum'> matches no parameter; there are w, b")
def a_rule_type_that_matches_nothing() -> None:
    freeze_(state(), Momentum)


NO_SELECTOR = (
    "is no selector; it takes a glob such as '**.bias', a selector such as opt.vectors, a function of (path, "
    "leaf), or a rule type"
)


@answers(NoMatch, f"where=3 {NO_SELECTOR}")
def a_number_for_a_selector() -> None:
    freeze_(state(), 3)


@answers(NoMatch, f"where={ADAM} {NO_SELECTOR}")
def a_rule_for_a_selector() -> None:
    freeze_(state(), Adam())


@answers(NoMatch, f"where=<class 'int'> {NO_SELECTOR}")
def another_type_for_a_selector() -> None:
    freeze_(state(), int)


# -- handles -------------------------------------------------------------------------------------------------


@answers(AttributeError, "state has no q; it has w, b")
def an_attribute_that_is_not_there() -> None:
    assert state().q


@answers(KeyError, "state has no 'q'; it has 'w', 'b'")
def a_key_that_is_not_there() -> None:
    assert state()["q"]


@answers(KeyError, "state has no 5; it has 0")
def an_index_that_is_not_there() -> None:
    assert setup(Adam(), [np.ones(2)])[5]


@answers(KeyError, "state['w'] has no 'q'; it is a Leaf, with rule, state and frozen")
def a_path_below_a_leaf() -> None:
    assert state()["w.q"]


@answers(KeyError, "state['w'] has no 'q'; it is a Leaf, with rule, state and frozen")
def a_key_path_below_a_leaf() -> None:
    assert state()[KeyPath("w", "q")]


@answers(LookupError, "tree['w']['q'] is not there")
def a_path_that_is_not_in_a_model() -> None:
    KeyPath("w", "q").get({"w": {"v": 1}})


@answers(BadState, "a state has no parts to replace; assign state.w.rule or .state of a leaf")
def assigning_a_child_of_a_branch() -> None:
    state().w = 1


@answers(BadState, "state['w'].rule is 3; it takes a rule, such as Adam()")
def a_number_for_the_rule_of_a_leaf() -> None:
    state().w.rule = 3


@answers(
    BadState,
    "state['w'].rule is <class 'optimisers.rules.descent.Descent'>; it takes a rule, such as "
    "Adam(); write Descent()",
)
def a_class_for_the_rule_of_a_leaf() -> None:
    state().w.rule = Descent


@answers(
    BadState,
    "state['w'] has a state of the form AdamState(array, array, tuple(number, number)); "
    "Momentum(eta=0.01, rho=0.9) takes MomentumState(array); call `setup` for a new state",
)
def a_rule_that_the_state_does_not_fit() -> None:
    state().w.rule = Momentum()


@answers(
    BadState,
    f"state['w'] has a state of the form (); {ADAM} takes AdamState(array, array, tuple(number, "
    f"number)); "
    "call `setup` for a new state",
)
def a_rule_with_state_for_a_leaf_without() -> None:
    state(Descent()).w.rule = Adam()


@answers(
    BadState, "state['w'].state is given number; it takes AdamState(array, array, tuple(number, number))"
)
def a_number_for_the_state_of_a_leaf() -> None:
    state().w.state = 3


@answers(BadState, "state['w'].state.m has shape (3,); it takes (3, 4)")
def a_state_of_another_shape() -> None:
    s = state()
    s.w.state = s.w.state._replace(m=np.zeros(3))


@answers(BadState, "state['w'].state.m is complex; it takes real numbers")
def a_complex_state_for_real_parameters() -> None:
    s = state()
    s.w.state = s.w.state._replace(m=np.zeros((3, 4), complex))


@answers(BadState, "state['w'].frozen is 'no'; it takes True or False")
def a_string_for_frozen() -> None:
    state().w.frozen = "no"


# -- flat ----------------------------------------------------------------------------------------------------


@answers(TreeMismatch, "re takes a vector of length 16; (15,) was given")
def a_vector_that_is_too_short() -> None:
    flat, re = destructure(model())
    re(flat[:-1])


@answers(TreeMismatch, "re takes a vector of length 16; (2, 8) was given")
def a_matrix_for_a_vector() -> None:
    flat, re = destructure(model())
    re(flat.reshape(2, 8))


@answers(TreeMismatch, "re takes a vector of length 16; list was given")
def a_list_for_a_vector() -> None:
    _, re = destructure(model())
    re([0.0] * 16)


@answers(TypeError, "re takes (flat) or (model, flat); 3 arguments were given")
def too_much_for_re() -> None:
    _, re = destructure(model())
    re(1, 2, 3)


@answers(
    TreeMismatch, "model has no 'b', which `destructure` saw; call `destructure` again for another model"
)
def another_model_for_re() -> None:
    flat, re = destructure(model())
    re({"w": np.ones((3, 4))}, flat)


@answers(TreeMismatch, "model['w'] has shape (9, 4); `destructure` saw an array of shape (3, 4)")
def a_model_of_other_shapes_for_re() -> None:
    flat, re = destructure(model())
    re({"w": np.ones((9, 4)), "b": np.zeros(4)}, flat)


@answers(BadState, "trainables was given a Branch; it takes a model")
def the_trainables_of_a_state() -> None:
    trainables(state())


@answers(BadState, "destructure was given a Branch; it takes a model")
def destructuring_a_state() -> None:
    destructure(state())


@answers(BadState, "kernel takes a rule, such as Adam(); <class 'optimisers.rules.adam.Adam'> was given")
def the_kernel_of_a_class() -> None:
    opt.kernel(Adam)


@answers(BadState, "kernel was given dtype='int32'; it takes types of floating point or complex numbers")
def the_kernel_for_whole_numbers() -> None:
    opt.kernel(Adam(), "int32")


# -- rules of one's own: init and apply ----------------------------------------------------------------------


@answers(NotImplementedError, "NoApply has no apply(self, state, x, dx)")
def a_rule_without_apply() -> None:
    class NoApply(Rule):
        def init(self, _x: Any) -> Any:
            return ()

    setup(NoApply(), np.ones(2))


@answers(TraceError, "Mine.apply returned one array; it returns a pair (state, dx)")
def apply_returns_the_step_alone() -> None:
    traced(lambda _self, _state, _x, dx: dx)


@answers(TraceError, "Mine.apply returned None; it returns a pair (state, dx)")
def apply_returns_nothing() -> None:
    traced(lambda _self, _state, _x, _dx: None)


@answers(TraceError, "Mine.apply returned list; it returns a pair (state, dx)")
def apply_returns_a_list() -> None:
    traced(lambda _self, state, _x, dx: [state, dx])


@answers(TraceError, "Mine.apply returned a tuple of 3; it returns a pair (state, dx)")
def apply_returns_three_things() -> None:
    traced(lambda _self, state, _x, dx: (state, dx, dx))


OTHER_FORM = "Mine.apply returned a state of another form than init:"


@answers(TraceError, f"{OTHER_FORM} tuple() instead of array")
def apply_forgets_its_state() -> None:
    traced(lambda _self, _state, _x, dx: ((), dx), zeros)


@answers(TraceError, f"{OTHER_FORM} tuple(array, array) instead of tuple(array)")
def apply_returns_a_longer_state() -> None:
    traced(lambda _self, s, _x, dx: ((s[0], s[0]), dx), lambda _self, x: (opt.zeros_like(x),))


@answers(TraceError, f"{OTHER_FORM} dict(n=array) instead of dict(m=array)")
def apply_returns_a_state_with_other_names() -> None:
    traced(lambda _self, s, _x, dx: ({"n": s["m"]}, dx), lambda _self, x: {"m": opt.zeros_like(x)})


@answers(
    TraceError, "the state of Mine is a number in init and an array in apply; let init return zeros_like(x)"
)
def a_number_in_the_state_that_becomes_an_array() -> None:
    traced(lambda _self, s, _x, dx: (s + dx, dx), lambda _self, _x: 0)


@answers(
    TraceError,
    "the state['v'] of Mine is a number in init and an array in apply; let init return zeros_like(x)",
)
def a_number_deep_in_the_state_that_becomes_an_array() -> None:
    traced(lambda _self, s, _x, dx: ({"v": s["v"] + dx}, dx), lambda _self, _x: {"v": 0.0})


@answers(
    TraceError,
    "the state of Mine is real in init and complex in apply; take abs2 or real, or let init return "
    "complex zeros",
)
def a_real_state_that_becomes_complex() -> None:
    traced(lambda _self, s, _x, dx: (1j * s, dx), zeros)


@answers(TraceError, "state holds 'a'; it takes arrays and numbers, in tuples, NamedTuples and dicts")
def a_string_in_the_state() -> None:
    traced(lambda _self, s, _x, dx: (s, dx), lambda _self, _x: "a")


@answers(TraceError, "Mine.apply gives a complex step for real parameters")
def a_complex_step_for_real_parameters() -> None:
    traced(lambda _self, s, _x, dx: (s, 1j * dx))


class Second(Rule):
    """A rule of second order."""

    def init(self, _x: Any) -> Any:
        return ()

    def apply(self, state: Any, _x: Any, dx: Any, dx2: Any) -> Any:
        return state, dx / dx2


@answers(TraceError, "Second takes 2 gradients, and 1 came; write update(state, model, grads, grads2)")
def a_rule_of_second_order_with_one_gradient() -> None:
    update(setup(Second(), np.ones(2)), np.ones(2), np.ones(2))


@answers(TreeMismatch, "gradient of shape (3,) for parameters of shape (2,), at grads2")
def a_second_gradient_of_another_shape() -> None:
    update(setup(Second(), np.ones(2)), np.ones(2), np.ones(2), np.ones(3))


# -- rules of one's own: what cannot be traced ---------------------------------------------------------------


BRANCHED = (
    "branched on a value that is not known until the step runs; "
    "write `where(condition, a, b)` instead of `a if condition else b`, "
    "and `&`, `|`, `~` instead of `and`, `or`, `not`"
)
PYTHON_NUMBER = (
    "turned a value that is not known until the step runs into a Python number; "
    "leave out float() and int(), and use the operations of opt.ops instead of those of math"
)


@answers(TraceError, f"Mine: a rule {BRANCHED}")
def branching_on_a_sum() -> None:
    traced(lambda _self, s, _x, dx: (s, dx if opt.ops.sum(dx) > 0 else -dx))


@answers(TraceError, f"Mine: a rule {BRANCHED}")
def joining_conditions_with_and() -> None:
    traced(lambda _self, s, x, dx: (s, opt.where(dx > 0 and x > 0, dx, x)))


@answers(TraceError, f"Mine: a rule {BRANCHED}")
def the_larger_of_two_arrays_by_the_built_in_max() -> None:
    traced(lambda _self, s, x, dx: (s, builtins.max(dx, x)))


@answers(TraceError, f"Mine: a rule {PYTHON_NUMBER}")
def a_float_of_a_sum() -> None:
    traced(lambda _self, s, _x, dx: (s, float(opt.ops.sum(dx)) * dx))


@answers(TraceError, f"Mine: a rule {PYTHON_NUMBER}")
def an_int_of_a_counter() -> None:
    traced(lambda _self, s, _x, dx: (s + 1, int(s) * dx), lambda _self, _x: 1)


@answers(TraceError, f"Mine: a rule {PYTHON_NUMBER}")
def the_square_root_of_the_math_module() -> None:
    traced(lambda _self, s, _x, dx: (s + 1, dx / math.sqrt(s)), lambda _self, _x: 1)


@answers(TraceError, f"Mine: a rule {PYTHON_NUMBER}")
def a_loop_over_a_counter() -> None:
    traced(lambda _self, s, _x, dx: (s + 1, builtins.sum(dx for _ in range(s))), lambda _self, _x: 1)


@answers(
    TraceError, "Mine: len() of an array inside a rule; x.size is its number of elements, x.shape its shape"
)
def the_length_of_an_array() -> None:
    traced(lambda _self, s, _x, dx: (s, dx / len(dx)))


@answers(
    TraceError,
    "Mine: a rule iterated over an array; it sees one array and writes its maths for the whole of it",
)
def the_built_in_sum_of_an_array() -> None:
    traced(lambda _self, s, _x, dx: (s, builtins.sum(dx)))


@answers(TraceError, "Mine: a rule indexed an array; use where, sums along an axis, or call(function, x)")
def an_element_of_an_array() -> None:
    traced(lambda _self, s, _x, dx: (s, dx[0]))


def wrote(_self: Any, state: Any, _x: Any, dx: Any) -> Any:
    dx[0] = 0
    return state, dx


@answers(TraceError, "Mine: a rule wrote into an array; rules are pure: return the new state and the step")
def writing_into_an_array() -> None:
    traced(wrote)


@answers(
    TraceError,
    "Mine: a rule called np.cbrt on a symbol; use the operations of opt.ops, or opt.ops.call(np.cbrt, x)",
)
def a_function_of_numpy_that_is_no_word() -> None:
    traced(lambda _self, s, _x, dx: (s, np.cbrt(dx)))


@answers(TraceError, "Mine: a rule called np.sum on a symbol; write opt.ops.sum(...)")
def the_sum_of_numpy() -> None:
    traced(lambda _self, s, _x, dx: (s, dx / np.sum(dx)))


@answers(TraceError, "Mine: a rule called np.where on a symbol; write opt.ops.where(...)")
def the_where_of_numpy() -> None:
    traced(lambda _self, s, _x, dx: (s, np.where(dx > 0, dx, 0)))


@answers(
    TraceError,
    "Mine: a rule called np.linalg.norm on a symbol; use the operations of opt.ops, or "
    "opt.ops.call(np.linalg.norm, x)",
)
def the_norm_of_numpy() -> None:
    traced(lambda _self, s, _x, dx: (s, dx / np.linalg.norm(dx)))


@answers(
    TraceError,
    "Mine: a rule asked an array for .mean, which it does not have while a step is traced; "
    "write opt.ops.mean(x)",
)
def a_method_that_is_a_word() -> None:
    traced(lambda _self, s, _x, dx: (s, dx - dx.mean()))


@answers(TraceError, "Mine: a rule asked an array for .astype, which it does not have while a step is traced")
def a_method_that_is_no_word() -> None:
    traced(lambda _self, s, _x, dx: (s, dx.astype(float)))


@answers(TraceError, "Mine: a rule used None in its arithmetic; it takes arrays and numbers")
def adding_nothing() -> None:
    traced(lambda _self, s, _x, dx: (s, dx + None))


ELEMENTWISE = (
    "when() was given a condition for each element; it takes a scalar one: use where() for single elements"
)


@answers(TraceError, f"Mine: {ELEMENTWISE}")
def a_condition_for_each_element() -> None:
    traced(lambda _self, s, _x, dx: (s, opt.when(dx > 0, dx)))


@answers(TraceError, ELEMENTWISE)
def a_condition_for_each_element_outside_a_rule() -> None:
    opt.when(np.ones(2) > 0, np.ones(2))


@answers(TraceError, "Mine: total() was given an array; it takes a scalar: total(sum(...))")
def the_total_of_an_array() -> None:
    traced(lambda _self, s, _x, dx: (s, dx / opt.total(dx)))


@answers(TraceError, "total() was given an array; it takes a scalar: total(sum(...))")
def the_total_of_an_array_outside_a_rule() -> None:
    opt.total(np.ones(2))


@answers(TraceError, "Mine: check() takes scalars, such as a norm or a sum")
def a_check_of_each_element() -> None:
    traced(lambda _self, _s, _x, dx: (opt.ops.check(dx > 0, "negative"), dx))


@answers(TraceError, "Mine: maximum of complex numbers has no meaning; take abs or real first")
def a_maximum_of_complex_numbers() -> None:
    traced(lambda _self, s, _x, dx: (s, opt.ops.maximum(dx, 0)), x=np.ones(2, complex))


@answers(TraceError, "Mine combined an array of shape (2,) with parameters of shape (2, 3), at model")
def shapes_that_do_not_fit_inside_a_rule() -> None:
    s: Any = traced(lambda _self, s, _x, dx: (s, dx - opt.ops.sum(dx, axis=1)))
    update(s, np.ones((2, 3)), np.ones((2, 3)))


@answers(TraceError, "Mine gave a state of shape (3,) where one of shape (2,) goes, at model")
def a_state_that_changes_its_shape() -> None:
    s: Any = traced(lambda _self, _s, _x, dx: (opt.ops.sum(dx, axis=0), dx), lambda _self, _x: np.zeros(2))
    update(s, np.ones((2, 3)), np.ones((2, 3)))


# -- schedules -----------------------------------------------------------------------------------------------


@answers(TraceError, f"the schedule of Adam.eta: a schedule {BRANCHED}")
def a_schedule_that_branches() -> None:
    setup(Adam(lambda clock: 0.1 if clock < 3 else 0.01), np.ones(2))


@answers(TraceError, f"the schedule of Adam.eta: a schedule {PYTHON_NUMBER}")
def a_schedule_by_the_math_module() -> None:
    setup(Adam(math.cos), np.ones(2))


@answers(
    TraceError, "the schedule of Adam.eta: a schedule used 'a' in its arithmetic; it takes arrays and numbers"
)
def a_schedule_that_gives_a_string() -> None:
    setup(Adam(lambda _clock: "a"), np.ones(2))


@answers(TraceError, "the schedule of Adam.eta gives no real number for the clock")
def a_schedule_that_gives_an_array() -> None:
    setup(Adam(lambda _clock: np.ones(3)), np.ones(2))


# -- the tests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mistake", "kind", "text"), MISTAKES)
def test_a_mistake_is_answered_with_what_to_write_instead(mistake: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind) as caught:
        mistake()
    assert caught.value.args[0] == text


@pytest.mark.parametrize(("doubt", "kind", "text"), WARNINGS)
def test_a_warning_says_what_will_not_train(doubt: Any, kind: Any, text: str) -> None:
    with pytest.warns(kind) as caught:
        doubt()
    assert [str(w.message) for w in caught] == [text]


class Dropout(NamedTuple):
    """A layer whose class says that `rate` is a setting."""

    w: Any
    rate: float


def test_a_float_that_a_class_declares_as_a_setting_makes_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup(Adam(), Dropout(np.ones(2), 0.5))


def test_every_error_is_an_error_of_this_package_and_of_a_built_in_kind() -> None:
    for kind in (BadSetting, UnknownField, BadState, TreeMismatch, NoMatch, DomainError, TraceError):
        assert issubclass(kind, opt.OptimiserError)
        assert kind.__mro__[2] is not Exception


def test_a_good_model_makes_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup(Adam(), {"w": np.ones(2), "name": "linear", "n": 3, "bias": None, "on": True, "f": np.tanh})
