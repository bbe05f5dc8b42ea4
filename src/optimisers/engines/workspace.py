"""Where do stacks of matrices lie? In buffers of the group, used again at every step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from optimisers.arrays.protocol import DType, Library
from optimisers.graph.recipe import Shape
from optimisers.state.buffers import Indices

BATCHES = 16
"""How many patterns of stepped leaves are remembered."""


class Workspace:
    """The buffers of a group, one for each purpose, as long as was ever asked for."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Any] = {}
        self.batches: dict[bytes, Batch] = {}
        self.waves: dict[Any, Any] = {}
        """How leaves travel to their owners and back, where they are spread over processes."""

    def flat(self, library: Library, purpose: tuple[object, ...], n: int, dtype: DType, device: str) -> Any:
        """A vector of n elements at least, not to be trusted to hold anything."""
        found = self.buffers.get((purpose, dtype))
        if found is None or found.shape[0] < n:
            found = self.buffers[purpose, dtype] = library.memory.empty(n, dtype, device)
        return found

    def batch(
        self, members: Indices | None, shapes: Sequence[Shape], strides: Sequence[tuple[int, ...]]
    ) -> "Batch":
        """How some of the leaves lie in stacks; None for all."""
        key = b"" if members is None else members.tobytes()
        if key not in self.batches:
            if len(self.batches) >= BATCHES:
                self.batches.clear()
            leaves = range(len(shapes)) if members is None else members.tolist()
            self.batches[key] = Batch.of(leaves, shapes, strides)
        return self.batches[key]

    @property
    def nbytes(self) -> int:
        """How much all of it takes."""
        return sum(b.nbytes for b in self.buffers.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Bucket:
    """Leaves of one shape and layout, side by side in every stack."""

    shape: Shape
    strides: tuple[int, ...]
    leaves: Indices
    offset: int
    """Elements before its first matrix in a buffer that has one of every leaf."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Leaves that are stepped together, sorted into buckets."""

    buckets: tuple[Bucket, ...]
    at: Indices
    """For every leaf of the job: elements before its matrix."""
    size: int

    @classmethod
    def of(
        cls, leaves: Sequence[int], shapes: Sequence[Shape], strides: Sequence[tuple[int, ...]]
    ) -> "Batch":
        kinds: dict[Any, list[int]] = {}
        for i in leaves:
            kinds.setdefault((shapes[i], strides[i]), []).append(i)
        at, offset, buckets = np.zeros(len(shapes), np.int64), 0, list[Bucket]()
        for (shape, laid), members in kinds.items():
            size, found = math.prod(shape), np.array(members, np.int64)
            buckets.append(Bucket(shape, laid, found, offset))
            at[found] = offset + size * np.arange(len(members))
            offset += size * len(members)
        return cls(tuple(buckets), at, offset)


@dataclasses.dataclass(eq=False)
class Found:
    """A value of another shape, of some leaves."""

    stacks: list[tuple[Bucket, Any]]
    at: Indices | None = None
    """Where each leaf's lies, in the shape and layout of x; made when a pass asks."""
    borrowed: bool = False
    """Whether it may lie where the state does, which is about to be written."""
    hold: Any = None
    waves: Sequence[Any] = ()
    """How the leaves of all processes that know it travel, where they are spread."""
