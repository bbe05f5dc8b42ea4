"""The state of one `setup`: groups of leaves, and what a whole step knows of them.

What a step reads (tables, the mask of frozen leaves) is replaced by an edit, never written, so a step in
another thread goes on with what it has begun with.
"""

import dataclasses
import itertools
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import BadState
from optimisers.nest import flatten
from optimisers.rule import Rule
from optimisers.settings import adjusted, numbers, skeleton
from optimisers.state.buffers import Indices
from optimisers.state.group import Entry, Group, Shape, grouped
from optimisers.state.rows import Columns, columns_of, flat
from optimisers.state.table import ScalarTable
from optimisers.tree.layout import Layout

Change = Callable[[Rule], Rule]


@final
class Loan:
    """A while in which the parameters of a state, and of all states made from it then, hold other values."""

    open = True

    def end(self) -> None:
        self.open = False


@dataclasses.dataclass(eq=False)
class Store:
    """The state of one `setup`; handles on it are made when they are looked at."""

    layout: Layout
    shapes: list[Shape | None]
    """None for a leaf without a rule, which is never stepped."""
    groups: list[Group]
    frozen: "np.ndarray[Any, np.dtype[np.bool_]]"
    """Which leaves are passed by; replaced, never written."""
    engine: str | None = None
    """The engine that must run all groups; None to choose by group."""
    conjugate: bool = False
    """Whether complex gradients are the conjugates of the direction of steepest ascent."""
    alone: bool = False
    """Whether each leaf is stepped alone, and has a group of its own."""
    group_of: Indices = dataclasses.field(init=False)
    index_of: Indices = dataclasses.field(init=False)
    handles: dict[Any, Any] = dataclasses.field(default_factory=dict[Any, Any])
    plans: dict[int, Any] = dataclasses.field(init=False)
    capturable: bool = dataclasses.field(init=False)
    """Whether the scalars live on a device."""
    retired: list[Group] = dataclasses.field(default_factory=list[Group])
    """Groups that took no further part: a graph that was captured may still write into their arrays."""
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict[Any, Any])
    """The programs of its groups, by what they are made for."""
    known: Any = None
    """The structure found last, and what it depends on."""
    lasting: Any = None
    """What no edit changes of the structure."""
    compiled: Callable[["Store"], Any] | None = None
    """Finds the structure for a compiler, which cannot look for it; called whenever it may have changed."""
    structure: Any = None
    """What `compiled` found last."""
    lock: Any = dataclasses.field(default_factory=threading.RLock)
    """Held while groups or tables are exchanged."""
    loan: Loan | None = None
    """The last time that the parameters held other values than those that are trained."""
    labels: "Labels | None" = None
    """What the last edit has edited."""

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
        self.plans, self.labels = {}, None

    def where(self, leaf: int) -> tuple[Group, int]:
        return self.groups[self.group_of[leaf]], int(self.index_of[leaf])

    def clock_of(self, leaf: int) -> Any:
        """How many updates have covered a leaf."""
        group, i = self.where(leaf)
        return group.table.read_clock(i)

    def found(self, leaves: Iterable[int]) -> list[tuple[Group, Indices, Indices]]:
        """(group, its members among some leaves, which of the leaves they are) for every group that has
        some.
        """
        wanted = np.fromiter(leaves, np.int64)
        if len(self.groups) == 1 and len(wanted):
            return [(self.groups[0], self.index_of[wanted], np.arange(len(wanted)))]
        at = self.group_of[wanted]
        found: list[tuple[Group, Indices, Indices]] = []
        for g in np.unique(at):
            which = np.flatnonzero(at == g)
            found.append((self.groups[g], self.index_of[wanted[which]], which))
        return found

    def lend(self) -> Callable[[], None]:
        """Let the parameters hold other values until what comes back is called."""
        self.loan = Loan()
        return self.loan.end

    def refuse_lent(self, what: str) -> None:
        """Raise BadState while the parameters hold other values than those that are trained."""
        if self.loan is not None and self.loan.open:
            raise BadState(
                f"{what} was called inside averaged_, where parameters hold their averages; call it behind "
                "the block"
            )

    # -- copies --

    def fork(self) -> "Store":
        """A store with the same state, to be changed apart from this one; arrays are copied when they are
        written.
        """
        return self.apart([g.fork() for g in self.groups])

    def apart(self, groups: list[Group]) -> "Store":
        """A store of the same leaves with other groups."""
        new = object.__new__(Store)
        fresh = {"handles": {}, "retired": [], "labels": None, "lock": threading.RLock()}
        vars(new).update(vars(self), groups=groups, **fresh)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "Store":
        return self.apart([g.duplicate() for g in self.groups])

    def successor(self, groups: list[Group]) -> "Store":
        """The store after a step, with groups of the same leaves."""
        new = self.apart(groups)
        new.changed()
        return new

    def become(self, other: "Store") -> None:
        """Go on as another store of the same leaves."""
        with self.lock:
            self.groups, self.frozen, self.labels = other.groups, other.frozen, None
        self.changed()

    def __getstate__(self) -> dict[str, Any]:
        self.refuse_lent("pickle")
        fresh = {"handles": {}, "plans": {}, "retired": [], "programs": {}} | dict.fromkeys(
            ("known", "compiled", "structure", "loan", "labels", "lasting")
        )
        return {k: v for k, v in vars(self).items() if k != "lock"} | fresh

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept, lock=threading.RLock())

    def grow(self, other: "Store", layout: Layout) -> None:
        """Take in the leaves of another store behind those of this one; `layout` is that of both."""
        with self.lock:
            for group in other.groups:
                group.leaves = group.leaves + len(self.shapes)
            self.groups = [*self.groups, *other.groups]
            self.shapes = [*self.shapes, *other.shapes]
            self.frozen = np.concatenate([self.frozen, other.frozen])
            self.layout, self.handles, self.lasting = layout, {}, None
            self.index()
        self.changed()

    # -- what a step asks --

    def arrays(self) -> list[Any]:
        """Everything that a step may change, in the order that a structure knows: of every group its state,
        scalars, clock.
        """
        found: list[Any] = []
        for group in self.groups:
            for slot in group.slots:
                found.extend(slot.buffers)
            found.extend(group.table.arrays())
        return found

    def changed(self) -> None:
        """Take note that the structure may be another."""
        if self.compiled is not None:
            self.structure = self.compiled(self)

    def settle(self) -> None:
        """Bring scalars to the host that are not traced any more."""
        for group in self.groups:
            group.table = group.table.settle()

    @property
    def traced(self) -> bool:
        """Whether a step must be traced, since the scalars are arrays of a library."""
        return any(g.table.traced for g in self.groups)

    # -- edits: each takes any number of leaves, and rebuilds no more than it must --

    def freeze(self, leaves: Sequence[int], frozen: bool) -> None:
        """Let updates pass some leaves by, or no longer."""
        with self.lock:
            mask = self.frozen.copy()
            mask[list(leaves)] = frozen
            self.frozen = mask
            for group, members, _ in self.found(leaves):
                if group.table.traced:
                    # They part at the next step. A structure that a compiler knows parts now, and once.
                    group.table = group.table.split(members)
        self.changed()

    def assign_many(self, states: Mapping[int, Any]) -> None:
        """Replace the states of leaves by others of the same form, shapes and types."""
        values = list(states.values())
        with self.lock:
            for group, members, which in self.found(states):
                group.owned()
                kinds = [registry.isarray(v) for _, v in flatten(group.program.template)]
                flat = [[v for _, v in flatten(values[w])] for w in which]
                arrays = [list(itertools.compress(f, kinds)) for f in flat]
                for j, slot in enumerate(group.slots):
                    slot.put_many(members, [a[j] for a in arrays])
                counters = [list(itertools.compress(f, map(operator.not_, kinds))) for f in flat]
                if group.types:
                    group.table = group.table.assign_counters(members, counters).merge_equal()
        self.changed()

    def assign(self, leaf: int, state: Any) -> None:
        """Replace the state of one leaf."""
        self.assign_many({leaf: state})

    def progress_of(self, leaf: int) -> dict[str, Any]:
        """How many updates have covered a leaf, as "step"; and under their names how many steps it has taken
        under each condition of its rule.
        """
        group, i = self.where(leaf)
        names = group.program.names[group.program.hypers + len(group.types) :]
        counters = group.table.read_counters(i)[len(group.types) :]
        return {"step": group.table.read_clock(i)} | dict(zip(names, counters, strict=True))

    def set_progress(self, progress: Mapping[int, Mapping[str, float]]) -> None:
        """Set the clocks of leaves, given as `progress_of` gives them; steps that are not named are those of
        every update.
        """
        values = list(progress.values())
        with self.lock:
            for group, members, which in self.found(progress):
                names = group.program.names[group.program.hypers + len(group.types) :]
                clocks = [values[w].get("step", 0) for w in which]
                steps = [[values[w].get(n, c) for n in names] for w, c in zip(which, clocks, strict=True)]
                table = group.table.set_clocks(members, clocks)
                if names:
                    table = table.assign_counters(members, steps, skip=len(group.types))
                group.table = table.merge_equal()
        self.changed()

    def change(self, leaves: Iterable[int], new: Change) -> None:
        """Replace the rule of every one of the leaves; state stays, and so do rules' equal parts of it.

        Where only hyper-parameters change, rows of tables are written; a leaf whose rule gets another
        structure changes its group.
        """
        self._edit([leaves], lambda group, label: _changed(group, label, [new]))

    def adjust_many(self, changes: Sequence[tuple[Iterable[int], Mapping[str, Any]]]) -> None:
        """Give some leaves other hyper-parameters by name, and others others; no leaf stands in two.

        Each must have been found fit by the rules. Numbers in the place of numbers are written into the
        tables, all at once.
        """
        given = [fields for _, fields in changes]

        def edit(group: Group, label: Indices) -> list[Entry]:
            return [] if _written(group, label, given) else _changed(group, label, [_to(f) for f in given])

        self._edit([leaves for leaves, _ in changes], edit)

    def _edit(
        self, lists: Sequence[Iterable[int]], edit: Callable[[Group, Indices], Sequence[Entry]]
    ) -> None:
        """Edit the groups of the leaves in some lists. `edit` is given the list of each member of a group, -1
        for none, and returns the entries that belong there no longer.
        """
        moved: list[Entry] = []
        with self.lock:
            for group, label in self._labelled(lists):
                moved += edit(group, label)
            if moved:
                self.move(moved)
        self.changed()

    def _labelled(self, lists: Sequence[Iterable[int]]) -> Sequence[tuple[Group, Indices]]:
        """(group, the list of each of its members, -1 for none) of every group with leaves in some lists; the
        same objects for the same lists, as long as these and the groups stay as they are.
        """
        listed = [leaves if isinstance(leaves, list) else list(leaves) for leaves in lists]
        counts = [len(leaves) for leaves in listed]
        known = self.labels
        if known is None or not known.are_of(listed, counts):
            of = np.repeat(np.arange(len(listed)), counts)
            found: list[tuple[Group, Indices]] = []
            for group, members, which in self.found(itertools.chain.from_iterable(listed)):
                label = np.full(len(group.leaves), -1)
                label[members] = of[which]
                found.append((group, label))
            known = self.labels = Labels(listed, counts, found)
        return known.groups

    def move(self, moved: Sequence[Entry]) -> None:
        """Give leaves rules of another structure, or states of another form: they change group."""
        gone = {entry.leaf for entry in moved}
        with self.lock:
            entries, kept = list(moved), list[Group]()
            for group in self.groups:
                if gone.isdisjoint(group.leaves.tolist()):
                    kept.append(group)
                    continue
                entries += [
                    group.entry(i) for i, leaf in enumerate(group.leaves.tolist()) if leaf not in gone
                ]
                if group.captured:
                    self.retired.append(group)
            self.groups = kept + grouped(
                sorted(entries, key=lambda e: e.leaf),
                self.shapes,
                self.programs,
                self.layout.paths,
                alone=self.alone,
            )
            self.index()
        self.changed()


def _to(fields: Mapping[str, Any]) -> Change:
    """Sets hyper-parameters of a rule by name."""
    return lambda rule: adjusted(rule, dict(fields))


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which members of the groups stood in which of some lists of leaves, at the last edit."""

    lists: list[list[int]]
    counts: list[int]
    groups: list[tuple[Group, Indices]]

    def are_of(self, lists: list[list[int]], counts: list[int]) -> bool:
        """Whether these are those lists: more leaves may have been put behind others."""
        return self.counts == counts and all(map(operator.is_, self.lists, lists))


def _parted(group: Group, label: Indices) -> tuple[ScalarTable, Indices, Indices]:
    """(the table of a group in which only members of one label share rows, the rows of those whose label is
    not -1, a member of each).
    """
    table, known = group.table, group.cache.parted
    if known is not None and known[0] is label and known[1] is table.row:
        return table, *known[2]
    first = np.zeros(table.rows, np.int64)
    first[table.row] = np.arange(len(label))
    if not (label[first][table.row] == label).all():  # a row with members of several labels
        table = table.split_by(label)
        first = np.zeros(table.rows, np.int64)
        first[table.row] = np.arange(len(label))
    rows = np.flatnonzero(label[first] >= 0)
    group.cache.parted = label, table.row, (rows, first[rows])
    return table, rows, first[rows]


def _written(group: Group, label: Indices, given: Sequence[Mapping[str, Any]]) -> bool:
    """Write hyper-parameters of the members of a group, those of one label alike; False, and nothing is
    written, where a setting is no number before or after.
    """
    table, rows, first = _parted(group, label)
    alike: dict[tuple[str, ...], list[tuple[int, Mapping[str, Any]]]] = {}
    for row, k in zip(rows.tolist(), label[first].tolist(), strict=True):
        alike.setdefault(tuple(given[k]), []).append((row, given[k]))
    edits: list[tuple[list[int], Columns, list[list[float]]]] = []
    for names, found in alike.items():
        columns = _columns(group, names)
        if columns is None:
            return False
        values = [list(flat([fields[name] for name in columns.names])) for _, fields in found]
        if not all(isinstance(v, float | int) for row in values for v in row):
            return False
        if len(columns.at):
            edits.append(([row for row, _ in found], columns, values))
    for where, columns, values in edits:
        given_there = np.array(values, np.float64)
        spread = given_there if columns.spread is None else given_there[:, columns.spread]
        table = table.write_hypers(np.array(where), columns.at, spread)
    apart = len(edits) == 1 and len(edits[0][0]) == table.rows == len(set(map(tuple, edits[0][2])))
    group.table = table if apart else table.merge_equal()
    return True


def _columns(group: Group, names: tuple[str, ...]) -> Columns | None:
    """The columns of settings of these names in the table of a group; None where one is a schedule."""
    known = group.cache.columns
    if names not in known:
        known[names] = columns_of(group.rule, names)
    return known[names]


def _changed(group: Group, label: Indices, changes: Sequence[Change]) -> list[Entry]:
    """Change the rules of the members of a group whose label is not -1; the entries of those that no longer
    belong there.
    """
    table, rows, first = _parted(group, label)
    moved: list[Entry] = []
    stay: list[int] = []
    written: list[list[Any]] = []
    own = skeleton(group.rule)
    for r, i in zip(rows.tolist(), first.tolist(), strict=True):
        rule = changes[int(label[i])](group.rule_of(i))
        if skeleton(rule) == own:
            stay.append(r)
            written.append(numbers(rule))
            continue
        moved += [group.entry(k)._replace(rule=rule) for k in np.flatnonzero(table.row == r).tolist()]
    if stay and table.hypers:
        table = table.write_hypers(np.array(stay), slice(0, table.hypers), written)
    group.table = table.merge_equal()
    return moved
