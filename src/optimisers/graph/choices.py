"""What does a rule compute at some steps alone? Nodes that take new values where a condition holds, else old
ones.

Where the new values are made element by element they are a `where`, which costs nothing in a pass. What the
array library computes for them stands behind one node of several results, `every`, and can be left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

from optimisers.errors import ShapeError, TraceError
from optimisers.graph.expr import Expr, order
from optimisers.graph.symbol import Symbol, lift, make, merged, result_type, within

Values = Sequence[Any]


class Choices:
    """The choices of one trace, and their conditions."""

    def __init__(self) -> None:
        self.conditions: list[Expr] = []

    def __call__(self, condition: Any, compute: Callable[[], Values], olds: Values) -> Values:
        condition = lift(condition)
        if condition.domain != "scalar":
            raise TraceError(
                "every() was given a condition for each element; it takes a scalar one: use where() for "
                "single elements"
            )
        if condition.op == "const":
            return compute() if condition.value else olds
        for g in merged(condition.guard, ()):  # where nothing steps nothing is computed
            condition = make("logical_and", (condition, g))
        self.conditions.append(condition)
        with within((condition,)):
            news = [lift(v) for v in compute()]
        pairs = list(zip(news, map(lift, olds), strict=True))
        apart = [pair for pair in pairs if is_computed(*pair)]
        found = iter(self.node(condition, apart) if apart else ())
        return [
            next(found) if is_computed(*pair) else _outside(make("where", (condition, *pair)), condition)
            for pair in pairs
        ]

    def node(self, condition: Symbol, pairs: Sequence[tuple[Symbol, Symbol]]) -> list[Symbol]:
        """The results of one choice."""
        shapes = tuple(_shape(new, old) for new, old in pairs)
        news, olds = zip(*pairs, strict=True)
        types = tuple(result_type("where", (condition, *pair)) for pair in pairs)
        made = make(
            "every", (condition, *news, *olds), domain="free", type=types[0], options=(("types", types),)
        )
        of_results: Any = None if None in shapes else shapes
        _outside(made, condition).shape_ = of_results
        return [
            make("item", (made,), domain="free", type=kind, options=(("index", i),))
            for i, kind in enumerate(types)
        ]


def is_computed(new: Expr, old: Expr) -> bool:
    """Whether the array library has to do with one of two values: elements of other shapes are in them."""
    return any(e.domain == "free" for e in order([new, old], given=True))


def _outside(e: Symbol, condition: Expr) -> Symbol:
    """A node that has a value also where the condition does not hold."""
    e.guard = tuple(g for g in e.guard if g is not condition)
    return e


def _shape(new: Symbol, old: Symbol) -> tuple[int, ...] | None:
    """The shape of both values; raises ShapeError if they have none in common."""
    if "scalar" in (new.domain, old.domain):
        raise TraceError(
            "every() has a number on one side and an array on the other; write number + zeros(shape, like=x)"
        )
    if None not in (new.shape_, old.shape_) and new.shape_ != old.shape_:
        raise ShapeError(
            f"every() computes an array of shape {new.shape_} where the old one has shape {old.shape_}"
        )
    return new.shape_ if old.shape_ is None else old.shape_
