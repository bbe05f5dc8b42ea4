"""What is a rule or a schedule made of? Numbers that may change at any step, and structure that may not.

A `Value` is a dataclass whose fields are set once. Its *skeleton* is everything but the numbers: two values
with one skeleton share one traced program and one compiled kernel. Every walk over nested settings (adjust,
trace, print) goes through here, so a rule that wraps another cannot forget to forward.
"""

import contextlib
import dataclasses
import functools
import inspect
import numbers as abstract
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType
from typing import Any, ClassVar, NamedTuple, Self, dataclass_transform

import numpy as np

from optimisers.errors import BadSetting, UnknownField
from optimisers.spellings import offered


def static(default: object = dataclasses.MISSING) -> Any:
    """A field that belongs to the structure, though it may hold a number: it cannot be adjusted or
    scheduled.
    """
    return dataclasses.field(default=default, metadata={"static": True})


def is_number(x: object) -> bool:
    """Whether `x` is one real run-time number: an int or float, a 0-d array of any library, or a traced
    scalar.
    """
    kind = type(x)
    if kind is float or kind is int:
        return True
    if kind is bool:
        return False
    if isinstance(x, abstract.Real):
        return True
    symbol = getattr(kind, "__number__", None)
    if symbol is not None:
        return symbol(x)
    return not isinstance(x, type) and getattr(x, "shape", None) == () and hasattr(x, "dtype")


class Form(NamedTuple):
    """What a class says of one of its fields."""

    name: str
    kind: Any
    """`float`, `int`, a tuple of such kinds, or None for a field that holds structure or other values."""
    static: bool
    default: object


@dataclass_transform(frozen_default=True)
class Value:
    """A dataclass whose fields are set once; its subclasses need no decorator."""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        generated = "__init__" not in vars(cls)
        _annotate_again(cls)
        # Only __init__ is generated for each class: the rest is the same for all, and generation is slow.
        dataclasses.dataclass(repr=False, eq=False)(cls)
        listed = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType] made above
        cls._fields = tuple(f.name for f in listed)
        cls._forms = tuple(Form(f.name, _kind(f), bool(f.metadata.get("static")), f.default) for f in listed)
        cls._named = generated
        if cls.formerly.__func__ is not Value.formerly.__func__:
            cls.__init__ = _unless_made(cls.__init__)

    _fields: ClassVar[tuple[str, ...]] = ()
    _forms: ClassVar[tuple[Form, ...]] = ()
    _named: ClassVar[bool] = False
    """Whether the constructor takes the fields by name; a class may have its own."""

    def __new__(cls, *given: object, **settings: object) -> Self:
        instead = cls.formerly(given, settings)
        if instead is not None:
            return instead
        if cls._named and len(given) > len(cls._fields):
            raise UnknownField(
                f"{cls.__name__} takes {len(cls._fields)} settings and was given {len(given)}; "
                f"{offered(cls.__name__, '', cls._fields)}{_bare(cls)}"
            )
        for name in settings:
            if cls._named and name not in cls._fields:
                raise UnknownField(
                    f"{cls.__name__} has no setting {name}; "
                    f"{offered(cls.__name__, name, cls._fields)}{_bare(cls)}"
                )
        return object.__new__(cls)

    @classmethod
    def formerly(cls, given: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        """The value that arguments of an older spelling mean; None for those of today."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self) or name not in type(self)._fields:
            cls = type(self).__name__
            if name not in type(self)._fields:
                raise dataclasses.FrozenInstanceError(
                    f"{cls} has no field {name}; list it: {name}: float = 0.1"
                )
            raise dataclasses.FrozenInstanceError(
                f"{cls} is a value; write opt.adjust_(state, {name}=...), or rule.adjust({name}=...) for a "
                "new rule"
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(
            f"{type(self).__name__} is a value; nothing can be deleted from it"
        )

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and settings(self) == settings(other)

    def __hash__(self) -> int:
        return hash((type(self), *(v for _, v in settings(self))))

    def __post_init__(self) -> None:
        held = vars(self)
        for field in fields(self):
            if not _stays(field.kind, value := getattr(self, field.name)):
                held[field.name] = checked(type(self).__name__, field, value)
        self.check()

    def check(self) -> None:
        """Raise BadSetting where the settings contradict the rule; runs after every construction and
        adjustment.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings(self))})"


def _unless_made(initialise: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a class that has older spellings: Python calls it for what `formerly` made, too."""

    @functools.wraps(initialise)
    def started(self: Value, *given: object, **settings: object) -> None:
        if not vars(self):
            initialise(self, *given, **settings)

    return started


def _annotate_again(cls: type[Value]) -> None:
    """Let a class give the fields that it inherits other defaults without saying their types again."""
    known = {f.name: f.type for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    own = inspect.get_annotations(cls)
    again = {name: known[name] for name in vars(cls) if name in known and name not in own}
    for name in again:
        if hasattr(vars(cls)[name], "__get__"):
            raise BadSetting(
                f"{cls.__name__}.{name} is a function or a property in the place of a setting; give it a "
                "number, or another name"
            )
    if again:
        cls.__annotations__ = {**own, **again}


def fields(value: Value) -> tuple[Form, ...]:
    """The fields of a value, in order."""
    return type(value)._forms  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] of this room


def settings(value: Value) -> list[tuple[str, Any]]:
    """The fields of a value by name, in order."""
    return [(name, getattr(value, name)) for name, *_ in fields(value)]


# -- what a field accepts ------------------------------------------------------------------------------------


def _kind(field: "dataclasses.Field[Any]") -> Any:
    """`float`, `int`, a tuple of such kinds, or None for a field that holds structure or other values."""
    if field.metadata.get("static"):
        return None
    name = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    declared = {"float": float, "int": int}.get(name)
    return (
        kind_of(field.default) if declared is None and field.default is not dataclasses.MISSING else declared
    )


def kind_of(default: object) -> Any:
    if isinstance(default, bool):
        return None
    if isinstance(default, int):
        return int
    if is_number(default):
        return float
    if isinstance(default, tuple) and default and all(kind_of(d) in (int, float) for d in default):
        return tuple(kind_of(d) for d in default)
    return None


def checked(owner: str, field: Form, value: object) -> Any:
    """What a field takes for a value; raises BadSetting, naming the field, for one that it does not take."""
    want = field.kind
    if _stays(want, value):
        return value
    if want is None:
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise BadSetting(f"{owner}.{field.name} is {value!r}; it takes True or False")
        return value
    if isinstance(want, tuple):
        name = f"{owner}.{field.name}"
        if callable(value) and not is_number(value):
            raise BadSetting(
                f"{name} is one schedule, {value!r}; it has {len(want)} numbers: write a tuple of "
                f"{len(want)}, each a number or a schedule"
            )
        if not isinstance(value, tuple | list) or len(value) != len(want):
            raise BadSetting(f"{name} is {value!r}; it takes a tuple of {len(want)} numbers")
        return tuple(number(f"{name}[{i}]", k, v) for i, (k, v) in enumerate(zip(want, value, strict=True)))
    return number(f"{owner}.{field.name}", want, value)


def _stays(want: Any, value: object) -> bool:
    """Whether a value is stored as it is, without another look: floats where they are wanted."""
    if want is float:
        return type(value) is float and value == value  # noqa: PLR0124 no NaN
    if type(want) is not tuple or type(value) is not tuple:
        return False
    return len(want) == len(value) and all(map(_stays, want, value))


def number(name: str, want: type, value: object) -> Any:
    """The number as the field stores it: an int becomes a float where the default is one; 0-d arrays stay
    themselves.
    """
    if isinstance(value, np.ndarray | np.generic) and value.shape == ():
        value = value.item()
    if isinstance(value, abstract.Real) and not _is_bool(value):
        return _real(name, want, value)
    if is_number(value) or (isinstance(value, Value) and callable(value)):
        return value
    if callable(value) and not isinstance(value, type):
        if not takes(value, 1):
            raise BadSetting(
                f"{name} is a function that cannot be called with one argument; a schedule is a function of "
                "the clock: write lambda clock: 0.1 / (1 + clock)"
            )
        if not _gives_number(value):
            kind = type(value).__name__
            raise BadSetting(f"{name} is a {kind}, which gives no number for the clock; it takes a schedule")
        return value
    raise BadSetting(f"{name} is {value!r}; it takes a real number, or a schedule of it")


def _gives_number(schedule: Callable[[int], object]) -> bool:
    """Whether an object that can be called is a schedule, and no model; functions are not called for that."""
    with contextlib.suppress(Exception):
        plain = hasattr(schedule, "__code__") or isinstance(schedule, functools.partial | BuiltinFunctionType)
        return plain or is_number(found := schedule(0)) or getattr(found, "shape", None) == ()
    return False


def _real(name: str, want: type, value: abstract.Real) -> Any:
    """A number of Python as the field stores it."""
    if value != value:  # noqa: PLR0124 the test for NaN
        raise BadSetting(f"{name} is nan; it takes a number")
    if want is int and not float(value).is_integer():
        raise BadSetting(f"{name} is {value!r}; it takes a whole number")
    return want(value if isinstance(value, int) else float(value))


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments; True where that is unknown."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


# -- the one walk over nested settings -----------------------------------------------------------------------

_number = "#"


def numbers(value: object) -> list[Any]:
    """Every run-time number in `value`, depth first in field order; `fill` takes them back in that order."""
    return [x for _, x in walk(value)]


def walk(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(path, number) for every run-time number in `value`."""
    if isinstance(value, Value):
        for field in fields(value):
            if not field.static:
                yield from walk(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from walk(item, (*path, i))
    elif is_number(value):
        yield path, value


def owners(value: object) -> Iterator[tuple[str, int]]:
    """(field, place in it) for every number of `numbers` that a field of a rule holds itself; ("", 0) for
    those inside of schedules and of structure.
    """
    if isinstance(value, Value):
        for name, kind, static, _ in fields(value):
            held = getattr(value, name)
            if kind is not None and not static:
                for i, part in enumerate(held if isinstance(kind, tuple) else (held,)):
                    yield from [(name, i)] if is_number(part) else (("", 0) for _ in walk(part))
            elif not static:
                yield from owners(held)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from owners(item)
    elif is_number(value):
        yield "", 0


def skeleton(value: object) -> Any:
    """What is left of `value` without its numbers: hashable, equal for values that may share a program."""
    if isinstance(value, Value):
        parts = tuple(
            ("static", _key(getattr(value, f.name))) if f.static else skeleton(getattr(value, f.name))
            for f in fields(value)
        )
        return (type(value), parts)
    if isinstance(value, tuple | list):
        return tuple(skeleton(v) for v in value)
    return _number if is_number(value) else _key(value)


def _key(value: object) -> Any:
    """A hashable stand-in; values that cannot be hashed are told apart by identity, and kept alive by the
    key.
    """
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return (type(value), value)


@dataclasses.dataclass(frozen=True)
class _Identity:
    value: object

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value


def fill(value: object, given: Iterator[Any]) -> Any:
    """`value` with its numbers replaced, in the order of `numbers`; nothing is checked or converted."""
    if isinstance(value, Value):
        changes = {f.name: fill(getattr(value, f.name), given) for f in fields(value) if not f.static}
        return replaced(value, changes)
    if isinstance(value, tuple):
        return rebuilt(value, [fill(v, given) for v in value])
    if isinstance(value, list):
        return [fill(v, given) for v in value]
    return next(given) if is_number(value) else value


def rebuilt(old: "tuple[Any, ...]", items: list[Any]) -> Any:
    """A tuple of the type of `old`, which may be a NamedTuple."""
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def replaced(value: object, changes: dict[str, Any]) -> Any:
    """`value` with some fields replaced, past every check: the new contents may be symbols."""
    new = object.__new__(type(value))
    vars(new).update((name, changes.get(name, old)) for name, old in vars(value).items())
    return new


def schedules(value: Value, resolve: Callable[[str, Callable[[Any], Any], Value], Any]) -> Any:
    """`value` with every schedule in a numeric field replaced by `resolve(name, schedule, its owner)`, at
    every depth.
    """
    changes: dict[str, Any] = {}
    for field in fields(value):
        old = getattr(value, field.name)
        if field.static:
            continue
        want = field.kind
        if want is not None:
            name = f"{type(value).__name__}.{field.name}"
            parts = old if isinstance(want, tuple) else (old,)
            new = tuple(resolve(name, v, value) if callable(v) and not is_number(v) else v for v in parts)
            changes[field.name] = new if isinstance(want, tuple) else new[0]
        else:
            changes[field.name] = inner(old, lambda v: schedules(v, resolve))
    return replaced(value, changes)


def inner(old: object, change: Callable[[Value], Any]) -> Any:
    """`old` with `change` applied to the values in it."""
    if isinstance(old, Value):
        return change(old)
    if isinstance(old, tuple) and any(isinstance(v, Value) for v in old):
        return rebuilt(old, [inner(v, change) for v in old])
    return old


def parts(value: object) -> Iterator[Value]:
    """A value and all values in it, outermost first; those that stand for numbers (schedules) are no
    parts.
    """
    if isinstance(value, Value):
        yield value
        for field in fields(value):
            if field.kind is None and not field.static:
                yield from parts(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from parts(item)


def scheduled(value: object) -> set[str]:
    """The names of the fields, of `value` and of the values in it, that hold a schedule, or one among their
    numbers.
    """
    return {
        name
        for part in parts(value)
        for name, kind, *_ in fields(part)
        if kind is not None and is_schedule(getattr(part, name))
    }


def is_schedule(value: object) -> bool:
    """Whether a setting, or a number in it, is a function of the clock."""
    values: Any = value if isinstance(value, tuple | list) else (value,)
    return type(value) is not float and any(callable(v) and not is_number(v) for v in values)


def adjustable(value: object) -> list[str]:
    """The names that `adjust` knows: the fields that hold numbers, of `value` and of the values in it."""
    return list(dict.fromkeys(f.name for part in parts(value) for f in fields(part) if f.kind is not None))


def adjusted(value: object, changes: dict[str, Any]) -> Any:
    """`value` with the named numeric fields replaced wherever they occur in it; every constructor check runs
    again.
    """
    if not isinstance(value, Value):
        return value
    new: dict[str, Any] = {}
    for name, kind, static, *_ in fields(value):
        if kind is not None and name in changes:
            new[name] = changes[name]
        elif kind is None and not static:
            new[name] = inner(getattr(value, name), lambda v: adjusted(v, changes))
    result = replaced(value, new)
    result.__post_init__()
    return result


def _bare(cls: type) -> str:
    """What to write for numbers of a class that look like settings, and are none; empty where it has none."""
    for base in cls.__mro__:
        annotated = inspect.get_annotations(base)
        for name, value in vars(base).items():
            if name[0] != "_" and name not in annotated and kind_of(value) is not None:
                return f"; {name} = {value!r} has no annotation: write {name}: float = {value!r}"
    return ""


def refuse_unknown(value: object, names: Iterable[str]) -> None:
    """Raise UnknownField for the first name that `adjust` does not know, listing those it does."""
    known = adjustable(value)
    for name in names:
        if name in known:
            continue
        for part in parts(value):
            if any(f.name == name for f in fields(part)):
                raise UnknownField(
                    f"{type(part).__name__}.{name} belongs to the structure of the rule and cannot be "
                    "adjusted; make a new rule and call `setup` with it"
                )
        cls = type(value)
        raise UnknownField(
            f"{cls.__name__} has no setting {name}; {offered(cls.__name__, name, known)}{_bare(cls)}"
        )
