"""Logarithms, powers and angles of the CPU's kernels: as near as float32 can be, at its edges too."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt

pytest.importorskip("numba")

EDGES = np.array(
    [0, 0.5, 1, 2, 3, 27, 1e-8, 1e-45, 3e-39, 1e-30, 88.7, 104, 3.4e38, 1 - 2**-24, np.inf, np.nan],
    np.float32,
)
DRAWN = np.random.default_rng(0)
NUMBERS = np.concatenate(
    [
        *(EDGES, -EDGES, DRAWN.normal(size=20_000), 30 * DRAWN.normal(size=20_000)),
        DRAWN.choice([-1, 1], 40_000) * np.exp(DRAWN.uniform(-103, 88, 40_000)),
    ]
).astype(np.float32)

FUNCTIONS = [
    *((opt.ops.exp, np.exp), (opt.ops.expm1, np.expm1), (opt.ops.log, np.log), (opt.ops.log1p, np.log1p)),
    *((opt.ops.tanh, np.tanh), (opt.ops.arctan, np.arctan)),
    (lambda x: opt.ops.arctan(x / -3), lambda x: np.arctan(x / -3)),
    (lambda x: x ** (1 / 3), lambda x: x ** (1 / 3)),
    *((lambda x, p=p: x**p, lambda x, p=p: x**p) for p in (-0.375, 0.625, 1.625, 3.0, -4.0, -5.0)),
]
"""Exponents that a float32 holds; a third counts as one."""


class Storing(opt.Rule):
    """Keeps a function of the gradient."""

    function: Callable[..., Any] = opt.static(opt.ops.exp)

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return self.function(dx), 0 * x


def stored(function: Callable[..., Any], numbers: Any, kind: str = "float32") -> Any:
    x = np.zeros(numbers.shape, kind)
    state, _ = opt.update_(opt.setup(Storing(function), [x]), [x], [numbers.astype(kind)])
    return state[0].state


@pytest.mark.parametrize(("ours", "numpys"), FUNCTIONS)
@pytest.mark.filterwarnings("ignore:(divide|invalid|overflow)")
def test_a_function_of_float32_is_the_nearest_number_or_the_next(
    ours: Callable[..., Any], numpys: Callable[..., Any]
) -> None:
    with np.errstate(all="ignore"):
        exact = numpys(NUMBERS.astype(np.float64))
        right = exact.astype(np.float32)
        ulps = np.abs(stored(ours, NUMBERS).astype(np.float64) - exact) / np.spacing(np.abs(right))

    found = stored(ours, NUMBERS)
    same = (found == right) & (np.signbit(found) == np.signbit(right)) | np.isnan(found) & np.isnan(right)
    assert np.all(same | (ulps < 1.7))


@pytest.mark.parametrize(("ours", "numpys"), FUNCTIONS)
def test_a_function_of_float64_is_the_librarys(ours: Callable[..., Any], numpys: Callable[..., Any]) -> None:
    numbers = NUMBERS[:2000].astype(np.float64)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(stored(ours, numbers, "float64"), numpys(numbers), rtol=1e-15)


def by_pairs(function: Callable[..., Any], more: list[float]) -> tuple[Any, Any, Any]:
    """What kernels make of every pair of edges, and the pairs."""

    class Joined(opt.Rule):
        def init(self, x: Any) -> Any:
            return opt.zeros_like(x)

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return function(x, dx), 0 * x

    edges = np.concatenate([EDGES, -EDGES, np.array(more, np.float32)])
    x, y = (np.ascontiguousarray(a.ravel()) for a in np.meshgrid(edges, edges))
    state, _ = opt.update(opt.setup(Joined(), [x]), [x], [y])
    return state[0].state, x, y


def same(found: Any, exact: Any, ulps: int) -> None:
    """Whether numbers are the nearest of float32, or so many further, NaN where NaN is."""
    exact = exact.astype(np.float32)
    np.testing.assert_array_max_ulp(np.nan_to_num(found, nan=7.25), np.nan_to_num(exact, nan=7.25), ulps)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))


def test_powers_follow_each_element_of_their_exponent() -> None:
    """As C and NumPy have them, of every pair of edges."""
    found, x, y = by_pairs(lambda x, y: x**y, [2.0**24, 101, -7, 1.5])
    with np.errstate(all="ignore"):
        same(found, np.power(x.astype(np.float64), y.astype(np.float64)), 1)


def test_the_angle_of_a_quotient_is_that_of_numpy_in_every_quarter() -> None:
    found, y, x = by_pairs(lambda y, x: opt.ops.arctan(y / x), [2.0**24, 1e-30, -7, 1.5])
    with np.errstate(all="ignore"):
        exact = np.arctan(y.astype(np.float64) / x.astype(np.float64))
        same(found, exact, 2)
    known = ~np.isnan(exact)
    np.testing.assert_array_equal(np.signbit(found[known]), np.signbit(exact[known]))
