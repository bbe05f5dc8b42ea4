"""What does a file say of itself? Which version of the format it has, which rules trained what, what was
tied, and whatever else its writer wanted to keep. All of it is text, and none of it is run.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optimisers.arrays import registry
from optimisers.checkpoint.entries import Kept, Modelled, structure
from optimisers.errors import BadFile, BadSetting

FORMAT = "optimisers"

VERSION = 1
"""Of the names and the metadata. A change of either makes a new one, and a function in `MIGRATIONS`."""

MIGRATIONS: dict[int, Callable[[dict[str, str]], dict[str, str]]] = {}
"""Version -> what makes the metadata of the next version of its own."""

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""What JSON holds."""


class Ruled(NamedTuple):
    """One rule, and the names of the parameters that it trains with the same numbers."""

    rule: str
    structure: str
    names: list[str]


class About(NamedTuple):
    """What a file says of itself."""

    rules: list[Ruled]
    ties: list[list[str]]
    more: dict[str, Any]
    groups: list[dict[str, Any]] | None
    """The groups of a `TorchOptimizer`, if it was one."""

    @property
    def structures(self) -> dict[str, str]:
        """The structure of the rule of every leaf."""
        return {name: ruled.structure for ruled in self.rules for name in ruled.names}


def rules_of(kept: Sequence[Kept]) -> list[Ruled]:
    """The rules of some leaves, each once."""
    found: dict[int, Ruled] = {}
    for leaf in kept:
        rule = leaf.row.rule
        found.setdefault(id(leaf.row), Ruled(repr(rule), structure(rule), [])).names.append(leaf.name)
    return list(found.values())


def ties_of(kept: Sequence[Kept], model: Modelled | None) -> list[list[str]]:
    """The places of each array that has several."""
    found = [leaf.places for leaf in kept if len(leaf.places) > 1]
    return found + [tie for tie in ([] if model is None else model.ties) if tie not in found]


def written(about: About) -> dict[str, str]:
    """The metadata of a file."""
    said = {
        "format": FORMAT,
        "version": str(VERSION),
        "rules": json.dumps([ruled._asdict() for ruled in about.rules]),
        "ties": json.dumps(about.ties),
        "more": json.dumps(about.more),
    }
    return said if about.groups is None else said | {"groups": json.dumps(about.groups)}


def understood(metadata: Mapping[str, str]) -> About:
    """What the metadata of a file say; those of an older version are brought up to this one.

    Raises BadFile for a later version, and for what is none of ours.
    """
    said = dict(metadata)
    version = said.get("version", "")
    if said.get("format") != FORMAT or not version.isdigit():
        raise BadFile("its metadata are not those of opt.save")
    for n in range(int(version), VERSION):
        said = MIGRATIONS[n](said)
    if int(version) > VERSION:
        raise BadFile(
            f"it has version {version} of the format, and this release reads {VERSION}; install a later one"
        )
    try:
        rules = [Ruled(str(r["rule"]), str(r["structure"]), _texts(r["names"])) for r in _read(said, "rules")]
        ties = [_texts(tie) for tie in _read(said, "ties")]
        more = dict(_read(said, "more"))
        groups = [dict(group) for group in _read(said, "groups")] if "groups" in said else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadFile(f"its metadata cannot be read: {error!r}") from error
    return About(rules, ties, more, groups)


def _read(said: Mapping[str, str], key: str) -> Any:
    return json.loads(said[key])


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{value!r} where names stand")
    return value


# -- what else is kept ---------------------------------------------------------------------------------------


def parted(more: Mapping[str, object]) -> tuple[dict[str, Plain], dict[str, Any]]:
    """(what JSON holds, arrays under their names in the file) of what a user wants to keep."""
    plain: dict[str, Plain] = {}
    arrays: dict[str, Any] = {}
    for name, value in more.items():
        if registry.isarray(value):
            arrays[f"@{name}"] = value
        else:
            plain[name] = plainly(value, name)
    return plain, arrays


def plainly(value: object, where: str) -> Plain:
    """A value as JSON holds it, to the bit; raises BadSetting, naming it, for what it does not."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return value
    if isinstance(value, np.generic):
        return plainly(value.item(), where)
    if isinstance(value, list | tuple):
        items: Iterable[object] = value
        return [plainly(item, f"{where}[{n}]") for n, item in enumerate(items)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise BadSetting(f"{where} has the key {key!r}; it takes keys of text")
        return {key: plainly(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise BadSetting(
        f"{where} is a {type(value).__name__}; save takes arrays, numbers, text, and lists and dicts of "
        "numbers and text"
    )
