"""What does a step cost, and who runs it?"""

import dataclasses
from typing import Any

import numpy as np

from optimisers.arrays.registry import isnumeric
from optimisers.engines.choose import choice_for, fused
from optimisers.errors import BadState
from optimisers.leaf import parts
from optimisers.rule import Rule
from optimisers.store import Group, Shape, grouped, started


@dataclasses.dataclass(frozen=True)
class GroupCost:
    """One group of leaves that are stepped together."""

    rule: str
    dtype: str
    leaves: int
    parameters: int
    engine: str
    reason: str
    """Why not a faster engine; empty if it is the fastest."""
    passes: int
    """How often a step reads through memory."""
    bytes_per_parameter: int
    """What a step moves: every array read and every array written, in every pass."""
    state_bytes: int
    histories: int
    """How many different rows of numbers the leaves have."""


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
                f"{g.rule}\n  {g.leaves} arrays of {g.dtype}, {g.parameters:,} parameters, "
                f"state {g.state_bytes / 1e6:,.1f} MB, {g.histories} row{'s' * (g.histories != 1)} of numbers"
            )
            why = f" ({g.reason})" if g.reason else ""
            lines.append(
                f"  engine {g.engine}{why}: {g.passes} pass{'es' * (g.passes != 1)} over memory, "
                f"{g.bytes_per_parameter} bytes per parameter"
            )
        lines.append(
            f"{self.clock} updates so far" + (f", {self.frozen} arrays frozen" if self.frozen else "")
        )
        return "\n".join(lines)

    __repr__ = __str__


def explain(state: Any) -> Explanation:
    """Which engine steps each group of leaves, in how many passes over memory, moving how many bytes per
    parameter.

    Counted for a step in which every condition of the rules holds (the flush of AccumGrad, say), with
    gradients of the type of the parameters. Raises BadState for anything but a state.
    """
    store, node, _ = parts(state)
    below = set(node.leaves)
    costs = [_cost(g, store.engine) for g in store.groups if below & set(map(int, g.leaves))]
    return Explanation(tuple(costs), int(store.frozen[sorted(below)].sum()), store.clock)


def _cost(group: Group, engine: str | None) -> GroupCost:
    library, dtype = group.kind.library, group.kind.dtype
    name = library.type_name(dtype)
    choice = choice_for(group.program, library, dtype, engine, group.memo)
    passes = fused().sample_passes(group.program)
    parameters = int(group.places.sizes.sum())
    state = sum(int(np.sum(p.places.sizes)) * np.dtype(p.dtype).itemsize for p in group.slots)
    moved = sum(fused().traffic(group.program, p, name, np.dtype(dtype).itemsize) for p in passes)
    return GroupCost(
        group.program.title if len(np.unique(group.row)) == 1 else type(group.rule).__name__,
        name,
        len(group.leaves),
        parameters,
        choice.name,
        choice.reason,
        len(passes),
        moved,
        state,
        len(np.unique(group.row)),
    )


def kernel(rule: Rule, dtype: Any = "float32", *, inplace: bool = True) -> str:
    """The generated source of a rule's kernels for parameters of this type, one module after the other.

    Raises TraceError if the rule cannot be traced, BadState if it is no rule or cannot be printed as a
    kernel.
    """
    if not isinstance(rule, Rule):
        raise BadState(f"kernel takes a rule, such as Adam(); {rule!r} was given")
    x = np.zeros(2, dtype)
    if not isnumeric(x):
        raise BadState(
            f"kernel was given dtype={dtype!r}; it takes types of floating point or complex numbers"
        )
    shape = Shape.of(x)
    (group,) = grouped([(0, rule, started(rule, x, "x"))], [shape])
    name = shape.library.type_name(shape.dtype)
    try:
        texts = [
            fused().shown(group.program, p, name, inplace=inplace)
            for p in fused().sample_passes(group.program)
        ]
    except fused().Unprintable as reason:
        raise BadState(f"{rule!r} has no kernel for {name}: {reason}") from reason
    return "\n\n".join(texts)
