"""What does an array library answer? One typed list; every library here, and any from outside, is one of
these.

A library subclasses `Library` for its type of arrays and writes what is abstract. What has a body is right
for arrays of which nothing is known but shape and type: no address, no transform that looks at them, nothing
shared. Functions take arrays of the library alone, unless a parameter says otherwise.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.parts import HostArray, HostScalars, NoShards, Scalars, Shards, Sparse

if TYPE_CHECKING:
    from typing_extensions import TypeVar
else:
    from typing import TypeVar

Shape = tuple[int, ...]
Strides = tuple[int, ...]
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


def _lacking(name: str, function: str) -> TypeError:
    return TypeError(f"the array library {name} declares no `{function}`")


class Library(Protocol[A, D]):
    """What an array library answers, in five parts, about its arrays `A` and element types `D`."""

    # -- what an array is -----------------------------------------------------------------------------------

    name: str
    """The name of the library, as its package is called."""

    immutable: bool = False
    """Whether arrays cannot be written, so that a step in place replaces them."""

    sorts_dicts: bool = False
    """Whether the library hands dicts on with their keys sorted."""

    capturable: bool = False
    """Whether the scalars of a state may live on a device, for graphs that are captured."""

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

    # -- memory: asked of arrays that are not opaque -----------------------------------------------

    def holds_same(self, a: A, b: A) -> bool:
        """Whether two arrays that cannot be written may be taken for one: they hold the same numbers."""
        return a is b

    def address(self, x: A) -> int:
        """Where the first element lies."""
        raise _lacking(self.name, "address")

    def layout(self, x: A) -> tuple[Shape, Strides]:
        """(shape, strides in bytes), were it contiguous memory."""
        return tuple(x.shape), contiguous_strides(tuple(x.shape))

    def is_contiguous(self, x: A) -> bool:
        """Whether the last axis is the fastest and nothing lies between the elements."""
        return True

    def is_dense_memory(self, x: A, where: str, *, write: bool) -> bool:
        """Whether kernels on a device may use the array where it lies, if its layout is the right one."""
        return False

    def dense_strides(self, x: A) -> Strides:
        """The strides, in elements, of a dense array with the axes of `x` in the same order."""
        return contiguous_strides(tuple(x.shape))

    def zeros(self, n: int, dtype: D, device: str) -> A:
        """A vector of zeros."""
        raise _lacking(self.name, "zeros")

    def empty(self, n: int, dtype: D, device: str) -> A:
        """A vector not yet written."""
        raise _lacking(self.name, "empty")

    def view(self, buffer: A, offset: int, shape: Shape, strides: Strides) -> A:
        """An array of this shape inside a flat buffer; offset and strides in elements."""
        raise _lacking(self.name, "view")

    def fresh(self, shape: Shape, dtype: D, strides: Strides | None, device: str) -> A:
        """An array not yet written, with these dense strides (in elements); None for contiguous ones."""
        raise _lacking(self.name, "fresh")

    def laid_out(self, x: A | Scalar, dtype: D, strides: Strides | None, device: str) -> A:
        """A copy of `x` in this type with these dense strides (in elements); None for contiguous ones."""
        raise _lacking(self.name, "laid_out")

    def touched(self, arrays: Sequence[A]) -> None:
        """Told which arrays a kernel has written, for a library that keeps count."""
        del arrays

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
        raise _lacking(self.name, "assign")

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
    def rounded(self, old: A, value: A | Scalar) -> A:
        """A new array of the type and shape of an old one that holds `value`."""

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

    gradient_of: Callable[[A], A | None] | None = None
    """The gradient that an array itself keeps, None for no step; None where arrays keep none."""

    hessian_product: Callable[[Callable[[Any], Any], list[Any], list[Any]], list[Any]] | None = None
    """The second derivative of a function of a list of arrays, there, times a list of vectors."""

    value_and_grad: Callable[[Callable[[Any], Any], Any, bool], Any] | None = None
    """(What a function of a list or dict of arrays gives, its gradients), of (function, arrays, has_aux);
    with `has_aux` it gives (value, aux). None where nothing is differentiated.
    """

    # -- scalars: by default those of a state are on the host, where NumPy keeps them -----------------------

    scalars: Scalars = HostScalars()
    """Tables and vectors of them."""

    @abstractmethod
    def number(self, value: Scalar, dtype: D) -> Any:
        """A scalar of the host beside arrays of a type, rounded to theirs."""

    def stacked(self, values: Sequence[A | Scalar]) -> Any:
        """A vector of these scalars."""
        return np.array([self.to_host(v) for v in values])

    def on_device(self, numbers: Any, device: str) -> Any:
        """Scalars of the host where kernels of a device read them."""
        return numbers

    def moved(self, x: Any, device: str) -> A:
        """A scalar in float32 on a device, without synchronisation."""
        raise _lacking(self.name, "moved")

    def advanced_clocks(self, clock: Any, skipped: Any, covered: Any) -> Any:
        """Clocks on a device after an update, in the same array; as they were where `skipped` is not 0, and
        where `covered`, if given, is 0.
        """
        raise _lacking(self.name, "advanced_clocks")

    def capturing(self, device: str) -> bool:
        """Whether what is launched now is noted in a graph, to be replayed."""
        return False

    def stream(self, device: str) -> int | None:
        """The handle of the stream on which arrays of a device are computed; None for that of PyTorch."""
        return None

    # -- stacks of arrays of one shape -----------------------------------------------------------------------

    into: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    """Operations that write into the array that they are given as `out`."""

    def stack(self, arrays: Sequence[A]) -> A:
        """Arrays of one shape along a new first axis."""
        raise NotImplementedError

    def product_type(self, dtype: D, wanted: str, device: str) -> D:
        """In which type products are taken of real matrices of a type: that which is wanted, by its name,
        where the library multiplies such; `fast` stands for bfloat16 where matrices are float32 and the
        device has units for it.
        """
        return dtype

    def product(
        self,
        a: A,
        b: A,
        target: A | None,
        c: A | None,
        alpha: Any,
        beta: Any,
        spare: Callable[[], A | None],
    ) -> Any:
        """alpha a @ b + beta c of stacks of matrices: in `target`, or in a new array.

        `spare` gives a second buffer, as large as the target, which may be written; factors are floats, or
        arrays of one number a matrix.
        """
        found: Any = self.operations["matmul"](a, b)
        found = found if isinstance(alpha, float | int) and alpha == 1 else found * alpha
        if c is None:
            return found
        return found + (c if isinstance(beta, float | int) and beta == 1 else c * beta)

    # -- operations -----------------------------------------------------------------------------------------

    operations: Mapping[str, Callable[..., Any]]
    """The functions of `optimisers.ops` by their names."""
