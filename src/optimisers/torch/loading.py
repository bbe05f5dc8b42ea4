"""How does a saved state come into an optimiser? By name where both sides have names, and checked before
anything changes.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from optimisers.errors import TreeMismatch
from optimisers.nest import flatten
from optimisers.settings import fill, numbers
from optimisers.state.buffers import FlatBuffers
from optimisers.state.group import started
from optimisers.torch.classes import plain
from optimisers.torch.entries import entry_name
from optimisers.torch.published import Block, Published
from optimisers.tree.path import KeyPath

MARKS = ("settings", "frozen")
"""Entries of a saved state that say what was changed in the tree alone."""


# -- which saved state belongs to which parameter ------------------------------------------------------------


class Arranged(NamedTuple):
    """A saved state in the order of the groups that are here."""

    groups: list[dict[str, Any]]
    """Their settings, one for each group here."""
    numbers: list[list[Any]]
    """For each parameter its number in the saved state; None where it is not there."""


def arranged(saved: Mapping[str, Any], groups: Sequence[dict[str, Any]], left: list[str] | None) -> Arranged:
    """A saved state as the groups here take it, by name where both sides have names for all, else by place.

    What does not fit is noted in `left`, or raises where that is None: TreeMismatch for other names, and for
    a group whose parameters had different settings; ValueError for other groups of parameters without names.
    """
    theirs = saved_groups(saved)
    if all(_named(group) for group in (*theirs, *groups)):
        return _by_name(theirs, groups, left)
    if left is None:
        if len(theirs) != len(groups):
            raise TreeMismatch(
                f"the saved state has a different number of parameter groups: {len(theirs)}; there are "
                f"{len(groups)} here"
            )
        for n, (one, other) in enumerate(zip(theirs, groups, strict=True)):
            if len(one["params"]) != len(other["params"]):
                raise TreeMismatch(
                    f"the saved state doesn't match the size of optimizer's group {n}: it has "
                    f"{len(one['params'])} parameters, and there are {len(other['params'])} here"
                )
    numbers = iter([number for group in theirs for number in group["params"]])
    return Arranged(
        [_settings(theirs[n]) if n < len(theirs) else {} for n in range(len(groups))],
        [[next(numbers, None) for _ in group["params"]] for group in groups],
    )


def saved_groups(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a saved state; raises TreeMismatch for what is none."""
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not isinstance(saved.get("state"), Mapping):
        raise TreeMismatch(
            "a saved state has 'state' and 'param_groups'; this has "
            f"{', '.join(map(repr, saved)) or 'nothing'}"
        )
    found: list[dict[str, Any]] = list(groups)
    for n, group in enumerate(found):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise TreeMismatch(f"group {n} of the saved state has no list of params: {group!r}")
    return found


def _named(group: Mapping[str, Any]) -> bool:
    names = group.get("param_names")
    return names is not None and len(names) == len(group["params"])


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def bare_name(name: str) -> str:
    """The name of a parameter without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _by_name(
    theirs: list[dict[str, Any]], groups: Sequence[dict[str, Any]], left: list[str] | None
) -> Arranged:
    number_of, group_of = dict[str, Any](), dict[str, int]()
    for n, group in enumerate(theirs):
        names = [bare_name(name) for name in group["param_names"]]
        number_of.update(zip(names, group["params"], strict=True))
        group_of.update(dict.fromkeys(names, n))
    wanted = [[bare_name(name) for name in group["param_names"]] for group in groups]
    _compare(group_of.keys(), set().union(*wanted), left)
    settings = [
        _common(n, [group_of[name] for name in names if name in group_of], theirs, left)
        for n, names in enumerate(wanted)
    ]
    return Arranged(settings, [list(map(number_of.get, names)) for names in wanted])


def _compare(theirs: Collection[str], ours: Collection[str], left: list[str] | None) -> None:
    """Note names that are on one side only, or raise TreeMismatch for them."""
    lost = [*sorted(set(ours) - set(theirs)), *sorted(set(theirs) - set(ours))]
    if lost and left is None:
        raise TreeMismatch(
            f"the saved state is that of other parameters: {lost[0]!r} is on one side only; strict=False "
            "takes what fits"
        )
    if left is not None:
        left += [f"{name!r} is on one side only" for name in lost]


def _common(
    n: int, sources: list[int], theirs: list[dict[str, Any]], left: list[str] | None
) -> dict[str, Any]:
    """The settings of a group here whose parameters were in some groups of the saved state."""
    if not sources:
        return {}
    first, *more = dict.fromkeys(sources)
    found = _settings(theirs[first])
    for other in more:
        differing = [k for k, v in found.items() if _settings(theirs[other]).get(k) != v]
        if not differing:
            continue
        text = (
            f"group {n} holds parameters of groups {first} and {other} of the saved state, whose "
            f"{', '.join(differing)} differ"
        )
        if left is None:
            raise TreeMismatch(f"{text}; strict=False keeps the settings that are here")
        left.append(text)
        return {}
    return found


def entries_by_parameter(
    groups: Sequence[Mapping[str, Any]],
    numbered: Sequence[Sequence[int | None]],
    state: Mapping[Any, Any],
    *,
    lenient: bool,
) -> dict[Any, Any]:
    """The saved entries by parameter; raises TreeMismatch for those under a number that no parameter has."""
    known = {n for ns in numbered for n in ns}
    strange = [n for n in state if isinstance(n, int) and n not in known]
    if strange and not lenient:
        raise TreeMismatch(f"the saved state has entries under {strange[0]}, a number that no parameter has")
    return {
        p: state[n]
        for group, ns in zip(groups, numbered, strict=True)
        for p, n in zip(group["params"], ns, strict=True)
        if n is not None and n in state
    }


# -- what is saved of one parameter --------------------------------------------------------------------------


def all_fit(held: Published, saved: Mapping[Any, Any]) -> bool:
    """Whether all saved entries are plainly what the rules keep; False where each must be looked at."""
    by_block: dict[Block, list[tuple[int, Any]]] = {}
    for p, found in saved.items():
        if p not in held.places:
            return False
        block, i = held.places[p]
        by_block.setdefault(block, []).append((i, found))
    return all(_all_fit(block, given) for block, given in by_block.items())


def _all_fit(block: Block, given: Sequence[tuple[int, Any]]) -> bool:
    """The same of members of one block."""
    found = [entries for _, entries in given]
    keys = set(found[0]) if type(found[0]) is dict else set()
    if not all(type(entries) is dict and entries.keys() == keys for entries in found):
        return False
    if not {"step", *block.needed} <= keys <= {*block.names}:
        return False
    columns = {key: [entries[key] for entries in found] for key in keys}
    members = [i for i, _ in given]
    return all(
        _are_arrays(values, block.slots[key], members)
        if key in block.slots
        else _are_numbers(values, whole=key in block.progress)
        for key, values in columns.items()
    )


def _are_arrays(values: Sequence[Any], slot: FlatBuffers, members: Sequence[int]) -> bool:
    """Whether these are plain tensors of the type of a slot and of the shapes of its members."""
    return (
        PLAIN.issuperset(map(type, values))
        and {v.dtype for v in values} == {slot.dtype}
        and list(map(torch.Tensor.size, values)) == [slot.shape(i) for i in members]
    )


def _are_numbers(values: Sequence[Any], *, whole: bool) -> bool:
    """Whether these are plainly counters, or numbers of steps."""
    found = scalars(values)
    return found is not None and not np.isnan(found).any() and (not whole or bool((found >= 0).all()))


PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def scalars(values: Sequence[Any]) -> Any:
    """Numbers, or tensors of one number and type on the CPU, as a vector; None for others."""
    kinds = set(map(type, values))
    if kinds <= {float, int}:
        return np.array(values, np.float64)
    if not kinds <= PLAIN or len({(v.dtype, v.device, v.numel()) for v in values}) != 1:
        return None
    first: torch.Tensor = values[0]
    if first.numel() != 1 or first.is_complex() or first.device.type != "cpu":
        return None
    return torch.stack([v.detach().reshape(()) for v in values]).double().numpy()


def misfit(block: Block, i: int, name: str, found: Any, others: Collection[str] | None) -> str:
    """Why the saved entries of a parameter do not fit its leaf, number `i` of a block; empty if they do.

    `others` are entries of other tools that may stand there too; None for any.
    """
    if not isinstance(found, Mapping):
        return f"the state of {name!r} is a {type(found).__name__}; it takes a dict"
    if _is_of_another(block, found, others):
        keeps = ", ".join(map(repr, block.own)) or "nothing"
        return (
            f"the state of {name!r} has {', '.join(map(repr, found)) or 'nothing'}; "
            f"{block.group.rule_of(i)!r} keeps {keeps}; load the state of the same rule"
        )
    for key in (*block.progress, *block.columns):
        if key in found and (reason := _no_number(found[key], whole=key in block.progress)):
            return f"{key!r} of {name!r} {reason}"
    for key, slot in block.slots.items():
        if reason := _no_array(found[key], slot):
            return f"{key!r} of {name!r} {reason}"
        if tuple(found[key].shape) != slot.shape(i):
            return (
                f"{key!r} of {name!r} has shape {tuple(found[key].shape)}; the parameter takes "
                f"{slot.shape(i)}"
            )
    return ""


def _is_of_another(block: Block, found: Mapping[Any, Any], others: Collection[str] | None) -> bool:
    """Whether the saved entries are those of another rule: keys too many, or some too few."""
    keys = found.keys() - {*block.progress, *MARKS}
    lacking = [key for key in block.needed if key not in keys]
    extra = [] if others is None else [key for key in keys if key not in block.own and key not in others]
    partly = others is None or len(lacking) < len(block.needed) or not keys
    return bool(extra) or (bool(lacking) and partly)


def _no_number(value: Any, *, whole: bool) -> str:
    """Why an entry is no counter."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, int | float) or math.isnan(value):
        return f"is {value!r}; it takes a number"
    return f"is {value!r}; it takes a number of steps" if whole and value < 0 else ""


def _no_array(value: Any, slot: Any) -> str:
    """Why an entry is no array of a slot."""
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}; it takes a tensor"
    if value.is_complex() and not slot.dtype.is_complex:
        return "is complex; it takes real numbers"
    if not (value.is_complex() or value.is_floating_point()) and slot.dtype.is_floating_point:
        return f"is a tensor of {value.dtype}; it takes floating point numbers"
    return ""


def entries_of(found: Mapping[str, Any], p: Any, block: Block, i: int) -> Mapping[str, Any]:
    """What the state of a parameter becomes: of one whose rule keeps nothing any more there, a new one."""
    if any(name in found for name in block.own) or (not block.own and found.keys() & block.progress):
        return found
    state = started(block.group.rule_of(i), p, KeyPath())
    return {entry_name(at): value for at, value in flatten(state)} | {"step": 0}


def adopt(held: Published, saved: Mapping[Any, Mapping[str, Any]]) -> None:
    """Take over the entries of parameters, which were found to fit, all at once."""
    by_block: dict[int, list[tuple[int, Any]]] = {}
    for p, found in saved.items():
        block, i = held.places[p]
        by_block.setdefault(id(block.group), []).append((i, entries_of(found, p, block, i)))
    with held.store.lock:
        for key, given in by_block.items():
            _adopt(held.block_of[key], np.array([i for i, _ in given]), [found for _, found in given])
    held.store.changed()
    mark(held, saved)


def _adopt(block: Block, members: Any, found: Sequence[Mapping[str, Any]]) -> None:
    """Take over the entries of some members of a group."""
    block.group.owned()
    for key, slot in block.slots.items():
        slot.put_many(members, [each[key] for each in found])
    block.count(members, np.array(_completed(block, members, found)))


def _completed(block: Block, members: Any, found: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A row of clock and counters for each of some members; those of equal ones are worked out once."""
    named = [[name for name in ("step", *block.columns) if name in each] for each in found]
    given = [
        {name: float(plain(each[name])) for name in names} for names, each in zip(named, found, strict=True)
    ]
    rows, known = block.group.table.row[members].tolist(), dict[Any, Any]()
    for k, (i, row, own) in enumerate(zip(members.tolist(), rows, given, strict=True)):
        key = row, block.row_of(i).tobytes(), *own.items()
        if key not in known:
            known[key] = block.completed(i, own)
        rows[k] = known[key]
    return rows


def mark(held: Published, saved: Mapping[Any, Mapping[str, Any]]) -> None:
    """Freeze and adjust what was frozen or adjusted when it was saved. Settings of a rule that is not here
    yet, since its group was not read, wait until that was done.
    """
    store = held.store
    frozen = [held.leaf_of[p] for p, found in saved.items() if found.get("frozen", 0)]
    if frozen:
        store.freeze(frozen, True)
    by_settings: dict[tuple[float, ...], list[int]] = {}
    for p, found in saved.items():
        if "settings" in found:
            leaf, own = held.leaf_of[p], tuple(found["settings"].tolist())
            if len(own) == len(numbers(store.where(leaf)[0].rule)):
                by_settings.setdefault(own, []).append(leaf)
    for own, leaves in by_settings.items():
        store.change(leaves, lambda rule, own=own: fill(rule, iter(own)))


def names_of_others(held: Published) -> list[str]:
    """The entries that other tools keep beside those of the rules."""
    known = {name for block in held.blocks for name in block.names}
    state = [held.state.get(p) for p in held.leaf_of]
    found = {key for entries in state if isinstance(entries, Mapping) for key in entries}
    return sorted(found - known, key=str)
