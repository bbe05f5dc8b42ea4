"""What is the learning rate of Keras to our rules? Their own rate where all have the same number, else a
factor on all of their rates.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import numpy as np

from optimisers.errors import BadSetting
from optimisers.rule import Rule, with_rates
from optimisers.schedules import Constant, Scaled, Schedule
from optimisers.settings import fields, inner, is_number, is_schedule, owners, parts, replaced, walk
from optimisers.state.interface import ScalarTable


@final
class Rates:
    """The rates of the rules of an optimiser, under the one learning rate that Keras knows."""

    def __init__(self, rule: Any, given: object) -> None:
        rate = given
        if isinstance(rate, Schedule) or is_number(rate):
            rule, rate = _of_one(rule, rate).adjust(eta=rate), None
        self.rule = rule
        etas = _etas(rule)
        self.none = etas is not None and not etas
        """Whether no rule has a rate."""
        same = etas is not None and len({*map(_number, etas)}) == 1
        self.own: float | None = _number(etas[0]) if same and etas else None
        """The one rate of all rules; None where the learning rate is a factor."""
        if self.none and rate is not None:
            raise BadSetting(f"learning_rate={rate!r} was given, and {rule!r} has no rate eta")
        self.given: Any = rate if rate is not None else 1.0 if self.own is None else self.own
        """What Keras is given for a learning rate."""

    def governed(self, rule: Rule | None) -> Rule | None:
        """A rule whose rates the learning rate of Keras governs."""
        return rule if rule is None or self.own is not None else _scaled(rule)

    def columns(self, rule: Rule) -> list[int]:
        """Which hyper-parameters of a governed rule the learning rate is written to."""
        if self.own is not None:
            return [j for j, (field, _) in enumerate(owners(rule)) if field == "eta"]
        return [j for j, (path, _) in enumerate(walk(rule)) if path[-2:] == ("eta", "factor")]

    def refuse_settings(self, weight_decay: object) -> None:
        """Raise BadSetting for decay by Keras, which is times the learning rate, where that is a factor."""
        if weight_decay is not None and self.own is None:
            raise BadSetting(
                f"weight_decay={weight_decay!r} of Keras is times the learning rate, which here is a factor "
                "on rates; write the decay into the rules, such as opt.AdamW(3e-4, lam=0.1)"
            )

    def refuse_assigned(self, rate: object) -> None:
        """Raise BadSetting for what cannot be assigned to the learning rate."""
        if self.none:
            raise BadSetting(f"learning_rate was set to {rate!r}, and {self.rule!r} has no rate eta")
        if isinstance(rate, Schedule):
            raise BadSetting(
                f"learning_rate was set to {rate!r}, which belongs into the rule: write "
                "KerasOptimizer(opt.Adam(schedule)); numbers and schedules of Keras can be assigned"
            )


def written(table: ScalarTable, columns: Sequence[int], rate: Any) -> ScalarTable:
    """A table with a learning rate, a number or traced, in some columns of all rows."""
    rows = np.arange(table.rows)
    for j in columns:
        table = table.write_hypers(rows, j, rate)
    return table


def shortest(rate: Any) -> float:
    """A rate that Keras keeps in float32 as the number that was meant: 0.001, not 0.0010000000474974513."""
    return float(str(np.float32(rate)))


def _of_one(rule: Any, rate: object) -> Rule:
    """The rule that takes a rate; raises BadSetting where there are several, or one without."""
    if not isinstance(rule, Rule):
        raise BadSetting(
            f"learning_rate={rate!r} was given beside several rules; give each its own rate, such as "
            '{opt.hidden_matrices: opt.Muon(0.02), "**": opt.AdamW(3e-4)}'
        )
    if not with_rates(parts(rule)):
        raise BadSetting(f"learning_rate={rate!r} was given, and {rule!r} has no rate eta")
    return rule


def _etas(rule: object) -> list[Any] | None:
    """The rates of all rules, as far as they are known before there are parameters."""
    if isinstance(rule, Rule):
        return [part.eta for part in with_rates(parts(rule))]
    if not isinstance(rule, Mapping):
        return None
    several: Iterable[Any] = rule.values()
    found = [_etas(r) for r in several if r is not None]
    return [eta for etas in found for eta in etas or ()]


def _number(eta: Any) -> float | None:
    return None if is_schedule(eta) else float(eta)


def _scaled(value: Any) -> Any:
    """A rule with a factor on each of its rates."""
    changes: dict[str, Any] = {}
    for field in fields(value):
        held = getattr(value, field.name)
        if field.name == "eta" and field.kind is not None:
            changes["eta"] = Scaled(held if is_schedule(held) else Constant(held), 1.0)
        elif not field.static and field.kind is None:
            changes[field.name] = inner(held, _scaled)
    return replaced(value, changes)
