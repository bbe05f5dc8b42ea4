"""Reductions along an axis, taken and read by passes over rows: right, the same on any number of threads, and
without a stack of matrices.

The numbers come from plain NumPy in float64.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.engines.addressed import byrow
from optimisers.engines.cpu import threads

torch = pytest.importorskip("torch")

Arrays = list[Any]

LIBRARIES: dict[str, Callable[[Any, str], Any]] = {
    "numpy": np.array,
    "torch": lambda a, kind: torch.tensor(a, dtype=getattr(torch, kind)),
}


def wide(x: Any) -> Any:
    """An array of either library as one of NumPy's in double precision."""
    held = torch.as_tensor(x)
    return held.to(torch.complex128 if held.is_complex() else torch.float64).numpy()


class Factored(opt.Rule):
    """Second moments of rows and columns, and a step as long as their product says, of RMS 1 at most."""

    eta: float = 0.1
    rho: float = 0.5

    def init(self, x: Any) -> Any:
        zero = opt.zeros_like(x)
        return opt.ops.sum(zero, axis=-1, keepdims=True), opt.ops.sum(zero, axis=-2, keepdims=True)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        m, n = x.shape
        rows = self.rho * state[0] + (1 - self.rho) * opt.ops.sum(opt.abs2(dx), axis=-1, keepdims=True) / n
        columns = self.rho * state[1] + (1 - self.rho) * opt.ops.sum(opt.abs2(dx), axis=-2, keepdims=True) / m
        mean = opt.ops.sum(rows, axis=-2, keepdims=True) / m
        u = dx * opt.sqrt(mean / rows) / opt.sqrt(columns)
        rms = opt.sqrt(opt.ops.sum(opt.abs2(u)) / x.size)
        return (rows, columns), self.eta / opt.maximum(1.0, rms) * u


def factored(x: Any, state: Any, g: Any, eta: float = 0.1, rho: float = 0.5) -> Any:
    rows = rho * state[0] + (1 - rho) * (abs(g) ** 2).mean(1, keepdims=True)
    columns = rho * state[1] + (1 - rho) * (abs(g) ** 2).mean(0, keepdims=True)
    u = g * np.sqrt(rows.mean() / rows) / np.sqrt(columns)
    return x - eta / max(1.0, np.sqrt((abs(u) ** 2).mean())) * u, (rows, columns)


SHAPES = [(70, 40), (3, 64), (70, 40), (130, 33), (1, 50), (2, 70000)]


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "complex64"])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_factored_moments_are_those_of_plain_numpy(name: str, kind: str) -> None:
    if (name, kind) == ("numpy", "bfloat16"):
        pytest.skip("NumPy has no bfloat16")
    rng, to = np.random.default_rng(0), LIBRARIES[name]

    def drawn() -> Arrays:
        return [rng.standard_normal(s) + (1j * rng.standard_normal(s) if "c" in kind else 0) for s in SHAPES]

    model = [to(x, kind) for x in drawn()]
    exact = list(map(wide, model))
    states: Arrays = [(np.zeros((s[0], 1)), np.zeros((1, s[1]))) for s in SHAPES]
    state = opt.setup(Factored(), model)
    tolerance = {"float64": 1e-12, "bfloat16": 3e-2}.get(kind, 1e-5)
    for t in range(3):
        grads = [to(g, kind) for g in drawn()]
        for i, g in enumerate(grads):
            exact[i], states[i] = factored(exact[i], states[i], wide(g))
        state, model = (opt.update if t % 2 else opt.update_)(state, model, grads)
    for x, e, leaf, (rows, columns) in zip(model, exact, state, states, strict=True):
        np.testing.assert_allclose(wide(x), e, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(wide(leaf.state[0]), rows, rtol=tolerance)
        np.testing.assert_allclose(wide(leaf.state[1]), columns, rtol=tolerance)


class Extremes(opt.Rule):
    """Reductions of every kind along every axis, kept and dropped, beside a product."""

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        high, low = opt.ops.max(dx, axis=1, keepdims=True), opt.ops.min(dx, axis=0)
        total = opt.ops.sum(dx - low, axis=0) + opt.ops.max(x, axis=0, keepdims=True)
        y = dx / (1 + opt.ops.abs(high)) + low
        z = (y @ opt.ops.transpose(dx)) @ dx
        return state + total, 0.01 * (z + y + opt.ops.sum(opt.ops.abs(y), axis=-1, keepdims=True))


def extremes(x: Any, s: Any, g: Any) -> Any:
    high, low = g.max(1, keepdims=True), g.min(0)
    total = (g - low).sum(0) + x.max(0, keepdims=True)
    y = g / (1 + abs(high)) + low
    return x - 0.01 * (y @ g.T @ g + y + abs(y).sum(-1, keepdims=True)), s + total


@pytest.mark.parametrize("step", [opt.update, opt.update_])
@pytest.mark.parametrize("engine", [None, "interpret"])
def test_reductions_of_all_kinds_beside_products(engine: str | None, step: Callable[..., Any]) -> None:
    rng = np.random.default_rng(1)
    shapes = [(70, 40), (5, 33), (70, 40)]
    model = [rng.standard_normal(s) for s in shapes]
    want = [(x.copy(), 0 * x) for x in model]
    state = opt.setup(Extremes(), model, engine=engine)
    for _ in range(2):
        grads = [rng.standard_normal(s) for s in shapes]
        want = [extremes(x, s, g) for (x, s), g in zip(want, grads, strict=True)]
        state, model = step(state, model, grads)
    for x, leaf, (e, s) in zip(model, state, want, strict=True):
        np.testing.assert_allclose(x, e, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(leaf.state, s, rtol=1e-10, atol=1e-10)


class RowScaled(opt.Rule):
    """Divides every row along the last axis by its length."""

    eta: float = 1.0

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, self.eta * dx / opt.sqrt(opt.ops.sum(opt.abs2(dx), axis=-1, keepdims=True))


def scaled(g: Any) -> Any:
    return g / np.sqrt((g * g).sum(-1, keepdims=True))


def test_arrays_of_other_ranks_frozen_ones_and_those_without_gradients() -> None:
    rng = np.random.default_rng(2)
    model = [rng.standard_normal(s) for s in [(4, 5, 40), (60,), (3, 64), (2, 2, 3, 33), (3, 64)]]
    want = [x.copy() for x in model]
    state = opt.setup(RowScaled(), model)
    opt.freeze_(state[2])
    opt.adjust_(state[3], eta=0.5)
    for t in range(2):
        grads: Arrays = [None if i == t else rng.standard_normal(x.shape) for i, x in enumerate(model)]
        for i, g in enumerate(grads):
            if g is not None and i != 2:
                want[i] -= (0.5 if i == 3 else 1.0) * scaled(g)
        state, model = opt.update_(state, model, grads)
    for x, e in zip(model, want, strict=True):
        np.testing.assert_allclose(x, e, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_units_are_clipped_by_norms_that_are_taken_row_by_row(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where their squares are no float32, and of rows that are cut into several chunks."""
    seen: Arrays = []
    take = byrow.take
    monkeypatch.setattr(byrow, "take", lambda *given: (seen.append(given), take(*given)))
    rng = np.random.default_rng(7)
    model = [rng.uniform(0.5, 1.0, s).astype("f") for s in [(40, 50), (2, 150_000), (3, 64)]]
    grads = [(size * rng.standard_normal(x.shape)).astype("f") for x in model]
    rule = opt.Chain(opt.AdaptiveClip(0.25, epsilon=1e-3), opt.Descent(1.0))
    _, new = opt.update(opt.setup(rule, model, engine="numba"), model, grads)
    for after, before, g in zip(new, model, grads, strict=True):
        x, dx = before.astype(float), g.astype(float)
        most = 0.25 * np.maximum(1e-3, np.sqrt((x * x).sum(1, keepdims=True)))
        clipped = dx * np.minimum(1, most / np.sqrt((dx * dx).sum(1, keepdims=True)))
        np.testing.assert_allclose(after, x - clipped, rtol=2e-6, atol=1e-6)
    assert len(seen) == len(model)


def test_short_rows_and_other_layouts_go_by_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("over rows")

    monkeypatch.setattr(byrow, "take", refused)
    rng = np.random.default_rng(3)
    model = [rng.standard_normal((50, 5)), rng.standard_normal((50, 40)).T, rng.standard_normal((40, 50))]
    for x in model[:2]:
        g = np.asarray(rng.standard_normal(x.shape))
        _, new = opt.update(opt.setup(RowScaled(), x), x, g)
        np.testing.assert_allclose(new, x - scaled(g), rtol=1e-11)
    with pytest.raises(RuntimeError, match="over rows"):
        opt.update(opt.setup(RowScaled(), model[2]), model[2], model[2])


class Rising(opt.Rule):
    """Steps only where the gradient sums to more than 0."""

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        dx = opt.when(opt.ops.sum(dx) > 0, dx)
        return state, dx / opt.sqrt(opt.ops.sum(opt.abs2(dx), axis=-1, keepdims=True))


def test_where_a_condition_holds_for_some_leaves_their_rows_alone_are_stepped() -> None:
    rng = np.random.default_rng(4)
    model = [rng.standard_normal((4, 40)) for _ in range(4)]
    grads = [abs(rng.standard_normal((4, 40))) * (-1 if i % 2 else 1) for i in range(4)]
    _, new = opt.update(opt.setup(Rising(), model), model, grads)
    for i, (x, e, g) in enumerate(zip(new, model, grads, strict=True)):
        np.testing.assert_allclose(x, e if i % 2 else e - scaled(g), rtol=1e-12)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    start = [rng.standard_normal((700, 600)).astype("f"), rng.standard_normal((90, 3000)).astype("f")]
    grads = [rng.standard_normal(x.shape).astype("f") for x in start]
    found: list[Arrays] = []
    for count in (1, 3):
        monkeypatch.setattr(threads, "available", lambda count=count: count)
        model = [x.copy() for x in start]
        state = opt.setup(Factored(), model)
        for _ in range(2):
            state, model = opt.update_(state, model, grads)
        found.append(model)
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_stack_of_matrices_is_written() -> None:
    model = [np.ones((256, 128), np.float32) for _ in range(8)]
    state = opt.setup(Factored(), model)
    opt.update_(state, model, [np.full((256, 128), i + 1.0, np.float32) for i in range(8)])
    (group,) = opt.explain(state).groups
    assert group.workspace < sum(x.nbytes for x in model) / 4


class Balanced(opt.Rule):
    """Rows of length 1, then columns of length 1, then the largest element of each row 1: every reduction
    reads what the one before was read for.
    """

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        y = dx / (1 + opt.sqrt(opt.ops.sum(opt.abs2(dx), axis=-1, keepdims=True)))
        y = y / (1 + opt.sqrt(opt.ops.sum(opt.abs2(y + x), axis=-2, keepdims=True)))
        m = 0.5 * state + y
        return m, 0.1 * m / (1 + opt.ops.max(opt.ops.abs(m), axis=-1, keepdims=True) * opt.ops.max(abs(y)))


def balanced(x: Any, s: Any, g: Any) -> Any:
    y = g / (1 + np.linalg.norm(g, axis=1, keepdims=True))
    y = y / (1 + np.linalg.norm(y + x, axis=0, keepdims=True))
    m = 0.5 * s + y
    return x - 0.1 * m / (1 + abs(m).max(1, keepdims=True) * abs(y).max()), m


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("shapes", [((70, 40), (130, 33), (70, 40)), ((40, 7), (9, 5), (9, 5), (40, 7))])
def test_reductions_that_follow_each_other_are_taken_one_after_the_other(
    library: str, shapes: tuple[tuple[int, int], ...]
) -> None:
    make: Any = np.array
    if library != "numpy":
        module = pytest.importorskip(library)
        make = torch.tensor if library == "torch" else module.numpy.asarray
    rng = np.random.default_rng(0)
    exact = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    held: Arrays = [np.zeros(s) for s in shapes]
    model: Arrays = list(map(make, exact))
    state = opt.setup(Balanced(), model)
    for t in range(3):
        grads = [rng.standard_normal(s).astype(np.float32) for s in shapes]
        step = opt.update_ if t == 1 and library != "jax" else opt.update
        state, model = step(state, model, list(map(make, grads)))
        exact, held = map(list, zip(*map(balanced, exact, held, grads), strict=True))

    for x, wanted in zip(model, exact, strict=True):
        np.testing.assert_allclose(np.asarray(x), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "rule", [opt.Adafactor(), opt.CAME(), opt.SM3(), Balanced()], ids=lambda r: type(r).__name__
)
def test_rules_that_reduce_along_axes_alone_write_no_stack(rule: opt.Rule) -> None:
    model = [np.zeros((64, 48), np.float32)] * 3
    (group,) = opt.explain(opt.setup(rule, [x.copy() for x in model])).groups

    assert not [w for s in group.plan.steps for w in s.writes if "stack" in w]
    assert sum(s.bytes for s in group.plan.steps if s.kind == "array operations") < 8
