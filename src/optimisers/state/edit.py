"""How is a state changed between steps? Freeze, thaw, adjust, and hyper-parameters as numbers."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import BadSetting, BadState, UnknownField
from optimisers.graph.clocks import UPDATES
from optimisers.rule import Rule, changes_of
from optimisers.settings import Value, adjustable, adjusted, refuse_unknown, schedules, walk
from optimisers.settings import parts as parts_of_value
from optimisers.state.group import Group
from optimisers.state.leaf import Branch, Leaf, handle, parts
from optimisers.state.rows import on_host, tracer_of
from optimisers.state.select import Where, leaves_of
from optimisers.state.store import Store
from optimisers.tree.layout import Node

S = TypeVar("S")
"""The type of a state, or of a part of one: an edit keeps it."""


def freeze_(state: object, where: Where = None) -> None:
    """Let updates pass by everything below `state` that `where` picks: no step, no decay, momenta kept.

    Raises BadState for anything but a state, NoMatch for a selector that picks nothing.
    """
    _freeze(state, where, True)


def thaw_(state: object, where: Where = None) -> None:
    """Undo `freeze_`: training goes on with the state as it was."""
    _freeze(state, where, False)


def freeze(state: S, where: Where = None) -> S:
    """The state with everything that `where` picks frozen; the old one stays as it was (see `freeze_`)."""
    return _forked(state, lambda new: _freeze(new, where, True))


def thaw(state: S, where: Where = None) -> S:
    """The state with everything that `where` picks thawed; the old one stays as it was (see `freeze_`)."""
    return _forked(state, lambda new: _freeze(new, where, False))


def _freeze(state: Any, where: Where, frozen: bool) -> None:
    parts(state)[0].freeze(leaves_of(state, where), frozen)


def adjust_(state: object, eta: object = None, *, where: Where = None, **changes: object) -> None:
    """Change hyper-parameters below `state`: `adjust_(state, 0.03)` sets eta, others go by name. State is
    kept.

    A value may be a schedule. In a chain, every rule that has the name takes it. Nothing is recompiled.
    Raises UnknownField for a name that no rule there has, BadSetting for a value that does not fit, NoMatch
    for a selector that picks nothing; then nothing has changed.
    """
    store, leaves = parts(state)[0], leaves_of(state, where)
    changes = changes_of(eta, changes)
    rules = _rules(store, leaves)
    for name in changes:
        if not any(name in adjustable(rule) for rule in rules):
            for rule in rules:
                refuse_unknown(rule, [name])
            raise UnknownField(f"there is nothing to train here, so nothing has a setting {name}")
    for rule in rules:  # before anything changes
        adjusted(rule, changes)
    store.adjust_many([(leaves, changes)])


def adjust(state: S, eta: object = None, *, where: Where = None, **changes: object) -> S:
    """The state, or the rule, with hyper-parameters changed; the old one stays as it was (see `adjust_`)."""
    if isinstance(state, Rule):
        if where is not None:
            raise BadState("a rule has no parts for `where` to pick from; adjust the state")
        return state.adjust(eta, **changes)
    return _forked(state, lambda new: adjust_(new, eta, where=where, **changes))


def _forked(state: Any, change: Callable[[Any], None]) -> Any:
    new = _copied(state)
    change(new)
    return new


def _copied(state: Any) -> Any:
    """A state that may be changed apart from this one, which is not put together for that."""
    if not isinstance(state, Leaf | Branch):
        parts(state)  # which says what is wrong
    return copy.copy(state)


def _rules(store: Store, leaves: list[int]) -> list[Rule]:
    """The different rules of some leaves."""
    found: list[Rule] = []
    for group, members, _ in store.found(leaves):
        first = np.unique(group.table.row[members], return_index=True)[1]
        found += [group.rule_of(int(i)) for i in members[first]]
    return found


def current(state: Any) -> Any:
    """The hyper-parameters that the next update will use: rules whose schedules are replaced by their present
    values.

    For a Leaf its rule, for a Branch a dict {path: rule}: `current(state.w).eta`, `current(state)["w"].eta`.
    """
    store = parts(state)[0]
    if isinstance(state, Leaf):
        return present(*store.where(leaves_of(state)[0]))
    return {
        str(store.layout.paths[i]): current(handle(store, Node(leaf=i, leaves=(i,)), store.layout.paths[i]))
        for i in leaves_of(state)
    }


def present(group: Group, i: int, rule: Rule | None = None) -> Any:
    """The rule of leaf i of a group, or one of its structure, with schedules at their present value."""
    rule = group.rule_of(i) if rule is None else rule
    read = {id(part): k for part, k in zip(parts_of_value(rule), group.program.clocks, strict=True)}
    counters = group.table.read_counters(i)[len(group.types) :]

    def value(_: str, schedule: Callable[[Any], Any], owner: Value) -> float:
        k = read[id(owner)]
        return float(schedule(group.table.read_clock(i) if k == UPDATES else int(counters[k])))

    return schedules(rule, value)


def hyperparameters(state: Any) -> dict[str, Any]:
    """The hyper-parameters of all rules below `state`, by name: numbers, or vectors of one for each
    row of scalars: leaves that were always adjusted and stepped alike share one.

    A name that several rules of a chain have is given with its place, `rules.1.eta`. What is done to these
    numbers may be differentiated: `with_hyperparameters(state, h)` puts them back. Settings that are
    schedules are functions, and not among them.
    """
    found: dict[str, list[Any]] = {}
    for group, rows in _rows(state):
        for j, name in enumerate(_hyper_names(group)):
            found.setdefault(name, []).append(group.table.column(rows, j))
    joined = {name: _joined(columns) for name, columns in found.items()}
    return {name: v[0] if len(v) == 1 else v for name, v in joined.items()}


def with_hyperparameters(state: S, values: dict[str, Any]) -> S:
    """The state with other hyper-parameters, given as `hyperparameters` gives them; the old one stays as it
    was.

    The values may be traced by a transform; then a step follows them. Raises UnknownField for other names,
    BadSetting for other shapes and for numbers that the rule does not take.
    """
    new = _copied(state)
    known = hyperparameters(new)
    for name, value in values.items():
        if name not in known:
            raise UnknownField(f"there is no hyper-parameter {name!r}; there are {', '.join(known)}")
        held = known[name]
        if np.ndim(value) and np.shape(value) not in (np.shape(held), (np.size(held),)):
            raise BadSetting(
                f"{name} has shape {np.shape(value)}; it takes a number, or what hyperparameters(state) "
                f"gives, of shape {np.shape(held)}"
            )
    taken = dict.fromkeys(values, 0)
    changed = parts(new)[0]
    with changed.lock:
        for group, members, _ in changed.found(leaves_of(new)):
            table = group.table.split(members)
            rows = np.unique(table.row[members])
            for j, name in enumerate(_hyper_names(group)):
                if name in values:
                    value = values[name]
                    if np.ndim(value):
                        value = value[taken[name] : taken[name] + len(rows)]
                        taken[name] += len(rows)
                    if tracer_of(value) is None:
                        for number in set(np.ravel(on_host(value)).tolist()):
                            adjusted(group.rule, {name: number})  # raises for what the rule does not take
                    table = table.write_hypers(rows, j, value)
            group.table = table.merge_equal()
    changed.changed()
    return new


def _rows(state: Any) -> Iterator[tuple[Any, Any]]:
    """(group, its rows of scalars) for the leaves below a handle."""
    store = parts(state)[0]
    for group, members, _ in store.found(leaves_of(state)):
        yield group, np.unique(group.table.row[members])


def _hyper_names(group: Any) -> list[str]:
    """The names of the hyper-parameters of a group: short ones where they are unique."""
    short = list(group.program.names[: group.program.hypers])
    full = [".".join(map(str, path)) for path, _ in walk(group.rule)]
    return [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]


def _joined(columns: list[Any]) -> Any:
    library = registry.library(columns[0])
    return columns[0] if len(columns) == 1 else library.scalars.joined(columns)
