"""What stands in `optimizer.state`? The arrays and counters of a store, live, as torch keeps them by
parameter; and what others have written there.
"""

# pyright: reportPrivateImportUsage=false

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any, final

import numpy as np
import torch

from optimisers.arrays.layout import contiguous_strides
from optimisers.engines.addressed.pointers import Form
from optimisers.errors import TreeMismatch
from optimisers.nest import flatten
from optimisers.state.buffers import FlatBuffers, Separate
from optimisers.state.group import Group
from optimisers.state.store import Store
from optimisers.state.table import DeviceTable
from optimisers.torch.entries import Entries, aliases, entry_name
from optimisers.tree.layout import Layout


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
        self.arrays = {name: list(slot) for name, slot in self.slots.items()}
        self.forms = {name: _form(slot) for name, slot in self.slots.items()}
        self.clock = np.zeros(0, np.float32)
        """What is shown of the clocks: in float32, as torch has its steps."""
        self.numbers = np.zeros((0, 0))
        """What is shown of the counters, in the order of `columns`."""
        self.shown = self.clock, self.numbers
        """The same as it was written last."""
        self.counters = self._counters()

    @property
    def names(self) -> list[str]:
        """The names of all entries."""
        return [*self.progress, *self.own]

    def renamed(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of a parameter, by our names where they have those of torch."""
        names = {there: own for there, own in self.aliases.items() if own not in found}
        return {names.get(key, key): value for key, value in found.items()}

    def _counters(self) -> dict[str, list[Any]]:
        """The clock and every counter as tensors: those of a device where they lie, others as parts of one
        array that is written after each step.
        """
        table, names = self.group.table, ["step", *self.columns]
        if isinstance(table, DeviceTable):
            rows = table.row.tolist()
            parts = [table.clock, *(table.values[:, j] for j in self.columns.values())]
            return {n: [part[i] for i in rows] for n, part in zip(names, parts, strict=True)}
        count = len(self.group.leaves)
        self.clock, self.numbers = np.zeros(count, np.float32), np.zeros((len(self.columns), count))
        self.refresh()
        whole = [*torch.from_numpy(self.clock).unbind(), *torch.from_numpy(self.numbers).view(-1).unbind()]
        return {name: whole[k * count : (k + 1) * count] for k, name in enumerate(names)}

    def entries(self, members: Iterable[int]) -> Iterable[tuple[Any, ...]]:
        """The values of `names` for some members."""
        lists = [self.counters.get(name) or self.arrays[name] for name in self.names]
        return (tuple(each[i] for each in lists) for i in members)

    def refresh(self) -> None:
        """Show the counters as they are after a step, and arrays that were replaced."""
        table = self.group.table
        if len(self.clock):
            row = table.row
            self.clock[:] = np.asarray(table.clock)[row]
            for k, j in enumerate(self.columns.values()):
                self.numbers[k] = np.asarray(table.values)[row, j]
            self.shown = self.clock.copy(), self.numbers.copy()

    def counted(self) -> Any:
        """The members whose counters were written."""
        clock, numbers = self.shown
        if np.array_equal(self.clock, clock) and np.array_equal(self.numbers, numbers):
            return ()
        return np.flatnonzero((self.clock != clock) | (self.numbers != numbers).any(axis=0))

    def written(self, members: Any) -> Any:
        """A row of clock and counters for some members, as they were written.

        Raises TreeMismatch for what is no number of steps.
        """
        rows = np.column_stack([self.clock[members].astype(np.float64), self.numbers[:, members].T])
        if np.isnan(rows).any() or (rows[:, 0] < 0).any():
            raise TreeMismatch(
                "a counter in optimizer.state is NaN, or a step is negative; write a number of steps"
            )
        return rows

    def count(self, members: Any, numbers: Any) -> None:
        """Give some members a clock and counters: a row of scalars for each, in the order of `columns`."""
        table = self.group.table.set_clocks(members, numbers[:, 0])
        if self.columns:
            table = table.assign_counters(members, numbers[:, 1:].tolist())
        self.group.table = table.merge_equal()

    def turned(self) -> list[tuple[str, int]]:
        """(name, member) of each array whose tensor was given other memory."""
        found: list[tuple[str, int]] = []
        for name, form in self.forms.items():
            if form is None:
                continue
            slot, arrays = self.slots[name], self.arrays[name]
            at, misfit = np.empty(len(arrays), np.int64), np.empty(len(arrays), np.int64)
            at, misfit = form.addresses(arrays, slot.dtype, at, misfit, write=True, name=name)
            other = at != slot.addresses
            if len(misfit) or other.any():
                other[misfit] = True
                full = np.flatnonzero(other & (slot.places.sizes > 0))
                found += [(name, i) for i in full.tolist()]
        return found

    def restore(self, name: str, i: int) -> None:
        """Take over what the tensor of an array holds in its new memory, and give it its old one.

        Raises TreeMismatch for another shape.
        """
        slot, tensor = self.slots[name], self.arrays[name][i]
        if tuple(tensor.shape) != slot.places.shapes[i]:
            raise TreeMismatch(
                f"{name!r} in optimizer.state was given memory of shape {tuple(tensor.shape)}; it takes "
                f"{slot.places.shapes[i]}: put a new tensor into the dict of its parameter"
            )
        self.slots[name].library.assign(slot[i], tensor)
        tensor.data = slot[i]


def _form(slot: FlatBuffers) -> Form | None:
    """How the arrays of a slot lie, to be looked at; None where they are separate."""
    if isinstance(slot, Separate):
        return None
    p = slot.places
    flat = [contiguous_strides(shape) == tuple(laid) for shape, laid in zip(p.shapes, p.strides, strict=True)]
    return Form(slot.name, slot.device, p.shapes, p.strides, flat)


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
        self.put(p for p in self.leaf_of if p not in but)

    def grow(self, store: Store, layout: Layout, leaf_of: Mapping[Any, int]) -> None:
        """Publish the leaves of another store, which is put behind this one; `layout` is that of both."""
        self.store.grow(store, layout)
        self.leaf_of |= leaf_of
        more = [Block(group) for group in store.groups]
        self.blocks += more
        self.block_of |= {id(block.group): block for block in more}
        self.put(leaf_of)

    def put(self, parameters: Iterable[Any]) -> None:
        """Put the entries of some parameters into `state`."""
        state = self.state
        chosen: dict[int, list[Any]] = {}
        for p in parameters:
            chosen.setdefault(int(self.store.group_of[self.leaf_of[p]]), []).append(p)
        for g, ps in chosen.items():
            block = self.block_of[id(self.store.groups[g])]
            names = block.names
            members = [int(self.store.index_of[self.leaf_of[p]]) for p in ps]
            for p, values in zip(ps, block.entries(members), strict=True):
                held = state.get(p)
                if type(held) is not Entries or held.notes is not self.notes:
                    held = state[p] = Entries(held or {}, self.notes)
                held.aliases = block.aliases
                held.fill(zip(names, values, strict=True))
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
                found[p] = {} if held is None else held
        return found

    def fits(self, p: Any) -> bool:
        """Whether a parameter still has the shape for which its state was made, and lies where it did."""
        kind = self.store.shapes[self.leaf_of[p]]
        return kind is not None and tuple(p.shape) == kind.shape and kind.library.device(p) == kind.device

    def place(self, p: Any) -> tuple[Block, int]:
        """The block of a parameter, and its number in it."""
        group, i = self.store.where(self.leaf_of[p])
        return self.block_of[id(group)], i

    def recount(self) -> None:
        """Take over arrays that were given other memory, and counters that were written."""
        edited = False
        for block in self.blocks:
            for name, i in block.turned():
                block.restore(name, i)
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
            mine, i = self.place(p)
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
