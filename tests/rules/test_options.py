"""Do options do what they say that they do? Each is held to the same path gone another way: by plain NumPy,
by other arrays, by a rule that starts anew.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.modern import rule_of

LIBRARIES: list[tuple[str, str | None]] = [
    ("numpy", "interpret"),
    ("numpy", None),
    ("torch", None),
    ("jax", None),
]


def walked(
    rule: opt.Rule, x0: Any, grads: list[Any], library: str = "numpy", engine: str | None = None
) -> tuple[list[Any], Any]:
    """(parameters after every step, state)."""
    make, step = maker(library)
    x = make(x0)
    state = opt.setup(rule, x, engine=engine)
    xs: list[Any] = []
    for g in grads:
        state, x = step(state, x, make(g))
        xs.append(numbers(x))
    return xs, state


def maker(library: str) -> tuple[Callable[[Any], Any], Callable[..., Any]]:
    """(how arrays enter a library, how a step is taken there)."""
    if library == "jax":
        jax = pytest.importorskip("jax")
        return jax.numpy.asarray, jax.jit(opt.update)
    return (pytest.importorskip("torch").tensor if library == "torch" else np.array), opt.update


def normal(shape: tuple[int, ...], count: int, dtype: str = "float32") -> list[Any]:
    return list(np.random.default_rng(3).standard_normal((count, *shape)).astype(dtype))


def numbers(x: Any) -> Any:
    """A copy of an array of any library, in NumPy."""
    return np.array(x.numpy() if hasattr(x, "numpy") else np.asarray(x))


def near(a: Any, b: Any, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(numbers(a), numbers(b), rtol=0, atol=tolerance)


# -- wrappers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("library", "engine"), LIBRARIES)
@pytest.mark.parametrize(
    "rule",
    [opt.Momentum(0.1, 0.9), opt.Yogi(0.1), opt.Chain(opt.ClipNorm(1.0), opt.AdamW(0.1)), opt.SOAP(0.1)],
    ids=lambda rule: type(rule).__name__,
)
def test_lookahead_with_reset_starts_the_rule_inside_anew(
    rule: opt.Rule, library: str, engine: str | None
) -> None:
    grads = normal((3, 2), 6)
    xs, _ = walked(
        opt.Lookahead(rule, 2, 0.25, reset=True), np.ones((3, 2), "float32"), grads, library, engine
    )
    slow = np.ones((3, 2), "float32")
    for t in (0, 2, 4):
        fast, _ = walked(rule, slow, grads[t : t + 2], library, engine)
        slow = slow + np.float32(0.25) * (fast[-1] - slow)

    near(xs[-1], slow)


@pytest.mark.parametrize(("library", "engine"), LIBRARIES)
@pytest.mark.parametrize("rho", [0.8, 0.0])
@pytest.mark.parametrize("at", ["y", "z"])
def test_schedule_free_decays_where_it_is_told_and_keeps_its_average(
    at: Any, rho: float, library: str, engine: str | None
) -> None:
    """Defazio et al., eq. 4 to 6, over descent with decay."""
    eta, lam, x0, grads = 0.1, 0.5, np.array([1.0, -2.0, 0.5], "float32"), normal((3,), 5)
    rule = opt.ScheduleFree(opt.AdamW(eta, (0.0, 0.9), lam), rho, decay_at=at, store="x")
    xs, state = walked(rule, x0, grads, library, engine)
    y = x = z = x0.astype("float64")
    v = np.zeros(3)
    for t, g in enumerate(grads, 1):
        v = 0.9 * v + 0.1 * g.astype("float64") ** 2
        u = g / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
        z = z - eta * (u + lam * (z if at == "z" else y))
        x = x + (z - x) / t
        y = rho * x + (1 - rho) * z

        near(xs[t - 1], y)
    near(opt.averaged(state, maker(library)[0](xs[-1])), x)


def test_the_average_of_schedule_free_is_the_same_kept_or_worked_out() -> None:
    grads, rule = normal((4,), 8, "float64"), opt.Momentum(0.1, 0.0)
    kept, mine = (walked(opt.ScheduleFree(rule, store=s), np.ones(4), grads) for s in ("x", "z"))

    near(kept[0][-1], mine[0][-1], 1e-14)
    near(opt.averaged(kept[1], kept[0][-1]), opt.averaged(mine[1], mine[0][-1]), 1e-14)
    with pytest.raises(opt.BadSetting, match='write store="x", or a rho above 0'):
        opt.ScheduleFree(rule, 0.0)


# -- axes ----------------------------------------------------------------------------------------------------

# No axis is longer than the others together plus one: its first Gram matrix would have several equal
# eigenvalues, and any of their bases is right.
JOINED = [
    ((4, 3, 2, 2), 6, (4, 6, 2)),
    ((2, 1, 3), 3, (2, 3)),
    ((3, 2, 2, 3), 6, (6, 6)),
    ((4, 5), 19, (4, 5)),
]


@pytest.mark.parametrize(("library", "engine"), LIBRARIES)
@pytest.mark.parametrize(("shape", "most", "seen"), JOINED, ids=str)
@pytest.mark.parametrize(
    "make",
    [partial(opt.SOAP, 0.01, every=2), partial(opt.Shampoo, 0.01, every=2, epsilon=1e-2)],
    ids=["SOAP", "Shampoo"],
)
def test_axes_that_are_joined_are_those_of_the_array_in_another_shape(
    make: Any, shape: tuple[int, ...], most: int, seen: tuple[int, ...], library: str, engine: str | None
) -> None:
    grads = normal(shape, 5)
    xs, _ = walked(make(max_dim=most, merge=True), np.ones(shape, "float32"), grads, library, engine)
    wanted, _ = walked(make(max_dim=most), np.ones(seen, "float32"), [g.reshape(seen) for g in grads])

    near(xs[-1].reshape(seen), wanted[-1], 2e-5)


def test_the_words_of_the_formulas_name_the_options_of_our_rules() -> None:
    """Settings that a case may have, beside those that the golden ones do."""
    yogi = rule_of({"rule": "Yogi", "eta": 0.1, "lam": 0.2, "couple": True}, [])
    muon = rule_of({"rule": "Muon", "coefficients": [2.0, -1.5, 0.5]}, [])
    inner = {"rule": "Momentum", "eta": 0.1, "rho": 0.5}

    assert yogi == opt.Chain(opt.WeightDecay(0.2), opt.Yogi(0.1, lam=0.0))
    assert muon == opt.Muon(coefficients=((2.0, -1.5, 0.5),))
    assert rule_of({"rule": "Muon", "coefficients": "you"}, []) == opt.Muon(coefficients="you")
    assert rule_of({"rule": "Lookahead", "base": inner, "reset": True}, []) == opt.Lookahead(
        opt.Momentum(0.1, 0.5), reset=True
    )
    assert "otherwise" in rule_of({"rule": "Cautious", "base": inner, "eta": 0.1, "fill": "sum"}, [])


# -- one estimate for all ------------------------------------------------------------------------------------


class Largest(opt.Rule):
    """Steps by the largest of one number of each array."""

    def init(self, x: Any) -> Any:
        return 0.0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        mine = opt.ops.max(opt.ops.abs(dx))
        return -mine, dx * 0 + opt.total(state, p=np.inf)


@pytest.mark.parametrize("engine", [None, "interpret", "triton", "captured", "jax"])
def test_a_total_may_be_the_largest_absolute_value(engine: str | None) -> None:
    """Of the state before: the number of the largest gradient, behind a sign."""
    captured = engine == "captured"
    make: Callable[[Any], Any] = maker("torch" if engine in ("triton", "captured") else "numpy")[0]
    if engine == "jax":
        make = maker("jax")[0]
    model = {"a": make(np.zeros(3)), "b": make(np.zeros((2, 2))), "c": make(np.zeros(3))}
    grads = {"a": make(np.full(3, 2.0)), "b": make(np.full((2, 2), 5.0)), "c": make(np.full(3, 1.0))}
    if captured or engine == "triton":
        pytest.importorskip("triton")
        state = opt.setup(Largest(), model, engine="triton", capturable=captured)
    else:
        state = opt.setup(Largest(), model, engine=None if engine == "jax" else engine)
    for _ in range(2):
        state, model = opt.update(state, model, grads)

    for x in model.values():
        np.testing.assert_array_equal(numbers(x), np.full(x.shape, -5.0))


@pytest.mark.parametrize("library", ["numpy", "jax"])
@pytest.mark.parametrize(
    "rule",
    [opt.Prodigy(d0=0.01, growth=1.5), opt.DAdaptAdam(d0=0.01, growth=1.5)],
    ids=lambda r: type(r).__name__,
)
def test_an_array_without_a_gradient_takes_the_estimate_that_the_others_found(
    rule: opt.Rule, library: str
) -> None:
    """Bounded growth keeps an array that takes its own estimate behind for ever."""
    make, step = maker(library)
    model = {"a": make(np.ones(4, "float32")), "b": make(np.ones(4, "float32"))}
    state, seen = opt.setup(rule, model), list[float]()
    for t in range(10):
        grads = {"a": make(np.full(4, 1.0 + t, "float32")), "b": make(np.full(4, 1.0, "float32"))}
        state, model = step(state, model, grads if t not in (3, 4, 5) else grads | {"b": None})
        seen.append(float(state["a"].state.d))

    assert float(state["b"].state.d) == seen[-1]
    assert seen[-1] > 0.01
    assert all(a == seen[0] or b <= 1.5 * a * (1 + 1e-6) for a, b in itertools.pairwise(seen))


ALIKE: list[tuple[opt.Rule, tuple[str, ...]]] = [
    (opt.MoMo(0.1), ("f", "c", "t")),
    (opt.MoMoAdam(0.1), ("f", "c", "known", "t")),
    (opt.Mechanic(opt.Descent(0.1), 0.01), ("m", "v", "r", "s", "t")),
    (opt.DoG(1.0, 0.01), ("r", "root")),
    (opt.DoWG(), ("r", "root")),
    (opt.Chain(opt.ZClip(0.9, 2.5, 1e3, 2), opt.Descent(0.01)), ("mean", "deviation", "t")),
]
"""Rules, and what their arrays have in common."""


@pytest.mark.parametrize("world", ["interpret", "numba", "jax"])
@pytest.mark.parametrize(("rule", "fields"), ALIKE, ids=[type(rule).__name__ for rule, _ in ALIKE])
def test_what_arrays_have_in_common_one_without_gradients_does_not_hold_back(
    rule: opt.Rule, fields: tuple[str, ...], world: str
) -> None:
    """It steps as if it had been there, as soon as it is again; one that joins later does too."""
    make, step = maker("jax" if world == "jax" else "numpy")
    model = {k: make(np.full(n, 1.5, "float32")) for k, n in (("a", 4), ("b", 3), ("late", 2))}
    state = opt.setup(rule, model, engine=None if world == "jax" else world)
    given = {"loss": 0.7} if "MoMo" in type(rule).__name__ else {}
    for t in range(8):
        gone = {"late"} | ({"b"} if t in (2, 3, 6) else set()) if t < 7 else set[str]()
        grads = {k: None if k in gone else (1 + t) * x for k, x in model.items()}
        state, model = step(state, model, grads, **given)

    def kept(name: str) -> list[Any]:
        own = state[name].state[0] if isinstance(rule, opt.Chain) else state[name].state
        return [numbers(value) for field in fields for value in np.atleast_1d(getattr(own, field))]

    for name in ("b", "late"):
        np.testing.assert_allclose(kept(name), kept("a"), rtol=1e-6)


def test_an_array_that_joins_later_starts_with_the_estimate_of_the_others() -> None:
    model = {"a": np.ones(4), "b": np.ones(4)}
    state = opt.setup(opt.Prodigy(d0=0.01, growth=1.5), model)
    for _ in range(6):
        state, model = opt.update(state, model, {"a": np.ones(4), "b": None})
    state, model = opt.update(state, model, {"a": np.ones(4), "b": np.ones(4)})

    assert state["b"].state.d == state["a"].state.d > 0.01


@pytest.mark.parametrize("rule", [opt.Kron(), opt.SOAP(merge=True), opt.Shampoo(merge=True)], ids=repr)
def test_arrays_without_elements_stay(rule: opt.Rule) -> None:
    for shape in ((0, 3), (2, 0)):
        xs, _ = walked(rule, np.ones(shape), [np.ones(shape)] * 2)

        assert xs[-1].shape == shape
