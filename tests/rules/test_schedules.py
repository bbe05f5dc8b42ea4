"""Schedules against the numbers of other libraries, and against a second formula written in plain Python."""

import math
import operator
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimisers import schedules
from optimisers.errors import BadSetting
from optimisers.schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    Join,
    Linear,
    OneCycle,
    Polynomial,
    Scaled,
    Schedule,
    Step,
    WarmupStableDecay,
)
from optimisers.settings import fill, numbers, skeleton, walk

# -- the numbers of the peers --------------------------------------------------------------------------------

# Made with Optax 0.2.8 on JAX 0.10.2 in float64, torch 2.13.0 and Transformers 5.23.0; each row begins with
# the call. In torch and Transformers the rate was read before each step, and the scheduler stepped after it.
CLOCKS = [0, 1, 7, 19, 20, 21, 59, 60, 61, 149, 150, 199, 200, 201, 300]

# fmt: off
PEERS: list[tuple[str, Any, list[float]]] = [
    ("optax.linear_schedule(0.02, 0.3, 150)",
     Linear(0.02, 0.3, 150),
     [0.020000000000000018, 0.0218666666666667, 0.03306666666666669, 0.05546666666666669, 0.05733333333333335,
      0.05920000000000003, 0.13013333333333332, 0.132, 0.1338666666666667, 0.2981333333333333,
      0.3, 0.3, 0.3, 0.3, 0.3]),
    ("optax.polynomial_schedule(0.3, 0.01, 3, 150)",
     Polynomial(0.3, 0.01, 150, power=3),
     [0.3, 0.2942385807407407, 0.26126519407407406, 0.20316930074074072, 0.1987792592592593,
      0.19445623999999997, 0.07475128592592592, 0.07264, 0.07057511407407405, 0.010000085925925927,
      0.01, 0.01, 0.01, 0.01, 0.01]),
    ("optax.warmup_cosine_decay_schedule(0.01, 0.3, 20, 200, 0.02)",
     Cosine(0.3, 200, warmup=20, end=0.02, start=0.01),
     [0.010000000000000009, 0.024500000000000022, 0.11149999999999999, 0.2855, 0.3,
      0.29997867732189476, 0.2688004346039759, 0.2672462220366569, 0.26565934123118806, 0.07189514525302278,
      0.07000973464388448, 0.020021322678105222, 0.02, 0.02, 0.02]),
    ("torch CosineAnnealingWarmRestarts(T_0=20, T_mult=2, eta_min=0.03), lr=0.3",
     Cosine(0.3, 20, end=0.03, cycles=5, steps_factor=2),
     [0.30000000000000004, 0.2983379259803436, 0.22628871746483883, 0.031662074019656414, 0.30000000000000004,
      0.2995838400539723, 0.030416159946027723, 0.30000000000000004, 0.29989591989249764, 0.2978975866921354,
      0.29740601285443613, 0.21910109246892404, 0.21666226336928715, 0.21420351748368519, 0.3]),
    ("optax.sgdr_schedule: 3 of init .01, peak .4 / 2**i, warmup 7 if i == 0, steps 20 * 2**i, end .02",
     Cosine(0.4, 20, warmup=7, end=0.02, start=0.01, cycles=3, steps_factor=2, eta_factor=0.5),
     [0.010000000000000009, 0.06571428571428573, 0.4, 0.025521054689050117, 0.2,
      0.19972256003598154, 0.020277439964018484, 0.1, 0.09996916144962892, 0.02,
      0.02, 0.02, 0.02, 0.02, 0.02]),
    ("optax.exponential_decay(0.3, 20, 0.5)",
     Exponential(0.3, 0.5, 20),
     [0.3, 0.28978089867745366, 0.23537522936902522, 0.15528973857620662, 0.15,
      0.14489044933872683, 0.03882243464405165, 0.0375, 0.036222612334681714, 0.0017157254249362795,
      0.0016572815184059707, 0.0003033002706566537, 0.00029296875, 0.0002829891588647007, 9.1552734375e-06]),
    ("optax.exponential_decay(0.3, 20, 0.5, staircase=True, end_value=0.002)",
     Exponential(0.3, 0.5, 20, end=0.002, staircase=True),
     [0.3, 0.3, 0.3, 0.3, 0.15, 0.15, 0.075, 0.0375, 0.0375, 0.00234375, 0.00234375,
      0.002, 0.002, 0.002, 0.002]),
    ("optax.piecewise_constant_schedule(0.3, {20: 0.5, 60: 0.1, 200: 2.0})",
     Step(0.3, (20, 60, 200), (0.5, 0.1, 2.0)),
     [0.3, 0.3, 0.3, 0.3, 0.15, 0.15, 0.15, 0.015, 0.015, 0.015, 0.015, 0.015, 0.03, 0.03, 0.03]),
    ("torch MultiStepLR([20, 60, 200], gamma=0.1), lr=0.3",
     Step(0.3, [20, 60, 200], [0.1] * 3),
     [0.3, 0.3, 0.3, 0.3, 0.03, 0.03, 0.03, 0.003, 0.003, 0.003, 0.003, 0.003, 0.0003, 0.0003, 0.0003]),
    ("optax.cosine_onecycle_schedule(200, 0.3)",
     OneCycle(0.3, 200),
     [0.01200000000000001, 0.012197346995341418, 0.021564418584403, 0.0775719789578361, 0.08400000000000002,
      0.09062536803750526, 0.29980265300465864, 0.3, 0.299962235392435, 0.08796707239012493,
      0.08491829946260977, 3.8964607564985906e-05, 1.2e-06, 1.2e-06, 1.2e-06]),
    ("torch OneCycleLR(0.3, total_steps=201), with its peak at 0.3 * 201 - 1 and its end at 200",
     OneCycle(0.3, 200, pct_start=(0.3 * 201 - 1) / 200),
     [0.01200000000000001, 0.012202032517786732, 0.02178894679154436, 0.07899559337687895,
      0.08554703825560514, 0.09229617465164738, 0.299981813202859, 0.2999816786143838,
      0.299891951989673, 0.08719048485049984, 0.08416492879222057, 3.8589790642875944e-05, 1.2e-06,
      1.2e-06, 1.2e-06]),
    ("the momentum of that torch OneCycleLR",
     OneCycle(0.85, 200, pct_start=(0.3 * 201 - 1) / 200, div_factor=0.85 / 0.95, final_div_factor=1),
     [0.95, 0.9499298498202129, 0.9466010601418249, 0.9267376411885837, 0.924462833939026,
      0.9221193838015113, 0.8500063148601184, 0.8500061071529673, 0.8500360161475069, 0.9209367887969886,
      0.9219453115171725, 0.9499875366865991, 0.95, 0.95, 0.95]),
    ("optax.join_schedules([linear(0, .3, 20), constant(.3), exponential(.3, 3, .9)], [20, 60])",
     Linear(0, 0.3, 20).then(Constant(0.3), after=20).then(Exponential(0.3, 0.9, 3), after=60),
     [0.0, 0.015000000000000013, 0.10499999999999998, 0.285, 0.3, 0.3, 0.3, 0.3, 0.2896468153816889,
      0.013171918495778678, 0.01271734748256487, 0.0022752241670376096, 0.0021967047808729994,
      0.0021208951470453167, 6.554235015851776e-05]),
    ("transformers.get_inverse_sqrt_schedule(num_warmup_steps=20), lr=0.3",
     InverseSqrt(0.3, 20),
     [0.0, 0.015, 0.105, 0.285, 0.3, 0.2927700218845599, 0.17466675292187459, 0.17320508075688776,
      0.17177950029416045, 0.10991149581709675, 0.10954451150103321, 0.09510639374223621, 0.09486832980505137,
      0.09463204468147675, 0.07745966692414832]),
    ("transformers.get_wsd_schedule(20, 50, 200, decay_type='linear', min_lr_ratio=0.1), lr=0.3",
     WarmupStableDecay(0.3, 200, 20, 50, end=0.03, start=0.03),
     [0.03, 0.043500000000000004, 0.1245, 0.2865, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.03540000000000001,
      0.03, 0.03, 0.03]),
    ("the same with decay_type='1-sqrt'",
     WarmupStableDecay(0.3, 200, 20, 50, end=0.03, start=0.03, power=0.5),
     [0.03, 0.043500000000000004, 0.1245, 0.2865, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.03271363671148502,
      0.03, 0.03, 0.03]),
]
# fmt: on


@pytest.mark.parametrize(("schedule", "expected"), [row[1:] for row in PEERS], ids=[row[0] for row in PEERS])
def test_it_has_the_values_of_the_peer(schedule: Any, expected: list[float]) -> None:
    assert [schedule(t) for t in CLOCKS] == pytest.approx(expected, rel=1e-12, abs=1e-16)


# -- a second formula ----------------------------------------------------------------------------------------

rates = st.floats(1e-5, 1.0)
steps = st.integers(1, 200)
clocks = st.integers(0, 500)


def same(value: Any, expected: float) -> bool:
    # 1e-13 of 1, the largest rate drawn: the fall ends in a difference of numbers of that size
    return math.isclose(float(value), expected, rel_tol=1e-12, abs_tol=1e-13)


@given(rates, rates, steps, clocks)
def test_linear_is_a_straight_line_and_then_flat(start: float, end: float, n: int, t: int) -> None:
    assert same(Linear(start, end, n)(t), start + (end - start) * t / n if t < n else end)


@given(rates, rates, steps, st.floats(0.1, 5), clocks)
def test_polynomial_is_a_power_of_the_time_left(start: float, end: float, n: int, p: float, t: int) -> None:
    assert same(Polynomial(start, end, n, p)(t), end + (start - end) * ((n - t) / n) ** p if t < n else end)


def sgdr(
    t: int, eta: float, n: int, warmup: int, end: float, start: float, cycles: int, m: float, f: float
) -> float:
    """Equation 5 of arXiv:1608.03983, cycle by cycle, with a warm-up at the beginning of the first."""
    if t < warmup:
        return start + (eta - start) * t / warmup
    done = warmup  # the updates of the cycle that are over before its cosine begins
    for i in range(cycles):
        if t < n:
            return end + 0.5 * (eta * f**i - end) * (1 + math.cos((t - done) / (n - done) * math.pi))
        t, n, done = t - n, math.floor(n * m + 0.5), 0
    return end


@given(
    clocks,
    rates,
    st.integers(10, 60),
    st.integers(0, 9),
    rates,
    rates,
    st.integers(1, 6),
    st.sampled_from([1.0, 1.1, 1.5, 2.0, 3.0]),
    st.floats(0.3, 1.5),
)
def test_cosine_is_that_of_sgdr(
    t: int, eta: float, n: int, warmup: int, end: float, start: float, cycles: int, m: float, f: float
) -> None:
    schedule = Cosine(eta, n, warmup, end, start, cycles, m, f)
    assert same(schedule(t), sgdr(t, eta, n, warmup, end, start, cycles, m, f))


@given(rates, st.floats(0.3, 1.01), steps, st.floats(0, 1e-5), st.booleans(), clocks)
def test_exponential_multiplies_every_steps(
    eta: float, factor: float, n: int, end: float, staircase: bool, t: int
) -> None:
    times = t // n if staircase else t / n
    expected = max(end, eta * math.exp(times * math.log(factor)))
    assert math.isclose(Exponential(eta, factor, n, end, staircase=staircase)(t), expected, rel_tol=1e-11)


@given(rates, st.dictionaries(st.integers(1, 400), st.floats(0.1, 3), min_size=1, max_size=5), clocks)
def test_step_multiplies_by_the_factors_of_the_boundaries_reached(
    eta: float, scales: dict[int, float], t: int
) -> None:
    boundaries = sorted(scales)
    schedule = Step(eta, boundaries, [scales[b] for b in boundaries])
    assert same(schedule(t), eta * math.prod(scales[b] for b in boundaries if b <= t))


@given(rates, steps, st.floats(0.05, 0.95), st.floats(1, 100), st.floats(1, 1e5), clocks)
def test_one_cycle_goes_up_and_down_on_half_cosines(
    eta: float, n: int, pct: float, div: float, final: float, t: int
) -> None:
    low, last, peak = eta / div, eta / div / final, pct * n
    if t < peak:
        expected = eta + (low - eta) / 2 * (1 + math.cos(math.pi * t / peak))
    elif t < n:
        expected = last + (eta - last) / 2 * (1 + math.cos(math.pi * (t - peak) / (n - peak)))
    else:
        expected = last
    assert same(OneCycle(eta, n, pct, div, final)(t), expected)


@given(st.integers(1, 4096), st.integers(1, 400), clocks)
def test_inverse_sqrt_is_that_of_the_transformer(d_model: int, warmup: int, t: int) -> None:
    # arXiv:1706.03762, equation 3, whose step_num is the clock here
    expected = d_model**-0.5 * min(t**-0.5, t * warmup**-1.5) if t else 0.0
    assert same(InverseSqrt((d_model * warmup) ** -0.5, warmup)(t), expected)


@given(
    rates,
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 50),
    rates,
    rates,
    st.sampled_from([0.5, 1.0, 2.0]),
    clocks,
)
def test_warmup_stable_decay_is_flat_between_warmup_and_decay(
    eta: float, warmup: int, stable: int, decay: int, end: float, start: float, power: float, t: int
) -> None:
    if t < warmup:
        expected = start + (eta - start) * t / warmup
    elif t < warmup + stable:
        expected = eta
    elif t < warmup + stable + decay:
        expected = eta - (eta - end) * ((t - warmup - stable) / decay) ** power
    else:
        expected = end
    schedule = WarmupStableDecay(eta, warmup + stable + decay, warmup, decay, end, start, power)
    assert same(schedule(t), expected)


def test_join_gives_each_schedule_a_clock_that_starts_at_0() -> None:
    schedule = Join((lambda clock: 100 + clock, lambda clock: 200 + clock, lambda clock: 300 + clock), (3, 5))
    assert [schedule(t) for t in range(8)] == [100, 101, 102, 200, 201, 300, 301, 302]


def test_join_may_hold_a_join() -> None:
    inner = Join((Constant(1.0), Constant(2.0)), (2,))
    assert [Join((Constant(0.0), inner), (3,))(t) for t in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_then_counts_from_the_start_of_the_first_schedule() -> None:
    a, b, c = Constant(1.0), Constant(2.0), Constant(3.0)
    assert a.then(b, after=2).then(c, after=4) == Join((a, b, c), (2, 4))


# -- what holds for every schedule ---------------------------------------------------------------------------

# schedule, clock of the end (None: it has none), its last value, and its numbers in the order of its fields
TABLE: list[tuple[Schedule, int | None, float, list[float]]] = [
    (Constant(0.1), 0, 0.1, [0.1]),
    (Linear(0.1, 0.01, 50), 50, 0.01, [0.1, 0.01, 50]),
    (Polynomial(0.1, 0.01, 50, 2.0), 50, 0.01, [0.1, 0.01, 50, 2]),
    (Cosine(0.1, 50), 50, 0.0, [0.1, 50, 0, 0, 0, 1, 1]),
    (Cosine(0.1, 50, 9, 0.02, 0.01, 3, 1.3, 0.7), 50 + 65 + 85, 0.02, [0.1, 50, 9, 0.02, 0.01, 1.3, 0.7]),
    (Exponential(0.1, 0.9), None, 0, [0.1, 0.9, 1, 0]),
    (Exponential(0.1, 0.5, 49, 0.02, staircase=True), 147, 0.02, [0.1, 0.5, 49, 0.02]),
    (Step(0.1, (5, 60), (0.5, 0.2)), 60, 0.01, [0.1, 5, 60, 0.5, 0.2]),
    (OneCycle(0.1, 80), 80, 0.1 / 25e4, [0.1, 80, 0.3, 25, 1e4]),
    (InverseSqrt(0.1, 10, 0.01), None, 0, [0.1, 10, 0.01]),
    (WarmupStableDecay(0.1, 100, 0, 30), 100, 0.0, [0.1, 100, 0, 30, 0, 0, 1]),
    (Scaled(Linear(0.1, 0.02, 50), 0.5), 50, 0.01, [0.1, 0.02, 50, 0.5]),
    (
        Join((Linear(0, 0.1, 10), Exponential(0.1, 2.0), Cosine(0.1, 30)), (10, 20)),
        50,
        0.0,
        [0, 0.1, 10, 0.1, 2, 1, 0, 0.1, 30, 0, 0, 0, 1, 1, 10, 20],
    ),
]


def every(*columns: str) -> Any:
    """The test runs for every row of the table, with these columns of it."""
    place = [("schedule", "stop", "last", "held").index(c) for c in columns]
    rows = [tuple(row[i] for i in place) for row in TABLE]
    names = [f"{type(row[0]).__name__}-{i}" for i, row in enumerate(TABLE)]
    return pytest.mark.parametrize(columns, rows, ids=names)


def test_every_class_has_a_row() -> None:
    classes = {v for v in vars(schedules).values() if isinstance(v, type) and issubclass(v, Schedule)}
    assert classes - {Schedule} == {type(row[0]) for row in TABLE}


@every("schedule")
def test_an_array_of_clocks_gives_the_value_of_each(schedule: Schedule) -> None:
    for dtype in (np.int64, np.int32):
        clock = np.arange(400, dtype=dtype).reshape(20, 20)
        curve = schedule(clock)
        assert curve.shape == clock.shape
        assert curve.dtype == np.float64
        one_by_one = [float(schedule(t)) for t in range(400)]
        np.testing.assert_allclose(curve.ravel(), one_by_one, rtol=1e-13, atol=1e-17)


@every("schedule", "stop", "last")
def test_the_last_value_is_held_for_ever(schedule: Schedule, stop: int | None, last: float) -> None:
    if stop is None:
        falling = schedule(np.array([10**3, 10**4, 10**6, 10**9]))
        assert (np.diff(falling) <= 0).all()
        assert falling[-1] >= last
    else:
        clock = np.array([stop, stop + 1, 2 * stop, 10**6, 10**9])
        np.testing.assert_allclose(schedule(clock), last, rtol=1e-13, atol=0)


@every("schedule")
def test_no_value_warns_or_is_infinite(schedule: Schedule) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(schedule(np.array([*range(300), 10**9]))).all()
        assert all(math.isfinite(schedule(t)) for t in (0, 1, 10, 300, 10**9))


def test_a_later_schedule_is_not_asked_about_the_time_before_it() -> None:
    schedule = Join((Constant(0.1), Exponential(0.1, 0.1)), (500,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 0.1 to the power -500 would overflow
        assert schedule(0) == schedule(499) == Constant(0.1)(0)


@every("schedule", "held")
def test_numbers_are_all_that_can_be_adjusted(schedule: Schedule, held: list[float]) -> None:
    assert numbers(schedule) == held


@every("schedule")
def test_lengths_are_whole_and_rates_are_floats(schedule: Schedule) -> None:
    lengths = {"steps", "warmup", "decay", "boundaries"}
    for path, value in walk(schedule):
        name = [part for part in path if isinstance(part, str)][-1]
        assert type(value) is (int if name in lengths else float), path


@every("schedule")
def test_what_it_prints_makes_it_again(schedule: Schedule) -> None:
    again = eval(repr(schedule), vars(schedules))  # noqa: S307 our own repr
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert repr(again) == repr(schedule)


def test_it_prints_its_fields() -> None:
    assert repr(Linear(0, 0.1, 10)) == "Linear(start=0.0, end=0.1, steps=10)"


class Symbol:
    """A scalar that is not known until the step runs: any question about its value is an error."""

    shape = ()
    dtype = "float64"

    def __init__(self, value: Any) -> None:
        self.value = value

    @staticmethod
    def __operation__(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> "Symbol":
        with np.errstate(all="raise", under="ignore"):
            known = [a.value if isinstance(a, Symbol) else a for a in args]
            return Symbol({"clip": np.clip}.get(name, getattr(np, name))(*known, **options))

    def __bool__(self) -> bool:
        raise AssertionError("a schedule branched on a number")

    __float__ = __int__ = __index__ = __hash__ = __iter__ = __bool__  # type: ignore[assignment]


def _teach(name: str, function: Any) -> None:
    def forward(self: Symbol, other: Any) -> Symbol:
        return Symbol(function(self.value, other.value if isinstance(other, Symbol) else other))

    def backward(self: Symbol, other: Any) -> Symbol:
        return Symbol(function(other, self.value))

    setattr(Symbol, f"__{name}__", forward)
    setattr(Symbol, f"__r{name}__", backward)


for _name in ("add", "sub", "mul", "truediv", "pow", "lt", "le", "gt", "ge"):
    _teach(_name, getattr(operator, f"__{_name}__"))


def traced(schedule: Schedule, values: list[float]) -> Any:
    return fill(schedule, iter([Symbol(v) for v in values]))


@every("schedule", "held")
def test_its_numbers_and_the_clock_may_be_symbols(schedule: Schedule, held: list[float]) -> None:
    for t in (0, 1, 9, 10, 49, 50, 51, 147, 399):
        assert traced(schedule, held)(Symbol(t)).value == schedule(t)


def test_a_schedule_of_symbols_passes_its_checks() -> None:
    s = Symbol(3)
    for schedule in (
        Linear(s, s, s),
        Polynomial(s, s, s, s),
        Cosine(s, s, s, s, s, 2, s, s),
        Exponential(s, s, s, s),
        Step(s, (s, s), (s, s)),
        OneCycle(s, s, s, s, s),
        InverseSqrt(s, s, s),
        WarmupStableDecay(s, s, s, s, s, s, s),
        Scaled(Constant(s), s),
        Join((Constant(s), Constant(s)), (s,)),
    ):
        assert all(n is s for n in numbers(schedule))


@every("schedule", "held")
def test_other_numbers_are_the_same_program(schedule: Schedule, held: list[float]) -> None:
    assert skeleton(fill(schedule, iter([x + 1 for x in held]))) == skeleton(schedule)


def test_cycles_and_staircase_are_structure() -> None:
    assert skeleton(Cosine(0.1, 10, cycles=2)) != skeleton(Cosine(0.1, 10))
    assert skeleton(Exponential(0.1, 0.9, 10, staircase=True)) != skeleton(Exponential(0.1, 0.9, 10))


def test_staircase_steps_exactly_on_the_multiples() -> None:
    for n in range(1, 300):
        edge = Exponential(1.0, 0.5, n, staircase=True)(np.array([n - 1, n, 3 * n - 1, 3 * n]))
        np.testing.assert_array_equal(edge, [1.0, 0.5, 0.25, 0.125])


# -- what is refused -----------------------------------------------------------------------------------------

WHOLE = "it takes whole numbers above 0 in rising order"
REFUSED = [
    (lambda: Linear(0.1, 0, 0), "Linear.steps is 0; it takes a number not below 1"),
    (lambda: Linear(0.1, 0, 2.5), "Linear.steps is 2.5; it takes a whole number"),
    (lambda: Linear("0.1", 0, 2), "Linear.start is '0.1'; it takes a real number, or a schedule of it"),
    (lambda: Polynomial(0.1, 0, 0), "Polynomial.steps is 0; it takes a number not below 1"),
    (lambda: Polynomial(0.1, 0, 9, 0), "Polynomial.power is 0.0; it takes a number above 0"),
    (lambda: Polynomial(0.1, 0, 9, math.nan), "Polynomial.power is nan; it takes a number"),
    (lambda: Cosine(0.1, 0), "Cosine.steps is 0; it takes a number not below 1"),
    (lambda: Cosine(0.1, 10, -1), "Cosine.warmup is -1; it takes a number not below 0"),
    (lambda: Cosine(0.1, 10, 10), "Cosine.warmup is 10; it takes a number below steps, which is 10"),
    (lambda: Cosine(0.1, 10, cycles=0), "Cosine.cycles is 0; it takes a whole number, not below 1"),
    (lambda: Cosine(0.1, 10, cycles=1.5), "Cosine.cycles is 1.5; it takes a whole number, not below 1"),
    (lambda: Cosine(0.1, 10, steps_factor=0.5), "Cosine.steps_factor is 0.5; it takes a number not below 1"),
    (lambda: Cosine(0.1, 10, eta_factor=0), "Cosine.eta_factor is 0.0; it takes a number above 0"),
    (lambda: Exponential(0.1, 0), "Exponential.factor is 0.0; it takes a number above 0"),
    (lambda: Exponential(0.1, 0.9, 0), "Exponential.steps is 0; it takes a number not below 1"),
    (
        lambda: Exponential(0.1, 0.9, end=0.2),
        "Exponential.end is 0.2; it takes a number not above eta, which is 0.1",
    ),
    (
        lambda: Step(0.1, (), ()),
        "Step.boundaries is (); it takes one clock at least, or write Constant",
    ),
    (lambda: Step(0.1, (5, 5), (1, 1)), f"Step.boundaries is (5, 5); {WHOLE}"),
    (lambda: Step(0.1, (0,), (1,)), f"Step.boundaries is (0,); {WHOLE}"),
    (lambda: Step(0.1, 5, 0.1), "Step.boundaries is 5; it takes a tuple of numbers"),
    (lambda: Step(0.1, (5.5,), (1,)), "Step.boundaries[0] is 5.5; it takes a whole number"),
    (
        lambda: Step(0.1, (5, 6), (1,)),
        "Step.factors is (1.0,); it takes one number per boundary, and there are 2",
    ),
    (
        lambda: Step(0.1, (5,), (Constant(1),)),
        (
            "Step.factors[0] is Constant(eta=1.0); it takes a number: "
            "to use two schedules write Join, or a function of the clock that calls both"
        ),
    ),
    (lambda: OneCycle(0.1, 0), "OneCycle.steps is 0; it takes a number not below 1"),
    (lambda: OneCycle(0.1, 9, 30), "OneCycle.pct_start is 30.0; it takes a number between 0 and 1"),
    (lambda: OneCycle(0.1, 9, div_factor=0), "OneCycle.div_factor is 0.0; it takes a number above 0"),
    (
        lambda: OneCycle(0.1, 9, final_div_factor=0),
        "OneCycle.final_div_factor is 0.0; it takes a number above 0",
    ),
    (lambda: InverseSqrt(0.1, 0), "InverseSqrt.warmup is 0; it takes a number not below 1"),
    (
        lambda: WarmupStableDecay(0.1, 9, -1, 3),
        "WarmupStableDecay.warmup is -1; it takes a number not below 0",
    ),
    (
        lambda: WarmupStableDecay(0.1, 9, 1, 0),
        "WarmupStableDecay.decay is 0; it takes a number not below 1",
    ),
    (
        lambda: WarmupStableDecay(0.1, 9, 7, 3),
        "WarmupStableDecay.steps is 9; it takes a number not below warmup + decay, which is 10",
    ),
    (
        lambda: WarmupStableDecay(0.1, 9, 1, 3, power=0),
        "WarmupStableDecay.power is 0.0; it takes a number above 0",
    ),
    (lambda: Join((), ()), "Join.schedules is (); it takes one schedule at least"),
    (
        lambda: Join((Constant(1), 0.1), (5,)),
        "Join.schedules[1] is 0.1; it takes a schedule, such as Constant(0.1)",
    ),
    (
        lambda: Join((Constant,), ()),
        (
            "Join.schedules[0] is <class 'optimisers.schedules.Constant'>; "
            "it takes a schedule, such as Constant(0.1)"
        ),
    ),
    (
        lambda: Join((Constant(1), Constant(2)), ()),
        (
            "Join.boundaries is (); it takes the clock at which each schedule after the first begins, "
            "and there are 1 of those"
        ),
    ),
    (lambda: Join((Constant(1),) * 3, (5, 4)), f"Join.boundaries is (5, 4); {WHOLE}"),
    (lambda: Constant(1).then(Constant(2), after=0), f"Join.boundaries is (0,); {WHOLE}"),
    (
        lambda: Cosine(Constant(1), 5),
        (
            "Cosine.eta is Constant(eta=1.0); it takes a number: "
            "to use two schedules write Join, or a function of the clock that calls both"
        ),
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[row[1] for row in REFUSED])
def test_the_error_says_what_was_there_and_what_is_accepted(make: Any, message: str) -> None:
    with pytest.raises(BadSetting) as caught:
        make()
    assert str(caught.value) == message


def test_a_schedule_without_a_call_says_so() -> None:
    class Flat(Schedule):
        eta: float = 0.1

    with pytest.raises(NotImplementedError, match=r"Flat has no __call__\(self, clock\)"):
        Flat()(0)


def test_a_schedule_of_the_user_is_a_value_too() -> None:
    class Wave(Schedule):
        eta: float = 1.0
        period: int = 10

        def __call__(self, clock: Any) -> Any:
            return self.eta * np.sin(clock / self.period)

    assert Wave(0.5).then(Constant(0), after=3)(2) == 0.5 * math.sin(0.2)
    assert numbers(Wave()) == [1, 10]
