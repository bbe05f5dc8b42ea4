"""How is a graph made simpler without changing a value? One node for one value, constants folded, guards only
where they steer.
"""

import functools
from collections.abc import Iterable, Sequence

from optimisers.graph.expr import Expr, Guard, is_full_reduction, order
from optimisers.graph.turn import settled, turned
from optimisers.ops.dispatch import OPERATIONS

Table = dict[tuple[object, ...], Expr]
"""The nodes made so far, by what two of them share if they have the same value."""


def unique(nodes: Iterable[Expr]) -> list[Expr]:
    """Each node once, in order."""
    return list({id(e): e for e in nodes}.values())


def clean(roots: Sequence[Expr]) -> tuple[list[Expr], dict[int, Expr]]:
    """The roots rebuilt with equal nodes merged and constants folded; and the new node of every old one, by
    id.

    Guards stay on reductions alone, where they tell that a pass over memory can be left out; a total gets a
    `where`.
    """
    table: Table = {}
    new: dict[int, Expr] = {}
    for e in order(roots, guards=True):
        args = tuple(new[id(a)] for a in e.args)
        keep = unique(new[id(g)] for g in e.guard) if is_full_reduction(e) or e.op == "total" else []
        new[id(e)] = fold(table, e, args, tuple(keep))
    found, last = settled([new[id(r)] for r in roots])
    return found, {i: last[id(e)] for i, e in new.items() if id(e) in last}


def _merge(table: Table, e: Expr) -> Expr:
    value = id(e.value) if e.domain == "free" and e.op == "const" else (type(e.value), e.value)
    options = tuple((k, v if k != "function" else id(v)) for k, v in e.options)
    key = (
        e.op,
        tuple(id(a) for a in e.args),
        repr(value),
        repr(options),
        e.domain,
        e.type,
        tuple(id(g) for g in e.guard),
    )
    return table.setdefault(key, e)


def fold(table: Table, e: Expr, args: tuple[Expr, ...], guard: Guard) -> Expr:
    """The node with these arguments, simplified where that cannot change its value."""
    if e.op == "total":
        args, guard = (_masked(table, args[0], guard),), ()
    back = _back(e, args)
    new = Expr(
        e.op,
        args,
        domain=e.domain if back is None else "array",
        type=e.type,
        value=e.value,
        options=e.options,
        guard=guard,
        shape=e.shape_ if back is None else back.shape_,
    )
    for simpler in (_identity, _choice, _logic, _power, _never):
        found = simpler(new)
        if found is not None:
            return _merge(table, found)
    last = turned(new, functools.partial(_merge, table))
    return _merge(table, new if last is None else last)


def _back(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
    """An argument in the shape of x, where elements of another shape were read and now none are: transposes
    have cancelled. Else None.
    """
    elementwise = e.op in OPERATIONS and OPERATIONS[e.op].family == "elementwise"
    if e.domain != "free" or not elementwise or any(a.domain == "free" for a in args):
        return None
    return next((a for a in args if a.domain == "array"), None)


def _masked(table: Table, s: Expr, guard: Guard) -> Expr:
    """A term of a total, 0 for the leaves whose guard does not hold."""
    zero = _merge(table, Expr("const", value=0.0))
    for g in guard:
        s = _merge(table, Expr("where", (g, s, zero), type=s.type))
    return s


def _known(e: Expr) -> bool | None:
    """The value of a condition that is known."""
    return e.value if e.op == "const" and e.type == "bool" else None


def _identity(e: Expr) -> Expr | None:
    return e.args[0] if e.op == "identity" else None


def _choice(e: Expr) -> Expr | None:
    """where(True, a, b) -> a; where(c, a, a) -> a."""
    if e.op != "where":
        return None
    condition, a, b = e.args
    if _known(condition) is not None:
        return a if _known(condition) else b
    return a if a is b else None


def _logic(e: Expr) -> Expr | None:
    """True & c -> c; False & c -> False; the same for | and ~."""
    if e.op == "logical_not" and _known(e.args[0]) is not None:
        return Expr("const", type="bool", value=not _known(e.args[0]))
    if e.op in ("logical_and", "logical_or"):
        for one, other in (e.args, e.args[::-1]):
            if _known(one) is not None:
                return one if _known(one) is (e.op == "logical_or") else other
    return None


def _power(e: Expr) -> Expr | None:
    """x**2 -> x * x; x**0.5 -> sqrt(x), for real x: exact, and fast in kernels."""
    if e.op != "power" or e.domain == "scalar" or e.args[1].op != "const" or e.args[1].domain != "scalar":
        return None
    x, exponent = e.args[0], e.args[1].value
    if exponent == 2:
        return Expr("multiply", (x, x), domain=e.domain, type=e.type, shape=e.shape_)
    if exponent == 0.5 and x.type == "real":
        return Expr("sqrt", (x,), domain=e.domain, type=e.type, shape=e.shape_)
    return None


def _never(e: Expr) -> Expr | None:
    """A reduction under a condition that is known not to hold is 0: it is not read."""
    never = is_full_reduction(e) and any(_known(g) is False for g in e.guard)
    return Expr("const", value=0.0) if never else None
