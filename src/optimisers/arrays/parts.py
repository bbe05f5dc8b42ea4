"""What does a library answer beside, in records of their own? Most say nothing of their own here."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, final

import numpy as np

A = TypeVar("A")

HostArray = np.ndarray[Any, np.dtype[Any]]
"""An array of NumPy."""


class Scalars(Protocol):
    """The scalars of states beside arrays of a library: by default they are on the host, in NumPy."""

    def is_fixed(self, x: object) -> bool:
        """Whether a scalar may be read once and for all: it is neither differentiated nor traced."""
        return True

    def table(self, rows: Any) -> Any:
        """A table of scalars in float64, or the widest type there is."""
        return np.array([[float(v) for v in row] for row in rows], np.float64)

    def constant(self, values: Any, beside: Any) -> Any:
        """Scalars of the host beside a table of them."""
        return float(values) if isinstance(values, int) else values

    def beside(self, value: Any, arrays: Sequence[Any]) -> Any:
        """An array of scalars where arrays that share devices lie: on all of these."""
        return value

    def mapped(self, function: Callable[[Any], Any], counts: Any) -> Any:
        """What a function that knows no vectors gives for each of some whole numbers."""
        found = np.array([float(function(int(n))) for n in self.counts(counts)])
        return self.constant(found, counts)

    def counts(self, counts: Any) -> HostArray:
        """A vector of whole numbers on the host."""
        return np.atleast_1d(counts)

    def joined(self, vectors: list[Any]) -> Any:
        """One vector of scalars after the other."""
        return np.concatenate(vectors)

    def columns(self, values: Sequence[Any], rows: int) -> Any:
        """A table of these columns, each a value for every row or one for all."""
        return np.stack([np.broadcast_to(np.asarray(v), (rows,)) for v in values], 1)

    def placed(self, x: Any, index: Any, values: Any) -> Any:
        """A table of scalars with values written at an index; perhaps the same."""
        x[index] = values
        return x

    def counted(self, clocks: Any) -> Any:
        """A vector of clocks, whole numbers, beside a table of scalars."""
        return clocks


@final
class HostScalars(Scalars):
    """Scalars on the host."""


class Sparse(Protocol[A]):
    """Gradients that hold some rows only."""

    @abstractmethod
    def dense(self, x: A) -> A:
        """The array with every element there; sparse ones are summed over equal indices."""

    @abstractmethod
    def has_rows(self, x: object) -> bool:
        """Whether a gradient is sparse: it holds some rows only."""

    @abstractmethod
    def rows(self, x: A) -> tuple[A, A]:
        """(numbers of the rows, their values) of a sparse array; equal ones summed."""

    @abstractmethod
    def taken(self, x: A, rows: A) -> A:
        """A copy of some rows."""

    @abstractmethod
    def put_rows(self, x: A, rows: A, values: A) -> None:
        """Write some rows."""


class Shards(Protocol[A]):
    """Arrays that lie on several devices: by default none does."""

    def is_spread(self, x: A) -> bool:
        """Whether the elements are shared out over several devices."""
        return False

    def is_cut(self, x: A) -> bool:
        """Whether this array is known to be cut into parts that lie on several devices."""
        return False

    def is_part(self, x: A) -> bool:
        """Whether this is one device's part of a larger array."""
        return False

    def across(self, op: str, value: A, x: A) -> A:
        """A reduction (`sum`, `max`, `min`) of a whole array, of which `x` may be one device's part."""
        return value


@final
class NoShards(Shards[Any]):
    """Arrays that each lie on one device."""
