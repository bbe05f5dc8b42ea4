"""By which rule is each array trained?"""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from optimisers.errors import BadState
from optimisers.rule import Rule
from optimisers.settings import takes
from optimisers.state.leaf import Branch, Leaf
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
    refuse_no_rule(rule, "setup(Adam(), model)")
    if isinstance(rule, Rule):
        return [rule] * len(arrays)
    return [rule(path, x) for path, x in zip(layout.paths, arrays, strict=True)]


def refuse_no_rule(rule: object, call: str) -> None:
    """Raise BadState for what is no rule and chooses none, in the place of Adam() in a call."""
    if isinstance(rule, Rule | Mapping | LayerDecay):
        return
    if callable(rule) and not isinstance(rule, type):
        if takes(rule, 2):
            return
        raise BadState(
            "the function that chooses rules is called with (path, array), which it does not take; write "
            "lambda path, x: Adam()"
        )
    if hasattr(rule, "param_groups"):
        shown, hint = f"torch's {type(rule).__name__}", "opt.TorchOptimizer.of(optimizer)"
    elif hasattr(rule, "init") and hasattr(rule, "update"):
        shown = "a transformation of Optax"
        hint = "opt.setup(opt.from_optax(transformation), model), for arrays of JAX"
    elif isinstance(rule, type):
        shown, hint = repr(rule), f"{rule.__name__}()"
    elif isinstance(rule, list | tuple):
        shown, hint = repr(rule), call.replace("Adam()", "Chain(...)")
    else:
        shown, hint = repr(rule), call
    raise BadState(f"{call.partition('(')[0]} was given {shown} where the rule goes; write {hint}")


def refuse_no_model(model: object, call: str) -> None:
    """Raise BadState for what is no model, in the place of `model` in a call."""
    name = call.partition("(")[0]
    if isinstance(model, Leaf | Branch):
        raise BadState(f"{name} was given a state where the model goes; write {call}")
    if isinstance(model, Rule):
        raise BadState(f"{name} was given the rule {model!r} where the model goes; write {call}")
    if isinstance(model, type):
        made = call.replace("model", f"{model.__name__}(...)")
        raise BadState(f"{name} was given the class {model.__name__} where the model goes; write {made}")
    if isinstance(model, Generator):
        made = call.replace("model", "module")
        raise BadState(
            f"{name} was given a generator where the model goes; write {made}, or a list of tensors"
        )
    if inspect.isroutine(model):
        raise BadState(f"{name} was given a function where the model goes; write {call}")
