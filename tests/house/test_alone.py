"""Does everything that needs no framework work where NumPy and Numba stand alone?"""

import subprocess
import sys
from pathlib import Path

import pytest

import optimisers as opt
from optimisers.arrays.registry import load_public, public_names
from tests.installed import loadable

ROOT = Path(__file__).parents[2]

FRAMEWORKS = ("torch", "triton", "jax", "jaxlib", "optax", "flax", "equinox", "cupy", "keras")

HIDDEN = f"import sys\nfor name in {FRAMEWORKS!r}: sys.modules[name] = None\n"


def alone(code: str) -> "subprocess.CompletedProcess[str]":
    """What a process says that runs the code without any framework."""
    command = [sys.executable, "-W", "error", "-c", HIDDEN + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_the_commands_and_the_pages_need_no_framework() -> None:
    done = alone(
        "from optimisers.__main__ import main\n"
        "assert [main(['list']), main(['show', 'AdamW']), main(['doctor'])] == [0, 0, 0]\n"
        "from docs.make_rules import __main__ as pages\n"
        "assert len(pages.families()['adam']) > 5\n"
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "def kernel(" in done.stdout


def test_what_is_hidden_is_missed() -> None:
    assert "import of torch halted" in alone("import torch").stderr


@pytest.mark.slow
def test_a_star_import_brings_every_name_that_needs_no_framework_and_loads_none() -> None:
    code = (
        f"from optimisers import *\nimport sys\nprint([n for n in {FRAMEWORKS!r} if n in sys.modules], Adam)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == f"[] {opt.Adam}\n"


@pytest.mark.parametrize("name", ["TorchOptimizer", "as_optax", "from_optax", "vmap_axes", "KerasOptimizer"])
def test_a_name_that_needs_a_library_says_so_where_it_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (public_names()[name], "optimisers.keras.library"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module in FRAMEWORKS:
        monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(ModuleNotFoundError, match=rf"optimisers.{name} needs (\w+),.*; write pip install \1"):
        load_public(name)


def test_names_that_need_a_library_are_found_by_who_looks_for_names() -> None:
    assert {"TorchOptimizer", "as_optax"} <= public_names().keys() <= set(dir(opt))
    assert [n for n in public_names().keys() & set(loadable()) if getattr(opt, n).__name__ != n] == []
