"""Is a lowered graph whole? Every node is known, its arguments of the types and domains that it takes.

Engines and printers decide nothing, so what is not said here would be decided by accident.
"""

from collections.abc import Iterable

from optimisers.graph.expr import Expr, order
from optimisers.graph.lower import LEAVES, fits, wanted
from optimisers.ops.dispatch import OPERATIONS
from optimisers.ops.state import MADE

TYPES = frozenset({"bool", "real", "complex"})

DOMAINS = frozenset({"scalar", "array", "free"})

_ARGUMENTS = {
    **dict.fromkeys(LEAVES, 0),
    **dict.fromkeys(("cast", "spread", "store", "sum", "norm2", "max", "min"), 1),
    **dict.fromkeys(("add", "subtract", "multiply", "divide", "power", "maximum", "minimum"), 2),
    **dict.fromkeys(("less", "less_equal", "greater", "greater_equal", "equal", "not_equal"), 2),
    **dict.fromkeys(("logical_and", "logical_or", "matmul", "join_bits"), 2),
    **dict.fromkeys(("solve_triangular", "take"), 2),
    **dict.fromkeys(MADE, 0),
    "where": 3,
    "random_word": 4,
}
"""How many arguments a node has; 1 unless it stands here."""

_ORDERED = frozenset(
    {
        "less",
        "less_equal",
        "greater",
        "greater_equal",
        "maximum",
        "minimum",
        "floor",
        "ceil",
        "max",
        "min",
        "argsort",
    }
)
"""Operations that complex numbers do not have."""

_RANK = {"bool": 0, "real": 1, "complex": 2}


class Malformed(Exception):
    """A lowered graph is not what engines read; the text says where."""


def check(roots: Iterable[Expr]) -> None:
    """Raise Malformed for the first node below the roots that is not fully typed."""
    for e in order(roots):
        fault = fault_of(e)
        if fault is not None:
            raise Malformed(f"{e!r}: {fault}")


def fault_of(e: Expr) -> str | None:
    """What is wrong with one lowered node, its arguments being right."""
    if e.op not in LEAVES and e.op not in ("cast", "spread", "store") and e.op not in OPERATIONS:
        return f"no engine knows {e.op}"
    if e.type not in TYPES:
        return f"type {e.type}; a node is bool, real or complex"
    if e.domain not in DOMAINS:
        return f"domain {e.domain}; a node is scalar, array or free"
    count = _ARGUMENTS.get(e.op, 1)
    if e.op not in ("call", "every") and len(e.args) != count:
        return f"{len(e.args)} arguments; {e.op} takes {count}"
    return _domain_fault(e) or _type_fault(e)


def _domain_fault(e: Expr) -> str | None:
    domains = {a.domain for a in e.args}
    if e.op in LEAVES:
        allowed = _GIVEN.get(e.op, ("scalar",))
        return None if e.domain in allowed else f"a {e.op} in domain {e.domain}"
    if e.op == "spread":
        return None if (domains, e.domain) == ({"free"}, "array") else "spread takes a free value"
    if e.op == "store":
        wrong = {"array": "free", "free": "array", "scalar": "scalar"}[e.domain]
        return f"a {wrong} value stored as {e.domain}" if wrong in domains else None
    family = OPERATIONS[e.op].family if e.op in OPERATIONS else "elementwise"
    faults = {
        "shape": _shape_fault,
        "made": _shape_fault,
        "choice": _shape_fault,
        "reduce": _reduction_fault,
        "random": _random_fault,
    }
    return faults.get(family, _elements_fault)(e, domains)


_GIVEN = {"load": ("array", "free"), "const": ("scalar", "free")}
"""The domains of what is given to a graph; scalar unless it stands here."""


def _shape_fault(e: Expr, _: set[str]) -> str | None:
    return None if e.domain == "free" else f"{e.op} is free, and is said to be {e.domain}"


def _reduction_fault(e: Expr, domains: set[str]) -> str | None:
    if e.domain == "free" or (e.domain == "scalar" and domains != {"scalar"}):
        return None
    return f"{e.op} gives a scalar of an array"


def _random_fault(e: Expr, domains: set[str]) -> str | None:
    return None if e.domain == "array" and domains == {"scalar"} else f"{e.op} is an array of scalars"


def _elements_fault(e: Expr, domains: set[str]) -> str | None:
    if e.domain == "array" and "free" in domains:
        return "a free value beside arrays without spread"
    if e.domain == "free" and "free" in domains:  # also beside arrays: the array library takes both
        return None
    widest = next(d for d in ("array", "free", "scalar") if d in domains)
    return None if e.domain == widest else f"domain {e.domain} of arguments that are {widest}"


def _type_fault(e: Expr) -> str | None:  # noqa: PLR0911 one a kind of node
    types = [a.type for a in e.args]
    if e.op in ("load", "column", "spread", "store") and e.type == "bool":
        return f"a condition in memory; {e.op} has numbers"
    if e.op == "cast":
        return _cast_fault(types[0], e.type)
    if e.op in ("spread", "store"):
        return None if types == [e.type] else f"{types[0]} where {e.type} goes: a cast is missing"
    for i, have in enumerate(types):
        want = wanted(e, i)
        if not fits(have, want):
            return f"argument {i} is {have} where {want} goes: a cast is missing"
    if e.op in LEAVES or e.op in ("call", "item", "every", *MADE):
        return None
    if e.op in _ORDERED and "complex" in types:
        return f"{e.op} of complex numbers"
    return None if e.type == _given(e, types) else f"type {e.type}; {e.op} gives {_given(e, types)}"


def _cast_fault(have: str, want: str) -> str | None:
    if have == want:
        return "a cast to its own type"
    return "a cast that loses the imaginary part" if (have, want) == ("complex", "real") else None


def _given(e: Expr, types: list[str]) -> str:
    """The type that an operation gives for arguments of these types."""
    gives = OPERATIONS[e.op].gives
    if gives in ("real", "bool"):
        return gives
    return max(types[1:] if gives == "branch" else types, key=_RANK.__getitem__)
