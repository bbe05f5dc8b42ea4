"""Where does a name lead that is not here? To what is written in its place."""

import builtins
import re
import warnings
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.names import ELSEWHERE


def test_a_star_import_replaces_nothing_of_python() -> None:
    assert set(opt.__all__) & set(dir(builtins)) == set()


def test_every_operation_is_there_and_explained() -> None:
    assert opt.ops.__all__ == sorted(set(opt.ops.__all__))
    assert [n for n in opt.ops.__all__ if not getattr(opt.ops, n).__doc__] == []


def test_operations_by_the_names_of_builtins_compute() -> None:
    x = np.array([-3.0, 2.0])
    assert [opt.ops.sum(x), opt.ops.max(x), opt.ops.min(x), *opt.ops.abs(x)] == [-1, 2, -3, 3, 2]


@pytest.mark.parametrize("name", sorted(set(opt.ops.__all__) - set(opt.__all__)))
def test_an_operation_that_left_the_root_still_works_and_says_where_it_is(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=re.escape(f"write opt.ops.{name}")) as caught:
        assert getattr(opt, name) is getattr(opt.ops, name)
    assert caught[0].filename == __file__


def test_operations_of_the_root_are_those_of_ops() -> None:
    both = set(opt.__all__) & set(opt.ops.__all__)
    assert len(both) == 12
    assert all(getattr(opt, n) is getattr(opt.ops, n) for n in both)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("adam", "opt.Adam"),
        ("adamw", "opt.AdamW"),
        ("sgd", "opt.SGD"),
        ("RMSprop", "opt.RMSProp"),
        ("Adagrad", "opt.AdaGrad"),
        ("chain", "opt.Chain"),
        ("CosineAnnealingLR", "opt.Cosine"),
        ("clip_by_global_norm", "opt.ClipGlobalNorm"),
        ("adjsut", "opt.adjust"),
        ("ClipGradNorm", "opt.Chain(opt.ClipGlobalNorm(), rule)"),
        ("adafactor", "opt.Adafactor"),
        ("AdaFactor", "opt.Adafactor"),
        ("Adam_mini", "opt.AdamMini"),
        ("DistributedShampoo", "opt.Shampoo"),
    ],
)
def test_a_name_of_another_library_leads_to_ours(name: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}'; write {re.escape(instead)}$"):
        getattr(opt, name)


@pytest.mark.parametrize(("name", "instead"), [("LBFGS", "keep torch.optim.LBFGS")])
def test_a_rule_that_is_not_here_says_so_and_what_to_take(name: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}': .*{instead}"):
        getattr(opt, name)


def test_a_name_that_nothing_is_like_is_only_refused() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'quux'$"):
        _ = opt.quux


def test_looking_for_a_name_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(opt, "__wrapped__")
        assert not hasattr(opt, "adam")


def test_the_table_of_foreign_names_points_at_what_is_there() -> None:
    assert set(ELSEWHERE) & {*opt.__all__, *opt.ops.__all__} == set()
    named = {n for text in ELSEWHERE.values() for n in re.findall(r"\bopt\.(\w+)", text)}
    assert named - set(dir(opt)) == set()


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("step", r"write opt.update\(state, model, grads\), where state = opt.setup\(rule, model\)"),
        ("state_dict", r"write opt.TorchOptimizer\(params, rule\)"),
        ("lr", "write its eta"),
        ("betas", "write its beta"),
    ],
)
def test_a_rule_says_what_replaces_a_method_of_other_optimisers(name: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=f"Adam has no attribute '{name}'; {instead}"):
        getattr(opt.Adam(), name)


def test_a_rule_that_is_asked_for_anything_else_only_refuses() -> None:
    rule: Any = opt.Adam()
    with pytest.raises(AttributeError, match=r"Adam has no attribute 'rho'$"):
        _ = rule.rho
    with pytest.raises(AttributeError, match=r"Descent has no attribute 'betas'$"):
        _ = getattr(opt.Descent(), "betas")  # noqa: B009 no checker knows it
