"""What is decided once is said once, under the name of the package, and only to who listens."""

import logging
import subprocess
import sys

import numpy as np
import pytest

import optimisers as opt


def test_the_engine_is_said_once_with_what_faster_ones_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = {"w": np.ones(3, np.float32)}
    with caplog.at_level(logging.INFO, "optimisers"):
        state = opt.setup(opt.Adam(), model)
        for _ in range(3):
            state, model = opt.update(state, model, {"w": np.ones(3, np.float32)})
        opt.setup(opt.Adam(), {"w": np.ones(3, np.float16)}, engine="interpret")

    said = [r.getMessage() for r in caplog.records if "go to the engine" in r.getMessage()]
    assert len(said) == 2
    assert "1 arrays of numpy in float32 on cpu go to the engine numba" in said[0]
    assert said[1].endswith("go to the engine interpret")


def salt() -> float:
    """A number that makes a kernel which nobody has compiled yet."""
    return float(np.random.default_rng().random())


@pytest.mark.slow
def test_kernels_and_roads_are_said_and_nobody_hears_it_unasked() -> None:
    code = (
        "import numpy as np, optimisers as opt\n"
        "class Own(opt.Rule):\n"
        "    eta: float = 0.1\n"
        "    def apply(self, state, x, dx):\n"
        "        return state, self.eta * dx * {salt}\n"
        "x = np.ones(3)\n"
        "opt.update(opt.setup(Own(), x), x, x)\n"
    )
    loud = "import logging; logging.basicConfig(level=logging.INFO)\n"
    quiet, said = (
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
        for text in (code.format(salt=salt()), loud + code.format(salt=salt()))
    )

    assert (quiet.stdout, quiet.stderr) == ("", "")
    assert "INFO:optimisers:addresses of arrays of numpy on cpu are" in said.stderr
    assert "was compiled, and is kept in" in said.stderr
