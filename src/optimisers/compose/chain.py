"""Several rules, one after the other."""

from typing import Any

from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting, UnknownField
from optimisers.ops import under
from optimisers.rule import Rule, one_step, stepped
from optimisers.settings import parts


class Chain(Rule):
    """Applies rules in order, each to what the one before returned; without rules, the gradient itself is the
    step.

    `Chain(WeightDecay(0.1), Adam())`. The state is the tuple of theirs. Where a rule answers "no step" (None,
    or `when` with a condition that fails), the rules behind it do not run and keep their state.
    """

    lazy = True

    rules: tuple[Rule, ...] = ()

    def __init__(self, *rules: Rule, **named: Any) -> None:
        for name in named:
            raise UnknownField(
                f"Chain has no setting {name}; its rules go by place, such as Chain(ClipGrad(), Adam())"
            )
        self.rules = rules  # pyright: ignore[reportAttributeAccessIssue] set once, here
        self.__post_init__()

    def check(self) -> None:
        for rule in self.rules:
            if not isinstance(rule, Rule):
                hint = f"; write {rule.__name__}()" if isinstance(rule, type) else ""
                hint = "; write Chain(*rules)" if isinstance(rule, list | tuple) else hint
                raise BadSetting(
                    f"Chain was given {rule!r}; it takes rules, such as Chain(ClipGrad(), Adam()){hint}"
                )

        for rule in self.rules[:-1]:
            for part in parts(rule):
                if isinstance(part, Rule) and part.last:
                    raise BadSetting(
                        f"Chain was given a {type(part).__name__} before other rules; it averages the "
                        f"parameters that a step leads to: write it last, Chain(..., {type(part).__name__}())"
                    )
        wrappers = [
            part for rule in self.rules for part in parts(rule) if isinstance(part, Rule) and part.whole
        ]
        if wrappers and len(self.rules) > 1:
            name = type(wrappers[0]).__name__
            raise BadSetting(
                f"Chain was given a {name} among other rules; it wraps a whole chain: write "
                f"{name}(Chain(...))"
            )

    def init(self, x: Array) -> tuple[Any, ...]:
        return tuple(rule.init(x) for rule in self.rules)

    def apply(self, state: tuple[Any, ...], x: Array, dx: Array | None, *more: Array) -> Any:
        new: list[Any] = []
        with one_step():
            for rule, old in zip(self.rules, state, strict=True):
                if dx is None:
                    new.append(old)
                    continue
                with under(dx):
                    kept, dx = stepped(rule, old, x, dx, more)
                new.append(kept)
        return tuple(new), dx

    def evaluate(self, state: tuple[Any, ...], x: Array) -> Any:
        found = (rule.evaluate(kept, x) for rule, kept in zip(self.rules, state, strict=True))
        return next((value for value in found if value is not None), None)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.rules))})"
