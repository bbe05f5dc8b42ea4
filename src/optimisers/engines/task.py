"""What is an engine given? Jobs: leaves that share a program, with their arrays. What it must offer: a
`Task`.
"""

import contextvars
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.numpy import library as host
from optimisers.errors import BadState, DomainError, TraceError, TreeMismatch
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Stage, stages
from optimisers.graph.scalars import Scalars, counters
from optimisers.graph.trace import Program, total_key
from optimisers.rule import Rule
from optimisers.state.buffers import Indices, Pack


@dataclasses.dataclass(eq=False)
class Job:
    """One step for leaves that share a program, an array library and an element type."""

    rule: Rule
    """A rule of the right structure, for messages."""
    program: Program
    library: Any
    dtype: Any
    x: Sequence[Any]
    """The parameters of each leaf."""
    grads: tuple[Sequence[Any], ...]
    """The gradients of each leaf, first order first."""
    slots: tuple[Pack, ...]
    """The state arrays: slot by slot, the array of each leaf."""
    out: tuple[Pack, ...]
    """Where new state goes: the same packs in place, else packs of the same form."""
    strides: list[tuple[int, ...]]
    """The layout of each leaf's arrays, in elements."""
    shapes: list[tuple[int, ...]]
    sizes: Indices
    numbers: Any
    """The table of numbers."""
    row: Indices
    """The row of `numbers` of each leaf."""
    clock: Any
    inplace: bool
    symbolic: bool
    """Whether somebody follows what becomes of arrays or numbers: then no value is looked at, and nothing is
    written.
    """
    device: str
    bundled: bool
    """Whether the arrays are whole, on one device, and small state shares a vector."""
    capturable: bool
    """Whether the numbers of the state live on the device, so that the host knows none of them."""
    scaling: Any
    """(what every gradient is divided by, whether the step is skipped), as arrays on the device; None for 1
    and no.
    """
    code: Callable[[int, str], str]
    """Leaf number here, root -> its path as code, for messages."""
    memo: dict[str, Any]
    """Tables that the engine wants to find again while the group stays the same."""

    @functools.cached_property
    def wide(self) -> Any:
        """The type of the arithmetic: float32 at least, and no narrower than the parameters and the state."""
        return self.library.promoted(
            self.library.arithmetic(self.dtype), [s.dtype for s in self.program.slots]
        )

    def local_shape(self, i: int) -> tuple[int, ...]:
        """The shape of a leaf as a symbolic step sees it: inside a map over shards parameters and state are
        smaller than `setup` saw.
        """
        x, seen = self.x[i], self.shapes[i]
        local = tuple(getattr(x, "shape", seen))
        if local == seen or not registry.isarray(x) or not self.library.is_part(x):
            return seen
        state = [p[i] for p in self.slots if p.places.shapes[i] == seen and len(p.buffers) == len(p)]
        return local if all(tuple(a.shape) == local for a in state) else seen

    def checked_x(self, i: int) -> Any:
        """The parameters of a leaf; raises TreeMismatch unless they are of the kind that `setup` saw."""
        x, name = self.x[i], self.code(i, "model")
        if registry.library_of(type(x)) is not self.library:
            raise TreeMismatch(f"{name} is {_brief(x)}; `setup` saw an array of {self.library.NAME}")
        kinds = (("shape", tuple(x.shape), self.shapes[i]), ("type", x.dtype, self.dtype))
        for what, found, seen in kinds:
            if found != seen:
                raise TreeMismatch(
                    f"{name} has {what} {found}; `setup` saw {seen}; call `setup` again for another model"
                )
        if not self.symbolic and self.library.device(x) != self.device:
            raise TreeMismatch(
                f"{name} is on {self.library.device(x)}; `setup` saw it on {self.device}, where its state "
                "is; call `setup` again after moving a model"
            )
        return x

    def checked_gradient(self, order: int, i: int) -> Any:
        """The gradient of a leaf as an array; raises TreeMismatch if it does not fit: nothing is
        broadcast.
        """
        dx, name = self.grads[order][i], self.code(i, "grads" if order == 0 else f"grads{order + 1}")
        if not registry.isarray(dx):
            found = self.library.scalar_array(dx) if self.shapes[i] == () else None
            if found is None:
                raise TreeMismatch(
                    f"{name} is {_brief(dx)}; it takes an array of shape {self.shapes[i]}, or None for no "
                    "step"
                )
            dx = found
        if registry.library_of(type(dx)) is not self.library:
            raise TreeMismatch(f"{name} is {_brief(dx)}; the parameters are arrays of {self.library.NAME}")
        where, here = self.library.device(dx), self.library.device(self.x[i])
        if where != here and not self.symbolic:
            raise TreeMismatch(f"{name} is on {where}; the parameters are on {here}; move it there")
        if tuple(dx.shape) != self.shapes[i]:
            raise TreeMismatch(
                f"gradient of shape {tuple(dx.shape)} for parameters of shape {self.shapes[i]}, at {name}"
            )
        dx = self.library.dense(dx)
        if isinstance(dx, np.ma.MaskedArray):
            raise TreeMismatch(f"{name} is masked; write filled(0), or None for no step")
        if not self.library.is_numbers(dx):
            raise TreeMismatch(f"{name} has elements of type {dx.dtype}; it takes numbers")
        if self.library.is_complex(dx) and not self.library.is_complex(self.x[i]):
            raise TreeMismatch(f"{name} is complex for real parameters; take its real part")
        return dx


def _brief(value: object) -> str:
    kind = type(value).__name__
    if isinstance(value, np.generic):
        return f"the number {value}"
    text = repr(value) if isinstance(value, int | float | complex | str) else ""
    return f"the Python {kind} {text}" if text else f"of type {kind}"


@dataclasses.dataclass(eq=False)
class Result:
    """What came of a job: for each leaf its new parameters (the old object where nothing was stored
    elsewhere).
    """

    x: Sequence[Any]
    counters: list[Any]
    of_leaf: bool
    """Whether the counters differ from leaf to leaf."""


class Task:
    """A job on its way through the levels of its program; an engine says how passes run.

    Nothing is written before every task of the step has come to its end and its checks hold.
    """

    def __init__(self, job: Job) -> None:
        if not job.capturable and job.library.capturing(job.device):
            raise BadState(
                "a CUDA graph would replay this step with the numbers of today; write setup(rule, model, "
                "capturable=True)"
            )
        self.job = job
        numbers, words = job.numbers, host
        if job.symbolic:
            words = job.library
            numbers = words.on_device(numbers, job.device)
        self.scalars = Scalars(numbers, job.row, job.sizes, job.clock, words)
        self.stages: tuple[Stage, ...] = stages(job.program)
        self.level = 0
        self.reduced = False

    # -- what an engine offers --

    def reduce(self, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any]:
        """The values of the wanted reductions of a level, each for every leaf."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Everything about the last pass that may fail, or needs memory."""
        raise NotImplementedError

    def written(self) -> tuple[Indices, Indices]:
        """(begin, end) of the memory of parameters and state, sorted."""
        raise NotImplementedError

    def separate(self, begin: Indices, end: Indices) -> None:
        """Copy the gradients that lie in this memory, if they are read while it is written."""
        raise NotImplementedError

    def commit(self) -> Result:
        """The last pass: store."""
        raise NotImplementedError

    # -- what all engines share --

    @property
    def blind(self) -> bool:
        """Whether no value may be looked at."""
        return self.job.symbolic or self.job.capturable

    def received(self, total: Any) -> Any:
        """A total, as this engine takes it."""
        return total if self.job.symbolic else _on_host(total)

    def advance(self, totals: "Totals") -> bool:
        """Go on as far as the totals known allow; whether anything moved."""
        moved = False
        while self.level < len(self.stages):
            stage = self.stages[self.level]
            if not self.reduced:
                wanted = tuple(self.needed(r) for r in stage.reductions)
                found = self.reduce(self.level, wanted) if any(wanted) else {}
                for r in stage.reductions:
                    self.scalars.put(r, found.get(r, np.zeros(len(self.job.row))), of_leaf=True)
                for t in stage.totals:
                    totals.give(t, self.scalars.sum(t.args[0]))
                self.reduced = moved = True
            known = [totals.known(t) for t in stage.totals]
            if any(value is None for value in known):
                break
            for t, value in zip(stage.totals, known, strict=True):
                self.scalars.put(t, self.received(value), of_leaf=False)
            self.level, self.reduced, moved = self.level + 1, False, True
        return moved

    def needed(self, reduction: Expr) -> bool:
        """Whether a reduction counts for any leaf: under a condition that holds for none, its pass is left
        out.
        """
        if not reduction.guard or self.blind:
            return True
        return bool(np.all([self.scalars.of_leaves(g) for g in reduction.guard], axis=0).any())

    def fitting(self, value: Any, shape: tuple[int, ...], leaf: int, what: str) -> Any:
        """A value to be stored; raises TraceError unless it is a number or has the shape of its place."""
        if np.shape(value) not in ((), shape):
            raise TraceError(
                f"{type(self.job.rule).__name__} gave {what} of shape {np.shape(value)} where one of shape "
                f"{shape} goes, at {self.job.code(leaf, 'model')}"
            )
        return value

    def verify(self) -> None:
        """Raise DomainError, naming the leaf, for the first check of the rule that fails.

        Where somebody follows the numbers, they are not looked at, and what is not finite spreads; unless
        somebody `watches`, who looks at them later.
        """
        if self.job.symbolic:
            if (seen := watches.get()) is not None:
                for condition, message, values in self.job.program.checks:
                    found = [self.scalars.of_leaves(e) for e in (condition, *values)]
                    seen.append(
                        (found, message, [self.job.code(i, "grads") for i in range(len(self.job.row))])
                    )
            return
        if self.blind:
            return
        for condition, message, values in self.job.program.checks:
            holds = self.scalars.of_leaves(condition)
            if not np.all(holds):
                found = [self.scalars.of_leaves(v) for v in values]
                refuse(holds, found, message, [self.job.code(i, "grads") for i in range(len(holds))])

    def branches(self) -> list[tuple[Any, Any]]:
        """(answers to the conditions of the program, the leaves where they are so); None for all leaves, and
        for answers that nobody may look at.
        """
        guards = self.job.program.guards
        if self.blind:
            return [(None, None)]
        if not guards:
            return [((), None)]
        holds = np.array([self.scalars.of_leaves(g) for g in guards], bool)
        if (holds == holds[:, :1]).all():
            return [(tuple(bool(h) for h in holds[:, 0]), None)] if holds.shape[1] else []
        kinds, which = np.unique(holds, axis=1, return_inverse=True)
        return [
            (tuple(bool(h) for h in kinds[:, i]), np.flatnonzero(which.ravel() == i))
            for i in range(kinds.shape[1])
        ]

    def counters(self) -> tuple[list[Any], bool]:
        """The new counters, by row of numbers or by leaf."""
        return counters(self.scalars, self.job.program.new_counters)


def refuse(holds: Any, values: list[Any], message: str, paths: Sequence[str]) -> None:
    """Raise DomainError for the first leaf whose check does not hold, if there is one."""
    if not np.all(holds):
        leaf = int(np.argmin(holds))
        shown = message.format(*(f"{v[leaf]:g}" for v in values))
        raise DomainError(f"{shown}, at {paths[leaf]}")


watches: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("watches", default=None)
"""Where the checks of a symbolic step are noted: ([condition and values, of every leaf], message, paths)."""


class Totals:
    """Sums over all leaves stepped together, across tasks: known once everyone who asks for one has given his
    part.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.symbolic = any(task.job.symbolic for task in tasks)
        self.askers: dict[str, int] = {}
        for task in tasks:
            for stage in task.stages:
                for t in stage.totals:
                    self.askers[total_key(t)] = self.askers.get(total_key(t), 0) + 1
        self.parts: dict[str, list[Any]] = {}

    def give(self, total: Expr, part: Any) -> None:
        self.parts.setdefault(total_key(total), []).append(part)

    def known(self, total: Expr) -> Any:
        key = total_key(total)
        parts = self.parts.get(key, [])
        if len(parts) < self.askers[key]:
            return None
        if len({str(getattr(part, "device", "host")) for part in parts}) > 1 and not self.symbolic:
            parts = [_on_host(part) for part in parts]
        return functools.reduce(operator.add, parts)


def _on_host(value: Any) -> Any:
    return registry.library(value).to_host(value) if registry.isarray(value) else value


def ready(tasks: Sequence[Task]) -> None:
    """Take all tasks in lock step to where they only have to store; if anything raises, nothing was
    stored.
    """
    totals = Totals(tasks)
    while any(t.level < len(t.stages) for t in tasks):
        moved = [t.advance(totals) for t in tasks]
        if not any(moved):
            raise TraceError(
                "two rules of this model wait for each other's totals; put their clipping in the same order"
            )
    for t in tasks:
        t.verify()
    for t in tasks:
        t.prepare()
    begin, end = merged([t.written() for t in tasks])
    if any(t.job.inplace for t in tasks):
        for t in tasks:
            t.separate(begin, end)


def merged(spans: list[tuple[Indices, Indices]]) -> tuple[Indices, Indices]:
    """Lists of (begin, end) of memory as one, sorted by where it begins; ends are never before those of
    earlier ones.
    """
    if len(spans) == 1 or not spans:
        return spans[0] if spans else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    begin, end = (np.concatenate(part) for part in zip(*spans, strict=True))
    by = np.argsort(begin, kind="stable")
    return begin[by], np.maximum.accumulate(end[by])
