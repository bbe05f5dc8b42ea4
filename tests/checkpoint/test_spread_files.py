"""Are arrays that are spread over processes one checkpoint: saved by two, taken by one, and by four?"""

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import optimisers as opt
from tests.processes import found_by, ran_once

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file of a POSIX system"),
    pytest.mark.slow,
]

SHAPES = {"even": (4, 6), "uneven": (5, 3), "short": (1,), "columns": (6, 8), "plain": (6,)}

RULES: dict[str, Any] = {
    "scheduled": opt.AdamW(opt.Cosine(0.1, 9, warmup=2), lam=0.1),
    "rows of scalars": opt.Chain(opt.ClipGlobalNorm(0.5), opt.Prodigy()),
    "stacked matrices": {opt.matrices: opt.Muon(0.02), "**": opt.AdamW(0.01)},
    "masters": opt.MixedPrecision(opt.AdamW(0.01)),
    "averages": opt.EMA(opt.Momentum(0.1)),
}

TYPES = {"masters": torch.bfloat16}

FIRST, SECOND, LAST = range(1, 4), range(4, 6), range(6, 8)
"""The steps of two processes, of one, and of four."""


def drawn(seed: int, name: str) -> dict[str, Any]:
    torch.manual_seed(seed)
    dtype = TYPES.get(name, torch.float32)
    return {k: torch.randn(s, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}


Place = tuple[DeviceMesh, dict[str, list[Placement]]] | None


def spread(arrays: dict[str, Any], place: Place) -> dict[str, Any]:
    if place is None:
        return arrays
    mesh, how = place
    return {k: distribute_tensor(x, mesh, how[k]) if k in how else x.clone() for k, x in arrays.items()}


def whole(arrays: dict[str, Any]) -> dict[str, Any]:
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in arrays.items()}


def stepped(state: Any, model: Any, place: Place, name: str, seeds: range) -> tuple[Any, Any]:
    for seed in seeds:
        state, model = opt.update_(state, model, spread(drawn(seed, name), place))
    return state, model


def of_two(mesh: DeviceMesh) -> Place:
    ways: dict[str, list[Placement]] = {key: [Shard(0)] for key in ("even", "uneven", "short")}
    return mesh, ways | {"columns": [Shard(1)]}


def of_four(mesh: DeviceMesh) -> Place:
    """Other axes are cut, and over a grid of processes."""
    ways: dict[str, list[Placement]] = {
        "even": [Shard(1), Replicate()],
        "uneven": [Replicate(), Shard(0)],
        "columns": [Shard(0), Shard(1)],
        "plain": [Shard(0), Shard(0)],
    }
    return mesh, ways


def moved(rank: int, folder: Path, two: DeviceMesh, grid: DeviceMesh) -> dict[str, Any]:
    """The parameters after steps of two processes, of one and of four, each of which goes on from a file."""
    found: dict[str, Any] = {}
    for name, rule in RULES.items():
        if rank < 2:
            place = of_two(two)
            model = spread(drawn(0, name), place)
            state, model = stepped(opt.setup(rule, model), model, place, name, FIRST)
            opt.save(folder / f"{name} of two", state, model, step=3)
            same(whole(opt.arrays(state, model)), taken(folder / f"{name} of two"))
        if rank == 0:
            model = drawn(9, name)
            state, model = opt.load(folder / f"{name} of two", opt.setup(rule, model), model)
            state, model = stepped(state, model, None, name, SECOND)
            opt.save(folder / f"{name} of one", state, model)
        torch.distributed.barrier()
        place = of_four(grid)
        model = spread(drawn(9, name), place)
        state, model = opt.load(folder / f"{name} of one", opt.setup(rule, model), model)
        same(whole(opt.arrays(state, model)), taken(folder / f"{name} of one"))
        _, model = stepped(state, model, place, name, LAST)
        found |= {f"{name} {k}": x for k, x in whole(model).items()}
    return found


def taken(file: Path) -> dict[str, Any]:
    """All that is in a file, by the loader of safetensors."""
    from safetensors.torch import load_file

    return load_file(file)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for k, x in wanted.items():
        assert torch.equal(found[k], x), k


def said_by(run: Callable[[], object]) -> str:
    try:
        run()
    except (opt.OptimiserError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def failed(rank: int, folder: Path, two: DeviceMesh, grid: DeviceMesh) -> dict[str, Any]:
    """What each of two processes says where one of them cannot go on; the next save is one of both."""
    del grid
    if rank > 1:
        return {}
    place, rule = of_two(two), RULES["scheduled"]
    model = spread(drawn(0, "scheduled"), place)
    state: Any = opt.setup(rule, model)
    file, own = folder / "run", folder / f"run of {rank}"
    opt.save(file, state, model)
    torch.distributed.barrier(two.get_group())
    own.write_bytes(file.read_bytes()[: -3 * rank or None])
    absent = {"save": folder / "absent" / "run", "load": file if rank == 0 else folder / "absent"}
    found = {
        "absent": said_by(lambda: opt.save(absent["save"], state, model)),
        "other": said_by(lambda: opt.save(file, state, model | ({"more": torch.ones(2)} if rank else {}))),
        "nowhere": said_by(lambda: opt.load(absent["load"], state, model)),
    }
    before = whole(opt.arrays(state, model))
    other = spread(drawn(5, "scheduled"), place)
    fresh: Any = opt.setup(rule, other)
    found["damaged"] = said_by(lambda: opt.load(own, fresh, other))
    same(whole(other), drawn(5, "scheduled"))
    opt.load(file, fresh, other)
    same(whole(opt.arrays(fresh, other)), before)
    kept = opt.Checkpoints(folder / "kept", keep=1)
    kept.save(1, state, model)
    kept.save(2, state, model, seen=[1, 2])
    resumed = kept.resume(fresh, other)
    assert (resumed.step, resumed.more, list(kept.files)) == (2, {"seen": [1, 2]}, [2])
    return found


def given_otherwise(rank: int, folder: Path, two: DeviceMesh, grid: DeviceMesh) -> dict[str, Any]:
    """A state from arrays that are spread another way over the same grid, with parts of the same shape."""
    del rank, folder, two
    x = torch.arange(16.0).reshape(4, 4)
    ways: list[list[Placement]] = [[Shard(0), Replicate()], [Replicate(), Shard(0)]]
    models = [{"w": distribute_tensor(x, grid, way)} for way in ways]
    first, second = (opt.setup(opt.Momentum(), model) for model in models)
    first, _ = opt.update(first, models[0], models[0])
    second = opt.from_arrays(second, opt.arrays(first))
    return {"found": whole(opt.arrays(second))["w/v"], "wanted": whole(opt.arrays(first))["w/v"]}


# -- torch.distributed.checkpoint ----------------------------------------------------------------------------


def network(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4, bias=False)
    return torch.nn.Sequential(*layers).to(TYPES.get(name, torch.float32))


def trained(net: Any, optimizer: Any, name: str, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        x = torch.randn(16, 6).to(TYPES.get(name, torch.float32))
        optimizer.zero_grad()
        net(x).pow(2).mean().backward()
        optimizer.step()


def in_shards(name: str, seed: int, mesh: DeviceMesh) -> Any:
    from torch.distributed.fsdp import fully_shard

    net = network(name, seed)
    for part in (net[0], net[2], net):
        fully_shard(part, mesh=mesh)
    return net


def put_away(net: Any, optimizer: Any, file: Path, **how: Any) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as dcp

    held = dict(zip("mo", dcp.get_state_dict(net, optimizer), strict=True))
    checkpoint.save(held, checkpoint_id=file, **how)


def gone_on(net: Any, rule: Any, file: Path, shard: Any = None, **how: Any) -> Any:
    """An optimiser that goes on from a folder of torch.distributed.checkpoint, with its model."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as dcp

    optimizer = opt.TorchOptimizer(net, rule, shard=shard)
    held = dict(zip("mo", dcp.get_state_dict(net, optimizer), strict=True))
    checkpoint.load(held, checkpoint_id=file, **how)
    dcp.set_state_dict(net, optimizer, model_state_dict=held["m"], optim_state_dict=held["o"])
    return optimizer


def of_torch(rank: int, folder: Path, two: DeviceMesh, grid: DeviceMesh) -> dict[str, Any]:
    """The same by FSDP2 and torch.distributed.checkpoint: of two, of one, of four, and of four under DDP."""
    del grid
    four, found = DeviceMesh("cpu", [0, 1, 2, 3]), dict[str, Any]()
    for name, rule in RULES.items():
        first, second = folder / f"{name} by two", folder / f"{name} by one"
        if rank < 2:
            net = in_shards(name, 0, two)
            optimizer = opt.TorchOptimizer(net, rule)
            trained(net, optimizer, name, FIRST)
            put_away(net, optimizer, first, process_group=two.get_group())
            opt.save(folder / f"{name} of FSDP2", optimizer, net)
        if rank == 0:
            net = network(name, 9)
            optimizer = gone_on(net, rule, first, no_dist=True)
            trained(net, optimizer, name, SECOND)
            put_away(net, optimizer, second, no_dist=True)
        torch.distributed.barrier()
        net = in_shards(name, 9, four)
        trained(net, gone_on(net, rule, second), name, LAST)
        found |= {f"{name} {k}": x for k, x in whole(net.state_dict()).items()}
        net = in_shards(name, 9, four)
        optimizer, _ = opt.load(folder / f"{name} of FSDP2", opt.TorchOptimizer(net, rule), net)
        trained(net, optimizer, name, range(SECOND.start, LAST.stop))
        found |= {f"{name} by save {k}": x for k, x in whole(net.state_dict()).items()}
        net = torch.nn.parallel.DistributedDataParallel(network(name, 9))
        optimizer = gone_on(net, rule, first)
        trained(net, optimizer, name, range(SECOND.start, LAST.stop))
        found |= {f"{name} under DDP {k}": x for k, x in net.module.state_dict().items()}
    return found


def of_shares(rank: int, folder: Path, two: DeviceMesh, grid: DeviceMesh) -> dict[str, Any]:
    """The same under DDP where each process keeps its part of the state: of two, of one, and of four."""
    del grid
    found: dict[str, Any] = {}
    for name, rule in RULES.items():
        files = {way: [folder / f"{name} {way} {n}" for n in (2, 1)] for way in ("by torch", "by save")}
        if rank < 2:
            group = two.get_group()
            net = torch.nn.parallel.DistributedDataParallel(network(name, 0), process_group=group)
            optimizer = opt.TorchOptimizer(net, rule, shard=group)
            trained(net, optimizer, name, FIRST)
            put_away(net, optimizer, files["by torch"][0], process_group=group)
            opt.save(files["by save"][0], optimizer, net.module)
        if rank == 0:
            net = network(name, 9)
            optimizer = gone_on(net, rule, files["by torch"][0], no_dist=True)
            trained(net, optimizer, name, SECOND)
            put_away(net, optimizer, files["by torch"][1], no_dist=True)
            net = network(name, 9)
            optimizer, _ = opt.load(files["by save"][0], opt.TorchOptimizer(net, rule), net)
            trained(net, optimizer, name, SECOND)
            opt.save(files["by save"][1], optimizer, net)
        torch.distributed.barrier()
        world = torch.distributed.group.WORLD
        for way, (_, file) in files.items():
            net = torch.nn.parallel.DistributedDataParallel(network(name, 9))
            if way == "by torch":
                optimizer = gone_on(net, rule, file, shard=world)
            else:
                optimizer = opt.TorchOptimizer(net, rule, shard=world)
                opt.load(file, optimizer, net.module)
            trained(net, optimizer, name, LAST)
            assert any(isinstance(x, DTensor) for e in optimizer.state.values() for x in e.values())
            found |= {f"{name} {way} {k}": x for k, x in net.module.state_dict().items()}
    return found


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "moved": moved,
    "of torch": of_torch,
    "of shares": of_shares,
    "failed": failed,
    "given otherwise": given_otherwise,
}


def one_of_four(rank: int, folder: Path) -> None:
    """Run all of them as one of the processes; what goes wrong is kept as text."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=4, timeout=timedelta(seconds=60)
    )
    two, grid = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [[0, 1], [2, 3]])
    for name, run in RUNS.items():
        try:
            result: Any = run(rank, folder, two, grid)
        except Exception:  # noqa: BLE001 the test of this part shows it
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes wrote what they found."""
    return ran_once(tmp_path_factory, "tests.checkpoint.test_spread_files", 200, ranks=4)


def alone(name: str) -> dict[str, Any]:
    """The parameters after all steps of whole arrays in one process, without an interruption."""
    model = drawn(0, name)
    state: Any = opt.setup(RULES[name], model, engine="interpret")
    for seed in (*FIRST, *SECOND, *LAST):
        state, model = opt.update(state, model, drawn(seed, name))
    return model


@pytest.mark.parametrize("name", RULES)
def test_two_save_one_goes_on_and_four_after_it(name: str, folder: Path) -> None:
    near = 2e-2 if name in TYPES else 5e-6
    for rank in range(4):
        found = found_by(rank, "moved", folder)
        for k, x in alone(name).items():
            assert torch.allclose(found[f"{name} {k}"], x, rtol=near, atol=near), k


@pytest.mark.parametrize(
    ("what", "ways"),
    [("of torch", ("", "by save ", "under DDP ")), ("of shares", ("by torch ", "by save "))],
    ids=["each has its part of all", "each has its part of the state only"],
)
@pytest.mark.parametrize("name", RULES)
def test_so_they_do_by_the_checkpoints_of_torch(
    name: str, what: str, ways: tuple[str, ...], folder: Path
) -> None:
    near = 2e-2 if name in TYPES else 1e-5
    net = network(name, 0)
    trained(net, opt.TorchOptimizer(net, RULES[name]), name, range(1, LAST.stop))
    for rank in range(4):
        found = found_by(rank, what, folder)
        for way in ways:
            for k, x in net.state_dict().items():
                assert torch.allclose(found[f"{name} {way}{k}"], x, rtol=near, atol=near), (way, k)


def test_what_goes_wrong_on_one_is_raised_by_all(folder: Path) -> None:
    first, second = (found_by(rank, "failed", folder) for rank in range(2))

    assert first["absent"].startswith("FileNotFoundError")
    assert second["absent"].startswith("BadState: the first of the processes could not write")
    assert first["other"] == second["other"]
    assert first["other"].startswith("BadState: processes disagree about what is saved")
    assert first["nowhere"].startswith("BadFile: another of the processes")
    assert second["nowhere"].startswith("FileNotFoundError")
    assert first["damaged"].startswith("BadFile: another of the processes")
    assert second["damaged"].startswith("BadFile")
    assert "its checksum is that of other bytes" in second["damaged"]


def test_arrays_that_are_spread_otherwise_are_taken_as_wholes(folder: Path) -> None:
    for rank in range(4):
        found = found_by(rank, "given otherwise", folder)
        np.testing.assert_array_equal(found["found"], found["wanted"])


if __name__ == "__main__":
    one_of_four(int(sys.argv[1]), Path(sys.argv[2]))
