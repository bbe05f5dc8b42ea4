"""Where do the arrays of a state lie? Small ones side by side in one buffer, large ones each in a buffer of
its own.

A thousand small arrays so cost one allocation, and their addresses are one base and a table of offsets; each
is made into an array of its own only when it is looked at.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.parts import Part

LARGE = 1 << 15
"""Elements from which an array has a buffer of its own."""

ALIGNED = 16
"""Arrays in a shared buffer start at multiples of this many elements."""

BUCKET = 16
"""Small arrays in one bucket: XLA compiles longer concatenations slowly, and runs shorter ones slowly."""

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclasses.dataclass(eq=False)
class Places:
    """Which buffer holds each of a list of arrays, from which element on, and how it is laid out."""

    shapes: list[tuple[int, ...]]
    strides: list[tuple[int, ...]]
    """In elements."""
    sizes: Indices
    buffer: Indices
    offset: Indices
    lengths: list[int]
    """Elements of each buffer."""
    number: Indices
    """Which of all arrays of the slot each is."""

    @classmethod
    def of(
        cls,
        shapes: Sequence[tuple[int, ...]],
        strides: Sequence[tuple[int, ...]],
        *,
        together: bool = False,
    ) -> "Places":
        """Side by side, but for large ones: each has a buffer of its own, unless all stay `together`."""
        sizes = np.array([math.prod(s) for s in shapes], np.int64)
        large = (sizes >= LARGE) & (not together)
        room = np.where(large, 0, -(-sizes // ALIGNED) * ALIGNED)
        offset = np.concatenate([[0], np.cumsum(room)[:-1]]) if len(sizes) else np.zeros(0, np.int64)
        lengths = [int(room.sum()), *(int(n) for n in sizes[large])]
        buffer = np.where(large, np.cumsum(large), 0)
        return cls(
            list(shapes),
            list(strides),
            sizes,
            buffer,
            np.where(large, 0, offset),
            lengths,
            np.arange(len(sizes)),
        )

    @classmethod
    def bucketed(cls, shapes: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...]]) -> "Places":
        """Small arrays in buckets of `BUCKET` neighbours without gaps, large ones each in its own buffer."""
        sizes = np.array([math.prod(s) for s in shapes], np.int64)
        buffer, offset = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
        lengths: list[int] = []
        room = 0
        for i, n in enumerate(sizes.tolist()):
            if n >= LARGE or not room:
                lengths.append(0)
            room = 0 if n >= LARGE else BUCKET - 1 if not room else room - 1
            buffer[i], offset[i] = len(lengths) - 1, lengths[-1]
            lengths[-1] += n
        return cls(list(shapes), list(strides), sizes, buffer, offset, lengths, np.arange(len(sizes)))

    def pick(self, members: Indices) -> "Places":
        """Some of the arrays, where they lie."""
        shapes, strides = [self.shapes[i] for i in members], [self.strides[i] for i in members]
        return Places(
            shapes,
            strides,
            self.sizes[members],
            self.buffer[members],
            self.offset[members],
            self.lengths,
            self.number[members],
        )


def spread_out(parts: Sequence[Part[Any]]) -> Places:
    """The places of whole arrays, of which these parts lie here."""
    shapes = [part.of for part in parts]
    return Places.of(shapes, list(map(contiguous_strides, shapes)))


@dataclasses.dataclass(eq=False)
class FlatBuffers:
    """The arrays of one slot of the state, one for each leaf of a group, side by side in buffers."""

    name: str
    """The array library."""
    dtype: Any
    device: str
    places: Places
    buffers: list[Any]

    @property
    def library(self) -> Any:
        return registry.named(self.name)

    @classmethod
    def zeros(cls, library: Any, dtype: Any, device: str, places: Places) -> "FlatBuffers":
        return cls(
            library.name,
            dtype,
            device,
            places,
            [library.memory.zeros(n, dtype, device) for n in places.lengths],
        )

    @functools.cached_property
    def addresses(self) -> Indices:
        """Where each array lies."""
        base = np.array([self.library.memory.address(b) for b in self.buffers], np.int64)
        return base[self.places.buffer] + self.places.offset * self.dtype.itemsize

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "addresses"}

    def empty(self) -> "FlatBuffers":
        """Buffers of the same form, not yet written."""
        fresh = [self.library.memory.empty(n, self.dtype, self.device) for n in self.places.lengths]
        return dataclasses.replace(self, buffers=fresh)

    def copy(self) -> "FlatBuffers":
        new = self.empty()
        for target, source in zip(new.buffers, self.buffers, strict=True):
            self.library.assign(target, source)
        return new

    def pick(self, places: Places) -> "FlatBuffers":
        """The arrays at some of the places; they share the buffers."""
        return dataclasses.replace(self, places=places)

    def local(self) -> "FlatBuffers":
        """The same arrays as engines see them."""
        return self

    def shape(self, i: int) -> tuple[int, ...]:
        """The shape of an array."""
        return self.places.shapes[i]

    def separated(self) -> "Separate":
        """The same arrays, each on its own; they are read, not written."""
        return Separate(self.name, self.dtype, self.device, self.places, list(self))

    def in_place(self, i: int) -> Any:
        """An array that writes into the slot; None where what is written must be given to `put`."""
        return self[i]

    def put(self, i: int, value: Any) -> None:
        """Write an array, rounding once to the type of the slot."""
        self.library.assign(self[i], value)

    def put_many(self, members: Indices, values: Sequence[Any]) -> None:
        """Write several arrays, or numbers into all of an array."""
        arrays = self if 4 * len(members) < len(self) else list(self)
        targets = [arrays[i] for i in members.tolist()]
        if all(np.shape(v) == t.shape for v, t in zip(values, targets, strict=True)):
            self.library.assign_many(targets, values)
        else:
            for target, value in zip(targets, values, strict=True):
                self.library.assign(target, value)

    def __getitem__(self, i: int) -> Any:
        p = self.places
        return self.library.memory.view(
            self.buffers[p.buffer[i]], int(p.offset[i]), p.shapes[i], p.strides[i]
        )

    def stacked(self, members: Indices) -> Any:
        """Arrays of one shape as one array with a new first axis, where they lie; None where they do not lie
        evenly in one buffer.
        """
        p, first = self.places, int(members[0])
        kinds = {(p.shapes[i], p.strides[i], int(p.buffer[i])) for i in members.tolist()}
        gaps = set(np.diff(p.offset[members]).tolist()) or {int(p.sizes[first])}
        if len(kinds) != 1 or len(gaps) != 1 or min(gaps) < 0:
            return None
        shape, strides = (len(members), *p.shapes[first]), (gaps.pop(), *p.strides[first])
        return self.library.memory.view(self.buffers[p.buffer[first]], int(p.offset[first]), shape, strides)

    def __len__(self) -> int:
        return len(self.places.shapes)

    def __iter__(self) -> Iterator[Any]:
        p, view = self.places, self.library.memory.view
        where = zip(p.buffer.tolist(), p.offset.tolist(), p.shapes, p.strides, strict=True)
        return (view(self.buffers[b], offset, shape, strides) for b, offset, shape, strides in where)


@dataclasses.dataclass(eq=False)
class Spread(FlatBuffers):
    """The arrays of one slot of the state that are spread over processes: the parts that lie here are in the
    buffers, and are shown as the arrays that they belong to.
    """

    parts: Sequence[Part[Any]] = ()
    """How each array of the slot is spread, by its number."""

    def local(self) -> FlatBuffers:
        return FlatBuffers(self.name, self.dtype, self.device, self.places, self.buffers)

    def part(self, i: int) -> Part[Any]:
        """How an array is spread."""
        return self.parts[self.places.number[i]]

    @property
    def held(self) -> list[Part[Any]]:
        """How each of these arrays is spread."""
        return [self.part(i) for i in range(len(self))]

    def shape(self, i: int) -> tuple[int, ...]:
        return self.part(i).of

    def in_place(self, i: int) -> Any:
        return None

    def put(self, i: int, value: Any) -> None:
        self.local().put(i, self._cut(i, value))

    def put_many(self, members: Indices, values: Sequence[Any]) -> None:
        self.local().put_many(
            members, [self._cut(i, v) for i, v in zip(members.tolist(), values, strict=True)]
        )

    def separated(self) -> "Separate":
        return Separate(self.name, self.dtype, self.device, spread_out(self.held), list(self))

    def stacked(self, members: Indices) -> Any:
        return None

    def __getitem__(self, i: int) -> Any:
        return self.part(i).whole(super().__getitem__(i))

    def __iter__(self) -> Iterator[Any]:
        return (self.part(i).whole(x) for i, x in enumerate(super().__iter__()))

    def _cut(self, i: int, value: Any) -> Any:
        """The part of a value that lies here; a number as it is."""
        return self.part(i).cut(value) if registry.isarray(value) else value


class Separate(FlatBuffers):
    """The arrays of one slot of the state where no address can be written: separate ones, which are
    replaced.

    So are the arrays of libraries that know no writing, distributed ones, and those that are
    differentiated.
    """

    def empty(self) -> "Separate":
        return self.copy()

    def copy(self) -> "Separate":
        return Separate(self.name, self.dtype, self.device, self.places, list(self.buffers))

    def pick(self, places: Places) -> "Separate":
        return Separate(self.name, self.dtype, self.device, places, self.buffers)

    def separated(self) -> "Separate":
        return self.copy()

    def in_place(self, i: int) -> Any:
        return None

    def put(self, i: int, value: Any) -> None:
        old = self[i]
        self.buffers[self.places.number[i]] = self.library.rounded(old, value)

    def put_many(self, members: Indices, values: Sequence[Any]) -> None:
        for i, value in zip(members.tolist(), values, strict=True):
            self.put(i, value)

    def stacked(self, members: Indices) -> Any:
        return None

    def __getitem__(self, i: int) -> Any:
        return self.buffers[self.places.number[i]]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class Bucketed(Separate):
    """Separate arrays, of which small ones share a vector: a step of a thousand has fewer to hand over."""

    @classmethod
    def of(cls, library: Any, device: str, places: Places, arrays: list[Any]) -> "Bucketed":
        """A slot of these arrays."""
        return cls(library.name, arrays[0].dtype, device, places, places_filled(library, places, arrays))

    def copy(self) -> "Bucketed":
        return Bucketed(self.name, self.dtype, self.device, self.places, list(self.buffers))

    def pick(self, places: Places) -> "Bucketed":
        return Bucketed(self.name, self.dtype, self.device, places, self.buffers)

    def separated(self) -> "Bucketed":
        return self.copy()

    def put(self, i: int, value: Any) -> None:
        p, old = self.places, self[i]
        new, at = self.library.rounded(old, value), int(p.offset[i])
        if p.lengths[p.buffer[i]] != p.sizes[i]:
            whole = self.buffers[p.buffer[i]]
            new = self.library.scalars.placed(whole, slice(at, at + int(p.sizes[i])), new.reshape(-1))
        self.buffers[p.buffer[i]] = new

    def put_many(self, members: Indices, values: Sequence[Any]) -> None:
        """Write several arrays: a bucket is put together once, whatever comes into it."""
        given = dict(zip(members.tolist(), values, strict=True))
        for b in np.unique(self.places.buffer[members]).tolist():
            inside = np.flatnonzero(self.places.buffer == b).tolist()
            arrays = [self[i] for i in inside]
            new = [
                self.library.rounded(old, given[i]) if i in given else old
                for i, old in zip(inside, arrays, strict=True)
            ]
            self.buffers[b] = new[0] if len(new) == 1 else self.library.flattened(new)

    def __getitem__(self, i: int) -> Any:
        p = self.places
        buffer, at = self.buffers[p.buffer[i]], int(p.offset[i])
        if p.lengths[p.buffer[i]] == p.sizes[i]:
            return buffer.reshape(p.shapes[i])
        return buffer[at : at + int(p.sizes[i])].reshape(p.shapes[i])


def places_filled(library: Any, places: Places, arrays: list[Any]) -> list[Any]:
    """The buffers that hold these arrays: the array itself where it is alone, else a vector of its bucket."""
    held: list[list[Any]] = [[] for _ in places.lengths]
    for b, x in zip(places.buffer, arrays, strict=True):
        held[b].append(x)
    return [xs[0] if len(xs) == 1 else library.flattened(xs) for xs in held]
