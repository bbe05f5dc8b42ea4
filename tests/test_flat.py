"""A model as one vector and back, and its arrays as a list, all in one order."""

import collections
import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

import optimisers as opt
from optimisers import (
    Descent,
    KeyPath,
    Leaf,
    TreeMismatch,
    destructure,
    isnumeric,
    maywrite,
    setup,
    trainable,
    trainables,
    update,
)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A layer with a field that cannot be trained."""

    w: Any
    b: Any
    f: Any = np.tanh


class Pair(NamedTuple):
    """Two things."""

    x: Any
    y: Any


@opt.register(children=("b", "a", "c"), trainable=("c", "b"))
class TwoThirds:
    """Three arrays, of which two train; named in three different orders."""

    def __init__(self, a: Any, b: Any, c: Any) -> None:
        self.a, self.b, self.c = a, b, c


@dataclasses.dataclass
class Affine:
    """A model that can be called."""

    w: Any

    def __call__(self, x: Any) -> Any:
        return self.w * x


def vector(*values: float) -> Any:
    return np.array(values, float)


def mixed() -> Any:
    """Two element types, and one array at two places."""
    a = vector(1.0, 2.0, 3.0)
    return {"a": a, "b": np.array([4.0 + 5.0j]), "c": {"again": a}}


# -- destructure ---------------------------------------------------------------------------------------------


def test_a_model_is_flattened_in_the_order_of_its_fields() -> None:
    flat, _ = destructure({"b": vector(1, 2), "a": Dense(vector(3), vector(4, 5))})
    np.testing.assert_array_equal(flat, [1, 2, 3, 4, 5])


def test_the_elements_of_a_matrix_come_row_by_row() -> None:
    flat, _ = destructure(np.array([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_array_equal(flat, [1, 2, 3, 4])


def test_the_elements_of_a_transposed_matrix_come_by_its_own_rows() -> None:
    flat, re = destructure(np.array([[1.0, 2.0], [3.0, 4.0]]).T)
    np.testing.assert_array_equal(flat, [1, 3, 2, 4])
    np.testing.assert_array_equal(re(flat), [[1, 3], [2, 4]])


def test_the_vector_is_a_copy() -> None:
    x = vector(1, 2)
    flat, _ = destructure(x)
    flat[0] = 9
    assert x[0] == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64, np.complex128])
def test_the_vector_of_one_element_type_keeps_it(dtype: Any) -> None:
    flat, re = destructure([np.ones(2, dtype), np.ones(3, dtype)])
    assert flat.dtype == dtype
    assert re(flat)[0].dtype == dtype


def test_a_tied_array_appears_once_and_is_tied_again_in_the_way_back() -> None:
    x = vector(1, 2)
    flat, re = destructure({"a": x, "b": [x]})
    new = re(flat + 1)
    np.testing.assert_array_equal(flat, [1, 2])
    assert new["a"] is new["b"][0]


def test_a_transposed_tie_is_tied_again_in_the_way_back() -> None:
    x = np.arange(6.0).reshape(2, 3)
    flat, re = destructure({"a": x, "t": x.T})
    new = re(flat * 2)
    assert len(flat) == 6
    assert np.shares_memory(new["a"], new["t"])
    np.testing.assert_array_equal(new["t"], 2 * x.T)


def test_element_types_promote_in_the_vector() -> None:
    flat, _ = destructure(mixed())
    np.testing.assert_array_equal(flat, np.array([1, 2, 3, 4 + 5j]))
    assert flat.dtype == np.complex128


def test_element_types_are_restored_by_the_way_back() -> None:
    _, re = destructure(mixed())
    new = re(np.array([4 + 1j, 5 + 2j, 6 + 3j, 7 + 4j]))
    np.testing.assert_array_equal(new["a"], [4, 5, 6])
    np.testing.assert_array_equal(new["b"], [7 + 4j])
    assert (new["a"].dtype, new["b"].dtype) == (np.float64, np.complex128)
    assert new["c"]["again"] is new["a"]


def test_half_and_single_precision_promote_to_single() -> None:
    flat, re = destructure([np.ones(1, np.float16), np.ones(1, np.float32)])
    assert flat.dtype == np.float32
    assert [x.dtype for x in re(flat)] == [np.float16, np.float32]


def test_shapes_are_restored_by_the_way_back() -> None:
    model = {
        "w": np.zeros((7, 1), np.float32),
        "s": np.array(0.0, np.float32),
        "e": np.zeros((0, 2), np.float32),
    }
    _, re = destructure(model)
    new = re(np.arange(8))
    assert {k: v.shape for k, v in new.items()} == {"w": (7, 1), "s": (), "e": (0, 2)}
    assert {v.dtype for v in new.values()} == {np.dtype(np.float32)}
    assert float(new["s"]) == 7


def test_what_does_not_train_is_that_of_the_original() -> None:
    model = (Dense(vector(1), False), TwoThirds(vector(1), vector(2), vector(3)), np.arange(3), "text")
    flat, re = destructure(model)
    new = re(flat + 1)
    assert type(new[0]) is Dense
    assert (new[0].b, new[0].f) == (False, np.tanh)
    assert new[1].a is model[1].a
    assert new[2] is model[2]
    assert new[3] == "text"


def test_arrays_in_nested_containers_are_found() -> None:
    model = [Dense(vector(1), vector(2)), [[vector(3)], (vector(4), {"k": vector(5)})]]
    flat, re = destructure(model)
    np.testing.assert_array_equal(flat, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(re(flat * 10)[1][1][1]["k"], [50])


def test_the_original_is_not_touched_by_the_way_back() -> None:
    model = {"a": vector(1, 2), "l": [vector(3)]}
    flat, re = destructure(model)
    new = re(flat + 1)
    np.testing.assert_array_equal(model["a"], [1, 2])
    assert new["l"] is not model["l"]


# -- the way back --------------------------------------------------------------------------------------------


def test_the_way_back_copies_the_vector() -> None:
    flat, re = destructure({"a": vector(1, 2)})
    new = re(flat)
    flat[0] = 9
    assert new["a"][0] == 1


def test_without_copying_the_arrays_are_views_of_the_vector() -> None:
    flat, re = destructure({"a": vector(1, 2), "w": np.ones((2, 2))})
    new = re(flat, copy=False)
    flat[:] = np.arange(6)
    np.testing.assert_array_equal(new["a"], [0, 1])
    np.testing.assert_array_equal(new["w"], [[2, 3], [4, 5]])


def test_without_copying_an_array_of_another_type_is_converted() -> None:
    flat, re = destructure([np.ones(2, np.float32), np.ones(2)])
    new = re(flat, copy=False)
    assert (new[0].dtype, new[1].dtype) == (np.float32, np.float64)
    assert np.shares_memory(new[1], flat)


@pytest.mark.parametrize("length", [0, 3, 5])
def test_a_vector_of_another_length_is_refused(length: int) -> None:
    _, re = destructure([np.ones(3), np.array(1.0)])
    with pytest.raises(TreeMismatch, match=rf"re takes a vector of length 4; \({length},\) was given"):
        re(np.zeros(length))


def test_the_way_back_may_fill_another_model_of_the_same_structure() -> None:
    flat, re = destructure(Dense(vector(1, 2), vector(3)))
    other = Dense(vector(7, 8), vector(9), np.sin)
    new = re(other, flat)
    np.testing.assert_array_equal(new.w, [1, 2])
    assert new.f is np.sin
    np.testing.assert_array_equal(other.w, [7, 8])


def test_a_model_that_can_be_called_still_can() -> None:
    flat, re = destructure(Affine(vector(1, 2)))
    np.testing.assert_array_equal(re(3 * flat)(vector(1, 10)), [3, 60])


def test_the_way_back_has_the_length_of_the_vector() -> None:
    flat, re = destructure(mixed())
    assert len(re) == len(flat) == 4


def test_the_way_back_prints_the_kind_of_model_and_the_length() -> None:
    assert repr(destructure(Pair(vector(1, 2), vector(3)))[1]) == "Restructure(Pair, ..., 3)"


def test_a_model_without_parameters_is_an_empty_vector_and_comes_back_itself() -> None:
    model = {"f": np.tanh, "n": [1, 2]}
    flat, re = destructure(model)
    assert flat.shape == (0,)
    assert re(np.zeros(0, np.float32)) is model
    with pytest.raises(TreeMismatch):
        re(np.zeros(1))


def test_an_empty_array_does_not_change_the_type_of_the_vector() -> None:
    flat, _ = destructure([np.ones(2, np.float16), (), {"n": 3}])
    assert flat.dtype == np.float16


def test_a_vector_trains_as_one_array_and_ends_where_the_model_does() -> None:
    model = {"w": np.arange(6.0).reshape(2, 3), "b": vector(1, 2)}
    grads = {"w": np.ones((2, 3)), "b": vector(3, -4)}
    rule = opt.Adam(0.1)
    flat, re = destructure(model)
    state = setup(rule, flat)
    assert isinstance(state, Leaf)
    _, new = update(state, flat, destructure(grads)[0])
    _, want = update(setup(rule, model), model, grads)
    np.testing.assert_array_equal(re(new)["w"], want["w"])
    np.testing.assert_array_equal(re(new)["b"], want["b"])


def test_the_vector_of_a_gradient_with_the_structure_of_the_model_fits_that_of_the_model() -> None:
    model = Dense(vector(1, 2), vector(3))
    flat, re = destructure(model)
    grads = re(vector(10, 20, 30))
    np.testing.assert_array_equal(destructure(grads)[0] + flat, [11, 22, 33])


# -- trainables ----------------------------------------------------------------------------------------------


def test_the_trainables_are_the_arrays_of_the_model_themselves() -> None:
    model = {"x": vector(1), "z": [vector(2)]}
    found = trainables(model)
    assert found[0] is model["x"]
    assert found[1] is model["z"][0]


def test_writing_into_a_trainable_changes_the_model() -> None:
    model = {"x": vector(1, 2)}
    for x in trainables(model):
        np.multiply(x, 10, out=x)
    np.testing.assert_array_equal(model["x"], [10, 20])


def test_the_trainables_leave_out_what_is_not_trained() -> None:
    model = (TwoThirds(vector(1), vector(2), vector(3)), np.arange(2), "text", 2.0, np.tanh)
    assert [float(x[0]) for x in trainables(model)] == [2, 3]


def test_a_tied_array_is_listed_once_with_its_first_path() -> None:
    x = vector(1, 2, 3)
    model = {"x": x, "y": x, "z": vector(4)}
    found = trainables(model, path=True)
    assert [p for p, _ in found] == [KeyPath("x"), KeyPath("z")]
    assert found[0][1] is x


def test_paths_name_attributes_keys_and_indices() -> None:
    model = {"a": Dense(vector(1), None), "b": [vector(2), {"c": vector(3)}]}
    assert [p for p, _ in trainables(model, path=True)] == [
        KeyPath("a", "w"),
        KeyPath("b", 0),
        KeyPath("b", 1, "c"),
    ]


def test_a_path_finds_the_array_of_the_same_place_in_another_structure() -> None:
    model = {"net": [Dense(vector(2), None)]}
    average = {"net": [Dense(vector(1), None)]}
    for path, x in trainables(model, path=True):
        path.get(average)[...] = 0.5 * path.get(average) + 0.5 * x
    np.testing.assert_array_equal(average["net"][0].w, [1.5])


TIED = vector(1)
ORDERS = {
    "a dict, as inserted": {"z": vector(0), "a": vector(1), "m": vector(2)},
    "an ordered dict": collections.OrderedDict(z=vector(0), a=vector(1)),
    "a dict with keys of many kinds": {3: vector(0), "1": vector(1), (0,): vector(2)},
    "a class with its children in another order": TwoThirds(vector(9), vector(0), vector(1)),
    "a nest": [Dense(vector(0), vector(1)), {"x": (vector(2), Pair(vector(3), vector(4)))}],
    "more than ten entries": [vector(i) for i in range(12)],
    "a tie": {"b": [vector(0), TIED], "a": TIED, "c": vector(2)},
    "two element types": [vector(0), np.ones(1, np.float32), vector(2), np.full(1, 3, np.float32)],
}


@pytest.mark.parametrize("model", ORDERS.values(), ids=ORDERS.keys())
def test_the_order_is_that_of_the_walk_with_and_without_paths_in_vectors_and_in_the_state(model: Any) -> None:
    want = list(range(len(trainables(model))))
    assert [float(x[0]) for x in trainables(model)] == want
    assert [float(x[0]) for _, x in trainables(model, path=True)] == want
    assert list(destructure(model)[0]) == want
    seen = []
    setup(lambda path, _x: seen.append(path) or Descent(), model)
    assert seen == [p for p, _ in trainables(model, path=True)]
    assert [float(seen[i].get(model)[0]) for i in want] == want


# -- trainable, isnumeric, maywrite --------------------------------------------------------------------------


def test_trainable_gives_the_children_of_one_container_by_key() -> None:
    model = Dense(vector(1), {"k": vector(2)})
    assert trainable(model) == {"w": model.w, "b": model.b, "f": np.tanh}


def test_trainable_leaves_out_what_a_registered_class_does_not_train() -> None:
    model = TwoThirds(vector(1), vector(2), vector(3))
    assert list(trainable(model)) == ["b", "c"]


@pytest.mark.parametrize("x", [np.ones(2), 3.0, "text", None, np.tanh], ids=repr)
def test_what_is_no_container_has_no_trainable_children(x: Any) -> None:
    assert trainable(x) == {}


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "c16", ">f4"])
def test_arrays_of_reals_and_complex_numbers_are_numeric(dtype: str) -> None:
    assert isnumeric(np.ones(2, dtype))
    assert isnumeric(np.ones((), dtype))
    assert isnumeric(np.ones((0, 3), dtype))


@pytest.mark.parametrize(
    "x",
    [np.arange(3), np.ones(2, bool), np.array(["a"]), np.ones(2, object), 2.0, 1j, "a", None, np.tanh],
    ids=repr,
)
def test_whole_numbers_bools_scalars_and_everything_else_are_not_numeric(x: Any) -> None:
    assert not isnumeric(x)


def test_an_array_may_be_written_unless_it_is_read_only_or_spread_out() -> None:
    fixed = np.ones(2)
    fixed.flags.writeable = False
    assert maywrite(np.ones(2))
    assert maywrite(np.ones((4, 4))[::2, 1:])
    assert not maywrite(fixed)
    assert not maywrite(np.broadcast_to(np.ones(1), (3,)))
    assert not maywrite("text")
