"""Tensors of PyTorch take the very steps that arrays of NumPy take, wherever and however they lie."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import optimisers as opt
from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.torch import library
from optimisers.engines.addressed import pointers as addresses
from optimisers.engines.addressed import public
from tests.table import DTYPES, TABLE, Row, dtype_of
from tests.tensors import array, misaligned, number_of, tensor, turned, with_gaps
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

ENGINES = ("interpret", "numba")

both_engines = pytest.mark.parametrize("engine", ENGINES)


# -- from NumPy and back -------------------------------------------------------------------------------------


def test_the_conversion_of_these_tests_loses_nothing() -> None:
    for dtype in DTYPES:
        a = np.array([[1.5, -2.25], [0.0, 3e-5]]).astype(dtype_of(dtype))

        assert bits(array(tensor(a))) == bits(a)
        assert library.type_name(tensor(a).dtype) == dtype


# -- every rule ----------------------------------------------------------------------------------------------

PAIRS = frozenset(f"{row.name}-{row.single}" for row in TABLE) | {f"{n}-complex64" for n in COMPLEX_PAIRS}
"""Rows and types of which the pure update is tried too: every other one is a kernel to compile."""


@functools.cache
def of_numpy(name: str, dtype: str, engine: str | None) -> Any:
    """(state, model) of NumPy after some steps by the rule of a row."""
    (row,) = [r for r in TABLE if r.name == name]
    return trained(row.rule, arrays_of(row, dtype), gradients_of(row, dtype, 4), opt.update_, engine)


def of_torch(row: Row, dtype: str, engine: str | None, step: Callable[..., Any]) -> Any:
    model = [tensor(a) for a in arrays_of(row, dtype)]
    gradients = [[tensor(a) for a in grads] for grads in gradients_of(row, dtype, 4)]
    return trained(row.rule, model, gradients, step, engine)


@rows_by_turns("interpret", None)
def test_tensors_are_stepped_as_arrays_of_numpy_are(row: Row, dtype: str, engine: str | None) -> None:
    """Parameters and state: to the last bit by the kernels, which both share."""
    wanted_state, wanted = of_numpy(row.name, dtype, engine)
    for step in STEPS if f"{row.name}-{dtype}" in PAIRS else STEPS[1:]:
        state, model = of_torch(row, dtype, engine, step)
        got = [array(x) for x in model]
        same_bits = engine is None and not row.matrix and row.engine_for(dtype) == "numba"

        assert {g.engine for g in opt.explain(state).groups} == {engine or row.engine_for(dtype)}
        assert {x.dtype for x in got} == {dtype_of(dtype)}
        if same_bits:
            assert [bits(x) for x in got] == [bits(x) for x in wanted]
        for a, b in zip(got, wanted, strict=True):
            assert close(a, b, dtype)
        for leaf, other in zip(leaves(state), leaves(wanted_state), strict=True):
            assert leaf.rule == other.rule
            for a, b in zip(numbers_in(leaf.state), numbers_in(other.state), strict=True):
                assert number_of(a).dtype == np.asarray(b).dtype
                assert close(number_of(a), b, "float32" if str(dtype) in ("float16", "bfloat16") else dtype)


@both_engines
@both_updates
def test_a_half_precision_adam_step_of_rate_1e_4_moves_by_1e_4(engine: str, step: Callable[..., Any]) -> None:
    x = torch.tensor([0.579, -0.729, 0.5493], dtype=torch.float16)
    g = torch.tensor([-0.001497, 0.0001875, -0.013176], dtype=torch.float16)
    exact = x.double() - 1e-4 * g.double() / (g.double().abs() + 1e-8)
    unit = np.spacing(np.abs(array(x))).astype(float)
    _, new = step(opt.setup(opt.Adam(1e-4), x, engine=engine), x, g)

    assert (np.abs(array(new).astype(float) - array(exact)) <= 0.5001 * unit).all()


@both_engines
def test_state_is_of_the_type_of_the_arithmetic(engine: str) -> None:
    for dtype, wide, real in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.complex64, torch.complex64, torch.float32),
    ):
        x = torch.ones(3, dtype=dtype)
        state, _ = opt.update(opt.setup(opt.Adam(), x, engine=engine), x, x)

        assert (state.state.m.dtype, state.state.v.dtype) == (wide, real)


# -- however they lie ----------------------------------------------------------------------------------------


def inside_a_storage(t: torch.Tensor) -> torch.Tensor:
    return torch.full((t.numel() + 5,), 7.0, dtype=t.dtype)[3:-2].view(t.shape).copy_(t)


def odd_strides(t: torch.Tensor) -> torch.Tensor:
    """An axis of length one has a stride that means nothing."""
    strides = [999 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return t.clone().as_strided(t.shape, strides)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor], str]] = {
    "contiguous": ((3, 4), torch.clone, "numba"),
    "a parameter": ((3, 4), lambda t: torch.nn.Parameter(t.clone()), "numba"),
    "that requires grad": ((3, 4), lambda t: t.clone().requires_grad_(), "numba"),
    "channels last": ((2, 3, 4, 5), lambda t: t.clone(memory_format=torch.channels_last), "numba"),
    "channels last of three axes": (
        (2, 3, 2, 4, 3),
        lambda t: t.clone(memory_format=torch.channels_last_3d),
        "numba",
    ),
    "transposed": ((3, 4), turned, "numba"),
    "turned": ((2, 3, 4), turned, "numba"),
    "with gaps": ((3, 4), with_gaps, "numba"),
    "inside a storage": ((3, 4), inside_a_storage, "numba"),
    "misaligned": ((3, 4), misaligned, "numba"),
    "0-d": ((), torch.clone, "numba"),
    "0-d inside a storage": ((), lambda t: torch.full((5,), 7.0, dtype=t.dtype)[3].copy_(t), "numba"),
    "empty": ((0, 2), torch.clone, "numba"),
    "of six axes": ((2, 1, 3, 1, 2, 2), torch.clone, "numba"),
    "of six axes, turned": ((2, 1, 3, 1, 2, 2), turned, "numba"),
    "of six axes, with gaps": ((2, 1, 3, 1, 2, 2), with_gaps, "numba"),
    "with strides that mean nothing": ((3, 1, 4), odd_strides, "numba"),
    "negated": ((3, 4), lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag, "interpret"),
    "a subclass": ((3, 4), lambda t: t.clone().as_subclass(Labelled), "interpret"),
}
"""Name -> (shape, what lays a tensor out so, the engine that it gets)."""


class Labelled(torch.Tensor):
    """A subclass of tensors."""


every_layout = pytest.mark.parametrize("what", LAYOUTS)

RULE = opt.Chain(opt.ClipNorm(0.5), opt.Momentum(0.1, 0.5))


def two(shape: tuple[int, ...], dtype: Any = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers for parameters and for a gradient."""
    rng = np.random.default_rng(sum(shape) + len(shape))
    a, b = (torch.as_tensor(rng.standard_normal(shape)) for _ in range(2))
    return torch.empty(shape, dtype=dtype).copy_(a), torch.empty(shape, dtype=dtype).copy_(b)


def by_hand(x: torch.Tensor, g: torch.Tensor, steps: int) -> Any:
    """`RULE` with the same gradient at every step, as NumPy would write it."""
    y, d, v = array(x), array(g), 0.0
    for _ in range(steps):
        norm = np.linalg.norm(d)
        v = 0.5 * v + 0.1 * d * min(1.0, 0.5 / norm if norm else 1.0)
        y = y - v
    return y


@pytest.mark.parametrize(
    ("what", "of_gradient", "engine", "step"),
    [
        pytest.param(what, of_gradient, engine, step, id=f"{what}-{of_gradient}-{engine}-{step.__name__}")
        for i, what in enumerate(LAYOUTS)
        for j, of_gradient in enumerate(("contiguous", "turned", "with gaps", "misaligned"))
        for k, engine in enumerate(ENGINES)
        for step in [STEPS[(i + j + k) % 2]]
    ],
)
def test_tensors_of_every_layout_take_the_step(
    what: str, of_gradient: str, engine: str, step: Callable[..., Any]
) -> None:
    shape, lay, possible = LAYOUTS[what]
    x, g = two(shape)
    model = [lay(x), lay(x)]
    state, new = opt.setup(RULE, model, engine=engine if possible == "numba" else None), model
    grads = [LAYOUTS[of_gradient][1](g), LAYOUTS[of_gradient][1](-g)]
    for _ in range(3):
        state, new = step(state, new, grads)

    assert [grp.engine for grp in opt.explain(state).groups] == [min(engine, possible)]
    for got, sign in zip(new, (1, -1), strict=True):
        np.testing.assert_allclose(array(got), by_hand(x, sign * g, 3), rtol=1e-12, atol=1e-14)

        assert type(got) is type(lay(x))
    if step is opt.update:
        for old in model:
            np.testing.assert_array_equal(array(old), array(x))
    else:
        assert all(a is b for a, b in zip(new, model, strict=True))


@every_layout
@pytest.mark.parametrize("engine", ENGINES)
def test_new_tensors_are_laid_out_like_the_old(what: str, engine: str) -> None:
    """Those that are dense; others are made so, as `torch.empty_like` does."""
    shape, lay, possible = LAYOUTS[what]
    x = lay(two(shape)[0])
    state = opt.setup(RULE, x, engine=engine if possible == "numba" else None)
    _, new = opt.update(state, x, two(shape)[1])
    axes = [axis for axis, n in enumerate(shape) if n != 1]

    assert [new.stride(a) for a in axes] == [torch.empty_like(x.detach()).stride(a) for a in axes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@every_layout
def test_tensors_of_every_layout_and_type_are_stepped_alike_by_both_engines(
    what: str, dtype: torch.dtype
) -> None:
    shape, lay, possible = LAYOUTS[what]
    if possible != "numba":
        return
    x, g = two(shape, dtype)
    rule = opt.AdamW(0.05, lam=0.1)
    found = []
    for engine, laid in itertools.product(ENGINES, (lay, torch.clone)):
        state, new = opt.setup(rule, y := laid(x), engine=engine), y
        for _ in range(3):
            state, new = opt.update_(state, new, g)
        found.append(new.detach())

    assert [close(array(t), array(found[0]), library.type_name(dtype)) for t in found] == [True] * 4


@both_engines
def test_nothing_beside_the_parameters_is_written(engine: str) -> None:
    buffer = torch.full((1000,), 7.0)
    model = [buffer[1:4], buffer[10:75], buffer[100:900:3], buffer[901:999].view(7, 14).T]
    inside = torch.zeros(1000, dtype=torch.bool)
    inside[1:4] = inside[10:75] = inside[100:900:3] = inside[901:999] = True
    state = opt.setup(opt.Momentum(1.0, 0.5), model, engine=engine)
    opt.update_(state, model, [torch.ones_like(x) for x in model])
    torch.testing.assert_close(buffer, torch.where(inside, 6.0, 7.0), rtol=0, atol=0)


@both_engines
@both_updates
def test_an_expanded_tensor_is_replaced_and_not_written(engine: str, step: Callable[..., Any]) -> None:
    one = torch.ones(4, dtype=torch.float64)
    model = {"x": one.expand(3, 4)}
    g = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    _, new = step(opt.setup(opt.Descent(0.5), model, engine=engine), model, {"x": g})
    torch.testing.assert_close(new["x"], 1 - 0.5 * g, rtol=0, atol=0)
    torch.testing.assert_close(one, torch.ones_like(one), rtol=0, atol=0)

    assert model["x"].data_ptr() == one.data_ptr()


@both_engines
@both_updates
def test_a_conjugate_view_is_stepped_as_what_it_shows(engine: str, step: Callable[..., Any]) -> None:
    z = torch.complex(*two((3, 4)))
    model = z.clone().conj()
    state, new = opt.setup(opt.Momentum(0.5, 0.5), model, engine="interpret"), model
    for _ in range(2):
        state, new = step(state, new, z.conj() if engine == "numba" else z.conj().resolve_conj())
    torch.testing.assert_close(new.resolve_conj(), z.conj() * (1 - 0.5 - 0.75))


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "of another real type": lambda g: g.double(),
    "of a narrower type": lambda g: g.bfloat16(),
    "of whole numbers": lambda g: g.long(),
    "expanded": lambda g: g[:1].expand(g.shape),
    "a parameter": lambda g: torch.nn.Parameter(g.clone()),
    "negated": lambda g: torch.complex(torch.zeros_like(g), -g).conj().imag,
    "a subclass": lambda g: g.clone().as_subclass(Labelled),
}


@pytest.mark.parametrize("what", GRADIENTS)
@both_engines
@both_updates
def test_gradients_of_every_kind_are_read(what: str, engine: str, step: Callable[..., Any]) -> None:
    """Whole numbers, which every type holds; all rows are equal, so that they may be expanded."""
    x, g = torch.zeros(3, 4), torch.tensor([[1.0, -2.0, 3.0, 4.0]]).repeat(3, 1)
    state = opt.setup(opt.Momentum(0.5, 0.5), x, engine=engine)
    with torch.no_grad():
        for _ in range(2):
            state, x = step(state, x, GRADIENTS[what](g))
    torch.testing.assert_close(x, -1.25 * g, rtol=0, atol=0)

    assert x.dtype is torch.float32
    assert not x.requires_grad


@both_engines
@both_updates
def test_state_does_not_lie_where_gradients_do(engine: str, step: Callable[..., Any]) -> None:
    """`zero_grad(set_to_none=False)` after a step must not empty a momentum."""
    x, g = torch.zeros(3), torch.ones(3)
    state, x = step(opt.setup(opt.Momentum(1.0, 0.5), x, engine=engine), x, g)
    g.zero_()
    state, x = step(state, x, g)
    torch.testing.assert_close(x, torch.full((3,), -1.5))


# -- ties ----------------------------------------------------------------------------------------------------


@both_engines
@both_updates
def test_a_tensor_and_its_transpose_are_one_leaf(engine: str, step: Callable[..., Any]) -> None:
    x, g = two((3, 4))
    shared = x.clone()
    model = {"a": shared, "b": shared.T, "c": shared.view(3, 4)}
    grads = {"a": g, "b": (2 * g).T.contiguous(), "c": None}
    state = opt.setup(opt.Momentum(0.5), model, engine=engine)
    state, new = step(state, model, grads)
    torch.testing.assert_close(new["a"], x - 0.5 * 3 * g)

    assert state.a is state.b is state.c
    assert new["b"].data_ptr() == new["a"].data_ptr() == new["c"].data_ptr()
    assert new["b"].shape == (4, 3)
    assert opt.setup(opt.Momentum(), new).a.path == opt.KeyPath("a")


@both_engines
def test_the_same_gradient_object_counts_once(engine: str) -> None:
    x, g = torch.zeros(3), torch.ones(3)
    model = [x, x]
    _, once = opt.update(opt.setup(opt.Descent(1.0), model, engine=engine), model, [g, g])
    _, twice = opt.update(opt.setup(opt.Descent(1.0), model, engine=engine), model, [g, g.clone()])
    torch.testing.assert_close(once[0], -g)
    torch.testing.assert_close(twice[0], -2 * g)

    assert once[0] is once[1]


# -- autograd beside it --------------------------------------------------------------------------------------


@both_engines
def test_autograd_notices_a_step_in_place(engine: str) -> None:
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    state = opt.setup(opt.Descent(0.5), [x, y], engine=engine)
    of_x, of_y = (x * x).sum(), (y * y).sum()
    before = x._version, y._version
    opt.update_(state, [x, y], [torch.ones(3), None])

    assert x._version > before[0]
    assert y._version == before[1]
    of_y.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_x.backward()


@both_engines
def test_autograd_goes_on_after_a_pure_step(engine: str) -> None:
    x = torch.nn.Parameter(torch.ones(3))
    loss = (x * x).sum()
    opt.update(opt.setup(opt.Descent(0.5), x, engine=engine), x, torch.ones(3))
    loss.backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 2.0))


@both_engines
@both_updates
def test_a_tensor_that_requires_grad_goes_on_to_do_so(engine: str, step: Callable[..., Any]) -> None:
    """Else the second `backward` of a training loop would fail."""
    for x in (torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(3))):
        state, new = opt.setup(opt.Descent(0.25), x, engine=engine), x
        for _ in range(2):
            new.grad = None
            (new * new).sum().backward()
            state, new = step(state, new, new.grad)
        torch.testing.assert_close(new.detach(), torch.full((3,), 0.25))

        assert new.is_leaf
        assert new.requires_grad


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@both_engines
@both_updates
def test_a_step_may_be_taken_in_every_mode_of_autograd(
    mode: Callable[[], Any], engine: str, step: Callable[..., Any]
) -> None:
    x = torch.nn.Parameter(torch.ones(3))
    state = opt.setup(opt.Momentum(0.5, 0.5), x, engine=engine)
    with mode():
        state, x = step(state, x, torch.ones(3))
        state, x = step(state, x, torch.ones(3))
    torch.testing.assert_close(x.detach(), torch.full((3,), 1 - 0.5 - 0.75))

    assert isinstance(x, torch.nn.Parameter)


@both_engines
@both_updates
def test_a_state_made_in_inference_mode_trains_outside(engine: str, step: Callable[..., Any]) -> None:
    x = torch.ones(3)
    with torch.inference_mode():
        state = opt.setup(opt.Momentum(0.5, 0.5), x, engine=engine)
    state, x = step(state, x, torch.ones(3))
    state, x = step(state, x, torch.ones(3))
    torch.testing.assert_close(x, torch.full((3,), 1 - 0.5 - 0.75))


@both_engines
@both_updates
def test_an_inference_tensor_is_replaced_outside_inference_mode(
    engine: str, step: Callable[..., Any]
) -> None:
    """PyTorch forbids writing into it there, as NumPy forbids writing into what is read-only."""
    with torch.inference_mode():
        x = torch.ones(3)
    _, new = step(opt.setup(opt.Descent(0.5), x, engine=engine), x, torch.ones(3))
    torch.testing.assert_close(new, torch.full((3,), 0.5))
    torch.testing.assert_close(x, torch.ones(3))


@both_engines
def test_a_step_in_place_takes_gradients_that_have_a_graph(engine: str) -> None:
    """Those of `create_graph=True`: a step in place cannot be differentiated, so it is a plain one."""
    x = torch.ones(3, requires_grad=True)
    (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    state = opt.setup(opt.Momentum(0.1), x, engine=engine)
    state, x = opt.update_(state, x, g)
    torch.testing.assert_close(x.detach(), torch.full((3,), 0.7))

    assert x.is_leaf
    assert not state.state.v.requires_grad


# -- memory --------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes every operation of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def arrays_in(state: Any) -> list[torch.Tensor]:
    return [v for leaf in leaves(state) for v in numbers_in(leaf.state) if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("rule", [opt.Adam(), RULE, opt.EMA(opt.AdamW(lam=0.1))], ids=repr)
def test_a_fused_step_in_place_moves_nothing_and_asks_pytorch_for_nothing(rule: opt.Rule) -> None:
    model = [lay(two(shape)[0]) for n, (shape, lay, e) in LAYOUTS.items() if e == "numba" and " " not in n]
    model += [torch.nn.Parameter(torch.ones(2, 3)), torch.ones(2, 3, 4, 4).mT]
    model = [x for x in model if library.memory.dense_strides(x) == x.stride() and x.data_ptr() % 8 == 0]
    grads = [torch.empty_like(x.detach()).fill_(0.5) for x in model]
    state = opt.setup(rule, model, engine="numba")
    state, model = opt.update_(state, model, grads)
    places = [t.data_ptr() for t in (*model, *arrays_in(state))]
    with Calls() as calls:
        state, new = opt.update_(state, model, grads)

    assert set(calls.seen) <= {"aten.promote_types.default"}  # which asks about types, not about tensors
    assert [t.data_ptr() for t in (*new, *arrays_in(state))] == places
    assert new is model
    assert len(model) >= 7


@both_engines
def test_a_step_in_place_leaves_everything_where_it_lies(engine: str) -> None:
    model = {name: lay(two(shape)[0]) for name, (shape, lay, e) in LAYOUTS.items() if e == "numba"}
    state = opt.setup(opt.Adam(), model, engine=engine)
    grads = {name: torch.ones_like(x.detach()) for name, x in model.items()}
    places = [t.data_ptr() for t in (*model.values(), *arrays_in(state))]
    for _ in range(3):
        state, model = opt.update_(state, model, grads)

    assert [t.data_ptr() for t in (*model.values(), *arrays_in(state))] == places


def test_the_state_of_adam_takes_twice_the_memory_of_the_model() -> None:
    model = [torch.ones(100, 100), torch.ones(7)]
    state = opt.setup(opt.Adam(), model)
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in arrays_in(state)}

    assert sum(own.values()) <= 2 * (4 * 10_007) + 1024
    assert opt.explain(state).groups[0].parameters == 10_007


# -- the look at tensor objects ------------------------------------------------------------------------------


def looked_at() -> list[torch.Tensor]:
    """Tensors of every kind, of float32 or not."""
    out: list[torch.Tensor] = []
    for shape, lay, _ in LAYOUTS.values():
        out += [lay(two(shape)[0].to(dtype)) for dtype in (torch.float32, torch.float64)]
    plain = torch.ones(3, 4)
    out += [
        plain.to_sparse(),
        plain.to("meta"),
        plain.int(),
        plain.bfloat16(),
        plain.expand(2, 3, 4),
        plain[1:],
        plain[:, 1:],
        plain[:0],
        torch.ones(3, 4, dtype=torch.complex64).conj(),
        torch.ones(3, 4, dtype=torch.complex64).real,
        torch.ones(1, 1, 1, 1, 1, 1, 1),
        torch.ones(2, 1, 2, 1, 2, 1, 2).transpose(0, 2),
    ]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_the_compiled_look_sees_what_python_sees(dtype: torch.dtype) -> None:
    arrays = looked_at()
    shapes = [tuple(x.shape) for x in arrays]
    dense = [contiguous_strides(s) for s in shapes]
    own = [tuple(x.stride()) if x.layout is torch.strided else d for x, d in zip(arrays, dense, strict=True)]
    other = shapes[1:] + shapes[:1]

    taken = addresses.road("torch", "cpu")
    assert taken is not None
    assert taken.look is not None
    for asked, strides in ((shapes, dense), (shapes, own), (other, [*dense[1:], dense[0]])):
        flat = [contiguous_strides(s) == t for s, t in zip(asked, strides, strict=True)]
        form = addresses.Form("torch", "cpu", asked, strides, flat)
        for given in (arrays, tuple(arrays)):
            tables = np.empty(len(arrays), np.int64), np.empty(len(arrays), np.int64)
            at, misfits = form.addresses(given, dtype, *tables, write=True)
            _, wanted = form.asked(given, dtype, write=True)
            fit = np.setdiff1d(np.arange(len(arrays)), wanted)
            np.testing.assert_array_equal(misfits, wanted)
            there = [i for i in fit if arrays[i].numel()]
            np.testing.assert_array_equal(at[there], [arrays[i].data_ptr() for i in there])


@pytest.mark.parametrize("found", [True, False])
def test_steps_are_the_same_without_the_compiled_look(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not found:
        road = addresses.Road(None, public.torch_addresses, "asked for")
        monkeypatch.setitem(addresses._roads, ("torch", "cpu"), road)
    model = {n: lay(two(shape)[0]) for n, (shape, lay, e) in LAYOUTS.items() if e == "numba"}
    state = opt.setup(RULE, model, engine="numba")
    _, new = opt.update_(state, model, {n: two(LAYOUTS[n][0])[1] for n in model})
    for n, x in new.items():
        np.testing.assert_allclose(array(x), by_hand(*two(LAYOUTS[n][0]), 1), rtol=1e-12, atol=1e-14)


def test_a_model_that_holds_something_else_than_a_tensor_is_refused_and_not_read() -> None:
    model = {"a": torch.ones(3), "b": torch.ones(3)}
    state = opt.setup(opt.Adam(), model)
    for other in (None, 1.0, "text", [1.0, 2.0, 3.0], object(), np.ones(3, np.float32)):
        with pytest.raises(opt.TreeMismatch, match=r"model\['b'\]"):
            opt.update_(state, model | {"b": other}, {"a": torch.ones(3), "b": torch.ones(3)})


@both_engines
@both_updates
def test_a_step_that_raises_has_changed_nothing(engine: str, step: Callable[..., Any]) -> None:
    model = {"a": torch.ones(3), "b": torch.ones(3, dtype=torch.float64)}
    state = opt.setup(opt.Chain(opt.ClipNorm(1.0), opt.Adam(0.1)), model, engine=engine)
    state, model = step(state, model, {k: torch.ones_like(x) for k, x in model.items()})
    before = copy.deepcopy((state, model))
    versions = [x._version for x in model.values()]
    bad = [
        torch.tensor([1.0, float("nan"), 1.0]),
        torch.ones(4),
        torch.ones(3, dtype=torch.complex64),
        np.ones(3),
        1.0,
    ]
    for wrong in bad:
        with pytest.raises(opt.OptimiserError):
            step(state, model, {"a": torch.ones(3), "b": wrong})

        assert state == before[0]
        assert all(torch.equal(x, before[1][k]) for k, x in model.items())
        assert [x._version for x in model.values()] == versions


@both_engines
def test_a_gradient_on_another_device_is_refused(engine: str) -> None:
    model = {"a": torch.ones(3)}
    state = opt.setup(opt.Adam(), model, engine=engine)
    with pytest.raises(opt.TreeMismatch) as caught:
        opt.update_(state, model, {"a": torch.ones(3, device="meta")})
    assert caught.value.args[0] == "grads['a'] is on meta; the parameters are on cpu; move it there"


# -- containers of tensors -----------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A NamedTuple of two of anything."""

    first: Any
    second: Any


@dataclasses.dataclass
class Layer:
    """A dataclass of two of anything."""

    weight: Any
    bias: Any


NESTS: dict[str, Callable[[Callable[[float], Any]], Any]] = {
    "a bare tensor": lambda t: t(1.0),
    "a dict": lambda t: {"a": t(1.0), "b": t(2.0), "n": 3},
    "a list": lambda t: [t(1.0), t(2.0)],
    "a tuple": lambda t: (t(1.0), "text", t(2.0)),
    "a NamedTuple": lambda t: Pair(t(1.0), t(2.0)),
    "a dataclass": lambda t: Layer(t(1.0), t(2.0)),
    "a nest": lambda t: {"a": [Layer(t(1.0), None), Pair(t(2.0), {"b": t(3.0)})], "c": (t(4.0),)},
}


def numpy_of(value: float) -> Any:
    return np.arange(value, value + 3)


def torch_of(value: float) -> Any:
    return torch.from_numpy(numpy_of(value))


@pytest.mark.parametrize("what", NESTS)
@both_engines
@both_updates
def test_containers_of_tensors_train_like_containers_of_arrays(
    what: str, engine: str, step: Callable[..., Any]
) -> None:
    found = []
    for make in (numpy_of, torch_of):
        model, grads = NESTS[what](make), NESTS[what](lambda v, make=make: make(v + 0.5))
        state = opt.setup(opt.AdamW(0.1, lam=0.1), model, engine=engine)
        for _ in range(3):
            state, model = step(state, model, grads)
        found.append(opt.trainables(model, path=True))

        assert type(model) is type(NESTS[what](make))
        assert [leaf.path for leaf in leaves(state)] == [path for path, _ in found[-1]]
    for (path, wanted), (other, got) in zip(*found, strict=True):
        assert path == other
        assert isinstance(got, torch.Tensor)
        np.testing.assert_allclose(got, wanted, rtol=1e-14)


def test_tensors_that_do_not_train_are_left_alone() -> None:
    model = {
        "w": torch.ones(3),
        "n": torch.arange(3),
        "b": torch.tensor([True]),
        "f": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "e": torch.ones(2).to(torch.float8_e4m3fn),
    }
    state = opt.setup(opt.Descent(1.0), model)
    _, new = opt.update(state, model, {"w": torch.ones(3), "n": None, "b": None, "f": None, "e": None})

    assert [str(path) for path, _ in opt.trainables(model, path=True)] == ["w"]
    assert all(new[k] is model[k] for k in ("n", "b", "f", "e"))
    assert not any(state[k] for k in ("n", "b", "f", "e"))
    torch.testing.assert_close(new["w"], torch.zeros(3))


def test_tensors_and_arrays_may_stand_in_one_model() -> None:
    model = {"a": torch.ones(3), "b": np.ones(3)}
    rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.Descent(1.0))
    state = opt.setup(rule, model)
    _, new = opt.update(state, model, {"a": torch.full((3,), 3.0), "b": np.full(3, 4.0)})
    length = np.sqrt(3 * 9 + 3 * 16)
    np.testing.assert_allclose(new["a"], 1 - 3 / length, rtol=1e-6)
    np.testing.assert_allclose(new["b"], 1 - 4 / length, rtol=1e-12)


def test_a_leaf_of_tensors_shows_and_takes_its_state() -> None:
    x = torch.zeros(3)
    state, _ = opt.update_(opt.setup(opt.Momentum(1.0, 0.5), x), x, torch.ones(3))
    state.state = state.state._replace(v=torch.tensor([4.0, 8.0, 16.0], dtype=torch.float64))
    state, x = opt.update_(state, x, torch.zeros(3))
    torch.testing.assert_close(x, -1 - torch.tensor([2.0, 4.0, 8.0]))

    assert state.state.v.dtype is torch.float32
    assert repr(state) == "Leaf(Momentum(eta=1.0, rho=0.5), MomentumState(v=[2., 4., 8.]))"
