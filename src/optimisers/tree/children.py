"""How is a container read and made anew? One table: type -> its keys, its children, its rebuilding."""

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from optimisers.arrays import registry
from optimisers.tree.path import Attr


@dataclasses.dataclass(frozen=True)
class Container:
    """The registry entry of one kind of container: how it is read and made anew."""

    keys: Callable[[Any], tuple[Any, ...]]
    """The keys of its children, in order; `Attr` for those read as attributes."""
    read: Callable[[Any, tuple[Any, ...]], Iterable[Any]]
    """The children under these keys."""
    rebuild: Callable[[Any, dict[Any, Any]], Any]
    """A new container like the old one, with some children replaced."""
    trainable: tuple[str, ...] | None = None
    """The keys that may be trained; None for all."""
    parameters: Callable[[Any, Any, list[str]], list[Any] | None] | None = None
    """A faster way to the arrays at all places below: of a container, its node, and their names."""
    gradients: Callable[[Any], dict[str, Any]] | None = None
    """The gradients that the container itself keeps, by name."""
    bare: bool = False
    """Whether it is but the wrapper of one array: then it is no key of a path, and a gradient may be bare."""
    shared: bool = False
    """Whether an object that stands at two places is one, and so are its arrays, of whatever library."""
    direct: bool = True
    """Whether children may be read by item or attribute, past `read`."""
    write: Callable[[Any, dict[Any, Any]], Any] | None = None
    """Replaces children in the container itself, for a step in place; None where a new one is made."""
    relink: Callable[[list[tuple[Any, Any]]], None] | None = None
    """Told all (old, new) containers of a rebuilt model, to replace what else they hold of each other."""
    partial: bool = False
    """Whether gradients in such a container may lack children, where there is no step."""
    beside: "Callable[[Any], list[Beside]] | None" = None
    """What such a container has beside parameters that a call of it may change, at every depth."""
    value_and_grad: Callable[..., Any] | None = None
    functional: Callable[..., Any] | None = None
    """Value and gradients of a loss: of (loss, container, arguments, has_aux)."""


class Beside(NamedTuple):
    """An array that a model holds and does not train: a buffer, a statistic, a key of random numbers."""

    path: tuple[Any, ...]
    value: Any
    write: Callable[[Any], None]
    """Puts another value in its place."""
    lasting: bool = True
    """Whether it is saved with the model."""


# -- the built-in kinds --------------------------------------------------------------------------------------


def _read_items(obj: Any, keys: tuple[Any, ...]) -> Iterable[Any]:
    return [obj[k] for k in keys]


def _read_attributes(obj: object, keys: tuple[Any, ...]) -> Iterable[Any]:
    return [getattr(obj, k) for k in keys]


def _with_items(old: Any, changes: dict[Any, Any]) -> Any:
    """A dict or list, or a subclass with its own attributes, with items replaced; order kept."""
    if type(old) is dict:
        return {**old, **changes}
    new = copy.copy(old)
    for key, value in changes.items():
        new[key] = value
    return new


def _with_tuple_items(old: Any, changes: dict[Any, Any]) -> Any:
    items = [changes.get(i, v) for i, v in enumerate(old)]
    return tuple(items) if type(old) is tuple else type(old)(items)


def _with_fields(old: Any, changes: dict[Any, Any]) -> Any:
    return old._replace(**{str(k): v for k, v in changes.items()})


def _with_attributes(old: object, changes: dict[Any, Any]) -> Any:
    """A copy with attributes replaced, past `__init__` and `__setattr__`: frozen classes and non-init fields
    work.
    """
    new = copy.copy(old)
    for key, value in changes.items():
        object.__setattr__(new, key, value)
    return new


def _always(names: tuple[Any, ...], _: object) -> tuple[Any, ...]:
    return names


def _attributes(obj: object) -> tuple[Any, ...]:
    return tuple(map(Attr, vars(obj)))


def _indices(obj: Any) -> tuple[Any, ...]:
    return tuple(range(len(obj)))


DICT = Container(tuple, _read_items, _with_items)
LIST = Container(_indices, lambda obj, _: list(obj), _with_items)
TUPLE = Container(_indices, lambda obj, _: list(obj), _with_tuple_items)
NAMEDTUPLE = Container(lambda obj: tuple(map(Attr, obj._fields)), lambda obj, _: list(obj), _with_fields)
DATACLASS = Container(
    lambda obj: tuple(Attr(f.name) for f in dataclasses.fields(obj) if hasattr(obj, f.name)),
    _read_attributes,
    _with_attributes,
)
ATTRS = Container(
    lambda obj: tuple(Attr(a.name) for a in type(obj).__attrs_attrs__ if hasattr(obj, a.name)),
    _read_attributes,
    _with_attributes,
)

REGISTERED: dict[type, Container] = {}
"""Classes that were registered by hand; looked up along the method resolution order, before the built-in
kinds.
"""


def register(
    cls: type | None = None,
    *,
    children: tuple[str, ...] | None = None,
    trainable: tuple[str, ...] | None = None,
) -> Any:
    """Make a class a container, whose `children` (attribute names) are walked; usable as a decorator.

    Without `children`: the fields of a dataclass or attrs class, else all instance attributes. Of these only
    the `trainable` ones are stepped; None for all. Attributes that are not children are never looked at, and
    survive. Raises TypeError if `cls` is not a class.
    """
    if cls is None:
        return lambda c: register(c, children=children, trainable=trainable)
    if not isinstance(cls, type):
        raise TypeError(f"register takes a class; {cls!r} is not one")
    like = DATACLASS if dataclasses.is_dataclass(cls) else ATTRS if hasattr(cls, "__attrs_attrs__") else None
    if children is not None:
        names = tuple(map(Attr, children))
        keys = functools.partial(_always, names)
    else:
        keys = _attributes if like is None else like.keys
    REGISTERED[cls] = Container(keys, _read_attributes, _with_attributes, trainable)
    return cls


def container_for(obj: object) -> Container | None:
    """The registry entry of the container `obj`, or None if it is not one."""
    found = container_of(type(obj))
    return found if found is not None else registry.registered_elsewhere(obj)


@functools.lru_cache(maxsize=4096)
def _foreign_or_builtin(kind: type) -> Container | None:
    for base in kind.__mro__:
        name = registry.container_module(base.__module__.partition(".")[0])
        if name is not None and (found := importlib.import_module(name).container_of(kind)) is not None:
            return found
    return _builtin(kind)


def container_of(kind: type) -> Container | None:
    """The registry entry of the containers of this type, or None if they are not."""
    for base in kind.__mro__:
        if base in REGISTERED:
            return REGISTERED[base]
    return _foreign_or_builtin(kind)


def _builtin(kind: type) -> Container | None:
    for base, container in ((dict, DICT), (list, LIST)):
        if issubclass(kind, base):
            return container
    if issubclass(kind, tuple):
        return NAMEDTUPLE if hasattr(kind, "_fields") else TUPLE
    if dataclasses.is_dataclass(kind):
        return DATACLASS
    return ATTRS if hasattr(kind, "__attrs_attrs__") else None


def loose(obj: object, keys: tuple[Any, ...], needed: tuple[Any, ...]) -> dict[Any, Any] | str:
    """The children of a gradient by key, whatever container it is; or a sentence that says what is wrong.

    A gradient may be a mapping, an object with attributes, or a sequence in the order of `keys`. It must have
    every key that is `needed` (None for "no step") and none that is not among `keys`.
    """
    if isinstance(obj, Mapping):
        return _by_key(obj, keys, needed)
    named = all(isinstance(k, str) for k in keys)
    if isinstance(obj, tuple | list) and not (named and hasattr(obj, "_fields")):
        return _by_place(list(obj), keys, type(obj).__name__)
    return _by_attribute(obj, needed if named else (), needed)


def _by_key(obj: Mapping[Any, Any], keys: tuple[Any, ...], needed: tuple[Any, ...]) -> dict[Any, Any] | str:
    """The entries of a mapping."""
    extra = [k for k in obj if k not in keys]
    missing = [k for k in needed if k not in obj]
    if extra or missing:
        return f"{extra[0]!r}, which is not in the model" if extra else _absent(missing[0])
    return {k: obj[k] for k in needed}


def _by_attribute(obj: object, names: tuple[Any, ...], needed: tuple[Any, ...]) -> dict[Any, Any] | str:
    """The children of a container of any kind, or the attributes `names` of an object."""
    container = container_for(obj)
    if container is not None and (own := container.keys(obj)) and set(needed) <= set(own):
        return dict(zip(own, container.read(obj, own), strict=True))
    there = [k for k in names if hasattr(obj, k)]
    if not there and container is None:
        return f"a {type(obj).__name__} where a container stands"
    missing = [k for k in needed if k not in there]
    return _absent(missing[0]) if missing else {k: getattr(obj, k) for k in needed}


def _by_place(items: list[Any], keys: tuple[Any, ...], kind: str) -> dict[Any, Any] | str:
    """The entries of a sequence by key: for the fields of a class their order is declared, for a dict it is
    not.
    """
    if any(not isinstance(k, int | Attr) for k in keys):
        return f"a {kind} where a dict stands, and its order might be another"
    if len(items) != len(keys):
        return f"{entries(len(items))}, not {len(keys)}"
    return dict(zip(keys, items, strict=True))


def entries(count: int) -> str:
    """`1 entry`, `2 entries`."""
    return f"{count} entr{'y' if count == 1 else 'ies'}"


def _absent(key: object) -> str:
    return f"no {str(key) if isinstance(key, Attr) else key!r} (None means no step there)"
