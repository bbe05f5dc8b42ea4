"""A rule as a `torch.optim.Optimizer`: schedulers, scalers, checkpoints and trainers know it as one."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch

from optimisers.arrays import registry
from optimisers.arrays.torch import library as tensors
from optimisers.errors import BadSetting, BadState, TreeMismatch, UnknownField
from optimisers.rule import Rule
from optimisers.settings import is_schedule
from optimisers.state.leaf import handle
from optimisers.step.choose import refuse_no_rule
from optimisers.step.layers import LayerDecay
from optimisers.step.update import update_listed
from optimisers.torch.classes import HOW
from optimisers.torch.convert import as_ours
from optimisers.torch.given import asks_for_state_only, gradients, second_gradients, unscaled
from optimisers.torch.groups import (
    ASKING,
    by_depth,
    by_key,
    matching,
    meanings_of,
    refuse_shapes,
    require_dense,
    rules_of,
    told,
)
from optimisers.torch.hooks import InBackward
from optimisers.torch.keeping import Keeper
from optimisers.torch.loading import (
    all_fit,
    arranged,
    bare_name,
    entries_by_parameter,
    mark,
    misfit,
    saved_groups,
)
from optimisers.torch.named import Found, groups_to_save, packed_again
from optimisers.torch.param_group import ParamGroup
from optimisers.torch.rates import marks
from optimisers.torch.shares import shares_of
from optimisers.torch.takeover import groups_of, take_over
from optimisers.tree.modules_torch import places
from optimisers.tree.path import KeyPath

__all__ = ["TorchOptimizer"]

L = TypeVar("L")
Seconds = Sequence[torch.Tensor | None] | Mapping[Any, torch.Tensor | None]
"""Second gradients: a list in the order of the parameters, or a dict by name or by parameter."""

CALL = "TorchOptimizer(module, Adam())"

_ABSENT: Any = False
"""Tells `step()` from `step(closure=None)`."""

Params = (
    torch.nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]
)
"""What is trained: a module, parameters, named parameters, or groups."""


class TorchOptimizer(torch.optim.Optimizer):
    """Trains parameters by a rule, as `torch.optim.Optimizer` does: one fused pass over all of them a step.

    `params` is a module, or what every optimiser of torch takes: parameters, (name, parameter) pairs, or
    dicts of groups. `rule` is a rule, or for a module or named parameters a dict whose keys are globs over
    names and selectors, where the first that picks a parameter wins; None trains nothing there; or
    `layer_decay(rule)`. `settings` adjust the rule: `lr=3e-4`.

    Every hyper-parameter of the rule stands in the groups by its name, `eta` as `lr`; `beta`, `epsilon`,
    `lam` and the `rho` of Momentum and Nesterov also as `betas`, `eps`, `weight_decay` and `momentum`.
    Whatever of these is changed counts from the next step on, and nothing is compiled for it. Where the rate
    follows a schedule, `lr` is a factor on it and `eta` shows the rate. `tree` is the state as `setup` gives
    it, with a Leaf for each name: freeze, thaw and look at it there.

    `capturable=True`, for parameters on one CUDA device, keeps clock and numbers there: a CUDA graph may hold
    the step, and a GradScaler makes it divide and skip without waiting for the device. A graph that is
    replayed does not look at the groups: write `read_groups()` after a scheduler has changed them.

    `shard=group`, a group of processes that train the same module (DistributedDataParallel), shares the state
    out to them: each keeps that of its part of every parameter, steps this part, and gives it to the others.
    State is made of DTensors then, of which each process holds its part.

    Raises BadSetting for settings that the rule does not have, TreeMismatch for a loaded state that does not
    fit, and what `update_` raises.
    """

    in_backward: InBackward | None = None
    """The hooks that step each parameter in `backward`, where `step_in_backward` has set them."""

    def __init__(
        self,
        params: Params,
        rule: Rule | Mapping[Any, Rule | None] | LayerDecay,
        *,
        engine: str | None = None,
        capturable: bool = False,
        shard: Any = None,
        **settings: Any,
    ) -> None:
        if isinstance(params, Rule):
            raise BadState(f"TorchOptimizer was given the rule {params!r} where the model goes; write {CALL}")
        shares = shares_of(shard, capturable=capturable)
        self._keeper = Keeper(engine, capturable=capturable, shares=shares)
        self._incoming: dict[Any, Any] | None = None
        """Saved entries on their way into `state`."""
        listed: Any = params
        if isinstance(params, torch.nn.Module):
            wrapped = isinstance(params, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel)
            inner: torch.nn.Module = params.module if wrapped else params
            listed = [(bare_name(name), p) for name, p in inner.named_parameters()]
            self._keeper.told = places(inner, bare_name)
        self._rule: Rule | None = None
        self._globs: dict[str, Any] | None = None
        self._given: list[Any] = []
        """The rules of the groups that globs have made, as long as they are being added."""
        self._common: dict[str, Any] = settings
        if isinstance(rule, Mapping):
            listed, self._given = by_key(rule, list(listed), self._keeper.told)
            self._globs = dict(rule)
            self._refuse_strange(settings, [r for r in rule.values() if r is not None])
        elif isinstance(rule, LayerDecay):
            self._refuse_strange(settings, [r for r in rules_of(rule, {}).values() if r is not None])
            listed, self._given = by_depth(rule, settings, list(listed), self._keeper.told)
            self._globs, self._common = {}, {}
        elif isinstance(rule, Rule):
            self._refuse_strange(settings, [rule])
            self._rule = told(rule, settings, "TorchOptimizer")
        else:
            refuse_no_rule(rule, CALL)
            raise BadState(f"TorchOptimizer was given a function where the rule goes; write {CALL}")
        super().__init__(listed, self._defaults(settings))
        self._given = []
        if self._globs is not None:
            self._lend_momentum()

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, *, engine: str | None = None) -> "TorchOptimizer":
        """An optimiser of torch as one of ours, which goes on where it stands: its parameters and groups, its
        hooks and what it has learnt, with the same numbers.

        Make schedulers from what comes back: those of the old one go on to set the groups of that. Raises
        UnknownField for a class that is no rule here (`from_torch_class` says which are).
        """
        groups = groups_of(optimizer)
        capturable = any(group.get("capturable") for group in optimizer.param_groups)
        new = cls(groups, groups[0]["rule"], engine=engine, capturable=capturable)
        take_over(new, optimizer)
        return new

    def _lend_momentum(self) -> None:
        """Let schedulers that cycle momentum find it where rules go by glob: in the defaults, and by one key
        in all groups.
        """
        for key in ("betas", "momentum"):
            shown = [group[key] for group in self.param_groups if key in group]
            if shown:
                self.defaults.setdefault(key, shown[0])
                for group in self._keeper.groups:
                    group.lend(key)
                return

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "step" and marks(value):
            for group in self._keeper.groups:
                group.greet()

    @staticmethod
    def _refuse_strange(settings: Mapping[str, Any], rules: list[Rule]) -> None:
        """Raise UnknownField for a setting that neither torch nor one of the rules has."""
        known = [meanings_of(rule) for rule in rules]
        for name in settings:
            if name not in ASKING and name not in HOW and not any(name in each for each in known):
                has = ", ".join(dict.fromkeys(key for each in known for key in each.values()))
                raise UnknownField(f"TorchOptimizer was given {name}=, which no rule has; there are {has}")

    def _defaults(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What new groups start from: the settings of the rule, with those that were given as tensors."""
        if self._rule is None:
            return {k: v for k, v in settings.items() if not is_schedule(v)}
        shown = ParamGroup(dict(settings), self._rule)
        return {k: v for k, v in shown.group.items() if k != "eta"}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler must leave the division to `step`: on the device, for gradients in float16,
        which it refuses, and where they are gone before it could divide.
        """
        return (
            self._keeper.capturable
            or self.in_backward is not None
            or any(p.dtype is torch.float16 for group in self.param_groups for p in group["params"])
        )

    # -- groups --

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, with settings of their own; what has been learnt stays.

        `rule` in it is their rule. Raises BadSetting for settings that the rule does not have.
        """
        n = len(self.param_groups)
        given = dict(param_group)
        if not isinstance(given["params"], torch.Tensor | set):
            given["params"] = list(given["params"])
            require_dense(given["params"])
        self._named(given, n)
        rule = self._rule_for(given, n)
        if rule is None:
            given.setdefault("lr", 0.0)
        else:
            refuse_shapes(rule, given, n)
        super().add_param_group(given)
        self._keeper.groups.append(ParamGroup(self.param_groups[-1], rule))

    def _rule_for(self, given: dict[str, Any], n: int) -> Rule | None:
        """The rule of a new group, with the settings that stand in it."""
        rule = given.pop("rule") if "rule" in given else self._rule_by_place(given, n)
        if rule is None:
            return None
        if not isinstance(rule, Rule):
            hint = f"; write {rule.__name__}()" if isinstance(rule, type) else ""
            raise BadState(f"group {n} has {rule!r} as its rule; it takes a rule, such as Adam(){hint}")
        common: dict[str, Any] = {}
        if rule is not self._rule:
            takes = meanings_of(rule)
            common = {k: v for k, v in self._common.items() if k in takes or k not in ASKING}
        own = {k: v for k, v in given.items() if k not in ("params", "param_names")}
        return told(rule, {**common, **own}, f"group {n}")

    def _rule_by_place(self, given: dict[str, Any], n: int) -> Any:
        """The rule of a new group that names none: the only one, that of its place, or by its names."""
        if self._globs is None:
            return self._rule
        return self._given[n] if n < len(self._given) else matching(self._globs, given)

    def _named(self, given: dict[str, Any], n: int) -> None:
        """Name the parameters of a new group, where those of the others have names."""
        taken = {name for group in self.param_groups for name in group.get("param_names", ())}
        params = given["params"]
        if not taken or "param_names" in given or isinstance(params, set):
            return
        listed = [params] if isinstance(params, torch.Tensor) else list(params)
        if all(isinstance(p, torch.Tensor) for p in listed):
            stem = str(n)
            while any(f"{stem}.{i}" in taken for i in range(len(listed))):
                stem += "'"
            given["params"] = [(f"{stem}.{i}", p) for i, p in enumerate(listed)]

    def read_groups(self) -> None:
        """Take over what schedulers and users have changed in the groups and in `state` since the last step,
        as `step` does.
        """
        self._follow()
        self._keeper.read()

    def _follow(self) -> None:
        """Follow what was done to the groups and to the state."""
        self._keeper.follow(self.param_groups, self.state, self._rule_for)

    # -- the step --

    def hook_into_backward(self) -> None:
        """Step each parameter in `backward` from here on, as `step_in_backward` says."""
        if self._keeper.shares is not None:
            raise BadSetting("shard= shares out whole steps; leave it out of step_in_backward")
        self.in_backward = InBackward(self._keeper, self.read_groups)

    @overload
    def step(self, closure: None = None, *, hessians: Seconds | None = ...) -> None: ...
    @overload
    def step(self, closure: Callable[[], L], *, hessians: Seconds | None = ...) -> L: ...
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Any = _ABSENT, *, hessians: Any = _ABSENT) -> Any:
        """One step with the gradients that the parameters keep; returns what `closure`, which works out loss
        and gradients, returns.

        `hessians` are second gradients for the rules that ask for them, such as Sophia: what `hutchinson`
        gives, a list in the order of the parameters, or a dict by name or by parameter; None where there is
        none at this step. A GradScaler does not scale them. Rules that take gradients of single examples
        find them in `p.grad_sample`, where Opacus keeps them.

        Raises BadState, naming it, for a parameter that has a gradient and cannot be stepped; then, and
        whenever a step raises, parameters, gradients and state are as they were.
        """
        loss = None
        if callable(closure):
            with torch.enable_grad():
                loss = closure()
        untouched = not self.state
        self._follow()
        keeper = self._keeper
        held, xs = keeper.held, keeper.trained
        if held is None:
            return loss
        keeper.refuse_lent("step")
        grads = gradients(xs, keeper.sampled())
        if closure is None and untouched and asks_for_state_only(self.param_groups, grads):
            return loss
        if self.in_backward is not None:
            self.in_backward.finish(scaled=hasattr(self, "found_inf"))
            return loss
        scaling, grads = unscaled(self, held.store, grads)
        if grads is None:
            return loss
        if keeper.capturable and tensors.graphs.capturing(str(xs[0].device)):
            for n, group in enumerate(keeper.groups):
                group.refuse_changed(n)
        else:
            keeper.read()
        orders = [grads]
        if hessians is not _ABSENT:
            taken = any(mine.second_order for mine in keeper.groups)
            orders.append(second_gradients(hessians, keeper.names, xs, taken=taken))
        if keeper.shares is not None:
            keeper.shares.step(held.store, xs, orders, loss, held.refresh)
        else:
            root = held.store.layout.root
            update_listed(held.store, root, xs, [*orders], scaling, loss, after=held.refresh)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, those of single examples too."""
        super().zero_grad(set_to_none)
        for p in self._keeper.sampled():
            if getattr(p, "grad_sample", None) is not None:
                p.grad_sample = None

    # -- the state as a tree --

    @property
    def tree(self) -> Any:
        """The state as `setup` gives it: a Leaf for each parameter, by its name."""
        self.read_groups()
        if self._keeper.held is None:
            return ()
        store = self._keeper.held.store
        known = registry.hooks("torch").known
        if store.compiled is None and known is not None:
            known(store)
        return handle(store, store.layout.root, KeyPath())

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by name, as `tree` mirrors them."""
        self.read_groups()
        return {self._keeper.names[p]: p for p in self._keeper.trained}

    # -- saving and loading --

    def state_dict(self) -> dict[str, Any]:
        """The state of all parameters by number, and the groups, as torch saves them; where other tools keep
        entries in `state`, "others" has their names.
        """
        self._keeper.refuse_lent("state_dict")
        if self._keeper.shares is not None:
            self._keeper.shares.refuse_torn()
        if self.state:
            self._follow()
        with contextlib.suppress(BadSetting):  # what no rule takes is saved as it stands
            self._keeper.read()
        self._keeper.note()
        plainly = self.register_state_dict_post_hook(
            lambda _, packed: self._keeper.plainly(packed, self.param_groups), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            plainly.remove()

    def consolidate_state_dict(self, to: int = 0) -> None:
        """With `shard=`, put the state together on one process of the group: until the next step its
        `state_dict` is that of an optimiser alone. All processes call it; elsewhere it does nothing.
        """
        self.read_groups()
        if self._keeper.shares is not None:
            self._keeper.shares.consolidate({p: self.state[p] for p in self._keeper.trained}, to)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Go on from a saved state; parameters are matched by name where both sides have names.

        State keeps the element type in which it was saved. Raises TreeMismatch for a state of other shapes,
        names or groups, or of another rule, and BadSetting for settings that the rules do not have; then
        nothing has changed. With `strict=False` what fits is taken, and a warning says what did not.
        """
        self._keeper.refuse_lent("load_state_dict")
        before, left = vars(self).copy(), list[str]()
        before["_keeper"] = copy.copy(self._keeper)
        arrange = self.register_load_state_dict_pre_hook(
            lambda _, saved: self._arranged(saved, None if strict else left)
        )
        try:
            super().load_state_dict(state_dict)
            keeper, state, incoming = self._keeper, self.state, self._incoming or {}
            keeper.own, keeper.fitting = {}, incoming
            self._follow()
            keeper.include([p for p in keeper.idle if state.get(p)], state)
            keeper.read()
            if keeper.held is not None:  # a group that was read has adjusted all of its parameters
                mark(keeper.held, {p: e for p, e in incoming.items() if p in keeper.held.leaf_of})
            for group in keeper.groups:
                group.warned = False
            if keeper.shares is not None:
                keeper.shares.torn, keeper.shares.whole = "", {}
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise
        finally:
            arrange.remove()
            self._incoming, self._keeper.fitting = None, {}
        if left:
            warnings.warn(f"not loaded: {'; '.join(left)}", stacklevel=2)

    def _arranged(self, saved: dict[str, Any], left: list[str] | None) -> dict[str, Any]:
        """A saved state as the groups here take it; its entries wait in `_incoming` until the groups are
        there.
        """
        self._follow()
        with contextlib.suppress(BadSetting):  # what no rule takes is loaded over
            self._keeper.read()
        saved_groups(saved)
        saved = as_ours(saved, [mine.rule for mine in self._keeper.groups])
        groups, state = self.param_groups, saved["state"]
        settings, numbered = arranged(saved, groups, left)
        incoming = entries_by_parameter(groups, numbered, state, lenient=left is not None)
        if self._keeper.held is None or not all_fit(self._keeper.held, incoming):
            others = {*saved.get("others", ()), *self._keeper.others()}
            incoming = {p: e for p, e in incoming.items() if self._fits(p, e, others, left)}
        self._incoming = incoming
        new: list[dict[str, Any]] = []
        for n, (mine, own, ns) in enumerate(zip(self._keeper.groups, settings, numbered, strict=True)):
            names = {k: v for k, v in mine.group.items() if k == "param_names"}
            new.append(mine.fitted(own, n, lenient=left is not None) | {"params": list(ns)} | names)
        return {
            **saved,
            "state": {k: v for k, v in state.items() if not isinstance(k, int)},
            "param_groups": new,
        }

    def _fits(self, p: Any, entries: Any, others: set[str], left: list[str] | None) -> bool:
        """Whether saved entries fit a parameter; raises TreeMismatch for others, or notes why they do not."""
        held = self._keeper.held
        if held is None or p not in held.leaf_of:
            return True  # it is seen when a state is made
        reason = misfit(*held.places[p], self._keeper.names[p], entries, others)
        if reason and left is None:
            raise TreeMismatch(reason)
        if reason and left is not None:
            left.append(reason)
        return not reason

    def groups_to_save(self) -> list[dict[str, Any]]:
        """The groups as `optimisers.save` keeps them."""
        return groups_to_save(self.state_dict(), self._keeper)

    def load_named(self, found: Found, groups: Sequence[Mapping[str, Any]] | None) -> None:
        """Go on from what `optimisers.load` has found, by the names of parameters."""
        self.load_state_dict(packed_again(self.state_dict(), self._keeper, found, groups))

    def __getstate__(self) -> dict[str, Any]:
        self._keeper.refuse_lent("pickle")
        if self._keeper.shares is not None:
            raise BadState(
                "a state that is shared out to processes was copied or pickled; save its state_dict()"
            )
        self._keeper.note()
        kept = ("_keeper", "_rule", "_globs", "_given", "_common", "_incoming")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._incoming is None:
            return
        groups = zip(self._keeper.groups, self.param_groups, strict=True)
        self._keeper.groups = [mine.loaded(group) for mine, group in groups]
        self.state.update({p: dict(entries) for p, entries in self._incoming.items()})
