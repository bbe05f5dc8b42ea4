"""States that are shared out to processes with the same parameters: each steps its part, and all of them come
to what one process comes to.
"""

import copy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import optimisers as opt
from tests.processes import found_by, ran_once

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file of a POSIX system")

SHAPES = {
    "rows": (12, 6),
    "uneven": (5, 3),
    "long": (1, 9),
    "kernel": (2, 3, 4, 4),
    "vector": (7,),
    "number": (),
}
"""Some have no row for every process."""

STEPS = 4

BY_ELEMENT: dict[str, opt.Rule] = {
    "element by element": opt.AdamW(opt.Cosine(0.01, 9, warmup=2), lam=0.1),
    "every second": opt.Chain(opt.AccumGrad(2), opt.SGD(0.1, 0.9)),
    "masters": opt.MixedPrecision(opt.AdamW(0.01)),
}
RULES: dict[str, Any] = BY_ELEMENT | {
    "a norm over all": opt.EMA(opt.Chain(opt.ClipGlobalNorm(0.5), opt.Adam(0.01))),
    "norms of arrays": opt.LAMB(0.01),
    "matrices": {opt.matrices: opt.Muon(0.02), "**": opt.AdamW(0.01)},
}


def parameters(name: str = "") -> dict[str, Any]:
    """An array of every shape."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "masters" else torch.float32
    found = {k: torch.nn.Parameter(torch.randn(s, dtype=dtype)) for k, s in SHAPES.items()}
    found["kernel"].data = found["kernel"].data.to(memory_format=torch.channels_last)
    return found


def give(held: dict[str, Any], n: int) -> None:
    """Gradients of step `n`, the same for all processes; now and then there is none."""
    torch.manual_seed(n + 1)
    for p in held.values():
        p.grad = torch.randn(p.shape).to(p.dtype)
    if n == 1:
        held["rows"].grad = None


def stepped(optimizer: Any, held: dict[str, Any], first: int = 0, steps: int = STEPS) -> dict[str, Any]:
    for n in range(first, first + steps):
        give(held, n)
        optimizer.step()
    return {k: p.detach().clone() for k, p in held.items()}


def shared(name: str, held: dict[str, Any]) -> opt.TorchOptimizer:
    return opt.TorchOptimizer(list(held.items()), RULES[name], shard=dist.group.WORLD)


def alone(name: str) -> dict[str, Any]:
    """What one process comes to."""
    held = parameters(name)
    return stepped(opt.TorchOptimizer(list(held.items()), RULES[name]), held)


# -- what the processes do -----------------------------------------------------------------------------------


def trained(name: str) -> dict[str, Any]:
    held = parameters(name)
    optimizer = shared(name, held)
    found = stepped(optimizer, held)
    arrays = [v for e in optimizer.state.values() for k, v in e.items() if k != "step" and v.ndim]
    here, all_ = (sum(a.nbytes for a in some) for some in ([a.to_local() for a in arrays], arrays))
    return found | {"bytes here": here, "bytes": all_}


def averages() -> dict[str, Any]:
    held = parameters()
    optimizer = shared("a norm over all", held)
    stepped(optimizer, held)
    with opt.averaged_(optimizer):
        inside = {f"inside {k}": p.detach().clone() for k, p in held.items()}
    return {k: p.detach() for k, p in opt.averaged(optimizer).items()} | inside


def edited() -> dict[str, Any]:
    """Frozen, adjusted, written and taken out."""
    held = parameters()
    optimizer = opt.TorchOptimizer(list(held.items()), opt.Momentum(0.1), shard=dist.group.WORLD)
    stepped(optimizer, held, 0, 1)
    opt.freeze_(optimizer.tree["uneven"])
    opt.adjust_(optimizer.tree["long"], 0.5)
    optimizer.state[held["rows"]]["v"].zero_()
    optimizer.param_groups[0]["momentum"] = 0.5
    return stepped(optimizer, held, 2, 2)


def whole_of(entries: dict[str, Any]) -> dict[str, Any]:
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in entries.items()}


def continued() -> dict[str, Any]:
    """Two more steps by what a state was saved as, whole and in parts, shared and alone."""
    held = parameters()
    optimizer = shared("a norm over all", held)
    stepped(optimizer, held, 0, 2)
    parts = optimizer.state_dict()
    whole = parts | {"state": {n: whole_of(entries) for n, entries in parts["state"].items()}}
    found: dict[str, Any] = {}
    optimizer.consolidate_state_dict(to=1)
    alone = optimizer.state_dict()
    assert all(type(v) is torch.Tensor for e in alone["state"].values() for v in e.values()) == (
        dist.get_rank() == 1
    )
    sent = [alone]
    dist.broadcast_object_list(sent, src=1)
    for kind, saved in (("parts", parts), ("whole", whole), ("consolidated", sent[0])):
        for group in (dist.group.WORLD, None):
            own = {k: torch.nn.Parameter(p.detach().clone()) for k, p in held.items()}
            again = opt.TorchOptimizer(list(own.items()), RULES["a norm over all"], shard=group)
            again.load_state_dict(saved)
            new = stepped(again, own, 2, 2)
            found |= {f"{kind} {'alone' if group is None else 'shared'} {k}": x for k, x in new.items()}
    return found


class Net(torch.nn.Module):
    """Small, with a weight that is tied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (
            torch.nn.Linear(6, 9),
            torch.nn.Linear(9, 9),
            torch.nn.Linear(9, 6, bias=False),
        )
        self.c.weight = torch.nn.Parameter(self.a.weight.detach().T.contiguous())

    def forward(self, x: Any) -> Any:
        return self.c(self.b(self.a(x).tanh()).tanh())


def batches(rank: int = 0, count: int = 1) -> list[Any]:
    torch.manual_seed(1)
    return [torch.randn(8, 6)[rank::count] for _ in range(STEPS)]


def fitted(net: Any, optimizer: Any, data: list[Any], module: Any = None) -> dict[str, Any]:
    for x in data:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    weights = {k: p.detach() for k, p in (module or net).named_parameters()}
    return {k: p.full_tensor() if hasattr(p, "full_tensor") else p for k, p in weights.items()}


RULE = opt.Chain(opt.ClipNorm(0.1), opt.AdamW(0.01, lam=0.1))


def in_data_parallel(how: str) -> dict[str, Any]:
    """A module in DistributedDataParallel, or in shards of FSDP2."""
    world, net = dist.group.WORLD, Net()
    data = batches(dist.get_rank(), dist.get_world_size())
    if how == "fsdp, in backward":
        fully_shard(net.b)
        fully_shard(net)
        return fitted(net, opt.step_in_backward(net, RULE), data)
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True)
    if how == "zero of torch":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of its own parts

        optimizer: Any = ZeroRedundancyOptimizer(net.parameters(), opt.TorchOptimizer, rule=RULE)
    else:
        optimizer = opt.TorchOptimizer(ddp, RULE, shard=world)
    found = fitted(ddp, optimizer, data, net)
    if how == "checkpoint":
        whole = StateDictOptions(full_state_dict=True)
        saved: Any = get_optimizer_state_dict(ddp, optimizer, options=whole)
        parts: Any = get_optimizer_state_dict(ddp, optimizer)
        assert type(parts["state"]["a.weight"]["1.m"]).__name__ == "DTensor"
        for kept, options in ((saved, whole), (parts, None)):
            again = opt.TorchOptimizer(ddp, RULE, shard=world)
            again.zero_grad()
            set_optimizer_state_dict(ddp, again, kept, options=options)
            other: Any = get_optimizer_state_dict(ddp, again, options=whole)
            assert torch.equal(other["state"]["b.bias"]["1.v"], saved["state"]["b.bias"]["1.v"])
        found = {k: e["1.m"] for k, e in saved["state"].items()}
    return found


def refused(folder: Path) -> dict[str, Any]:
    """What every process says."""
    world, rank = dist.group.WORLD, dist.get_rank()
    held = parameters()
    optimizer = shared("element by element", held)
    before = stepped(optimizer, held, 0, 1)
    state = optimizer.state[held["vector"]]["m"].full_tensor().clone()

    def without_a_gradient() -> None:
        give(held, 0)
        held["uneven"].grad = None if rank == 0 else held["uneven"].grad
        optimizer.step()

    def at_other_rates() -> None:
        give(held, 0)
        optimizer.param_groups[0]["weight_decay"] = 0.1 * rank
        optimizer.step()

    def of_another() -> None:
        file = folder / "saved"
        if rank == 1:
            torch.save(optimizer.state_dict(), file)
        dist.barrier()
        saved = torch.load(file, weights_only=False)
        again = parameters()
        other = shared("element by element", again)
        stepped(other, again, 0, 1)
        other.load_state_dict(saved)
        raise opt.BadState("this is its own part")

    spread = torch.nn.Parameter(
        distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    )

    def of_parts() -> None:
        spread.grad = torch.ones_like(spread)
        opt.TorchOptimizer([spread], opt.Adam(), shard=world).step()

    def wrapped_after() -> None:
        net = Net()
        opt.step_in_backward(net, opt.Adam())
        DistributedDataParallel(net)(torch.ones(2, 6))

    wrong: dict[str, Callable[[], object]] = {
        "gradient": without_a_gradient,
        "settings": at_other_rates,
        "parts": of_parts,
        "no group": lambda: opt.TorchOptimizer(held.values(), opt.Adam(), shard=2),
        "capturable": lambda: opt.TorchOptimizer(held.values(), opt.Adam(), shard=world, capturable=True),
        "in backward": lambda: opt.step_in_backward(held.values(), opt.Adam(), shard=world),
        "of another": of_another,
        "copied": lambda: copy.deepcopy(optimizer),
        "wrapped": lambda: opt.step_in_backward(DistributedDataParallel(Net()), opt.Adam()),
        "wrapped after": wrapped_after,
    }
    said: dict[str, Any] = {}
    for name, run in wrong.items():
        try:
            run()
        except opt.OptimiserError as error:
            said[name] = f"{type(error).__name__}: {error}"
    assert all(torch.equal(p, before[k]) for k, p in held.items())
    assert torch.equal(optimizer.state[held["vector"]]["m"].full_tensor(), state)
    return said


WAYS = ("zero", "zero of torch", "checkpoint", "fsdp, in backward")

RUNS: dict[int, dict[str, Callable[[], dict[str, Any]]]] = {
    2: {
        **{name: lambda n=name: trained(n) for name in RULES},
        **{way: lambda w=way: in_data_parallel(w) for way in WAYS},
        "averages": averages,
        "edited": edited,
        "continued": continued,
        "refused": dict,
    },
    4: {name: lambda n=name: trained(n) for name in ("element by element", "a norm over all")},
}


def one_of(count: int, rank: int, folder: Path) -> None:
    """Run all of them as one of the processes; what goes wrong is kept as text."""
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    for name, run in RUNS[count].items():
        try:
            result: Any = refused(folder) if name == "refused" else run()
        except Exception:  # noqa: BLE001 the test of this part shows it
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Where so many processes wrote what they found."""
    return lambda count: ran_once(tmp_path_factory, "tests.torch.test_shares", 200, ranks=count)


def agreed(folder: Path, name: str, count: int = 2) -> dict[str, Any]:
    """What a run gave, which must be the same on all processes."""
    first, *others = (found_by(rank, name, folder) for rank in range(count))
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(x, other[k]) for k, x in first.items() if torch.is_tensor(x))
    return first


def same(found: dict[str, Any], wanted: dict[str, Any], within: float = 3e-6) -> None:
    for k, x in wanted.items():
        assert torch.allclose(found[k], x, rtol=within, atol=within), k


# -- what must be true ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_two_processes_come_to_what_one_comes_to(name: str, folder: Any) -> None:
    found, wanted = agreed(folder(2), name), alone(name)

    same(found, wanted, 0 if name in BY_ELEMENT else 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS[4])
def test_four_come_to_the_same_and_each_keeps_a_quarter_of_the_state(name: str, folder: Any) -> None:
    each = [found_by(rank, name, folder(4)) for rank in range(4)]

    same(agreed(folder(4), name, 4), alone(name), 0 if name in BY_ELEMENT else 3e-6)
    # rows in even parts are a half of all; of the rest some has fewer rows than there are processes
    assert sum(found["bytes here"] for found in each) == each[0]["bytes"]
    assert max(found["bytes here"] for found in each) < 0.33 * each[0]["bytes"]


@pytest.mark.slow
def test_averages_are_whole(folder: Any) -> None:
    held = parameters()
    optimizer = opt.TorchOptimizer(list(held.items()), RULES["a norm over all"])
    stepped(optimizer, held)
    wanted = {k: p.detach() for k, p in opt.averaged(optimizer).items()}

    found = agreed(folder(2), "averages")
    same(found, wanted)
    same({k: found[f"inside {k}"] for k in SHAPES}, wanted)


@pytest.mark.slow
def test_edits_count(folder: Any) -> None:
    x = {k: p.detach().double() for k, p in parameters().items()}
    v = {k: torch.zeros_like(p) for k, p in x.items()}
    for n in (0, 2, 3):
        held = parameters()
        give(held, n)
        for k, p in held.items():
            rate = 0.5 if k == "long" and n else 0.1
            if n == 0 or k != "uneven":
                before = 0 if k == "rows" and n == 2 else v[k]
                v[k] = (0.5 if n else 0.9) * before + rate * p.grad.double()
                x[k] -= v[k]

    same(agreed(folder(2), "edited"), {k: p.float() for k, p in x.items()})


@pytest.mark.slow
def test_saved_states_go_on_shared_and_alone(folder: Any) -> None:
    found, wanted = agreed(folder(2), "continued"), alone("a norm over all")

    for kind in (
        f"{kind} {how}" for kind in ("parts", "whole", "consolidated") for how in ("shared", "alone")
    ):
        same({k: found[f"{kind} {k}"] for k in SHAPES}, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_data_parallel_modules_go_the_way_of_one_with_the_whole_batch(way: str, folder: Any) -> None:
    net = Net()
    optimizer = opt.TorchOptimizer(net, RULE)
    wanted = fitted(net, optimizer, batches())
    if way == "checkpoint":
        wanted = {k: optimizer.state[p]["1.m"] for k, p in net.named_parameters()}

    same(agreed(folder(2), way), wanted)


@pytest.mark.slow
def test_what_does_not_fit_is_named_on_every_process_and_changes_nothing(folder: Any) -> None:
    late = (
        "BadState: a DistributedDataParallel averages gradients after they were stepped in backward, and "
        "keeps them all; take TorchOptimizer(module, rule, shard=group) with it, or step_in_backward with "
        "FSDP2"
    )

    said = found_by(0, "refused", folder(2))
    assert found_by(1, "refused", folder(2)) == said | {"of another": "BadState: this is its own part"}
    assert said == {
        "gradient": "BadState: processes disagree: grads['uneven'] is stepped on some of them only; a "
        "parameter has a gradient on all of them or on none",
        "settings": "BadState: processes disagree: the settings or counters of their states differ; set "
        "and load the same on all of them",
        "parts": "BadSetting: shard= was given with a parameter of shape (4, 2) that is a DTensor: its state "
        "is spread as it is; leave shard out",
        "no group": "BadSetting: TorchOptimizer was given shard=2; it takes a group of processes: write "
        "shard=torch.distributed.group.WORLD",
        "capturable": "BadSetting: a graph of a device holds no collectives: leave capturable or shard out",
        "in backward": "BadSetting: shard= shares out whole steps; leave it out of step_in_backward",
        "of another": "BadState: this is the part that process (1,) has saved of an array, and process (0,) "
        "loads it; save with torch.distributed.checkpoint, or call consolidate_state_dict() on all processes "
        "before one saves state_dict()",
        "copied": "BadState: a state that is shared out to processes was copied or pickled; save its "
        "state_dict()",
        "wrapped": late,
        "wrapped after": late,
    }


if __name__ == "__main__":
    one_of(int(sys.argv[3]), int(sys.argv[1]), Path(sys.argv[2]))
