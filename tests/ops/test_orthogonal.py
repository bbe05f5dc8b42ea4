"""Does `orthogonal` compute the polynomials of singular values that it says, on every stack and library?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers.ops.matrices import NEWTON_SCHULZ

SHAPES = [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (2, 3, 5), (2, 5, 3), (4, 2, 3, 5)]


def drawn(seed: int, *shape: int, dtype: str = "float64") -> Any:
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal(shape), rng.standard_normal(shape)
    return (parts[0] + 1j * parts[1] if "complex" in dtype else parts[0]).astype(dtype)


def by_singular_values(m: Any, coefficients: Any, steps: int) -> Any:
    """U p(S) V^H of every matrix, where the polynomials are taken of each singular value."""
    u, s, v = np.linalg.svd(m, full_matrices=False)
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    for n in range(steps):
        a, b, c = coefficients[min(n, len(coefficients) - 1)]
        s = a * s + b * s**3 + c * s**5
    return u * s[..., None, :] @ v


class Orthogonal(opt.Rule):
    """Steps by the gradient made orthogonal."""

    coefficients: Any = opt.static("jordan")
    steps: int | None = opt.static(None)
    dtype: str | None = opt.static(None)

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, opt.ops.orthogonal(dx, self.coefficients, self.steps, dtype=self.dtype)


def step_of(rule: opt.Rule, dx: Any, engine: str | None = None) -> Any:
    x = 0 * dx
    return x - opt.update(opt.setup(rule, x, engine=engine), x, dx)[1]


@pytest.mark.parametrize("name", NEWTON_SCHULZ)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_takes_the_polynomials_of_its_name(shape: Any, dtype: str, name: str) -> None:
    m = drawn(0, *shape, dtype=dtype)
    wanted = by_singular_values(m, *NEWTON_SCHULZ[name])

    np.testing.assert_allclose(opt.ops.orthogonal(m, name), wanted, rtol=1e-10, atol=1e-10)
    for engine in (None, "interpret"):
        np.testing.assert_allclose(step_of(Orthogonal(name), m, engine), wanted, rtol=1e-10, atol=1e-10)


def test_the_presets_are_those_that_were_published() -> None:
    """Their sums say where a singular value of 1 goes: near 1 at the last step."""
    ends = {name: sum(triples[-1]) for name, (triples, _) in NEWTON_SCHULZ.items()}

    assert ends == pytest.approx({"jordan": 0.701, "you": 0.9853, "polar_express": 1.0, "exact": 1.0})
    assert {name: steps for name, (_, steps) in NEWTON_SCHULZ.items()} == {
        "jordan": 5,
        "you": 5,
        "polar_express": 8,
        "exact": 20,
    }


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 6)], ids=str)
def test_many_exact_steps_give_the_polar_factor(shape: Any) -> None:
    m = drawn(1, *shape)
    u, _, v = np.linalg.svd(m, full_matrices=False)

    np.testing.assert_allclose(opt.ops.orthogonal(m, "exact"), u @ v, atol=1e-12)


def test_singular_values_end_near_one() -> None:
    """Those of a normal matrix by five steps of Jordan, which are steepest at 0."""
    s = np.linalg.svd(opt.ops.orthogonal(drawn(0, 8, 5)), compute_uv=False)

    assert s.min() > 0.67
    assert s.max() < 1.14


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_last_polynomial_is_repeated(steps: int) -> None:
    triples = ((2.0, -1.5, 0.5), (3.4445, -4.7750, 2.0315))
    m = drawn(0, 3, 4)

    wanted = by_singular_values(m, triples, steps)
    np.testing.assert_allclose(opt.ops.orthogonal(m, triples, steps), wanted, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 3)], ids=str)
def test_all_libraries_say_the_same(shape: Any) -> None:
    m = drawn(2, *shape, dtype="float32")
    wanted = by_singular_values(m.astype(float), *NEWTON_SCHULZ["you"])

    for array in (m, torch.tensor(m), jnp.array(m)):
        np.testing.assert_allclose(np.asarray(opt.ops.orthogonal(array, "you")), wanted, atol=1e-4)
        np.testing.assert_allclose(np.asarray(step_of(Orthogonal("you"), array)), wanted, atol=1e-4)


def test_it_is_the_same_under_jit_and_vmap() -> None:
    m = drawn(3, 4, 3, 5, dtype="float32")
    alone = np.stack([opt.ops.orthogonal(one) for one in m])

    for function in (jax.jit(opt.ops.orthogonal), jax.vmap(opt.ops.orthogonal)):
        np.testing.assert_allclose(function(jnp.array(m)), alone, atol=1e-4)


def test_a_model_of_many_shapes_is_stepped_as_its_arrays_alone() -> None:
    shapes = [(3, 5), (5, 3), (3, 5), (2, 3, 4), (2, 3, 4), (7, 7)]
    grads = [drawn(i, *s) for i, s in enumerate(shapes)]
    model = [0 * g for g in grads]

    _, new = opt.update(opt.setup(Orthogonal(), model), model, grads)

    for x, g in zip(new, grads, strict=True):
        np.testing.assert_allclose(-x, opt.ops.orthogonal(g), atol=1e-12)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_zeros_stay_zeros(dtype: str | None) -> None:
    for m in (np.zeros((3, 4), np.float32), torch.zeros(3, 4)):
        assert not np.asarray(opt.ops.orthogonal(m, dtype=dtype)).any()
        assert not np.asarray(step_of(Orthogonal(dtype=dtype), m)).any()


@pytest.mark.parametrize("engine", [None, "interpret"])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_products_in_bfloat16_are_near_and_not_the_same(library: str, engine: str | None) -> None:
    """They round to 2^-8 at every product; a rule that asks for them is told so by its numbers."""
    m = drawn(4, 16, 24, dtype="float32")
    array: Any = torch.tensor(m) if library == "torch" else jnp.array(m)
    exact = by_singular_values(m.astype(float), *NEWTON_SCHULZ["jordan"])

    got = np.asarray(step_of(Orthogonal(dtype="bfloat16"), array, engine))

    assert got.dtype == np.float32
    assert 1e-4 < np.abs(got - exact).max() < 0.1


def test_products_in_float32_of_a_float64() -> None:
    m = drawn(5, 8, 6)
    exact = by_singular_values(m, *NEWTON_SCHULZ["jordan"])

    for got in (opt.ops.orthogonal(m, dtype="float32"), step_of(Orthogonal(dtype="float32"), m)):
        assert got.dtype == np.float64
        assert 1e-9 < np.abs(got - exact).max() < 1e-4


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(kind: torch.dtype) -> None:
    """Products of float16 would overflow."""
    m = torch.tensor(drawn(6, 4, 5) * 1000).to(kind)

    got = opt.ops.orthogonal(m)

    assert got.dtype is torch.float32
    np.testing.assert_allclose(
        got, by_singular_values(m.double().numpy(), *NEWTON_SCHULZ["jordan"]), atol=1e-4
    )


def test_what_is_none_of_its_arguments_is_refused() -> None:
    m = drawn(0, 3, 4)
    pairs: Any = ((1.0, 2.0),)

    with pytest.raises(opt.BadSetting, match="'newton'; it takes 'jordan', 'you'"):
        opt.ops.orthogonal(m, "newton")
    with pytest.raises(opt.BadSetting, match="takes triples"):
        opt.ops.orthogonal(m, pairs)
    with pytest.raises(opt.BadSetting, match=r"steps=0\); it takes 1 and more"):
        opt.ops.orthogonal(m, steps=0)
    with pytest.raises(opt.BadSetting, match="it takes None, 'bfloat16' or 'float32'"):
        opt.ops.orthogonal(m, dtype="float16")
    with pytest.raises(opt.TraceError, match=r"shape \(3,\); it takes two axes"):
        opt.ops.orthogonal(m[:, 0])
