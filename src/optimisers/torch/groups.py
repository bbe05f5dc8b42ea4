"""What does a parameter group of torch say of a rule? The names of settings there, and their values."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from optimisers.errors import BadSetting, BadState
from optimisers.rule import Rule, refuse_shape
from optimisers.rules.adam import AdamW, AMSGrad, TorchAMSGrad
from optimisers.rules.adaptive import RMSProp, Rprop
from optimisers.rules.descent import SGD, Momentum, Nesterov
from optimisers.rules.factored import Adafactor, TorchAdafactor
from optimisers.rules.gradient import DecoupledDecay, Maximise
from optimisers.rules.matrix import Muon
from optimisers.rules.of_torch import TorchRMSProp
from optimisers.settings import (
    Value,
    adjustable,
    adjusted,
    fields,
    inner,
    is_schedule,
    replaced,
    scheduled,
    settings,
)
from optimisers.settings import parts as parts_of_value
from optimisers.spellings import ELSEWHERE, OF_ANOTHER_RULE
from optimisers.step.layers import LayerDecay
from optimisers.torch.classes import chained, muon_scale, plain
from optimisers.torch.rates import scaled
from optimisers.tree.layout import Parameter, Place, Told
from optimisers.tree.path import KeyPath, named_path
from optimisers.tree.selectors import first_picks, selector

TORCH_NAMES = {
    "eta": "lr",
    "beta": "betas",
    "epsilon": "eps",
    "lam": "weight_decay",
    "psi": "momentum_decay",
    "decay": "lr_decay",
}
"""Settings that stand in a group under torch's name too, where schedulers and trainers look for them; `eta`
under that name alone.
"""

OWN_NAMES: dict[type, dict[str, str]] = {
    Momentum: {"rho": "momentum"},
    Nesterov: {"rho": "momentum"},
    SGD: {"rho": "momentum"},
    RMSProp: {"rho": "alpha"},
    TorchRMSProp: {"rho": "alpha", "mu": "momentum"},
    Rprop: {"ell": "etas", "gamma": "step_sizes"},
    Muon: {"rho": "momentum"},
    Adafactor: {"decay": "beta2_decay"},
    TorchAdafactor: {"decay": "beta2_decay", "clip": "d"},
}
"""The same for settings that mean something else elsewhere."""

ASKING = {*ELSEWHERE, *OF_ANOTHER_RULE, "beta", "epsilon", "eta", "lam", "omega"}
"""Keys of a group that ask for something."""

SAID_BY = {
    "maximize": Maximise,
    "amsgrad": (AMSGrad, TorchAMSGrad),
    "decoupled_weight_decay": (AdamW, DecoupledDecay),
}
"""Flags that are the kind of a rule."""


STATIC_NAMES = {
    "centered": "centred",
    "initial_accumulator_value": "start",
    "ns_steps": "steps",
    "ns_coefficients": "coefficients",
    "adjust_lr_fn": "scale",
}
"""Keys of torch's groups that belong to the structure of a rule -> their names there."""

IN_OUR_WORDS: dict[str, Callable[[Any], Any]] = {
    "ns_coefficients": lambda triple: (tuple(triple),),
    "adjust_lr_fn": muon_scale,
}
"""What the values of some of these are here."""


def torch_names(part: Value) -> dict[str, str]:
    """The settings of a rule itself that torch has too -> their names there. Decay that does not follow the
    rate has no name in torch.
    """
    apart = isinstance(part, AdamW | DecoupledDecay) and not part.couple
    names = {**TORCH_NAMES, **OWN_NAMES.get(type(part), {})}
    return {
        name: names[name] for name, _ in settings(part) if name in names and not (apart and name == "lam")
    }


def known(rule: Rule, name: str) -> bool:
    """Whether a setting, by our name or by torch's, is one of the rule."""
    return field_of(rule, name) in adjustable(rule)


def of_wrapper(group: Mapping[str, Any]) -> frozenset[str]:
    """Keys of a group that belong to a wrapper around the optimiser, though a rule may have a setting of that
    name: the radius `rho` of sharpness-aware minimisation, which stands beside `adaptive`.
    """
    return frozenset({"rho"} if "adaptive" in group else ())


def follows_schedule(group: Mapping[str, Any]) -> bool:
    """Whether a group shows a rate that follows a schedule: its `lr` is a factor, beside `eta`, the rate."""
    return "eta" in group and "lr" in group


def told(rule: Rule, given: Mapping[str, Any], where: str) -> Rule:
    """The rule with the settings of a group; those of other tools are left alone.

    A `weight_decay`, which every class of torch has, is added where the rule lacks it: behind the rule, times
    its rate. Raises BadSetting for what torch knows and this rule does not, and for two names of one setting
    with different values.
    """
    changes = _factor_of_copy(rule, given)
    others = of_wrapper(given).union({"lr", "eta"} if changes else ())
    for name, value in ((name, plain(value)) for name, value in given.items() if name not in others):
        if field_of(rule, name) == "eta" and any(isinstance(part, Rprop) for part in parts_of_value(rule)):
            rule = within(rule, Rprop, lambda part, eta=value: remade(part, eta=eta))
        elif known(rule, name):
            put(changes, field_of(rule, name), name, value, where)
        elif name == "weight_decay" and not nothing(value):
            rule = _decaying(rule, value, where)
        elif name == "weight_decay" and value is not None and "lam" in adjustable(rule):
            changes["lam"] = value
        else:
            refuse(rule, name, value, where)
    return adjusted(rule, changes)


def _factor_of_copy(rule: Rule, given: Mapping[str, Any]) -> dict[str, Any]:
    """The rate of a group that is a copy of one whose rate follows a schedule: it goes on with its factor."""
    if "eta" not in scheduled(rule) or not follows_schedule(given):
        return {}
    etas = [value for part in parts_of_value(rule) for name, value in settings(part) if name == "eta"]
    return {"eta": scaled(next(eta for eta in etas if is_schedule(eta)), plain(given["lr"]))}


def _decaying(rule: Rule, lam: Any, where: str) -> Rule:
    """A rule with decay behind it that follows the rate."""
    if "lam" in adjustable(rule):
        raise BadSetting(
            f"{where} sets weight_decay={lam!r}, which is times the rate, and the decay of {rule!r} is not; "
            "write lam=, or couple=True in the rule"
        )
    if "eta" not in adjustable(rule):
        raise BadSetting(f"{where} sets weight_decay={lam!r}, and {rule!r} has no rate that it could follow")
    return followed(rule, DecoupledDecay(lam, couple=True))


def refuse(rule: Rule, name: str, value: Any, where: str) -> None:
    """Raise BadSetting for a setting that torch has and the rule has not, where it says something; those of
    other tools are left alone.
    """
    if name not in ASKING:
        return
    listed = list(parts_of_value(rule))
    here = STATIC_NAMES.get(name, name)
    meant = IN_OUR_WORDS.get(name, plain)(value)
    has = [getattr(part, here) for part in listed if hasattr(part, here)]
    has += [True for part in listed if isinstance(part, SAID_BY.get(name, ()))]
    if meant in has or (nothing(value) and not any(has)):
        return
    hint = f"; {OF_ANOTHER_RULE[name]}" if name in OF_ANOTHER_RULE else ""
    raise BadSetting(
        f"{where} sets {name}={value!r}, and {rule!r} has no such setting; it has "
        f"{', '.join(defaults_of(rule))}{hint}"
    )


def defaults_of(rule: Rule | None, clock: int = 0) -> dict[str, Any]:
    """The settings of a rule as a group holds them: the first of each name among the rules it is made of, and
    schedules by their present value. Torch's name comes after ours: it counts where both were changed.
    """
    found: set[str] = set()
    shown: dict[str, Any] = {}
    for part in parts_of_value(rule):
        names, numbers = torch_names(part), {f.name for f in fields(part) if f.kind is not None}
        for name, value in settings(part):
            if (name in numbers or name == "eta") and name not in found:
                found.add(name)
                keys = (name, names.get(name, name)) if name != "eta" else ("lr",)
                shown |= dict.fromkeys(keys, at(plain(value), clock))
    return shown


def at(value: Any, clock: int) -> Any:
    """The present value of a setting."""
    if isinstance(value, tuple):
        return tuple(at(v, clock) for v in value)
    if callable(value):
        number: Any = value(clock)
        return float(number)
    return value


def has_schedule(rule: Rule) -> bool:
    """Whether a setting of the rule is a schedule."""
    return bool(scheduled(rule))


def meanings_of(rule: Rule) -> dict[str, str]:
    """The field of a rule behind every key that it takes, by our names and by torch's."""
    found: dict[str, str] = {}
    own = {name: name for name in adjustable(rule)}
    for part in parts_of_value(rule):
        for field, there in torch_names(part).items():
            if field in own:
                found.setdefault(there, field)
    others = {key: name for key in ELSEWHERE if (name := elsewhere(rule, key)) in own}
    return others | found | own


def field_of(rule: Rule, name: str) -> str:
    """The field that a key of a group stands for."""
    if name in adjustable(rule):
        return name
    for part in parts_of_value(rule):
        for field, there in torch_names(part).items():
            if there == name:
                return field
    return elsewhere(rule, name)


def elsewhere(rule: Rule, key: str) -> str:
    """The field that a key means in other packages; the key itself where torch means another thing by it for
    this rule: `momentum` of RMSprop is not the `rho` of RMSProp, which torch calls alpha.
    """
    field = ELSEWHERE.get(key, key)
    otherwise = any(OWN_NAMES.get(type(part), {}).get(field, key) != key for part in parts_of_value(rule))
    return key if otherwise or key == "weight_decay" else field


def within(rule: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A rule with every part of a kind replaced."""
    if isinstance(rule, kind):
        return change(rule)
    changes = {name: inner(value, lambda v: within(v, kind, change)) for name, value in settings(rule)}
    return replaced(rule, changes)


def remade(part: Rule, **changes: object) -> Rule:
    """A rule with fields replaced, structure too, and checked."""
    new = replaced(part, changes)
    new.__post_init__()
    return new


def followed(rule: Rule, other: Rule) -> Rule:
    """A rule with another behind it, inside those that wrap a whole chain."""
    wrapped = getattr(rule, "rule", None)
    if rule.whole and isinstance(wrapped, Rule):
        return remade(rule, rule=followed(wrapped, other))
    return chained(rule, other)


def put(found: dict[str, Any], field: str, key: str, value: Any, where: str) -> None:
    """Note the new value of a field; raises BadSetting where another name of it was given another."""
    if field in found and found[field] != value:
        raise BadSetting(
            f"{where} sets {field} to {found[field]!r} and, by its name {key}, to {value!r}; write one of "
            "them"
        )
    found[field] = value


def nothing(value: Any) -> bool:
    """Whether a setting says that something is not wanted: a rule without it may ignore it."""
    return value is None or (isinstance(value, float | int) and value == 0)


def require_dense(given: Iterable[Any]) -> None:
    """Raise BadSetting for parameters that are no dense arrays; gradients may be sparse."""
    for p in given:
        tensor = p[1] if isinstance(p, tuple) else p
        if getattr(tensor, "is_sparse", False) or getattr(tensor, "is_sparse_csr", False):
            raise BadSetting(
                f"a parameter of shape {tuple(tensor.shape)} is sparse; only gradients may be so: "
                "write tensor.to_dense()"
            )


def refuse_shapes(rule: Rule, given: Mapping[str, Any], n: int) -> None:
    """Raise BadSetting for a parameter of group `n` that is trained and has a shape which its rule does not
    step.
    """
    params = given["params"]
    listed = [params] if isinstance(params, torch.Tensor) else list(params)
    names = given.get("param_names") or [f"{n}.{i}" for i in range(len(listed))]
    for name, p in (p if isinstance(p, tuple) else (name, p) for name, p in zip(names, listed, strict=True)):
        if isinstance(p, torch.Tensor) and p.requires_grad and not is_lazy(p):
            try:
                refuse_shape(rule, tuple(p.shape))
            except BadSetting as e:
                raise BadSetting(f"{KeyPath(name).code()}: {e}") from e


def by_key(rules: Mapping[Any, Any], named: list[Any], told: Told) -> tuple[list[dict[str, Any]], list[Any]]:
    """(groups, their rules): one for each glob or selector that takes a parameter."""
    if not all(isinstance(pair, tuple) for pair in named):
        raise BadState("a dict of rules takes a module or named parameters: write model.named_parameters()")
    taken: list[list[Any]] = [[] for _ in rules]
    chosen = first_picks(list(rules), [described(name, p, told, rules) for name, p in named])
    for pair, k in zip(named, chosen, strict=True):
        taken[k].append(pair)
    return [{"params": found} for found in taken], list(rules.values())


def by_depth(
    decayed: LayerDecay, settings: Mapping[str, Any], named: list[Any], known: Told
) -> tuple[list[dict[str, Any]], list[Any]]:
    """(groups, their rules): one for each rule at each depth of a module. The settings are those of the rules
    before their rates fall.
    """
    if not all(isinstance(pair, tuple) for pair in named):
        raise BadState("layer_decay takes a module or named parameters: write model.named_parameters()")
    rules = rules_of(decayed, settings)
    parameters = [described(name, p, known, rules) for name, p in named]
    chosen = [list(rules.values())[k] for k in first_picks(list(rules), parameters)]
    slowed = decayed.slowed(chosen, parameters)
    members: dict[int, list[Any]] = {}
    for pair, rule in zip(named, slowed, strict=True):
        members.setdefault(id(rule), []).append(pair)
    by_id = {id(rule): rule for rule in slowed}
    return [{"params": found} for found in members.values()], [by_id[n] for n in members]


def rules_of(decayed: LayerDecay, settings: Mapping[str, Any]) -> dict[Any, Any]:
    """The rules by key whose rates fall with depth, with those settings that each of them takes."""
    rules = dict(decayed.rule) if isinstance(decayed.rule, Mapping) else {"**": decayed.rule}
    found: dict[Any, Any] = {}
    for key, rule in rules.items():
        if rule is not None and not isinstance(rule, Rule):
            raise BadState(
                f"TorchOptimizer was given layer_decay({rule!r}); it takes a rule, such as AdamW()"
            )
        takes = {} if rule is None else meanings_of(rule)
        own = {k: v for k, v in settings.items() if k in takes or k not in ASKING}
        found[key] = None if rule is None else told(rule, own, "TorchOptimizer")
    return found


def described(name: str, p: Any, told: Told, keys: Iterable[Any] = ()) -> Parameter:
    """What is known of a named parameter; raises BadState where the keys ask for a shape that a lazy module
    does not know yet.
    """
    lazy = is_lazy(p)
    if lazy and not all(isinstance(key, str) for key in keys):
        raise BadState(
            f"{name!r} has no shape yet, by which a selector picks; call the module on a batch first"
        )
    return Parameter(told.get(name, (Place(named_path(name), ()),)), () if lazy else tuple(p.shape))


def matching(rules: Mapping[Any, Any], given: Mapping[str, Any]) -> Any:
    """The rule of the key that takes all parameters of a group, each first; that of the last key where there
    is none. Raises BadState where there are no keys.
    """
    if not rules:
        raise BadState(
            "a group that is added where rates fall with depth needs its rule: write "
            "add_param_group({'params': ..., 'rule': opt.AdamW(1e-4)})"
        )
    params = given["params"]
    listed = [params] if isinstance(params, torch.Tensor) else list(params)
    names = given.get("param_names") or [""] * len(listed)
    named = [p if isinstance(p, tuple) else (name, p) for name, p in zip(names, listed, strict=True)]
    parameters = [described(name, p, {}, rules) for name, p in named]
    table = zip(*(selector(key).picks(parameters, 0) for key in rules), strict=True)
    first = {next((k for k, picked in enumerate(row) if picked), -1) for row in table}
    return list(rules.values())[first.pop() if len(first) == 1 else -1]
