"""A program -> what the array library computes, and when: matrices and other values of another shape than x.

A plan is a list of steps over all leaves of a group. Scalars, reductions of x's shape and stores are passes
(see `passes`); what multiplies, transposes or sums along an axis is run by the array library on stacks, all
leaves of one shape at once. Each such value is computed once a step: what a reduction and the last pass both
read is kept between them.

Before the first product of a chain stand values of x's shape: one pass writes them straight into the stack.
Transposes are not computed: every value is stored the way round in which its readers want it, and read
turned by the others.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence

from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr, order
from optimisers.graph.lower import Lowering, in_pass
from optimisers.graph.passes import Outputs, Pass, outputs, pass_of, stages
from optimisers.graph.trace import Program

# -- which values, and when ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """Array operations between two passes."""

    inputs: tuple[Expr, ...]
    """Values of the shape of x that a pass writes into stacks first."""
    nodes: tuple[Expr, ...]
    """What the array library computes, arguments first."""
    wanted: tuple[Expr, ...]
    """Those nodes that later steps of the plan read."""
    reductions: tuple[Expr, ...]
    """Reductions of some nodes to one number a leaf."""
    lowering: Lowering
    """Where the pass that writes the inputs finds them lowered."""
    along: tuple[Expr, ...] = ()
    """Reductions along an axis of values of the shape of x, which a pass over rows takes first."""


@cached
def operations(
    program: Program,
    level: int | None,
    holds: tuple[bool, ...] | None = None,
    done: tuple[int, ...] = (),
    rank: int | None = None,
) -> Round | None:
    """The array operations of a level, before its reductions are known; of None those before the last pass,
    where the conditions of the program hold or not; None if there are none. What the levels `done` computed
    is known already.

    `rank` is how many axes all arrays have, 0 if they differ, where passes go over rows; None where not.
    """
    known = {id(e) for k in done for e in free_below(_needed_at(program, k).roots)}
    need = _needed_at_end(outputs(program, holds)) if level is None else _needed_at(program, level)
    nodes = [e for e in free_below(need.roots) if id(e) not in known]
    if not nodes and not need.reductions:
        return None
    read = need.read | ({} if level is None else _read_later(program, nodes, need.reductions))
    return _round(nodes, need, read, program, rank)


@dataclasses.dataclass(frozen=True, eq=False)
class _Need:
    """What a step of a plan asks of the array library."""

    roots: tuple[Expr, ...]
    read: dict[int, Expr]
    """Values that passes read, or that are stored."""
    reductions: tuple[Expr, ...]


def _needed_at(program: Program, level: int) -> _Need:
    chosen = stages(program)[level].reductions
    free = tuple(r for r in chosen if r.args[0].domain == "free")
    arrays = [r.args[0] for r in chosen if r.args[0].domain == "array"]
    read = read_by(arrays)
    return _Need((*(r.args[0] for r in free), *read.values()), read, free)


def _needed_at_end(out: Outputs) -> _Need:
    roots = [e for e in (*out.slots, out.x) if e is not None]
    read = read_by(e for e in roots if e.domain != "free")
    read |= {id(e): e for e in roots if e.domain == "free" and e.op != "input"}
    return _Need(tuple(read.values()), read, ())


def read_by(roots: Iterable[Expr]) -> dict[int, Expr]:
    """The values of another shape that a pass over these elements reads, by id."""
    found: dict[int, Expr] = {}
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        e = stack.pop()
        if id(e) in seen or e.domain == "scalar":
            continue
        seen.add(id(e))
        if e.domain == "free" and not in_pass(e):
            found[id(e)] = e
        else:
            stack.extend(e.args)
    return found


def free_below(roots: Iterable[Expr]) -> list[Expr]:
    """Every value of another shape below these, arguments first, scalars not looked into."""
    return [e for e in order(roots, given=True) if e.domain == "free"]


def _read_later(program: Program, nodes: Sequence[Expr], now: Sequence[Expr]) -> dict[int, Expr]:
    """Those nodes that something else than themselves and the reductions of this level reads."""
    mine = {id(e) for e in nodes} | {id(r) for r in now}
    here = {id(e): e for e in nodes}
    found: dict[int, Expr] = {}
    for e in order([*program.roots, *program.guards], guards=True):
        if id(e) not in mine:
            found |= {id(a): a for a in e.args if id(a) in here}
    return found | {id(e): e for e in program.new_slots if id(e) in here}


def _round(
    nodes: Sequence[Expr], need: _Need, read: Collection[int], program: Program, rank: int | None
) -> Round:
    """These nodes as one round."""
    along = () if rank is None else tuple(e for e in nodes if axis_of(e, rank))
    summed = set(map(id, along))
    rest = [e for e in nodes if id(e) not in summed]
    arrays = {id(a): a for e in rest for a in e.args if a.domain == "array"}
    scaled = {i: a for i, a in arrays.items() if _multiple_of(a, arrays)}
    inputs = tuple(a for i, a in arrays.items() if i not in scaled)
    assert not read_by(inputs)  # what products read is of their domain (see `turn.settled`)
    wanted = tuple(filter(lambda e: id(e) in read, rest))
    return Round(inputs, (*scaled.values(), *rest), wanted, need.reductions, program.lowering, along)


def _multiple_of(e: Expr, others: Collection[int]) -> bool:
    """Whether a value of the shape of x is a number times one of these, which is not such itself."""
    inner = [a for a in e.args if a.domain == "array"]
    if e.op != "multiply" or e.type != "real" or len(inner) != 1:
        return False
    return id(inner[0]) in others and not _multiple_of(inner[0], others)


def axis_of(e: Expr, rank: int) -> str:
    """`last` or `first` for a reduction of a value of x's shape along that axis of matrices; else empty."""
    if e.op not in _SMALLEST or not e.args or e.args[0].domain != "array" or e.domain != "free":
        return ""
    axis = dict(e.options).get("axis")
    axes = {axis} if isinstance(axis, int) else set(axis) if isinstance(axis, tuple) else set[int]()
    if e.args[0].type != "real" or len(axes) != 1:
        return ""
    (at,) = axes
    if at == -1 or at == rank - 1 >= 0:
        return "last"
    return "first" if rank == 2 and at in (0, -2) else ""


_SMALLEST = {"sum": ("add", 0.0), "max": ("maximum", -math.inf), "min": ("minimum", math.inf)}
"""Reduction -> the operation that takes one element more, and what it begins with."""


@cached
def along(what: Round, rank: int) -> tuple[Pass, tuple[tuple[str, Expr, float], ...]]:
    """The pass over rows that takes the reductions of a round along an axis, and what it adds up over the
    rows: (array, reduction, value to begin with). Those along the last axis are its reductions.
    """
    first = [e for e in what.along if axis_of(e, rank) == "first"]
    sums = [(f"w{j}", e, _SMALLEST[e.op][1]) for j, e in enumerate(first)]
    stores = [(name, _more(name, e), "real") for name, e, _ in sums]
    last = [e for e in what.along if axis_of(e, rank) == "last"]
    return pass_of(what.lowering, stores, last), tuple(sums)


def _more(name: str, e: Expr) -> Expr:
    """What an array that gathers a reduction is after one more row."""
    inner = e.args[0]
    held = Expr("input", domain="array", value=name, shape=inner.shape_)
    return Expr(_SMALLEST[e.op][0], (held, inner), domain="array", shape=inner.shape_)


@cached
def filling(what: Round, which: tuple[int, ...]) -> Pass:
    """The pass that writes some of the inputs of a round, in this order."""
    inputs = [(f"w{j}", what.inputs[i]) for j, i in enumerate(which)]
    kinds = {"complex": "complex"}
    return pass_of(what.lowering, [(name, e, kinds.get(e.type, "real")) for name, e in inputs], [])
