"""The kernels for CUDA against the interpreter: every rule and operation, and numbers on the device.

Without a device Triton's interpreter runs them, and NumPy says what NVIDIA's libdevice says on a device; with
TRITON_INTERPRET=0 they run on the device.
"""

import copy
import functools
import itertools
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers.arrays.torch import library
from optimisers.engines import cache
from optimisers.engines.addressed import pointers as addresses
from optimisers.engines.cuda import device_functions, launch, printer, tables
from optimisers.engines.cuda import task as engine
from optimisers.errors import BadState
from optimisers.state.leaf import parts
from optimisers.state.structure import Structure
from optimisers.step.update import takes_scaling
from tests import operations
from tests.table import REAL, TABLE, LongestSeen, Row, numbers
from tests.table import name as of_row
from tests.tensors import array, misaligned, number_of, tensor, turned, with_gaps
from tests.worlds import (
    RULES,
    SCHEDULES,
    WORLDS,
    World,
    assert_near,
    both_updates,
    leaves,
    numbers_in,
    same_story,
    step_scaled,
    with_none,
    worlds,
)

DEVICE = "cpu" if device_functions.INTERPRETED else "cuda"

Model = list[torch.Tensor]

every_row = pytest.mark.parametrize("row", TABLE, ids=of_row)
capturable_or_not = pytest.mark.parametrize("capturable", [False, True], ids=["on the host", "capturable"])


# -- what the tests share ------------------------------------------------------------------------------------


def on_device(a: Any) -> torch.Tensor:
    """A copy of an array of NumPy where the kernels run."""
    return tensor(a).to(DEVICE)


def on_host(t: torch.Tensor) -> Any:
    """A copy of a tensor as an array of NumPy."""
    return array(t.detach().cpu())


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values one element behind a border of 16 bytes."""
    return t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.clone(memory_format=torch.channels_last)


Places = tuple[tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]], ...]

PLACES: Places = (
    ((), torch.clone),
    ((0, 2), torch.clone),
    ((2, 3, 2, 2), channels_last),
    ((7,), shifted),
    ((launch.BLOCK + 13,), torch.clone),
)
"""Shapes of a model, and how its tensors lie: one goes over a whole block and a bit, one may not be read 16
bytes at a time.
"""

MATRICES: Places = (
    ((3, 4), turned),
    ((1, 7), shifted),
    ((5, 5), torch.clone),
    ((3, launch.BLOCK // 2), torch.clone),
)


def model_of(places: Places, dtype: str, seed: int = 0) -> Model:
    """Random parameters or gradients."""
    rng = np.random.default_rng(seed)
    return [lay(on_device(numbers(rng, shape, dtype))) for shape, lay in places]


def of_cpu(t: Any) -> Any:
    """The same for the interpreter of rules, in memory of its own."""
    return t.detach().cpu().clone() if isinstance(t, torch.Tensor) else t


snapshot = World("torch", "triton").snapshot

on_triton = worlds(*(w for w in WORLDS if w.engine == "triton"))


def assert_close(got: tuple[Any, Any], wanted: tuple[Any, Any], dtype: str) -> None:
    """(state, model) of two engines: double precision to 1e-12, else as near as engines are to each other."""

    def near(a: Any, b: Any, kind: str) -> None:
        assert_near(number_of(of_cpu(a)), number_of(of_cpu(b)), kind)

    (state, model), (other, expected) = got, wanted
    pairs = zip(model.values(), expected.values(), strict=True) if isinstance(model, dict) else None
    for x, y in pairs or zip(model, expected, strict=True):
        near(x, y, dtype)
    for leaf, like in zip(leaves(state), leaves(other), strict=True):
        assert (leaf.rule, leaf.frozen) == (like.rule, like.frozen)
        for a, b in zip(numbers_in(leaf.state), numbers_in(like.state), strict=True):
            near(a, b, "float32")
    assert opt.explain(state).clock == opt.explain(other).clock


# -- which engine --------------------------------------------------------------------------------------------


def test_triton_was_imported_after_it_was_decided_who_runs_kernels() -> None:
    assert launch.interpreted() == device_functions.INTERPRETED
    assert (os.environ["TRITON_INTERPRET"] == "1") == device_functions.INTERPRETED


def test_kernels_print_every_word_of_real_numbers() -> None:
    assert set(printer.OPERATIONS) >= {*operations.ELEMENTWISE, *operations.REDUCE}


@every_row
def test_every_real_rule_can_be_stepped_by_it(row: Row) -> None:
    for dtype in REAL:
        if row.takes(dtype):
            state = opt.setup(row.rule, model_of(MATRICES[:1], dtype), engine="triton")

            assert [(g.engine, g.passes) for g in opt.explain(state).groups] == [("triton", row.passes)]


TAKES = "; it takes float16, bfloat16, float32 and float64 on a CUDA device, and the engine 'triton'"

WITHOUT = """
import sys
import torch
import optimisers as opt
opt.setup(opt.Adam(), torch.ones(3))
assert "optimisers.engines.cuda.task" not in sys.modules, "imported for nothing"
try:
    opt.setup(opt.Adam(), torch.ones(3), engine="triton")
except opt.BadSetting as error:
    print(error)
try:
    opt.setup(opt.Adam(), torch.ones(3), capturable=True)
except opt.BadSetting as error:
    print(error)
"""


def printed(program: str, *, interpreted: bool) -> str:
    """What a program prints in a process of its own, in which Triton interprets its kernels or does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    given = [sys.executable, "-W", "ignore", "-c", program]
    ended = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_without_the_interpreter_tensors_on_the_cpu_are_refused() -> None:
    assert printed(WITHOUT, interpreted=False).splitlines() == [
        "engine='triton' cannot run this model: arrays on cpu",
        f"capturable=True cannot run this model: arrays on cpu{TAKES}",
    ]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (np.ones(3), "arrays of numpy"),
        (torch.ones(3, dtype=torch.complex64, device=DEVICE), "element type complex64"),
        (torch.ones(3, device="meta"), "unpacked state"),
    ],
    ids=["NumPy", "complex", "meta"],
)
def test_what_it_cannot_run_is_refused(model: Any, reason: str) -> None:
    with pytest.raises(opt.BadSetting) as error:
        opt.setup(opt.Adam(), model, engine="triton")

    assert str(error.value) == f"engine='triton' cannot run this model: {reason}"


CAPTURABLE_TAKES = "capturable=True takes tensors of torch on one CUDA device; this model has "


@pytest.mark.parametrize(
    ("model", "settings", "text"),
    [
        (np.ones(3), {}, CAPTURABLE_TAKES + "numpy on cpu"),
        ([np.ones(3), torch.ones(3)], {}, CAPTURABLE_TAKES + "numpy on cpu, torch on cpu"),
        (
            [torch.ones(3), torch.ones(3, device="meta")],
            {},
            CAPTURABLE_TAKES + "torch on cpu, torch on meta",
        ),
        (
            torch.ones(3, device=DEVICE),
            {"engine": "numba"},
            f"capturable=True cannot run this model: engine='numba'{TAKES}",
        ),
        (
            torch.ones(3, device=DEVICE),
            {"engine": "interpret"},
            f"capturable=True cannot run this model: engine='interpret'{TAKES}",
        ),
        (
            torch.ones(3, dtype=torch.complex64, device=DEVICE),
            {},
            f"capturable=True cannot run this model: element type complex64{TAKES}",
        ),
    ],
    ids=["NumPy", "two libraries", "two devices", "numba", "interpret", "complex"],
)
def test_what_cannot_be_captured_is_refused(model: Any, settings: Any, text: str) -> None:
    with pytest.raises(opt.BadSetting) as error:
        opt.setup(opt.Adam(), model, capturable=True, **settings)

    assert str(error.value) == text


def test_a_model_without_arrays_cannot_be_captured() -> None:
    with (
        pytest.warns(opt.NoParameters),
        pytest.raises(opt.BadSetting) as error,
    ):
        opt.setup(opt.Adam(), {}, capturable=True)

    assert str(error.value) == CAPTURABLE_TAKES + "nothing"


# -- every rule ----------------------------------------------------------------------------------------------


@functools.cache
def rows() -> dict[str, Row]:
    return {row.name: row for row in TABLE}


@functools.cache
def run(name: str, dtype: str, engine: str, step: str = "update_", *, capturable: bool = False) -> Any:
    """(state, model) after some steps by the rule of a row."""
    row = rows()[name]
    places = MATRICES if row.matrix else PLACES
    steps = 4 if dtype == row.single else 2
    fit = of_cpu if engine == "interpret" else torch.Tensor.detach
    model = [fit(x) for x in model_of(places, dtype)]
    state = opt.setup(row.rule, model, engine=engine, capturable=capturable)
    for n in range(steps):
        grads = [fit(g) for g in model_of(places, dtype, 100 + n)]
        state, model = getattr(opt, step)(state, model, grads)
    return state, model


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}")
        for i, row in enumerate(TABLE)
        for others in [[t for t in REAL if row.takes(t) and t != row.single]]
        for dtype in (row.single, *others[i % max(1, len(others)) :][:1])
    ],
)
def test_every_rule_is_stepped_as_the_interpreter_steps_it(row: Row, dtype: str) -> None:
    """In single precision, and in one of the other types by turns: each is met by every third row."""
    got, wanted = run(row.name, dtype, "triton"), run(row.name, dtype, "interpret")
    assert_close(got, wanted, dtype)
    if dtype == "float64" and row.passes == 1:  # sums differ in the last digit
        assert repr(got[0]) == repr(wanted[0])


@pytest.mark.parametrize(
    ("row", "step"),
    [
        pytest.param(row, step, id=f"{row.name}-{step}")
        for i, row in enumerate(TABLE)
        for step in [("update", "update_")[i % 2 if row.passes == 1 else 0]]
    ],
)
def test_numbers_on_the_device_and_new_arrays_give_the_same_steps(row: Row, step: str) -> None:
    """To the last bit where NumPy computes both; the host and a device may differ by a unit. Where a pass
    writes is printed alike for all rows: every other one, and all with sums.
    """
    dtype = row.single
    got, wanted = run(row.name, dtype, "triton", step, capturable=True), run(row.name, dtype, "triton")
    if device_functions.INTERPRETED:
        assert snapshot(*got) == snapshot(*wanted)
        assert repr(got[0]) == repr(wanted[0])
    assert_close(got, wanted, dtype)


LONG: Places = (
    ((2 * launch.CHUNK + 77,), torch.clone),
    ((2,), torch.clone),
    ((launch.CHUNK + launch.BLOCK,), shifted),
)
"""Several chunks with an odd end, a short leaf between them, and one that ends with a block."""


def long_of(row: Row) -> Places:
    """The same as matrices, for rules that take these alone."""
    return tuple(((3, -(-s[0] // 3)), lay) for s, lay in LONG) if row.matrix else LONG


@pytest.mark.parametrize("row", [r for i, r in enumerate(TABLE) if i % 4 == 0 or r.passes > 1], ids=of_row)
def test_leaves_of_several_chunks_are_stepped_from_end_to_end(row: Row) -> None:
    """Of all rows with sums, and of some where no element of a chunk meets another."""
    model, grads = (model_of(long_of(row), row.single, seed) for seed in (0, 1))
    found = []
    for name in ("triton", "interpret"):
        xs, gs = ([of_cpu(t) for t in ts] if name == "interpret" else ts for ts in (model, grads))
        state, new = opt.update(opt.setup(row.rule, xs, engine=name), xs, gs)
        found.append((state, new))
    assert_close(*found, row.single)


@pytest.mark.parametrize("dtype", REAL)
def test_a_step_gives_the_same_bits_every_time(dtype: str) -> None:
    """Reductions are always added up in the same order."""
    rule = opt.Chain(opt.ClipGlobalNorm(0.5), opt.ClipNorm(0.3), opt.AdamW(0.1))
    model, grads = (model_of(LONG, dtype, seed) for seed in (0, 1))
    found = []
    for _ in range(2):
        state = opt.setup(rule, model, engine="triton")
        found.append(snapshot(*opt.update(state, model, grads)))

    assert found[0] == found[1]


# -- operations, one by one ----------------------------------------------------------------------------------


def computed(rule: opt.Rule, x: Any, dx: Any) -> Any:
    """The state that a rule keeps after one step, as arrays of NumPy."""
    state = operations.computed(rule, on_device(x), on_device(dx), "triton")
    return {k: on_host(v) for k, v in state.items()} if isinstance(state, dict) else state


@pytest.mark.parametrize("name", operations.REDUCE)
def test_a_reduction_sees_every_element_of_a_long_array(name: str) -> None:
    """The one element that counts stands at a border of blocks or chunks, in one leaf after the other."""
    n = 2 * launch.CHUNK + 77
    borders = (0, launch.BLOCK, launch.CHUNK, 2 * launch.CHUNK)
    spots = [*borders, *(b - 1 for b in borders[1:]), n - 1]
    value = -3.0 if name == "min" else 3.0
    model = [on_device(np.zeros(n, np.float32)) for _ in spots]
    for x, spot in zip(model, spots, strict=True):
        x[spot] = value
    state, _ = opt.update_(opt.setup(operations.Reduces(name), model, engine="triton"), model, model)

    assert [leaf.state[0] for leaf in state] == [value] * len(spots)


@pytest.mark.parametrize("name", operations.REDUCE)
@pytest.mark.parametrize(
    "special",
    [
        {9: math.nan},
        {8000: math.nan},
        {4100: math.inf},
        {5: math.inf, 8200: -math.inf},
        {5: math.nan, 6: math.inf},
    ],
    ids=repr,
)
def test_what_is_not_finite_in_one_chunk_counts_for_the_leaf(name: str, special: dict[int, float]) -> None:
    a = np.random.default_rng(0).standard_normal(2 * launch.CHUNK + 77)
    for spot, value in special.items():
        a[spot] = value
    with np.errstate(all="ignore"):
        wanted = operations.reduced(name, a)
    np.testing.assert_array_equal(computed(operations.Reduces(name), a, a)[0], wanted)


def test_sums_of_single_precision_are_taken_in_double_precision() -> None:
    """10^8 and many small ones: in float32 each of them would be lost."""
    x = np.full(20_001, 0.25, np.float32)
    x[0] = 1e8

    assert computed(operations.Reduces("sum"), x, x)[0] == 1e8 + 5_000


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("name", operations.REDUCE)
def test_the_chunks_of_a_leaf_are_gathered_whatever_their_number(name: str, count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count + 7)
    begin, out = np.array([0, 3, 3 + count, count + 7]), on_device(np.zeros(3))
    device_functions.gather[(3,)](on_device(values), on_device(begin), out, OP=name, BLOCK=128, num_warps=4)
    pieces = [values[:3], values[3 : 3 + count], values[3 + count :]]
    wanted = [operations.reduced(name, p) for p in pieces]
    np.testing.assert_allclose(on_host(out), wanted, rtol=1e-13)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("name", ["sum", "norm2"])
def test_all_chunks_are_added_up_whatever_their_number(name: str, count: int) -> None:
    values, out = np.random.default_rng(count).uniform(0, 1, count + 5), on_device(np.zeros(1))
    device_functions.add_up[(1,)](on_device(values), count, out, OP=name, BLOCK=1024, num_warps=8)
    np.testing.assert_allclose(on_host(out), operations.reduced(name, values[:count]), rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1e37), ("float32", 1e-37), ("float64", 1e300), ("float64", 1e-300)]
)
def test_a_norm_is_right_where_squares_overflow_or_vanish(dtype: str, size: float) -> None:
    grads = [np.full(500, size).astype(dtype), (np.array([0.0, -0.3, 0.4]) * size).astype(dtype)]
    for capturable in (False, True):
        rule = opt.Chain(opt.ClipGlobalNorm(size / 10, throw=False), opt.Descent(1.0))
        model = [on_device(np.zeros_like(g)) for g in grads]
        state = opt.setup(rule, model, engine="triton", capturable=capturable)
        _, model = opt.update_(state, model, [on_device(g) for g in grads])
        length = math.hypot(*(float(v) for g in grads for v in g))
        for x, g in zip(model, grads, strict=True):
            rtol = 1e-6 if dtype == "float32" else 1e-12
            np.testing.assert_allclose(-on_host(x), g * (size / 10 / length), rtol=rtol)


# -- the laws ------------------------------------------------------------------------------------------------


FORMS = {
    "turned": turned,
    "with gaps": with_gaps,
    "shifted": shifted,
    "misaligned": lambda t: misaligned(t.cpu()).to(t.device),
}


def lying(world: World, form: str, x: Any) -> Any:
    """The same values in another form, where a world has it; a scalar repeated has the first of them."""
    if form == "a scalar repeated":
        return np.broadcast_to(x[:1, :1], x.shape) if world.library == "numpy" else x[:1, :1].expand(x.shape)
    return FORMS[form](x) if world.library == "torch" else x


@on_triton
@pytest.mark.parametrize("form", [*FORMS, "a scalar repeated"])
def test_gradients_may_lie_in_any_way(world: World, form: str) -> None:
    def story(world: World) -> Any:
        model = world.model("float32")
        state = world.setup(opt.Chain(opt.ClipNorm(0.5), opt.Momentum(0.1, 0.5)), model)
        for n in range(2):
            grads = world.model("float32", seed=n + 1)
            state, model = world.step(state, model, grads | {k: lying(world, form, grads[k]) for k in "bd"})
        return state, model

    same_story(story, world, "float32")


@on_triton
@pytest.mark.parametrize("form", ["turned", "with gaps", "shifted", "misaligned"])
def test_parameters_may_lie_in_any_way(world: World, form: str) -> None:
    def story(world: World) -> Any:
        model = world.model("float32")
        model |= {k: lying(world, form, model[k]) for k in "bd"}
        state, first = world.setup(opt.Chain(opt.ClipNorm(0.5), opt.Momentum(0.1, 0.5)), model), model
        for n in range(2):
            state, model = world.step(state, model, world.model("float32", seed=n + 1))
        assert (model["b"] is first["b"]) == (world.step is opt.update_)
        return state, model

    same_story(story, world, "float32")


@both_updates
def test_nothing_beside_the_parameters_is_written(step: Callable[..., Any]) -> None:
    buffer = torch.full((6000,), 7.0, device=DEVICE)
    model = [buffer[1:4], buffer[10:75], buffer[100:900:3], buffer[901:999].view(7, 14).T, buffer[1500:5700]]
    inside = np.zeros(6000, bool)
    for at in (slice(1, 4), slice(10, 75), slice(100, 900, 3), slice(901, 999), slice(1500, 5700)):
        inside[at] = True
    state = opt.setup(opt.Momentum(1.0, 0.5), model, engine="triton")
    _, new = step(state, model, [torch.ones(x.shape, device=DEVICE) for x in model])
    np.testing.assert_array_equal(on_host(buffer), np.where(inside & (step is opt.update_), 6.0, 7.0))
    for x in new:
        np.testing.assert_array_equal(on_host(x), 6.0)


# -- conditions, checks, totals ------------------------------------------------------------------------------


def test_nobody_waits_for_a_check_of_a_capturable_state() -> None:
    """What is not finite spreads: in its leaf under ClipNorm, everywhere under ClipGlobalNorm."""
    for rule, spoilt in ((opt.ClipNorm(0.5), {"d"}), (opt.ClipGlobalNorm(0.5), set("abcde"))):
        world = World("torch", "triton", capturable=True)
        model = world.model()
        state = world.setup(opt.Chain(rule, opt.Descent(0.1)), model)
        grads = world.model(seed=1)
        grads["d"][0, 0] = math.nan
        opt.update_(state, model, grads)

        assert {k for k, x in model.items() if not x.isfinite().all()} == spoilt


@pytest.mark.slow
@capturable_or_not
def test_a_model_may_have_more_leaves_than_a_program_takes(capturable: bool) -> None:
    def story(world: World) -> Any:
        rng = np.random.default_rng(0)
        of_all = (enumerate(rng.standard_normal((launch.LANES + 3, 2))) for _ in range(2))
        model, grads = ({f"leaf {n}": world.put(a) for n, a in each} for each in of_all)
        state = world.setup(opt.Chain(opt.ClipGlobalNorm(0.5), opt.ClipNorm(0.05), opt.Adam(0.1)), model)
        return world.step(state, model, grads | {"leaf 7": None})

    same_story(story, World("torch", "triton", capturable=capturable))


# -- states are values ---------------------------------------------------------------------------------------


def test_the_clock_and_the_numbers_of_a_capturable_state_stay_where_they_are() -> None:
    """A graph that was captured reads and writes them there."""
    world = World("torch", "triton", capturable=True)
    model = world.model()
    state = world.setup(opt.Chain(opt.AccumGrad(2), opt.AdamW(0.1)), model)
    store = parts(state)[0]

    def places() -> list[int]:
        arrays = [a for a in store.arrays() if isinstance(a, torch.Tensor)]
        return [a.data_ptr() for a in arrays]

    before = places()
    for n in range(3):
        opt.update_(state, model, with_none(world.model(seed=n), "b" if n == 1 else ""))
    opt.adjust_(state, 0.3)
    opt.adjust_(state.c, beta=(0.5, 0.5))
    opt.freeze_(state.a)
    opt.update_(state, model, world.model(seed=5))
    state.b.state = state.c.state

    assert places() == before
    assert all(g.table.clock.device.type == DEVICE for g in store.groups)
    assert [store.clock_of(leaf) for leaf in range(3)] == [4, 4, 4]


# -- gradients that were scaled ------------------------------------------------------------------------------

SCALED = RULES | {
    "longest": LongestSeen(),
    "following": opt.AdamW(SCHEDULES["Linear"]),
    "nothing": opt.Chain(),
}


def scaling(scale: float, found: float, shape: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """What a scaler of gradients keeps on the device."""
    return torch.full(shape, scale, device=DEVICE), torch.full(shape, found, device=DEVICE)


@pytest.mark.parametrize("rule", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_gradients_are_divided(rule: opt.Rule, dtype: str) -> None:
    """By a power of two, so that nothing is rounded."""
    found = []
    for scale in (1.0, 1024.0):
        world = World("torch", "triton", capturable=True)
        model = world.model(dtype)
        state = world.setup(rule, model)
        for n in range(3):
            grads = with_none(
                {k: scale * g for k, g in world.model(dtype, seed=n + 1).items()}, "b" if n == 1 else ""
            )
            if scale == 1:
                opt.update_(state, model, grads)
            else:
                step_scaled(state, model, grads, scaling(scale, 0.0, () if n else (1,)))
        found.append(snapshot(state, model))

    assert found[0] == found[1]


@pytest.mark.parametrize("rule", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("shape", [(), (1,)], ids=repr)
def test_a_step_where_something_was_found_changes_nothing(rule: opt.Rule, shape: tuple[int, ...]) -> None:
    world = World("torch", "triton", capturable=True)
    model = world.model("float32")
    state = world.setup(rule, model)
    for n in range(3):
        step_scaled(state, model, world.model("float32", seed=n + 1), scaling(2.0, 0.0))
        before = snapshot(state, model)
        grads = world.model("float32", seed=7)
        grads["a"][0, 0], grads["c"][1, 1] = math.inf, math.nan
        step_scaled(state, model, grads, scaling(2.0, 1.0, shape))
        step_scaled(state, model, with_none(grads, "b"), scaling(math.inf, 2.0, shape))

        assert snapshot(state, model) == before


OTHER_SHAPES = {"Sketched", "RowScaled", "RowMoments"}
"""Rows that compute values of another shape than the parameters, leaf by leaf."""


def test_what_takes_scaling() -> None:
    """Capturable states of rules that compute nothing of another shape than the parameters."""
    model = [torch.ones(3, 4, device=DEVICE)]
    for row in TABLE:
        if row.takes("float32"):
            for capturable in (False, True):
                state = opt.setup(row.rule, model, engine="triton", capturable=capturable)

                assert takes_scaling(parts(state)[0]) == (capturable and row.name not in OTHER_SHAPES), (
                    row.name
                )


# -- what a step costs ---------------------------------------------------------------------------------------

Launch = tuple[Any, Any, tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of a kernel: (kernel, grid, arguments, settings)."""
    seen: list[Launch] = []
    kind = type(device_functions.gather)
    original = kind.__getitem__

    def __getitem__(kernel: Any, grid: Any) -> Any:  # noqa: N807 it takes the place of the other
        def launch(*args: Any, **settings: Any) -> Any:
            seen.append((kernel, grid, args, settings))
            return original(kernel, grid)(*args, **settings)

        return launch

    monkeypatch.setattr(kind, "__getitem__", __getitem__)
    return seen


@pytest.mark.parametrize(
    ("row", "capturable"), [pytest.param(r, i % 2 == 1, id=r.name) for i, r in enumerate(TABLE)]
)
def test_the_number_of_launches_does_not_depend_on_that_of_leaves(
    row: Row,
    capturable: bool,
    launches: list[Launch],
) -> None:
    counts = []
    for n in (2, 3):
        model = [torch.full((2, 3), 0.5, device=DEVICE, dtype=getattr(torch, row.single)) for _ in range(n)]
        state = opt.setup(row.rule, model, engine="triton", capturable=capturable)
        opt.update_(state, model, [x.clone() for x in model])
        launches.clear()
        opt.update_(state, model, [x.clone() for x in model])
        counts.append(len(launches))

    assert counts[0] == counts[1] or (capturable and row.name in OTHER_SHAPES)
    if not capturable:
        passes = row.passes + (row.name in OTHER_SHAPES)  # one more writes what the library computes with
        assert sum("addresses" in kernel.arg_names for kernel, *_ in launches) <= passes
        assert passes > 1 or counts[0] <= 1


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many words were copied to the device, copy by copy."""
    seen: list[int] = []
    original = tables.copy_over

    def copy_over(memory: Any, host: Any, count: int, staged: Any) -> None:
        seen.append(count)
        original(memory, host, count, staged)

    monkeypatch.setattr(tables, "copy_over", copy_over)
    return seen


def test_what_has_not_changed_is_not_sent_again(sent: list[int]) -> None:
    model, grads = (model_of(PLACES, "float32", seed) for seed in (0, 1))
    state = opt.setup(opt.Descent(0.1), model, engine="triton")
    opt.update_(state, model, grads)

    assert len(sent) == 1

    for _ in range(3):
        opt.update_(state, model, grads)

    assert len(sent) == 1


def test_only_the_scalars_are_sent_where_only_they_have_changed(sent: list[int], buffers: list[Any]) -> None:
    """A row of scalars for all leaves, since they were always stepped together."""
    model, grads = (model_of(PLACES, "float32", seed) for seed in (0, 1))
    state = opt.setup(opt.AdamW(0.1), model, engine="triton")
    for _ in range(3):
        opt.update_(state, model, grads)

    assert sent[0] > len(model)
    assert sent[1:] == [buffers[-1].numbers] * 2
    assert buffers[-1].numbers <= 10

    sent.clear()
    opt.update_(state, model, model_of(PLACES, "float32", 2))

    assert len(sent) == 1
    assert sent[0] > len(model)


def test_a_capturable_state_sends_nothing_but_addresses(sent: list[int]) -> None:
    model, grads = (model_of(PLACES, "float32", seed) for seed in (0, 1))
    rule = opt.Chain(opt.ClipGlobalNorm(0.5), opt.AccumGrad(2), opt.AdamW(opt.Linear(0.1, 0.2, 5)))
    state = opt.setup(rule, model, capturable=True)
    opt.update_(state, model, grads)
    sent.clear()
    for _ in range(3):
        opt.update_(state, model, grads)

    assert sent == []


@capturable_or_not
def test_nothing_is_written_anew_when_settings_change(
    capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    sources = engine.sources

    def noted(*what: Any, **how: Any) -> Any:
        if "scaled" in how:  # for a kernel that is launched, not for a look at whether there can be one
            written.append(what)
        return sources(*what, **how)

    monkeypatch.setattr(engine, "sources", noted)
    world = World("torch", "triton", capturable=capturable)
    model = world.model("float32")
    state = world.setup(opt.Chain(opt.ClipNorm(0.5), opt.AdamW(opt.Linear(0.1, 0.2, 5))), model)
    for n in range(2):
        opt.update_(state, model, world.model("float32", seed=n))
    before = len(written), len(cache._loaded)
    assert before[0] > 0
    for n in range(3):
        opt.adjust_(state, beta=(0.5, 0.25 * n))
        opt.adjust_(state.b, omega=0.25)
        state, model = opt.update_(state, model, with_none(world.model("float32", seed=n), "bcd"[n]))
    opt.freeze_(state.a)
    opt.update_(state, model, world.model("float32"))

    assert (len(written), len(cache._loaded)) == before


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tables of every pass that was launched."""
    seen: list[Any] = []
    original = engine.arguments_of

    def arguments(*args: Any) -> Any:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(engine, "arguments_of", arguments)
    return seen


def test_16_bytes_are_read_at_a_time_only_where_all_arrays_of_a_leaf_are_aligned(buffers: list[Any]) -> None:
    """The state always is; parameters and gradients lie as they lie."""
    ways = list(itertools.product([torch.clone, shifted], repeat=2))
    model, grads = ([w[n](torch.ones(5, device=DEVICE)) for w in ways] for n in range(2))
    state = opt.setup(opt.AdamW(0.1), model, engine="triton")
    for _ in range(2):
        opt.update_(state, model, grads)
        wanted = [
            x.data_ptr() % 16 == 0 and g.data_ptr() % 16 == 0 for x, g in zip(model, grads, strict=True)
        ]
        np.testing.assert_array_equal(buffers[-1].aligned.cpu()[: len(ways)].numpy(), wanted)

        assert sum(wanted) in (1, 2)

        model, grads = (
            [x.clone() for x in model],
            [g.clone() if n % 2 else shifted(g) for n, g in enumerate(grads)],
        )


# -- steps in a graph ----------------------------------------------------------------------------------------


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether what is launched from now on is noted in a graph."""
    now = [False]
    monkeypatch.setattr(launch, "capturing", lambda _: now[0])
    return lambda on: now.__setitem__(0, on)


def captured(state: Any) -> list[Any]:
    """The tables that belong to graphs."""
    kept = [s for g in parts(state)[0].groups for s in (g.cache.whole.captured if g.cache.whole else [])]
    return [s for s in kept if isinstance(s, tables.ArgumentBuffer)]


def test_a_captured_step_has_tables_of_its_own(capture: Callable[[bool], None], buffers: list[Any]) -> None:
    """Later steps do not write into them, nor does a later capture."""
    world = World("torch", "triton", capturable=True)
    model, grads = world.model(), world.model(seed=1)
    state = world.setup(opt.Chain(opt.ClipNorm(0.5), opt.AdamW(0.1)), model)
    opt.update_(state, model, grads)
    capture(True)
    opt.update_(state, model, grads)
    capture(False)
    own = captured(state)
    eager = [s for s in buffers if not any(s is o for o in own)]
    before = [s.memory.clone() for s in own]

    assert len(own) == 2
    assert len({s.memory.data_ptr() for s in (*own, *eager)}) == 4

    for n in range(3):
        opt.update_(state, model, with_none(world.model(seed=n), "b" if n == 1 else ""))
    opt.adjust_(state, 0.5)
    capture(True)
    opt.update_(state, model, world.model(seed=7))
    capture(False)

    assert len(captured(state)) == 4
    assert all(torch.equal(s.memory, m) for s, m in zip(own, before, strict=True))


REPLAYED = RULES | {
    "following": opt.Chain(opt.ClipGlobalNorm(0.5), opt.AdamW(SCHEDULES["Linear"])),
    "longest": LongestSeen(),
    "Descent": opt.Descent(0.1),
}


CHANGED: dict[str, Any] = {"following": {"epsilon": 1e-3}}
"""What is adjusted between replays: numbers, since another structure is another state in memory."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), REPLAYED.items(), ids=REPLAYED)
def test_what_a_step_launches_is_a_step_again(
    name: str, rule: opt.Rule, capture: Callable[[bool], None], launches: list[Launch]
) -> None:
    """So a graph that is replayed goes on, with the gradients, settings and numbers that then stand where
    they stood.
    """
    world = World("torch", "triton", capturable=True)
    model, grads = world.model(), world.model(seed=1)
    twin = {k: x.clone() for k, x in model.items()}
    state, other = world.setup(rule, model), world.setup(rule, twin)
    for s, m in ((state, model), (other, twin)):
        opt.update_(s, m, grads)
    launches.clear()
    capture(True)
    opt.update_(state, model, grads)
    capture(False)
    graph = launches.copy()
    opt.update_(other, twin, grads)
    for n in range(4):
        new = world.model(seed=n + 2)
        for k, g in grads.items():
            g.copy_(new[k])
        if n == 1:
            for s in (state, other):
                opt.adjust_(s.b, **CHANGED.get(name, {"eta": 0.03}))
        if n == 2:  # a step aside, as eager ones are
            for s, m in ((state, model), (other, twin)):
                opt.update_(s, m, with_none(world.model(seed=30), "c"))
        with np.errstate(all="ignore"):
            for kernel, grid, args, settings in graph:
                kernel[grid](*args, **settings)
        for group in parts(state)[0].groups:
            group.table.advance_clocks(None)
        opt.update_(other, twin, grads)

        assert snapshot(state, model) == snapshot(other, twin)


# -- what readers of the engine have found -------------------------------------------------------------------


def test_a_step_makes_no_tensors_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at tensors on the CPU initialises no GPU, however many there are."""
    made: list[str] = []
    original = torch.zeros

    def zeros(*args: Any, **options: Any) -> Any:
        made.append(str(options.get("device")))
        return original(*args, **options)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.delitem(addresses._roads, ("torch", "cpu"), raising=False)
    addresses.road("torch", "cpu")

    assert made
    assert set(made) <= {"cpu", "meta", "None"}


@capturable_or_not
def test_another_default_device_changes_nothing(capturable: bool) -> None:
    x = torch.ones(3)
    with torch.device("meta"):
        state = opt.setup(opt.AdamW(0.1), x, engine="triton", capturable=capturable)
        opt.update_(state, x, torch.full((3,), 1.0, device="cpu"))

    torch.testing.assert_close(x, torch.full((3,), 0.9), rtol=1e-5, atol=0)


@capturable_or_not
def test_a_state_that_was_made_in_inference_mode_steps_outside_it(capturable: bool) -> None:
    x, g = torch.ones(3), torch.ones(3)
    with torch.inference_mode():
        state = opt.setup(opt.Momentum(0.1), x, engine="triton", capturable=capturable)
        pure, _ = opt.update(state, x, g)
    y = torch.ones(3)
    opt.update_(state, x, g)
    opt.update_(pure, y, g)

    assert torch.equal(x, torch.full((3,), 0.9))
    torch.testing.assert_close(y, torch.full((3,), 0.81), rtol=1e-6, atol=0)


def test_a_copy_of_a_capturable_state_has_arrays_of_its_own() -> None:
    """A graph writes at the addresses it has seen: the state stays there, and copies stay what they were."""
    x = torch.ones(3)
    state = opt.setup(opt.Momentum(0.1), x, engine="triton", capturable=True)
    opt.update_(state, x, torch.ones(3))
    (group,) = parts(state)[0].groups
    where = group.slots[0].addresses.tolist(), group.table.values.data_ptr()
    other, again = opt.adjust(state, 0.5), copy.copy(state)
    group.slots[0].buffers[0].fill_(7.0)  # as a replay does

    assert other.state.v.tolist() == again.state.v.tolist() == pytest.approx([0.1] * 3)
    opt.update_(state, x, torch.ones(3))
    (group,) = parts(state)[0].groups
    assert (group.slots[0].addresses.tolist(), group.table.values.data_ptr()) == where


def test_groups_that_a_graph_may_write_into_are_kept_and_no_others(capture: Callable[[bool], None]) -> None:
    x = torch.ones(3)
    state = opt.setup(opt.Momentum(opt.Linear(0.1, 0.2, 5)), x, engine="triton", capturable=True)
    opt.update_(state, x, torch.ones(3))
    opt.adjust_(state, eta=0.1)
    store = parts(state)[0]
    assert store.retired == []

    opt.update_(state, x, torch.ones(3))
    capture(True)
    opt.update_(state, x, torch.ones(3))
    capture(False)
    old = store.groups[0]
    opt.adjust_(state, eta=opt.Linear(0.1, 0.2, 5))
    assert store.retired == [old]
    assert parts(pickle.loads(pickle.dumps(state)))[0].retired == []


def test_a_step_that_has_not_run_is_refused_in_a_capture_before_anything_is_noted(
    capture: Callable[[bool], None], launches: list[Launch]
) -> None:
    x = torch.ones(3)
    state = opt.setup(opt.AdamW(0.1), x, engine="triton", capturable=True)
    capture(True)
    with pytest.raises(BadState, match="take one before the capture, in the same thread"):
        opt.update_(state, x, torch.ones(3))
    capture(False)

    assert launches == []
    assert state.state.weight == (0.0, 0.0)


def test_numbers_are_not_changed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    state = opt.setup(opt.AdamW(0.1), x, engine="triton", capturable=True)
    monkeypatch.setattr(library.graphs, "capturing", lambda _: True)
    with pytest.raises(BadState, match="change them before, or between its replays"):
        opt.adjust_(state, 0.5)


@pytest.mark.slow
def test_so_many_graphs_may_be_captured_between_two_steps(capture: Callable[[bool], None]) -> None:
    x = torch.ones(3)
    state = opt.setup(opt.AdamW(0.1), x, engine="triton", capturable=True)
    opt.update_(state, x, torch.ones(3))
    capture(True)
    for _ in range(engine.PINNED):
        opt.update_(state, x, torch.ones(3))
    with pytest.raises(BadState, match="take a step before the next capture"):
        opt.update_(state, x, torch.ones(3))
    capture(False)
    opt.update_(state, x, torch.ones(3))
    capture(True)
    opt.update_(state, x, torch.ones(3))


def test_a_capturable_state_is_not_differentiated() -> None:
    x = torch.ones(3)
    state = opt.setup(opt.AdamW(0.1), x, engine="triton", capturable=True)
    with pytest.raises(BadState, match="a capturable state is for CUDA graphs"):
        opt.update(state, x, torch.ones(3, requires_grad=True) * 2)
    with pytest.raises(BadState, match="a capturable state is for CUDA graphs"):
        opt.adjust(state, eta=torch.tensor(0.1, requires_grad=True))
    opt.update_(state, x, torch.ones(3))


class OfProducts(opt.Rule):
    """Divides by the norm of a product: a sum over values of another shape than x."""

    eta: float = 0.1

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, self.eta * dx / opt.sqrt(opt.ops.sum(opt.abs2(dx @ opt.ops.transpose(dx))))


@capturable_or_not
def test_a_sum_over_values_of_another_shape(capturable: bool) -> None:
    dx = torch.arange(6.0).reshape(2, 3)
    x = torch.zeros(2, 3)
    state = opt.setup(OfProducts(), [x], engine="triton", capturable=capturable)
    opt.update_(state, [x], [dx])

    torch.testing.assert_close(x, -0.1 * dx / (dx @ dx.T).norm())


def test_a_rate_in_a_tensor_is_read_when_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at a tensor on a device waits for it."""
    p = torch.nn.Parameter(torch.ones(3))
    rate = torch.tensor(0.5)
    optimizer = opt.TorchOptimizer([p], opt.Descent(), lr=rate, engine="triton", capturable=True)
    p.grad = torch.ones(3)
    optimizer.step()
    reads: list[Any] = []
    original = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda x: reads.append(x) or original(x))
    optimizer.step()
    assert reads == []

    rate.fill_(0.25)
    optimizer.step()
    assert len(reads) <= 2  # once to see that it is another, once to take it over
    assert p.tolist() == pytest.approx([-0.25] * 3)
    monkeypatch.setattr(library.graphs, "capturing", lambda _: True)
    rate.fill_(0.5)
    with pytest.raises(BadState, match=r"write read_groups\(\) before"):
        optimizer.step()


def test_equal_states_are_told_apart_at_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The structure of a second state is that of the first: nothing is compared at every step."""
    grads = [torch.ones(3), torch.ones(4)]
    states = []
    for _ in range(2):
        model = [torch.ones(3), torch.ones(4)]
        states.append((opt.setup(opt.AdamW(0.1), model, engine="triton"), model))
        opt.update_(*states[-1], grads)
    compared: list[Any] = []
    original = Structure.__eq__
    monkeypatch.setattr(Structure, "__eq__", lambda a, b: (a is b) or (compared.append(a) or original(a, b)))
    for state, model in states:
        opt.update_(state, model, grads)

    assert compared == []


def test_fields_of_a_state_may_be_called_as_functions_of_kernels_are() -> None:
    class Named(opt.Rule):
        def init(self, x: Any) -> Any:
            return {"widened": opt.zeros_like(x), "bfloat16_of": opt.zeros_like(x), "load": opt.zeros_like(x)}

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            state = {k: v + dx for k, v in state.items()}
            return state, state["widened"]

    x = torch.ones(3, dtype=torch.bfloat16)
    state = opt.setup(Named(), x, engine="triton")
    opt.update_(state, x, torch.ones_like(x))

    assert x.tolist() == [0.0, 0.0, 0.0]


COMPILED = """
import torch
import optimisers as opt

x = torch.ones(3)
state = opt.setup(opt.AdamW(0.1), x, capturable=True)
try:
    torch.compile(lambda s, x: opt.update(s, x, x), backend="eager")(state, x)
except Exception as error:
    print(error)
torch.compile(lambda s, x: opt.update_(s, x, x), backend="eager")(state, x)
print(x)
"""


@pytest.mark.slow
def test_the_first_state_of_a_process_may_be_capturable_and_compiled_around() -> None:
    """`update` says that it cannot be in the graph; `update_` runs beside it."""
    said = printed(COMPILED, interpreted=True)

    assert "inside torch.compile, write setup without capturable" in said
    assert "tensor([0.9000, 0.9000, 0.9000])" in said


LATE = """
import os
import triton.language
os.environ["TRITON_INTERPRET"] = "1"
import torch
import optimisers as opt
try:
    opt.setup(opt.AdamW(0.1), torch.ones(3), engine="triton")
except opt.BadSetting as error:
    print(error)
"""


@pytest.mark.slow
def test_the_variable_must_be_set_before_triton_is_imported() -> None:
    said = printed(LATE, interpreted=False)

    assert "TRITON_INTERPRET was set after Triton was imported; set it before Python starts" in said


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bfloat16", "bfloat16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float32, "float32"),
        ("float16", "float16"),
        (np.float64, "float64"),
    ],
)
def test_kernels_are_shown_for_types_of_every_library(dtype: Any, name: str) -> None:
    assert f"x: {name}, dx: {name}, " in opt.kernel(opt.AdamW(), dtype, engine="triton")


def test_a_type_that_there_is_not_has_no_kernel() -> None:
    with pytest.raises(BadState, match="kernel was given dtype='float7'"):
        opt.kernel(opt.AdamW(), "float7", engine="triton")
