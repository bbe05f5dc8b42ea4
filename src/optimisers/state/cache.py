"""What do engines remember of a group while it stays the same? None of it is state, and all of it can be made
again; it dies with the group.
"""

import dataclasses

import numpy as np

from optimisers.state.buffers import FlatBuffers, Indices, Places
from optimisers.state.rows import Columns

SUBSETS = 16
"""How many patterns of stepped leaves a group remembers."""


@dataclasses.dataclass(eq=False)
class Subset:
    """Members of a group that are stepped together, and what was found out about them."""

    members: Indices | None
    """None for all of the group."""
    leaves: Indices
    places: Places
    slots: tuple[Places, ...]
    """Where the arrays of each slot lie, for these members."""
    names: Indices | None = None
    """The number of each leaf, by its path, in two halves; found when a rule first draws random numbers."""
    tables: object = None
    """What the engine of the group keeps for them."""
    spans: object = None
    """What was found out about the memory that their steps write."""
    captured: list[object] = dataclasses.field(default_factory=list[object])
    """What a captured graph of a step of them reads and writes: it lives as long as they do."""


@dataclasses.dataclass(eq=False)
class Cache:
    """What engines remember of a group."""

    choice: object = None
    """The engine that was chosen, and why no faster one."""
    by_rows: bool | None = None
    """Whether the rule may leave rows alone whose gradient is 0."""
    per_example: bool | None = None
    """Whether the rule takes gradients of single examples."""
    second_order: str | None = None
    """The name of the rule that must be given second gradients; empty if there is none."""
    columns: dict[tuple[str, ...], Columns | None] = dataclasses.field(
        default_factory=dict[tuple[str, ...], Columns | None]
    )
    """Where hyper-parameters of some names stand in the table; None where one is a schedule."""
    parted: tuple[Indices, Indices, tuple[Indices, Indices]] | None = None
    """(lists of members, the row of each, (rows with one list alone, a member of each)) of the last edit."""
    wide: object = None
    """The type of the arithmetic."""
    whole: Subset | None = None
    some: dict[bytes, Subset] = dataclasses.field(default_factory=dict[bytes, Subset])

    @property
    def captured(self) -> bool:
        """Whether a graph that was captured holds a step of some of the members."""
        subsets = [*self.some.values(), *([] if self.whole is None else [self.whole])]
        return any(s.captured for s in subsets)

    def all_of(self, leaves: Indices, places: Places, slots: tuple[FlatBuffers, ...]) -> Subset:
        """The whole of a group."""
        if self.whole is None:
            self.whole = Subset(None, leaves, places, tuple(p.places for p in slots))
        return self.whole

    def some_of(
        self, members: Indices, leaves: Indices, places: Places, slots: tuple[FlatBuffers, ...]
    ) -> Subset:
        """Some members of a group; the patterns seen last are remembered."""
        key = members.tobytes()
        if key not in self.some:
            idle = [k for k, kept in self.some.items() if not kept.captured]
            if len(idle) >= SUBSETS:
                self.some.pop(idle[0], None)
            self.some[key] = Subset(
                np.array(members),
                leaves[members],
                places.pick(members),
                tuple(p.places.pick(members) for p in slots),
            )
        return self.some[key]
