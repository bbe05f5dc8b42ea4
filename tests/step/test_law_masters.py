"""The parameters are the user's: what was written into them between steps counts, also under rules that keep
masters.

Wanted numbers come from the plainest possible model: float32 masters stepped by hand, each of which is what
the user wrote, wherever the user wrote.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import optimisers as opt

NARROW = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TINY = 2.0**-14
"""A step that is lost in a half next to 1: so many of them add up in a master alone."""


class Plain:
    """Descent on masters, by hand."""

    def __init__(self, x: Any, dtype: Any, eta: float) -> None:
        self.dtype, self.eta = dtype, np.float32(eta)
        self.master = np.asarray(x, np.float64).astype(np.float32)

    @property
    def x(self) -> Any:
        """The parameters as they are stored."""
        return self.master.astype(self.dtype)

    def step(self, g: Any) -> None:
        self.master = self.master - self.eta * np.asarray(g, np.float32)

    def write(self, at: Any, values: Any) -> None:
        """The user writes: from now on that is what is stepped."""
        self.master[at] = np.asarray(values, self.dtype).astype(np.float32)


# -- ways to step, and to write between steps ----------------------------------------------------------------


def by_numpy(step: Callable[..., Any], engine: str | None) -> Callable[..., Any]:
    def walk(rule: opt.Rule, start: Any, dtype: str, turns: Any) -> Any:
        x = start.astype(NARROW[dtype])
        state = opt.setup(rule, x, engine=engine)
        for gs, at, values in turns:
            for g in gs:
                state, x = step(state, x, g.astype(NARROW[dtype]))
            x = np.array(x)
            x[at] = values
        return state.state, x

    return walk


def by_torch(step: Callable[..., Any]) -> Callable[..., Any]:
    def walk(rule: opt.Rule, start: Any, dtype: str, turns: Any) -> Any:
        kind = getattr(torch, dtype)
        x = torch.tensor(start).to(kind)
        state = opt.setup(rule, x)
        for gs, at, values in turns:
            for g in gs:
                state, x = step(state, x, torch.tensor(g).to(kind))
            x[at] = torch.tensor(values).to(kind)
        return state.state, x.float().numpy()

    return walk


def by_adapter(rule: opt.Rule, start: Any, dtype: str, turns: Any) -> Any:
    kind = getattr(torch, dtype)
    x = torch.nn.Parameter(torch.tensor(start).to(kind))
    optimizer = opt.TorchOptimizer([x], rule)
    for gs, at, values in turns:
        for g in gs:
            x.grad = torch.tensor(g).to(kind)
            optimizer.step()
        with torch.no_grad():
            x[at] = torch.tensor(values).to(kind)
    return None, x.detach().float().numpy()


def by_jax(*, jit: bool, engine: str | None = None) -> Callable[..., Any]:
    def walk(rule: opt.Rule, start: Any, dtype: str, turns: Any) -> Any:
        x = jnp.asarray(start, dtype)
        state = opt.setup(rule, x, engine=engine)
        step = jax.jit(opt.update) if jit else opt.update
        for gs, at, values in turns:
            for g in gs:
                state, x = step(state, x, jnp.asarray(g, dtype))
            x = x.at[at].set(jnp.asarray(values, dtype))
        return state.state, np.asarray(x.astype(jnp.float32))

    return walk


WAYS: dict[str, Callable[..., Any]] = {
    "numpy update": by_numpy(opt.update, None),
    "numpy update_": by_numpy(opt.update_, None),
    "interpreter": by_numpy(opt.update_, "interpret"),
    "torch update": by_torch(opt.update),
    "torch update_": by_torch(opt.update_),
    "TorchOptimizer": by_adapter,
    "jax": by_jax(jit=False),
    "jax, jitted": by_jax(jit=True),
    "jax, words of XLA": by_jax(jit=True, engine="interpret"),
}

every_way = pytest.mark.parametrize("way", WAYS)
every_type = pytest.mark.parametrize("dtype", NARROW)


# -- the law -------------------------------------------------------------------------------------------------


@every_way
@every_type
def test_what_is_written_is_stepped_and_the_rest_keeps_its_master(way: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    start = np.concatenate([rng.standard_normal(60), [1.0, -1.0, 0.0, 3.0]])
    turns: list[Any] = []
    plain = Plain(start.astype(NARROW[dtype]), NARROW[dtype], TINY)
    for at, value in ((slice(4, 9), 0.25), (slice(60, 62), 0.0), (slice(0, 2), -2.0)):
        gs = [np.sign(rng.standard_normal(64)) for _ in range(5)]
        turns.append((gs, at, np.full(len(range(64)[at]), value)))
        for g in gs:
            plain.step(g)
        plain.write(at, turns[-1][2])
    turns.append(([np.ones(64)] * 3, slice(0, 0), np.zeros(0)))
    for _ in range(3):
        plain.step(np.ones(64))
    state, x = WAYS[way](opt.MixedPrecision(opt.Descent(TINY)), start, dtype, turns)

    np.testing.assert_array_equal(np.asarray(x, np.float32), plain.x.astype(np.float32))
    if state is not None:
        np.testing.assert_array_equal(np.asarray(state.master), plain.master)


@every_way
@every_type
def test_a_weight_clamped_after_every_step_stays_where_it_was_clamped(way: str, dtype: str) -> None:
    turns = [([-np.ones(2)], slice(0, 2), np.ones(2))] * 6 + [([-np.ones(2)], slice(0, 0), np.zeros(0))]
    for rule in (opt.MixedPrecision(opt.Descent(0.125)), opt.SplitPrecision(opt.Descent(0.125))):
        if dtype == "bfloat16" or isinstance(rule, opt.MixedPrecision):
            _, x = WAYS[way](rule, np.ones(2), dtype, turns)

            np.testing.assert_array_equal(np.asarray(x, np.float32), 1.125)


@every_way
@every_type
def test_every_number_of_a_half_is_read_as_it_was_written(way: str, dtype: str) -> None:
    """Masters between the numbers of the type, subnormal ones included: none is taken for written."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(NARROW[dtype])
    start = bits[np.isfinite(bits.astype(np.float32))].astype(np.float32)
    start = start[np.abs(start) < 3e38]
    start = start[(start == 0) | (np.abs(start) > 1.2e-38)]  # XLA knows no smaller float32
    offset = Offset()
    turns = [([np.ones(len(start))], slice(0, 0), np.zeros(0))] * 2
    state, _ = WAYS[way](opt.MixedPrecision(offset), start, dtype, turns)
    if state is not None:
        np.testing.assert_array_equal(np.asarray(state.master), start * np.float32(1 - 2.0**-13))


class Offset(opt.Rule):
    """Moves every master down by a fraction of itself that a half cannot see, once."""

    def init(self, x: Any) -> Any:
        return 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state + 1, opt.where(state == 0, 2.0**-13, 0.0) * x


def test_a_master_in_float64_follows_a_float32() -> None:
    x = np.ones(3, np.float32)
    state = opt.setup(opt.MixedPrecision(opt.Descent(2.0**-40), "float64"), x)
    state, x = opt.update_(state, x, np.ones(3, np.float32))
    np.testing.assert_array_equal(state.state.master, 1 - 2.0**-40)
    x[1] = 5
    state, x = opt.update_(state, x, np.ones(3, np.float32))
    np.testing.assert_array_equal(state.state.master, [1 - 2.0**-39, 5 - 2.0**-40, 1 - 2.0**-39])


@pytest.mark.parametrize("engine", [None, "interpret"])
def test_what_is_not_a_number_counts_as_well(engine: str | None) -> None:
    x = np.ones(4, np.float16)
    state = opt.setup(opt.MixedPrecision(opt.Descent(0.5)), x, engine=engine)
    state, x = opt.update_(state, x, np.ones(4, np.float16))
    x[:] = [np.nan, np.inf, -np.inf, 0.5]
    state, x = opt.update_(state, x, np.ones(4, np.float16))
    np.testing.assert_array_equal(x, np.array([np.nan, np.inf, -np.inf, 0.0], np.float16))


@pytest.mark.parametrize("engine", [None, "interpret"])
def test_a_master_that_no_half_can_hold_is_kept(engine: str | None) -> None:
    """1e5 is infinite in float16: nobody wrote that."""
    x = np.full(2, 60000, np.float16)
    state = opt.setup(opt.MixedPrecision(opt.Descent(1.0)), x, engine=engine)
    for g in (-40000, 40000):
        state, x = opt.update_(state, x, np.full(2, g, np.float16))
    np.testing.assert_array_equal(x, np.float16(60000))


@pytest.mark.parametrize("engine", [None, "interpret"])
def test_a_state_in_float64_beside_a_float32_master_changes_no_master(engine: str | None) -> None:
    """The parameter is rounded from the master as it is stored, not from what the rule computed, which lies
    above the middle of two float16, and as a float32 is the middle.
    """
    x = np.array([1.0], np.float16)
    state = opt.setup(opt.MixedPrecision(Wide()), x, engine=engine)
    state, x = opt.update_(state, x, np.array([-(2.0**-11)], np.float16))
    np.testing.assert_array_equal(state.state.master, np.float32(1 + 2.0**-11))
    np.testing.assert_array_equal(x, 1)
    state, x = opt.update_(state, x, np.zeros(1, np.float16))
    np.testing.assert_array_equal(state.state.master, np.float32(1 + 2.0**-11))


class Wide(opt.Rule):
    """A sum in float64, which makes all arithmetic that of float64."""

    def init(self, x: Any) -> Any:
        return np.zeros(x.shape)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state + dx, dx * (1 + 2.0**-19)


def test_the_comparison_costs_no_pass() -> None:
    """One more read of two bytes, in the pass that writes them."""
    x = np.ones(10, np.float16)
    (group,) = opt.explain(opt.setup(opt.MixedPrecision(opt.Adam()), x)).groups

    assert group.bytes_per_parameter == 2 + 2 * 2 + 3 * 2 * 4
    assert group.passes == 1


SPELT_BEFORE: Any = opt.MixedPrecision
"""With the setting `split`, which no checker knows."""


@pytest.mark.parametrize(
    ("make", "now", "said"),
    [
        (
            lambda: SPELT_BEFORE(opt.Adam(), split=True),
            opt.SplitPrecision(opt.Adam()),
            "write SplitPrecision",
        ),
        (lambda: SPELT_BEFORE(rule=opt.Adam(), split=True), opt.SplitPrecision(opt.Adam()), "write Split"),
        (lambda: SPELT_BEFORE(opt.Adam(), split=False), opt.MixedPrecision(opt.Adam()), "leave it out"),
        (
            lambda: SPELT_BEFORE(opt.Adam(), "float64", split=False),
            opt.MixedPrecision(opt.Adam(), "float64"),
            "leave it out",
        ),
    ],
)
def test_the_spelling_of_before_says_what_to_write(make: Callable[[], Any], now: opt.Rule, said: str) -> None:
    with pytest.warns(DeprecationWarning, match=said):
        found = make()

    assert found == now


def test_a_split_master_of_before_has_no_other_type() -> None:
    with pytest.raises(opt.BadSetting, match="leave out the dtype"):
        SPELT_BEFORE(opt.Adam(), "float64", split=True)


def test_both_rules_have_ordinary_constructors() -> None:
    assert opt.MixedPrecision(rule=opt.Adam()) == opt.MixedPrecision(opt.Adam(), dtype="float32")
    assert opt.SplitPrecision(rule=opt.Adam()) == opt.SplitPrecision(opt.Adam())
    assert opt.MixedPrecision(opt.Adam(), "float64") != opt.MixedPrecision(opt.Adam())
