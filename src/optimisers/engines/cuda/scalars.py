"""Scalars of a step that are known on the device only: they are computed there, without synchronisation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from optimisers.engines.cuda import printer
from optimisers.engines.cuda.launch import EXACT, LANES, compiled, launched, loaded, on, support
from optimisers.engines.cuda.tables import ArgumentBuffer, Fixed, lasting, placed
from optimisers.engines.task import Step
from optimisers.graph.expr import Expr, is_full_reduction
from optimisers.graph.scalars import Table, below
from optimisers.state.buffers import Indices


@dataclasses.dataclass(frozen=True)
class Partial:
    """A reduction of every chunk, on the device."""

    op: str
    values: Any


class DeviceScalars:
    """The scalars of a step, some of which are known on the device only: reductions, totals, and the numbers
    of a capturable state. They are fetched when the host asks for them.
    """

    def __init__(self, step: Step, device: Any) -> None:
        self.step, self.device, self.near = step, device, step.scalars.near
        self.scratch, self.chunks = step.work.tables.scratch, step.work.tables.chunks
        self.capturable = step.kind.capturable
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
            self.partials.pop(id(e), None)
            self.put_here.append(id(e))
            self.near.put(e, value, of_leaf=of_leaf)
        self.learn()

    def learn(self) -> None:
        """Take note that more is known; every step comes to know the same."""
        self.stage = (tuple(self.partials), tuple(self.totals), tuple(self.put_here))
        self.cache: dict[int, bool] = self.scratch.get_or_make(("far", self.stage), dict)

    def is_far(self, e: Expr) -> bool:
        """Whether the host does not know what a node depends on."""
        if id(e) not in self.cache:
            self.cache[id(e)] = id(e) not in self.put_here and any(
                id(n) in self.partials
                or id(n) in self.totals
                or (self.capturable and n.op in ("number", "clock"))
                for n in below(e)
            )
        return self.cache[id(e)]

    def far(self, wanted: Sequence[Expr]) -> bool:
        """Whether one of some nodes is such; most rules know all from the host."""
        if not (self.partials or self.totals or self.capturable):
            return False
        return any(self.is_far(e) for e in wanted)

    def of_leaves(self, e: Expr) -> Any:
        """The value of a scalar node for every leaf."""
        if not self.capturable or not self.is_far(e):
            if id(e) not in self.near.values:
                self.fetch([e])
            return self.near.of_leaves(e)
        if id(e) not in self.shown:
            with on(self.step.library, self.device):
                found = self.columns([e])[:, 0]
            self.shown[id(e)] = found != 0 if e.type == "bool" else found
        return self.shown[id(e)]

    def fetch(self, wanted: Sequence[Expr]) -> None:
        """Bring nodes to the host: it waits until the device has computed them."""
        if not self.far(wanted):
            return
        apart = [e for e in dict.fromkeys(wanted) if self.is_far(e)]
        with on(self.step.library, self.device):
            found = self.columns(apart).cpu().numpy()
        for e, column in zip(apart, found.T, strict=True):
            self.put(e, column != 0 if e.type == "bool" else column.copy(), of_leaf=True)

    def table(self, scalars: tuple[Expr, ...]) -> tuple[Table, Any]:
        """The scalar table of a pass of which the host knows all."""
        return self.near.table(scalars)

    def total(self, join: str, e: Expr) -> Any:
        """What a reduction makes of a node over the leaves, on the device if the host does not know it."""
        if not self.far([e]):
            return self.near.total(join, e)
        with on(self.step.library, self.device):
            out = self.kept(f"total {join}", e, 1)
            known = self.partials.get(id(e))
            if isinstance(known, Partial) and known.op == join and len(self.chunks.leaf):
                given = known.values, len(self.chunks.leaf), out
                options = EXACT | {"num_warps": 16}
                launched(self.step, support().add_up, 1, given, OP=join, BLOCK=8192, **options)
            else:
                self.run([e], (), out, total=join)
            # Totals of several groups are added on the stream of PyTorch; others have streams of their own.
            return out[0] if self.step.library.name == "torch" else float(out.cpu()[0])

    def columns(self, wanted: Sequence[Expr], counters: Sequence[Expr] = ()) -> Any:
        """A table on the device: a row for every leaf, a column for every node; new counters are stored."""
        shape = (self.step.leaves, max(1, len(wanted)))
        out = torch.empty(shape, dtype=torch.float64, device=self.device)
        if self.step.leaves:
            self.run(wanted, counters, out)
        return out

    def kept(self, what: str, e: Expr, n: int) -> Any:
        """A vector on the device that is there again at the next step."""
        return self.scratch.get_or_make((what, id(e)), lambda: lasting((n,), torch.float64, self.device))

    def found(self, wanted: Sequence[Expr], counters: Sequence[Expr], total: str = "") -> Any:
        """What `kernel` gives for some nodes, kept, and its name."""
        key = ("scalars", total, self.stage, *map(id, wanted), None, *map(id, counters))
        held, _ = self.scratch.get_or_make(
            key, lambda: (self.kernel(wanted, counters, total), (wanted, counters))
        )
        return *held, key

    def run(self, wanted: Sequence[Expr], counters: Sequence[Expr], out: Any, total: str = "") -> None:
        """Compute scalars by one launch."""
        kernel, near, vectors, totals, key = self.found(wanted, counters, total)
        device, leaves = self.device, self.step.leaves
        found: Any = self.scratch.get_or_make("found", lambda: lasting((1,), torch.float32, device).zero_())
        if self.capturable:
            table, row, clock = self.near.numbers, self.fixed("row", self.step.row), self.near.clock
            found = self.step.job.scaling[1] if self.step.job.scaling else found
        else:
            host, rows = self.near.table(near)
            arguments = self.scratch.get_or_make(
                ("near", key, host.shape), lambda: ArgumentBuffer(device, host.size, 0, leaves)
            )
            arguments.send(host, [], rows)
            table, row, clock = arguments.table, arguments.row, found
        sizes = self.fixed("sizes", self.step.whole_sizes)
        held = [self.gathered(e) for e in vectors]
        sums = [self.totals[id(e)] for e in totals]
        grid = 1 if total else -(-leaves // LANES)
        given = (table, row, sizes, clock, found, out, *held, *sums, leaves)
        launched(self.step, kernel, grid, given, LANES=LANES, **EXACT)

    def prepare(self, wanted: Sequence[Expr], counters: Sequence[Expr]) -> None:
        """Have the kernel compiled that computes these and stores the counters."""
        kernel, _, vectors, totals, _ = self.found(wanted, counters)
        clock = self.near.clock.dtype if isinstance(self.near.clock, torch.Tensor) else torch.float32
        kinds = [torch.float64, torch.int64, torch.int64, clock, torch.float32, torch.float64]
        kinds += [torch.float64] * (len(vectors) + len(totals))
        compiled(kernel, (*kinds, 3), self.device, LANES=LANES, **EXACT)

    def kernel(self, wanted: Sequence[Expr], counters: Sequence[Expr], total: str) -> Any:
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
            if self.is_vector(e):
                vectors.append(e)
                inputs.append((e, f"vector {len(vectors) - 1}"))
            elif id(e) in self.totals:
                totals.append(e)
                inputs.append((e, f"total {len(totals) - 1}"))
            elif e.op == "size":
                inputs.append((e, "size"))
            elif self.capturable and e.op in ("number", "clock"):
                inputs.append((e, "clock" if e.op == "clock" else f"number {e.value}"))
            elif not self.capturable and not self.is_far(e):
                near.append(e)
                inputs.append((e, f"number {len(near) - 1}"))
            else:
                assert not is_full_reduction(e), "a reduction that was not computed"
                stack.extend(e.args)
        width = len(self.step.program.names) if self.capturable else max(1, len(near))
        program = self.step.program
        text = printer.scalar_source(
            wanted, counters, inputs, width, program.hypers, program.lowering, total=total
        )
        return loaded(text), tuple(near), tuple(vectors), tuple(totals)

    def is_vector(self, e: Expr) -> bool:
        """Whether the device has a value for each leaf."""
        return id(e) in self.partials or (e.op == "leaf" and self.capturable)

    def gathered(self, e: Expr) -> Any:
        """A reduction of every leaf, from those of its chunks; or what is known of the leaf beforehand."""
        if e.op == "leaf":
            return self.scratch.get_or_make(("leaf", e.value), lambda: self.sent(self.near.names[e.value]))
        known = self.partials[id(e)]
        if not isinstance(known, Partial):
            return known
        out = self.kept("gathered", e, self.step.leaves)
        begin = placed(self.chunks, "begin", self.device)
        given = known.values, begin, out
        launched(self.step, support().gather, self.step.leaves, given, OP=known.op, BLOCK=1024, **EXACT)
        return out

    def sent(self, values: Indices) -> Any:
        """Numbers of the host that do not change, on the device."""
        memory = lasting((len(values),), torch.float64, self.device)
        memory.copy_(torch.from_numpy(values.astype(np.float64)))
        return memory

    def fixed(self, name: str, values: Indices) -> Any:
        """A vector of the host on the device; it goes over when it changes."""
        held = self.scratch.get_or_make(("fixed", name, len(values)), lambda: Fixed(self.device, len(values)))
        return held.of(values)
