"""Rules as transformations of Optax, and transformations of Optax as rules for a whole model."""

import copy
import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimisers.arrays import registry
from optimisers.arrays.jax import library as arrays
from optimisers.engines.signals import held
from optimisers.errors import BadState, TreeMismatch
from optimisers.graph.trace import reads_parameters
from optimisers.jax.mirror import (
    About,
    Mirrored,
    Reflection,
    Static,
    about_of,
    children_of,
    flat_dict,
    is_absent,
    kinds_of,
    known,
    labelled,
    mirrored,
    names_of,
    order_of,
    reflected,
    reflection_of,
    slot_name,
)
from optimisers.jax.pytree import stepped
from optimisers.nest import flatten
from optimisers.rule import Rule
from optimisers.settings import numbers, skeleton
from optimisers.state.group import Shape, program_of, started
from optimisers.state.interface import ScalarTable
from optimisers.state.leaf import parts
from optimisers.state.store import Store
from optimisers.state.structure import structure_of
from optimisers.step.choose import Rules, choose, refuse_no_rule
from optimisers.step.update import evaluated, setup
from optimisers.tree.flatten import Ties, flatten_model
from optimisers.tree.flatten_up_to import flatten_up_to, gradients_up_to
from optimisers.tree.layout import EMPTY, Layout, Node, Told
from optimisers.tree.path import KeyPath
from optimisers.tree.rebuild import rebuild, rebuilt

__all__ = ["as_optax", "from_optax"]


_ABSENT: Any = object()
"""Tells what was not given from None."""

# -- ours in Optax -------------------------------------------------------------------------------------------


def as_optax(rule: Rules, *, conjugate: bool = False) -> optax.GradientTransformationExtraArgs:
    """A rule, or what else `setup` takes for one, as a transformation of Optax, to chain, wrap, and hand to
    trainers.

    Its `update` returns the step of the rule, with the sign that Optax adds; it needs the parameters where
    the rule reads them, and ignores arguments that it does not know. Rules that ask for them are given
    `value=`, the loss, and `hessian=`, a tree of second gradients, or None where there is none at this step.
    Its state is read, adjusted and frozen as one of `setup`, with the paths of the parameters as names; to
    Optax it has the form of Optax's own states, where eta is "learning_rate" and the clock "count". A setting
    counts as whoever changed it last wrote it: the transformation (another one, or one around it that injects
    hyper-parameters) or `adjust`.

    As in Optax, complex gradients are those of steepest ascent, the conjugates of what `jax.grad` gives; with
    `conjugate=True` they are what it gives.

    Raises BadState for what is no rule, for a state that is none of `as_optax`, or of rules of another
    structure.
    """
    refuse_no_rule(rule, "as_optax(Adam())")

    def init(params: Any) -> Any:
        known()
        named, form = flat_dict(params)
        if not named:
            return _without_parameters(rule, form)
        layout, found = flatten_model(named)
        layout.told = _told(params)
        chosen = dict(zip(map(str, layout.paths), choose(rule, layout, found), strict=True))
        whole = setup(lambda path, _: chosen[str(path)], named, engine="interpret", conjugate=conjugate)
        store, node, path = parts(whole) if whole != () else (_nothing(named), EMPTY, KeyPath())
        store.layout.told = layout.told
        number = {str(p): leaf for leaf, p in enumerate(store.layout.paths)}
        place = tuple(number.get(name, -1) for name in named)
        given = tuple(
            arrays.scalars.beside(_settings(rule, store, kind.groups), list(named.values()))
            for kind in kinds_of(structure_of(store))
        )
        children = children_of(store, given, place, functools.partial(jax.tree.unflatten, form))
        about = About(jax.tree.structure(children, is_leaf=is_absent), given, place)
        return mirrored(store, node, path, about)

    def update(
        updates: Any,
        state: object,
        params: Any = None,
        *,
        value: Any = None,
        hessian: Any = _ABSENT,
        **_: object,
    ) -> Any:
        if not isinstance(state, Mirrored):
            raise BadState(
                f"a state of as_optax was wanted and a {type(state).__name__} came; write tx.init(params)"
            )
        known()
        slopes, form = flat_dict(updates)
        if not reflection_of(state).static.place:
            return updates, _counted(state)
        state = _with_settings_of(rule, state)
        store, node, path = parts(state)
        xs = _parameters(store, node, params)
        orders = [gradients_up_to(node, {k: slopes.get(k) for k in node.keys}, path)]
        if hessian is not _ABSENT:
            second = flat_dict(hessian)[0]
            orders.append(gradients_up_to(node, {k: second.get(k) for k in node.keys}, path))
        done = stepped(store, node, path, xs, orders, value, changes=True)
        after, new = evaluated(store, node, xs, orders, value, changes=True) if done is None else done
        number = {str(p): leaf for leaf, p in enumerate(store.layout.paths)}
        steps = [new.get(number.get(k, -1), jnp.zeros_like(g)) for k, g in slopes.items()]
        return jax.tree.unflatten(form, steps), mirrored(after, node, path, about_of(state))

    return optax.GradientTransformationExtraArgs(init, update)


def _told(params: object) -> Told:
    """The places of the arrays of a pytree, by their path; none where it is no model."""
    try:
        layout, _ = flatten_model(params)
    except TreeMismatch:
        return {}
    return {str(p.places[0].path) or "params": p.places for p in layout.parameters}


def _parameters(store: Store, node: Node, params: Any) -> list[Any]:
    """The parameters of each leaf; zeros where they were not given, and no rule reads them."""
    if params is not None:
        return flatten_up_to(node, flat_dict(params)[0], KeyPath())
    if any(reads_parameters(g.program) for g in store.groups):
        raise BadState("as_optax(rule) needs the parameters; write tx.update(grads, state, params)")
    kinds = [store.shapes[leaf] for leaf in node.leaves]
    return [0 if k is None else jnp.zeros(k.shape, k.dtype) for k in kinds]


# -- settings of the transformation --------------------------------------------------------------------------


def _settings(rule: Any, store: Store, groups: Sequence[int]) -> Any:
    """The settings that a transformation gives now to the leaves of some groups: [leaves, settings], or one
    row for all where it has one rule.
    """
    return _table([numbers(r) for r in _rules_of(rule, store, groups)])


def _table(rows: list[list[Any]]) -> Any:
    """Rows of numbers, some of them traced perhaps, as an array."""
    plain = all(isinstance(v, float | int) for row in rows for v in row)
    return arrays.scalars.table(np.array(rows, np.float64).reshape(len(rows), -1) if plain else rows)


def _rules_of(rule: Any, store: Store, groups: Sequence[int]) -> list[Rule]:
    """The rules of the leaves of some groups, or the one for all. Raises BadState for those of another
    structure.
    """
    leaves = [int(leaf) for g in groups for leaf in store.groups[g].leaves]
    own = skeleton(store.groups[groups[0]].rule)
    if isinstance(rule, Rule):
        chosen = [rule]
    else:
        shapes = [None if k is None else k.stand_in() for k in store.shapes]
        every = choose(rule, store.layout, shapes)
        chosen = [every[leaf] for leaf in leaves]
    for r in chosen:
        if not isinstance(r, Rule) or skeleton(r) != own:
            raise BadState(
                f"the state is that of {store.groups[groups[0]].rule!r}, and the transformation has {r!r}; "
                "write tx.init(params) for a state of its own"
            )
    return chosen


def _with_settings_of(rule: Any, state: Mirrored) -> Mirrored:
    """The state with those settings that the transformation has changed since the last step."""
    state = copy.copy(state)  # what is found out inside a transform does not stay in the old one
    store, node, path = parts(state)
    told: list[Any] = []
    for kind, before in zip(kinds_of(structure_of(store)), about_of(state).given, strict=True):
        rules = _rules_of(rule, store, kind.groups)
        now = _table([numbers(r) for r in rules])
        told.append(now)
        if not now.shape[1]:
            continue
        changed = (now != before) & ~(jnp.isnan(now) & jnp.isnan(before))
        start = 0
        for g in kind.groups:
            group = store.groups[g]
            own = np.zeros(len(group.leaves), int) if len(now) == 1 else start + np.arange(len(group.leaves))
            group.table = _parted(group.table, [rules[i] for i in own]).to_traced(arrays)
            values, first = group.table.values, np.unique(group.table.row, return_index=True)[1]
            given = jnp.where(changed[own[first]], now[own[first]], values[:, : group.table.hypers])
            values = arrays.scalars.placed(values, (slice(None), slice(0, group.table.hypers)), given)
            group.table = group.table.filled(values, group.table.clock)
            start += len(group.leaves)
    return mirrored(store, node, path, dataclasses.replace(about_of(state), given=tuple(told)))


def _parted(table: ScalarTable, rules: list[Rule]) -> ScalarTable:
    """The scalar table of leaves that now have these rules: no row is shared by two whose numbers differ."""
    known: dict[Any, int] = {}
    keys = [tuple(v if isinstance(v, float | int) else (id(v),) for v in numbers(r)) for r in rules]
    label = np.array([known.setdefault(key, len(known)) for key in keys])
    shared = len(known) > 1 and len(np.unique(np.stack([table.row, label]), axis=1).T) > table.rows
    return table.split_by(label) if shared else table


# -- no parameters -------------------------------------------------------------------------------------------


def _without_parameters(rule: Any, form: Any) -> Mirrored:
    """The state for parameters without arrays: what stands in place of them stands in it for every array of
    the state, so that Optax's placeholder finds where parameters are.
    """
    if not isinstance(rule, Rule | Mapping):
        raise BadState(
            "as_optax(function) has to see the parameters, and these have no array; give it a rule"
        )
    several: Any = rule.values() if isinstance(rule, Mapping) else [rule]
    rules = {order_of(r): r for r in several if r is not None}
    trees: dict[str, Any] = {}
    scalars: list[Any] = []
    for _, r in sorted(rules.items()):
        x = jnp.zeros((1, 1))
        start = started(r, x, KeyPath("params"))
        program = program_of(r, start, Shape.of(x, "interpret"))
        trees |= {slot_name(s.path): jax.tree.unflatten(form, []) for s in program.slots}
        own = _table([[*numbers(r), *(v for _, v in flatten(start) if not registry.isarray(v))]])
        own = jnp.pad(own, ((0, 0), (0, program.hidden)))
        names = names_of(program, r)
        scalars.append(labelled(*names, own[0], jnp.int32(0), own[:, : program.hypers]))
    static = Static(structure_of(_nothing({})), (), free=True)
    return reflected(Reflection(static, {"arrays": trees, "rules": tuple(scalars)}))


def _nothing(named: dict[str, Any]) -> Store:
    """The store of parameters of which none is trained."""
    layout, found = flatten_model(named)
    return Store(layout, [None] * len(found), [], np.zeros(len(found), bool))


def _counted(state: Mirrored) -> Mirrored:
    """A state without parameters after another step."""
    held = reflection_of(state)
    rules = tuple({**scalars, "count": scalars["count"] + 1} for scalars in held.children["rules"])
    return reflected(Reflection(held.static, {**held.children, "rules": rules}))


# -- Optax here ----------------------------------------------------------------------------------------------


def valued(extra: dict[str, Any], loss: Any) -> dict[str, Any]:
    """What a transformation is given besides gradients: the loss by Optax's name."""
    return extra if loss is None else {"value": loss, **extra}


class WholeState:
    """The state of a transformation of Optax beside a model; `update` steps the model with it."""

    def __init__(self, rule: "from_optax", layout: Layout, inner: optax.OptState) -> None:
        self.rule, self.layout, self.inner = rule, layout, inner

    def __repr__(self) -> str:
        return f"WholeState({self.inner!r})"

    def stepped(self, model: Any, grads: Any, *, loss: Any = None, **extra: Any) -> Any:
        """(state, model) after a step. `extra` goes to the transformation: for a line search `value`, `grad`
        and `value_fn`, a loss of the model.
        """
        inner, new = self._computed(model, grads, valued(extra, loss))
        return WholeState(self.rule, self.layout, inner), rebuild(self.layout.root, model, new)

    def stepped_(self, model: Any, grads: Any, *, loss: Any = None, **extra: Any) -> Any:
        """The same step in place: this state goes on, and modules of NNX are written."""
        inner, new = self._computed(model, grads, valued(extra, loss))
        made, writes = rebuilt(self.layout.root, model, new)
        with held():
            self.inner = inner
            for write in writes:
                write()
        return self, made

    def _computed(self, model: Any, grads: Any, extra: dict[str, Any]) -> tuple[Any, dict[int, Any]]:
        """(the state of the transformation, the parameters by leaf) after a step."""
        root = self.layout.root
        xs = _by_leaf(root, flatten_up_to(root, model, KeyPath()))
        slopes = _summed(root, gradients_up_to(root, grads, KeyPath()))
        for leaf, g in slopes.items():
            name = self.layout.paths[leaf].code("grads")
            if g is None:
                raise TreeMismatch(
                    f"{name} is None; a transformation of Optax steps all parameters at once: wrap it in "
                    "optax.masked, or give zeros"
                )
            if tuple(g.shape) != tuple(xs[leaf].shape):
                raise TreeMismatch(
                    f"gradient of shape {tuple(g.shape)} for parameters of shape {tuple(xs[leaf].shape)}, at "
                    f"{name}"
                )
        names = {leaf: str(self.layout.paths[leaf]) for leaf in xs}
        old = {names[i]: x for i, x in xs.items()}

        def whole(named: dict[str, Any]) -> Any:
            return rebuild(root, model, {i: named[name] for i, name in names.items()})

        if "value_fn" in extra:
            loss = extra["value_fn"]
            extra["value_fn"] = lambda named, **more: loss(whole(named), **more)
        if "grad" in extra:
            given = _summed(root, gradients_up_to(root, extra["grad"], KeyPath()))
            extra["grad"] = {names[i]: g for i, g in given.items()}
        found: Any = self.rule.tx.update({names[i]: g for i, g in slopes.items()}, self.inner, old, **extra)
        steps, inner = found
        new = cast("dict[str, Any]", optax.apply_updates(old, steps))
        return inner, {i: new[name] for i, name in names.items()}


def _by_leaf(root: Any, values: Any) -> dict[int, Any]:
    """What stands at the first place of every leaf."""
    found: dict[int, Any] = {}
    for leaf, value in zip(root.leaves, values, strict=True):
        found.setdefault(leaf, value)
    return found


def _summed(root: Any, grads: Any) -> dict[int, Any]:
    """The gradient of every leaf, summed over its places; the same object at several counts once."""
    places: dict[int, list[Any]] = {}
    for leaf, g in zip(root.leaves, grads, strict=True):
        seen = places.setdefault(leaf, [])
        if g is not None and all(g is not other for other in seen):
            seen.append(g)
    return {leaf: functools.reduce(operator.add, gs) if gs else None for leaf, gs in places.items()}


class _Static:
    """What of a state is no array; equal for one transformation over models that are walked alike."""

    def __init__(self, rule: "from_optax", layout: Layout) -> None:
        self.rule, self.layout = rule, layout

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or self.rule.tx is not other.rule.tx:
            return False
        return self.layout.key == other.layout.key

    def __hash__(self) -> int:
        return hash((id(self.rule.tx), self.layout.key))


jax.tree_util.register_pytree_with_keys(
    WholeState,
    lambda s: (((jax.tree_util.GetAttrKey("inner"), s.inner),), _Static(s.rule, s.layout)),
    lambda static, children: WholeState(static.rule, static.layout, next(iter(children))),
)


class from_optax:  # noqa: N801 it is used as a function
    """A transformation of Optax as a rule for a whole model: `setup(from_optax(optax.lbfgs()), model)`.

    `update(state, model, grads)` steps all parameters together; ties count once. What needs more, such as the
    line search of L-BFGS, is given to the state: `state.stepped(model, grads, value=v, grad=grads,
    value_fn=loss)`. There is no Leaf for each array, so freeze and adjust do not apply: use Optax's wrappers.
    """

    def __init__(self, tx: optax.GradientTransformation) -> None:
        if isinstance(tx, Rule) or not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise BadState(
                f"from_optax takes a transformation of Optax, such as optax.adam(1e-3); {tx!r} was given"
            )
        self.tx = tx

    def __repr__(self) -> str:
        return f"from_optax({self.tx!r})"

    def setup(self, model: Any, ties: Ties = ()) -> WholeState:
        """The state for a model."""
        layout, arrays = flatten_model(model, ties)
        for path, x in zip(layout.paths, arrays, strict=True):
            if registry.library(x).name != "jax":
                raise BadState(f"{path.code()} is no array of JAX, which is what Optax steps")
        names = map(str, layout.paths)
        return WholeState(self, layout, self.tx.init(dict(zip(names, arrays, strict=True))))
