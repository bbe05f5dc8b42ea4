"""The CUDA engine: one launch per pass for all leaves of a group, whatever their number.

Tables of addresses, chunks and numbers lie on the device and go over when they change, in one asynchronous
copy. What depends on a reduction is computed there too, so that clipping waits for nobody; only what the host
must know, such as whether a check of a rule holds, is fetched. A `capturable` state has all its numbers on
the device: then nothing is fetched, and a CUDA graph may hold the step.

Under TRITON_INTERPRET=1 it serves tensors on the CPU, by Triton's interpreter: slow, and for tests.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from optimisers.engines import cache
from optimisers.engines.addressed.pointers import Chunks
from optimisers.engines.addressed.task import Addressed, arithmetic_of, kinds_of, labels_of, printable, titled
from optimisers.engines.cpu import printer as kernels
from optimisers.engines.cuda import printer as triton_kernels
from optimisers.engines.task import Job, Result
from optimisers.errors import BadState
from optimisers.graph.expr import Expr, cuts
from optimisers.graph.memo import kept
from optimisers.graph.passes import Pass
from optimisers.graph.scalars import Scalars, below
from optimisers.graph.trace import Program
from optimisers.state.buffers import Indices

NAME = "triton"

LIBRARIES = ("torch", "cupy")
"""Array libraries whose arrays lie at addresses of the device."""

CHUNK = 4096
"""Elements of one chunk, which one program of a launch steps: small enough that the last ones to finish do
not keep the device waiting, large enough that looking up tables costs nothing.
"""

BLOCK = 1024
"""Elements that a program holds in registers."""

TAIL = 256
"""The same where elements are taken one by one, each at an address of its own."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True, "enable_reflect_ftz": False}
"""How Triton compiles a pass: products and sums may become one operation, as on the CPU, and the smallest
numbers are not taken for 0.
"""

NARROW = OPTIONS | {"maxnreg": 168}
"""The same for elements of two bytes beside wider state: left to itself, the assembler would spill a register
or two to fit in one more block of threads.
"""

EXACT = {"num_warps": 4, "enable_fp_fusion": False}
"""How it compiles scalars: as the host computes them."""

LANES = 128
"""Leaves whose scalars one program computes."""


# -- which groups it takes -----------------------------------------------------------------------------------


def refusal(program: Program, library: str, device: str, dtype: str) -> str | None:
    """Why this engine does not take a group; None if it does."""
    if library not in LIBRARIES:
        return f"arrays of {library}"
    if not reaches(device):
        here = "TRITON_INTERPRET is set, by which kernels run on the CPU"
        return f"arrays on {device}" + (f"; {here}" if interpreted() and device.startswith("cuda") else "")
    if dtype not in kernels.ARITHMETIC or "complex" in dtype:
        return f"element type {dtype}"
    if not available():
        return "Triton 3.4 or later is not installed; write pip install triton"
    if interpreted() and not support().INTERPRETED:
        return "TRITON_INTERPRET was set after Triton was imported; set it before Python starts"
    return printable(program, dtype, printed)


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def reaches(device: str) -> bool:
    """Whether kernels of this process run where these arrays are."""
    return device == "cpu" if interpreted() else device.startswith("cuda") and torch.cuda.is_available()


def home(device: str) -> Any:
    """Where the tables of a device are."""
    return torch.device(device)


@functools.cache
def available() -> bool:
    """Whether a Triton is installed that has what is needed."""
    try:
        support()
    except ImportError:
        return False
    return True


def printed(program: Program, p: Pass, dtype: str, *, inplace: bool) -> str:
    """The source of one pass for gradients of the type of the parameters; raises Unprintable."""
    return sources(program, p, kinds_of(program, p, dtype, dtype), dtype, inplace=inplace)


def sources(
    program: Program, p: Pass, kinds: dict[str, str], dtype: str, *, inplace: bool, scaled: bool = False
) -> str:
    """The source of one pass; raises Unprintable."""
    real, title = arithmetic_of(program, dtype, p), titled(p, dtype, inplace=inplace)
    return triton_kernels.source(p, kinds, real, labels_of(program), title, inplace=inplace, scaled=scaled)


# -- the task ------------------------------------------------------------------------------------------------


class Fused(Addressed):
    """Leaves of one group, on their way through kernels on their device."""

    chunk = CHUNK

    def __init__(self, job: Job) -> None:
        self.way = (
            job.inplace,
            job.scaling is not None,
            *(str(getattr(g, "dtype", "")) for g in job.grads[0][:1]),
        )
        if capturing(job) and self.way not in _seen(job):
            raise BadState(
                "a CUDA graph is captured of a step that has not run before; take one before the capture, in "
                "the same thread, with gradients for the same arrays"
            )
        super().__init__(job)
        self.device = home(job.device)
        self.scalars: Far = Far(job, self.scratch, self.chunks, self.device)

    # -- passes --

    def reductions(self, p: Pass) -> list[Any]:
        shape = len(p.reductions), max(1, len(self.chunks.leaf))
        with on(self.job.library, self.device):
            held = self.scratch.kept(("partial", id(p)), lambda: lasting(shape, torch.float64, self.device))
        self.launch(p, self.chunks, None, {}, held)
        return [Partial(r.op, row) for r, row in zip(p.reductions, held, strict=True)]

    def launch(self, p: Pass, chunks: Chunks, members: Any, new: dict[str, Indices], *partial: Any) -> None:
        far = self.scalars.far(p.scalars)
        counters = self.job.program.new_counters if self.blind and not (p.reductions or p.fills) else ()
        with on(self.job.library, self.device):
            on_device, table, row = None, None, self.job.row
            if far or counters:
                on_device = self.scalars.columns(p.scalars, counters)
                row = np.arange(len(row))
            elif p.scalars:
                table, row = self.scalars.table(p.scalars)
            rows, row = self.addressed(p, members, new, row)
            if not len(chunks.leaf):
                return
            sheet = self.sheet(p, members, table, rows, row)
            given = (
                placed(chunks, "table", self.device),
                sheet.addresses,
                sheet.aligned,
                sheet.table if on_device is None else on_device,
                sheet.row,
                len(row),
                *(self.job.scaling or ()),
                *partial,
            )
            options = options_of(self.job.dtype.itemsize)
            launched(self.job, self.kernel(p), len(chunks.leaf), given, **options)

    def sheet(self, p: Pass, members: Any, table: Any, rows: list[Indices], row: Indices) -> "Sheet":
        """The tables of a launch, on the device."""
        size = 0 if table is None else table.size
        key = ("sheet", id(p), size, len(rows), len(row))
        made = functools.partial(Sheet, self.device, size, len(rows), len(row), p)
        held = self.scratch.arrays if members is None else self.chunks_of(members).placed
        sheet = held[key] = held.get(key) or made()
        if self.job.capturable:
            spares = self.scratch.kept(("spares", *key), list)
            if capturing(self.job):  # the graph reads these tables whenever it is replayed: they are its own
                if not spares:
                    raise BadState(
                        f"{SPARES} CUDA graphs of one step were captured; take a step before the next capture"
                    )
                sheet = spares.pop()
                self.job.memo.setdefault("captured", []).append(sheet)
            else:
                spares += [made().spare() for _ in range(SPARES - len(spares))]
        sheet.send(table, rows, row)
        return sheet

    def kernel(self, p: Pass) -> Any:
        names = (self.job.library.type_name(t) for t in (self.job.dtype, self.gradient))
        return kernel_of(
            self.job.program, p, *names, inplace=self.job.inplace, scaled=self.job.scaling is not None
        )

    # -- what the host must know --

    def verify(self) -> None:
        if not self.blind:
            self.scalars.fetch([condition for condition, _, _ in self.job.program.checks])
        super().verify()

    def branches(self) -> list[tuple[Any, Any]]:
        if not self.blind:
            self.scalars.fetch(self.job.program.guards)
        return super().branches()

    def counters(self) -> tuple[list[Any], bool]:
        """The new counters; those of a capturable state stay on the device, where they are stored already."""
        if self.blind:
            return [], False
        self.scalars.fetch(self.job.program.new_counters)
        return super().counters()

    def received(self, total: Any) -> Any:
        return total

    def stacked(self, values: Any) -> Any:
        """A number of each leaf, which stays on the device where that can be."""
        return values.to(torch.float64) if self.job.library.NAME == "torch" else super().stacked(values)

    def prepare(self) -> None:
        super().prepare()
        for p, _ in self.plan:
            if p is not None:
                self.compile(p)
        if self.blind:
            p = self.plan[0][0] if self.plan else None
            self.scalars.prepare(p.scalars if p is not None else (), self.job.program.new_counters)

    def compile(self, p: Pass) -> None:
        """Have the kernel of a pass compiled: nothing is written before it is known that it can be."""
        if (known := (id(p), self.gradient, self.way)) in self.scratch.kept("compiled", set):
            return
        kinds = [*INDICES, *([torch.float32] * 2 if self.job.scaling is not None else [])]
        kinds += [torch.float64] if p.reductions else []
        compiled(self.kernel(p), tuple(kinds), self.device, **options_of(self.job.dtype.itemsize))
        self.scratch.kept("compiled", set).add(known)

    def commit(self) -> Result:
        if self.blind and self.plan and self.plan[0][0] is None:
            with on(self.job.library, self.device):
                self.scalars.columns((), self.job.program.new_counters)
        result = super().commit()
        self.scratch.kept("seen", set).add(self.way)
        return result


INDICES = (torch.int64, torch.int64, torch.int64, torch.float64, torch.int64, 3)
"""What every pass is given: chunks, addresses, whether they are aligned, scalars, rows, how many leaves."""

SPARES = 4
"""How many graphs of one step may be captured between two steps that are not."""


def _seen(job: Job) -> Any:
    """The ways in which these leaves were stepped in this thread."""
    scratch = job.memo.get("scratch")
    return () if scratch is None else scratch.arrays.get("seen", ())


def launched(job: Job, kernel: Any, programs: int, given: tuple[Any, ...], **options: Any) -> None:
    """Launch a kernel; what a graph that is captured reads and writes is kept as long as the state."""
    if capturing(job):
        job.memo.setdefault("captured", []).append(given)
    kernel[(programs,)](*given, **options)


@kept
def compiled(kernel: Any, kinds: tuple[Any, ...], device: Any, **options: Any) -> None:
    """Have a kernel compiled for arguments of some types, once."""
    if support().INTERPRETED:
        return
    with contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        kernel.warmup(*kinds, grid=(1,), **options)


def options_of(itemsize: int) -> dict[str, Any]:
    """How a pass over parameters of so many bytes is compiled."""
    return {"BLOCK": BLOCK, "TAIL": TAIL, **(NARROW if itemsize == 2 else OPTIONS)}


@kept
def kernel_of(program: Program, p: Pass, dtype: str, gradient: str, *, inplace: bool, scaled: bool) -> Any:
    """The kernel of a pass; Triton compiles it when it is first launched."""
    kinds = kinds_of(program, p, dtype, gradient)
    return cache.load(sources(program, p, kinds, dtype, inplace=inplace, scaled=scaled)).kernel


# -- numbers on the device -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Partial:
    """A reduction of every chunk, on the device."""

    op: str
    values: Any


class Far(Scalars):
    """The scalars of a step, some of which are known on the device only: reductions, totals, and the numbers
    of a capturable state. They are fetched when the host asks for them.
    """

    def __init__(self, job: Job, scratch: Any, chunks: Chunks, device: Any) -> None:
        super().__init__(job.numbers, job.row, job.sizes, job.clock)
        self.job, self.scratch, self.chunks, self.device = job, scratch, chunks, device
        self.partials: dict[int, Any] = {}
        """Reductions of every chunk, or of every leaf."""
        self.totals: dict[int, Any] = {}
        self.put_here: list[int] = []
        self.shown: dict[int, Any] = {}
        self.learn()

    def put(self, e: Expr, value: Any, *, of_leaf: bool) -> None:
        if isinstance(value, Partial) or (isinstance(value, torch.Tensor) and value.ndim):
            self.partials[id(e)] = value
        elif isinstance(value, torch.Tensor):
            self.totals[id(e)] = value
        else:
            self.put_here.append(id(e))
            super().put(e, value, of_leaf=of_leaf)
        self.learn()

    def learn(self) -> None:
        """Take note that more is known; every step comes to know the same."""
        self.stage = (tuple(self.partials), tuple(self.totals), tuple(self.put_here))
        self.memo: dict[int, bool] = self.scratch.kept(("far", self.stage), dict)

    def is_far(self, e: Expr) -> bool:
        """Whether the host does not know what a node depends on."""
        if id(e) not in self.memo:
            self.memo[id(e)] = id(e) not in self.put_here and any(
                id(n) in self.partials
                or id(n) in self.totals
                or (self.job.capturable and n.op in ("number", "clock"))
                for n in below(e)
            )
        return self.memo[id(e)]

    def far(self, wanted: Sequence[Expr]) -> bool:
        """Whether one of some nodes is such; most rules know all from the host."""
        if not (self.partials or self.totals or self.job.capturable):
            return False
        return any(self.is_far(e) for e in wanted)

    def get(self, e: Expr) -> Any:
        if id(e) not in self.values:
            self.fetch([e])
        return super().get(e)

    def of_leaves(self, e: Expr) -> Any:
        if not self.job.capturable or not self.is_far(e):
            return super().of_leaves(e)
        if id(e) not in self.shown:
            with on(self.job.library, self.device):
                found = self.columns([e])[:, 0]
            self.shown[id(e)] = found != 0 if e.type == "bool" else found
        return self.shown[id(e)]

    def fetch(self, wanted: Sequence[Expr]) -> None:
        """Bring nodes to the host: it waits until the device has computed them."""
        if not self.far(wanted):
            return
        apart = [e for e in dict.fromkeys(wanted) if self.is_far(e)]
        with on(self.job.library, self.device):
            found = self.columns(apart).cpu().numpy()
        for e, column in zip(apart, found.T, strict=True):
            self.put(e, column != 0 if e.type == "bool" else column.copy(), of_leaf=True)

    def sum(self, e: Expr) -> Any:
        """The sum over the leaves, on the device if the host does not know what is summed."""
        if not self.far([e]):
            return super().sum(e)
        with on(self.job.library, self.device):
            out = self.kept("total", e, 1)
            known = self.partials.get(id(e))
            if isinstance(known, Partial) and known.op == "sum" and len(self.chunks.leaf):
                given = known.values, len(self.chunks.leaf), out
                launched(self.job, support().add_up, 1, given, BLOCK=8192, **EXACT | {"num_warps": 16})
            else:
                self.run([e], (), out, total=True)
            # Totals of several groups are added on the stream of PyTorch; others have streams of their own.
            return out[0] if self.job.library.NAME == "torch" else float(out.cpu()[0])

    def columns(self, wanted: Sequence[Expr], counters: Sequence[Expr] = ()) -> Any:
        """A table on the device: a row for every leaf, a column for every node; new counters are stored."""
        shape = (len(self.row), max(1, len(wanted)))
        out = torch.empty(shape, dtype=torch.float64, device=self.device)
        if len(self.row):
            self.run(wanted, counters, out, total=False)
        return out

    def kept(self, what: str, e: Expr, n: int) -> Any:
        """A vector on the device that is there again at the next step."""
        return self.scratch.kept((what, id(e)), lambda: lasting((n,), torch.float64, self.device))

    def found(self, wanted: Sequence[Expr], counters: Sequence[Expr], *, total: bool) -> Any:
        """What `kernel` gives for some nodes, kept, and its name."""
        key = ("scalars", total, self.stage, *map(id, wanted), None, *map(id, counters))
        held, _ = self.scratch.kept(
            key, lambda: (self.kernel(wanted, counters, total=total), (wanted, counters))
        )
        return *held, key

    def run(self, wanted: Sequence[Expr], counters: Sequence[Expr], out: Any, *, total: bool) -> None:
        """Compute scalars by one launch."""
        kernel, near, vectors, totals, key = self.found(wanted, counters, total=total)
        device, leaves = self.device, len(self.row)
        found: Any = self.scratch.kept("found", lambda: lasting((1,), torch.float32, device).zero_())
        if self.job.capturable:
            table, row, clock = self.numbers, self.fixed("row", self.row), self.clock
            found = self.job.scaling[1] if self.job.scaling else found
        else:
            host, rows = self.table(near)
            sheet = self.scratch.kept(("near", key, host.shape), lambda: Sheet(device, host.size, 0, leaves))
            sheet.send(host, [], rows)
            table, row, clock = sheet.table, sheet.row, found
        sizes = self.fixed("sizes", self.sizes)
        held = [self.gathered(e) for e in vectors]
        sums = [self.totals[id(e)] for e in totals]
        grid = 1 if total else -(-leaves // LANES)
        given = (table, row, sizes, clock, found, out, *held, *sums, leaves)
        launched(self.job, kernel, grid, given, LANES=LANES, **EXACT)

    def prepare(self, wanted: Sequence[Expr], counters: Sequence[Expr]) -> None:
        """Have the kernel compiled that computes these and stores the counters."""
        kernel, _, vectors, totals, _ = self.found(wanted, counters, total=False)
        clock = self.clock.dtype if isinstance(self.clock, torch.Tensor) else torch.float32
        kinds = [torch.float64, torch.int64, torch.int64, clock, torch.float32, torch.float64]
        kinds += [torch.float64] * (len(vectors) + len(totals))
        compiled(kernel, (*kinds, 3), self.device, LANES=LANES, **EXACT)

    def kernel(self, wanted: Sequence[Expr], counters: Sequence[Expr], *, total: bool) -> Any:
        """(kernel, the nodes that the host gives it, reductions, totals) for some scalars."""
        inputs: list[tuple[Expr, str]] = []
        near: list[Expr] = []
        vectors: list[Expr] = []
        totals: list[Expr] = []
        seen: set[int] = set()
        stack = [*wanted, *counters]
        while stack:
            e = stack.pop()
            if id(e) in seen or e.op == "const":
                continue
            seen.add(id(e))
            if id(e) in self.partials:
                vectors.append(e)
                inputs.append((e, f"vector {len(vectors) - 1}"))
            elif id(e) in self.totals:
                totals.append(e)
                inputs.append((e, f"total {len(totals) - 1}"))
            elif e.op == "size":
                inputs.append((e, "size"))
            elif self.job.capturable and e.op in ("number", "clock"):
                inputs.append((e, "clock" if e.op == "clock" else f"number {e.value}"))
            elif not self.job.capturable and not self.is_far(e):
                near.append(e)
                inputs.append((e, f"number {len(near) - 1}"))
            else:
                assert not cuts(e), "a reduction that nobody has computed"
                stack.extend(e.args)
        width = len(self.job.program.names) if self.job.capturable else max(1, len(near))
        text = triton_kernels.scalar_source(
            wanted, counters, inputs, width, self.job.program.hypers, total=total
        )
        return cache.load(text).kernel, tuple(near), tuple(vectors), tuple(totals)

    def gathered(self, e: Expr) -> Any:
        """A reduction of every leaf, from those of its chunks."""
        known = self.partials[id(e)]
        if not isinstance(known, Partial):
            return known
        out = self.kept("gathered", e, len(self.row))
        begin = placed(self.chunks, "begin", self.device)
        given = known.values, begin, out
        launched(self.job, support().gather, len(self.row), given, OP=known.op, BLOCK=1024, **EXACT)
        return out

    def fixed(self, name: str, values: Indices) -> Any:
        """A vector of the host on the device; it goes over when it changes."""
        held = self.scratch.kept(("fixed", name, len(values)), lambda: Fixed(self.device, len(values)))
        return held.of(values)


# -- tables on the device ------------------------------------------------------------------------------------


def lasting(shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
    """Memory on a device for more than one step, in whatever mode that is taken."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def staging(n: int, device: Any) -> Any:
    """Memory of the host from which a device copies by itself."""
    with torch.inference_mode(False):
        return torch.empty(n, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


class Sheet:
    """What one launch is told: a table of scalars in float64, addresses, row of each leaf and whether its
    arrays are aligned; in one buffer, so that one copy brings all.
    """

    def __init__(self, device: Any, numbers: int, columns: int, leaves: int, owner: Any = None) -> None:
        self.owner = owner  # named by its identity, which nothing else must take meanwhile
        self.numbers = numbers + numbers % 2
        room = leaves + leaves % 2
        parts = [self.numbers, columns * room, room, room]
        self.host = np.zeros(max(1, sum(parts)), np.int64)
        self.sent: Any = None
        self.memory = lasting((len(self.host),), torch.int64, device)
        self.staged: Any = None
        at = np.cumsum([0, *parts]).tolist()
        views = [self.memory[a:b] for a, b in itertools.pairwise(at)]
        self.table, (self.addresses, self.row, self.aligned) = views[0].view(torch.float64), views[1:]
        table, addresses, row, aligned = (self.host[a:b] for a, b in itertools.pairwise(at))
        self.to_table = table.view(np.float64)[:numbers]
        self.to_addresses = addresses[: columns * leaves].reshape(columns, leaves)
        self.to_row, self.to_aligned = row[:leaves], aligned[:leaves]

    def spare(self) -> "Sheet":
        """This sheet with memory to copy from: while a graph is captured, none can be had."""
        self.staged = staging(len(self.host), self.memory.device)
        return self

    def send(self, table: Any, rows: Sequence[Indices], row: Any) -> None:
        """Bring over what has changed."""
        if len(self.to_table):
            self.to_table[:] = table.reshape(-1)
        for to, given in zip(self.to_addresses, rows, strict=True):
            to[:] = given
        self.to_row[:] = row
        host, sent, n = self.host, self.sent, self.numbers
        if sent is None or (host[n:] != sent[n:]).any():
            if rows:
                self.to_aligned[:] = (np.bitwise_or.reduce(self.to_addresses, axis=0) & 15) == 0
            copy_over(self.memory, host, len(host), self.staged)
            self.sent = host.copy()
        elif (host[:n] != sent[:n]).any():
            copy_over(self.memory, host, n, self.staged)
            sent[:n] = host[:n]


class Fixed:
    """A vector of whole numbers of the host, and what the device has of it."""

    def __init__(self, device: Any, n: int) -> None:
        self.memory = lasting((max(1, n),), torch.int64, device)
        self.sent: Any = None

    def of(self, values: Indices) -> Any:
        if self.sent is None or not np.array_equal(self.sent, values):
            self.sent = np.array(values, np.int64)
            copy_over(self.memory, self.sent, len(self.sent), None)
        return self.memory


def copy_over(memory: Any, host: Any, count: int, staged: Any) -> None:
    """Copy the first words of a vector to the device, without waiting."""
    if memory.device.type == "cpu":
        memory.numpy()[:count] = host[:count]
        return
    if staged is None:
        staged = staging(count, memory.device)
    staged.numpy()[:count] = host[:count]
    memory[:count].copy_(staged[:count], non_blocking=True)


def placed(chunks: Chunks, name: str, device: Any) -> Any:
    """A table of chunks on a device."""
    key = (name, str(device))
    if key not in chunks.placed:
        with torch.inference_mode(False):
            memory = torch.from_numpy(np.ascontiguousarray(getattr(chunks, name)).reshape(-1))
            chunks.placed[key] = memory.to(device, copy=True)
    return chunks.placed[key]


@functools.cache
def support() -> Any:
    """Kernels written by hand; their module needs Triton."""
    from optimisers.engines.cuda import device_functions

    return device_functions


def capturing(job: Job) -> bool:
    """Whether what is launched now is noted in a graph, to be replayed."""
    return job.library.capturing(job.device)


@contextlib.contextmanager
def _entered(device: Any, stream: Any) -> Any:
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


def on(library: Any, device: Any) -> Any:
    """The device, and the stream on which an array library works there, as the place of launches."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    handle = library.stream(str(device))
    if handle is not None and handle != torch.cuda.current_stream(device).cuda_stream:
        stream = torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)
        return _entered(device, stream)
    if torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
