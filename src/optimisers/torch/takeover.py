"""How does an optimiser of torch become one of ours? With its groups, its hooks and what it has learnt."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from typing import Any

import torch

from optimisers.errors import BadState
from optimisers.torch.classes import of_other_tools, rule_of_group

HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def groups_of(optimizer: object) -> list[dict[str, Any]]:
    """The groups of an optimiser of torch, each with the rule of its class and keywords.

    Raises BadState for what is no optimiser of torch, UnknownField for a class that is no rule here.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise BadState(f"TorchOptimizer.of was given {optimizer!r}; it takes an optimiser of torch.optim")
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        params, names = list(group["params"]), group.get("param_names")
        given = params if names is None else list(zip(names, params, strict=True))
        others = {k: v for k, v in of_other_tools(group).items() if k != "param_names"}
        rate = {"lr": group["lr"]} if isinstance(group["lr"], torch.Tensor) else {}
        groups.append({**others, **rate, "params": given, "rule": rule_of_group(optimizer, group)})
    return groups


def take_over(new: torch.optim.Optimizer, old: torch.optim.Optimizer) -> None:
    """Give one optimiser the hooks of another, whose handles go on to take them out, and its state."""
    if any(old.state.values()):
        new.load_state_dict(torch.optim.Optimizer.state_dict(old))
        for group, was in zip(new.param_groups, old.param_groups, strict=True):
            group["lr"] = was["lr"]
    for name in HOOKS:
        setattr(new, name, getattr(old, name))
