"""Where is kept what is worked out once? On the object it is about, so that both are gone together.

A cache of the process would keep every program that was ever traced, and with it rules and their classes.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

Owner = TypeVar("Owner")
Key = ParamSpec("Key")
Found = TypeVar("Found")


def cached(
    function: Callable[Concatenate[Owner, Key], Found],
) -> Callable[Concatenate[Owner, Key], Found]:
    """Keep what a function finds in the `__cache__` of its first argument, by the other ones."""

    @functools.wraps(function)
    def found(owner: Any, *key: Key.args, **options: Key.kwargs) -> Found:
        at = (function, key, *options.items()) if options else (function, key)
        try:
            return owner.__cache__[at]
        except KeyError:
            pass
        except AttributeError:
            object.__setattr__(owner, "__cache__", {})  # frozen ones have it too
        value = owner.__cache__[at] = function(owner, *key, **options)
        return value

    return found
