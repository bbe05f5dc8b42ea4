"""Do rules that keep less than a second moment an element compute what second formulas say?"""

import itertools
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests import modern

RULES: list[opt.Rule] = [
    opt.Adafactor(0.1),
    opt.Adafactor(0.1, rho=0.8, clip=None),
    opt.TorchAdafactor(0.1),
    opt.CAME(0.1),
    opt.SM3(0.1),
    opt.AdamMini(0.1),
    opt.AdamMini(0.1, blocks="rows"),
    opt.AdamMini(0.1, blocks=1),
]

named = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def drawn(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def moved(rule: opt.Rule, x: Any, dx: Any) -> Any:
    return x - opt.update(opt.setup(rule, x), x, dx)[1]


# -- first steps, by second formulas -------------------------------------------------------------------------


def by_rows_and_columns(dx: Any, first: int, second: int) -> Any:
    """dx over the root of r c / mean(r), r and c the means of squares along two axes, by einsum."""
    names = "abcdef"[: dx.ndim]
    shape = dx.shape
    r = np.einsum(f"{names}->{names.replace(names[second], '')}", dx**2) / shape[second]
    c = np.einsum(f"{names}->{names.replace(names[first], '')}", dx**2) / shape[first]
    mean = np.einsum(f"{names}->{names.replace(names[first], '').replace(names[second], '')}", dx**2)
    mean = mean / shape[first] / shape[second]
    r, c = np.expand_dims(r, second), np.expand_dims(c, first)
    return dx / np.sqrt(r * c / np.expand_dims(mean, (first, second)))


@pytest.mark.parametrize(("clip", "limit"), [(1.0, 1.0), (0.3, 0.3), (None, np.inf)])
@pytest.mark.parametrize(
    ("shape", "factor", "axes"),
    [
        ((6, 5), "last", (0, 1)),
        ((4, 3, 2), "last", (1, 2)),
        ((4, 2, 3), "largest", (0, 2)),
        ((3, 2, 3, 3), "largest", (2, 3)),
    ],
)
def test_adafactor_factors_the_mean_squares(
    shape: Any, factor: Any, axes: Any, clip: float | None, limit: float
) -> None:
    x, dx = drawn(0, *shape), drawn(1, *shape) ** 3
    u = by_rows_and_columns(dx, *axes)
    wanted = 0.01 * np.sqrt((x**2).mean()) * u / max(1.0, np.sqrt((u**2).mean()) / limit)

    found = moved(opt.Adafactor(clip=clip, factor=factor), x, dx)

    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("clip", [1.0, 1e9])
def test_adafactor_of_torch_steps_by_the_same_quotient(clip: float) -> None:
    x, dx = drawn(0, 6, 5), drawn(1, 6, 5) ** 3
    u = by_rows_and_columns(dx, 0, 1)
    wanted = 0.1 * np.sqrt((x**2).mean()) * u / max(1.0, np.sqrt((u**2).mean()) / clip)

    found = moved(opt.TorchAdafactor(0.1, clip=clip), x, dx)

    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)


def test_relative_steps_fall_with_the_root_of_the_step() -> None:
    """With one gradient all the time u is its sign, and the third step is 1 / sqrt(3) of rms(x)."""
    x: Any = np.full((2, 3), 2.0)
    state, lengths = opt.setup(opt.Adafactor(10.0, clip=None), x), []
    for _ in range(3):
        state, new = opt.update(state, x, np.ones((2, 3)))
        lengths.append((x - new)[0, 0])

    np.testing.assert_allclose(lengths, 2 / np.sqrt([1, 2, 3]), rtol=1e-12)


def test_the_second_moment_forgets_no_more_than_its_cap_says() -> None:
    """Of squares 1 and 4 a cap of a half leaves 2.5 at the second step, where 1 - 2^-0.8 leaves 2.72."""
    found = []
    for cap in (0.25, 1.0):
        state, x = opt.setup(opt.Adafactor(relative=False, scaled=False, clip=None, cap=cap), np.zeros(1)), 0
        for g in (1.0, 2.0):
            state, x = opt.update(state, np.zeros(1), np.full(1, g))
        found.append(-x[0])
    late = 1 - 2**-0.8

    np.testing.assert_allclose(found, [0.02 / np.sqrt(0.25 + 3), 0.02 / np.sqrt(late + 4 * (1 - late))])


def test_came_scales_by_how_far_the_momentum_is_from_the_gradient() -> None:
    x, dx = drawn(0, 4, 3), drawn(1, 4, 3)
    u = by_rows_and_columns(dx, 0, 1)
    v = 1 - 0.999  # of the first squares, the rest is the start at 0
    u = u / np.sqrt(v)
    u = u / np.sqrt((u**2).mean())
    m = 0.1 * u
    off = by_rows_and_columns(u - m, 0, 1)
    wanted = m / ((u - m) / off * np.sqrt(1 - 0.9999))

    np.testing.assert_allclose(moved(opt.CAME(1.0), x, dx), wanted, rtol=1e-10)


def covered(g: Any, covers: Any, eta: float, m: Any, rho: float) -> Any:
    """A step of SM3 element by element."""
    v, new = np.zeros(g.shape), [np.zeros(n) for n in g.shape]
    for at in itertools.product(*map(range, g.shape)):
        v[at] = min(c[i] for c, i in zip(covers, at, strict=True)) + g[at] ** 2
        for c, i in zip(new, at, strict=True):
            c[i] = max(c[i], v[at])
    m = rho * m + (1 - rho) * g / np.sqrt(v + 1e-8)
    return eta * m, new, m


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (5,)], ids=str)
def test_sm3_covers_every_element_by_the_least_of_its_axes(shape: Any) -> None:
    x, covers, m = np.zeros(shape), [np.zeros(n) for n in shape], np.zeros(shape)
    state, wanted = opt.setup(opt.SM3(0.1, 0.8), x), x
    for t in range(4):
        g = drawn(t, *shape)
        step, covers, m = covered(g, covers, 0.1, m, 0.8)
        wanted = wanted - step
        state, x = opt.update(state, x, g)

        np.testing.assert_allclose(x, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("blocks", "layout", "shape", "of"),
    [
        ("array", "rows", (4, 6), (4, 6)),
        ("rows", "rows", (4, 6), (1, 6)),
        ("rows", "columns", (4, 6), (4, 1)),
        ("rows", "rows", (4, 3, 2), (1, 3, 2)),
        ("rows", "rows", (5,), (1,)),
        (2, "rows", (4, 6), (2, 6)),
        (3, "columns", (4, 6), (4, 2)),
        (2, "rows", (4,), (2,)),
    ],
    ids=str,
)
def test_a_step_of_adam_mini_is_adams_with_the_mean_square_of_a_block(
    blocks: Any, layout: Any, shape: Any, of: Any
) -> None:
    """`of` is the shape of a block; three steps, by a loop over the blocks."""
    x = drawn(0, *shape)
    state, wanted = opt.setup(opt.AdamMini(0.1, (0.8, 0.9), 0.2, 0.01, blocks, layout), x), x.copy()
    m, v = np.zeros(shape), np.zeros(shape)
    for t in range(1, 4):
        g = drawn(t, *shape)
        for corner in itertools.product(*(range(0, n, k) for n, k in zip(shape, of, strict=True))):
            at = tuple(slice(i, i + k) for i, k in zip(corner, of, strict=True))
            m[at] = 0.8 * m[at] + 0.2 * g[at]
            v[at] = 0.9 * v[at] + 0.1 * (g[at] ** 2).mean()
        scaled = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 0.01)
        wanted = wanted - 0.1 * (scaled + 0.2 * wanted)
        state, x = opt.update(state, x, g)

        np.testing.assert_allclose(x, wanted, rtol=1e-12, atol=1e-15)


# -- cases of packages that count in float32 -----------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in modern.CASES if c["class"] == "optax.adafactor"])
def test_adafactor_goes_the_way_of_optax(case: Any) -> None:
    """To 1e-7 of the largest move: Optax has its decay in float32."""
    found = modern.run(case, "numpy")
    assert not isinstance(found, str)
    moves = [np.subtract(x, x0) for xs in case["xs"] for x, x0 in zip(xs, case["x0"], strict=True)]
    largest = max(abs(m).max() for m in moves)

    for after, wanted in zip(found[0], case["xs"], strict=True):
        for x, y in zip(after, wanted, strict=True):
            assert abs(x - np.array(y)).max() <= 1e-7 * largest


# -- what gradients there are --------------------------------------------------------------------------------


@named
def test_a_gradient_of_zeros_gives_no_step_and_no_nan(rule: opt.Rule) -> None:
    for shape in ((3, 4), (2, 3, 4), (5,), ()):
        x = np.asarray(drawn(0, *shape), np.float32)

        assert np.array_equal(moved(rule, x, 0 * x), 0 * x)


@named
def test_rows_and_columns_of_zeros_stay_where_they_are(rule: opt.Rule) -> None:
    """In float32, where the product of their second moments is 0."""
    x, dx = np.float32(drawn(0, 4, 5)), np.float32(drawn(1, 4, 5))
    dx[2], dx[:, 3] = 0, 0
    found = moved(rule, x, dx)

    assert np.isfinite(found).all()
    assert np.array_equal(found == 0, dx == 0)


@named
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_huge_gradients_give_finite_steps(rule: opt.Rule, kind: str) -> None:
    """Their squares are beyond float32."""
    for shape in ((3, 4), (2, 3, 4), (5,)):
        x, dx = drawn(0, *shape).astype(kind), (1e30 * drawn(1, *shape)).astype(kind)
        state, new = opt.update(opt.setup(rule, x), x, dx)
        for t in range(3):
            state, new = opt.update(state, new, drawn(t, *shape).astype(kind))

            assert np.isfinite(new).all()


@named
def test_a_gradient_that_is_no_number_is_not_hidden(rule: opt.Rule) -> None:
    x, dx = drawn(0, 4, 5), drawn(1, 4, 5)
    dx[1, 2] = np.nan

    assert np.isnan(moved(rule, x, dx)[1, 2])
    left = moved(opt.SkipNonFinite(rule), x, dx)
    assert np.array_equal(left, 0 * x)


@named
def test_single_and_half_precision_stay_beside_double(rule: opt.Rule) -> None:
    """1e-5 of the largest move in float32; bfloat16 parameters are the nearest to those at each step."""
    torch = pytest.importorskip("torch")
    shape = (40, 70)
    exact = torch.tensor(drawn(0, *shape)).to(torch.bfloat16).double()
    models = {kind: exact.to(kind).clone() for kind in (torch.float64, torch.float32)}
    states = {kind: opt.setup(rule, x) for kind, x in models.items()}
    half, start = models[torch.float64].to(torch.bfloat16), exact.clone()
    masters = opt.setup(opt.MixedPrecision(rule), half)
    for t in range(5):
        g = torch.tensor(drawn(t + 1, *shape)).to(torch.bfloat16)
        for kind, x in models.items():
            states[kind], models[kind] = opt.update(states[kind], x, g.to(kind))
        masters, half = opt.update(masters, half, g)
    largest = (models[torch.float64] - start).abs().max()

    assert (models[torch.float32].double() - models[torch.float64]).abs().max() <= 1e-5 * largest
    off = (half.double() - models[torch.float64]).abs()
    assert (off <= 2.0**-8 * models[torch.float64].abs() + 1e-5 * largest).all()


@named
def test_the_number_of_threads_changes_no_bit(rule: opt.Rule) -> None:
    start, grads = np.float32(drawn(0, 300, 200)), [np.float32(drawn(t, 300, 200)) for t in (1, 2)]
    before, found = opt.get_num_threads(), []
    try:
        for count in (1, 2):
            opt.set_num_threads(count)
            state, x = opt.setup(rule, start), start
            for g in grads:
                state, x = opt.update(state, x, g)
            found.append(x.tobytes())
    finally:
        opt.set_num_threads(before)

    assert found[0] == found[1]


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "of_matrix", "of_kernel", "of_vector"),
    [
        (opt.Adafactor(), 300 + 200, 8 * 4 * (3 + 3), 7),
        (opt.Adafactor(factor="largest"), 300 + 200, 9 * (8 + 4), 7),
        (opt.Adafactor(factor_from=128), 300 + 200, 8 * 4 * 9, 7),
        (opt.Adafactor(factor_from=256), 300 * 200, 8 * 4 * 9, 7),
        (opt.Adafactor(rho=0.9), 300 * 200 + 300 + 200, 8 * 4 * (9 + 3 + 3), 14),
        (opt.TorchAdafactor(), 300 + 200, 8 * 4 * (3 + 3), 7),
        (opt.CAME(), 300 * 200 + 2 * (300 + 200), 8 * 4 * (9 + 2 * (3 + 3)), 14),
        (opt.SM3(), 300 * 200 + 300 + 200, 8 * 4 * 9 + 8 + 4 + 3 + 3, 14),
        (opt.AdamMini(), 300 * 200, 8 * 4 * 9, 7),
        (opt.AdamMini(blocks="rows"), 300 * 200 + 300, 8 * 4 * 9 + 8, 14),
        (opt.AdamMini(blocks=4), 300 * 200 + 4, 8 * 4 * 9 + 4, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, opt.Rule) else "",
)
def test_the_state_is_as_small_as_it_is_said_to_be(
    rule: opt.Rule, of_matrix: int, of_kernel: int, of_vector: int | None
) -> None:
    """In numbers of 4 bytes."""
    shapes = {(300, 200): of_matrix, (8, 4, 3, 3): of_kernel, (7,): of_vector}
    for shape, count in shapes.items():
        if count is not None:
            (group,) = opt.explain(opt.setup(rule, np.zeros(shape, np.float32))).groups
            assert group.state_bytes == 4 * count


def test_without_limit_and_scale_a_step_of_adafactor_is_two_passes() -> None:
    x = np.zeros((128, 256), np.float32)
    plain = opt.Adafactor(clip=None, scaled=False)
    passes = [opt.explain(opt.setup(rule, x)).groups[0].passes for rule in (plain, opt.Adafactor())]

    assert passes == [2, 3]


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "settings", "says"),
    [
        (opt.Adafactor, {"decay": 0.8}, "up to 0"),
        (opt.Adafactor, {"clip": 0.0}, "above 0, or None"),
        (opt.Adafactor, {"rho": 1.0}, r"in \[0, 1\)"),
        (opt.Adafactor, {"factor": "all"}, "'last' or 'largest'"),
        (opt.TorchAdafactor, {"clip": 0.5}, "from 1 on"),
        (opt.TorchAdafactor, {"decay": 0.8}, "up to 0"),
        (opt.CAME, {"clip": 0.0}, "above 0"),
        (opt.SM3, {"rho": 1.0}, r"in \[0, 1\)"),
        (opt.AdamMini, {"blocks": "heads"}, "'array' or 'rows'"),
        (opt.AdamMini, {"blocks": 0}, "1 or more"),
        (opt.AdamMini, {"layout": "flax"}, "'rows' or 'columns'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(cls: Any, settings: Any, says: str) -> None:
    with pytest.raises(opt.BadSetting, match=says):
        cls(**settings)


def test_outputs_that_do_not_divide_into_blocks_are_refused_with_their_place() -> None:
    says = r"w.*: AdamMini divides outputs into 4 blocks, and an array of shape \(6, 5\) has 6 of them"
    with pytest.raises(opt.BadSetting, match=says):
        opt.setup(opt.AdamMini(blocks=4), {"w": drawn(0, 6, 5)})
