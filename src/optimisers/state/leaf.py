"""What does a user hold of the state? Handles: a Leaf beside each array, a Branch beside each container.

Any handle is an address: `freeze_(state.layers[3])`. They are made when somebody looks; the store behind them
is one.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.compose.average import AverageState
from optimisers.errors import BadState, NoMatch, UnknownField
from optimisers.graph.trace import entries, flatten, form, unflatten
from optimisers.rule import Rule, changes_of
from optimisers.settings import adjustable, adjusted, refuse_unknown, schedules, skeleton, walk
from optimisers.settings import parts as parts_of_value
from optimisers.state.store import Pending, Store
from optimisers.tree.path import Attr, KeyPath, matches
from optimisers.tree.walk import Node, find, gather, rebuild

Where = Any
"""A selector: a glob over paths, a predicate (path, leaf), a rule type, or a list of these."""


class Leaf:
    """The rule and state of one array of parameters (or of several tied ones).

    `rule`, `state` and `frozen` may be read and assigned. Arrays in `state` are views: they show what the
    next step starts from. Two leaves are equal if rule, state and frozen are.
    """

    __slots__ = ("_held", "_leaf", "_node")

    def __init__(self, store: "Store | Pending", node: Node) -> None:
        self._held, self._node, self._leaf = store, node, node.leaf

    @property
    def _store(self) -> Store:
        if isinstance(self._held, Pending):
            self._held = self._held.store()
        return self._held

    @property
    def path(self) -> KeyPath:
        """Where the parameters stand in the model; the first place of tied ones."""
        return self._store.layout.paths[self._leaf]

    @property
    def rule(self) -> Rule:
        group, i = self._store.where(self._leaf)
        return group.rule_of(i)

    @rule.setter
    def rule(self, rule: Rule) -> None:
        if not isinstance(rule, Rule):
            hint = f"; write {rule.__name__}()" if isinstance(rule, type) else ""
            raise BadState(f"{self._name()}.rule is {rule!r}; it takes a rule, such as Adam(){hint}")
        if skeleton(rule) == skeleton(self.rule):
            self._store.change([self._leaf], lambda _: rule)
            return
        kind = self._store.shapes[self._leaf]
        assert kind is not None
        wanted = rule.init(kind.stand_in())
        if form(wanted) != form(self.state):
            raise BadState(
                f"{self._name()} has a state of the form {_kinds(self.state)}; {rule!r} takes "
                f"{_kinds(wanted)}; call `setup` for a new state"
            )
        self._store.move([(self._leaf, rule, _copied(self.state, self.state, self._name()))])

    @property
    def state(self) -> Any:
        group, i = self._store.where(self._leaf)
        return group.state_of(i)

    @state.setter
    def state(self, state: Any) -> None:
        old, name = self.state, f"{self._name()}.state"
        if form(state) != form(old):
            raise BadState(f"{name} is given {_kinds(state)}; it takes {_kinds(old)}")
        self._store.assign(self._leaf, _copied(state, old, name))

    @property
    def frozen(self) -> bool:
        """Whether updates pass this leaf by: no step, no decay, no change of state."""
        return bool(self._store.frozen[self._leaf])

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        if not isinstance(frozen, bool | np.bool_):
            raise BadState(f"{self._name()}.frozen is {frozen!r}; it takes True or False")
        self._store.frozen[self._leaf] = frozen
        self._store.changed()

    def _name(self) -> str:
        return self.path.code("state")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Leaf)
            and self.rule == other.rule
            and self.frozen == other.frozen
            and same(self.state, other.state)
        )

    __hash__ = None  # type: ignore[assignment] equal leaves may change

    def __repr__(self) -> str:
        if unseen(self):
            return "Leaf(...)"
        return f"Leaf({self.rule!r}, {_short(self.state)}{', frozen=True' if self.frozen else ''})"

    def __reduce__(self) -> Any:
        return handle, (self._store, self._node, self.path)

    def __copy__(self) -> Any:
        return handle(self._store.fork(), self._node, self.path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return handle(copy.deepcopy(self._store, memo), self._node, self.path)


class Branch:
    """The part of the state beside one container: children by attribute or item, in the order of the model.

    `state.layers[3].w`, `state["layers"]`, `state["layers.3.w"]` and `state[path]` all work. Where the model
    has nothing to train there is `()`.
    """

    __slots__ = ("_held", "_node", "_path")

    def __init__(self, store: "Store | Pending", node: Node, path: KeyPath) -> None:
        for name, value in (("_held", store), ("_node", node), ("_path", path)):
            object.__setattr__(self, name, value)

    @property
    def _store(self) -> Store:
        if isinstance(self._held, Pending):
            object.__setattr__(self, "_held", self._held.store())
        return self._held

    def __setattr__(self, name: str, value: Any) -> None:
        raise BadState(
            f"a state has no parts to replace; assign {self._path.code('state')}.{name}.rule or .state of a "
            "leaf"
        )

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, KeyPath):
            return functools.reduce(_below, key, self)
        for name in (key, len(self) + key if isinstance(key, int) and key < 0 else key):
            child = find(self._node, name)
            if child is not None:
                return handle(self._store, child, KeyPath(self._path, _own(self._node, name)))
        if isinstance(key, str) and ("." in key or key.isdigit()):
            first, _, rest = key.partition(".")
            here = self[int(first)] if find(self._node, first) is None and first.isdigit() else self[first]
            return _below(here, rest) if rest else here
        has = ", ".join(repr(_plain(k)) for k in self._node.keys)
        raise KeyError(f"{self._path.code('state')} has no {key!r}; it has {has}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in Branch.__slots__:
            raise AttributeError(name)
        child = find(self._node, name)
        if child is None:
            has = ", ".join(str(k) for k in self._node.keys)
            raise AttributeError(f"{self._path.code('state')} has no {name}; it has {has}")
        return handle(self._store, child, KeyPath(self._path, _own(self._node, name)))

    def __iter__(self) -> Iterator[Any]:
        """The children in order, as over a list; over a dict, its keys."""
        if self._node.kind is not None and issubclass(self._node.kind, dict):
            return iter(self._node.keys)
        return (self[k] for k in self._node.keys)

    def __len__(self) -> int:
        return len(self._node.keys)

    def __contains__(self, key: object) -> bool:
        return find(self._node, key) is not None

    def __dir__(self) -> list[str]:
        return [k for k in self._node.keys if isinstance(k, str) and k.isidentifier()]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Branch)
            and self._node.keys == other._node.keys
            and all(self[k] == other[k] for k in self._node.keys)
        )

    __hash__ = None  # type: ignore[assignment] equal leaves may change

    def __repr__(self) -> str:
        return f"<state with {self._held.arrays!r}>" if unseen(self) else shown(self)

    def __reduce__(self) -> Any:
        return handle, (self._store, self._node, self._path)

    def __copy__(self) -> Any:
        return handle(self._store.fork(), self._node, self._path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return handle(copy.deepcopy(self._store, memo), self._node, self._path)


def opened_late(state: Leaf | Branch) -> Any:
    """What a handle holds, not put together."""
    return object.__getattribute__(state, "_held")


def unseen(state: Leaf | Branch) -> bool:
    """Whether a transform has put something else in place of the arrays: axes, shapes, populations."""
    held = opened_late(state)
    return isinstance(held, Pending) and not (
        isinstance(held.structure, int) or held.structure.fits(held.arrays)
    )


def _below(here: Any, key: Any) -> Any:
    """What a handle has under a key; raises KeyError for a leaf, which has nothing."""
    if isinstance(here, Branch):
        return here[key]
    if isinstance(here, Leaf):
        raise KeyError(f"{here.path.code('state')} has no {key!r}; it is a Leaf, with rule, state and frozen")
    raise KeyError(f"there is no {key!r} in (), where nothing is trained")


def _plain(key: Any) -> Any:
    return str(key) if isinstance(key, Attr) else key


def _own(node: Node, key: Any) -> Any:
    """The key as the model has it, so that paths print as code."""
    return next(k for k in node.keys if k == key)


def handle(store: Store, node: Node, path: KeyPath) -> Any:
    """The handle on one place: a Leaf, a Branch, or () where nothing trains; the same object each time for a
    leaf.
    """
    if node.ways is not None and node.ways.bare and node.live:
        node = node.live[0][1]
    if node.leaf >= 0:
        if store.shapes[node.leaf] is None:
            return ()
        if node.leaf not in store.handles:
            store.handles[node.leaf] = Leaf(store, node)
        return store.handles[node.leaf]
    return Branch(store, node, path) if node.leaves else ()


def opened(of: "Leaf | Branch") -> tuple[Store, Node, KeyPath]:
    """What stands behind a handle."""
    return of.__reduce__()[1]


def parts(state: Any) -> tuple[Store, Node, KeyPath]:
    """(store, node, path) of a handle; raises BadState for anything else."""
    if isinstance(state, Leaf | Branch):
        return opened(state)
    if isinstance(state, Rule) or (isinstance(state, type) and issubclass(state, Rule)):
        rule = f"{state.__name__}()" if isinstance(state, type) else repr(state)
        raise BadState(f"a state was wanted and the rule {state!r} came; write state = setup({rule}, model)")
    if isinstance(state, tuple) and not state:
        raise BadState(
            "a state was wanted and () came: nothing is trained there; a state is what `setup(rule, model)` "
            "returns, or a part of it"
        )
    if isinstance(getattr(state, "tree", None), Leaf | Branch):
        raise BadState(f"a state was wanted and a {type(state).__name__} came; its state is its `tree`")
    raise BadState(
        f"a state was wanted and a {type(state).__name__} came; a state is what `setup(rule, model)` "
        "returns, or a part of it"
    )


# -- selecting -----------------------------------------------------------------------------------------------


def leaves_of(state: Any, where: Where = None) -> list[int]:
    """The leaves below a handle that a selector picks; raises NoMatch if there are none."""
    store, node, path = parts(state)
    found = [i for i in dict.fromkeys(node.leaves) if store.shapes[i] is not None]
    if where is None:
        return found
    choices = where if isinstance(where, list | tuple) else [where]
    if not choices:
        raise NoMatch("where=[] picks nothing; leave it out to pick everything")
    picked: set[int] = set()
    for choice in choices:
        some = [i for i in found if picks(choice, store, i, len(path))]
        if not some:
            raise NoMatch(
                f"where={choice!r} matches no parameter; there are "
                f"{listed(store.layout.paths[i] for i in found)}"
            )
        picked.update(some)
    return [i for i in found if i in picked]


def picks(choice: Any, store: Store, leaf: int, depth: int) -> bool:
    """Whether one selector picks a leaf. Globs are tried on every place of a tie, from the handle's own
    root.
    """
    if isinstance(choice, str | KeyPath):
        return any(
            matches(str(choice), p[depth:]) or matches(str(choice), p) for p in store.layout.places[leaf]
        )
    if isinstance(choice, type) and issubclass(choice, Rule):
        group, _ = store.where(leaf)
        return any(isinstance(part, choice) for part in parts_of_value(group.rule))
    if callable(choice) and not isinstance(choice, type):
        return bool(
            choice(
                store.layout.paths[leaf],
                handle(store, Node(leaf=leaf, leaves=(leaf,)), store.layout.paths[leaf]),
            )
        )
    raise NoMatch(
        f"where={choice!r} is no selector; it takes a glob such as '**.bias', a function of (path, leaf), or "
        "a rule type"
    )


def listed(paths: Any, most: int = 6) -> str:
    names = [str(p) or "the array itself" for p in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- freeze, thaw, adjust ------------------------------------------------------------------------------------


def freeze_(state: Any, where: Where = None) -> None:
    """Let updates pass by everything below `state` that `where` picks: no step, no decay, momenta kept.

    Raises BadState for anything but a state, NoMatch for a selector that picks nothing.
    """
    _freeze(state, where, True)


def thaw_(state: Any, where: Where = None) -> None:
    """Undo `freeze_`: training goes on with the state as it was."""
    _freeze(state, where, False)


def freeze(state: Any, where: Where = None) -> Any:
    """The state with everything that `where` picks frozen; the old one stays as it was (see `freeze_`)."""
    return _forked(state, lambda new: _freeze(new, where, True))


def thaw(state: Any, where: Where = None) -> Any:
    """The state with everything that `where` picks thawed; the old one stays as it was (see `freeze_`)."""
    return _forked(state, lambda new: _freeze(new, where, False))


def _freeze(state: Any, where: Where, frozen: bool) -> None:
    store, leaves = parts(state)[0], leaves_of(state, where)
    store.frozen[leaves] = frozen
    for group in store.groups:
        if not isinstance(group.numbers, np.ndarray):
            # Their histories part at the next step. A structure that a compiler knows parts now, and once.
            group.part(np.flatnonzero(np.isin(group.leaves, leaves)))
    store.changed()


def adjust_(state: Any, eta: Any = None, *, where: Where = None, **changes: Any) -> None:
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
    store.change(leaves, lambda rule: adjusted(rule, changes))


def adjust(state: Any, eta: Any = None, *, where: Where = None, **changes: Any) -> Any:
    """The state, or the rule, with hyper-parameters changed; the old one stays as it was (see `adjust_`)."""
    if isinstance(state, Rule):
        if where is not None:
            raise BadState("a rule has no parts for `where` to pick from; adjust the state")
        return state.adjust(eta, **changes)
    return _forked(state, lambda new: adjust_(new, eta, where=where, **changes))


def _forked(state: Any, change: Callable[[Any], None]) -> Any:
    store, node, path = parts(state)
    new = handle(store.fork(), node, path)
    change(new)
    return new


def _rules(store: Store, leaves: list[int]) -> list[Rule]:
    """The different rules of some leaves."""
    seen: dict[tuple[int, int], Rule] = {}
    for leaf in leaves:
        group, i = store.where(leaf)
        key = (id(group), int(group.row[i]))
        if key not in seen:
            seen[key] = group.rule_of(i)
    return list(seen.values())


def current(state: Any) -> Any:
    """The hyper-parameters that the next update will use: rules whose schedules are replaced by their present
    values.

    For a Leaf its rule, for a Branch a dict {path: rule}: `current(state.w).eta`, `current(state)["w"].eta`.
    """
    store = parts(state)[0]
    if isinstance(state, Leaf):
        return schedules(state.rule, lambda _, schedule: float(schedule(store.clock)))
    return {
        str(store.layout.paths[i]): current(handle(store, Node(leaf=i, leaves=(i,)), store.layout.paths[i]))
        for i in leaves_of(state)
    }


def hyperparameters(state: Any) -> dict[str, Any]:
    """The hyper-parameters of all rules below `state`, by name: numbers, or vectors, one for each history.

    A name that several rules of a chain have is given with its place, `rules.1.eta`. What is done to these
    numbers may be differentiated: `with_hyperparameters(state, h)` puts them back. Settings that are
    schedules are functions, and not among them.
    """
    found: dict[str, list[Any]] = {}
    for group, rows in _histories(state):
        for j, name in enumerate(_hyper_names(group)):
            found.setdefault(name, []).append(group.numbers[rows, j])
    joined = {name: _joined(columns) for name, columns in found.items()}
    return {name: v[0] if len(v) == 1 else v for name, v in joined.items()}


def with_hyperparameters(state: Any, values: dict[str, Any]) -> Any:
    """The state with other hyper-parameters, given as `hyperparameters` gives them; the old one stays as it
    was.

    The values may be traced by a transform; then a step follows them. Raises UnknownField for other names.
    """
    known = hyperparameters(state)
    for name in values:
        if name not in known:
            raise UnknownField(f"there is no hyper-parameter {name!r}; there are {', '.join(known)}")
    store, node, path = parts(state)
    new = handle(store.fork(), node, path)
    taken = dict.fromkeys(values, 0)
    for group, rows in _histories(new):
        for j, name in enumerate(_hyper_names(group)):
            if name in values:
                value = values[name]
                if np.ndim(value):
                    value = value[taken[name] : taken[name] + len(rows)]
                    taken[name] += len(rows)
                if isinstance(group.numbers, np.ndarray) and not registry.library(value).is_fixed(value):
                    group.numbers = registry.library(value).table(group.numbers)
                library = registry.library(group.numbers)
                group.numbers = library.placed(group.numbers, (rows, j), value)
    parts(new)[0].changed()
    return new


def _histories(state: Any) -> Iterator[tuple[Any, Any]]:
    """(group, its rows of numbers) for the leaves below a handle."""
    store = parts(state)[0]
    below = np.array(leaves_of(state), np.int64)
    for group in store.groups:
        members = np.flatnonzero(np.isin(group.leaves, below))
        if len(members):
            yield group, np.unique(group.row[members])


def _hyper_names(group: Any) -> list[str]:
    """The names of the hyper-parameters of a group: short ones where they are unique."""
    short = list(group.program.names[: group.program.hypers])
    full = [".".join(map(str, path)) for path, _ in walk(group.rule)]
    return [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]


def _joined(columns: list[Any]) -> Any:
    library = registry.library(columns[0])
    return columns[0] if len(columns) == 1 else library.joined(columns)


def averaged(state: Any, model: Any) -> Any:
    """The model with the moving averages that `EMA` keeps in place of its parameters; the model stays as it
    was.

    Parameters whose rule keeps no average are shared with the model. Raises NoMatch if none does.
    """
    store, node, path = parts(state)
    xs = dict(zip(reversed(node.leaves), reversed(gather(node, model, path)), strict=True))
    new: dict[int, Any] = {}
    for leaf in leaves_of(state):
        group, i = store.where(leaf)
        kept = _path_of_average(group.program.template)
        slot = next((j for j, s in enumerate(group.program.slots) if s.path == kept), None)
        if slot is not None:
            library = group.kind.library
            new[leaf] = library.like(xs[leaf], library.copied(group.slots[slot][i], group.kind.dtype))
    if not new:
        raise NoMatch("no rule here keeps an average; write setup(EMA(rule), model)")
    return rebuild(node, model, new)


def _path_of_average(state: Any, path: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """Where in a state the first moving average of the parameters stands."""
    if isinstance(state, AverageState):
        return (*path, "average")
    found = (_path_of_average(item, (*path, key)) for key, item in entries(state))
    return next((p for p in found if p is not None), None)


# -- showing and comparing -----------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether two states are of one form and equal in every array and number."""
    if form(a) != form(b):
        return False
    return all(
        np.array_equal(_seen(x), _seen(y), equal_nan=True)
        for (_, x), (_, y) in zip(flatten(a), flatten(b), strict=True)
    )


def _seen(x: Any) -> Any:
    """What stands in a state, as NumPy shows it."""
    return registry.library(x).to_numpy(x) if registry.isarray(x) else x


def _copied(state: Any, old: Any, name: str) -> Any:
    """The state with arrays of its own, in the types of the old one; raises BadState for other shapes."""
    new: list[Any] = []
    for (path, value), (_, was) in zip(flatten(state), flatten(old), strict=True):
        if registry.isarray(was):
            at = "".join(f".{p}" if isinstance(p, str) else f"[{p}]" for p in path)
            if value.shape != was.shape:
                raise BadState(f"{name}{at} has shape {tuple(value.shape)}; it takes {tuple(was.shape)}")
            if registry.library(value).is_complex(value) and not registry.library(was).is_complex(was):
                raise BadState(f"{name}{at} is complex; it takes real numbers")
            new.append(registry.library(was).copied(value, was.dtype))
        else:
            new.append(value)
    return unflatten(state, iter(new))


def _kinds(state: Any) -> str:
    inner = entries(state)
    if inner:
        return f"{type(state).__name__}({', '.join(_kinds(v) for _, v in inner)})"
    return (
        "array"
        if registry.isarray(state)
        else "number"
        if not isinstance(state, tuple) and state is not None
        else repr(state)
    )


def _short(state: Any) -> str:
    """A state on one line, its arrays abbreviated."""
    if registry.isarray(state):
        library = registry.library(state)
        if library.size(state) > 6 or library.is_loose(state):
            return f"{library.dtype_name(state)}{list(state.shape)}"
        return np.array2string(_seen(state), precision=4, separator=", ").replace("\n", "")
    inner = entries(state)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return f"{type(state).__name__}({', '.join(f'{k}={_short(v)}' for k, v in inner)})"
    if isinstance(state, dict):
        return "{" + ", ".join(f"{k!r}: {_short(v)}" for k, v in inner) + "}"
    if inner:
        return f"({', '.join(_short(v) for _, v in inner)}{',' if len(inner) == 1 else ''})"
    return repr(state)


def shown(state: Any, indent: int = 0, most: int = 12) -> str:
    """A state as an indented tree; long containers are cut, with a count."""
    if not isinstance(state, Branch):
        return repr(state)
    node = parts(state)[1]
    kind = node.kind or tuple
    mapping, pad = issubclass(kind, dict), "  " * (indent + 1)
    lines: list[str] = []
    for key in node.keys[:most]:
        name = f"{key}=" if isinstance(key, Attr) else f"{key!r}: " if mapping else ""
        lines.append(f"{pad}{name}{shown(state[key], indent + 1)},\n")
    if len(node.keys) > most:
        lines.append(f"{pad}... and {len(node.keys) - most} more\n")
    named = kind.__name__ if any(isinstance(k, Attr) for k in node.keys) else ""
    left, right = "{}" if mapping else "[]" if issubclass(kind, list) else "()"
    return f"{named}{left}\n{''.join(lines)}{'  ' * indent}{right}"
