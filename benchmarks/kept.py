"""Rows of a table, each measured in a process of its own and kept in a file as soon as it is there.

What stands in the file is not measured again, unless that is asked for: a run that was stopped goes on. A row
says by which clock, when and with what it was measured.
"""

import argparse
import contextlib
import datetime as dt
import functools
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.printing import child

Found = dict[str, Any]
"""What was measured, beside what it was measured of."""

What = dict[str, str]
"""What a row is about: a rule, and whatever else tells it from the others."""

CLOCKS = {False: "clock", True: "processor"}
"""Whose time it is, by whether `--cpu` is asked for."""


def by_processor(function: Callable[[], object]) -> float:
    """Seconds of the processor for a call, of all threads."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def seconds_by(clock: str) -> Callable[[Any], float] | None:
    """How a clock of `CLOCKS` times a call; None for the usual one."""
    return by_processor if clock == CLOCKS[True] else None


def add_options(
    parser: argparse.ArgumentParser, *, out: Path | None = None, keep: Path | None = None
) -> None:
    """The options of a benchmark whose rows are kept."""
    parser.add_argument("--cpu", action="store_true", help="time of the processor, not of the clock")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="PACKAGE", help="packages whose peers are left out"
    )
    parser.add_argument(
        "--keep", type=Path, default=keep, help="a file for rows, one a line: what is there is not run again"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--again", action="store_true", help="measure also what stands in the file")
    how.add_argument("--show", action="store_true", help="measure nothing: show what stands in the file")
    parser.add_argument("--note", default="", help="how it was measured, for the reader of the tables")
    parser.add_argument("--out", type=Path, default=out, help="a file for the tables, as Markdown")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options that were given; ends the process where they contradict each other."""
    chosen = parser.parse_args()
    if chosen.show and chosen.keep is None:
        parser.error("--show makes tables of the rows in a file; name it: --keep FILE.jsonl --show")
    return chosen


def kept_rows(keep: Path | None, clock: str, names: Sequence[str]) -> dict[tuple[str, ...], Found]:
    """The rows of a file by what they are about, the last of each, that were measured by this clock."""
    if keep is None or not keep.exists():
        return {}
    found = map(json.loads, keep.read_text().splitlines())
    return {tuple(f[n] for n in names): f for f in found if f.get("clock") == clock}


def rows(
    chosen: argparse.Namespace, todo: Sequence[What], module: str, said: Callable[[Found], Sequence[str]]
) -> Iterator[Found]:
    """What was measured of each: what stands in the file, else what a fresh process of a module says. It is
    given what the row is about, the seconds, the clock and the packages that are left out. A row is printed
    as it is `said`, unless rows are only shown.
    """
    clock = CLOCKS[chosen.cpu]
    kept = kept_rows(chosen.keep, clock, list(todo[0]) if todo else [])
    begin = time.perf_counter()
    for n, what in enumerate(todo, 1):
        found = None if chosen.again else kept.get(tuple(what.values()))
        if found is None and chosen.show:
            continue
        if found is None:
            how = *what.values(), str(chosen.seconds), clock, ",".join(chosen.without)
            try:
                found = child(*how, module=module) | {"date": today(), "with": versions()}
            except (RuntimeError, ValueError, IndexError) as error:  # it failed, or said nothing
                found = {"failed": str(error).strip().splitlines()[-1]}
            found |= what | {"clock": clock}
            if chosen.keep is not None and "failed" not in found:
                chosen.keep.parent.mkdir(parents=True, exist_ok=True)
                with chosen.keep.open("a") as file:
                    file.write(json.dumps(found) + "\n")
        if not chosen.show:
            now = f"[{n}/{len(todo)}, {time.perf_counter() - begin:.0f} s]"
            print(now, *said(found), sep="  ", flush=True)
        yield found


def header(found: Sequence[Found]) -> Iterator[str]:
    """What the rows were measured with, and when."""
    dates: dict[str, set[str]] = {}
    for f in found:
        if "failed" not in f:
            dates.setdefault(f["with"], set()).add(f["date"])
    for what, when in dates.items():
        yield f"{what}; {' to '.join(sorted({min(when), max(when)}))}."


def today() -> str:
    return dt.datetime.now(dt.UTC).date().isoformat()


@functools.cache
def versions() -> str:
    """This machine and what is installed on it."""
    processor = platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        processor = next(x for x in text.splitlines() if x.startswith("model name")).partition(":")[2].strip()
        processor += f", {text.count('model name')} cores"
    found = [f"Python {platform.python_version()}"]
    for name in ("numpy", "numba", "torch", "jax", "optax", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return f"{processor}; {', '.join(found)}"


PACKAGES = (
    *("timm", "pytorch_optimizer", "torch-optimi", "schedulefree", "prodigyopt", "dadaptation"),
    *("heavyball", "came_pytorch"),
)
"""Those of the peers."""
