"""How does an operation find who computes it? It asks its arguments: a symbol writes it into the graph, else
the library of the first array computes it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optimisers.arrays import registry


@dataclass(frozen=True)
class Primitive:
    """One primitive operation: its name, what it does to shapes, and the type of what it gives."""

    name: str
    family: str
    """`elementwise`; `random` (for each element, of scalars alone); `reduce` (to one number, or along an
    axis); `shape` (free in its shape: closes a phase); `made` (of no arguments, beside an array).
    """
    gives: str
    """`same` as the arguments, `real`, `bool`, or `branch`: the type of its arguments after the first."""


OPERATIONS: dict[str, Primitive] = {}
"""All that an engine must know, by name."""


def primitive(
    family: str = "elementwise", gives: str = "same"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a declaration, a signature and a docstring, an operation of the table."""

    def register(declaration: Callable[..., Any]) -> Callable[..., Any]:
        name = declaration.__name__
        OPERATIONS[name] = Primitive(name, family, gives)

        @functools.wraps(declaration)
        def call(*args: object, **options: object) -> Any:
            return dispatch(name, args, options)

        return call

    return register


def dispatch(name: str, args: tuple[object, ...], options: dict[str, object]) -> Any:
    """The value of an operation: written into the graph if an argument is a symbol, else computed by its
    array library.
    """
    for a in args:
        if (write := getattr(type(a), "__operation__", None)) is not None:
            return write(name, args, options)
    return registry.library(*args).operations[name](*args, **options)
