"""The model with the moving averages of its parameters."""

from collections.abc import Sequence
from typing import Any

from optimisers.compose.average import AverageState
from optimisers.errors import NoMatch
from optimisers.nest import entries
from optimisers.state.leaf import Branch, Leaf, parts
from optimisers.state.select import leaves_of
from optimisers.state.store import Store
from optimisers.tree.gather import gather
from optimisers.tree.layout import Node
from optimisers.tree.rebuild import rebuild
from optimisers.tree.walk import survey


def averaged(state: object, model: object = None) -> Any:
    """The model with the moving averages that `EMA` keeps in place of its parameters; the model stays as it
    was.

    For a `TorchOptimizer` the model may be a module that has its parameters, or be left out: then the
    averages come in a dict by name. Parameters whose rule keeps no average are shared with the model. Raises
    NoMatch if none does.
    """
    given = None if isinstance(state, Leaf | Branch) else getattr(state, "parameters", None)
    if given is None:
        store, node, path = parts(state)
        return rebuild(node, model, _averages(store, node, gather(node, model, path), leaves_of(state)))
    tree: Any = getattr(state, "tree", state)
    store, node, path = parts(tree)
    new = _averages(store, node, gather(node, given, path), leaves_of(tree))
    if model is None:
        return rebuild(node, given, new)
    of_parameter = {id(x): leaf for leaf, x in zip(node.leaves, gather(node, given, path), strict=True)}
    layout, arrays = survey(model)
    mine = {i: of_parameter.get(id(x), -1) for i, x in enumerate(arrays)}
    found = {i: new[leaf] for i, leaf in mine.items() if leaf in new}
    if not found:
        raise NoMatch("the model has no parameter of this optimiser; give the module that it trains")
    return rebuild(layout.root, model, found)


def _averages(store: Store, node: Node, xs: Sequence[Any], leaves: Sequence[int]) -> dict[int, Any]:
    """The average of each leaf that has one."""
    at = dict(zip(reversed(node.leaves), reversed(xs), strict=True))
    new: dict[int, Any] = {}
    for leaf in leaves:
        group, i = store.where(leaf)
        kept = _path_of_average(group.program.template)
        slot = next((j for j, s in enumerate(group.program.slots) if s.path == kept), None)
        if slot is not None:
            library = group.kind.library
            new[leaf] = library.like(at[leaf], library.copied(group.slots[slot][i], group.kind.dtype))
    if not new:
        raise NoMatch("no rule here keeps an average; write setup(EMA(rule), model)")
    return new


def _path_of_average(state: object, path: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """Where in a state the first moving average of the parameters stands."""
    if isinstance(state, AverageState):
        return (*path, "average")
    found = (_path_of_average(item, (*path, key)) for key, item in entries(state))
    return next((p for p in found if p is not None), None)
