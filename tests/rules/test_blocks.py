"""Long axes in pieces: each block of an array is stepped as an array of its own."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.rules.axes import blocks_of

RULES = {
    "SOAP": opt.SOAP(0.05, (0.8, 0.9), 0.1, every=2, block=4),
    "SOAP-vectors": opt.SOAP(0.05, (0.8, 0.9), 0.1, every=2, vectors=True, block=4),
    "Shampoo": opt.Shampoo(0.05, (0.8, 0.9), 0.1, 1e-6, every=3, block=4),
    "Shampoo-sum": opt.Shampoo(0.05, (0.0, 1.0), epsilon=1e-4, graft=None, every=2, block=4),
}

SHAPES = ((8, 4), (4, 8), (8, 12), (7, 10), (9, 3, 8), (5, 9, 2, 3))
"""Axes of one piece and of several, some of which do not divide evenly."""

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def drawn(seed: int, shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def pieces(n: int, most: int) -> list[slice]:
    """An axis in as few pieces of one length as are `most` long at most; the last may be shorter."""
    size = -(-n // -(-n // most))
    return [slice(begin, begin + size) for begin in range(0, n, size)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_rule
def test_blocks_step_as_separate_arrays(rule: Any, shape: tuple[int, ...]) -> None:
    places = list(itertools.product(*(pieces(n, rule.block) for n in shape)))
    model: Any = {"x": drawn(0, shape)}
    apart: Any = [model["x"][at].copy() for at in places]
    state = opt.setup(rule, model)
    state_apart = opt.setup(dataclasses.replace(rule, block=None), apart)
    for t in range(6):
        g = drawn(1 + t, shape)
        state, model = opt.update(state, model, {"x": g})
        state_apart, apart = opt.update(state_apart, apart, [g[at].copy() for at in places])

    for at, x in zip(places, apart, strict=True):
        np.testing.assert_allclose(model["x"][at], x, atol=1e-12)
    assert len(places) > 1
    assert not np.allclose(model["x"], drawn(0, shape))


@every_rule
def test_axes_that_are_short_enough_are_left_as_they_are(rule: Any) -> None:
    model, gradients = {"x": drawn(0, (4, 3))}, [drawn(1 + t, (4, 3)) for t in range(4)]
    found: list[Any] = []
    for one in (rule, dataclasses.replace(rule, block=None)):
        state, after = opt.setup(one, model), model
        for g in gradients:
            state, after = opt.update(state, after, {"x": g})
        found.append(after["x"])

    np.testing.assert_array_equal(*found)


def test_joined_axes_are_no_longer_than_a_block() -> None:
    """(32, 16, 3, 3) with blocks of 64: 3 x 3 are joined, then 16 and 9 are not, since 144 is longer."""
    cut = blocks_of((32, 16, 3, 3), 10000, 64, merge=True)

    assert cut.seen == (32, 48, 3)
    assert cut.shape == (32, 48, 3)
    assert blocks_of((100, 16, 3, 3), 10000, 64, merge=True).shape == (2, 50, 48, 3)


def test_blocks_come_back_as_the_array() -> None:
    for shape in SHAPES:
        x, cut = drawn(0, shape), blocks_of(shape, 100, 4, merge=False)

        assert max(cut.sizes) <= 4
        np.testing.assert_array_equal(cut.back(cut.of(x)), x)


def test_state_is_that_of_the_blocks() -> None:
    """768 x 3072 is three matrices of 768 x 1024: 3 (768^2 + 1024^2) numbers in place of 768^2 + 3072^2."""
    state = opt.setup(opt.SOAP(block=1024), {"x": np.zeros((768, 3072), np.float32)})
    left, right = state["x"].state.grams

    assert left.shape == (3, 768, 768)
    assert right.shape == (3, 1024, 1024)


@pytest.mark.parametrize("block", [0, -1, 2.5])
@pytest.mark.parametrize("rule", [opt.SOAP, opt.Shampoo])
def test_other_lengths_are_refused(rule: Any, block: Any) -> None:
    with pytest.raises(
        opt.BadSetting, match=rf"{rule.__name__}\.block is {block}; it takes None, or the most"
    ):
        rule(block=block)
