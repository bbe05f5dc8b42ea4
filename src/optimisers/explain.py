"""What does a step cost, and who runs it?"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from optimisers.arrays.registry import isnumeric
from optimisers.arrays.types import bytes_of
from optimisers.engines import choose
from optimisers.engines.addressed import pointers, text
from optimisers.engines.cpu.maths import Unprintable
from optimisers.engines.cpu.printer import legend
from optimisers.engines.plans import Plan, plan_of
from optimisers.engines.spread import shares
from optimisers.errors import BadSetting, BadState
from optimisers.rule import Rule
from optimisers.state.group import Group, Shape, grouped, is_free, started
from optimisers.state.leaf import Branch, Leaf, parts
from optimisers.state.store import Store
from optimisers.tree.path import KeyPath, gathered, listed


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
    """How often a step reads through memory, in which every condition of the rule holds."""
    bytes_per_parameter: int
    """What a step moves: every array read and every array written, in every pass."""
    state_bytes: int
    rows: int
    """How many rows of scalars the leaves have: those whose scalars were always equal share one."""
    addresses: str
    """How kernels find the arrays; empty where none do."""
    plan: Plan
    """What a step does, one thing after the other."""
    crossing: int | None
    """How many numbers processes sum in a step, where each steps its part of every array; None elsewhere."""
    gathered: bool
    """Whether every process brings whole arrays together, of which each holds a part, and steps those."""
    trained: tuple[tuple[str, tuple[str, ...]], ...]
    """(rule, the paths that it trains) for every different rule of the group."""

    @property
    def refusals(self) -> tuple[tuple[str, str], ...]:
        """(engine, why it does not take the group) of every faster one."""
        return self.plan.refusals

    @property
    def products(self) -> int:
        """Products of matrices, on stacks of equal shape, that the array library runs in a step."""
        return sum(s.products for s in self.plan.steps)

    @property
    def flops(self) -> int:
        """Operations of floating point that all these products come to."""
        return sum(s.flops for s in self.plan.steps)

    @property
    def sent(self) -> int:
        """Bytes that this process sends to others in a step, in which every condition of the rule holds:
        parts of matrices to the process that computes with the whole, and what it has computed for others.
        """
        return self.plan.sent

    @property
    def workspace(self) -> int:
        """Bytes of the buffers that hold stacks between passes, as far as they were needed yet."""
        return self.plan.workspace


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; it prints as a table."""

    groups: tuple[GroupCost, ...]
    frozen: int
    clock: int

    def __str__(self) -> str:
        lines: list[str] = []
        groups = _together(self.groups)
        several = sum(len(g.trained) for g in groups) > 1
        for g in groups:
            lines.append(
                f"{g.rule}\n  {g.leaves} array{'s' * (g.leaves != 1)} of {g.dtype}, {g.parameters:,} "
                f"parameters, state {g.state_bytes / 1e6:,.1f} MB, {g.rows} "
                f"row{'s' * (g.rows != 1)} of scalars"
            )
            why = f" ({g.reason})" if g.reason else ""
            lines.append(
                f"  engine {g.engine}{why}: {g.passes} pass{'es' * (g.passes != 1)} over memory, "
                f"{g.bytes_per_parameter} bytes per parameter"
            )
            if several:
                lines += _trained(g.trained)
            if g.crossing is not None:
                over = f", and {g.crossing} numbers are summed over all of them" if g.crossing else ""
                lines.append(f"  each process steps its part of every array{over}")
                if g.sent:
                    lines.append(f"  each computes with some whole matrices; this one sends {g.sent:,} bytes")
            if g.gathered:
                lines.append("  every process brings all arrays together, and steps the whole of each")
            if "(" in g.addresses:  # not the fastest road
                lines.append(f"  addresses are {g.addresses}")
            lines += [f"  {line}" for line in g.plan.describe()]
        lines.append(
            f"{self.clock} update{'s' * (self.clock != 1)} so far"
            + (f", {self.frozen} array{'s' * (self.frozen != 1)} frozen" if self.frozen else "")
        )
        return "\n".join(lines)

    __repr__ = __str__


def _together(groups: Sequence[GroupCost]) -> list[GroupCost]:
    """The groups, those as one that differ in nothing but their arrays: each of these is stepped alone."""
    kinds: dict[Any, list[GroupCost]] = {}
    for g in groups:
        fixed = g.rule, g.dtype, g.engine, g.reason, g.passes, g.bytes_per_parameter, g.addresses
        kinds.setdefault((*fixed, g.crossing, g.gathered, *g.plan.describe()), []).append(g)
    return [_sum(alike) if len(alike) > 1 else alike[0] for alike in kinds.values()]


def _sum(alike: Sequence[GroupCost]) -> GroupCost:
    """What some groups come to that are alike."""
    trained: dict[str, tuple[str, ...]] = {}
    for g in alike:
        for rule, paths in g.trained:
            trained[rule] = (*trained.get(rule, ()), *paths)
    sums = ("leaves", "parameters", "state_bytes", "rows")
    changes: dict[str, Any] = {name: sum(getattr(g, name) for g in alike) for name in sums}
    return dataclasses.replace(alike[0], **changes, trained=tuple(trained.items()))


def _trained(trained: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Which rule trains what, as lines."""
    known = [(rule, listed(gathered(paths), 8)) for rule, paths in trained[:MOST]]
    lines = [f"  {rule}: {there}" if len(trained) > 1 else f"  trains {there}" for rule, there in known]
    more = len(trained) - MOST
    return [*lines, f"  and {more} more rule{'s' * (more > 1)}"] if more > 0 else lines


def explain(state: object) -> Explanation:
    """Which engine steps each group of leaves, in how many passes over memory, moving how many bytes per
    parameter; and where there are several rules, which parameters each of them trains.

    Counted for a step in which every condition of the rules holds (the flush of AccumGrad, say), with
    gradients of the type of the parameters; for the interpreter, every operation is a pass. Raises BadState
    for anything but a state, or a `TorchOptimizer`, which stands for its own.
    """
    store, node, _ = parts(getattr(state, "tree", state) if not isinstance(state, Leaf | Branch) else state)
    below = np.unique(np.array(node.leaves, np.int64))
    members = [np.flatnonzero(np.isin(g.leaves, below)) for g in store.groups]
    owner = _owners(store, members)
    costs = [_cost(store, g, *given) for g, *given in zip(store.groups, members, owner, strict=True)]
    clock = max((int(store.clock_of(i)) for i in below if store.shapes[i] is not None), default=0)
    return Explanation(tuple(c for c in costs if c.leaves), int(store.frozen[below].sum()), clock)


MOST = 16
"""How many rules of a group are printed."""


def _owners(store: Store, members: Sequence[Any]) -> list[Any]:
    """The process that computes with each matrix, group by group; None where processes share out none."""
    groups, kinds = store.groups, dict[Any, list[int]]()
    for i, group in enumerate(groups):
        if group.spread and is_free(group.program) and not _is_gathered(store, group):
            kinds.setdefault(group.parts[0].among, []).append(i)
    found: list[Any] = [None] * len(groups)
    for which in kinds.values():
        parts = [[groups[i].parts[k] for k in members[i].tolist()] for i in which]
        for i, owner in zip(which, shares(parts), strict=True):
            found[i] = owner
    return found


def _is_gathered(store: Store, group: Group) -> bool:
    """Whether every process steps whole arrays of a group, of which each holds a part."""
    free = group.spread and is_free(group.program)
    return free and choose.choice_for(group, store.engine).engine.start is None


def _cost(store: Store, group: Group, members: Any, owner: Any) -> GroupCost:
    library, program = group.kind.library, group.program
    choice = choose.choice_for(group, store.engine)
    plan = plan_of(group, members.tolist(), choice, owner)
    gathered = _is_gathered(store, group)
    rows = len(np.unique(group.table.row[members]))
    return GroupCost(
        rule=program.title if rows == 1 and len(members) == len(group.leaves) else type(group.rule).__name__,
        dtype=library.type_name(group.kind.dtype),
        leaves=len(members),
        parameters=int(group.places.sizes[members].sum()),
        engine=choice.name,
        reason=choice.reason,
        passes=plan.passes,
        bytes_per_parameter=plan.bytes,
        state_bytes=sum(
            int(p.places.sizes[members].sum()) * bytes_of(library.type_name(p.dtype)) for p in group.slots
        ),
        rows=rows,
        addresses=str(pointers.road(group.kind.name, group.kind.device) or "") if not choice.reason else "",
        plan=plan,
        crossing=sum(s.reductions for s in plan.steps) * len(members)
        if group.spread and not gathered
        else None,
        gathered=gathered,
        trained=_rules(store, group, members),
    )


def _rules(store: Store, group: Group, members: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(rule, the paths that it trains) for the different rules of some leaves of a group."""
    of_row: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for i, row in zip(members.tolist(), group.table.row[members].tolist(), strict=True):
        if row not in of_row:
            of_row[row] = repr(group.rule_of(i))
        found.setdefault(of_row[row], []).append(str(store.layout.paths[group.leaves[i]]))
    return tuple((rule, tuple(paths)) for rule, paths in found.items())


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
    x, state = _started(rule, x)
    shape = Shape.of(x)
    (group,) = grouped([(0, rule, state)], [shape])
    name = shape.library.type_name(shape.dtype)
    printed = choose.engine_of(printers[engine]).printed
    assert printed is not None
    try:
        texts = [
            legend(p) + printed(group.program, p, name, inplace=inplace)
            for p in text.sample_passes(group.program)
        ]
    except Unprintable as reason:
        raise BadState(f"{rule!r} has no kernel for {name}: {reason}") from reason
    return "\n\n".join(texts)


def _started(rule: Rule, x: Any) -> tuple[Any, Any]:
    """Parameters for which a rule is shown, and its state: a vector or, if it refuses that, a matrix."""
    try:
        return x, started(rule, x, KeyPath("x"))
    except BadSetting:
        matrix = x.reshape(1, -1)
        return matrix, started(rule, matrix, KeyPath("x"))


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
