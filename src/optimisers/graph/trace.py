"""A rule and the form of its state -> a program: what the new parameters, state and counters are made of."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from optimisers.arrays import registry
from optimisers.errors import TraceError
from optimisers.graph.cached import cached
from optimisers.graph.choices import Choices
from optimisers.graph.clocks import Clocks
from optimisers.graph.expr import GIVEN, Expr, Guard, order
from optimisers.graph.lower import Lowering
from optimisers.graph.simplify import clean, unique
from optimisers.graph.symbol import Symbol, Trace, lift, make, tracing
from optimisers.nest import flatten, form, unflatten
from optimisers.ops import Becomes
from optimisers.rule import Rule, at_clock, stepped
from optimisers.settings import fill, is_number, walk

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
    change: Expr | None
    """What is to be added to the parameters to have the new ones."""
    new_slots: tuple[Expr, ...]
    new_counters: tuple[Expr, ...]
    checks: tuple[tuple[Expr, str, tuple[Expr, ...]], ...]
    guards: tuple[Expr, ...]
    """The scalar conditions of `when`."""
    choices: tuple[Expr, ...]
    """Those of `every`."""
    shape_read: bool
    """Whether the rule asked for the shape of its parameters: then the program serves that shape only."""

    type: str
    """Whether the parameters are real or complex."""
    lowering: Lowering = dataclasses.field(default_factory=Lowering, repr=False)
    """Its nodes as engines read them."""

    @functools.cached_property
    def given(self) -> tuple[Expr, ...]:
        """What of that which a step is given beside arrays the rule asks for."""
        return tuple(e for e in order(self.roots, guards=True) if e.op in GIVEN)

    @property
    def roots(self) -> list[Expr]:
        return [
            *([self.new_x] if self.new_x is not None else []),
            *self.new_slots,
            *self.new_counters,
            *(e for c, _, values in self.checks for e in (c, *values)),
        ]


@cached
def of_changes(program: Program) -> Program:
    """The program that gives what is to be added to the parameters where the other gives new ones."""
    return dataclasses.replace(program, new_x=program.change)


@cached
def reads_parameters(program: Program) -> bool:
    """Whether steps depend on the values of the parameters."""
    return any(e.op == "input" and e.value == "x" for e in order(of_changes(program).roots))


# -- tracing -------------------------------------------------------------------------------------------------


def trace(rule: Rule, state: Any, x: Any, more: int = 0) -> Program:
    """The program of `rule` for parameters like `x` whose state is like `state`, with `more` further
    gradients.

    Raises TraceError, saying what the rule did, if it cannot be traced.
    """
    dtype, shape = registry.type_name(x), tuple(x.shape)
    kind = _kind(dtype)
    with tracing() as notes:
        paths = [path for path, _ in walk(rule)]
        hypers = [Symbol("number", value=i, options=(("name", _name(p)),)) for i, p in enumerate(paths)]
        symbolic = fill(rule, iter(hypers))
        inputs = _inputs(dtype, shape, more)
        slots, names, symbols = _state_symbols(state, shape, len(hypers))
        notes.choices = Choices()
        clocks = notes.clocks = Clocks(symbolic, len(hypers) + len(names))
        token = at_clock.set(clocks)
        try:
            new_state, dx = _answer_of(rule, symbolic, unflatten(state, iter(symbols)), inputs)
        finally:
            at_clock.reset(token)
        _whole(rule, shape, dx)
        _same_form(rule, state, new_state)
        new_x = _new_x(inputs[0], dx)
        new = [lift(e) for _, e in flatten(new_state)]
        _types(rule, kind, new_x, state, new, symbols)
        steps, hidden, counted = clocks.counters()
        symbols, new = [*symbols, *hidden], [*new, *counted]
        olds = [inputs[0], *symbols]
        outputs = [_guarded(e, old) for e, old in zip([new_x, *new], olds, strict=True)]
        outputs.append(_guarded(_change(inputs[0], dx), lift(0.0)))
        (new_x, *new, change), conditions, choices, checks = _cleaned(outputs, notes)
    return Program(
        title=repr(rule),
        template=unflatten(state, iter([_blank(v) for _, v in flatten(state)])),
        slots=tuple(slots),
        names=(*(_name(p) for p in paths), *names, *steps),
        hypers=len(hypers),
        hidden=len(hidden),
        clocks=tuple(clocks.read),
        new_x=None if dx is None else new_x,
        change=None if dx is None else change,
        new_slots=tuple(e for s, e in zip(symbols, new, strict=True) if s.op == "input"),
        new_counters=tuple(e for s, e in zip(symbols, new, strict=True) if s.op == "number"),
        checks=tuple(checks),
        guards=tuple(conditions),
        choices=tuple(choices),
        shape_read=notes.shape_read or any(s.shape is not None for s in slots),
        type=kind,
    )


def _kind(dtype: str) -> str:
    """Whether numbers of this type are real or complex."""
    return "complex" if "complex" in dtype else "real"


def _inputs(dtype: str, shape: tuple[int, ...], more: int) -> list[Symbol]:
    """The parameters and their gradients."""
    stored = {"x": (("dtype", dtype),)}
    return [
        Symbol("input", value=n, domain="array", type=_kind(dtype), shape=shape, options=stored.get(n, ()))
        for n in _gradients(more, "x")
    ]


def _whole(rule: Rule, shape: tuple[int, ...], dx: Any) -> None:
    """Raise TraceError for one number as the step of a whole array."""
    if shape and (is_number(dx) or (isinstance(dx, Symbol) and dx.domain == "scalar")):
        raise TraceError(
            f"{type(rule).__name__}.apply gives one number as the step for a whole array; write dx * "
            "number, or where(True, number, dx)"
        )


def _answer_of(rule: Rule, symbolic: Rule, state: Any, inputs: list[Symbol]) -> tuple[Any, Any]:
    """(state, step) of the rule for symbols; raises TraceError, naming the rule."""
    try:
        return stepped(symbolic, state, inputs[0], inputs[1], tuple(inputs[2:]))
    except TraceError as error:
        name = type(rule).__name__
        raise type(error)(
            str(error) if str(error).startswith((name, "the schedule of")) else f"{name}: {error}"
        ) from error
    except TypeError as error:
        if f"{Symbol.__module__}.{Symbol.__qualname__}" not in str(error):
            raise
        raise TraceError(
            f"{type(rule).__name__}: a rule gave a symbol to a function of another library; use the "
            "operations of opt.ops, or opt.ops.call(function, x)"
        ) from error


def _new_x(x: Symbol, dx: Any) -> Symbol:
    """The new parameters that a step asks for."""
    if dx is None:
        return x
    return lift(dx.value) if isinstance(dx, Becomes) else make("subtract", (x, lift(dx)))


def _change(x: Symbol, dx: Any) -> Symbol:
    """What is to be added to the parameters: the step itself, not a difference of parameters."""
    if dx is None:
        return lift(0.0)
    return make("subtract", (lift(dx.value), x)) if isinstance(dx, Becomes) else make("negative", (lift(dx),))


Check = tuple[Expr, str, tuple[Expr, ...]]


def _cleaned(
    outputs: Sequence[Symbol], notes: Trace
) -> tuple[list[Expr], list[Expr], list[Expr], list[Check]]:
    """Outputs, the conditions of `when` on which they hang, those of `every`, and checks, as one simplified
    graph.
    """
    checks = [(_implied(g, c), m, v) for c, m, v, g in notes.checks]
    chosen: dict[int, Expr] = {id(c): c for c in notes.choices.conditions}
    guards = unique(g for e in order([*outputs, *(c for c, _, _ in checks)]) for g in e.guard)
    conditions = [g for g in guards if id(g) not in chosen]
    cleaned, of = clean([*outputs, *conditions, *(e for c, _, v in checks for e in (c, *v))])
    return (
        cleaned[: len(outputs)],
        [of[id(c)] for c in conditions],
        unique(of[i] for i in chosen if i in of),
        [(of[id(c)], m, tuple(of[id(e)] for e in v)) for c, m, v in checks],
    )


def _implied(guard: Guard, condition: Expr) -> Expr:
    """A condition that is asked for where a guard holds."""
    return make("logical_or", (make("logical_not", (_all(guard),)), condition)) if guard else condition


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


def _state_symbols(
    state: Any, shape: tuple[int, ...], hypers: int
) -> tuple[list[Slot], list[str], list[Symbol]]:
    slots: list[Slot] = []
    names: list[str] = []
    symbols: list[Symbol] = []
    for path, value in flatten(state):
        if registry.isarray(value):
            dtype = registry.type_name(value)
            kind = "complex" if "complex" in dtype else "real"
            same = tuple(value.shape) == shape
            slot = Slot(f"s{len(slots)}", path, dtype, kind, None if same else tuple(value.shape))
            slots.append(slot)
            domain = "array" if same else "free"
            symbols.append(
                Symbol(
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
            symbols.append(Symbol("number", value=hypers + len(names), options=(("name", name),)))
            names.append(name)
    return slots, names, symbols


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


def _types(rule: Rule, kind: str, step: Symbol, state: Any, new: list[Symbol], symbols: list[Symbol]) -> None:
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
            raise TraceError(
                f"{where} has another shape than x in init and the shape of x in apply; let init return "
                "zeros_like(x)"
            )
        if old.type == "real" and e.type == "complex":
            raise TraceError(
                f"{where} is real in init and complex in apply; take abs2 or real, or let init return "
                "complex zeros"
            )


def _guarded(e: Symbol, old: Symbol) -> Symbol:
    for condition in e.guard:
        e = make("where", (condition, e, old))
    return e


def _all(guard: Guard) -> Expr:
    e: Expr = guard[0]
    for g in guard[1:]:
        e = make("logical_and", (e, g))
    return e


def total_key(e: Expr) -> str:
    """What two totals must share to be one sum over all leaves: the rule that asks, and which of its totals
    it is.
    """
    return dict(e.options)["of"]


def total_join(e: Expr) -> str:
    """The reduction that makes one number of what the leaves give to a total: `sum`, `norm2` or `max`."""
    return dict(e.options)["join"]
