"""A signal that ends the process by default ends it in the middle of a step too."""

import os
import signal
import subprocess
import sys

import pytest

CODE = """
import signal, sys
signal.signal(signal.{name}, signal.SIG_DFL)
import numpy as np
import optimisers as opt
model = {{"a": np.ones(1000, np.float32), "b": np.ones(30)}}
grads = {{"a": np.ones(1000, np.float32), "b": np.ones(30)}}
state = opt.setup(opt.AdamW(0.1), model)
opt.update_(state, model, grads)
print("ready", flush=True)
while True:
    opt.update_(state, model, grads)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_with_its_default_action_ends_the_process(name: str) -> None:
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", CODE.format(name=name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(getattr(signal, name))
        child.communicate(timeout=30)

        assert child.returncode == -getattr(signal, name)
