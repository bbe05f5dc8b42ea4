"""How are stacks of matrices shared out over the devices of a mesh? Each device computes with some whole
matrices, as the processes of PyTorch do.

A stack comes together along its first axis, one axis of the mesh after the other: each is one all-to-all, in
which every device sends what it holds of the matrices of others. The results go back the same way.
"""

import contextvars
import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Spec = tuple[tuple[str, ...], ...]
"""The axes of a mesh over which each axis of an array is cut."""


@dataclasses.dataclass(frozen=True)
class Lying:
    """Where the parameters of a step lie, as far as the trace may know."""

    mesh: Mesh | AbstractMesh
    specs: tuple[tuple[int, Spec], ...]
    """(leaf, how its array is cut)."""


lying: contextvars.ContextVar[Lying | None] = contextvars.ContextVar("lying", default=None)
"""Where the parameters lie of the step that is being traced; None where that is not known."""


def spec_of(spec: PartitionSpec, ndim: int) -> Spec:
    """A spec of JAX, with a tuple for every axis of the array."""
    each = [(a,) if isinstance(a, str) else tuple(a or ()) for a in spec]
    return (*each, *[()] * (ndim - len(each)))


def route(count: int, spec: Spec, sizes: Mapping[str, int]) -> list[Spec]:
    """How a stack of so many matrices lies, step by step: first it is cut as they are, in the end the stack
    itself is, by as many axes of the mesh as it has matrices for.
    """
    first: tuple[str, ...] = ()
    held = [list(axes) for axes in spec]
    found: list[Spec] = [((), *spec)]

    def wanted(axis: str) -> bool:
        return math.prod(sizes[a] for a in first) < count and sizes[axis] > 1

    for axes in held:
        while axes:
            axis = axes.pop()
            first = (*first, axis) if wanted(axis) else first
            found.append((first, *map(tuple, held)))
    for axis in sizes:
        if wanted(axis) and not any(axis in axes for axes in spec):
            first = (*first, axis)
    found.append((first, *map(tuple, held)))
    return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Share:
    """How the devices of a mesh share out a stack."""

    mesh: Mesh | AbstractMesh
    along: tuple[Spec, ...]
    """The ways in which it lies, from where it is written to where it is computed with."""
    given: int
    """The matrices that it has."""
    count: int
    """The same, made up to as many for each device: of those that are there, some twice."""

    def there(self, stack: jax.Array) -> jax.Array:
        """A stack of matrices as each device computes with it."""
        parts, missing = [stack], self.count - self.given
        while missing:
            parts.append(stack[: min(missing, self.given)])
            missing -= len(parts[-1])
        return self.laid(jnp.concatenate(parts) if len(parts) > 1 else stack, self.along)

    def back(self, found: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """What was computed of these matrices; what has their `shape` comes back to where they are."""
        if found.shape[1:] == shape:
            found = self.laid(found, self.along[::-1])
        return found[: self.given] if found.shape[0] == self.count else found

    def laid(self, x: jax.Array, along: Sequence[Spec]) -> jax.Array:
        for spec in along:
            there = PartitionSpec(*(axes or None for axes in spec))
            x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, there))
        return x


def share_of(count: int, leaf: int) -> Share | None:
    """How a stack of so many matrices, this leaf among them, is shared out; None where that is XLA's to
    choose.
    """
    where = lying.get()
    spec = None if where is None else dict(where.specs).get(leaf)
    if where is None or spec is None:
        return None
    sizes = dict(where.mesh.shape)
    along = route(count, spec, sizes)
    each = math.prod(sizes[a] for a in along[-1][0])
    return Share(where.mesh, tuple(along), count, -(-count // each) * each) if each > 1 else None
