"""The CPU engine: one compiled kernel per pass, over the addresses of all leaves of a group."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from optimisers.engines import cache
from optimisers.engines.addressed import byrow
from optimisers.engines.addressed import task as addressed
from optimisers.engines.addressed.byrow import Lines, Reading
from optimisers.engines.addressed.chunks import CHUNK, Chunks
from optimisers.engines.addressed.order import misplaced
from optimisers.engines.addressed.pointers import LOOKS
from optimisers.engines.addressed.text import arithmetic_of, kinds_of, labels_of, printable, titled, types_of
from optimisers.engines.cpu import printer as kernels
from optimisers.engines.cpu import threads
from optimisers.engines.cpu.maths import ARITHMETIC, BYTES
from optimisers.engines.task import Engine, Holds, Members, Step
from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Pass, draws
from optimisers.graph.trace import Program
from optimisers.state.buffers import Indices
from optimisers.state.group import Group

NAME = "numba"

NOTHING = np.empty((0, 0))
"""The place of partial sums, for kernels without."""


# -- which groups it takes -----------------------------------------------------------------------------------


def refusal(group: Group) -> str:
    """Why this engine does not take a group; empty if it does."""
    kind = group.kind
    if kind.name not in LOOKS:
        return f"arrays of {kind.name}"
    if group.opaque or kind.opaque:
        return "unpacked state"
    if kind.device != "cpu":
        return f"arrays on {kind.device}"
    return misplaced(group) or unprintable(group.program, kind.library.type_name(kind.dtype))


def unprintable(program: Program, dtype: str) -> str:
    """Why there is no kernel for a program over arrays of this type; empty if there is."""
    if dtype not in ARITHMETIC:
        return f"element type {dtype}"
    return cache.switched_off() or _unprintable(program, dtype) or ""


@cached
def _unprintable(program: Program, dtype: str) -> str | None:
    return printable(program, dtype, printed)


def printed(program: Program, p: Pass, dtype: str, *, inplace: bool) -> str:
    """The source of one pass for gradients of the type of the parameters; raises Unprintable."""
    return sources(program, p, kinds_of(program, p, dtype, dtype), dtype, inplace=inplace)


def sources(program: Program, p: Pass, kinds: dict[str, str], dtype: str, *, inplace: bool) -> str:
    """The source of one pass; raises Unprintable."""
    real, title = arithmetic_of(program, dtype), titled(p, dtype, inplace=inplace)
    return kernels.source(p, kinds, real, labels_of(program), title, inplace=inplace)


# -- the engine ----------------------------------------------------------------------------------------------


def begin(step: Step) -> None:
    """Find where the arrays lie."""
    ranked = None if draws(step.program) else byrow.rank_of  # elements of a row do not know their number
    addressed.begin(step, CHUNK, ranked, functools.partial(byrow.take, step, launch_over))


def reduce(step: Step, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any]:
    """The wanted reductions of a level."""
    return addressed.reduce(step, level, wanted, launch, reductions, addressed.stacked)


def reductions(step: Step, p: Pass) -> list[Any]:
    """The reductions of a pass, each for every leaf."""
    over = addressed.chunks_of(step, None)
    leaf = over.leaf
    if (seen := reading(step, p, None)) is not None:
        over = seen.lines.chunks
        leaf = seen.lines.leaf[over.leaf]
    partial = np.empty((len(p.reductions), len(leaf)))
    launch(step, p, over, None, {}, partial)
    return [gathered(r.op, parts, leaf, step.leaves) for r, parts in zip(p.reductions, partial, strict=True)]


def prepare(step: Step, holds: Holds, members: Members) -> Callable[[], None]:
    """Compile the kernel of the last pass, and compute what it takes from the array library."""
    last = addressed.prepared(step, holds, members, launch)
    if last.p is not None:
        seen = reading(step, last.p, members)
        kernel(step, last.p if seen is None else seen.p)
        for e in last.p.free if seen is None else ():
            addressed.stacks_of(step, launch).addresses(e)
    return functools.partial(addressed.store, step, last, launch)


def launch(
    step: Step, p: Pass, chunks: Chunks, members: Members, new: dict[str, Indices], *partial: Any
) -> None:
    """Run the kernel of a pass over these chunks, or over rows where it reads values of theirs; `new` has the
    addresses of the arrays that are written anew.
    """
    seen = reading(step, p, members)
    if seen is not None:
        launch_over(step, seen.p, seen.lines, seen.found, *partial, new=new)
    else:
        launch_with(step, p, chunks, addressed.rows(step, p, new, members), members, *partial)


def launch_over(
    step: Step,
    p: Pass,
    lines: Lines,
    at: dict[str, Indices],
    *partial: Any,
    new: dict[str, Indices] | None = None,
) -> None:
    """Run the kernel of a pass over rows; `at` has the addresses of what every row finds elsewhere."""
    kinds = kinds_of(step.program, p, *types_of(step))
    rows = [
        at[name]
        if name in at
        else addressed.column(step, p, name, new or {})[lines.leaf] + BYTES[kinds[name]] * lines.place
        for name in kernels.columns(p, inplace=addressed.in_place(step, p))
    ]
    launch_with(step, p, lines.chunks, rows, lines.leaf, *partial)


def launch_with(
    step: Step, p: Pass, chunks: Chunks, rows: list[Indices], leaf: Members, *partial: Any
) -> None:
    """Run the kernel of a pass; `rows` is its address table, whose columns belong to these leaves."""
    table, row = step.scalars.table(p.scalars)
    row = np.ascontiguousarray(row if leaf is None else row[leaf], np.int64)
    addresses = step.work.tables.scratch.array("addresses", (len(rows), len(row)), np.int64)
    for i, r in enumerate(rows):
        addresses[i] = r
    module = kernel(step, p)
    work, sums = module.kernel.run, partial[0] if partial else NOTHING
    counter = np.zeros(1, np.int64)
    at = counter.ctypes.data

    def run(
        _held: object = (counter, step, module),
    ) -> None:  # whoever runs this keeps what lies at the addresses
        work(at, chunks.spans, chunks.table, addresses, table, row, sums)

    threads.together(run, chunks.elements)


def kernel(step: Step, p: Pass) -> ModuleType:
    """The module with the compiled kernel of a pass."""
    return kernel_of(step.program, p, *types_of(step), inplace=addressed.in_place(step, p))


def reading(step: Step, p: Pass, members: Members) -> Reading | None:
    """How a pass reads values of another shape row by row; None where all have the shape of x."""
    return byrow.reading(step, p, members, addressed.stacks_of(step, launch)) if p.free else None


@cached
def kernel_of(program: Program, p: Pass, dtype: str, gradient: str, *, inplace: bool) -> ModuleType:
    """The module with the compiled kernel of a pass; the program holds it."""
    kinds = kinds_of(program, p, dtype, gradient)
    return cache.load(sources(program, p, kinds, dtype, inplace=inplace))


def gathered(op: str, partial: Any, leaf: Indices, leaves: int) -> Any:
    """The reduction of every leaf from those of its chunks, in their fixed order."""
    if op == "sum":
        return np.bincount(leaf, partial, leaves) if len(leaf) else np.zeros(leaves)
    if op == "norm2":
        return joined(partial, leaf, leaves)
    out = np.full(leaves, -np.inf if op == "max" else np.inf)
    (np.maximum if op == "max" else np.minimum).at(out, leaf, partial)
    return out


def joined(norms: Any, leaf: Indices, leaves: int) -> Any:
    """The norm of every leaf from those of its chunks."""
    if not len(leaf):
        return np.zeros(leaves)
    fit = (norms == 0) | ((norms > 1e-130) & (norms < 1e130))
    if fit.all():
        return np.sqrt(np.bincount(leaf, norms * norms, leaves))
    top = np.zeros(leaves)
    np.maximum.at(top, leaf, norms)
    scale = np.where((top > 0) & (top < np.inf), top, 1.0)
    return scale * np.sqrt(np.bincount(leaf, (norms / scale[leaf]) ** 2, leaves))


ENGINE = Engine(
    NAME,
    refusal,
    begin,
    reduce,
    prepare,
    addressed.spans,
    addressed.separate,
    addressed.finish,
    printed=printed,
    start=functools.partial(addressed.start, launch=launch),
    over_rows=True,
)
"""Leaves of one group, on their way through compiled kernels."""
