"""Do rules that see matrices compute what singular values and second formulas say?"""

from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests import modern

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


PRESETS = {
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_coefficients_by_name_are_those_of_their_authors(name: str) -> None:
    dx = drawn(1, 5, 5)
    wanted = by_singular_values(dx, PRESETS[name], len(PRESETS[name]))

    np.testing.assert_allclose(moved(opt.Muon(1.0, coefficients=name), 0 * dx, dx), wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "shape", "factor"),
    [
        ("original", (8, 2), 2.0),
        ("original", (2, 8), 1.0),
        ("rms", (2, 9), 0.6),
        ("rms", (9, 2), 0.6),
        ("spectral", (8, 2), 2.0),
        ("spectral", (2, 8), 0.5),
        ("max", (2, 9), 3.0),
    ],
)
def test_a_step_is_as_long_as_its_scale_says(scale: Any, shape: Any, factor: float) -> None:
    """Against its own orthogonal matrix, of a square of zeros around it."""
    dx = drawn(1, *shape)
    wanted = factor * by_singular_values(dx, PRESETS["jordan"], 5)

    np.testing.assert_allclose(moved(opt.Muon(1.0, scale=scale), 0 * dx, dx), wanted, atol=1e-12)


# -- first steps of its kin, by second formulas --------------------------------------------------------------


def norm(a: Any) -> Any:
    return np.sqrt((abs(a) ** 2).sum())


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
@pytest.mark.parametrize("scale", ["original", "rms"])
def test_outputs_of_normuon_take_steps_of_one_size(scale: Any, shape: Any, dtype: str) -> None:
    x, dx = drawn(0, *shape, dtype=dtype), drawn(1, *shape, dtype=dtype)
    rows, columns = shape
    o = by_singular_values(dx, PRESETS["jordan"], 5)
    v = 0.3 * (abs(o) ** 2).mean(axis=1, keepdims=True)
    p = o / (np.sqrt(v) + 1e-10)
    long = 0.2 * np.sqrt(rows * columns) if scale == "rms" else max(1, rows / columns) ** 0.5 * norm(o)
    wanted = 0.1 * (long * p / norm(p) + 0.2 * x)

    found = moved(opt.NorMuon(0.1, beta=0.7, lam=0.2, scale=scale), x, dx)

    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    sizes = np.linalg.norm(found - 0.02 * x, axis=1)
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-8)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_adamuon_scales_elements_by_how_large_they_were(shape: Any, dtype: str) -> None:
    """Two steps, so that the second moments are not those of one matrix."""
    x = drawn(0, *shape, dtype=dtype)
    state, found, wanted, m, v = opt.setup(opt.AdaMuon(0.1, (0.6, 0.7), 0.2), x), x, x, 0 * x, 0
    for t in (1, 2):
        dx = drawn(t, *shape, dtype=dtype)
        m = 0.6 * m + 0.4 * dx
        o = by_singular_values(m, PRESETS["jordan"], 5)
        v = 0.7 * v + 0.3 * abs(o) ** 2
        w = o / (np.sqrt(v / (1 - 0.7**t)) + 1e-10)
        long = 0.2 * np.sqrt(6) * np.sqrt(4)
        wanted = wanted - 0.1 * (long * w / norm(w) + 0.2 * wanted)
        state, found = opt.update(state, found, dx)

        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


BY_NORM: dict[str, Any] = {
    "spectral": lambda m: np.sqrt(4 / 6) * by_singular_values(m, PRESETS["jordan"], 5),
    "sign": lambda m: np.sign(m) / 6,
    "columns": lambda m: m / np.sqrt((m**2).mean(axis=0)),
    "rows": lambda m: m / np.sqrt((m**2).sum(axis=1, keepdims=True)) / np.sqrt(6),
}


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("name", BY_NORM)
def test_a_step_of_scion_has_one_size_in_its_norm(name: Any, constrained: bool) -> None:
    x, dx = drawn(0, 4, 6), drawn(1, 4, 6)
    wanted = 0.1 * (3 * BY_NORM[name](dx) + constrained * x)

    found = moved(opt.Scion(0.1, 3.0, constrained=constrained, norm=name), x, dx)

    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


def test_scion_takes_arrays_of_every_number_of_axes() -> None:
    """A kernel is a matrix over the number of its elements; what has no matrix is brought to size 1."""
    kernel, vector, number = drawn(1, 4, 3, 5, 2), drawn(2, 7), np.array(-2.0)
    flat = by_singular_values(kernel.reshape(4, 30), PRESETS["jordan"], 5).reshape(kernel.shape)
    rule = opt.Scion(1.0, 1.0, constrained=False)

    np.testing.assert_allclose(moved(rule, 0 * kernel, kernel), np.sqrt(4 / 3) / 10 * flat, atol=1e-12)
    found = moved(rule, 0 * vector, vector)
    np.testing.assert_allclose(found, vector / np.sqrt((vector**2).mean()), rtol=1e-6)
    np.testing.assert_allclose(moved(rule, np.zeros(()), number), -1, rtol=1e-6)


def test_the_way_of_scion_ends_in_the_ball_of_its_radius() -> None:
    """However large x was, singular values are at most 1.13 times the radius in the end."""
    x: Any = 100 * drawn(0, 6, 6)
    state = opt.setup(opt.Scion(0.2, 2.0), x)
    for t in range(60):
        state, x = opt.update(state, x, drawn(t, 6, 6))

    assert np.linalg.svd(x, compute_uv=False).max() <= 2 * 1.14


def shortened(case: Any) -> Any:
    """A case whose package adds epsilon to the norm, as if it bounded it."""
    settings = {k: v for k, v in case["rule_settings"].items() if k != "add"}
    return {**case, "rule_settings": settings}


ADDING = [
    c
    for c in modern.CASES
    if c.get("rule_settings", {}).get("add") and not c["rule_settings"].get("debias")
    if c["rule"] in ("Muon", "NorMuon", "Scion")
]


@pytest.mark.parametrize("case", ADDING, ids=lambda case: f"{case['class']}-{modern.CASES.index(case)}")
def test_the_rules_of_the_authors_differ_by_their_epsilon(case: Any) -> None:
    """1e-6 of the largest move: 1e-7 is added to norms of about 0.2 there."""
    found = modern.run(shortened(case), "numpy")
    assert not isinstance(found, str)
    pairs = [
        (np.array(a), b)
        for xs, ys in zip(case["xs"], found[0], strict=True)
        for a, b in zip(xs, ys, strict=True)
    ]
    starts = case["x0"] * len(case["xs"])
    largest = max(abs(a - np.array(x0)).max() for (a, _), x0 in zip(pairs, starts, strict=True))

    assert max(abs(a - b).max() for a, b in pairs) <= 1e-6 * largest


# -- which matrices there are in an array --------------------------------------------------------------------

KIN: list[opt.Rule] = [
    opt.Muon(0.1, lam=0.1),
    opt.NorMuon(0.1, lam=0.1, scale="rms"),
    opt.NorMuon(0.1, lam=0.1),
    opt.AdaMuon(0.1, lam=0.1),
    opt.Scion(0.1, 2.0),
    opt.Scion(0.1, 2.0, norm="rows"),
    opt.Scion(0.1, 2.0, norm="columns"),
    opt.Scion(0.1, 2.0, norm="sign"),
]
of_kin = pytest.mark.parametrize("rule", KIN, ids=lambda rule: type(rule).__name__)


def after(rule: opt.Rule, arrays: Any) -> Any:
    """Where a rule leads from the first array by the others, as gradients."""
    x, *grads = arrays
    state = opt.setup(rule, x)
    for g in grads:
        state, x = opt.update(state, x, g)
    return x


@of_kin
def test_the_layout_of_flax_is_the_transpose_of_that_of_torch(rule: opt.Rule) -> None:
    arrays = [drawn(n, 3, 7) for n in range(3)]
    flaxs = after(remade(rule, layout="columns"), [a.T.copy() for a in arrays])

    np.testing.assert_allclose(flaxs.T, after(rule, arrays), rtol=1e-10, atol=1e-13)


def remade(rule: opt.Rule, **changes: Any) -> Any:
    """The rule with other static settings."""
    return type(rule)(**{name: getattr(rule, name) for name in type(rule)._fields} | changes)


@pytest.mark.parametrize("scale", ["original", "rms", "spectral", "max"])
def test_every_scale_turns_over_with_the_layout(scale: Any) -> None:
    x, dx = drawn(0, 3, 7), drawn(1, 3, 7)
    torchs = moved(opt.Muon(lam=0.1, scale=scale), x, dx)
    flaxs = moved(opt.Muon(lam=0.1, scale=scale, layout="columns"), x.T.copy(), dx.T.copy())

    np.testing.assert_allclose(flaxs.T, torchs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("layout", "shape"), [("rows", (4, 6)), ("columns", (12, 2))])
@pytest.mark.parametrize("rule", KIN[:4], ids=lambda rule: type(rule).__name__)
def test_a_kernel_is_the_matrix_of_one_axis_against_the_others(
    rule: opt.Rule, layout: Any, shape: Any
) -> None:
    arrays = [drawn(n, 4, 3, 2) for n in range(3)]
    rule = remade(rule, layout=layout)
    flat = after(rule, [a.reshape(shape) for a in arrays])

    np.testing.assert_allclose(after(rule, arrays).reshape(shape), flat, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("engine", [None, "interpret"])
@of_kin
def test_a_stack_of_two_axes_is_stepped_matrix_by_matrix(
    rule: opt.Rule, engine: str | None, layout: Any
) -> None:
    stack = [drawn(n, 2, 3, 4, 6) for n in range(3)]
    rule, x = remade(rule, layout=layout, axes=2), stack[0]
    state = opt.setup(rule, x, engine=engine)
    for g in stack[1:]:
        state, x = opt.update(state, x, g)

    for at in np.ndindex(2, 3):
        alone = after(rule, [a[at] for a in stack])
        np.testing.assert_allclose(x[at], alone, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("axes", [None, 2])
@pytest.mark.parametrize("rule", KIN[:4], ids=lambda rule: type(rule).__name__)
def test_blocks_of_outputs_are_matrices_of_their_own(rule: opt.Rule, axes: Any, layout: Any) -> None:
    """Query, key and value that lie in one array."""
    parts = [[drawn(10 * n + k, 4, 5) for k in range(3)] for n in range(3)]
    joint = 0 if layout == "rows" else 1
    if layout == "columns":
        parts = [[part.T.copy() for part in each] for each in parts]
    rule = remade(rule, layout=layout)
    whole = after(remade(rule, axes=axes, blocks=3), [np.concatenate(each, joint) for each in parts])

    for k, found in enumerate(np.split(whole, 3, joint)):
        np.testing.assert_allclose(found, after(rule, [each[k] for each in parts]), rtol=1e-10, atol=1e-13)


def test_what_is_no_matrix_is_refused_with_its_place() -> None:
    model = {"layer": {"w": drawn(0, 3, 4), "b": drawn(0, 3)}}
    says = r"layer.*b.*: Muon steps matrices, and this array has shape \(3,\).*AdamW\(\)"
    with pytest.raises(opt.BadSetting, match=says):
        opt.setup(opt.Muon(), model)
    with pytest.raises(opt.BadSetting, match=r"b.*: NorMuon steps .* \(\); .*NorMuon\(\), .*AdamW\(\)"):
        opt.setup(opt.EMA(opt.Chain(opt.ClipNorm(), opt.NorMuon()), 0.9), {"b": np.array(1.0)})
    with pytest.raises(opt.BadSetting, match=r"b.*: AdaMuon divides outputs into 2 blocks.* 3 of them"):
        opt.setup(opt.AdaMuon(blocks=2), {"b": drawn(0, 3, 4)})
    state = opt.setup({"**.b": opt.AdamW(), "**": opt.Muon()}, model)

    assert isinstance(state["layer"]["w"].rule, opt.Muon)


# -- what gradients there are --------------------------------------------------------------------------------


@of_kin
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_gradient_of_zeros_gives_no_step_and_no_nan(rule: opt.Rule, kind: str) -> None:
    x = drawn(0, 3, 4).astype(kind)
    left = moved(rule, x, 0 * x)

    np.testing.assert_allclose(
        left, (1.0 if isinstance(rule, opt.Scion) else 0.1) * 0.1 * x, rtol=1e-6, atol=1e-7
    )


@of_kin
def test_huge_gradients_step_as_others_do(rule: opt.Rule) -> None:
    """Their squares are beyond float32."""
    x, dx = np.float32(drawn(0, 4, 6)), drawn(1, 4, 6)
    found, wanted = moved(rule, x, np.float32(1e30 * dx)), moved(rule, x, np.float32(dx))

    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["float32", "float64"])
@of_kin
def test_gradients_of_one_rank_and_with_empty_outputs_give_finite_steps(rule: opt.Rule, kind: str) -> None:
    one = np.outer(drawn(1, 6), drawn(2, 4)).astype(kind)
    holes = drawn(1, 6, 4).astype(kind)
    holes[2], holes[:, 1] = 0, 0
    for dx in (one, holes):
        x = drawn(0, 6, 4).astype(kind)
        state = opt.setup(rule, x)
        for _ in range(3):
            state, x = opt.update(state, x, dx)

            assert np.isfinite(x).all()


def test_of_one_rank_a_step_is_the_polynomial_of_its_one_singular_value() -> None:
    dx = np.outer(drawn(1, 6), drawn(2, 4))
    p = 1.0
    for a, b, c in PRESETS["jordan"]:
        p = a * p + b * p**3 + c * p**5

    found = moved(opt.Muon(1.0), 0 * dx, dx)

    np.testing.assert_allclose(found, 1.5**0.5 * p * dx / norm(dx), rtol=1e-10, atol=1e-12)


@of_kin
def test_a_gradient_that_is_no_number_is_not_hidden(rule: opt.Rule) -> None:
    x, dx = drawn(0, 4, 6), drawn(1, 4, 6)
    dx[1, 2] = np.nan

    assert np.isnan(moved(rule, x, dx)[1, 2])
    assert np.array_equal(moved(opt.SkipNonFinite(rule), x, dx), 0 * x)


@of_kin
def test_single_and_half_precision_stay_beside_double(rule: opt.Rule) -> None:
    """1e-3 of the largest move in float32, whose products are polynomials of degree 5^5; parameters in
    bfloat16 with masters are the nearest to those.
    """
    torch = pytest.importorskip("torch")
    start = torch.tensor(drawn(0, 24, 40)).to(torch.bfloat16).double()
    models = {kind: start.to(kind).clone() for kind in (torch.float64, torch.float32)}
    states = {kind: opt.setup(rule, x) for kind, x in models.items()}
    half = start.to(torch.bfloat16)
    masters = opt.setup(opt.MixedPrecision(rule), half)
    for t in range(4):
        g = torch.tensor(drawn(t + 1, 24, 40)).to(torch.bfloat16)
        for kind, x in models.items():
            states[kind], models[kind] = opt.update(states[kind], x, g.to(kind))
        masters, half = opt.update(masters, half, g)
    exact = models[torch.float64]
    largest = (exact - start).abs().max()

    assert (models[torch.float32].double() - exact).abs().max() <= 1e-3 * largest
    assert ((half.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-3 * largest).all()


@pytest.mark.parametrize("rule", [*KIN[:3], KIN[4]], ids=lambda rule: type(rule).__name__)
def test_products_in_bfloat16_stay_within_their_digits(rule: opt.Rule) -> None:
    """5e-2 of a step. First steps of AdaMuon are signs, of which some turn."""
    torch = pytest.importorskip("torch")
    arrays = [torch.tensor(drawn(n, 24, 40)).float() for n in range(2)]
    exact, rough = (after(remade(rule, dtype=kind), arrays) for kind in ("float32", "bfloat16"))
    largest, off = (exact - arrays[0]).abs().max(), (exact - rough).abs().max()

    assert 0 < off <= 5e-2 * largest


@of_kin
def test_the_number_of_threads_changes_no_bit(rule: opt.Rule) -> None:
    arrays = [np.float32(drawn(n, 300, 200)) for n in range(3)]
    before, found = opt.get_num_threads(), []
    try:
        for count in (1, 2):
            opt.set_num_threads(count)
            found.append(after(rule, arrays))
    finally:
        opt.set_num_threads(before)

    assert found[0].tobytes() == found[1].tobytes()


# -- memory and settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [
        (opt.Muon(), 300 * 200),
        (opt.Muon(axes=2), 300 * 200),
        (opt.NorMuon(), 300 * 200 + 300),
        (opt.NorMuon(layout="columns"), 300 * 200 + 200),
        (opt.NorMuon(blocks=3), 300 * 200 + 300),
        (opt.AdaMuon(), 2 * 300 * 200),
        (opt.Scion(), 300 * 200),
    ],
    ids=str,
)
def test_the_state_is_as_small_as_it_is_said_to_be(rule: opt.Rule, numbers: int) -> None:
    (group,) = opt.explain(opt.setup(rule, np.zeros((300, 200), np.float32))).groups

    assert group.state_bytes == 4 * numbers


@pytest.mark.parametrize(
    ("cls", "settings", "says"),
    [
        (opt.Muon, {"scale": "moonlight"}, "'original' or 'rms' or 'spectral' or 'max'"),
        (opt.NorMuon, {"layout": "flax"}, "'rows' or 'columns'"),
        (opt.Muon, {"steps": 0}, "1 or more"),
        (opt.Scion, {"coefficients": (3.4, -4.8, 2.0)}, r"Scion.* write \(\(a, b, c\),\)"),
        (opt.Muon, {"coefficients": "keller"}, "Muon.coefficients is 'keller'; it takes 'jordan', 'you'"),
        (opt.Muon, {"rho": 1.0}, r"in \[0, 1\)"),
        (opt.AdaMuon, {"beta": (0.9, 1.0)}, r"in \[0, 1\)"),
        (opt.AdaMuon, {"axes": 3}, "None or 2"),
        (opt.Muon, {"dtype": "float16"}, "Muon.dtype is 'float16'; it takes None, 'bfloat16' or 'float32'"),
        (opt.NorMuon, {"blocks": 0}, "1 or more"),
        (opt.Scion, {"alpha": 0.0}, "above 0, up to 1"),
        (opt.Scion, {"norm": "nuclear"}, "'spectral' or 'sign' or 'columns' or 'rows'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(cls: Any, settings: Any, says: str) -> None:
    with pytest.raises(opt.BadSetting, match=says):
        cls(**settings)


class TurnedTwice(opt.Rule):
    """The gradient, by a road of transposes and conjugates."""

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        turned = opt.ops.conj(dx.T) / 2
        return state, 2 * opt.ops.conj(turned.T)


@pytest.mark.parametrize("dtype", ["float64", "complex128", "complex64"])
def test_transposes_that_cancel_leave_maths_on_elements(dtype: str) -> None:
    x, dx = drawn(0, 3, 5, dtype=dtype), drawn(1, 3, 5, dtype=dtype)

    assert np.array_equal(opt.update(opt.setup(TurnedTwice(), x), x, dx)[1], x - dx)
