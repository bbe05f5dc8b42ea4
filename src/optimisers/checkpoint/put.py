"""How does what was saved come into a state and a model? In place where arrays can be written, as `update_`
writes them; else into new ones.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.memory import on_host
from optimisers.arrays.protocol import HostArray
from optimisers.checkpoint.entries import Modelled, form_of, in_numpy, numbers_in_numpy, part_of
from optimisers.checkpoint.fit import Fitted, Plan, Source, Where
from optimisers.checkpoint.format import elements
from optimisers.engines.signals import held
from optimisers.errors import BadState
from optimisers.settings import fill
from optimisers.state.buffers import FlatBuffers
from optimisers.state.leaf import parts
from optimisers.state.store import Store
from optimisers.tree.rebuild import rebuilt


def placed(tree: Any, model: Modelled | None, plan: Plan, source: Source) -> tuple[Any, Any]:
    """(the state, the model) with everything of a plan, which `refuse_read_only` has let through."""
    with held():
        state = tree if not plan.leaves else _state(tree, plan.leaves, source)
        return state, None if model is None else _model(model, plan, source)


def refuse_read_only(model: Modelled | None, plan: Plan) -> None:
    """Raise BadState for an array of the model that cannot be written."""
    for name, (_, x) in ({} if model is None else model.leaves).items():
        library = registry.library(x)
        if name in plan.model and not library.immutable and not library.is_writable(x):
            raise BadState(f"{name} cannot be written, for it is read-only; load into a copy of the model")


# -- states --------------------------------------------------------------------------------------------------


def _state(tree: Any, leaves: Sequence[Fitted], source: Source) -> Any:
    """The state after the leaves have taken everything over; a new one where arrays cannot be written."""
    if any(each.kept.group.kind.library.immutable for each in leaves):
        tree = copy.copy(tree)
    store = parts(tree)[0]
    by_leaf = {each.kept.leaf: each for each in leaves}
    with store.lock:
        for group, members, which in store.found(by_leaf):
            own = [leaves[w] for w in which]
            group.owned()
            for j, slot in enumerate(group.slots):
                _fill(slot, members, [_slots(each)[j] for each in own], source)
            if group.types:
                counters = [each.counters for each in own]
                group.table = group.table.assign_counters(members, counters).merge_equal()
    store.changed()
    _numbers(store, by_leaf)
    return tree


def _slots(each: Fitted) -> list[Any]:
    return [where for where in each.arrays if where is not None]


def _fill(slot: FlatBuffers, members: Any, wanted: Sequence[Where], source: Source) -> None:
    """Write the arrays of one slot: straight into its memory, or as many at a time as one large one takes
    room.
    """
    there = [slot.in_place(i) for i in members.tolist()]
    hosts = [_memory(x, where, source) for x, where in zip(there, wanted, strict=True)]
    source.fill([(where.name, h) for where, h in zip(wanted, hosts, strict=True) if h is not None])
    slot.library.memory.touched([x for x, h in zip(there, hosts, strict=True) if h is not None])
    rest = [k for k, host in enumerate(hosts) if host is None]
    most = max(form.bytes for form in source.forms.values())
    for part in _batches([source.forms[wanted[k].name].bytes for k in rest], most):
        some = members[rest[part]]
        values = [
            _ours(wanted[k].of(source), slot[i]) for k, i in zip(rest[part], some.tolist(), strict=True)
        ]
        slot.put_many(some, values)


def _memory(x: Any, where: Where, source: Source) -> HostArray | None:
    """The memory of an array, where what was saved can be put into it as it is; None where it is converted,
    turned, or sent elsewhere.
    """
    if x is None or where.axes is not None or source.forms[where.name].type != registry.type_name(x):
        return None
    host = on_host(x)
    return None if host is None or not host.flags.c_contiguous else host


def _batches(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Runs of neighbours that together take at most so many bytes, or are alone."""
    start, room = 0, most
    for k, size in enumerate(sizes):
        if k > start and size > room:
            yield slice(start, k)
            start, room = k, most
        room -= size
    if sizes:
        yield slice(start, len(sizes))


def _numbers(store: Store, leaves: dict[int, Fitted]) -> None:
    """Set clocks, settings and what is frozen."""
    store.set_progress({leaf: each.progress for leaf, each in leaves.items()})
    by_settings: dict[tuple[float, ...], list[int]] = {}
    for leaf, each in leaves.items():
        by_settings.setdefault(each.settings, []).append(leaf)
    for own, several in by_settings.items():
        store.change(several, lambda rule, own=own: fill(rule, iter(own)))
    for frozen in (False, True):
        some = [leaf for leaf, each in leaves.items() if each.frozen is frozen]
        if some:
            store.freeze(some, frozen)


# -- models --------------------------------------------------------------------------------------------------


def _model(model: Modelled, plan: Plan, source: Source) -> Any:
    new: dict[int, Any] = {}
    straight: list[tuple[Any, str, HostArray]] = []
    for name, where in plan.model.items():
        leaf, x = model.leaves[name] if name in model.leaves else (-1, model.beside[name].value)
        library = registry.library(x)
        host = None if library.immutable else _memory(x, where, source)
        if host is not None:
            straight.append((x, where.name, host))
        elif leaf < 0:
            model.beside[name].write(_ours(where.of(source), x))
        elif library.immutable:
            new[leaf] = _ours(where.of(source), x)
        else:
            _assign(x, _ours(where.of(source), x))
    source.fill([(name, host) for _, name, host in straight])
    for x, _, _ in straight:
        registry.library(x).memory.touched([x])
    made, writes = rebuilt(model.node, model.model, new)
    _run(writes)
    return made


def _assign(x: Any, value: Any) -> None:
    """Write an array; where it is spread over processes, the part that lies here."""
    library, part = registry.library(x), part_of(x)
    library.assign(x, value if part is None else part.whole(part.cut(value)))


def _ours(value: Any, x: Any) -> Any:
    """An array as one of the library of `x`; of its type and where it lies, if it was of another."""
    library = registry.library(x)
    if library.is_array_type(type(value)) and not library.immutable:
        return value
    return library.rounded(x, numbers_in_numpy(value))


def _run(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


class Given:
    """Arrays that were saved elsewhere, by name."""

    typed = False
    rules: dict[str, str]
    ties: list[list[str]]

    def __init__(self, arrays: "dict[str, Any]") -> None:
        self.arrays, self.rules, self.ties = arrays, {}, []
        self.groups = None
        self.forms = {name: form_of(name, value) for name, value in arrays.items()}

    def view(self, name: str) -> Any:
        """An array, as one of NumPy."""
        return numbers_in_numpy(self.arrays[name])

    def read(self, name: str) -> Any:
        """An array, as it was given."""
        value = self.arrays[name]
        return value if registry.isarray(value) else np.asarray(value)

    def fill(self, targets: Sequence[tuple[str, HostArray]]) -> None:
        """Copy arrays into memory of the host that has their shapes and types."""
        for name, target in targets:
            np.copyto(
                target, elements(in_numpy(self.arrays[name]), self.forms[name].type).reshape(target.shape)
            )
