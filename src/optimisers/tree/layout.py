"""What does a walk know of a model? A tree of nodes that mirrors it: containers, and leaves where arrays are
trained.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from optimisers.arrays import registry
from optimisers.tree.children import Container, container_of
from optimisers.tree.path import Attr, KeyPath


@dataclasses.dataclass(eq=False)
class Node:
    """One place of the model: a leaf (an array that is trained), a container, or nothing to train."""

    leaf: int = -1
    """The number of the leaf, or -1."""
    axes: tuple[int, ...] | None = None
    """How the axes of the leaf's first place are permuted here, for a transposed tie."""
    kind: type | None = None
    container: Container | None = None
    keys: tuple[Any, ...] = ()
    """All keys of the container."""
    children: "tuple[Node, ...]" = ()
    """One for each key."""
    live: "tuple[tuple[Any, Node], ...]" = ()
    """The keys and children that have leaves in them."""
    pick: Callable[[dict[int, Any]], dict[Any, Any]] | None = None
    """New arrays by leaf number -> those of the live children by key; set where all of these are leaves with
    the axes of their first place. Raises KeyError where one is missing.
    """
    fetch: Callable[[Any], Any] | None = None
    """The values of the live children in one call; set where all of them are leaves."""
    leaves: tuple[int, ...] = ()
    """The leaves below, in the order of the walk, one entry a place."""
    frozen: bool = False
    """Whether a parameter stands here that did not want to be trained."""
    again: bool = False
    """Whether all leaves below were met before: their gradients may stand there alone."""
    first: "Node | None" = None
    """The node of the same container where it was met first."""

    @property
    def bare(self) -> bool:
        """Whether it is but the wrapper of one array."""
        return self.container is not None and self.container.bare

    @property
    def by_name(self) -> bool:
        """Whether it is a model that knows its parameters, and their gradients, by name."""
        return self.container is not None and self.container.gradients is not None

    @functools.cached_property
    def names(self) -> list[str]:
        """The path to each place below, as text."""
        return [str(path) for path, _ in leaf_paths(self, KeyPath())]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("container", "fetch", "pick", "names")}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        kind = kept["kind"]
        self.container = None if kind is None else container_of(kind) or registry.container_elsewhere()
        vars(self).update(kept, fetch=fetcher(self.container, kept["live"]), pick=picker(kept["live"]))


def fetcher(container: Container | None, live: "tuple[tuple[Any, Node], ...]") -> Callable[[Any], Any] | None:
    """Reads all live children in one call, if all of them are leaves."""
    if not live or container is None or not container.direct or any(c.leaf < 0 for _, c in live):
        return None
    keys = [k for k, _ in live]
    get = attrgetter(*keys) if isinstance(keys[0], Attr) else itemgetter(*keys)
    return get if len(keys) > 1 else lambda obj: (get(obj),)


def picker(live: "tuple[tuple[Any, Node], ...]") -> Callable[[dict[int, Any]], dict[Any, Any]] | None:
    """See `Node.pick`."""
    if not live or any(c.leaf < 0 or c.axes is not None for _, c in live):
        return None
    keys, numbers = [k for k, _ in live], [c.leaf for _, c in live]
    get = itemgetter(*numbers) if len(live) > 1 else lambda new: (new[numbers[0]],)
    return lambda new: dict(zip(keys, get(new), strict=True))


class Place(NamedTuple):
    """One place of an array."""

    path: KeyPath
    kinds: tuple[type, ...]
    """The types of the modules, and of the boxes of one array, that it stands in, outermost first; plain
    dicts, lists and tuples are left out.
    """


class Parameter(NamedTuple):
    """What is known of an array that may be trained."""

    places: tuple[Place, ...]
    shape: tuple[int, ...]


Told = Mapping[str, tuple[Place, ...]]
"""All places of the arrays of a model, by the key of each where the model was flattened to a dict."""


@dataclasses.dataclass(eq=False)
class Layout:
    """How one model is flattened and rebuilt: what JAX calls a treedef."""

    root: Node
    paths: list[KeyPath]
    """The path of each leaf: that of its first place."""
    places: list[list[KeyPath]]
    """All paths of each leaf."""
    floats: list[tuple[KeyPath, Any]]
    """Numbers beside arrays: they do not train, though it might be thought."""
    shapes: list[tuple[int, ...]]
    """The shape of each leaf."""
    told: Told = dataclasses.field(default_factory=dict[str, tuple[Place, ...]])
    """Where the arrays stand in the model, if it was flattened to a dict before this walk."""

    @functools.cached_property
    def key(self) -> Any:
        """Equal for the layouts of models that are walked alike."""
        typed = any(place.kinds for places in self.told.values() for place in places)
        told = [(name, *map(_place_key, places)) for name, places in self.told.items()]
        return (_node_key(self.root), *told) if typed else _node_key(self.root)

    @functools.cached_property
    def text(self) -> str:
        """The key as text, in this process."""
        return described(self.key)

    def __getstate__(self) -> dict[str, Any]:
        """Without the types of a model that was flattened, as its classes may be none that pickle finds; the
        key remembers them.
        """
        kept = {k: v for k, v in vars(self).items() if k not in ("told", "parameters", "text")}
        return {**kept, "told": {}, "key": self.key}

    @functools.cached_property
    def parameters(self) -> list[Parameter]:
        """What is known of each leaf."""
        found: list[list[Place]] = [[] for _ in self.paths]
        for leaf, place in places_of(self.root, KeyPath(), ()):
            found[leaf] += self.told.get(str(place.path), (place,))
        return [Parameter(tuple(ps), shape) for ps, shape in zip(found, self.shapes, strict=True)]


def _place_key(place: Place) -> Any:
    return str(place.path), *(f"{kind.__module__}.{kind.__qualname__}" for kind in place.kinds)


def _node_key(node: Node) -> Any:
    if node.leaf >= 0:
        return node.leaf, node.axes
    return node.kind, node.keys, tuple((k, _node_key(c)) for k, c in node.live)


EMPTY = Node()

FROZEN = Node(frozen=True)


def extended(node: Node, path: KeyPath, key: object) -> KeyPath:
    """The path of a child of a node; the wrapper of one array does not count."""
    return path if node.bare else KeyPath(path, key)


def leaf_paths(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """(path, leaf) for every place below a node."""
    if node.leaf >= 0:
        yield path, node.leaf
    for key, child in node.live:
        yield from leaf_paths(child, extended(node, path, key))


def places_of(node: Node, path: KeyPath, kinds: tuple[type, ...]) -> Iterator[tuple[int, Place]]:
    """(leaf, place) for every place below a node that stands in containers of some types."""
    if node.leaf >= 0:
        yield node.leaf, Place(path, kinds)
    if node.kind is not None and not _plain(node.kind):
        kinds = (*kinds, node.kind)
    for key, child in node.live:
        yield from places_of(child, extended(node, path, key), kinds)


def _plain(kind: type) -> bool:
    """Whether containers of this type say nothing of what they hold."""
    return issubclass(kind, dict | list) or (issubclass(kind, tuple) and not hasattr(kind, "_fields"))


def find(node: Node, key: object) -> Node | None:
    """The child of a node under `key`."""
    for k, child in zip(node.keys, node.children, strict=True):
        if k == key:
            return child
    return None


def joined(first: Layout, second: Layout) -> Layout:
    """The layout of two flat dicts of arrays as one: the leaves of the second behind those of the first."""
    n, a, b = len(first.paths), first.root, second.root
    moved = [
        dataclasses.replace(child, leaf=child.leaf + n, leaves=(child.leaf + n,)) if child.leaves else child
        for child in b.children
    ]
    live = (*a.live, *((k, child) for k, child in zip(b.keys, moved, strict=True) if child.leaves))
    root = Node(
        kind=a.kind,
        container=a.container,
        keys=a.keys + b.keys,
        children=(*a.children, *moved),
        live=live,
        pick=picker(live),
        fetch=fetcher(a.container, live),
        leaves=a.leaves + tuple(leaf + n for leaf in b.leaves),
    )
    return Layout(
        root,
        first.paths + second.paths,
        first.places + second.places,
        first.floats + second.floats,
        first.shapes + second.shapes,
        {**first.told, **second.told},
    )


def described(key: Any) -> str:
    """A key as text; what has no text that tells it from all others is told by where it lies."""
    if isinstance(key, tuple):
        return f"({', '.join(map(described, key))})"
    if isinstance(key, type):
        return f"{key.__module__}.{key.__qualname__}"
    if isinstance(key, str | bytes | int | float | None):
        return repr(key)
    return f"{described(type(key))} {id(key)}"
