"""What do parameter groups, schedulers and checkpoints cost beside torch's own optimisers?

    python -m benchmarks.schedulers

AdamW over small tensors on the CPU, ours and torch's fused and foreach, interleaved in one process: medians
in milliseconds, and the ratios of ours to theirs. A step is timed with that of its scheduler.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import optimisers as opt

PEERS: dict[str, Callable[[Any], Any]] = {
    "ours": lambda groups: opt.TorchOptimizer(groups, opt.AdamW(0.01)),
    "fused": lambda groups: torch.optim.AdamW(groups, 0.01, weight_decay=0.0, fused=True),
    "foreach": lambda groups: torch.optim.AdamW(groups, 0.01, weight_decay=0.0, foreach=True),
}


def parameters(count: int, *shape: int) -> list[Any]:
    """Parameters with gradients."""
    found = [torch.nn.Parameter(torch.ones(shape)) for _ in range(count)]
    for p in found:
        p.grad = torch.ones_like(p)
    return found


def in_groups(params: list[Any], groups: int) -> list[dict[str, Any]]:
    """The parameters in groups with rates of their own."""
    return [{"params": params[n::groups], "lr": 0.01 * (1 + n / groups)} for n in range(groups)]


def timed(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each action, in milliseconds, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(found[rounds // 4 :]) for name, found in times.items()}


def stepping(count: int, groups: int, *shape: int, scheduled: bool) -> dict[str, float]:
    """A step, with a scheduler or without one."""

    def made(make: Callable[[Any], Any]) -> Callable[[], None]:
        optimizer = make(in_groups(parameters(count, *shape), groups))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9999)

        def act() -> None:
            optimizer.step()
            if scheduled:
                scheduler.step()

        act()
        return act

    return timed({name: made(make) for name, make in PEERS.items()}, 40)


def loading(count: int) -> dict[str, float]:
    """Loading a state."""

    def made(make: Callable[[Any], Any]) -> Callable[[], None]:
        optimizer = make(in_groups(parameters(count, 4), 1))
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        return lambda: optimizer.load_state_dict(saved)

    return timed({name: made(make) for name, make in PEERS.items()}, 8)


def adding(count: int) -> dict[str, float]:
    """The first step after a group was added, and the adding."""

    def made(make: Callable[[Any], Any]) -> Callable[[], None]:
        optimizer = make(in_groups(parameters(count, 4), 1))
        optimizer.step()

        def act() -> None:
            optimizer.add_param_group({"params": parameters(1, 4), "lr": 0.1})
            optimizer.step()

        return act

    return timed({name: made(make) for name, make in PEERS.items()}, 7)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rows: list[tuple[str, Callable[[], dict[str, float]]]] = [
        ("40 of 64 x 64, 1 group", lambda: stepping(40, 1, 64, 64, scheduled=False)),
        ("40 of 64 x 64, 1 group, scheduler", lambda: stepping(40, 1, 64, 64, scheduled=True)),
        *(
            (f"{n} of 16, {n} groups, scheduler", lambda n=n: stepping(n, n, 16, scheduled=True))
            for n in (2, 25, 50, 100, 200, 400)
        ),
        ("200 of 16, 200 groups", lambda: stepping(200, 200, 16, scheduled=False)),
        *((f"load {n} of 4", lambda n=n: loading(n)) for n in (300, 1200, 2000)),
        *((f"add a group to {n} of 4, and step", lambda n=n: adding(n)) for n in (300, 2000)),
    ]
    print(f"{'':38}{'ours':>8}{'fused':>9}{'foreach':>9}   ours/fused  ours/foreach")
    for title, row in rows:
        found = row()
        ours, fused, foreach = (found[name] for name in PEERS)
        print(f"{title:38}{ours:8.2f}{fused:9.2f}{foreach:9.2f}{ours / fused:13.2f}{ours / foreach:14.2f}")


if __name__ == "__main__":
    main()
