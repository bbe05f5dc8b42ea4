"""How is a model flattened the first time? Into its arrays and a layout, along which model, state and
gradients are flattened together at every step.

The same array at several places (the same memory: one object, equal views of it, or transposed views) is one
leaf with several places. Of arrays that cannot be written, being one object means nothing: any copy loses it.
There a tie is declared, by an object that stands at two places, or by whoever calls.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.memory import axes_between, bounds, memory_of, same_array
from optimisers.errors import BadSetting, NoMatch, TreeMismatch
from optimisers.tree.children import Container, container_for
from optimisers.tree.layout import EMPTY, FROZEN, Layout, Node, fetcher, leaf_paths, picker
from optimisers.tree.path import Attr, KeyPath, matches

Ties = Sequence[tuple[str, ...]]
"""Places that hold one array, by their paths, or by globs that match one path each."""


def flatten_model(
    model: object, ties: Ties = (), trained: Callable[[Any], bool] = registry.istrainable
) -> tuple[Layout, list[Any]]:
    """The layout of a model, and the array of each leaf: of those that are `trained`.

    Raises TreeMismatch for a container that holds itself, a class that hides arrays without being registered,
    parameters that overlap in memory without being the same, and declared ties of arrays that cannot be one;
    NoMatch for a tie that names no place, or several.
    """
    return _Flattening(checked_ties(ties), trained).run(model)


def checked_ties(ties: Any) -> Ties:
    """Declared ties; raises BadSetting for what are none."""
    found = [ties] if isinstance(ties, str) else list(ties)
    for tie in found:
        if isinstance(tie, str) or len(tie) < 2 or not all(isinstance(name, str) for name in tie):
            raise BadSetting(
                f'ties holds {tie!r}; it takes tuples of paths, such as ties=[("encoder.w", "decoder.w")]'
            )
    return [tuple(tie) for tie in found]


class _Flattening:
    """The first walk over a model; `ordered` where the array library hands dicts on with sorted keys: one
    model has one order.
    """

    def __init__(
        self,
        ties: Ties = (),
        trained: Callable[[Any], bool] = registry.istrainable,
        *,
        ordered: bool = False,
    ) -> None:
        self.ties, self.trained, self.ordered = ties, trained, ordered
        self.arrays: list[Any] = []
        self.places: list[list[KeyPath]] = []
        self.known: dict[Any, int] = {}
        self.nodes: dict[int, Node] = {}
        self.open: set[int] = set()
        self.floats: list[tuple[KeyPath, Any]] = []
        self.kept: list[Any] = []

    def run(self, model: object) -> tuple[Layout, list[Any]]:
        if isinstance(model, float | complex):
            raise TreeMismatch(
                f"the model is the Python number {model!r}; write np.array({model!r}) to train it"
            )
        root = self.visit(model, KeyPath(), listed=False)
        if self.arrays and not self.ordered and all(registry.sorts_dicts(x) for x in self.arrays):
            return _Flattening(self.ties, self.trained, ordered=True).run(model)
        self.refuse_overlaps()
        for tie in self.ties:
            self.refuse_tie(tie)
        shapes = [tuple(x.shape) for x in self.arrays]
        return Layout(root, [p[0] for p in self.places], self.places, self.floats, shapes), self.arrays

    def visit(self, obj: object, path: KeyPath, *, listed: bool) -> Node:
        if registry.isarray(obj):
            if self.trained(obj):
                return self.leaf(obj, path)
            if registry.isnumeric(obj):
                return FROZEN
            nested = obj.flat if isinstance(obj, np.ndarray) and obj.dtype == object else ()
            if any(_Flattening().visit(item, path, listed=False).leaves for item in nested):
                raise TreeMismatch(f"{path.code()} is an array of objects, which hold arrays; make it a list")
            return EMPTY
        container = container_for(obj)
        if container is None:
            self.refuse_hidden(obj, path, listed=listed)
            return EMPTY
        if id(obj) in self.nodes and (container.shared or self.writable(self.nodes[id(obj)])):
            return self.seen_again(self.nodes[id(obj)], path)
        if id(obj) in self.open:
            raise TreeMismatch(f"{path.code()} holds itself; a model is a tree")
        self.open.add(id(obj))
        node = self.branch(obj, container, path)
        self.open.discard(id(obj))
        if node.leaves:
            self.nodes[id(obj)] = node
            self.kept.append(obj)
        return node

    def branch(self, obj: object, container: Container, path: KeyPath) -> Node:
        keys = self.keys(obj, container)
        children: list[Node] = []
        for key, value in zip(keys, self.read(obj, container, keys, path), strict=True):
            below = path if container.bare else KeyPath(path, key)
            skipped = container.trainable is not None and key not in container.trainable
            listed = container.trainable is not None and not skipped
            children.append(EMPTY if skipped else self.visit(value, below, listed=listed))
            loose = isinstance(value, float | complex | np.floating | np.complexfloating)
            if loose and not skipped and not _declared_float(obj, key):
                self.floats.append((below, value))
        live = tuple((k, c) for k, c in zip(keys, children, strict=True) if c.leaves)
        leaves = tuple(i for _, c in live for i in c.leaves)
        return Node(
            kind=type(obj),
            container=container,
            keys=keys,
            children=tuple(children),
            live=live,
            pick=picker(live),
            fetch=fetcher(container, live),
            leaves=leaves,
            again=bool(live) and all(c.again for _, c in live),
        )

    def keys(self, obj: object, container: Container) -> tuple[Any, ...]:
        """The keys of a container; raises TreeMismatch where one registered as trainable is missing."""
        keys = container.keys(obj)
        for name in container.trainable or ():
            if name not in keys:
                raise TreeMismatch(
                    f"{type(obj).__name__} was registered with trainable {name!r}, which is not among its "
                    f"children {', '.join(map(str, keys))}"
                )
        if self.ordered and isinstance(obj, dict):
            with contextlib.suppress(TypeError):
                return tuple(sorted(keys))
        return keys

    @staticmethod
    def read(obj: object, container: Container, keys: tuple[Any, ...], path: KeyPath) -> list[Any]:
        try:
            return list(container.read(obj, keys))
        except AttributeError as error:
            raise TreeMismatch(
                f"{path.code()} lacks {error.name!r}, with which {type(obj).__name__} was registered as a "
                "child"
            ) from error

    def leaf(self, x: Any, path: KeyPath) -> Node:
        library = registry.library(x)
        if library.unready(x):
            raise TreeMismatch(f"{path.code()} {library.unready(x)}")
        where = self.identity(x, path)
        number = self.known.setdefault(where, len(self.arrays))
        if number == len(self.arrays):
            self.arrays.append(x)
            self.places.append([path])
            return Node(leaf=number, leaves=(number,))
        first = self.arrays[number]
        if library.immutable:
            self.refuse_other(first, x, self.places[number][0], path)
            self.places[number].append(path)
            return Node(leaf=number, leaves=(number,), again=True)
        if first.dtype != x.dtype:
            raise TreeMismatch(
                f"{path.code()} is the memory of {self.places[number][0].code()} read as {x.dtype} instead "
                f"of {first.dtype}; train one of them"
            )
        self.places[number].append(path)
        return Node(leaf=number, axes=axes_between(first, x), leaves=(number,), again=True)

    def identity(self, x: Any, path: KeyPath) -> Any:
        """What places of one array share: memory, or where arrays cannot be written a declared tie."""
        library = registry.library(x)
        if library.immutable:
            declared = (n for n, tie in enumerate(self.ties) if any(matches(name, path) for name in tie))
            return "tie", next(declared, -1 - len(self.arrays))
        return ("empty", id(x)) if 0 in x.shape else memory_of(x)

    def writable(self, node: Node) -> bool:
        """Whether all arrays below a node could be written."""
        return not any(registry.library(self.arrays[i]).immutable for i in node.leaves)

    @staticmethod
    def refuse_other(first: Any, x: Any, there: KeyPath, path: KeyPath) -> None:
        """Raise TreeMismatch where two places that were declared to be one array cannot be."""
        both = f"{there.code()} and {path.code()}"
        if (first.shape, first.dtype) != (x.shape, x.dtype):
            raise TreeMismatch(
                f"{both} are tied, and hold arrays of {first.dtype}, {tuple(first.shape)} and of {x.dtype}, "
                f"{tuple(x.shape)}; ties take arrays of one shape and type"
            )
        seen = all(hasattr(a, "__array__") for a in (first, x))
        if seen and not same_array(first, x):
            raise TreeMismatch(
                f"{both} are tied, and hold different numbers; put one array at both places first"
            )

    def refuse_tie(self, tie: tuple[str, ...]) -> None:
        """Raise NoMatch unless each name of a tie is one place, TreeMismatch unless they hold one array."""
        found: list[tuple[int, KeyPath]] = []
        for name in tie:
            fitting = [(i, p) for i, ps in enumerate(self.places) for p in ps if matches(name, p)]
            if len(fitting) != 1:
                there = ", ".join(str(p) for _, p in fitting[:4]) or "no parameter"
                known = ", ".join(str(ps[0]) for ps in self.places[:8])
                raise NoMatch(
                    f"{name!r} in ties matches {there}; it takes the path of one; there are {known}"
                )
            found += fitting
        first, at = found[0]
        for leaf, path in found[1:]:
            if leaf != first:
                a, b = at.code(), path.code()
                raise TreeMismatch(
                    f"{a} and {b} are tied, and are two arrays in memory; put the same array at both places "
                    f"first: {b} = {a}"
                )

    def seen_again(self, node: Node, path: KeyPath) -> Node:
        """A container met before: a node that knows the first, so that the rebuilt model shares it too."""
        for below, leaf in leaf_paths(node, path):
            self.places[leaf].append(below)
        return dataclasses.replace(node, again=True, first=node.first or node)

    def refuse_hidden(self, obj: Any, path: KeyPath, *, listed: bool) -> None:
        if listed and isinstance(obj, float | complex):
            raise TreeMismatch(
                f"{path.code()} is registered as trainable and is the Python number {obj!r}; write "
                f"np.array({obj!r})"
            )
        if isinstance(obj, str | bytes | range | type | ModuleType):
            return
        if module := registry.unknown_array(obj):
            raise TreeMismatch(f"{path.code()} is {registry.not_known(module)}")
        held = [(f" in {path.code()}.{name}", value) for name, value in attributes(obj)]
        several = isinstance(obj, Collection) and not isinstance(obj, Mapping)
        held += [("", item) for item in obj] if several else []
        for where, value in held:
            if holds_arrays(value):
                cls = type(obj).__name__
                instead = (
                    "make it a list, a tuple or a dict"
                    if several
                    else (f"write opt.register({cls}), or make it a dataclass")
                )
                raise TreeMismatch(
                    f"{path.code()} is a {cls}, which holds an array{where} but is no container known here; "
                    f"{instead}"
                )

    def refuse_overlaps(self) -> None:
        """Two parameters that share elements, but are not the same array, would be stepped twice."""
        spans = [(*bounds(x), i) for i, x in enumerate(self.arrays)]
        spans = [span for span in spans if span[0] < span[1]]
        spans.sort()
        end, last = 0, -1
        for low, high, i in spans:
            if low < end and share_elements(self.arrays[last], self.arrays[i]):
                a, b = self.places[last][0].code(), self.places[i][0].code()
                raise TreeMismatch(
                    f"{a} and {b} share memory without being the same array or its transpose; train one of "
                    "them, or copy"
                )
            if high > end:
                end, last = high, i


def share_elements(a: object, b: object) -> bool:
    """Whether two arrays have some element in common; asked of their layouts alone, wherever they lie."""
    return np.shares_memory(*(_layout_only(x) for x in (a, b)))


def _layout_only(x: Any) -> Any:
    """A NumPy array that has the layout of another array and is never read."""
    library = registry.library(x)
    shape, strides = library.memory.layout(x)
    kind = f"|V{x.dtype.itemsize}"
    about = {"data": (library.memory.address(x), True), "shape": shape, "strides": strides, "typestr": kind}
    return np.asarray(SimpleNamespace(__array_interface__={**about, "version": 3}))


def attributes(obj: object) -> list[tuple[str, Any]]:
    """The instance attributes of an object, those in slots too."""
    if isinstance(obj, functools.partial):
        return [("args", obj.args), ("keywords", obj.keywords)]
    slots = [name for base in type(obj).__mro__ for name in _names(vars(base).get("__slots__", ()))]
    return [*getattr(obj, "__dict__", {}).items(), *((n, getattr(obj, n)) for n in slots if hasattr(obj, n))]


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def holds_arrays(value: object, depth: int = 3) -> bool:
    """Whether a value is an array that could train, or a plain container of such, not too deep."""
    if registry.isnumeric(value):
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return depth > 0 and any(holds_arrays(v, depth - 1) for v in inner)


def _declared_float(obj: object, key: object) -> bool:
    """Whether the class of `obj` says that this field is a float: then it is a setting of the model."""
    for base in type(obj).__mro__:
        declared = vars(base).get("__annotations__", {}).get(str(key)) if isinstance(key, Attr) else None
        if declared is not None:
            return declared is float or "float" in str(declared)
    return False
