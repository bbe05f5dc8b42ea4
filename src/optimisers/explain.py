"""What does a step cost, and who runs it?"""

import dataclasses
import importlib
import importlib.util
from collections import Counter
from typing import Any

import numpy as np

from optimisers.arrays.registry import isnumeric
from optimisers.engines import choose, interpret
from optimisers.engines.addressed import pointers
from optimisers.engines.addressed import task as fused
from optimisers.engines.cpu.printer import Unprintable, legend
from optimisers.errors import BadSetting, BadState
from optimisers.graph.expr import order
from optimisers.graph.passes import stages
from optimisers.graph.plan import Round, operations
from optimisers.graph.recipe import recipe
from optimisers.rule import Rule
from optimisers.state.group import Group, Shape, grouped, started
from optimisers.state.leaf import parts
from optimisers.tree.path import KeyPath


@dataclasses.dataclass(frozen=True)
class GroupCost:
    """One group of leaves that are stepped together."""

    rule: str
    dtype: str
    leaves: int
    parameters: int
    engine: str
    reason: str
    """Why not the next faster engine; empty if it is the fastest."""
    passes: int
    """How often a step reads through memory."""
    bytes_per_parameter: int
    """What a step moves: every array read and every array written, in every pass."""
    state_bytes: int
    histories: int
    """How many different rows of numbers the leaves have."""
    addresses: str = ""
    """How kernels find the arrays; empty where none do."""
    refusals: tuple[tuple[str, str], ...] = ()
    """(engine, why it does not take the group) of every faster one."""
    products: int = 0
    """Products of matrices, on stacks of equal shape, that the array library runs in a step."""
    flops: int = 0
    """Operations of floating point that all array operations of a step come to."""
    workspace: int = 0
    """Bytes of the buffers that hold stacks between passes, as far as they were needed yet."""

    @property
    def plan(self) -> list[str]:
        """What is said of a step beyond its passes."""
        lines = [f"  not {name}: {why}" for name, why in self.refusals[:-1]]
        if self.products or self.flops:
            lines.append(
                f"  array operations on stacks of equal shape: {self.products} "
                f"product{'s' * (self.products != 1)} of matrices, {self.flops / 1e9:,.3f} Gflop, workspace "
                f"{self.workspace / 1e6:,.1f} MB"
            )
        return lines


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; it prints as a table."""

    groups: tuple[GroupCost, ...]
    frozen: int
    clock: int

    def __str__(self) -> str:
        lines: list[str] = []
        for g in self.groups:
            lines.append(
                f"{g.rule}\n  {g.leaves} array{'s' * (g.leaves != 1)} of {g.dtype}, {g.parameters:,} "
                f"parameters, state {g.state_bytes / 1e6:,.1f} MB, {g.histories} "
                f"row{'s' * (g.histories != 1)} of numbers"
            )
            why = f" ({g.reason})" if g.reason else ""
            lines.append(
                f"  engine {g.engine}{why}: {g.passes} pass{'es' * (g.passes != 1)} over memory, "
                f"{g.bytes_per_parameter} bytes per parameter"
            )
            if "(" in g.addresses:  # not the fastest road
                lines.append(f"  addresses are {g.addresses}")
            lines += g.plan
        lines.append(
            f"{self.clock} update{'s' * (self.clock != 1)} so far"
            + (f", {self.frozen} array{'s' * (self.frozen != 1)} frozen" if self.frozen else "")
        )
        return "\n".join(lines)

    __repr__ = __str__


def explain(state: object) -> Explanation:
    """Which engine steps each group of leaves, in how many passes over memory, moving how many bytes per
    parameter.

    Counted for a step in which every condition of the rules holds (the flush of AccumGrad, say), with
    gradients of the type of the parameters; for the interpreter, every operation is a pass. Raises BadState
    for anything but a state.
    """
    store, node, _ = parts(state)
    below = np.unique(np.array(node.leaves, np.int64))
    costs = [_cost(g, np.flatnonzero(np.isin(g.leaves, below)), store.engine) for g in store.groups]
    clock = max((int(store.clock_of(i)) for i in below if store.shapes[i] is not None), default=0)
    return Explanation(tuple(c for c in costs if c.leaves), int(store.frozen[below].sum()), clock)


def _cost(group: Group, members: Any, engine: str | None) -> GroupCost:
    library, dtype, program = group.kind.library, group.kind.dtype, group.program
    name = library.type_name(dtype)
    choice = choose.choice_for(group, engine)
    products, flops = 0, 0
    if choice.name == interpret.NAME:
        words = [e for e in order(program.roots) if e.args and e.domain != "scalar"]
        passes = len(words)
        moved = sum(1 + sum(a.domain != "scalar" for a in e.args) for e in words) * dtype.itemsize
    else:
        fused_passes = fused.sample_passes(program)
        passes = len(fused_passes)
        moved = sum(fused.traffic(program, p, name, dtype.itemsize) for p in fused_passes)
        products, flops = _array_operations(group, members)
    rows = len(np.unique(group.table.row[members]))
    return GroupCost(
        rule=program.title if rows == 1 and len(members) == len(group.leaves) else type(group.rule).__name__,
        dtype=name,
        leaves=len(members),
        parameters=int(group.places.sizes[members].sum()),
        engine=choice.name,
        reason=choice.reason,
        passes=passes,
        bytes_per_parameter=moved,
        state_bytes=sum(int(p.places.sizes[members].sum()) * p.dtype.itemsize for p in group.slots),
        histories=rows,
        addresses=str(pointers.road(group.kind.name, group.kind.device) or "") if not choice.reason else "",
        refusals=choice.refusals,
        products=products,
        flops=flops,
        workspace=_workspace(group),
    )


def _array_operations(group: Group, members: Any) -> tuple[int, int]:
    """(products, operations of floating point) that the array library runs in a step."""
    program, shapes = group.program, [group.places.shapes[i] for i in members]
    done: tuple[int, ...] = ()
    rounds: list[Round] = []
    for level, _ in enumerate(stages(program)):
        found = operations(program, level, done=done)
        if found is not None:
            rounds, done = [*rounds, found], (*done, level)
    last = operations(program, None, (True,) * len(program.guards), done)
    rounds += [] if last is None else [last]
    products, flops = 0, 0
    for shape, count in Counter(shapes).items():
        for todo in (recipe(part, shape) for part in rounds):
            products += sum(op.kind == "product" for op in todo.operations)
            flops += todo.flops * count
    return products, flops


def _workspace(group: Group) -> int:
    """Bytes of the buffers that steps of a group have used in this thread."""
    subset = group.memo.whole
    tables = None if subset is None else subset.tables
    return fused.workspace_of(tables).nbytes if isinstance(tables, fused.Tables) else 0


def kernel(rule: Rule, dtype: object = "float32", *, inplace: bool = True, engine: str = "numba") -> str:
    """The generated source of a rule's kernels for parameters of this type, one module after the other:
    those of the CPU, or with `engine="triton"` those of CUDA devices.

    Raises TraceError if the rule cannot be traced, BadState if it is no rule or cannot be printed as a
    kernel, BadSetting for another engine.
    """
    printers = {name: plug for name, plug in choose.named().items() if plug.prints}
    if engine not in printers:
        names = " or ".join(map(repr, printers))
        raise BadSetting(f"kernel was given engine={engine!r}; it takes {names}")
    if not isinstance(rule, Rule):
        raise BadState(f"kernel takes a rule, such as Adam(); {rule!r} was given")
    x = _example(dtype)
    if x is None or not isnumeric(x):
        raise BadState(
            f"kernel was given dtype={dtype!r}; it takes types of floating point or complex numbers"
        )
    shape = Shape.of(x)
    (group,) = grouped([(0, rule, started(rule, x, KeyPath("x")))], [shape])
    name = shape.library.type_name(shape.dtype)
    printed = choose.engine_of(printers[engine]).printed
    assert printed is not None
    try:
        texts = [
            legend(p) + printed(group.program, p, name, inplace=inplace)
            for p in fused.sample_passes(group.program)
        ]
    except Unprintable as reason:
        raise BadState(f"{rule!r} has no kernel for {name}: {reason}") from reason
    return "\n\n".join(texts)


def _example(dtype: Any) -> Any:
    """Two numbers of a type, which may be given as one of PyTorch; None if there is no such type."""
    name = str(dtype).removeprefix("torch.") if "torch." in str(dtype) else dtype
    if str(name) == "bfloat16":  # NumPy knows it from others
        if importlib.util.find_spec("ml_dtypes"):
            return np.zeros(2, importlib.import_module("ml_dtypes").bfloat16)
        if importlib.util.find_spec("torch"):
            torch: Any = importlib.import_module("torch")
            return torch.zeros(2, dtype=torch.bfloat16)
    try:
        return np.zeros(2, name)
    except TypeError:
        return None
