"""What is said along each axis of an array: products, Gram matrices, and the blocks that long axes are cut
into.

A block is an array of its own. Where there are several they stand one after the other, along an axis before
all others, and so do their matrices.
"""

import dataclasses
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from optimisers import ops
from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting
from optimisers.ops import conj, ema, where
from optimisers.ops.matrices import adjoint
from optimisers.rule import Rule, at_least_one

Shape = tuple[int, ...]

# -- blocks --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Blocks:
    """An array as one of another shape, cut into blocks."""

    whole: Shape
    seen: Shape
    """Its shape with neighbouring axes joined."""
    sizes: Shape
    """The shape of a block."""

    @property
    def counts(self) -> Shape:
        """Into how many pieces each axis is cut."""
        return tuple(-(-n // size) if size else 1 for n, size in zip(self.seen, self.sizes, strict=True))

    @property
    def shape(self) -> Shape:
        """That of all blocks together; of a single one its own."""
        count = prod(self.counts)
        return self.sizes if count == 1 else (count, *self.sizes)

    @property
    def outer(self) -> int:
        """How many axes count blocks."""
        return len(self.shape) - len(self.sizes)

    def of(self, y: Array) -> Any:
        """An array as its blocks; short ones are filled up with zeros."""
        y = seen_as(y, self.seen)
        if not self.outer:
            return y
        for axis, (n, count, size) in enumerate(zip(self.seen, self.counts, self.sizes, strict=True)):
            y = lengthened(y, axis, n, count * size)
        before, inside, after = 1, 1, prod(y.shape)
        for count, size in zip(self.counts, self.sizes, strict=True):
            after //= count * size
            y = exchanged(y, before, inside, count, size * after)
            before, inside = before * count, inside * size
        return ops.reshape(y, self.shape)

    def back(self, y: Array) -> Any:
        """The array of these blocks."""
        if self.outer:
            before, inside, after = prod(self.counts), prod(self.sizes), 1
            for count, size in zip(reversed(self.counts), reversed(self.sizes), strict=True):
                before, inside = before // count, inside // size
                y = exchanged(y, before, count, inside, size * after)
                after *= count * size
            y = ops.reshape(y, tuple(c * s for c, s in zip(self.counts, self.sizes, strict=True)))
            for axis, n in enumerate(self.seen):
                y = y if y.shape[axis] == n else ops.take(y, np.arange(n), axis=axis)
        return seen_as(y, self.whole)

    def norms(self, y: Array) -> Any:
        """The norm of every block."""
        axes = tuple(range(-len(self.sizes), 0))
        return ops.norm2(y, axis=axes, keepdims=True) if self.outer else ops.norm(y)


def blocks_of(shape: Shape, most: int, block: int | None, *, merge: bool) -> Blocks:
    """How an array of this shape is cut: axes longer than `block` into as few equal pieces as will do. With
    `merge` neighbouring axes are joined first, while they are `most` or a block long at most.
    """
    least = most if block is None else min(most, block)
    seen = joined(shape, least) if merge else shape
    return Blocks(shape, seen, tuple(n if block is None else -(-n // max(1, -(-n // block))) for n in seen))


def check_axes(rule: Rule, block: int | None) -> None:
    """Raise BadSetting where the settings are out of range that say which axes have matrices."""
    at_least_one(rule, "every")
    at_least_one(rule, "max_dim")
    if block is not None and not (isinstance(block, int) and block >= 1):
        raise BadSetting(
            f"{type(rule).__name__}.block is {block!r}; it takes None, or the most elements of a piece of an "
            "axis, such as 1024"
        )


def lengthened(y: Array, axis: int, n: int, to: int) -> Any:
    """An array with zeros behind the n elements of an axis."""
    if n == to:
        return y
    place = ops.argsort(ops.zeros((to,), like=y))  # 0, 1, 2, ..., in every library
    beside = (to, *(1,) * (len(y.shape) - axis - 1))
    return where(ops.reshape(place, beside) < n, ops.take(y, np.arange(to), axis=axis), 0)


def exchanged(y: Array, before: int, one: int, other: int, after: int) -> Any:
    """The elements (before, one, other, after) as (before, other, one, after)."""
    if 1 in (one, other):
        return y
    y = ops.transpose(ops.reshape(y, (before, one, other * after)))
    return ops.transpose(ops.reshape(y, (before * other, after, one)))


def joined(shape: Shape, most: int) -> Shape:
    """A shape whose neighbouring axes are joined, from the first on, as long as they have `most` elements at
    most together.
    """
    found: list[int] = []
    for n in shape:
        if found and (1 in (n, found[-1]) or found[-1] * n <= most):
            found[-1] *= n
        else:
            found.append(n)
    return tuple(found)


def seen_as(x: Array, shape: Shape) -> Any:
    """An array in another shape."""
    return x if x.shape == shape else ops.reshape(x, shape)


# -- matrices for axes ---------------------------------------------------------------------------------------


def rows_of(y: Array, axis: int, outer: int) -> Any:
    """y as (..., before, n, after), where n is an axis, counted behind the outer ones."""
    *first, n = y.shape[: outer + axis + 1]
    return ops.reshape(y, (*first[:outer], prod(first[outer:]), n, prod(y.shape[outer + axis + 1 :])))


def along(q: Array, y: Array, axis: int) -> Any:
    """q times y along an axis: the matrix q, one of each block, for every vector along it."""
    outer = len(q.shape) - 2
    if len(y.shape) - outer == 2:
        return ops.matmul(q, y) if axis == 0 else ops.matmul(y, ops.transpose(q))
    q = ops.reshape(q, (*q.shape[:outer], 1, *q.shape[outer:])) if outer else q
    return ops.reshape(q @ rows_of(y, axis, outer), y.shape)


def gram(y: Array, axis: int, outer: int = 0) -> Any:
    """G G^H, G being y with this axis as rows and all others as columns."""
    if len(y.shape) - outer == 2:
        return y @ adjoint(y) if axis == 0 else ops.transpose(y) @ conj(y)
    rows = rows_of(y, axis, outer)
    return ops.sum(rows @ adjoint(rows), axis=outer)


def rotated(y: Array, bases: tuple[Any, ...]) -> Any:
    """y in the bases of its axes."""
    for axis, q in enumerate(bases):
        y = y if q is None else along(adjoint(q), y, axis)
    return y


def rotated_back(y: Array, bases: tuple[Any, ...]) -> Any:
    """What `rotated` was given."""
    for axis, q in enumerate(bases):
        y = y if q is None else along(q, y, axis)
    return y


def for_axes(cut: Blocks, made: Callable[[Shape], Any], max_dim: int, least: int = 2) -> tuple[Any, ...]:
    """What is made of the shape of the matrices of every axis; None where that is longer than `max_dim`, or
    there are fewer axes than `least`.
    """
    outer = cut.shape[: cut.outer]
    return tuple(
        made((*outer, n, n)) if n <= max_dim and len(cut.sizes) >= least else None for n in cut.sizes
    )


def grams_of(cut: Blocks, x: Array, max_dim: int, least: int = 2) -> tuple[Any, ...]:
    """Gram matrices of nothing, beside an array."""
    return for_axes(cut, lambda shape: ops.zeros(shape, like=x), max_dim, least)


def identities_of(cut: Blocks, x: Array, max_dim: int, least: int = 2) -> tuple[Any, ...]:
    """The identity for every axis, beside an array."""

    def made(shape: Shape) -> Any:
        one = ops.eye(shape[-1], like=x)
        return ops.zeros(shape, like=x) + one if len(shape) > 2 else one

    return for_axes(cut, made, max_dim, least)


def mean_grams(beta: Any, grams: tuple[Any, ...], dx: Array) -> tuple[Any, ...]:
    """The means of the Gram matrices after one more gradient."""
    return tuple(
        None if c is None else ema(beta, c, gram(dx, i, len(c.shape) - 2)) for i, c in enumerate(grams)
    )


def each(function: Callable[..., Any], *several: tuple[Any, ...]) -> tuple[Any, ...]:
    """A function of what belongs to each axis that has something."""
    return tuple(None if items[0] is None else function(*items) for items in zip(*several, strict=True))
