"""Where is the state of a rule in Keras? In variables, which Keras saves, loads and hands through `jit`.

There is a variable for each array that a rule keeps beside a parameter; and for each group of parameters one
of clocks and one of numbers, with a row for each parameter. Steps of torch write into the memory of these
variables; those of JAX, and of torch inside a StatelessScope, read their values and assign new ones.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np

from optimisers.arrays import registry
from optimisers.errors import BadSetting, BadState
from optimisers.graph.expr import order
from optimisers.keras.library import keras
from optimisers.keras.rates import Rates, shortest, written
from optimisers.rule import Rule, needed, refuse_shape
from optimisers.settings import parts as parts_of_value
from optimisers.settings import skeleton
from optimisers.state.buffers import Separate
from optimisers.state.group import Group
from optimisers.state.leaf import handle, parts
from optimisers.state.store import Store
from optimisers.state.structure import structure_of
from optimisers.state.table import TracedTable
from optimisers.step.choose import choose
from optimisers.step.update import stepped, store_of, update_listed
from optimisers.tree.children import container_of
from optimisers.tree.layout import Layout, Node, Place, fetcher, picker
from optimisers.tree.path import KeyPath, named_path

MakeVariable = Callable[[Any, str, Any], Any]
"""(value, name, the parameter that it is like, or None) -> a variable of Keras."""


@final
class Kept:
    """The state of some parameters of Keras, by path."""

    def __init__(self, variables: Mapping[str, Any], rates: Rates, make: MakeVariable) -> None:
        named = {name: keras.ops.stop_gradient(v.value) for name, v in variables.items()}
        self.names = list(named)
        self.store = _set_up(named, rates)
        self.root = self.store.layout.root
        self.columns = [rates.columns(group.rule) for group in self.store.groups]
        """The hyper-parameters of each group to which the learning rate is written."""
        self.inplace = keras.config.backend() == "torch" and not any(g.opaque for g in self.store.groups)
        """Whether the arrays of the variables are those of the store."""
        apart = self.store.apart([_apart(group) for group in self.store.groups])
        self.structure = structure_of(apart)
        self.asks_for_loss = any(_asks_for_loss(group) for group in self.store.groups)
        self.variables = [
            make(value, name, None if like is None else variables[like])
            for value, (name, like) in zip(_values(apart), self._labels(), strict=True)
        ]
        """Those of the state, in an order that does not depend on the backend."""
        self.shown: list[tuple[Any, Any, bytes]] = []
        """Of each group, where its clocks and numbers are shown, and what stood there last."""
        if self.inplace:
            self._show_all()

    def _labels(self) -> Iterator[tuple[str, str | None]]:
        """(name, the parameter whose shape it has) of each variable."""
        for k, group in enumerate(self.store.groups):
            for spec in group.program.slots:
                at = "_".join(map(str, spec.path)) or "state"
                for leaf in group.leaves.tolist():
                    name = self.names[leaf]
                    yield f"{name}_{at}".replace(".", "_"), name if spec.shape is None else None
            yield f"numbers_{k}", None
            yield f"clock_{k}", None

    # -- steps --

    def step_(self, xs: Mapping[str, Any], grads: Mapping[str, Any], rate: Any, loss: Any) -> None:
        """A step in place of parameters and their gradients by path; those that have none take none."""
        self.read()
        given = shortest(rate)
        for group, columns in zip(self.store.groups, self.columns, strict=True):
            rows = np.arange(group.table.rows)
            if columns and (group.table.column(rows, columns[0]) != given).any():
                group.table = written(group.table, columns, given)
        listed = [xs[name] for name in self.names], [grads.get(name) for name in self.names]
        update_listed(self.store, self.root, listed[0], [listed[1]], loss=loss, after=self._show)

    def step(self, xs: Mapping[str, Any], grads: Mapping[str, Any], rate: Any, loss: Any) -> dict[str, Any]:
        """The new parameters, by path, after a step that assigns to variables all else that changes."""
        store = self._filled()
        for group, columns in zip(store.groups, self.columns, strict=True):
            given = rate if group.table.traced else shortest(keras.ops.convert_to_numpy(rate))
            group.table = written(group.table, columns, given)
        stop = keras.ops.stop_gradient
        listed = [stop(xs[name]) for name in self.names], [grads.get(name) for name in self.names]
        after, new = stepped(store, self.root, KeyPath(), listed[0], [listed[1]], loss)
        for variable, value in zip(self.variables, _values(after), strict=True):
            variable.assign(value)
        return {self.names[leaf]: value for leaf, value in new.items()}

    def _filled(self) -> Store:
        """A store of what the variables hold now."""
        arrays: list[Any] = []
        given = iter([keras.ops.stop_gradient(v.value) for v in self.variables])
        for group in self.structure.store.groups:
            for slot in group.slots:
                own = [next(given) for _ in group.leaves]
                if not isinstance(slot, Separate):
                    fresh = slot.empty()
                    fresh.put_many(np.arange(len(own)), own)
                    own = fresh.buffers
                arrays += own
            arrays += [next(given), next(given)]
        store = self.structure.filled(arrays)
        store.settle()
        return store

    # -- what is in place --

    def _show_all(self) -> None:
        """Let the variables show the memory of the store."""
        given = iter(self.variables)
        for group in self.store.groups:
            for _ in range(len(group.slots) * len(group.leaves)):
                next(given)
            numbers, clock = (registry.library(v.value).to_numpy(v.value) for v in (next(given), next(given)))
            self.shown.append((numbers, clock, numbers.tobytes() + clock.tobytes()))

    def _show(self) -> None:
        """Show clocks and numbers as they are after a step."""
        for k, (group, (numbers, clock, _)) in enumerate(zip(self.store.groups, self.shown, strict=True)):
            table = group.table
            numbers[:], clock[:] = table.values[table.row], table.clock[table.row]
            self.shown[k] = numbers, clock, numbers.tobytes() + clock.tobytes()

    def read(self) -> None:
        """Take over clocks and numbers that were written into the variables, by loading say."""
        for k, (numbers, clock, known) in enumerate(self.shown):
            if (found := numbers.tobytes() + clock.tobytes()) != known:
                group, apart = self.store.groups[k], self.structure.store.groups[k]
                library = group.kind.library.scalars
                table = apart.table.filled(library.table(numbers), library.table([clock])[0])
                group.table = table.settle().merge_equal()
                self.shown[k] = numbers, clock, found

    # -- the state as a tree --

    def seen(self) -> Any:
        """The state as `setup` gives it, a copy."""
        if not self.inplace:
            return handle(self._filled(), self.root, KeyPath())
        self.read()
        return handle(copy.deepcopy(self.store), self.root, KeyPath())

    def take(self, tree: object) -> float | None:
        """Take over a copy that was changed; its learning rate, None where rules have none.

        Raises BadState for the state of another model or of other rules, or with frozen leaves, BadSetting
        for rates of single parameters.
        """
        given, mine = parts(tree)[0], self.structure.store
        if [_kind(group) for group in given.groups] != [_kind(group) for group in mine.groups]:
            raise BadState(
                "this is the state of another model, or of rules of another structure; numbers of the rules "
                "and arrays can be changed: optimizer.tree = opt.adjust(optimizer.tree, lam=0.1)"
            )
        if given.frozen.any():
            raise BadState("the state has frozen leaves; in Keras write layer.trainable = False")
        rates = {
            float(group.table.read_hypers(i)[j])
            for group, columns in zip(given.groups, self.columns, strict=True)
            for j in columns
            for i in range(len(group.leaves))
        }
        if len(rates) > 1:
            raise BadSetting(
                f"single parameters have the learning rates {', '.join(map(str, sorted(rates)))}, and Keras "
                "has one; give KerasOptimizer a dict of rules"
            )
        for variable, value in zip(self.variables, _values(given), strict=True):
            variable.assign(value)
        return rates.pop() if rates else None


def _set_up(named: dict[str, Any], rates: Rates) -> Store:
    """The state of parameters by path; raises BadSetting for rules that no step of Keras can serve."""
    layout, arrays = _layout(named), list(named.values())
    rules = [rates.governed(rule) for rule in choose(rates.rule, layout, arrays)]
    for name, rule, x in zip(named, rules, arrays, strict=True):
        if rule is None:
            continue
        if needed(rule) or any(isinstance(part, Rule) and part.second_order for part in parts_of_value(rule)):
            raise BadSetting(f"{rule!r} asks for second gradients, which Keras does not work out")
        try:
            refuse_shape(rule, tuple(x.shape))
        except BadSetting as error:
            raise BadSetting(f"{name}: {error}") from error
    registry.hooks(registry.library(*arrays).name)  # which looks for a compiler
    return store_of(layout, arrays, rules, engine=None)


def _layout(named: dict[str, Any]) -> Layout:
    """The walk over parameters by path, in the order in which Keras has them, whichever backend it is: names
    are made anew in every process, and do not sort alike.
    """
    children = tuple(Node(leaf=i, leaves=(i,)) for i in range(len(named)))
    live, container = tuple(zip(named, children, strict=True)), container_of(dict)
    root = Node(
        kind=dict,
        container=container,
        keys=tuple(named),
        children=children,
        live=live,
        pick=picker(live),
        fetch=fetcher(container, live),
        leaves=tuple(range(len(named))),
    )
    paths = [KeyPath(name) for name in named]
    told = {name: (Place(named_path(name), ()),) for name in named}
    return Layout(root, paths, [[path] for path in paths], [], [tuple(x.shape) for x in named.values()], told)


def _apart(group: Group) -> Group:
    """A group with a row of scalars for each leaf."""
    table = group.table
    own = TracedTable(
        table.values[table.row], table.clock[table.row], np.arange(len(group.leaves)), table.hypers
    )
    return dataclasses.replace(group, table=own)


def _values(store: Store) -> Iterator[Any]:
    """What the variables of a store hold: of each group its arrays, numbers and clocks."""
    for group in store.groups:
        for slot in group.slots:
            yield from slot
        yield group.table.values[group.table.row]
        yield group.table.clock[group.table.row]


def _kind(group: Group) -> Any:
    """What two groups share if the state of one fits the other."""
    return skeleton(group.rule), group.leaves.tolist(), [slot.places.shapes for slot in group.slots]


def _asks_for_loss(group: Group) -> bool:
    """Whether the rule of a group reads the loss of the step."""
    roots: Sequence[Any] = [*group.program.roots, *group.program.new_counters]
    return any(e.op == "loss" for e in order(roots, guards=True))
