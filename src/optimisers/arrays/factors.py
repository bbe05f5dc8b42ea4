"""What do operations on matrices give in every library alike? Said once, with the operations that libraries
have anyway.

What cannot be factorised gives NaN, for that matrix alone. Left to themselves NumPy and PyTorch raise for the
whole stack, and XLA gives NaN or not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from optimisers.arrays.protocol import Array

Operations = Mapping[str, Callable[..., Any]]

Factors = Sequence[Any]

BLOCK = 32
"""Rows of a triangle that are solved one after the other."""


class NoError(Exception):
    """Raised by no library."""


def factorised(
    operations: Operations,
    factors: Callable[[Any], Factors],
    stack: Callable[[list[Any]], Any],
    vector: int = -1,
    error: type[Exception] = NoError,
) -> Callable[[Any], tuple[Any, ...]]:
    """A factorisation of matrices (..., m, n), by the function of a library, whose results are matrices but
    for the one numbered `vector`. The library raises `error` where it finds no answer.
    """
    where = operations["where"]

    def run(a: Array) -> tuple[Any, ...]:
        faults = operations["sum"](where(operations["isfinite"](a), 0.0, 1.0), axis=(-2, -1), keepdims=True)
        bad = faults > 0
        found = attempt(where(bad, 0.0, a))
        flat = operations["reshape"](bad, (*a.shape[:-2], 1))
        return tuple(where(flat if i == vector else bad, math.nan, f) for i, f in enumerate(found))

    def attempt(a: Any) -> Factors:
        try:
            return factors(a)
        except error:
            if a.ndim == 2:
                return [f + math.nan for f in factors(0 * a)]
        return [stack(list(parts)) for parts in zip(*map(attempt, a), strict=True)]

    return run


def cholesky(
    operations: Operations,
    factor: Callable[[Any], Any],
    stack: Callable[[list[Any]], Any],
    error: type[Exception] = NoError,
) -> Callable[[Any], Any]:
    """The Cholesky factors of matrices, by the function of a library that raises `error` for one without, or
    leaves on the diagonal what is not positive.
    """
    where = operations["where"]

    def run(a: Any) -> Any:
        found = attempt(a)
        diagonal = operations["real"](operations["diagonal"](found))
        faults = operations["sum"](where(diagonal > 0, 0.0, 1.0), axis=-1)
        return where(operations["reshape"](faults > 0, (*a.shape[:-2], 1, 1)), math.nan, found)

    def attempt(a: Any) -> Any:
        try:
            return factor(a)
        except error:
            return a * math.nan if a.ndim == 2 else stack(list(map(attempt, a)))

    return run


def solved(xp: Any, a: Any, b: Any, *, upper: bool, transposed: bool = False) -> Any:
    """The x of a x = b for triangles, by substitution: rows of blocks one after the other, and a product for
    what is left.
    """
    if transposed:
        a, upper = xp.swapaxes(a, -1, -2), not upper
    n = a.shape[-1]
    if n <= BLOCK:
        return _substituted(xp, a, b, upper)
    half = n // 2
    near, far = (slice(half, n), slice(half)) if upper else (slice(half), slice(half, n))
    x = solved(xp, a[..., near, near], b[..., near, :], upper=upper)
    rest = b[..., far, :] - xp.matmul(a[..., far, near], x)
    y = solved(xp, a[..., far, far], rest, upper=upper)
    return xp.concatenate([y, x] if upper else [x, y], axis=-2)


def _substituted(xp: Any, a: Any, b: Any, upper: bool) -> Any:
    n = a.shape[-1]
    outer = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    x = xp.empty((*outer, n, b.shape[-1]), np.result_type(a.dtype, b.dtype))
    for i in reversed(range(n)) if upper else range(n):
        known = slice(i + 1, n) if upper else slice(i)
        here = slice(i, i + 1)
        rest = b[..., here, :] - xp.matmul(a[..., here, known], x[..., known, :])
        x[..., here, :] = rest / a[..., here, here]
    return x


def places(x: Any, index: Any, axis: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(the shape of an index beside x, that of what is taken, the axis counted from the left)."""
    at, count = axis % x.ndim, index.shape[-1]
    between = at - (index.ndim - 1)
    beside = (*index.shape[:-1], *(1,) * between, count, *(1,) * (x.ndim - at - 1))
    return beside, (*x.shape[:at], count, *x.shape[at + 1 :]), at
