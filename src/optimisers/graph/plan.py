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
from collections.abc import Collection, Iterable, Sequence

from optimisers.graph.expr import Expr, order
from optimisers.graph.lower import Lowering, in_pass
from optimisers.graph.memo import kept
from optimisers.graph.passes import Outputs, Pass, outputs, pass_of, stages
from optimisers.graph.trace import Program

# -- which values, and when ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """Array operations that need no further pass between them."""

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


@dataclasses.dataclass(frozen=True, eq=False)
class Operations:
    """All array operations between two steps of a plan."""

    rounds: tuple[Round, ...]
    wanted: tuple[Expr, ...]


NOTHING = Operations((), ())


@kept
def operations(
    program: Program, level: int | None, holds: tuple[bool, ...] | None = None, done: tuple[int, ...] = ()
) -> Operations:
    """The array operations of a level, before its reductions are known; of None those before the last pass,
    where the conditions of the program hold or not. What the levels `done` computed is known already.
    """
    known = {id(e) for k in done for e in free_below(_needed_at(program, k).roots)}
    need = _needed_at_end(outputs(program, holds)) if level is None else _needed_at(program, level)
    nodes = [e for e in free_below(need.roots) if id(e) not in known]
    if not nodes:
        return NOTHING
    read = need.read | ({} if level is None else _read_later(program, nodes, need.reductions))
    return _in_rounds(program, nodes, read, need.reductions)


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


def _in_rounds(
    program: Program, nodes: Sequence[Expr], read: dict[int, Expr], reductions: Sequence[Expr]
) -> Operations:
    """The nodes, cut where a pass must write elements that depend on other nodes."""
    when: dict[int, int] = {}
    mine = {id(e) for e in nodes}

    def of_array(e: Expr) -> int:
        """The round after which the elements of a value can be written."""
        return max((when[i] for i in read_by([e]) if i in mine), default=-1)

    for e in nodes:
        free = [when.get(id(a), 0) for a in e.args if a.domain == "free"]
        when[id(e)] = max([0, *free, *(of_array(a) + 1 for a in e.args if a.domain == "array")])
    last = max(when.values())
    filled: set[int] = set()
    rounds: list[Round] = []
    for k in range(last + 1):
        here = [e for e in nodes if when[id(e)] == k]
        arrays = {id(a): a for e in here for a in e.args if a.domain == "array" and id(a) not in filled}
        scaled = [a for a in arrays.values() if _multiple_of(a, arrays.keys() | filled)]
        inputs = {i: a for i, a in arrays.items() if not any(a is b for b in scaled)}
        here = [*scaled, *here]
        filled |= inputs.keys()
        later = [e for e in nodes if when[id(e)] > k]
        wanted = {id(e): e for e in here if id(e) in read}
        wanted |= {id(a): a for e in later for a in e.args if a.domain == "free" and when.get(id(a)) == k}
        arrays = [a for e in later for a in e.args if a.domain == "array"]
        wanted |= {i: e for i, e in read_by(arrays).items() if when.get(i) == k}
        sums = tuple(r for r in reductions if when.get(id(r.args[0]), 0) == k)
        given = tuple(inputs.values())
        rounds.append(Round(given, tuple(here), tuple(wanted.values()), sums, program.lowering))
    return Operations(tuple(rounds), tuple(read.values()))


def _multiple_of(e: Expr, others: Collection[int]) -> bool:
    """Whether a value of the shape of x is a number times one of these, which is not such itself."""
    inner = [a for a in e.args if a.domain == "array"]
    if e.op != "multiply" or e.type != "real" or len(inner) != 1:
        return False
    return id(inner[0]) in others and not _multiple_of(inner[0], others)


@kept
def filling(what: Round, which: tuple[int, ...]) -> Pass:
    """The pass that writes some of the inputs of a round, in this order."""
    inputs = [(f"w{j}", what.inputs[i]) for j, i in enumerate(which)]
    kinds = {"complex": "complex"}
    return pass_of(what.lowering, [(name, e, kinds.get(e.type, "real")) for name, e in inputs], [])
