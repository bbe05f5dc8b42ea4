"""Tables of results, and fresh processes to measure in."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Table = list[list[str]]
"""Rows of cells."""

ROOT = Path(__file__).resolve().parent.parent


def child(*args: str, module: str = "benchmarks.numpy_engine", cache: str | None = None) -> dict[str, Any]:
    """Run one of the measurements of a module in a fresh process; its answers."""
    env = dict(os.environ)
    source = str(ROOT / "src")
    env["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [env.get("PYTHONPATH")])])
    if cache is not None:
        env["XDG_CACHE_HOME"] = cache
    command = [sys.executable, "-m", module, "--child", *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; the first column is text, the others are figures."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
        print(f"\n{title}")
        for line in (head, *rows):
            cells = [
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ]
            print("  " + "  ".join(cells).rstrip())
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(head):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)


class Report:
    """What is printed, and written as Markdown too if a file is named."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.text = out, ""

    def line(self, text: str) -> None:
        print(text)
        self.keep(text + "\n\n")

    def table(self, title: str, head: Sequence[str], rows: Table) -> None:
        show(title, head, rows)
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
        self.keep(f"**{title}**\n\n" + "\n".join(lines) + "\n\n")

    def keep(self, text: str) -> None:
        self.text += text
        if self.out is not None:  # a run that is cut short leaves what it has
            self.out.write_text(self.text)


def verdict(value: float, bound: float, *, least: bool = False) -> str:
    """Whether a target is met."""
    return "met" if (value >= bound if least else value <= bound) else "missed"
