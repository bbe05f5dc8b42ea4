"""Norms of gradients as large or as small as float32 can be: their squares are not float32."""

from typing import Any

import numpy as np
import pytest

import optimisers as opt

both_engines = pytest.mark.parametrize("engine", ["interpret", "numba"])
CLIPS = [opt.ClipNorm(1.0), opt.ClipNorm(1.0, 1.5), opt.ClipNorm(1.0, 3.0), opt.ClipGlobalNorm(1.0)]


@both_engines
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 3e25, 2e38])
@pytest.mark.parametrize("rule", CLIPS, ids=repr)
def test_any_finite_float32_gradient_is_clipped_to_its_norm(rule: Any, size: float, engine: str) -> None:
    directions = np.array([3.0, -4.0, 0.0, 1.0])
    g = (directions * size / 4).astype(np.float32)
    x = np.zeros(4, np.float32)
    state = opt.setup(opt.Chain(rule, opt.Descent(1.0)), x, engine=engine)
    _, x = opt.update(state, x, g)
    p = getattr(rule, "p", 2.0)
    length = float(np.sum(np.abs(g.astype(np.float64)) ** p) ** (1 / p))
    np.testing.assert_allclose(x, -g.astype(np.float64) / max(1.0, length), rtol=1e-6, atol=1e-45)


@both_engines
def test_the_sum_of_squares_is_that_of_float64(engine: str) -> None:
    g = np.full(1000, 1e-25, np.float32)

    class Norm(opt.Rule):
        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, opt.where(x < 1, opt.sqrt(opt.ops.sum(dx * dx)), 0.0)

    _, x = opt.update(
        opt.setup(Norm(), np.zeros(1000, np.float32), engine=engine), np.zeros(1000, np.float32), g
    )
    np.testing.assert_allclose(x, -np.sqrt(1000) * 1e-25, rtol=1e-6)


def test_rprop_refuses_factors_and_sizes_in_the_wrong_order() -> None:
    with pytest.raises(opt.BadSetting, match=r"ell is .*0 < shrink <= 1 <= grow"):
        opt.Rprop(ell=(1.2, 0.5))
    with pytest.raises(opt.BadSetting, match=r"gamma is .*0 < least <= most"):
        opt.Rprop(gamma=(50.0, 1e-6))


def test_the_rate_of_rprop_belongs_to_its_start() -> None:
    state = opt.setup(opt.Rprop(), np.zeros(3))
    with pytest.raises(opt.UnknownField, match=r"belongs to the structure"):
        opt.adjust_(state, 0.1)
