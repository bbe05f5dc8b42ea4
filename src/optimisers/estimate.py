"""What would a step cost on more devices than are there? Counted on paper: nothing is allocated."""

import dataclasses
import importlib
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.owners import cost_of, owners
from optimisers.engines.exchange import shape_of, states_of
from optimisers.engines.plans import PlanStep, steps_of
from optimisers.errors import BadSetting
from optimisers.graph.expr import Expr
from optimisers.graph.passes import number_of, stages
from optimisers.graph.plan import Round
from optimisers.graph.trace import Program
from optimisers.nest import values
from optimisers.settings import is_number, skeleton
from optimisers.state.buffers import Indices
from optimisers.state.group import Shape as Kind
from optimisers.state.group import is_free, program_of, started
from optimisers.step.choose import choose
from optimisers.tree.flatten import flatten_model

Shape = tuple[int, ...]

COPIES = "data"
"""The axis of a mesh along which arrays are held again; along all others they are cut."""

MEMORY, LINK, FLOPS, LATENCY = 2.5e12, 4e10, 4e14, 3e-5
"""What is assumed of a device: bytes of memory and bytes sent in a second, operations of products in one, and
seconds that a collective takes to begin.
"""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step costs each device of a mesh, counted for the one that has most to do; prints as a table."""

    mesh: Mapping[str, int]
    parameters: int
    """Of the whole model."""
    parameter_bytes: int
    """Bytes of parameters on a device; gradients take as many."""
    state_bytes: int
    workspace: int
    """Bytes of whole matrices that a device owns, as they go into products and come out."""
    moved: int
    """Bytes that passes read and write in the memory of a device."""
    summed: int
    """Bytes of the numbers that all devices sum."""
    collectives: int
    exchanged: int
    """Bytes of matrices that a device sends to others: parts to their owners, and results back."""
    flops: int
    """Operations of the products on a device."""
    times: Mapping[str, float]
    """Seconds that memory, products, links and the beginnings of collectives take, by the rates given."""

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a step: those of matrices, and its part of all sums, in a ring."""
        return self.exchanged + round(2 * self.summed * (self.devices - 1) / self.devices)

    @property
    def seconds(self) -> float:
        """One after the other: nothing is assumed to overlap."""
        return sum(self.times.values())

    def __str__(self) -> str:
        over = " x ".join(f"{n} {name}" for name, n in self.mesh.items())
        sums = f"{self.summed:,} bytes of sums, " if self.summed else ""
        slow = ", ".join(f"{name} {1e3 * t:,.3g}" for name, t in self.times.items() if t)
        given, state, work = map(amount, (self.parameter_bytes, self.state_bytes, self.workspace))
        crossing = f"{sums}{self.exchanged:,} of matrices"
        lines = (
            f"{self.parameters:,} parameters on {self.devices:,} devices ({over}); for each device:",
            f"  parameters {given}, gradients as much, state {state}, workspace {work}",
            f"  a step moves {amount(self.moved)} in memory and sends {amount(self.sent)} ({crossing})",
            f"  {self.flops / 1e9:,.1f} Gflop of products",
            f"  {1e3 * self.seconds:,.3g} ms: {slow}",
        )
        return "\n".join(lines)

    __repr__ = __str__


def amount(size: float) -> str:
    """Bytes for the reader."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def estimate(
    rule: object,
    shapes: object,
    mesh: Mapping[str, int] | int = 1,
    *,
    dtype: str = "float32",
    memory: float = MEMORY,
    link: float = LINK,
    flops: float = FLOPS,
    latency: float = LATENCY,
) -> Estimate:
    """What a step of `rule` costs on each device of a mesh, on paper: nothing is allocated, no device is
    needed. It counts the plan that `explain` prints.

    `shapes` is a dict of shapes by path, whose arrays are of `dtype`; or a model, whose arrays may have
    shapes alone: `jax.eval_shape(init)`, a module of torch on the device "meta". `mesh` has the sizes of its
    axes, `{"data": 8, "shard": 64}`: along "data" every array is held again, along all others it is cut, in
    its first axis, as FSDP cuts it; a number stands for so many that cut. State lies as its parameter does,
    that of another shape is cut along its longest axis. Each whole matrix has an owner, which computes with
    it.

    Seconds come from rates: bytes of `memory` and of a `link` in a second, `flops` of products, and `latency`
    of each collective. The defaults are about those of an H100 with 400 Gbit/s of network. Gradients are
    there when a step begins: what brings them together is not counted.

    Raises BadSetting for a mesh or a rate that makes no sense, and what `setup` raises.
    """
    axes = {"shard": mesh} if isinstance(mesh, int) else dict(mesh)
    if not axes or not all(type(n) is int and n > 0 for n in axes.values()):
        raise BadSetting(
            f'estimate was given mesh={mesh!r}; it takes {{"data": 8, "shard": 64}}, or a number'
        )
    rates = {"memory": memory, "link": link, "flops": flops}
    for name, rate in rates.items():
        if not is_number(rate) or not rate > 0:
            raise BadSetting(f"estimate was given {name}={rate!r}; it takes a number above 0")
    found = _counted(_kinds(rule, shapes, dtype), axes)
    times = {
        "memory": found["moved"] / memory,
        "products": found["flops"] / flops,
        "links": 0.0,
        "collectives": found["collectives"] * latency if math.prod(axes.values()) > 1 else 0.0,
    }
    whole = Estimate(axes, **found, times=times)
    return dataclasses.replace(whole, times=times | {"links": whole.sent / link})


# -- what there is -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Alike:
    """Arrays that are stepped by one program."""

    program: Program
    kind: Kind
    shapes: list[Shape]
    states: list[list[tuple[Shape, int]]]
    """(shape, bytes of an element) of the arrays of each state."""

    def state_bytes(self, cut: int) -> int:
        """Bytes of state on the device that has most, where arrays are cut into so many parts."""
        return sum(
            size * (piece if shape == x else longest)(shape, cut)
            for x, held in zip(self.shapes, self.states, strict=True)
            for shape, size in held
        )

    def summed(self, level: int) -> tuple[int, int]:
        """(numbers that devices add up at a level, of which they take the largest)."""
        found = stages(self.program)[level : level + 1]
        ops = [r.op for stage in found for r in stage.reductions if r.args[0].domain != "free"]
        if not any(stage.reductions for stage in found):
            return 0, 0
        each = 1 + sum(2 if op == "norm2" else 1 for op in ops)
        return len(self.shapes) * each, len(self.shapes) * sum(op in ("max", "min") for op in ops)


def _kinds(rule: object, shapes: object, dtype: str) -> list[Alike]:
    """Arrays that are alike."""
    model = shapes
    if isinstance(shapes, Mapping) and all(_is_shape(s) for s in shapes.values()):
        kind = _type(dtype)
        model = {str(path): sketch(tuple(s), kind) for path, s in shapes.items()}
    layout, arrays = flatten_model(model)
    found: dict[Any, Alike] = {}
    known: dict[Any, Any] = {}
    for i, (chosen, x) in enumerate(zip(choose(rule, layout, arrays), arrays, strict=True)):
        if chosen is None:
            continue
        kind = dataclasses.replace(Kind.of(x), opaque=False, part=None)
        key = (skeleton(chosen), kind.shape, str(kind.dtype))
        if key not in known:
            state = started(chosen, x, layout.paths[i])
            known[key] = state, program_of(chosen, state, kind, path=layout.paths[i])
        state, program = known[key]
        held = [(tuple(v.shape), v.dtype.itemsize) for v in values(state) if registry.isarray(v)]
        alike = (key[0], key[2], tuple(size for _, size in held), kind.shape if program.shape_read else ())
        found.setdefault(alike, Alike(program, kind, [], []))
        found[alike].shapes.append(kind.shape)
        found[alike].states.append(held)
    return list(found.values())


def _type(name: str) -> Any:
    """An element type of NumPy; raises BadSetting where there is none of this name."""
    if name == "bfloat16" and importlib.util.find_spec("ml_dtypes"):
        importlib.import_module("ml_dtypes")  # NumPy knows it from there
    try:
        found = np.dtype(name)
    except TypeError:
        found = None
    if found is None or not registry.isnumeric(np.zeros((), found)):
        raise BadSetting(
            f"estimate was given dtype={name!r}; it takes types of floating point or complex numbers that "
            "NumPy knows, such as one of as many bytes"
        )
    return found


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple | list) and all(type(n) is int for n in value)


class Sketch(np.ndarray[Any, np.dtype[Any]]):
    """An array of NumPy that takes the memory of one number, as what is made like it does."""

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in (np.zeros_like, np.full_like):
            return sketch(self.shape, args[2 if func is np.full_like else 1])
        if func is np.zeros:
            return sketch(args[0], args[1])
        if func is np.eye:
            return sketch((args[0], args[0]), kwargs["dtype"])
        return super().__array_function__(func, types, args, kwargs)

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        return sketch(self.shape, dtype)


def sketch(shape: Shape, dtype: Any) -> Any:
    """An array of this shape and type."""
    return np.broadcast_to(np.zeros((), dtype).view(Sketch), shape, subok=True)


# -- what it comes to ----------------------------------------------------------------------------------------


def chunk(n: int, parts: int, which: int = 0) -> int:
    """How many of n rows one of some parts has: as many as the others, the last ones fewer."""
    each = -(-n // parts)
    return max(0, min(each, n - each * which))


def piece(shape: Shape, parts: int, which: int = 0) -> int:
    """How many elements of an array one part of it has, which is cut in its first axis."""
    return chunk(shape[0], parts, which) * math.prod(shape[1:]) if shape else int(which == 0)


def longest(shape: Shape, parts: int, which: int = 0) -> int:
    """The same, of one that is cut along its longest axis."""
    axis = int(np.argmax(shape)) if shape else 0
    return piece((*shape[axis : axis + 1], *shape[:axis], *shape[axis + 1 :]), parts, which)


FEW = 16
"""So many devices are all looked at for the one that has most to do; of more, the first and the one that owns
most.
"""


def _counted(kinds: Sequence[Alike], axes: Mapping[str, int]) -> dict[str, int]:
    """The numbers of an estimate."""
    copies = axes.get(COPIES, 1)
    cut = math.prod(axes.values()) // copies
    owner, busiest = _owners(kinds, copies * cut)
    ranks = range(copies * cut) if copies * cut <= FEW else sorted({0, busiest})
    each = [_Device(rank, copies, cut).costs(kinds, owner) for rank in ranks]
    most = {name: max(costs[name] for costs in each) for name in each[0]}
    summed, collectives = _sums(kinds) if copies * cut > 1 else (0, 0)
    most["collectives"] += collectives
    return most | {
        "parameters": sum(math.prod(s) for a in kinds for s in a.shapes),
        "parameter_bytes": sum(a.kind.dtype.itemsize * piece(s, cut) for a in kinds for s in a.shapes),
        "state_bytes": sum(a.state_bytes(cut) for a in kinds),
        "summed": summed,
    }


def _owners(kinds: Sequence[Alike], count: int) -> tuple[list[Indices | None], int]:
    """(the device that computes with each matrix, of those arrays that are used as matrices; the device that
    has most to do).
    """
    free = [a for a in kinds if is_free(a.program)]
    costs = [cost_of(s) for a in free for s in a.shapes]
    every = owners(costs, count)
    shared = iter(np.split(every, np.cumsum([len(a.shapes) for a in free])))
    loads = np.bincount(every, costs, count)
    return [next(shared) if is_free(a.program) else None for a in kinds], int(np.argmax(loads))


def _sums(kinds: Sequence[Alike]) -> tuple[int, int]:
    """(bytes that all devices sum, in how many collectives): level by level, of every array."""
    numbers = collectives = 0
    for level in range(max((len(stages(a.program)) for a in kinds), default=0)):
        added, tops = np.sum([a.summed(level) for a in kinds], axis=0).tolist()
        numbers += (1 + added + tops) * (added > 0)
        collectives += (added > 0) + (tops > 0)
    free = sum(len(a.shapes) for a in kinds if is_free(a.program))
    if free:  # they agree first which matrices are stepped
        numbers, collectives = numbers + 1 + free, collectives + 1
    return 8 * numbers, collectives


@dataclasses.dataclass(frozen=True)
class _Device:
    """One device of a mesh: copy by copy, each a whole model."""

    rank: int
    copies: int
    cut: int

    def owned(self, a: Alike, owner: Indices | None) -> list[Shape]:
        """The shapes of the matrices with which it computes."""
        return [] if owner is None else [a.shapes[i] for i in np.flatnonzero(owner == self.rank).tolist()]

    def step(self, a: Alike, owner: Indices | None) -> list[PlanStep]:
        """The parts of its step."""
        if owner is None:
            return steps_of(a.program, a.kind, a.shapes)
        far = None if self.copies * self.cut == 1 else _Sent(self, a, owner)
        return steps_of(a.program, a.kind, self.owned(a, owner), None, far)

    def costs(self, kinds: Sequence[Alike], owner: Sequence[Indices | None]) -> "Counter[str]":
        """What a step of all arrays costs it."""
        found = Counter[str](workspace=0, moved=0, exchanged=0, flops=0, collectives=0)
        for a, own in zip(kinds, owner, strict=True):
            whole = sum(math.prod(s) for s in self.owned(a, own))
            local = sum(piece(s, self.cut) for s in a.shapes)
            for step in self.step(a, own):
                of_stacks = step.kind == "array operations"
                found["moved"] += step.bytes * (whole if of_stacks else local)
                found["workspace"] += (
                    of_stacks * (len(step.reads) + 1) * max(4, a.kind.dtype.itemsize) * whole
                )
                found["flops"] += step.flops
                found["exchanged"] += step.sent
                found["collectives"] += step.kind == "exchange"
        return found


class _Sent:
    """Elements of matrices that a device sends to others in a step."""

    def __init__(self, device: _Device, a: Alike, owner: Indices) -> None:
        self.device, self.a, self.owner = device, a, owner
        self.gathered: set[str] = set()
        copy = device.rank // device.cut
        self.near = (owner // device.cut == copy) & (owner != device.rank)
        """The matrices whose owner is another one of the same copy."""

    def given(self, shapes: Sequence[Shape], part: Callable[..., int]) -> int:
        which = self.device.rank % self.device.cut
        return sum(part(shapes[i], self.device.cut, which) for i in np.flatnonzero(self.near).tolist())

    def returned(self, shapes: Sequence[Shape], part: Callable[..., int]) -> int:
        d = self.device
        mine = [shapes[i] for i in np.flatnonzero(self.owner == d.rank).tolist()]
        return sum(d.copies * math.prod(s) - part(s, d.cut, d.rank % d.cut) for s in mine)

    def to_owners(self, what: Round) -> int:
        found = len(what.inputs) * self.given(self.a.shapes, piece)
        names = {e.value for s in set(self.a.shapes) for e in states_of(what, s)} - self.gathered
        self.gathered |= names
        return found + sum(self.given(self.of_state(number_of(name)), longest) for name in names)

    def back(self, value: Expr) -> int:
        return self.returned([shape_of(value, s) or s for s in self.a.shapes], piece)

    def stored(self, slot: int) -> int:
        return self.returned(self.of_state(slot), longest)

    def of_state(self, slot: int) -> list[Shape]:
        """The shapes of one array of every state."""
        return [held[slot][0] for held in self.a.states]
