"""Rows of one scalar table: a few are computed one by one, many as vectors, with one answer."""

from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.graph.scalars import FEW

RULES = {
    "AdamW": lambda eta: opt.AdamW(eta, lam=eta / 2),
    "schedule": lambda eta: opt.Chain(opt.Momentum(opt.Exponential(eta, 0.9)), opt.WeightDecay(eta)),
    "RAdam": opt.RAdam,
}


@pytest.mark.parametrize("count", [1, 2, FEW, FEW + 1, 2 * FEW])
@pytest.mark.parametrize("name", RULES)
def test_every_leaf_steps_as_it_does_alone(name: str, count: int) -> None:
    rng = np.random.default_rng(0)
    rates = [0.1 / (1 + n) for n in range(count)]
    whole = [rng.standard_normal(5) for _ in rates]
    alone = [x.copy() for x in whole]
    states = [opt.setup(RULES[name](eta), [x]) for eta, x in zip(rates, alone, strict=True)]
    state: Any = opt.setup(RULES[name](rates[0]), whole)
    for n, eta in enumerate(rates):
        state[n].rule = RULES[name](eta)
    for _ in range(7):
        grads = [rng.standard_normal(5) for _ in rates]
        opt.update_(state, whole, grads)
        for own, x, g in zip(states, alone, grads, strict=True):
            opt.update_(own, [x], [g])
        for leaf, own in enumerate(states):
            assert state[leaf] == own[0]

    for x, y in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(x, y)


def test_edits_of_the_same_lists_again_find_what_was_frozen_and_put_behind_meanwhile() -> None:
    """An edit remembers which rows the last one has written; the groups and their rows change in between."""
    model = [np.ones(3) for _ in range(6)]
    state: Any = opt.setup(opt.AdamW(0.1), model)
    grads = [np.ones(3) for _ in model]
    for step in range(4):
        for part, where in ((0.1, "*"), (0.2, "1"), (0.3, "2")):
            opt.adjust_(state, part / (1 + step), where=where)
        if step == 1:
            opt.freeze_(state[2])
        if step == 2:
            opt.thaw_(state[2])
            state[4].rule = opt.AdamW(0.7)
        opt.update_(state, model, grads)
        want = [0.1, 0.2, 0.3, 0.1, 0.1, 0.1]
        found = [state[n].rule.eta for n in range(6)]
        expected = [w / (1 + step) for w in want]
        if step == 2:
            expected[4] = 0.7
        np.testing.assert_allclose(found, expected)
