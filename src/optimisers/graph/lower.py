"""What do engines read? The same graph with nothing left to decide: every conversion is a node.

A lowered node is `op(arguments)`. Its type is bool, real or complex, where real is the real type of the
arithmetic, float32 or float64, and complex for the complex type that is made of it.

    load name     an array as it lies in memory, widened to the arithmetic
    column e      the scalar e of a leaf, read from the scalar table; a condition is read as 0 or 1
    const value   written in the rule
    cast (v)      v in another type: a condition as 0 or 1, a real number as a complex one, and what is not 0
                  as a condition that holds
    spread (v)    a value of another shape, broadcast to the shape of x
    store name (v)  v, rounded to what lies in the array
    random_word   random bits for each element of x, of four scalars
    <operation>   one of `OPERATIONS`, its arguments of the types that it takes; real and complex numbers may
                  stand together

`graph.check` holds lowered nodes to this.
"""

from optimisers.errors import TraceError
from optimisers.graph.expr import GIVEN, Expr, is_full_reduction, order
from optimisers.graph.symbol import Symbol
from optimisers.ops.dispatch import OPERATIONS
from optimisers.ops.random import of_words

LEAVES = frozenset({"load", "column", "const", "number", "clock", "size", "leaf", "known"})
"""What is given to a graph."""

_THROUGH = frozenset({"transpose", "reshape", "identity", "scheduled"})
"""Operations that give what they take, so also its type."""


def wanted(e: Expr, i: int) -> str:
    """The type that node `e` takes as its argument `i`: `number` is real or complex, `any` leaves it as it
    is.
    """
    if e.op.startswith("logical") or (e.op == "where" and i == 0):
        return "bool"
    if e.op == "every":
        types = dict(e.options)["types"]
        return "bool" if i == 0 else types[(i - 1) % len(types)]
    if e.op == "where" or e.op in _THROUGH:
        return e.type
    return "any" if e.op == "call" else "number"


def fits(have: str, want: str) -> bool:
    """Whether a value of one type may stand where another is wanted."""
    return want in ("any", have) or (want == "number" and have != "bool")


def in_pass(e: Expr) -> bool:
    """Whether a value of another shape is made in the pass that reads it: a function of the elements of one
    other.
    """
    if not _of_elements(e) or (e.op in _DEAR and _is_small(e)):
        return False
    return e.type == "real" and [a.type for a in e.args if a.domain != "scalar"] == ["real"]


_DEAR = frozenset({"sqrt", "divide", "power", "exp", "log"})
"""Functions that are taken once of a number for each row or column, not again of each element."""


def _of_elements(e: Expr) -> bool:
    """Whether a value of another shape is made element by element."""
    return e.domain == "free" and e.op in OPERATIONS and OPERATIONS[e.op].family == "elementwise"


def _is_small(e: Expr) -> bool:
    """Whether a value is made of sums along axes, and of state of another shape."""
    nodes = [e]
    summed = False
    for node in nodes:
        if _of_elements(node):
            nodes += [a for a in node.args if a.domain != "scalar"]
        elif node.domain == "free" and node.op in ("sum", "max", "min"):
            summed = True
        elif node.domain != "free" or node.op != "input":
            return False
    return summed


class Lowering:
    """The lowered nodes of one program, each made once."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Expr, Expr]] = {}
        """Node by id -> itself, so that the id stays its own, and what it became."""
        self.casts: dict[tuple[int, str], Expr] = {}
        self.columns: dict[int, Expr] = {}
        self.spreads: dict[int, Expr] = {}
        self.inlined: dict[int, Expr] = {}
        self.stores: dict[tuple[str, int, str], Expr] = {}
        self.scalars: dict[int, tuple[Expr, Expr]] = {}

    def value(self, e: Expr, want: str = "") -> Expr:
        """A node as an operand of arrays, of the type that is wanted, or of its own."""
        return self._operand(e, want or e.type, e.domain)

    def store(self, name: str, e: Expr, kind: str, domain: str = "array") -> Expr:
        """What stores a node in an array of real or complex numbers, in the shape of x or `free`."""
        value = self._operand(e, kind, domain)
        key = (name, id(value), domain)
        if key not in self.stores:
            self.stores[key] = Expr("store", (value,), domain=domain, type=kind, value=name)
        return self.stores[key]

    def scalar(self, e: Expr) -> Expr:
        """A scalar as the maths of one leaf; reductions, totals, settings and counters in it are known."""
        for node in order([e], self.scalars, given=True):
            self.scalars[id(node)] = node, self._scalar(node)
        return self.scalars[id(e)][1]

    def _scalar(self, e: Expr) -> Expr:
        if e.op in ("number", "clock", "size", "leaf", "const"):
            return e
        if is_full_reduction(e) or e.op in ("total", *GIVEN):
            return Expr("known", type=e.type, value=e)
        if e.op == "scheduled" and e.options:
            raise TraceError(
                "a schedule that computes with arrays of a library has no place in a captured graph; write "
                "it with the operations of optimisers"
            )
        args = tuple(self.cast(self.scalars[id(a)][1], wanted(e, i)) for i, a in enumerate(e.args))
        return args[0] if e.op in ("scheduled", "identity") else Expr(e.op, args, type=e.type)

    def cast(self, e: Expr, want: str) -> Expr:
        """A lowered node in the type that is wanted."""
        if fits(e.type, want):
            return e
        want = "real" if want == "number" else want
        key = (id(e), want)
        if key not in self.casts:
            self.casts[key] = _cast(e, want)
        return self.casts[key]

    def _operand(self, e: Expr, want: str, domain: str) -> Expr:
        """A node as an argument of one in a domain."""
        if e.domain == "scalar" and e.op != "const":
            column = self.columns.get(id(e))
            if column is None:
                kind = "complex" if e.type == "complex" else "real"
                column = self.columns.setdefault(id(e), Expr("column", type=kind, value=e))
            if e.type == "bool" and want == "any":
                want = "bool"
            return self.cast(column, want)
        for node in order([e], self.made):
            if node.domain != "scalar" or node.op == "const":
                self.made.setdefault(id(node), (node, self._node(node)))
        lowered = self.made[id(e)][1]
        if domain != "array" or e.domain != "free":
            return self.cast(lowered, want)
        if in_pass(e):
            return self.cast(self._inlined(e), want)
        number = self.cast(lowered, "number")
        spread = self.spreads.get(id(number))
        if spread is None:
            made = Expr("spread", (number,), domain="array", type=number.type, value=e)
            spread = self.spreads.setdefault(id(number), made)
        return self.cast(spread, e.type if want == "any" else want)

    def _inlined(self, e: Expr) -> Expr:
        """A value of another shape, element by element from what is spread to the shape of x."""
        if id(e) not in self.inlined:
            args = tuple(self._operand(a, wanted(e, i), "array") for i, a in enumerate(e.args))
            self.inlined[id(e)] = Expr(e.op, args, domain="array", type=e.type, options=e.options)
        return self.inlined[id(e)]

    def _node(self, e: Expr) -> Expr:
        if e.op == "const":
            return e
        if e.op == "input":
            return Expr("load", domain=e.domain, type=e.type, value=e.value, shape=e.shape_)
        if e.op == "random":
            return self._operand(_of_words(e), e.type, e.domain)
        args = tuple(self._operand(a, wanted(e, i), e.domain) for i, a in enumerate(e.args))
        return Expr(e.op, args, domain=e.domain, type=e.type, options=e.options, shape=e.shape_)


def _of_words(e: Expr) -> Symbol:
    """Random numbers, said with random words."""
    options = dict(e.options)

    def word(draw: int, part: int, bits: int) -> Symbol:
        chosen = (("bits", bits), ("draw", draw), ("part", part))
        return Symbol("random_word", e.args, domain="array", options=chosen, shape=e.shape_)

    return of_words(options["kind"], options["draw"], word, whole=e.type == "complex")


def _cast(e: Expr, want: str) -> Expr:
    if e.op == "const" and e.domain == "scalar" and want != "complex":
        return Expr("const", type=want, value=e.value != 0 if want == "bool" else float(e.value))
    return Expr("cast", (e,), domain=e.domain, type=want)
