"""The CUDA engine: one launch per pass for all leaves of a group, whatever their number.

Tables of addresses, chunks and scalars lie on the device and go over when they change, in one asynchronous
copy. What depends on a reduction is computed there too, so that clipping needs no synchronisation; only what
the host must know, such as whether a check of a rule holds, is fetched. A `capturable` state has all its
scalars on the device: then nothing is fetched, and a CUDA graph may hold the step.

Under TRITON_INTERPRET=1 it serves tensors on the CPU, by Triton's interpreter: slow, and for tests.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from optimisers.engines.addressed import task as addressed
from optimisers.engines.addressed.chunks import Chunks
from optimisers.engines.addressed.order import misplaced
from optimisers.engines.addressed.task import Tables
from optimisers.engines.addressed.text import arithmetic_of, kinds_of, labels_of, printable, titled, types_of
from optimisers.engines.cpu.maths import ARITHMETIC
from optimisers.engines.cuda import launch as launches
from optimisers.engines.cuda import printer
from optimisers.engines.cuda.launch import available, compiled, interpreted, launched, on, options_of, support
from optimisers.engines.cuda.scalars import DeviceScalars, Partial
from optimisers.engines.cuda.tables import ArgumentBuffer, lasting, placed
from optimisers.engines.task import Engine, Holds, Members, Step
from optimisers.errors import BadState
from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Pass
from optimisers.graph.trace import Program
from optimisers.state.buffers import Indices
from optimisers.state.group import Group

NAME = "triton"

LIBRARIES = ("torch", "cupy")
"""Array libraries whose arrays lie at addresses of the device."""


# -- which groups it takes -----------------------------------------------------------------------------------


def refusal(group: Group) -> str:
    """Why this engine does not take a group; empty if it does."""
    kind = group.kind
    if group.opaque or kind.opaque:
        return "unpacked state"
    if kind.name not in LIBRARIES:
        return f"arrays of {kind.name}"
    if not launches.reaches(kind.device):
        here = "; TRITON_INTERPRET is set, by which kernels run on the CPU"
        return f"arrays on {kind.device}{here if interpreted() and kind.device.startswith('cuda') else ''}"
    dtype = kind.library.type_name(kind.dtype)
    if dtype not in ARITHMETIC or "complex" in dtype:
        return f"element type {dtype}"
    return misplaced(group) or _missing() or printable(group.program, dtype, printed) or ""


def _missing() -> str:
    """What of Triton is not there; empty if all is."""
    if not available():
        return "Triton 3.4 or later is not installed; write pip install triton"
    if interpreted() and not support().INTERPRETED:
        return "TRITON_INTERPRET was set after Triton was imported; set it before Python starts"
    return ""


def printed(program: Program, p: Pass, dtype: str, *, inplace: bool) -> str:
    """The source of one pass for gradients of the type of the parameters; raises Unprintable."""
    return sources(program, p, kinds_of(program, p, dtype, dtype), dtype, inplace=inplace)


def sources(
    program: Program, p: Pass, kinds: dict[str, str], dtype: str, *, inplace: bool, scaled: bool = False
) -> str:
    """The source of one pass; raises Unprintable."""
    real, title = arithmetic_of(program, dtype), titled(p, dtype, inplace=inplace)
    return printer.source(p, kinds, real, labels_of(program), title, inplace=inplace, scaled=scaled)


# -- the engine ----------------------------------------------------------------------------------------------


def begin(step: Step) -> None:
    """Find where the arrays lie; raises BadState where a graph is captured of a step that has not run."""
    if launches.capturing(step) and way(step) not in _seen(step):
        raise BadState(
            "a CUDA graph is captured of a step that has not run before; take one before the capture, in "
            "the same thread, with gradients for the same arrays"
        )
    addressed.begin(step, launches.CHUNK)
    step.scalars = DeviceScalars(step, launches.home(step.kind.device))


def way(step: Step) -> tuple[object, ...]:
    """What decides, beside the leaves, which kernels a step launches."""
    job = step.job
    kinds = (str(getattr(g, "dtype", "")) for g in job.grads[0][:1])
    return (job.inplace, job.scaling is not None, *kinds)


def _seen(step: Step) -> set[object]:
    """The ways in which these leaves were stepped in this thread."""
    tables = step.job.subset.tables
    return tables.scratch.get_or_make("seen", set) if isinstance(tables, Tables) else set()


def scalars_of(step: Step) -> DeviceScalars:
    """The scalars of a step of this engine."""
    assert isinstance(step.scalars, DeviceScalars)
    return step.scalars


def reduce(step: Step, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any]:
    """The wanted reductions of a level; they stay on the device."""
    return addressed.reduce(step, level, wanted, launch, reductions, stacked)


def reductions(step: Step, p: Pass) -> list[Any]:
    """The reductions of a pass, each of every chunk."""
    tables: Tables = step.work.tables
    device = scalars_of(step).device
    shape = len(p.reductions), max(1, len(tables.chunks.leaf))
    with on(step.library, device):
        held = tables.scratch.get_or_make(("partial", id(p)), lambda: lasting(shape, torch.float64, device))
    launch(step, p, tables.chunks, None, {}, held)
    return [Partial(r.op, row) for r, row in zip(p.reductions, held, strict=True)]


def stacked(step: Step, values: Any) -> Any:
    """A number of each leaf, which stays on the device where that can be."""
    return values.to(torch.float64) if step.library.name == "torch" else addressed.stacked(step, values)


def launch(
    step: Step, p: Pass, chunks: Chunks, members: Members, new: dict[str, Indices], *partial: Any
) -> None:
    """Launch the kernel of a pass over these chunks; `new` has the addresses of the arrays that are written
    anew.
    """
    scalars = scalars_of(step)
    far = scalars.far(p.scalars)
    counters = step.program.new_counters if step.abstract and not (p.reductions or p.fills) else ()
    with on(step.library, scalars.device):
        on_device, table, row = None, None, step.row
        if far or counters:
            on_device = scalars.columns(p.scalars, counters)
            row = np.arange(step.leaves)
        elif p.scalars:
            table, row = scalars.table(p.scalars)
        rows = addressed.rows(step, p, new, members)
        row = row if members is None else row[members]
        if not len(chunks.leaf):
            return
        arguments = arguments_of(step, p, members, table, rows, row)
        given = (
            placed(chunks, "table", scalars.device),
            arguments.addresses,
            arguments.aligned,
            arguments.table if on_device is None else on_device,
            arguments.row,
            len(row),
            *(step.job.scaling or ()),
            *partial,
        )
        options = options_of(step.kind.dtype.itemsize)
        launched(step, kernel(step, p), len(chunks.leaf), given, **options)


def arguments_of(
    step: Step, p: Pass, members: Members, table: Any, rows: list[Indices], row: Indices
) -> ArgumentBuffer:
    """The tables of a launch, on the device."""
    size, scratch = 0 if table is None else table.size, step.work.tables.scratch
    key = ("arguments", id(p), size, len(rows), len(row))
    made = functools.partial(ArgumentBuffer, scalars_of(step).device, size, len(rows), len(row), p)
    held = scratch.arrays if members is None else addressed.chunks_of(step, members).placed
    arguments = held[key] = held.get(key) or made()
    if step.kind.capturable:
        pool = scratch.get_or_make(("pool", *key), list)
        if launches.capturing(step):
            # The graph reads these tables whenever it is replayed: they are its own.
            if not pool:
                raise BadState(
                    f"{PINNED} CUDA graphs of one step were captured; take a step before the next capture"
                )
            arguments = pool.pop()
            step.job.subset.captured.append(arguments)
        else:
            pool += [made().pinned() for _ in range(PINNED - len(pool))]
    arguments.send(table, rows, row)
    return arguments


def kernel(step: Step, p: Pass) -> Any:
    """The kernel of a pass."""
    inplace = addressed.in_place(step, p)
    return kernel_of(step.program, p, *types_of(step), inplace=inplace, scaled=step.job.scaling is not None)


def prepare(step: Step, holds: Holds, members: Members) -> Callable[[], None]:
    """Have the kernels compiled, and compute what the last pass takes from the array library."""
    last = addressed.prepared(step, holds, members, launch)
    if last.p is not None:
        for e in last.p.free:
            addressed.stacks_of(step, launch).addresses(e)
        compile_pass(step, last.p)
    if step.abstract:
        scalars = () if last.p is None else last.p.scalars
        scalars_of(step).prepare(scalars, step.program.new_counters)
    return functools.partial(store, step, last)


def compile_pass(step: Step, p: Pass) -> None:
    """Have the kernel of a pass compiled: nothing is written before it is known that it can be."""
    done: set[object] = step.work.tables.scratch.get_or_make("compiled", set)
    if (known := (id(p), step.work.gradient, way(step))) in done:
        return
    kinds = [*INDICES, *([torch.float32] * 2 if step.job.scaling is not None else [])]
    kinds += [torch.float64] if p.reductions else []
    device = scalars_of(step).device
    compiled(kernel(step, p), tuple(kinds), device, **options_of(step.kind.dtype.itemsize))
    done.add(known)


def store(step: Step, last: addressed.Last) -> None:
    """Launch the last pass; counters of a capturable state are stored even where there is none."""
    if step.abstract and last.p is None:
        scalars = scalars_of(step)
        with on(step.library, scalars.device):
            scalars.columns((), step.program.new_counters)
    addressed.store(step, last, launch)


def finish(step: Step) -> None:
    """Take note that these leaves were stepped this way."""
    addressed.finish(step)
    _seen(step).add(way(step))


INDICES = (torch.int64, torch.int64, torch.int64, torch.float64, torch.int64, 3)
"""What every pass is given: chunks, addresses, whether they are aligned, scalars, rows, how many leaves."""

PINNED = 4
"""How many graphs of one step may be captured between two steps that are not."""


@cached
def kernel_of(program: Program, p: Pass, dtype: str, gradient: str, *, inplace: bool, scaled: bool) -> Any:
    """The kernel of a pass; Triton compiles it when it is first launched."""
    kinds = kinds_of(program, p, dtype, gradient)
    return launches.loaded(sources(program, p, kinds, dtype, inplace=inplace, scaled=scaled))


ENGINE = Engine(
    NAME,
    refusal,
    begin,
    reduce,
    prepare,
    addressed.spans,
    addressed.separate,
    finish,
    keeps_totals=True,
    printed=printed,
    start=functools.partial(addressed.start, launch=launch),
)
"""Leaves of one group, on their way through kernels on their device."""
