"""How do whole matrices come together where every process holds a part of each? Each matrix has an owner, to
which the others send their parts; it computes with the whole, and sends everyone the part that is theirs.

Collectives begin as soon as what they send is written, and are waited for when what they bring is read: they
run while earlier matrices are computed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.parts import Part, Piece
from optimisers.arrays.types import promoted
from optimisers.engines.workspace import Bucket, Found
from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr
from optimisers.graph.passes import number_of, reduce_pass, stages, store_pass
from optimisers.graph.plan import Round, filling
from optimisers.graph.recipe import Shape, Shapes, recipe
from optimisers.graph.trace import Program
from optimisers.state.buffers import Indices, Spread
from optimisers.state.group import Group

if TYPE_CHECKING:
    from optimisers.engines.spread import SpreadStep
    from optimisers.engines.stacks import Stacks

WAVE = 1 << 24
"""Elements of the matrices that travel together: what comes later travels while these are computed."""

PATTERNS = 16
"""How many patterns of stepped leaves are remembered."""


@dataclasses.dataclass(frozen=True, eq=False)
class Wave:
    """Matrices of one shape that travel together."""

    leaves: Indices
    """All of them, those of the first process first."""
    owned: tuple[int, ...]
    """How many each process owns."""
    bucket: Bucket
    """Those that this one owns."""

    def order(self, near: Any) -> Indices:
        """All of them as they are sent: what goes to processes that are near comes first."""
        far = ~near[np.repeat(np.arange(len(self.owned)), self.owned)]
        return self.leaves[np.argsort(far, kind="stable")]


@final
class Routes:
    """How many elements go from this process to each, and from each to this one, of arrays spread alike."""

    def __init__(self, owned: Sequence[int], part: Part[Any], shape: Shape | None = None) -> None:
        """`shape` is that of values which are spread out to the arrays that lie so, if it is another one."""
        pieces = part.pieces
        assert pieces is not None
        self.part, self.here, self.shape = part, pieces.here, shape or part.of
        self.all = pieces.all if shape is None else [narrowed(piece, shape) for piece in pieces.all]
        self.piece, self.own = self.all[self.here], owned[self.here]
        mine, sizes = pieces.teams[self.here], [piece.size for piece in self.all]
        self.near = np.array([team == mine for team in pieces.teams])
        """The processes between which the whole lies once: an owner gathers from its own."""
        self.given = [n * self.piece.size * bool(near) for n, near in zip(owned, self.near, strict=True)]
        """What goes to owners: parts that lie here."""
        self.gathered = [self.own * size * bool(near) for size, near in zip(sizes, self.near, strict=True)]
        self.returned = [self.own * size for size in sizes]
        """What goes from an owner to all that hold a part."""
        self.received = [n * self.piece.size for n in owned]

    @property
    def crossing(self) -> tuple[int, int]:
        """How many elements this process sends to others: (to owners, back from it as an owner)."""
        given, returned = (sum(sent) - sent[self.here] for sent in (self.given, self.returned))
        return given, returned


def narrowed(piece: Piece, shape: Shape) -> Piece:
    """The part of a value that belongs to a part of what it is spread out to, axis by axis the same or 1."""
    held = zip(piece.start, piece.shape, shape, strict=True)
    found = [(0, min(n, 1)) if m == 1 else (at, n) for at, n, m in held]
    return Piece(tuple(at for at, _ in found), tuple(n for _, n in found))


@cached
def shape_of(e: Expr, shape: Shape) -> Shape | None:
    """The shape of a value beside parameters of a shape, with as many axes; None where it is the same, or
    not known before.
    """
    found = Shapes(shape).known(e)
    if found is None or len(found) > len(shape):
        return None
    found = (*(1,) * (len(shape) - len(found)), *found)
    narrow = found != shape and all(n in (1, m) for n, m in zip(found, shape, strict=True))
    return found if narrow else None


def waves_of(leaves: Sequence[int], parts: Sequence[Part[Any]], owner: Indices) -> list[Wave]:
    """Some leaves, whose arrays are spread so, in waves."""
    kinds: dict[Shape, list[int]] = {}
    for i in leaves:
        kinds.setdefault(parts[i].of, []).append(i)
    found: list[Wave] = []
    offset = 0
    for shape, members in kinds.items():
        pieces = parts[members[0]].pieces
        assert pieces is not None
        count, size = len(pieces.all), math.prod(shape)
        most = max(count, WAVE // max(1, size))
        for low in range(0, len(members), most):
            some = np.array(members[low : low + most], np.int64)
            some = some[np.argsort(owner[some], kind="stable")]
            mine = some[owner[some] == pieces.here]
            owned = tuple(np.bincount(owner[some], minlength=count).tolist())
            found.append(Wave(some, owned, Bucket(shape, contiguous_strides(shape), mine, offset)))
            offset += len(mine) * size
    return found


@cached
def read_by_passes(program: Program) -> frozenset[int]:
    """The values of another shape that passes read, by id: they are sent back as soon as they are there."""
    passes = [reduce_pass(program, k, (True,) * len(s.reductions)) for k, s in enumerate(stages(program))]
    passes.append(store_pass(program, (True,) * len(program.guards)))
    return frozenset(id(e) for p in passes if p is not None for e in p.free)


def states_of(what: Round, shape: Shape) -> list[Expr]:
    """The arrays of the state, of another shape than x, that a round reads for matrices of this shape."""
    return [e for e, _ in recipe(what, shape).older if e.op == "input"]


@dataclasses.dataclass(frozen=True, eq=False)
class Arrival:
    """Parts that are on their way here."""

    wave: Wave
    routes: Routes
    vector: Any
    """Where they arrive, those of the first process first."""
    wait: Callable[[], object]


@final
class Crossing:
    """What the matrices of a group send from this process to others in a step."""

    def __init__(self, group: Group, members: Sequence[int], owner: Indices) -> None:
        self.parts = [group.parts[i] for i in members]
        self.slots = [[slot.part(i) for i in members] for slot in group.slots if isinstance(slot, Spread)]
        self.waves = waves_of(range(len(members)), self.parts, owner)
        self.gathered: set[str] = set()
        """The arrays of the state that are with the owners already."""

    def to_owners(self, what: Round) -> int:
        """Elements that go to owners before a round."""
        found = sum(self.count(wave, self.parts)[0] for wave in self.waves) * len(what.inputs)
        states = {e.value for wave in self.waves for e in states_of(what, wave.bucket.shape)} - self.gathered
        self.gathered |= states
        return found + sum(
            self.count(wave, self.slots[number_of(name)])[0] for wave in self.waves for name in states
        )

    def back(self, value: Expr) -> int:
        """Elements of a value that go back to be read by passes."""
        found = 0
        for wave in self.waves:
            part = self.parts[wave.leaves[0]]
            found += Routes(wave.owned, part, shape_of(value, part.of)).crossing[1]
        return found

    def stored(self, slot: int) -> int:
        """Elements of an array of the state that go back."""
        return sum(self.count(wave, self.slots[slot])[1] for wave in self.waves)

    @staticmethod
    def count(wave: Wave, parts: Sequence[Part[Any]]) -> tuple[int, int]:
        """(to owners, back from this process) of one value of the leaves of a wave."""
        return Routes(wave.owned, parts[wave.leaves[0]]).crossing


@final
class Exchange:
    """The matrices of a step on their way to their owners and back."""

    def __init__(self, stacks: "Stacks", spread: "SpreadStep") -> None:
        self.s, self.spread, self.library = stacks, spread, stacks.library
        spread.exchange = self
        self.turns = 0
        self.begun: dict[Any, list[list[Arrival]]] = {}
        """The inputs of rounds on their way to owners, wave by wave."""
        self.states: dict[Any, Arrival | None] = {}
        """Arrays of the state on their way there; None for those that have come."""
        self.whole: dict[Any, Any] = {}
        """Those that have come, as stacks."""
        self.back: dict[Any, Arrival] = {}
        """Values on their way to all that hold a part."""
        self.coming: list[tuple[Arrival, Any]] = []
        """What passes are going to read, and where they find it."""

    def waves(self, members: Indices | None) -> list[Wave]:
        """Some leaves of the step, None for all, in waves."""
        key = _key(members), self.spread.owner.tobytes()
        held = self.s.workspace.waves
        if key not in held:
            if len(held) >= PATTERNS:
                held.clear()
            leaves = range(self.s.step.leaves) if members is None else members.tolist()
            held[key] = waves_of(leaves, self.spread.parts, self.spread.owner)
        return held[key]

    # -- to the owners --

    def knows(self, what: Round) -> bool:
        """Whether all is known of which a pass makes the inputs of a round."""
        return all(self.s.known_of(e) for e in filling(what, tuple(range(len(what.inputs)))).free)

    def start(self, what: Round, members: Indices | None) -> None:
        """Have a pass write the inputs of a round, and send them to the owners, with the state it reads."""
        key = id(what), _key(members)
        if key in self.begun:
            return
        waves = self.waves(members)
        routes = [Routes(wave.owned, self.spread.parts[wave.leaves[0]]) for wave in waves]
        place, size = np.zeros(self.s.step.leaves, np.int64), 0
        begin: list[int] = []
        for wave, way in zip(waves, routes, strict=True):
            place[wave.order(way.near)] = size + way.piece.size * np.arange(len(wave.leaves))
            begin.append(size)
            size += way.piece.size * len(wave.leaves)
        kinds = [self.s.kind(e) for e in what.inputs]
        flats = [self.flat(size, kind) for kind in kinds]
        at = [self.library.memory.address(f) + k.itemsize * place for f, k in zip(flats, kinds, strict=True)]
        if flats:
            p = filling(what, tuple(range(len(flats))))
            for e in p.free:
                self.s.addresses(e)
            self.arrive()
            self.s.fill(p, members, at)
        self.begun[key] = [
            [
                self.sent(wave, way, self.vector(flat, first, sum(way.given)), kind)
                for flat, kind in zip(flats, kinds, strict=True)
            ]
            for wave, way, first in zip(waves, routes, begin, strict=True)
        ]
        for wave in waves:
            for e in states_of(what, wave.bucket.shape):
                if (e.value, id(wave)) not in self.states:
                    self.states[e.value, id(wave)] = self.sent_state(wave, e)

    def sent(self, wave: Wave, way: Routes, given: Any, kind: Any) -> Arrival:
        """Begin to send the parts of some arrays to their owners."""
        out = self.flat(sum(way.gathered), kind)
        return Arrival(wave, way, out, way.part.exchanged(out, way.gathered, given, way.given))

    def sent_state(self, wave: Wave, e: Expr) -> Arrival:
        """The same for an array of the state."""
        j, kind = number_of(e.value), self.s.kind(e)
        way = Routes(wave.owned, self.spread.slots[j].part(wave.leaves[0]))
        given, piece = self.flat(way.piece.size * len(wave.leaves), kind), way.piece
        order = wave.order(way.near).tolist()
        targets = [self.block(given, k * piece.size, piece.shape) for k in range(len(order))]
        self.library.assign_many(targets, [self.s.step.slots[j][i] for i in order])
        return self.sent(wave, way, given, kind)

    def arrived(self, arrival: Arrival) -> Any:
        """The whole arrays that this process owns, as a stack, when all parts have come."""
        way = arrival.routes
        arrival.wait()
        whole = way.part.of
        if way.own * way.piece.size == sum(way.gathered):  # it holds all of them itself
            return self.block(arrival.vector, 0, (way.own, *whole))
        stack = self.block(self.flat(way.own * math.prod(whole), arrival.vector.dtype), 0, (way.own, *whole))
        at = 0
        for piece, n in zip(way.all, way.gathered, strict=True):
            if n:
                self.library.assign(
                    stack[piece.inside], self.block(arrival.vector, at, (way.own, *piece.shape))
                )
            at += n
        return stack

    def state(self, e: Expr, bucket: Bucket) -> Any:
        """An array of the state of the leaves that this process owns, as a stack; None for anything else."""
        return self.whole.get((e.value, id(bucket)))

    # -- the round --

    def computed(self, what: Round, members: Indices | None) -> list[list[tuple[Bucket, Any]]]:
        """The wanted values of a round, each as stacks, of the leaves that this process owns."""
        self.start(what, members)
        self.s.calls += 1
        self.s.waves = self.waves(members)
        held: list[list[tuple[Bucket, Any]]] = [[] for _ in what.wanted]
        read = read_by_passes(self.s.step.program)
        for wave, arrivals in zip(self.s.waves, self.begun.pop((id(what), _key(members))), strict=True):
            stacks = [self.arrived(arrival) for arrival in arrivals]
            for e in states_of(what, wave.bucket.shape):
                if (coming := self.states[e.value, id(wave)]) is not None:
                    self.whole[e.value, id(wave.bucket)] = self.arrived(coming)
                    self.states[e.value, id(wave)] = None
            if len(wave.bucket.leaves):
                bools = [
                    stack != 0 if e.type == "bool" else stack
                    for e, stack in zip(what.inputs, stacks, strict=True)
                ]
                for at, stack in zip(held, self.s.bucket(what, wave.bucket, bools), strict=True):
                    at.append((wave.bucket, stack))
            for e, at in zip(what.wanted, held, strict=True):
                if id(e) in read:
                    self.back[id(e), id(wave)] = self.returned(e, wave, at)
        return held

    def reduced(self, r: Expr, found: Sequence[tuple[Indices, Any]]) -> Any:
        """A reduction of a value to one number, of every leaf, from those of the leaves that each process
        owns.
        """
        kind = promoted(self.library, self.s.kind(r), ["float64"])
        out = self.library.memory.zeros(self.s.step.leaves, kind, self.s.step.kind.device)
        for leaves, values in found:
            out = self.library.scalars.placed(out, leaves.tolist(), self.library.cast(values, kind))
        return self.spread.across.added(out)

    # -- and back --

    def returned(
        self, e: Expr, wave: Wave, stacks: Sequence[tuple[Bucket, Any]], part: Part[Any] | None = None
    ) -> Arrival:
        """Begin to send a value from its owners to all that hold a part of the arrays that it belongs to:
        parameters, unless it is said which.
        """
        of, kind = self.spread.parts[wave.leaves[0]], self.s.kind(e)
        way = Routes(wave.owned, of, shape_of(e, of.of)) if part is None else Routes(wave.owned, part)
        given, out = self.flat(sum(way.returned), kind), self.flat(sum(way.received), kind)
        whole = dataclasses.replace(wave.bucket, shape=way.shape, strides=contiguous_strides(way.shape))
        for stack in (self.s.widened(whole, stack) for bucket, stack in stacks if bucket is wave.bucket):
            at = 0
            for piece, n in zip(way.all, way.returned, strict=True):
                if n:
                    target = self.block(given, at, (way.own, *piece.shape))
                    self.library.assign(target, stack[piece.inside])
                at += n
        return Arrival(wave, way, out, way.part.exchanged(out, way.received, given, way.returned))

    def addresses(self, e: Expr, found: Found) -> Indices:
        """Where the part of a value of each leaf is going to be; it is there when all has come."""
        at = np.zeros(self.s.step.leaves, np.int64)
        for wave in found.waves:
            arrival = self.back.pop((id(e), id(wave)), None) or self.returned(e, wave, found.stacks)
            part, kind, count = arrival.routes.part, self.s.kind(e), len(wave.leaves)
            flat = arrival.vector
            if arrival.routes.shape != part.of:
                flat = self.flat(count * math.prod(part.shape), kind)
            self.coming.append((arrival, flat))
            each = kind.itemsize * math.prod(part.shape)
            at[wave.leaves] = self.library.memory.address(flat) + each * np.arange(count)
        return at

    def parts(self, e: Expr, slot: int, leaves: Sequence[int]) -> list[Any]:
        """The parts that lie here of a new array of the state, of some leaves."""
        of = self.spread.slots[slot].part
        coming = [
            self.returned(e, wave, found.stacks, of(wave.leaves[0]))
            for found in self.s.known_of(e)
            for wave in found.waves
        ]
        known: dict[int, Any] = {}
        for arrival in coming:
            arrival.wait()
            piece = arrival.routes.piece
            for k, i in enumerate(arrival.wave.leaves.tolist()):
                known[i] = self.block(arrival.vector, k * piece.size, piece.shape)
        return [known[i] for i in leaves]

    def arrive(self) -> None:
        """Wait for all that passes are going to read."""
        for arrival, flat in self.coming:
            arrival.wait()
            if flat is not arrival.vector:
                way, count = arrival.routes, len(arrival.wave.leaves)
                narrow = self.block(arrival.vector, 0, (count, *way.piece.shape))
                self.library.assign(self.block(flat, 0, (count, *way.part.shape)), narrow)
        self.coming = []

    # -- buffers --

    def flat(self, n: int, kind: Any) -> Any:
        """A vector of so many elements."""
        self.turns += 1
        held = self.s.workspace.flat(self.library, ("x", self.turns), n, kind, self.s.step.kind.device)
        return self.vector(held, 0, n)

    def vector(self, flat: Any, begin: int, n: int) -> Any:
        """Some elements of a vector."""
        return self.library.memory.view(flat, begin, (n,), (1,))

    def block(self, flat: Any, begin: int, shape: Shape) -> Any:
        """Some elements of a vector as an array."""
        return self.library.memory.view(flat, begin, shape, contiguous_strides(shape))


def _key(members: Indices | None) -> bytes:
    return b"" if members is None else members.tobytes()
