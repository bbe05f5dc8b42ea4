"""Passes over rows: sums along an axis are taken and read where matrices lie, without a stack.

To a kernel a row is a leaf. A reduction along the last axis is then one of whole leaves; one along the first
axis is a row more added to an array that all rows of a block share, which one thread owns; and a value of
another shape that a pass reads is the number of a row, or a row that several leaves share.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from optimisers.engines.addressed.chunks import Chunks
from optimisers.engines.interpret import every
from optimisers.engines.stacks import Stacks
from optimisers.engines.task import Members, Step
from optimisers.engines.workspace import Bucket
from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Pass
from optimisers.graph.plan import Round, along
from optimisers.graph.recipe import Shape
from optimisers.state.buffers import Indices

SHORT = 32
"""Elements of rows, on average, below which going over rows costs more than writing stacks."""

BLOCK = 64
"""Rows whose sum along the first axis one thread adds up, in the type of the arithmetic."""


def rank_of(shapes: Sequence[Shape], contiguous: Sequence[bool]) -> int | None:
    """How many axes all these arrays have, 0 if they differ; None where passes do not go over their rows."""
    ranks = {len(s) for s in shapes}
    if not shapes or 0 in ranks or not all(contiguous) or any(0 in s for s in shapes):
        return None
    rows = sum(math.prod(s[:-1]) for s in shapes)
    if sum(map(math.prod, shapes)) < SHORT * rows:
        return None
    return ranks.pop() if len(ranks) == 1 else 0


class Lines:
    """The rows of some leaves, one after the other."""

    def __init__(self, leaves: Sequence[int], shapes: Sequence[Shape], chunk: int) -> None:
        count = np.array([math.prod(shapes[i][:-1]) for i in leaves], np.int64)
        length = np.array([shapes[i][-1] for i in leaves], np.int64)
        begin, blocks = np.cumsum(count) - count, -(-count // BLOCK)
        number = np.arange(int(count.sum())) - np.repeat(begin, count)
        self.leaf: Indices = np.repeat(np.array(leaves, np.int64), count)
        """The leaf of every row."""
        self.place: Indices = number * np.repeat(length, count)
        """Elements of that leaf before the row."""
        self.block: Indices = np.repeat(np.cumsum(blocks) - blocks, count) + number // BLOCK
        """Which rows stand together in a block."""
        self.first: Indices = np.zeros(len(shapes), np.int64)
        """Of every leaf: its first row."""
        self.first[list(leaves)] = begin
        wide = np.repeat(length, count)[np.flatnonzero(np.diff(self.block, prepend=-1))]
        self.places: Indices = np.cumsum(wide) - wide
        """Of every block: elements before it, where each has a row."""
        self.width = int(wide.sum())
        self.chunks = Chunks(np.repeat(length, count), chunk, self.block)

    def rows_of(self, bucket: Bucket) -> Indices:
        """The rows of all leaves of a bucket: (leaf, row)."""
        return self.first[bucket.leaves][:, None] + np.arange(math.prod(bucket.shape[:-1]))


def lines_of(step: Step, members: Members) -> Lines:
    """The rows of some leaves of a step; remembered."""
    tables = step.work.tables
    return tables.remembered(
        "lines", members, lambda: Lines(every(step, members), step.shapes, tables.chunks.chunk)
    )


# -- what passes over rows read ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """A pass whose leaves are rows."""

    p: Pass
    lines: Lines
    free: tuple[Indices, ...]
    """Where every row finds each value of another shape."""

    @property
    def found(self) -> dict[str, Indices]:
        """The same by the names that kernels have for them."""
        return {f"f{j}": at for j, at in enumerate(self.free)}


def reading(step: Step, p: Pass, members: Members, stacks: Stacks) -> Reading | None:
    """How a pass reads values of another shape row by row; None where all of them have the shape of x."""
    key = id(p), b"" if members is None else members.tobytes()
    known = stacks.readings
    if key not in known:
        known[key] = _reading(step, p, members, stacks)
    return known[key]


def _reading(step: Step, p: Pass, members: Members, stacks: Stacks) -> Reading | None:
    if step.work.tables.rank is None or all(_is_whole(stacks, e) for e in p.free):
        return None
    lines = lines_of(step, members)
    found = [_found(stacks, e, lines) for e in p.free]
    return Reading(narrowed(p, tuple(n for n, _ in found)), lines, tuple(at for _, at in found))


@cached
def narrowed(p: Pass, narrow: tuple[bool, ...]) -> Pass:
    """The pass that reads some values once a row."""
    return dataclasses.replace(p, narrow=narrow)


def _is_whole(stacks: Stacks, e: Expr) -> bool:
    return all(tuple(s.shape[1:]) == b.shape for f in stacks.known_of(e) for b, s in f.stacks)


def _found(stacks: Stacks, e: Expr, lines: Lines) -> tuple[bool, Indices]:
    """(whether a value is one number a row, where each row finds it)."""
    known = stacks.known_of(e)
    held = [(b, s) for f in known for b, s in f.stacks]
    size = stacks.kind(e).itemsize
    if not any(f.borrowed for f in known) and all(
        s.dtype == stacks.kind(e) and s.ndim - 1 <= len(b.shape) for b, s in held
    ):
        for last in (1, 0):
            laid = [(b, at) for b, s in held if (at := _rows(stacks, b, s, narrow=bool(last))) is not None]
            if len(laid) == len(held):
                out = np.zeros(len(lines.leaf), np.int64)
                for b, at in laid:
                    out[lines.rows_of(b)] = at
                return bool(last), out
    return False, stacks.addresses(e)[lines.leaf] + size * lines.place


def _rows(stacks: Stacks, bucket: Bucket, stack: Any, *, narrow: bool) -> Indices | None:
    """Where the rows of a bucket find a value of theirs, as one number or as a row; None if they do not."""
    library, missing = stacks.library, len(bucket.shape) + 1 - stack.ndim
    (apart, *strides), (*over, columns) = library.memory.layout(stack)[1], bucket.shape
    *outer, last = (*(1,) * missing, *stack.shape[1:])
    *steps, between = (*(0,) * missing, *strides)
    if last != (1 if narrow else columns) or not all(n in (1, m) for n, m in zip(outer, over, strict=True)):
        return None
    if not narrow and between != stack.dtype.itemsize and columns > 1:
        return None
    offset = np.zeros(over, np.int64)
    for axis, (n, m, stride) in enumerate(zip(outer, over, steps, strict=True)):
        if n > 1:
            offset += (stride * np.arange(m)).reshape(m, *(1,) * (len(over) - 1 - axis))
    begin = library.memory.address(stack) + apart * np.arange(len(bucket.leaves))
    return begin[:, None] + offset.reshape(1, -1)


# -- reductions along an axis --------------------------------------------------------------------------------


class Launch(Protocol):
    """Runs a pass over rows."""

    def __call__(
        self, step: Step, p: Pass, lines: Lines, at: dict[str, Indices], /, *partial: Any
    ) -> None: ...


def take(step: Step, launch: Launch, stacks: Stacks, what: Round, members: Members) -> None:
    """Take the reductions of a round along an axis, in one pass."""
    lines, batch = lines_of(step, members), stacks.batch(members)
    p, sums = along(what, step.work.tables.rank)
    size, at, held = stacks.real.itemsize, dict[str, Indices](), list[tuple[Expr, Any]]()
    for name, e, begin in sums:
        flat = stacks.buffer(("rows", stacks.calls, name), (lines.width,), stacks.real)
        stacks.library.assign(flat, begin)
        at[name] = (stacks.library.memory.address(flat) + size * lines.places)[lines.block]
        held.append((e, flat))
    seen = reading(step, p, members, stacks) if p.free else None
    if seen is not None:
        p, at = seen.p, at | seen.found
    partial = np.empty((len(p.reductions), len(lines.chunks.leaf)))
    launch(step, p, lines, at, *((partial,) if p.reductions else ()))
    for r, parts in zip(p.reductions, partial, strict=True):
        stacks.note(r, [(b, _last(stacks, r, b, parts, lines)) for b in batch.buckets])
    for e, flat in held:
        stacks.note(e, [(b, _first(stacks, e, b, flat, lines)) for b in batch.buckets])


JOINED: dict[str, Any] = {"sum": np.add, "norm2": np.hypot, "max": np.maximum, "min": np.minimum}
"""What makes one reduction of two, of the parts of a row."""


def _last(stacks: Stacks, r: Expr, bucket: Bucket, parts: Any, lines: Lines) -> Any:
    """The reductions of rows, as a stack."""
    begin, which = lines.chunks.begin, lines.rows_of(bucket)
    fold: Any = JOINED[r.op]
    rows = parts if len(parts) == len(begin) - 1 else fold.reduceat(parts, begin[:-1])
    shape = (len(bucket.leaves), *bucket.shape[:-1], *((1,) if dict(r.options).get("keepdims") else ()))
    stack = stacks.buffer(("last", stacks.calls, id(r), bucket.offset), shape, stacks.real)
    stacks.library.assign(stack, stacks.library.scalars.constant(rows[which].reshape(shape), stack))
    return stack


def _first(stacks: Stacks, e: Expr, bucket: Bucket, flat: Any, lines: Lines) -> Any:
    """The reduction over the rows of every matrix, of those of its blocks."""
    (rows, columns), n = bucket.shape, len(bucket.leaves)
    blocks = -(-rows // BLOCK)
    options = {"axis": 1, "keepdims": bool(dict(e.options).get("keepdims"))}
    first = lines.places[lines.block[lines.first[bucket.leaves]]]
    operation = stacks.library.operations[e.op]
    strides = (columns, 1)
    if n == 1 or (np.diff(first) == blocks * columns).all():
        parts = stacks.library.memory.view(
            flat, int(first[0]), (n, blocks, columns), (blocks * columns, *strides)
        )
        return operation(parts, **options)
    views = [stacks.library.memory.view(flat, int(f), (1, blocks, columns), (0, *strides)) for f in first]
    return stacks.library.scalars.joined([operation(v, **options) for v in views])
