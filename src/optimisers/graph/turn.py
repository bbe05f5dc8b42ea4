"""Transposes come last: what is done to elements of a transposed array is done before it is transposed.

So `transpose(g) / norm(transpose(g))` is maths on the elements of g, which passes do, and one transpose.
"""

from collections.abc import Callable, Sequence

from optimisers.graph.expr import Expr, Guard, axis_reduced, is_full_reduction, order
from optimisers.ops.dispatch import OPERATIONS


def turned(e: Expr, made: Callable[[Expr], Expr]) -> Expr | None:
    """A node with its transposes moved to the end; None if that changes nothing.

    `made` merges a new node with an equal one.
    """
    if e.op == "transpose" and _is_transpose(e.args[0]):
        return e.args[0].args[0]
    if is_full_reduction(e) and _is_transpose(e.args[0]):
        return Expr(e.op, e.args[0].args, type=e.type, options=e.options, guard=e.guard)
    if e.domain != "free" or e.op not in OPERATIONS or OPERATIONS[e.op].family != "elementwise":
        return None
    arrays = [a for a in e.args if a.domain != "scalar"]
    if not all(_is_transpose(a) and a.args[0].domain == "array" for a in arrays):
        return None
    args = tuple(a if a.domain == "scalar" else a.args[0] for a in e.args)
    shape = arrays[0].args[0].shape_
    inner = made(Expr(e.op, args, domain="array", type=e.type, options=e.options, shape=shape))
    return Expr("transpose", (inner,), domain="free", type=e.type)


def _is_transpose(e: Expr) -> bool:
    """Whether a node exchanges the axes of an array that has two."""
    return e.op == "transpose" and (e.args[0].domain == "free" or len(e.args[0].shape_ or ()) >= 2)


def settled(roots: Sequence[Expr]) -> tuple[list[Expr], dict[int, Expr]]:
    """The roots, and the new node of every old one by id, with values between two products in the domain of
    the products: `a * y + b @ y`, which the next product reads, is no pass over memory.
    """
    nodes = order(roots, guards=True)
    feeding = _feeding(nodes)
    new: dict[int, Expr] = {}
    for e in nodes:
        args, guard = tuple(new[id(a)] for a in e.args), tuple(new[id(g)] for g in e.guard)
        domains = {a.domain for a in args}
        free = "free" in domains and ("array" not in domains or id(e) in feeding)
        domain = "free" if e.domain == "array" and free else e.domain
        before, after = (e.domain, *e.args, *e.guard), (domain, *args, *guard)
        same = all(a is b for a, b in zip(before, after, strict=True))
        new[id(e)] = e if same else _made_of(e, args, domain, guard)
    return [new[id(r)] for r in roots], new


def _feeding(nodes: Sequence[Expr]) -> set[int]:
    """The values that a value of another shape reads, or that are made into such, by id; not those that are
    reduced along an axis alone, which a pass takes.
    """
    found: set[int] = set()
    by_rows = not any(e.op == "every" for e in nodes)
    for e in reversed(nodes):
        if by_rows and axis_reduced(e) is not None:
            continue
        if e.domain == "free" or id(e) in found:
            found.update(id(a) for a in e.args if a.domain == "array")
    return found


def _made_of(e: Expr, args: tuple[Expr, ...], domain: str, guard: Guard) -> Expr:
    """A node with other arguments, in this domain."""
    return Expr(
        e.op,
        args,
        domain=domain,
        type=e.type,
        value=e.value,
        options=e.options,
        guard=guard,
        shape=e.shape_,
    )
