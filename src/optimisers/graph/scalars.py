"""What are the scalars of a step? One value for a row of scalars, or for a leaf where a reduction is in it.

`Scalars` holds those of one group of leaves. It is asked for values, computes what they need from the table
of numbers, and keeps them: with NumPy in float64, or by the library that the table belongs to,
where a transform traces the numbers. Reductions and totals are put in from outside, as soon as
they are known.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays.numpy import library as host
from optimisers.graph.cached import cached
from optimisers.graph.expr import GIVEN, INFIX, Expr, is_full_reduction, order

Table = np.ndarray[Any, np.dtype[np.float64]]

FEW = 4
"""Rows that are computed one by one, by numbers: vectors of so few take longer."""


class Scalars:
    """The values of scalar nodes for leaves that share a program.

    `numbers` is the table (rows, numbers), `clock` that of each row, `row` the row of each leaf, `sizes` its
    number of elements, `names` its number in two halves, for random numbers. `last` are the counters that the
    step ends with, which share most of what they need with the scalars of its passes.
    """

    def __init__(
        self,
        numbers: Any,
        row: Any,
        sizes: Any,
        clock: Any,
        library: Any = host,
        names: Any = None,
        last: tuple[Expr, ...] = (),
    ) -> None:
        self.numbers, self.row, self.sizes, self.clock, self.names = numbers, row, sizes, clock, names
        self.library, self.last = library, last
        self.values: dict[int, Any] = {}
        self.leafy: set[int] = set()
        """Those values that differ from leaf to leaf."""
        self.spoilt: Any = None
        """What is added to all that `symbols` gives: NaN where a check has failed that cannot raise."""

    @property
    def near(self) -> "Scalars":
        """The scalars that are computed here."""
        return self

    @property
    def on_host(self) -> bool:
        """Whether NumPy computes them, of NumPy's numbers."""
        return self.library is host and isinstance(self.numbers, np.ndarray)

    def put(self, e: Expr, value: Any, *, of_leaf: bool) -> None:
        """Say what a reduction (a value for each leaf) or a total (one for all) came to."""
        self.values[id(e)] = value
        if of_leaf:
            self.leafy.add(id(e))

    def fetch(self, wanted: Sequence[Expr]) -> None:
        """Bring nodes to the host, for those that compute elsewhere."""

    def ahead(self, wanted: Sequence[Expr]) -> None:
        """Compute at one stroke those nodes that depend on nothing but numbers of the host and the clock."""
        if len(wanted) < 2 or not self.on_host:
            return
        plain = plain_of(*wanted, *self.last)
        if self.values:
            plain = tuple([e for e in plain if id(e) not in self.values])
        if len(plain) < 2:
            return
        single = len(self.numbers) == 1
        columns, clock = (self.numbers[0], self.clock[0]) if single else (self.numbers.T, self.clock)
        found = written_out(*plain, single=single)(columns, clock)
        self.values.update(zip(map(id, plain), found, strict=True))

    def by_row(self, scalars: tuple[Expr, ...]) -> Table | None:
        """The table of a pass, computed at one stroke for a few rows, and the last counters; None where it
        depends on more than numbers of the host and the clock.
        """
        wanted, count = (*scalars, *self.last), len(scalars)
        few = scalars and not self.values and len(self.numbers) <= FEW and self.on_host
        if not few or len(plain_of(*wanted)) < len(wanted):
            return None
        table = np.array(list(map(written_out(*wanted, single=True), self.numbers, self.clock)), np.float64)
        self.values.update(zip(map(id, self.last), table.T[count:], strict=True))
        return np.ascontiguousarray(table[:, :count])

    def differ(self, nodes: Sequence[Expr]) -> bool:
        """Whether one of some nodes, whose values are known, differs from leaf to leaf."""
        return bool(self.leafy) and not self.leafy.isdisjoint(map(id, nodes))

    def get(self, e: Expr) -> Any:
        """The value of a scalar node: an array over rows, over leaves, or a number for all."""
        if id(e) not in self.values:
            for node in below(e):
                if id(node) not in self.values:
                    self.compute(node)
        return self.values[id(e)]

    def compute(self, e: Expr) -> None:
        """The value of a node whose arguments are known."""
        leafy = False
        if e.op == "const":
            value: Any = e.value
        elif e.op == "number":
            value = self.numbers[:, e.value]
        elif e.op == "clock":
            value = self.library.scalars.constant(self.clock, self.numbers)
        elif e.op == "size":
            value, leafy = self.library.scalars.constant(self.sizes, self.numbers), True
        elif e.op == "leaf":
            value, leafy = self.library.scalars.constant(self.names[e.value], self.numbers), True
        elif e.op == "scheduled":
            value = self.values[id(e.args[0])]
            if e.options:
                value = self.library.scalars.mapped(dict(e.options)["function"], value)
        elif is_full_reduction(e) or e.op in ("total", *GIVEN):
            raise LookupError(f"{e.op} is not known yet")
        else:
            values = [self.values[id(a)] for a in e.args]
            leafy = self.differ(e.args)
            if leafy:
                values = [self.spread(v, a) for v, a in zip(values, e.args, strict=True)]
            value = self.library.operations[e.op](*values)
        self.put(e, value, of_leaf=leafy)

    def spread(self, value: Any, e: Expr) -> Any:
        """A value over rows as one over leaves."""
        if id(e) in self.leafy or np.ndim(value) == 0:
            return value
        return value[self.row] if len(value) != 1 else value

    def of_leaves(self, e: Expr) -> Any:
        """The value of a scalar node for every leaf, as an array."""
        return self.library.broadcast(self.spread(self.get(e), e), (len(self.row),))

    def total(self, join: str, e: Expr) -> Any:
        """What a reduction makes of a scalar node over the leaves."""
        found = self.library.operations[join](self.of_leaves(e))
        return float(found) if self.library is host else found

    def symbols(self, scalars: tuple[Expr, ...]) -> tuple[Any, Any]:
        """The same as `table`, in arrays of the library."""
        found = [self.get(e) for e in scalars]
        if self.spoilt is not None:
            found = [v + self.spoilt for v in found]
        leafy = self.differ(scalars)
        if leafy:
            found = [self.spread(v, e) for v, e in zip(found, scalars, strict=True)]
        rows = len(self.row) if leafy else len(self.numbers)
        row = np.arange(rows) if leafy else self.row
        return (self.library.scalars.columns(found, rows) if found else self.numbers[:, :0]), row

    def table(self, scalars: tuple[Expr, ...]) -> tuple[Table, Any]:
        """(values, row of each leaf): the scalar table of a pass, one column a node; a row for
        leaves whose scalars are equal, or for each.
        """
        out = self.by_row(scalars)
        if out is not None:
            return out, self.row
        self.ahead(scalars)
        known = self.values
        found = [known[id(e)] if id(e) in known else self.get(e) for e in scalars]
        if self.differ(scalars):
            found = [self.spread(v, e) for v, e in zip(found, scalars, strict=True)]
            rows, row = len(self.row), np.arange(len(self.row))
        else:
            rows, row = len(self.numbers), self.row
        out = np.empty((rows, len(scalars))) if scalars else np.zeros((rows, 1))
        for i, v in enumerate(found):
            out[:, i] = v
        return out, row


@cached
def below(e: Expr) -> tuple[Expr, ...]:
    """A scalar node and all it is made of, arguments first; reductions and totals are given, so not what is
    in them.
    """
    return tuple(order([e], given=True))


@cached
def is_plain(e: Expr) -> bool:
    """Whether a scalar node is made of numbers of a rule and the clock alone."""
    return not any(
        is_full_reduction(n) or n.op in ("size", "leaf", "total", *GIVEN) or is_called(n) for n in below(e)
    )


def is_called(e: Expr) -> bool:
    """Whether a node is a schedule that can only be called."""
    return e.op == "scheduled" and bool(e.options)


@cached
def plain_of(first: Expr, *others: Expr) -> tuple[Expr, ...]:
    """Those nodes that are such."""
    return tuple(filter(is_plain, (first, *others)))


_WRITTEN = INFIX.keys() - {"power", "logical_and", "logical_or"}
"""Operations that Python writes so for numbers of NumPy as well as for its arrays."""


@cached
def written_out(first: Expr, *others: Expr, single: bool) -> Callable[[Any, Any], tuple[Any, ...]]:
    """A function (columns of numbers, clock) -> the values of plain nodes, without a look at the graph.

    `single` ones take the numbers of the only row.
    """
    wanted = (first, *others)
    known: dict[str, Any] = {}
    names: dict[int, str] = {}
    lines: list[str] = []
    for i, e in enumerate(order(wanted)):
        args = [names[id(a)] for a in e.args]
        name = names[id(e)] = f"v{i}"
        if e.op == "const":
            known[name] = e.value
            continue
        if e.op == "number":
            text = f"columns[{e.value}]"
        elif e.op == "clock":
            text = "clock"
        elif e.op == "scheduled":
            text = args[0]
        elif e.op in _WRITTEN:
            text = f"{args[0]} {INFIX[e.op]} {args[1]}"
        elif e.op == "where" and single:
            text = f"{args[1]} if {args[0]} else {args[2]}"
        else:
            known[f"op_{e.op}"] = host.operations[e.op]
            text = f"op_{e.op}({', '.join(args)})"
        lines.append(f"    {name} = {text}\n")
    answer = "".join(f"{names[id(e)]}, " for e in wanted)
    exec(f"def values(columns, clock):\n{''.join(lines)}    return ({answer})\n", known)  # noqa: S102 made here
    return known["values"]


def counters(values: Scalars, new: tuple[Expr, ...]) -> tuple[list[Any], bool]:
    """The new counters of a step, and whether they differ from leaf to leaf."""
    values.ahead(new)
    known = values.values
    found = [known[id(e)] if id(e) in known else values.get(e) for e in new]
    leafy = values.differ(new)
    if leafy:
        found = [values.spread(v, e) for v, e in zip(found, new, strict=True)]
    return found, leafy
