"""A variant of a formula is a rule with its own name; the older spelling says so and gives the same rule."""

from typing import Any

import numpy as np
import pytest

import optimisers as opt

PAIRS: list[tuple[Any, Any]] = [
    (opt.AMSGrad, opt.TorchAMSGrad),
    (opt.RAdam, opt.TorchRAdam),
    (opt.NAdam, opt.TorchNAdam),
    (opt.AdaGrad, opt.TorchAdaGrad),
]

ALL = pytest.mark.parametrize(("plain", "torchs"), PAIRS, ids=lambda rule: rule.__name__)


@ALL
def test_the_older_spelling_says_what_to_write_and_where_it_stands(plain: Any, torchs: Any) -> None:
    with pytest.warns(DeprecationWarning, match=rf"write {torchs.__name__}\(\)") as found:
        rule = plain(0.25, epsilon=0.5, variant="torch")

    assert rule == torchs(0.25, epsilon=0.5)
    assert [w.filename for w in found] == [__file__]


@ALL
def test_the_older_spelling_may_go_by_place(plain: Any, torchs: Any) -> None:
    settings = [value for _, value in opt.settings.settings(plain(0.25))]
    with pytest.warns(DeprecationWarning, match=torchs.__name__):
        assert plain(*settings, "torch") == torchs(0.25)


@ALL
def test_the_older_spelling_of_the_default_gives_the_rule_itself(plain: Any, torchs: Any) -> None:
    with pytest.warns(DeprecationWarning, match=rf"write {plain.__name__}\(\) \(deprecated since 0\.2\.0\)$"):
        rule = plain(0.25, epsilon=0.5, variant="julia")

    assert rule == plain(0.25, epsilon=0.5) != torchs(0.25, epsilon=0.5)


@ALL
def test_other_variants_are_refused_with_what_to_write(plain: Any, torchs: Any) -> None:
    with pytest.raises(opt.UnknownField, match=rf"write {plain.__name__}\(\), or {torchs.__name__}\(\)"):
        plain(variant="tensorflow")


@ALL
def test_the_two_are_rules_apart_whose_settings_begin_alike(plain: Any, torchs: Any) -> None:
    here, there = opt.settings.settings(plain()), opt.settings.settings(torchs())

    assert not issubclass(torchs, plain)
    assert there[: len(here)] == here


def test_the_sums_of_adagrad_begin_where_each_formula_says() -> None:
    # After one gradient of 1: eta / (sqrt(start + 1) + epsilon), by hand.
    for rule, start in ((opt.AdaGrad(1.0, 3.0), 3.0), (opt.TorchAdaGrad(1.0, 3.0), 0.0)):
        _, x = opt.update(opt.setup(rule, np.zeros(1)), np.zeros(1), np.ones(1))
        np.testing.assert_allclose(x, -1 / (np.sqrt(start + 1) + 3), rtol=1e-15)


def test_the_older_spelling_of_splitprecision_warns_where_it_stands() -> None:
    with pytest.warns(DeprecationWarning, match=r"write SplitPrecision\(rule\)") as found:
        opt.MixedPrecision(opt.Adam(), split=True)  # type: ignore[call-arg]

    assert [w.filename for w in found] == [__file__]
