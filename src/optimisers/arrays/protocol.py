"""What does an array library answer? One typed list; every library here, and any from outside, is one of
these.

A library subclasses `Library` for its type of arrays and writes what is abstract. What has a body is right
for arrays of which nothing is known but shape and type: no address, no transform that looks at them, nothing
shared. Functions take arrays of the library alone, unless a parameter says otherwise.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from optimisers.arrays.parts import (
    Derivatives,
    Graphs,
    HostArray,
    HostScalars,
    Memory,
    NoGraphs,
    NoMemory,
    NoShards,
    NoStacks,
    Scalars,
    Shape,
    Shards,
    Sparse,
    Stacks,
    lacking,
)

if TYPE_CHECKING:
    from typing_extensions import TypeVar
else:
    from typing import TypeVar

Scalar = bool | int | float | complex
"""A number of Python."""


class DType(Protocol):
    """The type of the elements: `numpy.dtype`, `torch.dtype`."""

    @property
    def itemsize(self) -> int: ...


class Array(Protocol):
    """An array of any library.

    While a rule is traced a symbol stands for it, which answers the same arithmetic. The other operand is a
    number or an array of the same library, which no annotation can say for all libraries at once.
    """

    @property
    def shape(self) -> Shape: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> Any: ...

    def __add__(self, other: Any, /) -> Any: ...
    def __radd__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __rsub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: Any, /) -> Any: ...
    def __truediv__(self, other: Any, /) -> Any: ...
    def __rtruediv__(self, other: Any, /) -> Any: ...
    def __pow__(self, other: Any, /) -> Any: ...
    def __rpow__(self, other: Any, /) -> Any: ...
    def __neg__(self) -> Any: ...
    def __lt__(self, other: Any, /) -> Any: ...
    def __le__(self, other: Any, /) -> Any: ...
    def __gt__(self, other: Any, /) -> Any: ...
    def __ge__(self, other: Any, /) -> Any: ...


Operand = Array | Scalar
"""What may stand in a formula: an array or a number."""

Run = tuple[slice, int, Shape, Any]
"""A run of arrays of one shape and type in a flat vector: place, count, shape, type."""

if TYPE_CHECKING:
    A = TypeVar("A", bound=Array, default=Array)
    D = TypeVar("D", default=Any)
else:
    A, D = TypeVar("A"), TypeVar("D")


class Library(Protocol[A, D]):
    """What an array library answers, here and in records, about its arrays `A` and element types `D`."""

    # -- what an array is -----------------------------------------------------------------------------------

    name: str
    """The name of the library, as its package is called."""

    immutable: bool = False
    """Whether arrays cannot be written, so that a step in place replaces them."""

    @abstractmethod
    def is_array_type(self, kind: type) -> bool:
        """Whether a type is one of arrays of this library."""

    @abstractmethod
    def type_name(self, dtype: D) -> str:
        """The name of an element type, as NumPy or ml_dtypes calls it."""

    @abstractmethod
    def dtype(self, name: str) -> D:
        """The element type of a name; the widest that there is where one is switched off."""

    def is_trainable(self, x: A) -> bool:
        """Whether an array does not itself say that it should not be trained."""
        return True

    def is_writable(self, x: A) -> bool:
        """Whether `update_` may write into an array; one with two elements in one place it may not."""
        return not self.immutable

    def is_opaque(self, x: A) -> bool:
        """Whether this array is no plain memory: its state is kept in separate arrays of its kind."""
        return True

    def is_traced(self, x: object) -> bool:
        """Whether a transform or a compiler looks at this array, so that its elements may not be read."""
        return False

    def traces(self, xs: Sequence[object], gradients: Sequence[Sequence[object]], *, inplace: bool) -> bool:
        """Whether a step of these is differentiated, transformed or compiled: then it is made of arrays
        alone, each made anew.
        """
        return False

    def unready(self, x: A) -> str:
        """What must be done before this can be trained; empty if nothing."""
        return ""

    def device(self, x: A) -> str:
        """Where the elements are; arrays of different devices are stepped apart."""
        return "cpu"

    memory: Memory[A, D] = NoMemory()
    """Where elements lie."""

    def holds_same(self, a: A, b: A) -> bool:
        """Whether two arrays that cannot be written may be taken for one: they hold the same numbers."""
        return a is b

    # -- making arrays --------------------------------------------------------------------------------------

    @abstractmethod
    def full_like(self, x: A, value: Scalar, dtype: D | str) -> A:
        """One number in the shape of `x`, in this type (a name will do)."""

    @abstractmethod
    def copied(self, x: A, dtype: D | str) -> A:
        """A copy in this type (a name will do), laid out like `x`."""

    @abstractmethod
    def cast(self, x: A | Scalar, dtype: D) -> Any:
        """An array or number in this type; perhaps the same."""

    @abstractmethod
    def broadcast(self, x: A | Scalar, shape: Shape) -> A:
        """`x` in this shape; raises ValueError if it does not broadcast."""

    @abstractmethod
    def permuted(self, x: A, axes: tuple[int, ...]) -> A:
        """The array with its axes in this order; a view where there are views."""

    @abstractmethod
    def flattened(self, arrays: list[A]) -> A:
        """All elements in one new vector, in the type to which those of the arrays promote."""

    @abstractmethod
    def pieces(self, flat: A, runs: list[Run], *, copy: bool) -> list[A]:
        """The arrays of runs of a vector; views where they can be and no copy is wanted."""

    def assign(self, target: A, value: A | Scalar) -> None:
        """Write `value` into `target`, rounding once to its type."""
        raise lacking("assign")

    def assign_many(self, targets: Sequence[A], values: Sequence[A]) -> None:
        """Write arrays into arrays."""
        for target, value in zip(targets, values, strict=True):
            self.assign(target, value)

    @abstractmethod
    def to_numpy(self, x: A) -> HostArray:
        """The elements as an array of NumPy, to be looked at."""

    def to_host(self, x: A | Scalar) -> Any:
        """The value of a 0-d array; numbers as they are."""
        return x

    @abstractmethod
    def stand_in(self, shape: Shape, dtype: D) -> A:
        """An array of this shape and type that takes no memory, to be looked at only."""

    def scalar_array(self, value: object) -> A | None:
        """What is not an array here but means one (a number of NumPy) as a 0-d array; None for all else."""
        return None

    def any_set(self, x: A) -> bool:
        """Whether some element may be other than zero."""
        return True

    guards: bool = False
    """Whether an array may be shown that cannot be written."""

    def seen(self, x: A, *, read_only: bool) -> A:
        """A view to be looked at and written into; not into `x` itself if it is read-only."""
        return x if self.immutable or not read_only else self.duplicate(x)

    def duplicate(self, x: Any) -> Any:
        """A copy of an array, where arrays can be written; anything else as it is."""
        return self.copied(x, x.dtype) if self.is_array_type(type(x)) and not self.immutable else x

    @abstractmethod
    def rounded(self, old: A, value: A | HostArray | Scalar) -> A:
        """A new array of the type and shape of an old one, and where that lies, that holds `value`: an array
        of this library, or of NumPy.
        """

    def like(self, x: A, new: A) -> A:
        """`new`, as the same kind of array as `x`: its subclass, its flags."""
        return new

    def stored(self, x: A, value: A | Scalar, *, inplace: bool) -> A:
        """`value` rounded to the type of `x`: in `x` itself where that may be written, else in a new array of
        its kind.
        """
        if inplace and self.is_writable(x):
            self.assign(x, value)
            return x
        return self.like(x, self.rounded(x, value))

    sparse: Sparse[A] | None = None
    """Gradients that hold some rows only; None where there are none."""

    shards: Shards[A] = NoShards()
    """Arrays that lie on several devices."""

    derivatives: Derivatives = Derivatives()
    """Gradients, and who makes them."""

    scalars: Scalars = HostScalars()
    """The scalars of states: by default they are on the host, where NumPy keeps them."""

    graphs: Graphs = NoGraphs()
    """Launches that are noted, to be replayed."""

    stacks: Stacks[A, D] = NoStacks()
    """Arrays of one shape, side by side."""

    def stacked(self, values: Sequence[A | Scalar]) -> Any:
        """A vector of these scalars."""
        return np.array([self.to_host(v) for v in values])

    # -- operations -----------------------------------------------------------------------------------------

    operations: Mapping[str, Callable[..., Any]]
    """The functions of `optimisers.ops` by their names."""
