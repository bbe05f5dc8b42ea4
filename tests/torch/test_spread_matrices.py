"""Matrices that are spread over processes: one computes with each, and all go the way of the whole."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import optimisers as opt
from tests.processes import found_by, ran_once

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file of a POSIX system")

STEPS = 3

LONG = ((6, 4), (6, 4), (5, 7), (1, 3), (4, 2, 3))
SQUARE = ((5, 5), (5, 5), (1, 1), (8, 8))
"""Both products of a square matrix and its transpose have an inverse, so that rounding is not magnified."""

RULES: dict[str, tuple[opt.Rule | dict[Any, opt.Rule], tuple[tuple[int, ...], ...]]] = {
    "orthogonal": (opt.Muon(0.02), LONG),
    "rows of equal length": (opt.NorMuon(0.02), LONG),
    "clipped before": (opt.Chain(opt.ClipGlobalNorm(0.5), opt.Muon(0.02)), LONG),
    "clipped behind": (opt.EMA(opt.Chain(opt.Muon(1.0), opt.ClipNorm(0.1))), LONG),
    "sums of rows": (opt.Adafactor(0.01), LONG),
    "eigenvectors": (opt.SOAP(0.01), SQUARE),
    "roots": (opt.Shampoo(0.01, every=2), SQUARE),
    "eigenvectors now and then": (opt.SPlus(0.01), SQUARE),
    "noise": (opt.Kron(0.01), LONG),
    "low rank": (opt.Dion(0.02, rank=2), SQUARE),
    "sums of rows, twice": (opt.CAME(0.01), LONG),
    "largest of rows": (opt.SM3(0.1), LONG),
    "one number each": (opt.NovoGrad(0.01), LONG),
    "masters": (opt.MixedPrecision(opt.Muon(0.02)), LONG),
}
TYPES = {"masters": torch.bfloat16}

OF_TWO = [
    *((name, "in place") for name in RULES),
    *((name, "anew") for name in ("rows of equal length", "roots", "noise")),
    *((name, "interpreted") for name in ("clipped before", "sums of rows")),
]
OF_FOUR = [
    *((name, "in place") for name in ("clipped before", "eigenvectors", "sums of rows, twice", "noise")),
    ("sums of rows", "interpreted"),
]
"""The ways that differ in what is sent, over meshes of two axes too."""
WAYS = {2: OF_TWO, 4: OF_FOUR}

Arrays = dict[str, Any]


def places(count: int) -> dict[str, tuple[Any, list[Any]]]:
    """Ways to spread an array over so many processes."""
    line = init_device_mesh("cpu", (count,))
    found: dict[str, tuple[Any, list[Any]]] = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
    }
    if count == 4:
        two = init_device_mesh("cpu", (2, 2))
        found["copies of rows"] = two, [Replicate(), Shard(0)]
        found["both"] = two, [Shard(0), Shard(1)]
        found["rows of rows"] = two, [Shard(0), Shard(0)]
    return found


def drawn(seed: int, shapes: tuple[tuple[int, ...], ...], count: int, dtype: torch.dtype) -> Arrays:
    """An array of every shape for every way to spread it."""
    torch.manual_seed(seed)
    ways = ("rows", "columns", "copies", "copies of rows", "both", "rows of rows")[: 6 if count == 4 else 3]
    return {f"{way} {i}": torch.randn(s).to(dtype) for way in ways for i, s in enumerate(shapes)}


def whole(arrays: Arrays) -> Arrays:
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in arrays.items()}


class World:
    """One of some processes."""

    def __init__(self, count: int) -> None:
        self.count, self.places = count, places(count)

    def spread(self, arrays: Arrays) -> Arrays:
        return {
            k: distribute_tensor(x, *self.places[k.rsplit(" ", 1)[0]], src_data_rank=None)
            for k, x in arrays.items()
        }

    def drawn(self, seed: int, shapes: Any = LONG, dtype: torch.dtype = torch.float32) -> Arrays:
        return self.spread(drawn(seed, shapes, self.count, dtype))


def trained(world: World, name: str, form: str) -> Arrays:
    """The parameters and the state after some steps."""
    rule, shapes = RULES[name]
    dtype, step = TYPES.get(name, torch.float64), opt.update if form == "anew" else opt.update_
    model = world.drawn(0, shapes, dtype)
    state = opt.setup(rule, model, engine="interpret" if form == "interpreted" else None)
    random = name in ("noise", "low rank")  # of which kernels know the numbers of elements in a row alone
    wanted = {"interpret"} if form == "interpreted" else {"numba", *(["interpret"] if random else [])}
    groups = opt.explain(state).groups
    assert {g.engine for g in groups} == wanted
    assert all(g.gathered == (g.engine == "interpret") for g in groups)
    for n in range(STEPS):
        state, model = step(state, model, world.drawn(n + 1, shapes, dtype))
    assert all(isinstance(x, DTensor) for x in model.values())
    held = {k: v for k, v in opt.arrays(state).items() if isinstance(v, torch.Tensor)}
    if world.count == 2 and name == "roots":
        kinds = [v for k, v in held.items() if k.startswith("rows 0/") and isinstance(v, DTensor)]
        assert len(kinds) == 6
        assert all(v.placements == (Shard(0),) for v in kinds)
    return whole(model) | {f"state {k}": v for k, v in whole(held).items()}


def measured(world: World) -> Arrays:
    """Bytes that a step sends, counted where they are sent, beside those of `explain`."""
    real, sent = dist.all_to_all_single, 0

    def counting(out: Any, given: Any, received: Any, sizes: Any, **more: Any) -> Any:
        nonlocal sent
        sent += given.itemsize * (sum(sizes) - sizes[dist.get_rank()])
        return real(out, given, received, sizes, **more)

    found: Arrays = {}
    for name in dict.fromkeys(name for name, _ in WAYS[world.count]):
        rule, shapes = RULES[name]
        model = world.drawn(0, shapes)
        state = opt.setup(rule, model)
        dist.all_to_all_single, sent = counting, 0
        try:
            state, model = opt.update_(state, model, world.drawn(1, shapes))
        finally:
            dist.all_to_all_single = real
        groups = opt.explain(state).groups
        assert all((f"sends {g.sent:,} bytes" in str(opt.explain(state))) == bool(g.sent) for g in groups)
        found[name] = torch.tensor([sent, sum(g.sent for g in groups)])
    return found


def continued(world: World) -> Arrays:
    """The parameters after one more step by states that were saved and loaded, spread and whole."""
    rule = opt.SOAP(0.01)
    model = world.drawn(0, SQUARE, torch.float64)
    state, model = opt.update_(opt.setup(rule, model), model, world.drawn(1, SQUARE, torch.float64))
    saved = opt.arrays(state)
    states = {
        "itself": state,
        "saved": opt.from_arrays(opt.setup(rule, model), saved),
        "whole": opt.from_arrays(opt.setup(rule, model), whole(saved)),
    }
    grads = world.drawn(2, SQUARE, torch.float64)
    return {
        f"{n} {k}": x for n, s in states.items() for k, x in whole(opt.update(s, model, grads)[1]).items()
    }


def refused(world: World) -> Arrays:
    """What is said where processes have gradients of different matrices."""
    model = world.drawn(0)
    state, before = opt.setup(opt.Muon(0.02), model), whole(model)
    grads: Arrays = world.drawn(1)
    if dist.get_rank() == 0:
        grads["rows 2"] = None
    try:
        opt.update_(state, model, grads)
    except opt.BadState as error:
        assert all(torch.equal(x, before[k]) for k, x in whole(model).items())
        return {"said": str(error)}
    return {}


def runs(count: int) -> dict[str, Callable[[World], Arrays]]:
    """What so many processes do."""
    return {
        **{f"{name}, {form}": lambda w, n=name, f=form: trained(w, n, f) for name, form in WAYS[count]},
        "measured": measured,
        "continued": continued,
        "refused": refused,
    }


def one_of(rank: int, folder: Path, count: int) -> None:
    """Run all of them as one of the processes; what goes wrong is kept as text."""
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    torch.set_num_threads(1)
    world = World(count)
    for name, run in runs(count).items():
        try:
            result: Any = run(world)
        except Exception:  # noqa: BLE001 the test of this part shows it
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}")
    dist.destroy_process_group()


Ran = tuple[int, Path]
"""How many processes ran, and where they wrote what they found."""


@pytest.fixture(scope="module")
def ran_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ran]:
    """So many processes."""
    return lambda count: (
        count,
        ran_once(tmp_path_factory, "tests.torch.test_spread_matrices", 400, ranks=count),
    )


@pytest.fixture(params=[2, 4])
def ran(request: pytest.FixtureRequest, ran_by: Callable[[int], Ran]) -> Ran:
    return ran_by(request.param)


def agreed(ran: tuple[int, Path], name: str) -> Arrays:
    """What a run gave, which must be the same on all processes."""
    first, *others = (found_by(rank, name, ran[1]) for rank in range(ran[0]))
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[k], other[k]) if torch.is_tensor(first[k]) else True for k in first)
    return first


def alone(name: str, count: int) -> Arrays:
    """The parameters and the state after the same steps of whole arrays in one process."""
    rule, shapes = RULES[name]
    dtype = TYPES.get(name, torch.float64)
    model = drawn(0, shapes, count, dtype)
    state = opt.setup(rule, model)
    for n in range(STEPS):
        state, model = opt.update(state, model, drawn(n + 1, shapes, count, dtype))
    held = {f"state {k}": v for k, v in opt.arrays(state).items() if isinstance(v, torch.Tensor)}
    return model | held


# one of the processes runs them all, which takes the time; what is slow is marked so as a whole
@pytest.mark.slow
@pytest.mark.parametrize(("count", "name", "form"), [(n, *way) for n, ways in WAYS.items() for way in ways])
def test_each_matrix_goes_the_way_of_the_whole(
    count: int, name: str, form: str, ran_by: Callable[[int], Ran]
) -> None:
    found, wanted = agreed(ran_by(count), f"{name}, {form}"), alone(name, count)

    assert found.keys() == wanted.keys()
    within = 8e-3 if name == "masters" else 1e-9
    for k, x in wanted.items():
        assert torch.allclose(found[k].double(), x.double(), rtol=within, atol=within), k


@pytest.mark.slow
def test_explain_counts_the_bytes_that_are_sent(ran: Ran) -> None:
    for rank in range(ran[0]):
        for name, (sent, said) in found_by(rank, "measured", ran[1]).items():
            assert sent == said, name
            assert (said > 0) == (name != "one number each")


@pytest.mark.slow
def test_saved_factors_go_on_alike(ran: Ran) -> None:
    found = agreed(ran, "continued")

    for k in (k for k in found if k.startswith("itself ")):
        for other in ("saved", "whole"):
            assert torch.equal(found[k], found[k.replace("itself", other)]), k


@pytest.mark.slow
def test_processes_that_disagree_are_told(ran: Ran) -> None:
    assert agreed(ran, "refused")["said"] == (
        f"processes disagree: grads['rows 2'] is there on {ran[0] - 1} of {ran[0]}; a parameter has a "
        "gradient on all of them or on none"
    )


if __name__ == "__main__":
    one_of(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
