"""The scalars of a group's leaves: hyper-parameters, then counters, a row for each history."""

from typing import Any

import numpy as np

from optimisers.arrays import registry

Table = np.ndarray[Any, np.dtype[np.float64]]


def duplicated(numbers: Any) -> Any:
    """A table of numbers, to be changed apart from the old one."""
    return registry.library(numbers).duplicate(numbers)


def as_kind(kind: type, value: Any) -> Any:
    if not isinstance(value, float | np.floating):
        library = registry.library(value)
        if library.HOST_NUMBERS or not library.is_fixed(value):
            return value  # somebody follows it
        value = float(str(library.to_numpy(value)))  # 0.001, not 0.0010000000474974513
    return (
        int(value) if kind is int and value == int(value) else bool(value) if kind is bool else float(value)
    )


def table_of(rows: list[list[Any]]) -> Any:
    """The table of numbers: on the host in float64, unless somebody follows one of them."""
    followed = [v for row in rows for v in row if not registry.library(v).is_fixed(v)]
    if followed:
        return registry.library(followed[0]).table(rows)
    return registry.named("numpy").table(rows).reshape(len(rows), -1)
