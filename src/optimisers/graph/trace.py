"""A rule and the form of its state -> a program: what the new parameters, state and counters are made of."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from optimisers.arrays import registry
from optimisers.errors import TraceError
from optimisers.graph.clocks import Clocks
from optimisers.graph.expr import Expr, Guard, cuts, lift, make, order, tracing
from optimisers.graph.turn import turned
from optimisers.nest import flatten, form, unflatten
from optimisers.ops import Becomes
from optimisers.rule import Rule, at_clock, stepped
from optimisers.settings import fill, walk

# -- the program ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slot:
    """One array of the state."""

    name: str
    path: tuple[Any, ...]
    dtype: str
    type: str
    shape: tuple[int, ...] | None
    """None if it has the shape of the parameter."""


@dataclasses.dataclass(eq=False)
class Program:
    """What one step of a rule computes, for one array. Numbers come in a row: hyper-parameters first, then
    counters.
    """

    title: str
    template: Any
    """A state of the right form."""
    slots: tuple[Slot, ...]
    names: tuple[str, ...]
    """Names of the numbers: hyper-parameters first, then counters."""
    hypers: int
    hidden: int
    """How many counters at the end are no part of the state: steps taken under each condition of `when`."""
    clocks: tuple[int, ...]
    """Which clock the schedules of each part of the rule read: UPDATES, or the number of such a counter."""
    new_x: Expr | None
    new_slots: tuple[Expr, ...]
    new_counters: tuple[Expr, ...]
    checks: tuple[tuple[Expr, str, tuple[Expr, ...]], ...]
    guards: tuple[Expr, ...]
    """The scalar conditions of `when`."""
    shape_read: bool
    """Whether the rule asked for the shape of its parameters: then the program serves that shape only."""

    @property
    def roots(self) -> list[Expr]:
        return [
            *([self.new_x] if self.new_x is not None else []),
            *self.new_slots,
            *self.new_counters,
            *(e for c, _, values in self.checks for e in (c, *values)),
        ]


def trace(rule: Rule, state: Any, x: Any, more: int = 0) -> Program:
    """The program of `rule` for parameters like `x` whose state is like `state`, with `more` further
    gradients.

    Raises TraceError, saying what the rule did, if it cannot be traced.
    """
    dtype, shape = registry.library(x).dtype_name(x), tuple(x.shape)
    kind, stored = "complex" if "complex" in dtype else "real", (("dtype", dtype),)
    with tracing() as notes:
        paths = [path for path, _ in walk(rule)]
        hypers = [Expr("number", value=i, options=(("name", _name(p)),)) for i, p in enumerate(paths)]
        symbolic = fill(rule, iter(hypers))
        inputs = [
            Expr("input", value=n, domain="array", type=kind, shape=shape, options=stored if n == "x" else ())
            for n in _gradients(more, "x")
        ]
        slots, names, symbols = _state_symbols(state, shape, len(hypers))
        clocks = notes.clocks = Clocks(symbolic, len(hypers) + len(names))
        token = at_clock.set(clocks)
        try:
            answer = stepped(
                symbolic, unflatten(state, iter(symbols)), inputs[0], inputs[1], tuple(inputs[2:])
            )
        except TraceError as error:
            name = type(rule).__name__
            raise TraceError(
                str(error) if str(error).startswith((name, "the schedule of")) else f"{name}: {error}"
            ) from error
        finally:
            at_clock.reset(token)
        new_state, dx = _answer(rule, answer)
        if shape and isinstance(dx, Expr) and dx.domain == "scalar":
            raise TraceError(
                f"{type(rule).__name__}.apply gives one number as the step for a whole array; write dx * "
                "number, or where(True, number, dx)"
            )
        _same_form(rule, state, new_state)
        new = [lift(e) for _, e in flatten(new_state)]
        wanted = [
            inputs[0] if dx is None else lift(dx.value if isinstance(dx, Becomes) else inputs[0] - lift(dx))
        ]
        _types(rule, kind, wanted[0], state, new, symbols)
        steps, hidden, counted = clocks.counters()
        symbols, new = [*symbols, *hidden], [*new, *counted]
        olds = [inputs[0], *symbols]
        outputs = [_guarded(e, old) for e, old in zip([*wanted, *new], olds, strict=True)]
        checks = [
            (make("logical_or", (make("logical_not", (_all(g),)), c)) if g else c, m, v)
            for c, m, v, g in notes.checks
        ]
        conditions = _unique(g for e in order([*outputs, *(c for c, _, _ in checks)]) for g in e.guard)
        cleaned, of = clean([*outputs, *conditions, *(e for c, _, v in checks for e in (c, *v))])
    it = iter(cleaned[len(outputs) + len(conditions) :])
    by_symbol = dict(zip(symbols, cleaned[1 : len(outputs)], strict=True))
    return Program(
        title=repr(rule),
        template=unflatten(state, iter([_blank(v) for _, v in flatten(state)])),
        slots=tuple(slots),
        names=(*(_name(p) for p in paths), *names, *steps),
        hypers=len(hypers),
        hidden=len(hidden),
        clocks=tuple(clocks.read),
        new_x=None if dx is None else cleaned[0],
        new_slots=tuple(by_symbol[s] for s in symbols if s.op == "input"),
        new_counters=tuple(by_symbol[s] for s in symbols if s.op == "number"),
        checks=tuple((next(it), m, tuple(next(it) for _ in v)) for _, m, v in checks),
        guards=tuple(of[id(c)] for c in conditions),
        shape_read=notes.shape_read or any(s.shape is not None for s in slots),
    )


def _blank(value: Any) -> Any:
    """Only the form of a template is used: it keeps no arrays alive."""
    return registry.library(value).stand_in((0,), value.dtype) if registry.isarray(value) else value


def _gradients(more: int, *first: str) -> list[str]:
    return [*first, "dx", *(f"dx{i + 2}" for i in range(more))]


def _name(path: tuple[Any, ...]) -> str:
    """A short name for a number: `beta[0]`, without the rules around it."""
    at = (
        max(i for i, p in enumerate(path) if isinstance(p, str))
        if any(isinstance(p, str) for p in path)
        else 0
    )
    return str(path[at]) + "".join(f"[{p}]" for p in path[at + 1 :])


def _state_symbols(state: Any, shape: tuple[int, ...], hypers: int) -> Any:
    slots: list[Slot] = []
    names: list[str] = []
    symbols: list[Expr] = []
    for path, value in flatten(state):
        if registry.isarray(value):
            dtype = registry.library(value).dtype_name(value)
            kind = "complex" if "complex" in dtype else "real"
            same = tuple(value.shape) == shape
            slot = Slot(f"s{len(slots)}", path, dtype, kind, None if same else tuple(value.shape))
            slots.append(slot)
            domain = "array" if same else "free"
            symbols.append(
                Expr(
                    "input",
                    value=slot.name,
                    domain=domain,
                    type=kind,
                    shape=tuple(value.shape),
                    options=(("dtype", dtype),),
                )
            )
        else:
            name = _name(path) if path else "state"
            symbols.append(Expr("number", value=hypers + len(names), options=(("name", name),)))
            names.append(name)
    return slots, names, symbols


def _answer(rule: Rule, answer: Any) -> tuple[Any, Any]:
    if not isinstance(answer, tuple) or len(answer) != 2:
        what = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else f"{type(answer).__name__}"
        what = "one array" if isinstance(answer, Expr) else "None" if answer is None else what
        raise TraceError(f"{type(rule).__name__}.apply returned {what}; it returns a pair (state, dx)")
    return answer


def _same_form(rule: Rule, old: Any, new: Any) -> None:
    want, got = form(old), form(new)
    if _loosened(want) != _loosened(got):
        raise TraceError(
            f"{type(rule).__name__}.apply returned a state of another form than init: {_sketch(got)} instead "
            f"of {_sketch(want)}"
        )


def _loosened(f: Any) -> Any:
    """An array in the state may be given as a number, which fills it; the reverse is an error of its own."""
    if isinstance(f, tuple):
        return (f[0], tuple((k, _loosened(v)) for k, v in f[1]))
    return "value" if f in ("array", "number") else f


def _sketch(f: Any) -> str:
    if isinstance(f, tuple):
        kind, items = f
        named = issubclass(kind, dict) or hasattr(kind, "_fields")
        inner = ", ".join(f"{k}={_sketch(v)}" if named else _sketch(v) for k, v in items)
        return f"{kind.__name__}({inner})"
    return str(f)


def _types(rule: Rule, kind: str, step: Expr, state: Any, new: list[Expr], symbols: list[Expr]) -> None:
    """Raise TraceError where a result does not fit its place."""
    name = type(rule).__name__
    if step.type == "complex" and kind == "real":
        raise TraceError(f"{name}.apply gives a complex step for real parameters")
    for (path, _), e, old in zip(flatten(state), new, symbols, strict=True):
        where = f"the state{''.join(f'[{p!r}]' for p in path)} of {name}"
        if old.op == "number" and e.domain != "scalar":
            raise TraceError(
                f"{where} is a number in init and an array in apply; let init return zeros_like(x)"
            )
        if old.domain == "free" and e.domain == "array":
            raise TraceError(f"{where} has another shape than x in init and the shape of x in apply")
        if old.type == "real" and e.type == "complex":
            raise TraceError(
                f"{where} is real in init and complex in apply; take abs2 or real, or let init return "
                "complex zeros"
            )


def _guarded(e: Expr, old: Expr) -> Expr:
    for condition in e.guard:
        e = make("where", (condition, e, old))
    return e


def _all(guard: Guard) -> Expr:
    e = guard[0]
    for g in guard[1:]:
        e = make("logical_and", (e, g))
    return e


def _unique(nodes: Iterable[Expr]) -> list[Expr]:
    return list({id(e): e for e in nodes}.values())


# -- cleaning: one node for one value, guards only where they steer ------------------------------------------


def clean(roots: list[Expr]) -> tuple[list[Expr], dict[int, Expr]]:
    """The roots rebuilt with equal nodes merged and constants folded; and the new node of every old one, by
    id.

    Guards stay on reductions alone, where they tell that a pass over memory can be left out; a total gets a
    `where`.
    """
    table: dict[Any, Expr] = {}
    new: dict[int, Expr] = {}
    for e in order(roots, guards=True):
        args = tuple(new[id(a)] for a in e.args)
        keep = _unique(new[id(g)] for g in e.guard) if cuts(e) or e.op == "total" else []
        new[id(e)] = fold(table, e, args, tuple(keep))
    return [new[id(r)] for r in roots], new


def _merge(table: dict[Any, Expr], e: Expr) -> Expr:
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


def fold(table: dict[Any, Expr], e: Expr, args: tuple[Expr, ...], guard: Guard) -> Expr:
    """The node with these arguments, simplified where that cannot change its value."""
    if e.op == "total":
        args, guard = (_masked(table, args[0], guard),), ()
    new = Expr(
        e.op,
        args,
        domain=e.domain,
        type=e.type,
        value=e.value,
        options=e.options,
        guard=guard,
        shape=e.shape_,
    )
    for simpler in (_identity, _choice, _logic, _power, _never):
        found = simpler(new)
        if found is not None:
            return _merge(table, found)
    last = turned(new, functools.partial(_merge, table))
    return _merge(table, new if last is None else last)


def _masked(table: dict[Any, Expr], s: Expr, guard: Guard) -> Expr:
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
    """A reduction under a condition that is known not to hold is 0: nobody reads it."""
    return Expr("const", value=0.0) if cuts(e) and any(_known(g) is False for g in e.guard) else None


def total_key(e: Expr) -> str:
    """What two totals must share to be one sum over all leaves: the rule that asks, and which of its totals
    it is.
    """
    return dict(e.options)["of"]
