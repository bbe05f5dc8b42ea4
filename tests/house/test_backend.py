"""A library from outside: one file and a record, and its arrays train as those of NumPy do."""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.arrays import parts, protocol, registry
from optimisers.arrays.protocol import Library
from tests.table import TABLE, Row
from tests.toy_library import BACKEND, Toy, ToyLibrary, began
from tests.worlds import arrays_of, close, gradients_of, leaves, trained

ROOT = Path(opt.__file__).parents[2]

NAMES = {
    *(
        "Descent",
        "Momentum",
        "Nesterov",
        "Adam",
        "AdamW",
        "Lion",
        "RMSProp",
        "Rprop",
        "AdaGrad",
        "ClipGlobalNorm",
    ),
    *(
        "AccumGrad",
        "EMA",
        "SkipNonFinite",
        "MixedPrecision-double",
        "DictMomentum",
        "LongestSeen",
        "Sketched",
    ),
    *("RowScaled", "Chain-accumulate-clip-AdamW", "Averaged"),
}
ROWS = [row for row in TABLE if row.name in NAMES]


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    opt.register_backend(BACKEND)
    yield
    del registry.BACKENDS[BACKEND.name]
    registry.forget()


def toy(tree: Any) -> Any:
    """A copy of arrays of NumPy's, or of a nest of them."""
    if isinstance(tree, dict):
        return {k: toy(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [toy(v) for v in tree]
    return None if tree is None else Toy(tree)


def model() -> dict[str, Toy]:
    return {"w": Toy([[1.0, 2.0], [3.0, 4.0]]), "b": Toy([5.0, 6.0])}


def test_a_dozen_rules_of_the_table_are_tried() -> None:
    assert len(ROWS) > 12


@pytest.mark.parametrize("step", [opt.update, opt.update_])
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_arrays_from_outside_are_stepped_as_those_of_numpy_are(row: Row, step: Callable[..., Any]) -> None:
    start, gradients = arrays_of(row, "float32"), gradients_of(row, "float32")

    _, wanted = trained(row.rule, start, gradients, step)
    _, found = trained(row.rule, toy(start), toy(gradients), step)

    assert [type(x) for x in found] == [Toy] * len(wanted)
    assert [x.dtype.name for x in found] == ["float32"] * len(wanted)
    assert all(close(x.held, y, "float32") for x, y in zip(found, wanted, strict=True))


def test_a_step_is_right_to_a_second_formula() -> None:
    state = opt.setup(opt.Momentum(0.1, 0.5), model())

    state, found = opt.update(state, model(), {"w": Toy([[1.0, 0.0], [0.0, 2.0]]), "b": None})
    state, found = opt.update(state, found, {"w": Toy([[1.0, 0.0], [0.0, 2.0]]), "b": None})

    np.testing.assert_allclose(found["w"].held, [[1 - 0.1 - 0.15, 2.0], [3.0, 4 - 0.2 - 0.3]])
    np.testing.assert_array_equal(found["b"].held, [5.0, 6.0])


def test_update_leaves_old_arrays_alone_and_update_in_place_writes_them() -> None:
    given, grads = model(), {"w": Toy(np.ones((2, 2))), "b": Toy(np.ones(2))}
    state = opt.setup(opt.Descent(0.5), given)
    first = given["b"]

    _, new = opt.update(state, given, grads)
    assert first.held.tolist() == [5.0, 6.0]
    assert new["b"].held.tolist() == [4.5, 5.5]

    _, same = opt.update_(state, given, grads)
    assert same["b"] is first
    assert first.held.tolist() == [4.5, 5.5]


def test_arrays_that_cannot_be_written_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyLibrary, "immutable", True)
    given = model()
    rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.Descent(opt.Linear(1.0, 0.0, 2)))
    state = opt.setup(rule, given)

    _, new = opt.update_(state, given, {"w": None, "b": Toy([3.0, 4.0])})

    assert given["b"].held.tolist() == [5.0, 6.0]
    np.testing.assert_allclose(new["b"].held, [5 - 0.6, 6 - 0.8])


def test_the_same_array_at_two_places_is_one_leaf() -> None:
    shared = Toy([1.0, 2.0])
    state = opt.setup(opt.Descent(1.0), {"a": shared, "b": shared})

    _, new = opt.update(state, {"a": shared, "b": shared}, {"a": Toy([0.5, 0.0]), "b": Toy([0.25, 1.0])})

    assert new["a"] is new["b"]
    assert new["a"].held.tolist() == [0.25, 1.0]


def test_a_frozen_leaf_stays_and_an_adjusted_rate_counts() -> None:
    grads = {"w": Toy(np.ones((2, 2))), "b": Toy(np.ones(2))}
    state = opt.freeze(opt.setup(opt.Descent(1.0), model()), where="w")
    state = opt.adjust(state, 0.25)

    state, new = opt.update(state, model(), grads)
    assert new["w"].held.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert new["b"].held.tolist() == [4.75, 5.75]

    _, new = opt.update(opt.thaw(state), new, grads)
    assert new["w"].held.tolist() == [[0.75, 1.75], [2.75, 3.75]]


def test_a_model_goes_into_a_vector_and_comes_back() -> None:
    flat, again = opt.destructure(model())

    assert type(flat) is Toy
    assert sorted(flat.held) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert {k: v.held.tolist() for k, v in again(flat * 2.0).items()} == {
        "w": [[2.0, 4.0], [6.0, 8.0]],
        "b": [10.0, 12.0],
    }


def test_state_is_shown_and_explained() -> None:
    state, _ = opt.update(opt.setup(opt.Adam(), model()), model(), model())

    assert "2 arrays of float64" in str(opt.explain(state))
    assert "engine interpret" in str(opt.explain(state))
    assert "m=float64[2, 2]" in str(state)
    assert type(leaves(state)[0].state.m) is Toy


def test_its_own_engine_steps_what_it_does_not_refuse() -> None:
    narrow = Toy(np.ones(3, np.float32))
    given = {"w": narrow, "b": Toy(np.ones(3))}
    state = opt.setup(opt.Descent(0.5), given)
    began.clear()

    _, new = opt.update(state, given, given)

    assert began == [1]
    assert [x.held.tolist() for x in (new["w"], new["b"])] == [[0.5] * 3] * 2
    assert "engine toybox:" in str(opt.explain(state))
    assert "engine interpret (toys of float64)" in str(opt.explain(state))
    opt.setup(opt.Descent(0.5), narrow, engine="toybox")
    with pytest.raises(opt.BadSetting, match="engine='toybox' cannot run this model: toys of float64"):
        opt.setup(opt.Descent(0.5), given, engine="toybox")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda s: opt.update(s, model(), {"w": np.ones((2, 2)), "b": None}),
            "parameters are arrays of toys",
        ),
        (lambda _: opt.gradients(model()), "arrays of toys keep no gradients"),
        (lambda _: opt.value_and_grad(len, model()), "arrays of toys"),
        (lambda _: opt.setup(opt.Adam(), model(), engine="numba"), "engine='numba' cannot run this model"),
        (lambda _: opt.setup(opt.Adam(), model(), capturable=True), "toys on cpu"),
    ],
)
def test_what_it_cannot_do_is_said_with_its_name(call: Callable[..., Any], says: str) -> None:
    with pytest.raises(opt.OptimiserError, match=says):
        call(opt.setup(opt.Adam(), model()))


class Stranger:
    """An array of a library that nobody has registered."""

    shape, dtype = (3,), np.dtype(np.float32)

    def __add__(self, other: Any) -> Any:
        raise NotImplementedError


def test_arrays_of_no_library_known_are_refused_by_the_name_of_their_module() -> None:
    with pytest.raises(
        opt.TreeMismatch, match=r"model\['w'\] is an array of .*test_backend.*register_backend"
    ):
        opt.setup(opt.Adam(), {"w": Stranger()})


def test_numbers_of_numpy_are_no_arrays_of_a_stranger() -> None:
    opt.setup(opt.Adam(), {"w": np.ones(3), "count": np.int64(3)})


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        (BACKEND, "there is a back end 'toys' already"),
        (opt.Backend("others", BACKEND.packages, "others"), "belong to the back end 'toys' already"),
        (opt.Backend("others", ("numpy",), "others"), "belong to the back end 'numpy' already"),
        (opt.Backend("others", ("others",), ToyLibrary()), "has the arrays of 'toys'"),
        (ToyLibrary(), "takes a Backend"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(backend: Any, says: str) -> None:
    with pytest.raises(opt.BadSetting, match=says):
        opt.register_backend(backend)


def test_a_new_back_end_touches_one_file() -> None:
    naming = {
        str(file.relative_to(ROOT))
        for folder in ("src", "tests")
        for file in (ROOT / folder).rglob("*.py")
        if "toy_library" in file.read_text() or '"toys"' in file.read_text()
    }

    assert naming == {"tests/toy_library.py", "tests/house/test_backend.py"}


def test_it_writes_only_what_has_no_default() -> None:
    written = {name for name in vars(ToyLibrary) if not name.startswith("_")}

    assert len(written) <= 21, sorted(written)


def test_the_contract_of_a_library_does_not_grow() -> None:
    asked = {name for name in (*vars(Library), *Library.__annotations__) if not name.startswith("_")}

    assert len(asked) <= 64, sorted(asked)


def test_what_a_library_must_answer_does_not_grow() -> None:
    """Members of the protocol, and of its records; what follows from others is a function beside it."""
    counts = {
        made.name: sum(isinstance(node, ast.FunctionDef | ast.AnnAssign) for node in made.body)
        for module in (protocol, parts)
        for made in ast.parse(inspect.getsource(module)).body
        if isinstance(made, ast.ClassDef)
    }
    records = ("Memory", "Stacks", "Scalars", "Derivatives", "Sparse", "Shards", "Graphs")
    assert counts["Library"] <= 42
    assert sum(counts[name] for name in records) <= 43
