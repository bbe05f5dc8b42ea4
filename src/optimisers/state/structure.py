"""A store without its arrays, and a store that was not looked at yet."""

import dataclasses
import functools
import hashlib
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

from optimisers.arrays import registry
from optimisers.errors import BadState
from optimisers.settings import Value, skeleton
from optimisers.state.buffers import Bucketed, FlatBuffers, Separate
from optimisers.state.group import Group
from optimisers.state.store import Store
from optimisers.tree.layout import described


class Lasting:
    """What no edit changes of the structure of a store: that of a thousand leaves takes milliseconds."""

    def __init__(self, store: Store) -> None:
        shapes = tuple(None if k is None else (k.name, k.shape, str(k.dtype), k.device) for k in store.shapes)
        self.layout = store.layout
        self.key = (store.layout.key, shapes, store.engine, store.conjugate)
        self.hashed = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Lasting) and self.hashed == other.hashed and self.key == other.key
        )

    def __hash__(self) -> int:
        return self.hashed

    @functools.cached_property
    def text(self) -> str:
        """The key as text, in this process, in short."""
        text = f"{self.layout.text} {described(self.key[1:])}"
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class Structure:
    """A store without its arrays; equal for stores of the same rules over the same model, and hashable.

    There is one object for all equal ones, which lives as long as a store, or what was compiled for it, does:
    ask `structure_of`.
    """

    name: str
    """Under which compiled graphs know it; equal structures have equal names, now and later."""
    apart: "Structure"
    """The same one with a row of scalars for each leaf."""

    def __init__(self, store: Store, key: Any) -> None:
        self.store = dataclasses.replace(
            store,
            groups=[_hollow(g) for g in store.groups],
            handles={},
            known=None,
            structure=None,
        )
        self.key = key
        self.hashed = hash(self.key)
        self.names: Any = None
        """Names of the arrays, for those who ask for them."""
        self.later: list[Structure] = []
        """What structures compiled steps of it lead to; what was compiled does not keep them itself."""

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Structure) and self.hashed == other.hashed and self.key == other.key
        )

    def __hash__(self) -> int:
        return self.hashed

    def __repr__(self) -> str:
        rules = ", ".join(dict.fromkeys(written(skeleton(g.rule)) for g in self.store.groups))
        return f"<structure of a state of {len(self.store.shapes)} arrays{rules and ': '}{rules}>"

    def counts(self) -> list[tuple[int, int]]:
        """(buffers, leaves) of every group."""
        return [(sum(map(_buffers, g.slots)), len(g.leaves)) for g in self.store.groups]

    def fits(self, arrays: Sequence[Any]) -> bool:
        """Whether these are arrays of the shapes that the structure knows, whose values may be looked at."""
        shapes = [s for g in self.store.groups for s in _shapes_of(g)]
        found = list(arrays)
        return len(found) == len(shapes) and all(
            registry.isarray(a) and hasattr(a, "__array__") and tuple(a.shape) == s
            for a, s in zip(found, shapes, strict=True)
        )

    def filled(self, arrays: Sequence[Any]) -> Store:
        """The store that has these arrays."""
        given = iter(arrays)
        groups: list[Group] = []
        for g in self.store.groups:
            slots = tuple(
                dataclasses.replace(p, buffers=[next(given) for _ in range(n)])
                for p, n in zip(g.slots, map(_buffers, g.slots), strict=True)
            )
            table = g.table.filled(next(given), next(given))
            groups.append(dataclasses.replace(g, slots=slots, table=table))
        new = self.store.apart(groups)
        new.known = token_of(new), self
        new.changed()
        return new


def written(form: object) -> str:
    """The skeleton of a rule as text, with # in the place of each number: what two structures differ by, in
    messages of JAX.
    """
    match form:
        case (type() as kind, tuple() as settings) if issubclass(kind, Value):
            return f"{kind.__name__}({', '.join(map(written, settings))})"
        case ("static", inner):
            return written(inner)
        case (type(), value):
            return repr(value)
        case tuple():
            return f"({', '.join(map(written, form))})"
        case _:
            return str(form)


def structure_of(store: Store) -> Structure:
    """What is left of a store without its arrays; the same object as long as nothing of it changes."""
    token = token_of(store)
    if store.known is None or store.known[0] != token:
        store.known = token, shared(store)
    return store.known[1]


def token_of(store: Store) -> tuple[Any, ...]:
    """What the structure of a store depends on."""
    return (
        store.frozen.tobytes(),
        *((id(g.program), g.table.row.tobytes(), g.opaque) for g in store.groups),
    )


_shared: "weakref.WeakValueDictionary[int, Structure]" = weakref.WeakValueDictionary()
"""Structures in use, by the hash of their key: the key itself would keep classes of rules."""


def shared(store: Store) -> Structure:
    """The structure of a store, which is that of all stores like it."""
    if store.lasting is None:
        store.lasting = Lasting(store)
    groups = (
        (skeleton(g.rule), g.leaves.tobytes(), g.table.row.tobytes(), _slots_key(g), g.types)
        for g in store.groups
    )
    key = (store.lasting, store.frozen.tobytes(), tuple(groups))
    found = _shared.get(hash(key))
    if found is None or found.key != key:
        found = _shared[hash(key)] = Structure(store, key)
    return found


named: "weakref.WeakValueDictionary[str, Structure]" = weakref.WeakValueDictionary()
"""Structures in use, by the name under which compiled graphs know them."""


def name(structure: Structure) -> None:
    """Give a structure its name: what is baked into a graph must not keep a structure, nor number it anew."""
    lasting, *rest = structure.key
    text = f"{lasting.text} {described(tuple(rest))}"
    digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    while named.setdefault(digest, structure) is not structure:
        digest += "+"  # classes of one name: the other one lives
    structure.name = digest


class Pending:
    """A store that was not looked at yet: a structure and its arrays.

    What transforms and compilers hand from step to step is this; it takes whatever they put in place of
    arrays.
    """

    def __init__(self, structure: Any, arrays: Any) -> None:
        self.structure, self.arrays = structure, arrays

    def store(self) -> Store:
        """The store itself; raises BadState for one that has become many, or holds no arrays."""
        refuse_many(self.structure, self.arrays)
        store = self.structure.filled(self.arrays)
        if store.compiled is not None:
            store.settle()
        return store


def refuse_many(structure: Structure, arrays: Sequence[Any]) -> None:
    """Raise BadState for arrays of several states, which a map or a stack has put together."""
    counts = [n + 2 for n, _ in structure.counts()]
    if len(arrays) != sum(counts):
        raise BadState(
            "a transform has put something else in place of the arrays of this state: nothing is read there"
        )
    for end in itertools.accumulate(counts):
        for x, ndim in ((arrays[end - 2], 2), (arrays[end - 1], 1)):
            if (many := getattr(x, "ndim", ndim) - ndim) > 0:
                members = " x ".join(str(n) for n in x.shape[:many])
                raise BadState(
                    f"this is {members} states in one, from a map or a stack; write vmap(function)(state) to "
                    "read or change all of them, or jax.tree.map(lambda a: a[0], state) to take one"
                )


def _shapes_of(group: Group) -> list[tuple[int, ...]]:
    """The shapes of the buffers of a group, and of its table."""
    rows = int(group.table.row.max(initial=-1)) + 1
    return [*(s for p in group.slots for s in _buffer_shapes(p)), (rows, len(group.program.names)), (rows,)]


def _buffer_shapes(slot: FlatBuffers) -> list[tuple[int, ...]]:
    p = slot.places
    if isinstance(slot, Separate) and not isinstance(slot, Bucketed):
        return list(p.shapes)
    shapes: list[tuple[int, ...]] = [(n,) for n in p.lengths]
    if isinstance(slot, Bucketed):
        for i, b in enumerate(p.buffer.tolist()):
            if p.lengths[b] == p.sizes[i]:
                shapes[b] = p.shapes[i]
    return shapes


def _hollow(group: Group) -> Group:
    slots = tuple(dataclasses.replace(p, buffers=[]) for p in group.slots)
    return dataclasses.replace(group, slots=slots, table=group.table.filled(None, None))


def _buffers(slot: FlatBuffers) -> int:
    """How many buffers a slot has."""
    separate = isinstance(slot, Separate) and not isinstance(slot, Bucketed)
    return len(slot.places.shapes) if separate else len(slot.places.lengths)


def _slots_key(group: Group) -> Any:
    return tuple((str(p.dtype), type(p), p.places.number.tobytes()) for p in group.slots)
