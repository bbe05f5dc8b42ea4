"""What is the state of one array made of? Tuples, NamedTuples, dicts and lists, of arrays and numbers."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import BadState, TraceError
from optimisers.settings import is_number


def flatten(state: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, array or number) for everything in a state, depth first."""
    for key, item in entries(state):
        yield from flatten(item, (*path, key))
    if is_array(state) or is_number(state) or isinstance(state, bool):
        yield path, state


NUMBERS = (float, int, bool)


def values(state: object) -> list[Any]:
    """The arrays and numbers of a state, in the order of `flatten`."""
    if isinstance(state, dict):
        state = tuple(state.values())
    if not isinstance(state, tuple | list):
        return [] if state is None else [state]
    found: list[Any] = []
    for item in state:
        found += values(item) if item is None or isinstance(item, CONTAINERS) else [item]
    return found


CONTAINERS = (tuple, list, dict)


def entries(state: object) -> list[tuple[Any, Any]]:
    """The keys and items of a container in a state; none for what is not one."""
    if isinstance(state, dict):
        return list(state.items())
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return list(state._asdict().items())  # pyright: ignore[reportAttributeAccessIssue] a NamedTuple has it
    if isinstance(state, tuple | list):
        return list(enumerate(state))
    return []


def unflatten(template: object, leaves: Iterator[Any]) -> Any:
    """A state of the form of `template` with its arrays and numbers replaced, in the order of `flatten`."""
    if isinstance(template, dict):
        return {k: unflatten(v, leaves) for k, v in template.items()}
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*(unflatten(v, leaves) for v in template))
    if isinstance(template, tuple | list):
        return type(template)(unflatten(v, leaves) for v in template)
    return template if template is None else next(leaves)


def is_array(x: object) -> bool:
    """Whether `x` is an array of any library, or a symbol that stands for one: those say of themselves
    whether they are numbers.
    """
    symbol = getattr(type(x), "__number__", None)
    return registry.isarray(x) if symbol is None else not symbol(x)


def form(state: object) -> Any:
    """What two states must share to be of one form: containers, keys, and which entries are arrays or
    numbers.
    """
    if type(state) in NUMBERS:
        return "number"
    inner = entries(state)
    if inner or isinstance(state, tuple | list | dict):
        return (type(state), tuple((k, form(v)) for k, v in inner))
    if state is None:
        return None
    if is_array(state):
        return "array"
    if is_number(state) or isinstance(state, bool):
        return "number"
    raise TraceError(f"state holds {state!r}; it takes arrays and numbers, in tuples, NamedTuples and dicts")


# -- comparing, copying, showing ----------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    """Whether two states are of one form and equal in every array and number."""
    if form(a) != form(b):
        return False
    return all(
        np.array_equal(seen(x), seen(y), equal_nan=True)
        for (_, x), (_, y) in zip(flatten(a), flatten(b), strict=True)
    )


def seen(x: Any) -> Any:
    """What stands in a state, as NumPy shows it."""
    return registry.library(x).to_numpy(x) if registry.isarray(x) else x


def copied(state: object, old: object, name: str) -> Any:
    """The state with arrays of its own, in the types of the old one; raises BadState for other shapes."""
    new: list[Any] = []
    for (path, value), (_, was) in zip(flatten(state), flatten(old), strict=True):
        if registry.isarray(was):
            at = "".join(f".{p}" if isinstance(p, str) else f"[{p}]" for p in path)
            if value.shape != was.shape:
                raise BadState(f"{name}{at} has shape {tuple(value.shape)}; it takes {tuple(was.shape)}")
            if reason := registry.no_numbers(value):
                raise BadState(f"{name}{at} {reason}")
            if registry.iscomplex(value) and not registry.iscomplex(was):
                raise BadState(f"{name}{at} is complex; it takes real numbers")
            new.append(registry.library(was).copied(value, was.dtype))
        else:
            new.append(value)
    return unflatten(state, iter(new))


def kinds(state: object) -> str:
    inner = entries(state)
    if inner:
        return f"{type(state).__name__}({', '.join(kinds(v) for _, v in inner)})"
    return (
        "array"
        if registry.isarray(state)
        else "number"
        if not isinstance(state, tuple) and state is not None
        else repr(state)
    )


def short(state: Any) -> str:
    """A state on one line, its arrays abbreviated."""
    if registry.isarray(state):
        library = registry.library(state)
        if math.prod(state.shape) > 6 or library.is_opaque(state):
            return f"{library.type_name(state.dtype)}{list(state.shape)}"
        return np.array2string(seen(state), precision=4, separator=", ").replace("\n", "")
    inner = entries(state)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return f"{type(state).__name__}({', '.join(f'{k}={short(v)}' for k, v in inner)})"
    if isinstance(state, dict):
        return "{" + ", ".join(f"{k!r}: {short(v)}" for k, v in inner) + "}"
    if inner:
        return f"({', '.join(short(v) for _, v in inner)}{',' if len(inner) == 1 else ''})"
    return repr(state)
