"""What does a class of torch.optim keep, of what a rule has learnt? For those who go back to torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from optimisers.compose.chain import Chain
from optimisers.errors import BadState, TreeMismatch
from optimisers.nest import flatten
from optimisers.rule import Rule
from optimisers.rules.adam import Adam, AdamW
from optimisers.rules.adaptive import RMSProp, TorchAdaGrad
from optimisers.rules.descent import SGD, Descent, Momentum, Nesterov
from optimisers.rules.factored import TorchAdafactor
from optimisers.rules.gradient import DecoupledDecay, WeightDecay
from optimisers.rules.matrix import Muon
from optimisers.rules.of_torch import SparseAdam, TorchRMSProp
from optimisers.settings import fill, numbers, schedules, settings
from optimisers.state.group import Group
from optimisers.state.leaf import parts
from optimisers.state.select import leaves_of
from optimisers.torch.classes import plain, rule_of_group
from optimisers.torch.convert import SIGNS, last_name
from optimisers.torch.entries import TORCH_STATE
from optimisers.torch.groups import OWN_NAMES, STATIC_NAMES, TORCH_NAMES
from optimisers.torch.loading import bare_name
from optimisers.torch.optimizer import TorchOptimizer

__all__ = ["to_torch_state"]

SAME_VALUE = {STATIC_NAMES["centered"]: "centered"}
"""Flags of a rule that have another name in a group of torch, and the same value."""

WITHOUT_STEP = (SGD, Muon)
"""Rules whose classes of torch count no steps."""


def to_torch_state(state: object, given: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved state of an optimiser of torch.optim with what the rule has learnt: `given`, which stays as it
    is, is the optimiser whose `load_state_dict` will take it.

    `theirs.load_state_dict(opt.to_torch_state(optimizer, theirs))`, and `theirs` takes the steps that
    `optimizer` would have taken: a `TorchOptimizer`, or a state of `setup` whose parameters are tensors. For
    the rules of `from_torch_class`, and Momentum and Nesterov at a rate that does not change. Parameters are
    matched if they are the same tensors, else by name where both sides have names, else by place. Settings
    are those of the rule now, so a schedule goes on by a scheduler of torch. Torch works out the bias
    corrections of Adam from the number of steps and the present betas, and keeps moments in the type of their
    parameter.

    Raises BadState for another class than the rule is, for flags that differ, and where the parameters of one
    group have other settings; TreeMismatch for other parameters.
    """
    if not isinstance(given, torch.optim.Optimizer) or isinstance(given, TorchOptimizer):
        raise BadState(
            f"to_torch_state was given a {type(given).__name__}; it takes an optimiser of torch.optim: write "
            "to_torch_state(optimizer, torch.optim.Adam(model.parameters()))"
        )
    kept = {leaf.name: leaf for leaf in _trained(state)}
    packed = torch.optim.Optimizer.state_dict(given)
    entries = dict(packed["state"])
    groups: list[dict[str, Any]] = []
    matched = _matched(state, list(kept), given)
    for theirs, group, names in zip(given.param_groups, packed["param_groups"], matched, strict=True):
        found = [
            (n, p, kept[name])
            for n, p, name in zip(group["params"], theirs["params"], names, strict=True)
            if name in kept
        ]
        groups.append(_group(given, group, [leaf for _, _, leaf in found]))
        for n, p, leaf in found:
            entries.pop(n, None)
            entry = _entry(leaf, p)
            if entry:
                entries[n] = entry
    return {**packed, "state": entries, "param_groups": groups}


class Trained(NamedTuple):
    """A parameter that has a state."""

    name: str
    group: Group
    member: int


def _trained(state: object) -> list[Trained]:
    """The parameters of a state, in order."""
    tree: Any = state.tree if isinstance(state, TorchOptimizer) else state
    if isinstance(tree, tuple) and not tree:
        return []
    store = parts(tree)[0]
    store.refuse_lent("to_torch_state")
    return [Trained(str(store.layout.paths[leaf]), *store.where(leaf)) for leaf in leaves_of(tree)]


# -- which parameter is which --------------------------------------------------------------------------------


def _matched(state: object, leaves: Sequence[str], given: torch.optim.Optimizer) -> list[list[str]]:
    """The name here of each parameter there, group by group; empty for one that is not trained here."""
    theirs = given.param_groups
    ours, called = [list(leaves)], True
    if isinstance(state, TorchOptimizer):
        name_of = {p: name for name, p in state.parameters.items()}
        if any(p in name_of for group in theirs for p in group["params"]):
            return _complete(_names(theirs, name_of), leaves)
        ours, called = _names(state.param_groups, name_of), _are_named(state.param_groups)
    if called and _are_named(theirs):
        return _complete([list(map(bare_name, group["param_names"])) for group in theirs], leaves)
    counts = [len(group["params"]) for group in theirs]
    if counts != list(map(len, ours)):
        raise TreeMismatch(
            f"the groups of {type(given).__name__} have {counts} parameters, and those here "
            f"{list(map(len, ours))}; give it the same tensors, or model.named_parameters()"
        )
    return ours


def _names(groups: Sequence[Mapping[str, Any]], name_of: Mapping[Any, str]) -> list[list[str]]:
    return [[name_of.get(p, "") for p in group["params"]] for group in groups]


def _are_named(groups: Sequence[Mapping[str, Any]]) -> bool:
    return all("param_names" in group for group in groups)


def _complete(names: list[list[str]], leaves: Sequence[str]) -> list[list[str]]:
    """The names, among which those of all leaves are; raises TreeMismatch where one is missing."""
    there = {name for group in names for name in group}
    for name in leaves:
        if name not in there:
            raise TreeMismatch(f"{name!r} is not among the parameters of the optimiser of torch")
    return names


# -- settings ------------------------------------------------------------------------------------------------


def _group(
    given: torch.optim.Optimizer, group: Mapping[str, Any], leaves: Sequence[Trained]
) -> dict[str, Any]:
    """A group of torch with the settings of the rule of some leaves."""
    rules = dict[Rule, str]()
    for leaf in leaves:
        rules.setdefault(_now(leaf), leaf.name)
    if not rules:
        return dict(group)
    rule, name = next(iter(rules.items()))
    if len(rules) > 1:
        other, there = list(rules.items())[1]
        raise BadState(
            f"{name} is trained by {rule!r} and {there} by {other!r}, and they stand in one group of "
            f"{type(given).__name__}; give each a group of its own"
        )
    said = _said(rule, group)
    theirs = rule_of_group(given, {**group, **said})
    if _alike(theirs) != _alike(rule):
        raise BadState(
            f"{name} is trained by {rule!r}, and this {type(given).__name__} is {theirs!r}; give the class "
            "of torch.optim that is the rule, with its flags"
        )
    tensor = isinstance(group["lr"], torch.Tensor)
    return {**group, **said} | ({"lr": torch.full_like(group["lr"], said["lr"])} if tensor else {})


def _now(leaf: Trained) -> Rule:
    """The rule of a leaf with the numbers that its next step has."""
    rule, clock = leaf.group.rule_of(leaf.member), int(leaf.group.table.read_clock(leaf.member))
    rule = schedules(rule, lambda _name, schedule, _owner: float(schedule(clock)))
    return fill(rule, map(plain, numbers(rule)))


def _listed(rule: Rule) -> Iterator[Rule]:
    """The rules of a chain, or the one."""
    for part in rule.rules if isinstance(rule, Chain) else (rule,):
        yield from _listed(part) if isinstance(part, Chain) else (part,)


def _said(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a rule by torch's names, as far as the group has them."""
    said: dict[str, Any] = {}
    for part in _listed(rule):
        names = TORCH_NAMES | SAME_VALUE | OWN_NAMES.get(type(part), {})
        values = {names.get(name, name): value for name, value in settings(part)}
        if isinstance(part, TorchAdafactor):
            values["eps"] = part.epsilon, part.scale_epsilon
        said |= {key: value for key, value in values.items() if key in group}
    return said


def _alike(rule: Rule) -> list[Rule]:
    """The rules of a chain, where those that step alike are the same, and decay by 0 is left out."""
    found = [plainer for part in _listed(rule) for plainer in _plainer(part)]
    return [part for part in found if not (isinstance(part, WeightDecay | DecoupledDecay) and part.lam == 0)]


def _plainer(part: Rule) -> list[Rule]:
    """The simplest rules that take the same steps in a row."""
    match part:
        case AdamW():
            return [Adam(part.eta, part.beta, part.epsilon), DecoupledDecay(part.lam, couple=part.couple)]
        case Momentum() | Nesterov():
            return [SGD(part.eta, part.rho, 0.0, isinstance(part, Nesterov))]
        case SGD() if part.rho == 0:
            return [Descent(part.eta)]
        case TorchRMSProp() if part.mu == 0:
            return [RMSProp(part.eta, part.rho, part.epsilon, part.centred)]
        case TorchAdaGrad():
            return [TorchAdaGrad(part.eta, part.epsilon, part.decay)]
        case _:
            return [part]


# -- what was learnt -----------------------------------------------------------------------------------------


def _entry(leaf: Trained, p: Any) -> dict[str, Any]:
    """What torch keeps of a parameter; nothing where it begins by itself."""
    group, i = leaf.group, leaf.member
    if group.kind.name != "torch" or group.places.shapes[i] != tuple(p.shape):
        raise TreeMismatch(
            f"{leaf.name} is an array of {group.kind.name} of shape {group.places.shapes[i]}, and its "
            f"parameter in the optimiser of torch has shape {tuple(p.shape)}; load the state into a "
            "TorchOptimizer of that model first"
        )
    own = {last_name(path): value for path, value in flatten(group.state_of(i))}
    steps = int(group.table.read_clock(i))
    entry: dict[str, Any] = {}
    for part in _listed(group.rule_of(i)):
        if not (steps or isinstance(part, TorchAdaGrad)) or not own.get("started", 1):
            continue
        if type(part) in SIGNS:
            entry["momentum_buffer"] = own["v"] / (SIGNS[type(part)] * _rate(part, leaf.name))
        elif type(part) in TORCH_STATE:
            names = TORCH_STATE[type(part)].items()
            entry |= {there: _tensor(own[here]) for there, here in names if here in own}
            if not isinstance(part, WITHOUT_STEP):
                entry["step"] = steps if isinstance(part, SparseAdam) else _tensor(steps)
    return entry


def _rate(part: Any, name: str) -> float:
    """The rate inside a velocity."""
    if callable(part.eta) or not part.eta:
        raise BadState(f"{name} is trained by {part!r}, whose velocity holds rates of other steps; use SGD")
    return float(part.eta)


def _tensor(value: Any) -> Any:
    """An array of its own; a number as torch keeps its counters."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return value.detach().clone()
    double = torch.get_default_dtype() == torch.float64
    return torch.tensor(float(value), dtype=torch.float64 if double else torch.float32)
