"""What stands in `optimizer.state`? The arrays and counters of a store, live, as torch keeps them by
parameter; and what others have written there.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any, final

import numpy as np
import torch

from optimisers.arrays.layout import contiguous_strides
from optimisers.engines.addressed.pointers import Form
from optimisers.errors import TreeMismatch
from optimisers.graph.clocks import UPDATES
from optimisers.graph.courses import courses
from optimisers.nest import flatten
from optimisers.state.buffers import FlatBuffers, Separate, Spread
from optimisers.state.group import Group
from optimisers.state.store import Store
from optimisers.state.table import DeviceTable
from optimisers.torch.entries import COME_TRUE, Entries, aliases, entry_name, plain
from optimisers.tree.layout import Layout


@final
class Shown:
    """The tensors of one element type that are shown, and where they lay when they were put there."""

    def __init__(self, slots: Mapping[str, FlatBuffers], arrays: Mapping[str, list[Any]]) -> None:
        first, *_ = slots.values()
        self.dtype = first.dtype
        self.places = [(name, i) for name in slots for i in range(len(arrays[name]))]
        """(entry, member) of each."""
        self.arrays = [a for name in slots for a in arrays[name]]
        self.full = np.concatenate([slot.places.sizes > 0 for slot in slots.values()])
        self.lay = np.concatenate([slot.addresses for slot in slots.values()])
        self.bytes = self.lay.tobytes()
        self.at, self.misfit = np.empty_like(self.lay), np.empty_like(self.lay)
        shapes = [shape for slot in slots.values() for shape in slot.places.shapes]
        strides = [laid for slot in slots.values() for laid in slot.places.strides]
        flat = [contiguous_strides(s) == tuple(laid) for s, laid in zip(shapes, strides, strict=True)]
        self.form = Form(first.name, first.device, shapes, strides, flat)

    def moved(self) -> list[tuple[str, int]]:
        """(entry, member) of each tensor that was given other memory."""
        at, misfits = self.form.addresses(self.arrays, self.dtype, self.at, self.misfit, write=True, name="s")
        if not len(misfits) and at.tobytes() == self.bytes:
            return []
        other = at != self.lay
        other[misfits] = True
        return [self.places[k] for k in np.flatnonzero(other & self.full).tolist()]


def _shown(slots: Mapping[str, FlatBuffers], arrays: Mapping[str, list[Any]]) -> list[Shown]:
    """The tensors of some slots that keep their memory, by element type."""
    lasting = {name: slot for name, slot in slots.items() if not isinstance(slot, Separate | Spread)}
    kinds = dict.fromkeys(slot.dtype for slot in lasting.values())
    return [Shown({n: s for n, s in lasting.items() if s.dtype == kind}, arrays) for kind in kinds]


@final
class Block:
    """The entries of the leaves of one group."""

    def __init__(self, group: Group) -> None:
        self.group = group
        program = group.program
        steps = program.names[program.hypers + len(group.types) :]
        entries = [(entry_name(path), value) for path, value in flatten(program.template)]
        arrays = [name for name, value in entries if isinstance(value, torch.Tensor)]
        counters = [name for name, value in entries if not isinstance(value, torch.Tensor)]
        self.own = [name for name, _ in entries]
        """The names of what the rule keeps."""
        self.aliases = aliases(group.rule_of(0), [path for path, _ in flatten(program.template)])
        """Torch's names for it."""
        self.progress = ["step", *steps]
        self.slots = dict(zip(arrays, group.slots, strict=True))
        self.columns = dict(zip([*counters, *steps], range(program.hypers, len(program.names)), strict=True))
        self.courses = courses(program)
        """The counters that follow from how many steps there were, by their column."""
        self.needed = [name for name in self.own if not self._is_derived(name)]
        """The names of what the rule keeps and does not follow from the steps."""
        self.hidden = [name for name in self.own if name not in {*self.needed, *self.aliases.values()}]
        """The names of counters that follow from others, and which torch does not keep."""
        self.arrays = {name: list(slot) for name, slot in self.slots.items()}
        self.tensors = _shown(self.slots, self.arrays)
        """The tensors among them whose memory stays where it is, by element type."""
        self.memory = np.zeros(0, np.uint8)
        """What is shown of counters and clocks."""
        self.numbers, self.clock = self.views(self.memory)
        self.shown = b""
        """The same as it was written last."""
        self.version: Any = None
        """How often the clocks of a device had been written then."""
        self.counters = self._counters()

    def views(self, memory: Any) -> tuple[Any, Any]:
        """(counters in the order of `columns`, clocks) in such memory, which are in float32 in torch."""
        end = len(memory) // (8 * len(self.columns) + 4) * 8 * len(self.columns)
        numbers = memory[:end].view(np.float64)
        return numbers.reshape(len(self.columns), -1) if end else numbers, memory[end:].view(np.float32)

    @property
    def names(self) -> list[str]:
        """The names of all entries."""
        return [*self.progress, *self.own]

    def renamed(self, found: Mapping[str, Any]) -> Mapping[str, Any]:
        """Entries of a parameter, by our names where they have those of torch."""
        names = {there: own for there, own in self.aliases.items() if own not in found}
        if names.keys().isdisjoint(found):
            return found
        return {names.get(key, key): value for key, value in found.items()}

    def _is_derived(self, name: str) -> bool:
        return name in COME_TRUE or self.columns.get(name) in self.courses

    def _counters(self) -> dict[str, list[Any]]:
        """The clock and every counter as tensors: those of a device where they lie, others as parts of one
        array that is written after each step.
        """
        table, names = self.group.table, ["step", *self.columns]
        if isinstance(table, DeviceTable):
            self.refresh()
            rows = table.row.tolist()
            parts = [table.clock, *(table.values[:, j] for j in self.columns.values())]
            return {n: [part[i] for i in rows] for n, part in zip(names, parts, strict=True)}
        count = len(self.group.leaves)
        self.memory = np.zeros((8 * len(self.columns) + 4) * count, np.uint8)
        self.numbers, self.clock = self.views(self.memory)
        self.refresh()
        parts = self.clock, self.numbers.reshape(-1)
        whole = [tensor for part in parts for tensor in torch.from_numpy(part).unbind()]
        return {name: whole[k * count : (k + 1) * count] for k, name in enumerate(names)}

    def fill(self, entries: Entries, i: int) -> None:
        """Put the entries of a member into the dict of its parameter."""
        values = {name: (self.counters.get(name) or self.arrays[name])[i] for name in self.names}
        hidden = [(name, values.pop(name)) for name in self.hidden]
        entries.aliases, entries.home = self.aliases, (self, i)
        entries.fill(values.items(), hidden)

    def refresh(self) -> None:
        """Show the counters as they are after a step, and arrays that were replaced."""
        table = self.group.table
        if len(self.clock):
            row = table.row
            self.clock[:] = np.asarray(table.clock)[row]
            if self.columns:
                self.numbers[:] = np.asarray(table.values).T[table.hypers :, row]
            self.shown = self.memory.tobytes()
        elif isinstance(table, DeviceTable):
            self.version = written(table.clock)

    def counted(self) -> Any:
        """The members whose counters were written: all of them where that was on a device."""
        table = self.group.table
        if isinstance(table, DeviceTable):
            return () if written(table.clock) == self.version else np.arange(table.rows)
        if self.memory.tobytes() == self.shown:
            return ()
        numbers, clock = self.views(np.frombuffer(self.shown, np.uint8))
        return np.flatnonzero((self.clock != clock) | (self.numbers != numbers).any(axis=0))

    def written(self, members: Any) -> Any:
        """A row of clock and counters for some members, as they were written.

        Raises TreeMismatch for what is no number of steps.
        """
        if len(self.clock):
            rows = np.array([self.clock[members], *(n[members] for n in self.numbers)], np.float64).T
        else:
            rows = np.array([self.row_of(i) for i in members])
        if np.isnan(rows).any() or (rows[:, 0] < 0).any():
            raise TreeMismatch(
                "a counter in optimizer.state is NaN, or a step is negative; write a number of steps"
            )
        known: dict[Any, Any] = {}
        for i, row in zip(members, rows, strict=True):
            before = self.before(i)
            key = int(self.group.table.row[i]), before.tobytes(), row.tobytes()
            if key not in known:
                known[key] = self.follow(i, before, row.copy())
            row[:] = known[key]
        return rows

    def row_of(self, i: int) -> Any:
        """The clock and the counters of a member, as they were shown last; those of a device as they are."""
        if len(self.clock):
            numbers, clock = self.views(np.frombuffer(self.shown, np.uint8))
            return np.array([clock[i], *(n[i] for n in numbers)], np.float64)
        table = self.group.table
        return np.array([table.read_clock(i), *table.read_counters(i)])

    def before(self, i: int) -> Any:
        """What stood there before it was written: on a device, how many steps there were is not known."""
        row = self.row_of(i)
        if not len(self.clock):
            row[0] = np.nan
        return row

    def follow(self, i: int, before: Any, now: Any) -> Any:
        """A row of clock and counters in which the number of steps was written: counters that follow from
        that, and were not written themselves, are what they come to.
        """
        changed, hypers = before != now, self.group.table.read_hypers(i)
        for column, course in self.courses.items():
            at, clock = self._at(column), self._at(course.clock)
            if changed[clock] and not changed[at] and not course.mark:
                now[at] = course.after(now[clock], hypers)
        return now

    def _at(self, number: int) -> int:
        """The place of a clock or a counter in such a row."""
        return 0 if number == UPDATES else number - self.group.program.hypers + 1

    def followed(self, i: int, found: dict[str, Any]) -> dict[str, Any]:
        """The entries of a member as they were left; counters follow a step that was written, and those that
        were taken out are as they were.
        """
        before, names = self.row_of(i), ("step", *self.columns)
        try:
            given = np.array([float(found.get(name, was)) for name, was in zip(names, before, strict=True)])
        except (TypeError, ValueError, RuntimeError):
            return found  # what is no number is refused where it is taken over
        now = self.follow(i, before, given.copy())
        rows = zip(names, now, given, strict=True)
        moved = [(name, v) for name, v, was in rows if v != was or name not in found]
        return found | {name: torch.tensor(v, dtype=torch.float64) for name, v in moved}

    def completed(self, i: int, found: Mapping[str, Any]) -> Any:
        """A row of clock and counters for a member whose entries were found to fit; those that they lack
        follow from the step.
        """
        before, hypers = self.row_of(i), self.group.table.read_hypers(i)
        now = np.array([float(found.get("step", 0)), *before[1:]])
        for name, column in reversed(self.columns.items()):
            at, course = self._at(column), self.courses.get(column)
            if name in found:
                now[at] = float(found[name])
            elif name in COME_TRUE:
                now[at] = COME_TRUE[name]
            elif now[0] != before[0]:
                now[at] = now[0] if course is None else course.after(now[self._at(course.clock)], hypers)
        return now

    def count(self, members: Any, numbers: Any) -> None:
        """Give some members a clock and counters: a row of scalars for each, in the order of `columns`."""
        table = self.group.table.set_clocks(members, numbers[:, 0])
        if self.columns:
            table = table.assign_counters(members, numbers[:, 1:].tolist())
        self.group.table = table.merge_equal()

    def turned(self) -> list[tuple[str, int]]:
        """(name, member) of each array whose tensor was given other memory."""
        return [place for tensors in self.tensors for place in tensors.moved()]

    def restore_counters(self) -> None:
        """The same for counters, whose tensors stay parts of one array."""
        shown = {"step": self.clock} | dict(zip(self.columns, self.numbers, strict=True))
        for name, numbers in shown.items() if len(self.clock) else ():
            for tensor, mine in zip(self.counters[name], torch.from_numpy(numbers), strict=True):
                if tensor.data_ptr() != mine.data_ptr():
                    mine.fill_(tensor)
                    tensor.data = mine

    def restore(self, name: str, i: int) -> None:
        """Take over what the tensor of an array holds in its new memory, and give it its old one.

        Raises TreeMismatch for another shape.
        """
        slot, tensor = self.slots[name], self.arrays[name][i]
        if tuple(tensor.shape) != slot.shape(i):
            raise TreeMismatch(
                f"{name!r} in optimizer.state was given memory of shape {tuple(tensor.shape)}; it takes "
                f"{slot.shape(i)}: put a new tensor into the dict of its parameter"
            )
        self.slots[name].library.assign(slot[i], tensor)
        tensor.data = slot[i]


def written(value: Any) -> Any:
    """Which tensor a setting is, and how often it has been written; None for a number."""
    if not isinstance(value, torch.Tensor):
        return None
    return id(value), None if value.is_inference() else value._version  # noqa: SLF001 there is no other name


@final
class Published:
    """The entries of all leaves of a store, in the `state` of an optimiser."""

    def __init__(self, store: Store, state: Any, leaf_of: Mapping[Any, int]) -> None:
        self.store, self.state, self.leaf_of = store, state, dict(leaf_of)
        self.notes: list[Entries] = []
        self.blocks: list[Block] = []
        self.keys: list[Any] = []
        self.values: list[Any] = []
        self.publish()

    def publish(self, but: Collection[Any] = ()) -> None:
        """Put the entries of every leaf into `state`, but those of some parameters; what others keep in the
        same dicts stays.
        """
        self.blocks = [Block(group) for group in self.store.groups]
        self.block_of = {id(block.group): block for block in self.blocks}
        self.places = self._places(self.leaf_of)
        """The block of each parameter, and its number in it."""
        self.put(p for p in self.leaf_of if p not in but)

    def _places(self, leaf_of: Mapping[Any, int]) -> dict[Any, tuple[Block, int]]:
        blocks = [self.block_of[id(group)] for group in self.store.groups]
        group_of, index_of = self.store.group_of.tolist(), self.store.index_of.tolist()
        return {p: (blocks[group_of[leaf]], index_of[leaf]) for p, leaf in leaf_of.items()}

    def grow(self, store: Store, layout: Layout, leaf_of: Mapping[Any, int]) -> None:
        """Publish the leaves of another store, which is put behind this one; `layout` is that of both."""
        self.store.grow(store, layout)
        self.leaf_of |= leaf_of
        more = [Block(group) for group in store.groups]
        self.blocks += more
        self.block_of |= {id(block.group): block for block in more}
        self.places |= self._places(leaf_of)
        self.put(leaf_of)

    def put(self, parameters: Iterable[Any]) -> None:
        """Put the entries of some parameters into `state`."""
        state = self.state
        for p in parameters:
            held, (block, i) = state.get(p), self.places[p]
            if type(held) is not Entries or held.notes is not self.notes:
                held = state[p] = Entries(held or {}, self.notes)
            block.fill(held, i)
        self.keys, self.values = list(state), list(state.values())
        self.notes.clear()

    # -- what others have written --

    def intact(self, state: Any) -> bool:
        """Whether the dicts in `state`, and what is in them, are those that were put there."""
        return (
            state is self.state
            and not self.notes
            and len(state) == len(self.keys)
            and all(map(operator.is_, state, self.keys))
            and all(map(operator.is_, state.values(), self.values))
        )

    def exchanged(self, state: Any) -> dict[Any, Mapping[str, Any]]:
        """What stands in `state` of parameters whose entries were exchanged; {} where they were taken out."""
        noted = {id(entries) for entries in self.notes}
        mine = dict(zip(self.keys, self.values, strict=True))
        found: dict[Any, Mapping[str, Any]] = {}
        for p in self.leaf_of:
            held = state.get(p)
            if held is None or held is not mine.get(p) or id(held) in noted:
                found[p] = {} if held is None else plain(held)
        return found

    def fits(self, p: Any) -> bool:
        """Whether a parameter still has the shape for which its state was made, and lies where it did."""
        kind = self.store.shapes[self.leaf_of[p]]
        return kind is not None and tuple(p.shape) == kind.shape and kind.library.device(p) == kind.device

    def recount(self) -> None:
        """Take over arrays that were given other memory, and counters that were written."""
        edited = False
        for block in self.blocks:
            turned = block.turned()
            for name, i in turned:
                block.restore(name, i)
            if turned:
                block.restore_counters()
            members = block.counted()
            if len(members):
                with self.store.lock:
                    block.count(members, block.written(members))
                    edited = True
        if edited:
            self.store.changed()
            self.refresh()

    def refresh(self) -> None:
        """Show the state as it is after a step."""
        if not self.current:
            self.publish()
            return
        for block in self.blocks:
            block.refresh()
            if block.group.opaque:
                self.replace(block)

    def replace(self, block: Block) -> None:
        """Show separate arrays, which a step replaces."""
        block.arrays = {name: list(slot) for name, slot in block.slots.items()}
        for p in self.leaf_of:
            mine, i = self.places[p]
            if mine is block:
                self.state[p].fill((name, arrays[i]) for name, arrays in block.arrays.items())

    @property
    def current(self) -> bool:
        """Whether the groups of the store are those whose entries were published."""
        groups = self.store.groups
        return len(groups) == len(self.blocks) and all(
            b.group is g and tuple(b.slots.values()) == g.slots
            for b, g in zip(self.blocks, groups, strict=True)
        )
