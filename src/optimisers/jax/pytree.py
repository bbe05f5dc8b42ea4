"""How is a state a pytree of JAX? Its children are arrays, a few tables of numbers and the clock; all else is
static.

An eager step jits itself, once for each structure: rates and schedules are numbers in a table, so changing
them compiles nothing; freezing a leaf is another structure.
"""

import collections
import functools
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.jax import library as arrays
from optimisers.engines.task import refuse, watches
from optimisers.engines.xla.mesh import Lying, lying
from optimisers.errors import BadState, TreeMismatch, UnknownField
from optimisers.graph.cached import cached
from optimisers.jax.mesh import evaluated, lying_of, once
from optimisers.settings import parts
from optimisers.state.buffers import Bucketed
from optimisers.state.leaf import Branch, Leaf, opened
from optimisers.state.store import Store
from optimisers.state.structure import Pending, Structure, structure_of
from optimisers.step.plan import refuse_untied
from optimisers.tree.layout import Node, find
from optimisers.tree.path import KeyPath

# pyright: reportPrivateUsage=false


# -- states as pytrees ---------------------------------------------------------------------------------------


def _parts(state: "Leaf | Branch") -> tuple[Any, Any]:
    """(children, static rest) of a handle."""
    children, structure = _apart(state._held)
    return children, (structure, state._path if isinstance(state, Branch) else state.path)


def _apart(held: "Store | Pending") -> tuple[Any, Structure]:
    """(arrays, structure) of a store."""
    if isinstance(held, Pending):
        return held.arrays, held.structure
    return tuple(held.arrays()), structure_of(held)


def _flatten_with_keys(state: "Leaf | Branch") -> tuple[Any, Any]:
    children, rest = _parts(state)
    return list(zip(_names(rest[0]), children, strict=True)), rest


def _names(structure: Structure) -> list[Any]:
    """A key for every array of a state: the path of its leaf and its place in the state of the rule."""
    if structure.names is None:
        store, found = structure.store, list[Any]()
        for g, group in enumerate(store.groups):
            for spec, slot in zip(group.program.slots, group.slots, strict=True):
                at = ".".join(map(str, spec.path))
                found += [f"{name}:{at}" for name in _buffer_names(store, group, slot)]
            found += [f"numbers:{g}", f"clock:{g}"]
        structure.names = [jax.tree_util.DictKey(name) for name in found]
    return structure.names


def _buffer_names(store: Store, group: Any, slot: Any) -> list[str]:
    """The path of the first array in every buffer of a slot."""
    paths = [str(store.layout.paths[leaf]) for leaf in group.leaves]
    if not isinstance(slot, Bucketed):
        return paths
    first: dict[int, str] = {}
    for path, b in zip(paths, slot.places.buffer.tolist(), strict=True):
        first.setdefault(b, path)
    many = np.bincount(slot.places.buffer)
    return [f"{path}..." if n > 1 else path for path, n in zip(first.values(), many, strict=True)]


def _unflatten(kind: type, rest: Any, children: Any) -> Any:
    structure, path = rest
    refuse_foreign(structure, children)
    node = _located(structure, path)
    pending = Pending(structure, tuple(children))
    return Leaf(pending, node) if kind is Leaf else Branch(pending, node, path)


def refuse_foreign(structure: Structure, children: Any) -> None:
    """Raise BadState for a state of another library that a transform of JAX hands on."""
    names = {g.kind.name for g in structure.store.groups} - {arrays.name}
    if names and any(map(arrays.is_traced, children)):
        name = ", ".join(sorted(names))
        raise BadState(
            f"this state is that of arrays of {name}, and a transform of JAX hands on arrays of JAX; write "
            "model = jax.tree.map(jnp.asarray, model) before setup"
        )


def _located(structure: Structure, path: KeyPath) -> Node:
    """The node at a path of the layout that a structure knows."""
    node = structure.store.layout.root
    for key in path:
        node = find(node, key) or node
    return node


for _kind in (Leaf, Branch):
    jax.tree_util.register_pytree_with_keys(
        _kind, _flatten_with_keys, functools.partial(_unflatten, _kind), _parts
    )


def known(_: Store) -> None:
    """Teach Flax, if it is there, to save states."""
    if "flax" in sys.modules:
        _teach_flax()


@functools.cache
def _teach_flax() -> None:
    """Let `flax.serialization` write a state as a dict of its arrays, by name."""
    from flax import serialization

    def to_dict(state: Any) -> dict[str, Any]:
        children, (structure, _) = _parts(state)
        return dict(_by_name(structure, children))

    def from_dict(kind: type, target: Any, saved: dict[str, Any]) -> Any:
        children, rest = _parts(target)
        found = {name: saved.get(name) for name, _ in _by_name(rest[0], children)}
        lost = [n for n, v in found.items() if v is None and not n.startswith("setting:")]
        lost += [name for name in saved if name not in found and not name.startswith("setting:")]
        if lost:
            raise TreeMismatch(
                f"the saved state is that of another model or rule: {lost[0]!r} is on one side only"
            )
        return _unflatten(kind, rest, _from_names(rest[0], children, found))

    for kind in (Leaf, Branch):
        serialization.register_serialization_state(kind, to_dict, functools.partial(from_dict, kind))


def _by_name(structure: Structure, children: Any) -> Any:
    """(name, array) for everything in a state: arrays by path, settings and counters by their name."""
    store = structure.filled(children)
    for g, group in enumerate(store.groups):
        for spec, slot in zip(group.program.slots, group.slots, strict=True):
            at = ".".join(k for k in spec.path if isinstance(k, str)) or "state"
            for i, leaf in enumerate(group.leaves):
                yield f"{store.layout.paths[leaf]}:{at}", slot[i]
        for j, name in enumerate(group.program.names):
            kind = "setting" if j < group.program.hypers else "number"
            yield f"{kind}:{g}:{name}", group.table.values[:, j]
        yield f"clock:{g}", group.table.clock


def _from_names(structure: Structure, children: Any, found: dict[str, Any]) -> list[Any]:
    """The children of a state from saved arrays by name; settings that were not saved stay as they are."""
    store = structure.filled(children)
    saved = iter([(found[name], own) for name, own in _by_name(structure, children)])
    for group in store.groups:
        for slot in group.slots:
            for i in range(len(group.leaves)):
                slot.put(i, jnp.asarray(next(saved)[0]))
        columns = [next(saved) for _ in group.program.names]
        values = [jnp.asarray(own if new is None else new) for new, own in columns]
        whole = jnp.stack(values, 1) if values else group.table.values
        group.table = group.table.filled(whole, arrays.scalars.counted(next(saved)[0]))
    return store.arrays()


# -- steps ---------------------------------------------------------------------------------------------------


def _concrete(store: Store, xs: Sequence[Any], orders: list[Any]) -> bool:
    """Whether no transform looks at what a step is made of: then it is jitted."""
    every = (*xs, *(g for gs in orders for g in gs), *store.arrays())
    return not any(arrays.is_traced(a) for a in every)


class _After:
    """The structure that a step leads to, and what its checks say. JAX keeps it beside what it compiles, as
    long as the function lives that was compiled: a structure, which holds that function, would never be
    freed.
    """

    def __init__(self, structure: Structure, about: tuple[Any, ...]) -> None:
        self.structure, self.about = weakref.ref(structure), about


class _Out:
    """What a jitted step gives: the arrays of a state, new parameters, and whether checks hold."""

    def __init__(self, held: Any, new: dict[int, Any], checks: Any, after: _After) -> None:
        self.held, self.new, self.checks, self.after = held, new, checks, after


jax.tree_util.register_pytree_node(
    _Out, lambda out: ((out.held, out.new, out.checks), out.after), lambda after, parts: _Out(*parts, after)
)


def _step(
    structure: Structure,
    path: KeyPath,
    changes: bool,
    where: Lying | None,
    held: Any,
    xs: Any,
    orders: Any,
    loss: Any,
) -> _Out:
    node, notes = _located(structure, path), list[Any]()
    tokens = watches.set(notes), lying.set(where)
    try:
        store, new = evaluated(structure.filled(held), node, xs, orders, loss, changes=changes)
    finally:
        watches.reset(tokens[0])
        lying.reset(tokens[1])
    held, after = _apart(store)
    if after is not structure:
        structure.later.append(after)
    about = tuple((message, tuple(paths)) for _, message, paths in notes)
    return _Out(held, new, [found for found, _, _ in notes], _After(after, about))


@cached
def jitted(structure: Structure, path: KeyPath, changes: bool, where: Lying | None) -> Any:
    """The compiled step of a part of the states of one structure, whose parameters lie there."""
    _remember(structure)
    return jax.jit(functools.partial(_step, structure, path, changes, where))


RECENT = 16
"""Structures, of rules without a class of their user, whose compiled steps outlive the states: a sweep makes
states anew.
"""

_recent: "collections.deque[Structure]" = collections.deque(maxlen=RECENT)


def _remember(structure: Structure) -> None:
    """Keep a structure for a while: for long if it is among the last ones, but no longer than the classes of
    which its rules are.
    """
    found = {type(part) for g in structure.store.groups for part in parts(g.rule)}
    own = next((cls for cls in found if cls.__module__.partition(".")[0] != "optimisers"), None)
    if own is None:
        _recent.append(structure)
        return
    if "__recent__" not in vars(own):
        type.__setattr__(own, "__recent__", collections.deque(maxlen=RECENT))
    vars(own)["__recent__"].append(structure)


def stepped(
    store: Store, node: Node, path: KeyPath, xs: Any, orders: list[Any], loss: Any, *, changes: bool = False
) -> tuple[Store, dict[int, Any]] | None:
    """(the store after a step, the new parameters by leaf), computed by one jitted function; None where the
    engines say what is wrong, or each array is stepped where it lies. With `changes`, what is to be added to
    the parameters in place of new ones.

    Raises DomainError, naming the leaf, where a check of a rule fails: nothing was handed out then.
    """
    foreign = any(g is not None and registry.library_of(type(g)) is not arrays for o in orders for g in o)
    if foreign:
        return None
    if not _concrete(store, xs, [*orders, [loss]]):
        return evaluated(store, node, xs, orders, loss, changes=changes)
    refuse_untied(store, node, xs)
    structure = structure_of(store)
    run = jitted(structure, path, changes, lying_of(node, xs))
    try:
        out = run(store.arrays(), list(xs), [once(node, o) for o in orders], loss)
    except ValueError as error:
        if "incompatible devices" not in str(error):
            raise
        return None
    for (holds, *values), (message, paths) in zip(out.checks, out.after.about, strict=True):
        refuse(np.asarray(holds), [np.asarray(v) for v in values], message, paths)
    return out.after.structure().filled(out.held), out.new


HOOKS = registry.Hooks(known=known, stepped=stepped)


# -- populations ---------------------------------------------------------------------------------------------


def vmap_axes(state: Any, *names: str) -> Any:
    """The axes over which `jax.vmap` maps a state whose named hyper-parameters differ: a tree like the state,
    0 at the tables of numbers that hold them, None elsewhere.

    `states = vmap(lambda e: adjust(state, e), out_axes=axes)(rates)`, `vmap(step, in_axes=(axes, None))`.
    Counters that have come to differ stand in the same tables; states that have trained apart map whole, with
    axis 0. Where a setting follows a schedule, give another of its kind, `adjust(state, Cosine(e, 100))`;
    with a number there the state has another structure. Raises UnknownField for a name that no rule has.
    """
    structure = _apart(opened(state)[0])[1]
    known, axes = set[str](), list[Any]()
    for group in structure.store.groups:
        has = {name.split("[")[0] for name in group.program.names[: group.program.hypers]}
        known |= has
        axes += [None] * sum(len(_buffer_names(structure.store, group, p)) for p in group.slots)
        axes += [0 if has & set(names) else None, None]
    for name in names:
        if name not in known:
            raise UnknownField(f"no rule here has {name!r}; there are {', '.join(sorted(known))}")
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(state), axes)
