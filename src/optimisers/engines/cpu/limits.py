"""How many threads may a step use? No more than this process was given, and than its user asked for.

`set_num_threads` decides alone. Without it the least of these counts: the cores that the process may run on,
the quota of its container, OMP_NUM_THREADS (which torchrun sets for every rank), NUMBA_NUM_THREADS, what
`torch.set_num_threads` said, and 16.
"""

import functools
import math
import operator
import os
import re
import sys
from pathlib import Path

from optimisers.errors import BadSetting

MOST = 16
"""Memory, not arithmetic, limits a step: more threads add nothing."""

VARIABLES = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
"""Environment variables by which users limit the threads of a process; they are read once."""

_wanted: int | None = None


def set_num_threads(count: int | None) -> None:
    """Let large steps on the CPU use so many threads, the calling one included; None for as many as the
    process may use.

    It holds for this process, from the next step on. Under JAX the threads are XLA's, which this does not
    touch. Numbers stay the same to the bit.

    Raises BadSetting unless `count` is None or a whole number from 1 on.
    """
    global _wanted  # noqa: PLW0603 one number for the process, as the threads are
    try:
        number = None if count is None or isinstance(count, bool) else operator.index(count)
    except TypeError:
        number = 0
    if (number is None and count is not None) or (number is not None and number < 1):
        raise BadSetting(f"set_num_threads({count!r}); it takes a whole number from 1 on, or None")
    _wanted = number


def get_num_threads() -> int:
    """How many threads a large step on the CPU uses."""
    return min(limits().values())


def limits() -> dict[str, int]:
    """What limits the threads of a step, each by what it is called."""
    if _wanted is not None:
        return {"set_num_threads": _wanted}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {"cores": cores, **_of_process()}
    said = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if said is not None:
        found["torch"] = said()
    return found


@functools.cache
def _of_process() -> dict[str, int]:
    """What does not change while a process runs."""
    found = {"most": MOST}
    for name in VARIABLES:
        number = re.match(r"\s*([1-9]\d*)", os.environ.get(name, ""))
        if number is not None:
            found[name] = int(number[1])
    if (quota := quota_of(Path("/"))) is not None:
        found["container"] = quota
    return found


def quota_of(root: Path) -> int | None:
    """The cores that the control groups of this process let it use, rounded up; None without a quota.

    Both versions are read, the group itself and those above it: of a container only its own may be seen, as
    the root of what is mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        second = controllers == ""
        if not second and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("" if second else "cpu")
        group = mounted / path.lstrip("/")
        for folder in (group, *group.parents):
            quotas += _read(folder, second=second)
            if folder == mounted:
                break
    return max(1, math.ceil(min(quotas))) if quotas else None


def _read(folder: Path, *, second: bool) -> list[float]:
    """The quota of one control group, in cores; empty if it has none."""
    try:
        if second:
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (folder / name).read_text(encoding="utf-8")
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        return [float(quota) / float(period)] if float(quota) > 0 and float(period) > 0 else []
    except (OSError, ValueError):  # "max" is no number
        return []
