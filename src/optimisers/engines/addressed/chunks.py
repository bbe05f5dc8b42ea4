"""How is the work of a step cut up, and which small tables does every step need again?"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from optimisers.arrays.philox import LANES
from optimisers.state.buffers import Indices

CHUNK = 1 << 16
"""Elements of one chunk: large enough that its set-up costs nothing, small enough to share out."""

SPAN = 1 << 14
"""Elements that a thread claims at least: several small leaves at once."""


class Chunks:
    """The chunk table for leaves of these sizes, and the spans of chunks that threads claim; leaves of one
    `unit`, which stand side by side, are in one span. Elements are numbered from what comes `before` each
    leaf, if anything does; then the first of its chunks ends where a block of random numbers does.
    """

    def __init__(
        self,
        sizes: Indices,
        chunk: int = CHUNK,
        unit: Indices | None = None,
        before: Indices | None = None,
    ) -> None:
        self.chunk = chunk
        self.before = before
        number = np.zeros(len(sizes), np.int64) if before is None else before
        head = np.minimum(-number % (4 * LANES), sizes)
        pieces = -(-(sizes - head) // chunk) + (head > 0)
        leaf = np.repeat(np.arange(len(sizes)), pieces)
        place = np.arange(len(leaf)) - np.repeat(np.cumsum(pieces) - pieces, pieces) - (head > 0)[leaf]
        first = np.where(place < 0, 0, head[leaf] + place * chunk)
        length = np.where(place < 0, head[leaf], np.minimum(chunk, sizes[leaf] - first))
        self.leaf: Indices = leaf
        self.table: Indices = np.stack([leaf, first + number[leaf], length], axis=1).astype(np.int64)
        self.begin: Indices = np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64)
        """Of each leaf: its first chunk; then how many there are."""
        self.elements = int(sizes.sum())
        self.placed: dict[Any, Any] = {}
        """What engines have made of these tables elsewhere."""
        group = (np.cumsum(length) - length) // SPAN
        if unit is not None and len(leaf):  # leaves of one unit go to one thread
            of_chunk = unit[leaf]
            first = np.flatnonzero(np.diff(of_chunk, prepend=-1))
            group = np.repeat(group[first], np.diff(np.append(first, len(leaf))))
        self.spans: Indices = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(leaf)).astype(
            np.int64
        )


class Scratch(threading.local):
    """Small tables that every step needs again; each thread has its own."""

    def __init__(self) -> None:
        self.arrays: dict[Any, Any] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array to be filled; the one of the last call by this name, if it has this shape."""
        found = self.arrays.get(name)
        if found is None or found.shape != shape:
            found = self.arrays[name] = np.empty(shape, dtype)
        return found

    def get_or_make(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` made when this was first asked for."""
        if name not in self.arrays:
            self.arrays[name] = make()
        return self.arrays[name]
