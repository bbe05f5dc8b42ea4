"""A saved state is taken whole where it is plainly what the rules keep, else by entry: with one answer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

import optimisers as opt

torch = pytest.importorskip("torch")


def parameters() -> list[Any]:
    return [torch.nn.Parameter(torch.arange(n, dtype=torch.float32)) for n in (3, 2, 4)]


def optimiser(params: list[Any]) -> Any:
    return opt.TorchOptimizer(params, opt.AdamW(0.1))


def stepped(optimizer: Any, params: list[Any], steps: range) -> None:
    for n in steps:
        for p in params:
            p.grad = p.detach() + (-1) ** n
        optimizer.step()


def as_number(entry: Any) -> Any:
    return entry.item() if entry.ndim == 0 else entry


FORMS: dict[str, Callable[[Any], Any]] = {
    "as it was saved": lambda entry: entry,
    "numbers of Python": as_number,
    "vectors of one number": lambda entry: entry.reshape(1) if entry.ndim == 0 else entry,
    "wide": lambda entry: entry.double(),
    "as a parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "one of three"])
@pytest.mark.parametrize("known", [False, True], ids=["new", "stepped"])
def test_training_goes_on_from_a_state_whatever_holds_its_numbers(
    form: str, mixed: bool, known: bool
) -> None:
    params = parameters()
    first = optimiser(params)
    stepped(first, params, range(4))
    saved = copy.deepcopy(first.state_dict())
    for n, entries in saved["state"].items():
        if n == 1 or not mixed:
            saved["state"][n] = {key: FORMS[form](entry) for key, entry in entries.items()}
    others = parameters()
    second = optimiser(others)
    if known:
        stepped(second, others, range(2))
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p.data)
    second.load_state_dict(saved)

    for p, other in zip(params, others, strict=True):
        for key, entry in first.state[p].items():
            assert torch.equal(entry.double(), second.state[other][key].double()), key
    stepped(first, params, range(4, 9))
    stepped(second, others, range(4, 9))
    torch.testing.assert_close(others, params, rtol=0, atol=0)


WRONG: dict[str, tuple[str, Any]] = {
    "a step below 0": ("step", torch.tensor(-1.0)),
    "a counter that is NaN": ("weight.0", torch.tensor(float("nan"))),
    "another shape": ("m", torch.zeros(7)),
    "whole numbers": ("v", torch.zeros(2, dtype=torch.int64)),
    "no tensor": ("m", [0.0, 0.0]),
    "two numbers in a counter": ("weight.1", torch.ones(2)),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named_and_nothing_has_changed(case: str) -> None:
    params = parameters()
    optimizer = optimiser(params)
    stepped(optimizer, params, range(3))
    before, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    key, wrong = WRONG[case]
    assert key in saved["state"][1]
    saved["state"][1][key] = wrong
    with pytest.raises(opt.TreeMismatch, match=rf"'{key}' of"):
        optimizer.load_state_dict(saved)

    after = optimizer.state_dict()
    assert all(
        torch.equal(after["state"][n][k], v) for n, held in before["state"].items() for k, v in held.items()
    )
