"""By which rule is each array trained?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optimisers.errors import BadState
from optimisers.rule import Rule
from optimisers.settings import takes
from optimisers.step.layers import LayerDecay
from optimisers.tree.layout import Layout
from optimisers.tree.path import KeyPath
from optimisers.tree.selectors import first_picks

Rules = Rule | Mapping[Any, Rule | None] | Callable[[KeyPath, Any], Rule | None] | LayerDecay
"""One rule for all arrays, or one by glob or selector, or what a function of path and array says; None trains
nothing. Or any of these with rates by depth.
"""


def choose(rule: Any, layout: Layout, arrays: Sequence[Any]) -> list[Any]:
    """The rule of each leaf."""
    if isinstance(rule, LayerDecay):
        return rule.slowed(choose(rule.rule, layout, arrays), layout.parameters)
    if isinstance(rule, Mapping):
        chosen = list(rule.values())
        return [chosen[k] for k in first_picks(list(rule), layout.parameters)]
    if callable(rule) and not isinstance(rule, type | Rule):
        if not takes(rule, 2):
            raise BadState(
                "the function that chooses rules is called with (path, array), which it does not take; write "
                "lambda path, x: Adam()"
            )
        return [rule(path, x) for path, x in zip(layout.paths, arrays, strict=True)]
    if not isinstance(rule, Rule):
        several = isinstance(rule, list | tuple)
        hint = f"write {rule.__name__}()" if isinstance(rule, type) else "write setup(Adam(), model)"
        hint = "write setup(Chain(...), model)" if several else hint
        raise BadState(f"setup was given {rule!r} where the rule goes; {hint}")
    return [rule] * len(arrays)
