"""Which memory does a step write, and does any of it belong to two arrays?"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

from optimisers.arrays.memory import bounds
from optimisers.errors import TreeMismatch
from optimisers.state.buffers import FlatBuffers, Indices, Separate
from optimisers.state.cache import Subset
from optimisers.tree.flatten import share_elements


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """Pieces of memory, sorted by where they begin."""

    begin: Indices
    end: Indices
    owner: Indices
    """The leaf of the step whose parameters each piece is; -1 for state."""
    strides: object = None
    """Of parameters that are not dense: they may lie between each other."""

    @classmethod
    def of(cls, begin: Indices, end: Indices, owner: Indices, strides: object = None) -> "Spans":
        """Sorted, without those that are empty."""
        by = np.argsort(begin, kind="stable")
        by = by[end[by] > begin[by]]
        return cls(begin[by], end[by], owner[by], strides)

    def same(self, other: "Spans") -> bool:
        """Whether these are the same pieces."""
        return (
            np.array_equal(self.begin, other.begin)
            and np.array_equal(self.end, other.end)
            and np.array_equal(self.owner, other.owner)
            and self.strides == other.strides
        )


NOTHING = Spans(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
"""The memory of a step that only makes new arrays."""


class Stepped(Protocol):
    """What is asked of a step here."""

    xs: Sequence[Any]

    def code(self, leaf: int, root: str) -> str: ...


@dataclasses.dataclass(eq=False)
class Known:
    """What the last look at the memory of a step found: it holds as long as nothing has moved."""

    spans: list[Spans] = dataclasses.field(default_factory=list[Spans])
    begin: Indices = dataclasses.field(default_factory=lambda: NOTHING.begin)
    end: Indices = dataclasses.field(default_factory=lambda: NOTHING.end)


def looked(library: Any, xs: Sequence[Any], slots: Sequence[FlatBuffers], subset: Subset) -> Spans:
    """The memory of these parameters and state arrays, each asked in Python; the very object found last, if
    nothing has moved.
    """
    state = [b for p in slots if not isinstance(p, Separate) for b in p.buffers]
    ends = [bounds(a) for a in (*xs, *state)]
    owner = np.array([*range(len(xs)), *([-1] * len(state))], np.int64)
    pieces = np.array(ends, np.int64).reshape(-1, 2)
    strides = [
        tuple(library.memory.layout(x)[1]) if b[0] < b[1] else () for x, b in zip(xs, ends, strict=False)
    ]
    found = Spans.of(pieces[:, 0], pieces[:, 1], owner, strides)
    if not (isinstance(subset.spans, Spans) and subset.spans.same(found)):
        subset.spans = found
    return subset.spans if isinstance(subset.spans, Spans) else found


def merged(spans: list[Spans], steps: Sequence[Stepped], known: Known) -> tuple[Indices, Indices]:
    """(begin, end) of all pieces, sorted by where they begin; ends are never before those of earlier ones.

    Raises TreeMismatch for parameters that share memory with others or with state: they would be stepped one
    after the other, or overwritten.
    """
    last = known.spans
    if len(spans) == len(last) and all(map(operator.is_, spans, last)):
        return known.begin, known.end
    begin, end = (
        np.concatenate([NOTHING.begin, *part]) for part in ([s.begin for s in spans], [s.end for s in spans])
    )
    by = np.argsort(begin, kind="stable")
    reach = np.maximum.accumulate(end[by])
    if (begin[by][1:] < reach[:-1]).any():
        which = np.repeat(np.arange(len(spans)), [len(s.begin) for s in spans])
        owner = np.concatenate([s.owner for s in spans])
        _refuse_sharing(begin[by], end[by], which[by].tolist(), owner[by].tolist(), steps)
    known.spans, known.begin, known.end = spans, begin[by], reach
    return known.begin, known.end


def _refuse_sharing(
    begin: Indices, end: Indices, which: list[int], owner: list[int], steps: Sequence[Stepped]
) -> None:
    """Raise TreeMismatch for the first two pieces that have an element in common; those that only lie between
    each other, such as columns of a matrix, may.
    """
    for i in range(len(begin)):
        for j in range(i + 1, int(np.searchsorted(begin, end[i]))):
            if owner[i] < 0 and owner[j] < 0:  # one buffer, of which two steps have a part each
                continue
            a, b = (steps[which[k]] for k in (i, j))
            params = owner[i] >= 0 and owner[j] >= 0
            if not params or share_elements(a.xs[owner[i]], b.xs[owner[j]]):
                _refuse((a, owner[i]), (b, owner[j]))


def _refuse(*pieces: tuple[Stepped, int]) -> NoReturn:
    names = [step.code(leaf, "model") if leaf >= 0 else "the state" for step, leaf in pieces]
    raise TreeMismatch(
        f"{' and '.join(names)} share memory, which they did not at `setup`; call `setup` again, or copy"
    )
