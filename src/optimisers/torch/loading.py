"""How does a saved state come into an optimiser? By name where both sides have names, and checked."""

from collections.abc import Iterable
from typing import Any

from optimisers.arrays import registry
from optimisers.errors import TreeMismatch
from optimisers.nest import flatten, unflatten
from optimisers.settings import fill
from optimisers.state.store import Store


def entry_name(path: tuple[Any, ...]) -> str:
    """Where in the state of a rule something stands, as torch's loaders take it."""
    return ".".join(map(str, path)) or "state"


def in_order(saved: dict[str, Any], groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A saved state whose parameters stand in the order of the groups here, where both have names."""
    new: list[dict[str, Any]] = []
    for theirs, ours in zip(saved["param_groups"], groups, strict=False):
        names, wanted = theirs.get("param_names"), ours.get("param_names")
        if names and wanted and names != wanted:
            if set(names) != set(wanted):
                lost = sorted(set(wanted) - set(names)) or sorted(set(names) - set(wanted))
                raise TreeMismatch(
                    f"the saved state is that of other parameters: {lost[0]!r} is on one side only"
                )
            number = dict(zip(names, theirs["params"], strict=True))
            theirs = theirs | {"params": [number[n] for n in wanted], "param_names": list(wanted)}  # noqa: PLW2901 what is kept
        new.append(theirs)
    return saved | {"param_groups": new + saved["param_groups"][len(new) :]}


def adopt(store: Store, saved: dict[int, dict[str, Any]], frozen: list[int]) -> None:
    """Take over the states of leaves that a checkpoint or another process has saved, all at once."""
    states = {leaf: _state_from(store, leaf, found) for leaf, found in saved.items()}
    frozen = [*frozen, *(leaf for leaf, found in saved.items() if found.get("frozen", 0))]
    if states:
        store.assign_many(states)
        store.wind(
            {
                leaf: {k: int(found[k]) for k in store.progress_of(leaf) if k in found}
                for leaf, found in saved.items()
            }
        )
    if frozen:
        store.freeze(frozen, True)
    by_settings: dict[tuple[float, ...], list[int]] = {}
    for leaf, found in saved.items():
        if "settings" in found:
            by_settings.setdefault(tuple(found["settings"].tolist()), []).append(leaf)
    if by_settings:
        store.change_many(
            [(leaves, lambda rule, own=own: fill(rule, iter(own))) for own, leaves in by_settings.items()]
        )


def _state_from(store: Store, leaf: int, saved: dict[str, Any]) -> Any:
    """The state of a leaf from what was saved; raises TreeMismatch where it does not fit."""
    group, i = store.where(leaf)
    template = group.program.template
    entries = list(flatten(template))
    name = str(store.layout.paths[leaf])
    known, extra = {entry_name(path) for path, _ in entries}, {*store.progress_of(leaf), "settings", "frozen"}
    if saved.keys() - extra != known:
        raise TreeMismatch(
            f"the state of {name!r} has {', '.join(map(repr, saved))}; {group.rule_of(i)!r} keeps "
            f"{', '.join(repr(entry_name(path)) for path, _ in entries)}; load the state of the same rule"
        )
    new: list[Any] = []
    slots = iter(group.slots)
    for path, value in entries:
        found = saved[entry_name(path)]
        if not registry.isarray(value):
            new.append(float(found))
            continue
        pack = next(slots)
        shape = pack.places.shapes[i]
        if tuple(found.shape) != shape:
            raise TreeMismatch(
                f"{entry_name(path)!r} of {name!r} has shape {tuple(found.shape)}; the parameter takes "
                f"{shape}"
            )
        new.append(found.to(pack[i].device if group.kind.loose else group.kind.device))
    return unflatten(template, iter(new))
