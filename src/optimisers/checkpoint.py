"""How is a state written down? As plain arrays with names, which any format takes; and put back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.memory import laid_out
from optimisers.errors import TreeMismatch
from optimisers.nest import flatten, unflatten
from optimisers.settings import fill, numbers
from optimisers.state.group import Group
from optimisers.state.leaf import handle, parts
from optimisers.state.select import leaves_of
from optimisers.state.store import Store

S = TypeVar("S")
"""The type of a state."""


def state_dict(state: object) -> dict[str, Any]:
    """The state as a dict of names to arrays, each a copy, all of the library of their parameters.

    `torch.save` and `torch.load` with `weights_only=True`, safetensors and `numpy.savez` take it. Of the
    parameters at `layers.0.w` there are `layers.0.w/m` for what the rule keeps (shaped as the rule keeps it),
    and scalars in float64, or the widest type that there is: `layers.0.w@step`, how many updates have covered
    it; `@settings`, the numbers of its rule in their order; `@frozen`, 0 or 1. Rules themselves are not among
    them: `load_state_dict` takes the names into a state that `setup` has made with the same rules.
    """
    store = parts(state)[0]
    store.refuse_lent("state_dict")
    found: dict[str, Any] = {}
    for leaf in leaves_of(state):
        group, i = store.where(leaf)
        name, library, kind = str(store.layout.paths[leaf]), group.kind.library, group.kind
        for path, value in flatten(group.state_of(i)):
            if not registry.isarray(value):
                found[_entry(name, path)] = _vector(library, [value]).reshape(())
            elif kind.opaque:
                found[_entry(name, path)] = library.copied(value, value.dtype)
            else:
                found[_entry(name, path)] = laid_out(library, value, value.dtype, None, kind.device)
        for key, value in _scalars(store, leaf, group, i).items():
            vector = _vector(library, value if isinstance(value, list) else [value])
            found[f"{name}@{key}"] = vector if isinstance(value, list) else vector.reshape(())
    return found


def load_state_dict(state: S, saved: Mapping[str, Any]) -> S:
    """The state with everything that `state_dict` has saved; the old one stays as it was.

    The arrays may be of another library than the parameters. Raises TreeMismatch, naming the first entry that
    does not fit, where the state is one of another model or of other rules.
    """
    store, node, path = parts(state)
    new = store.fork()
    found = {leaf: _Found.of(new, leaf, saved) for leaf in leaves_of(state)}
    expected = {name for each in found.values() for name in each.names}
    if lost := sorted(saved.keys() - expected):
        raise TreeMismatch(
            f"the saved state has {lost[0]!r}, which this state does not; load it into a state of the same "
            "rules and model"
        )
    new.assign_many({leaf: each.state for leaf, each in found.items()})
    new.set_progress({leaf: each.progress for leaf, each in found.items()})
    by_settings: dict[tuple[float, ...], list[int]] = {}
    for leaf, each in found.items():
        by_settings.setdefault(each.settings, []).append(leaf)
    for own, leaves in by_settings.items():
        new.change(leaves, lambda rule, own=own: fill(rule, iter(own)))
    for frozen in (False, True):
        new.freeze([leaf for leaf, each in found.items() if each.frozen is frozen], frozen)
    return handle(new, node, path)


class _Found(NamedTuple):
    """What was saved of one leaf."""

    names: list[str]
    state: Any
    progress: dict[str, float]
    settings: tuple[float, ...]
    frozen: bool

    @classmethod
    def of(cls, store: Store, leaf: int, saved: Mapping[str, Any]) -> "_Found":
        group, i = store.where(leaf)
        name, own = str(store.layout.paths[leaf]), group.state_of(i)
        entries = [(_entry(name, path), was) for path, was in flatten(own)]
        scalars = _scalars(store, leaf, group, i)
        names = [*(key for key, _ in entries), *(f"{name}@{key}" for key in scalars)]
        for key in names:
            if key not in saved:
                raise TreeMismatch(
                    f"the saved state has no {key!r}; load it into a state of the same rules and model"
                )
        state = unflatten(own, iter([_taken(group, key, saved[key], was) for key, was in entries]))
        known = {key: _host(saved[f"{name}@{key}"]).ravel().tolist() for key in scalars}
        if len(known["settings"]) != len(scalars["settings"]):
            raise TreeMismatch(
                f"{name}@settings has {len(known['settings'])} numbers; {group.rule_of(i)!r} takes "
                f"{len(scalars['settings'])}"
            )
        progress = {key: known[key][0] for key in store.progress_of(leaf)}
        return cls(names, state, progress, tuple(known["settings"]), bool(known["frozen"][0]))


def _entry(name: str, path: Sequence[object]) -> str:
    """The name of something in the state of a rule."""
    return f"{name}/{'.'.join(map(str, path)) or 'state'}"


def _scalars(store: Store, leaf: int, group: Group, i: int) -> dict[str, Any]:
    """What is known of a leaf beside the state of its rule: numbers, and a list of them."""
    rule = group.rule_of(i)
    return {**store.progress_of(leaf), "settings": numbers(rule), "frozen": int(store.frozen[leaf])}


def _vector(library: Any, values: Iterable[Any]) -> Any:
    """Scalars in an array of a library."""
    return library.scalars.table(np.array([[float(v) for v in values]], np.float64))[0]


def _host(value: Any) -> Any:
    """A saved array as one of NumPy, in a type that every library reads."""
    found = registry.library(value).to_numpy(value) if registry.isarray(value) else np.asarray(value)
    return found if found.dtype.kind in "fciub" else found.astype(np.float32)


def _taken(group: Group, name: str, value: Any, was: Any) -> Any:
    """A saved value in the place of another; raises TreeMismatch where it does not fit there."""
    shape = tuple(was.shape) if registry.isarray(was) else ()
    if tuple(getattr(value, "shape", ())) != shape:
        raise TreeMismatch(f"{name!r} has shape {tuple(value.shape)}; this state takes {shape}")
    if not registry.isarray(was):
        return type(was)(_host(value).item())
    library = group.kind.library
    ours = registry.library_of(type(value)) is library
    found = value if ours else _host(value)
    if registry.iscomplex(found) and not registry.iscomplex(was):
        raise TreeMismatch(f"{name!r} is complex; this state takes real numbers")
    if ours:
        return library.copied(value, was.dtype)
    if library.immutable:
        return library.cast(found, was.dtype)
    return laid_out(library, found, was.dtype, None, group.kind.device)
