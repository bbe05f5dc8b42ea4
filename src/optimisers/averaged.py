"""The model with the parameters that its rule would evaluate with."""

from collections.abc import Sequence
from typing import Any

from optimisers.errors import NoMatch
from optimisers.ops.state import copy
from optimisers.state.edit import present
from optimisers.state.leaf import Branch, Leaf, parts
from optimisers.state.select import leaves_of
from optimisers.state.store import Store
from optimisers.tree.gather import gather
from optimisers.tree.layout import Node
from optimisers.tree.rebuild import rebuild
from optimisers.tree.walk import survey


def averaged(state: object, model: object = None) -> Any:
    """The model with the parameters to evaluate with: for every rule that keeps such (EMA, SWA, ScheduleFree,
    Lookahead, ...) what its `evaluate(state, x)` gives; the model stays as it was.

    For a `TorchOptimizer` the model may be a module that has its parameters, or be left out: then the
    averages come in a dict by name. Parameters whose rule keeps none are shared with the model. Raises
    NoMatch if no rule does.
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
    """The parameters to evaluate with, of each leaf whose rule keeps such."""
    at = dict(zip(reversed(node.leaves), reversed(xs), strict=True))
    new: dict[int, Any] = {}
    for leaf in leaves:
        group, i = store.where(leaf)
        library, x = group.kind.library, at[leaf]
        rule = present(group, i, group.rule_of(i))
        value = rule.evaluate(group.state_of(i), copy(x))
        if value is not None:
            new[leaf] = library.like(x, library.copied(value, group.kind.dtype))
    if not new:
        raise NoMatch("no rule here keeps an average; write setup(EMA(rule), model)")
    return new
