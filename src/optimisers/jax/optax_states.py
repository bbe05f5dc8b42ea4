"""What does a transformation of Optax keep, in our words, and back? For those who change from one to the
other in the middle of a run.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optimisers.arrays import registry
from optimisers.errors import BadState, TreeMismatch
from optimisers.graph.courses import courses
from optimisers.nest import flatten, unflatten
from optimisers.rule import Rule
from optimisers.rules.adam import Adam, AdaMax, AdamW
from optimisers.rules.adaptive import RMSProp
from optimisers.rules.descent import SGD, Descent, Momentum
from optimisers.rules.sign import Lion
from optimisers.settings import numbers
from optimisers.settings import parts as parts_of_value
from optimisers.state.group import Group
from optimisers.state.leaf import parts
from optimisers.state.select import leaves_of
from optimisers.tree.flatten import flatten_model
from optimisers.tree.rebuild import rebuild

__all__ = ["from_optax_state", "to_optax_state"]

KEPT: dict[type[Rule], dict[str, str]] = {
    Adam: {"m": "mu", "v": "nu"},
    AdamW: {"m": "mu", "v": "nu"},
    AdaMax: {"m": "mu", "u": "nu"},
    Lion: {"m": "mu"},
    RMSProp: {"q": "nu"},
    SGD: {"v": "trace"},
    Momentum: {"v": "trace"},
    Descent: {},
}
"""Rules that are transformations of Optax -> what the rule keeps -> what Optax calls it."""

NAMED = "_fields"
"""What a NamedTuple has, as states of Optax are."""

FIELDS = {theirs for names in KEPT.values() for theirs in names.values()}


class Known(NamedTuple):
    """A rule that both have."""

    names: Mapping[str, str]
    factor: float
    """What the arrays of Optax are multiplied with: the velocity of Momentum holds the rate."""


def from_optax_state(state: Any, given: object) -> Any:
    """The state with what a transformation of Optax has learnt: `given` is the state of the one that is the
    same as the rule. The old state stays as it was.

    For Adam, AdamW, AdaMax, Lion, RMSProp, SGD, Momentum and Descent, alone or in a chain with rules that
    keep nothing. Names are the paths of the parameters, in `given` as in the model. Raises BadState for
    another rule, TreeMismatch for a state of Optax without the arrays that the rule keeps.
    """
    found = {name: _by_name(tree) for name, tree in _fields(given) if name in FIELDS}
    counts = [int(np.max(np.asarray(value))) for name, value in _fields(given) if name == "count"]
    steps = max(counts, default=None)
    new = copy.copy(state)
    store, states = parts(new)[0], dict[int, Any]()
    for leaf in leaves_of(new):
        group, i = store.where(leaf)
        path = str(store.layout.paths[leaf])
        known = _known(group.rule_of(i), path)

        def theirs(entry: str, was: Any, known: Known = known, path: str = path) -> Any:
            tree = found.get(known.names[entry], {})
            if path not in tree or tuple(tree[path].shape) != tuple(was.shape):
                raise TreeMismatch(
                    f"the state of Optax has no {known.names[entry]!r} of shape {tuple(was.shape)} for "
                    f"{path}; give the state of the transformation that is the rule"
                )
            return tree[path] * known.factor

        states[leaf] = _converted(group, i, steps, known, theirs)
    store.assign_many(states)
    if steps is not None:
        store.set_progress({leaf: {"step": steps} for leaf in states})
    return new


def to_optax_state(state: Any, given: Any) -> Any:
    """A state of Optax with what the rule has learnt: `given` is a state of the transformation that is the
    same as the rule, as its `init` makes it. What it does not share with the rule stays as it is.

    Raises BadState for a rule that Optax does not have (see `from_optax_state`), and where parameters have
    taken different numbers of steps.
    """
    store = parts(state)[0]
    trees: dict[str, dict[str, Any]] = {name: {} for name in FIELDS}
    clocks = set[int]()
    for leaf in leaves_of(state):
        group, i = store.where(leaf)
        path = str(store.layout.paths[leaf])
        known = _known(group.rule_of(i), path)
        clocks.add(int(group.table.read_clock(i)))
        for at, value in flatten(group.state_of(i)):
            if at and at[-1] in known.names:
                trees[known.names[at[-1]]][path] = value / known.factor
    if len(clocks) > 1:
        raise BadState(
            f"parameters have taken {sorted(clocks)} steps; a state of Optax has one count for all"
        )
    return _filled(given, trees, next(iter(clocks), 0))


def _known(rule: Rule, path: str) -> Known:
    """What a rule shares with Optax; raises BadState where that is nothing."""
    found = [part for part in parts_of_value(rule) if isinstance(part, Rule) and type(part) in KEPT]
    if len(found) != 1:
        raise BadState(
            f"{path} is trained by {rule!r}, which is not one of those that Optax keeps alike: "
            f"{', '.join(kind.__name__ for kind in KEPT)}"
        )
    eta = getattr(found[0], "eta", 1.0)
    if type(found[0]) is Momentum and not isinstance(eta, float | int):
        raise BadState(f"{path} is trained by {rule!r}, whose velocity holds rates of other steps; use SGD")
    return Known(KEPT[type(found[0])], float(eta) if type(found[0]) is Momentum else 1.0)


def _converted(
    group: Group, i: int, steps: int | None, known: Known, theirs: Callable[[str, Any], Any]
) -> Any:
    """The state of a member with the arrays of Optax; counters are what they come to after so many steps."""
    old, program = group.state_of(i), group.program
    hypers = numbers(group.rule_of(i))
    follow = courses(program)
    new: list[Any] = []
    counter = program.hypers
    for at, value in flatten(old):
        if registry.isarray(value):
            new.append(theirs(str(at[-1]), value) if at and at[-1] in known.names else value)
            continue
        course = follow.get(counter)
        counts = course is not None and (steps is not None or course.mark)
        new.append(course.after(steps or 1, hypers) if course is not None and counts else value)
        counter += 1
    return unflatten(old, iter(new))


def _fields(node: Any) -> Iterator[tuple[str, Any]]:
    """(name, what stands there) of every field of the states in a state of Optax."""
    if isinstance(node, tuple) and hasattr(node, NAMED):
        for name, value in zip(getattr(node, NAMED), node, strict=True):
            yield name, value
            if name not in FIELDS:
                yield from _fields(value)
    elif isinstance(node, tuple | list):
        items: Any = node
        for value in items:
            yield from _fields(value)
    elif isinstance(node, dict):
        named: dict[Any, Any] = node
        for value in named.values():
            yield from _fields(value)


def _by_name(tree: object) -> dict[str, Any]:
    layout, found = flatten_model(tree)
    return {str(path): x for path, x in zip(layout.paths, found, strict=True)}


def _filled(node: Any, trees: Mapping[str, Mapping[str, Any]], count: int) -> Any:
    """A state of Optax with other arrays and another count."""
    if isinstance(node, tuple) and hasattr(node, NAMED):
        names: tuple[str, ...] = getattr(node, NAMED)
        changes: dict[str, Any] = {}
        for name, value in zip(names, node, strict=True):
            if name == "count":
                changes[name] = jnp.full_like(value, count)
            elif trees.get(name):
                changes[name] = _exchanged(value, trees[name])
            else:
                changes[name] = _filled(value, trees, count)
        return type(node)(**changes)
    if isinstance(node, tuple | list):
        items: Any = node
        return type(items)(_filled(value, trees, count) for value in items)
    if isinstance(node, dict):
        named: dict[Any, Any] = node
        return {key: _filled(value, trees, count) for key, value in named.items()}
    return node


def _exchanged(tree: Any, new: Mapping[str, Any]) -> Any:
    layout, _ = flatten_model(tree)
    names = [str(path) for path in layout.paths]
    return rebuild(layout.root, tree, {i: jnp.asarray(new[n]) for i, n in enumerate(names) if n in new})
