"""The state of one `setup`: groups of leaves, and what a whole step knows of them."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import BadState
from optimisers.nest import flatten
from optimisers.rule import Rule
from optimisers.settings import numbers, skeleton
from optimisers.state.buffers import Indices
from optimisers.state.group import FOLLOWED, Group, Shape, grouped
from optimisers.state.table import duplicated
from optimisers.tree.walk import Layout


@dataclasses.dataclass(eq=False)
class Store:
    """The state of one `setup`; handles on it are made when somebody looks."""

    layout: Layout
    shapes: list[Shape | None]
    """None for a leaf without a rule, which is never stepped."""
    groups: list[Group]
    frozen: "np.ndarray[Any, np.dtype[np.bool_]]"
    clock: Any = 0
    """Updates finished so far, of whatever part."""
    engine: str | None = None
    """The engine that must run all groups; None to choose by group."""
    group_of: Indices = dataclasses.field(init=False)
    index_of: Indices = dataclasses.field(init=False)
    handles: dict[Any, Any] = dataclasses.field(default_factory=dict[Any, Any])
    plans: dict[int, Any] = dataclasses.field(init=False)
    capturable: bool = dataclasses.field(init=False)
    """Whether clock and numbers live on a device."""
    retired: list[Group] = dataclasses.field(default_factory=list[Group])
    """Groups that took no further part: a graph that was captured may still write into their arrays."""
    known: Any = None
    """The structure found last, and what it depends on."""
    numbered: Callable[["Store"], Any] | None = None
    """Numbers the structure for those who cannot look at it; called whenever it may have changed."""
    number: Any = None
    """What `numbered` said last."""

    def __post_init__(self) -> None:
        self.capturable = any(kind is not None and kind.capturable for kind in self.shapes)
        self.index()

    def index(self) -> None:
        """Note where each leaf lives, after the groups have changed."""
        self.group_of = np.full(len(self.shapes), -1)
        self.index_of = np.full(len(self.shapes), -1)
        for g, group in enumerate(self.groups):
            self.group_of[group.leaves] = g
            self.index_of[group.leaves] = np.arange(len(group.leaves))
        self.plans = {}

    def where(self, leaf: int) -> tuple[Group, int]:
        return self.groups[self.group_of[leaf]], int(self.index_of[leaf])

    def fork(self) -> "Store":
        """A store with the same state, to be changed apart from this one; arrays are copied when they are
        written.
        """
        groups = [g.fork() for g in self.groups]
        return dataclasses.replace(
            self, groups=groups, frozen=self.frozen.copy(), clock=self.own_clock(), handles={}, retired=[]
        )

    def own_clock(self) -> Any:
        """The clock, to be changed apart from this one."""
        return duplicated(self.clock) if self.capturable else self.clock

    def tick(self, skipped: Any = None) -> None:
        """Count an update; on a device, none where `skipped` is not 0."""
        self.clock = registry.library(self.clock).ticked(self.clock, skipped)

    def wind(self, clock: int) -> None:
        """Set the clock to this, if it says less."""
        if not self.capturable:
            self.clock = max(self.clock, clock)
        elif int(self.clock) < clock:
            registry.library(self.clock).assign(self.clock, clock)

    def arrays(self) -> list[Any]:
        """Everything that a step may change, in the order that a structure knows: state, numbers, clock."""
        found: list[Any] = []
        for group in self.groups:
            for pack in group.slots:
                found.extend(pack.buffers)
            found.append(group.numbers)
        return [*found, self.clock]

    def changed(self) -> None:
        """Take note that the structure may be another."""
        if self.numbered is not None:
            self.number = self.numbered(self)

    def settle(self) -> None:
        """Bring numbers to the host that nobody follows any more."""
        for group in self.groups:
            group.settle()
        if not isinstance(self.clock, int) and not self.capturable:
            library = registry.library(self.clock)
            if library.HOST_NUMBERS and library.is_fixed(self.clock):
                self.clock = int(self.clock)

    def on_host(self) -> bool:
        """Whether no number of the state is followed by somebody."""
        if self.capturable:
            return all(registry.library(g.numbers).is_fixed(g.numbers) for g in self.groups)
        return isinstance(self.clock, int) and all(isinstance(g.numbers, np.ndarray) for g in self.groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Store":
        groups = [g.duplicate() for g in self.groups]
        return dataclasses.replace(
            self, groups=groups, frozen=self.frozen.copy(), clock=self.own_clock(), handles={}, retired=[]
        )

    def successor(self, groups: list[Group]) -> "Store":
        """The store after a step, with groups of the same leaves."""
        new = object.__new__(Store)
        clock = (
            registry.library(self.clock).ticked(self.own_clock(), None) if self.capturable else self.clock + 1
        )
        changed = {"groups": groups, "frozen": self.frozen.copy(), "clock": clock, "handles": {}}
        vars(new).update(vars(self) | changed | {"retired": []})
        new.changed()
        return new

    def become(self, other: "Store") -> None:
        """Go on as another store of the same leaves."""
        self.groups, self.clock, self.frozen = other.groups, other.clock, other.frozen
        self.changed()

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"handles": {}, "plans": {}, "known": None, "numbered": None, "number": None, "retired": []}
        return vars(self) | fresh

    def assign(self, leaf: int, state: Any) -> None:
        """Replace the state of a leaf by one of the same form, shapes and types."""
        group, i = self.where(leaf)
        group.owned().part(np.array([i]))
        kinds = [registry.isarray(v) for _, v in flatten(group.program.template)]
        values = [v for _, v in flatten(state)]
        for pack, value in zip(group.slots, itertools.compress(values, kinds), strict=True):
            pack.put(i, value)
        counters = list(itertools.compress(values, map(operator.not_, kinds)))
        at = (group.row[i], slice(group.program.hypers, None))
        library = registry.library(group.numbers)
        if group.mirror is None:
            group.numbers = library.placed(group.numbers, at, counters)
        elif counters:
            given = np.array(counters, np.float64)
            library.assign(group.numbers[at], library.on_device(given, group.kind.device))
        self.changed()

    def change(self, leaves: Iterable[int], new: Callable[[Rule], Rule]) -> None:
        """Replace the rule of every one of the leaves; state stays, and so do rules' equal parts of it."""
        wanted = np.array(list(leaves), np.int64)
        moved: list[tuple[int, Rule, Any]] = []
        for group in self.groups:
            mask = np.isin(group.leaves, wanted)
            if not mask.any():
                continue
            group.part(np.flatnonzero(mask))
            moved += self.change_group(group, mask, new)
            group.send()
            group.join()
        if moved:
            self.move(moved)
        self.changed()

    @staticmethod
    def change_group(group: Group, mask: Any, new: Callable[[Rule], Rule]) -> list[tuple[int, Rule, Any]]:
        """Change the rules of some leaves of a group; (leaf, rule, state) of those that no longer belong
        there.
        """
        moved: list[tuple[int, Rule, Any]] = []
        for r in np.unique(group.row[mask]):
            members = np.flatnonzero(group.row == r)
            rule = new(group.rule_of(int(members[0])))
            if skeleton(rule) == skeleton(group.rule):
                followed = [v for v in numbers(rule) if not registry.library(v).is_fixed(v)]
                if group.mirror is not None and followed:
                    raise BadState(FOLLOWED)
                if group.mirror is not None:
                    group.mirror[r, : group.program.hypers] = [float(v) for v in numbers(rule)]
                    continue
                if followed and isinstance(group.numbers, np.ndarray):
                    group.numbers = registry.library(followed[0]).table(group.numbers)
                library = registry.library(group.numbers)
                at = (r, slice(0, group.program.hypers))
                on_host = isinstance(group.numbers, np.ndarray)
                given = [float(v) if on_host else v for v in numbers(rule)]
                group.numbers = library.placed(group.numbers, at, given)
            else:
                moved += [(int(group.leaves[i]), rule, group.state_of(int(i))) for i in members]
        return moved

    def move(self, moved: Sequence[tuple[int, Rule, Any]]) -> None:
        """Give leaves rules of another structure, or states of another form: they change group."""
        gone = {leaf for leaf, _, _ in moved}
        entries = list(moved)
        for group in self.groups:
            if gone & set(map(int, group.leaves)):
                entries += [
                    (int(leaf), group.rule_of(i), group.state_of(i))
                    for i, leaf in enumerate(group.leaves)
                    if int(leaf) not in gone
                ]
        touched = {leaf for leaf, _, _ in entries}
        kept = [g for g in self.groups if not touched & set(map(int, g.leaves))]
        self.retired += [g for g in self.groups if g not in kept and g.captured]
        self.groups = kept + grouped(sorted(entries, key=lambda e: e[0]), self.shapes)
        self.index()
        self.changed()
