"""What does an optimiser of torch keep, in our words? For those who go on from its checkpoint."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from optimisers.errors import TreeMismatch
from optimisers.graph.courses import Course, courses
from optimisers.nest import flatten
from optimisers.rule import Rule
from optimisers.rules.adaptive import AdaDelta
from optimisers.rules.descent import Momentum, Nesterov
from optimisers.rules.matrix import Muon
from optimisers.settings import adjustable, numbers, parts
from optimisers.spellings import BESIDE_A_RULE
from optimisers.state.group import Shape, program_of
from optimisers.torch.classes import HOW, of_other_tools, plain
from optimisers.torch.entries import COME_TRUE, TORCH_STATE, entry_name
from optimisers.torch.groups import defaults_of, has_schedule, told, torch_names

ARRAYS = {there: here for names in TORCH_STATE.values() for there, here in names.items()}
"""What torch keeps of a parameter -> the state of a rule here; of two rules that differ, the later."""

COUNTERS = ("step",)
"""What torch keeps of a parameter and the state of a rule does not."""

SIGNS: dict[type[Any], int] = {Momentum: 1, Nesterov: -1}
"""Rules whose momentum holds the rate -> the sign it has there."""


def as_ours(saved: dict[str, Any], rules: Iterable[Rule | None]) -> dict[str, Any]:
    """A saved state whose groups and entries of classes of torch are those of our rules; others as they are.

    Raises TreeMismatch where a group was saved by another class than its rule, or with other flags.
    """
    groups: list[dict[str, Any]] = []
    states: dict[Any, Any] = dict(saved["state"])
    rules = list(rules)
    for n, group in enumerate(saved["param_groups"]):
        rule = rules[n] if n < len(rules) else None
        if rule is None or not _is_torchs(group, rule):
            groups.append(group)
            continue
        kept, rule = _group(group, rule, f"group {n} of the saved state")
        groups.append(kept)
        for number in group["params"]:
            if number in states:
                states[number] = _entry(states[number], group, rule)
    return {**saved, "state": states, "param_groups": groups}


def _is_torchs(group: Mapping[str, Any], rule: Rule) -> bool:
    """Whether a saved group is that of a class of torch: it has their flags, and not the names here."""
    flags = {*HOW, *BESIDE_A_RULE, "maximize", "ns_steps"}
    here = {name for part in parts(rule) if isinstance(part, Rule) for name in torch_names(part)} - {"eta"}
    return bool(flags & group.keys()) and not (here and here <= group.keys())


def _group(group: dict[str, Any], rule: Rule, where: str) -> tuple[dict[str, Any], Rule]:
    """(a group of torch by our names, the rule with its settings); a schedule of ours goes on."""
    kept = of_other_tools(group) | {"params": group["params"]}
    said = {k: v for k, v in group.items() if k not in kept and k not in AT_THE_START}
    if "beta2_decay" in said:
        said["epsilon"], said["scale_epsilon"] = said.pop("eps")
    if has_schedule(rule) or "eta" not in adjustable(rule):
        del said["lr"]
    if not plain(group.get("weight_decay", 0)):
        said.pop("decoupled_weight_decay", None)
    if plain(said.get("weight_decay", 0)) and "lam" not in adjustable(rule):
        raise TreeMismatch(
            f"{where} decays by weight_decay={said['weight_decay']!r}, and {rule!r} does not; take the "
            "rule of from_torch_class with the keywords of the class that saved it"
        )
    rule = told(rule, said, where)
    return kept | defaults_of(rule), rule


AT_THE_START = {*BESIDE_A_RULE, "initial_accumulator_value"}
"""Keywords that count when an optimiser is made, and no more when it goes on."""


def _entry(saved: Mapping[str, Any], group: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """What torch keeps of a parameter, by the names of the state of a rule with the settings of its group;
    what a rule has not stays by its own name, and is refused where the state is taken over.
    """
    kept = {k: v for k, v in saved.items() if v is not None}
    steps = int(kept.get("step", 0))
    axes = max((v.ndim for v in kept.values() if isinstance(v, torch.Tensor)), default=0)
    known = _arrays(kept, group, rule) | COME_TRUE
    counted, wanted = _form(rule, axes)
    known |= {wanted[entry]: course.after(steps, numbers(rule)) for entry, course in counted.items()}
    others = {k: v for k, v in kept.items() if k not in COUNTERS}
    if not known.keys() >= set(wanted.values()):
        return others
    found = {entry: _tensor(known[name]) for entry, name in wanted.items()}
    return {k: v for k, v in others.items() if k not in ARRAYS} | {"step": _tensor(steps), **found}


@functools.lru_cache(maxsize=256)
def _form(rule: Rule, axes: int) -> tuple[dict[str, Course], dict[str, str]]:
    """(the counters of the state of a rule that follow from the steps, the name of each entry): for an array
    of some axes.
    """
    x = torch.zeros((1,) * axes)
    state = rule.init(x)
    program = program_of(rule, state, Shape.of(x))
    paths = [(path, value) for path, value in flatten(state)]
    counters = [entry_name(path) for path, value in paths if not isinstance(value, torch.Tensor)]
    found = {counters[at - program.hypers]: course for at, course in courses(program).items()}
    return found, {entry_name(path): last_name(path) for path, _ in paths}


def _arrays(saved: Mapping[str, Any], group: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """The arrays of a parameter by the names here, where momenta hold the rate."""
    of_adadelta, of_muon = "acc_delta" in saved, "ns_steps" in group
    names = ARRAYS | (TORCH_STATE[AdaDelta] if of_adadelta else TORCH_STATE[Muon] if of_muon else {})
    found = {names.get(name, name): value for name, value in saved.items()}
    if "momentum_buffer" in saved:
        for sign in [SIGNS[type(part)] for part in parts(rule) if type(part) in SIGNS]:
            found["v"] = found["v"] * (sign * float(group["lr"]))
    return found


def last_name(path: tuple[Any, ...]) -> str:
    """The name of what stands at a path, without the rules around it: `weight.0`."""
    named = max((i for i, part in enumerate(path) if isinstance(part, str)), default=0)
    return ".".join(map(str, path[named:]))


def _tensor(value: Any) -> Any:
    """An entry as it is saved: a tensor; numbers in double precision."""
    return value if isinstance(value, torch.Tensor) else torch.tensor(float(value), dtype=torch.float64)
