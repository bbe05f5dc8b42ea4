"""How is a model made with new arrays in place of its old ones?"""

import functools
from collections.abc import Callable
from typing import Any

from optimisers.arrays import registry
from optimisers.tree.flatten_up_to import model_children
from optimisers.tree.layout import Node
from optimisers.tree.path import KeyPath


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
    assert node.container is not None
    changes: dict[Any, Any] = {}
    if node.pick is not None:
        changes = _picked(node, new)
    else:
        for key, child, value in model_children(node, model, KeyPath(), "setup"):
            if any(i in new for i in child.leaves):
                made = _rebuild(child, value, new, memo, writes)
                if made is not value or writes is None:
                    changes[key] = made
    if not changes:
        return model
    if writes is not None and node.container.write is not None:
        writes.append(functools.partial(node.container.write, model, changes))
        return model
    result = node.container.rebuild(model, changes)
    if result is not model and node.container.relink is not None:
        memo.setdefault(-1, []).append((node.container.relink, model, result))
    return result


def _picked(node: Node, new: dict[int, Any]) -> dict[Any, Any]:
    """The new arrays of a container whose children are all leaves, by key."""
    assert node.pick is not None
    try:
        return node.pick(new)
    except KeyError:
        return {key: new[c.leaf] for key, c in node.live if c.leaf in new}


def _by_relink(memo: dict[int, Any]) -> dict[Any, list[tuple[Any, Any]]]:
    """The (old, new) containers that may hold each other elsewhere than among their children."""
    found: dict[Any, list[tuple[Any, Any]]] = {}
    for relink, old, made in memo.get(-1, ()):
        found.setdefault(relink, []).append((old, made))
    return found
