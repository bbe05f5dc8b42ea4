"""Do elements lie in the order of their numbers, where a step has random ones?"""

from collections.abc import Sequence

import numpy as np

from optimisers.arrays.layout import contiguous_strides
from optimisers.engines.addressed.text import kinds_of, types_of
from optimisers.engines.cpu.maths import BYTES
from optimisers.engines.task import Step
from optimisers.graph.passes import Pass, draws
from optimisers.state.buffers import Indices
from optimisers.state.group import Group


def elements_before(step: Step) -> Indices | None:
    """How many elements of each whole array come before those that lie here, where random numbers depend on
    that; None where none do.
    """
    if step.spread is None or not draws(step.program):
        return None
    return np.array([part.before for part in step.spread.parts], np.int64)


def numbered(step: Step, p: Pass, names: Sequence[str], at: list[Indices], before: Indices) -> list[Indices]:
    """Where arrays would begin that had all elements which come before those that lie here."""
    kinds = kinds_of(step.program, p, *types_of(step))
    return [a - BYTES[kinds[name]] * before for name, a in zip(names, at, strict=True)]


def misplaced(group: Group) -> str:
    """Why kernels cannot number the elements of a group; empty if they can, or need not."""
    if not draws(group.program):
        return ""
    places = group.places
    if any(contiguous_strides(s) != t for s, t in zip(places.shapes, places.strides, strict=True)):
        return "random numbers for arrays whose elements do not lie in order"
    if any(part.before is None for part in group.parts):
        return "random numbers for shards whose elements are not in a row"
    return ""
