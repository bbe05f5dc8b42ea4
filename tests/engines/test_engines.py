"""The fused engine against NumPy: operation by operation, bit by bit, and for arrays of every kind."""

import copy
import functools
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.arrays.layout import contiguous_strides
from optimisers.engines.addressed import chunks
from optimisers.engines.addressed import pointers as addresses
from optimisers.engines.cpu import maths
from optimisers.engines.cpu import task as numba
from optimisers.ops.primitives import ROUNDINGS
from tests.operations import (
    ARGUMENTS,
    BITS,
    CALLS,
    COMPLEX,
    ELEMENTWISE,
    OF_FLOAT32,
    REDUCE,
    Computes,
    Reduces,
    agree,
    complex_pairs,
    computed,
    samples,
)
from tests.table import DTYPES, TABLE, Row, dtype_of
from tests.table import name as of_row
from tests.worlds import both_updates

ENGINES = ("interpret", "numba")

both_engines = pytest.mark.parametrize("engine", ENGINES)


# -- vocabulary ----------------------------------------------------------------------------------------------


def test_kernels_print_every_word_but_those_that_change_the_shape() -> None:
    assert {*maths.REAL, *maths.TYPED} == {*ELEMENTWISE, *REDUCE}


def test_every_word_is_tested_here() -> None:
    assert set(ARGUMENTS) == set(ELEMENTWISE)


# -- which engine, at what cost ------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE, ids=of_row)
def test_a_rule_gets_the_engine_and_the_passes_of_its_row(row: Row) -> None:
    for dtype in DTYPES:
        if row.takes(dtype):
            x = np.ones((3, 4), dtype_of(dtype))
            (group,) = opt.explain(opt.setup(row.rule, x)).groups

            assert (group.engine, group.passes) == (row.engine_for(dtype), row.passes)


@both_engines
@both_updates
def test_the_engine_that_is_asked_for_takes_the_step(
    engine: str, step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are out of order here, so only the interpreter can step."""
    launched: list[int] = []
    monkeypatch.setattr(numba, "launch", lambda *_: launched.append(1))
    x = np.ones(3)
    state = opt.setup(opt.Descent(0.5), x, engine=engine)
    _, new = step(state, x, np.ones(3))

    assert [g.engine for g in opt.explain(state).groups] == [engine]
    assert len(launched) == (engine == "numba")
    assert (new == 0.5).all() or engine == "numba"


@pytest.mark.parametrize(
    ("rule", "dtype", "cost"),
    [
        (opt.Adam(), "float32", 4 * (2 + 2) + 4 * 3),  # reads x, dx, m, v; writes x, m, v
        (opt.Adam(), "float64", 8 * (2 + 2) + 8 * 3),
        (opt.Adam(), "float16", 2 * 2 + 4 * 2 + 2 + 4 * 2),  # state is float32
        (opt.Adam(), "complex64", 8 * 3 + 4 + 8 * 2 + 4),  # v is real
        (opt.Descent(), "float32", 4 * 2 + 4),
        (opt.Chain(opt.ClipGlobalNorm(), opt.Descent()), "float32", 4 + 4 * 2 + 4),  # dx once more
    ],
    ids=str,
)
def test_explain_counts_the_bytes_that_a_step_moves(rule: opt.Rule, dtype: str, cost: int) -> None:
    (group,) = opt.explain(opt.setup(rule, np.ones(10, dtype))).groups

    assert group.bytes_per_parameter == cost


# -- operations, one by one ----------------------------------------------------------------------------------


NUMPY_ONLY = frozenset(["power", "sqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "arctan"])
"""Operations of complex numbers that NumPy knows and kernels do not."""


SEEN = ("negative", "equal", "not_equal", "where", "abs", "real", "imag", "isfinite", "isnan")


@functools.cache
def all_seen(engine: str) -> dict[str, Any]:
    """What the operations that do no arithmetic make of infinities and NaN in either part."""
    parts = np.array([0.0, 1.0, -2.0, math.inf, -math.inf, math.nan])
    x = (parts[:, None] + 1j * np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])).ravel()
    x.imag = np.tile(parts, 6)
    y = np.roll(x, 7)
    y[::3] = x[::3]
    return computed(Computes(SEEN, complex=True), x, y, engine)


@pytest.mark.parametrize("name", SEEN)
def test_infinities_and_nan_in_complex_numbers_are_seen_as_numpy_sees_them(name: str) -> None:
    agree(all_seen("numba")[name], all_seen("interpret")[name], 2)


def test_every_elementwise_word_of_complex_numbers_is_accounted_for() -> None:
    """The others compare or round, which has no meaning for complex numbers, or take conditions."""
    meaningless = {"less", "less_equal", "greater", "greater_equal", "maximum", "minimum", "floor", "ceil"}
    meaningless |= set(ROUNDINGS)
    conditions = {"logical_and", "logical_or", "logical_not"}

    assert COMPLEX | NUMPY_ONLY | OF_FLOAT32 | meaningless | conditions == set(ELEMENTWISE)
    for name in meaningless:
        with pytest.raises(opt.TraceError, match="of complex numbers has no meaning"):
            opt.setup(Computes((name,), complex=True), np.ones(2, complex))


@pytest.mark.parametrize("name", sorted(NUMPY_ONLY))
def test_what_kernels_do_not_know_of_complex_numbers_goes_to_the_interpreter(name: str) -> None:
    x, y = complex_pairs("complex128")
    rule = Computes((name,), complex=True)
    with np.errstate(all="ignore"):
        wanted = CALLS[ARGUMENTS[name]](getattr(np, name), x, y)
    np.testing.assert_array_equal(computed(rule, x, y, None)[name], wanted)
    (group,) = opt.explain(opt.setup(rule, x)).groups

    assert group.engine == "interpret"
    assert name in group.reason


@both_engines
def test_the_high_half_of_a_float32_is_the_nearest_bfloat16(engine: str) -> None:
    """Or one of the two nearest, and then that which is further from 0."""
    got = computed(Computes(("high_bits",)), BITS, BITS, engine)["high_bits"]
    bits = BITS.view(np.uint32)
    down = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    most = 2.0**128 - 2.0**120  # above it, the next step counts for as long as the last
    with np.errstate(all="ignore"):
        exact = BITS.astype(float)
        up = ((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32).astype(float)
        above = np.where(np.isinf(up) & (np.abs(exact) >= most), np.sign(exact) * 2.0**128, up)
        nearer = np.abs(above - exact) <= np.abs(exact - down)
    wanted = np.where(nearer & np.isfinite(BITS), up, down)
    finite = ~np.isnan(BITS)
    np.testing.assert_array_equal(got[finite], wanted[finite])

    assert np.isnan(got[~finite]).all()


class Divides(opt.Rule):
    """Keeps dx over a setting, and a setting over dx."""

    by: float = 1.0

    def init(self, x: Any) -> Any:
        return (opt.zeros_like(x), opt.zeros_like(x))

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return (dx / self.by, self.by / dx), None


@pytest.mark.parametrize("by", [3.0, 1e-39, -1e-42, 1e38, 0.0, math.inf])
def test_division_by_a_setting_of_any_size_is_division(by: float) -> None:
    x = samples("float32")
    with np.errstate(all="ignore"):
        wanted = x / np.float32(by), np.float32(by) / x
    state = opt.setup(Divides(by), x)
    state, _ = opt.update_(state, x.copy(), x)
    agree(state.state[0], wanted[0], 2)
    agree(state.state[1], wanted[1], 2)


@pytest.mark.parametrize("name", REDUCE)
@both_engines
def test_a_reduction_sees_every_element_of_a_long_array(name: str, engine: str) -> None:
    """The one element that counts stands at every border of the chunks in turn."""
    n = 2 * chunks.CHUNK + 77
    spots = [0, chunks.CHUNK - 1, chunks.CHUNK, 2 * chunks.CHUNK - 1, 2 * chunks.CHUNK, n - 1]
    value = -3.0 if name == "min" else 3.0
    for spot in spots:
        x = np.zeros(n, np.float32)
        x[spot] = value

        assert computed(Reduces(name), x, x, engine)[0] == value


def test_sums_of_single_precision_are_taken_in_double_precision() -> None:
    """10^8 and a million small ones: in float32 each of them would be lost."""
    x = np.full(1_000_001, 0.25, np.float32)
    x[0] = 1e8

    assert computed(Reduces("sum"), x, x, "numba")[0] == 1e8 + 250_000


# -- gradients of every kind ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
@both_engines
def test_gradients_may_be_of_any_real_type(kind: str, dtype: str, engine: str) -> None:
    g = np.array([0, 1, 3, 2]).astype(dtype_of(kind))
    x = np.array([1, 2, 3, 4]).astype(dtype)
    state = opt.setup(opt.Descent(0.5), x, engine=engine)
    _, new = opt.update(state, x, g)
    np.testing.assert_array_equal(new, x - 0.5 * g.astype(float))

    assert new.dtype == x.dtype


@both_engines
def test_gradients_of_a_wider_type_are_rounded_to_the_arithmetic_first(engine: str) -> None:
    """Else the numbers would depend on the engine, and on whether all gradients of a model are of one
    type.
    """

    class Less(opt.Rule):
        def init(self, x: Any) -> Any:
            return ()

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, dx - 1

    x = np.zeros(2, np.float32)
    _, new = opt.update(opt.setup(Less(), x, engine=engine), x, np.array([1 + 1e-9, 1e39]))
    np.testing.assert_array_equal(new, [0, -np.inf])


@both_engines
def test_complex_parameters_take_complex_gradients_of_either_width(engine: str) -> None:
    for dtype in ("complex64", "complex128"):
        for kind in ("complex64", "complex128"):
            x = np.array([1 + 1j, 2], dtype)
            _, new = opt.update(
                opt.setup(opt.Descent(0.5), x, engine=engine), x, np.array([2 - 4j, 1j], kind)
            )
            np.testing.assert_array_equal(new, [3j, 2 - 0.5j])


@pytest.mark.parametrize("bad", [[1.0, 2.0], (1.0, 2.0), 1.0, "text", {"a": 1}], ids=repr)
@both_engines
def test_what_is_no_array_is_no_gradient(bad: Any, engine: str) -> None:
    x = np.ones(2)
    with pytest.raises(opt.TreeMismatch):
        opt.update(opt.setup(opt.Descent(), x, engine=engine), x, bad)


def unaligned(g: Any) -> Any:
    raw = np.zeros(g.nbytes + 1, np.uint8)
    new = raw[1:].view(g.dtype).reshape(g.shape)
    new[...] = g
    return new


class Labelled(np.ndarray):
    """A subclass of no special meaning."""


GRADIENT_FORMS: dict[str, Callable[[Any], Any]] = {
    "read-only": lambda g: np.frombuffer(g.tobytes(), g.dtype).reshape(g.shape),
    "broadcast": lambda g: np.broadcast_to(g[:1, :1], g.shape),
    "transposed": lambda g: np.ascontiguousarray(g.T).T,
    "strided": lambda g: np.repeat(g, 3, axis=1)[:, ::3],
    "backwards": lambda g: g[::-1, ::-1].copy()[::-1, ::-1],
    "byte-swapped": lambda g: g.astype(g.dtype.newbyteorder()),
    "unaligned": lambda g: unaligned(g),  # noqa: PLW0108 defined below
    "a subclass": lambda g: g.view(Labelled),
    "a scalar repeated": lambda g: np.broadcast_to(g[0, 0], g.shape),
}


@pytest.mark.parametrize("form", GRADIENT_FORMS)
@both_engines
@both_updates
def test_gradients_may_lie_in_memory_in_any_way(form: str, engine: str, step: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((3, 4)), GRADIENT_FORMS[form](rng.standard_normal((3, 4)))
    model = {"x": x.copy(), "y": x.copy()}
    state = opt.setup(opt.Momentum(0.5, 0.5), model, engine=engine)
    state, model = step(state, model, {"x": g, "y": x})
    state, model = step(state, model, {"x": g, "y": x})
    np.testing.assert_allclose(model["x"], x - 1.25 * np.array(g, float), rtol=1e-12)
    np.testing.assert_allclose(model["y"], -0.25 * x, rtol=1e-12)


# -- gradients that are parameters or state ------------------------------------------------------------------


class Remembers(opt.Rule):
    """Descent that keeps the last gradient."""

    eta: float = 1.0

    def init(self, x: Any) -> Any:
        return (opt.zeros_like(x),)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return (dx,), self.eta * dx


ALIASED = {
    "Momentum": opt.Momentum(0.5, 0.5),
    "Remembers": Remembers(0.5),
    "clipped Adam": opt.Chain(opt.ClipGlobalNorm(1.0), opt.Adam(0.5)),
}


def alone(rule: Any, model: Any, grads: Any, engine: str) -> Any:
    """(state, model) after a step in which nothing is shared."""
    model, grads = copy.deepcopy(model), copy.deepcopy(grads)
    return opt.update(opt.setup(rule, model, engine=engine), model, grads)


@pytest.mark.parametrize("rule", ALIASED)
@both_engines
@both_updates
def test_parameters_may_be_each_others_gradients(rule: str, engine: str, step: Callable[..., Any]) -> None:
    model = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([40.0, 50.0, 60.0])}
    grads = {"a": model["b"], "b": model["a"]}
    wanted_state, wanted = alone(ALIASED[rule], model, grads, engine)
    state, new = step(opt.setup(ALIASED[rule], model, engine=engine), model, grads)
    np.testing.assert_array_equal(new["a"], wanted["a"])
    np.testing.assert_array_equal(new["b"], wanted["b"])

    assert state == wanted_state


@both_engines
@both_updates
def test_parameters_of_different_groups_may_be_each_others_gradients(
    engine: str, step: Callable[..., Any]
) -> None:
    rules = {"a": opt.Momentum(0.5), "b": Remembers(0.5), "c": opt.Adam(0.5)}
    model = {"a": np.array([1.0, 2.0]), "b": np.array([30.0, 40.0]), "c": np.array([-5.0, 7.0])}
    grads = {"a": model["b"], "b": model["c"], "c": model["a"]}
    wanted_state, wanted = alone(rules, model, grads, engine)
    state, new = step(opt.setup(rules, model, engine=engine), model, grads)
    for key, x in wanted.items():
        np.testing.assert_array_equal(new[key], x)

    assert state == wanted_state


@pytest.mark.parametrize("form", ["strided", "backwards", "a subclass", "unaligned"])
@both_updates
def test_parameters_of_another_group_that_lie_oddly_may_be_gradients(
    form: str, step: Callable[..., Any]
) -> None:
    """They are stepped in a copy, which is written back."""
    odd = GRADIENT_FORMS[form](np.array([[1.0, 2.0], [3.0, 4.0]]))
    model = {"a": odd, "b": np.full((2, 2), 10.0)}
    view = np.lib.stride_tricks.as_strided(odd.view(np.ndarray), odd.shape, odd.strides)
    rules = {"a": opt.Descent(0.5), "b": opt.Momentum(0.5)}
    _, new = step(opt.setup(rules, model), model, {"a": np.full((2, 2), 2.0), "b": view})
    np.testing.assert_array_equal(new["b"], [[9.5, 9], [8.5, 8]])
    np.testing.assert_array_equal(new["a"], [[0, 1], [2, 3]])


@both_updates
def test_what_overlaps_oddly_stepped_parameters_of_another_group_may_be_a_gradient(
    step: Callable[..., Any],
) -> None:
    buffer = np.arange(8.0)
    model = {"a": buffer[::2], "b": np.full(8, 10.0)}
    rules = {"a": opt.Descent(0.5), "b": opt.Momentum(1.0)}
    _, new = step(opt.setup(rules, model), model, {"a": np.full(4, 2.0), "b": buffer})
    np.testing.assert_array_equal(new["b"], 10 - np.arange(8.0))


@pytest.mark.parametrize("rule", ALIASED)
@both_engines
@both_updates
def test_a_parameter_may_be_its_own_gradient(rule: str, engine: str, step: Callable[..., Any]) -> None:
    model = {"a": np.array([1.0, 2.0, 3.0])}
    _, wanted = alone(ALIASED[rule], model, model, engine)
    _, new = step(opt.setup(ALIASED[rule], model, engine=engine), model, model)
    np.testing.assert_array_equal(new["a"], wanted["a"])


@pytest.mark.parametrize("rule", ALIASED)
@both_engines
@both_updates
def test_a_gradient_may_be_a_turned_or_shifted_view_of_parameters(
    rule: str, engine: str, step: Callable[..., Any]
) -> None:
    line = np.arange(1.0, 9.0)
    square = np.arange(9.0).reshape(3, 3)
    model = {"line": line[:6], "square": square}
    grads = {"line": line[2:], "square": square.T}
    _, wanted = alone(ALIASED[rule], model, grads, engine)
    _, new = step(opt.setup(ALIASED[rule], model, engine=engine), model, grads)
    np.testing.assert_array_equal(new["line"], wanted["line"])
    np.testing.assert_array_equal(new["square"], wanted["square"])


# -- parameters of every kind --------------------------------------------------------------------------------

X = np.random.default_rng(1).standard_normal((3, 4))
G = np.random.default_rng(2).standard_normal((3, 4))

PARAMETERS: dict[str, tuple[Callable[[], Any], str]] = {
    "contiguous": (X.copy, "numba"),
    "Fortran": (lambda: np.asfortranarray(X), "numba"),
    "strided": (lambda: np.repeat(X, 2, axis=1)[:, ::2], "numba"),
    "backwards": (lambda: X[::-1].copy()[::-1], "numba"),
    "unaligned": (lambda: unaligned(X), "numba"),
    "read-only": (lambda: np.frombuffer(X.tobytes()).reshape(3, 4), "numba"),
    "a subclass": (lambda: X.copy().view(Labelled), "numba"),
    "byte-swapped": (lambda: X.astype(X.dtype.newbyteorder()), "interpret"),
    "long double": (lambda: X.astype(np.longdouble), "interpret"),
    "long complex": (lambda: X.astype(np.clongdouble), "interpret"),
}
"""Name -> (how they are made, the engine they get)."""


@pytest.mark.parametrize("what", PARAMETERS)
@both_updates
def test_parameters_of_every_kind_are_stepped_and_stay_what_they_are(
    what: str, step: Callable[..., Any]
) -> None:
    make, _ = PARAMETERS[what]
    model = {"x": make(), "y": make()}
    state, new = opt.setup(opt.Momentum(0.5, 0.5), model), model
    for _ in range(2):
        state, new = step(state, new, {"x": G, "y": 2 * G})
    np.testing.assert_allclose(np.array(new["x"], complex), X - 1.25 * G, rtol=1e-12)
    np.testing.assert_allclose(np.array(new["y"], complex), X - 2.5 * G, rtol=1e-12)

    assert new["x"].dtype == make().dtype
    assert type(new["x"]) is type(make())
    assert new["x"].flags.writeable == make().flags.writeable


@pytest.mark.parametrize("what", PARAMETERS)
def test_parameters_that_may_be_written_are_stepped_where_they_lie(what: str) -> None:
    make, _ = PARAMETERS[what]
    model = {"x": make()}
    before, may_write = np.array(model["x"]), model["x"].flags.writeable
    _, new = opt.update_(opt.setup(opt.Descent(1.0), model), model, {"x": G})
    np.testing.assert_allclose(np.array(new["x"], complex), X - G, rtol=1e-12)

    assert (new["x"] is model["x"]) == may_write
    assert (np.array(model["x"]) == before).all() != may_write


@pytest.mark.parametrize("what", PARAMETERS)
def test_parameters_get_the_engine_that_can_step_them(what: str) -> None:
    make, engine = PARAMETERS[what]
    (group,) = opt.explain(opt.setup(opt.Adam(), {"x": make()})).groups

    assert group.engine == engine


def test_long_doubles_keep_their_digits() -> None:
    x = np.ones(2, np.longdouble)
    _, new = opt.update(opt.setup(opt.Descent(1.0), x), x, np.full(2, np.finfo(np.longdouble).eps))
    np.testing.assert_array_equal(new, np.longdouble(1) - np.finfo(np.longdouble).eps)


def test_an_engine_that_cannot_run_a_model_is_refused() -> None:
    with pytest.raises(
        opt.BadSetting, match=r"engine='numba' cannot run this model: element type (float128|longdouble)"
    ):
        opt.setup(opt.Adam(), np.ones(2, np.longdouble), engine="numba")


LENGTHS = (1, 2, 15, 16, 17, 1023, 16_384, 16_385, 32_767, 32_768, 65_535, 65_536, 65_537, 131_073, 200_001)


@both_updates
@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_arrays_of_every_length_are_stepped_from_end_to_end(dtype: str, step: Callable[..., Any]) -> None:
    """Whole numbers, so that the sums are exact; one group, so that arrays share chunks, spans and
    buffers.
    """
    model = [(np.arange(n) % 97 + 1).astype(dtype) for n in LENGTHS]
    grads = [(np.arange(n) % 89).astype(dtype) for n in LENGTHS]
    wanted = [x - 2 * g - 3 * g for x, g in zip(model, grads, strict=True)]
    state = opt.setup(opt.Momentum(2.0, 0.5), model, engine="numba")
    state, model = step(state, model, grads)
    state, model = step(state, model, grads)
    for x, w in zip(model, wanted, strict=True):
        np.testing.assert_array_equal(x, w)


@both_engines
def test_nothing_beside_the_parameters_is_written(engine: str) -> None:
    """Parameters are pieces of one buffer; what lies between them stays."""
    buffer = np.full(1000, 7.0, np.float32)
    model = [buffer[1:4], buffer[10:75], buffer[100:900:3], buffer[901:999].reshape(7, 14).T]
    inside = np.zeros(1000, bool)
    inside[1:4] = inside[10:75] = inside[100:900:3] = inside[901:999] = True
    state = opt.setup(opt.Momentum(1.0, 0.5), model, engine=engine)
    opt.update_(state, model, [np.ones(x.shape, np.float32) for x in model])
    np.testing.assert_array_equal(buffer, np.where(inside, 6.0, 7.0))


# -- the look at array objects -------------------------------------------------------------------------------


def test_the_compiled_look_sees_what_python_sees() -> None:
    kind = np.dtype(np.float32)
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (3,), (), (1, 5), (0, 2), (2, 1, 3)]
    arrays: list[Any] = []
    for shape in shapes * 12:
        x = rng.standard_normal(shape).astype(kind)
        forms = [
            x,
            np.asfortranarray(x),
            x.astype(float),
            x.astype(">f4"),
            np.repeat(x[..., None], 2, -1)[..., 0],
            x.view(Labelled),
            x[::-1] if x.ndim else x,
            np.broadcast_to(x, x.shape),
            unaligned(x) if x.size else x,
        ]
        arrays.append(forms[rng.integers(len(forms))])
    asked = shapes * 12
    strides = [contiguous_strides(s) for s in asked]
    form = addresses.Form("numpy", "cpu", asked, strides, [True] * len(asked))

    taken = addresses.road("numpy", "cpu")
    assert taken is not None
    assert taken.look is not None
    for write in (False, True):
        for given in (arrays, tuple(arrays)):
            tables = np.empty(len(arrays), np.int64), np.empty(len(arrays), np.int64)
            at, misfits = form.addresses(given, kind, *tables, write=write)
            wanted_at, wanted = form.asked(given, kind, write=write)
            fit = np.setdiff1d(np.arange(len(arrays)), wanted)
            np.testing.assert_array_equal(misfits, wanted)
            np.testing.assert_array_equal(at[fit], wanted_at[fit])

            assert 0 < len(wanted) < len(arrays)


def test_a_model_that_holds_something_else_than_an_array_is_refused_and_not_read() -> None:
    model = {"a": np.ones(3), "b": np.ones(3)}
    state = opt.setup(opt.Adam(), model)
    for other in (None, 1.0, "text", [1.0, 2.0, 3.0], object()):
        with pytest.raises(opt.TreeMismatch, match=r"model\['b'\]"):
            opt.update_(state, model | {"b": other}, {"a": np.ones(3), "b": np.ones(3)})


# -- processes and threads -----------------------------------------------------------------------------------

FORK = """
import os, sys
import numpy as np
import optimisers as opt
from optimisers.engines.cpu import threads

threads.available = lambda: 2
x, g = np.ones(700_001, np.float32), np.full(700_001, 2.0, np.float32)
state = opt.setup(opt.Chain(opt.ClipGlobalNorm(1e9), opt.Momentum(0.25, 0.5)), x)
state, x = opt.update_(state, x, g)
child = os.fork()
state, x = opt.update_(state, x, g)
right = bool((x == 1 - 0.5 - 0.75).all())
if child == 0:
    os._exit(0 if right else 1)
_, status = os.waitpid(child, 0)
sys.exit(0 if right and os.waitstatus_to_exitcode(status) == 0 else 1)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_child_takes_a_step() -> None:
    """After the threads of its parent have started, none of which it has."""
    ended = subprocess.run([sys.executable, "-c", FORK], timeout=60, capture_output=True, check=False)

    assert ended.returncode == 0, ended.stderr.decode()


def test_two_python_threads_update_two_models_at_once() -> None:
    rng = np.random.default_rng(0)
    rule = opt.Chain(opt.ClipNorm(1.0), opt.Adam(0.1))
    xs = [rng.standard_normal(300_001).astype(np.float32) for _ in range(2)]
    gs = [rng.standard_normal(300_001).astype(np.float32) for _ in range(2)]

    def train(x: Any, g: Any, out: list[Any]) -> None:
        x = x.copy()
        state = opt.setup(rule, {"x": x, "s": x[:5].copy()})
        for _ in range(15):
            opt.update_(state, {"x": x, "s": x[:5].copy()}, {"x": g, "s": g[:5]})
        out.append(x)

    wanted: list[list[Any]] = [[], []]
    for x, g, out in zip(xs, gs, wanted, strict=True):
        train(x, g, out)
    found: list[list[Any]] = [[], []]
    workers = [threading.Thread(target=train, args=a) for a in zip(xs, gs, found, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    np.testing.assert_array_equal(found[0][0], wanted[0][0])
    np.testing.assert_array_equal(found[1][0], wanted[1][0])


def test_python_threads_may_update_one_state_at_once() -> None:
    """`update` is pure, so what it is given may be shared; every thread gets what it would get alone."""
    rng = np.random.default_rng(0)
    models = [[rng.standard_normal(200_001).astype(np.float32), np.zeros(3, np.float32)] for _ in range(2)]
    state = opt.setup(opt.Chain(opt.ClipNorm(1.0), opt.Adam(0.1)), models[0], engine="numba")
    wanted = [opt.update(state, model, model) for model in models]
    wrong: list[str] = []

    def work(n: int) -> None:
        for _ in range(40):
            new_state, new = opt.update(state, models[n], models[n])
            if not all(map(np.array_equal, new, wanted[n][1])) or new_state != wanted[n][0]:
                wrong.append(f"thread {n}")

    workers = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert wrong == []
