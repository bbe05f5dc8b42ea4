"""How are model, state and gradients walked together? Along one layout, made once by `survey`.

The layout is a tree of nodes that mirrors the model: containers, and leaves where arrays are trained. The
same array at several places (the same memory: one object, equal views of it, or transposed views) is one leaf
with several places. Of arrays that cannot be written, being one object means nothing: any copy loses it.
There a tie is declared, by an object that stands at two places, or by whoever calls.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import BadSetting, NoMatch, TreeMismatch
from optimisers.tree.children import Container, container, container_of, loose
from optimisers.tree.path import Attr, KeyPath, matches


@dataclasses.dataclass(eq=False)
class Node:
    """One place of the model: a leaf (an array that is trained), a container, or nothing to train."""

    leaf: int = -1
    """The number of the leaf, or -1."""
    axes: tuple[int, ...] | None = None
    """How the axes of the leaf's first place are permuted here, for a transposed tie."""
    kind: type | None = None
    ways: Container | None = None
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

    @functools.cached_property
    def names(self) -> list[str]:
        """The path to each place below, as text."""
        return [str(path) for path, _ in _leaf_paths(self, KeyPath())]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("ways", "fetch", "pick", "names")}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.ways = None if kept["kind"] is None else container_of(kept["kind"])
        vars(self).update(kept, fetch=_fetcher(self.ways, kept["live"]), pick=_picker(kept["live"]))


def _fetcher(ways: Container | None, live: "tuple[tuple[Any, Node], ...]") -> Callable[[Any], Any] | None:
    """Reads all live children in one call, if all of them are leaves."""
    if not live or ways is None or not ways.direct or any(c.leaf < 0 for _, c in live):
        return None
    keys = [k for k, _ in live]
    get = attrgetter(*keys) if isinstance(keys[0], Attr) else itemgetter(*keys)
    return get if len(keys) > 1 else lambda obj: (get(obj),)


def _picker(live: "tuple[tuple[Any, Node], ...]") -> Callable[[dict[int, Any]], dict[Any, Any]] | None:
    """See `Node.pick`."""
    if not live or any(c.leaf < 0 or c.axes is not None for _, c in live):
        return None
    keys, numbers = [k for k, _ in live], [c.leaf for _, c in live]
    get = itemgetter(*numbers) if len(live) > 1 else lambda new: (new[numbers[0]],)
    return lambda new: dict(zip(keys, get(new), strict=True))


@dataclasses.dataclass(eq=False)
class Layout:
    """The walk over one model."""

    root: Node
    paths: list[KeyPath]
    """The path of each leaf: that of its first place."""
    places: list[list[KeyPath]]
    """All paths of each leaf."""
    floats: list[tuple[KeyPath, Any]]
    """Numbers beside arrays: they do not train, though somebody may think so."""

    @functools.cached_property
    def key(self) -> Any:
        """Equal for the layouts of models that are walked alike."""
        return _node_key(self.root)


def _node_key(node: Node) -> Any:
    if node.leaf >= 0:
        return node.leaf, node.axes
    return node.kind, node.keys, tuple((k, _node_key(c)) for k, c in node.live)


EMPTY = Node()

FROZEN = Node(frozen=True)


# -- the first walk ------------------------------------------------------------------------------------------


Ties = Sequence[tuple[str, ...]]
"""Places that hold one array, by their paths, or by globs that match one path each."""


def survey(model: object, ties: Ties = ()) -> tuple[Layout, list[Any]]:
    """The layout of a model, and the array of each leaf.

    Raises TreeMismatch for a container that holds itself, a class that hides arrays without being registered,
    parameters that overlap in memory without being the same, and declared ties of arrays that cannot be one;
    NoMatch for a tie that names no place, or several.
    """
    return _Survey(checked_ties(ties)).run(model)


def checked_ties(ties: Any) -> Ties:
    """Declared ties; raises BadSetting for what are none."""
    found = [ties] if isinstance(ties, str) else list(ties)
    for tie in found:
        if isinstance(tie, str) or len(tie) < 2 or not all(isinstance(name, str) for name in tie):
            raise BadSetting(
                f'ties holds {tie!r}; it takes tuples of paths, such as ties=[("encoder.w", "decoder.w")]'
            )
    return [tuple(tie) for tie in found]


class _Survey:
    """The first walk; `ordered` where the array library hands dicts on with sorted keys: one model has
    one order.
    """

    def __init__(self, ties: Ties = (), *, ordered: bool = False) -> None:
        self.ties, self.ordered = ties, ordered
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
        if self.arrays and not self.ordered and all(registry.library(x).sorts_dicts for x in self.arrays):
            return _Survey(self.ties, ordered=True).run(model)
        self.refuse_overlaps()
        for tie in self.ties:
            self.refuse_tie(tie)
        return Layout(root, [p[0] for p in self.places], self.places, self.floats), self.arrays

    def visit(self, obj: object, path: KeyPath, *, listed: bool) -> Node:
        if registry.isarray(obj):
            if registry.istrainable(obj):
                return self.leaf(obj, path)
            if registry.isnumeric(obj):
                return FROZEN
            nested = obj.flat if isinstance(obj, np.ndarray) and obj.dtype == object else ()
            if any(_Survey().visit(item, path, listed=False).leaves for item in nested):
                raise TreeMismatch(f"{path.code()} is an array of objects, which hold arrays; make it a list")
            return EMPTY
        ways = container(obj)
        if ways is None:
            self.refuse_hidden(obj, path, listed=listed)
            return EMPTY
        if id(obj) in self.nodes and (ways.shared or self.writable(self.nodes[id(obj)])):
            return self.seen_again(self.nodes[id(obj)], path)
        if id(obj) in self.open:
            raise TreeMismatch(f"{path.code()} holds itself; a model is a tree")
        self.open.add(id(obj))
        node = self.branch(obj, ways, path)
        self.open.discard(id(obj))
        if node.leaves:
            self.nodes[id(obj)] = node
            self.kept.append(obj)
        return node

    def branch(self, obj: object, ways: Container, path: KeyPath) -> Node:
        keys = ways.keys(obj)
        if self.ordered and isinstance(obj, dict):
            with contextlib.suppress(TypeError):
                keys = tuple(sorted(keys))
        if ways.trainable is not None:
            for name in ways.trainable:
                if name not in keys:
                    raise TreeMismatch(
                        f"{type(obj).__name__} was registered with trainable {name!r}, which is not among "
                        f"its children {', '.join(map(str, keys))}"
                    )
        children: list[Node] = []
        for key, value in zip(keys, self.read(obj, ways, keys, path), strict=True):
            below = path if ways.bare else KeyPath(path, key)
            skipped = ways.trainable is not None and key not in ways.trainable
            listed = ways.trainable is not None and not skipped
            children.append(EMPTY if skipped else self.visit(value, below, listed=listed))
            loose = isinstance(value, float | complex | np.floating | np.complexfloating)
            if loose and not skipped and not _declared_float(obj, key):
                self.floats.append((below, value))
        live = tuple((k, c) for k, c in zip(keys, children, strict=True) if c.leaves)
        leaves = tuple(i for _, c in live for i in c.leaves)
        return Node(
            kind=type(obj),
            ways=ways,
            keys=keys,
            children=tuple(children),
            live=live,
            pick=_picker(live),
            fetch=_fetcher(ways, live),
            leaves=leaves,
            again=bool(live) and all(c.again for _, c in live),
        )

    @staticmethod
    def read(obj: object, ways: Container, keys: tuple[Any, ...], path: KeyPath) -> list[Any]:
        try:
            return list(ways.read(obj, keys))
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
        return Node(leaf=number, axes=library.axes_between(first, x), leaves=(number,), again=True)

    def identity(self, x: Any, path: KeyPath) -> Any:
        """What places of one array share: memory, or where arrays cannot be written a declared tie."""
        library = registry.library(x)
        if library.immutable:
            declared = (n for n, tie in enumerate(self.ties) if any(matches(name, path) for name in tie))
            return "tie", next(declared, -1 - len(self.arrays))
        return ("empty", id(x)) if library.size(x) == 0 else (library.name, library.memory(x))

    def writable(self, node: Node) -> bool:
        """Whether all arrays below a node could be written."""
        return not any(registry.library(self.arrays[i]).immutable for i in node.leaves)

    @staticmethod
    def refuse_other(first: Any, x: Any, there: KeyPath, path: KeyPath) -> None:
        """Raise TreeMismatch where two places that were declared to be one array cannot be."""
        both, library = f"{there.code()} and {path.code()}", registry.library(x)
        if (first.shape, first.dtype) != (x.shape, x.dtype):
            raise TreeMismatch(
                f"{both} are tied, and hold arrays of {first.dtype}, {tuple(first.shape)} and of {x.dtype}, "
                f"{tuple(x.shape)}; ties take arrays of one shape and type"
            )
        seen = all(hasattr(a, "__array__") for a in (first, x))
        if seen and not library.same_array(first, x):
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
        for below, leaf in _leaf_paths(node, path):
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
            raise TreeMismatch(
                f"{path.code()} is an array of {module}, a library that is not known here; "
                "opt.register_backend teaches it"
            )
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
        spans = [(*registry.library(x).bounds(x), i) for i, x in enumerate(self.arrays)]
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
    shape, strides = library.layout(x)
    kind = f"|V{x.dtype.itemsize}"
    about = {"data": (library.bounds(x)[0], True), "shape": shape, "strides": strides, "typestr": kind}
    return np.asarray(SimpleNamespace(__array_interface__={**about, "version": 3}))


def attributes(obj: object) -> list[tuple[str, Any]]:
    """The instance attributes of an object, those in slots too."""
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


def extended(node: Node, path: KeyPath, key: object) -> KeyPath:
    """The path of a child of a node; the wrapper of one array does not count."""
    return path if node.ways is not None and node.ways.bare else KeyPath(path, key)


def _leaf_paths(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """(path, leaf) for every place below a node."""
    if node.leaf >= 0:
        yield path, node.leaf
    for key, child in node.live:
        yield from _leaf_paths(child, extended(node, path, key))


# -- the walks of every step ---------------------------------------------------------------------------------


def gather(node: Node, model: object, path: KeyPath, seen: str = "setup") -> Any:
    """The arrays of a model at the places below `node`, in order.

    Raises TreeMismatch where the structure is not that which `seen`, the function that made the layout, saw.
    """
    if node.leaf >= 0:
        return [model]
    if node.ways is not None and node.ways.gather is not None:
        found = node.ways.gather(model, node, node.names) if type(model) is node.kind else None
        if found is not None:
            return found
    elif node.fetch is not None and type(model) is node.kind and _sized_like(node, model):
        try:
            return node.fetch(model)
        except (LookupError, AttributeError):
            pass
    out: list[Any] = []
    for key, child, value in model_children(node, model, path, seen):
        out.extend(gather(child, value, KeyPath(path, key), seen))
    return out


def _sized_like(node: Node, obj: Any) -> bool:
    """Whether a dict, list or tuple has as many entries as `setup` saw; other containers have their
    class's.
    """
    if node.kind not in (dict, list, tuple):
        return True
    same = len(node.live) == len(node.keys) or node.kind is not dict or all(k in obj for k in node.keys)
    return same and len(obj) == len(node.keys)


def model_children(node: Node, model: object, path: KeyPath, seen: str) -> Iterator[tuple[Any, Node, Any]]:
    """(key, child, value) of the live children of a container; raises TreeMismatch if it is not the one
    surveyed.
    """
    if not node.leaves:
        return
    ways = container(model)
    assert node.kind is not None
    if ways is None or (type(model) is not node.kind and not isinstance(model, node.kind)):
        raise TreeMismatch(
            f"{path.code()} is a {type(model).__name__}; `{seen}` saw a {node.kind.__name__}; call `{seen}` "
            "again for another model"
        )
    keys = ways.keys(model)
    if keys != node.keys and set(keys) != set(node.keys):
        if issubclass(node.kind, list | tuple) and not isinstance(node.keys[0], Attr):
            raise TreeMismatch(
                f"{path.code()} has {len(keys)} entr{'y' if len(keys) == 1 else 'ies'}; `{seen}` saw "
                f"{len(node.keys)}; call `{seen}` again for another model"
            )
        gone = [k for k in node.keys if k not in keys]
        new = [k for k in keys if k not in node.keys]
        what = f"no {gone[0]!r}, which `{seen}` saw" if gone else f"{new[0]!r}, which `{seen}` did not see"
        raise TreeMismatch(f"{path.code()} has {what}; call `{seen}` again for another model")
    values = dict(zip(keys, ways.read(model, keys), strict=True))
    for key, child in node.live:
        yield key, child, values[key]


def gather_gradients(node: Node, grads: object, path: KeyPath) -> Any:
    """The gradients at the places below `node`, in order: None where there is no step.

    Gradients may stand in any container with the keys of the model. Raises TreeMismatch where they do not
    fit.
    """
    if node.leaf >= 0:
        return [grads]
    if grads is None:
        return [None] * len(node.leaves)
    if (
        node.fetch is not None
        and type(grads) is node.kind
        and len(node.live) == len(node.keys)
        and _sized_like(node, grads)
    ):
        try:
            return node.fetch(grads)
        except (LookupError, AttributeError):
            pass
    if registry.isarray(grads):
        return _bare(node, grads, path)
    if isinstance(grads, Mapping) and any(k not in node.keys for k in grads):
        named = _by_name(node, grads, path)
        if named is not None:
            return named
    found = loose(grads, node.keys, tuple(k for k, c in node.live if not c.again or _has(grads, k)))
    if isinstance(found, str):
        live = [str(k) for k, _ in node.live]
        raise TreeMismatch(
            f"{path.code('grads')} has {found}; it takes the structure of the model, with "
            f"{', '.join(live[:8])}{', ...' if len(live) > 8 else ''}"
        )
    _refuse_frozen(node, grads, path)
    out: list[Any] = []
    for key, child in node.live:
        out.extend(gather_gradients(child, found.get(key), extended(node, path, key)))
    return out


def _has(grads: object, key: object) -> bool:
    """Whether gradients have something under a key."""
    return (
        key in grads
        if isinstance(grads, Mapping)
        else isinstance(grads, list | tuple) or hasattr(grads, str(key))
    )


def _refuse_frozen(node: Node, grads: object, path: KeyPath) -> None:
    """Raise TreeMismatch for the gradient of a parameter that is not trained."""
    if not isinstance(grads, Mapping):
        return
    for key, child in zip(node.keys, node.children, strict=True):
        if child.frozen and grads.get(key) is not None:
            raise TreeMismatch(NOT_TRAINED.format(path.code("grads"), repr(str(key))))


NOT_TRAINED = (
    "{} has a gradient for {}, which the state does not train; it was no trainable parameter at `setup`"
)


def _bare(node: Node, grads: Any, path: KeyPath) -> list[Any]:
    """An array that stands for a container of one."""
    if node.ways is not None and node.ways.bare:
        return [grads]
    raise TreeMismatch(
        f"{path.code('grads')} is an array of shape {tuple(grads.shape)}; the model has a "
        f"{node.kind.__name__ if node.kind else 'container'} there"
    )


def _by_name(node: Node, grads: Mapping[Any, Any], path: KeyPath) -> list[Any] | None:
    """The gradients of a dict whose keys are the names of parameters; None if they are not.

    Names of arrays that are not trained may be there with None, and a tied array may be there once.
    """
    if len(grads) == len(node.names):
        try:
            return [grads[name] for name in node.names]
        except KeyError:
            pass
    if any(k in grads for k, c in node.live if c.leaf < 0):
        return None
    dotted = any("." in name for name in node.names) or (node.ways is not None and node.ways.gradients)
    if not dotted or not any(name in grads for name in node.names):
        return None
    known = set(node.names)
    for key, value in grads.items():
        if key not in known and value is not None:
            raise TreeMismatch(NOT_TRAINED.format(path.code("grads"), repr(key)))
    there = {leaf for leaf, name in zip(node.leaves, node.names, strict=True) if name in grads}
    for leaf, name in zip(node.leaves, node.names, strict=True):
        if leaf not in there:
            raise TreeMismatch(f"{path.code('grads')} has no {name!r} (None means no step there)")
    return [grads.get(name) for name in node.names]


def mirrored(node: Node, values: Sequence[Any]) -> Any:
    """Values for the places below a node, in a plain tree like the model: dicts and lists, and for models
    that name their parameters a dict by name, tied ones once.
    """
    return _mirrored(node, dict(zip(node.names, values, strict=True)), "")


def _mirrored(node: Node, values: dict[str, Any], prefix: str) -> Any:
    if node.leaf >= 0:
        return values[prefix.removesuffix(".")]
    if node.ways is not None and node.ways.gradients is not None:
        first: dict[int, str] = {}
        for name, leaf in zip(node.names, node.leaves, strict=True):
            first.setdefault(leaf, name)
        return {name: values[prefix + name] for name in first.values()}
    inner = {
        k: _mirrored(c, values, f"{prefix}{k}.") if c.leaves else None
        for k, c in zip(node.keys, node.children, strict=True)
    }
    return inner if any(not isinstance(k, int) for k in node.keys) else list(inner.values())


def rebuild(node: Node, model: object, new: dict[int, Any]) -> Any:
    """The model with the leaves in `new` replaced; what holds none of them is the same object as before."""
    memo: dict[int, Any] = {}
    result = _rebuild(node, model, new, memo, None)
    for relink, pairs in _by_relink(memo).items():
        relink(pairs)
    return result


def rebuilt(node: Node, model: object, new: dict[int, Any]) -> tuple[Any, list[Callable[[], Any]]]:
    """(the same in place, what is left to do): containers that can be written are, but not before the rest is
    done, since constructors of those that cannot may raise.
    """
    memo: dict[int, Any] = {}
    writes: list[Callable[[], Any]] = []
    result = _rebuild(node, model, new, memo, writes)
    writes += [functools.partial(relink, pairs) for relink, pairs in _by_relink(memo).items()]
    return result, writes


def _rebuild(
    node: Node,
    model: object,
    new: dict[int, Any],
    memo: dict[int, Any],
    writes: list[Callable[[], Any]] | None,
) -> Any:
    """A part of the model with the leaves in `new` replaced; writing into it is left for later where `writes`
    takes note.
    """
    if node.leaf >= 0:
        x = new.get(node.leaf)
        if x is None:
            return model
        return x if node.axes is None else registry.library(x).permuted(x, node.axes)
    here = id(node.first or node)
    if here not in memo:
        memo[here] = _changed(node, model, new, memo, writes)
    return memo[here]


def _changed(
    node: Node,
    model: object,
    new: dict[int, Any],
    memo: dict[int, Any],
    writes: list[Callable[[], Any]] | None,
) -> Any:
    """A container with the leaves in `new` replaced."""
    assert node.ways is not None
    changes: dict[Any, Any] = {}
    if node.pick is not None:
        try:
            changes = node.pick(new)
        except KeyError:
            changes = {key: new[c.leaf] for key, c in node.live if c.leaf in new}
    else:
        for key, child, value in model_children(node, model, KeyPath(), "setup"):
            if any(i in new for i in child.leaves):
                made = _rebuild(child, value, new, memo, writes)
                if made is not value or writes is None:
                    changes[key] = made
    if not changes:
        return model
    if writes is not None and node.ways.write is not None:
        writes.append(functools.partial(node.ways.write, model, changes))
        return model
    result = node.ways.rebuild(model, changes)
    if result is not model and node.ways.relink is not None:
        memo.setdefault(-1, []).append((node.ways.relink, model, result))
    return result


def _by_relink(memo: dict[int, Any]) -> dict[Any, list[tuple[Any, Any]]]:
    """The (old, new) containers that may hold each other elsewhere than among their children."""
    found: dict[Any, list[tuple[Any, Any]]] = {}
    for relink, old, made in memo.get(-1, ()):
        found.setdefault(relink, []).append((old, made))
    return found


def find(node: Node, key: object) -> Node | None:
    """The child of a node under `key`."""
    for k, child in zip(node.keys, node.children, strict=True):
        if k == key:
            return child
    return None
