"""The definition of correct: a rule's graph, pass by pass, with the array library's own functions, leaf by
leaf.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.engines.task import Job, Result, Task
from optimisers.errors import TraceError
from optimisers.graph.expr import Expr, order
from optimisers.graph.passes import is_input, number_of, outputs, reduce_pass
from optimisers.state.buffers import Indices, Loose

NAME = "interpret"

_CONDITIONS = frozenset({"logical_and", "logical_or", "logical_not", "where", "call", "reshape", "transpose"})
"""Words that leave conditions as they are; for all others they count as 0 and 1."""


class Values:
    """The arrays of one leaf, node by node, in the type of the arithmetic, or in a type of their own."""

    def __init__(self, task: Task, leaf: int, wide: Any = None) -> None:
        self.job, self.scalars, self.leaf = task.job, task.scalars, leaf
        self.library = self.job.library
        self.wide = self.job.wide if wide is None else wide
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
        if e.domain == "scalar" or self.job.symbolic or not self.library.shares(value, self.seen):
            return value
        return self.library.duplicate(value)

    def number(self, e: Expr) -> Any:
        """A scalar as the kernels see it: rounded once to the type of the arithmetic."""
        value = self.scalars.of_leaves(e)[self.leaf] if e.op != "const" else e.value
        dtype = self.wide if e.type == "complex" else self.real
        if registry.library_of(type(value)) is self.library and (self.job.symbolic or self.job.capturable):
            return value if e.type == "bool" else self.library.cast(value, dtype)
        return np.bool_(value) if e.type == "bool" else self.library.number(value, dtype)

    def compute(self, e: Expr) -> Any:
        if e.op == "input":
            self.seen.append(input_of(self.job, self.leaf, e.value))
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
        word = self.library.WORDS[e.op]
        if e.op == "call":
            return word(options["function"], *args)
        try:
            return word(*args, **options)
        except (ValueError, RuntimeError, TypeError) as error:
            shapes = " and ".join(str(np.shape(a)) for a in args)
            raise TraceError(
                f"{type(self.job.rule).__name__}: {e.op} of arrays of shape {shapes}: {error}, at "
                f"{self.job.code(self.leaf, 'model')}"
            ) from error


def input_of(job: Job, leaf: int, name: str) -> Any:
    """The array that an input of the program stands for."""
    if name == "x":
        return job.x[leaf]
    if name.startswith("d"):
        return job.grads[number_of(name)][leaf]
    return job.slots[number_of(name)][leaf]


class Interpreter(Task):
    """Runs any program on any array library."""

    def __init__(self, job: Job) -> None:
        leaves = range(len(job.row))
        job = dataclasses.replace(job, shapes=[job.local_shape(i) for i in leaves]) if job.symbolic else job
        x = [job.checked_x(i) for i in leaves]
        grads = tuple([job.checked_gradient(order, i) for i in leaves] for order in range(len(job.grads)))
        super().__init__(dataclasses.replace(job, x=x, grads=grads))

    def reduce(self, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any]:
        chosen = [r for r, w in zip(self.stages[level].reductions, wanted, strict=True) if w]
        found: dict[Expr, list[Any]] = {r: [] for r in chosen}
        p, library = reduce_pass(self.job.program, level, wanted), self.job.library
        exact = library.promoted(self.job.wide, ["float64"]) if p is not None and p.exact else None
        for leaf in range(len(self.job.row)):
            arrays, others = Values(self, leaf, exact), Values(self, leaf)
            for r in chosen:
                values = arrays if r.args[0].domain == "array" else others
                value = library.WORDS[r.op](values.get(r.args[0]))
                found[r].append(library.across(r.op, value, self.job.x[leaf]))
        if self.job.symbolic:
            return {r: library.stacked(v) for r, v in found.items()}
        kinds = {r: complex if r.type == "complex" else float for r in chosen}
        return {r: np.array([library.to_host(x) for x in v], kinds[r]) for r, v in found.items()}

    def prepare(self) -> None:
        """Compute everything before anything is written, since a word of the array library may raise."""
        job = self.job
        self.new: dict[int, tuple[Any, list[Any]]] = {}
        for holds, members in self.branches():
            out = outputs(job.program, holds)
            for leaf in range(len(job.row)) if members is None else members:
                self.new[int(leaf)] = self.leaf_outputs(int(leaf), out.x, out.slots)

    def leaf_outputs(self, leaf: int, x: Expr | None, slots: Sequence[Expr]) -> tuple[Any, list[Any]]:
        values = Values(self, leaf)
        new_x = None if x is None or is_input(x, "x") else values.own(x)
        if new_x is not None:
            self.fitting(new_x, self.job.shapes[leaf], leaf, "a step")
        return new_x, [
            None
            if is_input(e, s.name)
            else self.fitting(values.own(e), p.places.shapes[leaf], leaf, "a state")
            for e, s, p in zip(slots, self.job.program.slots, self.job.slots, strict=True)
        ]

    def written(self) -> tuple[Indices, Indices]:
        return self.memory(self.job)

    @staticmethod
    def memory(job: Job) -> tuple[Indices, Indices]:
        """(begin, end) of what a job writes."""
        packed = [b for p in job.out if not isinstance(p, Loose) for b in p.buffers]
        arrays = [] if job.symbolic else [*job.x, *packed]
        spans = sorted(job.library.bounds(a) for a in arrays) or [(0, 0)]
        begin, end = zip(*spans, strict=True)
        return np.array(begin, np.int64), np.array(end, np.int64)

    def separate(self, begin: Indices, end: Indices) -> None:
        """Everything was read in `prepare`."""

    def commit(self) -> Result:
        job, library = self.job, self.job.library
        results = list(job.x)
        for leaf, (x, slots) in self.new.items():
            for pack, old, value in zip(job.out, job.slots, slots, strict=True):
                if value is not None:
                    pack.put(leaf, value)
                elif pack is not old and not isinstance(pack, Loose):
                    pack.put(leaf, old[leaf])
            if x is not None:
                results[leaf] = (
                    library.rounded(job.x[leaf], x)
                    if job.symbolic
                    else library.stored(job.x[leaf], x, inplace=job.inplace)
                )
        return Result(results, *self.counters())
