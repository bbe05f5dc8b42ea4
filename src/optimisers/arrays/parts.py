"""What does a library answer in records of their own? Of most a library says nothing."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar, cast, final

import numpy as np

from optimisers.arrays.layout import contiguous_strides

A = TypeVar("A")
D = TypeVar("D")
Kind_contra = TypeVar("Kind_contra", contravariant=True)
"""Arrays; element types, given and answered or given alone."""

Shape = tuple[int, ...]
Strides = tuple[int, ...]

HostArray = np.ndarray[Any, np.dtype[Any]]
"""An array of NumPy."""


def lacking(function: str) -> TypeError:
    """What is raised where a library is asked what it does not answer."""
    return TypeError(f"the array library declares no `{function}`")


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

    def number(self, value: Any, dtype: Any) -> Any:
        """A scalar of the host beside arrays of a type, rounded to theirs."""
        return np.asanyarray(value).astype(dtype)[()]

    def on_device(self, numbers: Any, device: str) -> Any:
        """Scalars of the host where kernels of a device read them."""
        return numbers

    def moved(self, x: Any, device: str) -> Any:
        """A scalar in float32 on a device, without synchronisation."""
        raise lacking("moved")

    def advanced_clocks(self, clock: Any, skipped: Any, covered: Any) -> Any:
        """Clocks on a device after an update, in the same array; as they were where `skipped` is not 0, and
        where `covered`, if given, is 0.
        """
        raise lacking("advanced_clocks")


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


class Piece(NamedTuple):
    """Which elements of a whole array one process holds."""

    start: tuple[int, ...]
    """The first of them along every axis."""
    shape: Shape

    @property
    def inside(self) -> tuple[Any, ...]:
        """The index that picks them in a stack of such arrays."""
        return (slice(None), *(slice(at, at + n) for at, n in zip(self.start, self.shape, strict=True)))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def is_run(self, of: Shape) -> bool:
        """Whether these elements of an array follow each other in their order."""
        cut = next((axis for axis, n in enumerate(self.shape) if n > 1), len(of)) + 1
        return not self.size or self.shape[cut:] == of[cut:]


class Pieces(NamedTuple):
    """How a whole array is shared out to processes."""

    all: tuple[Piece, ...]
    """What each of them holds."""
    teams: tuple[int, ...]
    """Processes with one number hold the whole array between them, once; others hold it again."""
    here: int
    """Which process this is."""


class Part(Protocol[A]):
    """How the part of an array that lies here belongs to the whole of it, which is spread over processes."""

    shape: Shape
    """That of the part."""
    strides: Strides
    """Those of a dense array of this shape, in elements."""
    of: Shape
    """The shape of the whole."""
    device: str
    """Where the part lies."""
    inside: tuple[slice, ...] | None
    """Where it stands in a whole array, where every process has whole arrays and steps its parts of them;
    None where arrays come in parts.
    """

    @abstractmethod
    def of_wholes(self) -> "Part[A]":
        """The same part, where whole arrays come."""

    @abstractmethod
    def local(self, x: A) -> A | None:
        """The part of an array that is spread like this one; None for any other."""

    @abstractmethod
    def cut(self, x: A) -> A:
        """The part of an array, which may be spread otherwise or not at all."""

    @abstractmethod
    def whole(self, local: A) -> A:
        """The array of which this is the part that lies here; nothing is copied."""

    @property
    @abstractmethod
    def across(self) -> object:
        """The processes that hold the other parts; equal for arrays that are cut over the same ones."""

    @abstractmethod
    def joined(self, values: HostArray, how: str) -> HostArray:
        """The sums (`sum`) or largest (`max`) of numbers over all processes that hold other parts: one
        collective for every axis of processes along which the array is cut.
        """

    @property
    @abstractmethod
    def processes(self) -> tuple[int, ...]:
        """All that hold a part, this one and copies too."""

    @property
    @abstractmethod
    def first(self) -> bool:
        """Whether this process is the first of them."""

    @abstractmethod
    def largest(self, values: HostArray) -> HostArray:
        """The largest of each number over all of them: a collective."""

    @abstractmethod
    def gathered(self, x: A) -> A:
        """The whole of an array that may be spread like this one, in plain memory: then a collective."""

    @property
    @abstractmethod
    def among(self) -> object:
        """All processes over which the array is spread; equal for arrays that are spread over the same
        ones.
        """

    @property
    @abstractmethod
    def pieces(self) -> Pieces | None:
        """What each of them holds; None where that is not one block of the array each."""

    @property
    @abstractmethod
    def before(self) -> int | None:
        """How many elements of the whole come before those that lie here, in their order; None where they
        are not one after the other on every process.
        """

    @abstractmethod
    def numbers(self) -> A:
        """The number of each element that lies here, among those of the whole in their order."""

    @abstractmethod
    def like(self, shape: Shape) -> "Part[A]":
        """How an array of another shape is spread over the same processes: cut along its longest axis."""

    @abstractmethod
    def in_order(self) -> "Part[A]":
        """The same part where its last axis is the fastest."""

    @abstractmethod
    def added(self, x: A) -> A:
        """The sum of a vector over all processes over which the array is spread."""

    @abstractmethod
    def exchanged(
        self, out: A, received: Sequence[int], given: A, sent: Sequence[int]
    ) -> Callable[[], object]:
        """Begin to send so many elements of a vector to each of these processes, one after the other, and
        to receive others in theirs; what comes back waits until they are there.
        """


class Shards(Protocol[A]):
    """Arrays that lie on several devices: by default none does."""

    def part(self, x: A) -> Part[A] | None:
        """How the part that lies here, in plain memory, belongs to the whole; None for an array that is not
        spread over processes, or whose parts are not plain memory.
        """
        return None

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


class Memory(Protocol[A, Kind_contra]):
    """Where elements lie: asked of arrays that are not opaque."""

    def address(self, x: A) -> int:
        """Where the first element lies."""
        raise lacking("address")

    def layout(self, x: A) -> tuple[Shape, Strides]:
        """(shape, strides in bytes), were it contiguous memory."""
        shape: Shape = tuple(cast("Any", x).shape)
        return shape, contiguous_strides(shape)

    def is_dense(self, x: A, where: str, *, write: bool) -> bool:
        """Whether kernels on a device may use the array where it lies, if its layout is the right one."""
        return False

    def dense_strides(self, x: A) -> Strides:
        """The strides, in elements, of a dense array with the axes of `x` in the same order."""
        return contiguous_strides(tuple(cast("Any", x).shape))

    def zeros(self, n: int, dtype: Kind_contra, device: str) -> A:
        """A vector of zeros."""
        raise lacking("zeros")

    def empty(self, n: int, dtype: Kind_contra, device: str) -> A:
        """A vector not yet written."""
        raise lacking("empty")

    def view(self, buffer: A, offset: int, shape: Shape, strides: Strides) -> A:
        """An array of this shape inside a flat buffer; offset and strides in elements."""
        raise lacking("view")

    def fresh(self, shape: Shape, dtype: Kind_contra, strides: Strides | None, device: str) -> A:
        """An array not yet written, with these dense strides (in elements); None for contiguous ones."""
        raise lacking("fresh")

    def touched(self, arrays: Sequence[A]) -> None:
        """Told which arrays a kernel has written, for a library that keeps count."""
        del arrays


@final
class NoMemory(Memory[Any, Any]):
    """Arrays that are no plain memory."""


class Stacks(Protocol[A, D]):
    """Arrays of one shape, side by side."""

    into: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    """Operations that write into the array that they are given as `out`."""

    product: Callable[..., Any] | None = None
    """alpha a @ b + beta c of stacks of matrices, of (a, b, target, c, alpha, beta, spare): in `target`, or
    in a new array where that is None; None where products are taken by the operations.

    `spare` gives a second buffer, as large as the target, which may be written; factors are floats, or
    arrays of one number a matrix.
    """

    def stack(self, arrays: Sequence[A]) -> A:
        """Arrays of one shape along a new first axis."""
        raise lacking("stack")

    def product_type(self, dtype: D, wanted: str, device: str) -> D:
        """In which type products are taken of real matrices of a type: that which is wanted, by its name,
        where the library multiplies such; `fast` stands for bfloat16 where matrices are float32 and the
        device has units for it.
        """
        return dtype


@final
class NoStacks(Stacks[Any, Any]):
    """Arrays that are taken one by one."""


class Graphs(Protocol):
    """Launches that are noted, to be replayed: by default none is."""

    capturable: bool = False
    """Whether the scalars of a state may live on a device, for graphs that are captured."""

    def capturing(self, device: str) -> bool:
        """Whether what is launched now is noted in a graph, to be replayed."""
        return False

    def stream(self, device: str) -> int | None:
        """The handle of the stream on which arrays of a device are computed; None for that of PyTorch."""
        return None


@final
class NoGraphs(Graphs):
    """Launches of which none is noted."""


class Derivatives(NamedTuple):
    """Gradients of arrays, and what makes them: by default nothing."""

    gradient_of: Callable[[Any], Any] | None = None
    """The gradient that an array itself keeps, None for no step; None where arrays keep none."""
    hessian_product: Callable[[Callable[[Any], Any], list[Any], list[Any]], list[Any]] | None = None
    """The second derivative of a function of a list of arrays, there, times a list of vectors."""
    value_and_grad: Callable[[Callable[[Any], Any], Any, bool], Any] | None = None
    """(What a function of a list or dict of arrays gives, its gradients), of (function, arrays, has_aux);
    with `has_aux` it gives (value, aux). None where nothing is differentiated.
    """
