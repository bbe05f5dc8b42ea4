"""Mistakes of those who come from PyTorch and Optax, and what answers them."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest
import torch
from torch import nn

import optimisers as opt
from optimisers import Adam, AdamW, BadSetting, BadState, NoMatch, TraceError, TreeMismatch


def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def loss(m: Any) -> torch.Tensor:
    return m(torch.ones(1, 3)).sum()


def refused(mistake: Callable[[], object], kind: type[Exception], text: str) -> None:
    """The mistake raises this kind of error, in whose text this stands."""
    with pytest.raises(kind, match=re.escape(text)):
        mistake()


MODELS: dict[str, Callable[[], Any]] = {
    "module": module,
    "generator": lambda: module().parameters(),
    "names": lambda: module().named_parameters(),
    "list": lambda: list(module().parameters()),
    "dict": lambda: {"w": np.ones(2)},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("settings", [{}, {"lr": 1e-3}], ids=str)
def test_a_rule_refuses_parameters(model: Callable[[], Any], settings: Any) -> None:
    rule: Any = AdamW
    text = "where a number goes; a rule holds no parameters: write opt.TorchOptimizer(module, opt.AdamW())"
    refused(lambda: rule(model(), **settings), BadSetting, text)


def test_a_module_is_no_selector_of_a_state() -> None:
    m = module()
    state = opt.setup(Adam(), m)
    text = "for a part of the model write its part of the state"
    refused(lambda: opt.freeze_(state, m[0]), NoMatch, text)
    refused(lambda: opt.adjust_(state, 0.1, where=m[0]), NoMatch, text)


def test_classes_of_modules_are_picked_by_type() -> None:
    m = module()
    rules: Any = {nn.Linear: Adam()}
    refused(lambda: opt.setup(rules, m), NoMatch, "; write opt.by_type(Linear)")
    refused(lambda: opt.TorchOptimizer(m, rules), NoMatch, "; write opt.by_type(Linear)")
    refused(lambda: opt.freeze_(opt.setup(Adam(), m), nn.Linear), NoMatch, "; write opt.by_type(Linear)")


def test_an_empty_dict_of_rules_says_how_to_fill_it() -> None:
    text = 'the dict of rules is empty; write {"**": Adam()}'
    refused(lambda: opt.setup({}, module()), NoMatch, text)
    refused(lambda: opt.TorchOptimizer(module(), {}), NoMatch, text)


def test_optimisers_of_others_are_no_rules() -> None:
    m = module()
    theirs: Any = torch.optim.AdamW(m.parameters())
    of_optax: Any = optax.adamw(1e-3)
    refused(
        lambda: opt.setup(theirs, m),
        BadState,
        "torch's AdamW where the rule goes; write opt.TorchOptimizer.of",
    )
    refused(lambda: opt.TorchOptimizer(m, theirs), BadState, "write opt.TorchOptimizer.of(optimizer)")
    refused(lambda: opt.from_torch_class(theirs), BadState, "write opt.TorchOptimizer.of(optimizer)")
    refused(lambda: opt.setup(of_optax, m), BadState, "opt.setup(opt.from_optax(transformation), model)")


@pytest.mark.parametrize(
    "rule", [AdamW, "adamw", 3, optax.adam(0.1)], ids=["class", "name", "number", "optax"]
)
def test_as_optax_refuses_at_once_what_is_no_rule(rule: Any) -> None:
    refused(lambda: opt.as_optax(rule), BadState, "as_optax was given ")


def test_arguments_in_the_other_order_are_told_the_order() -> None:
    m: Any = module()
    rule: Any = Adam()
    of: Any = loss
    refused(lambda: opt.TorchOptimizer(rule, m), BadState, "write TorchOptimizer(module, Adam())")
    refused(lambda: opt.value_and_grad(m, of), BadState, "write value_and_grad(loss, model)")
    refused(lambda: opt.hutchinson(m, of, 0), BadState, "write hutchinson(loss, model, seed)")
    refused(lambda: opt.gradients(rule), BadState, "write gradients(model)")


def test_a_generator_is_no_model() -> None:
    m = module()
    refused(lambda: opt.gradients(m.parameters()), BadState, "given a generator where the model goes")
    refused(
        lambda: opt.value_and_grad(loss, m.parameters()), BadState, "given a generator where the model goes"
    )


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_gradients_is_told_to_take_names(kind: Any) -> None:
    m = module()
    state = opt.setup(Adam(), m)
    grads = torch.autograd.grad(loss(m), list(m.parameters()))
    refused(
        lambda: opt.update_(state, m, kind(grads)),
        TreeMismatch,
        "dict(zip(dict(module.named_parameters()), grads))",
    )
    weight = next(m.parameters())
    before = weight.detach().clone()
    opt.update_(state, m, dict(zip(dict(m.named_parameters()), grads, strict=True)))
    assert not torch.equal(weight, before)


class Signed(opt.Rule):
    """Calls a function of PyTorch."""

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, torch.sign(dx)


def test_functions_of_torch_are_told_the_operation() -> None:
    text = "Signed: a rule called torch.sign on a symbol; write opt.ops.sign(...)"
    refused(lambda: opt.setup(Signed(), module()), TraceError, text)
    text = "the schedule of Adam.eta: a schedule called torch.cos on a symbol; write opt.ops.cos(...)"
    refused(lambda: opt.setup(Adam(torch.cos), module()), TraceError, text)


class Scaled(opt.Rule):
    """Computes with a tensor that it knows."""

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        by = torch.tensor([1.0, 2.0])
        return state, by * dx - by / (1 + dx) + by**dx


def test_tensors_that_a_rule_knows_take_part_in_its_arithmetic() -> None:
    x, dx = torch.ones(2, dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    by = torch.tensor([1.0, 2.0], dtype=torch.float64)
    _, new = opt.update(opt.setup(Scaled(), x), x, dx)
    assert torch.allclose(new, x - (by * dx - by / (1 + dx) + by**dx))


class Swapped(opt.Rule):
    """Answers in the other order."""

    def init(self, x: Any) -> Any:
        return (opt.zeros_like(x),)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return dx, state


def test_a_step_before_the_state_is_told_the_order() -> None:
    refused(lambda: opt.setup(Swapped(), np.ones(2)), TraceError, "the state goes first: return state, dx")
