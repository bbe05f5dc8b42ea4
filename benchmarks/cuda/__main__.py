"""How fast are steps on a CUDA device, beside torch.optim and Optax, and are they right there?

    PYTHONPATH=src python -m benchmarks.cuda [--only gpt2 xl small resnet18] [--rows adamw recipe own modern]
                                             [--out FILE]

It first checks every rule against float64, and what only a device can show: CUDA graphs, a GradScaler, steps
that wait for nobody; a failure ends it. Then it times, in turn and in one process, and judges targets.
`--compile` adds peers that compile for minutes, `--tune` tries other sizes of blocks. `--rehearse` runs the
same code on the CPU, by Triton's interpreter and on six small arrays: nothing that it prints is a
measurement.

ms: several steps one after the other, from an idle device until it is idle again, over their number.
device ms: one step that stands in the queue before the device comes to it, by CUDA events.
of copy: the bytes that our step moves, over ms, as a share of what copying a large array moves in that time.
host us: until the call of one step returns.
"""

import argparse
import contextlib
import dataclasses
import datetime as dt
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import shapes
from benchmarks.cuda.device import check_device
from benchmarks.cuda.judge import targets, tune
from benchmarks.cuda.measure import Session, agreement, measure
from benchmarks.cuda.modern import measure_modern
from benchmarks.cuda.place import CHECKED, Place
from benchmarks.cuda.rows import ROWS
from benchmarks.cuda.rules import check_rules, checked, show_errors
from benchmarks.printing import Report, Table

MODERN = "modern"
"""Beside the rows: one table of the rules of today."""


# -- all -----------------------------------------------------------------------------------------------------
def header(place: Place) -> list[str]:
    """What was measured with, and when."""
    versions = ["torch", "triton", "jax", "optax", "numpy"]
    found: list[str] = []
    for name in versions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    where = "the CPU" if place.rehearse else torch.cuda.get_device_name(0)
    if not place.rehearse:
        memory = torch.cuda.get_device_properties(0).total_memory
        where += f", {memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    when = dt.datetime.now(dt.UTC).date().isoformat()
    return [
        f"{where}; {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {when}",
        ", ".join(found),
    ]


def run(chosen: argparse.Namespace) -> list[str]:
    """Check, time and judge; what failed."""
    place = Place("cpu" if chosen.rehearse else "cuda:0")
    session = Session(
        place,
        Report(chosen.out),
        chosen.seconds,
        chosen.compile,
        time.perf_counter() + 60 * chosen.minutes,
    )
    report = session.report
    for line in header(place):
        report.line(line)
    if place.rehearse:
        report.line("A rehearsal on the CPU, by Triton's interpreter: nothing here is a measurement.")
    begin = time.perf_counter()
    rules_are_right = show_errors(check_rules(place, chosen.workers), report)
    device_is_right = check_device(place, report)
    if not (rules_are_right and device_is_right):
        session.failures.append("a check, see above")
        if not chosen.keep_going:
            return session.failures
    report.line(f"checked in {time.perf_counter() - begin:.0f} s")
    if chosen.tune:
        tune(session)
        return session.failures
    time_rows(chosen, session)
    return session.failures


def time_rows(chosen: argparse.Namespace, session: Session) -> None:
    """Whether the ways of each row agree, how fast they are, and what the targets say of it."""
    place, report = session.place, session.report
    rows = [key for key in chosen.rows if key in ROWS]
    lines = [line for key in rows for line in agreement(key, session)]
    title = f"Same numbers? Mean difference from the first peer after {CHECKED} steps, as a share of the way"
    report.table(title, ["row", "way", "difference", ""], lines)
    judgements: Table = []
    for name, key in itertools.product(chosen.only, rows):
        if session.left() < 2 * chosen.seconds and not place.rehearse:
            report.line(f"left out: {shapes.TITLES[name]}, {ROWS[key].title}: no time is left")
            continue
        m = measure(key, name, session)
        if m is not None:
            judgements += targets(key, name, m)
        del m
        place.free()
    if MODERN in chosen.rows:
        measure_modern(session)
    report.line(f"Bandwidth of a copy: {session.bandwidth / 1e9:.0f} GB/s")
    if place.rehearse:
        judgements = [[what, "no measurement", asked, "not judged"] for what, _, asked, _ in judgements]
    report.table(
        "Targets, and other ratios: by medians, by minima", ["what", "measured", "target", ""], judgements
    )


def main(args: Sequence[str] | None = None) -> None:
    """Check and measure what was asked for and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = ("gpt2", "xl", "small", "resnet18")
    parser.add_argument("--only", nargs="+", choices=models, default=models, help="models")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, MODERN], default=[*ROWS, MODERN])
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the rounds of each table")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no table is begun")
    parser.add_argument("--workers", type=int, default=8, help="processes that check the rules")
    parser.add_argument("--compile", action="store_true", help="peers too that compile for minutes")
    parser.add_argument("--tune", action="store_true", help="after the checks, only try other blocks")
    parser.add_argument("--keep-going", action="store_true", help="time what has failed its checks")
    parser.add_argument("--rehearse", action="store_true", help="run the same code on the CPU")
    parser.add_argument("--out", type=Path, help="a file for the tables, as Markdown")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(args)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX is imported
    if chosen.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device was found, and this measures on one; write --rehearse to try its code")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    sys.stdout.reconfigure(line_buffering=True)
    if chosen.child:
        errors = checked(chosen.child[1], Place("cuda:0"))
        print(json.dumps({"errors": [dataclasses.asdict(e) for e in errors]}))
        return
    failures = run(chosen)
    for why in failures:
        print(f"FAILED  {why}")
    if failures and not chosen.keep_going:
        sys.exit(1)


if __name__ == "__main__":
    main()
