"""Compiled kernels are kept on disk, and nothing is run from there that this user did not write."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.engines import cache

SOURCE = '''"""Adds one."""
from numba import njit


@njit(cache=True)
def kernel(x):
    return x + 1
'''

pytestmark = pytest.mark.skipif(os.name != "posix", reason="other systems have no owners and modes of files")


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that is not there yet; nothing is loaded so far."""
    path = tmp_path / "cache" / "kernels"
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "directory", lambda: path)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def a_step_is_right() -> None:
    """A new kernel is loaded and gives the numbers that the interpreter gives."""
    x, g = np.array([1.0, 2.0, 3.0]), np.array([0.5, -0.5, 2.0])
    _, new = opt.update(opt.setup(opt.Descent(0.5), x, engine="numba"), x, g)
    np.testing.assert_array_equal(new, x - 0.5 * g)


def refused(match: str) -> None:
    """The directory is not trusted: a warning, and the right numbers without it."""
    with pytest.warns(opt.CacheRefused, match=match):
        a_step_is_right()


def written(where: Path) -> list[str]:
    return sorted(str(p.relative_to(where)) for p in where.rglob("*") if p.is_file())


# -- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_the_directory_is_for_this_user_alone(where: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        cache.load(SOURCE)
    finally:
        os.umask(old)

    assert mode(where) == 0o700


@pytest.mark.slow
def test_a_directory_that_others_may_read_is_closed_to_them(where: Path) -> None:
    where.mkdir(parents=True, mode=0o755)
    where.chmod(0o755)
    a_step_is_right()

    assert mode(where) == 0o700


def test_a_kernel_is_a_readable_module_beside_its_compiled_code(where: Path) -> None:
    module = cache.load(SOURCE)

    assert module.kernel(2) == 3
    (text,) = where.glob("*.py")
    assert text.read_text() == SOURCE
    assert any(name.endswith(".nbc") for name in written(where))


def test_one_text_is_one_module(where: Path) -> None:
    assert cache.load(SOURCE) is cache.load(SOURCE)
    assert cache.load(SOURCE) is not cache.load(SOURCE + "\n")
    assert len(list(where.glob("*.py"))) == 2


def test_writing_leaves_no_temporary_file(where: Path) -> None:
    a_step_is_right()

    assert [n for n in written(where) if n.endswith(".tmp")] == []


# -- who is trusted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_to", [0o777, 0o770, 0o702, 0o1777], ids=oct)
def test_a_directory_that_others_may_write_is_refused(where: Path, open_to: int) -> None:
    where.mkdir(parents=True)
    where.chmod(open_to)
    refused("can be written by others")

    assert written(where) == []
    assert mode(where) == open_to


def test_a_directory_of_somebody_else_is_refused(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where.mkdir(parents=True, mode=0o700)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    refused(f"belongs to user {owner}")

    assert written(where) == []


def test_a_link_to_a_directory_is_refused(where: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    where.parent.mkdir()
    where.symlink_to(elsewhere)
    refused("is a link")

    assert written(elsewhere) == []


def test_a_place_where_no_directory_can_be_made_is_refused(where: Path) -> None:
    where.parent.write_text("a file stands in the way")
    refused("kernels are compiled anew in each process")


@pytest.mark.parametrize(
    "pattern", ["*.py", "__pycache__", "__pycache__/*.nbi", "__pycache__/*.nbc", "__pycache__/*.o"]
)
def test_what_others_may_write_inside_is_refused(
    where: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_step_is_right()
    paths = list(where.glob(pattern))
    for path in paths:
        path.chmod(0o777)
    monkeypatch.setattr(cache, "_loaded", {})

    assert paths
    refused("can be written by others")


@pytest.mark.parametrize(
    "pattern", ["*.py", "__pycache__", "__pycache__/*.nbi", "__pycache__/*.nbc", "__pycache__/*.o"]
)
def test_links_inside_are_refused(
    where: Path, tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_step_is_right()
    paths = list(where.glob(pattern))
    for n, path in enumerate(paths):
        path.rename(tmp_path / f"moved{n}")
        path.symlink_to(tmp_path / f"moved{n}")
    monkeypatch.setattr(cache, "_loaded", {})

    assert paths
    refused("is a link")


def test_a_refused_kernel_is_compiled_in_memory(where: Path) -> None:
    where.mkdir(parents=True)
    where.chmod(0o777)
    with pytest.warns(opt.CacheRefused):
        module = cache.load(SOURCE)

    assert module.kernel(2) == 3
    assert written(where) == []


# -- tampering -----------------------------------------------------------------------------------------------


def test_a_changed_text_is_written_again_and_not_executed(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.load(SOURCE)
    (path,) = where.glob("*.py")
    path.write_text("raise SystemExit('this was executed')\n")
    monkeypatch.setattr(cache, "_loaded", {})

    assert cache.load(SOURCE).kernel(2) == 3
    assert path.read_text() == SOURCE


def test_a_text_cut_short_is_written_again(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.load(SOURCE)
    (path,) = where.glob("*.py")
    path.write_text(SOURCE[:40])
    monkeypatch.setattr(cache, "_loaded", {})

    assert cache.load(SOURCE).kernel(2) == 3
    assert path.read_text() == SOURCE


def test_broken_compiled_code_is_compiled_again(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_step_is_right()
    for path in where.glob("__pycache__/*.*"):
        path.write_bytes(path.read_bytes()[:50])
    monkeypatch.setattr(cache, "_loaded", {})
    a_step_is_right()


# -- other processes -----------------------------------------------------------------------------------------

SCRIPT = """
import numpy as np
import optimisers as opt
from optimisers.engines import cache

rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.1, lam=0.1))
x = np.linspace(-1, 1, 7)
state = opt.setup(rule, x)
for _ in range(2):
    state, x = opt.update_(state, x, np.ones(7))
functions = [f for m in cache._loaded.values() for f in vars(m).values() if hasattr(f, "stats")]
print(sum(f.stats.cache_hits[s] for f in functions for s in f.stats.cache_hits),
      sum(f.stats.cache_misses[s] for f in functions for s in f.stats.cache_misses), x.tobytes().hex())
"""


def started(home: Path) -> Any:
    """A fresh process that takes two steps with its cache below `home`."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: Any) -> tuple[int, int, str]:
    """(functions loaded, functions compiled, the parameters)."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    hits, misses, numbers = out.split()
    return int(hits), int(misses), numbers


@pytest.mark.slow
def test_a_second_process_loads_what_the_first_compiled(tmp_path: Path) -> None:
    hits, misses, first = ended(started(tmp_path))

    assert (hits, misses > 0) == (0, True)
    assert ended(started(tmp_path)) == (misses, 0, first)


@pytest.mark.slow
def test_processes_that_start_together_all_get_the_right_numbers(tmp_path: Path) -> None:
    processes = [started(tmp_path) for _ in range(3)]
    found = [ended(p)[2] for p in processes]

    assert len(set(found)) == 1
    assert ended(started(tmp_path))[1:] == (0, found[0])
