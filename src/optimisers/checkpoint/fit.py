"""Which saved array goes where? By name, and found to fit before anything is written."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.protocol import HostArray
from optimisers.arrays.types import is_complex
from optimisers.checkpoint.entries import Kept, Modelled, numbers_in_numpy, structure
from optimisers.checkpoint.format import Form
from optimisers.checkpoint.turned import Turn, turned
from optimisers.errors import BadSetting, TreeMismatch
from optimisers.settings import fill, parts

Axes = tuple[int, ...] | None
Renamed = str | tuple[str, Axes]
"""What something is called here, and in which order its axes stand here, as `numpy.transpose` takes it."""

Called = Renamed | list[Renamed] | None
"""The same; several, of which the first that is here counts; None for what is not taken."""

Names = Mapping[str, Renamed] | Callable[[str, tuple[int, ...]], Called] | None
"""What parameters of a file are called here: a table, or a function of name and shape."""


class Source(Protocol):
    """What was saved."""

    forms: Mapping[str, Form]
    rules: Mapping[str, str]
    """The structure of the rule of each leaf, where it is known."""
    ties: Sequence[Sequence[str]]
    typed: bool
    """Whether types must be those that are here."""

    def read(self, name: str) -> Any:
        """An array, of any library."""
        ...

    def view(self, name: str) -> Any:
        """The same where it lies, if it lies somewhere; then bfloat16 as its bits."""
        ...

    def fill(self, targets: Sequence[tuple[str, HostArray]]) -> None:
        """Put arrays into memory of the host that has their shapes and types, bfloat16 as its bits."""
        ...


class Where(NamedTuple):
    """A saved array, and how its axes are permuted here."""

    name: str
    axes: Axes = None

    def of(self, source: Source) -> Any:
        found = source.read(self.name)
        return found if self.axes is None else registry.library(found).permuted(found, self.axes)

    def view(self, source: Source) -> tuple[Any, str]:
        """The same, not read yet where it lies in a file; and its type."""
        found = source.view(self.name)
        return found if self.axes is None else found.transpose(self.axes), source.forms[self.name].type


class Fitted(NamedTuple):
    """What a leaf takes over."""

    kept: Kept
    arrays: list[Where | None]
    """For each slot of its group the saved array; None for a number."""
    counters: list[Any]
    progress: dict[str, float]
    settings: tuple[float, ...]
    frozen: bool


class Plan(NamedTuple):
    """What is taken over, and what is not."""

    leaves: list[Fitted]
    model: dict[str, Where]
    left: list[str]


SUFFIX = "@settings"
"""Every leaf that was saved has an entry of this name."""


def fitted(
    source: Source,
    kept: Sequence[Kept],
    model: Modelled | None,
    *,
    below: str,
    names: Names = None,
    strict: bool = True,
    ruled: bool = True,
) -> Plan:
    """What fits where; raises TreeMismatch, naming the first thing that does not fit, where `strict`. Rules
    and their settings are compared where they are `ruled` by nothing else, such as the groups of torch.
    """
    arrays = {} if model is None else model.arrays()
    here = {*arrays, *(place for leaf in kept for place in leaf.straight)}
    known = _known(source, here, names)
    plan = Plan([], {}, [])
    for leaf in kept:
        found = _leaf(leaf, known, ruled)
        if isinstance(found, str):
            plan.left.append(found)
        else:
            plan.leaves.append(found)
    for name, x in arrays.items():
        at = known.there.get(name)
        known.used.add(name if at is None else at.name)
        reason = _misfit(name, x, at, source, known.others)
        if at is None or reason:
            plan.left.append(reason)
        else:
            plan.model[name] = at
    plan.left.extend(_lost(known, below, modelled=model is not None or not source.typed))
    if strict and plan.left:
        _refuse(plan.left)
    return plan


class Known(NamedTuple):
    """What was saved, by what it is called here."""

    source: Source
    saved: set[str]
    """The leaves whose state was saved."""
    inside: dict[str, str]
    """Entry of a state -> its leaf."""
    others: list[str]
    """The arrays of a model."""
    there: dict[str, Where]
    """Parameter here -> the one that was saved."""
    used: set[str]
    """What has its place here, fit or not."""


def _known(source: Source, here: set[str], names: Names) -> Known:
    saved = {name.removesuffix(SUFFIX) for name in source.forms if name.endswith(SUFFIX)}
    inside = {name: owner for name in source.forms if (owner := _owner(name, saved)) is not None}
    others = [name for name in source.forms if name not in inside and name[:1] != "@"]
    there = _there(sorted(saved.union(others)), source, here, names)
    return Known(source, saved, inside, others, there, set())


def _lost(known: Known, below: str, *, modelled: bool) -> list[str]:
    """What was saved below a path and has no place here."""
    counted = [*known.inside, *(known.others if modelled else ())]
    lost = sorted(name for name in counted if name not in known.used and _is_below(name, below))
    return [f"{name!r} was saved, and is not here" for name in lost if _is_told(name, known)]


def _refuse(left: Sequence[str]) -> None:
    """Raise TreeMismatch for what does not fit."""
    more = f", and {len(left) - 1} more do not fit" if left[1:] else ""
    raise TreeMismatch(
        f"{left[0]}{more}; load into a state of the same rules and model, or write strict=False"
    )


def _is_told(name: str, known: Known) -> bool:
    """Whether an entry that is not here is told of: of a leaf that is not here one is enough."""
    inside = known.inside
    return name not in inside or name.endswith(SUFFIX) or f"{inside[name]}{SUFFIX}" in known.used


def _is_below(name: str, below: str) -> bool:
    return not below or name == below or name.startswith((f"{below}.", f"{below}/", f"{below}@"))


def _owner(name: str, saved: set[str]) -> str | None:
    """The leaf to whose state an entry belongs; None for a parameter."""
    ends = (i for i, c in enumerate(name) if c in "/@")
    return next((name[:i] for i in ends if name[:i] in saved), None)


# -- names ---------------------------------------------------------------------------------------------------


def _there(saved: Sequence[str], source: Source, here: set[str], names: Names) -> dict[str, Where]:
    """Name here -> what it was saved as."""
    found: dict[str, Where] = {}
    for name in saved:
        for called, axes in _called(name, source, names):
            if called in here or names is None:
                if called in found:
                    raise BadSetting(
                        f"names calls both {found[called].name!r} and {name!r} {called!r}; it takes one for "
                        "each"
                    )
                found[called] = Where(name, axes)
                break
    return found


def _called(name: str, source: Source, names: Names) -> Iterator[tuple[str, Axes]]:
    """What a saved parameter may be called here, with its axes."""
    if names is None:
        yield name, None
        return
    form = source.forms.get(name)
    shape = shape_of(name, source) if form is None else form.shape
    given: Any = names.get(name, name) if isinstance(names, Mapping) else names(name, shape)
    several: Sequence[Renamed] = given if isinstance(given, list) else [] if given is None else [given]
    for one in several:
        if isinstance(one, str):
            yield one, None
            continue
        called, axes = one
        if axes is not None and sorted(axes) != list(range(len(shape))):
            raise BadSetting(f"names gives {name!r}, of shape {shape}, the axes {axes}")
        yield called, axes


def shape_of(name: str, source: Source) -> tuple[int, ...]:
    """The shape of a parameter of which the state alone was saved: that of its largest array."""
    own = [form.shape for entry, form in source.forms.items() if entry.startswith(f"{name}/")]
    return max(own, key=math.prod, default=())


# -- states --------------------------------------------------------------------------------------------------


def _leaf(leaf: Kept, known: Known, ruled: bool) -> Fitted | str:
    """What a leaf takes over, or why it does not."""
    there = known.there
    places = [place for place in leaf.straight if place in there and there[place].name in known.saved]
    if len(places) != 1:
        known.used.update(f"{there[place].name}{SUFFIX}" for place in places)
        return _apart([there[place].name for place in places]) if places else _missing(leaf, known.source)
    return _from(leaf, there[places[0]], known, ruled)


def _from(leaf: Kept, at: Where, known: Known, ruled: bool) -> Fitted | str:
    """What a leaf takes over from one that was saved, or why it does not."""
    source = known.source
    wanted = {name: at.name + name[len(leaf.name) :] for name, _ in leaf.entries()}
    known.used.update(wanted.values())
    own, theirs = structure(leaf.row.rule), source.rules.get(at.name)
    if ruled and theirs not in (None, own):
        return f"{at.name!r} was trained by {theirs}; here is {own}"
    if lost := [name for name in wanted.values() if name not in source.forms]:
        return f"there is no {lost[0]!r} in what was saved"
    arrays = _arrays(leaf, at, wanted, source)
    if isinstance(arrays, str):
        return arrays
    numbers = {n: _numbers(source, wanted[n]) for n, value in leaf.entries() if not registry.isarray(value)}
    return _scalars(leaf, at.name, arrays, numbers, ruled)


def _apart(names: Sequence[str]) -> str:
    return f"{names[0]!r} and {names[1]!r} were saved apart, and are tied here"


def _missing(leaf: Kept, source: Source) -> str:
    for tie in source.ties:
        if leaf.name in tie[1:]:
            return f"{leaf.name!r} was saved tied to {tie[0]!r}, and stands alone here"
    return f"there is no state of {leaf.name!r} in what was saved: no '{leaf.name}{SUFFIX}'"


def _arrays(leaf: Kept, at: Where, wanted: Mapping[str, str], source: Source) -> list[Where | None] | str:
    """The saved array for every entry, or why one does not fit."""
    turn: Turn | None = None
    if at.axes is not None and any(column is not None for column in leaf.slots.arrays):
        kind = leaf.group.places.shapes[leaf.member]
        turn = turned(leaf.row.rule, kind, at.axes)
        if turn.reason:
            return f"{at.name!r} cannot be turned: {turn.reason}"
    found: list[Where | None] = []
    for entry, column in zip(leaf.slots.names, leaf.slots.arrays, strict=True):
        name = f"{leaf.name}/{entry}"
        if column is None:
            if source.forms[wanted[name]].shape not in ((), (1,)):
                return f"{wanted[name]!r} has shape {source.forms[wanted[name]].shape}; this state takes ()"
            found.append(None)
            continue
        here = Where(wanted[name])
        if turn is not None:
            if entry not in turn.entries:
                return f"{at.name!r} cannot be turned: small arrays have no {entry!r} beside them"
            origin, axes = turn.entries[entry]
            here = Where(f"{at.name}/{origin}", axes)
        reason = _misfit(name, column[leaf.member], here, source, source.forms)
        if reason:
            return reason
        found.append(here)
    return found


def _misfit(name: str, x: Any, at: Where | None, source: Source, known: Iterable[str]) -> str:
    """Why a saved array does not fit in the place of one here; empty if it does."""
    if at is None or at.name not in known:
        return f"there is no {name!r} in what was saved"
    form, kind = source.forms[at.name], registry.type_name(x)
    fits = at.axes is None or len(at.axes) == len(form.shape)
    shape = form.shape if at.axes is None or not fits else tuple(form.shape[i] for i in at.axes)
    called = repr(at.name) if at.name == name else f"{at.name!r}, here {name!r},"
    if not fits or shape != tuple(x.shape):
        return f"{called} has shape {shape}; this state takes {tuple(x.shape)}"
    if is_complex(form.type) and not is_complex(kind):
        return f"{called} is complex; this state takes real numbers"
    if source.typed and form.type != kind:
        return f"{called} is {form.type}; this state takes {kind}"
    return ""


def _numbers(source: Source, name: str) -> list[float]:
    found = numbers_in_numpy(source.read(name))
    return [float("nan")] if found.dtype.kind == "c" else found.astype(np.float64).ravel().tolist()


def _scalars(
    leaf: Kept, saved: str, arrays: list[Where | None], known: Mapping[str, list[float]], ruled: bool
) -> Fitted | str:
    """A leaf with its numbers, or why these do not fit."""
    own = known[f"{leaf.name}{SUFFIX}"]
    rule = leaf.row.rule
    if ruled and len(own) != len(leaf.row.settings):
        return f"{saved}{SUFFIX} has {len(own)} numbers; {rule!r} takes {len(leaf.row.settings)}"
    progress = {key: known[f"{leaf.name}@{key}"][0] for key in leaf.row.progress}
    for key, n in progress.items():
        if not (math.isfinite(n) and n >= 0):
            return f"'{saved}@{key}' is {n!r}; it takes a number of steps"
    try:
        for part in parts(fill(rule, iter(own))) if ruled else ():
            part.check()
    except BadSetting as error:
        return f"{saved}{SUFFIX}: {error}"
    counters = [
        known[f"{leaf.name}/{entry}"][0]
        for entry, column in zip(leaf.slots.names, leaf.slots.arrays, strict=True)
        if column is None
    ]
    return Fitted(leaf, arrays, counters, progress, tuple(own), bool(known[f"{leaf.name}@frozen"][0]))
