"""What does a step of a part of a state come to? One job for each group of leaves; each goes to an engine."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from optimisers.arrays import registry
from optimisers.engines import sparse
from optimisers.engines.choose import engine_for
from optimisers.engines.task import Engine, Job, Step, ready
from optimisers.errors import BadState
from optimisers.graph.passes import stages
from optimisers.rule import Rule, needed
from optimisers.settings import parts
from optimisers.state.buffers import Indices
from optimisers.state.group import Group, is_free
from optimisers.state.store import Store
from optimisers.state.table import CAPTURED
from optimisers.step.examples import summed
from optimisers.step.plan import Plan, active, plan_of
from optimisers.tree.layout import Node

Orders: TypeAlias = list[Sequence[Any]]
"""The gradients of every order, first order first, each at the places of a model."""


def by_orders(
    members: Indices | None, taken: Indices, orders: Orders, group: Group
) -> list[tuple[Indices | None, Indices, Orders]]:
    """(members, where they stand, the gradients that they have) of leaves that have as many: None among
    further gradients means that there is none at this step, which a rule that needs more is told. Raises
    BadState where no further gradients were given at all, and a rule goes astray without them.
    """
    if len(orders) == 1:
        if name := _of_second_order(group):
            raise BadState(
                f"{name} asks for second gradients; write update(state, model, grads, hessians), with None "
                "in their place at a step without a new estimate; opt.hutchinson(loss, model, seed) makes "
                "them. TorchOptimizer takes step(hessians=...), as_optax tx.update(..., hessian=...)"
            )
        return [(members, taken, orders)]
    known = np.array([[order[i] is not None for i in taken] for order in orders])
    counts = np.maximum(np.logical_and.accumulate(known).sum(0), min(1 + needed(group.rule), len(orders)))
    if (counts == len(orders)).all():
        return [(members, taken, orders)]
    every = np.arange(len(taken)) if members is None else members
    return [(every[counts == n], taken[counts == n], orders[:n]) for n in np.unique(counts).tolist()]


def _of_second_order(group: Group) -> str:
    """The name of the rule of a group, or in it, that must be given second gradients; empty if none is."""
    if group.cache.second_order is None:
        found = (part for part in parts(group.rule) if isinstance(part, Rule) and part.second_order)
        group.cache.second_order = next((type(part).__name__ for part in found), "")
    return group.cache.second_order


def _conjugated(g: Any) -> Any:
    """The conjugate of a complex gradient; anything else as it is."""
    if not registry.isarray(g) or not registry.iscomplex(g):
        return g
    return registry.library(g).operations["conj"](g)


class Steps:
    """The steps of all groups with leaves below a node, on their way to the engines and back."""

    targets: dict[int, Group]
    """The groups that take the new state."""

    def __init__(
        self,
        store: Store,
        node: Node,
        xs: Sequence[Any],
        orders: list[Sequence[Any]],
        *,
        inplace: bool,
        loss: Any = None,
        scaling: tuple[Any, Any] | None = None,
    ) -> None:
        self.store, self.inplace, self.loss, self.scaling = store, inplace, loss, scaling
        store.settle()
        self.targets = {}
        self.plan = plan = plan_of(store, node)
        if store.conjugate:
            orders = [[_conjugated(g) for g in gs] for gs in orders]
        if plan.first is not None:
            xs, orders = plan.untied(xs, orders, store.layout)
        self.traced = self.is_traced(xs, orders)
        if self.traced and store.capturable:
            raise BadState(CAPTURED)
        self.jobs = self.made(plan, xs, orders)

    def made(self, plan: Plan, xs: Sequence[Any], orders: list[Sequence[Any]]) -> list[tuple[Job, Engine]]:
        """The jobs, each with its engine: only leaves that are not frozen and have a gradient are stepped."""
        mask = active(self.store, plan, orders)
        first, self.examples = summed(self.store, plan, mask, orders[0])
        orders = [first, *orders[1:]]
        jobs: list[tuple[Job, Engine]] = []
        for g, inside, at in plan.parts:
            members, taken = inside, at
            if mask is not None:
                on = mask[at]
                if not on.all():
                    members, taken = (np.arange(len(on)) if inside is None else inside)[on], at[on]
            if not len(taken) and not (self.store.groups[g].spread and self.meets(g, orders)):
                continue
            for inside_of, at_of, known in by_orders(members, taken, orders, self.store.groups[g]):
                for chosen, at_chosen, engine in self.by_kind(g, inside_of, at_of, known):
                    given = [xs, *known]
                    if not plan.whole or chosen is not None:
                        given = [[v[i] for i in at_chosen] for v in given]
                    jobs.append((self.job(g, chosen, given[0], tuple(given[1:])), engine))
        return jobs

    def meets(self, g: int, orders: Orders) -> bool:
        """Whether other processes may wait for a step of a group, for its sums or its matrices."""
        program = self.store.groups[g].program_for(len(orders))
        return bool(stages(program)) or is_free(program)

    def by_kind(
        self, g: int, members: Any, taken: Any, orders: list[Sequence[Any]]
    ) -> list[tuple[Indices | None, Indices, Engine]]:
        """(members, where they stand, engine) of a group: those whose gradient touches a few rows are stepped
        by rows, if the rule allows it.
        """
        group = self.store.groups[g]
        engine = engine_for(group, self.store.engine, traced=self.traced)
        whole = (
            group.kind.name == "numpy"
            or self.traced
            or group.kind.capturable
            or group.spread
            or len(orders) > 1
        )
        if whole or not sparse.allowed(group):
            return [(members, taken, engine)]
        touched = np.array(sparse.sparse([orders[0][i] for i in taken]), bool)
        if not touched.any():
            return [(members, taken, engine)]
        every = np.arange(len(taken)) if members is None else members
        found = [(every[touched], taken[touched], sparse.ENGINE), (every[~touched], taken[~touched], engine)]
        return [kinds for kinds in found if len(kinds[1])]

    def is_traced(self, xs: Sequence[Any], orders: list[Sequence[Any]]) -> bool:
        """Whether a transform or a compiler traces the numbers or the arrays."""
        found = self.store.traced
        for library in {g.kind.name: g.kind.library for g in self.store.groups}.values():
            found = found or library.traces(xs, orders, inplace=self.inplace)
            if found and self.inplace:
                raise BadState(
                    "update_ writes in place, which cannot be traced; write update for a step that is "
                    "differentiated or compiled"
                )
        return found

    def job(
        self, g: int, members: Indices | None, xs: Sequence[Any], grads: tuple[Sequence[Any], ...]
    ) -> Job:
        """The job of some members of a group, None for all; its target takes the new state."""
        group, target = self.store.groups[g], self.targets.get(g)
        if target is None:
            if self.inplace:
                target = group.owned()
            else:
                target = group.successor(whole=members is None, traced=self.traced)
            self.targets[g] = target
        if members is not None:
            target.table = target.table.split(members)
        if self.traced:
            target.table = target.table.to_traced(group.kind.library)
        return Job(
            group,
            target,
            group.subset(members),
            xs,
            grads,
            target.table,
            self.store.layout.paths,
            self.inplace,
            self.traced,
            self.loss,
            self.examples,
            self.scaling,
        )

    def prepare(self) -> dict[int, Any]:
        """Everything that may fail; the new parameters by leaf, where they are known to be new objects."""
        self.steps = [Step(job, engine) for job, engine in self.jobs]
        with np.errstate(all="ignore"):  # infinities and NaN are answers; checks of rules say which are not
            ready(self.steps, self.plan.known)
        return self.new()

    def store_all(self) -> dict[int, Any]:
        """Store; the new parameters, by leaf, where they are other objects than the old."""
        with np.errstate(all="ignore"), self.store.lock:
            for step in self.steps:
                step.store()
            self.advance_clocks()
        if self.inplace:
            self.store.changed()
        new = self.new()
        for step in self.steps:
            step.release()
        return new

    def advance_clocks(self) -> None:
        """Count the update for every leaf that it covered, stepped or not."""
        skipped = None if self.scaling is None else self.scaling[1]
        for g, inside, _ in self.plan.parts:
            if g not in self.targets:
                group = self.store.groups[g]
                self.targets[g] = group if self.inplace else group.fork()
            self.targets[g].table = self.targets[g].table.advance_clocks(inside, skipped)

    def new(self) -> dict[int, Any]:
        """The new parameters, by leaf of the model."""
        found: dict[int, Any] = {}
        for step in self.steps:
            if step.new:
                leaf = step.job.subset.leaves.tolist().__getitem__
                new = step.results()
                found.update(zip(map(leaf, new), new.values(), strict=True))
        return found
