"""Are products and other values of another shape right, computed for all leaves of a shape at once?

The numbers come from plain NumPy in float64, and from the interpreter, which goes leaf by leaf.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from benchmarks.muon import Muon, stepped

torch = pytest.importorskip("torch")

SHAPES = [(8, 8), (8, 8), (16, 6), (8, 8), (16, 6), (6, 16), (40, 40)]


def library(name: str, kind: str) -> Any:
    """(to an array of a library, back to float64)."""
    if name == "numpy":
        return lambda a: a.astype(kind), lambda a: np.asarray(a, np.float64)
    if name == "torch":
        return lambda a: torch.tensor(a, dtype=getattr(torch, kind)), lambda a: a.double().numpy()
    jnp = pytest.importorskip("jax.numpy")
    return lambda a: jnp.asarray(a, kind), lambda a: np.asarray(a, np.float64)


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_muon_takes_the_steps_of_plain_numpy(name: str, kind: str) -> None:
    if (name, kind) in (("numpy", "bfloat16"), ("jax", "float64")):
        pytest.skip("NumPy has no bfloat16, JAX no float64 unless asked")
    to, back = library(name, kind)
    rng, rule = np.random.default_rng(0), Muon(lam=0.1)
    model = [to(rng.standard_normal(s)) for s in SHAPES]
    want = [(back(x), np.zeros(x.shape)) for x in model]
    state = opt.setup(rule, model)
    for t in range(4):
        grads = [to(rng.standard_normal(s)) for s in SHAPES]
        want = [stepped(x, m, back(g), rule) for (x, m), g in zip(want, grads, strict=True)]
        state, model = (opt.update if t % 2 else opt.update_)(state, model, grads)
        if kind == "bfloat16":  # parameters are rounded at every step: go on from there
            want = [(back(x), m) for x, (_, m) in zip(model, want, strict=True)]
            continue
        for x, (expected, _) in zip(model, want, strict=True):
            np.testing.assert_allclose(back(x), expected, atol=2e-6 if kind == "float32" else 1e-14)
    for leaf, (_, m) in zip(state, want, strict=True):
        np.testing.assert_allclose(back(leaf.state), m, atol=3e-7 if kind != "float64" else 1e-15)


class Axes(opt.Rule):
    """Sums along an axis, a function of the array library, and a value that a reduction reads too."""

    eta: float = 0.1

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        rows = opt.ops.sum(opt.ops.square(dx), axis=-1, keepdims=True)
        y = dx / opt.sqrt(rows + 1)
        p = (y @ dx.T) @ dx
        size = opt.sqrt(opt.ops.sum(opt.abs2(p @ y.T)) + 1)
        state = state + opt.ops.call(abs, p) - opt.ops.max(dx, axis=0)
        return state, self.eta * (p / size + state)


def axes_by_numpy(x: Any, s: Any, g: Any, eta: float) -> Any:
    y = g / np.sqrt((g * g).sum(-1, keepdims=True) + 1)
    p = (y @ g.T) @ g
    size = np.sqrt(((p @ y.T) ** 2).sum() + 1)
    s = s + abs(p) - g.max(0)
    return x - eta * (p / size + s), s


@pytest.mark.parametrize("engine", [None, "interpret"])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_what_reductions_and_the_step_read_is_computed_once(name: str, engine: str | None) -> None:
    to, back = library(name, "float64")
    rng = np.random.default_rng(1)
    shapes = [(5, 3), (3, 5), (5, 3), (4, 4)]
    model = [to(rng.standard_normal(s)) for s in shapes]
    want = [(back(x), 0 * back(x)) for x in model]
    state = opt.setup(Axes(), model, engine=engine)
    for t in range(3):
        grads = [to(rng.standard_normal(s)) for s in shapes]
        want = [axes_by_numpy(x, s, back(g), 0.1) for (x, s), g in zip(want, grads, strict=True)]
        state, model = (opt.update if t % 2 else opt.update_)(state, model, grads)
        for x, leaf, (expected, s) in zip(model, state, want, strict=True):
            np.testing.assert_allclose(back(x), expected, rtol=1e-12)
            np.testing.assert_allclose(back(leaf.state), s, rtol=1e-12)


def test_no_product_is_computed_twice_or_leaf_by_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    model = [np.ones((4, 4), np.float32) for _ in range(6)]
    state = opt.setup(Axes(), model)
    calls: list[Any] = []
    matmul = np.matmul
    monkeypatch.setattr(np, "matmul", lambda *args, **kw: calls.append(args) or matmul(*args, **kw))
    opt.update_(state, model, [np.ones((4, 4), np.float32) for _ in range(6)])
    assert [a.shape for a, *_ in calls] == [(6, 4, 4)] * 3


class Late(opt.Rule):
    """A reduction of a product that is wanted only where another one of it is positive."""

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        z = dx @ dx
        dx = opt.when(opt.ops.sum(z) > 0, dx)
        return state, opt.ops.max(z) * dx


def test_a_product_of_an_earlier_level_is_reduced_again() -> None:
    model = [np.ones((2, 2)) for _ in range(3)]
    grads = [np.array([[1.0, 2], [3, 4]]), np.array([[0.0, -1], [1, 0]]), np.eye(2)]
    _, new = opt.update(opt.setup(Late(), model), model, grads)
    for x, factor, g in zip(new, [22, 0, 1], grads, strict=True):
        np.testing.assert_allclose(x, 1 - factor * g)


class Shaped(opt.Rule):
    """State of another shape than x: the second moment of its rows, and where it stands."""

    eta: float = 0.1

    def init(self, x: Any) -> Any:
        return (x @ x.T) * 0, 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        cov, n = state
        cov = 0.5 * cov + dx @ dx.T
        return (cov, n + 1), self.eta * (cov @ dx)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_state_of_another_shape_is_stacked(name: str) -> None:
    to, back = library(name, "float64")
    rng = np.random.default_rng(2)
    shapes = [(3, 5), (3, 5), (5, 3)]
    model = [to(rng.standard_normal(s)) for s in shapes]
    xs, covs = [back(x) for x in model], [np.zeros((s[0], s[0])) for s in shapes]
    state = opt.setup(Shaped(), model)
    for t in range(3):
        grads = [to(rng.standard_normal(s)) for s in shapes]
        covs = [0.5 * c + back(g) @ back(g).T for c, g in zip(covs, grads, strict=True)]
        xs = [x - 0.1 * c @ back(g) for x, c, g in zip(xs, covs, grads, strict=True)]
        state, model = (opt.update if t % 2 else opt.update_)(state, model, grads)
        for x, leaf, e, c in zip(model, state, xs, covs, strict=True):
            np.testing.assert_allclose(back(x), e, rtol=1e-12)
            np.testing.assert_allclose(back(leaf.state[0]), c, rtol=1e-12)


class Kept(opt.Rule):
    """State of another shape that nothing reads but a reduction, and that is stored at the end."""

    def init(self, x: Any) -> Any:
        return opt.ops.sum(x, axis=-1) * 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        sums = opt.ops.sum(dx @ opt.ops.transpose(dx), axis=-1)
        return sums, dx * opt.ops.sum(sums)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_state_that_a_reduction_alone_reads_is_stored(name: str) -> None:
    to, back = library(name, "float64")
    x, g = to(np.zeros((3, 4))), np.random.default_rng(3).standard_normal((3, 4))
    state, x = opt.update(opt.setup(Kept(), x), x, to(g))

    np.testing.assert_allclose(back(state.state), (g @ g.T).sum(1), rtol=1e-12)
    np.testing.assert_allclose(back(x), -g * (g @ g.T).sum(), rtol=1e-12)


@pytest.mark.parametrize("engine", [None, "interpret"])
def test_leaves_of_other_rows_frozen_ones_and_those_without_gradients(engine: str | None) -> None:
    rng, rule = np.random.default_rng(3), Muon()
    model = [
        torch.tensor(rng.standard_normal((6, 9)).T if i % 2 else rng.standard_normal((9, 6)))
        for i in range(6)
    ]
    model = [x.T.contiguous().T if i == 1 else x for i, x in enumerate(model)]
    want = [x.clone().numpy() for x in model]
    moments = [np.zeros((9, 6)) for _ in model]
    state = opt.setup(rule, model, engine=engine)
    opt.freeze_(state[2])
    opt.adjust_(state[4], eta=0.5, rho=0.5)
    for t in range(3):
        grads: list[Any] = [torch.tensor(rng.standard_normal((9, 6))) for _ in model]
        if t == 1:
            grads[0] = grads[3] = None
        for i, g in enumerate(grads):
            if g is not None and i != 2:
                own = dataclasses.replace(rule, eta=0.5, rho=0.5) if i == 4 else rule
                want[i], moments[i] = stepped(want[i], moments[i], g.numpy(), own)
        state, model = opt.update_(state, model, grads)
        for x, e in zip(model, want, strict=True):
            np.testing.assert_allclose(x.numpy(), e, rtol=1e-11)


def test_accumulated_gradients_meet_the_products_only_at_the_end_of_a_window() -> None:
    rng, rule = np.random.default_rng(4), Muon()
    model = [rng.standard_normal((4, 7)) for _ in range(3)]
    want, moments = [x.copy() for x in model], [np.zeros((4, 7)) for _ in model]
    state = opt.setup(opt.Chain(opt.AccumGrad(2), rule), model)
    for _ in range(2):
        pair = [[rng.standard_normal((4, 7)) for _ in model] for _ in range(2)]
        for grads in pair:
            state, model = opt.update_(state, model, grads)
        for i, (x, m) in enumerate(zip(want, moments, strict=True)):
            want[i], moments[i] = stepped(x, m, (pair[0][i] + pair[1][i]) / 2, rule)
            np.testing.assert_allclose(model[i], want[i], rtol=1e-10)


def test_a_step_that_cannot_be_computed_changes_nothing() -> None:
    class Odd(opt.Rule):
        def init(self, x: Any) -> Any:
            return opt.zeros_like(x)

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state + dx, dx @ dx

    model = [np.ones((3, 3)), np.ones((2, 3))]
    state = opt.setup(Odd(), model)
    with pytest.raises(opt.TraceError, match="matmul of arrays of shape"):
        opt.update_(state, model, [np.ones((3, 3)), np.ones((2, 3))])
    assert all((x == 1).all() for x in model)
    assert all((leaf.state == 0).all() for leaf in state)


@pytest.mark.slow
def test_a_thousand_matrices_and_one_huge_one() -> None:
    rng, rule = np.random.default_rng(5), Muon()
    model = [rng.standard_normal((3, 4)) for _ in range(1000)] + [rng.standard_normal((900, 300))]
    grads = [rng.standard_normal(x.shape) for x in model]
    want = [stepped(x, 0 * x, g, rule)[0] for x, g in zip(model, grads, strict=True)]
    _, model = opt.update(opt.setup(rule, model), model, grads)
    for x, e in zip(model, want, strict=True):
        np.testing.assert_allclose(x, e, rtol=1e-9, atol=1e-12)


def test_a_warm_step_allocates_no_stack() -> None:
    import tracemalloc

    model = [np.ones((64, 64), np.float32) for _ in range(64)]
    grads = [np.eye(64, dtype=np.float32) for _ in range(64)]
    state = opt.setup(Muon(), model)
    for _ in range(3):
        opt.update_(state, model, grads)
    tracemalloc.start()
    opt.update_(state, model, grads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 64 * 4 * 8  # the stack is 64 of these


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_under_jit_vmap_and_grad_a_step_is_that_of_plain_numpy(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    if not fast:  # as on devices without the kernel
        from optimisers.engines.xla import call

        monkeypatch.setattr(call, "refusal", lambda: "asked for")
    rng, rule = np.random.default_rng(6), Muon(lam=0.1)
    shapes = [(5, 7), (9, 4), (5, 7), (5, 7)]
    xs = [rng.standard_normal(s) for s in shapes]
    gs = [rng.standard_normal(s) for s in shapes]
    want = [stepped(x, 0 * x, g, rule)[0] for x, g in zip(xs, gs, strict=True)]
    model, grads = [jnp.asarray(x, "float32") for x in xs], [jnp.asarray(g, "float32") for g in gs]
    state = opt.setup(rule, model)
    for new in (opt.update(state, model, grads)[1], jax.jit(opt.update)(state, model, grads)[1]):
        for x, e in zip(new, want, strict=True):
            np.testing.assert_allclose(x, e, atol=3e-6)

    def first(g: Any) -> Any:
        return opt.update(state, model, [g, *grads[1:]])[1][0]

    batch = jnp.stack([grads[0], 2 * grads[0], grads[2]])
    for g, x in zip(batch, jax.vmap(first)(batch), strict=True):
        expected = stepped(xs[0], 0 * xs[0], np.asarray(g), rule)[0]
        np.testing.assert_allclose(x, expected, atol=3e-6)
    along = jax.jvp(first, (grads[0],), (grads[2],))[1]
    h = 1e-4
    up, down = (stepped(xs[0], 0 * xs[0], gs[0] + d * gs[2], rule)[0] for d in (h, -h))
    np.testing.assert_allclose(along, (up - down) / (2 * h), atol=2e-5)


def test_under_jit_all_matrices_of_a_shape_are_one_product() -> None:
    jax = pytest.importorskip("jax")
    model = [jax.numpy.ones((4, 4)) for _ in range(20)]
    state = opt.setup(Muon(), model)
    text = str(jax.make_jaxpr(opt.update)(state, model, model))
    assert text.count("dot_general") == 15


def test_other_leaves_of_a_group_under_jit() -> None:
    jax = pytest.importorskip("jax")
    rng, rule = np.random.default_rng(7), Muon()
    xs = [rng.standard_normal((4, 6)) for _ in range(70)]  # more than one call of the kernel takes
    gs = [rng.standard_normal((4, 6)) for _ in xs]
    model, grads = (
        [jax.numpy.asarray(x, "float32") for x in xs],
        [jax.numpy.asarray(g, "float32") for g in gs],
    )
    state = opt.setup(rule, model)
    state = opt.adjust(state, eta=0.5, where=lambda path, _: path.code().endswith("[1]"))
    grads[2] = None
    _, new = jax.jit(opt.update)(state, model, grads)
    for i, (x, g) in enumerate(zip(xs, gs, strict=True)):
        own = dataclasses.replace(rule, eta=0.5) if i == 1 else rule
        np.testing.assert_allclose(new[i], x if i == 2 else stepped(x, 0 * x, g, own)[0], atol=3e-6)


def primitives(traced: Any, *, inside: bool) -> Any:
    """The operations of a computation, inside of branches that may not run or outside of them alone."""
    for eqn in getattr(traced, "jaxpr", traced).eqns:
        yield eqn.primitive.name
        if eqn.primitive.name != "cond" or inside:
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                        yield from primitives(inner, inside=inside)


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_under_jit_products_run_only_in_steps_that_take_them(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    if not fast:
        from optimisers.engines.xla import call

        monkeypatch.setattr(call, "refusal", lambda: "asked for")
    rng, rule = np.random.default_rng(9), opt.Chain(opt.AccumGrad(3), Muon())
    xs = [rng.standard_normal(s) for s in [(5, 7), (9, 4), (5, 7)]]
    gs = [[rng.standard_normal(x.shape) for x in xs] for _ in range(6)]
    model: Any = [jnp.asarray(x, "float32") for x in xs]
    state = opt.setup(rule, model)
    traced = jax.make_jaxpr(opt.update)(state, model, model)
    step = jax.jit(opt.update)
    for t, grads in enumerate(gs):
        state, model = step(state, model, [jnp.asarray(g, "float32") for g in grads])
        if t == 1:
            np.testing.assert_array_equal(model[0], jnp.asarray(xs[0], "float32"))
    moments = [0 * x for x in xs]
    for window in (gs[:3], gs[3:]):
        for i, each in enumerate(zip(*window, strict=True)):
            xs[i], moments[i] = stepped(xs[i], moments[i], sum(each) / 3, Muon())
    for x, e in zip(model, xs, strict=True):
        np.testing.assert_allclose(x, e, atol=5e-6)

    assert "dot_general" not in list(primitives(traced, inside=False))
    assert list(primitives(traced, inside=True)).count("dot_general") == 2 * 15  # two shapes

    grads = [jnp.asarray(g, "float32") for g in gs[0]]
    many = jax.vmap(lambda g: step(state, model, [g, *grads[1:]])[1][0])(jnp.stack([grads[0], -grads[0]]))
    np.testing.assert_allclose(many[0], step(state, model, grads)[1][0], atol=1e-6)
