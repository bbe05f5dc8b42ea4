"""Do rules that learn in random directions compute what second formulas say?"""

from typing import Any

import numpy as np
import pytest

import optimisers as opt


def drawn(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def size(a: Any, axis: int | None = None) -> Any:
    return np.sqrt((a**2).sum(axis=axis, keepdims=axis is not None))


@pytest.mark.parametrize("per", ["channel", "array"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)], ids=str)
def test_apollo_scales_channels_as_adam_scales_their_projection(shape: Any, per: Any) -> None:
    """By the directions that stand in the state, whose step with a large gradient is cut down."""
    rule = opt.APOLLO(0.1, (0.8, 0.9), 0.2, 0.01, 4.0, rank=3, every=2, per=per)
    x, tall = drawn(0, *shape), shape[0] > shape[1]
    state, wanted, m, v, before = opt.setup(rule, x), x, 0.0, 0.0, 0.0
    for t in range(1, 6):
        g = drawn(t, *shape) * (10.0 if t == 4 else 1.0)
        state, x = opt.update(state, x, g)
        basis = state.state.basis
        r = g @ basis if tall else basis.T @ g
        m, v = 0.8 * m + 0.2 * r, 0.9 * v + 0.1 * r**2
        u = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 0.01)
        axis = None if per == "array" else 1 if tall else 0
        w = g * size(u, axis) / (size(r, axis) + 1e-8)
        w = w * min(1.0, 1.01 * before / size(w)) if before else w
        before = size(w)
        wanted = wanted - 0.1 * (2 * w + 0.2 * wanted)

        np.testing.assert_allclose(x, wanted, rtol=1e-9, atol=1e-12)


def test_directions_are_normal_numbers_that_are_drawn_anew() -> None:
    """Of variance 1 / rank, others for every array, seed and period, and the same for every library."""
    model = {"a": drawn(0, 200, 300), "b": drawn(0, 300, 200)}
    found: dict[Any, Any] = {}
    for seed in (0, 1):
        state, x = opt.setup(opt.APOLLO(rank=64, every=2, seed=seed), model), model
        for t in range(3):
            state, x = opt.update(state, x, model)
            for name in model:
                found[seed, t, name] = np.array(state[name].state.basis)

    assert all(p.shape == (200, 64) for p in found.values())
    assert abs(np.var(found[0, 0, "a"]) * 64 - 1) < 0.05
    assert abs(np.mean(found[0, 0, "a"])) < 4 / np.sqrt(64 * 200 * 64)
    assert np.array_equal(found[0, 0, "a"], found[0, 1, "a"])
    apart = [found[0, 0, "a"], found[0, 2, "a"], found[1, 0, "a"], found[0, 0, "b"]]
    for i, p in enumerate(apart):
        for q in apart[:i]:
            assert abs(np.corrcoef(p.ravel(), q.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_every_library_has_the_same_directions(library: str) -> None:
    module = pytest.importorskip(library)
    make = module.tensor if library == "torch" else module.numpy.asarray
    rule, ways = opt.APOLLO(rank=2, every=2), []
    for to in (np.array, make):
        x = to(np.float32(drawn(0, 4, 6)))
        state = opt.setup(rule, {"w": x})
        _, new = opt.update(state, {"w": x}, {"w": to(np.float32(drawn(1, 4, 6)))})
        ways.append(np.asarray(new["w"]))

    np.testing.assert_allclose(ways[1], ways[0], rtol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4), (0, 3)], ids=str)
def test_arrays_that_are_no_matrices_step_by_adam(shape: Any) -> None:
    x, g = np.asarray(drawn(0, *shape)), np.asarray(drawn(1, *shape))
    both = [(rule, opt.setup(rule, [x])) for rule in (opt.APOLLO(0.1, epsilon=1e-8), opt.AdamW(0.1))]
    found = [opt.update(state, [x], [g])[1][0] for _, state in both]

    np.testing.assert_allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("per", ["channel", "array"])
def test_zeros_huge_gradients_and_those_of_one_rank_give_finite_steps(per: Any, kind: str) -> None:
    x = drawn(0, 4, 6).astype(kind)
    holes = drawn(1, 4, 6)
    holes[1], holes[:, 2] = 0, 0
    for g in (0 * x, 1e30 * drawn(1, 4, 6), np.outer(drawn(1, 4), drawn(2, 6)), holes):
        state, new = opt.setup(opt.APOLLO(rank=2, per=per), x), x
        for _ in range(3):
            state, new = opt.update(state, new, g.astype(kind))

            assert np.isfinite(new).all()
            assert g.any() or np.array_equal(new, x)


def test_a_gradient_that_is_no_number_is_not_hidden() -> None:
    x, g = drawn(0, 4, 6), drawn(1, 4, 6)
    g[1, 2] = np.nan

    assert np.isnan(opt.update(opt.setup(opt.APOLLO(rank=2), x), x, g)[1][1, 2])
    rule = opt.SkipNonFinite(opt.APOLLO(rank=2))
    assert np.array_equal(opt.update(opt.setup(rule, x), x, g)[1], x)


@pytest.mark.parametrize(
    ("rule", "shape", "numbers"),
    [
        (opt.APOLLO(rank=16), (100, 300), 2 * 16 * 300 + 16 * 100),
        (opt.APOLLO(rank=16), (300, 100), 2 * 16 * 300 + 16 * 100),
        (opt.APOLLO(), (100, 300), 2 * 100 * 300 + 100 * 100),
        (opt.APOLLO(rank=1, per="array"), (100, 300), 2 * 300 + 100),
        (opt.APOLLO(), (300,), 2 * 300),
    ],
    ids=str,
)
def test_the_state_is_as_small_as_it_is_said_to_be(rule: opt.Rule, shape: Any, numbers: int) -> None:
    (group,) = opt.explain(opt.setup(rule, np.zeros(shape, np.float32))).groups

    assert group.state_bytes == 4 * numbers


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 0}, "1 or more"),
        ({"every": 0}, "1 or more"),
        ({"per": "tensor"}, "'channel' or 'array'"),
        ({"seed": -1}, "whole number from 0"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: Any, says: str) -> None:
    with pytest.raises(opt.BadSetting, match=says):
        opt.APOLLO(**settings)
