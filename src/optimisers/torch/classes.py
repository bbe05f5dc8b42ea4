"""Which rule is a class of torch.optim, with which keywords?"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from optimisers.compose.chain import Chain
from optimisers.errors import BadSetting, BadState, UnknownField
from optimisers.rule import Rule
from optimisers.rules.adam import Adam, AdamW, TorchAMSGrad, TorchNAdam, TorchRAdam
from optimisers.rules.adaptive import AdaDelta, RMSProp, Rprop, TorchAdaGrad
from optimisers.rules.descent import SGD, Descent
from optimisers.rules.factored import TorchAdafactor
from optimisers.rules.gradient import DecoupledDecay, Maximise, WeightDecay
from optimisers.rules.matrix import Muon
from optimisers.rules.of_torch import ASGD, SparseAdam, TorchAdaMax, TorchRMSProp
from optimisers.spellings import BESIDE_A_RULE, NOT_HERE

__all__ = ["from_torch_class"]

Pair = tuple[float, float]
Triple = tuple[float, float, float]


def from_torch_class(name: str | type, **keywords: object) -> Rule:
    """The rule that is a class of torch.optim: by its name in any case, or the class, with the keywords of
    its constructor and their defaults there.

    `from_torch_class("adamw", lr=3e-4, weight_decay=0.1)` is `AdamW(0.0003, lam=0.1)`. Where several rules
    say it, a chain comes back: `maximize=True` puts Maximise first, `weight_decay` puts WeightDecay before
    the rule, or, where the decay of torch follows the rate, DecoupledDecay(couple=True) behind it.
    `foreach` and `fused` say how torch computes, and change nothing here.

    Raises UnknownField for a name or keyword that is not known, BadSetting for a value that no rule takes.
    """
    if not isinstance(name, str | type):
        raise BadState(
            f"from_torch_class was given a {type(name).__name__}; it takes a class of torch.optim, or its "
            "name: for an optimiser that has parameters write opt.TorchOptimizer.of(optimizer)"
        )
    title = name if isinstance(name, str) else name.__name__
    make = CLASSES.get(title.lower().replace("_", ""))
    if make is None:
        why = NOT_HERE.get(title.lower())
        raise UnknownField(
            f"no rule is torch's {title}{f': {why}' if why else ''}; there are {', '.join(CLASSES)}"
        )
    given = {k: plain(v) for k, v in keywords.items() if k not in HOW}
    _refuse(title, {k: v for k, v in keywords.items() if k in BESIDE_A_RULE})
    upwards = bool(given.pop("maximize", False))
    takes = inspect.signature(make).parameters
    for key in given:
        if key not in takes and key not in BESIDE_A_RULE:
            raise UnknownField(
                f"{title} has no keyword {key}; it has {', '.join((*takes, 'maximize', *HOW))}"
            )
    rule = make(**{k: v for k, v in given.items() if k in takes})
    return chained(Maximise(), rule) if upwards else rule


HOW = ("foreach", "fused")
"""Keywords that say how torch computes its steps."""


def _refuse(title: str, flags: dict[str, object]) -> None:
    """Raise BadSetting for a flag that is set and is said elsewhere."""
    for key, value in flags.items():
        if value:
            raise BadSetting(
                f"{title} was given {key}={value!r}, which is no part of a rule; {BESIDE_A_RULE[key]}"
            )


def plain(value: Any) -> Any:
    """A keyword as numbers of Python; tensors give what they hold. Schedules stay."""
    if isinstance(value, tuple | list):
        items: Iterable[Any] = value
        return tuple(plain(v) for v in items)
    if not hasattr(value, "item"):
        return value
    if math.prod(value.shape) != 1:
        raise BadSetting(f"a setting is an array of shape {tuple(value.shape)}; it takes one number")
    return value.item()


def chained(*rules: Rule) -> Rule:
    """Rules in a row as one flat chain; a single one as it is."""
    flat = [part for rule in rules for part in (rule.rules if isinstance(rule, Chain) else (rule,))]
    return flat[0] if len(flat) == 1 else Chain(*flat)


# -- the classes ---------------------------------------------------------------------------------------------


def penalised(rule: Rule, weight_decay: float | None) -> Rule:
    """A rule with an L2 penalty in its gradient; None leaves that out, 0 does not."""
    return rule if weight_decay is None else chained(WeightDecay(weight_decay), rule)


def decayed(rule: Rule, weight_decay: float | None, decoupled: bool) -> Rule:
    """A rule with a penalty in the gradient, or with decay beside the step that follows the rate."""
    if not decoupled or weight_decay is None:
        return penalised(rule, weight_decay)
    return chained(rule, DecoupledDecay(weight_decay, couple=True))


def _sgd(
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float | None = None,
    nesterov: bool = False,
) -> Rule:
    plainly = momentum == 0 and not nesterov
    return penalised(Descent(lr) if plainly else SGD(lr, momentum, dampening, nesterov), weight_decay)


def _adam(
    lr: float = 1e-3,
    betas: Pair = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | None = None,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
) -> Rule:
    if decoupled_weight_decay and not amsgrad:
        return AdamW(lr, betas, weight_decay or 0.0, eps)
    rule = TorchAMSGrad(lr, betas, eps) if amsgrad else Adam(lr, betas, eps)
    return decayed(rule, weight_decay, decoupled_weight_decay)


def _adamw(
    lr: float = 1e-3,
    betas: Pair = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = True,
) -> Rule:
    return _adam(lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay)


def _nadam(
    lr: float = 2e-3,
    betas: Pair = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | None = None,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
) -> Rule:
    return decayed(TorchNAdam(lr, betas, eps, momentum_decay), weight_decay, decoupled_weight_decay)


def _radam(
    lr: float = 1e-3,
    betas: Pair = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | None = None,
    decoupled_weight_decay: bool = False,
) -> Rule:
    return decayed(TorchRAdam(lr, betas, eps), weight_decay, decoupled_weight_decay)


def _adamax(
    lr: float = 2e-3,
    betas: Pair = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | None = None,
) -> Rule:
    return penalised(TorchAdaMax(lr, betas, eps), weight_decay)


def _sparse_adam(lr: float = 1e-3, betas: Pair = (0.9, 0.999), eps: float = 1e-8) -> Rule:
    return SparseAdam(lr, betas, eps)


def _rmsprop(
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float | None = None,
    momentum: float = 0.0,
    centered: bool = False,
) -> Rule:
    still = momentum == 0
    rule = RMSProp(lr, alpha, eps, centered) if still else TorchRMSProp(lr, alpha, momentum, eps, centered)
    return penalised(rule, weight_decay)


def _adagrad(
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float | None = None,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
) -> Rule:
    return penalised(TorchAdaGrad(lr, eps, lr_decay, float(initial_accumulator_value)), weight_decay)


def _adadelta(
    lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: float | None = None
) -> Rule:
    return penalised(AdaDelta(rho, eps, lr), weight_decay)


def _rprop(lr: float = 1e-2, etas: Pair = (0.5, 1.2), step_sizes: Pair = (1e-6, 50.0)) -> Rule:
    return Rprop(lr, etas, step_sizes)


def _asgd(
    lr: float = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float | None = None,
) -> Rule:
    return penalised(ASGD(lr, lambd, alpha, t0), weight_decay)


def _muon(
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: Triple = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> Rule:
    scale: Any = muon_scale(adjust_lr_fn)
    return Muon(lr, momentum, weight_decay, eps, nesterov, scale, int(ns_steps), (ns_coefficients,))


def muon_scale(adjust_lr_fn: Any) -> Any:
    """What torch's Muon calls adjust_lr_fn, as a scale."""
    return {None: "original", "match_rms_adamw": "rms"}.get(adjust_lr_fn, adjust_lr_fn)


def _adafactor(
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
) -> Rule:
    return TorchAdafactor(lr, beta2_decay, d, weight_decay, eps[1], eps[0])


CLASSES: dict[str, Callable[..., Rule]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "nadam": _nadam,
    "radam": _radam,
    "adamax": _adamax,
    "sparseadam": _sparse_adam,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "adadelta": _adadelta,
    "rprop": _rprop,
    "asgd": _asgd,
    "muon": _muon,
    "adafactor": _adafactor,
}
"""Class of torch.optim, in lower case -> the rule for its keywords."""

KEYWORDS = frozenset(key for make in CLASSES.values() for key in inspect.signature(make).parameters)
"""What the constructors of these classes take, and their groups hold."""


def rule_of_group(optimizer: Any, group: Mapping[str, Any]) -> Rule:
    """The rule of one group of an optimiser of torch."""
    title = next(
        (cls.__name__ for cls in type(optimizer).__mro__ if cls.__module__.startswith("torch.optim.")), ""
    )
    title = title if title != "Optimizer" else type(optimizer).__name__
    make = CLASSES.get(title.lower())
    takes = {*inspect.signature(make).parameters} if make is not None else set[str]()
    known = takes | {"maximize", "differentiable"}
    return from_torch_class(title, **{k: v for k, v in group.items() if k in known})


def of_other_tools(group: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in a group of torch beside the keywords of its class."""
    ours = {*KEYWORDS, *HOW, *BESIDE_A_RULE, "maximize", "params"}
    return {k: v for k, v in group.items() if k not in ours}
