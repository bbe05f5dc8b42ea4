"""A model as one vector, and back; and its arrays as a list."""

import math
from typing import Any

from optimisers.arrays import registry
from optimisers.arrays.types import is_number
from optimisers.errors import BadState, TreeMismatch
from optimisers.rule import Rule
from optimisers.state.leaf import Branch, Leaf
from optimisers.tree.children import container_for
from optimisers.tree.flatten import Ties, flatten_model
from optimisers.tree.flatten_up_to import flatten_up_to
from optimisers.tree.layout import Layout
from optimisers.tree.path import KeyPath
from optimisers.tree.rebuild import rebuild


class Restructure:
    """The way back from a vector to a model: `re(flat)` is the model with its numbers taken from `flat`.

    `re(model, flat)` fills another model of the same structure. `len(re)` is the length of the vector.
    Everything that is not trained is that of the original; shapes, element types and ties are restored. With
    `copy=False` arrays that need no conversion are views of `flat`.
    """

    def __init__(self, model: Any, layout: Layout, arrays: list[Any]) -> None:
        self._model, self._layout = model, layout
        self._like = [(tuple(x.shape), x.dtype) for x in arrays]
        ends = [0]
        for x in arrays:
            ends.append(ends[-1] + math.prod(x.shape))
        self._ends = ends
        self._runs = runs(self._like, ends)
        self._library = registry.library(*arrays) if arrays else None

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        return f"Restructure({type(self._model).__name__}, ..., {len(self)})"

    def __call__(self, *given: Any, copy: bool = True) -> Any:
        """The model of a vector.

        Raises TreeMismatch, naming both lengths, for a vector of another length.
        """
        if len(given) not in (1, 2):
            raise TypeError(f"re takes (flat) or (model, flat); {len(given)} arguments were given")
        model, flat = (self._model, *given)[-2:]
        if not registry.isarray(flat) or tuple(flat.shape) != (len(self),) or not _numbers(flat):
            shape = tuple(flat.shape) if registry.isarray(flat) else type(flat).__name__
            if registry.isarray(flat) and not _numbers(flat):
                shape = f"one of {flat.dtype}"
            raise TreeMismatch(f"re takes a vector of length {len(self)}; {shape} was given")
        if model is not self._model:
            self._refuse_other(model)
        if self._library is None:
            return model
        pieces = self._library.pieces(flat, self._runs, copy=copy)
        return rebuild(self._layout.root, model, dict(enumerate(pieces)))

    def _refuse_other(self, model: object) -> None:
        """Raise TreeMismatch unless another model has arrays of the same shapes at the same places."""
        found = flatten_up_to(self._layout.root, model, KeyPath(), "destructure")
        for leaf, x in zip(self._layout.root.leaves, found, strict=True):
            shape = self._like[leaf][0]
            if not registry.isnumeric(x) or tuple(x.shape) != shape:
                what = f"shape {tuple(x.shape)}" if registry.isarray(x) else type(x).__name__
                raise TreeMismatch(
                    f"{self._layout.paths[leaf].code()} has {what}; `destructure` saw an array of shape "
                    f"{shape}"
                )


def _numbers(x: Any) -> bool:
    return is_number(registry.type_name(x))


def runs(like: list[tuple[Any, Any]], ends: list[int]) -> list[tuple[slice, int, Any, Any]]:
    """(place in the vector, count, shape, type) for neighbours of one shape and type: they are cut from the
    vector at one stroke.
    """
    out: list[tuple[slice, int, Any, Any]] = []
    for (shape, dtype), start, end in zip(like, ends, ends[1:], strict=False):
        if out and out[-1][2:] == (shape, dtype):
            place, count, *_ = out[-1]
            out[-1] = (slice(place.start, end), count + 1, shape, dtype)
        else:
            out.append((slice(start, end), 1, shape, dtype))
    return out


def destructure(model: object, *, ties: Ties = ()) -> tuple[Any, Restructure]:
    """(flat, re): all trainable numbers of a model in one vector, and the way back.

    The vector has the type to which those of all arrays promote, ties occur once, order is that of
    `trainables`. `setup(rule, flat)` then trains the whole model as one array. `ties` are those of `setup`.
    """
    layout, arrays = _survey(model, "destructure", ties)
    library = registry.library(*arrays) if arrays else registry.library(0.0)
    return library.flattened(arrays), Restructure(model, layout, arrays)


def trainables(model: object, *, path: bool = False, ties: Ties = ()) -> list[Any]:
    """The arrays that `setup` would train, in its order, tied ones once; with `path`, as pairs (KeyPath,
    array).

    `ties` are those of `setup`. They are the model's own arrays: writing into them changes the model.
    """
    layout, arrays = _survey(model, "trainables", ties)
    return list(zip(layout.paths, arrays, strict=True)) if path else arrays


def _survey(model: object, name: str, ties: Ties) -> Any:
    if isinstance(model, Leaf | Branch | Rule):
        raise BadState(f"{name} was given a {type(model).__name__}; it takes a model")
    return flatten_model(model, ties)


def trainable(x: object) -> dict[Any, Any]:
    """The children of one container that may be trained, by key; empty for what is not a container."""
    container = container_for(x)
    if container is None:
        return {}
    keys = container.keys(x)
    kept = keys if container.trainable is None else [k for k in keys if k in container.trainable]
    found = dict(zip(keys, container.read(x, keys), strict=True))
    return {k: found[k] for k in kept}
