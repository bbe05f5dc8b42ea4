"""How is an operation on the array of one leaf done to a stack of them? By the array library at once, along
axes that are one further.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays.protocol import Library
from optimisers.graph.expr import Expr
from optimisers.ops.dispatch import OPERATIONS


def batched(library: Library, e: Expr, args: Sequence[Any]) -> Any:
    """What an operation that is not element by element gives for every leaf of some stacks; None where the
    library does not do it to stacks.
    """
    operation, options = library.operations[e.op], dict(e.options)
    if e.op == "item":
        return operation(*args, **options)
    if any(np.ndim(a) < 1 for a in args):
        return None
    if e.op == "reshape":
        return args[0].reshape(args[0].shape[0], *np.atleast_1d(options["shape"]).tolist())
    if e.op in _OF_MATRICES and min(a.ndim for a in args) > 2:
        rank = max(a.ndim for a in args) - 1
        return operation(*(raised(a, rank) for a in args), **options)
    if OPERATIONS[e.op].family == "reduce" or e.op in _ALONG:
        axis = moved(options.get("axis", _ALONG.get(e.op)), args[0].ndim - 1)
        return None if axis is None else operation(*args, **(options | {"axis": axis}))
    return None


_OF_MATRICES = frozenset(
    {"matmul", "transpose", "eigh", "qr", "svd", "cholesky", "solve_triangular", "triu", "diagonal"}
)
"""Operations on the last two axes."""

_ALONG = {"argsort": -1, "take": -1}
"""Operations along an axis that is this one unless said."""


_CONDITIONS = frozenset({"logical_and", "logical_or", "logical_not", "where", "call", "reshape", "transpose"})
"""Operations that leave conditions as they are; for all others they count as 0 and 1."""


def counted(library: Library, e: Expr, args: Sequence[Any], dtype: Any) -> list[Any]:
    """The arguments of an operation, conditions as 0 and 1 unless it is one of conditions."""
    if e.op in _CONDITIONS:
        return list(args)
    pairs = zip(args, e.args, strict=True)
    return [library.cast(a, dtype) if node.type == "bool" else a for a, node in pairs]


def leaf_by_leaf(library: Library, e: Expr, args: Sequence[Any], count: int) -> Any:
    """The same, one leaf after the other."""
    operation, options = library.operations[e.op], dict(e.options)
    found: list[Any] = []
    for i in range(count):
        own = [a[i] if np.ndim(a) else a for a in args]
        found.append(operation(options["function"], *own) if e.op == "call" else operation(*own, **options))
    return stack_of(library, found)


def moved(axes: Any, rank: int) -> Any:
    """Axes of an array as they stand in a stack, all for None; None if they are not there."""
    if axes is None:
        return tuple(range(1, rank + 1))
    several = isinstance(axes, tuple | list)
    found = list(axes) if several else [axes]
    if not all(isinstance(a, int) and -rank <= a < rank for a in found):
        return None
    shifted = tuple(a + 1 if a >= 0 else a for a in found)
    return shifted if several else shifted[0]


def raised(a: Any, rank: int) -> Any:
    """A stack whose arrays have as many axes as those beside them."""
    missing = rank - (a.ndim - 1)
    return a.reshape(a.shape[0], *(1,) * missing, *a.shape[1:]) if missing > 0 else a


def shaped(value: Any, rank: int) -> Any:
    """A vector of numbers, one a leaf, as it stands beside stacks of arrays of this many axes."""
    return value.reshape(value.shape[0], *(1,) * rank) if len(np.shape(value)) == 1 else value


def stack_of(library: Library, arrays: Sequence[Any]) -> Any:
    """A stack of arrays of one shape; no copy of a single one. Of several results of an operation a stack
    each.
    """
    if isinstance(arrays[0], tuple):
        return tuple(stack_of(library, parts) for parts in zip(*arrays, strict=True))
    if len(arrays) == 1:
        return library.operations["reshape"](arrays[0], (1, *np.shape(arrays[0])))
    return library.stacks.stack(arrays)


def written(library: Library, value: Any, like: Any, dtype: Any) -> Any:
    """An array that a rule has written; one of NumPy's as one of this library beside `like`, of this type."""
    if not isinstance(value, np.ndarray) or library.name == "numpy":
        return value
    return library.scalars.constant(value, library.operations["zeros"](like, dtype=dtype, shape=(0,)))


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of a stack, or of each of the stacks of several results."""
    return tuple(map(function, value)) if isinstance(value, tuple) else function(value)


def plain(x: Any) -> Any:
    """An array that no gradient follows."""
    return x.detach() if hasattr(x, "detach") else x
