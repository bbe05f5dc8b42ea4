"""What do the counters of a rule come to after a number of steps? For a step count that was written.

The sum of the weights in an average, and a count of steps, are made anew from themselves, in the same way at
every step: s' = a s + b. So what they come to follows from how many steps there were. Other counters have a
history of their own: a distance, a product of momenta that change.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from optimisers.arrays.numpy import library as host
from optimisers.arrays.registry import isarray
from optimisers.graph.cached import cached
from optimisers.graph.clocks import UPDATES
from optimisers.graph.expr import Expr, order
from optimisers.graph.scalars import is_plain
from optimisers.graph.trace import Program
from optimisers.nest import values


class Course(NamedTuple):
    """How a counter goes on from step to step."""

    clock: int
    """What counts its steps: UPDATES, or the number of a hidden counter."""
    place: int
    """Its own number among the scalars."""
    start: float
    new: Expr
    """Its value after one more step."""
    mark: bool
    """Whether that is the same whatever it was before: it says that there was a step."""

    def after(self, steps: float, hypers: Sequence[float]) -> float:
        """The counter after so many steps with these hyper-parameters, schedules at their present value."""
        factor, shift = _line(self.new, self.place, hypers, steps)
        if self.mark:
            return shift
        if factor == 1:
            return self.start + steps * shift
        share = factor**steps
        return self.start * share + (1 - share) * (shift / (1 - factor))


@cached
def courses(program: Program) -> dict[int, Course]:
    """The counters of a program that follow from how many steps there were, by their number among the
    scalars.
    """
    known = len(program.new_counters) - program.hidden
    bare = [_unconditional(e, program.hypers + n) for n, e in enumerate(program.new_counters)]
    clocks = {tuple(map(id, c)): program.hypers + n for n, (_, c) in enumerate(bare[known:], known)}
    clocks[()] = UPDATES
    starts = [v for v in values(program.template) if not isarray(v)]
    found: dict[int, Course] = {}
    for at, (start, (new, conditions)) in enumerate(zip(starts, bare[:known], strict=True), program.hypers):
        clock = clocks.get(tuple(map(id, conditions)))
        stays = new.op == "number" and new.value == at
        if clock is not None and not stays and is_plain(new) and _is_linear(new, at, program.hypers):
            mark = not any(e.op == "number" and e.value == at for e in order([new]))
            found[at] = Course(clock, at, float(start), new, mark)
    return found


def _unconditional(e: Expr, at: int) -> tuple[Expr, list[Expr]]:
    """(the new value of scalar number `at` where it has one, the conditions for that)."""
    conditions: list[Expr] = []
    while e.op == "where" and e.args[2].op == "number" and e.args[2].value == at:
        conditions.append(e.args[0])
        e = e.args[1]
    return e, conditions


_LINES: dict[str, Callable[..., tuple[float, float]]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "subtract": lambda a, b: (a[0] - b[0], a[1] - b[1]),
    "negative": lambda a: (-a[0], -a[1]),
    "multiply": lambda a, b: (a[0] * b[1] + a[1] * b[0], a[1] * b[1]),
    "divide": lambda a, b: (a[0] / b[1], a[1] / b[1]),
    "scheduled": lambda a: a,
}
"""What operations make of straight lines, (slope, value at 0)."""


def _is_linear(new: Expr, at: int, hypers: int) -> bool:
    """Whether a value is a straight line in scalar number `at`, and depends on no other counter."""
    moved = set[int]()
    for e in order([new]):
        if e.op == "number" and e.value != at and e.value >= hypers:
            return False
        of = [id(a) in moved for a in e.args]
        bent = (e.op == "multiply" and all(of)) or (e.op == "divide" and of[1])
        if any(of) and (e.op not in _LINES or bent):
            return False
        if any(of) or (e.op == "number" and e.value == at):
            moved.add(id(e))
    return True


def _line(new: Expr, at: int, hypers: Sequence[float], clock: float) -> tuple[float, float]:
    """(slope, value at 0) of the straight line that a value is in scalar number `at`."""
    found: dict[int, tuple[float, float]] = {}
    for e in order([new]):
        lines = [found[id(a)] for a in e.args]
        if e.op == "const":
            line = 0.0, float(e.value)
        elif e.op == "number":
            line = (1.0, 0.0) if e.value == at else (0.0, float(hypers[e.value]))
        elif e.op == "clock":
            line = 0.0, float(clock)
        elif e.op in _LINES:
            line = _LINES[e.op](*lines)
        else:
            operation: Any = host.operations[e.op]
            line = 0.0, operation(*(value for _, value in lines))
        found[id(e)] = line
    return found[id(new)]
