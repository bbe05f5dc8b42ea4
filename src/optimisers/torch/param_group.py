"""What stands in one parameter group of torch, by which rule, and what of it has changed?"""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false

import copy
import operator
import warnings
from collections.abc import Callable
from typing import Any, final

import torch

from optimisers.errors import BadSetting, BadState
from optimisers.rule import EVERY, Rule, further
from optimisers.settings import adjusted, fields, is_schedule
from optimisers.settings import parts as parts_of_value
from optimisers.torch.classes import plain
from optimisers.torch.groups import (
    ASKING,
    at,
    defaults_of,
    follows_schedule,
    meanings_of,
    nothing,
    of_wrapper,
    put,
    refuse,
    told,
)
from optimisers.torch.published import written
from optimisers.torch.rates import ABSOLUTE, has_scheduler, of_its_own, scaled

NUMBERS = frozenset({bool, float, int, tuple, type(None)})
"""Types of settings that hold no tensor."""


@final
class ParamGroup:
    """One parameter group, and the rule that it stands for."""

    leaves: list[int]
    """The leaves of its parameters."""
    warned = False
    """Whether it was said that `lr` is a factor here, where no scheduler set it."""
    lent = ""
    """What momentum is called in other groups, where it has another name here or there is none: schedulers
    that cycle it look for one key in all groups.
    """

    def __init__(self, group: dict[str, Any], rule: Rule | None) -> None:
        self.group, self.leaves = group, []
        self.take(rule)

    def take(self, rule: Rule | None) -> None:
        """Stand for a rule: all of its settings are shown, those that others keep under more names too."""
        group, self.rule = self.group, rule
        self.watched: dict[str, str] = {}
        self.constant: list[str] = []
        self.meanings: dict[str, str] = {}
        """The field behind every key that the rule takes."""
        self.moving: list[tuple[str, Any, int]] = [] if rule is None else _moving(rule)
        takes = [further(type(part))[1] for part in parts_of_value(rule) if isinstance(part, Rule)]
        self.second_order = any(0 < count < EVERY for count in takes)
        """Whether a rule here, and not only one around it, takes second gradients."""
        self.per_example = any(isinstance(part, Rule) and part.per_example for part in parts_of_value(rule))
        if rule is not None:
            foreign = of_wrapper(group)
            self._show(defaults_of(rule), foreign)
            meanings = {key: field for key, field in meanings_of(rule).items() if key not in foreign}
            self.meanings = meanings
            self.watched = {key: meanings[key] for key in group if key in meanings}
            self.constant = [key for key in group if key not in {*meanings, *foreign} and key in ASKING]
        self.fetch = _fetcher([*self.watched, *self.constant])
        self.look()

    def _show(self, settings: dict[str, Any], foreign: frozenset[str]) -> None:
        """Put the settings of the rule into the group; where the rate is a schedule, `lr` is a factor on it
        and `eta` the rate now.
        """
        group, follows = self.group, self.rate is not None
        factor = group["lr"] if follows_schedule(group) else 1.0
        group.pop("eta", None)
        for key, value in settings.items():
            if key not in foreign:
                self.put("eta" if key == "lr" and follows else key, value)
        if follows:
            self.put("lr", factor)
        group.setdefault("lr", 1.0)
        self.show_lent()

    @property
    def noted(self) -> dict[str, Any]:
        """What stood in the group at the last look, by key."""
        return dict(zip([*self.watched, *self.constant], self.seen, strict=True))

    @property
    def rate(self) -> Any:
        """The schedule that the rate follows; None if it does not."""
        return next((value for field, value, _ in self.moving if field == "eta"), None)

    def greet(self) -> None:
        """Look at a scheduler of torch that is being made; raises BadSetting for one that sets rates of its
        own, where the rate is a schedule.
        """
        if self.rate is not None and (plain(self.group["lr"]) != self.noted["lr"] or self._sets_rates()):
            raise BadSetting(of_its_own("this scheduler", self.rate))

    def _sets_rates(self) -> bool:
        """Whether a scheduler has begun at another number than the factor that stood here, or left its own
        rates.
        """
        began = self.group.get("initial_lr", self.noted["lr"])
        new = "initial_lr" not in self.known and plain(began) != self.noted["lr"]
        return new or any(key in self.group for key in ABSOLUTE)

    def _meant(self, key: str, value: Any, where: str) -> Any:
        """What a number stands for that was written: in `lr`, where the rate is a schedule, a factor on that.

        Raises BadSetting for a scheduler that sets rates of its own.
        """
        schedule = self.rate if key == "lr" and self.moving else None
        if schedule is None or is_schedule(value):
            return value
        if self._sets_rates():
            raise BadSetting(f"{where}: {of_its_own('a scheduler', schedule)}")
        if not self.warned and "initial_lr" not in self.known and not has_scheduler(self.group):
            self.warned = True
            warnings.warn(
                f"{where} sets lr to {value!r}, which is a factor on {schedule!r}; for a rate of its own "
                "write it as the eta of the group",
                stacklevel=2,
            )
        return scaled(schedule, value)

    def lend(self, key: str) -> None:
        """Show the momentum under a key of other groups, where it has another name."""
        if key not in self.group:
            self.lent = key
            self.show_lent()
            self.take(self.rule)

    def show_lent(self) -> None:
        """Show the momentum as other groups do: `betas` of one number, or of none."""
        momentum = self.group.get("momentum")
        if self.lent == "betas":
            self.group["betas"] = () if momentum is None else (momentum,)
        elif self.lent:
            self.group[self.lent] = 0.0

    def renew(self, rule: Rule, found: dict[str, Any]) -> None:
        """Stand for a rule that differs by the fields that were found."""
        new = self.group.keys() != self.known.keys()
        if new or self.moving or self.lent or any(map(is_schedule, found.values())):
            self.take(rule)
            return
        self.rule = rule
        seen = [found.get(field, was) for field, was in zip(self.watched.values(), self.seen, strict=False)]
        for key, value, was in zip(self.watched, seen, self.seen, strict=False):
            if value is not was:
                self.put(key, value)
        self.seen = (*seen, *self.seen[len(seen) :])
        held = self.fetch(self.group)
        if not NUMBERS.issuperset(map(type, held)):
            self.raw = [written(v) for v in held]

    def put(self, key: str, value: Any) -> None:
        """Show a value; a tensor that holds it stays."""
        held = self.group.get(key)
        if held is not value and (held is None or plain(held) != value):
            self.group[key] = value

    def begin(self) -> None:
        """Take the rate that stands here for the first one, where it is read at the start alone."""
        rule, rate = self.rule, self.group.get("lr")
        if rule is not None and "lr" in self.constant and plain(rate) != self.noted["lr"]:
            self.take(told(rule, {"lr": rate}, "a group"))

    def look(self) -> None:
        """Note what stands in the group now."""
        held = self.fetch(self.group)
        self.seen = tuple(map(plain, held))
        self.raw = [written(v) for v in held]
        """The tensors among them, and how often they had been written."""
        self.known = dict.fromkeys(self.group)

    def move(self, clock: Callable[[int], int]) -> None:
        """Show the present values of schedules."""
        now = {field: at(value, clock(n)) for field, value, n in self.moving}
        for key, field in self.watched.items():
            if field in now and (key != "lr" or self.rate is None):
                self.put(key, now[field])
        self.seen = tuple(map(plain, self.fetch(self.group)))

    def refuse_changed(self, n: int) -> None:
        """Raise BadState where something else stands in group number n than at the last look: a graph that
        is being captured would not hold it, and tensors cannot be read then.
        """
        now = zip(self.fetch(self.group), self.seen, self.raw, strict=True)
        if any(
            written(value) != raw if isinstance(value, torch.Tensor) else value != seen
            for value, seen, raw in now
        ):
            raise BadState(f"group {n} was changed; write read_groups() before a graph is captured")

    def loaded(self, group: dict[str, Any]) -> "ParamGroup":
        """The same group after it was loaded: what is another number there will be found, but for the present
        value of a schedule, which is no change. A factor on that is.
        """
        new = copy.copy(self)
        moving = {field for field, _, _ in self.moving}
        new.warned = True  # a factor that was saved is meant
        new.group, new.known = group, self.known | dict.fromkeys({"initial_lr"} & group.keys())
        new.seen = tuple(
            plain(group[key]) if key != "lr" and self.watched.get(key) in moving else seen
            for key, seen in zip([*self.watched, *self.constant], self.seen, strict=True)
        )
        return new

    def fitted(self, saved: dict[str, Any], n: int, *, lenient: bool) -> dict[str, Any]:
        """The settings of a saved group, each under all of its names; those that it lacks stay as they are if
        that is `lenient`. Raises BadSetting for what the rule does not take.
        """
        full = {key: self.group[key] for key in ("initial_lr",) if key in self.group} | saved
        if self.rule is None:
            return self.settings | full
        if follows_schedule(full) != (self.rate is not None):
            self._keep_rate(full, n, lenient=lenient)
        for key, field in self.watched.items():
            if key not in full:
                named = next((name for name in full if self.meanings.get(name) == field), None)
                if named is None and not lenient:
                    raise BadSetting(f"group {n} of the saved state has no {key}, which {self.rule!r} has")
                full[key] = self.group[key] if named is None else full[named]
        full = {key: self.group[key] for key in self.constant} | full
        adjusted(self.rule, self.loaded(full).edits(n))
        return full

    def _keep_rate(self, full: dict[str, Any], n: int, *, lenient: bool) -> None:
        """Leave the rate as it is where a saved group has a rate in `lr` and this one a factor on a schedule.
        Raises BadSetting where it is the other way round, unless that is `lenient`.
        """
        if follows_schedule(full) and not lenient:
            raise BadSetting(
                f"group {n} of the saved state has lr={full['lr']!r} as a factor on a schedule, and the rate "
                f"of {self.rule!r} follows none; take the rule with its schedule"
            )
        full.pop("eta", None)
        full |= {key: self.group[key] for key in ("lr", "eta") if key in self.group}

    @property
    def settings(self) -> dict[str, Any]:
        """What stands in the group beside its parameters."""
        return {k: v for k, v in self.group.items() if k not in ("params", "param_names")}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("fetch", "raw")}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept, raw=[None] * len(kept["seen"]))
        self.fetch = _fetcher([*self.watched, *self.constant])

    def edits(self, n: int) -> dict[str, Any]:
        """What was written into group number n since the last look, as fields of its rule.

        Raises BadSetting for what the rule does not have, for a setting that is gone, and for two names of
        one setting with different values.
        """
        keys = list(self.noted)
        try:
            now = self.fetch(self.group)
            if now == self.seen and self.group.keys() == self.known.keys():
                return {}
            keys = [key for key, value, was in zip(keys, now, self.seen, strict=True) if value is not was]
        except (KeyError, RuntimeError):
            pass  # a key that is gone, a tensor that is no number
        if self.group.keys() != self.known.keys():
            keys += [key for key in self.group if key not in self.known]
        return {} if self.rule is None else self._edits(self.rule, keys, f"group {n}")

    def _edits(self, rule: Rule, keys: list[str], where: str) -> dict[str, Any]:
        """What was written under those of some keys that show something else than at the last look."""
        found: dict[str, Any] = {}
        seen = self.noted
        meanings = self.meanings
        for key in keys:
            if key not in self.group:
                raise BadSetting(f"{where} has no {key} any more; write it again: it was {seen[key]!r}")
            held = self.group[key]
            if key in seen and not isinstance(held, torch.Tensor) and held == seen[key]:
                continue
            value = plain(held)
            if key in seen and value == seen[key]:
                continue
            if key in meanings:
                put(found, meanings[key], key, self._meant(key, value, where), where)
            elif key == self.lent:
                if value and "momentum" in meanings:
                    put(found, meanings["momentum"], key, value[0], where)
            else:
                self._refuse(rule, key, value, where)
        if not found:
            self.look()
        return found

    def _refuse(self, rule: Rule, key: str, value: Any, where: str) -> None:
        """Raise BadSetting for what was written and no setting of the rule is, where it says something."""
        if key == "lr":
            if any(hasattr(part, "eta") for part in parts_of_value(rule)):
                return  # the rate of Rprop is read at the start alone, here as in torch
            raise BadSetting(
                f"{where} sets lr to {value!r}, and {rule!r} has no rate that may change; write "
                "Chain(rule, Descent(1.0)), whose rate scales the step"
            )
        refuse(rule, key, value, where)
        was = self.noted.get(key)
        if not nothing(was):
            raise BadSetting(
                f"{where} sets {key} to {value!r}; it was {was!r} from the start, and belongs to the "
                "structure of the rule"
            )


def _fetcher(keys: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Reads the values of some keys in one call."""
    if len(keys) > 1:
        return operator.itemgetter(*keys)
    return lambda group: tuple(group[key] for key in keys)


def _moving(rule: Rule) -> list[tuple[str, Any, int]]:
    """(field, value, which part of the rule) for each setting that is a schedule."""
    found: dict[str, tuple[str, Any, int]] = {}
    for n, part in enumerate(parts_of_value(rule)):
        for name, kind, *_ in fields(part):
            if kind is not None:
                found.setdefault(name, (name, getattr(part, name), n))
    return [entry for entry in found.values() if is_schedule(entry[1])]
