"""What does a rule meet in place of arrays and numbers? Symbols, which write down what is done with them."""

import contextlib
import contextvars
import math
import numbers
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np

from optimisers import ops
from optimisers.arrays import registry
from optimisers.errors import ShapeError, TraceError
from optimisers.graph.expr import Expr, Guard, Options, show
from optimisers.graph.shapes import OPERANDS, RESULTS, SAID, TAKES, shape_of
from optimisers.ops.dispatch import OPERATIONS, dispatch
from optimisers.ops.primitives import ROUNDINGS
from optimisers.ops.random import DRAWS
from optimisers.rule import Rule, asking


class Trace:
    """What a trace collects besides its outputs."""

    def __init__(self) -> None:
        self.scope: list[Guard] = []
        self.within: list[Guard] = []
        """The conditions of `every` around what is traced now."""
        self.choices: Any = None
        """The `every` that were met."""
        self.checks: list[tuple[Expr, str, tuple[Expr, ...], Guard]] = []
        self.shape_read = False
        self.clocks: Any = None
        """The clocks of its scopes."""
        self.given: dict[str, Symbol] = {}
        """What a step is given beside arrays, where the rule asks for it: the loss, how many examples."""
        self.totals: dict[str, int] = {}
        """How many totals each type of rule has asked for."""
        self.drawing: list[Rule | None] = []
        """The rules that have drawn random numbers, in their order."""


MOST_DRAWING = 256 // DRAWS
"""How many rules of a chain may draw random numbers."""

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


class Symbol(Expr):
    """One node of the graph while a rule is traced."""

    __slots__ = ()

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
    def size(self) -> "Symbol | int":
        """The number of elements, as a symbol: a program serves arrays of every size."""
        return 1 if self.domain == "scalar" else Symbol("size", guard=merged((), ()))

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

    __hash__ = object.__hash__

    # -- what cannot be traced --

    def __bool__(self) -> bool:
        raise TraceError(
            "a rule branched on a value that is not known until the step runs; write `where(condition, a, "
            "b)` instead of `a if condition else b`, and `&`, `|`, `~` instead of `and`, `or`, `not`"
        )

    def __float__(self) -> float:
        raise TraceError(
            "a rule turned a value that is not known until the step runs into a Python number; leave out "
            "float() and int(), and use the operations of opt.ops instead of those of math"
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
        raise TraceError(
            "a rule gave a symbol to NumPy; use the operations of opt.ops, or opt.ops.call(function, x)"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = f"; write opt.ops.{name}(x)" if name in ops.__all__ else ""
        raise TraceError(
            f"a rule asked an array for .{name}, which it does not have while a step is traced{known}"
        )

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        name = function.__name__
        instead = (
            f"write opt.ops.{name}(...)"
            if name in ops.__all__
            else f"use the operations of opt.ops, or opt.ops.call(torch.{name}, x)"
        )
        raise TraceError(f"a rule called torch.{name} on a symbol; {instead}")

    def __array_function__(self, function: Any, *_: Any) -> Any:
        name = f"{function.__module__}.{function.__name__}".removeprefix("numpy.")
        instead = (
            f"write opt.ops.{name}(...)"
            if name in ops.__all__
            else f"use the operations of opt.ops, or opt.ops.call(np.{name}, x)"
        )
        raise TraceError(f"a rule called np.{name} on a symbol; {instead}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        name = {"true_divide": "divide", "absolute": "abs", "conjugate": "conj"}.get(
            ufunc.__name__, ufunc.__name__
        )
        if method == "__call__" and not options and name in OPERATIONS:
            return dispatch(name, inputs, {})
        raise TraceError(
            f"a rule called np.{ufunc.__name__} on a symbol; use the operations of opt.ops, or "
            f"opt.ops.call(np.{ufunc.__name__}, x)"
        )

    # -- the protocol of `value` and `ops` --

    def __number__(self) -> bool:
        return self.domain == "scalar"

    @staticmethod
    def __operation__(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return write(name, args, options)

    @staticmethod
    def __stored_type__(x: "Symbol") -> str:
        """The element type of the array that an input stands for; empty for what is computed."""
        return dict(x.options).get("dtype", "")

    @staticmethod
    def __full_like__(x: "Symbol", value: Any) -> Any:
        return make("add", (lift(value), make("subtract", (x, x)))) if x.domain == "free" else lift(value)

    @staticmethod
    def __total__(s: "Symbol", p: float) -> Any:
        if s.domain != "scalar":
            raise TraceError("total() was given an array; it takes a scalar: total(sum(...))")
        trace, rule = current(), type(asking.get())
        name = f"{rule.__module__}.{rule.__qualname__}"
        count = trace.totals[name] = trace.totals.get(name, 0) + 1
        join = {1: "sum", 2: "norm2", math.inf: "max"}[p]
        part = make("abs", (s,)) if join == "max" else s
        return make("total", (part,), options=(("of", f"{name} {count}"), ("join", join)))

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
    def __every__(condition: Any, compute: Callable[[], Any], olds: Any) -> Any:
        return current().choices(condition, compute, olds)

    @staticmethod
    def __clock__() -> "Symbol":
        return current().clocks.now()

    @staticmethod
    def __random__(kind: str, x: "Symbol", seed: Any, draw: int) -> "Symbol":
        """Random numbers in the shape of `x`; each rule of a chain has its own, whatever the seeds are."""
        seed = lift(seed)
        if x.domain != "array" or seed.domain != "scalar" or seed.type == "complex":
            raise TraceError(f"{kind}(x, seed) takes an array in the shape of the parameters and a number")
        trace, rule = current(), asking.get()
        place = next((i for i, known in enumerate(trace.drawing) if known is rule), len(trace.drawing))
        if place == len(trace.drawing):
            trace.drawing.append(rule)
        if place >= MOST_DRAWING:
            raise TraceError(f"more than {MOST_DRAWING} rules of a chain draw random numbers")
        args = (seed, trace.clocks.now(), Symbol("leaf", value=0), Symbol("leaf", value=1))
        options = (("draw", place * DRAWS + draw), ("kind", kind))
        whole = kind == "normal" and x.type == "complex"
        made = make("random", args, domain="array", type="complex" if whole else "real", options=options)
        made.shape_ = x.shape_
        return made

    @staticmethod
    def __loss__() -> "Symbol":
        return current().given.setdefault("loss", Symbol("loss"))

    @staticmethod
    def __examples__() -> "Symbol":
        return current().given.setdefault("examples", Symbol("examples"))

    @staticmethod
    def __under__(dx: "Symbol") -> Any:
        return scope(dx.guard)

    @staticmethod
    def __check__(condition: Any, message: str, values: tuple[Any, ...]) -> None:
        condition = lift(condition)
        shown = tuple(lift(v) for v in values)
        if any(e.domain != "scalar" for e in (condition, *shown)):
            raise TraceError("check() takes scalars, such as a norm or a sum")
        trace = current()
        trace.checks.append((condition, message, shown, merged(condition.guard, ())))


# -- operators -----------------------------------------------------------------------------------------------

_OPERATORS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "divide",
    "pow": "power",
    "matmul": "matmul",
    "and": "logical_and",
    "or": "logical_or",
}
"""Python's name of an operator that has a reflected form -> the operation."""

_COMPARISONS = {
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "eq": "equal",
    "ne": "not_equal",
}

_PREFIXES = {"neg": "negative", "abs": "abs", "invert": "logical_not"}


def _floor_divided(a: Any, b: Any) -> Any:
    return ops.floor(ops.divide(a, b))


def _remainder(a: Any, b: Any) -> Any:
    return ops.subtract(a, ops.multiply(b, _floor_divided(a, b)))


def _operation(name: str) -> Callable[..., Any]:
    return lambda *args: dispatch(name, args, {})


def _give_operators() -> None:
    """Operators of symbols, from the tables."""
    two = {python: _operation(name) for python, name in _OPERATORS.items()}
    two |= {"floordiv": _floor_divided, "mod": _remainder}
    for python, function in two.items():
        setattr(Symbol, f"__{python}__", function)
        setattr(Symbol, f"__r{python}__", lambda self, other, function=function: function(other, self))
    for python, name in (_COMPARISONS | _PREFIXES).items():
        setattr(Symbol, f"__{python}__", _operation(name))


_give_operators()


@contextlib.contextmanager
def _inside(guards: list[Guard], guard: Guard) -> Generator[None]:
    guards.append(guard)
    try:
        yield
    finally:
        guards.pop()


def scope(guard: Guard) -> contextlib.AbstractContextManager[None]:
    """What is made inside holds only with these conditions, and so does its clock."""
    return _inside(current().scope, guard)


def within(guard: Guard) -> contextlib.AbstractContextManager[None]:
    """What is made inside is computed only with these conditions; its clock is that of what is around."""
    return _inside(current().within, guard)


def scoped() -> Guard:
    """The conditions of the scope."""
    trace = _current.get()
    return _unique(g for guard in (trace.scope if trace else ()) for g in guard)


def merged(first: Guard, second: Iterable[Expr]) -> Guard:
    """Both guards, that of the scope and what is around, each condition once."""
    trace = _current.get()
    around = [g for guard in trace.within for g in guard] if trace else []
    return _unique((*first, *second, *scoped(), *around))


def _unique(conditions: Iterable[Expr]) -> Guard:
    return tuple({id(g): g for g in conditions}.values())


# -- making nodes --------------------------------------------------------------------------------------------


def lift(value: Any) -> Symbol:
    """A value as a node: numbers and concrete arrays become constants."""
    if isinstance(value, Symbol):
        return value
    if isinstance(value, bool | np.bool_):
        return Symbol("const", type="bool", value=bool(value))
    if isinstance(value, numbers.Real | np.floating | np.integer):
        return Symbol("const", value=float(value) if not isinstance(value, int) else value)
    if isinstance(value, numbers.Complex):
        return Symbol("const", type="complex", value=complex(value))
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if value.shape == ():
            if not registry.library(value).scalars.is_fixed(value):
                raise TraceError(
                    "a rule used a number that a transform traces; make it a field of the rule, or of the "
                    "schedule"
                )
            return lift(value.item())
        text = str(value.dtype)
        kind = "complex" if "complex" in text else "bool" if "bool" in text else "real"
        return Symbol("const", domain="free", type=kind, value=value, shape=tuple(value.shape))
    raise TraceError(f"a rule used {value!r} in its arithmetic; it takes arrays and numbers")


def write(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The node of an operation."""
    declared = OPERATIONS[name]
    if name == "call":
        function, *rest = args
        return make(name, tuple(lift(a) for a in rest), domain="free", options=(("function", function),))
    if declared.family == "shape":
        return _shaped(name, args, options)
    if declared.family == "made":
        return make(name, (), domain="free", options=tuple(options.items()))
    if declared.family == "reduce":
        x = lift(args[0])
        chosen = dict(zip(("axis", "keepdims"), args[1:], strict=False)) | options
        along = {k: v for k, v in chosen.items() if v is not None and v is not False}
        if not along:
            own = make("abs", (x,)) if name == "norm2" else x
            return (
                own if x.domain == "scalar" else make(name, (x,), domain="scalar", type=reduced_type(name, x))
            )
        return make(name, (x,), domain="free", options=tuple(sorted(along.items())))
    return make(name, tuple(lift(a) for a in args))


def _shaped(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The node of an operation that the array library computes; of several results one each."""
    names = SAID.get(name, ())
    count = len(args) - len(names) if len(args) > OPERANDS.get(name, 1) else len(args)
    chosen = dict(zip(names, args[count:], strict=False)) | options
    given = tuple(sorted((k, v) for k, v in chosen.items() if v is not None))
    found = make(name, tuple(lift(a) for a in args[:count]), domain="free", options=given)
    operands = [a.shape_ if a.domain != "scalar" else () for a in found.args]
    if found.shape_ is None and name in TAKES and None not in operands:
        shapes = " and ".join(map(str, operands))
        raise ShapeError(f"{name}() of an array of shape {shapes}; it takes {TAKES[name]}")
    if name not in RESULTS:
        return found
    kinds = [found.type if kind == "same" else kind for kind in RESULTS[name]]
    return tuple(
        make("item", (found,), domain="free", type=kind, options=(("index", i),))
        for i, kind in enumerate(kinds)
    )


def reduced_type(name: str, x: Expr) -> str:
    if name == "norm2":
        return "real"
    if name != "sum" and x.type == "complex":
        raise TraceError(f"{name} of complex numbers has no meaning; take abs or real first")
    return "real" if x.type == "bool" else x.type


def make(
    op: str,
    args: tuple[Expr, ...],
    *,
    domain: str = "",
    type: str = "",
    options: Options = (),
) -> Symbol:
    domains = {a.domain for a in args}
    if not domain:
        domain = "array" if "array" in domains else "free" if "free" in domains else "scalar"
    guard: Guard = ()
    for a in args:
        guard = merged(guard, a.guard)
    type = type or result_type(op, args)
    shape = _shape(op, args, domain, options)
    return Symbol(op, args, domain=domain, type=type, options=options, guard=merged(guard, ()), shape=shape)


def _shape(op: str, args: tuple[Expr, ...], domain: str, options: Options) -> tuple[int, ...] | None:
    """The shape of a node in a domain; None if it is not known."""
    if domain == "array":
        return next((a.shape_ for a in args if a.domain == "array"), None)
    if domain == "scalar" or any(a.domain != "scalar" and a.shape_ is None for a in args):
        return None
    return shape_of(op, dict(options), [a.shape_ or () for a in args])


_RANK = {"bool": 0, "real": 1, "complex": 2}


def result_type(op: str, args: tuple[Expr, ...]) -> str:
    """The type of a node from those of its arguments."""
    if op in ("identity", "scheduled", "total"):
        return args[0].type if args[0].type != "bool" or op == "identity" else "real"
    gives = OPERATIONS[op].gives
    if gives in ("real", "bool"):
        if op in ("less", "less_equal", "greater", "greater_equal") and any(
            a.type == "complex" for a in args
        ):
            raise TraceError(f"{op} of complex numbers has no meaning; take abs or real first")
        return gives
    widest = max((a.type for a in (args[1:] if gives == "branch" else args)), key=_RANK.__getitem__)
    if op in ("maximum", "minimum", "floor", "ceil", "argsort", *ROUNDINGS) and widest == "complex":
        raise TraceError(f"{op} of complex numbers has no meaning; take abs or real first")
    return "real" if widest == "bool" and gives != "branch" else widest
