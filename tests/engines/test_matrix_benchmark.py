"""The benchmark of the rules of matrices has a row for each size that was measured, and adds to its table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("torch")


@pytest.mark.slow
def test_the_table_has_every_row_that_was_kept_by_this_clock(tmp_path: Path) -> None:
    keep, out = tmp_path / "build" / "rows.jsonl", tmp_path / "table.md"
    command = [sys.executable, "-m", "benchmarks.matrix", "--sizes", "24x256", "--seconds", "0"]
    command += ["--without", "pytorch_optimizer", "timm", "heavyball", "came_pytorch"]
    command += ["--keep", str(keep), "--out", str(out), "--rules"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}

    def rows(*given: str) -> list[str]:
        done = subprocess.run(
            [*command, *given], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FAILED" not in done.stdout
        return [line for line in out.read_text().splitlines() if line.startswith("| **")]

    came, sm3 = (f"| **{rule}, 24 x (256, 256)** | | | | |" for rule in ("CAME", "SM3"))
    assert rows("SM3", "--cpu") == [sm3]
    kept = keep.read_text()
    assert rows("CAME", "--cpu", "--note", "Twice.") == [came, sm3]
    assert "Twice." in out.read_text()
    assert keep.read_text().startswith(kept)
    assert rows("CAME", "SM3", "--cpu", "--show") == [came, sm3]
    assert keep.read_text().count("\n") == 2
    assert rows("CAME") == [came]
