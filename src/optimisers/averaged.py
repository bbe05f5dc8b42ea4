"""The parameters that a rule would evaluate with: in a model of their own, or for a while in the model."""

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

from optimisers.arrays import registry
from optimisers.engines.signals import held
from optimisers.errors import BadState, NoMatch
from optimisers.ops.state import copy
from optimisers.state.edit import present
from optimisers.state.leaf import Branch, Leaf, parts
from optimisers.state.select import leaves_of
from optimisers.state.store import Store
from optimisers.tree.flatten import flatten_model
from optimisers.tree.flatten_up_to import flatten_up_to, model_children
from optimisers.tree.layout import Node
from optimisers.tree.path import KeyPath
from optimisers.tree.rebuild import rebuild, rebuilt


def averaged(state: object, model: object = None) -> Any:
    """The model with the parameters to evaluate with: for every rule that keeps such (EMA, SWA, ScheduleFree,
    Lookahead, ...) what its `evaluate(state, x)` gives; the model stays as it was.

    For a `TorchOptimizer` the model may be a module that has its parameters, or be left out: then the
    averages come in a dict by name. For a state of `as_optax` it is the pytree of parameters. What is no
    parameter, and parameters whose rule keeps no average, are shared with the model. Raises NoMatch if no
    rule does.
    """
    trained = _trained(state, model)
    new = _averages(trained)
    if model is None or trained.holder is model:
        return rebuild(trained.node, model if model is not None else trained.holder, new)
    if trained.back is not None:
        return trained.back(rebuild(trained.node, trained.holder, new))
    node, leaf_of = _within(trained, model)
    return rebuild(node, model, {i: new[leaf] for i, leaf in leaf_of.items() if leaf in new})


@contextlib.contextmanager
def averaged_(state: object, model: object = None) -> Generator[Any, None, None]:
    """For the time of a block the parameters themselves hold what `averaged` gives: evaluate inside, and save
    the model. Behind it they are what they were, bit for bit, also after an exception.

    `with averaged_(optimizer):`, or `with averaged_(state, model):`.

    Only parameters are written, at every place of a tie; the mode of a module, train or eval, is yours. Of
    the model that is given, buffers and variables that are no parameters are put back behind the block too:
    so statistics of batches may be worked out anew inside, by `torch.optim.swa_utils.update_bn(batches,
    module)`. With a `TorchOptimizer` the model may be left out, or be a module with some of its parameters,
    which alone are then written. `as` gives the model.

    For arrays of NumPy, PyTorch and CuPy, and modules of Flax NNX. Raises BadState for arrays that cannot be
    written, such as those of JAX elsewhere: there `averaged(state, model)` is the way. Inside, a step,
    another average and whatever saves the state raise BadState: the parameters are not those that they belong
    to. Raises NoMatch if no rule keeps an average.
    """
    trained = _trained(state, model)
    new, old = _averages(trained), trained.arrays()
    node: Node | None = trained.node
    if model is None or trained.back is not None:
        node = None
    elif trained.holder is not model:
        node, leaf_of = _within(trained, model)
        new = {leaf: new[leaf] for leaf in leaf_of.values() if leaf in new}
    enter = _writes(trained, old, new)
    before = {i: registry.library(old[i]).duplicate(old[i]) for i in new}
    leave = [*_writes(trained, old, before), *([] if node is None else _beside(node, model))]
    end = trained.store.lend()
    try:
        with held():
            _run(enter)
        yield model
    finally:
        try:
            with held():
                _run(leave)
        finally:
            end()


class _Trained(NamedTuple):
    """The parameters of a state, and where they are."""

    store: Store
    node: Node
    path: KeyPath
    leaves: list[int]
    holder: Any
    """The model, or a dict of its parameters."""
    back: Callable[[Mapping[str, Any]], Any] | None = None
    """What makes the model of such a dict, where nothing else of it is to be looked for."""

    def arrays(self) -> dict[int, Any]:
        """The array at the first place of each leaf."""
        xs = flatten_up_to(self.node, self.holder, self.path)
        return dict(zip(reversed(self.node.leaves), reversed(xs), strict=True))


def _trained(state: object, model: object) -> _Trained:
    """The parameters of a state, whatever it is that has one."""
    optimizer = not isinstance(state, Leaf | Branch) and hasattr(state, "parameters")
    if model is None and not optimizer:
        parts(state)  # which says what else is wrong
        raise BadState("the model is missing; write averaged(state, model)")
    tree = getattr(state, "tree", state) if optimizer else state
    store, node, path = parts(tree)
    store.refuse_lent("averaged")
    leaves, holder, back = leaves_of(tree), model, None
    if optimizer:
        holder = getattr(state, "parameters")  # noqa: B009 of whatever class
    elif (flattened := getattr(type(tree), "flattened", None)) is not None:
        holder, back = flattened(tree, model)
    return _Trained(store, node, path, leaves, holder, back)


def _averages(trained: _Trained) -> dict[int, Any]:
    """The parameters to evaluate with, of each leaf whose rule keeps such."""
    store, at = trained.store, trained.arrays()
    new: dict[int, Any] = {}
    rules: dict[tuple[int, int], Any] = {}
    for leaf in trained.leaves:
        group, i = store.where(leaf)
        library, x, row = group.kind.library, at[leaf], (id(group), int(group.table.row[i]))
        if row not in rules:  # leaves of one row have one rule and one clock
            rules[row] = present(group, i)
        part = group.parts[i] if group.parts and group.parts[i].inside is not None else None
        own = copy(x) if part is None else part.cut(x)
        value = rules[row].evaluate(group.state_of(i), own if part is None else part.whole(copy(own)))
        if value is not None and part is not None:
            value = part.gathered(value)
        if value is not None:
            new[leaf] = library.like(x, library.copied(value, group.kind.dtype))
    if not new:
        raise NoMatch("no rule here keeps an average; write setup(EMA(rule), model)")
    return new


def _within(trained: _Trained, model: object) -> tuple[Node, dict[int, int]]:
    """(the walk over a model, the leaf of each of its arrays) where it has parameters of an optimiser."""
    leaf_of = {id(x): leaf for leaf, x in trained.arrays().items()}
    layout, arrays = flatten_model(model)
    found = {i: leaf_of[id(x)] for i, x in enumerate(arrays) if id(x) in leaf_of}
    if not found:
        raise NoMatch("the model has no parameter of this optimiser; give the module that it trains")
    return layout.root, found


def _writes(trained: _Trained, old: Mapping[int, Any], new: Mapping[int, Any]) -> list[Callable[[], Any]]:
    """What writes new values into the parameters; raises BadState, naming it, for one that cannot be
    written.
    """
    fixed = {i: value for i, value in new.items() if registry.library(old[i]).immutable}
    made, writes = rebuilt(trained.node, trained.holder, fixed) if fixed else (trained.holder, [])
    stuck = [*fixed] if made is not trained.holder or (fixed and trained.back is not None) else []
    stuck += [i for i in new if i not in fixed and not registry.library(old[i]).is_writable(old[i])]
    if stuck:
        name, library = trained.store.layout.paths[stuck[0]].code(), registry.library(old[stuck[0]]).name
        raise BadState(
            f"{name} is an array of {library} that averaged_ cannot write; write averaged(state, model), "
            "which makes a model of its own"
        )
    return [
        *(
            functools.partial(registry.library(old[i]).assign, old[i], value)
            for i, value in new.items()
            if i not in fixed
        ),
        *writes,
    ]


def _beside(node: Node, model: Any) -> list[Callable[[], Any]]:
    """What puts back buffers, and variables that are no parameters, of the modules in a model."""
    if node.container is None:
        return []
    if node.container.beside is not None:
        return [functools.partial(b.write, _before(b.value)) for b in node.container.beside(model)]
    below = [_beside(child, value) for _, child, value in model_children(node, model, KeyPath(), "setup")]
    return [put_back for found in below for put_back in found]


def _before(value: Any) -> Any:
    """A value as it is now, whatever is written into it."""
    return registry.library(value).duplicate(value) if registry.isarray(value) else value


def _run(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()
