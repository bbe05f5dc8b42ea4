"""Do the arrays of a step fit what `setup` saw?"""

from typing import TYPE_CHECKING, Any

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import TreeMismatch

if TYPE_CHECKING:
    from optimisers.engines.task import Step


def local_shape(step: "Step", leaf: int) -> tuple[int, ...]:
    """The shape of a leaf as a traced step sees it: inside a map over shards parameters and state are
    smaller than `setup` saw.
    """
    x, seen = step.xs[leaf], step.shapes[leaf]
    local = tuple(getattr(x, "shape", seen))
    if local == seen or not registry.isarray(x) or not step.library.shards.is_part(x):
        return seen
    state = [p[leaf] for p in step.slots if p.places.shapes[leaf] == seen and len(p.buffers) == len(p)]
    return local if all(tuple(a.shape) == local for a in state) else seen


def checked_x(step: "Step", leaf: int) -> Any:
    """The parameters of a leaf; raises TreeMismatch unless they are of the kind that `setup` saw."""
    x, name, library, kind = step.xs[leaf], step.code(leaf, "model"), step.library, step.kind
    if registry.library_of(type(x)) is not library:
        raise TreeMismatch(f"{name} is {_brief(x)}; `setup` saw an array of {library.name}")
    kinds = (("shape", tuple(x.shape), step.shapes[leaf]), ("type", x.dtype, kind.dtype))
    for what, found, seen in kinds:
        if found != seen:
            raise TreeMismatch(
                f"{name} has {what} {found}; `setup` saw {seen}; call `setup` again for another model"
            )
    if not step.job.traced and library.device(x) != kind.device:
        raise TreeMismatch(
            f"{name} is on {library.device(x)}; `setup` saw it on {kind.device}, where its state "
            "is; call `setup` again after moving a model"
        )
    return x


def checked_gradient(step: "Step", order: int, leaf: int) -> Any:
    """The gradient of a leaf as an array; raises TreeMismatch if it does not fit: nothing is broadcast."""
    dx, shape, library = step.grads[order][leaf], step.shapes[leaf], step.library
    name = step.code(leaf, "grads" if order == 0 else f"grads{order + 1}")
    if not registry.isarray(dx):
        found = library.scalar_array(dx) if shape == () else None
        if found is None:
            raise TreeMismatch(
                f"{name} is {_brief(dx)}; it takes an array of shape {shape}, or None for no step"
            )
        dx = found
    if registry.library_of(type(dx)) is not library:
        raise TreeMismatch(f"{name} is {_brief(dx)}; the parameters are arrays of {library.name}")
    where, here = library.device(dx), library.device(step.xs[leaf])
    if where != here and not step.job.traced:
        raise TreeMismatch(f"{name} is on {where}; the parameters are on {here}; move it there")
    if tuple(dx.shape) != shape:
        raise TreeMismatch(f"gradient of shape {tuple(dx.shape)} for parameters of shape {shape}, at {name}")
    dx = dx if library.sparse is None else library.sparse.dense(dx)
    if reason := registry.no_numbers(dx):
        raise TreeMismatch(f"{name} {reason}, or None for no step")
    if registry.iscomplex(dx) and not registry.iscomplex(step.xs[leaf]):
        raise TreeMismatch(f"{name} is complex for real parameters; take its real part")
    return dx


def _brief(value: object) -> str:
    kind = type(value).__name__
    if isinstance(value, np.generic):
        return f"the number {value}"
    text = repr(value) if isinstance(value, int | float | complex | str) else ""
    return f"the Python {kind} {text}" if text else f"of type {kind}"
