"""The kernel cache is this user's alone: its files, the directories above it, and where Numba keeps what."""

import importlib
import os
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import optimisers as opt
from optimisers.engines import cache, trust

SOURCE = '''"""Adds one."""
from numba import njit


@njit("f8(f8)", cache=True)
def kernel(x):
    return x + 1
'''

pytestmark = pytest.mark.skipif(os.name != "posix", reason="other systems have no owners and modes of files")


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that is not there yet; nothing is loaded so far."""
    path = tmp_path / "home" / "optimisers" / "kernels"
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "directory", lambda: path)
    return path


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def loaded(monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a fresh look at the cache had to compile; without a warning."""
    monkeypatch.setattr(cache, "_loaded", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel = cache.load(SOURCE).kernel
    assert kernel(2.0) == 3
    return sum(kernel.stats.cache_misses.values())


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077, 0o277], ids=oct)
def test_all_is_made_for_this_user_alone_whatever_the_umask(
    where: Path, mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.umask(mask)

    assert [loaded(monkeypatch), loaded(monkeypatch)] == [1, 0]
    for path in (where.parent.parent, where.parent, where, where / "__pycache__"):
        assert mode(path) == 0o700, path
    files = [p for p in where.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".py", ".nbi", ".nbc"}
    assert {mode(p) for p in files if p.suffix != ".py"} <= {0o600, 0o400}
    assert {mode(p) for p in files if p.suffix == ".py"} == {0o600}


@pytest.mark.parametrize("open_to", [0o777, 0o702, 0o770], ids=oct)
@pytest.mark.parametrize("up", [0, 1])
def test_a_directory_above_that_others_may_write_is_refused(where: Path, up: int, open_to: int) -> None:
    where.parent.mkdir(parents=True, mode=0o700)
    above = where.parents[up]
    above.chmod(open_to)
    if up == 1 and open_to == 0o770 and trust.is_own_group(above.stat().st_gid):
        assert trust.prepared(where) is None  # a group without other members
        return
    with pytest.warns(opt.CacheRefused, match="can be written by others"):
        assert cache.load(SOURCE).kernel(2.0) == 3
    assert list(where.rglob("*.nb?")) == []


@pytest.mark.usefixtures("where")
def test_a_directory_far_above_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.warns(opt.CacheRefused, match="who could replace the kernel cache below"):
        cache.load(SOURCE)


@pytest.mark.usefixtures("where")
def test_a_sticky_directory_above_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /tmp is: others may write there, but not rename what is ours."""
    tmp_path.chmod(0o1777)

    assert loaded(monkeypatch) == 1


def test_a_link_in_the_place_of_our_directory_is_refused(where: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "kernels").mkdir(parents=True, mode=0o700)
    where.parent.parent.mkdir(mode=0o700)
    where.parent.symlink_to(elsewhere)
    with pytest.warns(opt.CacheRefused, match="is a link"):
        cache.load(SOURCE)


def test_a_link_far_above_is_followed_and_looked_at(
    where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches of users often lie on another disk."""
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    where.parent.parent.symlink_to(disk)
    assert loaded(monkeypatch) == 1

    monkeypatch.setattr(cache, "_loaded", {})
    disk.chmod(0o777)
    with pytest.warns(opt.CacheRefused, match="can be written by others"):
        cache.load(SOURCE)


@pytest.mark.parametrize(
    "broken", [b"\xff\xfe\x00", b"", SOURCE.encode("utf-16")], ids=["no text", "empty", "utf-16"]
)
def test_a_file_that_is_no_such_text_is_written_again(
    where: Path, broken: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(monkeypatch)
    (path,) = where.glob("*.py")
    path.write_bytes(broken)

    loaded(monkeypatch)
    assert path.read_bytes() == SOURCE.encode()


@pytest.mark.slow
def test_a_name_that_is_not_ascii_is_kept_under_any_locale(tmp_path: Path) -> None:
    code = f"""
from optimisers.engines import cache
text = {SOURCE!r}.replace("Adds one", "Adds \\u00e9in")
assert cache.load(text).kernel(2.0) == 3
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment |= {"PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 0, ended.stderr


# -- Numba ---------------------------------------------------------------------------------------------------


def test_the_configuration_of_numba_is_left_alone_and_does_not_count(
    where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = importlib.import_module("numba.core.config")
    theirs = tmp_path / "theirs"
    writes: list[str] = []

    class Watched(ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            writes.append(name)
            super().__setattr__(name, value)

    monkeypatch.setattr(config, "CACHE_DIR", str(theirs))
    monkeypatch.setattr(config, "__class__", Watched)
    loaded(monkeypatch)
    monkeypatch.undo()

    assert not theirs.exists()
    assert [w for w in writes if w.isupper()] == []
    assert len(list(where.rglob("*.nbc"))) == 1


@pytest.mark.slow
def test_kernels_of_others_go_where_numba_is_told_meanwhile(tmp_path: Path) -> None:
    """A thread that compiles a user's function while ours are loaded finds the configuration as it was."""
    code = f"""
import threading
from pathlib import Path
import numba
from optimisers.engines import cache
seen, stop = set(), threading.Event()
def watch():
    while not stop.is_set():
        seen.add(numba.core.config.CACHE_DIR)
thread = threading.Thread(target=watch); thread.start()
cache.load({SOURCE!r}); stop.set(); thread.join()
assert seen == {{{str(tmp_path / "theirs")!r}}}, seen
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "theirs")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "theirs").exists()


@pytest.mark.usefixtures("where")
def test_one_text_is_compiled_once_by_threads_that_start_together() -> None:
    found: list[object] = []
    workers = [threading.Thread(target=lambda: found.append(cache.load(SOURCE))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert len(found) == 4
    assert len(set(map(id, found))) == 1


def test_without_compilation_the_interpreter_steps_and_explain_says_why() -> None:
    code = """
import numpy as np, optimisers as opt
x = np.ones(5, np.float32)
state, x = opt.update_(opt.setup(opt.Descent(0.5), x), x, np.ones(5, np.float32))
assert (x == 0.5).all()
said = str(opt.explain(state))
assert "engine interpret (NUMBA_DISABLE_JIT switches compilation off)" in said, said
"""
    environment = os.environ | {
        "NUMBA_DISABLE_JIT": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 0, ended.stderr
