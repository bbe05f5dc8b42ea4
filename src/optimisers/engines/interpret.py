"""The definition of correct: a rule's graph, pass by pass, with the array library's own functions, leaf by
leaf.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.engines.checks import checked_gradient, checked_x, local_shape
from optimisers.engines.memory import NOTHING, Spans, looked
from optimisers.engines.task import Engine, Holds, Members, Step
from optimisers.errors import TraceError
from optimisers.graph.expr import Expr, order
from optimisers.graph.passes import Outputs, is_input, number_of, outputs, reduce_pass
from optimisers.state.buffers import Loose

NAME = "interpret"

_CONDITIONS = frozenset({"logical_and", "logical_or", "logical_not", "where", "call", "reshape", "transpose"})
"""Words that leave conditions as they are; for all others they count as 0 and 1."""


class Values:
    """The arrays of one leaf, node by node, in the type of the arithmetic, or in a type of their own."""

    def __init__(self, step: Step, leaf: int, wide: Any = None) -> None:
        self.step, self.scalars, self.leaf = step, step.scalars, leaf
        self.library = step.library
        self.wide = step.wide if wide is None else wide
        self.real = self.library.real_of(self.wide)
        self.found: dict[int, Any] = {}
        self.seen: list[Any] = []

    def get(self, e: Expr) -> Any:
        if e.domain == "scalar":
            return self.number(e)
        for node in order([e], self.found):
            if node.domain != "scalar":
                self.found[id(node)] = self.compute(node)
        return self.found[id(e)]

    def own(self, e: Expr) -> Any:
        """The value of a node in memory of its own: it is stored after other arrays have been written."""
        value = self.get(e)
        if e.domain == "scalar" or self.step.job.symbolic or not self.library.shares(value, self.seen):
            return value
        return self.library.duplicate(value)

    def number(self, e: Expr) -> Any:
        """A scalar as the kernels see it: rounded once to the type of the arithmetic."""
        value = self.scalars.of_leaves(e)[self.leaf] if e.op != "const" else e.value
        dtype = self.wide if e.type == "complex" else self.real
        if registry.library_of(type(value)) is self.library and self.step.blind:
            return value if e.type == "bool" else self.library.cast(value, dtype)
        return np.bool_(value) if e.type == "bool" else self.library.number(value, dtype)

    def compute(self, e: Expr) -> Any:
        if e.op == "input":
            self.seen.append(input_of(self.step, self.leaf, e.value))
            return self.library.cast(self.seen[-1], self.wide if e.type == "complex" else self.real)
        if e.op == "const":
            return e.value
        args = [self.number(a) if a.domain == "scalar" else self.found[id(a)] for a in e.args]
        if e.op not in _CONDITIONS:
            args = [
                self.library.cast(a, self.real) if n.type == "bool" else a
                for a, n in zip(args, e.args, strict=True)
            ]
        options = dict(e.options)
        word = self.library.operations[e.op]
        if e.op == "call":
            return word(options["function"], *args)
        try:
            return word(*args, **options)
        except (ValueError, RuntimeError, TypeError) as error:
            shapes = " and ".join(str(np.shape(a)) for a in args)
            raise TraceError(
                f"{type(self.step.job.group.rule).__name__}: {e.op} of arrays of shape {shapes}: {error}, at "
                f"{self.step.code(self.leaf, 'model')}"
            ) from error


def input_of(step: Step, leaf: int, name: str) -> Any:
    """The array that an input of the program stands for."""
    if name == "x":
        return step.xs[leaf]
    if name.startswith("d"):
        return step.grads[number_of(name)][leaf]
    return step.slots[number_of(name)][leaf]


# -- the engine ----------------------------------------------------------------------------------------------


def begin(step: Step) -> None:
    """Check every array: here all of them are used as they are."""
    leaves = range(step.leaves)
    if step.job.symbolic:
        step.shapes = [local_shape(step, i) for i in leaves]
    xs = [checked_x(step, i) for i in leaves]
    step.grads = tuple([checked_gradient(step, order, i) for i in leaves] for order in range(len(step.grads)))
    step.xs = xs


def reduce(step: Step, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any]:
    """The wanted reductions of a level, leaf by leaf."""
    chosen = [r for r, w in zip(step.stages[level].reductions, wanted, strict=True) if w]
    found: dict[Expr, list[Any]] = {r: [] for r in chosen}
    p, library = reduce_pass(step.program, level, wanted), step.library
    exact = library.promoted(step.wide, ["float64"]) if p is not None and p.exact else None
    for leaf in range(step.leaves):
        arrays, others = Values(step, leaf, exact), Values(step, leaf)
        for r in chosen:
            values = arrays if r.args[0].domain == "array" else others
            value = library.operations[r.op](values.get(r.args[0]))
            found[r].append(library.across(r.op, value, step.xs[leaf]))
    if step.job.symbolic:
        return {r: library.stacked(v) for r, v in found.items()}
    kinds = {r: complex if r.type == "complex" else float for r in chosen}
    return {r: np.array([library.to_host(x) for x in v], kinds[r]) for r, v in found.items()}


def prepare(step: Step, holds: Holds, members: Members) -> Callable[[], None]:
    """Compute everything before anything is written, since an operation of the array library may raise."""
    out = outputs(step.program, holds)
    new = {i: leaf_outputs(step, i, out) for i in every(step, members)}
    if step.job.inplace:
        for i, (x, slots) in new.items():
            if x is not None and not step.library.is_writable(step.xs[i]):
                step.new[i] = step.library.stored(step.xs[i], x, inplace=True)
                new[i] = None, slots
    return functools.partial(store, step, new)


def every(step: Step, members: Members) -> list[int]:
    """The numbers of some leaves of a step; None stands for all."""
    return list(range(step.leaves)) if members is None else members.tolist()


def leaf_outputs(step: Step, leaf: int, out: Outputs) -> tuple[Any, list[Any]]:
    """(new parameters, new state arrays) of a leaf; None for what stays."""
    values = Values(step, leaf)
    x = None if out.x is None or is_input(out.x, "x") else values.own(out.x)
    if x is not None:
        step.fitting(x, step.shapes[leaf], leaf, "a step")
    return x, [
        None if is_input(e, s.name) else step.fitting(values.own(e), p.places.shapes[leaf], leaf, "a state")
        for e, s, p in zip(out.slots, step.program.slots, step.slots, strict=True)
    ]


def store(step: Step, new: dict[int, tuple[Any, list[Any]]]) -> None:
    """Write what was computed."""
    for leaf, (x, slots) in new.items():
        for pack, old, value in zip(step.out, step.slots, slots, strict=True):
            if value is not None:
                pack.put(leaf, value)
            elif pack is not old and not isinstance(pack, Loose):
                pack.put(leaf, old[leaf])
        if x is not None:
            was, library = step.xs[leaf], step.library
            if step.job.inplace:
                library.stored(was, x, inplace=True)
            else:
                step.new[leaf] = (
                    library.rounded(was, x) if step.job.symbolic else library.stored(was, x, inplace=False)
                )


def spans(step: Step) -> Spans:
    """The memory of parameters and state."""
    return NOTHING if step.job.symbolic else looked(step.library, step.xs, step.out, step.job.subset)


ENGINE = Engine(NAME, lambda _: "", begin, reduce, prepare, spans)
"""Runs any program on any array library."""
