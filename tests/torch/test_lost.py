"""Processes that die in a step, or come too late for it: those that live say so, and have changed nothing.

One process lives. Each of the others makes a pair with it, and is lost in its own way.
"""

import datetime as dt
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import optimisers as opt
from tests.processes import found_by, ran_once

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file of a POSIX system")

LIMIT = 6.0
"""Seconds that a group waits for a process."""

RULE = opt.Chain(opt.ClipGlobalNorm(0.5), opt.AdamW(0.01))


def parameters() -> dict[str, Any]:
    torch.manual_seed(0)
    return {k: torch.nn.Parameter(torch.randn(s)) for k, s in {"w": (40, 30), "b": (30,)}.items()}


def give(held: dict[str, Any], n: int) -> None:
    torch.manual_seed(n)
    for p in held.values():
        p.grad = torch.randn(p.shape)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tried(optimizer: Any, held: dict[str, Any]) -> dict[str, Any]:
    """What a step says, how long it takes, and whether it has changed anything."""

    def now() -> list[Any]:
        local = [
            getattr(x, "to_local", lambda x=x: x)() for e in optimizer.state.values() for x in e.values()
        ]
        return [x.detach().clone() for x in (*held.values(), *local)]

    before, said, begin = now(), "", time.perf_counter()
    try:
        optimizer.step()
    except opt.OptimiserError as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - begin
    kept = all(torch.equal(x, y) for x, y in zip(before, now(), strict=True))
    return {"said": said, "seconds": seconds, "kept": kept}


def shared(lost: Callable[[Any], object], alive: bool, group: Any) -> dict[str, Any]:
    """A pair that shares a state: after one step the other process is lost in a way."""
    held = parameters()
    optimizer = opt.TorchOptimizer(list(held.items()), RULE, shard=group)
    give(held, 0)
    optimizer.step()
    give(held, 1)
    if not alive:
        lost(optimizer)
    found = tried(optimizer, held)
    return found | {"then": tried(optimizer, held)["said"], "saved": saved(optimizer)}


def saved(optimizer: Any) -> str:
    try:
        optimizer.state_dict()
    except opt.BadState as error:
        return str(error)
    return ""


def before_the_step(optimizer: Any) -> None:
    optimizer.register_step_pre_hook(die)


def on_the_way(optimizer: Any) -> None:
    optimizer._keeper.shares.gather = die


def too_late(_: Any) -> None:
    time.sleep(2.5 * LIMIT)
    die()


def spread(alive: bool, group: Any) -> dict[str, Any]:
    """A pair that holds DTensors: the other process is too late."""
    mesh = DeviceMesh.from_group(group, "cpu")
    held = {k: torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for k, p in parameters().items()}
    optimizer = opt.TorchOptimizer(list(held.items()), RULE)
    for n in range(2):
        for p in held.values():
            p.grad = torch.full_like(p, 0.5 + n)
        if n == 0:
            optimizer.step()
    if not alive:
        too_late(optimizer)
    local: dict[str, Any] = {k: p.detach() for k, p in held.items()}
    return tried(optimizer, {k: p.to_local() for k, p in local.items()})


LOST: dict[str, Callable[[bool, Any], dict[str, Any]]] = {
    "before the step": lambda alive, group: shared(before_the_step, alive, group),
    "on the way": lambda alive, group: shared(on_the_way, alive, group),
    "too late": spread,
}
"""What happens in the pair with each of the processes 1, 2, 3."""


def one_of(rank: int, folder: Path) -> None:
    """The first process meets all others, one after the other; what goes wrong is kept as text."""
    meeting = f"file://{folder / 'meeting'}"
    held = parameters()
    give(held, 0)
    opt.TorchOptimizer(list(held.items()), RULE).step()  # who compiles is late
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=1 + len(LOST))
    limit = dt.timedelta(seconds=LIMIT)
    pairs = [dist.new_group([0, other], timeout=limit) for other in range(1, 1 + len(LOST))]
    for other, (name, run) in enumerate(LOST.items(), 1):
        if rank not in (0, other):
            continue
        turn = folder / f"turn of {other}"
        if rank == 0:
            turn.touch()
        while not turn.exists():  # a collective would wait no longer than the limit
            time.sleep(0.02)
        try:
            result: Any = run(rank == 0, pairs[other - 1])
        except Exception:  # noqa: BLE001 the test of this part shows it
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}")
    os._exit(0)  # without waiting for those that are lost


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the process that lives wrote what it found."""
    return ran_once(tmp_path_factory, "tests.torch.test_lost", 150, ranks=1 + len(LOST))


@pytest.mark.slow
def test_a_process_that_dies_before_others_write_is_named_and_nothing_has_changed(folder: Path) -> None:
    found = found_by(0, "before the step", folder)

    assert found["said"].startswith(
        "ProcessLost: process 0 of 2 joined what all parts give, and another one did not"
    )
    assert found["kept"]
    assert found["seconds"] < LIMIT
    assert found["saved"] == ""


@pytest.mark.slow
def test_one_that_dies_while_new_parameters_travel_is_named_and_no_half_step_is_used(folder: Path) -> None:
    found = found_by(0, "on the way", folder)

    assert "new parameters, and another one did not answer" in found["said"]
    assert found["seconds"] < LIMIT
    for said in (found["then"], found["saved"]):
        assert "those here are partly of the step before" in said
        assert "load both from a checkpoint" in said


@pytest.mark.slow
def test_one_that_is_too_late_is_named_within_the_limit_of_the_group(folder: Path) -> None:
    found = found_by(0, "too late", folder)

    assert found["said"].startswith(
        "ProcessLost: process 0 of 2 joined what all parts give, and another one did not"
    )
    assert "later than the time limit of the group allows" in found["said"]
    assert found["kept"]
    assert LIMIT / 2 < found["seconds"] < 2 * LIMIT


if __name__ == "__main__":
    one_of(int(sys.argv[1]), Path(sys.argv[2]))
