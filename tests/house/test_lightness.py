"""What does `import optimisers` load? NumPy, and nothing else that is heavy."""

import subprocess
import sys

import pytest

HEAVY = (
    "numba",
    "llvmlite",
    "platformdirs",
    "scipy",
    "sklearn",
    "matplotlib",
    "rich",
    "torch",
    "jax",
    "cupy",
)


def loaded_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of these packages a fresh process has loaded after running the code."""
    probe = f"{code}\nimport sys\nprint(*[n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=True, text=True)
    return done.stdout.split()


def test_importing_loads_no_compiler_and_no_framework() -> None:
    assert loaded_by("import optimisers", HEAVY) == []


def test_making_a_state_loads_no_framework() -> None:
    code = "import numpy, optimisers\noptimisers.setup(optimisers.Adam(), numpy.ones(3))"
    assert loaded_by(code, HEAVY) == []


@pytest.mark.parametrize("code", ["import numpy", "import optimisers, numpy"])
def test_the_probe_finds_what_is_loaded(code: str) -> None:
    assert loaded_by(code, ("numpy", "numba")) == ["numpy"]
