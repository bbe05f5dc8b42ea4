"""How does an optimiser of torch stand in a checkpoint of ours? Its groups as numbers and text, what
it has learnt by the names of parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from optimisers.errors import BadState
from optimisers.rule import Rule
from optimisers.settings import fill, numbers
from optimisers.torch.classes import plain
from optimisers.torch.groups import defaults_of, has_schedule
from optimisers.torch.keeping import Keeper

Found = Mapping[str, Mapping[str, Any]]
"""Parameter -> what was saved of it, entry by entry."""

OURS = ("names", "own")
"""Keys of a group in a checkpoint that are no settings."""


def groups_to_save(packed: Mapping[str, Any], keeper: Keeper) -> list[dict[str, Any]]:
    """The groups of a saved state, with the names of their parameters, and of those that have settings of
    their own.

    Raises BadState where other tools keep entries beside those of the rules, which only torch saves.
    """
    if others := packed.get("others"):
        raise BadState(
            f"other tools keep {others[0]!r} in the state of this optimiser; save its state_dict() with "
            "torch.save"
        )
    names = {n: name for name, n in _number_of(packed, keeper).items()}
    found: list[dict[str, Any]] = []
    for group in packed["param_groups"]:
        own = [names[n] for n in group["params"] if "settings" in packed["state"].get(n, ())]
        settings = {k: plain(v) for k, v in group.items() if k not in ("params", "param_names")}
        found.append(settings | {"names": [names[n] for n in group["params"]], "own": own})
    return found


def _number_of(packed: Mapping[str, Any], keeper: Keeper) -> dict[str, int]:
    """The number of each parameter in a saved state, by name."""
    return {
        keeper.names[p]: n
        for mine, group in zip(keeper.groups, packed["param_groups"], strict=True)
        for p, n in zip(mine.group["params"], group["params"], strict=True)
    }


def packed_again(
    packed: dict[str, Any], keeper: Keeper, found: Found, saved: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """A saved state with what was found by name, and with the groups that were saved, if some were."""
    number = _number_of(packed, keeper)
    state = dict(packed["state"])
    own = {name for group in saved or () for name in group["own"]}
    for name, entries in found.items():
        marks = [
            mark for mark, wanted in (("settings", name in own), ("frozen", entries["frozen"])) if wanted
        ]
        state[number[name]] = _entries(entries, marks)
    if saved is not None:
        called = all("param_names" in mine.group for mine in keeper.groups)
        return {"state": state, "param_groups": _numbered(saved, number, called=called)}
    return {"state": state, "param_groups": _shown_in(packed["param_groups"], keeper, found, state, number)}


def _shown_in(
    groups: Sequence[Mapping[str, Any]],
    keeper: Keeper,
    found: Found,
    state: dict[Any, dict[str, Any]],
    number: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Groups with the settings that were found of their parameters, where these are alike; else those stand
    with each parameter, in `state`.
    """
    again = [dict(group) for group in groups]
    for mine, group in zip(keeper.groups, again, strict=True):
        there = [name for p in mine.group["params"] if (name := keeper.names[p]) in found]
        if mine.rule is not None and not _shown(group, mine.rule, [found[name] for name in there]):
            for name in there:
                state[number[name]] |= _entries(found[name], ("settings",))
    return again


def _shown(group: dict[str, Any], rule: Rule, found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a group shows the settings of all of its parameters, or can, and then does."""
    differing = {tuple(entries["settings"]) for entries in found}
    if differing == {tuple(numbers(rule))}:
        return True
    if len(differing) != 1 or has_schedule(rule):
        return False
    shown = defaults_of(fill(rule, iter(differing.pop())))
    group.update({k: v for k, v in shown.items() if k in group})
    return True


def _entries(entries: Mapping[str, Any], marks: Sequence[str]) -> dict[str, Any]:
    """What was saved of one parameter, as torch's loader takes it."""
    kept = {k: tensor(*v) if isinstance(v, tuple) else v for k, v in entries.items() if k not in MARKS}
    return kept | {mark: torch.tensor(entries[mark], dtype=torch.float64) for mark in marks}


MARKS = ("settings", "frozen")


def tensor(host: Any, kind: str) -> Any:
    """An array of NumPy as a tensor on its memory; bits of bfloat16 as what they are."""
    found = torch.from_numpy(host if host.shape else np.array(host))
    return found.view(torch.bfloat16) if kind == "bfloat16" and host.dtype == np.uint16 else found


def _numbered(
    saved: Sequence[Mapping[str, Any]], number: Mapping[str, int], *, called: bool
) -> list[dict[str, Any]]:
    """Groups of a checkpoint as torch has them; names that are not here have numbers of their own."""
    new = len(number)
    groups: list[dict[str, Any]] = []
    for group in saved:
        settings = {k: _tuples(v) for k, v in group.items() if k not in OURS}
        params: list[int] = []
        for name in group["names"]:
            params.append(number.get(name, new))
            new += name not in number
        names = {"param_names": list(group["names"])} if called else {}
        groups.append(settings | {"params": params} | names)
    return groups


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
