"""The graph: symbols that write down what a rule does with them.

Grammar. A node is `op(arguments)`:

    number i      hyper-parameter or counter i of a leaf            clock        updates finished so far
    input name    an array: x, dx, dx2, ..., s0, s1, ...            const value  written in the rule
    size          how many elements x has
    <word>        one of `ops.WORDS` (sum, max and min of a whole array give a scalar)
    total         the sum of a scalar over the leaves stepped together

Domain: `scalar` (one number a leaf), `array` (one number an element of x), or `free` (an array of another
shape, which the array library computes). Type: bool, real or complex. A node made under a condition (see
`ops.when`) carries it as its guard: its value means something only where the guard holds.
"""

import contextlib
import contextvars
import numbers
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from optimisers import ops
from optimisers.errors import TraceError
from optimisers.rule import asking

Guard = tuple["Expr", ...]

_REDUCTIONS = frozenset({"sum", "max", "min"})


class Trace:
    """What a trace collects besides its outputs."""

    def __init__(self) -> None:
        self.scope: list[Guard] = []
        self.checks: list[tuple[Expr, str, tuple[Expr, ...], Guard]] = []
        self.shape_read = False
        self.clocks: Any = None
        """The clocks of its scopes."""
        self.totals: dict[str, int] = {}
        """How many totals each type of rule has asked for."""


_current: contextvars.ContextVar[Trace | None] = contextvars.ContextVar("trace", default=None)


@contextlib.contextmanager
def tracing() -> Generator[Trace]:
    """Symbols made inside belong to this trace."""
    trace = Trace()
    token = _current.set(trace)
    try:
        yield trace
    finally:
        _current.reset(token)


def current() -> Trace:
    trace = _current.get()
    if trace is None:
        raise TraceError(
            "a symbol was used after its trace had ended; a rule keeps nothing between calls, what it wants "
            "to remember belongs in its state"
        )
    return trace


class Expr:
    """One node of the graph; rules meet it in place of an array or a number."""

    __slots__ = ("__memo__", "args", "domain", "guard", "op", "options", "shape_", "type", "value")

    def __init__(
        self,
        op: str,
        args: "tuple[Expr, ...]" = (),
        *,
        domain: str = "scalar",
        type: str = "real",
        value: Any = None,
        options: tuple[tuple[str, Any], ...] = (),
        guard: Guard = (),
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.op, self.args, self.domain, self.type = op, args, domain, type
        self.value, self.options, self.guard, self.shape_ = value, options, guard, shape

    # -- what a rule may ask of an array --

    @property
    def shape(self) -> tuple[int, ...]:
        if self.domain == "scalar":
            return ()
        if self.shape_ is None:
            raise TraceError(f"the shape of the result of {self.op} is not known until the step runs")
        current().shape_read = True
        return self.shape_

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> "Expr | int":
        """The number of elements, as a symbol: a program serves arrays of every size."""
        return 1 if self.domain == "scalar" else Expr("size", guard=merged((), ()))

    @property
    def real(self) -> Any:
        return ops.real(self)

    @property
    def imag(self) -> Any:
        return ops.imag(self)

    @property
    def T(self) -> Any:  # noqa: N802 the name that every array library has
        return ops.transpose(self)

    def conj(self) -> Any:
        return ops.conj(self)

    def __repr__(self) -> str:
        return f"<symbol {show(self)}>"

    # -- arithmetic --

    def __add__(self, other: Any) -> Any:
        return ops.add(self, other)

    def __radd__(self, other: Any) -> Any:
        return ops.add(other, self)

    def __sub__(self, other: Any) -> Any:
        return ops.subtract(self, other)

    def __rsub__(self, other: Any) -> Any:
        return ops.subtract(other, self)

    def __mul__(self, other: Any) -> Any:
        return ops.multiply(self, other)

    def __rmul__(self, other: Any) -> Any:
        return ops.multiply(other, self)

    def __truediv__(self, other: Any) -> Any:
        return ops.divide(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return ops.divide(other, self)

    def __pow__(self, other: Any) -> Any:
        return ops.power(self, other)

    def __rpow__(self, other: Any) -> Any:
        return ops.power(other, self)

    def __matmul__(self, other: Any) -> Any:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return ops.matmul(other, self)

    def __floordiv__(self, other: Any) -> Any:
        return ops.floor(self / other)

    def __rfloordiv__(self, other: Any) -> Any:
        return ops.floor(other / self)

    def __mod__(self, other: Any) -> Any:
        return self - other * ops.floor(self / other)

    def __rmod__(self, other: Any) -> Any:
        return other - self * ops.floor(other / self)

    def __neg__(self) -> Any:
        return ops.negative(self)

    def __abs__(self) -> Any:
        return ops.abs_(self)

    def __lt__(self, other: Any) -> Any:
        return ops.less(self, other)

    def __le__(self, other: Any) -> Any:
        return ops.less_equal(self, other)

    def __gt__(self, other: Any) -> Any:
        return ops.greater(self, other)

    def __ge__(self, other: Any) -> Any:
        return ops.greater_equal(self, other)

    def __eq__(self, other: object) -> Any:
        return ops.equal(self, other)

    def __ne__(self, other: object) -> Any:
        return ops.not_equal(self, other)

    __hash__ = object.__hash__

    def __and__(self, other: Any) -> Any:
        return ops.logical_and(self, other)

    def __rand__(self, other: Any) -> Any:
        return ops.logical_and(other, self)

    def __or__(self, other: Any) -> Any:
        return ops.logical_or(self, other)

    def __ror__(self, other: Any) -> Any:
        return ops.logical_or(other, self)

    def __invert__(self) -> Any:
        return ops.logical_not(self)

    # -- what cannot be traced --

    def __bool__(self) -> bool:
        raise TraceError(
            "a rule branched on a value that is not known until the step runs; write `where(condition, a, "
            "b)` instead of `a if condition else b`, and `&`, `|`, `~` instead of `and`, `or`, `not`"
        )

    def __float__(self) -> float:
        raise TraceError(
            "a rule turned a value that is not known until the step runs into a Python number; leave out "
            "float() and int(), and use the words of optimisers instead of those of math"
        )

    __int__ = __index__ = __complex__ = __round__ = __floor__ = __ceil__ = __trunc__ = __float__

    def __iter__(self) -> Iterator[Any]:
        raise TraceError(
            "a rule iterated over an array; it sees one array and writes its maths for the whole of it"
        )

    def __len__(self) -> int:
        raise TraceError(
            "len() of an array inside a rule; x.size is its number of elements, x.shape its shape"
        )

    def __getitem__(self, _: Any) -> Any:
        raise TraceError("a rule indexed an array; use where, sums along an axis, or call(function, x)")

    def __setitem__(self, _: Any, __: Any) -> None:
        raise TraceError("a rule wrote into an array; rules are pure: return the new state and the step")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TraceError("a rule gave a symbol to NumPy; use the words of optimisers, or call(function, x)")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = f"; write {name}(x) with the word of optimisers" if name in ops.NAMES else ""
        raise TraceError(
            f"a rule asked an array for .{name}, which it does not have while a step is traced{known}"
        )

    def __array_function__(self, function: Any, *_: Any) -> Any:
        name = f"{function.__module__}.{function.__name__}".removeprefix("numpy.")
        instead = (
            f"write {name}(...) with the word of optimisers"
            if name in ops.NAMES
            else (f"use the words of optimisers, or call(np.{name}, x)")
        )
        raise TraceError(f"a rule called np.{name} on a symbol; {instead}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        name = {"true_divide": "divide", "absolute": "abs", "conjugate": "conj"}.get(
            ufunc.__name__, ufunc.__name__
        )
        if method == "__call__" and not options and name in ops.WORDS:
            return ops.speak(name, inputs, {})
        raise TraceError(
            f"a rule called np.{ufunc.__name__} on a symbol; use the words of optimisers, or "
            f"call(np.{ufunc.__name__}, x)"
        )

    # -- the protocol of `value` and `ops` --

    def __number__(self) -> bool:
        return self.domain == "scalar"

    @staticmethod
    def __word__(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return write(name, args, options)

    @staticmethod
    def __stored_type__(x: "Expr") -> str:
        """The element type of the array that an input stands for; empty for what is computed."""
        return dict(x.options).get("dtype", "")

    @staticmethod
    def __full_like__(x: "Expr", value: Any) -> Any:
        return make("add", (lift(value), x - x)) if x.domain == "free" else lift(value)

    @staticmethod
    def __total__(s: "Expr") -> Any:
        if s.domain != "scalar":
            raise TraceError("total() was given an array; it takes a scalar: total(sum(...))")
        trace, rule = current(), asking.get()
        name = f"{rule.__module__}.{rule.__qualname__}" if rule else ""
        count = trace.totals[name] = trace.totals.get(name, 0) + 1
        return make("total", (s,), options=(("of", f"{name} {count}"),))

    @staticmethod
    def __when__(condition: Any, dx: Any) -> Any:
        condition, dx = lift(condition), lift(dx)
        if condition.domain != "scalar":
            raise TraceError(
                "when() was given a condition for each element; it takes a scalar one: use where() for "
                "single elements"
            )
        result = make("identity", (dx,))
        result.guard = merged(result.guard, (condition, *condition.guard))
        return result

    @staticmethod
    def __clock__() -> "Expr":
        return current().clocks.now()

    @staticmethod
    def __under__(dx: "Expr") -> Any:
        return scope(dx.guard)

    @staticmethod
    def __check__(condition: Any, message: str, values: tuple[Any, ...]) -> None:
        condition = lift(condition)
        shown = tuple(lift(v) for v in values)
        if any(e.domain != "scalar" for e in (condition, *shown)):
            raise TraceError("check() takes scalars, such as a norm or a sum")
        trace = current()
        trace.checks.append((condition, message, shown, merged(condition.guard, ())))


@contextlib.contextmanager
def scope(guard: Guard) -> Generator[None]:
    trace = current()
    trace.scope.append(guard)
    try:
        yield
    finally:
        trace.scope.pop()


def merged(first: Guard, second: Iterable[Expr]) -> Guard:
    """Both guards and that of the scope, each condition once."""
    trace = _current.get()
    out: dict[int, Expr] = {id(g): g for g in first}
    for g in second:
        out.setdefault(id(g), g)
    for guard in trace.scope if trace else ():
        for g in guard:
            out.setdefault(id(g), g)
    return tuple(out.values())


# -- making nodes --------------------------------------------------------------------------------------------


def lift(value: Any) -> Expr:
    """A value as a node: numbers and concrete arrays become constants."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool | np.bool_):
        return Expr("const", type="bool", value=bool(value))
    if isinstance(value, numbers.Real | np.floating | np.integer):
        return Expr("const", value=float(value) if not isinstance(value, int) else value)
    if isinstance(value, numbers.Complex):
        return Expr("const", type="complex", value=complex(value))
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if value.shape == ():
            return lift(value.item())
        kind = "complex" if "complex" in str(value.dtype) else "real"
        return Expr("const", domain="free", type=kind, value=value, shape=tuple(value.shape))
    raise TraceError(f"a rule used {value!r} in its arithmetic; it takes arrays and numbers")


def write(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Expr:
    """The node of a word."""
    word = ops.WORDS[name]
    if name == "call":
        function, *rest = args
        return make(name, tuple(lift(a) for a in rest), domain="free", options=(("function", function),))
    if name == "reshape":
        return make(name, (lift(args[0]),), domain="free", options=(("shape", args[1]),))
    if word.family == "reduce":
        x = lift(args[0])
        chosen = dict(zip(("axis", "keepdims"), args[1:], strict=False)) | options
        along = {k: v for k, v in chosen.items() if v is not None and v is not False}
        if not along:
            return (
                x if x.domain == "scalar" else make(name, (x,), domain="scalar", type=reduced_type(name, x))
            )
        return make(name, (x,), domain="free", options=tuple(sorted(along.items())))
    nodes = tuple(lift(a) for a in args)
    if word.family == "shape":
        return make(name, nodes, domain="free")
    return make(name, nodes)


def reduced_type(name: str, x: Expr) -> str:
    if name != "sum" and x.type == "complex":
        raise TraceError(f"{name} of complex numbers has no meaning; take abs or real first")
    return "real" if x.type == "bool" else x.type


def make(
    op: str,
    args: tuple[Expr, ...],
    *,
    domain: str = "",
    type: str = "",
    options: tuple[tuple[str, Any], ...] = (),
) -> Expr:
    domains = {a.domain for a in args}
    if not domain:
        domain = "array" if "array" in domains else "free" if "free" in domains else "scalar"
    guard: Guard = ()
    for a in args:
        guard = merged(guard, a.guard)
    shape = next((a.shape_ for a in args if a.domain == "array"), None) if domain == "array" else None
    type = type or result_type(op, args)
    return Expr(op, args, domain=domain, type=type, options=options, guard=merged(guard, ()), shape=shape)


_RANK = {"bool": 0, "real": 1, "complex": 2}


def result_type(op: str, args: tuple[Expr, ...]) -> str:
    """The type of a node from those of its arguments."""
    if op in ("identity", "scheduled", "total"):
        return args[0].type if args[0].type != "bool" or op == "identity" else "real"
    gives = ops.WORDS[op].gives
    if gives in ("real", "bool"):
        if op in ("less", "less_equal", "greater", "greater_equal") and any(
            a.type == "complex" for a in args
        ):
            raise TraceError(f"{op} of complex numbers has no meaning; take abs or real first")
        return gives
    widest = max((a.type for a in (args[1:] if gives == "branch" else args)), key=_RANK.__getitem__)
    if op in ("maximum", "minimum", "floor", "ceil", *ops.ROUNDINGS) and widest == "complex":
        raise TraceError(f"{op} of complex numbers has no meaning; take abs or real first")
    return "real" if widest == "bool" and gives != "branch" else widest


# -- reading a graph -----------------------------------------------------------------------------------------


def cuts(e: Expr) -> bool:
    """Whether a node is a reduction of a whole array: its value is known only after a pass over memory."""
    return e.op in _REDUCTIONS and e.domain == "scalar"


def order(
    roots: Iterable[Expr], known: Iterable[int] = (), *, guards: bool = False, given: bool = False
) -> list[Expr]:
    """Every node below the roots, arguments first, but for those `known` by id and what lies below them
    alone.

    With `guards`, the conditions of reductions and totals count as their arguments; with `given`, their
    values are given, and nothing below them is wanted. Without recursion, so that long chains do not
    overflow.
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
            needs = e.args
            if cuts(e) or e.op == "total":
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
"""Words that Python writes between their arguments."""


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
    if e.op in INFIX:
        return f"({inner[0]} {INFIX[e.op]} {inner[1]})"
    return f"{e.op}({', '.join(inner)})"
