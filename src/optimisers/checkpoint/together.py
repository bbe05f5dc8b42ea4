"""How do several processes save and load as one, whose arrays are spread over them? Each calls `save`, gives
its parts array by array, and the first of them writes the whole. Each calls `load`, reads the file, and takes
its parts. What goes wrong on one of them is an error on all.
"""

import contextlib
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from optimisers.arrays.parts import Part
from optimisers.checkpoint.entries import part_of
from optimisers.checkpoint.format import Form
from optimisers.errors import BadFile, BadState

Team = Part[Any]
"""The processes that hold parts of an array."""


def team_of(values: Mapping[str, Any]) -> Team | None:
    """The processes over which some arrays are spread; None where each of them has all. Raises BadState where
    they are not the same for all.
    """
    found = {name: part for name, x in values.items() if (part := part_of(x)) is not None}
    if len({part.processes for part in found.values()}) > 1:
        said = sorted({(part.processes, name) for name, part in found.items()})
        (one, first), (other, last) = said[0], said[-1]
        raise BadState(
            f"{first} is spread over the processes {one}, and {last} over {other}; save each of these parts "
            "of the model in a file of its own"
        )
    return next(iter(found.values()), None)


@contextlib.contextmanager
def agreed(team: Team | None) -> Generator[None]:
    """Run a block on all processes: where it raises on one, it raises on all."""
    try:
        yield
    except BaseException:
        if team is not None:
            team.largest(np.ones(1))
        raise
    if team is not None and team.largest(np.zeros(1))[0]:
        raise BadFile(
            "another of the processes found this checkpoint damaged, unfit or not there; it says why"
        )


def compared(team: Team, names: Sequence[str], forms: Mapping[str, Form]) -> None:
    """Raise BadState, on all processes, where they are about to save different arrays."""
    own = float(zlib.crc32(repr([(name, forms[name]) for name in names]).encode()))
    least, most = team.largest(np.array([-own, own])) * (-1, 1)
    if least != most:
        raise BadState(
            "processes disagree about what is saved; names, shapes and types are the same on all of them"
        )


class Gathered(Mapping[str, Any]):
    """The elements of arrays, some of which are spread over processes: those are put together one by one, in
    an order that is the same on all.
    """

    def __init__(self, spread: Sequence[str], elements: Mapping[str, Any]) -> None:
        self.left, self.elements = list(spread), elements

    def __getitem__(self, name: str) -> Any:
        if self.left[:1] == [name]:
            left, self.left = self.left[1:], []  # where a collective fails there is none after it
            found = self.elements[name]
            self.left = left
            return found
        return self.elements[name]

    def rest(self) -> None:
        """Take part in putting together what is left."""
        while self.left:
            self[self.left[0]]

    def __iter__(self) -> Any:
        return iter(self.elements)

    def __len__(self) -> int:
        return len(self.elements)


def by_first(team: Team, write: Callable[[Mapping[str, Any]], None], data: Gathered) -> None:
    """Have the first process write; raises BadState on the others where it could not."""
    failed = True
    try:
        if team.first:
            write(data)
        failed = False
    finally:
        data.rest()
        somewhere = team.largest(np.array([float(failed)]))[0]
    if somewhere:
        raise BadState("the first of the processes could not write the checkpoint; it says why")
