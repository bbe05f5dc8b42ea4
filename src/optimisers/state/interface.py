"""What every form of a scalar table answers."""

from collections.abc import Sequence
from typing import Any, Protocol

from optimisers.state.rows import Indices


class ScalarTable(Protocol):
    """The scalars of the leaves of a group."""

    hypers: int
    """How many of the columns are hyper-parameters; counters follow."""

    @property
    def values(self) -> Any:
        """The scalars, a row for all leaves whose scalars are equal."""
        ...

    @property
    def clock(self) -> Any:
        """How many updates have covered the leaves of each row."""
        ...

    @property
    def row(self) -> Indices:
        """The row of each leaf."""
        ...

    @property
    def rows(self) -> int:
        """How many rows there are."""
        ...

    @property
    def traced(self) -> bool:
        """Whether a step must be traced, since the scalars are not known here."""
        ...

    def split(self, members: Indices) -> "ScalarTable":
        """The table in which these leaves share no row with others."""
        ...

    def split_by(self, label: Indices) -> "ScalarTable":
        """The table in which leaves share a row only if their labels are equal; all of label -1 may."""
        ...

    def merge_equal(self) -> "ScalarTable":
        """The table with one row for equal scalars: of what has not parted, or has met again."""
        ...

    def read_hypers(self, i: int) -> Any:
        """The hyper-parameters of leaf i."""
        ...

    def read_counters(self, i: int) -> Any:
        """The counters of leaf i."""
        ...

    def read_clock(self, i: int) -> Any:
        """The clock of leaf i: a number, or what is traced in its place."""
        ...

    def column(self, rows: Indices, j: int) -> Any:
        """A hyper-parameter of some rows."""
        ...

    def write_hypers(self, rows: Indices, columns: Any, values: Any) -> "ScalarTable":
        """The table with other hyper-parameters in some rows; values may be traced."""
        ...

    def write_counters(
        self, members: Indices | None, counters: Sequence[Any], *, of_leaf: bool, computed: "ScalarTable"
    ) -> "ScalarTable":
        """The table with the counters that a step has computed from another one, by row or by leaf, for the
        leaves that it stepped (None for all).
        """
        ...

    def assign_counters(
        self, members: Indices, values: Sequence[Sequence[Any]], skip: int = 0
    ) -> "ScalarTable":
        """The table with other counters of some leaves, each given its own; the first `skip` counters
        stay.
        """
        ...

    def advance_clocks(self, members: Indices | None, skipped: Any = None) -> "ScalarTable":
        """The table after an update that covered these leaves (None for all); on a device it is none where
        `skipped` is not 0.
        """
        ...

    def set_clocks(self, members: Indices, clocks: Sequence[float]) -> "ScalarTable":
        """The table with other clocks of some leaves."""
        ...

    def copy(self) -> "ScalarTable":
        """A table to be changed apart from this one."""
        ...

    def to_traced(self, library: Any) -> "ScalarTable":
        """The same scalars as arrays of a library that traces them."""
        ...

    def settle(self) -> "ScalarTable":
        """The same on the host, once it is not traced any more."""
        ...

    def arrays(self) -> tuple[Any, Any]:
        """What a structure hands on: the scalars and the clock."""
        ...

    def filled(self, values: Any, clock: Any) -> "ScalarTable":
        """A table with these arrays and the rows of this one."""
        ...
