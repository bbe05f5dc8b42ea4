"""A rule as a `torch.optim.Optimizer`: schedulers, scalers, checkpoints and trainers know it as one."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from optimisers.arrays import registry
from optimisers.errors import BadSetting, BadState, TreeMismatch
from optimisers.leaf import parts
from optimisers.rule import Rule
from optimisers.rules.descent import Momentum, Nesterov
from optimisers.trace.program import flatten, unflatten
from optimisers.tree.path import KeyPath, matches
from optimisers.update import setup, update_
from optimisers.value import ELSEWHERE, adjustable, adjusted, settings
from optimisers.value import parts as parts_of_value

__all__ = ["TorchOptimizer"]

TORCH_NAMES = {"beta": "betas", "epsilon": "eps", "lam": "weight_decay"}
"""Settings that stand in a group under torch's name too, where schedulers and trainers look for them."""


class TorchOptimizer(torch.optim.Optimizer):
    """Trains parameters by a rule, as `torch.optim.Optimizer` does: one fused pass over all of them a step.

    `params` is a module, or what every optimiser of torch takes: parameters, (name, parameter) pairs, or
    dicts of groups. `rule` is a rule, or for a module or named parameters a dict {glob: rule}, where the
    first glob that matches a name wins; None trains nothing there. `settings` adjust the rule: `lr=3e-4`.

    Every hyper-parameter of the rule stands in the groups by its name, `eta` as `lr`; `beta`, `epsilon`,
    `lam` and the `rho` of Momentum and Nesterov also as `betas`, `eps`, `weight_decay` and `momentum`.
    Whatever of these is changed counts from the next step on, and nothing is compiled for it. `tree` is the
    state as `setup` gives it, with a Leaf for each name: freeze, thaw and look at it there.

    Raises BadSetting for settings that the rule does not have, TreeMismatch for a loaded state that does not
    fit, and what `update_` raises.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: Any, rule: Any, *, engine: str | None = None, **settings: Any) -> None:
        self._engine = engine
        self._rules: list[Rule | None] = []
        self._seen: list[dict[str, Any]] = []
        self._scheduled: list[bool] = []
        self._tree: Any = None
        self._model: dict[str, Any] = {}
        self._known: list[Any] = []
        self._untrained: list[int] = []
        if isinstance(params, torch.nn.Module):
            params = params.named_parameters()
        if isinstance(rule, Mapping):
            groups, rules = _by_glob(rule, list(params))
        else:
            groups, rules = params, None
            if not isinstance(rule, Rule):
                hint = f"; write {rule.__name__}()" if isinstance(rule, type) else ""
                raise BadState(f"TorchOptimizer was given {rule!r} where the rule goes{hint}")
        self._given = rules
        self._rule: Rule | None = None
        if isinstance(rule, Rule):
            self._rule = adjusted(rule, self._fields(rule, settings, "TorchOptimizer"))
        super().__init__(groups, _defaults(self._rule) if self._rule is not None else settings)

    # -- groups --

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, with settings of their own; what has been learnt stays."""
        n = len(self.param_groups)
        given = dict(param_group)
        rule = (
            self._rule if self._given is None else self._given[n] if n < len(self._given) else self._given[-1]
        )
        rule = given.pop("rule", rule)
        own = {k: v for k, v in given.items() if k not in ("params", "param_names")}
        if rule is not None:
            own = self._fields(rule, {**({} if self._given is None else self.defaults), **own}, f"group {n}")
            rule = adjusted(rule, own)
            given |= {k: v for k, v in _defaults(rule).items() if k not in given}
        super().add_param_group(given)
        self._rules.append(rule)
        self._scheduled.append(rule is not None and _has_schedule(rule))
        self._seen.append(self._shown(self.param_groups[-1], rule))
        self._stop()

    @staticmethod
    def _fields(rule: Rule, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Settings of a group as the fields of the rule; those of other tools are left alone."""
        found: dict[str, Any] = {}
        known = adjustable(rule)
        for name, value in given.items():
            field = _field(rule, name)
            if field in known:
                found[field] = _plain(value)
            elif name in ELSEWHERE and not _nothing(value):
                raise BadSetting(
                    f"{where} sets {name}={value!r}, and {rule!r} has no such setting; it has "
                    f"{', '.join(_names(rule))}"
                )
        return found

    def _shown(self, group: dict[str, Any], rule: Any) -> dict[str, Any]:
        """The settings of a group as they stand, by key."""
        return {} if rule is None else {key: _plain(group[key]) for key in _names(rule) if key in group}

    def _now(self, n: int, group: dict[str, Any]) -> dict[str, Any]:
        """The same for the keys that are known to be there."""
        return {key: _plain(group[key]) for key in self._seen[n]}

    def _read_groups(self) -> None:
        """Take over what schedulers and users have changed in the groups since the last step."""
        store = parts(self._tree)[0]
        for n, (group, rule, seen) in enumerate(zip(self.param_groups, self._rules, self._seen, strict=True)):
            if rule is None:
                continue
            now = self._now(n, group)
            if now != seen:
                changes = {_field(rule, k): v for k, v in now.items() if v != seen.get(k)}
                leaves = [self._leaf_of[p] for p in group["params"] if p in self._leaf_of]
                self._rules[n] = rule = adjusted(rule, changes)  # noqa: PLW2901 it goes on as the new one
                self._scheduled[n] = _has_schedule(rule)
                store.change(leaves, lambda old, changes=changes: adjusted(old, changes))
            if now != seen or self._scheduled[n]:
                meant = _defaults(rule, store.clock).items()
                group.update({k: v for k, v in meant if k not in group or v != _plain(group[k])})
                self._seen[n] = self._shown(group, rule)

    # -- the step --

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients that the parameters keep; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = self._parameters()
        grads = [p.grad for p in given]
        if self._tree is None or not self._same(given) or any(grads[i] is not None for i in self._untrained):
            untouched = not self.state
            self._start()
            if untouched and closure is None and _asks_for_state_only(self.param_groups, grads):
                return loss
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and found.item():
            return loss
        if scale is not None:
            present = [g for g in grads if g is not None]
            torch._foreach_mul_(present, 1 / scale.item())
        self._read_groups()
        update_(self._tree, self._model, dict(zip(self._model, grads, strict=True)))
        return loss

    def _parameters(self) -> list[Any]:
        groups = self.param_groups
        return groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]

    def _same(self, given: list[Any]) -> bool:
        """Whether the groups hold the parameters of the last step: others may stand there now."""
        return len(given) == len(self._known) and all(map(operator.is_, given, self._known))

    @property
    def tree(self) -> Any:
        """The state as `setup` gives it: a Leaf for each parameter, by its name."""
        if self._tree is None or not self._same(self._parameters()):
            self._start()
        self._read_groups()
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
            rules += [rule] * len(group["params"])
        self._model = dict(zip(names, given, strict=True))
        rule_of = dict(zip(names, rules, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._tree = setup(lambda path, _: rule_of[str(path[0])], self._model, engine=self._engine)
        self._known = list(given)
        store, node, _ = parts(self._tree) if self._tree != () else (None, None, None)
        places = dict(zip(node.names, node.leaves, strict=True)) if node is not None else {}
        self._leaf_of = {p: places[name] for name, p in self._model.items() if name in places}
        self._untrained = [i for i, p in enumerate(given) if p not in self._leaf_of]
        for p in list(self.state):
            if p in self._leaf_of and self.state[p]:
                self._adopt(p, store)
            elif p not in self._leaf_of and all(p is not q for q in given):
                del self.state[p]
        self._publish()

    def _stop(self) -> None:
        """Forget the tree; what it has learnt stays in `state`."""
        if self._tree is not None:
            self._publish()
            self._tree = None

    def _publish(self) -> None:
        """Show the state of every parameter in `state`: arrays as views, which stay true, numbers as they are
        now.
        """
        if self._tree == ():
            return
        store = parts(self._tree)[0]
        for p, leaf in self._leaf_of.items():
            group, i = store.where(leaf)
            shown: dict[str, Any] = {"step": torch.tensor(float(store.clock))}
            for path, value in flatten(group.state_of(i)):
                tensor = registry.isarray(value)
                shown[_key(path)] = value if tensor else torch.tensor(float(value), dtype=torch.float64)
            self.state[p] = shown

    def _adopt(self, p: Any, store: Any) -> None:
        """Take over the state of a parameter from `state`, where a checkpoint or another process put it."""
        group, i = store.where(self._leaf_of[p])
        saved, name = self.state[p], next(n for n, q in self._model.items() if q is p)
        old = group.state_of(i)
        entries = [(_key(path), value) for path, value in flatten(old)]
        missing = [key for key, _ in entries if key not in saved]
        extra = [key for key in saved if key != "step" and key not in dict(entries)]
        if missing or extra:
            raise TreeMismatch(
                f"the state of {name!r} has {', '.join(map(repr, saved))}; {self._rules[0]!r} keeps "
                f"{', '.join(repr(k) for k, _ in entries)}; load the state of the same rule"
            )
        new: list[Any] = []
        for key, value in entries:
            found = saved[key]
            if registry.isarray(value):
                if tuple(found.shape) != tuple(value.shape):
                    raise TreeMismatch(
                        f"{key!r} of {name!r} has shape {tuple(found.shape)}; the parameter takes "
                        f"{tuple(value.shape)}"
                    )
                new.append(found.to(value.device))
            else:
                new.append(float(found))
        store.assign(self._leaf_of[p], unflatten(old, iter(new)))
        if "step" in saved:
            store.clock = max(store.clock, int(saved["step"]))

    def state_dict(self) -> dict[str, Any]:
        """The state of all parameters by number, and the groups, as torch saves them."""
        if self._tree is not None:
            self._publish()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; parameters are matched by name where both sides have names.

        State keeps the element type in which it was saved. Raises TreeMismatch for a state of other shapes or
        of another rule, ValueError for other groups.
        """
        state_dict = _in_order(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        self._tree = None
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for n, p in zip(numbers, self._parameters(), strict=True):
            if n in state_dict["state"]:
                self.state[p] = dict(state_dict["state"][n])
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        if self._tree is not None:
            self._publish()
        kept = {
            name: getattr(self, name)
            for name in ("_engine", "_rules", "_given", "_rule", "_seen", "_scheduled")
        }
        return super().__getstate__() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tree, self._model, self._known, self._untrained = None, {}, [], []


# -- names of settings ---------------------------------------------------------------------------------------


def _names(rule: Rule) -> list[str]:
    """The keys under which the settings of a rule stand in a group."""
    return list(_defaults(rule))


def _defaults(rule: Rule | None, clock: int = 0) -> dict[str, Any]:
    """The settings of a rule as a group holds them: the first of each name among the rules it is made of, and
    schedules by their present value.
    """
    found: dict[str, Any] = {}
    for part in parts_of_value(rule):
        for name, value in settings(part):
            if name not in adjustable(part) or name in found:
                continue
            found[name] = _at(_plain(value), clock)
            if name in TORCH_NAMES:
                found[TORCH_NAMES[name]] = found[name]
            elif name == "rho" and isinstance(part, Momentum | Nesterov):
                found["momentum"] = found[name]
    return {("lr" if name == "eta" else name): value for name, value in found.items()}


def _at(value: Any, clock: int) -> Any:
    """The present value of a setting."""
    if isinstance(value, tuple):
        return tuple(_at(v, clock) for v in value)
    if callable(value):
        number: Any = value(clock)
        return float(number)
    return value


def _has_schedule(rule: Rule) -> bool:
    """Whether a setting of the rule is a function of the clock."""
    values = [v for part in parts_of_value(rule) for name, v in settings(part) if name in adjustable(part)]
    return any(callable(v) for value in values for v in (value if isinstance(value, tuple) else (value,)))


def _field(rule: Rule, name: str) -> str:
    """The field that a key of a group stands for."""
    fields = adjustable(rule)
    if name in fields:
        return name
    return {"lr": "eta", "momentum": "rho"}.get(name) or ELSEWHERE.get(name, name)


def _plain(value: Any) -> Any:
    """A setting as a number of Python, or a tuple of them; schedules stay."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, torch.Tensor) else value


def _nothing(value: Any) -> bool:
    """Whether a setting says that something is not wanted: a rule without it may ignore it."""
    return value is None or (isinstance(value, float | int) and value == 0)


def _key(path: tuple[Any, ...]) -> str:
    """Where in the state of a rule something stands, as torch's loaders take it."""
    return ".".join(map(str, path)) or "state"


# -- groups and checkpoints ----------------------------------------------------------------------------------


def _by_glob(rules: Mapping[str, Any], named: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """(groups, their rules): one for each glob that takes a parameter."""
    if not all(isinstance(pair, tuple) for pair in named):
        raise BadState("a dict of rules takes a module or named parameters: write model.named_parameters()")
    taken: dict[str, list[Any]] = {glob: [] for glob in rules}
    for name, p in named:
        glob = next((g for g in rules if matches(g, KeyPath(name))), None)
        if glob is None:
            raise BadState(f'no rule for {name!r}; the globs are {", ".join(map(repr, rules))}; add "**"')
        taken[glob].append((name, p))
    for glob, found in taken.items():
        if not found:
            raise BadState(f"{glob!r} takes no parameter; there are {', '.join(n for n, _ in named[:6])}")
    return [{"params": found} for found in taken.values()], list(rules.values())


def _in_order(saved: dict[str, Any], groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A saved state whose parameters stand in the order of the groups here, where both have names."""
    new: list[dict[str, Any]] = []
    for theirs, ours in zip(saved["param_groups"], groups, strict=False):
        names, wanted = theirs.get("param_names"), ours.get("param_names")
        if names and wanted and names != wanted:
            if set(names) != set(wanted):
                lost = sorted(set(wanted) - set(names)) or sorted(set(names) - set(wanted))
                raise TreeMismatch(
                    f"the saved state is that of other parameters: {lost[0]!r} is on one side only"
                )
            number = dict(zip(names, theirs["params"], strict=True))
            theirs = theirs | {"params": [number[n] for n in wanted], "param_names": list(wanted)}  # noqa: PLW2901
        new.append(theirs)
    return saved | {"param_groups": new + saved["param_groups"][len(new) :]}


def _asks_for_state_only(groups: list[dict[str, Any]], grads: list[Any]) -> bool:
    """Whether this step is that of `torch.distributed.checkpoint`, which wants a state to load into: with
    rate 0 and gradients of zeros. Decay must not move the weights then.
    """
    still = all(not _plain(group.get("lr", 1)) for group in groups)
    return still and all(g is None or not bool(g.any()) for g in grads)
