"""What is there to keep of a state, and of the model beside it? Arrays and numbers, each under a name.

Of the parameters at `layers.0.w` there are `layers.0.w/m` for what the rule keeps (shaped as the rule keeps
it), and scalars in float64: `layers.0.w@step`, how many updates have covered it; `@settings`, the numbers of
its rule in their order; `@frozen`, 0 or 1. The model's own arrays stand under their paths alone.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from optimisers.arrays import memory, registry
from optimisers.arrays.parts import Part
from optimisers.arrays.protocol import HostArray
from optimisers.checkpoint.format import CODES, PAIRS, Form
from optimisers.errors import BadState
from optimisers.nest import flatten
from optimisers.rule import Rule
from optimisers.settings import Value, fields, numbers, settings
from optimisers.state.group import Group
from optimisers.state.leaf import Branch, Leaf, parts
from optimisers.state.rows import on_host, tracer_of
from optimisers.state.select import leaves_of
from optimisers.state.store import Store
from optimisers.tree.children import Beside
from optimisers.tree.flatten import flatten_model
from optimisers.tree.flatten_up_to import model_children
from optimisers.tree.layout import Layout, Node, extended
from optimisers.tree.path import KeyPath

COMPILED = "_orig_mod."
"""What torch.compile puts into the names of a module."""


def named(path: object) -> str:
    """The name of what stands at a path."""
    return str(path).replace(COMPILED, "")


# -- states --------------------------------------------------------------------------------------------------


class Slots(NamedTuple):
    """What the leaves of one group keep, entry by entry."""

    names: list[str]
    arrays: list[list[Any] | None]
    """The array of each member; None for a number, which stands in the table."""


class Numbers(NamedTuple):
    """What leaves of one row of scalars share."""

    rule: Rule
    counters: list[float]
    """The numbers of the state, in the order of its entries."""
    progress: dict[str, float]
    settings: list[float]


class Kept(NamedTuple):
    """One leaf, and all that is kept of it."""

    leaf: int
    name: str
    places: list[str]
    """Its name at all its places, the first one first."""
    straight: list[str]
    """Those where its axes stand as at the first."""
    group: Group
    member: int
    slots: Slots
    row: Numbers
    frozen: bool

    def entries(self) -> Iterator[tuple[str, Any]]:
        """(name, array or number or list of numbers) of everything."""
        counters = iter(self.row.counters)
        for entry, arrays in zip(self.slots.names, self.slots.arrays, strict=True):
            yield f"{self.name}/{entry}", next(counters) if arrays is None else arrays[self.member]
        for key, value in self.row.progress.items():
            yield f"{self.name}@{key}", value
        yield f"{self.name}@settings", self.row.settings
        yield f"{self.name}@frozen", int(self.frozen)


def tree_of(state: object) -> Any:
    """The state as a tree, whatever it is that has one."""
    optimizer = not isinstance(state, Leaf | Branch) and hasattr(state, "parameters")
    return getattr(state, "tree", state) if optimizer else state


def kept_of(state: object, what: str) -> list[Kept]:
    """Everything below a handle, leaf by leaf; none where nothing is trained.

    Raises BadState inside a transform and while parameters hold their averages.
    """
    tree = tree_of(state)
    if isinstance(tree, tuple) and not tree:
        return []
    store = parts(tree)[0]
    store.refuse_lent(what)
    if any(tracer_of(g.table.values) is not None for g in store.groups):
        raise BadState(f"{what} was called inside a transform, where numbers are not known; call it outside")
    leaves = leaves_of(tree)
    straight = _straight(store.layout)
    slots: dict[int, Slots] = {}
    rows: dict[tuple[int, int], Numbers] = {}
    found: list[Kept] = []
    for leaf in leaves:
        group, i = store.where(leaf)
        if id(group) not in slots:
            slots[id(group)] = _slots(group)
        row = id(group), int(group.table.row[i])
        if row not in rows:
            rows[row] = _row(store, leaf, group, i)
        places = [named(path) for path in store.layout.places[leaf]]
        frozen = bool(store.frozen[leaf])
        found.append(
            Kept(leaf, places[0], places, straight[leaf], group, i, slots[id(group)], rows[row], frozen)
        )
    return found


def _straight(layout: Layout) -> list[list[str]]:
    """The names of the places of each leaf at which it is not transposed."""
    found: list[list[str]] = [[] for _ in layout.paths]
    for name, node in _leaf_nodes(layout.root, KeyPath()):
        if node.axes is None:
            found[node.leaf].append(name)
    return found


def _leaf_nodes(node: Node, path: KeyPath) -> Iterator[tuple[str, Node]]:
    if node.leaf >= 0:
        yield named(path), node
    for key, child in node.live:
        yield from _leaf_nodes(child, extended(node, path, key))


def _slots(group: Group) -> Slots:
    arrays = iter(group.slots)
    names: list[str] = []
    columns: list[list[Any] | None] = []
    for path, value in flatten(group.program.template):
        names.append(".".join(map(str, path)) or "state")
        columns.append(list(next(arrays)) if registry.isarray(value) else None)
    return Slots(names, columns)


def _row(store: Store, leaf: int, group: Group, i: int) -> Numbers:
    rule = group.rule_of(i)
    counters = [float(v) for v in on_host(group.table.read_counters(i))[: len(group.types)]]
    progress = {key: float(on_host(value)) for key, value in store.progress_of(leaf).items()}
    return Numbers(rule, counters, progress, [float(on_host(v)) for v in numbers(rule)])


# -- rules ---------------------------------------------------------------------------------------------------


def structure(value: object) -> str:
    """A rule without its numbers, as text that is the same in every process: what must be equal for a state
    to fit.
    """
    if isinstance(value, Value):
        static = {f.name for f in fields(value) if f.static}
        inner = (f"{k}={repr(v) if k in static and _plain(v) else structure(v)}" for k, v in settings(value))
        return f"{type(value).__name__}({', '.join(inner)})"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(structure, value))})"
    if isinstance(value, float | int) and not isinstance(value, bool):
        return "#"
    return repr(value) if _plain(value) else getattr(value, "__qualname__", type(value).__qualname__)


def _plain(value: object) -> bool:
    """Whether a value prints as what it is."""
    if isinstance(value, tuple | list):
        items: Iterable[object] = value
        return all(map(_plain, items))
    return value is None or isinstance(value, str | bool | int | float)


# -- models --------------------------------------------------------------------------------------------------


class Modelled(NamedTuple):
    """The arrays of a model, by name."""

    node: Node
    model: Any
    leaves: dict[str, tuple[int, Any]]
    """(number, array) of those that stand in the tree."""
    beside: dict[str, Beside]
    """Buffers, and variables that are no parameters."""
    ties: list[list[str]]

    def arrays(self) -> dict[str, Any]:
        return {name: x for name, (_, x) in self.leaves.items()} | {
            name: found.value for name, found in self.beside.items()
        }


def modelled(model: object, prefix: KeyPath) -> Modelled:
    """All arrays of a model, trained or not, at their paths below `prefix`."""
    layout, arrays = flatten_model(model, trained=_has_numbers)
    first = [[named(KeyPath(prefix, p)) for p in places] for places in layout.places]
    leaves = {places[0]: (i, arrays[i]) for i, places in enumerate(first)}
    found = [(named(KeyPath(prefix, path)), b) for path, b in _beside(layout.root, model, KeyPath())]
    beside = {name: b for name, b in found if b.lasting and registry.isarray(b.value)}
    if len(leaves) < len(arrays) or not beside.keys().isdisjoint(leaves):
        names = [places[0] for places in first] + list(beside)
        raise collision(next(name for name in names if names.count(name) > 1))
    return Modelled(layout.root, model, leaves, beside, [places for places in first if len(places) > 1])


def collision(name: str) -> BadState:
    """Two arrays would have one name."""
    return BadState(
        f"two arrays would both be called {name!r}; rename a key of the model that has a dot, / or @ in it"
    )


def _has_numbers(x: Any) -> bool:
    return registry.isarray(x) and not registry.no_numbers(x)


def _beside(node: Node, model: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Beside]]:
    """(path, array) of what modules hold beside parameters."""
    if node.container is None:
        return
    if node.container.beside is not None:
        for found in node.container.beside(model):
            yield KeyPath(path, *found.path), found
        return
    for key, child, value in model_children(node, model, path, "setup"):
        yield from _beside(child, value, KeyPath(path, key))


# -- all of it -----------------------------------------------------------------------------------------------


def whole(kept: list[Kept], model: Modelled | None) -> dict[str, Any]:
    """Name -> array, number or list of numbers, of a state and a model."""
    found: dict[str, Any] = {}
    for leaf in kept:
        for name, value in leaf.entries():
            if name in found:
                raise collision(name)
            found[name] = value
    for name, value in ({} if model is None else model.arrays()).items():
        if name in found:
            raise collision(name)
        found[name] = value
    return found


def part_of(value: Any) -> Part[Any] | None:
    """How the part of an array that this process holds belongs to the whole; None where it holds all."""
    return registry.library(value).shards.part(value) if registry.isarray(value) else None


def gathered(value: Any) -> Any:
    """The whole of an array, put together where it is spread over processes."""
    part = part_of(value)
    return value if part is None else part.gathered(value)


def in_numpy(value: Any) -> HostArray:
    """An array or numbers, as an array of NumPy: on its own memory where it is of the host, then bfloat16 as
    its bits. What is spread over processes is put together.
    """
    if not registry.isarray(value):
        return np.array(value, float)
    library = registry.library(value)
    value = gathered(value)
    found = memory.on_host(value)
    return library.to_numpy(value) if found is None else found


def numbers_in_numpy(value: Any) -> HostArray:
    """The same to be converted: a type that NumPy and ml_dtypes have, and bfloat16 never as its bits."""
    if not registry.isarray(value):
        return np.asarray(value)
    library = registry.library(value)
    found = library.to_numpy(gathered(value))
    known = found.dtype.kind in "fciub" or found.dtype.name == "bfloat16"
    return found if known else found.astype(np.float32)


def form_of(name: str, value: object) -> Form:
    """Type and shape of an array, a number or a list of numbers; raises BadState for what no file holds."""
    if not registry.isarray(value):
        numbers_there: Any = value
        return Form("float64", np.shape(numbers_there))
    array: Any = value
    if not getattr(array, "is_fully_addressable", True):
        raise BadState(f"{name} is shared out over several processes of JAX; save it with Orbax")
    if hasattr(array, "full_tensor") and part_of(array) is None:
        raise BadState(
            f"{name} is spread over processes by {array.placements}; reduce partial sums before save"
        )
    kind = registry.type_name(array).removeprefix("byte-swapped ")
    if kind not in CODES and kind != PAIRS:
        raise BadState(f"{name} has elements of type {kind}; a file takes {', '.join(CODES)} and {PAIRS}")
    return Form(kind, tuple(array.shape))
