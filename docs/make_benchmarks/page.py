"""The page of benchmarks: paragraphs and tables of the files of results, with charts."""

import dataclasses
import io
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optimisers.curves import COLOURS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

MILLISECONDS = "milliseconds"

OURS, THEIRS = COLOURS[0], "#9aa5b1"

INTRODUCTION = """# Benchmarks

Every table was measured on the machine and on the day that stand above it. Candidates took turns in one
process, round by round, so that all met the same machine; compare medians, and where others used the
machine meanwhile, the least times. A ratio says more than milliseconds: another machine has others. What is
slower than a peer or than its limit stands here too.

"Limit" is what a program needs that does the unavoidable alone: reads and writes the same memory, or
computes the bare products."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results, with the line in bold that stands before it."""

    title: str
    head: list[str]
    rows: list[list[str]]

    @property
    def groups(self) -> list[tuple[str, list[list[str]]]]:
        """Its rows, cut where a row has nothing but a name in bold."""
        found: list[tuple[str, list[list[str]]]] = [("", [])]
        for row in self.rows:
            if row[0].startswith("**") and not any(row[1:]):
                found.append((row[0].strip("*"), []))
            else:
                found[-1][1].append(row)
        return [(name, rows) for name, rows in found if rows]

    def column(self, *names: str) -> int | None:
        """The first column whose head begins with one of these."""
        return next((i for name in names for i, head in enumerate(self.head) if head.startswith(name)), None)


@dataclasses.dataclass(frozen=True)
class Result:
    """One file of results."""

    name: str
    title: str
    parts: list[str | Table]
    """Paragraphs and tables, in their order."""


def read(name: str, text: str) -> Result:
    """The parts of a file of results."""
    title, parts, bold = name, list[str | Table](), ""
    for block in re.split(r"\n\s*\n", re.sub(r"(?<!\n)\n(\*\*[^\n]*\*\*\n)", r"\n\n\1", text.strip())):
        lines = block.splitlines()
        if lines[0].startswith("# "):
            title = lines[0][2:]
        elif lines[0].startswith("|"):
            cells = [[c.strip() for c in line.strip().strip("|").split("|")] for line in lines]
            parts.append(Table(bold or title, cells[0], cells[2:]))
            bold = ""
        elif block.startswith("**") and block.endswith("**"):
            bold = block.strip("*")
        else:
            parts.append(block)
    return Result(name, title, parts)


def number(cell: str) -> float | None:
    """The first number of a cell such as `6.3 x (7.2)`; None where there is none."""
    found = re.match(r"-?[\d,.]*\d", cell)
    return float(found[0].replace(",", "")) if found else None


# -- charts --------------------------------------------------------------------------------------------------


def chart(table: Table) -> bytes | None:
    """A chart of a table as SVG: how many times as fast or as long as what it is compared with, else times
    or the memory itself; None where the table has none of these.
    """
    faster, ours = table.column("faster"), table.column("x ours")
    plain = table.column("ms", "median", "peak")
    if faster is not None:
        return _bars(table, faster, "times as fast as the best peer", beside=table.column("best peer"))
    if ours is not None:
        return _bars(table, ours, "times as long as ours")
    if plain is None:
        return None
    return _bars(table, plain, table.head[plain] if "peak" in table.head[plain] else MILLISECONDS)


def _bars(table: Table, column: int, measure: str, beside: int | None = None) -> bytes | None:
    """Horizontal bars of a column, one a row; groups stand apart."""
    groups = [
        (name, [(row, value) for row in rows if (value := number(row[column])) is not None])
        for name, rows in table.groups
    ]
    groups = [(name, rows) for name, rows in groups if rows]
    count = sum(len(rows) + bool(name) for name, rows in groups)
    if not count:
        return None
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "optimisers", "font.size": 9}):
        figure = Figure(figsize=(7.4, 0.6 + 0.21 * count), layout="constrained")
        axes = figure.add_subplot()
        labels: list[str] = []
        for name, rows in groups:
            if name:
                axes.text(0, len(labels), f" {name}", va="center", fontweight="bold", fontsize=9)
                labels.append("")
            for row, value in rows:
                mine = row[0].startswith(("ours", "TorchOptimizer", "step_in_backward")) or beside is not None
                axes.barh(len(labels), value, color=OURS if mine else THEIRS, height=0.74)
                against = f", {row[beside]}" if beside is not None else ""
                axes.text(
                    value,
                    len(labels),
                    f" {row[column].partition(' ')[0]}{against}",
                    va="center",
                    fontsize=7.5,
                )
                labels.append(row[0])
        _dressed(axes, labels, measure)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _dressed(axes: Axes, labels: list[str], measure: str) -> None:
    """Labels, a line at one, and room for the figures behind the bars."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.28)
    axes.set_xlabel(measure)
    if measure.startswith("times"):
        axes.axvline(1, color="#333333", linewidth=0.8, zorder=3)
    axes.grid(visible=True, axis="x", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


# -- the page ------------------------------------------------------------------------------------------------


def _shown(table: Table, name: str, charts: dict[str, bytes]) -> str:
    """A table on the page: its chart, and the figures folded away under it."""
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
    figures = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    drawn = chart(table)
    if drawn is None:
        return f"**{table.title}**\n\n{figures}"
    charts[name] = drawn
    folded = f'??? note "All figures"\n\n    {figures.replace(chr(10), chr(10) + "    ")}'
    return f"**{table.title}**\n\n![{table.title}](charts/{name})\n\n{folded}"


def made(results: Path) -> tuple[str, dict[str, bytes]]:
    """(the page, its charts by name) from the files of a folder, whose README names their commands."""
    commands = dict(
        re.findall(r"\[[^]]*\]\(([^)]*)\) \| (`[^`]*`)", (results / "README.md").read_text(encoding="utf-8"))
    )
    sections, charts = [INTRODUCTION], dict[str, bytes]()
    files = sorted(f for f in results.glob("*.md") if f.name != "README.md")
    for file in files:
        result = read(file.stem, file.read_text(encoding="utf-8"))
        sections.append(f"## {result.title}")
        if file.name in commands:
            sections.append(f"Made by {commands[file.name]}.")
        for n, part in enumerate(result.parts):
            sections.append(part if isinstance(part, str) else _shown(part, f"{file.stem}-{n}.svg", charts))
    if not any(re.search("cuda|gpu", f.stem) for f in files):
        sections += ["## On a GPU", "No table was measured on a GPU so far."]
    return "\n\n".join(sections) + "\n", charts
