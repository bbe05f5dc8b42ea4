"""How is a rule written into the config of a Keras model? As plain data with names, which JSON takes."""

from collections.abc import Iterator, Mapping
from typing import Any

from optimisers.errors import BadState
from optimisers.keras.library import keras
from optimisers.settings import Value, is_number, settings
from optimisers.step.layers import LayerDecay
from optimisers.tree.selectors import Selector

PACKAGE = "optimisers"

PLAIN = (type(None), bool, int, float, str)
"""Types that JSON takes as they are."""


def described(value: Any) -> Any:
    """A rule, what chooses rules, or what stands in them, as plain data.

    Raises BadState for what has no name by which it is found again, such as a lambda.
    """
    if type(value) in PLAIN or is_number(value):
        return value if type(value) in PLAIN else float(value)
    if isinstance(value, tuple | list):
        return {"tuple": [described(item) for item in value]}
    if isinstance(value, Mapping):
        return {"rules": [[described(key), described(rule)] for key, rule in value.items()]}
    if isinstance(value, Value | Selector | LayerDecay):
        held = settings(value) if isinstance(value, Value) else vars(value).items()
        return {"class": _name(type(value)), "settings": {k: described(v) for k, v in held}}
    name = keras.saving.get_registered_name(value) if hasattr(value, "__name__") else ""
    if name and keras.saving.get_registered_object(name) is value:
        return {"object": name}
    raise BadState(
        f"{value!r} stands in the rule of an optimizer and has no name by which it could be loaded; write a "
        "schedule of optimisers, or put @keras.saving.register_keras_serializable() above the function"
    )


def restored(data: Any, custom: Mapping[str, Any] | None = None) -> Any:
    """What `described` has written; `custom` has classes and functions of users by name.

    Raises BadState for a name that is not known.
    """
    if not isinstance(data, dict):
        return data
    if "tuple" in data:
        return tuple(restored(item, custom) for item in data["tuple"])
    if "rules" in data:
        return {restored(key, custom): restored(rule, custom) for key, rule in data["rules"]}
    if "object" in data:
        return _of_users(data["object"], custom)
    kind = _class(data["class"], custom)
    held = {name: restored(value, custom) for name, value in data["settings"].items()}
    if not issubclass(kind, Value):
        return kind(**held)
    made = object.__new__(kind)
    vars(made).update(held)
    made.__post_init__()
    return made


def _name(kind: type) -> str:
    """The name of a class: ours is its own, that of a user the one by which Keras knows it."""
    ours = kind.__module__.partition(".")[0] == PACKAGE
    return f"{PACKAGE}>{kind.__name__}" if ours else keras.saving.get_registered_name(kind)


def _class(name: str, custom: Mapping[str, Any] | None) -> type:
    package, _, plain = name.partition(">")
    if package != PACKAGE:
        return _of_users(name, custom)
    found = (kind for base in (Value, Selector, LayerDecay) for kind in _descendants(base))
    for kind in found:
        if kind.__name__ == plain and kind.__module__.partition(".")[0] == PACKAGE:
            return kind
    raise BadState(f"the saved optimizer has {plain}, which this version of optimisers does not know")


def _descendants(kind: type) -> Iterator[type]:
    yield kind
    for child in type.__subclasses__(kind):
        yield from _descendants(child)


def _of_users(name: str, custom: Mapping[str, Any] | None) -> Any:
    """What Keras, or whoever loads, knows by a name."""
    found = keras.saving.get_registered_object(name, custom_objects=custom)
    if found is None:
        plain = name.rpartition(">")[2]
        raise BadState(
            f"the saved optimizer has {name}, which is not known here; write load_model(path, custom_objects="
            f'{{"{name}": {plain}}}), or put @keras.saving.register_keras_serializable() above it'
        )
    return found
