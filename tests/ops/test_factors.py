"""Do the operations on matrices give what numpy.linalg says, in every library, plain and inside of rules?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers import ops
from tests.worlds import World

LIBRARIES: dict[str, Callable[[Any], Any]] = {"numpy": np.array, "torch": torch.tensor, "jax": jnp.array}


def drawn(seed: int, *shape: int, dtype: str = "float64") -> Any:
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal(shape), rng.standard_normal(shape)
    return (parts[0] + 1j * parts[1] if "complex" in dtype else parts[0]).astype(dtype)


def gram(a: Any) -> Any:
    return a @ a.conj().swapaxes(-1, -2)


def near(got: Any, wanted: Any) -> None:
    """Equal up to the roundings of the narrower type."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    narrow = {got.dtype, wanted.dtype} & {np.dtype("float32"), np.dtype("complex64")}
    tolerance = 1e-4 if narrow else 1e-10
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


libraries = pytest.mark.parametrize("array", LIBRARIES.values(), ids=LIBRARIES)
types = pytest.mark.parametrize("dtype", ["float64", "complex128", "float32"])
outer = pytest.mark.parametrize("outer", [(), (3,), (2, 3)], ids=str)


# -- on plain arrays -----------------------------------------------------------------------------------------


@libraries
@types
@outer
def test_factors_multiply_to_what_was_factorised(array: Any, dtype: str, outer: Any) -> None:
    square, tall = gram(drawn(0, *outer, 4, 4, dtype=dtype)), drawn(1, *outer, 5, 3, dtype=dtype)

    w, q = map(np.asarray, ops.eigh(array(square)))
    near(q * w[..., None, :] @ q.conj().swapaxes(-1, -2), square)
    near(w, np.linalg.eigvalsh(square))
    for a in (tall, tall.swapaxes(-1, -2).copy()):
        q, r = map(np.asarray, ops.qr(array(a)))
        near(q @ r, a)
        near(q.conj().swapaxes(-1, -2) @ q, np.broadcast_to(np.eye(3), (*outer, 3, 3)))
        near(np.tril(r, -1), 0 * r)
        u, s, vh = map(np.asarray, ops.svd(array(a)))
        near(u * s[..., None, :] @ vh, a)
        near(s, np.linalg.svd(a, compute_uv=False))
        assert s.dtype == np.abs(a[:0]).dtype or array is jnp.array
    c = np.asarray(ops.cholesky(array(square)))
    near(gram(c), square)
    near(np.triu(c, 1), 0 * c)


@libraries
@types
@pytest.mark.parametrize("n", [1, 4, 33, 70])
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_triangle_is_solved(array: Any, dtype: str, n: int, upper: bool, transposed: bool) -> None:
    a, b = drawn(0, 2, n, n, dtype=dtype) / n + 2 * np.eye(n).astype(dtype), drawn(1, 2, n, 3, dtype=dtype)
    triangle = np.triu(a) if upper else np.tril(a)

    x = np.asarray(ops.solve_triangular(array(a), array(b), upper=upper, transposed=transposed))

    near(x, np.linalg.solve(triangle.swapaxes(-1, -2) if transposed else triangle, b))


@libraries
def test_one_triangle_solves_for_many_matrices(array: Any) -> None:
    a, b = drawn(0, 4, 4) + 4 * np.eye(4), drawn(1, 3, 4, 2)

    near(ops.solve_triangular(array(a), array(b)), np.linalg.solve(np.triu(a), b))


@libraries
def test_a_zero_on_the_diagonal_gives_what_is_not_finite(array: Any) -> None:
    a = np.triu(np.ones((3, 3)))
    a[1, 1] = 0

    x = ops.solve_triangular(array(a), array(np.ones((3, 1))))

    assert not np.isfinite(np.asarray(x)).all()


@libraries
@outer
def test_parts_of_matrices(array: Any, outer: Any) -> None:
    a = drawn(0, *outer, 4, 3)

    near(ops.triu(array(a)), np.triu(a))
    near(ops.triu(array(a), 1), np.triu(a, 1))
    near(ops.triu(array(a), k=-1), np.triu(a, -1))
    near(ops.diagonal(array(a)), np.diagonal(a, axis1=-2, axis2=-1))
    for axis in range(-a.ndim, a.ndim):
        near(ops.argsort(array(a), axis=axis), np.argsort(a, axis=axis))
        places = array(np.array([2.0, 0.0, 2.0]) % a.shape[axis])
        near(
            ops.take(array(a), places, axis=axis), np.take(a, [2 % a.shape[axis], 0, 2 % a.shape[axis]], axis)
        )


@libraries
def test_places_may_differ_from_matrix_to_matrix(array: Any) -> None:
    a = drawn(0, 3, 4, 5)
    order = ops.argsort(array(a[:, 0]))

    near(ops.take(array(a), order, axis=-1), np.take_along_axis(a, np.argsort(a[:, 0])[:, None], axis=-1))


@libraries
def test_places_outside_are_taken_from_the_ends(array: Any) -> None:
    near(ops.take(array(np.arange(4.0)), array(np.array([-2.0, 1.0, 9.0]))), [0, 1, 3])


@libraries
def test_equal_elements_stay_in_order_and_nan_comes_last(array: Any) -> None:
    got = np.asarray(ops.argsort(array(np.array([2.0, np.nan, 1.0, 2.0, 1.0, -np.inf]))))

    assert got.tolist() == [5, 2, 4, 0, 3, 1]


@libraries
def test_what_has_no_answer_is_nan_for_that_matrix_alone(array: Any) -> None:
    square = gram(drawn(0, 3, 4, 4))
    square[0, 2, 1] = np.nan
    square[2, 0, 0] = np.inf
    tall = drawn(1, 3, 5, 4)
    tall[0, 0, 0], tall[2, 4, 3] = np.inf, np.nan

    found = [*ops.eigh(array(square)), *ops.qr(array(tall)), *ops.svd(array(tall))]
    found += [ops.cholesky(array(np.stack([-np.eye(4), np.eye(4), square[0]])))]

    for each in map(np.asarray, found):
        assert np.isnan(each[0]).all()
        assert np.isfinite(each[1]).all()
        assert np.isnan(each[2]).all()


@libraries
def test_of_no_rows_there_is_nothing(array: Any) -> None:
    assert [np.shape(f) for f in ops.svd(array(np.zeros((0, 3))))] == [(0, 0), (0,), (0, 3)]
    assert [np.shape(f) for f in ops.eigh(array(np.zeros((2, 0, 0))))] == [(2, 0), (2, 0, 0)]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(kind: torch.dtype) -> None:
    a = torch.tensor(drawn(0, 3, 3)).to(kind)

    for found in (*ops.eigh(a @ a.T), *ops.qr(a), *ops.svd(a), ops.solve_triangular(a, a), ops.argsort(a)):
        assert found.dtype is torch.float32


@libraries
def test_zeros_and_the_identity_beside_an_array(array: Any) -> None:
    for dtype in ("float16", "float32", "complex64"):
        x = array(np.ones(3, dtype))
        wide = "float32" if dtype == "float16" else dtype
        for made, wanted in ((ops.zeros((2, 3), x), np.zeros((2, 3))), (ops.eye(3, x), np.eye(3))):
            assert type(made) is type(x)
            assert np.asarray(made).dtype == wide
            near(made, wanted)
        assert np.asarray(ops.eye(2, x, dtype="float32")).dtype == np.float32
        assert np.asarray(ops.zeros((2,), x, dtype="int8")).dtype == np.int8


def test_factors_are_differentiated() -> None:
    """The derivative of the sum of singular values is the polar factor."""
    a = drawn(0, 4, 3)
    u, _, vh = np.linalg.svd(a, full_matrices=False)

    x = torch.tensor(a, requires_grad=True)
    ops.svd(x)[1].sum().backward()

    near(x.grad, u @ vh)
    near(jax.grad(lambda m: ops.svd(m)[1].sum())(jnp.array(a)), u @ vh)


# -- inside of rules -----------------------------------------------------------------------------------------


class Whitened(opt.Rule):
    """The gradient times the root of its Grams' inverses, from both sides; every operation is in it."""

    eta: float = 0.5
    beta: float = 0.8

    def init(self, x: Any) -> Any:
        rows, columns = x.shape[-2:]
        outer = x.shape[:-2]
        if outer:
            left = opt.zeros_like(x) @ ops.transpose(opt.zeros_like(x)) + ops.eye(rows, x)
            return left, ops.zeros((*outer, columns, columns), like=x), ops.zeros((*outer, columns), like=x)
        return ops.eye(rows, like=x), ops.zeros((columns, columns), like=x), ops.zeros((columns,), like=x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        left, right, _ = state
        turned = ops.transpose(dx)
        columns = x.shape[-1]
        left = opt.ema(self.beta, left, dx @ turned)
        right = opt.ema(self.beta, right, turned @ dx) + 0.1 * ops.eye(columns, like=x)
        w, q = ops.eigh(left)
        root = q @ (ops.reshape(w**-0.25, (*w.shape, 1)) * ops.transpose(q))
        c = ops.cholesky(right)
        half = ops.solve_triangular(c, ops.transpose(root @ dx), upper=False)
        back = ops.transpose(ops.solve_triangular(c, half, upper=False, transposed=True))
        u, s, vh = ops.svd(back)
        order = ops.argsort(s)
        u, vh = ops.take(u, order, axis=-1), ops.take(vh, order, axis=-2)
        p, r = ops.qr(u)
        step = p @ ops.triu(r) @ vh + back + ops.norm(s) * dx
        return (left, right, ops.diagonal(right)), self.eta * step


def whitened(x: Any, grads: Any) -> Any:
    """The same in NumPy, matrix by matrix."""
    rule = Whitened()
    state = rule.init(x)
    for g in grads:
        state, step = rule.apply(state, x, g)
        x = x - step
    return x, state


SHAPES = [(3, 5), (5, 3), (4, 4), (3, 5), (2, 3, 4)]


@pytest.mark.parametrize("engine", [None, "interpret"])
@libraries
def test_a_rule_made_of_factors_is_what_it_is_on_plain_arrays(array: Any, engine: str | None) -> None:
    dtype = "float32" if array is jnp.array else "float64"
    xs = [drawn(i, *s, dtype=dtype) for i, s in enumerate(SHAPES)]
    grads = [[drawn(10 * k + i, *s, dtype=dtype) for i, s in enumerate(SHAPES)] for k in range(1, 4)]
    model = [array(x) for x in xs]
    state = opt.setup(Whitened(), model, engine=engine)

    for g in grads:
        state, model = opt.update(state, model, [array(a) for a in g])

    for i, x in enumerate(xs):
        wanted, kept = whitened(x.astype(float), [g[i].astype(float) for g in grads])
        tolerance = 2e-3 if dtype == "float32" else 1e-9
        np.testing.assert_allclose(np.asarray(model[i]), wanted, rtol=tolerance, atol=tolerance)
        for got, want in zip(state[i].state, kept, strict=True):
            np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=tolerance)


def test_in_place_and_under_jit_it_is_the_same() -> None:
    xs = [drawn(i, *s, dtype="float32") for i, s in enumerate(SHAPES)]
    grads = [drawn(10 + i, *s, dtype="float32") for i, s in enumerate(SHAPES)]
    model = [x.copy() for x in xs]
    opt.update_(opt.setup(Whitened(), model), model, grads)
    arrays = list(map(jnp.array, xs))

    _, new = jax.jit(opt.update)(opt.setup(Whitened(), arrays), arrays, list(map(jnp.array, grads)))

    for a, b in zip(new, model, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


class Factorises(opt.Rule):
    """Steps by a factor of the gradient."""

    what: str = opt.static("eigh")

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        found = getattr(ops, self.what)(dx)
        return state, found[-1] if isinstance(found, tuple) else found

    def init(self, x: Any) -> Any:
        return ()


def test_one_computation_serves_all_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three factors of two shapes: two calls a step, whatever is read of them."""
    calls: list[Any] = []
    svd = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda a, **o: calls.append(a.shape) or svd(a, **o))
    model = [drawn(i, *s) for i, s in enumerate([(3, 4), (3, 4), (5, 2)])]

    class Scaled(opt.Rule):
        def init(self, x: Any) -> Any:
            return ()

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            u, s, vh = ops.svd(dx)
            return state, opt.norm(s) * (u @ vh)  # the norm comes before the product, a pass later

    _, new = opt.update(opt.setup(Scaled(), model), model, model)

    assert calls == [(2, 3, 4), (1, 5, 2)]
    for x, y in zip(model, new, strict=True):
        u, s, vh = svd(x, full_matrices=False)
        np.testing.assert_allclose(x - y, np.linalg.norm(s) * (u @ vh), rtol=1e-10)


@pytest.mark.parametrize(
    ("what", "shape", "said"),
    [
        ("eigh", (3, 4), r"eigh\(\) of an array of shape \(3, 4\); it takes square matrices"),
        ("cholesky", (4, 3), r"cholesky\(\) of an array of shape \(4, 3\); it takes square matrices"),
        ("qr", (3,), r"qr\(\) of an array of shape \(3,\); it takes two axes and more"),
        ("svd", (), r"svd\(\) of an array of shape \(\); it takes two axes and more"),
        ("diagonal", (3,), r"diagonal\(\) of an array of shape \(3,\); it takes two axes and more"),
    ],
)
@libraries
def test_what_is_no_matrix_is_refused_at_setup_with_its_place(
    array: Any, what: str, shape: Any, said: str
) -> None:
    model = {"layer": {"w": array(np.ones(shape))}}

    with pytest.raises(opt.TraceError, match=f"Factorises: {said}, at model\\['layer'\\]\\['w'\\]"):
        opt.setup(Factorises(what), model)


@pytest.mark.parametrize("engine", [None, "interpret"])
@libraries
def test_a_gradient_with_nan_makes_nan_of_its_own_array_alone(array: Any, engine: str | None) -> None:
    model = [array(drawn(i, 3, 3)) for i in range(3)]
    grads = [drawn(10 + i, 3, 3) for i in range(3)]
    grads[1][0, 0] = np.nan

    _, new = opt.update(opt.setup(Factorises("svd"), model, engine=engine), model, list(map(array, grads)))

    assert [bool(np.isnan(np.asarray(x)).all()) for x in new] == [False, True, False]
    assert np.isfinite(np.asarray(new[0])).all()
    assert np.isfinite(np.asarray(new[2])).all()


def test_cupy_says_the_same() -> None:
    """Or what stands in its place: NumPy that refuses what CuPy refuses."""
    world = World("cupy", None)
    square, tall = gram(drawn(0, 2, 4, 4)) + np.eye(4), drawn(1, 2, 5, 3)
    with world.open():
        w, q = map(world.get, ops.eigh(world.put(square)))
        near(q * w[..., None, :] @ q.swapaxes(-1, -2), square)
        near(gram(world.get(ops.cholesky(world.put(square)))), square)
        assert np.isnan(world.get(ops.cholesky(world.put(-square)))).all()
        u, s, vh = map(world.get, ops.svd(world.put(tall)))
        near(u * s[..., None, :] @ vh, tall)
        x = ops.solve_triangular(world.put(square), world.put(square), transposed=True)
        near(world.get(x), np.linalg.solve(np.triu(square).swapaxes(-1, -2), square))
        order = ops.argsort(world.put(tall[0, :, 0]))
        near(world.get(ops.take(world.put(tall), order, axis=1)), tall[:, np.argsort(tall[0, :, 0])])
        model = [drawn(i, *s) for i, s in enumerate(SHAPES)]
        arrays = world.put(model)
        _, arrays = opt.update(opt.setup(Whitened(), arrays), arrays, world.put(model))
        for x, old in zip(arrays, model, strict=True):
            near(world.get(x), whitened(old, [old])[0])
