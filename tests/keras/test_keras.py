"""Does a rule train a model of Keras as one of its own optimizers does? A process has one backend of Keras,
so each check runs in a process of its backend.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.installed import NEEDS_KERAS

pytestmark = [NEEDS_KERAS, pytest.mark.slow]

CHECKS = sorted(map(str, Path(__file__).parent.glob("check_*.py")))

QUIETER = ["-W", "ignore:__array__ implementation:DeprecationWarning", "-p", "no:cacheprovider", "-q"]
"""Keras on torch answers NumPy in an old way."""

UNTUNED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""XLA compiles a model of Keras for most of a second, and half as long so."""


def process(backend: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python where Keras has a backend."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    there = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": paths, "XLA_FLAGS": UNTUNED}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=there, check=False, cwd=root)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_every_check_holds(backend: str) -> None:
    done = process(backend, "-m", "pytest", *QUIETER, *CHECKS)

    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_another_backend_is_refused_by_name() -> None:
    done = process("numpy", "-c", "import optimisers as opt; opt.KerasOptimizer(opt.Adam())")

    assert (
        "KerasOptimizer takes the backends torch and jax of Keras, and this process has numpy" in done.stderr
    )


def test_a_backend_that_is_not_installed_is_named() -> None:
    hidden = "import sys; sys.modules['tensorflow'] = None; import optimisers as opt; opt.KerasOptimizer"
    done = process("tensorflow", "-c", hidden)

    assert "set the environment variable KERAS_BACKEND to torch or jax" in done.stderr


TRAINED = """
import sys
import keras
import numpy as np
import optimisers as opt

rng = np.random.default_rng(0)
x, y = rng.standard_normal((2, 64, 4)).astype(np.float32)
"""

SAVING = f"""{TRAINED}
dense = keras.layers.Dense
made = keras.Sequential([keras.layers.Input((4,)), dense(8, activation="tanh"), dense(4)])
rule = {{opt.matrices: opt.Muon(0.02, layout="columns"), "**": opt.AdamW(opt.Cosine(0.01, 40))}}
made.compile(optimizer=opt.KerasOptimizer(rule), loss="mse")
made.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
made.save(sys.argv[1] + ".keras")
made.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
np.savez(sys.argv[1], *made.get_weights())
"""

LOADING = f"""{TRAINED}
opt.KerasOptimizer  # teaches Keras the class
made = keras.models.load_model(sys.argv[1] + ".keras")
made.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
for mine, theirs in zip(made.get_weights(), np.load(sys.argv[1] + ".npz").values(), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
"""


def test_what_torch_has_saved_goes_on_with_jax(tmp_path: Path) -> None:
    saved = process("torch", "-c", SAVING, str(tmp_path / "run"))
    loaded = process("jax", "-c", LOADING, str(tmp_path / "run"))

    assert (saved.returncode, loaded.returncode) == (0, 0), saved.stderr + loaded.stderr
