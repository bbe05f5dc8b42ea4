"""How does a model take a step? `setup` puts a rule and state beside each array; `update` walks them
together.
"""

import contextlib
import dataclasses
import functools
import itertools
import operator
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.engines.choose import symbolic_task, task_for
from optimisers.engines.signals import held
from optimisers.engines.sparse import Rows, by_rows, sparse
from optimisers.engines.task import Job, Result, Task, ready
from optimisers.errors import BadSetting, BadState, FloatParameter, NoMatch, NoParameters, TreeMismatch
from optimisers.graph.passes import store_pass
from optimisers.rule import Rule
from optimisers.state.group import Group, Shape, grouped, started
from optimisers.state.leaf import Branch, Leaf, handle, parts
from optimisers.state.select import listed
from optimisers.state.store import Store
from optimisers.state.table import CAPTURED, ScalarTable
from optimisers.tree.path import KeyPath, matches
from optimisers.tree.walk import Layout, Node, Ties, gather, gather_gradients, rebuild, survey

# -- setup ---------------------------------------------------------------------------------------------------


def setup(
    rule: Any,
    model: Any,
    *,
    engine: str | None = None,
    capturable: bool = False,
    ties: Ties = (),
) -> Any:
    """The state that trains `model` by `rule`: a tree with the model's structure and a Leaf for each array.

    `rule` is a rule; or a dict {glob: rule}, where the first glob that matches a path wins; or a function
    (path, array) -> rule. A rule of None trains nothing there. `engine="interpret"` computes every step with
    the array library's own functions instead of fused kernels. `capturable=True`, for tensors on one CUDA
    device, keeps the clock and all numbers of the state there: then a CUDA graph may hold a step, and what is
    adjusted between its replays counts from the next one on; checks of the rules are left out, since nobody
    waits for them.

    Where arrays can be written, the same array at several places is one parameter. Arrays of JAX are tied by
    an object of Flax NNX that stands at several places, or by `ties`: tuples of the paths that hold one
    array, or of globs that match one path each, such as `ties=[("encoder.w", "decoder.w")]`.

    Raises BadState if rule and model are mixed up, NoMatch for a glob that matches nothing or a parameter
    that no glob matches, TraceError for a rule that cannot be traced, BadSetting for an engine that cannot
    step the model, or a model that cannot be captured. Warns if there is nothing to train.
    """
    for compiler in registry.compilers:
        if compiler.looks():
            return compiler.aside(setup, rule, model, engine=engine, capturable=capturable, ties=ties)
    _refuse_model(model)
    if not isinstance(rule, type) and hasattr(rule, "setup"):
        return rule.setup(model, ties)
    layout, arrays = survey(model, ties)
    for path, value in layout.floats if arrays else []:
        warnings.warn(
            f"{path.code()} is the number {value}, which does not train; write np.array({value}) to train it",
            FloatParameter,
            stacklevel=2,
        )
    if not arrays:
        warnings.warn(
            "the model has no array of floating point or complex numbers: nothing will be trained",
            NoParameters,
            stacklevel=2,
        )
    rules = _choose(rule, layout, arrays)
    shapes = [
        None if r is None else Shape.of(x, engine, capturable=capturable)
        for r, x in zip(rules, arrays, strict=True)
    ]
    entries = [
        (i, r, started(r, x, layout.paths[i].code()))
        for i, (r, x) in enumerate(zip(rules, arrays, strict=True))
        if r is not None
    ]
    if capturable:
        _refuse_uncapturable(shapes)
    store = Store(layout, shapes, grouped(entries, shapes), np.zeros(len(arrays), bool), engine=engine)
    for group in store.groups:
        task_for(group, engine, group.memo)
    for name in {kind.name for kind in shapes if kind is not None}:
        if (known := registry.hooks(name).known) is not None:
            known(store)
    return handle(store, layout.root, KeyPath())


def _refuse_uncapturable(shapes: Sequence[Shape | None]) -> None:
    """Raise BadSetting unless the parameters are all on one device whose steps can be captured."""
    found = {(k.name, k.device) for k in shapes if k is not None}
    if len(found) != 1 or not registry.named(next(iter(found))[0]).capturable:
        where = ", ".join(f"{name} on {device}" for name, device in sorted(found)) or "nothing"
        raise BadSetting(f"capturable=True takes tensors of torch on one CUDA device; this model has {where}")


def _refuse_model(model: Any) -> None:
    """Raise BadState for what is no model."""
    if isinstance(model, Leaf | Branch):
        raise BadState("setup was given a state where the model goes; write setup(rule, model)")
    if isinstance(model, Rule):
        raise BadState(f"setup was given the rule {model!r} where the model goes; write setup(rule, model)")
    if isinstance(model, type):
        name = model.__name__
        raise BadState(
            f"setup was given the class {name} where the model goes; write setup(rule, {name}(...))"
        )
    if isinstance(model, Generator):
        raise BadState(
            "setup was given a generator where the model goes; write setup(rule, module), or a list of "
            "tensors"
        )


def _choose(rule: Any, layout: Layout, arrays: list[Any]) -> list[Any]:
    """The rule of each leaf."""
    if isinstance(rule, Mapping):
        return _by_glob(dict(rule), layout)
    if callable(rule) and not isinstance(rule, type | Rule):
        return [rule(path, x) for path, x in zip(layout.paths, arrays, strict=True)]
    if not isinstance(rule, Rule):
        several = isinstance(rule, list | tuple)
        hint = f"write {rule.__name__}()" if isinstance(rule, type) else "write setup(Adam(), model)"
        hint = "write setup(Chain(...), model)" if several else hint
        raise BadState(f"setup was given {rule!r} where the rule goes; {hint}")
    return [rule] * len(arrays)


def _by_glob(rules: dict[str, Any], layout: Layout) -> list[Any]:
    for glob in rules:
        if not isinstance(glob, str):
            raise NoMatch(f"{glob!r} is no selector; a dict of rules takes globs, such as '**.bias'")
    used: set[str] = set()
    won: set[str] = set()
    chosen: list[Any] = []
    for places in layout.places:
        fitting = [g for g in rules if any(matches(g, p) for p in places)]
        used.update(fitting)
        if not fitting:
            raise NoMatch(
                f"no rule for {places[0].code()}; the globs are {', '.join(map(repr, rules))}; "
                f'add "**" for the rest, with None as its rule to train nothing there'
            )
        won.add(fitting[0])
        chosen.append(rules[fitting[0]])
    for glob in rules:
        if glob not in used:
            raise NoMatch(f"{glob!r} matches no parameter; there are {listed(layout.paths)}")
        if glob not in won and glob != "**":
            raise NoMatch(
                f"{glob!r} takes no parameter, since globs before it match all that it does; put it first"
            )
    return chosen


# -- update --------------------------------------------------------------------------------------------------


class _Missing:
    def __repr__(self) -> str:
        return "<required>"


_MISSING: Any = _Missing()


def update(state: Any, model: Any, grads: Any = _MISSING, *more: Any) -> Any:
    """(state, model) after one step, leaving the old arrays and the old state as they were.

    `grads` has the structure of `model`; None in it means "no step here", which is not the same as a zero
    gradient: momenta stay untouched too. `more` are further gradients (of second order, say) for rules that
    ask for them. What takes no step is shared with the old model. `state` may be a part of a state tree, with
    that part of the model.

    Raises TreeMismatch, naming the path, if structure, shapes or types do not fit, BadState for mixed-up
    arguments, and what the rules raise, such as DomainError for a norm that is not finite.
    """
    for compiler in registry.compilers:
        if compiler.looks():
            return compiler.update(state, model, _given(grads, "update"), more)
    if hasattr(type(state), "stepped"):
        return state.stepped(model, _given(grads, "update"))
    store, node, path = _opened(state, model)
    xs, orders = walked(node, path, model, (_given(grads, "update"), *more))
    successor, new = stepped(store, node, path, xs, orders)
    return handle(successor, node, path), rebuild(node, model, new)


def walked(node: Node, path: KeyPath, model: Any, grads: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    """(parameters, gradients of each order) at the places below a node."""
    return gather(node, model, path), [gather_gradients(node, g, path) for g in grads]


def stepped(
    store: Store, node: Node, path: KeyPath, xs: Any, orders: list[Any]
) -> tuple[Store, dict[int, Any]]:
    """(the store after a step with new arrays, the new parameters by leaf)."""
    names = {group.kind.name for group in store.groups}
    run = registry.hooks(names.pop()).stepped if len(names) == 1 else None
    found = None if run is None else run(store, node, path, xs, orders)
    return evaluated(store, node, xs, orders) if found is None else found


def evaluated(store: Store, node: Node, xs: Any, orders: list[Any]) -> tuple[Store, dict[int, Any]]:
    """The same, by the engines."""
    step = _Step(store, node, xs, orders, inplace=False)
    new = step.run()
    groups = [step.targets.get(g) or group.fork() for g, group in enumerate(store.groups)]
    return store.successor(groups), new


def update_(state: Any, model: Any, grads: Any = _MISSING, *more: Any) -> Any:
    """(state, model) after one step in place: the same numbers as `update`, written into the arrays that are
    there.

    Arrays that may not be written (read-only ones) are replaced in the model that is returned, and only
    there. If it raises, nothing has changed. Arguments and errors are those of `update`.

    While the step is stored, handlers of signals that are written in Python (Ctrl-C is one) wait, in the main
    thread: they are called when all of it is stored, and find no half step. For that they are replaced for
    this moment, and put back; `update`, whose new arrays nobody has yet, replaces none.
    """
    for compiler in registry.compilers:
        if compiler.looks():
            return compiler.aside(update_, state, model, grads, *more)
    if hasattr(type(state), "stepped"):
        return state.stepped(model, _given(grads, "update_"))
    store, node, path = _opened(state, model)
    xs, orders = walked(node, path, model, (_given(grads, "update_"), *more))
    if any(g.kind.library.immutable for g in store.groups):
        successor, new = stepped(store, node, path, xs, orders)
        with held():
            store.become(successor)
    else:
        new = _Step(store, node, xs, orders, inplace=True).run()
    return state, rebuild(node, model, new, inplace=True) if new else model


def update_scaled(state: Any, model: Any, grads: Any, scaling: tuple[Any, Any]) -> None:
    """A step in place whose gradients are divided by a number first, and which is none where another is not
    0: both on the device, where they stay. For states that say `takes_scaling`.
    """
    store, node, path = parts(state)
    xs, orders = walked(node, path, model, (grads,))
    kind = store.groups[0].kind
    scale, found = (kind.library.moved(value, kind.device) for value in scaling)
    _Step(store, node, xs, orders, inplace=True, scaling=(scale, found)).run()


def takes_scaling(state: Any) -> bool:
    """Whether a step of this state may depend on numbers on the device alone."""
    store = parts(state)[0]
    whole = all(slot.shape is None for g in store.groups for slot in g.program.slots)
    stored = [store_pass(g.program, None) for g in store.groups]
    return store.capturable and whole and not any(p is not None and p.free for p in stored)


def _opened(state: Any, model: Any) -> tuple[Store, Node, KeyPath]:
    if isinstance(model, Leaf | Branch):
        raise BadState("the second argument is a state; the order is update(state, model, grads)")
    store, node, path = parts(state)
    kind = store.shapes[node.leaf] if node.leaf >= 0 and len(store.layout.places[node.leaf]) > 1 else None
    if kind is not None and registry.isarray(model):
        library = registry.library(model)
        if (tuple(model.shape), library.dense_strides(model)) != (kind.shape, kind.strides):
            raise TreeMismatch(
                f"this is a transposed view of {path.code()}, whose Leaf speaks for that place; update a "
                "part of the model that holds it"
            )
    return store, node, path


def _given(grads: Any, name: str) -> Any:
    """The gradients; raises BadState if they are missing."""
    if grads is _MISSING:
        raise BadState(f"the gradients are missing; write state, model = {name}(state, model, grads)")
    return grads


class _Step:
    """One step of a part of a state, on its way to the engines and back."""

    def __init__(
        self,
        store: Store,
        node: Node,
        xs: Sequence[Any],
        orders: list[Sequence[Any]],
        *,
        inplace: bool,
        scaling: tuple[Any, Any] | None = None,
    ) -> None:
        self.store, self.inplace, self.scaling = store, inplace, scaling
        store.settle()
        self.targets: dict[int, Group] = {}
        plan = _plan(store, node)
        if plan.first is not None:
            xs, orders = plan.untied(xs, orders, store.layout)
        active = _active(store, plan, orders)
        self.symbolic = self.followed(xs, orders)
        if self.symbolic and store.capturable:
            raise BadState(CAPTURED)
        self.jobs: list[tuple[Group, Any, Job, ScalarTable, type[Task] | None]] = []
        self.parts = plan.parts
        for g, inside, at in plan.parts:
            members, taken = inside, at
            if active is not None:
                on = active[at]
                if not on.all():
                    members, taken = (np.arange(len(on)) if inside is None else inside)[on], at[on]
            for chosen, at_chosen, kind in self.by_kind(g, members, taken, orders):
                whole = plan.whole and chosen is None
                given = [xs, *orders] if whole else [[v[i] for i in at_chosen] for v in (xs, *orders)]
                self.jobs.append((*self.job(g, chosen, given[0], tuple(given[1:])), kind))

    def by_kind(self, g: int, members: Any, taken: Any, orders: list[Sequence[Any]]) -> list[Any]:
        """(members, where they stand, kind of task) of a group: those whose gradient touches a few rows are
        stepped by rows, if the rule allows it.
        """
        group = self.store.groups[g]
        if not len(taken):
            return []
        whole = group.kind.name == "numpy" or self.symbolic or self.store.capturable
        if "by rows" not in group.memo:
            group.memo["by rows"] = by_rows(group.rule)
        if whole or len(orders) > 1 or not group.memo["by rows"]:
            return [(members, taken, None)]
        touched = np.array(sparse([orders[0][i] for i in taken]), bool)
        if not touched.any():
            return [(members, taken, None)]
        every = np.arange(len(taken)) if members is None else members
        found = [(every[touched], taken[touched], Rows), (every[~touched], taken[~touched], None)]
        return [kinds for kinds in found if len(kinds[1])]

    def followed(self, xs: Sequence[Any], orders: list[Sequence[Any]]) -> bool:
        """Whether somebody follows what becomes of the numbers or of the arrays: a transform, a compiler."""
        found = self.store.traced
        for library in {g.kind.name: g.kind.library for g in self.store.groups}.values():
            found = found or library.follows(xs, orders, inplace=self.inplace)
            if found and self.inplace:
                raise BadState(
                    "update_ writes in place, which nobody can follow; write update for a step that is "
                    "differentiated or compiled"
                )
        return found

    def job(
        self, g: int, members: Any, xs: Sequence[Any], grads: tuple[Sequence[Any], ...]
    ) -> tuple[Group, Any, Job, ScalarTable]:
        """(group that takes the result, its members that are stepped or None for all, their job, the table
        that it reads).
        """
        group = self.store.groups[g]
        if g not in self.targets:
            whole = members is None
            self.targets[g] = (
                group.owned() if self.inplace else group.successor(whole=whole, symbolic=self.symbolic)
            )
        target = self.targets[g]
        memo, places, leaves = group.memo, group.places, group.leaves
        slots, out = group.slots, target.slots
        if members is not None:
            target.table = target.table.split(members)
            memo = _memo(group, members)
            places, leaves = memo["places"], leaves[members]
            slots = tuple(p.pick(q) for p, q in zip(slots, memo["slots"], strict=True))
            out = tuple(p.pick(q) for p, q in zip(out, memo["slots"], strict=True))
        if self.symbolic:
            target.table = target.table.to_traced(group.kind.library)
        table, paths = target.table, self.store.layout.paths
        job = Job(
            rule=group.rule,
            program=group.program_for(len(grads)),
            library=group.kind.library,
            dtype=group.kind.dtype,
            x=xs,
            grads=grads,
            slots=slots,
            out=out,
            strides=places.strides,
            shapes=places.shapes,
            sizes=places.sizes,
            numbers=table.values,
            row=table.row if members is None else table.row[members],
            clock=table.clock,
            inplace=self.inplace,
            symbolic=self.symbolic,
            device=group.kind.device,
            bundled=group.kind.bundled,
            capturable=group.kind.capturable,
            scaling=self.scaling,
            code=lambda i, root: paths[leaves[i]].code(root),
            memo=memo,
        )
        return target, members, job, table

    def run(self) -> dict[int, Any]:
        """Take the step; the new parameters, by leaf, where they are other objects than the old."""
        tasks = [
            (kind or (symbolic_task(j.library) if j.symbolic else task_for(g, self.store.engine, j.memo)))(j)
            for g, _, j, _, kind in self.jobs
        ]
        with np.errstate(
            all="ignore"
        ):  # infinities and NaN are answers; checks of the rules say which are not
            ready(tasks)
            with held() if self.inplace else contextlib.nullcontext():  # what is written anew, nobody sees
                return self.stored([t.commit() for t in tasks])

    def stored(self, results: Sequence[Result]) -> dict[int, Any]:
        new: dict[int, Any] = {}
        with self.store.lock:
            for (target, members, job, table, _), result in zip(self.jobs, results, strict=True):
                target.table = target.table.write_counters(
                    members, result.counters, of_leaf=result.of_leaf, computed=table
                )
                if result.x is not job.x:
                    leaves = (target.leaves if members is None else target.leaves[members]).tolist()
                    new.update(
                        {i: x for i, x, was in zip(leaves, result.x, job.x, strict=True) if x is not was}
                    )
            self.tick()
        if self.inplace:
            self.store.changed()
        return new

    def tick(self) -> None:
        """Count the update for every leaf that it covered, stepped or not."""
        skipped = None if self.scaling is None else self.scaling[1]
        for g, inside, _ in self.parts:
            if g not in self.targets:
                group = self.store.groups[g]
                self.targets[g] = group if self.inplace else group.fork()
            self.targets[g].table = self.targets[g].table.tick(inside, skipped)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """How the places below a node come to the groups."""

    leaves: list[int]
    """The different leaves, in the order of the walk."""
    parts: list[tuple[int, Any, Any]]
    """(group, its members here or None for all, where they stand in `leaves`)."""
    whole: bool
    """Whether all of it is one group, in order."""
    first: list[int] | None
    """Where in the walk each leaf is met first; None where the walk meets each leaf once, as it is."""
    ties: dict[int, list[tuple[int, Any]]]
    """For each leaf (by its number in `leaves`) that has several places or other axes: (number in the walk,
    axes).
    """
    numbers: Any
    """The leaves as an index."""

    def untied(self, xs: Sequence[Any], orders: list[Sequence[Any]], layout: Layout) -> Any:
        """(parameters, gradients) of each leaf, with the axes of its first place in the model.

        Gradients are summed over the places; the same object at several of them counts once.
        """
        assert self.first is not None
        alone = [xs[i] for i in self.first]
        summed = [[gs[i] for i in self.first] for gs in orders]
        for n, places in self.ties.items():
            paths = layout.places[self.leaves[n]]
            views = [_turned(xs[place], axes) for place, axes in places]
            for other in views[1:]:
                _still_tied(views[0], other, paths)
            alone[n] = views[0]
            for gs, to in zip(orders, summed, strict=True):
                to[n] = _sum_of_places([(gs[place], axes) for place, axes in places], paths)
        return alone, summed


def _turned(x: Any, axes: Any) -> Any:
    """What stands at a place, with the axes of the first place of its leaf."""
    if axes is None or not registry.isarray(x) or x.ndim != len(axes):
        return x
    return registry.library(x).permuted(x, tuple(np.argsort(axes)))


def _plan(store: Store, node: Node) -> _Plan:
    if id(node) not in store.plans:
        leaves = [i for i in dict.fromkeys(node.leaves) if store.shapes[i] is not None]
        seen: dict[int, list[tuple[int, Any]]] = {}
        for place, (leaf, axes) in enumerate(_places(node)):
            seen.setdefault(leaf, []).append((place, axes))
        ties = {n: seen[i] for n, i in enumerate(leaves) if len(seen[i]) > 1 or seen[i][0][1] is not None}
        first = None if leaves == list(node.leaves) and not ties else [seen[i][0][0] for i in leaves]
        at = {leaf: n for n, leaf in enumerate(leaves)}
        parts: list[tuple[int, Any, Any]] = []
        for g, group in enumerate(store.groups):
            members = np.array([m for m, leaf in enumerate(group.leaves) if int(leaf) in at], np.int64)
            if len(members):
                inside = None if len(members) == len(group.leaves) else members
                parts.append((g, inside, np.array([at[int(i)] for i in group.leaves[members]], np.int64)))
        whole = len(parts) == 1 and bool((parts[0][2] == np.arange(len(leaves))).all())
        store.plans[id(node)] = node, _Plan(leaves, parts, whole, first, ties, np.array(leaves, np.int64))
    return store.plans[id(node)][1]


def _places(node: Node) -> Iterator[tuple[int, Any]]:
    """(leaf, axes) of every place below a node, in the order of the walk."""
    if node.leaf >= 0:
        yield node.leaf, node.axes
    for _, child in node.live:
        yield from _places(child)


def _active(store: Store, plan: _Plan, orders: list[Sequence[Any]]) -> Any:
    """Which leaves are stepped, as a mask; None for all: those that are not frozen and have a gradient."""
    some = any(map(operator.is_, orders[0], itertools.repeat(None)))
    missing = [n for n, g in enumerate(orders[0]) if g is None] if some else []
    frozen = store.frozen[plan.numbers]
    if not missing and not frozen.any():
        return None
    active = ~frozen
    active[missing] = False
    return active


def _still_tied(first: Any, other: Any, places: list[KeyPath]) -> None:
    """Raise TreeMismatch unless two places still share one array, as `setup` saw."""
    if first is other:
        return
    library = registry.library(first)
    if registry.library_of(type(other)) is not library or not library.same_array(first, other):
        names = " and ".join(p.code() for p in places)
        raise TreeMismatch(
            f"{names} were one array at `setup` and are not now; tie them again, or call `setup` again"
        )


def refuse_untied(store: Store, node: Node, xs: Sequence[Any]) -> None:
    """Raise TreeMismatch where places that were one array at `setup` are not now."""
    plan = _plan(store, node)
    for n, places in plan.ties.items():
        views = [_turned(xs[place], axes) for place, axes in places]
        for other in views[1:]:
            _still_tied(views[0], other, store.layout.places[plan.leaves[n]])


def _sum_of_places(grads: Sequence[tuple[Any, Any]], paths: list[KeyPath]) -> Any:
    """The gradient of a tied leaf: the sum of those that are there; None if there is none."""
    found: list[Any] = []
    for n, ((g, axes), path) in enumerate(zip(grads, paths, strict=False)):
        if g is None or any(g is other for other, _ in grads[:n]):
            continue
        if not registry.isarray(g):
            raise TreeMismatch(
                f"{path.code('grads')} is a {type(g).__name__}; it takes an array, or None for no step"
            )
        found.append(_turned(g, axes))
    for g in found[1:]:
        if g.shape != found[0].shape:
            raise TreeMismatch(
                f"gradients of shapes {tuple(found[0].shape)} and {tuple(g.shape)} for one array, at "
                f"{' and '.join(p.code('grads') for p in paths)}"
            )
    if len(found) <= 1:
        return found[0] if found else None
    add = registry.library(found[0]).WORDS["add"]  # which knows on which device
    return functools.reduce(add, (registry.library(g).widened(g) for g in found))


def _memo(group: Group, members: Any) -> dict[str, Any]:
    """Tables for some of the members of a group, kept for the patterns seen last."""
    subsets: dict[bytes, dict[str, Any]] = group.memo.setdefault("subsets", {})
    key = members.tobytes()
    if key not in subsets:
        idle = [k for k, kept in subsets.items() if not kept.get("captured")]
        if len(idle) >= SUBSETS:
            subsets.pop(idle[0])
        slots = [p.places.pick(members) for p in group.slots]
        subsets[key] = {"places": group.places.pick(members), "slots": slots}
    return subsets[key]


SUBSETS = 16
"""How many patterns of stepped leaves a group remembers."""
