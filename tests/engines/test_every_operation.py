"""Does every operation give in every library, by every engine, what it gives in NumPy?"""

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import optimisers as opt
from optimisers.arrays import registry
from optimisers.ops.dispatch import OPERATIONS
from tests.operations import (
    BITS,
    HALVES,
    REDUCE,
    SUMS,
    ULPS,
    Computes,
    Reduces,
    Widens,
    agree,
    complex_pairs,
    hard_to_round,
    known_of,
    pairs,
    reduced,
    same_bits,
)
from tests.table import DTYPES, REAL, dtype_of
from tests.worlds import WORLDS, World, by_engine, worlds, worlds_with

PLACES = [w for w in WORLDS if w.step is opt.update_]
"""What an operation gives does not depend on where the step writes; the store does."""

everywhere = worlds(*PLACES)


def types_in(world: World) -> tuple[str, ...]:
    """The types whose operations are compared: XLA computes halves in float32, kernels of CUDA are real."""
    if world.library == "jax":
        return ("float32", "float64", "complex64", "complex128")
    return REAL if world.engine == "triton" else DTYPES


def computed(world: World, rule: opt.Rule, x: Any, dx: Any) -> Any:
    """The state that a rule keeps after one step, as NumPy has it."""
    with world.open(), np.errstate(all="ignore"):
        model = world.put(x)
        state, _ = world.step(world.setup(rule, model), model, world.put(dx))
        kept = state.state
        if isinstance(kept, dict):
            return {k: world.get(v) for k, v in kept.items()}
        return tuple(world.get(v) for v in kept)


@functools.cache
def all_computed(world: World, dtype: str) -> Any:
    """What every operation makes of the samples: one kernel says them all."""
    of_complex = dtype.startswith("complex")
    pair = complex_pairs(dtype) if of_complex else pairs(dtype)
    return computed(world, Computes(known_of(dtype), of_complex), *pair)


def normal(a: Any) -> Any:
    """Numbers whose subnormals are 0: XLA flushes them."""
    if a.dtype.kind == "c":
        return normal(a.real) + 1j * normal(a.imag)
    return np.where(np.abs(a) < ml_dtypes.finfo(a.dtype).tiny, np.zeros((), a.dtype), a)


def is_normal(a: Any) -> Any:
    return np.isnan(a) | (normal(a) == a)


def units(world: World, name: str, dtype: str) -> int:
    """Units in the last place by which an operation may be off."""
    if world.library == "jax":
        looser = dict.fromkeys(ULPS, 16) | {"log1p": 64}
        return 8 if dtype.startswith("complex") else looser.get(name, 4)
    if world.library == "cupy":
        return 2
    return 4 if dtype.startswith("complex") else ULPS.get(name, 2)


@pytest.mark.parametrize(
    ("world", "dtype"),
    [
        pytest.param(*param.values, dtype, id=f"{param.id}-{dtype}", marks=param.marks)
        for world, param in zip(PLACES[1:], everywhere.args[1][1:], strict=True)
        if not world.capturable
        for dtype in types_in(world)
    ],
)
def test_every_operation_gives_what_it_gives_in_numpy(world: World, dtype: str) -> None:
    all_got, all_wanted = all_computed(world, dtype), all_computed(PLACES[0], dtype)
    for name in known_of(dtype):
        got, wanted = all_got[name], all_wanted[name]
        if world.library == "jax":
            x, y = complex_pairs(dtype) if dtype.startswith("complex") else pairs(dtype)
            kept = is_normal(x) & is_normal(y)
            got, wanted = normal(got[kept]), normal(wanted[kept])
        try:
            agree(got, wanted, units(world, name, dtype))
        except AssertionError as error:
            error.add_note(f"by {name}")
            raise


@everywhere
@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("name", REDUCE)
def test_a_reduction_is_that_of_numpy(world: World, name: str, dtype: str) -> None:
    """All cases are leaves of one model, so one kernel call serves them; sums are taken in float64, but by
    XLA.
    """
    arrays = [np.array(v, float).astype(dtype_of(dtype)) for v in SUMS.values()]
    with world.open(), np.errstate(all="ignore"):
        wanted = [reduced(name, a) for a in arrays]
        model, grads = world.put(arrays), world.put(arrays)
        state, _ = world.step(world.setup(Reduces(name), model), model, grads)
        got = [float(leaf.state[0]) for leaf in state]
    off = 1e-5 if world.library == "jax" and dtype != "float64" else 1e-12
    np.testing.assert_allclose(got, wanted, rtol=off, err_msg=str(list(SUMS)))


@everywhere
def test_the_two_halves_of_a_float32_are_all_of_it(world: World) -> None:
    got = computed(world, Computes(("join_bits", "high_bits", "low_bits")), BITS, BITS)
    wanted = computed(PLACES[0], Computes(("high_bits", "low_bits")), BITS, BITS)
    there = is_normal(BITS) & ~np.isnan(BITS) if world.library == "jax" else ~np.isnan(BITS)
    np.testing.assert_array_equal(got["join_bits"].view(np.uint32)[there], BITS.view(np.uint32)[there])
    for name, bits in wanted.items():
        np.testing.assert_array_equal(got[name][there], bits[there])

    assert np.isnan(got["join_bits"][np.isnan(BITS)]).all()


@everywhere
@pytest.mark.parametrize("dtype", HALVES)
def test_all_65536_halves_are_widened_as_numpy_widens_them(world: World, dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype_of(dtype))
    (got,) = computed(world, Widens(), np.zeros_like(every), every)

    assert got.dtype == np.float32
    same_bits(got, every.astype(np.float32))


@worlds_with("dtype", {t: t for t in HALVES}, *by_engine([w for w in WORLDS if not w.capturable]))
def test_the_store_rounds_to_halves_as_numpy_rounds(world: World, dtype: str) -> None:
    """To the nearest, ties to even; NaN stays NaN."""
    values = hard_to_round(dtype)
    x = np.zeros(values.shape, dtype_of(dtype))
    with world.open(), np.errstate(all="ignore"):
        wanted = (np.float32(0) - values).astype(x.dtype)
        model = world.put(x)
        _, model = world.step(world.setup(opt.Chain(), model), model, world.put(values))
        got = world.get(model)
    kept = is_normal(values) if world.library == "jax" else slice(None)
    same_bits(got[kept], wanted[kept])


@everywhere
def test_a_library_has_exactly_the_operations_of_the_vocabulary(world: World) -> None:
    with world.open():
        assert set(registry.named(world.library).operations) == set(OPERATIONS)


def test_every_operation_is_compared() -> None:
    assert set(known_of("float32")) | set(REDUCE) == {
        n for n, o in OPERATIONS.items() if o.family in ("elementwise", "reduce")
    }
