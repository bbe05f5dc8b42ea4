"""Where is something in a model? A path of keys, printed as the code that reaches it; and patterns over
paths.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, overload


class Attr(str):
    """A key that is read as an attribute; equal to the plain string."""

    __slots__ = ()


class KeyPath(Sequence[Any]):
    """The keys from the root of a model to a place in it: attribute names, dict keys, indices.

    `KeyPath("b", 1, "c")` joins keys and other paths; it compares, hashes, slices and counts like a tuple,
    prints as `b.1.c`, and `path.get(model)` reads what stands there.
    """

    __slots__ = ("keys",)
    keys: tuple[Any, ...]

    def __init__(self, *keys: object) -> None:
        flat: list[Any] = []
        for key in keys:
            flat.extend(key.keys if isinstance(key, KeyPath) else (key,))
        object.__setattr__(self, "keys", tuple(flat))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a KeyPath is a value; make a new one, such as KeyPath(path, key)")

    def __reduce__(self) -> Any:
        return KeyPath, self.keys

    @overload
    def __getitem__(self, index: SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> "KeyPath": ...
    def __getitem__(self, index: Any) -> Any:
        return KeyPath(*self.keys[index]) if isinstance(index, slice) else self.keys[index]

    def __add__(self, other: Any) -> "KeyPath":
        return KeyPath(self, *other) if isinstance(other, KeyPath | tuple | list) else NotImplemented

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyPath) and self.keys == other.keys

    def __hash__(self) -> int:
        return hash(self.keys)

    def __str__(self) -> str:
        return ".".join(str(k) for k in self.keys)

    def __repr__(self) -> str:
        return f"KeyPath({', '.join(repr(str(k) if isinstance(k, Attr) else k) for k in self.keys)})"

    def code(self, root: str = "model") -> str:
        """The path as one would type it: `model.layers[1]["w"]`."""
        for k in self.keys:
            if not isinstance(k, Attr):
                root += f"[{k!r}]"
            else:
                root = f"{root}.{k}" if k.isidentifier() else f"getattr({root}, {str(k)!r})"
        return root

    def get(self, tree: object) -> Any:
        """What stands at this path in `tree`; raises LookupError, naming the first key that is missing."""
        here = tree
        for i, key in enumerate(self.keys):
            try:
                here = step(here, key)
            except (LookupError, TypeError, AttributeError) as error:
                raise LookupError(f"{KeyPath(*self.keys[: i + 1]).code('tree')} is not there") from error
        return here

    def set(self, tree: object, value: object) -> None:
        """Put `value` at this path of `tree`, whose containers must be mutable there.

        Raises LookupError where the path is empty or its parent missing.
        """
        if not self.keys:
            raise LookupError(
                "the path is empty: it stands for the whole tree, which cannot be put in itself"
            )
        parent, key = KeyPath(*self.keys[:-1]).get(tree), self.keys[-1]
        if named(parent, key):
            setattr(parent, key, value)
        else:
            parent[key] = value

    def within(self, tree: object) -> bool:
        """Whether `tree` has something at this path."""
        try:
            self.get(tree)
        except LookupError:
            return False
        return True


def named_path(name: str) -> KeyPath:
    """The path that a dotted name stands for, as torch names parameters: `blocks.0.weight`."""
    return KeyPath(*(int(key) if key.isdigit() else Attr(key) for key in name.split(".")))


def step(here: Any, key: Any) -> Any:
    """The child of `here` under `key`: an item, or an attribute where there are no items."""
    return getattr(here, key) if named(here, key) else here[key]


def named(here: object, key: object) -> bool:
    """Whether a key of `here` is the name of an attribute."""
    if not isinstance(key, str) or isinstance(here, Mapping):
        return False
    return isinstance(key, Attr) or (type(here) not in (list, tuple) and hasattr(here, key))


def matches(pattern: str, path: KeyPath) -> bool:
    """Whether a glob fits a path: `*` is any one key, `**` any number of keys, also none; keys are split at
    dots.
    """
    return compiled(pattern).fullmatch(f"{path}.") is not None


@functools.lru_cache(256)
def compiled(pattern: str) -> "re.Pattern[str]":
    """The regular expression of a glob, over keys that each end in a dot."""
    text = ""
    for part in pattern.split("."):
        if part == "**":
            text += r"(?:[^.]+\.)*"
        else:
            text += (
                "".join("[^.]*" if c == "*" else "[^.]" if c == "?" else re.escape(c) for c in part) + r"\."
            )
    return re.compile(text)


def offered(pattern: object, paths: Sequence[KeyPath]) -> str:
    """The paths that there are, and a pattern that matches some where the given one matches none."""
    there = f"there are {listed(paths)}"
    if not isinstance(pattern, str):
        return there
    wide = ".".join("**" if key == "*" else key for key in pattern.split("."))
    wider = [wide, f"{pattern}.**", f"**.{pattern}", f"**.{wide}", f"**.{pattern}.**"]
    for instead in wider:
        if any(matches(instead, path) for path in paths):
            return f"{there}; `*` is one key, `**` any number of keys: write {instead!r}"
    narrower = [pattern.partition(".")[2], pattern.replace("/", ".")]
    alike = difflib.get_close_matches(pattern, list(map(str, paths)), n=1, cutoff=0.8)
    for instead in [*narrower, *alike]:
        if any(matches(instead, path) for path in paths):
            return f"{there}; write {instead!r}"
    return there


def gathered(paths: Iterable[object]) -> list[str]:
    """Paths as text; those that differ in numbers alone are one glob with a count: `layers.*.w (12)`."""
    alike: dict[str, list[list[str]]] = {}
    for path in paths:
        keys = str(path).split(".")
        alike.setdefault(".".join(map(_unnumbered, keys)), []).append(keys)
    return [
        ".".join(map(_common, zip(*ps, strict=True))) + f" ({len(ps)})" * (len(ps) > 1)
        for ps in alike.values()
    ]


def _unnumbered(key: str) -> str:
    return re.sub(r"\d+$", "*", key)


def _common(keys: tuple[str, ...]) -> str:
    """The keys at one place of several paths as one key."""
    return keys[0] if len(set(keys)) == 1 else _unnumbered(keys[0])


def listed(paths: Iterable[object], most: int = 6) -> str:
    names = [str(p) or "the array itself" for p in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
