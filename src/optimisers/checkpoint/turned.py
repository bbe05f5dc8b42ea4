"""What becomes of the state of a rule when the axes of its parameters are permuted? Asked of the rule itself.

The rule steps a small random array, and the same one turned. Where all its steps are the same but for the
turn, what it keeps of the one is what it keeps of the other: `left` of a matrix is `right` of its transpose,
sums of rows are sums of columns. A rule that tells its axes apart, such as one that scales by the ratio of
rows to columns, is found out by its steps.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import OptimiserError
from optimisers.nest import flatten
from optimisers.rule import EVERY, Rule, further
from optimisers.settings import numbers, parts, skeleton
from optimisers.step.update import setup, update

STEPS = 12
"""So many that what is worked out every tenth step was."""

SIZES = (3, 5, 7, 11, 13)
"""Lengths of the axes of the small array, which have the order of the real ones."""

NEAR = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2}
"""Type of the small array -> how far apart numbers of two orders of summation are; of the types that a rule
takes, the widest.
"""


class Turn(NamedTuple):
    """What every entry of a state is in the state of the turned array."""

    reason: str
    """Why there is no such thing; empty if there is."""
    entries: Mapping[str, tuple[str, tuple[int, ...] | None]]
    """Entry here -> (entry of what was saved, the order in which its axes stand here)."""


_known: dict[Any, Turn] = {}


def turned(rule: Rule, shape: tuple[int, ...], axes: tuple[int, ...]) -> Turn:
    """The turn of a state for parameters of a shape, whose axes are those of what was saved in this order."""
    real = tuple(sorted({n for n in shape if n > 1}))
    if len(real) > len(SIZES):
        return Turn(f"{rule!r} was not tried with {len(shape)} axes", {})
    small = {n: SIZES[real.index(n)] if n > 1 else n for n in shape}
    key = skeleton(rule), tuple(numbers(rule)), tuple(small[n] for n in shape), axes
    if key not in _known:
        _known[key] = _first(rule, key[2], axes)
    return _known[key]


def _first(rule: Rule, shape: tuple[int, ...], axes: tuple[int, ...]) -> Turn:
    """The turn that is found in the widest type that the rule takes."""
    said = ""
    for kind in NEAR:
        try:
            return _tried(rule, shape, axes, kind)
        except (OptimiserError, TypeError, ValueError, ArithmeticError) as error:
            said = said or str(error)
    return Turn(f"{rule!r} could not be tried on a small array: {said}", {})


def _tried(rule: Rule, shape: tuple[int, ...], axes: tuple[int, ...], kind: str) -> Turn:
    rng = np.random.default_rng(0)
    back = tuple(np.argsort(axes).tolist())
    x, *grads = [rng.standard_normal(shape).astype(kind) for _ in range(1 + STEPS)]
    near = NEAR[kind]
    here, at_here = _trained(rule, x, grads)
    saved, at_saved = _trained(rule, x.transpose(back), [g.transpose(back) for g in grads])
    if not _near(at_here, at_saved.transpose(axes), near):
        return Turn(f"{rule!r} steps an array whose axes are permuted another way", {})
    found: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for entry, value in here.items():
        match = _match(entry, value, saved, axes, near)
        if match is None:
            return Turn(f"{rule!r} keeps {entry!r}, which is no array of the turned state", {})
        found[entry] = match
    return Turn("", found)


def _trained(rule: Rule, x: Any, grads: Sequence[Any]) -> tuple[dict[str, Any], Any]:
    """(what the rule keeps, the parameters) after some steps."""
    model: Any = [np.array(x)]
    state: Any = setup(rule, model, engine="interpret")
    takes = [further(type(part))[1] for part in parts(rule) if isinstance(part, Rule)]
    more = max((count for count in takes if count < EVERY), default=0)
    with np.errstate(all="ignore"):
        for n, g in enumerate(grads):
            second = [[np.abs(g)]] * more
            state, model = update(state, model, [np.array(g)], *second, loss=1 / (1 + n))
    kept = {".".join(map(str, path)) or "state": value for path, value in flatten(state[0].state)}
    return {entry: value for entry, value in kept.items() if registry.isarray(value)}, model[0]


def _match(
    entry: str, value: Any, saved: Mapping[str, Any], axes: tuple[int, ...], near: float
) -> tuple[str, tuple[int, ...] | None] | None:
    """Which array of the other state this one is: its namesake if that will do."""
    for name in (entry, *(other for other in saved if other != entry)):
        other = saved.get(name)
        if other is None or other.ndim != value.ndim:
            continue
        every = itertools.permutations(range(other.ndim))
        for order in dict.fromkeys((axes, *every) if len(axes) == other.ndim else every):
            turned_there = other.transpose(order)
            if turned_there.shape == value.shape and _near(value, turned_there, near):
                return name, order
    return None


def _near(a: Any, b: Any, near: float) -> bool:
    """Whether two arrays are the same but for the order in which they were summed."""
    one, other = a.astype(np.float64), b.astype(np.float64)
    size = max(float(np.abs(one).max(initial=0)), 1e-30)
    return bool(np.isfinite(size) and np.abs(one - other).max(initial=0) <= near * size)
