"""Rows of a scalar table and the leaves that share them, and scalars as the host takes them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from optimisers.arrays import registry
from optimisers.settings import owners, scheduled

Indices = np.ndarray[Any, np.dtype[np.int64]]


def parted(row: Indices, rows: int, members: Indices) -> tuple[Indices, Indices] | None:
    """(old row of every new one, new row of every leaf), with rows of their own for some leaves; None where
    they share none with others.
    """
    among = np.bincount(row[members], minlength=rows)
    split = np.flatnonzero((among > 0) & (among < np.bincount(row, minlength=rows)))
    if not len(split):
        return None
    renamed = np.arange(rows)
    renamed[split] = rows + np.arange(len(split))
    new = row.copy()
    new[members] = renamed[row[members]]
    return np.concatenate([np.arange(rows), split]), new


def labelled(row: Indices, label: Indices) -> tuple[Indices, Indices]:
    """(old row of every new one, new row of every leaf), with a row for each pair of row and label."""
    pairs = row * (int(label.max(initial=-1)) + 2) + label + 1
    _, first, new = np.unique(pairs, return_index=True, return_inverse=True)
    return row[first], new.ravel()


def alike(row: Indices, members: Indices, values: Iterable[Any]) -> Indices:
    """Labels by which some leaves share a row only where they are given equal numbers."""
    label, known = np.full(len(row), -1), dict[Any, int]()
    label[members] = [known.setdefault(value, len(known)) for value in values]
    return label


def own(row: Indices, members: Indices) -> Indices:
    """Labels by which each of some leaves has its own row."""
    label = np.full(len(row), -1)
    label[members] = np.arange(len(members))
    return label


def spread(counters: Sequence[Any], row: Indices, members: Indices | None) -> list[Any]:
    """Counters of rows as counters of the leaves that have them."""
    of = row if members is None else row[members]
    return [v if np.ndim(v) == 0 or len(v) == 1 else v[of] for v in counters]


def block(rows: Indices, columns: Any) -> Any:
    """The index of some rows and columns."""
    if isinstance(columns, np.ndarray):
        return rows[:, None], columns
    return (rows, columns) if np.ndim(columns) == 0 else (rows[:, None], np.asarray(columns))


def flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for v in values:
            yield from flat(v)
    else:
        yield values


def tracer_of(values: Any) -> Any:
    """The library that traces one of some scalars; None if they all may be read."""
    if isinstance(values, np.ndarray):
        return None
    for v in flat(values):
        if not isinstance(v, float | int) and not (library := registry.library(v)).scalars.is_fixed(v):
            return library
    return None


def on_host(values: Any) -> Any:
    """Scalars that may be read, as NumPy takes them."""
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, list | tuple):
        items: Iterable[Any] = values
        return [on_host(v) for v in items]
    return registry.library(values).to_numpy(values) if registry.isarray(values) else float(values)


class Columns(NamedTuple):
    """Where hyper-parameters of some names stand in a table."""

    names: tuple[str, ...]
    """Those that the rule has."""
    at: Indices
    spread: Indices | None
    """Which of their numbers goes into each of these columns, since a chain may have a setting in several
    rules; None where each goes into one, in order.
    """


def columns_of(rule: object, names: Sequence[str]) -> Columns | None:
    """Which hyper-parameters of a rule bear some names; None where one is a schedule."""
    if not set(names).isdisjoint(scheduled(rule)):
        return None
    found: dict[str, dict[int, list[int]]] = {name: {} for name in names}
    for j, (name, place) in enumerate(owners(rule)):
        if name in found:
            found[name].setdefault(place, []).append(j)
    places = [columns for name in names for columns in found[name].values()]
    spread = np.repeat(np.arange(len(places)), [len(columns) for columns in places])
    at = np.array([j for columns in places for j in columns], np.int64)
    known = tuple(name for name in names if found[name])
    return Columns(known, at, None if len(at) == len(places) else spread)
