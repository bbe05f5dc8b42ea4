"""Processes that run a test module together, each of which writes what it found."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def run_as_two(module: str, folder: Path, seconds: float, ranks: int = 2) -> None:
    """Run a test module as `python -m module RANK FOLDER RANKS`, once for each of two ranks, or of more; what
    they print goes into logs, and after so many seconds they are stopped.
    """
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(folder), str(ranks)],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for run in runs:
            run.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for rank, run in enumerate(runs):
            run.kill()
            (folder / f"{rank}.log").write_text(run.communicate()[0])


def ran_once(factory: pytest.TempPathFactory, module: str, seconds: float, ranks: int = 2) -> Path:
    """The folder in which processes ran a test module together: once, however many workers pytest has."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{module}.{ranks}"
    over = folder / "over"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + seconds + 60
        while not over.exists() and time.monotonic() < end:
            time.sleep(0.2)
    else:
        run_as_two(module, folder, seconds, ranks)
        over.touch()
    return folder


def found_by(rank: int, name: str, folder: Path) -> dict[str, Any]:
    """What one of them wrote under a name; the test fails with what went wrong there, if something did."""
    import torch

    file = folder / f"{name}.{rank}"
    if not file.exists():
        pytest.fail((folder / f"{rank}.log").read_text()[-3000:] or "it did not finish")
    result = torch.load(file, weights_only=True)
    if isinstance(result, str):
        pytest.fail(result)
    return result
