"""AdamP and SGDP: the part of a step along x, unit by unit and over the whole array, in two passes."""

from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.rules.projected import SGDPState

pytest.importorskip("numba")

DRAWN = np.random.default_rng(0)
X = DRAWN.normal(size=(5, 40))
EVEN = np.tile([1.0, -1.0], 20)
"""Orthogonal to a row of ones."""

WORLDS: dict[str, tuple[Any, Any]] = {
    "rows": (np.ones((5, 40)) + 0.01 * X, np.outer(1 + DRAWN.random(5), EVEN)),
    "whole": (np.ones((4, 40)), np.outer([1.0, -1.0, 2.0, -2.0], np.ones(40))),
    "neither": (X, X + DRAWN.normal(size=(5, 40))),
}
"""(x, dx) nearly orthogonal in every row, over the whole array alone, and not at all."""


def tangent(x: Any, dx: Any, step: Any, delta: float) -> tuple[Any, bool]:
    """Algorithm 1 of the paper: (the step, whether it was projected)."""
    for a, b, s in ((x, dx, step), tuple(v.reshape(1, -1) for v in (x, dx, step))):
        long = np.linalg.norm(a, axis=1, keepdims=True)
        cosine = np.abs((a * b).sum(1)) / long[:, 0] / np.linalg.norm(b, axis=1)
        if cosine.max() < delta / a.shape[1] ** 0.5:
            unit = a / long
            return (s - unit * (unit * s).sum(1, keepdims=True)).reshape(x.shape), True
    return step, False


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "rtol"), [("float64", 1e-8), ("float32", 1e-5)])
@pytest.mark.parametrize("engine", ["numba", "interpret"])
def test_a_step_loses_its_part_along_x_where_that_is_orthogonal_to_the_gradient(
    world: str, kind: str, rtol: float, engine: str
) -> None:
    x, dx = (a.astype(kind) for a in WORLDS[world])
    m = DRAWN.normal(size=x.shape).astype(kind)
    state = opt.setup(opt.SGDP(0.1, 0.9, 0.05, delta=0.1, ratio=0.2), [x], engine=engine)
    state[0].state = SGDPState(m)
    wide = x.astype(float), dx.astype(float)
    step, projected = tangent(*wide, 0.9 * m.astype(float) + wide[1], 0.1)

    _, (found,) = opt.update(state, [x], [dx])

    assert projected == (world != "neither")
    expected = 0.1 * (step + 0.5 * (0.2 if projected else 1) * wide[0])
    np.testing.assert_allclose(x.astype(float) - found, expected, rtol, 10 * rtol)


@pytest.mark.parametrize(("rule", "moved"), [(opt.AdamP(), 16 + 28), (opt.SGDP(), 12 + 20)])
def test_all_inner_products_are_taken_in_one_pass(rule: opt.Rule, moved: int) -> None:
    (group,) = opt.explain(opt.setup(rule, [np.ones((64, 64), np.float32)])).groups

    assert (group.passes, group.bytes_per_parameter) == (2, moved)
