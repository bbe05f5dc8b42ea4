"""Finds the module of functions for an array, without importing a library that the user has not imported."""

import functools
import importlib
import numbers
from types import ModuleType
from typing import Any

LIBRARIES = {
    "numpy": "optimisers.arrays.numpy",
    "torch": "optimisers.arrays.torch",
    "jax": "optimisers.arrays.jax",
    "jaxlib": "optimisers.arrays.jax",
    "cupy": "optimisers.arrays.cupy",
}
"""Top-level package of an array type -> the module here that speaks for it."""


@functools.lru_cache(maxsize=1024)
def module_of(kind: type) -> ModuleType | None:
    """The module that speaks for arrays of this type, or None if it is not an array type."""
    for base in kind.__mro__:
        name = LIBRARIES.get(base.__module__.partition(".")[0])
        if name is not None:
            module = importlib.import_module(name)
            if module.is_array_type(kind):
                return module
    return None


@functools.cache
def named(name: str) -> Any:
    """The module that speaks for a library."""
    return importlib.import_module(LIBRARIES[name])


def library(*args: Any) -> Any:
    """The library of the first array among the arguments; NumPy for plain numbers.

    Raises TypeError if none of them is an array or a number.
    """
    plain = False
    for a in args:
        module = module_of(type(a))
        if module is not None:
            return module
        plain = plain or isinstance(a, numbers.Number)
    if plain:
        return named("numpy")
    raise TypeError(f"no array among {', '.join(type(a).__name__ for a in args)}")


def isarray(x: object) -> bool:
    """Whether `x` is an array of a library known here."""
    return module_of(type(x)) is not None


def isnumeric(x: object) -> bool:
    """Whether `x` is an array that can be trained: floating point or complex, any shape, 0-d included.

    Arrays of integers and bools, Python numbers and everything else are not.
    """
    module = module_of(type(x))
    return module is not None and module.is_inexact(x)


def istrainable(x: object) -> bool:
    """Whether `x` is an array that can be trained and does not say that it should not be."""
    module = module_of(type(x))
    return module is not None and module.is_trainable(x)


def maywrite(x: object) -> bool:
    """Whether `update_` may write into `x`; a read-only or broadcast array is replaced instead."""
    module = module_of(type(x))
    return module is not None and module.is_writable(x)
