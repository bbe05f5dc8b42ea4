"""What does a parameter group of torch say of a rule? The names of settings there, and their values."""

from collections.abc import Mapping
from typing import Any

import torch

from optimisers.errors import BadSetting, BadState
from optimisers.rule import Rule
from optimisers.rules.descent import Momentum, Nesterov
from optimisers.settings import ELSEWHERE, adjustable, adjusted, numbers, settings, skeleton
from optimisers.settings import parts as parts_of_value
from optimisers.tree.path import KeyPath, matches

TORCH_NAMES = {"beta": "betas", "epsilon": "eps", "lam": "weight_decay"}
"""Settings that stand in a group under torch's name too, where schedulers and trainers look for them."""


def known(rule: Rule, name: str) -> bool:
    """Whether a setting, by our name or by torch's, is one of the rule."""
    return field_of(rule, name) in adjustable(rule)


def fields_of(rule: Rule, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of a group as the fields of the rule; those of other tools are left alone."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if known(rule, name):
            found[field_of(rule, name)] = plain(value)
        elif name in ELSEWHERE and not _nothing(value):
            raise BadSetting(
                f"{where} sets {name}={value!r}, and {rule!r} has no such setting; it has "
                f"{', '.join(defaults_of(rule))}"
            )
    return found


def defaults_of(rule: Rule | None, clock: int = 0) -> dict[str, Any]:
    """The settings of a rule as a group holds them: the first of each name among the rules it is made of, and
    schedules by their present value.
    """
    found: dict[str, Any] = {}
    for part in parts_of_value(rule):
        for name, value in settings(part):
            if name not in adjustable(part) or name in found:
                continue
            found[name] = _at(plain(value), clock)
            if name in TORCH_NAMES:
                found[TORCH_NAMES[name]] = found[name]
            elif name == "rho" and isinstance(part, Momentum | Nesterov):
                found["momentum"] = found[name]
    return {("lr" if name == "eta" else name): value for name, value in found.items()}


def _at(value: Any, clock: int) -> Any:
    """The present value of a setting."""
    if isinstance(value, tuple):
        return tuple(_at(v, clock) for v in value)
    if callable(value):
        number: Any = value(clock)
        return float(number)
    return value


def is_schedule(value: Any) -> bool:
    """Whether a setting, or a number in it, is a function of the clock."""
    return any(callable(v) for v in (value if isinstance(value, tuple | list) else (value,)))


def has_schedule(rule: Rule) -> bool:
    """Whether a setting of the rule is a schedule."""
    return any(
        is_schedule(v)
        for part in parts_of_value(rule)
        for name, v in settings(part)
        if name in adjustable(part)
    )


def field_of(rule: Rule, name: str) -> str:
    """The field that a key of a group stands for."""
    fields = adjustable(rule)
    if name in fields:
        return name
    return {"lr": "eta", "momentum": "rho"}.get(name) or ELSEWHERE.get(name, name)


def plain(value: Any) -> Any:
    """A setting as a number of Python, or a tuple of them; schedules stay."""
    if isinstance(value, tuple | list):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, torch.Tensor) else value


def _nothing(value: Any) -> bool:
    """Whether a setting says that something is not wanted: a rule without it may ignore it."""
    return value is None or (isinstance(value, float | int) and value == 0)


def renewed(was: Rule, new: Rule, changes: dict[str, Any], old: Rule) -> Rule:
    """The rule of a leaf after its group has changed; that of the group, unless the leaf had its own."""
    same = numbers(old) == numbers(was) and skeleton(old) == skeleton(was)
    return new if same else adjusted(old, changes)


def by_glob(rules: Mapping[str, Any], named: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """(groups, their rules): one for each glob that takes a parameter."""
    if not all(isinstance(pair, tuple) for pair in named):
        raise BadState("a dict of rules takes a module or named parameters: write model.named_parameters()")
    taken: dict[str, list[Any]] = {glob: [] for glob in rules}
    for name, p in named:
        glob = next((g for g in rules if matches(g, KeyPath(name))), None)
        if glob is None:
            raise BadState(f'no rule for {name!r}; the globs are {", ".join(map(repr, rules))}; add "**"')
        taken[glob].append((name, p))
    for glob, found in taken.items():
        if not found:
            raise BadState(f"{glob!r} takes no parameter; there are {', '.join(n for n, _ in named[:6])}")
    return [{"params": found} for found in taken.values()], list(rules.values())
