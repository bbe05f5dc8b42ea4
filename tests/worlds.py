"""What tests of all engines share: rules by types, models for them, and how results are compared."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

import optimisers as opt
from tests.table import (
    Row,
    numbers,
)

ENGINES = ("interpret", "numba")


COMPLEX_PAIRS = ("Adam", "SignDecay", "ClipNorm-2", "Chain-accumulate-clip-AdamW", "LongestSeen", "RowScaled")
"""Rows of which both kinds of update are tried on complex numbers too."""


def arrays_of(row: Row, dtype: str, seed: int = 0) -> list[Any]:
    """A model of the shapes that a rule takes."""
    rng = np.random.default_rng(seed)
    return [numbers(rng, shape, dtype) for shape in row.shapes()]


def gradients_of(row: Row, dtype: str, steps: int = 7) -> list[list[Any]]:
    return [arrays_of(row, dtype, seed=100 + n) for n in range(steps)]


def bits(a: Any) -> bytes:
    """An array by its bytes: NaN equals itself, 0 does not equal -0."""
    return repr((np.shape(a), str(a.dtype))).encode() + np.ascontiguousarray(a).tobytes()


def leaves(state: Any) -> list[opt.Leaf]:
    """Every leaf of a state, depth first."""
    if isinstance(state, opt.Leaf):
        return [state]
    if not isinstance(state, opt.Branch):
        return []
    children = [state[k] for k in state] if isinstance(next(iter(state), None), str) else list(state)
    return [leaf for child in children for leaf in leaves(child)]


def numbers_in(state: Any) -> list[Any]:
    """Arrays and numbers in the state of one leaf, depth first."""
    if isinstance(state, dict):
        return [x for v in state.values() for x in numbers_in(v)]
    if isinstance(state, tuple):
        return [x for v in state for x in numbers_in(v)]
    return [] if state is None else [state]


def trained(
    rule: Any, model: Any, gradients: Any, step: Callable[..., Any] = opt.update, engine: str | None = None
) -> Any:
    """(state, model) after a step for each of the gradients; the model given is not written."""
    model = copy.deepcopy(model)
    state = opt.setup(rule, model, engine=engine)
    for grads in gradients:
        state, model = step(state, model, grads)
    return state, model


EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "complex64": 2.0**-23}


def close(a: Any, b: Any, dtype: str) -> bool:
    """To one unit of a half store, or a few of the arithmetic, of values of about 1."""
    units = {"float16": 1, "bfloat16": 1}.get(dtype, 16)
    wide = complex if dtype.startswith("complex") else float
    a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
    limit = units * EPS.get(dtype, 2.0**-52) * np.maximum(1, np.abs(b))
    return bool((np.abs(a - b) <= limit).all())
