"""Do rules that see matrices compute what singular values and second formulas say?"""

from typing import Any

import numpy as np
import pytest

import optimisers as opt

COEFFICIENTS = ((2.0, -1.5, 0.5), (3.4445, -4.7750, 2.0315))


def drawn(seed: int, *shape: int, dtype: str = "float64") -> Any:
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal(shape), rng.standard_normal(shape)
    return (parts[0] + 1j * parts[1] if "complex" in dtype else parts[0]).astype(dtype)


def by_singular_values(dx: Any, coefficients: Any, steps: int) -> Any:
    """U p(S) V^H, where a polynomial is taken of each singular value."""
    u, s, v = np.linalg.svd(dx, full_matrices=False)
    s = s / np.linalg.norm(s)
    for n in range(steps):
        a, b, c = coefficients[min(n, len(coefficients) - 1)]
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


def moved(rule: opt.Rule, x: Any, dx: Any, engine: str | None = None) -> Any:
    return x - opt.update(opt.setup(rule, x, engine=engine), x, dx)[1]


@pytest.mark.parametrize("engine", [None, "interpret"])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1)], ids=str)
def test_muon_takes_a_polynomial_of_the_singular_values(shape: Any, dtype: str, engine: str | None) -> None:
    x, dx = drawn(0, *shape, dtype=dtype), drawn(1, *shape, dtype=dtype)
    rule = opt.Muon(1.0, 0.5, steps=4, scale="rms", coefficients=COEFFICIENTS)
    wanted = 0.2 * max(shape) ** 0.5 * by_singular_values(dx, COEFFICIENTS, 4)

    np.testing.assert_allclose(moved(rule, x, dx, engine), wanted, rtol=1e-12, atol=1e-13)


def test_singular_values_of_a_step_end_near_one() -> None:
    """Between 0.68 and 1.13, for those that were not tiny beside the norm."""
    dx = drawn(0, 8, 5)

    s = np.linalg.svd(moved(opt.Muon(1.0), 0 * dx, dx) / (8 / 5) ** 0.5, compute_uv=False)

    assert s.min() > 0.67
    assert s.max() < 1.14


@pytest.mark.parametrize("scale", ["original", "rms", "spectral", "max"])
def test_the_layout_of_flax_is_the_transpose_of_that_of_torch(scale: Any) -> None:
    x, dx = drawn(0, 3, 7), drawn(1, 3, 7)
    torchs = moved(opt.Muon(lam=0.1, scale=scale), x, dx)
    flaxs = moved(opt.Muon(lam=0.1, scale=scale, layout="columns"), x.T.copy(), dx.T.copy())

    np.testing.assert_allclose(flaxs.T, torchs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("layout", "shape"), [("rows", (4, 6)), ("columns", (12, 2))])
def test_a_kernel_is_the_matrix_of_one_axis_against_the_others(layout: Any, shape: Any) -> None:
    x, dx = drawn(0, 4, 3, 2), drawn(1, 4, 3, 2)
    rule = opt.Muon(lam=0.1, layout=layout)
    flat = moved(rule, x.reshape(shape), dx.reshape(shape))

    np.testing.assert_allclose(moved(rule, x, dx).reshape(shape), flat, rtol=1e-12, atol=1e-15)


def test_a_gradient_of_zeros_gives_no_step_and_no_nan() -> None:
    x = drawn(0, 3, 4)

    assert np.array_equal(moved(opt.Muon(), x, 0 * x), 0 * x)


def test_what_is_no_matrix_is_refused_with_its_place() -> None:
    model = {"layer": {"w": drawn(0, 3, 4), "b": drawn(0, 3)}}
    says = r"layer.*b.*: Muon steps matrices, and this array has shape \(3,\).*AdamW\(\)"
    with pytest.raises(opt.BadSetting, match=says):
        opt.setup(opt.Muon(), model)
    state = opt.setup({"**.b": opt.AdamW(), "**": opt.Muon()}, model)

    assert isinstance(state["layer"]["w"].rule, opt.Muon)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scale": "moonlight"}, "'original' or 'rms' or 'spectral' or 'max'"),
        ({"layout": "flax"}, "'rows' or 'columns'"),
        ({"steps": 0}, "1 or more"),
        ({"coefficients": (3.4, -4.8, 2.0)}, r"write \(\(a, b, c\),\)"),
        ({"rho": 1.0}, r"in \[0, 1\)"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: Any, says: str) -> None:
    with pytest.raises(opt.BadSetting, match=says):
        opt.Muon(**settings)


class TurnedTwice(opt.Rule):
    """The gradient, by a road of transposes and conjugates."""

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        turned = opt.ops.conj(dx.T) / 2
        return state, 2 * opt.ops.conj(turned.T)


@pytest.mark.parametrize("dtype", ["float64", "complex128", "complex64"])
def test_transposes_that_cancel_leave_maths_on_elements(dtype: str) -> None:
    x, dx = drawn(0, 3, 5, dtype=dtype), drawn(1, 3, 5, dtype=dtype)

    assert np.array_equal(opt.update(opt.setup(TurnedTwice(), x), x, dx)[1], x - dx)
