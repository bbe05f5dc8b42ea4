"""What does a rule compute? The nodes of its graph.

Grammar. A node is `op(arguments)`:

    number i      hyper-parameter or counter i of a leaf            clock        updates finished so far
    input name    an array: x, dx, dx2, ..., s0, s1, ...            const value  written in the rule
    size          how many elements x has                           leaf i       half i of a leaf's number
    <operation>   one of `OPERATIONS` (sum, max and min of a whole array give a scalar)
    random        random numbers of a kind, one an element of x, of (seed, step, leaf 0, leaf 1)
    total         the sum of a scalar over the leaves stepped together
    every         several results: the new ones where a scalar condition holds, else the old ones
    item          one of several results

Domain: `scalar` (one number a leaf), `array` (one number an element of x), or `free` (an array of another
shape, which the array library computes). Type: bool, real or complex. A node made under a condition (see
`ops.when`) carries it as its guard: its value means something only where the guard holds.

A rule meets nodes as symbols, which have operators (`graph.symbol`); engines meet them lowered, with every
conversion a node of its own (`graph.lower`).
"""

from collections.abc import Iterable
from typing import Any

Guard = tuple["Expr", ...]

Options = tuple[tuple[str, Any], ...]

GIVEN = frozenset({"loss", "examples"})
"""What a step is given, one number for all leaves: the loss, and how many examples its gradients are of."""

_REDUCTIONS = frozenset({"sum", "norm2", "max", "min"})


class Expr:
    """One node; two nodes are equal if they are the same."""

    __slots__ = ("__cache__", "args", "domain", "guard", "op", "options", "shape_", "type", "value")

    def __init__(
        self,
        op: str,
        args: "tuple[Expr, ...]" = (),
        *,
        domain: str = "scalar",
        type: str = "real",
        value: Any = None,
        options: Options = (),
        guard: Guard = (),
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.op, self.args, self.domain, self.type = op, args, domain, type
        self.value, self.options, self.guard, self.shape_ = value, options, guard, shape

    def __repr__(self) -> str:
        return f"<{show(self)}>"


# -- reading a graph -----------------------------------------------------------------------------------------


def is_full_reduction(e: Expr) -> bool:
    """Whether a node is a reduction of a whole array: its value is known only after a pass over memory."""
    return e.op in _REDUCTIONS and e.domain == "scalar"


def axis_reduced(e: Expr) -> int | None:
    """The axis along which a node reduces real numbers in the shape of x; None for any other node."""
    if (
        e.op not in _REDUCTIONS
        or e.domain != "free"
        or e.args[0].domain != "array"
        or e.args[0].type != "real"
    ):
        return None
    axis = dict(e.options).get("axis")
    axes = {axis} if isinstance(axis, int) else set(axis) if isinstance(axis, tuple) else set[int]()
    return axes.pop() if len(axes) == 1 else None


def news_of(e: Expr) -> tuple[Expr, ...]:
    """What an `every` gives where its condition holds."""
    return e.args[1 : 1 + len(e.args) // 2]


def olds_of(e: Expr) -> tuple[Expr, ...]:
    """What it gives elsewhere."""
    return e.args[1 + len(e.args) // 2 :]


def order(
    roots: Iterable[Expr],
    known: Iterable[int] = (),
    *,
    guards: bool = False,
    given: bool = False,
    always: bool = False,
) -> list[Expr]:
    """Every node below the roots, arguments first, but for those `known` by id and what lies below them
    alone.

    With `guards`, the conditions of reductions and totals count as their arguments; with `given`, their
    values are given, and nothing below them is wanted; with `always`, what is computed at some steps alone is
    left out. Without recursion, so that long chains do not overflow.
    """
    done = set(known)
    out: list[Expr] = []
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(list(roots))]
    while stack:
        e, ready = stack.pop()
        if ready:
            out.append(e)
        elif id(e) not in done:
            done.add(id(e))
            stack.append((e, True))
            needs = (e.args[0], *olds_of(e)) if always and e.op == "every" else e.args
            if is_full_reduction(e) or e.op == "total":
                needs = () if given else (*e.args, *e.guard) if guards else e.args
            stack.extend((a, False) for a in reversed(needs) if id(a) not in done)
    return out


INFIX = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "power": "**",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "equal": "==",
    "not_equal": "!=",
    "logical_and": "&",
    "logical_or": "|",
}
"""Operations that Python writes between their arguments."""


def show(e: Expr, depth: int = 6) -> str:
    """The node as a formula, abbreviated below `depth`."""
    if e.op in ("const", "input"):
        return str(e.value)
    if e.op == "number":
        return dict(e.options)["name"]
    if not e.args:
        return e.op
    if depth == 0:
        return "..."
    inner = [show(a, depth - 1) for a in e.args]
    if e.op in INFIX and len(inner) == 2:
        return f"({inner[0]} {INFIX[e.op]} {inner[1]})"
    return f"{dict(e.options).get('kind', e.op)}({', '.join(inner)})"
