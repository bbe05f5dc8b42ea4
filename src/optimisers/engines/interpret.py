"""The definition of correct: a rule's graph, pass by pass, with the array library's own functions, leaf by
leaf.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.memory import shares
from optimisers.arrays.types import promoted, real_of
from optimisers.engines.checks import checked_gradient, checked_x, local_shape
from optimisers.engines.evaluate import evaluate
from optimisers.engines.memory import NOTHING, Spans, looked
from optimisers.engines.task import Engine, Holds, Members, Step
from optimisers.errors import BadState, TraceError
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Outputs, draws, is_input, number_of, outputs, reduce_pass
from optimisers.ops.state import MADE
from optimisers.state.buffers import Separate

NAME = "interpret"


class Values:
    """The arrays of one leaf, node by node, in the type of the arithmetic, or in a type of their own."""

    def __init__(self, step: Step, leaf: int, wide: Any = None) -> None:
        self.step, self.scalars, self.leaf = step, step.scalars, leaf
        self.library = step.library
        self.wide = step.wide if wide is None else wide
        self.real = real_of(self.library, self.wide)
        self.found: dict[int, Any] = {}
        if step.job.traced and step.program.choices:  # what a choice computes is traced once
            self.found = step.found_traced.setdefault((leaf, self.wide), self.found)
        self.seen: list[Any] = []

    def get(self, e: Expr) -> Any:
        """The value of a node of the program; a condition as 0 and 1."""
        return self.value(self.step.program.lowering.value(e, "number"))

    def own(self, name: str, e: Expr, kind: str, domain: str = "array") -> Any:
        """What is stored, in memory of its own: that is done after other arrays have been written."""
        value = self.value(self.step.program.lowering.store(name, e, kind, domain))
        if e.domain == "scalar" or self.step.job.traced or not shares(value, self.seen):
            return value
        return self.library.duplicate(value)

    def value(self, e: Expr) -> Any:
        """The value of a lowered node."""
        return evaluate([e], self.given, self.library, self.wide, self.found, self.operation)[id(e)]

    def given(self, e: Expr) -> Any:
        """An array of this leaf, or one of its scalars."""
        if e.op == "column":
            return self.number(e)
        self.seen.append(input_of(self.step, self.leaf, e.value))
        return self.seen[-1]

    def number(self, column: Expr) -> Any:
        """A scalar as the kernels see it: rounded once to the type of the arithmetic."""
        value = self.scalars.of_leaves(column.value)[self.leaf]
        dtype = self.wide if column.type == "complex" else self.real
        if registry.library_of(type(value)) is self.library and self.step.abstract:
            return self.library.cast(value, dtype)
        return self.library.scalars.number(value, dtype)

    def operation(self, name: str) -> Callable[..., Any]:
        """A function of the library that says where it was called if it raises."""
        function = self.library.operations[name]
        if name == "call":
            return function
        if name == "random_word":
            return functools.partial(random_word, self.step, self.leaf)
        if name in MADE:
            return functools.partial(function, self.step.xs[self.leaf], dtype=self.real)

        def computed(*args: Any, **options: Any) -> Any:
            try:
                return function(*args, **options)
            except (ValueError, RuntimeError, TypeError) as error:
                shapes = " and ".join(str(np.shape(a)) for a in args)
                rule = type(self.step.job.group.rule).__name__
                raise TraceError(
                    f"{rule}: {name} of arrays of shape {shapes}: {error}, at "
                    f"{self.step.code(self.leaf, 'model')}"
                ) from error

        return computed


def random_word(step: Step, leaf: int, *given: Any, **which: int) -> Any:
    """Random bits for every element of a leaf; where it is part of one that is spread, those of the whole."""
    function, x = step.library.operations["random_word"], step.xs[leaf]
    if step.spread is None:
        return function(x, *given, **which)
    part = step.spread.parts[leaf]
    return part.local(function(part.whole(x), *given, **which))


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
    if step.job.traced:
        step.shapes = [local_shape(step, i) for i in leaves]
        if draws(step.program) and list(step.shapes) != list(step.job.subset.places.shapes):
            raise BadState(
                f"{type(step.job.group.rule).__name__} draws random numbers, inside a map over shards, where "
                "none of them knows its place in the whole; take the step outside it, in jax.jit alone"
            )
    xs = [checked_x(step, i) for i in leaves]
    step.grads = tuple([checked_gradient(step, order, i) for i in leaves] for order in range(len(step.grads)))
    step.xs = xs


def reduce(step: Step, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any]:
    """The wanted reductions of a level, leaf by leaf."""
    chosen = [r for r, w in zip(step.stages[level].reductions, wanted, strict=True) if w]
    found: dict[Expr, list[Any]] = {r: [] for r in chosen}
    p, library = reduce_pass(step.program, level, wanted), step.library
    exact = promoted(library, step.wide, ["float64"]) if p is not None and p.exact else None
    for leaf in range(step.leaves):
        arrays, others = Values(step, leaf, exact), Values(step, leaf)
        for r in chosen:
            values = arrays if r.args[0].domain == "array" else others
            value = library.operations[r.op](values.get(r.args[0]))
            found[r].append(library.shards.across(r.op, value, step.xs[leaf]))
    if step.job.traced:
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
    values, program = Values(step, leaf), step.program
    x = None if out.x is None or is_input(out.x, "x") else values.own("x", out.x, program.type)
    if x is not None:
        step.fitting(x, step.shapes[leaf], leaf, "a step")
    return x, [
        None
        if is_input(e, s.name)
        else step.fitting(
            values.own(s.name, e, s.type, "array" if s.shape is None else "free"),
            p.places.shapes[leaf],
            leaf,
            "a state",
        )
        for e, s, p in zip(out.slots, program.slots, step.slots, strict=True)
    ]


def store(step: Step, new: dict[int, tuple[Any, list[Any]]]) -> None:
    """Write what was computed."""
    for leaf, (x, slots) in new.items():
        for slot, old, value in zip(step.out, step.slots, slots, strict=True):
            if value is not None:
                slot.put(leaf, value)
            elif slot is not old and not isinstance(slot, Separate):
                slot.put(leaf, old[leaf])
        if x is not None:
            was, library = step.xs[leaf], step.library
            if step.job.inplace:
                library.stored(was, x, inplace=True)
            else:
                step.new[leaf] = (
                    library.rounded(was, x) if step.job.traced else library.stored(was, x, inplace=False)
                )


def spans(step: Step) -> Spans:
    """The memory of parameters and state."""
    return NOTHING if step.job.traced else looked(step.library, step.xs, step.out, step.job.subset)


ENGINE = Engine(NAME, lambda _: "", begin, reduce, prepare, spans)
"""Runs any program on any array library."""
