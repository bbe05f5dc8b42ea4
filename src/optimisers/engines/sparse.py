"""Gradients that touch some rows only: the interpreter steps those rows, of rules that allow it."""

import dataclasses
from typing import Any

from optimisers.arrays import registry
from optimisers.engines.interpret import Interpreter
from optimisers.engines.task import Job, Result
from optimisers.errors import TreeMismatch
from optimisers.rule import Rule
from optimisers.settings import parts
from optimisers.state.buffers import Indices, Loose


def by_rows(rule: Rule) -> bool:
    """Whether a rule, and every rule that it is made of, may leave rows alone whose gradient is 0."""
    return all(part.lazy for part in parts(rule) if isinstance(part, Rule))


class Rows(Interpreter):
    """Leaves whose gradients are sparse along the first axis: a job of the rows that are touched."""

    def __init__(self, job: Job) -> None:
        self.whole, library = job, job.library
        given = [library.rows(self.checked(job, i)) for i in range(len(job.row))]
        self.rows = [rows for rows, _ in given]
        picked = [library.taken(job.checked_x(i), rows) for i, rows in enumerate(self.rows)]
        shapes = [tuple(x.shape) for x in picked]
        slots = [self.picked(pack, shapes) for pack in job.slots]
        super().__init__(
            dataclasses.replace(
                job,
                x=picked,
                grads=([values for _, values in given],),
                slots=tuple(slots),
                out=tuple(pack.copy() for pack in slots),
                shapes=shapes,
                inplace=False,
            )
        )

    @staticmethod
    def checked(job: Job, leaf: int) -> Any:
        g = job.grads[0][leaf]
        if tuple(g.shape) != job.shapes[leaf]:
            raise TreeMismatch(
                f"gradient of shape {tuple(g.shape)} for parameters of shape {job.shapes[leaf]}, at "
                f"{job.code(leaf, 'grads')}"
            )
        return g

    def picked(self, pack: Any, shapes: list[tuple[int, ...]]) -> Loose:
        """The touched rows of a state array of every leaf."""
        arrays = [pack.library.taken(pack[i], rows) for i, rows in enumerate(self.rows)]
        places = dataclasses.replace(pack.places, shapes=shapes, number=range(len(shapes)))
        return Loose(pack.name, pack.dtype, pack.device, places, arrays)

    def written(self) -> tuple[Indices, Indices]:
        return Interpreter.memory(self.whole)

    def commit(self) -> Result:
        result, job = super().commit(), self.whole
        library = job.library
        for new, pack, old in zip(self.job.out, job.out, job.slots, strict=True):
            for i, rows in enumerate(self.rows):
                if pack is not old:
                    pack.put(i, old[i])
                library.put_rows(pack[i], rows, new[i])
        xs = [x if job.inplace else library.duplicate(x) for x in job.x]
        for x, rows, new in zip(xs, self.rows, result.x, strict=True):
            library.put_rows(x, rows, new)
        if not job.inplace:
            xs = [library.like(old, x) for old, x in zip(job.x, xs, strict=True)]
        return Result(xs if not job.inplace else job.x, result.counters, result.of_leaf)


def sparse(grads: Any) -> list[bool]:
    """Which gradients touch only some rows."""
    return [g is not None and registry.library(g).has_rows(g) for g in grads]
