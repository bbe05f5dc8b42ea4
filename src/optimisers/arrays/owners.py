"""Who does which part of a work that is shared out over processes? Each thing has one owner."""

from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import Any

import numpy as np


def owners(costs: Sequence[float], count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The owner of each of some things, one of `count`: the costliest come first, each to whom has least to
    do so far. The same costs have the same owners on every process.
    """
    found = np.zeros(len(costs), np.int64)
    loads = [(0.0, owner) for owner in range(count)]
    heapify(loads)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, owner = loads[0]
        found[i] = owner
        heapreplace(loads, (load + costs[i], owner))
    return found


def cost_of(shape: Sequence[int]) -> float:
    """About what it costs to make the matrix of an array orthogonal, or to factorise it: rows, columns and
    the smaller of both, multiplied.
    """
    rows = shape[0] if len(shape) > 1 else 1
    size = float(np.prod(shape, dtype=float))
    return size * min(rows, size / rows) if rows else 0.0
