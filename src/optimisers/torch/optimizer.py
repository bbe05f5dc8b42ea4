"""A rule as a `torch.optim.Optimizer`: schedulers, scalers, checkpoints and trainers know it as one."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import functools
import operator
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from optimisers.arrays.torch import library as tensors
from optimisers.errors import BadState, UnknownField
from optimisers.nest import flatten
from optimisers.rule import Rule
from optimisers.settings import (
    ELSEWHERE,
    adjustable,
    adjusted,
    numbers,
    refuse_unknown,
    settings,
)
from optimisers.settings import parts as parts_of_value
from optimisers.state.edit import present
from optimisers.state.leaf import parts
from optimisers.step.update import setup, takes_scaling, update_, update_scaled
from optimisers.torch.classes import plain
from optimisers.torch.convert import as_ours
from optimisers.torch.groups import (
    FLAGS,
    by_glob,
    defaults_of,
    field_of,
    has_schedule,
    is_schedule,
    known,
    renewed,
    require_dense,
    told,
)
from optimisers.torch.loading import adopt, entry_name, in_order
from optimisers.torch.takeover import groups_of, take_over

__all__ = ["TorchOptimizer"]

_NO_CLOSURE: Any = False
"""Tells `step()` from `step(closure=None)`."""


class TorchOptimizer(torch.optim.Optimizer):
    """Trains parameters by a rule, as `torch.optim.Optimizer` does: one fused pass over all of them a step.

    `params` is a module, or what every optimiser of torch takes: parameters, (name, parameter) pairs, or
    dicts of groups. `rule` is a rule, or for a module or named parameters a dict {glob: rule}, where the
    first glob that matches a name wins; None trains nothing there. `settings` adjust the rule: `lr=3e-4`.

    Every hyper-parameter of the rule stands in the groups by its name, `eta` as `lr`; `beta`, `epsilon`,
    `lam` and the `rho` of Momentum and Nesterov also as `betas`, `eps`, `weight_decay` and `momentum`.
    Whatever of these is changed counts from the next step on, and nothing is compiled for it. `tree` is the
    state as `setup` gives it, with a Leaf for each name: freeze, thaw and look at it there.

    `capturable=True`, for parameters on one CUDA device, keeps clock and numbers there: a CUDA graph may hold
    the step, and a GradScaler makes it divide and skip without waiting for the device. A graph that is
    replayed does not look at the groups: write `read_groups()` after a scheduler has changed them.

    Raises BadSetting for settings that the rule does not have, TreeMismatch for a loaded state that does not
    fit, and what `update_` raises.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        rule: Any,
        *,
        engine: str | None = None,
        capturable: bool = False,
        **settings: Any,
    ) -> None:
        self._engine, self._capturable = engine, capturable
        self._rules: list[Rule | None] = []
        self._seen: list[dict[str, Any]] = []
        self._scheduled: list[bool] = []
        self._kept: dict[Any, tuple[Any, bool]] = {}
        self._tensors: dict[int, tuple[weakref.ref[torch.Tensor], int, Any]] = {}
        self._forget()
        if isinstance(params, torch.nn.Module):
            wrapped = isinstance(params, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel)
            inner: torch.nn.Module = params.module if wrapped else params
            params = [(name.replace("_orig_mod.", ""), p) for name, p in inner.named_parameters()]
        self._rule: Rule | None = None
        self._given: list[Any] | None = None
        if isinstance(rule, Mapping):
            params, self._given = by_glob(rule, list(params))
            defaults = settings
            for name in settings:
                if name not in FLAGS and not any(known(r, name) for r in self._given if r is not None):
                    raise UnknownField(f"TorchOptimizer was given {name}=, which none of the rules has")
        elif isinstance(rule, Rule):
            for name in settings:
                if not known(rule, name) and name not in ELSEWHERE and name not in FLAGS:
                    refuse_unknown(rule, [name])
            self._rule = told(rule, settings, "TorchOptimizer")
            tensors = {k: v for k, v in settings.items() if isinstance(v, torch.Tensor)}
            defaults = defaults_of(self._rule) | tensors
        else:
            hint = f"; write {rule.__name__}()" if isinstance(rule, type) else ""
            raise BadState(f"TorchOptimizer was given {rule!r} where the rule goes{hint}")
        super().__init__(params, defaults)

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

    def _forget(self) -> None:
        """Have no tree: it is made when it is first needed."""
        self._tree: Any = None
        self._model: dict[str, Any] = {}
        self._known: list[Any] = []
        self._untrained: list[int] = []
        self._published = 0
        self._leaf_of: dict[Any, int] = {}
        self._rule_of: dict[Any, Any] = {}

    # -- groups --

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, with settings of their own; what has been learnt stays."""
        n = len(self.param_groups)
        given = dict(param_group)
        if not isinstance(given["params"], torch.Tensor | set):
            given["params"] = list(given["params"])
            require_dense(given["params"])
        rule = self._rule if self._given is None else self._given[min(n, len(self._given) - 1)]
        rule = given.pop("rule", rule)
        if rule is None:
            given.setdefault("lr", 0.0)
        else:
            own = {k: v for k, v in given.items() if k not in ("params", "param_names")}
            common = {} if self._given is None else self.defaults
            rule = told(rule, {**common, **own}, f"group {n}")
            given.pop("eta", None)
            rates = {k: v for k, v in self.defaults.items() if isinstance(v, torch.Tensor)}
            shown = defaults_of(rule) | {k: v for k, v in rates.items() if k not in own}
            given |= {k: v for k, v in shown.items() if k not in given or is_schedule(given[k])}
        super().add_param_group(given)
        self._rules.append(rule)
        self._scheduled.append(rule is not None and has_schedule(rule))
        self._seen.append(self._shown(self.param_groups[-1], rule))
        self._stop()

    def _shown(self, group: dict[str, Any], rule: Any) -> dict[str, Any]:
        """The settings of a group as they stand, by key."""
        return (
            {} if rule is None else {key: self._read(group[key]) for key in defaults_of(rule) if key in group}
        )

    def read_groups(self) -> None:
        """Take over what schedulers and users have changed in the groups since the last step, as `step`
        does.
        """
        if not self._is_ready(self._parameters()):
            self._start()
        if self._leaf_of:
            self._read_groups()

    def _read_groups(self) -> None:
        """Take over what is another number than at the last look: of all groups in one edit."""
        store = parts(self._tree)[0]
        new: dict[int, tuple[Rule, dict[str, Any]]] = {}
        for n, (group, rule, seen) in enumerate(zip(self.param_groups, self._rules, self._seen, strict=True)):
            now = {key: self._read(group[key]) for key in seen}
            if rule is not None and now != seen:
                changes = {field_of(rule, k): v for k, v in now.items() if v != seen[k]}
                new[n] = adjusted(rule, changes), changes
        if new:
            edits = [
                (self._leaves(n), functools.partial(renewed, self._rules[n], *of)) for n, of in new.items()
            ]
            store.change_many([(leaves, change) for leaves, change in edits if leaves])
        for n, group in enumerate(self.param_groups):
            if n in new:
                self._rules[n] = rule = new[n][0]
                self._scheduled[n] = has_schedule(rule)
                self._rule_of.update(dict.fromkeys(group["params"], rule))
            rule = self._rules[n]
            if rule is not None and (n in new or (self._scheduled[n] and not self._capturable)):
                leaves = self._leaves(n)
                now = present(*store.where(leaves[0]), rule) if leaves and self._scheduled[n] else rule
                meant = defaults_of(now).items()
                group.update({k: v for k, v in meant if k not in group or v != self._read(group[k])})
                self._seen[n] = self._shown(group, rule)

    def _leaves(self, n: int) -> list[int]:
        """The leaves of the parameters of a group."""
        return [self._leaf_of[p] for p in self.param_groups[n]["params"] if p in self._leaf_of]

    def _read(self, value: Any) -> Any:
        """A setting as a number; a tensor is read anew when it has been written."""
        if not isinstance(value, torch.Tensor):
            return plain(value)
        read = self._tensors.get(id(value))
        if read is None or read[0]() is not value or read[1] != value._version:
            if tensors.capturing(str(value.device)):
                raise BadState("a setting was changed; write read_groups() before a graph is captured")
            forget = functools.partial(self._tensors.pop, id(value), None)
            held = weakref.ref(value, lambda _: forget())
            read = self._tensors[id(value)] = held, value._version, plain(value)
        return read[2]

    # -- the step --

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Any = _NO_CLOSURE) -> Any:
        """One step with the gradients that the parameters keep; returns what `closure`, which works out loss
        and gradients, returns.
        """
        loss = None
        if callable(closure):
            with torch.enable_grad():
                loss = closure()
        given = self._parameters()
        grads = [p.grad for p in given]
        if not self._is_ready(given) or any(grads[i] is not None for i in self._untrained):
            untouched = not self.state
            self._start()
            if closure is None and untouched and _asks_for_state_only(self.param_groups, grads):
                return loss
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if not self._leaf_of:
            return loss
        slopes = dict(zip(self._model, grads, strict=True))
        if found is not None and self._capturable and takes_scaling(self._tree):
            self._read_groups()
            scale = torch.ones_like(found) if scale is None else scale
            update_scaled(self._tree, self._model, slopes, (scale, found))
            return loss
        if found is not None and self._capturable and tensors.capturing(str(found.device)):
            raise BadState(
                "this rule computes values of another shape than the parameters; a step of it that a "
                "GradScaler may skip cannot be captured"
            )
        if found is not None and found.item():
            return loss
        if scale is not None:
            torch._foreach_mul_([g for g in grads if g is not None], 1 / scale.item())
        self._read_groups()
        update_(self._tree, self._model, slopes)
        return loss

    def _parameters(self) -> list[Any]:
        groups = self.param_groups
        return groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]

    def _is_ready(self, given: list[Any]) -> bool:
        """Whether there is a tree for these parameters, and nobody has deleted state: others may stand in the
        groups now.
        """
        return (
            self._tree is not None
            and len(self.state) == self._published
            and len(given) == len(self._known)
            and all(map(operator.is_, given, self._known))
        )

    @property
    def tree(self) -> Any:
        """The state as `setup` gives it: a Leaf for each parameter, by its name."""
        self.read_groups()
        return self._tree

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by name, as `tree` mirrors them."""
        return dict(self._model) if self.tree is not None else {}

    # -- the state, for those who look for it where torch keeps it --

    def _start(self) -> None:
        """Make the tree for the parameters that are in the groups now, from what is known of their state."""
        self._stop()
        given, rules, names = self._parameters(), list[Any](), list[str]()
        for n, (group, rule) in enumerate(zip(self.param_groups, self._rules, strict=True)):
            called = group.get("param_names") or [f"{n}.{i}" for i in range(len(group["params"]))]
            names += called if not set(called) & set(names) else [f"{n}.{name}" for name in called]
            rules += [self._kept.get(p, (rule,))[0] if rule is not None else None for p in group["params"]]
        model = dict(zip(names, given, strict=True))
        rule_of = dict(zip(names, rules, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = setup(
                lambda path, _: rule_of[str(path[0])], model, engine=self._engine, capturable=self._capturable
            )
        leaf_of: dict[Any, int] = {}
        if tree != ():
            store, node, _ = parts(tree)
            places = dict(zip(node.names, node.leaves, strict=True))
            trained = {name: leaf for name, leaf in places.items() if store.shapes[leaf] is not None}
            leaf_of = {model[name]: leaf for name, leaf in trained.items()}
            frozen = [leaf for p, leaf in leaf_of.items() if self._kept.get(p, (None, False))[1]]
            adopt(store, {leaf: self.state[p] for p, leaf in leaf_of.items() if self.state.get(p)}, frozen)
        everyone = set(given)
        for p in list(self.state):
            if p not in everyone:
                del self.state[p]
        self._tree, self._model, self._known, self._leaf_of = tree, model, list(given), leaf_of
        self._rule_of = {
            p: r for g, r in zip(self.param_groups, self._rules, strict=True) for p in g["params"]
        }
        self._untrained = [i for i, p in enumerate(given) if p not in leaf_of and rules[i] is not None]
        self._publish(leaf_of)
        self._published = len(self.state)

    def _stop(self) -> None:
        """Forget the tree; what it has learnt stays in `state`, what was frozen or adjusted in it is kept."""
        if self._tree is not None:
            self._keep()
            self._forget()

    def _keep(self) -> None:
        """Note what the tree knows, for one that is made anew or elsewhere."""
        if self._tree is None or not self._leaf_of:
            return
        store = parts(self._tree)[0]
        self._publish([p for p in self._leaf_of if p in self.state])
        self._kept = {}
        rules: dict[tuple[int, int], Rule] = {}
        for p, leaf in self._leaf_of.items():
            group, i = store.where(leaf)
            row = id(group), int(group.table.row[i])
            if row not in rules:
                rules[row] = group.rule_of(i)
            self._kept[p] = rules[row], bool(store.frozen[leaf])

    def _publish(self, parameters: Iterable[Any]) -> None:
        """Show the state of parameters in `state`: arrays as views, which stay true, numbers as they are
        now.
        """
        if not self._leaf_of:
            return
        store = parts(self._tree)[0]
        histories: dict[tuple[int, int], tuple[dict[str, Any], list[Any]]] = {}
        keys: dict[int, list[str]] = {}
        common: dict[int, list[Any]] = {}
        for p in parameters:
            group, i = store.where(self._leaf_of[p])
            row, rule = (id(group), int(group.table.row[i])), self._rule_of[p]
            if row not in histories:
                histories[row] = store.progress_of(self._leaf_of[p]), numbers(group.rule_of(i))
            if id(group) not in keys:
                keys[id(group)] = [entry_name(path) for path, _ in flatten(group.program.template)]
            if id(rule) not in common:
                common[id(rule)] = numbers(rule)
            clocks, own = histories[row]
            shown: dict[str, Any] = {k: torch.tensor(float(v)) for k, v in clocks.items()}
            for key, (_, value) in zip(keys[id(group)], flatten(group.state_of(i)), strict=True):
                tensor = isinstance(value, torch.Tensor)
                shown[key] = value if tensor else torch.tensor(float(value), dtype=torch.float64)
            if own != common[id(rule)]:
                shown["settings"] = torch.tensor(own, dtype=torch.float64)
            if store.frozen[self._leaf_of[p]]:
                shown["frozen"] = torch.tensor(1.0)
            self.state[p] = shown

    def state_dict(self) -> dict[str, Any]:
        """The state of all parameters by number, and the groups, as torch saves them."""
        if self._tree is not None:
            self._publish([p for p in self._leaf_of if p in self.state])
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; parameters are matched by name where both sides have names.

        State keeps the element type in which it was saved. Raises TreeMismatch for a state of other shapes or
        of another rule, ValueError for other groups; then nothing has changed.
        """
        before = vars(self).copy()
        given: list[dict[str, Any]] = []
        catch = self.register_load_state_dict_pre_hook(lambda _, loaded: given.append(loaded))
        try:
            super().load_state_dict(in_order(as_ours(state_dict, self._rules), self.param_groups))
            loaded = given[0]
            order = [n for group in loaded["param_groups"] for n in group["params"]]
            self.state.clear()
            for n, p in zip(order, self._parameters(), strict=True):
                if n in loaded["state"]:
                    self.state[p] = dict(loaded["state"][n])
            self._forget()
            self._kept = {p: (rule, frozen) for p, (rule, frozen) in self._kept.items() if frozen}
            self._seen = [self._loaded(n) for n in range(len(self.param_groups))]
            self._start()
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise
        finally:
            catch.remove()

    def _loaded(self, n: int) -> dict[str, Any]:
        """What was seen of a group before it was loaded; the present value of a schedule is no change."""
        rule, seen, group = self._rules[n], self._seen[n], self.param_groups[n]
        if rule is None or not self._scheduled[n]:
            return seen
        moving = {
            name
            for part in parts_of_value(rule)
            for name, value in settings(part)
            if name in adjustable(part) and is_schedule(value)
        }
        return {k: plain(group[k]) if field_of(rule, k) in moving else v for k, v in seen.items()}

    def __getstate__(self) -> dict[str, Any]:
        self._keep()
        kept = ("_engine", "_capturable", "_rules", "_given", "_rule", "_seen", "_scheduled", "_kept")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tensors = {}
        self._forget()


def _asks_for_state_only(groups: list[dict[str, Any]], grads: list[Any]) -> bool:
    """Whether this step is that of `torch.distributed.checkpoint`, which wants a state to load into: with
    rate 0 and gradients of zeros. Decay must not move the weights then.
    """
    still = all(not plain(group.get("lr", 0)) for group in groups)
    return still and all(g is None or not bool(g.any()) for g in grads)
