"""The model with the moving averages of its parameters."""

from typing import Any

from optimisers.compose.average import AverageState
from optimisers.errors import NoMatch
from optimisers.nest import entries
from optimisers.state.leaf import parts
from optimisers.state.select import leaves_of
from optimisers.tree.gather import gather
from optimisers.tree.rebuild import rebuild


def averaged(state: object, model: object) -> Any:
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


def _path_of_average(state: object, path: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """Where in a state the first moving average of the parameters stands."""
    if isinstance(state, AverageState):
        return (*path, "average")
    found = (_path_of_average(item, (*path, key)) for key, item in entries(state))
    return next((p for p in found if p is not None), None)
