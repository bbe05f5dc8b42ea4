"""Under a mode that makes fake tensors, real ones are stepped as ever or refused, and no memory is written
that is not theirs.
"""

import subprocess
import sys

import pytest

pytest.importorskip("torch")

CODE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import optimisers as opt

def made(laid):
    x = torch.ones(6, 4)
    return x if laid == "plain" else x.t()[::2]

for laid in ("plain", "strided"):
    p, g = torch.nn.Parameter(made(laid)), made(laid) / 2
    state = opt.setup(opt.Adam(0.1), [p])
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            opt.update_(state, [p], [g])
            said = "stepped"
        except opt.OptimiserError as error:
            said = f"refused: {error}"
    opt.update_(state, [p], [g])
    print(laid, said)
    assert torch.isfinite(p).all() and (p < 1).all(), laid
"""


@pytest.mark.slow
def test_real_tensors_under_a_fake_mode_do_not_crash() -> None:
    given = [sys.executable, "-c", CODE]
    done = subprocess.run(given, capture_output=True, text=True, timeout=120, check=False)
    said = [line.split()[:2] for line in done.stdout.splitlines()]

    assert done.returncode == 0, (said, done.stderr[-2000:])
    assert [laid for laid, _ in said] == ["plain", "strided"]
    assert {word.strip(":") for _, word in said} <= {"stepped", "refused"}
