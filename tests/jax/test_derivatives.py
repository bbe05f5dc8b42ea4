"""Steps have derivatives of any order under JAX, at gradients of 0 too, by every transform."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

import optimisers as opt
from tests.table import NORMS, TABLE, Row, name

ROWS = [row for row in TABLE if row.takes("float32") and row.name != "MixedPrecision-double"]
DERIVED = [
    row for row in ROWS if not row.name.startswith("ClipNorm") or row.name.endswith(("0.5", "2", "-inf"))
]
"""Norms of all orders are derived below, without rules around them."""

DIRECTION = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)), jnp.float32)


@pytest.fixture(autouse=True)
def single() -> Any:
    with jax.enable_x64(False):
        yield


def line(rule: opt.Rule) -> Callable[[Any], Any]:
    """The parameters after two steps whose gradients lie on a line through 0."""

    def along(t: Any) -> Any:
        x = jnp.ones((3, 3))
        state = opt.setup(rule, x)
        for _ in range(2):
            state, x = opt.update(state, x, t * DIRECTION)
        return x

    return along


@pytest.mark.slow
@pytest.mark.parametrize("row", DERIVED, ids=name)
def test_steps_have_two_derivatives_at_gradients_of_0(row: Row) -> None:
    """By the settings, the parameters and the gradients: backwards, where a branch that is not taken may give
    0 times infinity, and forwards through that.
    """
    h = opt.hyperparameters(opt.setup(row.rule, jnp.ones((3, 3))))

    def after(h: Any, x: Any, t: Any) -> Any:
        state = opt.with_hyperparameters(opt.setup(row.rule, x), h)
        for _ in range(2):
            state, x = opt.update(state, x, t * DIRECTION)
        return jnp.sum(x)

    at = h, jnp.ones((3, 3)), jnp.float32(0)
    with jax.disable_jit():
        found = jax.jvp(jax.grad(after, argnums=(0, 1, 2)), at, jax.tree.map(jnp.ones_like, at))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))


@pytest.mark.slow
@pytest.mark.parametrize("p", NORMS)
def test_norms_have_finite_derivatives_where_elements_are_0(p: float) -> None:
    """And those of a formula in NumPy where they are not."""

    def norm(x: Any) -> Any:
        return opt.ops.norm(x, p)

    for x in (jnp.zeros(3), jnp.array([0.0, 2.0, -3.0])):
        assert bool(jnp.isfinite(jax.grad(norm)(x)).all())
        assert bool(jnp.isfinite(jax.hessian(norm)(x)).all())

    x = np.array([0.5, 2.0, -3.0])
    with jax.enable_x64(True):
        found = jax.grad(norm)(jnp.asarray(x))
    h = 1e-6 * np.eye(3)
    around = [np.linalg.norm(x + d, p) - np.linalg.norm(x - d, p) for d in h]
    np.testing.assert_allclose(found, np.array(around) / 2e-6, rtol=1e-6, atol=1e-8)


def test_norms_of_no_elements_and_of_none_but_zeros_are_0() -> None:
    for p in NORMS:
        for x in (np.zeros(0), np.zeros(3), np.zeros((2, 0), np.float32)):
            assert opt.ops.norm(x, p) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", [opt.Adam(0.1, epsilon=1e-2), opt.AdaGrad(0.1), opt.Momentum(0.1)])
def test_a_step_is_expanded_by_jet(rule: opt.Rule) -> None:
    t, one = jnp.float32(0.75), jnp.float32(1)
    along = line(rule)
    _, (first, second) = jet.jet(along, (t,), ((one, jnp.float32(0)),))

    def slope(t: Any) -> Any:
        return jax.jvp(along, (t,), (one,))[1]

    np.testing.assert_allclose(first, slope(t), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(second, jax.jvp(slope, (t,), (one,))[1], rtol=1e-3, atol=1e-5)
