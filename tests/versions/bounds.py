"""The oldest and the newest of everything: what is installed to try the versions that are declared.

`python tests/versions/bounds.py oldest` prints each lower bound of the dependencies and of the extras `torch`
and `jax` as an exact version; `newest` prints all that the tests need, without upper bounds but for what is
pinned for another reason. `--without torch` leaves a library out.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2] / "pyproject.toml"

PINNED = ("keras", "triton")
"""Libraries whose next release is met on purpose, when the pin is moved."""

TOOLS = ("optimisers", "mypy", "pyright", "ruff")
"""What tests do not import."""


def bounds(*extras: str) -> dict[str, str]:
    """Library -> what is declared of its version, of the dependencies and these extras."""
    project: dict[str, Any] = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *(w for e in extras for w in project["optional-dependencies"][e])]
    parts = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", wanted) for wanted in declared]
    return {part[1]: part[2] for part in parts if part is not None}


def wanted(which: str, without: set[str]) -> list[str]:
    """What pip is asked for."""
    if which == "oldest":
        found = {name: said.replace(">=", "==") for name, said in bounds("torch", "jax").items()}
    else:
        known = bounds("torch", "jax", "demo", "test")
        found = {name: said if name in PINNED else "" for name, said in known.items() if name not in TOOLS}
    return [name + said for name, said in found.items() if name not in without]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("which", choices=("oldest", "newest"))
    parser.add_argument("--without", nargs="*", default=[])
    given = parser.parse_args()
    sys.stdout.write("\n".join(wanted(given.which, set(given.without))) + "\n")
