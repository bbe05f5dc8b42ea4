"""How do the places below a node of a model come to the groups of its state?"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.memory import same_array
from optimisers.engines.memory import Known
from optimisers.errors import TreeMismatch
from optimisers.ops.state import copy
from optimisers.state.buffers import Indices
from optimisers.state.store import Store
from optimisers.tree.layout import Layout, Node
from optimisers.tree.path import KeyPath


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How the places below a node come to the groups."""

    leaves: list[int]
    """The different leaves, in the order of the walk."""
    parts: list[tuple[int, Any, Any]]
    """(group, its members here or None for all, where they stand in `leaves`)."""
    whole: bool
    """Whether all of it is one group, in order."""
    first: list[int] | None
    """Where in the walk each leaf is met first; None where the walk meets each leaf once, as it is."""
    ties: dict[int, list[tuple[int, Any]]]
    """For each leaf (by its number in `leaves`) that has several places or other axes: (number in the walk,
    axes).
    """
    numbers: Indices
    """The leaves as an index."""
    known: Known
    """The memory that was written last."""

    def untied(self, xs: Sequence[Any], orders: list[Sequence[Any]], layout: Layout) -> Any:
        """(parameters, gradients) of each leaf, with the axes of its first place in the model.

        Gradients are summed over the places; the same object at several of them counts once.
        """
        assert self.first is not None
        alone = [xs[i] for i in self.first]
        summed = [[gs[i] for i in self.first] for gs in orders]
        for n, places in self.ties.items():
            paths = layout.places[self.leaves[n]]
            views = [_turned(xs[place], axes) for place, axes in places]
            for other in views[1:]:
                _still_tied(views[0], other, paths)
            alone[n] = views[0]
            for gs, to in zip(orders, summed, strict=True):
                to[n] = _sum_of_places([(gs[place], axes) for place, axes in places], paths)
        return alone, summed


def _turned(x: Any, axes: Any) -> Any:
    """What stands at a place, with the axes of the first place of its leaf."""
    if axes is None or not registry.isarray(x):
        return x
    back: list[int] = np.argsort(axes).tolist()
    if x.ndim == len(axes) + 1:  # with an axis of examples in front, which stays there
        back = [0, *(a + 1 for a in back)]
    return registry.library(x).permuted(x, tuple(back)) if x.ndim == len(back) else x


def plan_of(store: Store, node: Node) -> Plan:
    """The plan of the steps of what lies below a node of the layout."""
    if id(node) not in store.plans:
        store.plans[id(node)] = node, _planned(store, node)
    return store.plans[id(node)][1]


def _planned(store: Store, node: Node) -> Plan:
    leaves = [i for i in dict.fromkeys(node.leaves) if store.shapes[i] is not None]
    seen: dict[int, list[tuple[int, Any]]] = {}
    for place, (leaf, axes) in enumerate(_places(node)):
        seen.setdefault(leaf, []).append((place, axes))
    ties = {n: seen[i] for n, i in enumerate(leaves) if len(seen[i]) > 1 or seen[i][0][1] is not None}
    first = None if leaves == list(node.leaves) and not ties else [seen[i][0][0] for i in leaves]
    parts = _parts(store, leaves)
    whole = len(parts) == 1 and bool((parts[0][2] == np.arange(len(leaves))).all())
    return Plan(leaves, parts, whole, first, ties, np.array(leaves, np.int64), Known())


def _parts(store: Store, leaves: list[int]) -> list[tuple[int, Any, Any]]:
    """Which of the leaves each group holds, as `Plan.parts` has it."""
    at = np.full(len(store.shapes), -1)
    at[leaves] = np.arange(len(leaves))
    parts: list[tuple[int, Any, Any]] = []
    for g, group in enumerate(store.groups):
        members = np.flatnonzero(at[group.leaves] >= 0)
        if len(members):
            inside = None if len(members) == len(group.leaves) else members
            parts.append((g, inside, at[group.leaves[members]]))
    return parts


def _places(node: Node) -> Iterator[tuple[int, Any]]:
    """(leaf, axes) of every place below a node, in the order of the walk."""
    if node.leaf >= 0:
        yield node.leaf, node.axes
    for _, child in node.live:
        yield from _places(child)


def active(store: Store, plan: Plan, orders: list[Sequence[Any]]) -> Any:
    """Which leaves are stepped, as a mask; None for all: those that are not frozen and have a gradient."""
    some = any(map(operator.is_, orders[0], itertools.repeat(None)))
    missing = [n for n, g in enumerate(orders[0]) if g is None] if some else []
    frozen = store.frozen[plan.numbers]
    if not missing and not np.count_nonzero(frozen):
        return None
    active = ~frozen
    active[missing] = False
    return active


def _still_tied(first: Any, other: Any, places: list[KeyPath]) -> None:
    """Raise TreeMismatch unless two places still share one array, as `setup` saw."""
    if first is other:
        return
    library = registry.library(first)
    if registry.library_of(type(other)) is not library or not same_array(first, other):
        names = " and ".join(p.code() for p in places)
        raise TreeMismatch(
            f"{names} were one array at `setup` and are not now; tie them again, or call `setup` again"
        )


def refuse_untied(store: Store, node: Node, xs: Sequence[Any]) -> None:
    """Raise TreeMismatch where places that were one array at `setup` are not now."""
    plan = plan_of(store, node)
    for n, places in plan.ties.items():
        views = [_turned(xs[place], axes) for place, axes in places]
        for other in views[1:]:
            _still_tied(views[0], other, store.layout.places[plan.leaves[n]])


def _sum_of_places(grads: Sequence[tuple[Any, Any]], paths: list[KeyPath]) -> Any:
    """The gradient of a tied leaf: the sum of those that are there; None if there is none."""
    found: list[Any] = []
    for n, ((g, axes), path) in enumerate(zip(grads, paths, strict=False)):
        if g is None or any(g is other for other, _ in grads[:n]):
            continue
        if not registry.isarray(g):
            raise TreeMismatch(
                f"{path.code('grads')} is a {type(g).__name__}; it takes an array, or None for no step"
            )
        found.append(_turned(g, axes))
    for g in found[1:]:
        if g.shape != found[0].shape:
            raise TreeMismatch(
                f"gradients of shapes {tuple(found[0].shape)} and {tuple(g.shape)} for one array, at "
                f"{' and '.join(p.code('grads') for p in paths)}"
            )
    if len(found) <= 1:
        return found[0] if found else None
    add = registry.library(found[0]).operations["add"]  # which knows on which device
    return functools.reduce(add, map(copy, found))
