"""Parameters that are spread over two processes, each of which steps its parts by compiled kernels."""

import copy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import optimisers as opt
from tests.processes import found_by, ran_once

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file of a POSIX system")

SHAPES = {
    "even": (4, 3),
    "uneven": (5, 3),
    "short": (1, 3),
    "columns": (2, 8),
    "copied": (4, 4),
    "plain": (6,),
}
"""The second process has two of five rows, and none of one."""

STEPS = 4

RULES: dict[str, opt.Rule] = {
    "element by element": opt.AdamW(0.01, lam=0.1),
    "a norm over all": opt.EMA(opt.Chain(opt.ClipGlobalNorm(0.5), opt.Adam(0.01))),
    "norms of arrays": opt.LAMB(0.01),
    "largest elements": opt.Chain(opt.ClipNorm(0.3, p=np.inf), opt.Momentum(0.1)),
    "sums without a rate": opt.Prodigy(),
    "masters": opt.MixedPrecision(opt.Chain(opt.ClipNorm(0.3), opt.AdamW(0.01))),
}
TYPES = {"masters": torch.bfloat16, "largest elements": torch.float64, "norms of arrays": torch.complex64}


def drawn(seed: int, dtype: torch.dtype = torch.float32, size: float = 1) -> dict[str, Any]:
    """An array of every shape."""
    torch.manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return {k: (size * torch.randn(s, dtype=wide)).to(dtype) for k, s in SHAPES.items()}


class World:
    """One of two processes."""

    def __init__(self) -> None:
        line, two = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
        self.places: dict[str, tuple[DeviceMesh, list[Placement]]] = {
            "even": (line, [Shard(0)]),
            "uneven": (line, [Shard(0)]),
            "short": (line, [Shard(0)]),
            "columns": (line, [Shard(1)]),
            "copied": (two, [Replicate(), Shard(0)]),
        }

    def spread(self, arrays: dict[str, Any]) -> dict[str, Any]:
        where = self.places
        return {k: distribute_tensor(x, *where[k]) if k in where else x.clone() for k, x in arrays.items()}


def whole(arrays: dict[str, Any]) -> dict[str, Any]:
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in arrays.items()}


def trained(world: World, name: str, step: Callable[..., Any], engine: str | None = None) -> dict[str, Any]:
    dtype = TYPES.get(name, torch.float32)
    model = world.spread(drawn(0, dtype))
    state = opt.setup(RULES[name], model, engine=engine)
    assert {g.engine for g in opt.explain(state).groups} == {engine or "numba"}
    for n in range(STEPS):
        state, model = step(state, model, world.spread(drawn(n + 1, dtype)))
    assert all(isinstance(model[k], DTensor) for k in world.places)
    return whole(model)


def with_partial_gradients(world: World) -> dict[str, Any]:
    """Gradients that are not summed yet, or lie elsewhere than the parameters."""
    model = world.spread(drawn(0))
    state = opt.setup(RULES["a norm over all"], model)
    for n in range(STEPS):
        given = drawn(n + 1)
        grads = world.spread(given)
        line, _ = world.places["even"]
        grads["even"] = DTensor.from_local(given["even"] / 2, line, [Partial()])
        grads["uneven"] = distribute_tensor(given["uneven"], line, [Replicate()])
        state, model = opt.update_(state, model, grads)
    return whole(model)


def of_extreme_norms(world: World) -> dict[str, Any]:
    """The norms of gradients whose squares overflow and vanish, as the steps to which they are clipped."""
    found: dict[str, Any] = {}
    for size in (1e200, 1e-200):
        model = world.spread(drawn(0, torch.float64))
        rule = opt.Chain(opt.ClipGlobalNorm(size / 100), opt.Descent(1 / size))
        _, new = opt.update(opt.setup(rule, model), model, world.spread(drawn(1, torch.float64, size)))
        found |= {f"{size} {k}": x for k, x in whole(new).items()}
    return found


def continued(world: World) -> dict[str, Any]:
    """The parameters after one more step by the state itself, and by what it was copied and saved to."""
    rule = opt.AdamW(0.01)
    model = world.spread(drawn(0))
    state, model = opt.update_(opt.setup(rule, model), model, world.spread(drawn(1)))
    saved = opt.state_dict(state)
    assert isinstance(saved["even/m"], DTensor)
    states = {
        "itself": state,
        "copied": copy.deepcopy(state),
        "saved": opt.load_state_dict(opt.setup(rule, model), saved),
        "whole": opt.load_state_dict(opt.setup(rule, model), whole(saved)),
    }
    grads = world.spread(drawn(2))
    return {
        f"{name} {k}": x
        for name, s in states.items()
        for k, x in whole(opt.update(s, model, grads)[1]).items()
    }


def edited(world: World) -> dict[str, Any]:
    """What was written into a state, given to it, adjusted and frozen."""
    model = world.spread(drawn(0))
    state, model = opt.update_(opt.setup(opt.Momentum(0.1), model), model, world.spread(drawn(1)))
    state["uneven"].state.v.zero_()
    state["columns"].state = state["columns"].state._replace(v=torch.ones(2, 8))
    opt.adjust_(state["even"], 0.5)
    opt.freeze_(state["copied"])
    state, model = opt.update_(state, model, world.spread(drawn(2)))
    return whole(model)


def differentiated(world: World) -> dict[str, Any]:
    """The slope of a step along its gradients, and a step after it."""
    model = world.spread(drawn(0))
    scale = {k: torch.zeros_like(x).requires_grad_() for k, x in model.items()}
    state, new = opt.update(opt.setup(opt.Momentum(0.1), model), model, scale)
    sum(x.full_tensor().sum() if isinstance(x, DTensor) else x.sum() for x in new.values()).backward()
    state, after = opt.update(state, new, world.spread(drawn(1)))
    return whole({k: x.grad for k, x in scale.items()}) | {
        f"after {k}": x.detach() for k, x in whole(after).items()
    }


def adapted(world: World) -> dict[str, Any]:
    """The parameters of a TorchOptimizer whose entries are written, given anew, and loaded."""
    model = {k: torch.nn.Parameter(x) for k, x in world.spread(drawn(0)).items()}
    optimizer = opt.TorchOptimizer(model.values(), opt.Adam(0.01))
    for n in range(STEPS):
        for k, g in world.spread(drawn(n + 1)).items():
            model[k].grad = g
        if n == 1:
            optimizer.state[model["even"]]["m"].zero_()
        if n == 2:
            entries = optimizer.state[model["copied"]]
            entries["m"] = torch.zeros_like(entries["m"])
        if n == 3:
            saved, optimizer = optimizer.state_dict(), opt.TorchOptimizer(model.values(), opt.Adam(0.5))
            optimizer.load_state_dict(saved)
        optimizer.step()
    return {k: x.detach() for k, x in whole(model).items()}


NOISE = opt.Chain(opt.AddNoise(0.1, seed=3), opt.Momentum(0.1))

RUNS_OF_ELEMENTS = {
    "even": (8, 64),
    "uneven": (7, 100),
    "short": (1, 3),
    "columns": (2, 8),
    "copied": (6, 90),
}
"""What is cut by rows has its elements in a row, and begins where no block of random numbers does."""


def noisy(world: World) -> dict[str, Any]:
    """Parameters that are stepped with noise of their own."""
    model = world.spread({k: torch.zeros(s) for k, s in RUNS_OF_ELEMENTS.items()})
    state = opt.setup(NOISE, model)
    engines = [{g.engine for g in opt.explain(state[k]).groups} for k in ("uneven", "columns")]
    assert engines == [{"numba"}, {"interpret"}]
    for n in range(STEPS):
        grads = world.spread({k: torch.full(s, float(n)) for k, s in RUNS_OF_ELEMENTS.items()})
        state, model = (opt.update_ if n % 2 else opt.update)(state, model, grads)
    return whole(model)


def refused(world: World) -> dict[str, Any]:
    """What is said of arrays that do not fit, by every process."""
    model = world.spread(drawn(0))
    state = opt.setup(RULES["a norm over all"], model)
    grads, line = world.spread(drawn(1)), world.places["even"][0]
    first = torch.distributed.get_rank() == 0
    wrong: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": (model, grads | {"even": torch.ones(4, 3)}),
        "shape": (model, grads | {"even": distribute_tensor(torch.ones(2, 2), line, [Shard(0)])}),
        "moved": (model | {"even": distribute_tensor(torch.ones(4, 3), line, [Replicate()])}, grads),
        "disagree": (model, grads | ({"uneven": None} if first else {})),
        "alone": (model, grads | ({"columns": None} if first else {})),
    }
    said: dict[str, Any] = {}
    for name, (x, dx) in wrong.items():
        try:
            opt.update_(state, x, dx)
        except opt.OptimiserError as error:
            said[name] = str(error)
    assert all(torch.equal(x, drawn(0)[k]) for k, x in whole(model).items())
    return said


RUNS: dict[str, Callable[[World], dict[str, Any]]] = {
    **{f"in place, {name}": lambda w, n=name: trained(w, n, opt.update_) for name in RULES},
    **{f"anew, {name}": lambda w, n=name: trained(w, n, opt.update) for name in RULES},
    "interpreted": lambda w: trained(w, "norms of arrays", opt.update_, "interpret"),
    "partial": with_partial_gradients,
    "extreme": of_extreme_norms,
    "continued": continued,
    "edited": edited,
    "differentiated": differentiated,
    "adapted": adapted,
    "noisy": noisy,
    "refused": refused,
}


def one_of_two(rank: int, folder: Path) -> None:
    """Run all of them as one of the two processes; what goes wrong is kept as text."""
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    world = World()
    for name, run in RUNS.items():
        try:
            result: Any = run(world)
        except Exception:  # noqa: BLE001 the test of this part shows it
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes wrote what they found."""
    return ran_once(tmp_path_factory, "tests.torch.test_spread", 200)


def agreed(folder: Path, name: str) -> dict[str, Any]:
    """What a run gave, which must be the same on both processes."""
    first, second = (found_by(rank, name, folder) for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) if torch.is_tensor(first[k]) else True for k in first)
    return first


def alone(name: str) -> dict[str, Any]:
    """The parameters after the same steps of whole arrays in one process, by the interpreter."""
    dtype = TYPES.get(name, torch.float32)
    model = drawn(0, dtype)
    state = opt.setup(RULES[name], model, engine="interpret")
    for n in range(STEPS):
        state, model = opt.update(state, model, drawn(n + 1, dtype))
    return model


def same(found: dict[str, Any], wanted: dict[str, Any], within: float = 3e-6) -> None:
    assert found.keys() == wanted.keys()
    for k, x in wanted.items():
        assert torch.allclose(found[k], x, rtol=within, atol=within), k


# one of the processes runs them all, which takes the time; what is slow is marked so as a whole
@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "anew"])
@pytest.mark.parametrize("name", RULES)
def test_parts_go_the_way_of_the_whole(name: str, how: str, folder: Path) -> None:
    same(agreed(folder, f"{how}, {name}"), alone(name), 8e-3 if name == "masters" else 3e-6)


@pytest.mark.slow
def test_the_interpreter_and_gradients_that_lie_elsewhere_do_too(folder: Path) -> None:
    same(agreed(folder, "interpreted"), alone("norms of arrays"))
    same(agreed(folder, "partial"), alone("a norm over all"))


@pytest.mark.slow
def test_noise_is_that_of_the_place_in_the_whole(folder: Path) -> None:
    model = {k: torch.zeros(s) for k, s in RUNS_OF_ELEMENTS.items()}
    state = opt.setup(NOISE, model, engine="interpret")
    for n in range(STEPS):
        grads = {k: torch.full(s, float(n)) for k, s in RUNS_OF_ELEMENTS.items()}
        state, model = opt.update(state, model, grads)

    same(agreed(folder, "noisy"), model)


@pytest.mark.slow
def test_norms_whose_squares_overflow_or_vanish_are_summed(folder: Path) -> None:
    found, unit = agreed(folder, "extreme"), drawn(1, torch.float64)
    norm = sum(float((g**2).sum()) for g in unit.values()) ** 0.5

    for size in (1e200, 1e-200):
        for k, x in drawn(0, torch.float64).items():
            assert torch.allclose(found[f"{size} {k}"], x - unit[k] / norm / 100, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_copies_and_saved_states_go_on_alike(folder: Path) -> None:
    found = agreed(folder, "continued")
    parameters = {k: torch.nn.Parameter(x) for k, x in drawn(0).items()}
    peer = torch.optim.AdamW(parameters.values(), 0.01, weight_decay=0)
    for n in (1, 2):
        for k, g in drawn(n).items():
            parameters[k].grad = g
        peer.step()

    for name in ("itself", "copied", "saved", "whole"):
        same({k: found[f"{name} {k}"] for k in SHAPES}, {k: p.detach() for k, p in parameters.items()})


@pytest.mark.slow
def test_edits_reach_the_parts(folder: Path) -> None:
    x, first, second = drawn(0), drawn(1), drawn(2)
    v = {k: 0.1 * g for k, g in first.items()}
    x = {k: p - v[k] for k, p in x.items()}
    v["uneven"], v["columns"] = torch.zeros(5, 3), torch.ones(2, 8)
    rate = {k: 0.5 if k == "even" else 0.1 for k in x}
    wanted = {k: p if k == "copied" else p - 0.9 * v[k] - rate[k] * second[k] for k, p in x.items()}

    same(agreed(folder, "edited"), wanted)


@pytest.mark.slow
def test_a_step_is_differentiated_over_the_parts(folder: Path) -> None:
    found, start, grads = agreed(folder, "differentiated"), drawn(0), drawn(1)

    same({k: found[k] for k in SHAPES}, {k: torch.full(s, -0.1) for k, s in SHAPES.items()})
    same({k: found[f"after {k}"] for k in SHAPES}, {k: x - 0.1 * grads[k] for k, x in start.items()})


@pytest.mark.slow
def test_an_optimizer_of_torch_shows_and_takes_the_parts(folder: Path) -> None:
    parameters = {k: torch.nn.Parameter(x) for k, x in drawn(0).items()}
    peer = torch.optim.Adam(parameters.values(), 0.01)
    for n in range(STEPS):
        for k, g in drawn(n + 1).items():
            parameters[k].grad = g
        if n in (1, 2):
            peer.state[parameters["even" if n == 1 else "copied"]]["exp_avg"].zero_()
        peer.step()

    same(agreed(folder, "adapted"), {k: p.detach() for k, p in parameters.items()})


@pytest.mark.slow
def test_what_does_not_fit_is_named_on_every_process(folder: Path) -> None:
    either = "a parameter has a gradient on all of them or on none"

    assert agreed(folder, "refused") == {
        "plain": "grads['even'] is a plain array; the parameters are spread over processes: spread it as "
        "they are",
        "shape": "gradient of shape (2, 2) for parameters of shape (4, 3), at grads['even']",
        "moved": "model['even'] is not spread over processes as `setup` saw it; call `setup` again for "
        "another model",
        "disagree": f"processes disagree: grads['uneven'] is there on 1 of 2; {either}",
        "alone": f"processes disagree: grads['columns'] is there on 1 of 2; {either}",
    }


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]))
