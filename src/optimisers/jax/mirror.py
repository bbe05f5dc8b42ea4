"""The state of a rule inside Optax: to Optax it has the form that its own states have, to us it is a state as
any other.

As a pytree it holds, for every array that the rule keeps beside a parameter, a tree like the parameters; and
for each rule a dict with its count, its settings, and the other numbers of its state. So what Optax has for
states works: `tree_map_params`, `tree.get` and `tree.set`, partition specs of boxed parameters, variables of
NNX. Whoever looks at it, or adjusts or freezes it, opens it.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimisers.arrays.jax import library as arrays
from optimisers.graph.cached import cached
from optimisers.graph.trace import Program
from optimisers.settings import skeleton, walk
from optimisers.state.leaf import Branch
from optimisers.state.store import Store
from optimisers.state.structure import Pending, Structure, structure_of
from optimisers.tree.layout import described
from optimisers.tree.modules_jax import is_variable
from optimisers.tree.path import KeyPath

# pyright: reportPrivateUsage=false

RENAMED = {"eta": "learning_rate"}
"""Settings that Optax knows by another name."""


class Absent(optax.MaskedNode):
    """Stands where a rule keeps no array beside a parameter."""


# -- what stands where ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """The leaves whose rules have one structure."""

    groups: tuple[int, ...]
    rows: tuple[int, ...]
    """Rows of scalars of each group."""
    settings: tuple[str, ...]
    numbers: tuple[str, ...]


def names_of(program: Program, rule: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the settings and of the other numbers of a rule, each once."""
    full = [".".join(map(str, path)) for path, _ in walk(rule)]
    short, rest = list(program.names[: program.hypers]), list(program.names[program.hypers :])
    settings = tuple(
        RENAMED.get(s, s) if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)
    )
    return settings, tuple(n if rest.count(n) == 1 else f"{n}.{i}" for i, n in enumerate(rest))


def slot_name(path: tuple[Any, ...]) -> str:
    """The name of an array of the state of a rule."""
    return ".".join(map(str, path)) or "state"


def order_of(rule: Any) -> str:
    """By what kinds are sorted: the same whatever the parameters are."""
    return described(skeleton(rule))


@cached
def kinds_of(structure: Structure) -> tuple[Kind, ...]:
    """The kinds of leaves in states of a structure."""
    groups = structure.store.groups
    found: dict[str, list[int]] = {}
    for g, group in enumerate(groups):
        found.setdefault(order_of(group.rule), []).append(g)
    return tuple(
        Kind(
            tuple(at),
            tuple(groups[g].table.rows for g in at),
            *names_of(groups[at[0]].program, groups[at[0]].rule),
        )
        for _, at in sorted(found.items())
    )


# -- the state -----------------------------------------------------------------------------------------------


def flat_dict(tree: object) -> tuple[dict[str, Any], Any]:
    """(the arrays of a pytree by their path, its form); those of NumPy are taken for arrays of JAX."""
    found, form = jax.tree_util.tree_flatten_with_path(tree)
    return {path_of(keys): jnp.asarray(x) if isinstance(x, np.ndarray) else x for keys, x in found}, form


def path_of(keys: Any) -> str:
    """A path as our globs read it; the wrapper of a variable of Flax does not count."""
    text = jax.tree_util.keystr(keys, simple=True, separator=".")
    return text.removesuffix(".value") or "params"


class Mirrored(Branch):
    """A state that stands in Optax's form in pytrees."""

    __slots__ = ("_about",)

    @property
    def _store(self) -> Store:
        held = object.__getattribute__(self, "_held")
        if isinstance(held, Reflection):
            if held.static.free:
                return held.store()
            object.__setattr__(self, "_about", held.about())
            object.__setattr__(self, "_held", held.store())
        return object.__getattribute__(self, "_held")

    def flattened(self, params: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
        """(the parameters as their paths name them here, what makes the pytree of such a dict)."""
        found, form = flat_dict(params)
        return found, lambda new: jax.tree.unflatten(form, list(new.values()))

    def __reduce__(self) -> Any:
        return mirrored, (self._store, self._node, self._path, about_of(self))

    def __copy__(self) -> Any:
        held = object.__getattribute__(self, "_held")
        if isinstance(held, Reflection):
            return reflected(held)
        return mirrored(self._store.fork(), self._node, self._path, about_of(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.__copy__()


@dataclasses.dataclass(frozen=True)
class About:
    """What a state in Optax's form holds beside a store."""

    form: Any
    """The tree of its children."""
    given: tuple[Any, ...]
    """For each kind the settings that the transformation had at the last step: [rules, settings]."""
    place: tuple[int, ...]
    """The leaf of each array of the parameters; -1 for those that are not trained."""
    varies: bool = False
    """Whether the children are variables of NNX, which others hold too."""


def mirrored(store: Store, node: Any, path: KeyPath, about: About) -> Mirrored:
    """A store in Optax's form."""
    new = Mirrored(store, node, path)
    object.__setattr__(new, "_about", about)
    return new


def about_of(state: Mirrored) -> About:
    """What a state that was opened holds beside its store."""
    return object.__getattribute__(state, "_about")


class Static:
    """The static part of such a state. That of one without parameters is `free`: it equals all, as Optax's
    placeholder for parameters asks.
    """

    def __init__(self, structure: Structure, place: tuple[int, ...], *, free: bool = False) -> None:
        self.structure, self.place, self.free = structure, place, free

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return False
        alike = self.structure == other.structure and self.place == other.place
        return self.free or other.free or alike

    def __hash__(self) -> int:
        return hash((self.structure, self.place))


class Reflection(Pending):
    """A state in Optax's form that was not looked at."""

    def __init__(self, static: Static, children: dict[str, Any]) -> None:
        self.static, self.structure, self.children = static, static.structure, children

    @property
    def arrays(self) -> list[Any]:
        """What it holds, in the order of a store; nothing where something else stands in place of arrays."""
        found = self.read()
        return [] if found is None else found[0]

    def read(self) -> "tuple[list[Any], tuple[Any, ...]] | None":
        """(the arrays in the order of a store, what `About` calls `given`)."""
        if self.static.free:
            return [], ()
        held: Any = jax.tree.map(_value, self.children, is_leaf=_apart)
        kinds, n = kinds_of(self.structure), len(self.static.place)
        trees, rules = held["arrays"], held["rules"]
        whole = isinstance(trees, dict) and isinstance(rules, tuple) and len(rules) == len(kinds)
        whole = whole and all(map(_is_numeric, jax.tree.leaves(held)))
        if not whole or any(len(jax.tree.leaves(t, is_leaf=is_absent)) != n for t in trees.values()):
            return None
        return _joined(self.structure, self.static.place, held)

    def about(self) -> About:
        """What it holds beside a store."""
        flat = jax.tree.leaves(self.children, is_leaf=_apart)
        found = self.read()
        return About(
            jax.tree.structure(self.children, is_leaf=is_absent),
            () if found is None else found[1],
            self.static.place,
            any(map(is_variable, flat)),
        )


def _is_numeric(x: object) -> bool:
    return hasattr(x, "shape") or isinstance(x, float | int)


def is_absent(x: object) -> bool:
    return isinstance(x, Absent)


def _apart(x: object) -> bool:
    return is_absent(x) or is_variable(x)


def _value(x: Any) -> Any:
    return x.get_value() if is_variable(x) else x


# -- there and back ------------------------------------------------------------------------------------------


def children_of(store: Store, given: Sequence[Any], place: Sequence[int], values: Any = list) -> Any:
    """A store in Optax's form: {"arrays": {name: what `values` makes of the arrays beside the parameters},
    "rules": (settings and numbers of each kind)}.
    """
    kinds = kinds_of(structure_of(store))
    held: dict[str, dict[int, Any]] = {}
    for group in store.groups:
        for spec, slot in zip(group.program.slots, group.slots, strict=True):
            found = held.setdefault(slot_name(spec.path), {})
            found.update((int(leaf), slot[i]) for i, leaf in enumerate(group.leaves))
    trees = {name: values([found.get(leaf, Absent()) for leaf in place]) for name, found in held.items()}
    rules = tuple(_scalars(store, kind, told) for kind, told in zip(kinds, given, strict=True))
    return {"arrays": trees, "rules": rules}


def _scalars(store: Store, kind: Kind, told: Any) -> dict[str, Any]:
    """The scalars of a kind by name: single numbers where it has one row, else vectors."""
    tables = [store.groups[g].table.to_traced(arrays).arrays() for g in kind.groups]
    values, clock = tables[0] if len(tables) == 1 else (jnp.concatenate(t) for t in zip(*tables, strict=True))
    if sum(kind.rows) == 1:
        values, clock = values[0], clock[0]
    return labelled(kind.settings, kind.numbers, values, clock, told)


def labelled(
    settings: Sequence[str], numbers: Sequence[str], values: Any, clock: Any, told: Any
) -> dict[str, Any]:
    """The scalars of a kind, of which the last axis of `values` has settings, then other numbers."""
    columns = [values[..., j] for j in range(len(settings) + len(numbers))]
    return {
        "count": clock,
        "settings": dict(zip(settings, columns, strict=False)),
        "numbers": dict(zip(numbers, columns[len(settings) :], strict=True)),
        "given": told,
    }


def _joined(structure: Structure, place: Sequence[int], children: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """The arrays of children in the order of a store, and what `About` calls `given`."""
    trees = {
        name: dict(zip(place, jax.tree.leaves(tree, is_leaf=is_absent), strict=True))
        for name, tree in children["arrays"].items()
    }
    tables: dict[int, tuple[Any, Any]] = {}
    for kind, scalars in zip(kinds_of(structure), children["rules"], strict=True):
        values, clock = _table(kind, scalars)
        ends = np.cumsum(kind.rows).tolist()
        for g, rows, end in zip(kind.groups, kind.rows, ends, strict=True):
            tables[g] = values[end - rows : end], clock[end - rows : end]
    found: list[Any] = []
    for g, group in enumerate(structure.store.groups):
        for slot in group.program.slots:
            found += [trees[slot_name(slot.path)][int(leaf)] for leaf in group.leaves]
        found += tables[g]
    return found, tuple(scalars["given"] for scalars in children["rules"])


def _table(kind: Kind, scalars: dict[str, Any]) -> tuple[Any, Any]:
    """(the table, the clocks) of a kind; a single number where a vector stands is meant for all."""
    rows = sum(kind.rows)
    columns = [scalars["settings"][n] for n in kind.settings] + [scalars["numbers"][n] for n in kind.numbers]
    whole = [*columns, scalars["count"]]
    if any(np.ndim(c) > 1 or (np.ndim(c) == 1 and np.shape(c)[0] != rows) for c in whole):
        return scalars["count"], scalars["count"]  # of a population: it does not fit, and is not looked at
    *columns, clock = [jnp.broadcast_to(jnp.asarray(c), (rows,)) for c in whole]
    return (jnp.stack(columns, 1) if columns else arrays.scalars.table(np.zeros((rows, 0)))), clock.astype(
        jnp.int32
    )


# -- as a pytree ---------------------------------------------------------------------------------------------


def _flatten(state: Mirrored) -> tuple[tuple[Any, Any], Static]:
    held = reflection_of(state)
    return (held.children["arrays"], held.children["rules"]), held.static


def reflection_of(state: Mirrored) -> Reflection:
    """A state as Optax sees it."""
    held = object.__getattribute__(state, "_held")
    if isinstance(held, Reflection):
        return held
    about = about_of(state)
    leaves = jax.tree.leaves(children_of(held, about.given, about.place), is_leaf=is_absent)
    static = Static(structure_of(held), about.place)
    made = Reflection(static, jax.tree.unflatten(about.form, leaves))
    if about.varies:
        object.__setattr__(state, "_held", made)  # what others hold now is what they will write
    return made


def _flatten_with_keys(state: Mirrored) -> tuple[Any, Static]:
    children, static = _flatten(state)
    keys = (jax.tree_util.GetAttrKey("arrays"), jax.tree_util.GetAttrKey("rules"))
    return tuple(zip(keys, children, strict=True)), static


def _unflatten(static: Static, children: Any) -> Mirrored:
    trees, rules = children
    return reflected(Reflection(static, {"arrays": trees, "rules": rules}))


def reflected(held: Reflection) -> Mirrored:
    """A state that was not looked at."""
    return Mirrored(held, held.structure.store.layout.root, KeyPath())


jax.tree_util.register_pytree_with_keys(Mirrored, _flatten_with_keys, _unflatten, _flatten)


def known() -> None:
    """Teach Flax, if it is there, to save states."""
    if "flax" in sys.modules:
        _teach_flax()


@functools.cache
def _teach_flax() -> None:
    from flax import serialization

    def to_dict(state: Mirrored) -> Any:
        return serialization.to_state_dict(reflection_of(state).children)

    def from_dict(target: Mirrored, saved: dict[str, Any]) -> Mirrored:
        held = reflection_of(target)
        return reflected(Reflection(held.static, serialization.from_state_dict(held.children, saved)))

    serialization.register_serialization_state(Mirrored, to_dict, from_dict)
