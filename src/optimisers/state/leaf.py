"""What does a user hold of the state? Handles: a Leaf beside each array, a Branch beside each container.

Any handle is an address: `freeze_(state.layers[3])`. They are made when they are looked at; the store behind
them is one.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from optimisers.errors import BadState
from optimisers.nest import copied, form, kinds, same, short
from optimisers.rule import Rule
from optimisers.settings import adjustable, skeleton
from optimisers.spellings import ELSEWHERE
from optimisers.state.store import Store
from optimisers.state.structure import Pending
from optimisers.tree.layout import Node, find
from optimisers.tree.path import Attr, KeyPath


class Leaf:
    """The rule and state of one array of parameters (or of several tied ones).

    `rule`, `state` and `frozen` may be read and assigned. Arrays in `state` are views: they show what the
    next step starts from, and what is written into them counts, unless they are read-only. Two leaves are
    equal if rule, state and frozen are.
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
                f"{self._name()} has a state of the form {kinds(self.state)}; {rule!r} takes "
                f"{kinds(wanted)}; call `setup` for a new state"
            )
        group, i = self._store.where(self._leaf)
        kept = copied(self.state, self.state, self._name())
        self._store.move([group.entry(i)._replace(rule=rule, state=kept)])

    @property
    def state(self) -> Any:
        group, i = self._store.where(self._leaf)
        library = group.kind.library
        if group.shared and not (library.guards or library.immutable or group.opaque):
            with self._store.lock:
                group.owned()  # what is written into a copy would be lost
        return group.state_of(i)

    @state.setter
    def state(self, state: Any) -> None:
        old, name = self.state, f"{self._name()}.state"
        if form(state) != form(old):
            raise BadState(f"{name} is given {kinds(state)}; it takes {kinds(old)}")
        self._store.assign(self._leaf, copied(state, old, name))

    @property
    def frozen(self) -> bool:
        """Whether updates pass this leaf by: no step, no decay, no change of state."""
        return bool(self._store.frozen[self._leaf])

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        if not isinstance(frozen, bool | np.bool_):
            raise BadState(f"{self._name()}.frozen is {frozen!r}; it takes True or False")
        self._store.freeze([self._leaf], bool(frozen))

    def _name(self) -> str:
        return self.path.code("state")

    def __setattr__(self, name: str, value: object) -> None:
        if not hasattr(Leaf, name):
            raise BadState(
                f"{self._name()} is a Leaf, with rule, state and frozen{_as_setting(self, name, value)}"
            )
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        hint = _as_setting(self, name)
        raise AttributeError(f"{self._name()} has no {name}; it is a Leaf, with rule, state and frozen{hint}")

    __iter__ = None

    def __getitem__(self, key: object) -> Any:
        return _below(self, key)

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
        return f"Leaf({self.rule!r}, {short(self.state)}{', frozen=True' if self.frozen else ''})"

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
        here = f"{self._path.code('state')}.{name}"
        hint = _as_setting(self, name, value) or f"; assign {here}.rule or .state of a leaf"
        raise BadState(f"a state has no parts to replace{hint}")

    def __setitem__(self, key: object, value: object) -> None:
        here = f"{self._path.code('state')}[{key!r}]"
        raise BadState(f"a state has no parts to replace; assign {here}.rule or .state of a leaf")

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
            hint = _as_setting(self, name)
            raise AttributeError(f"{self._path.code('state')} has no {name}; it has {has}{hint}")
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


State = Leaf | Branch
"""What `setup` returns, and every part of it where something trains."""


def opened_late(state: Leaf | Branch) -> Any:
    """What a handle holds, not put together."""
    return object.__getattribute__(state, "_held")


def unseen(state: Leaf | Branch) -> bool:
    """Whether a transform has put something else in place of the arrays: axes, shapes, populations."""
    held = opened_late(state)
    return isinstance(held, Pending) and not (
        held.structure.store.compiled is not None or held.structure.fits(held.arrays)
    )


def _as_setting(of: Leaf | Branch, name: str, value: object = None) -> str:
    """What to write for the setting of a rule where it is looked for in the state; empty for other
    names. With a value it is to be set.
    """
    store, node, path = parts(of)
    setting, code = ELSEWHERE.get(name, name), path.code("state")
    rules = {store.where(leaf)[0].rule for leaf in node.leaves if store.shapes[leaf] is not None}
    if not any(setting in adjustable(rule) for rule in rules):
        return ""
    if value is not None:
        return f"; settings belong to rules: write opt.adjust_({code}, {setting}={value!r})"
    read = f"{code}.rule.{setting}" if isinstance(of, Leaf) else f"opt.current({code})"
    return f"; settings belong to rules: write {read}"


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
    if node.bare and node.live:
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
    return of.__reduce__()[1][:3]


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
            "returns, or a part of it, where the model has arrays of floating point or complex numbers"
        )
    if isinstance(state, tuple) and isinstance(state[0], Leaf | Branch):
        raise BadState(
            "a state was wanted and (state, model) came, as an update gives them; write state, model = "
            "update(state, model, grads)"
        )
    if isinstance(getattr(state, "tree", None), Leaf | Branch):
        raise BadState(f"a state was wanted and a {type(state).__name__} came; its state is its `tree`")
    raise BadState(
        f"a state was wanted and a {type(state).__name__} came; a state is what `setup(rule, model)` "
        "returns, or a part of it"
    )


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
