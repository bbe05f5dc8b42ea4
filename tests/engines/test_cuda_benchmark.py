"""The benchmark on a CUDA device runs on the CPU too, and says that it measured nothing there."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import optimisers as opt
from optimisers.settings import parts

ROOT = Path(__file__).resolve().parents[2]

torch = pytest.importorskip("torch")


def ran(*args: str) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "benchmarks.cuda", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_in_one_line() -> None:
    done = ran()

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("no CUDA device was found")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_rehearsal_runs_all_and_claims_nothing(tmp_path: Any) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "table.md"

    done = ran("--rehearse", "--only", "gpt2", "--seconds", "0", "--out", str(out))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing here is a measurement" in done.stdout
    text = out.read_text()
    assert "FAILED" not in text
    for way in (
        "update_ in a graph",
        "torch foreach",
        "Optax, jitted",
        "torch, folded into fused",
        "foreach",
    ):
        assert f"| {way} |" in text
    checks = [line for line in text.splitlines() if "its code ran on the CPU" in line]
    assert len(checks) == 6
    targets = text[text.index("**Targets") :].splitlines()[4:]
    judgements = [line for line in targets if line.startswith("|")]
    assert len(judgements) == 5
    assert all("not judged" in line and "no measurement" in line for line in judgements)


def test_an_error_of_two_units_in_the_last_place_of_float16_fails_the_check() -> None:
    from benchmarks.cuda import rules as cuda

    found, expected = torch.tensor([1.0, 1.5], dtype=torch.float16), [1.0, 1.5]
    errors = cuda.Errors("rule", "float16")

    assert errors.noted(found, expected, expected) == 0.0
    assert errors.why == ""
    assert errors.noted(found, [1.0, 1.5 + 2**-9], expected) == 2.0
    assert errors.why == "2 units in the last place of float16; at most 1"
    assert errors.noted(found * torch.nan, expected, expected) == float("inf")


def test_every_rule_is_checked_against_float64() -> None:
    from benchmarks.cuda import rules as cuda

    found = {type(part).__name__ for case in cuda.ALL for part in parts(case.rule)}
    rules = {
        n for n in opt.__all__ if isinstance(getattr(opt, n), type) and issubclass(getattr(opt, n), opt.Rule)
    }

    assert rules - found == {"Rule"}


def test_the_large_transformer_has_the_size_of_gpt3_xl() -> None:
    from benchmarks import shapes

    assert len(list(shapes.xl())) == 292
    assert shapes.count("xl") == pytest.approx(1.3e9, rel=0.02)
    assert "xl" not in shapes.MODELS
