"""`jax.grad` gives the conjugate of the direction in which a loss of complex parameters grows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimisers as opt
from tests.table import TABLE, name

GOAL = np.array([1 + 2j, -1j])


@pytest.fixture(autouse=True)
def single() -> Any:
    with jax.enable_x64(False):
        yield


def loss(model: Any) -> Any:
    return jnp.sum(jnp.abs(model["z"] - GOAL) ** 2) + jnp.sum(model["r"] ** 2)


START: dict[str, Any] = {"z": jnp.ones(2, jnp.complex64), "r": jnp.ones(1)}


@pytest.mark.parametrize(
    "step", [opt.update, opt.update_, jax.jit(opt.update)], ids=["pure", "in place", "jit"]
)
def test_gradients_of_jax_descend_where_setup_was_told(step: Any) -> None:
    state, model = opt.setup(opt.Descent(0.125), START, conjugate=True), dict(START)
    for _ in range(40):
        state, model = step(state, model, jax.grad(loss)(model))
    np.testing.assert_allclose(model["z"], GOAL, atol=1e-4)


@pytest.mark.parametrize("row", [r for r in TABLE if r.takes("complex64") and not r.matrix][:24:3], ids=name)
def test_it_is_as_conjugating_them_by_hand(row: Any) -> None:
    told, model = opt.setup(row.rule, START, conjugate=True), START
    plain, other = opt.setup(row.rule, START), START
    for _ in range(3):
        told, model = opt.update(told, model, jax.grad(loss)(model))
        plain, other = opt.update(plain, other, jax.tree.map(jnp.conj, jax.grad(loss)(other)))
    np.testing.assert_array_equal(model["z"], other["z"])
    assert jax.tree.structure(told) != jax.tree.structure(plain)


def test_as_optax_takes_them_too() -> None:
    tx: Any = opt.as_optax(opt.Descent(0.125), conjugate=True)
    updates, _ = tx.update(jax.grad(loss)(START), tx.init(START), START)
    np.testing.assert_allclose(updates["z"], 0.25 * (GOAL - 1), rtol=1e-6)


def test_other_libraries_may_be_told_as_well() -> None:
    x = np.zeros(2, np.complex64)
    for more in (None, 2):
        g = np.array([1j, 1 + 1j], np.complex64)
        state = opt.setup(opt.Descent(0.5), {"x": x}, conjugate=True)
        _, new = opt.update(state, {"x": x}, {"x": g if more is None else g.astype(np.complex128)})
        np.testing.assert_allclose(new["x"], -0.5 * np.conj(g))
