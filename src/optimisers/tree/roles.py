"""What is a parameter for? Told by the types of the modules around it, and by names in its paths.

A name counts as that of the array, of what holds it, or of what holds that; a number is a name too.
"""

import re
from collections.abc import Sequence

from optimisers.tree.children import container_of
from optimisers.tree.layout import Parameter, Place

EMBEDDINGS = {"embed", "embeds", "embedding", "embeddings", "emb", "wte", "wpe"}
"""Words in the name of an embedding, or of its class."""

TOKENS = {"pos", "position", "positional", "token", "tokens"}
"""Words in the name of an array itself that say the same: `cls_token`."""

HEADS = {"classifier", "logits", "unembed", "unembedding"}
"""Words in the name of a head; it may also begin or end with `head`, which `multi_head` does not count as."""

WHOLE_HEADS = {"score", "qa_outputs", "embed_out"}
"""Names that are those of heads as a whole."""

OUTERMOST_HEADS = {"fc", "heads", "out", "output", "proj_out"}
"""Names that are those of heads where they stand first in the path."""

WRAPPERS = {"model", "module", "net", "params", "_orig_mod"}
"""Names before the first one that says something."""

VECTORS = {"bias", "biases", "scale", "gain"}
"""Last words in the names of vectors, of which several layers may be stacked."""

ABOUT = 3
"""How many names at the end of a path are about the array."""


def keys_of(place: Place) -> list[str]:
    """The names in a path, also where it was flattened to one key."""
    return [key for key in re.split(r"[./]", str(place.path)) if key not in ("", "~")]


def words(name: str) -> list[str]:
    """The words of a name, whichever way they are joined: `PatchEmbed`, `patch_embed`."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def owner(place: Place) -> type | None:
    """The type of the module that has an array for its own; None where there are plain containers alone."""
    boxed = (kind for kind in reversed(place.kinds) if not getattr(container_of(kind), "bare", False))
    return next(boxed, None)


def is_matrix(parameter: Parameter) -> bool:
    """Whether an array has two axes or more."""
    return len(parameter.shape) > 1


def is_embedding(parameter: Parameter) -> bool:
    """Whether an array stands in a module whose type is called an embedding, or is called so by a name."""
    return any(
        not EMBEDDINGS.isdisjoint(words(name))
        for place in parameter.places
        for name in [*_kind(place), *keys_of(place)[-ABOUT:]]
    ) or any(not TOKENS.isdisjoint(_own(place)) for place in parameter.places)


def is_head(parameter: Parameter) -> bool:
    """Whether an array is called a head by a name."""
    return any(
        _outermost(place) in OUTERMOST_HEADS or any(map(_names_head, keys_of(place)[-ABOUT:]))
        for place in parameter.places
    )


def is_flat(parameter: Parameter) -> bool:
    """Whether an array has one axis longer than 1 at most, or holds a vector for each of several layers: by
    its name, or by the type of a norm that it stands in.
    """
    long = sum(n > 1 for n in parameter.shape)
    return long < 2 or any(
        not VECTORS.isdisjoint(_own(place)[-1:]) or any("norm" in words(name) for name in _kind(place))
        for place in parameter.places
    )


def last_of_sequence(parameters: Sequence[Parameter]) -> int:
    """Which one is the last matrix of a model that is one sequence (a list, a tuple, `nn.Sequential`), or the
    last `Dense` that stands at the root of the parameters of Linen, which counts them, where none is called a
    head; -1 in others.
    """
    counted = [(_number(p), i) for i, p in enumerate(parameters) if is_matrix(p)]
    firsts = [keys_of(place)[:1] for p in parameters for place in p.places]
    if not all(keys and keys[0].isdigit() for keys in firsts):
        if any(map(is_head, parameters)):
            return -1
        counted = [(_dense(parameters[i]), i) for _, i in counted]
    number, last = max(counted, default=(-1, -1), key=lambda pair: pair[0])
    return last if number >= 0 else -1


def _number(parameter: Parameter) -> int:
    """The number that is the first name of a path; -1 without one."""
    return max(_numbered(r"(\d+)$", keys_of(place)[:1]) for place in parameter.places)


def _dense(parameter: Parameter) -> int:
    """The number of a `Dense` of Linen at the root; -1 of others."""
    paths = [[key for key in keys_of(place) if key not in WRAPPERS] for place in parameter.places]
    return max(_numbered(r"Dense_(\d+)\.kernel$", [".".join(keys)]) for keys in paths)


def _numbered(pattern: str, names: list[str]) -> int:
    found = [re.match(pattern, name) for name in names]
    return max((int(m[1]) for m in found if m), default=-1)


def _own(place: Place) -> list[str]:
    """The words of the name of an array itself."""
    return words("".join(keys_of(place)[-1:]))


def _kind(place: Place) -> list[str]:
    """The name of the type of its module, as far as known."""
    kind = owner(place)
    return [] if kind is None else [kind.__name__]


def _names_head(name: str) -> bool:
    found = words(name)
    ends = "head" in found[:1] + found[-1:] and "multi" not in found
    return ends or name in WHOLE_HEADS or not HEADS.isdisjoint(found)


def _outermost(place: Place) -> str:
    """The first name of a path that says something."""
    return next((key for key in keys_of(place) if key not in WRAPPERS), "")
