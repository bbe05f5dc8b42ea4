"""Finds the module of functions for an array, without importing a library that the user has not imported."""

import functools
import importlib
import numbers
from typing import cast

from optimisers.arrays.protocol import Array, Library

LIBRARIES = {
    "numpy": "optimisers.arrays.numpy",
    "torch": "optimisers.arrays.torch",
    "jax": "optimisers.arrays.jax",
    "jaxlib": "optimisers.arrays.jax",
    "cupy": "optimisers.arrays.cupy",
}
"""Top-level package of an array type -> the module here that speaks for it."""


@functools.lru_cache(maxsize=1024)
def library_of(kind: type) -> Library | None:
    """The library of arrays of this type, or None if it is not an array type."""
    for base in kind.__mro__:
        if (name := base.__module__.partition(".")[0]) in LIBRARIES:
            found = named(name)
            if found.is_array_type(kind):
                return found
    return None


@functools.cache
def named(name: str) -> Library:
    """The library of a name, imported now."""
    return importlib.import_module(LIBRARIES[name]).library


def library(*args: object) -> Library:
    """The library of the first array among the arguments; NumPy for plain numbers.

    Raises TypeError if none of them is an array or a number.
    """
    plain = False
    for a in args:
        found = library_of(type(a))
        if found is not None:
            return found
        plain = plain or isinstance(a, numbers.Number)
    if plain:
        return named("numpy")
    raise TypeError(f"no array among {', '.join(type(a).__name__ for a in args)}")


def isarray(x: object) -> bool:
    """Whether `x` is an array of a library known here."""
    return library_of(type(x)) is not None


def isnumeric(x: object) -> bool:
    """Whether `x` is an array that can be trained: floating point or complex, any shape, 0-d included.

    Arrays of integers and bools, Python numbers and everything else are not.
    """
    found = library_of(type(x))
    return found is not None and found.is_inexact(cast("Array", x))


def istrainable(x: object) -> bool:
    """Whether `x` is an array that can be trained and does not say that it should not be."""
    found = library_of(type(x))
    return found is not None and found.is_trainable(cast("Array", x))


def maywrite(x: object) -> bool:
    """Whether `update_` may write into `x`; a read-only or broadcast array is replaced instead."""
    found = library_of(type(x))
    return found is not None and found.is_writable(cast("Array", x))


module_of = library_of
