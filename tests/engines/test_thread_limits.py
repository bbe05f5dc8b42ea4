"""How many threads a step may use: what limits them, and who decides."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.engines.cpu import limits, threads


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of 40 cores without a limit, whatever this machine is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(40)), raising=False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    monkeypatch.setattr(limits, "_of_process", functools.cache(limits._of_process.__wrapped__))
    monkeypatch.setattr(limits, "quota_of", lambda _: None)
    for name in limits.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    opt.set_num_threads(None)


def test_without_limits_there_are_sixteen() -> None:
    assert opt.get_num_threads() == 16


def test_there_are_no_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6})
    assert opt.get_num_threads() == 3


@pytest.mark.parametrize("name", limits.VARIABLES)
@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), (" 4 ", 4), ("2,4", 2), ("", 16), ("0", 16), ("many", 16), ("99", 16)]
)
def test_variables_of_the_environment_count(
    name: str, text: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    assert opt.get_num_threads() == count


def test_what_torch_was_told_counts_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 5):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda count=count: count))
        assert opt.get_num_threads() == count


def test_the_user_decides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    opt.set_num_threads(7)
    assert opt.get_num_threads() == 7
    opt.set_num_threads(np.int64(2))  # type: ignore[arg-type]  # whatever is a whole number
    assert opt.get_num_threads() == 2
    opt.set_num_threads(None)
    assert opt.get_num_threads() == 1


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True, False])
def test_what_is_no_number_of_threads_is_refused(count: Any) -> None:
    with pytest.raises(opt.BadSetting, match="it takes a whole number from 1 on, or None"):
        opt.set_num_threads(count)


def test_large_steps_ask_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(threads, "available", lambda: asked.append(1) or 1)
    for elements in (10, threads.SERIAL_BELOW - 1):
        threads.together(lambda: None, elements)
    assert not asked
    threads.together(lambda: None, threads.SERIAL_BELOW)
    assert asked


def test_one_thread_starts_no_helper() -> None:
    code = """
import threading, numpy as np, optimisers as opt
x = {"w": np.zeros(2_000_000, np.float32)}
state = opt.setup(opt.AdamW(0.1), x)
for _ in range(2):
    opt.update_(state, x, x)
print(sum(t.name == "optimisers" for t in threading.enumerate()))
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


# -- the quota of a container --------------------------------------------------------------------------------


def laid(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/gone\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n2:memory:/\n0::/\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "nonsense\n\n", "sys/fs/cgroup/cpu.max": "a b c"}, None),
    ],
)
def test_the_quota_of_a_container_is_seen(files: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    assert QUOTA_OF(laid(tmp_path, files)) == cores


QUOTA_OF = limits.quota_of
