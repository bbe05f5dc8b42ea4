"""What are the values of lowered nodes? Those that an array library computes, one operation after the other.

The interpreter, the operations of XLA and the functions that CuPy fuses are all this one function: it knows
the graph, the library knows its arrays, and whoever asks says where arrays and scalars come from.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from optimisers.arrays.protocol import Library
from optimisers.arrays.types import real_of
from optimisers.graph.expr import Expr, news_of, olds_of, order

Values = dict[int, Any]
"""The value of each lowered node, by id."""


def evaluate(
    roots: Iterable[Expr],
    given: Callable[[Expr], Any],
    library: Library[Any, Any],
    wide: Any,
    found: Values | None = None,
    operation: Callable[[str], Callable[..., Any]] | None = None,
    cast: Callable[[Any, Any], Any] | None = None,
) -> Values:
    """The values of the roots and of all below them, by id, with arithmetic in the type `wide`.

    `given` has the array of a `load`, as it lies in memory, and the number of a `column`; `found` has values
    that are known already, and gets the new ones. `operation` gives the functions; that of random words
    knows how many elements they are for.
    """
    types = {"bool": np.dtype(bool), "real": real_of(library, wide), "complex": wide}
    apply: Callable[[str], Callable[..., Any]] = operation or library.operations.__getitem__
    how = _Evaluation(library, types, given, apply, cast or library.cast, {} if found is None else found)
    return how.values(roots)


@dataclasses.dataclass(frozen=True, eq=False)
class _Evaluation:
    """What is found of a graph, and how."""

    library: Library[Any, Any]
    types: dict[str, Any]
    given: Callable[[Expr], Any]
    apply: Callable[[str], Callable[..., Any]]
    cast: Callable[[Any, Any], Any]
    found: Values

    def values(self, roots: Iterable[Expr]) -> Values:
        for e in order(roots, self.found, always=True):
            self.found[id(e)] = self.chosen(e) if e.op == "every" else self.value(e)
        return self.found

    def value(self, e: Expr) -> Any:
        """The value of a node whose arguments are known."""
        args, dtype, options = [self.found[id(a)] for a in e.args], self.types[e.type], dict(e.options)
        match e.op:
            case "load":
                found = self.cast(self.given(e), dtype)
            case "column":
                found = self.given(e)
            case "const":
                found = constant(e, self.library, dtype)
            case "cast" if e.type == "bool":
                found = args[0] != self.library.scalars.number(0, self.types[e.args[0].type])
            case "cast":
                found = self.cast(args[0], dtype)
            case "spread" | "store":
                found = args[0]
            case "random_word" | "where" if e.domain != "scalar":  # which may know no type of their own
                found = self.cast(self.apply(e.op)(*args, **options), dtype)
            case "call":
                found = self.apply("call")(options["function"], *args)
            case op:
                found = self.apply(op)(*args, **options)
        return found

    def chosen(self, e: Expr) -> Any:
        """The results of a choice. New ones may be computed inside a transform, of which nothing is kept but
        they: so their scalars are known before.
        """
        for column in order(news_of(e), self.found):
            if column.op == "column":
                self.found[id(column)] = self.given(column)
        sides = [functools.partial(self.side, roots) for roots in (news_of(e), olds_of(e))]
        return self.apply("every")(self.found[id(e.args[0])], *sides)

    def side(self, roots: tuple[Expr, ...]) -> tuple[Any, ...]:
        """The values of one side of a choice."""
        inner = dataclasses.replace(self, found=dict(self.found)).values(roots)
        return tuple(inner[id(e)] for e in roots)


def constant(e: Expr, library: Any, dtype: Any) -> Any:
    """What a rule wrote: a number in the type of the arithmetic, an array as it is."""
    if e.domain == "free":
        return e.value
    return np.bool_(e.value) if e.type == "bool" else library.scalars.number(e.value, dtype)
