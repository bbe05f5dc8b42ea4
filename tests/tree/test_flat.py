"""A model as one vector and back, and its arrays as a list, all in one order."""

import collections
import copy
import dataclasses
from collections.abc import Callable
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
    """136. And of the insertions into a dict."""
    flat, _ = destructure({"b": vector(1, 2), "a": Dense(vector(3), vector(4, 5))})
    np.testing.assert_array_equal(flat, [1, 2, 3, 4, 5])


def test_the_elements_of_a_matrix_come_row_by_row() -> None:
    """137. They come by columns there."""
    flat, _ = destructure(np.array([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_array_equal(flat, [1, 2, 3, 4])


def test_the_elements_of_a_transposed_matrix_come_by_its_own_rows() -> None:
    flat, re = destructure(np.array([[1.0, 2.0], [3.0, 4.0]]).T)
    np.testing.assert_array_equal(flat, [1, 3, 2, 4])
    np.testing.assert_array_equal(re(flat), [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: [x], lambda x: {"x": x, "y": x}], ids=["alone", "in a list", "tied"]
)
def test_the_vector_is_a_copy(wrap: Any) -> None:
    """136. In the case of one array, too."""
    x = vector(1, 2)
    flat, _ = destructure(wrap(x))
    flat[0] = 9
    assert x[0] == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64, np.complex128])
def test_the_vector_of_one_element_type_keeps_it(dtype: Any) -> None:
    """137. And so does the way back."""
    flat, re = destructure([np.ones(2, dtype), np.ones(3, dtype)])
    assert flat.dtype == dtype
    assert re(flat)[0].dtype == dtype


def test_a_tied_array_appears_once_and_is_tied_again_in_the_way_back() -> None:
    """138. One object at both places."""
    x = vector(1, 2)
    flat, re = destructure({"a": x, "b": [x]})
    new = re(flat + 1)
    np.testing.assert_array_equal(flat, [1, 2])
    assert new["a"] is new["b"][0]


def test_a_transposed_tie_is_tied_again_in_the_way_back() -> None:
    """138. One memory at both places."""
    x = np.arange(6.0).reshape(2, 3)
    flat, re = destructure({"a": x, "t": x.T})
    new = re(flat * 2)
    assert len(flat) == 6
    assert np.shares_memory(new["a"], new["t"])
    np.testing.assert_array_equal(new["t"], 2 * x.T)


def test_element_types_promote_in_the_vector() -> None:
    """139. Real and complex numbers are complex numbers."""
    flat, _ = destructure(mixed())
    np.testing.assert_array_equal(flat, np.array([1, 2, 3, 4 + 5j]))
    assert flat.dtype == np.complex128


def test_element_types_are_restored_by_the_way_back() -> None:
    """139. A real array takes the real parts."""
    _, re = destructure(mixed())
    new = re(np.array([4 + 1j, 5 + 2j, 6 + 3j, 7 + 4j]))
    np.testing.assert_array_equal(new["a"], [4, 5, 6])
    np.testing.assert_array_equal(new["b"], [7 + 4j])
    assert (new["a"].dtype, new["b"].dtype) == (np.float64, np.complex128)
    assert new["c"]["again"] is new["a"]


def test_half_and_single_precision_promote_to_single() -> None:
    """139. And come back as what they were."""
    flat, re = destructure([np.ones(1, np.float16), np.ones(1, np.float32)])
    assert flat.dtype == np.float32
    assert [x.dtype for x in re(flat)] == [np.float16, np.float32]


def test_a_matrix_of_single_precision_stays_one_among_vectors_of_double() -> None:
    """140. Of seven numbers three are for a vector and four for a matrix, both of them at two places."""
    a, b = vector(1, 2, 3), np.array([[4, 6], [5, 7]], np.float32)
    _, re = destructure({"a": a, "b": b, "c": [b, a]})
    new = re(np.arange(10, 80, 10))
    np.testing.assert_array_equal(new["a"], [10, 20, 30])
    np.testing.assert_array_equal(new["b"], [[40, 50], [60, 70]])
    assert (new["a"].dtype, new["b"].dtype) == (np.float64, np.float32)
    assert new["c"][0] is new["b"]
    assert new["c"][1] is new["a"]


def test_shapes_are_restored_by_the_way_back() -> None:
    """140. Those without axes and without elements, too; the vector may be of whole numbers."""
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
    """141. Functions, flags, whole numbers, text, children that are not trained, what is no child."""
    model = (Dense(vector(1), False), TwoThirds(vector(1), vector(2), vector(3)), np.arange(3), "text")
    model[1].d = vector(4)
    flat, re = destructure(model)
    np.testing.assert_array_equal(flat, [1, 2, 3])
    new = re(flat + 1)
    assert (type(new[0]), type(new[1])) == (Dense, TwoThirds)
    assert (new[0].b, new[0].f) == (False, np.tanh)
    assert new[1].a is model[1].a
    assert new[1].d is model[1].d
    np.testing.assert_array_equal([new[1].b, new[1].c], [[3], [4]])
    assert new[2] is model[2]
    assert new[3] == "text"


def test_arrays_in_nested_containers_are_found() -> None:
    """142. In lists of layers, and lists of lists."""
    model = [Dense(vector(1), vector(2)), [[vector(3)], (vector(4), {"k": vector(5)})]]
    flat, re = destructure(model)
    np.testing.assert_array_equal(flat, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(re(flat * 10)[1][1][1]["k"], [50])


def test_a_list_of_layers_comes_back_with_its_ties_and_what_does_not_train() -> None:
    """142. Two layers and a dict: one array at two places, True, False, and ()."""
    x = vector(1, 2, 3)
    model = [Pair(x, x), {"a": True, "b": Pair(vector(4), False), "c": ()}]
    flat, re = destructure(model)
    np.testing.assert_array_equal(flat, [1, 2, 3, 4])
    new = re(vector(10, 20, 30, 40))
    np.testing.assert_array_equal(new[0].x, [10, 20, 30])
    assert new[0].y is new[0].x
    np.testing.assert_array_equal(new[1]["b"].x, [40])
    assert (new[1]["a"], new[1]["b"].y, new[1]["c"]) == (True, False, ())


def test_an_array_of_objects_that_hold_parameters_is_refused() -> None:
    """142. It is walked there. Here lists are; but nothing that could train is passed over in silence."""
    for inside in (vector(1), Dense(vector(1), None), [vector(1)]):
        layers = np.empty(2, object)
        layers[:] = [inside, None]
        with pytest.raises(TreeMismatch, match=r"model\['layers'\]"):
            destructure({"w": vector(1), "layers": layers})


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


@pytest.mark.parametrize("length", [0, 1, 3, 5, 8])
def test_a_vector_of_another_length_is_refused(length: int) -> None:
    """143. Too short or too long; both lengths are named."""
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
    """145. `re(x, p)` there is `re(p)(x)` here."""
    flat, re = destructure(Affine(vector(1, 2)))
    np.testing.assert_array_equal(re(3 * flat)(vector(1, 10)), [3, 60])


def test_the_way_back_has_the_length_of_the_vector() -> None:
    """145. Whatever the types."""
    flat, re = destructure(mixed())
    assert len(re) == len(flat) == 4


def test_the_way_back_prints_the_kind_of_model_and_the_length() -> None:
    """145. The model is not printed."""
    assert repr(destructure(Pair(vector(1, 2), vector(3)))[1]) == "Restructure(Pair, ..., 3)"


def test_a_model_without_parameters_is_an_empty_vector_and_comes_back_itself() -> None:
    """144. The very object."""
    model = {"f": np.tanh, "n": [1, 2]}
    flat, re = destructure(model)
    assert flat.shape == (0,)
    assert re(np.zeros(0, np.float32)) is model
    with pytest.raises(TreeMismatch):
        re(np.zeros(1))


def test_an_empty_array_does_not_change_the_type_of_the_vector() -> None:
    """144. Nor does a container without arrays."""
    flat, _ = destructure([np.ones(2, np.float16), (), {"n": 3}])
    assert flat.dtype == np.float16


def test_a_vector_trains_as_one_array_and_ends_where_the_model_does() -> None:
    """154. With one Leaf."""
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


def test_whole_numbers_have_no_place_in_the_vector() -> None:
    """155. An example there says that they have."""
    model = Dense(np.arange(4).reshape(2, 2), np.arange(2))
    flat, re = destructure(model)
    assert flat.shape == (0,)
    assert re(flat) is model


# -- derivatives ---------------------------------------------------------------------------------------------


def slopes(loss: Callable[[], float], x: Any) -> Any:
    """The derivative of a loss by each element of an array, by differences: exact for quadratic functions."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + 1
        above = loss()
        x[i] = kept - 1
        out[i] = (above - loss()) / 2
        x[i] = kept
    return out


def test_differences_of_quadratic_functions_are_exact() -> None:
    x = vector(1, -2, 3)
    np.testing.assert_array_equal(slopes(lambda: x @ x + x[0] * x[1], x), [2 - 2, -4 + 1, 6])
    np.testing.assert_array_equal(x, [1, -2, 3])


def test_an_element_of_the_vector_depends_on_its_own_array_alone() -> None:
    """146. A tie moves as one."""
    x, z = vector(1, 2, 3), vector(4, 5, 6)
    for model in ([x, z], {"x": x, "y": np.sin, "z": z}, {"x": x, "y": x, "z": z}):
        for i in range(6):
            by_x, by_z = (slopes(lambda i=i, model=model: destructure(model)[0][i], a) for a in (x, z))
            np.testing.assert_array_equal([*by_x, *by_z], np.eye(6)[i])


def test_real_arrays_have_real_derivatives_in_a_complex_vector() -> None:
    """146. A real array has none by the imaginary parts."""
    model = mixed()
    by_real = slopes(lambda: float(destructure(model)[0][1].real), model["a"])
    by_imaginary = slopes(lambda: float(destructure(model)[0].imag.sum()), model["a"])
    np.testing.assert_array_equal([by_real, by_imaginary], [[0, 1, 0], [0, 0, 0]])


def test_the_derivative_by_the_vector_adds_those_of_the_places_of_a_tie() -> None:
    """147. x[0] + 2 y[1] + 3 z[2], where x and y are tied."""
    x = vector(1, 2, 3)
    flat, re = destructure({"x": x, "y": x, "z": vector(4, 5, 6)})

    def loss() -> float:
        new = re(flat)
        return new["x"][0] + 2 * new["y"][1] + 3 * new["z"][2]

    np.testing.assert_array_equal(slopes(loss, flat), [1, 2, 0, 0, 0, 3])


def test_what_does_not_train_does_not_depend_on_the_vector() -> None:
    """147. Of the squares of three arrays, those of the two that train count."""
    flat, re = destructure(TwoThirds(vector(7, 8, 9), vector(1, 2), vector(4)))

    def loss() -> float:
        new = re(flat)
        return sum(float(a @ a) for a in (new.a, new.b, new.c))

    np.testing.assert_array_equal(slopes(loss, flat), [2, 4, 8])
    np.testing.assert_array_equal(slopes(lambda: float(re(flat).a.sum()), flat), [0, 0, 0])


def test_a_model_may_be_used_in_part() -> None:
    """148. The sum of the first two of five."""
    flat, re = destructure(Pair(vector(1, 2), vector(3, 4, 5)))
    np.testing.assert_array_equal(slopes(lambda: float(re(flat).x.sum()), flat), [1, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("x", "y", "z", "want"),
    [(3, 0, 13, [16, 16, 0, 0]), (4, 0, 4, [8, 8, 0, 0]), (4, 4, 13, [17, 17, 4, 4])],
    ids=["two", "two alike", "with a third"],
)
def test_both_places_of_a_tie_count(x: float, y: float, z: float, want: list[float]) -> None:
    """149. A sum of multiples of three arrays, of which the first and the last are tied."""
    tied = vector(1, 2)
    flat, re = destructure((tied, vector(3, 4), tied))

    def loss() -> float:
        a, b, c = re(flat)
        return x * a.sum() + y * b.sum() + z * c.sum()

    np.testing.assert_array_equal(slopes(loss, flat), want)


@pytest.mark.parametrize("model", ["a", ("a", "beta"), (3, 4), (3, np.arange(4), None), {}], ids=repr)
def test_what_holds_no_parameters_has_no_derivative(model: Any) -> None:
    """151. Its vector has no elements."""
    flat, re = destructure(model)
    assert (flat.shape, len(re)) == ((0,), 0)
    assert re(flat) is model


def test_the_second_derivatives_of_the_vector() -> None:
    """152. Of the squares of 2 x: 8 x; of three times 3 (x[0] + ... + y[2])^2: 18 times 21."""
    x = vector(1, 2, 3)
    model = (x, vector(4, 5, 6))
    squares = slopes(
        lambda: float(np.sum(slopes(lambda: destructure(model)[0] @ destructure(model)[0], x) ** 2)), x
    )
    cubes = slopes(lambda: slopes(lambda: destructure(model)[0].sum() ** 3, x).sum(), x)
    np.testing.assert_array_equal(squares, [8, 16, 24])
    np.testing.assert_array_equal(cubes, [378, 378, 378])


def test_the_second_derivatives_of_the_way_back() -> None:
    """152. 8 times what is used, 0 for the rest; they fail there."""
    flat, re = destructure((vector(1, 2, 3), vector(4, 5, 6)))

    def loss() -> float:
        first, _ = re(flat)
        return first @ first

    got = slopes(lambda: float(np.sum(slopes(loss, flat) ** 2)), flat)
    np.testing.assert_array_equal(got, [8, 16, 24, 0, 0, 0])


# -- derivatives by those who take them ----------------------------------------------------------------------


class Library(NamedTuple):
    """A library that differentiates functions of one array."""

    name: str
    array: Callable[[Any, str], Any]
    grad: Callable[[Any], Any]


def of_jax() -> Library:
    jax = pytest.importorskip("jax")
    return Library("jax", jax.numpy.asarray, jax.grad)


def of_torch() -> Library:
    torch = pytest.importorskip("torch")
    return Library("torch", lambda x, kind: torch.tensor(x, dtype=getattr(torch, kind)), torch.func.grad)


by_libraries = pytest.mark.parametrize("library", [of_jax, of_torch], ids=["jax", "torch"])


def plain(x: Any) -> Any:
    return np.asarray(x, np.float64)


@by_libraries
def test_libraries_differentiate_the_vector(library: Callable[[], Library]) -> None:
    """146, 152. The tie, which is declared, moves as one; second derivatives make no warning."""
    lib = library()
    x = lib.array([1.0, 2.0, 3.0], "float32")

    def model(x: Any) -> Any:
        return {"a": x, "b": [x], "c": 2 * x, "n": lib.array([1, 2], "int32")}

    def vector(model: Any) -> Any:
        return destructure(model, ties=[("a", "b.0")])[0]

    np.testing.assert_array_equal(lib.grad(lambda x: vector(model(x))[0])(x), [1, 0, 0])
    np.testing.assert_array_equal(lib.grad(lambda x: vector(model(x)).sum())(x), [3, 3, 3])

    def squares(x: Any) -> Any:
        return (vector(model(x)) ** 2).sum()

    np.testing.assert_array_equal(lib.grad(lambda x: (lib.grad(squares)(x) ** 2).sum())(x), [200, 400, 600])


@by_libraries
def test_libraries_differentiate_the_way_back(library: Callable[[], Library]) -> None:
    """147, 148, 149, 152. Places of a tie are added; what is not used has zeros; second ones do not fail."""
    lib = library()
    x = lib.array([1.0, 2.0, 3.0], "float32")
    model = {"x": x, "y": x, "z": lib.array([4.0, 5.0, 6.0], "float32")}
    flat, re = destructure(model, ties=[("x", "y")])

    def mixed(v: Any) -> Any:
        m = re(v)
        return m["x"][0] + 2 * m["y"][1] + 3 * m["z"][2]

    def partly(v: Any) -> Any:
        return (re(v)["x"] ** 2).sum()

    np.testing.assert_array_equal(lib.grad(mixed)(flat), [1, 2, 0, 0, 0, 3])
    np.testing.assert_array_equal(lib.grad(partly)(flat), [2, 4, 6, 0, 0, 0])
    second = lib.grad(lambda v: (lib.grad(partly)(v) ** 2).sum())(flat)
    np.testing.assert_array_equal(second, [8, 16, 24, 0, 0, 0])


@by_libraries
def test_derivatives_of_the_vector_have_its_type_and_those_of_an_array_its_own(
    library: Callable[[], Library],
) -> None:
    """150. Whatever is added: here float16, float32 and complex numbers."""
    lib = library()
    h, f, c = (lib.array([1.0], kind) for kind in ("float16", "float32", "complex64"))
    flat, re = destructure([h, f])
    assert str(flat.dtype).endswith("float32")
    assert lib.grad(lambda v: (re(v)[0] * re(v)[1]).sum())(flat).dtype == f.dtype

    for x, others in ((h, [f]), (f, [h]), (f, [c])):
        slope = lib.grad(lambda x, others=others: (abs(destructure([x, *others])[0]) ** 2).sum())(x)
        assert slope.dtype == x.dtype
        np.testing.assert_allclose(plain(slope), [2], rtol=1e-3)


def test_the_vector_lies_where_the_arrays_lie() -> None:
    """153. On any device; this one stores nothing."""
    torch = pytest.importorskip("torch")
    flat, re = destructure({"a": torch.ones(2, device="meta"), "b": torch.ones(3, 1, device="meta")})
    assert flat.device.type == "meta"
    assert flat.shape == (5,)
    assert {x.device.type for x in re(flat).values()} == {"meta"}


@by_libraries
def test_libraries_differentiate_a_penalty_on_the_trainables(library: Callable[[], Library]) -> None:
    """157, 158, 160. Of one array at two places made inside, counted once; twice over; by one path."""
    lib = library()
    x, w = lib.array([1.0, 2.0, 3.0], "float32"), lib.array([[1.0, 2.0], [3.0, 4.0]], "float32")

    def penalty(model: Any) -> Any:
        tied = [("x", "y")] if isinstance(model, dict) and "y" in model else []
        return sum((a**2).sum() for a in trainables(model, ties=tied))

    def by_path(x: Any) -> Any:
        _, first = trainables({"x": x, "n": 3}, path=True)[0]
        return (first**2).sum()

    np.testing.assert_array_equal(lib.grad(lambda x: penalty({"x": x, "y": x}))(x), [2, 4, 6])
    twice = lib.grad(lambda w: penalty([lib.grad(lambda w: penalty({"w": w}))(w)]))(w)
    np.testing.assert_array_equal(twice, [[8, 16], [24, 32]])
    np.testing.assert_array_equal(lib.grad(by_path)(x), [2, 4, 6])


# -- trainables ----------------------------------------------------------------------------------------------


def test_the_trainables_are_the_arrays_of_the_model_themselves() -> None:
    """156. Not copies."""
    model = {"x": vector(1), "z": [vector(2)]}
    found = trainables(model)
    assert found[0] is model["x"]
    assert found[1] is model["z"][0]


def test_writing_into_a_trainable_changes_the_model() -> None:
    """156. For they are its own."""
    model = {"x": vector(1, 2)}
    for x in trainables(model):
        np.multiply(x, 10, out=x)
    np.testing.assert_array_equal(model["x"], [10, 20])


def test_the_trainables_leave_out_what_is_not_trained() -> None:
    """156. In the order of the walk."""
    model = (TwoThirds(vector(1), vector(2), vector(3)), np.arange(2), "text", 2.0, np.tanh)
    assert [float(x[0]) for x in trainables(model)] == [2, 3]


def test_a_tied_array_is_listed_once_with_its_first_path() -> None:
    """159. Without paths it is listed once, too (156)."""
    x = vector(1, 2, 3)
    model = {"x": x, "y": x, "z": vector(4)}
    found = trainables(model, path=True)
    assert [p for p, _ in found] == [KeyPath("x"), KeyPath("z")]
    assert found[0][1] is x


def test_paths_name_attributes_keys_and_indices() -> None:
    """159. In the order of the walk."""
    model = {"a": Dense(vector(1), None), "b": [vector(2), {"c": vector(3)}]}
    assert [p for p, _ in trainables(model, path=True)] == [
        KeyPath("a", "w"),
        KeyPath("b", 0),
        KeyPath("b", 1, "c"),
    ]


def test_a_path_finds_the_array_of_the_same_place_in_another_structure() -> None:
    """161. Where the other one has the same keys."""
    model = {"net": [Dense(vector(2), None)]}
    average = {"net": [Dense(vector(1), None)]}
    for path, x in trainables(model, path=True):
        path.get(average)[...] = 0.5 * path.get(average) + 0.5 * x
    np.testing.assert_array_equal(average["net"][0].w, [1.5])


def penalty(model: Any) -> float:
    """The sum of the squares of all parameters."""
    return sum(float(np.sum(x * x)) for x in trainables(model))


def test_a_penalty_on_the_trainables_counts_a_tie_once_and_nothing_else() -> None:
    """157. Its derivative by the array at two places is [2, 4, 6]; by what does not train it is 0."""
    x, z, fixed, c = vector(1, 2, 3), vector(4), vector(7), vector(6)
    model = {"x": x, "y": x, "z": [z], "t": TwoThirds(fixed, vector(5), c)}
    np.testing.assert_array_equal(slopes(lambda: penalty(model), x), [2, 4, 6])
    np.testing.assert_array_equal(slopes(lambda: penalty(model), z), [8])
    np.testing.assert_array_equal(slopes(lambda: penalty(model), c), [12])
    np.testing.assert_array_equal(slopes(lambda: penalty(model), fixed), [0])


def test_a_penalty_on_the_gradient_of_a_penalty() -> None:
    """158. 8 w for the weights, nothing for a bias of zeros."""
    w, b = np.array([[1.0, 2.0], [3.0, 4.0]]), vector(0, 0)
    model = Dense(w, b)

    def loss() -> float:
        return penalty(Dense(slopes(lambda: penalty(model), w), slopes(lambda: penalty(model), b)))

    np.testing.assert_array_equal(slopes(loss, w), [[8, 16], [24, 32]])
    np.testing.assert_array_equal(slopes(loss, b), [0, 0])


def test_the_array_of_one_path_depends_on_that_place_alone() -> None:
    """160. Of the squares of the first array with its path."""
    model = {"x": vector(1, 2, 3), "y": np.sin, "z": vector(4, 5, 6)}

    def loss() -> float:
        _, x = trainables(model, path=True)[0]
        return x @ x

    np.testing.assert_array_equal(slopes(loss, model["x"]), [2, 4, 6])
    np.testing.assert_array_equal(slopes(loss, model["z"]), [0, 0, 0])


SHAPES = {"embed": (4, 3), "w0": (3, 3), "b0": (3,), "w1": (3, 2), "b1": (2,), "shift": (2,), "scale": (2,)}
PLACES = ["embed", "layers.0.w", "layers.0.b", "layers.1.w", "layers.1.b", "norm.b", "norm.c"]
"""Where the arrays are in `layers`, in the order of the walk."""


def layers(x: dict[str, Any], again: Any = None) -> Any:
    """A nested model; the array `embed` stands at its beginning and at its end, or `again` does there."""
    return {
        "embed": x["embed"],
        "layers": [Dense(x["w0"], x["b0"]), Dense(x["w1"], x["b1"])],
        "norm": TwoThirds(np.zeros(2), x["shift"], x["scale"]),
        "head": Pair(x["embed"] if again is None else again, np.arange(2)),
    }


def test_the_moving_average_of_the_documentation_is_the_one_by_hand() -> None:
    """161. 0.99 of the average and 0.01 of the parameters, by path, after each of seven steps.

    By hand it is 0.99^7 of the start and 0.01 * 0.99^(7 - k) of what came after step k. One array stands at
    two places, and a running mean does not train.
    """
    random, steps = np.random.default_rng(161), 7
    start = {k: random.normal(size=shape) for k, shape in SHAPES.items()}
    model = layers({k: x.copy() for k, x in start.items()})
    average = copy.deepcopy(model)
    state = setup(opt.Momentum(0.1, 0.5), model)
    now, v = start, {k: np.zeros(shape) for k, shape in SHAPES.items()}
    want = {k: 0.99**steps * x for k, x in start.items()}
    for k in range(1, steps + 1):
        grads = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
        state, model = update(state, model, layers(grads, again=3 * grads["embed"]))
        model["norm"].a += 1
        for path, x in trainables(model, path=True):
            mean = path.get(average)
            mean[...] = 0.99 * mean + 0.01 * x
        summed = {**grads, "embed": 4 * grads["embed"]}  # of both places
        v = {name: 0.5 * v[name] + 0.1 * g for name, g in summed.items()}
        now = {name: x - v[name] for name, x in now.items()}
        want = {name: x + 0.01 * 0.99 ** (steps - k) * now[name] for name, x in want.items()}

    assert [str(p) for p, _ in trainables(average, path=True)] == PLACES
    for (path, x), name in zip(trainables(average, path=True), SHAPES, strict=True):
        np.testing.assert_allclose(x, want[name], rtol=1e-12, err_msg=str(path))
    assert average["head"].x is average["embed"]
    assert average["layers"][0].f is np.tanh
    np.testing.assert_array_equal(average["norm"].a, [0, 0])
    np.testing.assert_array_equal(model["norm"].a, [steps, steps])


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
    """162. There the lists with and without paths may differ."""
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
