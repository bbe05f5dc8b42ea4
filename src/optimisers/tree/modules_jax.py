"""How are the models of Flax and Equinox read? As the pytrees that they are, one level at a time."""

import functools
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, default_registry

from optimisers.tree.children import Beside, Container
from optimisers.tree.path import Attr


def container_of(kind: type) -> Container | None:
    """The registry entry of a class that JAX knows; None for others, and for plain dicts and lists."""
    if issubclass(kind, dict | list | tuple):
        return None
    variable = _variable()
    if variable is not None and issubclass(kind, variable):
        trained = issubclass(kind, sys.modules["flax"].nnx.Param)
        return PARAMETER if trained else VARIABLE
    if any(base.__module__.startswith("flax.nnx") for base in kind.__mro__):
        return STATE if issubclass(kind, sys.modules["flax"].nnx.State) else OBJECT
    if any(base.__module__.partition(".")[0] in ("flax", "equinox") for base in kind.__mro__):
        return PYTREE
    return None


def is_registered(obj: object) -> bool:
    """Whether the class of an object, none of Python's own, is registered with JAX."""
    own = obj is None or isinstance(obj, dict | list | tuple)
    return not own and not jax.tree_util.all_leaves([obj])


def _variable() -> Any:
    """Flax's class of variables, if the user has it."""
    flax = sys.modules.get("flax.nnx")
    return getattr(flax, "Variable", None)


def is_variable(x: object) -> bool:
    """Whether something is a variable of Flax NNX."""
    variable = _variable()
    return variable is not None and isinstance(x, variable)


def _level(obj: object) -> list[tuple[Any, Any]]:
    """(key, child) of everything one level down; nothing for what is a leaf to JAX."""
    found = default_registry.flatten_one_level_with_keys(obj)
    return [(_key(key), child) for key, child in found[0]] if found is not None else []


def _key(key: Any) -> Any:
    if isinstance(key, GetAttrKey):
        return Attr(key.name)
    if isinstance(key, DictKey | FlattenedIndexKey):
        return key.key
    return key.idx if isinstance(key, SequenceKey) else str(key)


def _keys(obj: object) -> tuple[Any, ...]:
    return tuple(key for key, _ in _level(obj))


def _read(obj: object, _: tuple[Any, ...]) -> Iterable[Any]:
    return [child for _, child in _level(obj)]


def _rebuild(obj: object, changes: dict[Any, Any]) -> Any:
    children, form = jax.tree_util.tree_flatten(obj, is_leaf=functools.partial(_is_other, obj))
    keys = _keys(obj)
    return jax.tree_util.tree_unflatten(
        form, [changes.get(k, child) for k, child in zip(keys, children, strict=True)]
    )


def _is_other(obj: object, x: object) -> bool:
    return x is not obj


def _write(obj: Any, changes: dict[Any, Any]) -> Any:
    """A variable of Flax holds its array, and is told another."""
    for value in changes.values():
        obj[...] = value
    return obj


def _beside(obj: object) -> list[Beside]:
    """The variables of a module that are no parameters; of keys of random numbers their data."""
    nnx = sys.modules["flax"].nnx
    found = [(path, v) for path, v in nnx.iter_graph(obj) if is_variable(v) and not isinstance(v, nnx.Param)]
    return [Beside(tuple(path), _shown(v[...]), functools.partial(_put, v)) for path, v in found]


def _shown(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _put(variable: Any, value: Any) -> None:
    old = variable[...]
    variable[...] = jax.random.wrap_key_data(value, impl=jax.random.key_impl(old)) if _is_key(old) else value


def _is_key(x: object) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


PYTREE = Container(_keys, _read, _rebuild, direct=False)
OBJECT = Container(_keys, _read, _rebuild, direct=False, shared=True, beside=_beside)
OTHERS = PYTREE
STATE = Container(_keys, _read, _rebuild, direct=False, partial=True)
PARAMETER = Container(_keys, _read, _rebuild, direct=False, shared=True, bare=True, write=_write)
VARIABLE = Container(_keys, _read, _rebuild, direct=False, shared=True, trainable=())
