"""How are a model and its gradients flattened up to the leaves of a layout?"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimisers.arrays import registry
from optimisers.errors import TreeMismatch
from optimisers.tree.children import container_for, entries, loose
from optimisers.tree.layout import Node, extended
from optimisers.tree.path import Attr, KeyPath


def flatten_up_to(node: Node, model: object, path: KeyPath, seen: str = "setup") -> Any:
    """The arrays of a model at the places below `node`, in order.

    Raises TreeMismatch where the structure is not that which `seen`, the function that made the layout, saw.
    """
    if node.leaf >= 0:
        return [model]
    if node.container is not None and node.container.parameters is not None:
        found = node.container.parameters(model, node, node.names) if type(model) is node.kind else None
        if found is not None:
            return found
    elif (found := _fetched(node, model)) is not None:
        return found
    out: list[Any] = []
    for key, child, value in model_children(node, model, path, seen):
        out.extend(flatten_up_to(child, value, KeyPath(path, key), seen))
    return out


def _fetched(node: Node, obj: Any) -> Any:
    """The children of a container whose children are all leaves, in one call; None where that fails."""
    if node.fetch is None or type(obj) is not node.kind or not _sized_like(node, obj):
        return None
    try:
        return node.fetch(obj)
    except (LookupError, AttributeError):
        return None


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
    flattened.
    """
    if not node.leaves:
        return
    container = container_for(model)
    assert node.kind is not None
    if container is None or (type(model) is not node.kind and not isinstance(model, node.kind)):
        raise TreeMismatch(
            f"{path.code()} is a {type(model).__name__}; `{seen}` saw a {node.kind.__name__}; call `{seen}` "
            "again for another model"
        )
    keys = container.keys(model)
    if keys != node.keys and set(keys) != set(node.keys):
        what = _other_keys(node, keys, seen)
        raise TreeMismatch(f"{path.code()} has {what}; call `{seen}` again for another model")
    values = dict(zip(keys, container.read(model, keys), strict=True))
    for key, child in node.live:
        yield key, child, values[key]


def _other_keys(node: Node, keys: tuple[Any, ...], seen: str) -> str:
    """How the keys of a container differ from those that were flattened."""
    if issubclass(node.kind or object, list | tuple) and not isinstance(node.keys[0], Attr):
        return f"{entries(len(keys))}; `{seen}` saw {len(node.keys)}"
    gone = [k for k in node.keys if k not in keys]
    new = [k for k in keys if k not in node.keys]
    return f"no {gone[0]!r}, which `{seen}` saw" if gone else f"{new[0]!r}, which `{seen}` did not see"


def gradients_up_to(node: Node, grads: object, path: KeyPath) -> Any:
    """The gradients at the places below `node`, in order: None where there is no step.

    Gradients may stand in any container with the keys of the model. Raises TreeMismatch where they do not
    fit.
    """
    if node.leaf >= 0:
        return [grads]
    if grads is None:
        return [None] * len(node.leaves)
    if len(node.live) == len(node.keys) and (found := _fetched(node, grads)) is not None:
        return found
    if registry.isarray(grads):
        return _bare(node, grads, path)
    if isinstance(grads, Mapping) and any(k not in node.keys for k in grads):
        named = _by_name(node, grads, path)
        if named is not None:
            return named
    found = _by_child(node, grads, path)
    out: list[Any] = []
    for key, child in node.live:
        out.extend(gradients_up_to(child, found.get(key), extended(node, path, key)))
    return out


def _by_child(node: Node, grads: object, path: KeyPath) -> dict[Any, Any]:
    """The gradients of the live children, by key."""
    container = container_for(grads)
    whole = container is None or not container.partial
    needed = tuple(k for k, c in node.live if (whole and not c.again) or _has(grads, k))
    found = loose(grads, node.keys, needed)
    if isinstance(found, str):
        live = [str(k) for k, _ in node.live]
        named = isinstance(grads, list | tuple) and node.by_name
        hint = f"; {BY_NAME}" if named else ""
        raise TreeMismatch(
            f"{path.code('grads')} has {found}; it takes the structure of the model, with "
            f"{', '.join(live[:8])}{', ...' if len(live) > 8 else ''}{hint}"
        )
    _refuse_frozen(node, grads, path)
    return found


BY_NAME = (
    "write opt.gradients(module) after backward(), or a dict by the names of named_parameters(): "
    "dict(zip(dict(module.named_parameters()), grads))"
)
"""What to write for a list of gradients of a module, as torch.autograd.grad gives it."""


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
    "{} has a gradient for {}, which the state does not train; it was no trainable parameter at `setup`: "
    "let it be one there, and freeze_ it for as long as it shall wait"
)


def _bare(node: Node, grads: Any, path: KeyPath) -> list[Any]:
    """An array that stands for a container of one."""
    if node.bare:
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
    if not _names_parameters(node, grads):
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


def _names_parameters(node: Node, grads: Mapping[Any, Any]) -> bool:
    """Whether the keys of a dict are names of parameters, rather than the keys of the container."""
    if any(k in grads for k, c in node.live if c.leaf < 0):
        return False
    dotted = node.by_name or any("." in name for name in node.names)
    return dotted and any(name in grads for name in node.names)


def mirrored(node: Node, values: Sequence[Any]) -> Any:
    """Values for the places below a node, in a plain tree like the model: dicts and lists, and for models
    that name their parameters a dict by name, tied ones once.
    """
    return _mirrored(node, dict(zip(node.names, values, strict=True)), "")


def _mirrored(node: Node, values: dict[str, Any], prefix: str) -> Any:
    if node.leaf >= 0:
        return values[prefix.removesuffix(".")]
    if node.by_name:
        first: dict[int, str] = {}
        for name, leaf in zip(node.names, node.leaves, strict=True):
            first.setdefault(leaf, name)
        return {name: values[prefix + name] for name in first.values()}
    inner = {
        k: _mirrored(c, values, f"{prefix}{k}.") if c.leaves else None
        for k, c in zip(node.keys, node.children, strict=True)
    }
    return inner if any(not isinstance(k, int) for k in node.keys) else list(inner.values())
