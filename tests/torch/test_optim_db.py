"""What torch tests its own optimisers with: the keywords, schedulers, sparse gradients and wrong inputs of
its `optim_db`. Each goes the way of torch, or stands in a short list of differences.
"""

import copy
import sys
import types
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if "expecttest" not in sys.modules:  # torch's helpers ask for it; what is used here does not
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
database = pytest.importorskip("torch.testing._internal.common_optimizers")

import optimisers as opt  # noqa: E402 torch may not be there

WITHOUT_RULE = {"LBFGS"}
"""Classes that are no rule here."""

DIFFERENCES = {
    "lr as Tensor doesn't work with foreach & not capturable": "every way of computing takes tensors",
    "betas must be either both floats or both Tensors": "each may be either",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "as above",
    "complex not supported": "SparseAdam takes complex parameters, by |g|^2 as Adam here",
    "does not support complex parameters": "Muon and Adafactor take them, by |g|^2 and adjoint matrices",
    "only support 2D parameters": "Muon takes kernels and stacks, as (out, all others)",
}
"""Inputs that torch refuses, by their description, and why they are taken here."""

COMPLEX_ALIKE = ("SGD", "ASGD", "Rprop")
"""Classes that step complex parameters as torch does; the others divide by |g| where torch takes real and
imaginary parts apart.
"""

pytestmark = pytest.mark.usefixtures("double", "wide_muon")

INFOS = {info.name: info for info in database.optim_db if info.name not in WITHOUT_RULE}
Given = dict[str, Any]
Maker = Callable[[Any], Any]


def inputs(info: Any) -> list[Given]:
    found = [given.kwargs for given in info.optim_inputs_func(device="cpu", dtype=torch.float64)]
    return [{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in g.items()} for g in found]


def named(given: Given) -> str:
    return ",".join(f"{k}={v}" for k, v in given.items()) or "default"


INPUTS = [pytest.param(n, given, id=f"{n}-{named(given)}") for n, i in INFOS.items() for given in inputs(i)]
every_input = pytest.mark.parametrize(("name", "given"), INPUTS)


def drawn(seed: int, *shape: int, dtype: Any = None) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(dtype: Any = None, *, name: str = "") -> list[Any]:
    shapes = ((4, 3), (2, 5), (3, 3)) if name == "Muon" else ((4, 3), (5,), ())
    return [torch.nn.Parameter(drawn(n, *shape, dtype=dtype)) for n, shape in enumerate(shapes)]


def mine(name: str, params: Any, given: Given) -> Any:
    """Our optimiser for a class of torch; a rate in a tensor stays that tensor."""
    rates = {"lr": given["lr"]} if isinstance(given.get("lr"), torch.Tensor) else {}
    return opt.TorchOptimizer(params, opt.from_torch_class(name, **given), **rates)


def both(name: str, given: Given, dtype: Any = None) -> list[tuple[list[Any], Any]]:
    """(parameters, optimiser), ours and that of torch."""
    here, there = (parameters(dtype, name=name) for _ in range(2))
    theirs = getattr(torch.optim, name)(there, **copy.deepcopy(given))
    return [(here, mine(name, here, copy.deepcopy(given))), (there, theirs)]


def stepped(name: str, runs: Any, steps: Any, schedulers: Any = ((), ())) -> None:
    """Steps of both, with equal parameters after each."""
    for n in steps:
        for (ps, optimizer), listed in zip(runs, schedulers, strict=True):
            for i, p in enumerate(ps):
                g = drawn(10 * n + i + 3, *p.shape, dtype=p.dtype)
                apart = name == "SparseAdam" and isinstance(optimizer, torch.optim.SparseAdam)
                p.grad = g.reshape(p.shape).to_sparse() if apart else g
            optimizer.step()
            scheduled(listed)
        close(runs)


def scheduled(schedulers: Any) -> None:
    """A step of schedulers, with a loss that stays where it is."""
    for scheduler in schedulers:
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*((1.0,) if plateau else ()))


def close(runs: Any) -> None:
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@every_input
def test_every_input_goes_the_way_of_torch(name: str, given: Given) -> None:
    stepped(name, both(name, given), range(6))


@every_input
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_flags_of_how_torch_computes_change_nothing(name: str, given: Given, flag: str) -> None:
    plain, flagged = (mine(name, parameters(name=name), {**given, **more}) for more in ({}, {flag: True}))

    assert flagged.param_groups[0].keys() == plain.param_groups[0].keys()
    assert flagged.tree["0.0"].rule == plain.tree["0.0"].rule


@pytest.mark.parametrize(
    ("name", "given", "which"),
    [
        pytest.param(name, given, which, id=f"{name}-{named(given)}-{which}")
        for name, info in INFOS.items()
        for given in inputs(info)
        if not isinstance(given.get("lr"), torch.Tensor)
        for which in range(len(info.scheduler_inputs))
    ],
)
def test_every_scheduler_goes_the_way_of_torch(name: str, given: Given, which: int) -> None:
    runs = both(name, given)
    makers: list[Maker] = INFOS[name].scheduler_inputs[which]
    stepped(name, runs, range(12), [[make(o) for make in makers] for _, o in runs])


@every_input
def test_a_state_goes_on_in_a_new_optimiser(name: str, given: Given) -> None:
    runs = both(name, given)
    stepped(name, runs, range(3))
    ps, old = runs[0]
    new = mine(name, ps, copy.deepcopy(given))
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    stepped(name, [(ps, new), runs[1]], range(3, 6))


@every_input
def test_an_optimiser_of_torch_is_taken_over_on_the_way(name: str, given: Given) -> None:
    here, there = (parameters(name=name) for _ in range(2))
    runs = [(ps, getattr(torch.optim, name)(ps, **copy.deepcopy(given))) for ps in (here, there)]
    stepped(name, runs, range(3))
    stepped(name, [(here, opt.TorchOptimizer.of(runs[0][1])), runs[1]], range(3, 6))


@every_input
def test_groups_with_rates_of_their_own_go_the_way_of_torch(name: str, given: Given) -> None:
    given = {k: v for k, v in given.items() if k != "lr"}
    runs: list[Any] = []
    for make in (lambda ps: mine(name, ps, given), lambda ps: getattr(torch.optim, name)(ps, **given)):
        ps = parameters(name=name)
        runs.append((ps, make([{"params": ps[:1], "lr": 0.02}, {"params": ps[1:]}])))
    stepped(name, runs, range(4))


@every_input
def test_copies_go_the_way_of_the_original(name: str, given: Given) -> None:
    runs = both(name, given)
    stepped(name, runs, range(2))
    (ps, optimizer), peer = runs
    again, copied = copy.deepcopy((ps, optimizer))
    stepped(name, [(again, copied), peer], range(2, 4))


@pytest.mark.parametrize("name", COMPLEX_ALIKE)
def test_complex_parameters_go_the_way_of_torch(name: str) -> None:
    for given in inputs(INFOS[name]):
        stepped(name, both(name, given, torch.complex128), range(4))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("name", [n for n, info in INFOS.items() if info.supports_sparse])
def test_sparse_gradients_go_the_way_of_torch(name: str) -> None:
    keywords, makers = INFOS[name].metadata_for_sparse
    runs: list[Any] = []
    for make in (lambda ps: mine(name, ps, keywords), lambda ps: getattr(torch.optim, name)(ps, **keywords)):
        ps = [torch.nn.Parameter(drawn(0, 6, 3))]
        runs.append((ps, make(ps)))
    schedulers = [[make(o) for make in makers] for _, o in runs]
    for n in range(6):
        rows = torch.tensor([[n % 6, (n + 2) % 6, n % 6]])  # one of them twice
        for (ps, optimizer), listed in zip(runs, schedulers, strict=True):
            ps[0].grad = torch.sparse_coo_tensor(rows, drawn(n + 1, 3, 3), (6, 3))
            optimizer.step()
            scheduled(listed)
        close(runs)


ERRORS = [
    pytest.param(name, wrong, id=f"{name}-{wrong.optimizer_error_input.desc}")
    for name, info in INFOS.items()
    for wrong in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


@pytest.mark.parametrize(("name", "wrong"), ERRORS)
def test_what_torch_refuses_is_refused(name: str, wrong: Any) -> None:
    given = wrong.optimizer_error_input

    def run() -> None:
        params = parameters(name=name) if given.params is None else given.params
        optimizer = mine(name, params, given.kwargs)
        if wrong.error_on is database.OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()

    if wrong.error_type is UserWarning:
        with pytest.warns(UserWarning, match=wrong.error_regex):
            run()
    elif given.desc in DIFFERENCES:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run()
    else:
        with pytest.raises(wrong.error_type):
            run()


def test_every_difference_is_one_of_torchs_inputs() -> None:
    assert set(DIFFERENCES) <= {e.values[1].optimizer_error_input.desc for e in ERRORS}
    assert set(INFOS) | WITHOUT_RULE == {info.name for info in database.optim_db}
