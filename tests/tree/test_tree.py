"""State mirrors the model, whatever containers it is made of, and any part of it is an address."""

import collections
import copy
import dataclasses
import pickle
from types import SimpleNamespace
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest

import optimisers as opt
from optimisers import (
    Adam,
    AdamW,
    BadState,
    Chain,
    ClipGrad,
    Descent,
    KeyPath,
    Leaf,
    Momentum,
    NoMatch,
    adjust,
    adjust_,
    freeze,
    freeze_,
    setup,
    thaw,
    thaw_,
    trainables,
    update,
    update_,
)

# -- models --------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A layer as a named tuple."""

    w: Any
    b: Any


@dataclasses.dataclass
class Dense:
    """A layer as a dataclass."""

    w: Any
    b: Any = None
    name: str = "dense"


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A layer as a frozen dataclass."""

    w: Any
    b: Any = None


@dataclasses.dataclass(slots=True)
class Slots:
    """A layer as a dataclass with slots."""

    w: Any
    b: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    """A layer as a frozen dataclass with slots."""

    w: Any
    b: Any = None


@dataclasses.dataclass
class Counted:
    """A layer with a field that its constructor makes itself."""

    w: Any
    b: Any = None
    shape: tuple[int, ...] = dataclasses.field(init=False)
    mask: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.shape = self.w.shape
        self.mask = np.full(self.w.shape, 7)


@dataclasses.dataclass
class Made:
    """A layer with an array that its constructor makes itself."""

    size: int
    w: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.w = np.ones(self.size)


@attrs.define
class Attrs:
    """A layer as an attrs class, with slots."""

    w: Any
    b: Any = None


@attrs.frozen
class FrozenAttrs:
    """A layer as a frozen attrs class."""

    w: Any
    b: Any = None


@opt.register
class Plain:
    """A layer as a plain class, registered as it is."""

    def __init__(self, w: Any, b: Any = None) -> None:
        self.w, self.b = w, b


@opt.register(children=("w", "b"))
class Some:
    """A layer with an array that is no child of it."""

    def __init__(self, w: Any, b: Any = None) -> None:
        self.w, self.b, self.seen = w, b, np.full(3, 5.0)


@opt.register(trainable=("w",))
class Partly:
    """A layer with an array that is a child and is not trained."""

    def __init__(self, w: Any, b: Any = None) -> None:
        self.w, self.b, self.mean = w, b, np.full(3, 5.0)


class Sub(dict):
    """A dict with an attribute of its own."""


class Items(list):
    """A list with an attribute of its own."""


def mapping(w: Any, b: Any = None) -> Any:
    return {"w": w, "b": b}


MAKERS = [mapping, Dense, Frozen, Slots, FrozenSlots, Counted, Attrs, FrozenAttrs, Plain, Some, Partly, Pair]
NAMED = pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)


def at(layer: Any, name: str) -> Any:
    return layer[name] if isinstance(layer, dict) else getattr(layer, name)


def ones(*shape: int) -> Any:
    return np.ones(shape or (2,))


@NAMED
def test_setup_puts_a_leaf_beside_the_array_of_every_kind_of_container(make: Any) -> None:
    state = setup(Descent(), make(ones(), None))
    assert isinstance(state.w, Leaf)
    assert state.b == ()


@NAMED
def test_an_update_gives_back_the_same_kind_of_container(make: Any) -> None:
    model = make(ones(), None)
    _state, new = update(setup(Descent(0.1), model), model, {"w": ones(), "b": None})
    assert type(new) is type(model)
    assert at(new, "b") is None
    np.testing.assert_allclose(at(new, "w"), [0.9, 0.9])


@NAMED
def test_a_pure_update_leaves_the_old_container_as_it_was(make: Any) -> None:
    w = ones()
    model = make(w, None)
    update(setup(Descent(0.1), model), model, {"w": ones(), "b": None})
    assert at(model, "w") is w
    np.testing.assert_array_equal(w, [1, 1])


@NAMED
def test_an_update_in_place_returns_the_very_container_with_its_arrays_written(make: Any) -> None:
    w = ones()
    model = make(w, None)
    _, new = update_(setup(Descent(0.1), model), model, {"w": ones(), "b": None})
    assert new is model
    assert at(model, "w") is w
    np.testing.assert_allclose(w, [0.9, 0.9])


@NAMED
def test_state_beside_every_kind_of_container_can_be_frozen_and_adjusted(make: Any) -> None:
    state = setup(Descent(0.1), {"net": [make(ones(), None)]})
    freeze_(state.net[0])
    adjust_(state.net, 0.5)
    assert state.net[0].w.frozen
    assert state.net[0].w.rule == Descent(0.5)


def test_fields_that_the_constructor_makes_survive() -> None:
    model = Counted(ones())
    _, new = update(setup(Descent(), model), model, {"w": ones()})
    assert new.shape == (2,)
    assert new.mask is model.mask


def test_an_array_that_the_constructor_makes_trains_like_any_other() -> None:
    model = Made(2)
    _, new = update(setup(Descent(0.1), model), model, {"w": ones()})
    assert new.size == 2
    np.testing.assert_allclose(new.w, [0.9, 0.9])


def test_an_array_that_is_no_child_is_never_looked_at_and_survives() -> None:
    model = Some(ones())
    state, new = update(setup(Descent(0.1), model), model, {"w": ones()})
    assert new.seen is model.seen
    assert len(state) == 2


def test_an_array_that_is_not_trainable_has_no_leaf_and_survives() -> None:
    model = Partly(ones(), ones())
    state, new = update(setup(Descent(0.1), model), model, {"w": ones()})
    assert (state.mean, state.b) == ((), ())
    assert new.mean is model.mean


def test_a_dict_may_have_keys_of_any_kind() -> None:
    model = {3: ones(), (1, "a"): ones(), None: ones(), "w": ones()}
    state, new = update(setup(Descent(0.1), model), model, {3: ones(), (1, "a"): None, None: None, "w": None})
    assert list(new) == [3, (1, "a"), None, "w"]
    assert isinstance(state[(1, "a")], Leaf)
    np.testing.assert_allclose(new[3], [0.9, 0.9])


def test_an_ordered_dict_stays_one_in_its_order() -> None:
    model = collections.OrderedDict(b=ones(), a=ones())
    _, new = update(setup(Descent(), model), model, {"a": ones(), "b": ones()})
    assert type(new) is collections.OrderedDict
    assert list(new) == ["b", "a"]


def test_a_default_dict_stays_one_and_gains_no_keys() -> None:
    model = collections.defaultdict(ones, w=ones())
    _, new = update(setup(Descent(), model), model, {"w": ones()})
    assert new.default_factory is model.default_factory
    assert list(new) == list(model) == ["w"]


def test_subclasses_of_dict_and_list_keep_their_attributes() -> None:
    model = Sub(net=Items([ones()]))
    model.note, model["net"].note = "outer", "inner"
    _, new = update(setup(Descent(), model), model, {"net": [ones()]})
    assert (type(new), type(new["net"])) == (Sub, Items)
    assert (new.note, new["net"].note) == ("outer", "inner")


def test_containers_nest_in_any_order() -> None:
    model = {"enc": [Dense(Pair(ones(), (ones(), "text")))], "dec": Frozen({"k": [ones()]})}
    state = setup(Descent(), model)
    assert [str(leaf.path) for leaf in (state.enc[0].w.w, state.enc[0].w.b[0], state.dec.w.k[0])] == [
        "enc.0.w.w",
        "enc.0.w.b.0",
        "dec.w.k.0",
    ]


def test_what_is_no_array_of_reals_is_left_alone() -> None:
    extras = {
        "f": np.tanh,
        "s": "relu",
        "n": 3,
        "none": None,
        "on": True,
        "ints": np.arange(3),
        "bits": ones() > 0,
    }
    model = {"w": ones(), **extras}
    state, new = update(setup(Descent(), model), model, {"w": ones()})
    assert all(state[k] == () for k in extras)
    assert all(new[k] is extras[k] for k in extras)


def test_a_container_with_nothing_to_train_is_the_empty_tuple_and_stays_the_same_object() -> None:
    inner = {"f": np.tanh, "n": [1, 2]}
    model = {"w": ones(), "rest": inner}
    state, new = update(setup(Descent(), model), model, {"w": ones()})
    assert state.rest == ()
    assert new["rest"] is inner


def test_a_bare_array_gets_a_bare_leaf() -> None:
    state = setup(Descent(0.1), ones())
    assert isinstance(state, Leaf)
    assert state.path == KeyPath()
    np.testing.assert_allclose(update(state, ones(), ones())[1], [0.9, 0.9])


def test_arrays_without_axes_and_without_elements_train_too() -> None:
    model = {"scalar": np.array(1.0), "empty": np.zeros((0, 3))}
    _, new = update(setup(Descent(0.5), model), model, {"scalar": np.array(1.0), "empty": np.zeros((0, 3))})
    assert new["scalar"].shape == ()
    assert float(new["scalar"]) == 0.5
    assert new["empty"].shape == (0, 3)


# -- shared parts --------------------------------------------------------------------------------------------


def test_a_container_at_two_places_is_still_one_after_an_update() -> None:
    layer = Dense(ones())
    model = {"a": layer, "b": [layer]}
    _, new = update(setup(Descent(0.1), model), model, {"a": {"w": ones(), "b": None}, "b": None})
    assert new["a"] is new["b"][0]
    np.testing.assert_allclose(new["a"].w, [0.9, 0.9])


def test_two_containers_with_the_same_arrays_stay_two() -> None:
    w = ones()
    model = [Dense(w), Dense(w)]
    _, new = update(setup(Descent(0.1), model), model, [{"w": ones()}, None])
    assert new[0] is not new[1]
    assert new[0].w is new[1].w


def test_the_same_array_at_two_places_has_one_leaf() -> None:
    w = ones()
    state = setup(Momentum(), {"a": w, "b": {"c": w}, "d": w.copy()})
    assert state.a is state.b.c
    assert state.a is not state.d


def test_equal_arrays_are_not_tied() -> None:
    state = setup(Momentum(), {"a": ones(), "b": ones()})
    freeze_(state.a)
    assert not state.b.frozen


def test_a_transposed_view_has_the_leaf_of_its_array() -> None:
    w = ones(2, 3)
    state = setup(Momentum(), {"a": w, "t": w.T})
    assert state.t is state.a


def test_a_view_of_the_whole_array_is_tied_to_it() -> None:
    w = ones(2, 3)
    assert len(trainables({"a": w, "b": w[:], "c": w.view()})) == 1


def test_gradients_of_a_tie_are_summed_before_the_rule_runs() -> None:
    w = ones()
    model = {"a": w, "b": w}
    _, new = update(setup(Chain(ClipGrad(1.0), Descent(1.0)), model), model, {"a": ones(), "b": 2 * ones()})
    np.testing.assert_allclose(new["a"], [0, 0])
    assert new["a"] is new["b"]


def test_the_same_gradient_object_at_all_places_of_a_tie_counts_once() -> None:
    w, g = ones(), ones()
    model = {"a": w, "b": w}
    _, new = update(setup(Descent(0.1), model), model, {"a": g, "b": g})
    np.testing.assert_allclose(new["a"], [0.9, 0.9])


def test_a_transposed_tie_takes_its_gradients_transposed_and_holds_afterwards() -> None:
    w, g = np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(3, 2)
    model = {"a": w, "t": w.T}
    _, new = update(setup(Descent(1.0), model), model, {"a": ones(2, 3), "t": g})
    np.testing.assert_allclose(new["a"], w - 1 - g.T)
    assert np.shares_memory(new["a"], new["t"])
    np.testing.assert_array_equal(new["t"], new["a"].T)


def test_a_tie_holds_through_many_updates_of_both_kinds() -> None:
    w = ones(2, 2)
    model: Any = {"a": w, "t": w.T, "l": [w]}
    state = setup(Momentum(), model)
    for step in (update, update_, update, update_):
        state, model = step(state, model, {"a": ones(2, 2), "t": None, "l": None})
        assert model["a"] is model["l"][0]
        assert np.shares_memory(model["a"], model["t"])


# -- a rule for each part ------------------------------------------------------------------------------------


def net() -> dict[str, Any]:
    return {"layers": [{"w": ones(), "bias": ones()}, {"w": ones(), "bias": ones()}], "head": {"w": ones()}}


def net_grads() -> dict[str, Any]:
    return {"layers": [{"w": ones(), "bias": ones()}, {"w": ones(), "bias": ones()}], "head": {"w": ones()}}


def rules(state: Any) -> list[str]:
    return [type(leaf.rule).__name__ for leaf in leaves(state)]


def leaves(state: Any) -> list[Any]:
    if isinstance(state, Leaf):
        return [state]
    return [] if state == () else [leaf for key in state._node.keys for leaf in leaves(state[key])]


def test_the_first_glob_that_matches_wins() -> None:
    state = setup({"**.bias": Adam(), "head.*": Momentum(), "**": Descent()}, net())
    assert rules(state) == ["Descent", "Adam", "Descent", "Adam", "Momentum"]


def test_a_glob_may_name_an_index_or_use_a_single_star_for_it() -> None:
    state = setup({"layers.0.*": Adam(), "layers.*.w": Momentum(), "**": Descent()}, net())
    assert rules(state) == ["Adam", "Adam", "Momentum", "Descent", "Descent"]


def test_a_function_of_path_and_array_chooses_the_rule() -> None:
    seen = []

    def choose(path: KeyPath, x: Any) -> Any:
        seen.append((str(path), x.shape))
        return Descent() if path[-1] == "bias" else Adam()

    state = setup(choose, net())
    assert rules(state) == ["Adam", "Descent", "Adam", "Descent", "Adam"]
    assert seen[0] == ("layers.0.w", (2,))


def test_a_rule_of_none_trains_nothing_there() -> None:
    model = net()
    state = setup({"head.**": None, "**": Descent(0.1)}, model)
    _, new = update(state, model, net_grads())
    assert state.head.w == ()
    assert new["head"]["w"] is model["head"]["w"]
    np.testing.assert_allclose(new["layers"][0]["w"], [0.9, 0.9])


def test_a_branch_whose_rules_are_all_none_can_still_be_passed_by() -> None:
    state = setup(lambda path, _x: None if path[0] == "head" else Descent(), net())
    assert [leaf.frozen for leaf in leaves(freeze(state))] == [True] * 4


def test_leaves_of_different_rules_take_their_own_steps() -> None:
    model = net()
    _, new = update(setup({"**.bias": Descent(0.5), "**": Descent(0.1)}, model), model, net_grads())
    np.testing.assert_allclose(new["layers"][1]["bias"], [0.5, 0.5])
    np.testing.assert_allclose(new["layers"][1]["w"], [0.9, 0.9])


# -- paths ---------------------------------------------------------------------------------------------------


def test_a_path_joins_keys_and_other_paths() -> None:
    """163. In any depth; an empty one adds nothing."""
    assert KeyPath("b", KeyPath(1, "c")) == KeyPath("b", 1, "c")
    assert KeyPath(KeyPath("a", KeyPath("b")), KeyPath(), 1, KeyPath("c")) == KeyPath("a", "b", 1, "c")
    rest = (1, "c")
    assert KeyPath("b") + rest == KeyPath("b", 1) + KeyPath("c") == KeyPath("b", 1, "c")


def test_a_path_prints_as_its_keys_with_dots_between() -> None:
    """163. And, for `repr`, as the code that makes it."""
    assert str(KeyPath("b", 1, "c")) == "b.1.c"
    assert repr(KeyPath("b", 1, "c")) == "KeyPath('b', 1, 'c')"


def test_a_path_behaves_as_a_tuple_does() -> None:
    """163. Length, index, last, slice, tail, iteration, equality, hash."""
    path = KeyPath("b", 1, "c")
    assert (len(path), path[0], path[-1], path[1:], list(path)) == (
        3,
        "b",
        "c",
        KeyPath(1, "c"),
        ["b", 1, "c"],
    )
    assert (path[:-1], path[::-1], path[3:]) == (KeyPath("b", 1), KeyPath("c", 1, "b"), KeyPath())
    assert {path: 1}[KeyPath("b", 1, "c")] == 1
    assert path != KeyPath("b", 1)
    assert KeyPath("1") != KeyPath(1)
    assert path != ("b", 1, "c")
    assert 1 in path
    with pytest.raises(IndexError):
        path[3]


def test_a_path_survives_copies_and_pickles() -> None:
    path = KeyPath("b", 1, ("c", 2))
    for clone in (copy.copy(path), copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert clone == path
        assert hash(clone) == hash(path)


def test_a_path_reads_what_stands_there_in_any_container() -> None:
    """163. Attributes, keys of any kind, indices of arrays."""
    path = KeyPath("net", 0, "w")
    assert path.get({"net": [Dense("here")]}) == "here"
    assert path.get(SimpleNamespace(net=({"w": "there"},))) == "there"
    nest = {"a": 3, 2: {("c", 1): 4, "d": np.array([[5, 6], [7, 8]])}}
    assert KeyPath("a").get(nest) == 3
    assert KeyPath(2, ("c", 1)).get(nest) == 4
    assert KeyPath(2, "d", (1, 0)).get(nest) == 7
    assert KeyPath(2, "d", 1, 0).get(nest) == 7


def test_a_path_says_whether_something_stands_there() -> None:
    """163. A key that is missing anywhere on the way, or an index beyond the end, is no place."""
    nest = {"a": [1], "b": {"c": None, "d": np.arange(3)}, "e": Dense(1)}
    there = [(), ("a",), ("a", 0), ("b", "c"), ("b", "d", 2), ("e", "w")]
    missing = [
        ("z",),
        ("a", 1),
        ("a", "0"),
        ("b", "d", 3),
        ("b", "c", "x"),
        ("b", "c", 0),
        ("e", "z"),
        ("z", "a"),
    ]
    assert [keys for keys in there if not KeyPath(*keys).within(nest)] == []
    assert [keys for keys in missing if KeyPath(*keys).within(nest)] == []


def test_what_a_path_does_not_find_is_named_up_to_the_first_key_that_is_missing() -> None:
    """163. Not the whole path."""
    with pytest.raises(LookupError, match=r"tree\['b'\]\['z'\] is not there"):
        KeyPath("b", "z", 0, "w").get({"b": {"c": 1}})


def test_an_empty_path_stands_for_the_whole() -> None:
    """163. It can be read and not set."""
    model, path = [ones()], KeyPath()
    assert path.get(model) is model
    assert path.within(model)
    assert (len(path), list(path), str(path), repr(path), path.code()) == (0, [], "", "KeyPath()", "model")
    assert path == KeyPath(KeyPath()) == KeyPath("a")[1:]
    with pytest.raises(LookupError, match="the path is empty"):
        path.set(model, 1)
    with pytest.raises(IndexError):
        path[-1]


def test_a_path_sets_what_stands_there() -> None:
    """163. In lists, dicts, objects and arrays; an unknown way there is an error."""
    nest: Any = {"a": [1, 2], "b": {"d": np.arange(3)}, "e": Dense(1)}
    KeyPath("a", 1).set(nest, "new")
    KeyPath("b", "d", 2).set(nest, 9)
    KeyPath("b", "made").set(nest, 8)
    KeyPath("e", "w").set(nest, 7)
    assert nest["a"] == [1, "new"]
    assert list(nest["b"]["d"]) == [0, 1, 9]
    assert (nest["b"]["made"], nest["e"].w) == (8, 7)
    with pytest.raises(LookupError, match=r"tree\['z'\] is not there"):
        KeyPath("z", 0).set(nest, 1)


class Attention(NamedTuple):
    """A layer whose fields have the name of a method of dicts."""

    queries: Any
    keys: Any
    values: Any


@dataclasses.dataclass
class Memory:
    """The same as a dataclass; the defaults are attributes of the class."""

    queries: Any
    keys: Any = None
    values: Any = None


@pytest.mark.parametrize("kind", [Attention, Memory])
def test_a_path_goes_through_a_container_with_a_field_called_keys(kind: Any) -> None:
    """161. Every path of the list finds its array."""
    model = {"attention": kind(ones(), ones(3), ones(4))}
    for path, x in trainables(model, path=True):
        assert path.get(model) is x
        assert KeyPath(*map(str, path)).get(model) is x


def test_a_path_prints_as_code_that_reaches_the_array() -> None:
    model = {"net": [Dense(ones()), Pair(ones(), ones())], 3: ones()}
    for path, x in trainables(model, path=True):
        assert eval(path.code("model"), {"model": model}) is x  # noqa: S307 the code is the path's own


# -- handles -------------------------------------------------------------------------------------------------


def deep() -> Any:
    return {"layers": [Dense(ones()), Dense(ones()), Dense(ones(), ones())], "head": {"w": ones()}}


def test_a_leaf_is_reached_by_attributes_keys_paths_and_path_strings_alike() -> None:
    state = setup(Adam(), deep())
    leaf = state.layers[2].w
    assert state["layers"][2]["w"] is leaf
    assert state["layers.2.w"] is leaf
    assert state[KeyPath("layers", 2, "w")] is leaf
    assert state[leaf.path] is leaf


def test_a_negative_index_counts_from_the_end_of_a_list() -> None:
    state = setup(Adam(), deep())
    assert state.layers[-1].w is state.layers[2].w


def test_a_leaf_is_the_same_object_each_time() -> None:
    state = setup(Adam(), deep())
    assert state.head.w is state.head.w


def test_a_branch_has_the_length_of_its_container() -> None:
    state = setup(Adam(), deep())
    assert (len(state), len(state.layers), len(state.layers[0])) == (2, 3, 3)


def test_iterating_over_a_list_gives_its_states_and_over_a_dict_its_keys() -> None:
    state = setup(Adam(), deep())
    assert [part.w.path[1] for part in state.layers] == [0, 1, 2]
    assert list(state) == ["layers", "head"]
    assert "head" in state
    assert "tail" not in state


def test_dir_lists_the_children_that_can_be_written_with_a_dot() -> None:
    assert dir(setup(Adam(), {"w": ones(), 3: ones(), "a b": ones()})) == ["w"]


def test_a_key_with_a_dot_in_it_is_found_before_it_is_split() -> None:
    state = setup({"a.b": Descent(), "**": Adam()}, {"a.b": ones(), "a": {"c": ones()}})
    assert state["a.b"].rule == Descent()
    assert state["a.c"].rule == Adam()


def test_a_key_that_is_the_name_of_a_method_is_reached_as_an_item() -> None:
    state = setup(Adam(), {"keys": ones(), "_store": ones(), "__len__": ones()})
    assert [str(state[k].path) for k in ("keys", "_store", "__len__")] == ["keys", "_store", "__len__"]


def test_states_are_equal_when_rules_states_and_frozen_flags_are() -> None:
    a, b = setup(Adam(), deep()), setup(Adam(), deep())
    assert a == b
    assert a.head.w == b.layers[0].w
    freeze_(b.head)
    assert a != b
    assert a.layers == b.layers
    adjust_(b.layers[0], 0.5)
    assert a.layers != b.layers


def test_states_that_differ_in_one_number_of_an_array_are_not_equal() -> None:
    model = ones()
    a, b = setup(Momentum(), model), setup(Momentum(), model)
    a, _ = update(a, model, np.array([1.0, 2.0]))
    b, _ = update(b, model, np.array([1.0, 3.0]))
    assert a != b


def test_a_leaf_prints_its_rule_and_state_on_one_line() -> None:
    assert repr(setup(Descent(0.1), ones())) == "Leaf(Descent(eta=0.1), ())"
    assert repr(setup(Momentum(), ones())) == "Leaf(Momentum(eta=0.01, rho=0.9), MomentumState(v=[0., 0.]))"


def test_a_frozen_leaf_says_so() -> None:
    assert repr(freeze(setup(Descent(0.1), ones()))) == "Leaf(Descent(eta=0.1), (), frozen=True)"


def test_a_large_array_prints_as_its_type_and_shape() -> None:
    state = setup(Momentum(), np.ones((300, 40), np.float32))
    assert repr(state) == "Leaf(Momentum(eta=0.01, rho=0.9), MomentumState(v=float32[300, 40]))"


def test_a_branch_prints_as_an_indented_tree_of_its_containers() -> None:
    state = setup(Descent(), {"net": [Dense(ones()), (ones(), 3)], 2: ones()})
    assert repr(state) == (
        "{\n"
        "  'net': [\n"
        "    Dense(\n"
        "      w=Leaf(Descent(eta=0.1), ()),\n"
        "      b=(),\n"
        "      name=(),\n"
        "    ),\n"
        "    (\n"
        "      Leaf(Descent(eta=0.1), ()),\n"
        "      (),\n"
        "    ),\n"
        "  ],\n"
        "  2: Leaf(Descent(eta=0.1), ()),\n"
        "}"
    )


def test_a_long_container_prints_its_beginning_and_a_count() -> None:
    lines = repr(setup(Descent(), [ones() for _ in range(100)])).splitlines()
    assert len(lines) < 20
    assert lines[-2:] == ["  ... and 88 more", "]"]


# -- assigning -----------------------------------------------------------------------------------------------


def test_the_rule_of_a_leaf_may_be_replaced_by_one_with_other_numbers() -> None:
    model = {"a": ones(), "b": ones()}
    state = setup(Descent(0.1), model)
    state.a.rule = Descent(0.5)
    _, new = update(state, model, {"a": ones(), "b": ones()})
    np.testing.assert_allclose(new["a"], [0.5, 0.5])
    np.testing.assert_allclose(new["b"], [0.9, 0.9])


def test_the_rule_of_a_leaf_may_be_replaced_by_another_kind_whose_state_is_alike() -> None:
    model = {"a": ones(), "b": ones()}
    state = setup(Momentum(0.1, 0.5), model)
    state, model = update(state, model, {"a": ones(), "b": ones()})
    state.a.rule = opt.Nesterov(0.1, 0.5)
    np.testing.assert_allclose(state.a.state.v, [0.1, 0.1])
    _, new = update(state, model, {"a": ones(), "b": ones()})
    np.testing.assert_allclose(new["a"], 0.9 - (1.5 * 0.1 - 0.25 * 0.1))
    np.testing.assert_allclose(new["b"], 0.9 - (0.5 * 0.1 + 0.1))


def test_a_rule_that_is_refused_leaves_the_leaf_as_it_was() -> None:
    state = setup(Adam(), {"a": ones()})
    with pytest.raises(BadState):
        state.a.rule = Momentum()
    assert state.a.rule == Adam()


def test_the_state_of_a_leaf_may_be_replaced() -> None:
    model = {"a": ones(), "b": ones()}
    state = setup(Momentum(0.1, 0.5), model)
    state.a.state = state.a.state._replace(v=np.array([2.0, 4.0]))
    _, new = update(state, model, {"a": np.zeros(2), "b": np.zeros(2)})
    np.testing.assert_allclose(new["a"], [0.0, -1.0])
    np.testing.assert_allclose(new["b"], [1.0, 1.0])


def test_a_state_that_is_assigned_is_copied() -> None:
    v = np.zeros(2)
    state = setup(Momentum(), ones())
    state.state = state.state._replace(v=v)
    v[:] = 9
    np.testing.assert_array_equal(state.state.v, [0, 0])


def test_a_state_that_is_assigned_takes_the_element_type_of_the_old_one() -> None:
    state = setup(Momentum(), ones())
    state.state = state.state._replace(v=np.array([1, 2]))
    assert state.state.v.dtype == np.float64


def test_numbers_in_a_state_may_be_replaced() -> None:
    state = setup(Adam(), {"a": ones(), "b": ones()})
    state.a.state = state.a.state._replace(weight=(0.5, 0.25))
    assert state.a.state.weight == (0.5, 0.25)
    assert state.b.state.weight == (0.0, 0.0)


def test_the_arrays_of_a_state_are_views_of_it() -> None:
    model = ones()
    state = setup(Momentum(0.1, 0.5), model)
    state.state.v[:] = 2.0
    np.testing.assert_allclose(update(state, model, np.zeros(2))[1], [0, 0])


# -- freeze, thaw, adjust ------------------------------------------------------------------------------------


def frozen(state: Any) -> list[bool]:
    return [leaf.frozen for leaf in leaves(state)]


def etas(state: Any) -> list[float]:
    return [leaf.rule.eta for leaf in leaves(state)]


PARTS = {
    "the whole": (lambda s: s, None, [True] * 5),
    "a branch": (lambda s: s.layers[1], None, [False, False, True, True, False]),
    "a leaf": (lambda s: s.layers[0].bias, None, [False, True, False, False, False]),
    "a glob": (lambda s: s, "**.bias", [False, True, False, True, False]),
    "a glob below a branch": (lambda s: s.layers[0], "bias", [False, True, False, False, False]),
    "a glob with a star for an index": (lambda s: s, "layers.*.w", [True, False, True, False, False]),
    "a predicate": (lambda s: s, lambda path, _leaf: path[-1] == "bias", [False, True, False, True, False]),
    "a predicate of the leaf": (lambda s: s, lambda _path, leaf: leaf.rule.eta == 0.1, [True] * 5),
    "a rule type": (lambda s: s, Descent, [True] * 5),
    "a list": (lambda s: s, ["head.w", "layers.0.w"], [True, False, False, False, True]),
    "a list of several kinds": (
        lambda s: s,
        ["head.**", lambda path, _leaf: path[1] == 0],
        [True, True, False, False, True],
    ),
    "a path": (lambda s: s, KeyPath("head", "w"), [False, False, False, False, True]),
}
PART = pytest.mark.parametrize(("of", "where", "want"), PARTS.values(), ids=PARTS.keys())


@PART
def test_freezing_a_part_freezes_that_part_alone(of: Any, where: Any, want: list[bool]) -> None:
    state = setup(Descent(0.1), net())
    freeze_(of(state), where)
    assert frozen(state) == want


@PART
def test_thawing_a_part_thaws_that_part_alone(of: Any, where: Any, want: list[bool]) -> None:
    state = freeze(setup(Descent(0.1), net()))
    thaw_(of(state), where)
    assert frozen(state) == [not w for w in want]


@PART
def test_adjusting_a_part_adjusts_that_part_alone(of: Any, where: Any, want: list[bool]) -> None:
    state = setup(Descent(0.1), net())
    adjust_(of(state), 0.5, where=where)
    assert etas(state) == [0.5 if w else 0.1 for w in want]


@PART
def test_the_pure_forms_change_a_part_of_the_new_state_and_nothing_of_the_old(
    of: Any, where: Any, want: list[bool]
) -> None:
    state = setup(Descent(0.1), net())
    assert sum(frozen(freeze(of(state), where))) == sum(want)
    assert etas(adjust(of(state), 0.5, where=where)).count(0.5) == sum(want)
    assert frozen(state) == [False] * 5
    assert etas(state) == [0.1] * 5


def test_a_rule_type_picks_rules_inside_chains() -> None:
    state = setup({"head.**": Chain(ClipGrad(), Adam()), "**": Descent()}, net())
    freeze_(state, ClipGrad)
    assert frozen(state) == [False] * 4 + [True]


def test_a_frozen_leaf_takes_no_step_and_keeps_its_state() -> None:
    model = {"a": ones(), "b": ones()}
    state = freeze(setup(Momentum(), model), "a")
    state, new = update(state, model, {"a": ones(), "b": ones()})
    assert new["a"] is model["a"]
    np.testing.assert_array_equal(state.a.state.v, [0, 0])
    np.testing.assert_allclose(state.b.state.v, [0.01, 0.01])


def test_a_leaf_may_be_frozen_by_assignment() -> None:
    state = setup(Descent(), net())
    state.head.w.frozen = True
    assert frozen(state) == [False] * 4 + [True]


def test_freezing_one_place_of_a_tie_freezes_all() -> None:
    w = ones()
    state = setup(Descent(), {"a": w, "b": [w]})
    freeze_(state.b)
    assert state.a.frozen


def test_a_glob_that_fits_any_place_of_a_tie_picks_it() -> None:
    w = ones()
    state = setup(Descent(), {"a": w, "b": [w], "c": ones()})
    freeze_(state, "b.*")
    assert (state.a.frozen, state.c.frozen) == (True, False)


def test_adjusting_keeps_momenta_and_the_frozen_flag() -> None:
    model = ones()
    state, model = update(setup(Momentum(), model), model, ones())
    freeze_(state)
    adjust_(state, 0.5)
    assert state.frozen
    np.testing.assert_allclose(state.state.v, [0.01, 0.01])


def test_an_adjustment_that_is_refused_changes_nothing_anywhere() -> None:
    state = setup({"head.**": Adam(0.2), "**": Descent(0.1)}, net())
    with pytest.raises(opt.BadSetting):
        adjust_(state, eta=0.3, beta=0.9)
    assert etas(state) == [0.1] * 4 + [0.2]


def test_a_name_that_only_some_rules_have_is_adjusted_where_it_is() -> None:
    state = setup({"head.**": AdamW(lam=0.1), "**": Descent()}, net())
    adjust_(state, lam=0.2)
    assert state.head.w.rule.lam == 0.2


def test_a_selector_that_picks_nothing_changes_nothing() -> None:
    state = setup(Descent(), net())
    with pytest.raises(NoMatch):
        freeze_(state, ["head.w", "tail.w"])
    assert not any(frozen(state))


# -- old states stay as they were ----------------------------------------------------------------------------


def picture(state: Any) -> list[Any]:
    return [(leaf.rule, leaf.frozen, copy.deepcopy(leaf.state)) for leaf in leaves(state)]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(x[:2] == y[:2] and all(map(np.array_equal, x[2], y[2])) for x, y in zip(a, b, strict=True))


FORMS = {
    "update": lambda s, m, g: update(s, m, g)[0],
    "freeze": lambda s, _m, _g: freeze(s, "**.bias"),
    "thaw": lambda s, _m, _g: thaw(s),
    "adjust": lambda s, _m, _g: adjust(s, 0.5),
    "copy": lambda s, _m, _g: copy.copy(s),
    "deepcopy": lambda s, _m, _g: copy.deepcopy(s),
    "update with nothing": lambda s, m, _g: update(s, m, None)[0],
    "update of a part": lambda s, m, g: update(s, m, {**g, "layers": None})[0],
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS.keys())
def test_the_old_state_stays_when_the_new_one_is_stepped_in_place(make: Any) -> None:
    model = net()
    state, model = update(setup(Momentum(), model), model, net_grads())
    before = picture(state)
    new = make(state, model, net_grads())
    update_(new, net(), net_grads())
    adjust_(new, 0.7)
    freeze_(new)
    assert same(picture(state), before)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS.keys())
def test_the_new_state_stays_when_the_old_one_is_stepped_in_place(make: Any) -> None:
    model = net()
    state, model = update(setup(Momentum(), model), model, net_grads())
    new = make(state, model, net_grads())
    before = picture(new)
    update_(state, net(), net_grads())
    adjust_(state, 0.7)
    freeze_(state)
    assert same(picture(new), before)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS.keys())
def test_assigning_to_the_new_state_leaves_the_old_one(make: Any) -> None:
    model = net()
    state = setup(Momentum(), model)
    before = picture(state)
    new = make(state, model, net_grads())
    new.head.w.state = new.head.w.state._replace(v=np.full(2, 9.0))
    new.head.w.rule = Momentum(0.9)
    assert same(picture(state), before)


def test_what_takes_no_step_is_shared_by_the_old_and_the_new_model() -> None:
    model = net()
    _, new = update(setup(Descent(), model), model, {"layers": None, "head": {"w": ones()}})
    assert new["layers"] is model["layers"]
    assert new["head"] is not model["head"]


# -- parts ---------------------------------------------------------------------------------------------------


def test_a_part_of_the_state_steps_that_part_of_the_model() -> None:
    model = net()
    state = setup(Momentum(0.1), model)
    part, new = update(state.layers, model["layers"], net_grads()["layers"])
    np.testing.assert_allclose(new[0]["w"], [0.9, 0.9])
    np.testing.assert_allclose(part[0].w.state.v, [0.1, 0.1])
    np.testing.assert_array_equal(state.layers[0].w.state.v, [0, 0])


def test_a_leaf_steps_its_array_alone() -> None:
    model = net()
    state = setup(Momentum(0.1), model)
    update_(state.head.w, model["head"]["w"], ones())
    np.testing.assert_allclose(model["head"]["w"], [0.9, 0.9])
    np.testing.assert_array_equal(model["layers"][0]["w"], [1, 1])
    np.testing.assert_allclose(state.head.w.state.v, [0.1, 0.1])


def test_parts_stepped_in_turn_end_where_the_whole_does() -> None:
    one, two = net(), net()
    whole, parts = setup(Adam(0.1), one), setup(Adam(0.1), two)
    for _ in range(3):
        update_(whole, one, net_grads())
        update_(parts.layers, two["layers"], net_grads()["layers"])
        update_(parts.head, two["head"], net_grads()["head"])
    for a, b in zip(trainables(one), trainables(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_part_sees_a_tie_that_lies_inside_it() -> None:
    w = ones()
    model = {"in": [w, w], "out": ones()}
    state = setup(Descent(0.1), model)
    _, new = update(state["in"], model["in"], [ones(), 2 * ones()])
    np.testing.assert_allclose(new[0], [0.7, 0.7])
    assert new[0] is new[1]


# -- copies --------------------------------------------------------------------------------------------------


def pickled(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


def trained(rule: Any) -> tuple[Any, Any]:
    """A state of some history: leaves frozen, adjusted, skipped, tied."""
    w = ones(2, 2)
    model: Any = {
        "layers": [Dense(w), Dense(w.T, ones())],
        "head": Pair(ones(), ones()),
        3: (ones(), np.tanh),
    }
    state = setup(rule, model)
    grads = {
        "layers": [{"w": ones(2, 2)}, {"w": None, "b": ones()}],
        "head": (ones(), None),
        3: (ones(), None),
    }
    state, model = update(state, model, grads)
    freeze_(state.head.w)
    adjust_(state[3], 0.5)
    return update(state, model, grads)


@pytest.mark.parametrize(
    "clone",
    [copy.copy, copy.deepcopy, pickled],
    ids=["copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize(
    "rule", [Descent(), Adam(), Chain(ClipGrad(), opt.AccumGrad(2), Momentum())], ids=str
)
def test_a_clone_of_a_state_is_equal_and_steps_alike(clone: Any, rule: Any) -> None:
    state, model = trained(rule)
    new = clone(state)
    assert new == state
    assert new.layers[0].w is new.layers[1].w
    grads = {"layers": [{"w": ones(2, 2)}, None], "head": (ones(), ones()), 3: (ones(), None)}
    _, a = update(state, model, grads)
    _, b = update(new, model, grads)
    for x, y in zip(trainables(a), trainables(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", [Leaf, opt.Branch], ids=["leaf", "branch"])
def test_a_part_can_be_pickled(kind: type) -> None:
    state, _ = trained(Momentum())
    part = state.head.b if kind is Leaf else state.head
    new = pickled(part)
    assert isinstance(new, kind)
    assert new == part


def test_a_schedule_keeps_its_place_in_a_pickle() -> None:
    model = ones()
    state, model = update(setup(Descent(opt.Linear(1.0, 0.0, 4)), model), model, np.zeros(2))
    new = pickled(state)
    np.testing.assert_allclose(update(new, model, ones())[1], [0.25, 0.25])


# -- gradients in other containers ---------------------------------------------------------------------------


def dense_net() -> Any:
    return {"layers": [Dense(ones(), ones()), Dense(ones())], "rate": 3}


HEAD = [{"w": ones(), "b": ones()}, {"w": 2 * ones(), "b": None}]
GRADIENTS = {
    "dicts": {"layers": HEAD},
    "a tuple for a list": {"layers": tuple(HEAD)},
    "an object with attributes": {"layers": [SimpleNamespace(**g) for g in HEAD]},
    "named tuples": {"layers": [Pair(**g) for g in HEAD]},
    "dataclasses of another class": {"layers": [Frozen(**g) for g in HEAD]},
    "the model's own classes": {"layers": [Dense(**g) for g in HEAD], "rate": 0},
    "a tuple in the order of the fields": {"layers": [(g["w"], g["b"], None) for g in HEAD]},
    "entries for what does not train": {"layers": [{**g, "name": "x"} for g in HEAD], "rate": ones(7)},
    "the keys in another order": {"rate": None, "layers": [{"b": g["b"], "w": g["w"]} for g in HEAD]},
    "an ordered dict": collections.OrderedDict(layers=HEAD),
}


@pytest.mark.parametrize("grads", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_a_gradient_may_stand_in_any_container_with_the_keys_of_the_model(grads: Any) -> None:
    model = dense_net()
    _, new = update(setup(Descent(0.1), model), model, grads)
    np.testing.assert_allclose(new["layers"][0].w, [0.9, 0.9])
    np.testing.assert_allclose(new["layers"][0].b, [0.9, 0.9])
    np.testing.assert_allclose(new["layers"][1].w, [0.8, 0.8])


def test_a_gradient_as_a_plain_object_of_a_class_is_read_by_its_attributes() -> None:
    class Gradient:
        def __init__(self) -> None:
            self.w, self.b = ones(), None

    model = Dense(ones(), ones())
    _, new = update(setup(Descent(0.1), model), model, Gradient())
    np.testing.assert_allclose(new.w, [0.9, 0.9])
    assert new.b is model.b


@pytest.mark.parametrize(
    "grads",
    [
        {"layers": [{"w": ones(), "b": None}, None]},
        {"layers": [{"w": ones(), "b": None}, {"w": None}]},
        {"layers": ({"w": ones(), "b": None}, None)},
    ],
    ids=["none at a branch", "none at a leaf", "none in a tuple"],
)
def test_none_in_a_gradient_means_no_step_there_and_the_state_stays(grads: Any) -> None:
    model = dense_net()
    state, new = update(setup(Momentum(0.1), model), model, grads)
    assert new["layers"][1] is model["layers"][1]
    assert new["layers"][0].b is model["layers"][0].b
    np.testing.assert_allclose(new["layers"][0].w, [0.9, 0.9])
    np.testing.assert_array_equal(state.layers[1].w.state.v, [0, 0])


def test_none_for_the_whole_gradient_steps_nothing() -> None:
    model = dense_net()
    state, new = update(setup(Momentum(), model), model, None)
    assert new is model
    assert state == setup(Momentum(), model)


def test_a_gradient_may_be_of_whole_numbers() -> None:
    _, new = update(setup(Descent(0.1), ones()), ones(), np.array([1, 2]))
    np.testing.assert_allclose(new, [0.9, 0.8])


def test_an_array_may_be_a_gradient_that_is_part_of_the_model() -> None:
    model = {"a": np.array([1.0, 2.0]), "b": np.array([3.0, 4.0])}
    state = setup(Descent(1.0), model)
    update_(state, model, {"a": model["b"], "b": model["a"]})
    np.testing.assert_array_equal(model["a"], [-2, -2])
    np.testing.assert_array_equal(model["b"], [2, 2])


def test_the_leaf_of_a_tie_refuses_a_transposed_view_of_its_array() -> None:
    x = np.arange(9.0).reshape(3, 3)
    model = {"a": x, "b": {"c": x.T}}
    state = opt.setup(opt.Momentum(), model)
    with pytest.raises(opt.TreeMismatch, match=r"a transposed view of model\['a'\]"):
        opt.update_(state["b"]["c"], model["b"]["c"], np.ones((3, 3)))
