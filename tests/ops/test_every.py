"""Is what `every` leaves out computed nowhere, and does a rule with it step as with an `if`?"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers import ops
from optimisers.arrays import registry
from tests.worlds import STEPS, WORLDS, World, worlds

SHAPES = [(3, 5), (3, 5), (4, 4), (4, 4), (2, 6)]

everywhere = worlds(*WORLDS)
wherever_it_runs = worlds(*[w for w in WORLDS if not w.capturable])
each_library = worlds(
    *[w for w in WORLDS if not w.capturable and w.engine != "interpret" and w.step is opt.update_]
)


class RotatedState(NamedTuple):
    left: Any
    basis: Any
    w: Any
    t: Any


class Rotated(opt.Rule):
    """Steps by signs in a basis of eigenvectors that is renewed at some steps alone."""

    eta: float = 0.1
    beta: float = 0.7
    period: int = 2

    def init(self, x: Any) -> RotatedState:
        n = x.shape[0]
        return RotatedState(ops.zeros((n, n), like=x), ops.eye(n, like=x), ops.zeros((n,), like=x), 0)

    def apply(self, state: RotatedState, x: Any, dx: Any) -> Any:
        left = opt.ema(self.beta, state.left, dx @ ops.transpose(dx))

        def renewed() -> Any:
            w, q = ops.eigh(left)
            return q, w / ops.norm(left)

        basis, w = ops.every(state.t % self.period == 0, renewed, (state.basis, state.w))
        step = basis @ opt.sign(ops.transpose(basis) @ dx)
        return RotatedState(left, basis, w, state.t + 1), self.eta * step / ops.norm(step)


def rotated(x: Any, grads: Any, period: int = 2) -> Any:
    """(x, state) by an `if` of Python's; a gradient that is None is no step."""
    n = x.shape[0]
    left, basis, w, t = np.zeros((n, n)), np.eye(n), np.zeros(n), 0
    for g in grads:
        if g is None:
            continue
        left = 0.7 * left + 0.3 * g @ g.T
        if t % period == 0:
            w, basis = np.linalg.eigh(left)
            w = w / np.linalg.norm(left)
        step = basis @ np.sign(basis.T @ g)
        x, t = x - 0.1 * step / np.linalg.norm(step), t + 1
    return x, (left, basis, w, t)


def drawn(seed: int, shapes: Any = SHAPES) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s) for s in shapes]


def near(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.fixture
def factorised(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of what NumPy and PyTorch are asked for the eigenvectors of."""
    found: list[Any] = []
    for x in (np.ones(1), torch.ones(1)):
        operations = cast("dict[str, Any]", registry.library(x).operations)
        real = operations["eigh"]
        counted = functools.partial(lambda f, a: found.append(tuple(a.shape)) or f(a), real)
        monkeypatch.setitem(operations, "eigh", counted)
    return found


# -- the numbers of an `if`, everywhere ----------------------------------------------------------------------


@wherever_it_runs
def test_a_rule_steps_as_with_an_if(world: World) -> None:
    xs, grads = drawn(0), [drawn(k) for k in range(1, 6)]
    with world.open():
        model = world.put(xs)
        state = world.setup(Rotated(), model)
        for g in grads:
            state, model = world.step(state, model, world.put(g))
        for i, x in enumerate(xs):
            wanted, kept = rotated(x, [g[i] for g in grads])
            near(world.get(model[i]), wanted)
            near(world.get(state[i].state.left), kept[0])
            near(np.abs(world.get(state[i].state.basis)), np.abs(kept[1]))
            near(world.get(state[i].state.w), kept[2])


@wherever_it_runs
def test_arrays_of_one_group_may_be_at_different_steps(world: World) -> None:
    """Gradients come and go: at one update some of a group renew their basis, and others keep it."""
    xs, grads = drawn(0), [drawn(k) for k in range(1, 7)]
    for k, g in enumerate(grads):
        for i in range(len(g)):
            if (k + i) % 3 == 0:
                g[i] = None
    with world.open():
        model = world.put(xs)
        state = world.setup(Rotated(), model)
        for g in grads:
            state, model = world.step(state, model, world.put(g))
        for i, x in enumerate(xs):
            near(world.get(model[i]), rotated(x, [g[i] for g in grads])[0])


def test_on_plain_arrays_it_is_an_if() -> None:
    def never() -> Any:
        raise AssertionError("computed")

    for old in (np.ones(2), torch.ones(2), jnp.ones(2)):
        assert ops.every(False, never, old) is old
        assert ops.every(np.array(False), never, old) is old
        assert ops.every(old[0] < 0, never, (old, 1.0)) == (old, 1.0)
        assert (np.asarray(ops.every(old[0] > 0, lambda o=old: 2 * o, old)) == 2).all()
    state = RotatedState(1, 2, 3, 4)
    assert ops.every(True, lambda: RotatedState(5, 6, 7, 8), state) == RotatedState(5, 6, 7, 8)
    assert isinstance(ops.every(False, never, state), RotatedState)


def test_under_jit_it_is_a_branch_and_under_vmap_a_choice() -> None:
    def basis(t: Any, a: Any, q: Any) -> Any:
        return ops.every(t % 2 == 0, lambda: ops.eigh(a)[1], q)

    a = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    old, new = jnp.ones((2, 2)), np.linalg.eigh(np.asarray(a))[1]

    assert "cond[" in str(jax.make_jaxpr(basis)(0, a, old))
    np.testing.assert_allclose(np.abs(jax.jit(basis)(0, a, old)), np.abs(new), atol=1e-6)
    assert (jax.jit(basis)(1, a, old) == 1).all()
    several = jax.vmap(basis, (0, None, None))(jnp.arange(3), a, old)
    np.testing.assert_allclose(np.abs(several), [np.abs(new), np.ones((2, 2)), np.abs(new)], atol=1e-6)
    chosen = torch.func.vmap(basis, (0, None, None))(
        torch.arange(3), torch.tensor(np.array(a)), torch.ones(2, 2)
    )
    np.testing.assert_allclose(chosen.abs().numpy(), [np.abs(new), np.ones((2, 2)), np.abs(new)], atol=1e-6)


# -- what is left out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("array", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_nothing_is_factorised_but_where_the_condition_holds(
    array: Any, step: Any, factorised: list[Any]
) -> None:
    """Three shapes, each at once, at every third step."""
    model = [array(x) for x in drawn(0)]
    state = opt.setup(Rotated(period=3), model)
    seen = []
    for k in range(7):
        factorised.clear()
        state, model = step(state, model, [array(g) for g in drawn(k + 1)])
        seen.append(sorted(factorised))

    assert seen == [sorted([(2, 3, 3), (2, 4, 4), (1, 2, 2)]) if k % 3 == 0 else [] for k in range(7)]


def test_only_those_arrays_are_factorised_whose_step_it_is(factorised: list[Any]) -> None:
    xs = drawn(0, [(3, 3)] * 4)
    state = opt.setup(Rotated(period=2), xs)
    first = [*drawn(1, [(3, 3)] * 3), None]
    opt.update_(state, xs, first)
    factorised.clear()

    opt.update_(state, xs, drawn(2, [(3, 3)] * 4))

    assert factorised == [(1, 3, 3)]


def places_of(name: str, jaxpr: Any, inside: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The primitives around each one of a name."""
    found: list[tuple[str, ...]] = []
    for e in jaxpr.eqns:
        found += [inside] if e.primitive.name == name else []
        for value in e.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    found += places_of(name, inner, (*inside, e.primitive.name))
    return found


def test_under_jit_what_is_factorised_stands_in_a_branch() -> None:
    """Each array in one, though two passes read what comes out."""
    xs = [jnp.array(x, "float32") for x in drawn(0)]

    places = places_of("eigh", jax.make_jaxpr(opt.update)(opt.setup(Rotated(), xs), xs, xs).jaxpr)

    assert len(places) == len(xs)
    assert all("cond" in inside for inside in places)


def test_it_is_scanned_as_it_is_stepped() -> None:
    xs, grads = drawn(0), [drawn(k) for k in range(1, 6)]
    with jax.enable_x64(True):
        model = [jnp.array(x) for x in xs]
        state = opt.setup(Rotated(), model)
        stacks = [jnp.stack([jnp.array(g[i]) for g in grads]) for i in range(len(xs))]

        (_, model), _ = jax.lax.scan(lambda c, g: (opt.update(*c, g), None), (state, model), stacks)

        for i, x in enumerate(xs):
            near(model[i], rotated(x, [g[i] for g in grads])[0])


# -- with other rules ----------------------------------------------------------------------------------------


@each_library
def test_behind_a_window_it_counts_the_steps_that_are_taken(world: World) -> None:
    xs, grads = drawn(0), [drawn(k) for k in range(1, 9)]
    with world.open():
        model = world.put(xs)
        state = world.setup(opt.Chain(opt.AccumGrad(2), Rotated()), model)
        for g in grads:
            state, model = world.step(state, model, world.put(g))
        for i, x in enumerate(xs):
            means = [(a[i] + b[i]) / 2 for a, b in zip(grads[::2], grads[1::2], strict=True)]
            near(world.get(model[i]), rotated(x, means)[0])


def test_behind_a_window_nothing_is_factorised_while_it_is_open(factorised: list[Any]) -> None:
    xs = drawn(0)
    state = opt.setup(opt.Chain(opt.AccumGrad(2), Rotated(period=1)), xs)
    seen = []
    for k in range(4):
        factorised.clear()
        opt.update_(state, xs, drawn(k + 1))
        seen.append(len(factorised))

    assert seen == [0, 3, 0, 3]


@each_library
def test_averaged_frozen_and_clipped_it_is_the_same_rule(world: World) -> None:
    xs, grads = drawn(0), [drawn(k) for k in range(1, 6)]
    with world.open():
        model = world.put(xs)
        state = world.setup(opt.EMA(Rotated(), 0.5), model)
        for k, g in enumerate(grads):
            if k in (1, 3):
                (opt.freeze_ if k == 1 else opt.thaw_)(state[0])
            state, model = world.step(state, model, world.put(g))
        averages = opt.averaged(state, model)
        for i, x in enumerate(xs):
            mine = [None if i == 0 and k in (1, 2) else g[i] for k, g in enumerate(grads)]
            near(world.get(model[i]), rotated(x, mine)[0])
            assert np.isfinite(world.get(averages[i])).all()


def test_with_masters_it_is_the_rule_of_the_masters() -> None:
    xs, grads = drawn(0), [drawn(k) for k in range(1, 6)]
    model = [torch.tensor(x).bfloat16() for x in xs]
    starts = [x.float().numpy().astype(float) for x in model]
    state = opt.setup(opt.MixedPrecision(Rotated()), model)
    for g in grads:
        state, model = opt.update(state, model, [torch.tensor(a, dtype=torch.float32) for a in g])

    for i, x in enumerate(starts):
        wanted = rotated(x, [g[i].astype(np.float32).astype(float) for g in grads])[0]
        np.testing.assert_allclose(model[i].float(), wanted, atol=0.02)


# -- what may stand in it ------------------------------------------------------------------------------------


class Nested(opt.Rule):
    """Choices of numbers, of elements and of matrices, one in the other and one after the other."""

    def init(self, x: Any) -> Any:
        n = x.shape[0]
        return {
            "size": 0.0,
            "h": opt.zeros_like(x),
            "a": ops.zeros((n, n), like=x),
            "b": ops.eye(n, like=x),
            "c": ops.eye(n, like=x),
            "t": 0,
        }

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        t = state["t"]
        gram = dx @ ops.transpose(dx)
        size = ops.every(t % 2 == 0, lambda: ops.norm(gram @ gram), state["size"])
        h = ops.every(t % 3 == 0, lambda: opt.ema(0.5, state["h"], dx), state["h"])
        a = ops.every(t % 2 == 0, lambda: gram @ gram / (1 + ops.norm(gram)), state["a"])

        def inner() -> Any:
            twice = a @ state["b"]
            return ops.every(t % 4 == 0, lambda: twice @ twice, twice), twice + 1 / (1 + size)

        b, c = ops.every(t % 2 == 0, inner, (state["b"], state["c"]))
        step = 0.01 * (b @ dx + c @ h) / (1 + ops.norm(b @ dx))
        return {"size": size, "h": h, "a": a, "b": b, "c": c, "t": t + 1}, step


def nested(x: Any, grads: Any) -> Any:
    n, size, h, t = x.shape[0], 0.0, 0 * x, 0
    a, b, c = np.zeros((n, n)), np.eye(n), np.eye(n)
    for g in grads:
        gram = g @ g.T
        if t % 3 == 0:
            h = (h + g) / 2
        if t % 2 == 0:
            size = np.linalg.norm(gram @ gram)
            a = gram @ gram / (1 + np.linalg.norm(gram))
            twice = a @ b
            b, c = twice @ twice if t % 4 == 0 else twice, twice + 1 / (1 + size)
        x, t = x - 0.01 * (b @ g + c @ h) / (1 + np.linalg.norm(b @ g)), t + 1
    return x, (size, h, a, b, c)


@wherever_it_runs
def test_choices_may_stand_in_each_other_and_after_each_other(world: World) -> None:
    xs, grads = drawn(0), [[g / 3 for g in drawn(k)] for k in range(1, 7)]
    with world.open():
        model = world.put(xs)
        state = world.setup(Nested(), model)
        for g in grads:
            state, model = world.step(state, model, world.put(g))
        for i, x in enumerate(xs):
            wanted, kept = nested(x, [g[i] for g in grads])
            near(world.get(model[i]), wanted)
            for key, value in zip(["h", "a", "b", "c"], kept[1:], strict=True):
                near(world.get(state[i].state[key]), value)


class Swaps(opt.Rule):
    """Two matrices of the state that change places at every second step: old values lie in the state."""

    def init(self, x: Any) -> Any:
        n = x.shape[0]
        return ops.eye(n, like=x), 2 * ops.eye(n, like=x), 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        a, b, t = state
        a, b = ops.every(t % 2 == 0, lambda: (a @ b + 1, a), (b, a))
        return (a, b, t + 1), b @ dx


@wherever_it_runs
def test_old_values_are_read_before_they_are_written(world: World) -> None:
    shapes = [(40, 3), (40, 3), (3, 3), (3, 3), (2, 3)]
    xs, grads = drawn(0, shapes), [drawn(k, shapes) for k in range(1, 5)]
    with world.open():
        model = world.put(xs)
        state = world.setup(Swaps(), model)
        for g in grads:
            state, model = world.step(state, model, world.put(g))
        for i, x in enumerate(xs):
            n, wanted = len(x), x
            a, b = np.eye(n), 2 * np.eye(n)
            for t, g in enumerate(grads):
                a, b = (a @ b + 1, a) if t % 2 == 0 else (b, a)
                wanted = wanted - b @ g[i]
            near(world.get(model[i]), wanted)
            near(world.get(state[i].state[0]), a)
            near(world.get(state[i].state[1]), b)


class Periodic(opt.Rule):
    """Elements alone: a mean that is renewed at every second step."""

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x), 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        m, t = state
        m = ops.every(t % 2 == 0, lambda: opt.ema(0.5, m, dx / (1 + ops.norm(dx))), m)
        return (m, t + 1), 0.1 * m


@everywhere
def test_elements_are_chosen_in_the_pass(world: World) -> None:
    xs, grads = drawn(0, [(3,), (2, 2)]), [drawn(k, [(3,), (2, 2)]) for k in range(1, 5)]
    with world.open():
        model = world.put(xs)
        state = world.setup(Periodic(), model)
        for g in grads:
            state, model = world.step(state, model, world.put(g))
        for i, x in enumerate(xs):
            m, wanted = 0 * x, x
            for k, g in enumerate(grads):
                if k % 2 == 0:
                    m = (m + g[i] / (1 + np.linalg.norm(g[i]))) / 2
                wanted = wanted - 0.1 * m
            near(world.get(model[i]), wanted)


def test_a_step_with_it_is_differentiated() -> None:
    """By torch and by JAX: the derivative by the gradient, against differences, at both kinds of steps."""
    x, g = drawn(0, [(3, 4)])[0], drawn(1, [(3, 4)])[0]
    weights = drawn(2, [(3, 4)])[0]

    def moved(dx: Any, new: bool) -> Any:
        left = dx @ ops.transpose(dx)
        q = ops.every(new, lambda: left @ left, ops.eye(3, like=dx))
        return q @ dx

    class Moves(opt.Rule):
        new: bool = opt.static(True)

        def init(self, x: Any) -> Any:
            return 0

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state + 1, moved(dx, state % 2 == (0 if self.new else 1))

    for new in (True, False):
        h = 1e-6
        around = [
            ((moved(g + h * e, new) - moved(g - h * e, new)) * weights).sum() / (2 * h) for e in unit(g)
        ]
        dx: Any = torch.tensor(g, requires_grad=True)
        start = torch.tensor(x)
        _, y = opt.update(opt.setup(Moves(new), start), start, dx)
        (-(y * torch.tensor(weights)).sum()).backward()
        np.testing.assert_allclose(dx.grad.reshape(-1), around, rtol=1e-6)
        with jax.enable_x64(True):
            state = opt.setup(Moves(new), jnp.array(x))

            def loss(dx: Any, state: Any = state) -> Any:
                return -(opt.update(state, jnp.array(x), dx)[1] * weights).sum()

            np.testing.assert_allclose(jax.grad(loss)(jnp.array(g)).reshape(-1), around, rtol=1e-6)


def unit(a: Any) -> Any:
    for i in range(a.size):
        yield np.eye(1, a.size, i).reshape(a.shape)


def test_the_old_values_may_be_any_nest() -> None:
    old = ({"a": np.ones(1), "b": None}, RotatedState(1.0, None, (2.0, 3.0), 4))
    new = ({"a": np.zeros(1), "b": None}, RotatedState(5.0, None, (6.0, 7.0), 8))

    assert repr(ops.every(True, lambda: new, old)) == repr(new)
    assert repr(ops.every(False, lambda: new, old)) == repr(old)


class Sequence(opt.Rule):
    """Two choices one after the other, with numbers of whole arrays in them and after them."""

    def init(self, x: Any) -> Any:
        n = x.shape[0]
        return (ops.zeros((n, n), like=x), opt.zeros_like(x)), ops.eye(n, like=x), 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        (a, v), q, t = state
        size = ops.norm(dx)
        q = ops.every(t % 2 == 0, lambda: q + dx @ ops.transpose(dx) / (1 + size + ops.norm(q @ q)), q)
        p = q @ dx
        a, v = ops.every(
            t % 2 == 0,
            lambda: (q @ q / ops.max(ops.abs(q)), ops.take(v, ops.argsort(-ops.sum(p, axis=0)), axis=-1) + p),
            (a, v),
        )
        step = a @ dx + v / (1 + ops.norm(v))
        rows = ops.sum(step * step, axis=-1, keepdims=True)
        return ((a, v), q, t + 1), 0.01 * step / (1 + ops.sqrt(rows) + ops.norm(step))


@pytest.mark.parametrize("shape", [(5, 5), (5, 6), (96, 96), (96, 128)], ids=str)
@pytest.mark.parametrize("array", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_choices_in_sequence_are_right_at_every_size(array: Any, shape: Any) -> None:
    """Against the rule on plain arrays, where `every` is an `if`; long rows have passes over them."""
    xs, grads = drawn(0, [shape] * 2), [drawn(k, [shape] * 2) for k in range(1, 5)]
    model, rule = list(map(array, xs)), Sequence()
    state = opt.setup(rule, model)
    for g in grads:
        state, model = opt.update_(state, model, list(map(array, g)))
    for i, x in enumerate(xs):
        plain, wanted = rule.init(x), x
        for g in grads:
            plain, step = rule.apply(plain, wanted, g[i])
            wanted = wanted - step
        np.testing.assert_allclose(np.asarray(model[i]), wanted, rtol=1e-8, atol=1e-10)


# -- what is said of it --------------------------------------------------------------------------------------


def test_the_plan_says_what_only_some_steps_do() -> None:
    model = drawn(0, [(3, 4)] * 2)

    text = str(opt.explain(opt.setup(Rotated(period=2), model)))

    assert "every: array operations: 1 eigh;" in text
    assert "only where ((t - (period * floor((t / period)))) == 0)" in text


@worlds(*[w for w in WORLDS if w.capturable and w.step is opt.update_])
def test_a_captured_graph_refuses_it_and_says_what_to_write(world: World) -> None:
    with world.open(), pytest.raises(opt.BadSetting) as error:
        world.setup(Rotated(), world.put(drawn(0)))

    assert str(error.value) == (
        "capturable=True cannot run this model: Rotated computes with matrices at some steps alone, and a "
        "captured graph leaves nothing out; leave capturable out, capture the forward and the backward pass, "
        "and call update_ after each replay"
    )


class Wrong(opt.Rule):
    kind: str = opt.static("")

    def init(self, x: Any) -> Any:
        return ops.eye(2, like=x), 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        q, t = state
        made = {
            "elements": lambda: ops.every(dx > 0, lambda: q @ q, q),
            "count": lambda: ops.every(t == 0, lambda: (q @ q, q), q),
            "shape": lambda: ops.every(t == 0, lambda: dx @ ops.transpose(dx), q),
            "number": lambda: ops.every(t == 0, lambda: q @ q, 0.0),
        }[self.kind]()
        return (q, t + 1), dx + ops.norm(made)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("elements", "was given a condition for each element; it takes a scalar one: use where()"),
        ("count", "computes 2 values where there are 1 old ones"),
        (
            "shape",
            "computes an array of shape (3, 3) where the old one has shape (2, 2), at model['w']",
        ),
        ("number", "has a number on one side and an array on the other; write number + zeros(shape, like=x)"),
    ],
)
def test_a_mistake_is_answered_at_setup(kind: str, said: str) -> None:
    with pytest.raises(opt.TraceError) as error:
        opt.setup(Wrong(kind), {"w": np.ones((3, 4))})

    assert said in str(error.value)
    assert str(error.value).startswith("Wrong: every() ")
