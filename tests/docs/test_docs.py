"""Is every example of the documentation true? The blocks of a page are run in order, in one namespace."""

import re
from pathlib import Path

import pytest

from tests.installed import NEEDS_KERAS, from_outside
from tests.prose import blocks

OPTIONAL = {"peft", "mlx"}
"""Packages without which the rest of a page is left out."""

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))


def read(page: str) -> str:
    return next(p for p in PAGES if p.name == page).read_text()


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[NEEDS_KERAS] * (p.stem == "keras")) for p in PAGES]
)
@from_outside()
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, on torch
def test_every_example_of_a_page_runs_and_prints_what_stands_there(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    said = ""
    for language, line, content in blocks(page.read_text()):
        assert language in {"python", "text"}
        if language == "python":
            try:
                exec(compile("\n" * line + content, str(page), "exec"), namespace)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                pytest.skip(f"{error.name} is not installed: the page was run up to line {line}")
            said = capsys.readouterr().out
        else:
            assert said.strip() == content.strip()


def numbers(cell: str) -> list[int]:
    """The numbers of a cell such as `96, 111 - 116`."""
    found: list[int] = []
    for part in cell.split(","):
        first, _, last = part.partition(" - ")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def test_ranges_of_numbers_are_read_with_both_ends() -> None:
    assert numbers("96, 111 - 113") == [96, 111, 112, 113]


def test_the_table_for_readers_from_julia_has_every_number_once() -> None:
    cells = re.findall(r"^\| ([\d, -]+) \|", read("coming-from-julia.md"), re.MULTILINE)
    assert sorted(n for cell in cells for n in numbers(cell)) == list(range(1, 187))
