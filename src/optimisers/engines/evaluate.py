"""What are the values of lowered nodes? Those that an array library computes, one operation after the other.

The interpreter, the operations of XLA and the functions that CuPy fuses are all this one function: it knows
the graph, the library knows its arrays, and whoever asks says where arrays and scalars come from.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from optimisers.arrays.protocol import Library
from optimisers.arrays.types import real_of
from optimisers.graph.expr import Expr, order

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
    found = {} if found is None else found
    apply: Callable[[str], Callable[..., Any]] = operation or library.operations.__getitem__
    types = {"bool": np.dtype(bool), "real": real_of(library, wide), "complex": wide}
    convert: Callable[[Any, Any], Any] = cast or library.cast
    for e in order(roots, found):
        args = [found[id(a)] for a in e.args]
        match e.op:
            case "load":
                found[id(e)] = convert(given(e), types[e.type])
            case "column":
                found[id(e)] = given(e)
            case "const":
                found[id(e)] = constant(e, library, types[e.type])
            case "cast" if e.type == "bool":
                found[id(e)] = args[0] != library.number(0, types[e.args[0].type])
            case "cast":
                found[id(e)] = convert(args[0], types[e.type])
            case "spread" | "store":
                found[id(e)] = args[0]
            case "random_word" | "where" if e.domain != "scalar":  # which may know no type of their own
                found[id(e)] = convert(apply(e.op)(*args, **dict(e.options)), types[e.type])
            case "call":
                found[id(e)] = apply("call")(dict(e.options)["function"], *args)
            case op:
                found[id(e)] = apply(op)(*args, **dict(e.options))
    return found


def constant(e: Expr, library: Any, dtype: Any) -> Any:
    """What a rule wrote: a number in the type of the arithmetic, an array as it is."""
    if e.domain == "free":
        return e.value
    return np.bool_(e.value) if e.type == "bool" else library.number(e.value, dtype)
