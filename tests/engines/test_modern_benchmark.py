"""The benchmark of the modern rules has a row for each of them, and goes on where it was stopped."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optimisers.settings import parts
from tests.table import GIVEN_MORE, MODERN

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("torch")


def test_every_rule_that_steps_by_elements_and_norms_has_a_row() -> None:
    from benchmarks.modern_rows import ROWS

    def names(rules: Any) -> set[str]:
        return {type(part).__name__ for rule in rules for part in parts(rule)}

    modern = names(row.rule for row in MODERN if row.rule.__module__ not in OF_MATRICES)
    assert {*modern, *GIVEN_MORE} - names(row.rule for row in ROWS.values()) == UNTIMED


OF_MATRICES = tuple(f"optimisers.rules.{room}" for room in ("matrix", "factored", "sketched"))
UNTIMED = {"DecoupledDecay", "MARSLion", "Momentum", "NormGrowthCap", "SophiaG"}
"""Older rules, kin of rules with a row, and one that came with the rules of matrices."""


@pytest.mark.slow
def test_rows_that_were_kept_are_not_measured_again(tmp_path: Path) -> None:
    keep, out = tmp_path / "rows.jsonl", tmp_path / "table.md"
    command = [sys.executable, "-m", "benchmarks.modern", "--models", "tiny", "--seconds", "0"]
    command += ["--keep", str(keep), "--out", str(out), "--rules"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}

    def ran(*rules: str) -> str:
        done = subprocess.run(
            [*command, *rules], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FAILED" not in done.stdout
        return done.stdout

    ran("SGLD")
    kept = keep.read_text()
    assert kept.count("\n") == 1
    ran("SGLD", "PolyakSPS")

    assert keep.read_text().startswith(kept)
    assert keep.read_text().count("\n") == 2
    table = out.read_text()
    assert [line.split(" | ")[0] for line in table.splitlines() if "| " in line][2:] == [
        "| SGLD",
        "| PolyakSPS",
    ]
    assert table.startswith("# Modern rules on a CPU\n\n")
    assert "numba" in table.splitlines()[2]
    ran("SGLD", "--again", "--note", "Twice.")
    assert keep.read_text().count("\n") == 3
    ran("SGLD", "PolyakSPS", "LAMB", "--show")
    shown = out.read_text()
    assert "| LAMB" not in shown
    assert [line for line in shown.splitlines() if line.startswith("| PolyakSPS")] == [
        line for line in table.splitlines() if line.startswith("| PolyakSPS")
    ]
    assert keep.read_text().count("\n") == 3
