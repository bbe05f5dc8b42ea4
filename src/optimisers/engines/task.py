"""How do leaves get from gradients to new parameters and state? One driver, `Step`, takes them through the
levels of their program, the checks and the last pass. An engine is a value: its functions say how passes run.
"""

import contextvars
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.numpy import library as host
from optimisers.arrays.types import arithmetic, promoted
from optimisers.engines.memory import Known, Spans, merged
from optimisers.engines.spread import SpreadStep, WholeStep, joined, shared_out
from optimisers.engines.totals import Totals, on_host
from optimisers.errors import BadState, DomainError, TraceError
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Pass, draws, stages
from optimisers.graph.recipe import misfit, stores_free
from optimisers.graph.scalars import Scalars, Table, counters
from optimisers.graph.trace import Program, total_join
from optimisers.ops.random import number_of_leaf
from optimisers.state.buffers import FlatBuffers, Indices
from optimisers.state.cache import Subset
from optimisers.state.group import Group, is_free
from optimisers.state.table import ScalarTable
from optimisers.tree.path import KeyPath

Holds: TypeAlias = tuple[bool, ...] | None
"""The answers to the conditions of a program; None where they are traced: they stay in the graph."""

Members: TypeAlias = Indices | None
"""Some of the leaves of a step; None for all."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One step for leaves that share a program, an array library and an element type."""

    group: Group
    target: Group
    """The group that takes the new state: the same one in place, else its successor."""
    subset: Subset
    """The members that are stepped."""
    xs: Sequence[Any]
    """The parameters of each leaf."""
    grads: tuple[Sequence[Any], ...]
    """The gradients of each leaf, first order first."""
    table: ScalarTable
    """The scalars that the step reads."""
    paths: Sequence[KeyPath]
    """Those of all leaves of the model, for messages."""
    inplace: bool
    traced: bool
    """Whether a transform or a compiler traces arrays or numbers: then no value is read, and nothing is
    written.
    """
    loss: Any = None
    """The loss of this step, one number; None where none was given."""
    examples: int | None = None
    """How many examples the gradients are of, where they came example by example."""
    scaling: tuple[Any, Any] | None = None
    """(what every gradient is divided by, whether the step is skipped), as arrays on the device; None for 1
    and no.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """A way to run passes. Nothing of it writes parameters or state before what `prepare` gave is called.

    What an engine does not run (`reduce` or `prepare` gives None) goes to the one it falls back on.
    """

    name: str
    refusal: Callable[[Group], str]
    """Why it does not take a group; empty if it does."""
    begin: Callable[["Step"], None]
    """Check the arrays of a step and lay them out as the engine wants them."""
    reduce: Callable[["Step", int, tuple[bool, ...]], dict[Expr, Any] | None]
    """The values of the wanted reductions of a level, each for every leaf."""
    prepare: Callable[["Step", Holds, Members], Callable[[], None] | None]
    """Everything about the last pass over some leaves that may fail; what it gives stores."""
    spans: Callable[["Step"], Spans]
    """The memory of parameters and state."""
    separate: Callable[["Step", Indices, Indices], None] | None = None
    """Copy the gradients that lie in this memory (begin, end of each piece), if they are read while it is
    written.
    """
    finish: Callable[["Step"], None] | None = None
    """What comes after the stores."""
    otherwise: "Engine | None" = None
    """The engine to fall back on."""
    keeps_totals: bool = False
    """Whether totals stay where they were computed."""
    printed: "Printed | None" = None
    """The source of its kernels."""
    over_rows: bool = False
    """Whether its passes go over the rows of matrices where that saves a stack."""
    start: Callable[["Step", Holds, Members], None] | None = None
    """Send the matrices of the last pass over some leaves to their owners, where processes share an array;
    None for an engine that takes no parts of matrices, but whole arrays that lie over all processes.
    """


class Printed(Protocol):
    """Prints the source of one pass, for gradients of the type of the parameters; raises Unprintable."""

    def __call__(self, program: Program, p: Pass, dtype: str, /, *, inplace: bool) -> str: ...


class StepScalars(Protocol):
    """The scalars of a step, wherever they are computed."""

    @property
    def near(self) -> Scalars:
        """Those that the host computes, or that are traced."""
        ...

    def put(self, e: Expr, value: Any, *, of_leaf: bool) -> None: ...
    def of_leaves(self, e: Expr) -> Any: ...
    def total(self, join: str, e: Expr) -> Any: ...
    def table(self, scalars: tuple[Expr, ...]) -> tuple[Table, Any]: ...
    def fetch(self, wanted: Sequence[Expr]) -> None: ...


class Step:
    """A job on its way through its engine. Nothing is written before all steps that are taken together have
    come to their end and their checks hold.
    """

    def __init__(self, job: Job, engine: Engine) -> None:
        group, subset, kind = job.group, job.subset, job.group.kind
        self.job, self.engine, self.kind = job, engine, kind
        self.library = kind.library
        if not kind.capturable and self.library.graphs.capturing(kind.device):
            raise BadState(
                "a CUDA graph would replay this step with the numbers of today; write setup(rule, model, "
                "capturable=True)"
            )
        self.program = group.program_for(len(job.grads))
        self.stages = stages(self.program)
        self.abstract = job.traced or kind.capturable
        """Whether scalars are abstract, traced or read when a captured graph runs: none may be looked at."""
        self.xs, self.grads = job.xs, job.grads
        self.shapes, self.sizes = subset.places.shapes, subset.places.sizes
        self.whole_sizes = self.sizes
        """How many elements each array has, with the parts that other processes hold."""
        whole = group.wholes(subset)
        if stores_free(self.program):
            self._refuse_misfits(whole)
        self.slots, self.out, self.row = group.slots, job.target.slots, job.table.row
        if subset.members is not None:
            self.slots = picked(self.slots, subset)
            self.out = picked(self.out, subset)
            self.row = self.row[subset.members]
        self.spread: SpreadStep | None = None
        self.whole: WholeStep | None = None
        if group.spread and job.traced:
            self.slots, self.shapes = tuple(slot.separated() for slot in self.slots), whole
        elif group.spread:  # from here on the step sees the parts that lie here, or whole arrays
            if engine.start is None and is_free(self.program):
                self.whole, self.shapes = WholeStep(self), whole
            else:
                self.spread = SpreadStep(self)
        self.scalars: StepScalars = _scalars(self)
        self.level, self.reduced, self.given = 0, False, False
        self.work: Any = None
        """What the engine has made of the arrays."""
        self.found_traced: dict[tuple[int, Any], dict[int, Any]] = {}
        """The values of single leaves that the interpreter found in a type."""
        self.stores: list[Callable[[], None]] = []
        self.new: dict[int, Any] = {}
        """The new parameters of leaves, where they are other objects than the old."""
        engine.begin(self)
        for e in self.program.given:
            self.scalars.put(e, self.loss() if e.op == "loss" else job.examples, of_leaf=False)

    def _refuse_misfits(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise TraceError for a step or a state of another shape than that of its place."""
        for shape in dict.fromkeys(shapes):
            if what := misfit(self.program, shape):
                at = self.code(shapes.index(shape), "model")
                raise TraceError(f"{type(self.job.group.rule).__name__} gave {what}, at {at}")

    def loss(self) -> Any:
        """The loss of the step, where the scalars are computed; raises BadState if none was given."""
        given = self.job.loss
        if given is None:
            raise BadState(
                f"{type(self.job.group.rule).__name__} asks for the loss; write update(state, model, grads, "
                "loss=value). TorchOptimizer takes it from step(closure), as_optax from tx.update(..., "
                "value=value)"
            )
        if np.shape(given) != ():
            raise BadState(
                f"the loss has shape {np.shape(given)}; it is one number: the mean over a batch, say"
            )
        if self.job.traced:
            return given
        here = registry.isarray(given) and registry.library(given) is self.library
        if self.kind.capturable and here:
            return self.library.scalars.moved(given, self.kind.device).double()
        value = float(registry.library(given).to_host(given)) if registry.isarray(given) else float(given)
        return (
            self.library.scalars.on_device(np.float64(value), self.kind.device)
            if self.kind.capturable
            else value
        )

    @property
    def leaves(self) -> int:
        return len(self.row)

    @property
    def wide(self) -> Any:
        """The type of the arithmetic: float32 at least, and no narrower than the parameters and the state."""
        cache = self.job.group.cache
        if cache.wide is None:
            kinds = [s.dtype for s in self.program.slots]
            cache.wide = promoted(self.library, arithmetic(self.library, self.kind.dtype), kinds)
        return cache.wide

    def code(self, leaf: int, root: str) -> str:
        """The path of a leaf as code, for messages."""
        return self.job.paths[int(self.job.subset.leaves[leaf])].code(root)

    # -- sums ------------------------------------------------------------------------------------------------

    def sum_up(self) -> tuple[Expr, ...] | None:
        """Compute the reductions of the level at which the step stands: those that were wanted; None where
        that is done already.
        """
        if self.reduced or self.level == len(self.stages):
            return None
        reductions = self.stages[self.level].reductions
        wanted = tuple(self.needed(r) for r in reductions)
        found = self.found(self.level, wanted) if any(wanted) else {}
        for r in reductions:
            self.scalars.put(r, found.get(r, np.zeros(self.leaves)), of_leaf=True)
        self.reduced = True
        return tuple(found)

    def advance(self, totals: Totals) -> bool:
        """Go on to the next level where all totals of this one are known; whether it did."""
        if not self.reduced:
            return False
        stage = self.stages[self.level]
        if not self.given:
            for t in stage.totals:
                totals.give(t, self.scalars.total(total_join(t), t.args[0]))
            self.given = True
        known = [totals.known(t) for t in stage.totals]
        if any(value is None for value in known):
            return False
        for t, value in zip(stage.totals, known, strict=True):
            here = value if self.job.traced or self.engine.keeps_totals else on_host(value)
            self.scalars.put(t, here, of_leaf=False)
        self.level, self.reduced, self.given = self.level + 1, False, False
        return True

    def found(self, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any]:
        """The wanted reductions of a level, by this engine or by the one it falls back on."""
        found = self.engine.reduce(self, level, wanted)
        if found is None:
            assert self.engine.otherwise is not None
            found = self.engine.otherwise.reduce(self, level, wanted)
        assert found is not None
        return found

    def needed(self, reduction: Expr) -> bool:
        """Whether a reduction counts for any leaf: under a condition that holds for none, its pass is left
        out.
        """
        if not reduction.guard or self.abstract:
            return True
        return bool(np.all([self.scalars.of_leaves(g) for g in reduction.guard], axis=0).any())

    # -- checks and conditions -------------------------------------------------------------------------------

    def fitting(self, value: Any, shape: tuple[int, ...], leaf: int, what: str) -> Any:
        """A value to be stored; raises TraceError unless it is a number or has the shape of its place."""
        if np.shape(value) not in ((), shape):
            raise TraceError(
                f"{type(self.job.group.rule).__name__} gave {what} of shape {np.shape(value)} where one of "
                f"shape {shape} goes, at {self.code(leaf, 'model')}"
            )
        return value

    def verify(self) -> None:
        """Raise DomainError, naming the leaf, for the first check of the rule that fails.

        Traced numbers are not read: they are noted in `watches`, to be read later, or else a check that fails
        makes every scalar NaN that the last pass reads, and so what it stores.
        """
        checks = self.program.checks
        if not checks or (self.abstract and not self.job.traced):
            return
        if self.job.traced:
            if (seen := watches.get()) is not None:
                for condition, message, values in checks:
                    found = [self.scalars.of_leaves(e) for e in (condition, *values)]
                    seen.append((found, message, [self.code(i, "grads") for i in range(self.leaves)]))
            else:
                self.scalars.near.spoilt = self._spoilt()
            return
        self.scalars.fetch([condition for condition, _, _ in checks])
        for condition, message, values in checks:
            holds = self.scalars.of_leaves(condition)
            if not np.all(holds):
                found = [self.scalars.of_leaves(v) for v in values]
                refuse(holds, found, message, [self.code(i, "grads") for i in range(len(holds))])

    def _spoilt(self) -> Any:
        """0 where all checks hold, NaN where one fails, as the library of the scalars computes it."""
        join, choose = (self.scalars.near.library.operations[name] for name in ("sum", "where"))
        return sum(join(choose(self.scalars.of_leaves(c), 0.0, math.nan)) for c, _, _ in self.program.checks)

    def branches(self) -> list[tuple[Holds, Members]]:
        """The leaves for which the conditions of the program have the same answers, with these."""
        guards = self.program.guards
        if self.abstract:
            return [(None, None)]
        if not guards:
            return [((), None)]
        self.scalars.fetch(guards)
        holds = np.array([self.scalars.of_leaves(g) for g in guards], bool)
        if (holds == holds[:, :1]).all():
            return [(tuple(bool(h) for h in holds[:, 0]), None)] if holds.shape[1] else []
        kinds, which = np.unique(holds, axis=1, return_inverse=True)
        return [
            (tuple(bool(h) for h in kinds[:, i]), np.flatnonzero(which.ravel() == i))
            for i in range(kinds.shape[1])
        ]

    # -- the last pass ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Do everything about the last pass that may fail."""
        for holds, members in self.branches():
            store = self.engine.prepare(self, holds, members)
            if store is None:
                assert self.engine.otherwise is not None
                store = self.engine.otherwise.prepare(self, holds, members)
            assert store is not None
            self.stores.append(store)

    def start(self) -> None:
        """Send what the last pass needs of whole matrices to their owners."""
        assert self.engine.start is not None
        for holds, members in self.branches():
            self.engine.start(self, holds, members)

    def arrive(self) -> None:
        """Wait for what other processes have computed."""
        if self.spread is not None and self.spread.exchange is not None:
            self.spread.exchange.arrive()

    def store(self) -> None:
        """Write parameters, state and counters."""
        for store in self.stores:
            store()
        if self.engine.finish is not None:
            self.engine.finish(self)
        job, target = self.job, self.job.target
        if self.whole is not None and job.inplace:
            self.whole.store()
        if job.group.spread and job.inplace:
            self.library.memory.touched(job.xs)
        found, of_leaf = self.counters()
        target.table = target.table.write_counters(
            job.subset.members, found, of_leaf=of_leaf, computed=job.table
        )

    def release(self) -> None:
        """Let go of what was read: what refers back to this step would keep the gradients until a garbage
        collector comes.
        """
        self.stores, self.work, self.spread = [], None, None

    def results(self) -> dict[int, Any]:
        """The new parameters of leaves, as arrays of the kind of the old ones."""
        far = self.spread or self.whole
        return self.new if far is None else far.results(self.new)

    def counters(self) -> tuple[list[Any], bool]:
        """(the new counters, whether they differ from leaf to leaf); those of a capturable state stay on the
        device, where they are stored already.
        """
        if self.kind.capturable:
            return [], False
        self.scalars.fetch(self.program.new_counters)
        return counters(self.scalars.near, self.program.new_counters)


def picked(slots: tuple[FlatBuffers, ...], subset: Subset) -> tuple[FlatBuffers, ...]:
    """The state arrays of some members."""
    return tuple(slot.pick(places) for slot, places in zip(slots, subset.slots, strict=True))


def _scalars(step: Step) -> Scalars:
    """The scalars of a step: on the host, or with the operations of who traces them."""
    table = step.job.table
    names = _names(step) if draws(step.program) else None
    if not step.job.traced:
        last = () if step.kind.capturable else step.program.new_counters
        return Scalars(table.values, step.row, step.whole_sizes, table.clock, host, names, last)
    values = step.library.scalars.on_device(table.values, step.kind.device)
    return Scalars(values, step.row, step.sizes, table.clock, step.library, names)


def _names(step: Step) -> Indices:
    """The number of each leaf in two halves, by which it has random numbers of its own."""
    subset = step.job.subset
    if subset.names is None:
        found = [number_of_leaf(step.job.paths[i]) for i in subset.leaves.tolist()]
        subset.names = np.array(found, np.int64).reshape(-1, 2).T
    return subset.names


def refuse(holds: Any, values: list[Any], message: str, paths: Sequence[str]) -> None:
    """Raise DomainError for the first leaf whose check does not hold, if there is one."""
    if not np.all(holds):
        leaf = int(np.argmin(holds))
        shown = message.format(*(f"{v[leaf]:g}" for v in values))
        raise DomainError(f"{shown}, at {paths[leaf]}")


watches: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("watches", default=None)
"""Where the checks of a traced step are noted: ([condition and values, of every leaf], message, paths)."""


def ready(steps: Sequence[Step], known: Known) -> None:
    """Take all steps in lock step to where they only have to store; if anything raises, nothing was stored.

    `known` remembers the memory that was written last.
    """
    far = [s for s in steps if s.spread is not None and s.engine.start is not None]
    if far:
        shared_out(far)
    if any(s.stages for s in steps):
        _levels(steps)
    for s in steps:
        s.verify()
    for s in far:
        s.start()
    for s in steps:
        s.prepare()
    for s in far:
        s.arrive()
    begin, end = merged([s.engine.spans(s) for s in steps], steps, known)
    for s in steps:
        if s.job.inplace and s.engine.separate is not None:
            s.engine.separate(s, begin, end)


def _levels(steps: Sequence[Step]) -> None:
    """Compute the sums of all steps, level by level."""
    totals = Totals([s.stages for s in steps], traced=any(s.job.traced for s in steps))
    while any(s.level < len(s.stages) for s in steps):
        fresh = [(s, found) for s in steps if (found := s.sum_up()) is not None]
        joined([(s, found) for s, found in fresh if found])
        moved = [s.advance(totals) for s in steps]
        # A total is known when the last has given: the others go on in the same round, with one collective.
        moved = [done or s.advance(totals) for done, s in zip(moved, steps, strict=True)]
        if not fresh and not any(moved):
            raise TraceError(
                "two rules of this model wait for each other's totals; put their clipping in the same order"
            )
