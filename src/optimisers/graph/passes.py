"""A program -> passes over memory. A pass ends where a sum over the whole array is needed before the maths
can go on.

Level of a node: how many reductions and totals lie below it. The pass of level k computes the reductions that
need nothing above level k; the last pass stores the new parameters and state. Passes share no intermediate
arrays: a later one computes again, in registers, what it needs from the unchanged inputs.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from optimisers.graph.cached import cached
from optimisers.graph.check import check
from optimisers.graph.expr import Expr, is_full_reduction, olds_of, order
from optimisers.graph.lower import Lowering
from optimisers.graph.simplify import Table, fold
from optimisers.graph.trace import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """One pass over memory, lowered, in no particular kernel language."""

    loads: tuple[str, ...]
    """The arrays read: x, dx, ..., s0, ..."""
    free: tuple[Expr, ...]
    """Values of another shape that the array library computes first; they are read broadcast to the shape of
    x.
    """
    scalars: tuple[Expr, ...]
    """What the columns of the scalar table hold."""
    body: tuple[Expr, ...]
    """The lowered nodes of the maths, arguments first."""
    stores: tuple[tuple[str, Expr], ...]
    """(array, `store` node): written at the end."""
    reductions: tuple[Expr, ...]
    """Sums, maxima and minima over each whole array, not lowered: by these the scalars know them."""
    terms: tuple[Expr, ...]
    """What each of them is taken of, lowered."""
    narrow: tuple[bool, ...] = ()
    """Of each value of another shape, where leaves are rows: whether it is one number a row."""
    double: frozenset[int] = frozenset()
    """The nodes, by id, that kernels compute in float64 (see `doubled`)."""

    @property
    def exact(self) -> bool:
        """Whether array libraries do the maths in float64: so it is for reductions, where the square of a
        float32 would overflow or vanish, but not on the bits of a float32.
        """
        return bool(self.reductions) and not any(e.op in _OF_BITS for e in self.body)

    @property
    def fills(self) -> bool:
        """Whether it writes stacks for the array library, and nothing else."""
        return any(name.startswith("w") for name, _ in self.stores)


_OF_BITS = frozenset({"join_bits", "high_bits", "low_bits"})


@dataclasses.dataclass(frozen=True, eq=False)
class Outputs:
    """What a step stores, for known answers to the conditions of a program."""

    x: Expr | None
    slots: tuple[Expr, ...]


@cached
def draws(program: Program) -> bool:
    """Whether a step needs random numbers."""
    return any(e.op == "random" for e in order(program.roots, guards=True))


@cached
def outputs(program: Program, holds: tuple[bool, ...] | None) -> Outputs:
    """The arrays that a step stores where condition i of the program holds or not; what does not run is left
    out. With None the conditions stay in the graph.

    Scalar nodes, and others that no condition is in, stay the very ones of the program, so their values serve
    every variant.
    """
    if holds is None:
        return Outputs(program.new_x, program.new_slots)
    known = {id(g): h for g, h in zip(program.guards, holds, strict=True)}
    roots = [*program.new_slots, *([] if program.new_x is None else [program.new_x])]
    table: Table = {}
    new: dict[int, Expr] = {}
    for e in order(roots):
        if id(e) in known:
            new[id(e)] = Expr("const", type="bool", value=known[id(e)])
        elif e.domain == "scalar":
            new[id(e)] = e
        else:
            args = tuple(new[id(a)] for a in e.args)
            same = all(a is b for a, b in zip(args, e.args, strict=True))
            new[id(e)] = e if same else fold(table, e, args, ())
    x = None if program.new_x is None else new[id(program.new_x)]
    return Outputs(x, tuple(new[id(s)] for s in program.new_slots))


def levels(roots: Sequence[Expr]) -> dict[int, int]:
    """The level of every node below the roots, by id."""
    level: dict[int, int] = {}
    for e in order(roots, guards=True):
        below = max((level[id(a)] for a in e.args), default=0)
        below = max([below, *(level[id(g)] for g in e.guard)])
        level[id(e)] = below + (is_full_reduction(e) or e.op == "total")
    return level


@cached
def reduce_pass(program: Program, level: int, wanted: tuple[bool, ...]) -> Pass | None:
    """The pass for the wanted reductions of a level over arrays of the shape of x; None if there are none."""
    chosen = [
        r
        for r, w in zip(stages(program)[level].reductions, wanted, strict=True)
        if w and r.args[0].domain == "array"
    ]
    return pass_of(program.lowering, [], chosen, maths_of_stores(program)) if chosen else None


def maths_of_stores(program: Program) -> tuple[Expr, ...]:
    """The lowered nodes of what a step stores in the end, whatever its conditions."""
    last = store_pass(program, None)
    return () if last is None else last.body


@cached
def store_pass(program: Program, holds: tuple[bool, ...] | None) -> Pass | None:
    """The last pass: stores everything that changes at every step and has the shape of the parameters; None
    if nothing does.
    """
    new = outputs(program, holds)
    stores: list[tuple[str, Expr, str]] = []
    for slot, e in zip(program.slots, new.slots, strict=True):
        if slot.shape is None and not is_input(e, slot.name) and not is_kept(e, slot.name):
            stores.append((slot.name, e, slot.type))
    if new.x is not None and not is_input(new.x, "x"):
        stores.append(("x", new.x, program.type))
    return pass_of(program.lowering, stores, []) if stores else None


def number_of(array: str) -> int:
    """Which gradient, state array or free value an array of a pass is: dx, dx2, ... and s0, f0, ... count
    from 0.
    """
    return int(array[2:] or "1") - 1 if array.startswith("dx") else int(array[1:])


def is_input(e: Expr, name: str) -> bool:
    return e.op == "input" and e.value == name


def is_kept(e: Expr, name: str) -> bool:
    """Whether the new value of an array of the state is the old one but at some steps."""
    return (
        e.op == "item"
        and e.args[0].op == "every"
        and is_input(olds_of(e.args[0])[dict(e.options)["index"]], name)
    )


def keeps(program: Program) -> bool:
    """Whether some of the state changes at some steps alone; the last pass does not store that."""
    return any(is_kept(e, slot.name) for slot, e in zip(program.slots, program.new_slots, strict=True))


def pass_of(
    lowering: Lowering,
    values: list[tuple[str, Expr, str]],
    reductions: list[Expr],
    stored: Iterable[Expr] = (),
) -> Pass:
    """The pass that stores these values in arrays by these names, of real or complex numbers, and takes these
    reductions; `stored` are the nodes of the maths of what other passes store.
    """
    stores = [lowering.store(*value) for value in values]
    terms = [lowering.value(r.args[0], "number") for r in reductions]
    check([*terms, *stores])
    body = _body([*terms, *(s.args[0] for s in stores)])
    loads = [e.value for e in body if e.op == "load"]
    return Pass(
        loads=tuple(sorted(loads, key=lambda name: ("xdsw".index(name[0]), len(name), name))),
        free=tuple(e.value for e in body if e.op == "spread"),
        scalars=tuple(e.value for e in body if e.op == "column"),
        body=tuple(e for e in body if e.op != "const"),
        stores=tuple((s.value, s) for s in stores),
        reductions=tuple(reductions),
        terms=tuple(terms),
        double=doubled(body, [*stored, *order(stores)]) if reductions else frozenset(),
    )


_IN_RANGE = frozenset(
    {
        *("sqrt", "abs", "negative", "sign", "where", "maximum", "minimum", "floor", "ceil", "real", "imag"),
        *("conj", "isfinite", "isnan", "cast", "sin", "cos", "tanh", "arctan", "to_float16", "to_bfloat16"),
        *("to_float32", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
        *("logical_and", "logical_or", "logical_not", "random_word", "load", "column", "const", "spread"),
    }
)
"""What a float32 holds where it holds the arguments."""


def doubled(body: Sequence[Expr], stored: Iterable[Expr]) -> frozenset[int]:
    """The nodes of a pass that are computed in float64, by id: those that reductions alone need, where a
    value may be no float32, as squares are. What is stored too, or is part of that, has the value that it has
    there; and the bits of a float32 are read in no other type.
    """
    single, double = {id(e) for e in stored}, set[int]()
    if any(e.op in _OF_BITS for e in body):
        return frozenset()
    for e in body:
        alike = e.op in _IN_RANGE and not any(id(a) in double for a in e.args)
        if e.domain != "scalar" and id(e) not in single and not alike:
            double.add(id(e))
    return frozenset(double)


def _body(roots: Sequence[Expr]) -> list[Expr]:
    """The lowered nodes of a pass, arguments first. Below `spread` the array library computes; that is no
    part of the pass.
    """
    body: list[Expr] = []
    done: set[int] = set()
    stack = [(e, False) for e in reversed(roots)]
    while stack:
        e, ready = stack.pop()
        if ready:
            body.append(e)
        elif id(e) not in done:
            done.add(id(e))
            stack.append((e, True))
            stack.extend((a, False) for a in (() if e.op == "spread" else reversed(e.args)))
    return body


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What becomes known at one level."""

    reductions: tuple[Expr, ...]
    totals: tuple[Expr, ...]


@cached
def stages(program: Program) -> tuple[Stage, ...]:
    """The reductions and totals of a program by level, the lowest first."""
    roots = [*program.guards, *program.roots]
    level = levels(roots)
    top = max(level.values(), default=0)
    nodes = order(roots, guards=True)
    return tuple(
        Stage(
            tuple(e for e in nodes if is_full_reduction(e) and level[id(e)] == k),
            tuple(e for e in nodes if e.op == "total" and level[id(e)] == k),
        )
        for k in range(1, top + 1)
    )
