"""Which parameters have a state, and by which rule? What stands in `param_groups` and `state` decides: both
are followed at every step, whoever wrote there.
"""

# pyright: reportPrivateImportUsage=false

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from optimisers.arrays import registry
from optimisers.errors import BadState, TreeMismatch
from optimisers.graph.clocks import UPDATES
from optimisers.rule import Rule
from optimisers.settings import adjusted, numbers
from optimisers.state.store import Store
from optimisers.step.update import store_of
from optimisers.torch.entries import Entries, plain
from optimisers.torch.loading import adopt, misfit, names_of_others
from optimisers.torch.param_group import ParamGroup
from optimisers.torch.published import Published
from optimisers.torch.shares import Shares
from optimisers.tree.flatten import flatten_model
from optimisers.tree.layout import Layout, Told, joined

GROWTH = 8
"""How many times parameters are put behind others before all are laid out anew."""

Groups = list[dict[str, Any]]
"""Groups of parameters, as torch has them."""


@final
class Keeper:
    """The state of the parameters that are in some groups."""

    alone = False
    """Whether each parameter is stepped alone."""

    def __init__(self, engine: str | None, *, capturable: bool, shares: Shares | None = None) -> None:
        self.engine, self.capturable = engine, capturable
        self.shares = shares
        """How the state is shared out to processes."""
        self.groups: list[ParamGroup] = []
        self.names: dict[Any, str] = {}
        self.told: Told = {}
        """Where the parameters of a module stand, by name; it is not pickled, as its classes may not be."""
        self.own: dict[Any, tuple[Rule | None, bool, ParamGroup]] = {}
        """What was adjusted and frozen in the tree, beside the groups."""
        self.fitting: dict[Any, Mapping[str, Any]] = {}
        """Entries that were found to fit already."""
        self.away: Any = WeakTensorKeyDictionary()
        """The entries of parameters that were taken out of the groups, and may come again."""
        self.forget()

    def forget(self) -> None:
        """Have no state: it is made when it is first needed."""
        self.held: Published | None = None
        self.known: list[Any] = []
        """All parameters of the groups."""
        self.trained: list[Any] = []
        """Those that have a state, in the order of the store."""
        self.idle: list[Any] = []
        """Those that have a rule and none."""
        self.grown = 0

    def __getstate__(self) -> dict[str, Any]:
        """What the entries in `state` do not say; the others are made again."""
        return {name: getattr(self, name) for name in ("engine", "capturable", "groups", "names", "own")}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept, away=WeakTensorKeyDictionary(), fitting={}, told={}, shares=None)
        self.forget()

    # -- following --

    def follow(self, groups: Groups, state: Any, rule_for: Callable[[dict[str, Any], int], Any]) -> None:
        """Have a state for the parameters that are in the groups now, and take over what others have written
        into `state`. `rule_for` gives the rule of a group that was not there before.

        Raises TreeMismatch for entries that do not fit, BadState for a parameter whose gradient cannot step
        it.
        """
        given = parameters_of(groups)
        if (
            len(groups) != len(self.groups)
            or not all(map(operator.is_, groups, [mine.group for mine in self.groups]))
            or len(given) != len(self.known)
            or not all(map(operator.is_, given, self.known))
        ):
            self._regroup(groups, given, state, rule_for)
        if any(p.grad is not None for p in self.idle):
            self.include(self.idle, state)
        held = self.held
        if held is not None:
            if not held.intact(state):
                self._exchange(held, groups, state)
            held.recount()

    def _regroup(self, groups: Groups, given: list[Any], state: Any, rule_for: Callable[..., Any]) -> None:
        """Follow what was done to the list of groups and to their lists of parameters."""
        before = {id(mine.group): mine for mine in self.groups}
        found = [
            before.get(id(group)) or ParamGroup(group, rule_for(group, n)) for n, group in enumerate(groups)
        ]
        known = len(self.known)
        grown = (
            self.held is not None
            and len(given) > known
            and all(map(operator.is_, given, self.known))
            and found[: len(self.groups)] == self.groups
            and self.grown < GROWTH
        )
        if not grown:
            self.stop()
        self.groups = found
        self.call(groups)
        if grown:
            self.known = list(given)
            self.include(given[known:], state)
        else:
            self._start(given, state)

    def call(self, groups: Groups) -> None:
        """Give every parameter a name, that which it had if it had one, and show the names in the groups if
        any of these has names.
        """
        listed, before = any("param_names" in group for group in groups), self.names
        names: dict[Any, str] = {}
        taken: set[str] = set()
        for n, group in enumerate(groups):
            params, own = group["params"], group.get("param_names")
            if own is None or len(own) != len(params):
                known = dict(enumerate(own or ()))
                new = [known.get(i, f"{n}.{i}") for i in range(len(params))]
                own = [before.get(p, name) if listed else name for p, name in zip(params, new, strict=True)]
            found: list[str] = []
            for p, name in zip(params, own, strict=True):
                if p not in names:
                    while name in taken:
                        name = f"{n}.{name}"  # noqa: PLW2901 until it is free
                    names[p] = name
                    taken.add(name)
                found.append(names[p])
            if listed:
                group["param_names"] = found
        self.names = names

    def _start(self, given: list[Any], state: Any) -> None:
        """Make the state of all parameters from what is known of it."""
        self.known = list(given)
        for mine in self.groups:
            mine.leaves = []
            mine.begin()
        self._put_away(set(given), state)
        self.include(given, state)

    def _put_away(self, here: set[Any], state: Any) -> None:
        """Keep the entries of parameters that are in no group any more."""
        for p in [p for p in state if isinstance(p, torch.Tensor) and p not in here]:
            entries = plain(state.pop(p))
            self.away[p] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in entries.items()}

    def include(self, parameters: Sequence[Any], state: Any) -> None:
        """Have a state for more parameters: those that want to be trained, or have gradients or state."""
        if self.away:
            self._take_back(parameters, state)
        ruled = {p: mine for mine in self.groups if mine.rule is not None for p in mine.group["params"]}
        wanted = [p for p in dict.fromkeys(parameters) if p in ruled and (_wants(p) or state.get(p))]
        chosen = {self.names[p]: p for p in wanted if _may_be_stepped(p, self.names)}
        if chosen:
            self._make(chosen, ruled, state)
        held = {} if self.held is None else self.held.leaf_of
        self.idle = [p for p in ruled if p not in held]

    def _take_back(self, parameters: Sequence[Any], state: Any) -> None:
        """Put the entries of parameters that come again back into the state."""
        for p in parameters:
            if p in self.away and p not in state:
                state[p] = self.away.pop(p)

    def _make(self, chosen: dict[str, Any], group_of: Mapping[Any, ParamGroup], state: Any) -> None:
        """Make the state of parameters, and put it behind that of the others."""
        layout, arrays = flatten_model(chosen, trained=registry.isnumeric)
        layout.told = self.told
        order = list(zip(layout.root.leaves, chosen.values(), strict=True))
        rules = {leaf: self._rule_of(p, group_of[p]) for leaf, p in reversed(order)}
        store = self._store_of(layout, arrays, [rules[leaf] for leaf in range(len(arrays))])
        saved = {p: dict(plain(state[p])) for p in chosen.values() if state.get(p)}
        held = self.held
        first = 0 if held is None else len(held.store.shapes)
        leaf_of = {p: leaf + first for leaf, p in order}
        if held is None:
            held = self.held = Published(store, state, leaf_of)
        else:
            held.grow(store, joined(held.store.layout, layout), leaf_of)
            self.grown += 1
        self.trained = [*self.trained, *chosen.values()]
        for p, leaf in leaf_of.items():
            group_of[p].leaves.append(leaf)
        if saved:
            self.take(held, saved, state)
        frozen = [leaf for p, leaf in leaf_of.items() if p in self.own and self.own[p][1]]
        if frozen:
            held.store.freeze(frozen, True)

    def _store_of(self, layout: Layout, arrays: Sequence[Any], rules: Sequence[Rule | None]) -> Store:
        """A store of parameters; where its state is shared out, they are shown to it as spread."""
        if (shares := self.shares) is not None:
            arrays = [x if r is None else shares.spread(x) for x, r in zip(arrays, rules, strict=True)]
        return store_of(
            layout,
            arrays,
            rules,
            engine=self.engine,
            capturable=self.capturable,
            programs=None if self.held is None else self.held.store.programs,
            alone=self.alone,
            wholes=shares is not None,
        )

    def _rule_of(self, p: Any, mine: ParamGroup) -> Rule | None:
        """The rule of a parameter: its own, as long as it stays in its group, or that of the group."""
        own, _, group = self.own.get(p, (None, False, None))
        return own if own is not None and group is mine else mine.rule

    # -- what others have written into the state --

    def _exchange(self, held: Published, groups: Groups, state: Any) -> None:
        """Take over the entries that others have put into `state`."""
        found = held.exchanged(state)
        if not held.current:  # a rule was exchanged in the tree
            held.publish(found)
        if all(held.fits(p) for p in found):
            self.take(held, found, state)
            return
        self.stop()  # a parameter has another shape now, or is somewhere else
        self.call(groups)
        self._start(parameters_of(groups), state)

    def take(self, held: Published, found: Mapping[Any, Mapping[str, Any]], state: Any) -> None:
        """Take over entries of parameters, and publish them; raises TreeMismatch for what does not fit."""
        found = {p: held.places[p][0].renamed(entries) for p, entries in found.items()}
        for p, entries in found.items():
            if _alike(entries, self.fitting.get(p)):
                continue
            block, i = held.places[p]
            if any(name in entries for name in block.own) and (
                reason := misfit(block, i, self.names[p], entries, None)
            ):
                raise TreeMismatch(reason)
        held.state = state
        adopt(held, found)
        if held.current:
            held.put(found)
        held.refresh()

    def stop(self) -> None:
        """Forget the store: what it has learnt stands in `state`; what was frozen or adjusted in it is
        kept.
        """
        if self.held is not None:
            self.refuse_lent("a change of groups or state")
            self.note()
            self.forget()

    def sampled(self) -> set[Any]:
        """The parameters whose rules take the gradients of single examples."""
        return {p for mine in self.groups if mine.per_example for p in mine.group["params"]}

    def refuse_lent(self, what: str) -> None:
        """Raise BadState while the parameters hold other values than those that are trained."""
        if self.held is not None:
            self.held.store.refuse_lent(what)

    def note(self) -> None:
        """Note what was frozen or adjusted in the tree, for one that is made anew or elsewhere."""
        if self.held is None:
            return
        store, self.own = self.held.store, {}
        rules: dict[tuple[int, int], tuple[Rule, list[Any]]] = {}
        p_of = {leaf: p for p, leaf in self.held.leaf_of.items()}
        for mine in self.groups:
            common = numbers(mine.rule)
            for leaf in mine.leaves:
                group, i = store.where(leaf)
                row = id(group), int(group.table.row[i])
                if row not in rules:
                    rule = group.rule_of(i)
                    rules[row] = rule, numbers(rule)
                rule, own = rules[row]
                if own != common or store.frozen[leaf]:
                    own_rule = rule if own != common else None
                    self.own[p_of[leaf]] = own_rule, bool(store.frozen[leaf]), mine

    # -- what is saved --

    def plainly(self, packed: dict[str, Any], groups: Groups) -> dict[str, Any]:
        """A saved state of plain dicts, with what was frozen and adjusted."""
        number = {
            p: n
            for group, saved in zip(groups, packed["param_groups"], strict=True)
            for p, n in zip(group["params"], saved["params"], strict=True)
        }
        state = {k: e.settled() if isinstance(e, Entries) else e for k, e in packed["state"].items()}
        for p, entries in ({} if self.shares is None else self.shares.whole).items():
            state[number[p]] |= entries
        for p, (own, frozen, _) in self.own.items():
            if own is not None and number[p] in state:
                state[number[p]]["settings"] = torch.tensor(numbers(own), dtype=torch.float64)
            if frozen and number[p] in state:
                state[number[p]]["frozen"] = torch.tensor(1.0)
        return packed | {"state": state} | ({"others": others} if (others := self.others()) else {})

    def others(self) -> list[str]:
        """The entries that other tools keep in `state`."""
        return [] if self.held is None else names_of_others(self.held)

    # -- settings --

    def read(self) -> None:
        """Take over what is another number in the groups than at the last look: of all groups in one edit.

        Raises BadSetting, before anything changes, for what a rule does not take.
        """
        held = self.held
        edits = [(mine, found) for n, mine in enumerate(self.groups) if (found := mine.edits(n))]
        if edits:
            rules = [adjusted(mine.rule, found) for mine, found in edits]
            if held is not None:
                held.store.adjust_many([(mine.leaves, found) for mine, found in edits if mine.leaves])
                if not held.current:
                    held.publish()
            for (mine, found), rule in zip(edits, rules, strict=True):
                mine.renew(rule, found)
        if held is not None and not self.capturable:
            for mine in self.groups:
                if mine.moving and mine.leaves:
                    mine.move(_clock_of(held, mine.leaves[0]))


def parameters_of(groups: Groups) -> list[Any]:
    """The parameters of some groups, one after another."""
    return groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]


def _clock_of(held: Published, leaf: int) -> Callable[[int], int]:
    """The clock that the schedules of each part of the rule of a leaf read."""
    group, i = held.store.where(leaf)
    steps = group.table.read_counters(i)[len(group.types) :]
    read = group.program.clocks
    return lambda part: group.table.read_clock(i) if read[part] == UPDATES else int(steps[read[part]])


def _alike(entries: Mapping[str, Any], others: Mapping[str, Any] | None) -> bool:
    """Whether two dicts hold the same objects."""
    return (
        others is not None
        and len(entries) == len(others)
        and all(map(operator.is_, entries.values(), others.values()))
    )


def _wants(p: Any) -> bool:
    """Whether a parameter is to be trained: it says so, or has a gradient."""
    return p.requires_grad or p.grad is not None


def _may_be_stepped(p: Any, names: Mapping[Any, str]) -> bool:
    """Whether a tensor has numbers that can be stepped; raises BadState for others that have a gradient."""
    if not registry.isnumeric(p) and p.grad is not None:
        raise BadState(
            f"{names[p]!r} has a gradient and cannot be stepped: it is a tensor of {p.dtype}; keep it in a "
            "wider type"
        )
    return registry.isnumeric(p)
