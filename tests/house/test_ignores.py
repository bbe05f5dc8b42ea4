"""How often is the linter or the type checker overruled? Thirty times at most, each with a reason."""

import re
from pathlib import Path

import optimisers

SOURCE = Path(optimisers.__file__).parent
MOST = 30

IGNORE = re.compile(r"# (?:noqa|type: ignore|pyright: ?(?:ignore|basic))")
WITH_REASON = re.compile(
    r"# (?:noqa: [A-Z]+\d+(?:, [A-Z]+\d+)*|(?:type|pyright): ignore\[\w+(?:, \w+)*\]) +[^ ]"
)


def ignores(text: str) -> list[str]:
    """The lines that overrule a check."""
    return [line.strip() for line in text.splitlines() if IGNORE.search(line)]


def found() -> list[str]:
    return [line for file in SOURCE.rglob("*.py") for line in ignores(file.read_text())]


def test_checks_are_overruled_thirty_times_at_most() -> None:
    assert len(found()) <= MOST


def test_every_ignore_has_its_reason() -> None:
    assert [line for line in found() if not WITH_REASON.search(line)] == []


def test_an_ignore_without_a_reason_is_found() -> None:
    bare = ["x = 1  # noqa", "x = 1  # noqa: E501", "x = 1  # type: ignore", "x = 1  # pyright: ignore[a]"]
    good = ["x = 1  # noqa: E501 a table", "x = 1  # type: ignore[a]  # made later"]
    assert ignores("\n".join([*bare, "x = 2", *good])) == [*bare, *good]
    assert [line for line in [*bare, *good] if not WITH_REASON.search(line)] == bare
