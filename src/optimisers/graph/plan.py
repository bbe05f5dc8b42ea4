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
from optimisers.graph.expr import Expr, axis_reduced, news_of, olds_of, order
from optimisers.graph.lower import Lowering, in_pass
from optimisers.graph.parts import Held, Part, below, parts, unconditional, under
from optimisers.graph.passes import Outputs, Pass, maths_of_stores, outputs, pass_of, stages
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
    stored: tuple[Expr, ...] = ()
    """The lowered maths of what the last pass stores, which that pass may share."""
    only: tuple[Expr, ...] = ()
    """The scalar conditions without which nobody reads what it computes; none where somebody always does."""
    chooses: Expr | None = None
    """The `every` whose new results are wanted here, of leaves for which the condition holds."""
    otherwise: "Round | None" = None
    """Where its old ones come from, of the others."""


@cached
def operations(
    program: Program,
    level: int | None,
    holds: tuple[bool, ...] | None = None,
    done: tuple[int, ...] = (),
    rank: int | None = None,
) -> tuple[Round, ...]:
    """The array operations of a level, before its reductions are known; of None those before the last pass,
    where the conditions of the program hold or not; one after the other, with those that only some steps need
    apart. What the levels `done` computed is known already.

    `rank` is how many axes all arrays have, 0 if they differ, where passes go over rows; None where not.
    """
    known = {id(e) for k in done for e in unconditional(_needed_at(program, k).roots)}
    need = _needed_at_end(outputs(program, holds)) if level is None else _needed_at(program, level)
    readers = order(need.roots, given=True)
    if level is not None:
        readers = order([*program.roots, *program.guards], guards=True)
    held = _held(program, done)
    rounds = _rounds(parts(need.roots, known, held), need, readers, program, rank)
    seen = known | {id(e) for e in unconditional(need.roots)}
    for some in need.sometimes:
        part = Part(tuple(below(some.roots, seen | under(some.only, held))), some.only)
        rounds += _rounds([part], some, readers, program, None)
    return tuple(filter(_does_something, rounds))


def _held(program: Program, done: tuple[int, ...]) -> Held:
    """What the levels `done` computed where conditions hold, for what is computed under the same later."""
    found: Held = []
    known: set[int] = set()
    for k in done:
        need = _needed_at(program, k)
        known |= {id(e) for e in unconditional(need.roots)}
        for some in need.sometimes:
            nodes = below(some.roots, known | under(some.only, found))
            found.append((some.only, {id(e) for e in nodes}))
    return found


def _does_something(what: Round) -> bool:
    """Whether a round computes, or keeps what others read."""
    if what.wanted or what.along or what.reductions:
        return True
    return any(e.op not in ("input", "const") for e in what.nodes)


@dataclasses.dataclass(frozen=True, eq=False)
class _Need:
    """What a step of a plan asks of the array library."""

    roots: tuple[Expr, ...]
    read: dict[int, Expr]
    """Values that passes read, or that are stored."""
    reductions: tuple[Expr, ...] = ()
    sometimes: "tuple[_Need, ...]" = ()
    """What is asked for under conditions."""
    only: tuple[Expr, ...] = ()
    """These conditions."""


def _needed_at(program: Program, level: int) -> _Need:
    groups: dict[tuple[Expr, ...], list[Expr]] = {(): []}
    for r in stages(program)[level].reductions:
        only = tuple(g for g in r.guard if any(g is c for c in program.choices))
        groups.setdefault(only, []).append(r)
    always, *some = [_needed_by(reductions, only) for only, reductions in groups.items()]
    inside = {id(e) for each in some for e in order(each.roots, given=True)}
    nodes = order([*always.roots, *(e for each in some for e in each.roots)], given=True)
    soon = _needed_in_any_case(program) if program.choices else set[int]()
    early = (e for e in nodes if id(e) in soon or (e.op == "every" and id(e) in inside))
    return dataclasses.replace(always, roots=(*always.roots, *early), sometimes=tuple(some))


@cached
def _needed_in_any_case(program: Program) -> set[int]:
    """What every step computes, by id: where that is read at some steps before, it is computed then."""
    roots = _needed_at_end(outputs(program, None)).roots if not program.guards else ()
    return {id(e) for e in unconditional(roots) if e.op not in ("input", "const")}


def _needed_by(reductions: Sequence[Expr], only: tuple[Expr, ...]) -> _Need:
    free = tuple(r for r in reductions if r.args[0].domain == "free")
    read = read_by(r.args[0] for r in reductions if r.args[0].domain == "array")
    return _Need((*(r.args[0] for r in free), *read.values()), read, free, only=only)


def _needed_at_end(out: Outputs) -> _Need:
    roots = [e for e in (*out.slots, out.x) if e is not None]
    read = read_by(e for e in roots if e.domain != "free")
    read |= {id(e): e for e in roots if e.domain == "free" and e.op != "input"}
    return _Need(tuple(read.values()), read)


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


def _rounds(
    given: Sequence[Part], need: _Need, readers: Sequence[Expr], program: Program, rank: int | None
) -> list[Round]:
    """Parts as rounds; the reductions of the step are of the last."""
    between = read_by(a for p in given for e in p.nodes for a in _arrays(e))
    if between:  # passes read some of this between two rounds
        need = dataclasses.replace(need, read=need.read | between)
        given = [wave for p in given for wave in _waves(p, {id(e) for e in need.roots})]
    sums = [()] * (len(given) - 1) + [need.reductions]
    return [_round_of(p, r, need, readers, program, rank) for p, r in zip(given, sums, strict=True)]


def _arrays(e: Expr) -> list[Expr]:
    """The arguments of the shape of x."""
    return [a for a in e.args if a.domain == "array"]


def _waves(part: Part, roots: set[int]) -> list[Part]:
    """A part in several, where passes make of what one has computed what the next one reads; without what
    only such passes compute.
    """
    if part.chooses is not None:
        return [part]
    alive = set(roots)
    for e in reversed(part.nodes):
        if id(e) in alive:
            alive |= {id(a) for a in e.args if a.domain == "free"} | read_by(_arrays(e)).keys()
    wave: dict[int, int] = {}
    for e in part.nodes:
        beside = [wave[id(a)] for a in e.args if id(a) in wave]
        before = [wave[i] + 1 for i in read_by(_arrays(e)) if i in wave]
        wave[id(e)] = max([0, *beside, *before])
    found: list[list[Expr]] = [[] for _ in range(max(wave.values(), default=0) + 1)]
    for e in part.nodes:
        if id(e) in alive:
            found[wave[id(e)]].append(e)
    return [dataclasses.replace(part, nodes=tuple(nodes)) for nodes in found]


def _round_of(
    part: Part,
    reductions: tuple[Expr, ...],
    need: _Need,
    readers: Sequence[Expr],
    program: Program,
    rank: int | None,
) -> Round:
    """A part as a round, which keeps what others read of it."""
    if part.chooses is not None:
        old = _round((), olds_of(part.chooses), (), program, None)
        new = _round(part.nodes, news_of(part.chooses), (), program, None)
        return dataclasses.replace(new, only=part.only, chooses=part.chooses, otherwise=old)
    mine = {id(e) for e in (*part.nodes, *reductions)}
    read = {id(a) for e in readers if id(e) not in mine for a in e.args} | need.read.keys()
    read |= set(map(id, program.new_slots))
    wanted = tuple(e for e in part.nodes if id(e) in read)
    return dataclasses.replace(_round(part.nodes, wanted, reductions, program, rank), only=part.only)


def _round(
    nodes: Sequence[Expr],
    wanted: Sequence[Expr],
    reductions: tuple[Expr, ...],
    program: Program,
    rank: int | None,
) -> Round:
    """These nodes as one round."""
    along = () if rank is None else tuple(e for e in nodes if axis_of(e, rank))
    summed = set(map(id, along))
    rest = [e for e in nodes if id(e) not in summed]
    inputs, scaled = _inputs((*(a for e in rest for a in e.args), *wanted))
    kept = tuple(e for e in wanted if id(e) not in summed)
    stored = maths_of_stores(program) if along else ()
    return Round(inputs, (*scaled, *rest), kept, reductions, program.lowering, along, stored)


def _inputs(read: Iterable[Expr]) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
    """(values of the shape of x that a pass writes, multiples of these) of what a round reads."""
    arrays = {id(a): a for a in read if a.domain == "array"}
    scaled = {i: a for i, a in arrays.items() if _multiple_of(a, arrays)}
    inputs = tuple(a for i, a in arrays.items() if i not in scaled)
    return inputs, tuple(scaled.values())


def _multiple_of(e: Expr, others: Collection[int]) -> bool:
    """Whether a value of the shape of x is a number times one of these, which is not such itself."""
    inner = [a for a in e.args if a.domain == "array"]
    if e.op != "multiply" or e.type != "real" or len(inner) != 1:
        return False
    return id(inner[0]) in others and not _multiple_of(inner[0], others)


def axis_of(e: Expr, rank: int) -> str:
    """`last` or `first` for a reduction of a value of x's shape along that axis of matrices; else empty."""
    at = axis_reduced(e)
    if at is None:
        return ""
    if at == -1 or at == rank - 1 >= 0:
        return "last"
    return "first" if rank == 2 and at in (0, -2) and e.op in _SMALLEST else ""


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
    return pass_of(what.lowering, stores, last, what.stored), tuple(sums)


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
