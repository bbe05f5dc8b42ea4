"""Rules made of rules: masters, averages, skipped steps, decay beside the step, gradients of second order."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.table import dtype_of, numbers

ENGINES = ("interpret", "numba")
SMALL = ("float16", "bfloat16", "float32")

both_engines = pytest.mark.parametrize("engine", ENGINES)
both_updates = pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)
every_small_type = pytest.mark.parametrize("dtype", SMALL)

Step = Callable[..., Any]


def drawn(seed: int, shape: tuple[int, ...] = (3, 5), dtype: str = "float64") -> Any:
    return numbers(np.random.default_rng(seed), shape, dtype)


def walked(rule: Any, x: Any, gradients: Any, step: Step = opt.update, engine: str | None = None) -> Any:
    """(state, model) after a step for each gradient; an array given is not written."""
    x = x.copy() if isinstance(x, np.ndarray) else x
    state = opt.setup(rule, x, engine=engine)
    for g in gradients:
        state, x = step(state, x, g)
    return state, x


def bits(x: Any) -> bytes:
    return np.ascontiguousarray(x).tobytes()


# -- MixedPrecision ------------------------------------------------------------------------------------------


@every_small_type
@pytest.mark.parametrize("master", ["float32", "float64"])
@both_engines
@both_updates
def test_the_parameters_are_the_master_rounded(dtype: str, master: str, engine: str, step: Step) -> None:
    """111, 112, 113. The rule steps a wider copy, with its state in the type of the copy."""
    x = drawn(0, dtype=dtype)
    state = opt.setup(opt.MixedPrecision(opt.Adam(0.03), master), x, engine=engine)
    np.testing.assert_array_equal(state.state.master, x.astype(master))
    for n in range(6):
        state, x = step(state, x, drawn(1 + n, dtype=dtype))

        assert x.dtype == dtype_of(dtype)
        assert state.state.master.dtype == master
        assert state.state.inner.m.dtype == master
        assert state.state.inner.v.dtype == master
        assert bits(x) == bits(state.state.master.astype(dtype_of(dtype)))


@every_small_type
@pytest.mark.parametrize("master", ["float32", "float64"])
@pytest.mark.parametrize(
    "rule",
    [
        opt.Adam(0.03),
        opt.Chain(opt.WeightDecay(0.1), opt.Nesterov(0.03), opt.DecoupledDecay(0.01)),
        opt.Chain(opt.AccumGrad(2), opt.Momentum(0.03)),
    ],
    ids=["Adam", "chain", "accumulate"],
)
@both_engines
@both_updates
def test_the_master_goes_where_parameters_of_its_type_would_go(
    dtype: str, master: str, rule: opt.Rule, engine: str, step: Step
) -> None:
    x, gradients = drawn(0, dtype=dtype), [drawn(1 + n, dtype=dtype) for n in range(6)]
    state, _ = walked(opt.MixedPrecision(rule, master), x, gradients, step, engine)
    _, wanted = walked(rule, x.astype(master), [g.astype(master) for g in gradients], step, engine)
    rtol = 1e-6 if master == "float32" else 1e-13
    np.testing.assert_allclose(state.state.master, wanted, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("split", [False, True])
@both_engines
@both_updates
def test_steps_that_the_stored_type_rounds_away_add_up(
    dtype: str, split: bool, engine: str, step: Step
) -> None:
    if split and dtype != "bfloat16":
        dtype = "bfloat16"
    x, g = np.ones(3, dtype_of(dtype)), np.ones(3, dtype_of(dtype))
    _, alone = walked(opt.Descent(1e-4), x, [g] * 500, step, engine)
    _, mastered = walked(
        (opt.SplitPrecision if split else opt.MixedPrecision)(opt.Descent(1e-4)), x, [g] * 500, step, engine
    )
    np.testing.assert_array_equal(alone.astype(float), 1)
    np.testing.assert_allclose(mastered.astype(float), 0.95, rtol=2.0**-8)


@both_engines
@both_updates
def test_read_only_parameters_are_replaced_by_the_rounded_master(engine: str, step: Step) -> None:
    """114. The new parameters are the master in their type."""
    x = drawn(0, dtype="float16")
    x.flags.writeable = False
    before = x.copy()
    state = opt.setup(opt.MixedPrecision(opt.Momentum(0.1)), x, engine=engine)
    state, new = step(state, x, drawn(1, dtype="float16"))
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(new, state.state.master.astype(np.float16))

    assert new.dtype == np.float16


@pytest.mark.parametrize("change", [opt.adjust, opt.adjust_], ids=lambda f: f.__name__)
@both_engines
def test_adjust_reaches_the_rule_inside_and_keeps_the_type(change: Callable[..., Any], engine: str) -> None:
    """115. And the next step has the new rate."""
    x = np.ones(2, np.float16)
    state = opt.setup(opt.MixedPrecision(opt.Adam(1e-3), "float64"), x, engine=engine)
    state = change(state, 2e-3) or state

    assert state.rule == opt.MixedPrecision(opt.Adam(2e-3), "float64")
    state, _ = opt.update(state, x, np.ones(2, np.float16))
    np.testing.assert_allclose(state.state.master, 1 - 2e-3, rtol=1e-9)


@pytest.mark.parametrize("change", [opt.adjust, opt.adjust_], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda rule: opt.Chain(opt.ClipGrad(8.0), rule),
        lambda rule: opt.Chain(opt.ClipGrad(8.0), opt.Chain(rule)),
        lambda rule: opt.MixedPrecision(rule, "float64"),
        lambda rule: opt.MixedPrecision(opt.Chain(opt.ClipGrad(8.0), rule), "float64"),
        opt.EMA,
        opt.SkipNonFinite,
    ],
    ids=["chain", "chain in chain", "mixed precision", "chain in mixed precision", "average", "skip"],
)
@both_engines
def test_adjust_reaches_the_step_of_a_rule_inside_any_other(change: Any, wrap: Any, engine: str) -> None:
    """182. Steps of 0.5 and then of 0.25; wrapped for compilation, chains go on as before there."""
    x: Any = np.ones(2, np.float32)
    state = opt.setup(wrap(opt.Descent(0.5)), x, engine=engine)
    state, x = opt.update(state, x, np.ones(2, np.float32))
    np.testing.assert_array_equal(x, 0.5)
    state = change(state, 0.25) or state
    _, x = opt.update(state, x, np.ones(2, np.float32))
    np.testing.assert_array_equal(x, 0.25)


@both_engines
@both_updates
def test_mixed_precision_does_not_scale_gradients(engine: str, step: Step) -> None:
    """116. The smallest number of half precision moves the master by itself."""
    x, g = np.zeros(2, np.float16), np.array([2.0**-24, -60000], np.float16)
    state, _ = walked(opt.MixedPrecision(opt.Descent(1.0)), x, [g], step, engine)
    np.testing.assert_array_equal(state.state.master, -g.astype(np.float32))


def test_a_schedule_inside_mixed_precision_is_read() -> None:
    rule = opt.MixedPrecision(opt.Descent(lambda clock: 2.0**clock))
    state, _ = walked(rule, np.zeros(2, np.float16), [np.ones(2, np.float16)] * 4)
    np.testing.assert_array_equal(state.state.master, -15)


@pytest.mark.parametrize(
    ("wrapper", "name"),
    [(opt.MixedPrecision, "MixedPrecision"), (opt.EMA, "EMA")],
    ids=["MixedPrecision", "EMA"],
)
def test_a_wrapper_of_the_whole_chain_cannot_stand_in_a_chain(
    wrapper: Callable[..., opt.Rule], name: str
) -> None:
    """96. The error says what to write."""
    wanted = rf"Chain was given a {name} among other rules; .* write {name}\(Chain\(\.\.\.\)\)"
    for rules in (
        (opt.ClipGrad(), wrapper(opt.Adam())),
        (wrapper(opt.Adam()), opt.DecoupledDecay()),
    ):
        with pytest.raises(opt.BadSetting, match=wanted):
            opt.Chain(*rules)
    for inside in (opt.Chain(wrapper(opt.Adam())), opt.SkipNonFinite(wrapper(opt.Adam()))):
        with pytest.raises(opt.BadSetting, match=name):
            opt.Chain(opt.ClipGrad(), inside)


def test_a_wrapper_alone_in_a_chain_is_the_wrapper() -> None:
    x, g = np.ones(3, np.float16), np.full(3, 0.3, np.float16)
    rule = opt.MixedPrecision(opt.Momentum(0.01))
    _, alone = walked(rule, x, [g] * 5)
    _, chained = walked(opt.Chain(rule), x, [g] * 5)
    np.testing.assert_array_equal(chained, alone)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: opt.MixedPrecision("float32"), r"MixedPrecision\(Adam\(\)\)"),
        (lambda: opt.MixedPrecision("float64", opt.Descent()), r"MixedPrecision\(Descent\(.*\), 'float64'\)"),
        (lambda: opt.MixedPrecision(opt.Adam), r"MixedPrecision\(Adam\(\)\)"),
        (lambda: opt.MixedPrecision(opt.Adam(), "float16"), r"dtype is 'float16'.*'float32' or 'float64'"),
        (lambda: opt.SplitPrecision(opt.Adam), r"SplitPrecision\(Adam\(\)\)"),
        (lambda: opt.MixedPrecision(opt.SplitPrecision(opt.Adam())), "both keep masters; write one"),
    ],
    ids=["no rule", "the order of before", "a class", "a half master", "a class to split", "two masters"],
)
def test_mixed_precision_says_what_it_takes(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(opt.BadSetting, match=text):
        make()


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        (opt.MixedPrecision(opt.Adam()), "complex64"),
        (opt.MixedPrecision(opt.Adam()), "complex128"),
        (opt.MixedPrecision(opt.Adam()), "float64"),
        (opt.SplitPrecision(opt.Adam()), "float32"),
        (opt.SplitPrecision(opt.Adam()), "float16"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_a_master_that_could_not_hold_the_parameters_is_refused(rule: opt.Rule, dtype: str) -> None:
    with pytest.raises(opt.BadSetting, match=f"{type(rule).__name__} .*{dtype}"):
        opt.setup(rule, np.ones(3, dtype))


def test_mixed_precision_prints_as_it_is_written() -> None:
    for text in (
        "MixedPrecision(Descent(eta=0.1))",
        "MixedPrecision(Descent(eta=0.1), 'float64')",
        "SplitPrecision(Descent(eta=0.1))",
    ):
        assert repr(eval(text, vars(opt))) == text  # noqa: S307 it is the text above


@both_engines
@both_updates
def test_a_tie_in_half_precision_has_one_master(engine: str, step: Step) -> None:
    x = drawn(0, (2, 3), "float16")
    model = {"a": x, "b": x.T}
    rule = opt.MixedPrecision(opt.Momentum(0.1))
    state = opt.setup(rule, model, engine=engine)
    state, model = step(state, model, {"a": np.ones((2, 3), np.float16), "b": np.ones((3, 2), np.float16)})
    np.testing.assert_array_equal(model["a"], state.a.state.master.astype(np.float16))

    assert np.shares_memory(model["a"], model["b"])
    assert state.a is state.b


# -- a master split into the weight and its missing bits -----------------------------------------------------


def whole_master(x: Any, state: Any) -> Any:
    """The float32 master that a bfloat16 weight and its low bits make."""
    high = np.asarray(x).view(np.uint16).astype(np.uint32) << np.uint32(16)
    low = np.asarray(state.state.low).astype(np.int32).view(np.uint32)
    return (high + low).view(np.float32)


def halves_up(master: Any) -> Any:
    """The upper bits of float32 numbers, rounded to nearest with halves away from 0."""
    kept = (np.asarray(master).view(np.uint32).astype(np.uint64) + 0x8000) >> 16
    return kept.astype(np.uint16)


SPLIT_RULES = pytest.mark.parametrize(
    "rule",
    [opt.Adam(0.01), opt.Chain(opt.ClipNorm(1.0), opt.Momentum(1e-3)), opt.Lion(1e-3)],
    ids=["Adam", "chain", "Lion"],
)


@SPLIT_RULES
@both_engines
@both_updates
def test_a_split_master_is_the_float32_master_bit_for_bit(rule: opt.Rule, engine: str, step: Step) -> None:
    rng = np.random.default_rng(0)
    x = numbers(rng, (41,), "bfloat16")
    whole_x, split_x = x.copy(), x.copy()
    whole = opt.setup(opt.MixedPrecision(rule), whole_x, engine=engine)
    split = opt.setup(opt.SplitPrecision(rule), split_x, engine=engine)
    for n in range(200):
        g = (numbers(rng, (41,), "float64") * 10.0 ** rng.integers(-6, 3)).astype(x.dtype)
        whole, whole_x = step(whole, whole_x, g)
        split, split_x = step(split, split_x, g)

        assert bits(whole_master(split_x, split)) == bits(whole.state.master), n
        assert bits(split_x.view(np.uint16)) == bits(halves_up(whole.state.master)), n
    assert split.state.low.dtype == np.int16


@both_engines
@both_updates
def test_a_split_master_keeps_halves_exactly(engine: str, step: Step) -> None:
    """1 + 2^-8 lies midway between two bfloat16 numbers; so do the others."""
    half = 2.0**-8
    starts = np.array([1, -1, 1, -1, 2, 0.5, 1]).astype(dtype_of("bfloat16"))
    moves = np.array([half, -half, 3 * half, -3 * half, 2 * half, half / 2, -half / 2]).astype(starts.dtype)
    rule = opt.SplitPrecision(opt.Descent(1.0))
    state = opt.setup(rule, starts.copy(), engine=engine)
    exact = starts.astype(float) + moves.astype(float)
    state, x = step(state, starts.copy(), -moves)
    np.testing.assert_array_equal(whole_master(x, state), exact)
    up = np.array([1 + 2 * half, -1 - 2 * half, 1 + 4 * half, -1 - 4 * half, 2 + 4 * half, 0.5 + half, 1])
    np.testing.assert_array_equal(x.astype(float), up)
    state, x = step(state, x, np.zeros_like(x))
    np.testing.assert_array_equal(whole_master(x, state), exact)
    state, x = step(state, x, moves)
    np.testing.assert_array_equal(x.astype(float), starts.astype(float))
    np.testing.assert_array_equal(state.state.low, 0)


@both_engines
@both_updates
def test_a_split_master_holds_infinity_nan_and_the_largest_numbers(engine: str, step: Step) -> None:
    b = dtype_of("bfloat16")
    largest = float(np.finfo(np.float32).max)
    top = np.array(0x7F7F, np.uint16).view(b)  # the largest finite bfloat16
    x = np.array([1, 1, 1, 1, 0, 1], b)
    x[4] = top
    gradients = [
        np.array([np.inf, -np.inf, np.nan, 1, 0, -1], b),
        np.array([1, 1, 1, 1, -(2.0**119), np.inf], b),
        np.array([1, 1, 1, 1, -(2.0**118), -np.inf], b),
    ]
    whole_x, split_x = x.copy(), x.copy()
    whole = opt.setup(opt.MixedPrecision(opt.Descent(1.0)), whole_x, engine=engine)
    split = opt.setup(opt.SplitPrecision(opt.Descent(1.0)), split_x, engine=engine)
    for g in gradients:
        whole, whole_x = step(whole, whole_x, g)
        split, split_x = step(split, split_x, g)
        joined = whole_master(split_x, split)
        np.testing.assert_array_equal(joined, whole.state.master)
    finite = np.isfinite(whole.state.master)

    assert bits(joined[finite]) == bits(whole.state.master[finite])
    assert np.isnan(split_x.astype(float)).tolist() == [False, False, True, False, False, True]
    assert split_x[0] == -np.inf
    assert split_x[1] == np.inf
    assert float(joined[4]) <= largest


@both_engines
def test_a_nan_of_any_bits_stays_one_in_a_split_master(engine: str) -> None:
    """Adding a half to the bits of 0x7FFFFFFF would carry into the sign and give -0."""
    b = dtype_of("bfloat16")
    nans = np.array([0x7FC0, 0x7FFF, 0xFFC0, 0xFFFF, 0x7F81, 0xFFBF], np.uint16).view(b)
    state, x = walked(
        opt.SplitPrecision(opt.Descent(1.0)), np.zeros(6, b), [nans, np.ones(6, b)], engine=engine
    )

    assert np.isnan(x.astype(float)).all()
    assert np.isnan(whole_master(x, state)).all()


@pytest.mark.parametrize("value", [0x7FFFFFFF, 0x7FFF8000, 0xFFFFFFFF, 0x7F800001])
def test_high_and_low_bits_of_a_nan_are_a_nan(value: int) -> None:
    nan = np.array([value], np.uint32).view(np.float32)
    high, low = opt.ops.high_bits(nan), opt.ops.low_bits(nan)

    assert np.isnan(np.asarray(high).astype(np.float32)).all()
    assert np.isnan(opt.ops.join_bits(high, low)).all()


def test_high_and_low_bits_hold_every_float32() -> None:
    """Every upper half with lower halves at and beside the places where rounding turns."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper | np.uint32(lower)).view(np.float32)
        back = np.asarray(opt.ops.join_bits(opt.ops.high_bits(x), opt.ops.low_bits(x)))
        number = ~np.isnan(x)

        assert bits(back[number]) == bits(x[number])
        assert np.isnan(back[~number]).all()


def test_a_split_master_moves_26_bytes_per_parameter() -> None:
    """Adam: 2 of weight, 2 of low bits, 4 and 4 of moments, all read and written, and 2 of gradient."""
    x = np.ones(1000, dtype_of("bfloat16"))
    (split,) = opt.explain(opt.setup(opt.SplitPrecision(opt.Adam()), x)).groups
    (whole,) = opt.explain(opt.setup(opt.MixedPrecision(opt.Adam()), x)).groups

    assert (split.engine, split.passes, split.bytes_per_parameter) == ("numba", 1, 26)
    assert split.state_bytes == 10_000
    assert (whole.engine, whole.passes, whole.state_bytes) == ("numba", 1, 12_000)


# -- EMA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex128"])
@both_engines
@both_updates
def test_an_average_is_the_one_written_by_hand(dtype: str, engine: str, step: Step) -> None:
    rho = 0.75
    x = drawn(0, dtype=dtype)
    wide = {"float16": "float32", "bfloat16": "float32"}.get(dtype, dtype)
    rule = opt.Momentum(0.1)
    plain_x, by_hand = x.copy(), x.astype(wide)
    state, plain = opt.setup(opt.EMA(rule, rho), x, engine=engine), opt.setup(rule, plain_x, engine=engine)
    np.testing.assert_array_equal(opt.averaged(state, x), x)
    for n in range(6):
        g = drawn(1 + n, dtype=dtype)
        state, x = step(state, x, g)
        plain, plain_x = step(plain, plain_x, g)

        assert bits(x) == bits(plain_x)
        by_hand = rho * by_hand + (1 - rho) * x.astype(wide)
        rtol = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-6}.get(dtype, 1e-13)
        np.testing.assert_allclose(state.state.average, by_hand, rtol=rtol, atol=rtol)

        assert state.state.average.dtype == wide
    average = opt.averaged(state, x)

    assert average.dtype == x.dtype
    assert bits(average) == bits(state.state.average.astype(x.dtype))


def test_the_averaged_model_keeps_ties_types_and_all_that_does_not_train() -> None:
    x = drawn(0, (2, 3))
    model = {
        "w": x,
        "again": x,
        "turned": x.T,
        "half": drawn(1, (4,), "float16"),
        "count": np.arange(3),
        "name": "net",
        "act": np.tanh,
    }
    state = opt.setup(opt.EMA(opt.Momentum(0.1), 0.5), model)
    for n in range(3):
        grads = {"w": drawn(2 + n, (2, 3)), "turned": drawn(9 + n, (3, 2)), "half": np.ones(4, np.float16)}
        state, model = opt.update(state, model, grads | dict.fromkeys(("again", "count", "name", "act")))
    before = {k: np.copy(model[k]) for k in ("w", "half")}
    average = opt.averaged(state, model)
    np.testing.assert_array_equal(average["w"], state.w.state.average)
    np.testing.assert_array_equal(average["turned"], state.w.state.average.T)
    np.testing.assert_array_equal(model["w"], before["w"])
    np.testing.assert_array_equal(model["half"], before["half"])

    assert average["again"] is average["w"]
    assert np.shares_memory(average["turned"], average["w"])
    assert average["half"].dtype == np.float16
    assert average["count"] is model["count"]
    assert (average["name"], average["act"]) == ("net", np.tanh)
    assert list(average) == list(model)
    assert not np.shares_memory(average["w"], model["w"])


def test_the_averaged_model_is_its_own() -> None:
    state, x = walked(opt.EMA(opt.Descent(0.1), 0.5), np.ones(3), [np.ones(3)] * 2)
    opt.averaged(state, x)[...] = 99
    np.testing.assert_allclose(opt.averaged(state, x), 0.5 * (0.5 * 1 + 0.5 * 0.9) + 0.5 * 0.8)


def test_parameters_without_average_are_shared_with_the_averaged_model() -> None:
    model = {"a": np.ones(2), "b": np.ones(2), "c": {"d": np.ones(2)}}
    state = opt.setup({"a": opt.EMA(opt.Descent(0.1), 0.5), "b": opt.Descent(0.1), "**": None}, model)
    state, model = opt.update(state, model, {"a": np.ones(2), "b": np.ones(2), "c": None})
    average = opt.averaged(state, model)
    np.testing.assert_allclose(average["a"], 0.95)

    assert average["b"] is model["b"]
    assert average["c"]["d"] is model["c"]["d"]


def test_the_averages_of_a_part_of_the_state_are_those_of_that_part() -> None:
    model = {"a": {"x": np.ones(2)}, "b": np.ones(2)}
    state = opt.setup(opt.EMA(opt.Descent(0.1), 0.5), model)
    state, model = opt.update(state, model, {"a": {"x": np.ones(2)}, "b": np.ones(2)})
    np.testing.assert_allclose(opt.averaged(state.a, model["a"])["x"], 0.95)
    np.testing.assert_allclose(opt.averaged(state.b, model["b"]), 0.95)


def test_there_is_no_averaged_model_without_an_average() -> None:
    state = opt.setup(opt.Adam(), np.ones(2))
    with pytest.raises(opt.NoMatch, match=r"setup\(EMA\(rule\), model\)"):
        opt.averaged(state, np.ones(2))


@both_engines
@both_updates
def test_an_average_moves_only_where_a_step_is_taken(engine: str, step: Step) -> None:
    rule = opt.EMA(opt.Chain(opt.AccumGrad(3), opt.Descent(1.0)), 0.5)
    x, wanted = np.zeros(2), 0.0
    state = opt.setup(rule, x, engine=engine)
    for n in range(1, 10):
        state, x = step(state, x, np.ones(2))
        if n % 3 == 0:
            wanted = 0.5 * wanted + 0.5 * (-n // 3)
        np.testing.assert_allclose(state.state.average, wanted)
        np.testing.assert_allclose(x, -(n // 3))


@both_engines
@both_updates
def test_an_average_rests_where_there_is_no_gradient(engine: str, step: Step) -> None:
    model = {"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2)}
    state = opt.setup(opt.EMA(opt.Momentum(1.0, 0.9), 0.5), model, engine=engine)
    ones = {k: np.ones(2) for k in "abc"}
    state, model = step(state, model, ones)
    opt.freeze_(state.c)
    state, model = step(state, model, ones | {"b": None})
    np.testing.assert_allclose(state.a.state.average, 0.5 * -0.5 + 0.5 * -2.9)
    np.testing.assert_allclose(state.b.state.average, -0.5)
    np.testing.assert_allclose(state.c.state.average, -0.5)


@pytest.mark.parametrize("split", [False, True])
@both_engines
@both_updates
def test_an_average_over_mixed_precision_is_that_of_the_masters(split: bool, engine: str, step: Step) -> None:
    """Steps of 1e-4 do not move bfloat16 weights near 1 one by one, but their average moves."""
    b = dtype_of("bfloat16")
    x = np.array([1, -1, 3], b)
    rule = opt.EMA((opt.SplitPrecision if split else opt.MixedPrecision)(opt.Descent(1e-4)), 0.9)
    state, by_hand = opt.setup(rule, x, engine=engine), x.astype(np.float64)
    for _ in range(50):
        state, x = step(state, x, np.ones(3, b))
        inner = state.state.inner
        master = (
            (
                (x.view(np.uint16).astype(np.uint32) << np.uint32(16))
                + inner.low.astype(np.int32).view(np.uint32)
            ).view(np.float32)
            if split
            else inner.master
        )
        by_hand = 0.9 * by_hand + 0.1 * master.astype(np.float64)
    np.testing.assert_allclose(state.state.average, by_hand, rtol=1e-6)

    assert opt.averaged(state, x).dtype == b
    assert bits(opt.averaged(state, x)) == bits(state.state.average.astype(b))


@pytest.mark.parametrize(
    "rule",
    [
        opt.SkipNonFinite(opt.EMA(opt.Descent(0.1), 0.5)),
        opt.Chain(opt.EMA(opt.Descent(0.1), 0.5)),
        opt.MixedPrecision(opt.EMA(opt.Descent(0.1), 0.5)),
        opt.EMA(opt.SkipNonFinite(opt.Descent(0.1)), 0.5),
    ],
    ids=repr,
)
def test_an_average_is_found_wherever_it_is_kept(rule: opt.Rule) -> None:
    state, x = walked(rule, np.ones(3, np.float32), [np.ones(3, np.float32)] * 2)
    np.testing.assert_allclose(opt.averaged(state, x), 0.5 * (0.5 * 1 + 0.5 * 0.9) + 0.5 * 0.8, rtol=1e-6)


def test_adjust_reaches_the_average_and_the_rule_that_it_wraps() -> None:
    state = opt.setup(opt.EMA(opt.Descent(0.1), 0.5), x := np.ones(2))
    opt.adjust_(state, eta=0.2, rho=0.25)
    state, _ = opt.update(state, x, np.ones(2))
    np.testing.assert_allclose(state.state.average, 0.25 * 1 + 0.75 * 0.8)

    assert state.rule == opt.EMA(opt.Descent(0.2), 0.25)


# -- SkipNonFinite -------------------------------------------------------------------------------------------


def several() -> dict[str, Any]:
    """A model of several groups: three types and three rules."""
    return {
        "a": np.ones(3, np.float32),
        "b": np.ones((2, 2)),
        "c": np.ones(2, np.complex128),
        "d": np.ones(4, np.float16),
        "e": np.ones(5, np.float32),
    }


SKIPPING = {
    "a": opt.SkipNonFinite(opt.Adam(0.1)),
    "b": opt.SkipNonFinite(opt.Momentum(0.1)),
    "**": opt.SkipNonFinite(opt.Chain(opt.ClipNorm(1.0), opt.AdamW(0.1, lam=0.1))),
}


def inner_numbers(state: Any) -> list[Any]:
    """The state of every rule inside, as bytes."""

    def below(value: Any) -> list[Any]:
        return [b for v in value for b in below(v)] if isinstance(value, tuple) else [bits(value)]

    return [below(state[k].state.inner) for k in "abcde"]


@pytest.mark.parametrize(
    ("bad", "where", "engine", "step"),
    [
        pytest.param(bad, where, *way, id=f"{bad}-{where}-{way[0]}-{way[1].__name__}")
        for i, bad in enumerate((np.nan, np.inf, -np.inf))
        for j, where in enumerate("abcde")
        for way in [[*itertools.product(ENGINES, (opt.update, opt.update_))][(i + j) % 4]]
    ],
)
def test_one_bad_element_anywhere_stops_every_leaf(bad: float, where: str, engine: str, step: Step) -> None:
    model, good = several(), several()
    state = opt.setup(SKIPPING, model, engine=engine)
    state, model = step(state, model, good)
    numbers_before, before = inner_numbers(state), [bits(x) for x in model.values()]
    spoilt = several()
    spoilt[where].flat[-1] = bad
    state, model = step(state, model, spoilt)

    assert [bits(x) for x in model.values()] == before
    assert inner_numbers(state) == numbers_before
    assert [state[k].state.skipped for k in "abcde"] == [1] * 5


@both_engines
@both_updates
def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been(engine: str, step: Step) -> None:
    good = several()
    state, model = opt.setup(SKIPPING, several(), engine=engine), several()
    for _ in range(4):
        state, model = step(state, model, good)
    skipping, other = opt.setup(SKIPPING, several(), engine=engine), several()
    for n in range(4):
        for _ in range(n):
            skipping, other = step(skipping, other, good | {"b": np.full((2, 2), np.nan)})
        skipping, other = step(skipping, other, good)

    assert [bits(x) for x in other.values()] == [bits(x) for x in model.values()]
    assert inner_numbers(skipping) == inner_numbers(state)
    assert [skipping[k].state.skipped for k in "abcde"] == [6] * 5
    assert [state[k].state.skipped for k in "abcde"] == [0] * 5


@both_engines
@both_updates
def test_without_bad_gradients_skipping_changes_no_bit(engine: str, step: Step) -> None:
    rule = opt.Chain(opt.ClipGrad(0.5), opt.Adam(0.1))
    gradients = [drawn(1 + n) for n in range(5)]
    _, plain = walked(rule, drawn(0), gradients, step, engine)
    _, skipping = walked(opt.SkipNonFinite(rule), drawn(0), gradients, step, engine)
    np.testing.assert_allclose(skipping, plain, rtol=1e-14)


@both_engines
@both_updates
def test_only_gradients_of_leaves_that_skip_and_step_count(engine: str, step: Step) -> None:
    model = {k: np.ones(2) for k in "abcd"}
    bad, ones = np.array([1, np.nan]), np.ones(2)
    rules = {"a": opt.Descent(1.0), "**": opt.SkipNonFinite(opt.Descent(1.0))}
    state = opt.setup(rules, model, engine=engine)
    opt.freeze_(state.b)
    state, model = step(state, model, {"a": bad, "b": bad, "c": None, "d": ones})
    np.testing.assert_array_equal(model["a"], [0, np.nan])
    np.testing.assert_array_equal(model["b"], 1)
    np.testing.assert_array_equal(model["c"], 1)
    np.testing.assert_array_equal(model["d"], 0)
    state, model = step(state, model, {"a": ones, "b": ones, "c": bad, "d": ones})
    np.testing.assert_array_equal(model["a"], [-1, np.nan])
    np.testing.assert_array_equal(model["d"], 0)

    assert [state[k].state.skipped for k in "bcd"] == [0, 1, 1]


@both_engines
@both_updates
def test_a_skipped_gradient_is_not_accumulated(engine: str, step: Step) -> None:
    rule = opt.SkipNonFinite(opt.Chain(opt.AccumGrad(2), opt.Descent(1.0)))
    state, x = opt.setup(rule, np.zeros(1), engine=engine), np.zeros(1)
    seen = []
    for g in (1.0, np.nan, 3.0, np.inf, 5.0, 7.0):
        state, x = step(state, x, np.array([g]))
        seen.append(float(x[0]))

    assert seen == [0, 0, -2, -2, -2, -8]
    assert state.state.skipped == 2
    assert state.state.inner[0].taken == 0


@both_engines
@both_updates
def test_a_bad_mean_behind_an_accumulation_is_skipped_whole(engine: str, step: Step) -> None:
    rule = opt.Chain(opt.AccumGrad(2), opt.SkipNonFinite(opt.Descent(1.0)))
    model = {"a": np.zeros(1), "b": np.zeros(1)}
    state = opt.setup(rule, model, engine=engine)
    seen = []
    for g in (1.0, np.nan, 3.0, 5.0):
        state, model = step(state, model, {"a": np.ones(1), "b": np.array([g])})
        seen.append((float(model["a"][0]), float(model["b"][0])))

    assert seen == [(0, 0), (0, 0), (0, 0), (-1, -4)]
    assert [state[k].state[1].skipped for k in "ab"] == [1, 1]


@both_engines
@both_updates
def test_the_checks_of_rules_inside_do_not_see_what_is_skipped(engine: str, step: Step) -> None:
    rule = opt.SkipNonFinite(opt.Chain(opt.ClipNorm(1.0), opt.ClipGlobalNorm(1.0), opt.Descent()))
    state, x = walked(rule, np.ones(2), [np.array([np.nan, 1])], step, engine)
    np.testing.assert_array_equal(x, 1)

    assert state.state.skipped == 1


@both_engines
def test_large_finite_gradients_are_not_skipped(engine: str) -> None:
    x = np.ones(3, np.float16)
    top = np.full(3, 60000, np.float16)
    model = {"a": x, "b": x}  # their sum is beyond float16, not beyond the arithmetic
    state = opt.setup(opt.SkipNonFinite(opt.Descent(1e-5)), model, engine=engine)
    state, new = opt.update(state, model, {"a": top, "b": top.copy()})

    assert state.a.state.skipped == 0
    assert (new["a"] < 1).all()
    state, _ = walked(opt.SkipNonFinite(opt.Descent(0.0)), np.ones(2), [np.full(2, 1.7e308)], engine=engine)

    assert state.state.skipped == 0


@both_engines
@both_updates
def test_one_bad_element_among_millions_is_found(engine: str, step: Step) -> None:
    x, g = np.zeros(1_000_003, np.float32), np.zeros(1_000_003, np.float32)
    g[700_001] = np.nan
    state, new = walked(opt.SkipNonFinite(opt.Descent()), x, [g], step, engine)

    assert state.state.skipped == 1
    assert (new == 0).all()


# -- DecoupledDecay ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("couple", [True, False])
@both_engines
@both_updates
def test_decay_behind_adam_is_adamw(couple: bool, engine: str, step: Step) -> None:
    x, gradients = drawn(0), [drawn(1 + n) for n in range(10)]
    eta, lam = 0.05, 0.2
    whole = opt.AdamW(eta, lam=lam, couple=couple)
    apart = opt.Chain(opt.Adam(eta), opt.DecoupledDecay(eta * lam if couple else lam))
    _, wanted = walked(whole, x, gradients, step, engine)
    _, got = walked(apart, x, gradients, step, engine)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


@both_engines
@both_updates
def test_decay_behind_momentum_does_not_enter_the_velocity(engine: str, step: Step) -> None:
    rule = opt.Chain(opt.Momentum(0.1, 0.9), opt.DecoupledDecay(0.01))
    x, v = np.array([2.0, -3.0]), np.zeros(2)
    state, by_hand = opt.setup(rule, x, engine=engine), x.copy()
    for n in range(5):
        g = drawn(n, (2,))
        state, x = step(state, x, g)
        v = 0.9 * v + 0.1 * g
        by_hand = by_hand - v - 0.01 * by_hand
        np.testing.assert_allclose(state.state[0].v, v, rtol=1e-13)
        np.testing.assert_allclose(x, by_hand, rtol=1e-13)


@both_updates
def test_a_zero_gradient_decays_and_a_missing_one_does_not(step: Step) -> None:
    rule = opt.Chain(opt.Momentum(0.1), opt.DecoupledDecay(0.25))
    model = {"a": np.ones(2), "b": np.ones(2)}
    state = opt.setup(rule, model)
    _, model = step(state, model, {"a": np.zeros(2), "b": None})
    np.testing.assert_array_equal(model["a"], 0.75)
    np.testing.assert_array_equal(model["b"], 1)


@pytest.mark.parametrize("split", [False, True])
@both_engines
def test_decay_inside_mixed_precision_decays_the_master(split: bool, engine: str) -> None:
    b = dtype_of("bfloat16")
    rule = (opt.SplitPrecision if split else opt.MixedPrecision)(
        opt.Chain(opt.Descent(), opt.DecoupledDecay(1e-4))
    )
    _, x = walked(rule, np.ones(2, b), [np.zeros(2, b)] * 1000, opt.update_, engine)
    np.testing.assert_allclose(x.astype(float), (1 - 1e-4) ** 1000, rtol=2.0**-8)


# -- gradients of second order -------------------------------------------------------------------------------


class Curved(opt.Rule):
    """Steps along both gradients; its state says how often, and what it saw last."""

    a: float = 0.25
    b: float = 0.5

    def init(self, x: Any) -> Any:
        return opt.ops.ones_like(x), opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any, dx2: Any) -> Any:
        return (state[0] + 1, state[1] + 1), self.a * dx + self.b * dx2


class Willing(opt.Rule):
    """Uses a second gradient where there is one."""

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any, dx2: Any = None) -> Any:
        return state, dx if dx2 is None else dx / dx2


class Agreeing(opt.Rule):
    """Raises where its two gradients differ."""

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any, dx2: Any) -> Any:
        opt.ops.check(opt.ops.sum(opt.abs2(dx - dx2)) == 0, "the gradients differ")
        return state, dx


G, G2 = {"p": np.array([1.0, 2.0]), "q": [np.ones(3)]}, {"p": np.array([4.0, 8.0]), "q": [np.full(3, 2.0)]}


def two_arrays() -> dict[str, Any]:
    return {"p": np.ones(2), "q": [np.zeros(3)]}


@both_engines
@both_updates
def test_a_rule_of_second_order_gets_both_gradients(engine: str, step: Step) -> None:
    """52. On every leaf."""
    model = two_arrays()
    state = opt.setup(Curved(), model, engine=engine)
    for n in range(1, 4):
        state, model = step(state, model, G, G2)
        np.testing.assert_allclose(model["p"], 1 - n * (0.25 * G["p"] + 0.5 * G2["p"]))
        np.testing.assert_allclose(model["q"][0], -n * (0.25 + 0.5 * 2))
        np.testing.assert_array_equal(state.p.state[0], 1 + n)
        np.testing.assert_array_equal(state.p.state[1], n)


@both_engines
@both_updates
def test_rules_of_first_order_ignore_further_gradients(engine: str, step: Step) -> None:
    """48. To the last bit."""
    rule = opt.Chain(opt.ClipNorm(1.0), opt.Adam(0.1))
    plain, model = two_arrays(), two_arrays()
    state, other = opt.setup(rule, model, engine=engine), opt.setup(rule, plain, engine=engine)
    for _ in range(3):
        state, model = step(state, model, G, G2, G2)
        other, plain = step(other, plain, G)

    assert bits(model["p"]) == bits(plain["p"])
    assert bits(model["q"][0]) == bits(plain["q"][0])


@both_engines
@both_updates
def test_a_missing_second_gradient_is_asked_for(engine: str, step: Step) -> None:
    """49. Also of a rule inside others."""
    model = two_arrays()
    for rule in (Curved(), opt.Chain(opt.Descent(), Curved()), opt.EMA(Curved())):
        state = opt.setup(rule, model, engine=engine)
        with pytest.raises(opt.TraceError, match=r"Curved takes 2 gradients, and 1 came; .*grads2\)"):
            step(state, model, G)


@both_engines
@both_updates
def test_a_rule_that_refuses_the_gradients_is_heard(engine: str, step: Step) -> None:
    """50. Where the gradients differ, nothing is stepped."""
    model = two_arrays()
    state = opt.setup(Agreeing(), model, engine=engine)
    with pytest.raises(opt.DomainError, match=r"the gradients differ.*grads\['p'\]"):
        step(state, model, G, G2)
    np.testing.assert_array_equal(model["p"], 1)
    _, model = step(state, model, G, G)
    np.testing.assert_array_equal(model["p"], 1 - G["p"])


@both_engines
@both_updates
def test_rules_of_both_orders_go_in_one_chain(engine: str, step: Step) -> None:
    """51. Rules of first order change the first gradient alone; the second one passes them by."""
    model = two_arrays()
    rule = opt.Chain(opt.Descent(0.1), Curved(), opt.Descent(10.0))
    _, model = step(opt.setup(rule, model, engine=engine), model, G, G2)
    np.testing.assert_allclose(model["p"], 1 - 10 * (0.25 * 0.1 * G["p"] + 0.5 * G2["p"]))


@both_engines
@both_updates
@pytest.mark.parametrize(
    "wrapped",
    [
        opt.EMA(Curved(), 0.5),
        opt.SkipNonFinite(Curved()),
        opt.MixedPrecision(Curved(), "float64"),
        opt.Chain(opt.Chain(Curved())),
    ],
    ids=lambda r: type(r).__name__,
)
def test_further_gradients_reach_the_rule_inside_another(wrapped: opt.Rule, engine: str, step: Step) -> None:
    _, plain = step(opt.setup(Curved(), two_arrays(), engine=engine), two_arrays(), G, G2)
    _, model = step(opt.setup(wrapped, two_arrays(), engine=engine), two_arrays(), G, G2)
    np.testing.assert_allclose(model["p"], plain["p"], rtol=1e-14)
    np.testing.assert_allclose(model["q"][0], plain["q"][0], rtol=1e-14)


@both_engines
@both_updates
def test_a_second_gradient_may_be_optional(engine: str, step: Step) -> None:
    model = two_arrays()
    state = opt.setup(Willing(), model, engine=engine)
    _, once = step(state, two_arrays(), G)
    _, twice = step(opt.setup(Willing(), two_arrays(), engine=engine), two_arrays(), G, G2)
    np.testing.assert_array_equal(once["p"], 1 - G["p"])
    np.testing.assert_array_equal(twice["p"], 1 - G["p"] / G2["p"])


class Estimating(opt.Rule):
    """Divides by the mean of the second gradients that came."""

    def init(self, x: Any) -> Any:
        return {"mean": opt.zeros_like(x), "seen": 0}

    def apply(self, state: Any, x: Any, dx: Any, dx2: Any = None) -> Any:
        mean, seen = state["mean"], state["seen"]
        if dx2 is not None:
            seen = seen + 1
            mean = mean + (dx2 - mean) / seen
        return {"mean": mean, "seen": seen}, dx / (1 + mean)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@both_updates
def test_a_second_gradient_that_is_none_is_no_new_estimate(library: str, step: Step) -> None:
    """In whole, by its place, and left out: the state stays as it was there."""
    module = pytest.importorskip({"jax": "jax.numpy"}.get(library, library))
    made = module.tensor if library == "torch" else module.asarray

    def tree(p: float, q: float | None) -> Any:
        one = made(np.full(3, q, np.float32)) if q is not None else None
        return {"p": made(np.full(2, p, np.float32)), "q": [one]}

    model = tree(0.0, 0.0)
    state = opt.setup(Estimating(), model)
    seen = [tree(3.0, 1.0), None, tree(5.0, None), None]
    wanted = ((0, 0), (-0.25, -0.5), (-0.5, -1.0), (-0.7, -1.5), (-0.9, -2.0))
    for t, second in enumerate(seen):
        more = () if t == 3 else (second,)
        state, model = step(state, model, tree(1.0, 1.0), *more)
        p, q = wanted[t + 1]

        np.testing.assert_allclose(model["p"], np.full(2, p), rtol=1e-6)
        np.testing.assert_allclose(model["q"][0], np.full(3, q), rtol=1e-6)
    assert [int(state[k].state["seen"]) for k in ("p", "q.0")] == [2, 1]


@both_engines
@both_updates
def test_second_gradients_of_a_tie_are_summed_too(engine: str, step: Step) -> None:
    x = np.ones((2, 3))
    model = {"a": x, "b": x.T}
    first, second = drawn(0, (2, 3)), drawn(1, (3, 2))
    state = opt.setup(Curved(), model, engine=engine)
    _, new = step(state, model, {"a": first, "b": second}, {"a": 2 * first, "b": 3 * second})
    wanted = 1 - 0.25 * (first + second.T) - 0.5 * (2 * first + 3 * second.T)
    np.testing.assert_allclose(new["a"], wanted, rtol=1e-13)


@both_engines
@both_updates
def test_no_first_gradient_is_no_step_whatever_the_second_one_is(engine: str, step: Step) -> None:
    model = two_arrays()
    state = opt.setup(Curved(), model, engine=engine)
    state, model = step(state, model, {"p": G["p"], "q": None}, G2)
    np.testing.assert_array_equal(model["q"][0], 0)
    np.testing.assert_array_equal(state.q[0].state[1], 0)
    np.testing.assert_array_equal(state.p.state[1], 1)


@both_engines
@both_updates
def test_a_second_gradient_that_is_missing_at_one_leaf_is_pointed_out(engine: str, step: Step) -> None:
    model = two_arrays()
    state = opt.setup(Curved(), model, engine=engine)
    with pytest.raises(opt.OptimiserError, match=r"\['q'\]\[0\]"):
        step(state, model, G, {"p": G2["p"], "q": None})
    np.testing.assert_array_equal(model["p"], 1)


@pytest.mark.parametrize("wrapper", [opt.EMA, opt.SkipNonFinite])
def test_a_wrapper_takes_rules_alone(wrapper: Any) -> None:
    name = wrapper.__name__
    with pytest.raises(
        opt.BadSetting, match=rf"{name}\.rule is 3; it takes a rule: write {name}\(Adam\(\)\)"
    ):
        wrapper(3)
    with pytest.raises(opt.BadSetting, match=rf"write {name}\(Descent\(\)\)"):
        wrapper(opt.Descent)
