"""What do all fused engines share? Arrays at addresses: where each lies, which must be copied first, and what
comes after the kernels.

Serves writable or fresh arrays of float16, bfloat16, float32, float64, complex64 and complex128. Arrays that
are not laid out like the state, of another type, or overlapping what is written, are copied first; all else
is used where it lies.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.memory import bounds, laid_out
from optimisers.engines.addressed.chunks import Chunks, Scratch
from optimisers.engines.addressed.order import elements_before, numbered
from optimisers.engines.addressed.pointers import Form, is_fake, lacks_memory
from optimisers.engines.addressed.text import common_dtype
from optimisers.engines.checks import checked_gradient, checked_x
from optimisers.engines.cpu import printer as kernels
from optimisers.engines.interpret import Values, every
from optimisers.engines.memory import Spans
from optimisers.engines.stacks import Stacks, Take, Workspace
from optimisers.engines.task import Holds, Members, Step
from optimisers.errors import BadState, TreeMismatch
from optimisers.graph.expr import Expr
from optimisers.graph.passes import (
    Pass,
    is_input,
    is_kept,
    number_of,
    outputs,
    reduce_pass,
    store_pass,
)
from optimisers.graph.plan import operations
from optimisers.graph.recipe import Shape
from optimisers.state.buffers import FlatBuffers, Indices
from optimisers.state.group import is_free

# -- the arrays of a step ------------------------------------------------------------------------------------


Kept = TypeVar("Kept")

PATTERNS = 16
"""How many parts of a group that took branches of their own are remembered."""


@dataclasses.dataclass(eq=False)
class Tables:
    """What is remembered of leaves that are stepped together."""

    form: Form
    chunks: Chunks
    scratch: Scratch
    patterns: dict[tuple[str, bytes], Any]
    """Tables of some of the leaves, for the patterns seen last."""
    rank: int | None = None
    """How many axes the arrays have, 0 if they differ; None where no pass goes over rows."""
    apart: tuple[Indices, list[Indices]] | None = None
    """Memory that is written, and gradients that do not lie in it."""
    written: "Written | None" = None

    def remembered(self, what: str, members: Members, make: Callable[[], Kept]) -> Kept:
        """What was made of some leaves before, or is made now."""
        key = what, b"" if members is None else members.tobytes()
        if key not in self.patterns:
            while len(self.patterns) >= PATTERNS:
                self.patterns.pop(next(iter(self.patterns)), None)
            self.patterns[key] = make()
        return self.patterns[key]


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """The memory found last, and where parameters and state were then."""

    x_at: Indices
    state_at: list[Indices]
    spans: Spans


@dataclasses.dataclass(eq=False)
class Arrays:
    """The arrays of a step, each laid out like the state; where one is not, a copy that is."""

    tables: Tables
    x: Sequence[Any]
    x_at: Indices
    dx: list[Sequence[Any]]
    dx_at: list[Indices]
    gradient: Any
    """The element type of the gradients."""
    take: Take | None = None
    """Takes the reductions of a round along an axis."""
    stacks: Stacks | None = None
    """Values of another shape, computed by the array library."""
    ran: tuple[int, ...] = ()
    """The levels for which it has computed some."""


Ranked = Callable[[Sequence[Shape], Sequence[bool]], int | None]
"""(shapes, whether each is contiguous) -> the `rank` of tables."""


def tables_of(step: Step, chunk: int, ranked: Ranked | None) -> Tables:
    """The tables of these leaves, made when they are first stepped; chunks have so many elements."""
    found = step.job.subset.tables
    if not isinstance(found, Tables):
        places, name = step.job.subset.places, step.library.name
        contiguous = [contiguous_strides(s) == t for s, t in zip(places.shapes, places.strides, strict=True)]
        form = Form(name, step.kind.device, places.shapes, places.strides, contiguous)
        chunks = Chunks(places.sizes, chunk, before=elements_before(step))
        found = step.job.subset.tables = Tables(form, chunks, Scratch(), {})
        if ranked is not None and step.spread is None:
            found.rank = ranked(places.shapes, contiguous)
    return found


def begin(step: Step, chunk: int, ranked: Ranked | None = None, take: Take | None = None) -> None:
    """Find where the arrays of a step lie, and copy those that are not laid out like the state.

    Engines whose passes go over rows say what is `ranked`, and how they `take` reductions along an axis.
    """
    tables, kind, library = tables_of(step, chunk, ranked), step.kind.dtype, step.library
    inplace = step.job.inplace
    x, (x_at, misfits) = step.xs, look(step, tables, "x", step.xs, kind, write=inplace)
    if len(misfits):
        x = _laid_out(step, tables, x, x_at, misfits, kind, functools.partial(checked_x, step))
        for i in misfits.tolist() if inplace else ():
            if not library.is_writable(step.xs[i]):
                step.new[i] = library.like(step.xs[i], x[i])
    gradient, found = kind, [look(step, tables, f"dx{n}", g, kind) for n, g in enumerate(step.grads)]
    dx = list(step.grads)
    if any(len(misfits) for _, misfits in found):
        gradient = common_dtype(library, step.grads, kind, step.wide)
        for n, grads in enumerate(step.grads):
            at, misfits = found[n] = look(step, tables, f"dx{n}", grads, gradient)
            if len(misfits):
                checked = functools.partial(checked_gradient, step, n)
                dx[n] = _laid_out(step, tables, grads, at, misfits, gradient, checked)
    step.work = Arrays(tables, x, x_at, dx, [at for at, _ in found], gradient, take)


def look(
    step: Step, tables: Tables, name: str, arrays: Sequence[Any], dtype: Any, *, write: bool = False
) -> tuple[Indices, Indices]:
    """(addresses, the numbers of arrays that are not laid out like the state)."""
    n, scratch = (step.leaves,), tables.scratch
    at, misfit = scratch.array(name, n, np.int64), scratch.array("misfit " + name, n, np.int64)
    return tables.form.addresses(arrays, dtype, at, misfit, write=write, name=name)


def _laid_out(
    step: Step,
    tables: Tables,
    arrays: Sequence[Any],
    at: Indices,
    misfits: Indices,
    dtype: Any,
    checked: Callable[[int], Any],
) -> list[Any]:
    """The arrays with copies of those that do not fit, whose addresses are noted."""
    found = list(arrays)
    for i in misfits.tolist():
        source = checked(i)
        if lacks_memory(source):
            raise TreeMismatch(
                f"an array of shape {tables.form.shapes[i]} whose storage was freed or made smaller, "
                f"at {step.code(i, 'model' if arrays is step.xs else 'grads')}"
            )
        found[i] = laid_out(step.library, source, dtype, *layout(step, tables, i))
        if is_fake(found[i]) and not is_fake(source):
            raise BadState(
                "a FakeTensorMode is on, in which tensors have no memory; take the step outside it"
            )
        at[i] = step.library.memory.address(found[i])
    return found


def layout(step: Step, tables: Tables, leaf: int) -> tuple[tuple[int, ...] | None, str]:
    """(the strides of a leaf's arrays, None where they are contiguous; their device)."""
    return None if tables.form.contiguous[leaf] else tables.form.strides[leaf], step.kind.device


def chunks_of(step: Step, members: Members) -> Chunks:
    """The chunk table of some leaves."""
    tables: Tables = step.work.tables
    if members is None:
        return tables.chunks
    every = tables.chunks
    before = None if every.before is None else every.before[members]
    return tables.remembered(
        "chunks", members, lambda: Chunks(step.sizes[members], every.chunk, before=before)
    )


def addresses_of(slots: Sequence[FlatBuffers], step: Step) -> list[Indices]:
    """Where the state arrays of a step lie, slot by slot, of the slots of its whole group."""
    members = step.job.subset.members
    return [p.addresses if members is None else p.addresses[members] for p in slots]


# -- passes --------------------------------------------------------------------------------------------------


def reduce(
    step: Step,
    level: int,
    wanted: tuple[bool, ...],
    launch: Callable[..., None],
    reductions: Callable[[Step, Pass], list[Any]],
    stacked: Callable[[Step, Any], Any],
) -> dict[Expr, Any]:
    """The wanted reductions of a level: those of whole arrays by a kernel, others by the array library."""
    arrays: Arrays = step.work
    p = reduce_pass(step.program, level, wanted)
    others = [r for r, w in zip(step.stages[level].reductions, wanted, strict=True) if w]
    others = [r for r in others if r.args[0].domain == "free"]
    found: dict[Expr, Any] = {}
    if others or (p is not None and p.free):
        stacks = stacks_of(step, launch)
        stacks.run(operations(step.program, level, None, arrays.ran, arrays.tables.rank), None)
        arrays.ran = (*arrays.ran, level)
        found.update((r, stacked(step, stacks.reduced(r))) for r in others)
        if p is not None and stacks.exchange is not None:
            for e in p.free:
                stacks.addresses(e)
        step.arrive()
    if p is not None:
        found.update(zip(p.reductions, reductions(step, p), strict=True))
    return found


def stacked(step: Step, values: Any) -> Any:
    """A vector of the array library, a number of each leaf, as one of the host."""
    return np.array(step.library.to_numpy(values), float)


def stacks_of(step: Step, launch: Callable[..., None]) -> Stacks:
    """What the array library computes for a step, on stacks that passes fill; `launch` runs a pass."""
    arrays: Arrays = step.work
    if arrays.stacks is None:
        workspace = workspace_of(arrays.tables)
        fill, given = functools.partial(_fill, step, launch), functools.partial(_given, step)
        arrays.stacks = Stacks(step, workspace, fill, given, arrays.take)
    return arrays.stacks


def workspace_of(tables: Tables) -> Workspace:
    """The buffers of the stacks of some leaves, in this thread."""
    return tables.scratch.get_or_make("workspace", Workspace)


def _given(step: Step, name: str, leaf: int) -> Any:
    """An array that a pass reads, laid out like the state."""
    arrays: Arrays = step.work
    if name == "x":
        return arrays.x[leaf]
    return arrays.dx[number_of(name)][leaf] if name.startswith("d") else step.slots[number_of(name)][leaf]


def _fill(step: Step, launch: Callable[..., None], p: Pass, members: Members, at: list[Indices]) -> None:
    """Run a pass that writes stacks, at these addresses."""
    launch(step, p, chunks_of(step, members), members, {f"w{j}": a for j, a in enumerate(at)})


def rows(step: Step, p: Pass, new: dict[str, Indices], members: Members) -> list[Indices]:
    """The address table of a pass, for all leaves or for some; `new` has the arrays that are written anew."""
    names = kernels.columns(p, inplace=in_place(step, p))
    out = [column(step, p, name, new) for name in names]
    if members is not None:
        out = [r[members] for r in out]
    if p.free:
        sizes = step.job.subset.places.sizes
        read = [r for name, r in zip(names, out, strict=True) if name.startswith("f")]
        missing = np.equal(read, 0) & ((sizes if members is None else sizes[members]) > 0)
        if missing.any():  # a kernel would read at address 0
            raise LookupError(f"{type(step.job.group.rule).__name__}: a value that a pass reads is not known")
    if (before := chunks_of(step, members).before) is not None:
        out = numbered(step, p, names, out, before)
    return out


def in_place(step: Step, p: Pass) -> bool:
    """Whether a pass writes the arrays that it reads; one that fills stacks writes no others."""
    return step.job.inplace or p.fills


def column(step: Step, p: Pass, name: str, new: dict[str, Indices]) -> Indices:
    """Where an array of a pass lies, of every leaf."""
    arrays: Arrays = step.work
    if name in new:
        return new[name]
    if name == "x":
        return arrays.x_at
    if name.startswith("d"):
        return arrays.dx_at[number_of(name)]
    if name.startswith("f"):
        assert arrays.stacks is not None
        return arrays.stacks.addresses(p.free[number_of(name)])
    return addresses_of(step.job.group.slots, step)[number_of(name)]


# -- storing -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Last:
    """The last pass over some leaves, and what the array library has computed for them."""

    p: Pass | None
    members: Members
    other: list[tuple[int, Indices, list[Any]]]
    """(slot, leaves, values) of state that the pass does not store."""


def prepared(step: Step, holds: Holds, members: Members, launch: Callable[..., None]) -> Last:
    """Everything about the last pass that is not the kernel, nor where it finds values of another shape."""
    arrays: Arrays = step.work
    out, p = outputs(step.program, holds), store_pass(step.program, holds)
    rounds = operations(step.program, None, holds, arrays.ran, arrays.tables.rank)
    if rounds:
        stacks_of(step, launch).run(rounds, members)
    other: list[tuple[int, Indices, list[Any]]] = []
    for j, (spec, e, slot) in enumerate(zip(step.program.slots, out.slots, step.slots, strict=True)):
        kept = is_kept(e, spec.name)
        if kept or (spec.shape is not None and not is_input(e, spec.name)):
            leaves = changing(step, e, members) if kept else np.array(every(step, members), np.int64)
            if not len(leaves):
                continue
            values = values_of(step, e, j, leaves.tolist(), launch)
            shapes = slot.places.shapes
            fitting = [step.fitting(v, shapes[k], k, "a state") for k, v in zip(leaves, values, strict=True)]
            other.append((j, leaves, fitting))
    return Last(p, members, other)


def values_of(
    step: Step, e: Expr, slot: int, leaves: Sequence[int], launch: Callable[..., None]
) -> list[Any]:
    """A value that goes into a slot, of some leaves."""
    if e.domain != "free" or e.op == "input":
        return [step.library.duplicate(Values(step, i).get(e)) for i in leaves]
    stacks = stacks_of(step, launch)
    if stacks.exchange is not None:
        return stacks.exchange.parts(e, slot, leaves)
    return [stacks.value(e, i) for i in leaves]


def start(step: Step, holds: Holds, members: Members, launch: Callable[..., None]) -> None:
    """Send matrices to their owners, of which the last pass needs what is computed with the whole."""
    arrays: Arrays = step.work
    if not is_free(step.program):
        return
    exchange = stacks_of(step, launch).exchange
    for what in operations(step.program, None, holds, arrays.ran, arrays.tables.rank):
        if exchange is not None and what.chooses is None and not what.only and exchange.knows(what):
            exchange.start(what, members)


def changing(step: Step, e: Expr, members: Members) -> Indices:
    """The leaves for which the condition of a choice holds, of which `e` is a result."""
    condition, leaves = e.args[0].args[0], np.array(every(step, members), np.int64)
    step.scalars.fetch([condition])
    return leaves[step.scalars.of_leaves(condition)[leaves]]


def store(step: Step, last: Last, launch: Callable[..., None]) -> None:
    """Launch the kernel of the last pass; `launch` takes (step, pass, chunks, members, new addresses)."""
    p, members, job = last.p, last.members, step.job
    new: dict[str, Indices] = {}
    if not job.inplace:
        new = {f"new s{j}": at for j, at in enumerate(addresses_of(job.target.slots, step))}
        stored = {name for name, _ in p.stores} if p is not None else set[str]()
        _keep(step, stored, members)
        if "x" in stored:
            new["new x"] = _targets(step, members)
    elif p is not None:
        new["new x"] = step.work.x_at
    if p is not None:
        launch(step, p, chunks_of(step, members), members, new)
    for j, leaves, values in last.other:
        step.out[j].put_many(leaves, values)


def _keep(step: Step, stored: set[str], members: Members) -> None:
    """Carry over the state that this step leaves as it was."""
    kept = np.array(every(step, members), np.int64)
    for j, (slot, old) in enumerate(zip(step.out, step.slots, strict=True)):
        if f"s{j}" not in stored:
            slot.put_many(kept, [old[k] for k in kept.tolist()])


def _targets(step: Step, members: Members) -> Indices:
    """Where new parameters go: fresh arrays, which become the results."""
    form, kind, library = step.work.tables.form, step.kind, step.library
    new = [
        library.memory.fresh(shape, kind.dtype, None if flat else laid, kind.device)
        for shape, flat, laid in zip(form.shapes, form.flat, form.strides, strict=True)
    ]
    at, misfits = look(step, step.work.tables, "new x", new, kind.dtype, write=True)
    for k in misfits.tolist():
        at[k] = library.memory.address(new[k])
    like, xs = library.like, step.xs
    for k in every(step, members):
        step.new[k] = like(xs[k], new[k])
    return at


def finish(step: Step) -> None:
    """Bring parameters that were stepped in a copy home, and say which arrays were written."""
    arrays: Arrays = step.work
    if not step.job.inplace:
        return
    if arrays.x is step.xs:
        step.library.memory.touched(step.xs)
        return
    step.library.memory.touched([x for x, was in zip(arrays.x, step.xs, strict=True) if x is was])
    for i, (new, old) in enumerate(zip(arrays.x, step.xs, strict=True)):
        if new is not old and i not in step.new:
            step.library.stored(old, new, inplace=True)


def separate(step: Step, begin: Indices, end: Indices) -> None:
    """Copy gradients that lie where this step writes: `{"a": model["b"], "b": model["a"]}` is a gradient."""
    if not len(begin):
        return
    arrays: Arrays = step.work
    was = arrays.tables.apart
    if (
        was is not None
        and was[0] is begin
        and all(a.tobytes() == b.tobytes() for a, b in zip(was[1], arrays.dx_at, strict=True))
    ):
        return
    size = step.sizes * arrays.gradient.itemsize
    apart = True
    for n, at in enumerate(arrays.dx_at):
        before = np.searchsorted(begin, at + size) - 1
        for i in np.flatnonzero((end[before] > at) & (before >= 0) & (step.sizes > 0)).tolist():
            copies = arrays.dx[n] = list(arrays.dx[n])
            copies[i] = laid_out(step.library, copies[i], arrays.gradient, *layout(step, arrays.tables, i))
            at[i] = step.library.memory.address(copies[i])
            apart = False
    if apart:
        arrays.tables.apart = begin, [at.copy() for at in arrays.dx_at]


def spans(step: Step) -> Spans:
    """The memory of parameters and state; the very object found last, while all stays where it is."""
    arrays: Arrays = step.work
    slots = step.job.group.slots
    where = [p.addresses for p in slots]
    known = arrays.tables.written
    if (
        known is not None
        and arrays.x is step.xs
        and known.x_at.tobytes() == arrays.x_at.tobytes()
        and all(map(operator.is_, known.state_at, where))
    ):
        return known.spans
    buffers = [b for p in slots for b in p.buffers]
    state_at = np.array([step.library.memory.address(b) for b in buffers], np.int64)
    state_size = np.array([b.nbytes for b in buffers], np.int64)
    low, high = arrays.x_at.copy(), arrays.x_at + step.sizes * step.kind.dtype.itemsize
    strides: list[Any] = []
    for i, (new, old) in enumerate(zip(arrays.x, step.xs, strict=True)):
        if new is not old:  # a copy: what counts is where the original lies
            low[i], high[i] = bounds(old)
            strides.append((i, step.library.memory.layout(old)[1]))
    owner = np.concatenate([np.arange(step.leaves), np.full(len(buffers), -1)])
    begin, end = np.concatenate([low, state_at]), np.concatenate([high, state_at + state_size])
    found = Spans.of(begin, end, owner, strides)
    if arrays.x is step.xs:
        arrays.tables.written = Written(low, where, found)
    elif isinstance(step.job.subset.spans, Spans) and step.job.subset.spans.same(found):
        return step.job.subset.spans
    else:
        step.job.subset.spans = found
    return found
