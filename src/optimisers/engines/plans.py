"""What does a step of a group do, one thing after the other? Its plan, with what each part costs."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.types import bytes_of
from optimisers.engines import interpret
from optimisers.engines.addressed import byrow, text
from optimisers.engines.addressed import task as fused
from optimisers.engines.choose import Choice
from optimisers.engines.exchange import Crossing
from optimisers.graph.expr import Expr, order, show
from optimisers.graph.passes import (
    Pass,
    is_input,
    is_kept,
    number_of,
    outputs,
    reduce_pass,
    stages,
    store_pass,
)
from optimisers.graph.plan import Round, along, filling, operations
from optimisers.graph.recipe import Shape, Shapes, recipe
from optimisers.graph.trace import Program
from optimisers.state.buffers import Indices
from optimisers.state.group import Group
from optimisers.state.group import Shape as Kind

PASSES = ("pass", "pass over rows")

FACTORISATIONS = frozenset({"eigh", "qr", "svd", "cholesky", "solve_triangular"})


@dataclasses.dataclass(frozen=True)
class PlanStep:
    """One part of a step, over all leaves of a group."""

    kind: str
    """`pass`: one kernel over all elements; `pass over rows`: the same where each row of a matrix is a leaf;
    `array operations`: by the array library, on stacks of equal shape; `operation`: by the array library,
    leaf by leaf; `exchange`: parts of matrices between processes, to the owner of each and back.
    """
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    bytes: int
    """What it moves for one parameter, the cache apart; of array operations, what each reads and writes."""
    reductions: int = 0
    """How many numbers it gives for a leaf, or for a row."""
    products: int = 0
    """Products of matrices, one for all leaves of a shape."""
    flops: int = 0
    """Of all products and all leaves."""
    where: tuple[str, ...] = ()
    """The conditions without which it does not run."""
    factorisations: tuple[str, ...] = ()
    """Operations such as `eigh`, one for all leaves of a shape."""
    sometimes: bool = False
    """Whether it is what an `every` computes, for leaves of which the conditions hold."""
    sent: int = 0
    """Bytes that this process sends to others."""

    def __str__(self) -> str:
        parts = [f"reads {', '.join(self.reads)}"] if self.reads else []
        parts += [f"writes {', '.join(self.writes)}"] if self.writes else []
        parts += [counted(self.reductions, "reduction")] if self.reductions else []
        if self.products or self.flops:
            parts.append(f"{counted(self.products, 'product')} of matrices, {self.flops / 1e9:,.3f} Gflop")
        parts += [f"{n} {name}" for name, n in Counter(self.factorisations).items()]
        moved = f"{counted(self.bytes, 'byte')} per parameter"
        parts.append(f"{self.sent:,} bytes sent" if self.kind == "exchange" else moved)
        only = f", only where {' and '.join(self.where)}" if self.where else ""
        return f"{'every: ' * self.sometimes}{self.kind}: {'; '.join(parts)}{only}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of a group does, and who does it."""

    engine: str
    refusals: tuple[tuple[str, str], ...]
    """(engine, why it does not take the group) of every faster one."""
    steps: tuple[PlanStep, ...]
    workspace: int
    """Bytes of the buffers that hold stacks between passes, as far as they were needed yet."""

    @property
    def passes(self) -> int:
        """How often a step reads through memory."""
        return sum(s.kind in PASSES or s.kind == "operation" for s in self.steps)

    @property
    def bytes(self) -> int:
        """What all passes move for one parameter."""
        return sum(s.bytes for s in self.steps if s.kind != "array operations")

    @property
    def sent(self) -> int:
        """Bytes of matrices that this process sends to others."""
        return sum(s.sent for s in self.steps)

    def describe(self) -> list[str]:
        """Lines that say why each faster engine was refused, and the parts of a step where it has several."""
        lines = [f"not {name}: {why}" for name, why in self.refusals[:-1]]
        if len(self.steps) > 1 and self.steps[0].kind != "operation":
            lines += [f"{i}. {step}" for i, step in enumerate(self.steps, 1)]
        if any(s.kind == "array operations" for s in self.steps):
            lines.append(f"workspace {self.workspace / 1e6:,.1f} MB")
        return lines


def counted(n: int, what: str) -> str:
    """`1 product`, `2 products`."""
    return f"{n} {what}{'s' * (n != 1)}"


def plan_of(group: Group, leaves: Sequence[int], choice: Choice, owner: Indices | None = None) -> Plan:
    """The plan of a step of these members of a group, in which every condition of the rule holds; where
    processes share matrices out, `owner` has which of them computes with each.
    """
    shapes = [group.parts[i].of if group.spread else group.places.shapes[i] for i in leaves]
    if choice.name != interpret.NAME:
        rank = None
        if choice.engine.over_rows and owner is None:
            laid = [group.places.strides[i] for i in leaves]
            rank = byrow.rank_of(
                shapes, [contiguous_strides(s) == t for s, t in zip(shapes, laid, strict=True)]
            )
        far = None if owner is None else Crossing(group, leaves, owner)
        steps = tuple(steps_of(group.program, group.kind, shapes, rank, far))
    else:
        steps = tuple(_interpreted(group.program, bytes_of(group.kind.library.type_name(group.kind.dtype))))
    subset = group.cache.whole
    tables = None if subset is None else subset.tables
    held = fused.workspace_of(tables).nbytes if isinstance(tables, fused.Tables) else 0
    return Plan(choice.name, choice.refusals, steps, held)


def _interpreted(program: Program, itemsize: int) -> list[PlanStep]:
    """Every operation on arrays by itself."""
    return [
        PlanStep("operation", (), (e.op,), (1 + sum(a.domain != "scalar" for a in e.args)) * itemsize)
        for e in order(program.roots)
        if e.args and e.domain != "scalar"
    ]


class Sent(Protocol):
    """What the matrices of a group send from one process to others in a step."""

    def to_owners(self, what: Round) -> int:
        """Elements that go to owners before a round."""
        ...

    def back(self, value: Expr) -> int:
        """Elements of a value that go back to be read by passes."""
        ...

    def stored(self, slot: int) -> int:
        """Elements of an array of the state that go back."""
        ...


def steps_of(
    program: Program, kind: Kind, shapes: Sequence[Shape], rank: int | None = None, far: Sent | None = None
) -> list[PlanStep]:
    """The parts of a step by kernels, of arrays of one kind that have these shapes."""
    return _Writer(program, kind, shapes, rank, far).steps()


class _Writer:
    """Lists the parts of a step."""

    def __init__(
        self, program: Program, kind: Kind, shapes: Sequence[Shape], rank: int | None, far: Sent | None
    ) -> None:
        self.program, self.rank, self.shapes = program, rank, Counter(shapes)
        self.far, self.here = far, set[int]()
        self.dtype = kind.library.type_name(kind.dtype)
        self.itemsize = bytes_of(self.dtype)
        self.width = 8 if text.arithmetic_of(self.program, self.dtype) == "float64" else 4
        """Bytes of a number of the arithmetic."""
        self.labels = text.labels_of(self.program)
        self.guards = tuple(show(g) for g in self.program.guards)

    def steps(self) -> list[PlanStep]:
        """All of them, level by level, then what comes before the stores, and the stores."""
        found: list[PlanStep] = []
        done: tuple[int, ...] = ()
        for level, stage in enumerate(stages(self.program)):
            rounds = operations(self.program, level, None, done, self.rank)
            if rounds:
                found, done = [*found, *self.rounds(rounds)], (*done, level)
            p = reduce_pass(self.program, level, (True,) * len(stage.reductions))
            if p is not None:
                where = tuple(dict.fromkeys(show(g) for r in p.reductions for g in r.guard))
                found += [*self.returned(p), self.pass_over(p, where)]
        holds = (True,) * len(self.program.guards)
        rounds = operations(self.program, None, holds, done, self.rank)
        if rounds:
            idle = operations(self.program, None, tuple(not h for h in holds), done, self.rank)
            found += self.rounds(rounds, () if idle else self.guards)
        p = store_pass(self.program, holds)
        return found if p is None else [*found, *self.returned(p), self.pass_over(p)]

    def returned(self, p: Pass) -> list[PlanStep]:
        """What comes back from the owners of matrices before a pass; before the last, the state too."""
        if self.far is None:
            return []
        fresh = [e for e in p.free if id(e) not in self.here]
        self.here |= set(map(id, fresh))
        count = sum(map(self.far.back, fresh))
        named = tuple(self.named(f"f{p.free.index(e)}") for e in fresh)
        if not (p.reductions or p.fills):
            out = outputs(self.program, (True,) * len(self.program.guards))
            for j, (slot, e) in enumerate(zip(self.program.slots, out.slots, strict=True)):
                changes = slot.shape is not None and not is_input(e, slot.name)
                if e.domain == "free" and (changes or is_kept(e, slot.name)):
                    count += self.far.stored(j)
                    named += (self.named(slot.name),)
        return [PlanStep("exchange", (), named, 0, sent=self.width * count)] if named else []

    def rounds(self, rounds: Sequence[Round], where: tuple[str, ...] = ()) -> list[PlanStep]:
        """The parts of rounds, one after the other; of one that only some steps need, with its conditions."""
        found: list[PlanStep] = []
        for what in rounds:
            parts = self.round(what, (*where, *map(show, what.only)))
            found += [dataclasses.replace(p, sometimes=bool(what.only)) for p in parts]
        return found

    def round(self, what: Round, where: tuple[str, ...] = ()) -> list[PlanStep]:
        """The parts of array operations: sums that a pass takes, what a pass writes first, the rest."""
        found: list[PlanStep] = []
        if what.along and self.rank is not None:
            found.append(self.over_rows(what, self.rank, where))
        if what.inputs:
            found.append(self.pass_over(filling(what, tuple(range(len(what.inputs)))), where))
        if self.far is not None and (sent := self.width * self.far.to_owners(what)):
            reads = tuple(f"stack {j}" for j in range(len(what.inputs)))
            found.append(PlanStep("exchange", reads, (), 0, where=where, sent=sent))
        if what.nodes or what.reductions:
            found.append(self.by_library(what, where))
        return found

    def over_rows(self, what: Round, rank: int, where: tuple[str, ...]) -> PlanStep:
        """The pass that takes sums along an axis; what it adds up stays in the cache."""
        p, gathered = along(what, rank)
        step = self.pass_over(p, where)
        return PlanStep(
            "pass over rows",
            tuple(name for name in step.reads if not name.startswith("stack")),
            (),
            step.bytes - 2 * self.width * len(gathered),
            len(what.along),
            where=where,
        )

    def by_library(self, what: Round, where: tuple[str, ...]) -> PlanStep:
        products = flops = moved = 0
        for shape, count in self.shapes.items():
            todo = recipe(what, shape)
            products += sum(op.kind == "product" for op in todo.operations)
            flops += todo.flops * count
            moved += todo.elements * count
        size = max(1, sum(math.prod(s) * n for s, n in self.shapes.items()))
        reads = tuple(f"stack {j}" for j in range(len(what.inputs)))
        return PlanStep(
            "array operations",
            reads,
            (),
            round(self.width * moved / size),
            len(what.reductions),
            products,
            flops,
            where,
            tuple(e.op for e in what.nodes if e.op in FACTORISATIONS for _ in self.shapes),
        )

    def pass_over(self, p: Pass, where: tuple[str, ...] = ()) -> PlanStep:
        """A kernel."""
        small = sum(self.is_small(e) for e in p.free)
        moved = text.traffic(self.program, p, self.dtype, self.itemsize) - self.width * small
        return PlanStep(
            "pass over rows" if small else "pass",
            tuple(map(self.named, [*p.loads, *(f"f{j}" for j in range(len(p.free)))])),
            tuple(self.named(name) for name, _ in p.stores),
            moved,
            len(p.reductions),
            where=where,
        )

    def is_small(self, e: Expr) -> bool:
        """Whether passes over rows read a value where it lies, and that is smaller than x."""
        return self.rank is not None and all(Shapes(s).known(e) != s for s in self.shapes)

    def named(self, array: str) -> str:
        """An array of a pass, for the reader."""
        kinds = {"f": "value {} of another shape", "w": "stack {}"}
        if array[0] in kinds:
            return kinds[array[0]].format(number_of(array))
        return self.labels.get(array, array)
