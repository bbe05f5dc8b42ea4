"""Decay that follows the rate of the rule before it, whatever that rule is and wherever it stands."""

from typing import Any

import numpy as np
import pytest

import optimisers as opt

ENGINES = pytest.mark.parametrize("engine", ["interpret", "numba"])
UPDATES = pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)


def drawn(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((3, 4))


def walked(rule: opt.Rule, engine: str, step: Any, steps: int = 6) -> Any:
    x = drawn(0)
    state = opt.setup(rule, x, engine=engine)
    for n in range(steps):
        state, x = step(state, x, drawn(1 + n))
    return x


FALLING = opt.Linear(0.1, 0.02, 5)
DECAY = opt.DecoupledDecay(0.3, couple=True)


@ENGINES
@UPDATES
@pytest.mark.parametrize("eta", [0.05, FALLING], ids=["constant", "scheduled"])
def test_decay_coupled_behind_adam_is_adamw(eta: Any, engine: str, step: Any) -> None:
    wanted = walked(opt.AdamW(eta, lam=0.3), engine, step)
    np.testing.assert_allclose(walked(opt.Chain(opt.Adam(eta), DECAY), engine, step), wanted, rtol=1e-12)


@ENGINES
@pytest.mark.parametrize(
    "rule",
    [
        opt.Chain(opt.Chain(opt.ClipNorm(1e9), opt.Momentum(FALLING)), DECAY),
        opt.Chain(opt.Momentum(FALLING), opt.Chain(DECAY)),
        opt.Chain(opt.AdaDelta(eta=5.0), opt.Momentum(FALLING), DECAY),
        opt.EMA(opt.Chain(opt.Momentum(FALLING), DECAY)),
        opt.Chain(opt.SkipNonFinite(opt.Momentum(FALLING)), DECAY),
    ],
    ids=repr,
)
def test_the_rate_is_that_of_the_last_rule_before_it_that_has_one(rule: opt.Rule, engine: str) -> None:
    # Each step is that of the same rule without decay, and then eta lam x, by hand.
    x = drawn(0)
    without = opt.setup(opt.adjust(opt.setup(rule, x), lam=0.0).rule, x, engine=engine)
    state = opt.setup(rule, x, engine=engine)
    for n in range(6):
        rate = 0.1 + (0.02 - 0.1) * min(n / 5, 1)
        without, plain = opt.update(without, x, drawn(1 + n))
        state, new = opt.update(state, x, drawn(1 + n))
        np.testing.assert_allclose(new, plain - rate * 0.3 * x, rtol=1e-12)
        x = new


def test_behind_an_accumulation_it_decays_once_a_step_at_the_clock_of_the_steps() -> None:
    x = np.ones(2)
    rule = opt.Chain(opt.AccumGrad(2), opt.Descent(FALLING), DECAY)
    state = opt.setup(rule, x)
    for _ in range(6):
        state, x = opt.update(state, x, np.zeros(2))
    rates = [0.1 + (0.02 - 0.1) * n / 5 for n in range(3)]
    np.testing.assert_allclose(x, np.prod([1 - 0.3 * r for r in rates]), rtol=1e-13)


@UPDATES
def test_a_rate_that_is_adjusted_counts_for_the_decay_too(step: Any) -> None:
    x = np.ones(2)
    state = opt.setup(opt.Chain(opt.Lion(0.5), DECAY), x)
    state, x = step(opt.adjust(state, 0.01), x, np.zeros(2))
    np.testing.assert_allclose(x, 1 - 0.01 * 0.3, rtol=1e-13)


def test_apply_called_by_hand_knows_the_rate_and_forgets_it_afterwards() -> None:
    rule = opt.Chain(opt.Descent(0.5), DECAY)
    _, dx = rule.apply(((), ()), np.ones(2), np.ones(2))
    np.testing.assert_allclose(dx, 0.5 + 0.5 * 0.3)
    with pytest.raises(opt.BadSetting, match="there is none with an eta"):
        DECAY.apply((), np.ones(2), np.ones(2))


class Plain(opt.Rule):
    """Wraps a rule and calls its `apply` itself."""

    rule: opt.Rule

    def init(self, x: Any) -> Any:
        return self.rule.init(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return self.rule.apply(state, x, dx)


def test_a_rule_inside_a_wrapper_of_the_user_lends_its_rate() -> None:
    x = np.ones(2)
    _, x = opt.update(opt.setup(opt.Chain(Plain(opt.Descent(0.5)), DECAY), x), x, np.zeros(2))
    np.testing.assert_allclose(x, 1 - 0.5 * 0.3)


@pytest.mark.parametrize(
    "rule", [opt.Chain(DECAY), opt.Chain(DECAY, opt.Adam()), opt.Chain(opt.Rprop(), DECAY)], ids=repr
)
def test_without_a_rate_before_it_setup_says_what_to_write(rule: opt.Rule) -> None:
    with pytest.raises(opt.BadSetting, match=r"write Chain\(Adam\(\), DecoupledDecay\(0.01, couple=True\)\)"):
        opt.setup(rule, np.ones(2))
