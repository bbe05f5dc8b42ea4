"""How does a step stand in a graph that `torch.compile` makes? As one operator, which runs the fused kernels.

The compiler sees tensors alone: parameters, gradients, and what a state is made of. The structure of the
state, which it could not look at, has a name; a change of structure (a frozen leaf, another rule) is
another name, and the graph is made anew once. A graph holds names only, and finds the structure that the
state at hand has: it keeps none alive.
"""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree

from optimisers.arrays.registry import Compiler, Hooks
from optimisers.arrays.torch import library as tensors
from optimisers.errors import BadState
from optimisers.state.leaf import Branch, Leaf
from optimisers.state.store import Store
from optimisers.state.structure import Pending, Structure, name, named, shared, structure_of
from optimisers.step.update import evaluated
from optimisers.step.update import update as eager


def looks() -> bool:
    """Whether a graph is being made."""
    return torch.compiler.is_compiling()


def known(store: Store) -> None:
    """Name the structure of a store, now and whenever it changes; capturable ones go into no graph of the
    compiler.
    """
    if not store.capturable:
        store.compiled = _named
        store.changed()


def _named(store: Store) -> Structure:
    """The structure of a store, with its name and the one with a row of scalars for each leaf."""
    structure = structure_of(store)
    if not hasattr(structure, "apart"):
        name(structure)
        rows = [
            dataclasses.replace(g, table=g.table.split_by(np.arange(len(g.leaves)))) for g in store.groups
        ]
        apart = shared(dataclasses.replace(store, groups=rows, compiled=None, structure=None))
        if not hasattr(apart, "apart"):
            name(apart)
            apart.apart, apart.store.compiled = apart, _named
        structure.apart, structure.store.compiled = apart, _named
    return structure


def disabling(disable: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for what the compiler must not look into, with the reason where `disable` takes one: that
    of PyTorch 2.6 and 2.7 does not.
    """
    if "reason" not in inspect.signature(disable).parameters:
        return disable
    return disable(
        reason="setup and update_ work on addresses and run beside the graph; write update for a step inside "
        "it, and give dict(module.named_parameters()) instead of a module"
    )


@disabling(torch.compiler.disable)
def aside(function: Any, *args: Any, **options: Any) -> Any:
    """Call a function beside the graph: a break, where breaks are allowed, else an error of the compiler."""
    return function(*args, **options)


def update(state: Any, model: Any, grads: Any, more: Any, loss: Any) -> Any:
    """`update` as the compiler sees it: for nests of dicts, lists, tuples and NamedTuples; other models, such
    as modules, are stepped beside the graph.
    """
    if not isinstance(state, Branch | Leaf) or more or loss is not None:
        raise BadState("inside torch.compile, update takes (state, model, grads)")
    held, node = state._held, state._node
    structure = held.structure
    arrays = held.arrays if isinstance(held, Pending) else _arrays_of(held)
    leaves, form = pytree.tree_flatten(model)
    at = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and _inexact(x)]
    if len(at) != len(node.leaves):
        return aside(eager, state, model, grads)
    slopes = _slopes_at(at, len(leaves), grads)
    found = step(structure.name, [leaves[i].detach() for i in at], slopes, arrays)
    count = len(found) - len(arrays)
    for i, leaf in zip(at, node.leaves):  # noqa: B905 the compiler knows no strict
        leaves[i] = found[leaf]
    pending = Pending(structure.apart, found[count:])
    new = Leaf(pending, node) if isinstance(state, Leaf) else Branch(pending, node, state._path)
    return new, pytree.tree_unflatten(leaves, form)


def _arrays_of(store: Any) -> list[torch.Tensor]:
    """The arrays of a state, the scalar table of each group behind its slots."""
    if store.structure is None:
        raise BadState(
            "a capturable state is for CUDA graphs; inside torch.compile, write setup without capturable"
        )
    return [
        a
        for g in store.groups
        for a in (
            *[b for p in g.slots for b in p.buffers],
            torch.as_tensor(g.table.values),
            torch.as_tensor(g.table.clock),
        )
    ]


def _slopes_at(at: list[int], count: int, grads: Any) -> list[Any]:
    """The gradients of the leaves at these places of a model of so many."""
    slopes = [g for g in pytree.tree_leaves(grads) if g is None or isinstance(g, torch.Tensor)]
    return [slopes[i] for i in at] if len(slopes) == count else slopes


def _inexact(x: Any) -> bool:
    return x.is_floating_point() or x.is_complex()


SCHEMA = "(str structure, Tensor[] xs, Tensor?[] grads, Tensor[] arrays) -> Tensor[]"
"""What PyTorch infers from the annotations of `step`; that of 2.6 cannot read `list[...]`."""


@torch.library.custom_op("optimisers::step", mutates_args=(), schema=SCHEMA)
def step(
    structure: str,
    xs: list[torch.Tensor],
    grads: list[torch.Tensor | None],
    arrays: list[torch.Tensor],
) -> list[torch.Tensor]:
    """The parameters of every leaf after a step, then the arrays of the state."""
    old = named[structure].filled(arrays)
    node = old.layout.root
    new, changed = evaluated(old, node, xs, [grads])
    first = [node.leaves.index(leaf) for leaf in range(len(old.shapes))]
    out = [changed[i] if i in changed else xs[n].clone() for i, n in enumerate(first)]
    for before, group in zip(old.groups, new.groups, strict=True):
        for slot, was in zip(group.slots, before.slots, strict=True):
            out += [b.clone() if b is a else b for b, a in zip(slot.buffers, was.buffers, strict=True)]
        table = group.table
        out += [tensors.scalars.table(np.asarray(a)[table.row]) for a in table.arrays()]
    return out


@step.register_fake
def _(
    structure: str,
    xs: list[torch.Tensor],
    grads: list[torch.Tensor | None],
    arrays: list[torch.Tensor],
) -> list[torch.Tensor]:
    store = named[structure].store
    node, given = store.layout.root, iter(arrays)
    out = [torch.empty_like(xs[node.leaves.index(leaf)]) for leaf in range(len(store.shapes))]
    for buffers, leaves in named[structure].counts():
        out += [torch.empty_like(next(given)) for _ in range(buffers)]
        table = next(given)
        out += [table.new_empty((leaves, table.shape[1])), next(given).new_empty((leaves,))]
    return out


HOOKS = Hooks(known=known, compiler=Compiler(looks, update, aside))
