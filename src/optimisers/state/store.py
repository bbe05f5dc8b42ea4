"""Where does the state live? In groups of leaves that share a program, each with packed arrays and a table of
numbers.

The numbers of a leaf (hyper-parameters, then counters) are a row of the table of its group. Leaves that were
always stepped together share a row; one that is adjusted, frozen or skipped gets its own, copied when they
part.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import BadState
from optimisers.graph.expr import Expr, cuts, order
from optimisers.graph.trace import Program, flatten, form, trace, unflatten
from optimisers.rule import Rule, needed
from optimisers.settings import fill, numbers, skeleton
from optimisers.state.buffers import Bundled, Indices, Loose, Pack, Places
from optimisers.tree.walk import Layout

Table = np.ndarray[Any, np.dtype[np.float64]]

FOLLOWED = (
    "a capturable state is for CUDA graphs; for steps that somebody differentiates, write setup without "
    "capturable"
)
"""What is said to those who want a capturable state to be followed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
    """What `setup` saw of one leaf's parameters."""

    name: str
    """The array library."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Those of its state arrays, in elements."""
    dtype: Any
    device: str
    loose: bool
    """Whether its state arrays stand each for itself, since no address of theirs can be written."""

    bundled: bool = False
    """Whether small ones of them share a vector all the same."""
    capturable: bool = False
    """Whether the numbers of its state live on its device, each leaf's in a row of their own. They stay at
    their address, as the arrays do: a graph that was captured reads and writes them there.
    """

    @classmethod
    def of(cls, x: Any, engine: str | None = None, *, capturable: bool = False) -> "Shape":
        library = registry.library(x)
        strides, loose = library.dense_strides(x), library.is_loose(x)
        bundled = loose and engine is None and library.may_bundle(x)
        return cls(
            library.NAME, tuple(x.shape), strides, x.dtype, library.device(x), loose, bundled, capturable
        )

    @property
    def library(self) -> Any:
        return registry.named(self.name)

    def stand_in(self) -> Any:
        """An array of this kind that takes no memory, to be looked at only."""
        return self.library.stand_in(self.shape, self.dtype)


@dataclasses.dataclass(eq=False)
class Group:
    """Leaves with one rule structure, element type and device."""

    rule: Rule
    """A rule of the right structure; the numbers of each leaf are in the table."""
    program: Program
    programs: dict[int, Program]
    """The programs for updates with one, two, ... gradients; `program` is that for as few as the rule
    needs.
    """
    kind: Shape
    leaves: Indices
    places: Places
    slots: tuple[Pack, ...]
    types: tuple[type, ...]
    """Python types of the counters, for those who look."""
    numbers: Any
    """The table of numbers, float64 on the host or in the library of who follows it."""
    row: Indices
    shared: bool = False
    """Whether another store may hold the same arrays: then they are copied before they are written."""
    memo: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    mirror: Any = None
    """The hyper-parameters, where the numbers live on a device: only the host changes them, so it need not
    read them back.
    """

    def owned(self) -> "Group":
        """This group, its arrays no other store's: they may be written."""
        if self.shared:
            self.slots = tuple(p.copy() for p in self.slots)
            self.shared = False
        return self

    def fork(self) -> "Group":
        """The same leaves and arrays with a table of their own; what a graph may write is not shared."""
        if self.kind.capturable:
            return self.duplicate()
        self.shared = True
        return dataclasses.replace(self, numbers=duplicated(self.numbers), row=self.row.copy())

    def duplicate(self) -> "Group":
        """The same leaves with arrays and a table of their own."""
        slots = tuple(p.copy() for p in self.slots)
        return dataclasses.replace(
            self,
            numbers=duplicated(self.numbers),
            row=self.row.copy(),
            slots=slots,
            shared=False,
            memo={} if self.kind.capturable else self.memo,
            mirror=self.own_mirror(),
        )

    def successor(self, *, whole: bool, symbolic: bool) -> "Group":
        """A group for the state after a step: new arrays, not yet written where the `whole` of it is
        stepped; those of a symbolic step are replaced, not written.
        """
        slots = tuple(p.loosened() if symbolic else p.empty() if whole else p.copy() for p in self.slots)
        turned = symbolic and not all(isinstance(p, Loose) for p in self.slots)
        return dataclasses.replace(
            self,
            numbers=duplicated(self.numbers),
            row=self.row.copy(),
            slots=slots,
            shared=False,
            memo={} if turned else self.memo,
            mirror=self.own_mirror(),
        )

    @property
    def captured(self) -> bool:
        """Whether a graph that was captured holds a step of some of the leaves."""
        memos = (self.memo, *self.memo.get("subsets", {}).values())
        return any(memo.get("captured") for memo in memos)

    @property
    def loose(self) -> bool:
        """Whether the arrays of the state stand each for itself."""
        return any(isinstance(p, Loose) for p in self.slots)

    def settle(self) -> None:
        """Bring the table of numbers to the host, once nobody follows what becomes of it."""
        if not isinstance(self.numbers, np.ndarray) and not self.kind.capturable:
            library = registry.library(self.numbers)
            if library.HOST_NUMBERS and library.is_fixed(self.numbers):
                self.numbers = np.array(library.to_numpy(self.numbers), np.float64)

    def part(self, stepped: Indices) -> None:
        """Give the members that are stepped rows of their own, where they shared one with others."""
        among = np.bincount(self.row[stepped], minlength=len(self.numbers))
        split = np.flatnonzero((among > 0) & (among < np.bincount(self.row, minlength=len(self.numbers))))
        if len(split):
            renamed = np.arange(len(self.numbers))
            renamed[split] = len(self.numbers) + np.arange(len(split))
            self.numbers = self.numbers[np.concatenate([np.arange(len(self.numbers)), split])]
            self.row[stepped] = renamed[self.row[stepped]]

    def count(self, members: Any, counters: list[Any], *, of_leaf: bool) -> None:
        """Store the counters of the members that were stepped (None for all), given by row or by leaf."""
        if counters and not isinstance(self.numbers, np.ndarray):
            self.count_symbols(members, counters, of_leaf=of_leaf)
            return
        if of_leaf:
            stepped = np.arange(len(self.row)) if members is None else members
            rows = self.numbers[self.row[stepped]]
            self.numbers = np.concatenate([self.numbers, rows])
            self.row[stepped] = at = len(self.numbers) - len(rows) + np.arange(len(rows))
            for j, value in enumerate(counters):
                self.numbers[at, self.program.hypers + j] = value
            self.join()
            return
        rows = slice(None) if members is None else np.unique(self.row[members])
        for j, value in enumerate(counters):
            self.numbers[rows, self.program.hypers + j] = value if np.ndim(value) == 0 else value[rows]

    def count_symbols(self, members: Any, counters: list[Any], *, of_leaf: bool) -> None:
        """The same for a table of numbers that somebody follows: it is replaced."""
        library, hypers = registry.library(self.numbers), self.program.hypers
        if of_leaf:
            self.numbers, self.row = self.numbers[self.row], np.arange(len(self.row))
            rows = self.row if members is None else members
        else:
            rows = np.arange(len(self.numbers)) if members is None else np.unique(self.row[members])
            counters = [v if np.ndim(v) == 0 else v[rows] for v in counters]
        new = library.columns(counters, len(rows))
        self.numbers = library.placed(self.numbers, (rows[:, None], hypers + np.arange(len(counters))), new)

    def program_for(self, gradients: int) -> Program:
        """The program for updates with this many gradients; raises TraceError if the rule needs more."""
        if gradients not in self.programs:
            self.programs[gradients] = program_of(self.rule_of(0), self.state_of(0), self.kind, gradients - 1)
        return self.programs[gradients]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what can be made again: programs, and the tables of engines."""
        kept = {k: v for k, v in vars(self).items() if k not in ("program", "programs", "memo")}
        return kept | {"template": self.program.template}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        template = kept.pop("template")
        vars(self).update(kept, memo={})
        arrays = iter([p.library.stand_in(p.places.shapes[0], p.dtype) for p in self.slots])
        state = unflatten(
            template, iter([next(arrays) if registry.isarray(v) else v for _, v in flatten(template)])
        )
        self.program = program_of(self.rule, state, self.kind)
        self.programs = {needed(self.rule) + 1: self.program}

    def join(self) -> None:
        """One row for equal numbers: what has not parted, or has met again, is one history.

        Numbers that somebody follows are not compared.
        """
        if not isinstance(self.numbers, np.ndarray) or self.kind.capturable:
            return
        used, row = np.unique(self.row, return_inverse=True)
        table, which = np.unique(self.numbers[used], axis=0, return_inverse=True)
        self.numbers, self.row = table, which.ravel()[row.ravel()]

    def own_mirror(self) -> Any:
        """What the host knows of the numbers, to be changed apart."""
        return None if self.mirror is None else self.mirror.copy()

    def send(self) -> None:
        """Bring hyper-parameters that the host has changed to where the numbers live, to the same address.

        Raises BadState while a graph is captured, which would not hold the change.
        """
        if self.mirror is None:
            return
        library, device = self.kind.library, self.kind.device
        if library.capturing(device):
            raise BadState(
                "the numbers of a capturable state were changed while a graph is captured; change them "
                "before, or between its replays"
            )
        library.assign(
            self.numbers[:, : self.program.hypers],
            library.on_device(self.mirror[:, : self.program.hypers], device),
        )

    def counters_of(self, i: int) -> Any:
        """The counters of leaf i."""
        found = self.numbers[self.row[i], self.program.hypers :]
        return found if self.mirror is None else self.kind.library.to_numpy(found)

    def rule_of(self, i: int) -> Rule:
        """The rule of leaf i of this group."""
        like, table = numbers(self.rule), self.numbers if self.mirror is None else self.mirror
        given = [_as(type(old), v) for old, v in zip(like, table[self.row[i]], strict=False)]
        return fill(self.rule, iter(given))

    def state_of(self, i: int) -> Any:
        """The state of leaf i: arrays are views (read-only where other stores share them), numbers are
        copies.
        """
        counters = iter([_as(t, v) for t, v in zip(self.types, self.counters_of(i), strict=True)])
        arrays = iter([pack.library.seen(pack[i], read_only=self.shared) for pack in self.slots])
        leaves = [
            next(arrays) if registry.isarray(v) else next(counters) for _, v in flatten(self.program.template)
        ]
        return unflatten(self.program.template, iter(leaves))


def duplicated(numbers: Any) -> Any:
    """A table of numbers, to be changed apart from the old one."""
    return registry.library(numbers).duplicate(numbers)


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, float | np.floating):
        library = registry.library(value)
        if library.HOST_NUMBERS or not library.is_fixed(value):
            return value  # somebody follows it
        value = float(str(library.to_numpy(value)))  # 0.001, not 0.0010000000474974513
    return (
        int(value) if kind is int and value == int(value) else bool(value) if kind is bool else float(value)
    )


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

    def structure(self) -> "Structure":
        """What is left without `arrays`; the same object as long as nothing of it changes."""
        token = (
            self.frozen.tobytes(),
            *((id(g.program), g.row.tobytes(), len(g.numbers), g.loose) for g in self.groups),
        )
        if self.known is None or self.known[0] != token:
            self.known = token, Structure(self)
        return self.known[1]

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


class Structure:
    """A store without its arrays; equal for stores of the same rules over the same model, and hashable."""

    def __init__(self, store: Store) -> None:
        self.store = dataclasses.replace(
            store,
            groups=[_hollow(g) for g in store.groups],
            frozen=store.frozen.copy(),
            clock=None,
            handles={},
            known=None,
        )
        groups = (
            (skeleton(g.rule), g.leaves.tobytes(), g.row.tobytes(), _slots_key(g), g.types)
            for g in store.groups
        )
        shapes = tuple(None if k is None else (k.name, k.shape, str(k.dtype), k.device) for k in store.shapes)
        self.key = (store.layout.key, shapes, store.frozen.tobytes(), store.engine, tuple(groups))
        self.hashed = hash(self.key)
        self.names: Any = None
        """Names of the arrays, for those who ask for them."""

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Structure) and self.hashed == other.hashed and self.key == other.key
        )

    def __hash__(self) -> int:
        return self.hashed

    def __repr__(self) -> str:
        return f"<structure of a state of {len(self.store.shapes)} arrays>"

    def counts(self) -> list[tuple[int, int]]:
        """(buffers, leaves) of every group."""
        return [(sum(map(_buffers, g.slots)), len(g.leaves)) for g in self.store.groups]

    def fits(self, arrays: Sequence[Any]) -> bool:
        """Whether these are arrays of the shapes that the structure knows, whose values may be looked at."""
        shapes = [s for g in self.store.groups for s in _shapes_of(g)]
        found = list(arrays)[:-1]
        return len(found) == len(shapes) and all(
            registry.isarray(a) and hasattr(a, "__array__") and tuple(a.shape) == s
            for a, s in zip(found, shapes, strict=True)
        )

    def filled(self, arrays: Sequence[Any]) -> Store:
        """The store that has these arrays."""
        given = iter(arrays)
        groups: list[Group] = []
        for g in self.store.groups:
            slots = tuple(
                dataclasses.replace(p, buffers=[next(given) for _ in range(n)])
                for p, n in zip(g.slots, map(_buffers, g.slots), strict=True)
            )
            groups.append(dataclasses.replace(g, slots=slots, numbers=next(given), row=g.row.copy()))
        new = object.__new__(Store)
        changed = {"groups": groups, "frozen": self.store.frozen.copy(), "clock": next(given), "handles": {}}
        vars(new).update(vars(self.store) | changed)
        new.changed()
        return new


class Pending:
    """A store that nobody has looked at yet: a structure and its arrays.

    What transforms and compilers hand from step to step is this; it takes whatever they put in place of
    arrays.
    """

    def __init__(self, structure: Any, arrays: Any) -> None:
        self.structure, self.arrays = structure, arrays

    def store(self) -> Store:
        """The store itself."""
        if not isinstance(self.structure, int):
            return self.structure.filled(self.arrays)
        store = NUMBERED[self.structure].filled(self.arrays)
        store.settle()
        return store


NUMBERED: list[Structure] = []
"""Structures by the number under which compiled graphs know them."""


def _shapes_of(group: Group) -> list[tuple[int, ...]]:
    """The shapes of the buffers of a group, and of its table."""
    table = int(group.row.max(initial=-1)) + 1, len(group.program.names)
    return [*(s for p in group.slots for s in _buffer_shapes(p)), table]


def _buffer_shapes(pack: Pack) -> list[tuple[int, ...]]:
    p = pack.places
    if isinstance(pack, Loose) and not isinstance(pack, Bundled):
        return list(p.shapes)
    shapes: list[tuple[int, ...]] = [(n,) for n in p.lengths]
    if isinstance(pack, Bundled):
        for i, b in enumerate(p.buffer.tolist()):
            if p.lengths[b] == p.sizes[i]:
                shapes[b] = p.shapes[i]
    return shapes


def _hollow(group: Group) -> Group:
    slots = tuple(dataclasses.replace(p, buffers=[]) for p in group.slots)
    return dataclasses.replace(group, slots=slots, numbers=None, row=group.row.copy())


def _buffers(pack: Pack) -> int:
    """How many buffers a pack has."""
    loose = isinstance(pack, Loose) and not isinstance(pack, Bundled)
    return len(pack.places.shapes) if loose else len(pack.places.lengths)


def _slots_key(group: Group) -> Any:
    return tuple((str(p.dtype), type(p), p.places.number.tobytes()) for p in group.slots)


# -- making groups -------------------------------------------------------------------------------------------


def grouped(entries: Sequence[tuple[int, Rule, Any]], shapes: Sequence[Shape | None]) -> list[Group]:
    """Groups for (leaf, rule, state) entries: one for each rule structure, form of state, element type and
    device.
    """
    kinds: dict[Any, list[tuple[int, Rule, Any]]] = {}
    programs: dict[Any, Program] = {}
    for leaf, rule, state in entries:
        kind = shapes[leaf]
        assert kind is not None
        key = (
            skeleton(rule),
            form(state),
            _arrays(state, kind),
            str(kind.dtype),
            kind.library.NAME,
            kind.device,
            kind.loose,
            kind.bundled,
            kind.capturable,
        )
        if key not in programs:
            programs[key] = program_of(rule, state, kind)
        if programs[key].shape_read:
            key = (*key, kind.shape)
            if key not in programs:
                programs[key] = program_of(rule, state, kind)
        kinds.setdefault(key, []).append((leaf, rule, state))
    return [_group(items, programs[key], shapes) for key, items in kinds.items()]


def _arrays(state: Any, kind: Shape) -> Any:
    """The types of the arrays of a state, and whether they have the shape of the parameters."""
    return tuple(
        (str(v.dtype), tuple(v.shape) == kind.shape) for _, v in flatten(state) if registry.isarray(v)
    )


def program_of(rule: Rule, state: Any, kind: Shape, more: int | None = None) -> Program:
    """The program for parameters of one kind, with as many further gradients as are given, or else needed."""
    return trace(rule, state, kind.stand_in(), needed(rule) if more is None else more)


def _group(items: list[tuple[int, Rule, Any]], program: Program, shapes: Sequence[Shape | None]) -> Group:
    kinds = [k for leaf, _, _ in items if (k := shapes[leaf]) is not None]
    first, rule = kinds[0], items[0][1]
    rows = [[*numbers(r), *(v for _, v in flatten(s) if not registry.isarray(v))] for _, r, s in items]
    places = Places.of([k.shape for k in kinds], [k.strides for k in kinds])
    columns = [[v for _, v in flatten(s) if registry.isarray(v)] for _, _, s in items]
    packs: list[Pack] = []
    for j, slot in enumerate(program.slots):
        arrays = [c[j] for c in columns]
        there = places if slot.shape is None else _places(first.library, arrays)
        if first.bundled and slot.shape is None:
            there = Places.bundled([k.shape for k in kinds], [k.strides for k in kinds])
            packs.append(Bundled.of(first.library, first.device, there, arrays))
            continue
        if first.loose:
            packs.append(Loose(first.name, arrays[0].dtype, first.device, there, arrays))
            continue
        pack = Pack.zeros(first.library, arrays[0].dtype, first.device, there)
        for i, a in enumerate(arrays):
            if first.library.any_set(a):  # zeros are left as the system gives them, untouched
                first.library.assign(pack[i], a)
        packs.append(pack)
    group = Group(
        rule=rule,
        program=program,
        programs={needed(rule) + 1: program},
        kind=first,
        leaves=np.array([leaf for leaf, _, _ in items], np.int64),
        places=places,
        slots=tuple(packs),
        types=tuple(type(v) for _, v in flatten(items[0][2]) if not registry.isarray(v)),
        numbers=table_of(rows),
        row=np.arange(len(items)),
    )
    if first.capturable:
        if not isinstance(group.numbers, np.ndarray):
            raise BadState(FOLLOWED)
        group.mirror = group.numbers
        group.numbers = first.library.on_device(group.mirror, first.device)
    elif first.library.HOST_NUMBERS or not any(map(depends_on_leaf, program.new_counters)):
        group.join()
    if not first.library.HOST_NUMBERS and isinstance(group.numbers, np.ndarray):
        group.numbers = first.library.table(group.numbers)
    return group


def depends_on_leaf(e: Expr) -> bool:
    """Whether a counter comes to differ from leaf to leaf: then each has a row of numbers at once, where
    a change of structure compiles anew.
    """
    return any(cuts(node) or node.op == "size" for node in order([e]))


def table_of(rows: list[list[Any]]) -> Any:
    """The table of numbers: on the host in float64, unless somebody follows one of them."""
    followed = [v for row in rows for v in row if not registry.library(v).is_fixed(v)]
    if followed:
        return registry.library(followed[0]).table(rows)
    return registry.named("numpy").table(rows).reshape(len(rows), -1)


def _places(library: Any, arrays: list[Any]) -> Places:
    return Places.of(
        [tuple(a.shape) for a in arrays], [library.contiguous_strides(tuple(a.shape)) for a in arrays]
    )


def started(rule: Rule, x: Any, path: str) -> Any:
    """The state that a rule wants for an array; raises BadState if it is no state."""
    if not isinstance(rule, Rule):
        hint = f"; write {rule.__name__}()" if isinstance(rule, type) and issubclass(rule, Rule) else ""
        raise BadState(f"the rule for {path} is {rule!r}; it takes a rule, such as Adam(){hint}")
    state = rule.init(x)
    if x.shape != ():
        return state
    # Arithmetic turns 0-d arrays of NumPy into its numbers; beside a 0-d parameter they are its state arrays.
    as_array = registry.library(x).scalar_array
    return unflatten(state, iter([v if (a := as_array(v)) is None else a for _, v in flatten(state)]))
