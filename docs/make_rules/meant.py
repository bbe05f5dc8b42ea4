"""What does a rule mean, where it computes something in another way: for the sake of rounding, or of arrays
that had no gradient for a while?
"""

import dataclasses
import operator
from typing import Any

from optimisers.graph.expr import Expr, order
from optimisers.graph.trace import Program, total_join


def as_meant(program: Program, variables: list[tuple[str, Expr]]) -> tuple[Program, list[tuple[str, Expr]]]:
    """The same, where what rules compute otherwise than they mean it is what they mean."""
    roots = [*program.roots, *program.guards, *(e for _, e in variables)]
    new: dict[int, Expr] = {}
    for e in order(roots, guards=True):
        args, guard = tuple(new[id(a)] for a in e.args), tuple(new.get(id(g), g) for g in e.guard)
        same = all(map(operator.is_, (*args, *guard), (*e.args, *e.guard)))
        kept: dict[str, Any] = {"domain": e.domain, "type": e.type, "value": e.value, "shape": e.shape_}
        made = e if same else Expr(e.op, args, **kept, options=e.options, guard=guard)
        short = _shortened(made)
        new[id(e)] = made if short is None else short
    changed: dict[str, Any] = {
        name: tuple(new[id(e)] for e in getattr(program, name))
        for name in ("new_slots", "new_counters", "guards")
    }
    if program.new_x is not None:
        changed["new_x"] = new[id(program.new_x)]
    checks = tuple((new[id(c)], text, tuple(new[id(v)] for v in vs)) for c, text, vs in program.checks)
    return dataclasses.replace(program, **changed, checks=checks), [(n, new[id(e)]) for n, e in variables]


def _shortened(e: Expr) -> Expr | None:
    """What stands for a node on a page; None for itself."""
    found = (of(e) for of in (_quotient, _divisor, _hypotenuse, _common))
    return next((short for short in found if short is not None), None)


def _divisor(e: Expr) -> Expr | None:
    """What is 1 where x is 0, and else x, as x."""
    if e.op != "where" or e.args[0].op != "equal" or not is_const(e.args[1], 1):
        return None
    x, zero = e.args[0].args
    return x if x is e.args[2] and is_const(zero, 0) else None


def _common(e: Expr) -> Expr | None:
    """What arrays have alike, told by those that took the most steps, as each of them has it."""
    if e.op == "total":
        size = e.args[0]
        alike = total_join(e) == "max" and size.op == "abs" and size.args[0].op == "number"
        return size.args[0] if alike else None
    if e.op != "divide" or [a.op for a in e.args] != ["total", "total"]:
        return None
    number, one = (a.args[0] for a in e.args)
    if number.op != "where" or one.op != "where" or number.args[0] is not one.args[0]:
        return None
    return number.args[1] if is_const(number.args[2], 0) and is_const(one.args[1], 1) else None


def _hypotenuse(e: Expr) -> Expr | None:
    """max(a, b) sqrt(1 + (min(a, b) / max(a, b))^2) as sqrt(a^2 + b^2)."""
    if e.op != "multiply" or [a.op for a in e.args] != ["maximum", "sqrt"]:
        return None
    sides = e.args[0].args
    if not any(n.op == "minimum" and n.args == sides for n in order([e.args[1]], given=True)):
        return None
    kept: dict[str, Any] = {"domain": e.domain, "type": e.type, "shape": e.shape_}
    squares = tuple(a.args[0] if a.op == "sqrt" else Expr("multiply", (a, a), **kept) for a in sides)
    return Expr("sqrt", (Expr("add", squares, **kept),), **kept)


def _quotient(e: Expr) -> Expr | None:
    """x * (to / near) * (near / size) as x * (to / size)."""
    if e.op != "multiply" or e.args[1].op != "divide" or e.args[0].op != "multiply":
        return None
    (x, first), (near, size) = e.args[0].args, e.args[1].args
    if first.op != "divide" or first.args[1] is not near:
        return None
    kept: dict[str, Any] = {"domain": first.domain, "type": first.type, "shape": first.shape_}
    ratio = Expr("divide", (first.args[0], size), **kept)
    return Expr("multiply", (x, ratio), domain=e.domain, type=e.type, shape=e.shape_)


def is_const(e: Expr, value: float) -> bool:
    """Whether a node is this number."""
    return e.op == "const" and isinstance(e.value, int | float) and e.value == value
