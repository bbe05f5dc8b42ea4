"""Arrays of CuPy take the very steps that arrays of NumPy take.

There is no GPU here: `standin_cupy` is NumPy in CuPy's dress, which refuses what CuPy refuses. So what is
shown is that this package asks CuPy only for what it has, and what comes of it; that CuPy's kernels compile
and run needs a GPU.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.arrays import registry
from optimisers.arrays.numpy import library as host
from optimisers.arrays.protocol import Library
from optimisers.ops.dispatch import OPERATIONS
from tests import standin_cupy as standin
from tests.table import DTYPES, TABLE, Row, RowMoments, RowScaled, dtype_of
from tests.worlds import (
    COMPLEX_PAIRS,
    STEPS,
    arrays_of,
    bits,
    both_updates,
    close,
    gradients_of,
    leaves,
    numbers_in,
    rows_by_turns,
    trained,
)

ENGINES = ("interpret", None)

both_engines = pytest.mark.parametrize("engine", ENGINES, ids=["interpret", "fused"])

FUSED = ("float16", "float32", "float64", "complex64", "complex128")


@pytest.fixture(scope="module", autouse=True)
def cupy() -> Iterator[ModuleType]:
    with standin.in_place() as made:
        yield made


@pytest.fixture(autouse=True)
def _forget() -> None:
    standin.forget()


def library() -> Any:
    return importlib.import_module("optimisers.arrays.cupy").library


def gpu(a: Any) -> Any:
    """A copy of an array of NumPy's, or of a nest of them."""
    if isinstance(a, dict):
        return {k: gpu(v) for k, v in a.items()}
    if isinstance(a, list):
        return [gpu(v) for v in a]
    return standin.array(a) if isinstance(a, np.ndarray) else a


def array(x: Any) -> Any:
    """What stands in a state or a model, as NumPy has it."""
    return x.get() if isinstance(x, standin.ndarray) else np.asarray(x)


# -- every library keeps to the protocol ---------------------------------------------------------------------


def public(cls: type) -> set[str]:
    return {n for c in cls.__mro__[:-1] for n in {*vars(c), *inspect.get_annotations(c)} if n[0] != "_"}


def arguments(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


def misfits(cls: type) -> set[str]:
    """What a library has beyond the protocol, or with other arguments than it."""
    found = public(cls) - public(Library)
    for name in public(cls) - found:
        own, wanted = vars(cls).get(name), getattr(Library, name, None)
        if inspect.isfunction(own) and inspect.isfunction(wanted):
            found |= {name} if arguments(own) != arguments(wanted) else set()
    return found


@pytest.mark.parametrize("name", sorted(registry.BACKENDS))
def test_a_library_keeps_to_the_protocol(name: str) -> None:
    found = registry.named(name)

    assert misfits(type(found)) == set()
    assert set(found.operations) == set(OPERATIONS)
    assert found.name == name


def test_what_a_library_has_of_its_own_is_found() -> None:
    class Odd(Library):
        def rows(self, y: Any) -> Any: ...
        def more(self) -> None: ...

    assert misfits(Odd) == {"rows", "more"}


def test_a_library_that_lacks_a_function_is_not_made() -> None:
    class Half(Library):
        pass

    with pytest.raises(TypeError, match="is_array_type"):
        Half()


# -- the stand-in refuses what CuPy refuses ------------------------------------------------------------------


def fused(function: Callable[..., Any]) -> Any:
    return standin.fuse(kernel_name="k")(function)


@pytest.mark.parametrize(
    "ask",
    [
        np.asarray,
        lambda x: x + np.ones(3),
        lambda x: np.ones(3) + x,
        lambda x: standin.matmul(x, np.ones(3)),
        fused(lambda v: v.shape),
        fused(lambda v: v * 2.0),
        fused(lambda v: v.real),
        fused(bool),
    ],
)
def test_the_stand_in_refuses(ask: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, AttributeError)):
        ask(standin.array(np.ones(3)))


def test_the_stand_in_knows_no_read_only_arrays_and_keeps_arrays_of_no_axes() -> None:
    x = standin.array(np.ones(3))

    assert not hasattr(x.flags, "writeable")
    assert type(standin.FUNCTIONS["sum"](x)) is standin.ndarray
    with standin.Device(1), pytest.raises(ValueError, match="device 0 while the current one is 1"):
        x + x


# -- every rule ----------------------------------------------------------------------------------------------

PAIRS = frozenset(f"{row.name}-{row.single}" for row in TABLE) | {f"{n}-complex64" for n in COMPLEX_PAIRS}


@functools.cache
def of_numpy(name: str, dtype: str) -> Any:
    (row,) = [r for r in TABLE if r.name == name]
    return trained(row.rule, arrays_of(row, dtype), gradients_of(row, dtype, 4), opt.update_, "interpret")


@rows_by_turns("interpret", None)
def test_arrays_of_cupy_are_stepped_as_arrays_of_numpy_are(row: Row, dtype: str, engine: str | None) -> None:
    wanted_state, wanted = of_numpy(row.name, dtype)
    for step in STEPS if f"{row.name}-{dtype}" in PAIRS else STEPS[1:]:
        gradients = gpu(gradients_of(row, dtype, 4))
        state, model = trained(row.rule, gpu(arrays_of(row, dtype)), gradients, step, engine)

        assert {type(x) for x in model} == {standin.ndarray}
        for a, b in zip(model, wanted, strict=True):
            assert a.dtype == b.dtype
            assert bits(array(a)) == bits(b) if engine else close(array(a), b, dtype)
        for got, leaf in zip(leaves(state), leaves(wanted_state), strict=True):
            assert got.rule == leaf.rule
            for a, b in zip(numbers_in(got.state), numbers_in(leaf.state), strict=True):
                assert isinstance(a, standin.ndarray) == isinstance(b, np.ndarray)
                np.testing.assert_allclose(
                    array(a).astype(complex), np.asarray(b).astype(complex), rtol=2e-3, atol=1e-6
                )


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_passes_element_by_element_are_fused(row: Row) -> None:
    for dtype in DTYPES:
        if row.takes(dtype):
            x = gpu(np.ones((3, 4), dtype_of(dtype)))
            (group,) = opt.explain(opt.setup(row.rule, x)).groups
            fused = row.engine_for(dtype) == "numba" and not row.matrix and dtype in FUSED

            if not row.matrix:
                assert (group.engine == "cupy.fuse") == fused
            assert group.engine in ("cupy.fuse", "interpret")
            assert group.reason


@pytest.mark.parametrize(
    ("rule", "dtype", "reason"),
    [
        (opt.Adam(), "bfloat16", "element type bfloat16"),
        (opt.SplitPrecision(opt.Momentum(0.1)), "bfloat16", "element type bfloat16"),
        (RowScaled(), "float32", "values of another shape"),
        (RowMoments(), "float32", "values of another shape"),
    ],
)
def test_what_is_not_fused_says_why(rule: Any, dtype: str, reason: str) -> None:
    (group,) = opt.explain(opt.setup(rule, gpu(np.ones((3, 4), dtype_of(dtype))))).groups

    assert group.reason.startswith(reason)


# -- kernels -------------------------------------------------------------------------------------------------


def test_one_kernel_steps_a_leaf() -> None:
    model, grads = gpu([np.ones(5, np.float32), np.ones((2, 3), np.float32)]), None
    state = opt.setup(opt.AdamW(), model)
    for _ in range(3):
        grads = gpu([np.ones(5, np.float32), np.ones((2, 3), np.float32)])
        standin.launched.clear()
        state, model = opt.update_(state, model, grads)

    assert standin.launched == ["optimisers_step"] * 2


def test_a_rate_that_changes_follows_nothing_anew() -> None:
    rule = opt.Chain(opt.ClipNorm(0.5), opt.Adam(opt.Cosine(0.1, 20)))
    x = gpu(np.ones(5, np.float32))
    state = opt.setup(rule, x)
    state, x = opt.update(state, x, gpu(np.ones(5, np.float32)))
    state, x = opt.update(state, x, gpu(np.ones(5, np.float32)))
    before = list(standin.followed)
    for beta in (0.5, 0.8):
        state = opt.adjust(state, beta=(beta, 0.9))
        state, x = opt.update(state, x, gpu(np.ones(5, np.float32)))

    assert before
    assert standin.followed == before


def test_what_a_kernel_raises_is_raised_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(opt.Rule):
        def init(self, x: Any) -> Any:
            return ()

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, opt.ops.tanh(dx)

    fusion = importlib.import_module("optimisers.engines.cupy")

    def raises(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setitem(fusion.FUSED, "tanh", raises)
    model = gpu({"a": np.ones(3), "b": np.ones(3)})
    state = opt.setup({"a": opt.Momentum(0.1), "b": Broken()}, model)
    with pytest.raises(RuntimeError, match="no compiler"):
        opt.update_(state, model, gpu({"a": np.ones(3), "b": np.ones(3)}))

    assert [array(v).tolist() for v in model.values()] == [[1.0] * 3] * 2
    assert array(state["a"].state[0]).tolist() == [0.0] * 3


def test_state_that_takes_the_place_of_other_state_is_read_first() -> None:
    """s0 <- s1 and s1 <- s0, in one kernel that writes in place."""

    class Swap(opt.Rule):
        def init(self, x: Any) -> Any:
            return (opt.zeros_like(x), opt.copy(x))

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            a, b = state
            return (b, a), x - a

    for step in STEPS:
        x = gpu(np.arange(3.0))
        state = opt.setup(Swap(), x)
        state, x = step(state, x, gpu(np.ones(3)))
        state, x = step(state, x, gpu(np.ones(3)))

        assert [array(s).tolist() for s in state.state] == [[0.0] * 3, [0.0, 1.0, 2.0]]
        assert array(x).tolist() == [0.0, 1.0, 2.0]


# -- where and how arrays lie --------------------------------------------------------------------------------


@both_engines
@both_updates
def test_arrays_lie_as_they_like(engine: str | None, step: Callable[..., Any]) -> None:
    big = gpu(np.arange(48.0).reshape(6, 8))
    kinds = [big[::2, ::3], big.T, gpu(np.arange(24.0).reshape(2, 3, 4)).transpose((2, 0, 1)), big[::-1]]
    for x in kinds:
        plain, ones = x.get(), np.ones(x.shape)
        dx = ones + np.arange(x.shape[-1])
        _, wanted = opt.update(opt.setup(opt.Adam(0.1), plain), plain, dx)
        state, new = step(opt.setup(opt.Adam(0.1), x, engine=engine), x, gpu(dx))

        np.testing.assert_allclose(array(new), wanted, rtol=1e-12)
        assert (new is x) == (step is opt.update_)
        assert state.state.m.shape == x.shape


def test_state_lies_as_its_parameter_does() -> None:
    for a in (np.zeros((3, 4)), np.zeros((3, 4)).T, np.zeros((2, 3, 4)).transpose(1, 2, 0)[::-1]):
        assert library().memory.dense_strides(gpu_like(a)) == host.memory.dense_strides(a)


def gpu_like(a: Any) -> Any:
    """An array of the stand-in that lies as one of NumPy's does."""
    return standin.wrapped(a)


@both_engines
def test_broadcast_views_are_replaced_not_written(engine: str | None) -> None:
    x = standin.FUNCTIONS["broadcast_to"](gpu(np.ones(1)), (3,))
    model = {"w": x}
    state = opt.setup(opt.Descent(0.5), model, engine=engine)
    _, new = opt.update_(state, model, {"w": gpu(np.arange(3.0))})

    assert array(new["w"]).tolist() == [1.0, 0.5, 0.0]
    assert array(x).tolist() == [1.0] * 3


@both_engines
@both_updates
def test_arrays_may_lie_on_several_devices(engine: str | None, step: Callable[..., Any]) -> None:
    rule = opt.EMA(opt.Chain(opt.ClipGlobalNorm(1.0), opt.Adam(0.1)), 0.5)
    plain = [np.arange(3.0), np.arange(4.0)]
    _, wanted = opt.update(opt.setup(rule, plain), plain, plain)
    model = gpu(plain)
    with standin.Device(1):
        model[1] = gpu(plain[1])
    state = opt.setup(rule, model, engine=engine)
    state, new = step(state, model, [x.copy() if i == 0 else x for i, x in enumerate(model)])

    assert [x._device for x in new] == [0, 1]
    assert [{a._device for a in numbers_in(s.state) if isinstance(a, standin.ndarray)} for s in state] == [
        {0},
        {1},
    ]
    np.testing.assert_allclose(array(new[1]), wanted[1])
    with pytest.raises(opt.TreeMismatch, match="is on cuda:0; the parameters are on cuda:1"):
        opt.update(state, new, [new[0], gpu(plain[1])])


def test_gradients_of_ties_are_summed_on_their_device() -> None:
    with standin.Device(1):
        x, g, h = (gpu(np.ones((2, 3)) * n) for n in range(3))
    model = [x, x.T]
    _, new = opt.update(opt.setup(opt.Descent(0.5), model), model, [g, h.T])

    assert [v._device for v in new] == [1, 1]
    assert array(new[1]).tolist() == [[-1.5] * 2] * 3


def test_a_stand_in_takes_no_memory_and_starts_a_state() -> None:
    thing = library().stand_in((1 << 40, 4), np.dtype(np.float32))

    assert registry.library_of(type(thing)) is library()
    assert library().full_like(thing, 1.0, "float32").shape == (1 << 40, 4)
    assert opt.ops.copy(thing).shape == (1 << 40, 4)
    assert opt.Adam().init(thing).m.strides == (0, 0)
    assert not library().any_set(thing)
    assert library().stand_in((0,), np.float32).data.ptr == 0


# -- the rest of the road ------------------------------------------------------------------------------------


def model_of(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((3, 4))
    return {"w": shared, "again": shared.T, "b": rng.standard_normal(4), "n": np.arange(3), "name": "net"}


def gpu_model(seed: int = 0) -> dict[str, Any]:
    model = gpu(model_of(seed))
    return model | {"again": model["w"].T}


def test_a_setting_may_be_an_array_of_no_axes() -> None:
    x = gpu(np.ones(3))
    state = opt.setup(opt.Descent(gpu(np.array(0.5))), x)
    _, new = opt.update(opt.adjust(state, gpu(np.array(0.25))), x, gpu(np.ones(3)))

    assert array(new).tolist() == [0.75] * 3


def test_destructure_and_trainables() -> None:
    model = gpu_model() | {"half": gpu(np.ones((), np.float16)), "c": gpu(np.ones(2, np.complex64))}
    flat, rebuild = opt.destructure(model)
    plain, again = opt.destructure(
        model_of() | {"half": np.ones((), np.float16), "c": np.ones(2, np.complex64)}
    )

    np.testing.assert_array_equal(array(flat), plain)
    for copied in (True, False):
        new, wanted = rebuild(flat * np.float64(2), copy=copied), again(plain * 2, copy=copied)
        for k in ("w", "again", "b", "half", "c"):
            assert (new[k].dtype, new[k].shape) == (wanted[k].dtype, wanted[k].shape)
            np.testing.assert_array_equal(array(new[k]), wanted[k])
    assert [x.shape for x in opt.trainables(model)] == [(3, 4), (4,), (), (2,)]


def test_arrays_of_no_axes_train() -> None:
    for rule in (opt.Adam(0.1), opt.EMA(opt.Chain(opt.ClipGlobalNorm(0.5), opt.Momentum(0.1)), 0.5)):
        model, plain = {"a": gpu(np.array(2.0, np.float32))}, {"a": np.array(2.0, np.float32)}
        state, other = opt.setup(rule, model), opt.setup(rule, plain)
        for step in (opt.update, opt.update_):
            state, model = step(state, model, {"a": gpu(np.array(1.0, np.float32))})
            other, plain = step(other, plain, {"a": np.array(1.0, np.float32)})

        assert model["a"].shape == ()
        assert close(array(model["a"]), plain["a"], "float32")


def test_directly_called_rules_give_arrays_of_cupy() -> None:
    rule, x = opt.Chain(opt.ClipNorm(0.5), opt.Adam(0.1)), gpu(np.arange(4.0, dtype=np.float32))
    _, dx = rule.apply(rule.init(x), x, gpu(np.ones(4, np.float32)))
    _, wanted = rule.apply(rule.init(x.get()), x.get(), np.ones(4, np.float32))

    assert type(dx) is standin.ndarray
    np.testing.assert_allclose(array(dx), wanted, rtol=1e-6)


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grad", "text"),
    [
        (np.ones(3), "grads is of type ndarray; the parameters are arrays of cupy"),
        (standin.array(np.ones(4)), r"gradient of shape \(4,\) for parameters of shape \(3,\)"),
        (standin.array(np.ones(3) * 1j), "grads is complex for real parameters"),
        (1.0, "grads is the Python float 1.0"),
    ],
)
@both_engines
def test_gradients_that_do_not_fit_are_refused(grad: Any, text: str, engine: str | None) -> None:
    x = gpu(np.ones(3))
    state = opt.setup(opt.Adam(), x, engine=engine)
    with pytest.raises(opt.TreeMismatch, match=text):
        opt.update(state, x, grad)


def test_arrays_of_two_libraries_train_beside_each_other() -> None:
    model = {"a": np.ones(3), "b": gpu(np.ones(3))}
    state = opt.setup(opt.Chain(opt.ClipGlobalNorm(1.0), opt.Descent(0.5)), model)
    _, new = opt.update(state, model, {"a": np.ones(3), "b": gpu(np.ones(3))})

    np.testing.assert_allclose(array(new["b"]), new["a"])


def test_parts_of_one_memory_are_refused() -> None:
    x = gpu(np.arange(6.0))
    with pytest.raises(opt.TreeMismatch, match="share memory without being the same array"):
        opt.setup(opt.Adam(), [x[:4], x[2:]])


def test_numba_is_refused_and_gradients_are_not_kept() -> None:
    x = gpu(np.ones(3))
    with pytest.raises(opt.BadSetting, match="engine='numba' cannot run this model: arrays of cupy"):
        opt.setup(opt.Adam(), x, engine="numba")
    with pytest.raises(opt.BadState, match="arrays of cupy keep no gradients"):
        opt.gradients(x)


# -- Triton, where it is installed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "step"),
    [
        pytest.param(row, STEPS[i % 2], id=f"{row.name}-{STEPS[i % 2].__name__}")
        for i, row in enumerate(r for r in TABLE if r.takes("float32"))
    ],
)
def test_triton_steps_arrays_of_cupy_where_it_reaches_them(
    row: Row, step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels take addresses; that of the stand-in is on the host, where Triton's interpreter is."""
    triton = importlib.import_module("optimisers.engines.cuda.launch")
    monkeypatch.setattr(triton, "reaches", lambda _: True)
    monkeypatch.setattr(triton, "home", lambda _: importlib.import_module("torch").device("cpu"))
    models, states = {}, {}
    for name, put in (("numpy", lambda a: a), ("cupy", gpu)):
        model = [put(a) for a in arrays_of(row, "float32")]
        state = opt.setup(row.rule, model)
        for grads in gradients_of(row, "float32", 2):
            state, model = step(state, model, [put(g) for g in grads])
        models[name], states[name] = model, state
    assert {g.engine for g in opt.explain(states["cupy"]).groups} == {"triton"}
    for got, wanted in zip(models["cupy"], models["numpy"], strict=True):
        np.testing.assert_allclose(array(got), wanted, rtol=2e-6, atol=1e-7)
