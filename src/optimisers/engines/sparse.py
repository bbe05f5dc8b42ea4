"""Gradients that touch some rows only: the interpreter steps those rows, of rules that allow it."""

import dataclasses
from typing import Any

from optimisers.arrays import registry
from optimisers.engines import interpret
from optimisers.engines.checks import checked_x
from optimisers.engines.memory import Spans, looked
from optimisers.engines.task import Engine, Step
from optimisers.errors import TreeMismatch
from optimisers.graph.passes import draws
from optimisers.rule import Rule
from optimisers.settings import parts
from optimisers.state.buffers import FlatBuffers, Separate
from optimisers.state.group import Group


def by_rows(rule: Rule) -> bool:
    """Whether a rule, and every rule that it is made of, may leave rows alone whose gradient is 0."""
    return all(part.lazy for part in parts(rule) if isinstance(part, Rule))


def allowed(group: Group) -> bool:
    """The same for the rule of a group; remembered by the group."""
    if group.cache.by_rows is None:
        group.cache.by_rows = by_rows(group.rule) and not draws(group.program)
    return group.cache.by_rows


def sparse(grads: list[Any]) -> list[bool]:
    """Which gradients touch only some rows."""
    kinds = [None if g is None else registry.library(g).sparse for g in grads]
    return [kind is not None and kind.has_rows(g) for kind, g in zip(kinds, grads, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """The arrays of which the step sees the rows that are touched."""

    rows: list[Any]
    """The rows of each leaf."""
    slots: tuple[FlatBuffers, ...]
    out: tuple[FlatBuffers, ...]


def begin(step: Step) -> None:
    """Put the rows that are touched in the place of parameters, gradients and state."""
    by, leaves = step.library.sparse, range(step.leaves)
    given = [by.rows(_checked(step, i)) for i in leaves]
    rows = [found for found, _ in given]
    xs = [by.taken(checked_x(step, i), rows[i]) for i in leaves]
    step.work = Whole(rows, step.slots, step.out)
    step.xs, step.grads = xs, ([values for _, values in given],)
    step.shapes = [tuple(x.shape) for x in xs]
    step.slots = tuple(_picked(slot, rows, step.shapes) for slot in step.slots)
    step.out = tuple(slot.copy() for slot in step.slots)
    interpret.begin(step)


def _checked(step: Step, leaf: int) -> Any:
    g = step.grads[0][leaf]
    if tuple(g.shape) != step.shapes[leaf]:
        raise TreeMismatch(
            f"gradient of shape {tuple(g.shape)} for parameters of shape {step.shapes[leaf]}, at "
            f"{step.code(leaf, 'grads')}"
        )
    return g


def _picked(slot: FlatBuffers, rows: list[Any], shapes: list[tuple[int, ...]]) -> Separate:
    """The touched rows of a state array of every leaf."""
    arrays = [slot.library.sparse.taken(slot[i], found) for i, found in enumerate(rows)]
    places = dataclasses.replace(slot.places, shapes=shapes, number=range(len(shapes)))
    return Separate(slot.name, slot.dtype, slot.device, places, arrays)


def spans(step: Step) -> Spans:
    """The memory of the whole arrays."""
    whole: Whole = step.work
    return looked(step.library, step.job.xs, whole.out, step.job.subset)


def finish(step: Step) -> None:
    """Bring the rows home."""
    whole: Whole = step.work
    library, job = step.library, step.job
    for new, slot, old in zip(step.out, whole.out, whole.slots, strict=True):
        for i, rows in enumerate(whole.rows):
            if slot is not old:
                slot.put(i, old[i])
            library.sparse.put_rows(slot[i], rows, new[i])
    touched, step.new = step.new, {}
    for i, (x, rows) in enumerate(zip(job.xs, whole.rows, strict=True)):
        to = x if job.inplace else library.duplicate(x)
        library.sparse.put_rows(to, rows, touched.get(i, step.xs[i]))
        if not job.inplace:
            step.new[i] = library.like(x, to)


ENGINE = Engine("rows", lambda _: "", begin, interpret.reduce, interpret.prepare, spans, finish=finish)
"""Leaves whose gradients are sparse along the first axis."""
