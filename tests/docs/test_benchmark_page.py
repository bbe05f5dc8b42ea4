"""Does the page of benchmarks say what the files of results say?"""

import re
from pathlib import Path

import pytest

from docs.make_benchmarks.page import RESULTS, Table, chart, made, number, read

FILES = sorted(f for f in RESULTS.glob("*.md") if f.name != "README.md")

TEXT = """# Some rules

One machine; 2026-01-31.
**AdamW, 3 arrays**

| way | median | x ours |
|---|---:|---:|
| **first** | | |
| ours | 2.0 | 1.00 (1.00) |
| theirs | 5.0 | 2.50 (2.25) |
| none | - | - |

Last words.
"""


def test_a_file_is_read_into_paragraphs_and_tables_with_their_titles() -> None:
    result = read("some", TEXT)

    assert result.title == "Some rules"
    first, table, last = result.parts
    assert (first, last) == ("One machine; 2026-01-31.", "Last words.")
    assert isinstance(table, Table)
    assert table.title == "AdamW, 3 arrays"
    assert [(name, len(rows)) for name, rows in table.groups] == [("first", 3)]


@pytest.mark.parametrize(
    ("cell", "value"),
    [("6.3 x (7.2)", 6.3), ("1,050.37", 1050.37), ("75% (54%)", 75.0), ("-", None), ("", None)],
)
def test_the_number_of_a_cell_is_its_first(cell: str, value: float | None) -> None:
    assert number(cell) == value


def test_a_chart_has_a_bar_for_each_row_with_a_figure() -> None:
    (table,) = (part for part in read("some", TEXT).parts if isinstance(part, Table))
    drawn = chart(table)

    assert drawn is not None
    said = re.findall(r">\s*([^<>]+?)\s*</text>", drawn.decode())
    assert {"ours", "theirs", "2.50", "times as long as ours", "first"} <= set(said)
    assert "none" not in said


def test_a_table_without_figures_has_no_chart() -> None:
    assert chart(Table("", ["row", "way"], [["a", "b"]])) is None


def test_the_page_has_every_file_with_its_machine_its_command_and_every_figure() -> None:
    page, charts = made(RESULTS)
    cells = re.sub(r"\s", "", page)

    assert len(FILES) >= 3
    for file in FILES:
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.lstrip("# ")
            assert set(line) <= set("|-: ") or re.sub(r"\s", "", words) in cells, (file.name, line)
    assert page.count("Made by `python -m benchmarks.") == len(FILES)
    assert set(charts) == set(re.findall(r"\(charts/([^)]*)\)", page))
    assert made(RESULTS) == (page, charts)


def test_charts_on_the_page_are_there_and_small() -> None:
    docs = Path(__file__).parents[2] / "docs"
    named = re.findall(r"\]\((charts/[^)]*)\)", (docs / "benchmarks.md").read_text(encoding="utf-8"))

    assert len(named) >= 4
    assert max((docs / name).stat().st_size for name in named) < 100_000
