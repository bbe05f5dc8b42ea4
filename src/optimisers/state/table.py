"""The scalar table of a group: hyper-parameters, then counters, in rows, and the clock of each row.

Leaves that were always stepped together share a row; one that is adjusted, frozen or skipped gets its own,
copied when they part. The clock of a row counts the updates that covered its leaves. There are three forms
with one interface, and no other code asks which: scalars of the host, those that a transform traces, and
those that live on a device. Tables of the first two are values: what changes one gives another, so a step
goes on with the one it has begun with. That of a device keeps its addresses, for graphs that were captured.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import BadState
from optimisers.state.interface import ScalarTable
from optimisers.state.rows import Indices, alike, block, labelled, on_host, own, parted, spread, tracer_of

Floats = np.ndarray[Any, np.dtype[np.float64]]

CAPTURED = (
    "a capturable state is for CUDA graphs; for steps that are differentiated, write setup without capturable"
)
"""What is said to those who want to trace the scalars of a capturable state."""


# -- the forms -----------------------------------------------------------------------------------------------


class HostTable:
    """Scalars and clock in float64 on the host; never written, always replaced."""

    __slots__ = ("clock", "hypers", "row", "values")
    traced = False

    def __init__(self, values: Floats, clock: Floats, row: Indices, hypers: int) -> None:
        self.values, self.clock, self.row, self.hypers = values, clock, row, hypers

    @property
    def rows(self) -> int:
        return len(self.values)

    def split(self, members: Indices) -> "HostTable":
        found = parted(self.row, len(self.values), members)
        return self if found is None else self._at(*found)

    def split_by(self, label: Indices) -> "HostTable":
        return self._at(*labelled(self.row, label))

    def _at(self, source: Indices, row: Indices) -> "HostTable":
        return HostTable(self.values[source], self.clock[source], row, self.hypers)

    def merge_equal(self) -> "HostTable":
        if len(self.values) == 1:
            return self
        seen = {(scalars.tobytes(), at) for scalars, at in zip(self.values, self.clock.tolist(), strict=True)}
        if len(seen) == len(self.values) and np.bincount(self.row, minlength=len(seen)).all():
            return self
        used, row = np.unique(self.row, return_inverse=True)
        whole = np.column_stack([self.values, self.clock])[used]
        table, which = np.unique(whole, axis=0, return_inverse=True)
        return HostTable(table[:, :-1], table[:, -1], which.ravel()[row.ravel()], self.hypers)

    def read_hypers(self, i: int) -> Floats:
        return self.values[self.row[i], : self.hypers]

    def read_counters(self, i: int) -> Floats:
        return self.values[self.row[i], self.hypers :]

    def read_clock(self, i: int) -> int:
        return int(self.clock[self.row[i]])

    def column(self, rows: Indices, j: int) -> Floats:
        return self.values[rows, j]

    def write_hypers(self, rows: Indices, columns: Any, values: Any) -> "HostTable | TracedTable":
        if (library := tracer_of(values)) is not None:
            return self.to_traced(library).write_hypers(rows, columns, values)
        new = self.values.copy()
        new[block(rows, columns)] = on_host(values)
        return HostTable(new, self.clock, self.row, self.hypers)

    def write_counters(
        self, members: Indices | None, counters: Sequence[Any], *, of_leaf: bool, computed: ScalarTable
    ) -> "HostTable":
        if not counters:
            return self
        if not of_leaf and computed.row is not self.row:  # an edit has changed the rows meanwhile
            counters, of_leaf = spread(counters, computed.row, members), True
        if of_leaf:
            stepped = np.arange(len(self.row)) if members is None else members
            new, row = self.values[self.row], np.arange(len(self.row))
            for j, value in enumerate(counters, self.hypers):
                new[stepped, j] = value
            return HostTable(new, self.clock[self.row], row, self.hypers).merge_equal()
        new = self.values.copy()
        if members is None:
            for j, value in enumerate(counters, self.hypers):
                new[:, j] = value
        else:
            rows = np.unique(self.row[members])
            for j, value in enumerate(counters, self.hypers):
                new[rows, j] = value if np.ndim(value) == 0 else value[rows]
        return HostTable(new, self.clock, self.row, self.hypers)

    def assign_counters(
        self, members: Indices, values: Sequence[Sequence[Any]], skip: int = 0
    ) -> "HostTable | TracedTable":
        if (library := tracer_of(values)) is not None:
            return self.to_traced(library).assign_counters(members, values, skip)
        apart = self.split_by(alike(self.row, members, map(tuple, values)))
        new = apart.values.copy()
        at = self.hypers + skip
        new[apart.row[members], at : at + len(values[0])] = values
        return HostTable(new, apart.clock, apart.row, self.hypers)

    def advance_clocks(self, members: Indices | None, skipped: Any = None) -> "HostTable":
        if members is None:
            return HostTable(self.values, self.clock + 1, self.row, self.hypers)
        new = self.split(members)
        clock = new.clock.copy()
        clock[np.unique(new.row[members])] += 1
        return HostTable(new.values, clock, new.row, self.hypers)

    def set_clocks(self, members: Indices, clocks: Sequence[float]) -> "HostTable":
        new = self.split_by(alike(self.row, members, clocks))
        clock = new.clock.copy()
        clock[new.row[members]] = clocks
        return HostTable(new.values, clock, new.row, self.hypers)

    def copy(self) -> Self:
        return self

    def to_traced(self, library: Any) -> "TracedTable":
        return TracedTable(
            library.scalars.table(self.values), library.scalars.counted(self.clock), self.row, self.hypers
        )

    def settle(self) -> Self:
        return self

    def arrays(self) -> tuple[Any, Any]:
        return self.values, self.clock

    def filled(self, values: Any, clock: Any) -> "TracedTable":
        return TracedTable(values, clock, self.row, self.hypers)

    def __reduce__(self) -> Any:
        return HostTable, (self.values, self.clock, self.row, self.hypers)


class TracedTable:
    """Scalars and clock as arrays of a library, which a transform may trace; what it does not know it does
    not compare.
    """

    __slots__ = ("clock", "hypers", "row", "values")

    def __init__(self, values: Any, clock: Any, row: Indices, hypers: int) -> None:
        self.values, self.clock, self.row, self.hypers = values, clock, row, hypers

    @property
    def traced(self) -> bool:
        return True

    @property
    def library(self) -> Any:
        """The library whose arrays these are."""
        return registry.library(self.values)

    @property
    def rows(self) -> int:
        return int(self.row.max(initial=-1)) + 1

    def split(self, members: Indices) -> "TracedTable":
        found = parted(self.row, self.rows, members)
        return self if found is None else self._at(*found)

    def split_by(self, label: Indices) -> "TracedTable":
        return self._at(*labelled(self.row, label))

    def _at(self, source: Indices, row: Indices) -> "TracedTable":
        return TracedTable(self.values[source], self.clock[source], row, self.hypers)

    def merge_equal(self) -> Self:
        return self

    def read_hypers(self, i: int) -> Any:
        return self.values[self.row[i], : self.hypers]

    def read_counters(self, i: int) -> Any:
        return self.values[self.row[i], self.hypers :]

    def read_clock(self, i: int) -> Any:
        clock = self.clock[self.row[i]]
        return int(clock) if self.library.scalars.is_fixed(clock) else clock

    def column(self, rows: Indices, j: int) -> Any:
        return self.values[rows, j]

    def write_hypers(self, rows: Indices, columns: Any, values: Any) -> "TracedTable":
        new = self.library.scalars.placed(self.values, block(rows, columns), self._taken(values))
        return TracedTable(new, self.clock, self.row, self.hypers)

    def _taken(self, values: Any) -> Any:
        """Scalars as this library takes them: rows of them as a table."""
        if not isinstance(values, list):
            return values
        return self.library.scalars.table(
            values if tracer_of(values) is not None else np.array(on_host(values))
        )

    def write_counters(
        self, members: Indices | None, counters: Sequence[Any], *, of_leaf: bool, computed: ScalarTable
    ) -> "TracedTable":
        if not counters:
            return self
        values, clock, row = self.values, self.clock, self.row
        if of_leaf:
            values, clock, row = values[row], clock[row], np.arange(len(row))
            rows = row if members is None else members
        else:
            rows = np.arange(self.rows) if members is None else np.unique(row[members])
            counters = [v if np.ndim(v) == 0 else v[rows] for v in counters]
        at = (rows[:, None], self.hypers + np.arange(len(counters)))
        new = self.library.scalars.placed(values, at, self.library.scalars.columns(counters, len(rows)))
        return TracedTable(new, clock, row, self.hypers)

    def assign_counters(
        self, members: Indices, values: Sequence[Sequence[Any]], skip: int = 0
    ) -> "TracedTable":
        known = all(isinstance(v, float | int) for row in values for v in row)
        label = alike(self.row, members, map(tuple, values)) if known else own(self.row, members)
        new = self.split_by(label)
        at = (new.row[members][:, None], self.hypers + skip + np.arange(len(values[0])))
        whole = self.library.scalars.placed(new.values, at, self.library.scalars.table(list(values)))
        return TracedTable(whole, new.clock, new.row, self.hypers)

    def advance_clocks(self, members: Indices | None, skipped: Any = None) -> "TracedTable":
        if members is None:
            return TracedTable(self.values, self.clock + 1, self.row, self.hypers)
        new = self.split(members)
        rows = np.unique(new.row[members])
        clock = self.library.scalars.placed(new.clock, rows, new.clock[rows] + 1)
        return TracedTable(new.values, clock, new.row, self.hypers)

    def set_clocks(self, members: Indices, clocks: Sequence[float]) -> "TracedTable":
        new = self.split_by(alike(self.row, members, clocks))
        clock = self.library.scalars.placed(new.clock, new.row[members], np.asarray(clocks))
        return TracedTable(new.values, clock, new.row, self.hypers)

    def copy(self) -> "TracedTable":
        duplicate = self.library.duplicate
        return TracedTable(duplicate(self.values), duplicate(self.clock), self.row, self.hypers)

    def to_traced(self, library: Any) -> Self:
        return self

    def settle(self) -> "HostTable | TracedTable":
        library = self.library
        if library.immutable or not (
            library.scalars.is_fixed(self.values) and library.scalars.is_fixed(self.clock)
        ):
            return self
        values, clock = (np.array(library.to_numpy(a), np.float64) for a in (self.values, self.clock))
        return HostTable(values, clock, self.row, self.hypers)

    def arrays(self) -> tuple[Any, Any]:
        return self.values, self.clock

    def filled(self, values: Any, clock: Any) -> "TracedTable":
        return TracedTable(values, clock, self.row, self.hypers)

    def __reduce__(self) -> Any:
        return TracedTable, (self.values, self.clock, self.row, self.hypers)


class DeviceTable:
    """Scalars and clock on a device, a row for each leaf, at addresses that stay: a graph that was captured
    reads and writes them there. Only the host changes hyper-parameters, so what it has sent it need not read
    back.
    """

    __slots__ = ("clock", "covered", "device", "hypers", "library", "mirror", "row", "values")
    traced = False

    def __init__(self, host: HostTable, library: Any, device: str) -> None:
        self.library, self.device = library, device
        self.hypers, self.row, self.mirror = host.hypers, host.row, host.values[:, : host.hypers]
        self.values = library.scalars.on_device(host.values, device)
        self.clock = library.scalars.on_device(host.clock, device)
        self.covered: dict[bytes, Any] = {}
        """Which rows some leaves have, on the device."""

    @property
    def rows(self) -> int:
        return len(self.row)

    def split(self, members: Indices) -> Self:
        return self  # no leaf shares its row

    def split_by(self, label: Indices) -> Self:
        return self

    def merge_equal(self) -> Self:
        return self

    def read_hypers(self, i: int) -> Floats:
        return self.mirror[self.row[i]]

    def read_counters(self, i: int) -> Floats:
        return self.library.to_numpy(self.values[int(self.row[i]), self.hypers :])

    def read_clock(self, i: int) -> int:
        return int(self.clock[int(self.row[i])])

    def column(self, rows: Indices, j: int) -> Floats:
        return self.mirror[rows, j]

    def write_hypers(self, rows: Indices, columns: Any, values: Any) -> Self:
        """The same table with other hyper-parameters.

        Raises BadState for traced ones, and while a graph is captured, which would not hold the change.
        """
        if tracer_of(values) is not None:
            raise BadState(CAPTURED)
        if self.library.graphs.capturing(self.device):
            raise BadState(
                "the numbers of a capturable state were changed while a graph is captured; change them "
                "before, or between its replays"
            )
        mirror = self.mirror.copy()
        mirror[block(rows, columns)] = on_host(values)
        self.library.assign(
            self.values[:, : self.hypers], self.library.scalars.on_device(mirror, self.device)
        )
        self.mirror = mirror
        return self

    def write_counters(
        self, members: Indices | None, counters: Sequence[Any], *, of_leaf: bool, computed: ScalarTable
    ) -> Self:
        """Kernels have written counters where they lie; those of other engines are sent."""
        stepped = np.arange(len(self.row)) if members is None else members
        if counters and not of_leaf:
            counters = spread(counters, computed.row, members)
        for j, value in enumerate(counters, self.hypers):
            column = self.library.to_numpy(self.values[:, j]).copy()
            column[self.row[stepped]] = value
            self.library.assign(self.values[:, j], self.library.scalars.on_device(column, self.device))
        return self

    def assign_counters(self, members: Indices, values: Sequence[Sequence[Any]], skip: int = 0) -> Self:
        if tracer_of(values) is not None:
            raise BadState(CAPTURED)
        given = self.library.scalars.on_device(np.array(values, np.float64), self.device)
        for i, new in zip(self.row[members].tolist(), given, strict=True):
            at = self.hypers + skip
            self.library.assign(self.values[i, at : at + len(new)], new)
        return self

    def advance_clocks(self, members: Indices | None, skipped: Any = None) -> Self:
        covered = None
        if members is not None:
            key = members.tobytes()
            if key not in self.covered:
                mask = np.zeros(len(self.row))
                mask[self.row[members]] = 1
                self.covered[key] = self.library.scalars.on_device(mask, self.device)
            covered = self.covered[key]
        self.clock = self.library.scalars.advanced_clocks(self.clock, skipped, covered)
        return self

    def set_clocks(self, members: Indices, clocks: Sequence[float]) -> Self:
        clock = self.library.to_numpy(self.clock).copy()
        clock[self.row[members]] = clocks
        self.library.assign(self.clock, self.library.scalars.on_device(clock, self.device))
        return self

    def copy(self) -> "DeviceTable":
        new = object.__new__(DeviceTable)
        new.library, new.device, new.hypers, new.row = self.library, self.device, self.hypers, self.row
        new.mirror, new.covered = self.mirror, dict(self.covered)
        new.values, new.clock = self.library.duplicate(self.values), self.library.duplicate(self.clock)
        return new

    def to_traced(self, library: Any) -> "TracedTable":
        raise BadState(CAPTURED)

    def settle(self) -> Self:
        return self

    def arrays(self) -> tuple[Any, Any]:
        return self.values, self.clock

    def filled(self, values: Any, clock: Any) -> "TracedTable":
        return TracedTable(values, clock, self.row, self.hypers)

    def __reduce__(self) -> Any:
        return _sent, (self.values, self.clock, self.mirror, self.row, self.library.name, self.device)


def _sent(values: Any, clock: Any, mirror: Floats, row: Indices, library: str, device: str) -> DeviceTable:
    """A table of a device that was saved."""
    new = object.__new__(DeviceTable)
    new.values, new.clock, new.mirror, new.row, new.hypers = values, clock, mirror, row, mirror.shape[1]
    new.library, new.device, new.covered = registry.named(library), device, {}
    return new


# -- making one ----------------------------------------------------------------------------------------------


def table_of(
    rows: Sequence[Sequence[Any]],
    clocks: Sequence[Any],
    hypers: int,
    library: Any,
    device: str,
    *,
    captured: bool,
    apart: bool,
) -> ScalarTable:
    """The table of some leaves of a library, each given its scalars and clock: on the host, unless they are
    traced, the library keeps none there, or they are to be `captured`. `apart` leaves each leaf its row.
    """
    row = np.arange(len(rows))
    if library.immutable and not apart and not captured:
        kept, row = _distinct(rows, clocks)
        rows, clocks = [rows[i] for i in kept], [clocks[i] for i in kept]
    if (tracer := tracer_of([*rows, clocks])) is not None:
        if captured:
            raise BadState(CAPTURED)
        given = [[c] for c in clocks]
        clock = (
            tracer.scalars.table(given)[:, 0]
            if tracer_of(clocks) is not None
            else np.array(clocks, np.float64)
        )
        return TracedTable(tracer.scalars.table(rows), tracer.scalars.counted(clock), row, hypers)
    values = np.array([[float(v) for v in r] for r in rows], np.float64).reshape(len(rows), -1)
    host = HostTable(values, np.array([float(c) for c in clocks]), row, hypers)
    if captured:
        return DeviceTable(host, library, device)
    return host.to_traced(library) if library.immutable else host.merge_equal()


def _distinct(rows: Sequence[Sequence[Any]], clocks: Sequence[Any]) -> tuple[list[int], Indices]:
    """(the first leaf of every row, the row of each leaf): those of one rule have the same numbers,
    or the same arrays, whatever is traced and whatever the values are.
    """
    known: dict[Any, int] = {}
    first: list[int] = []
    row: list[int] = []
    for i, (scalars, clock) in enumerate(zip(rows, clocks, strict=True)):
        key = tuple(v if isinstance(v, int | float) else (id(v),) for v in (*scalars, clock))
        row.append(known.setdefault(key, len(known)))
        if len(known) > len(first):
            first.append(i)
    return first, np.array(row, np.int64)


def as_kind(kind: type, value: Any) -> Any:
    """A scalar of a table as a Python number of this type; what is traced stays."""
    if not isinstance(value, float | np.floating):
        library = registry.library(value)
        if not library.immutable or not library.scalars.is_fixed(value):
            return value  # it is traced
        value = float(str(library.to_numpy(value)))  # 0.001, not 0.0010000000474974513
    return (
        int(value) if kind is int and value == int(value) else bool(value) if kind is bool else float(value)
    )
