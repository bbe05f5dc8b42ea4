"""A rule as an optimiser of torch goes where torch.optim goes, and everything that knows torch's takes it.

Expected numbers are those of torch.optim on a copy of the same model, or formulas written here. The last
section runs in two processes of its own: `python -m tests.torch.test_torch_optimizer rank folder`.
"""

import copy
import inspect
import io
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import optimisers as opt
from optimisers.engines import cache
from tests.processes import found_by, ran_once

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402 torch may be missing
from torch.optim import lr_scheduler, swa_utils  # noqa: E402 the same
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402 the same

Model = Any
"""A module of torch, whose types are not here where torch is missing."""


def network(dtype: Any = torch.float64, seed: int = 0) -> Model:
    """Two layers, the same ones for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(n: int, rows: int = 6, dtype: Any = torch.float64) -> tuple[Any, Any]:
    """Batch number n."""
    drawn = torch.randn(rows, 7, generator=torch.Generator().manual_seed(100 + n), dtype=torch.float64)
    return drawn[:, :4].to(dtype), drawn[:, 4:].to(dtype)


def loss_of(model: Model, n: int) -> Any:
    """The loss of batch number n."""
    x, y = data(n, dtype=next(model.parameters()).dtype)
    return ((model(x) - y) ** 2).mean()


def walked(model: Model, optimizer: Any, steps: Any, scheduler: Any = None) -> None:
    """Train on the batches with these numbers."""
    for n in steps:
        optimizer.zero_grad()
        loss_of(model, n).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def values(model: Model) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(mine: Model, theirs: Model, tolerance: float = 1e-12) -> None:
    """The models have equal parameters, up to rounding."""
    torch.testing.assert_close(values(mine), values(theirs), rtol=tolerance, atol=tolerance)


def equal(mine: Model, theirs: Model) -> None:
    """The models have the same parameters, bit for bit."""
    torch.testing.assert_close(values(mine), values(theirs), rtol=0, atol=0)


def side_by_side(
    mine: Callable[[Model], Any],
    theirs: Callable[[Model], Any],
    schedule: Callable[[Any], Any] | None = None,
    steps: int = 12,
) -> tuple[Any, Any]:
    """Both optimisers, after training two copies of a model with them, equal after every step."""
    models = network(), network()
    optimizers = mine(models[0]), theirs(models[1])
    schedulers = [schedule(o) for o in optimizers] if schedule is not None else []
    for n in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            walked(model, optimizer, [n])
        for scheduler in schedulers:
            measured = (1 / (1 + n // 3),) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
            scheduler.step(*measured)
        close(*models)
        if schedule is not None:
            rates = [[float(group["lr"]) for group in o.param_groups] for o in optimizers]

            assert rates[0] == rates[1]
    return optimizers


def saved(state: Any) -> Any:
    """A state after a way through a file, read as torch reads files of others."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_state(mine: Any, theirs: Any) -> None:
    """The states of two optimisers are the same, bit for bit."""
    mine, theirs = mine.state_dict(), theirs.state_dict()
    torch.testing.assert_close(mine["state"], theirs["state"], rtol=0, atol=0)

    assert mine["param_groups"] == theirs["param_groups"]


def compiled() -> int:
    """How many kernels were compiled and are there."""
    return len(cache._loaded)


# -- the numbers of torch.optim ------------------------------------------------------------------------------

ADAMS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
OURS: Any = (0.05, (0.8, 0.95))

PEERS: list[tuple[str, dict[str, Any], opt.Rule]] = [
    ("SGD", {"lr": 0.1}, opt.Descent(0.1)),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}, opt.Chain(opt.WeightDecay(0.1), opt.Descent(0.1))),
    ("SGD", {"lr": 0.1, "momentum": 0.8}, opt.Momentum(0.1, 0.8)),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True}, opt.Nesterov(0.1, 0.8)),
    (
        "SGD",
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1},
        opt.Chain(opt.WeightDecay(0.1), opt.Momentum(0.1, 0.8)),
    ),
    ("Adam", {"lr": 0.05}, opt.Adam(0.05)),
    ("Adam", ADAMS, opt.Adam(*OURS, 1e-6)),
    ("Adam", ADAMS | {"weight_decay": 0.1}, opt.Chain(opt.WeightDecay(0.1), opt.Adam(*OURS, 1e-6))),
    ("Adam", ADAMS | {"amsgrad": True}, opt.TorchAMSGrad(*OURS, 1e-6)),
    ("AdamW", ADAMS | {"weight_decay": 0.1}, opt.AdamW(*OURS, 0.1, 1e-6)),
    ("AdamW", ADAMS | {"weight_decay": 0.1}, opt.AdamW(*OURS, 0.05 * 0.1, 1e-6, couple=False)),
    ("AdamW", ADAMS | {"weight_decay": 0.1}, opt.Chain(opt.Adam(*OURS, 1e-6), opt.DecoupledDecay(0.005))),
    ("NAdam", ADAMS, opt.TorchNAdam(*OURS, 1e-6)),
    ("RAdam", ADAMS, opt.TorchRAdam(*OURS, 1e-6)),
    ("Adamax", ADAMS | {"eps": 0.0}, opt.AdaMax(*OURS, 0.0)),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-6}, opt.RMSProp(0.01, 0.9, 1e-6)),
    (
        "RMSprop",
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-6, "centered": True},
        opt.RMSProp(0.01, 0.9, 1e-6, centred=True),
    ),
    ("Adagrad", {"lr": 0.1, "eps": 1e-8}, opt.TorchAdaGrad(0.1, 1e-8)),
    ("Adadelta", {"lr": 1.0, "rho": 0.9, "eps": 1e-6}, opt.AdaDelta(0.9, 1e-6)),
    ("Rprop", {"lr": 0.01}, opt.Rprop(0.01)),
    (
        "Rprop",
        {"lr": 0.02, "etas": (0.4, 2.0), "step_sizes": (0.01, 0.05)},
        opt.Rprop(0.02, (0.4, 2.0), (0.01, 0.05)),
    ),
]
WITHOUT_RULE = {"ASGD", "Adafactor", "LBFGS", "Muon", "Optimizer", "SparseAdam"}
"""Optimisers of torch whose formulas are no rules here."""


@pytest.fixture
def double() -> Iterator[None]:
    """NAdam of torch keeps a product in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("name", "settings", "rule"), PEERS, ids=lambda v: repr(v) if isinstance(v, opt.Rule) else ""
)
def test_a_rule_goes_the_way_of_its_peer(name: str, settings: dict[str, Any], rule: opt.Rule) -> None:
    side_by_side(
        lambda model: opt.TorchOptimizer(model, rule),
        lambda model: getattr(torch.optim, name)(model.parameters(), **settings),
        steps=15,
    )


def test_every_optimiser_of_torch_is_compared_or_has_no_rule() -> None:
    there = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }

    assert {name for name, _, _ in PEERS} | WITHOUT_RULE == there


def test_the_interpreter_goes_the_same_way() -> None:
    side_by_side(
        lambda model: opt.TorchOptimizer(model, opt.AdamW(0.05, lam=0.1), engine="interpret"),
        lambda model: torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1),
    )


@pytest.mark.parametrize(
    "params",
    [
        lambda m: m,
        lambda m: m.parameters(),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.parameters()}],
    ],
    ids=["module", "parameters", "named parameters", "groups"],
)
def test_parameters_come_as_torch_takes_them(params: Callable[[Model], Any]) -> None:
    side_by_side(
        lambda model: opt.TorchOptimizer(params(model), opt.Adam(0.05)),
        lambda model: torch.optim.Adam(model.parameters(), 0.05),
        steps=3,
    )


def test_it_is_an_optimiser_of_torch() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Adam(0.05))

    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True)] == [
        True
    ] * 4
    assert "lr: 0.05" in repr(optimizer)


# -- schedulers ----------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9 if n % 2 else 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8, 0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 12, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.2, anneal_epochs=5),
}


def test_there_is_a_case_for_every_scheduler_of_torch() -> None:
    assert set(SCHEDULERS) == set(lr_scheduler.__all__) - {"LRScheduler"} | {"SWALR"}


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_the_rate_of_the_next_step(name: str, tensor: bool) -> None:
    """Of every group, the second of which has a rate of its own; tensors are filled by most schedulers."""

    def groups(model: Model) -> list[dict[str, Any]]:
        rates = [torch.tensor(v, dtype=torch.float64) if tensor else v for v in (0.05, 0.02)]
        return [
            {"params": model[0].parameters(), "lr": rates[0]},
            {"params": model[2].parameters(), "lr": rates[1]},
        ]

    side_by_side(
        lambda model: opt.TorchOptimizer(groups(model), opt.Adam()),
        lambda model: torch.optim.Adam(groups(model)),
        SCHEDULERS[name],
    )


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, 12),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_a_cycle_of_rate_and_momentum_reaches_the_rule(schedule: Callable[[Any], Any]) -> None:
    """The cycle is that which torch.optim.SGD is given; SGD itself keeps the rate outside its velocity."""
    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer(model, opt.Momentum(0.02, 0.9))
    peer = torch.optim.SGD(shadow.parameters(), 0.02, 0.9)
    schedulers = [schedule(optimizer), schedule(peer)]
    x, v = values(model), {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    seen: list[float] = []
    for n in range(10):
        eta, rho = (peer.param_groups[0][name] for name in ("lr", "momentum"))
        seen.append(rho)

        assert [optimizer.param_groups[0][name] for name in ("lr", "momentum")] == [eta, rho]
        walked(model, optimizer, [n])
        assert optimizer.param_groups[0]["rho"] == rho
        for name, p in model.named_parameters():
            v[name] = rho * v[name] + eta * p.grad
            x[name] = x[name] - v[name]
        torch.testing.assert_close(values(model), x, rtol=1e-12, atol=1e-12)
        peer.step()
        for scheduler in schedulers:
            scheduler.step()

    assert len(set(seen)) > 5


def test_a_cycle_of_beta_reaches_the_rule() -> None:
    """The weights of the averages follow the betas of every step."""
    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer(model, opt.Adam(0.02))
    peer = torch.optim.Adam(shadow.parameters(), 0.02)
    schedulers = [lr_scheduler.OneCycleLR(o, 0.1, 12) for o in (optimizer, peer)]
    x = values(model)
    m, v, w = ({name: torch.zeros_like(p) for name, p in x.items()} for _ in range(3))
    u = dict(w)
    for n in range(10):
        eta, (a, b) = (peer.param_groups[0][name] for name in ("lr", "betas"))

        assert [optimizer.param_groups[0][name] for name in ("lr", "betas")] == [eta, (a, b)]
        walked(model, optimizer, [n])
        for name, p in model.named_parameters():
            m[name], w[name] = a * m[name] + (1 - a) * p.grad, a * w[name] + (1 - a)
            v[name], u[name] = b * v[name] + (1 - b) * p.grad**2, b * u[name] + (1 - b)
            x[name] = x[name] - eta * (m[name] / w[name]) / ((v[name] / u[name]).sqrt() + 1e-8)
        torch.testing.assert_close(values(model), x, rtol=1e-12, atol=1e-12)
        peer.step()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("given", ["keyword", "group"])
def test_a_tensor_given_as_the_rate_is_read_at_every_step(given: str) -> None:
    model = network()
    rate = torch.tensor(0.1, dtype=torch.float64)
    x = values(model)
    if given == "keyword":
        optimizer = opt.TorchOptimizer(model, opt.Descent(), lr=rate)
    else:
        optimizer = opt.TorchOptimizer([{"params": model.parameters(), "lr": rate}], opt.Descent())
    for n, value in enumerate((0.1, 0.02, 0.3)):
        rate.fill_(value)
        walked(model, optimizer, [n])
        x = {name: x[name] - value * p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close(values(model), x, rtol=1e-12, atol=1e-12)

    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize(
    "make",
    [
        lambda model, rate: opt.TorchOptimizer(model, opt.Adam(rate)),
        lambda model, rate: opt.TorchOptimizer(model, opt.Adam(), lr=rate),
        lambda model, rate: opt.TorchOptimizer([{"params": model.parameters(), "lr": rate}], opt.Adam()),
    ],
    ids=["rule", "keyword", "group"],
)
def test_a_schedule_of_ours_is_followed_and_shown_as_the_rate(make: Callable[[Model, Any], Any]) -> None:
    def rate(n: int) -> float:
        return 0.1 + (0.01 - 0.1) * min(n / 8, 1)

    model, shadow = network(), network()
    optimizer = make(model, opt.Linear(0.1, 0.01, 8))
    peer = torch.optim.Adam(shadow.parameters(), 1.0)
    scheduler = lr_scheduler.LambdaLR(peer, rate)

    assert optimizer.param_groups[0]["eta"] == pytest.approx(0.1, rel=1e-15)
    for n in range(11):
        walked(model, optimizer, [n])
        walked(shadow, peer, [n], scheduler)
        close(model, shadow)

        assert optimizer.param_groups[0]["eta"] == pytest.approx(rate(n), rel=1e-14)
        assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_rate_written_into_the_group_ends_a_schedule_of_ours() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Descent(opt.Linear(0.1, 0.0, 8)))
    walked(model, optimizer, range(2))
    optimizer.param_groups[0]["eta"] = 0.3
    for n in range(3):
        before = values(model)
        walked(model, optimizer, [n])
        wanted = {name: before[name] - 0.3 * p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close(values(model), wanted, rtol=1e-12, atol=1e-12)

        assert optimizer.param_groups[0]["lr"] == 0.3


def test_a_scheduler_does_not_warn_about_the_order_of_steps() -> None:
    """It marks `step` as called by replacing it on the optimiser, and would warn if that were lost."""
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Descent())
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    walked(model, optimizer, range(2), scheduler)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        lr_scheduler.StepLR(opt.TorchOptimizer(model, opt.Descent()), 1).step()


# -- groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "betas", "eps", "weight_decay"),
    [("lr", "betas", "eps", "weight_decay"), ("eta", "beta", "epsilon", "lam")],
    ids=["names of torch", "names of ours"],
)
def test_groups_have_settings_of_their_own(lr: str, betas: str, eps: str, weight_decay: str) -> None:
    def groups(model: Model, names: tuple[str, ...]) -> list[dict[str, Any]]:
        own = dict(zip(names, (0.003, (0.8, 0.99), 1e-5, 0.3), strict=True))
        return [{"params": model[0].parameters()}, {"params": model[2].parameters(), **own}]

    side_by_side(
        lambda model: opt.TorchOptimizer(
            groups(model, (lr, betas, eps, weight_decay)), opt.AdamW(0.02, lam=0.1)
        ),
        lambda model: torch.optim.AdamW(
            groups(model, ("lr", "betas", "eps", "weight_decay")), 0.02, weight_decay=0.1
        ),
    )


@pytest.mark.parametrize("momentum", ["momentum", "rho"])
def test_a_group_has_its_own_momentum(momentum: str) -> None:
    def groups(model: Model, name: str) -> list[dict[str, Any]]:
        return [{"params": model[0].parameters(), name: 0.5}, {"params": model[2].parameters()}]

    side_by_side(
        lambda model: opt.TorchOptimizer(groups(model, momentum), opt.Momentum(0.02)),
        lambda model: torch.optim.SGD(groups(model, "momentum"), 0.02, 0.9),
    )


@pytest.mark.parametrize(
    ("rule", "peer"),
    [
        (opt.AdamW(0.02, lam=0.1), lambda g: torch.optim.AdamW(g, 0.02, weight_decay=0.1)),
        (
            opt.Chain(opt.WeightDecay(0.1), opt.Momentum(0.02)),
            lambda g: torch.optim.SGD(g, 0.02, 0.9, weight_decay=0.1),
        ),
    ],
    ids=["beside the step", "inside the gradient"],
)
def test_decay_leaves_out_a_group_that_wants_none(rule: opt.Rule, peer: Callable[[Any], Any]) -> None:
    def groups(model: Model) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        return [
            {"params": [p for name, p in named if "weight" in name]},
            {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
        ]

    mine, _ = side_by_side(
        lambda model: opt.TorchOptimizer(groups(model), rule), lambda model: peer(groups(model))
    )

    assert [(g["weight_decay"], g["lam"]) for g in mine.param_groups] == [(0.1, 0.1), (0.0, 0.0)]


@pytest.mark.parametrize(
    ("rule", "settings", "shown"),
    [
        (opt.Adam(), {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-3}, opt.Adam(0.1, (0.5, 0.6), 1e-3)),
        (opt.Adam(), {"eta": 0.1, "beta": (0.5, 0.6), "epsilon": 1e-3}, opt.Adam(0.1, (0.5, 0.6), 1e-3)),
        (opt.AdamW(), {"lr": 0.1, "weight_decay": 0.2}, opt.AdamW(0.1, lam=0.2)),
        (opt.AdamW(), {"lam": 0.2}, opt.AdamW(lam=0.2)),
        (opt.Momentum(), {"lr": 0.1, "momentum": 0.5}, opt.Momentum(0.1, 0.5)),
        (opt.Adam(), {"lr": 0.1, "weight_decay": 0.0}, opt.Adam(0.1)),
    ],
    ids=repr,
)
def test_settings_of_the_constructor_adjust_the_rule(
    rule: opt.Rule, settings: dict[str, Any], shown: opt.Rule
) -> None:
    """A decay of 0 is no setting for a rule without decay: trainers give it to every optimiser."""
    optimizer = opt.TorchOptimizer(network(), rule, **settings)
    group = optimizer.param_groups[0]

    assert optimizer.tree["0.weight"].rule == shown
    assert all(group[name] == value for name, value in settings.items() if name in ("lr", "betas", "eps"))


@pytest.mark.parametrize(
    ("rule", "settings", "text"),
    [
        (opt.Adam(), {"alpha": 0.1}, r"alpha=0.1.*Adam\(.*no such setting.*it has lr, beta"),
        (opt.Adam(), {"momentum": 0.9}, r"momentum=0.9.*Adam\("),
        (opt.Adam(), {"learning_rat": 0.1}, "learning_rat"),
        (opt.Adam(), {"betas": (0.9, 1.5)}, r"Adam.beta"),
        (opt.Adam(), {"eps": -1.0}, "Adam.epsilon"),
        (opt.Adam(), {"lr": "fast"}, "Adam.eta is 'fast'"),
        (opt.Adam(), {"betas": 0.9}, "Adam.beta is 0.9; it takes a tuple of 2"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_settings_that_the_rule_does_not_have_are_refused(
    rule: opt.Rule, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises((opt.BadSetting, opt.UnknownField), match=text):
        opt.TorchOptimizer(network(), rule, **settings)


def test_misspelt_settings_are_refused_beside_rules_for_parts() -> None:
    with pytest.raises((opt.BadSetting, opt.UnknownField), match="learning_rat"):
        opt.TorchOptimizer(network(), {"**.bias": opt.Descent(), "**": opt.Adam()}, learning_rat=0.1)


def test_settings_of_a_group_that_the_rule_does_not_have_are_refused() -> None:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "momentum": 0.1}]
    with pytest.raises(opt.BadSetting, match=r"group 1 sets momentum=0.1, and Adam\("):
        opt.TorchOptimizer(groups, opt.Adam())


def test_settings_of_other_tools_stay_in_their_group() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(
        [{"params": model.parameters(), "name": "all", "lr_scale": 0.5}], opt.Adam()
    )
    walked(model, optimizer, range(2))

    assert (optimizer.param_groups[0]["name"], optimizer.param_groups[0]["lr_scale"]) == ("all", 0.5)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: opt.TorchOptimizer(network(), opt.Adam), opt.BadState, r"write Adam\(\)"),
        (lambda: opt.TorchOptimizer(network(), "adam"), opt.BadState, "'adam' where the rule goes"),
        (lambda: opt.TorchOptimizer([], opt.Adam()), ValueError, "empty parameter list"),
        (lambda: opt.TorchOptimizer(torch.ones(2), opt.Adam()), TypeError, "params argument"),
        (
            lambda: opt.TorchOptimizer(network().parameters(), {"**": opt.Adam()}),
            opt.BadState,
            "named_parameters",
        ),
        (
            lambda: opt.TorchOptimizer(network(), {"**.bias": opt.Adam()}),
            opt.OptimiserError,
            r"no rule for .*weight",
        ),
        (
            lambda: opt.TorchOptimizer(network(), {"**.scale": opt.Adam(), "**": opt.Adam()}),
            opt.OptimiserError,
            r"'\*\*.scale'",
        ),
    ],
    ids=[
        "a class",
        "a name",
        "nothing",
        "a tensor",
        "no names",
        "a parameter without rule",
        "a glob too many",
    ],
)
def test_what_is_no_rule_or_has_no_parameters_is_refused(
    make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


def test_a_group_may_be_changed_between_steps() -> None:
    """By the names of torch and by ours; both show the new value after the step."""
    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer(model, opt.AdamW(0.02, lam=0.1))
    peer = torch.optim.AdamW(shadow.parameters(), 0.02, weight_decay=0.1)
    for n, (ours, name, value) in enumerate(
        [
            ("weight_decay", "weight_decay", 0.3),
            ("lam", "weight_decay", 0.0),
            ("lr", "lr", 0.05),
            ("eps", "eps", 1e-3),
            ("epsilon", "eps", 1e-5),
        ]
    ):
        optimizer.param_groups[0][ours] = value
        peer.param_groups[0][name] = value
        for k in range(2):
            walked(model, optimizer, [2 * n + k])
            walked(shadow, peer, [2 * n + k])
            close(model, shadow)
        group = optimizer.param_groups[0]

        assert group[name] == value
        assert (group["lam"], group["epsilon"]) == (group["weight_decay"], group["eps"])


def test_a_change_of_a_group_reaches_that_group_alone() -> None:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = opt.TorchOptimizer(groups, opt.Descent(0.1))
    walked(model, optimizer, [0])
    optimizer.param_groups[1]["lr"] = 0.0
    before = values(model)
    walked(model, optimizer, [1])
    wanted = {
        name: before[name] - (0.1 if name.startswith("0") else 0.0) * p.grad
        for name, p in model.named_parameters()
    }
    torch.testing.assert_close(values(model), wanted, rtol=1e-12, atol=1e-12)


def test_a_wrong_value_in_a_group_raises_before_anything_is_changed() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Adam())
    walked(model, optimizer, range(2))
    before, state = values(model), saved(optimizer.state_dict())["state"]
    optimizer.param_groups[0]["betas"] = (0.9, 1.5)
    with pytest.raises(opt.BadSetting, match=r"Adam.beta"):
        optimizer.step()
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    torch.testing.assert_close(saved(optimizer.state_dict())["state"], state, rtol=0, atol=0)


def test_nothing_is_compiled_after_the_first_step_whatever_is_changed() -> None:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.0}]
    optimizer = opt.TorchOptimizer(groups, opt.AdamW(0.02, lam=0.1))
    walked(model, optimizer, range(2))
    before = compiled()
    for n in range(4):
        optimizer.param_groups[n % 2]["weight_decay"] = 0.1 * n
        optimizer.param_groups[0] |= {"lr": 0.01 * n, "betas": (0.5 + 0.1 * n, 0.9), "eps": 10.0**-n}
        walked(model, optimizer, range(3))
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(2 + n, dtype=torch.float64)), "lr": 0.5})
        optimizer.load_state_dict(saved(optimizer.state_dict()))

    assert compiled() == before


def test_a_group_added_on_the_way_leaves_what_was_learnt() -> None:
    def added(optimizer: Any) -> Any:
        more = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))
        optimizer.add_param_group({"params": [more], "lr": 0.3})
        return more

    models = network(), network()
    optimizers = (
        opt.TorchOptimizer(models[0].parameters(), opt.Adam(0.05)),
        torch.optim.Adam(models[1].parameters(), 0.05),
    )
    for model, optimizer in zip(models, optimizers, strict=True):
        walked(model, optimizer, range(4))
    more = [added(optimizer) for optimizer in optimizers]
    for n in range(6):
        for model, optimizer, p in zip(models, optimizers, more, strict=True):
            optimizer.zero_grad()
            (loss_of(model, n) + (p**3).sum()).backward()
            optimizer.step()
        close(*models)
        torch.testing.assert_close(*more, rtol=1e-12, atol=1e-12)


def test_a_group_that_is_refused_leaves_everything_as_it_was() -> None:
    def twice(model: Model, optimizer: Any, error: Any) -> None:
        walked(model, optimizer, range(2))
        with pytest.raises(error):
            optimizer.add_param_group({"params": [model[0].weight]})
        walked(model, optimizer, range(2, 4))

    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer(model.parameters(), opt.Adam(0.05))
    twice(model, optimizer, ValueError)
    twice(shadow, torch.optim.Adam(shadow.parameters(), 0.05), ValueError)
    close(model, shadow)
    with pytest.raises(opt.BadSetting, match="group 1 sets momentum"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "momentum": 0.1})

    assert len(optimizer.param_groups) == 1


def test_a_rule_for_each_part_is_chosen_by_name() -> None:
    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer(
        model, {"2.bias": None, "**.bias": opt.Momentum(0.1), "**": opt.AdamW(0.02, lam=0.1)}
    )
    peers = [
        torch.optim.SGD([shadow[0].bias], 0.1, 0.9),
        torch.optim.AdamW([shadow[0].weight, shadow[2].weight], 0.02, weight_decay=0.1),
    ]
    for n in range(8):
        walked(model, optimizer, [n])
        shadow.zero_grad()
        loss_of(shadow, n).backward()
        for peer in peers:
            peer.step()
        close(model, shadow)


def test_a_scheduler_takes_parts_without_a_rule() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, {"2.*": None, "**": opt.Descent(0.1)})
    before = values(model)
    walked(model, optimizer, [0], lr_scheduler.StepLR(optimizer, 1, 0.5))
    wanted = {
        name: before[name] - (0.1 if name.startswith("0") else 0) * p.grad
        for name, p in model.named_parameters()
    }
    torch.testing.assert_close(values(model), wanted, rtol=1e-12, atol=1e-12)

    assert optimizer.param_groups[1]["lr"] == 0.05


@pytest.mark.parametrize("by", ["requires_grad", "rule"])
def test_where_nothing_is_trained_a_step_does_nothing(by: str) -> None:
    """As in torch, where the parameters may be switched on later."""
    model = network()
    if by == "requires_grad":
        model.requires_grad_(requires_grad=False)
        optimizer = opt.TorchOptimizer(model, opt.Adam())
    else:
        optimizer = opt.TorchOptimizer(model, {"**": None})
        loss_of(model, 0).backward()
    before = values(model)
    optimizer.step()
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    optimizer.load_state_dict(saved(optimizer.state_dict()))

    assert optimizer.state_dict()["state"] == {}


def test_rules_for_parts_take_a_scheduler_and_a_checkpoint() -> None:
    def made(model: Model) -> tuple[Any, Any]:
        rules = {"**.bias": opt.Momentum(0.1), "**": opt.AdamW(0.02, lam=0.1)}
        optimizer = opt.TorchOptimizer(model, rules)
        return optimizer, lr_scheduler.ExponentialLR(optimizer, 0.8)

    model = network()
    optimizer, scheduler = made(model)
    walked(model, optimizer, range(4), scheduler)

    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
        [0.1 * 0.8**4, 0.02 * 0.8**4], rel=1e-12
    )
    other = copy.deepcopy(model)
    new, after = made(other)
    new.load_state_dict(saved(optimizer.state_dict()))
    after.load_state_dict(saved(scheduler.state_dict()))
    walked(model, optimizer, range(4, 8), scheduler)
    walked(other, new, range(4, 8), after)
    equal(other, model)


# -- steps and gradients -------------------------------------------------------------------------------------


def test_a_closure_is_called_with_gradients_on_and_its_loss_comes_back() -> None:
    models = network(), network()
    optimizers = opt.TorchOptimizer(models[0], opt.Adam(0.05)), torch.optim.Adam(models[1].parameters(), 0.05)

    def step(model: Model, optimizer: Any, n: int) -> Any:
        def closure() -> Any:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(model, n)
            loss.backward()
            return loss

        with torch.no_grad():
            return optimizer.step(closure)

    for n in range(5):
        losses = [step(model, optimizer, n) for model, optimizer in zip(models, optimizers, strict=True)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        close(*models)

    assert optimizers[0].step() is None


@pytest.mark.parametrize("none", [True, False], ids=["to None", "to zeros"])
def test_gradients_set_to_zero_or_to_none_are_what_they_are_to_torch(none: bool) -> None:
    """Zeros move the parameters by their momenta, None does not touch them."""
    models = network(), network()
    optimizers = (
        opt.TorchOptimizer(models[0], opt.Momentum(0.05)),
        torch.optim.SGD(models[1].parameters(), 0.05, 0.9),
    )
    for n in range(6):
        moved = values(models[0])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=none)
            if n % 2 == 0:
                loss_of(model, n).backward()
            optimizer.step()
        close(*models)
        still = all(torch.equal(p, moved[name]) for name, p in models[0].named_parameters())

        assert still == (none and n % 2 == 1)
        assert (models[0][0].weight.grad is None) == still


def test_a_parameter_without_gradient_takes_no_step_and_keeps_its_state() -> None:
    models = network(), network()
    optimizers = (
        opt.TorchOptimizer(models[0], opt.AdamW(0.05, lam=0.1)),
        torch.optim.AdamW(models[1].parameters(), 0.05, weight_decay=0.1),
    )
    for n in range(8):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, n).backward()
            for k, p in enumerate(model.parameters()):
                p.grad = None if (n + k) % 3 == 0 else p.grad
            optimizer.step()
        close(*models)


def test_a_first_step_with_rate_0_and_gradients_of_zeros_counts_as_one() -> None:
    """A warm-up may begin so, though torch.distributed.checkpoint asks for a state in the same way."""
    models = network(), network()
    optimizers = opt.TorchOptimizer(models[0], opt.Adam(0.0)), torch.optim.Adam(models[1].parameters(), 0.0)
    for n in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.05 * n
            optimizer.zero_grad()
            (loss_of(model, n) * min(n, 1)).backward()
            optimizer.step()
        close(*models)


def test_gradients_add_up_between_steps() -> None:
    models = network(), network()
    optimizers = opt.TorchOptimizer(models[0], opt.Adam(0.05)), torch.optim.Adam(models[1].parameters(), 0.05)
    for n in range(12):
        for model, optimizer in zip(models, optimizers, strict=True):
            (loss_of(model, n) / 3).backward()
            if n % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        close(*models)


def test_a_chain_may_add_the_gradients_up() -> None:
    """AccumGrad passes on their mean at every third step."""
    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer(model, opt.Chain(opt.AccumGrad(3), opt.Adam(0.05)))
    peer = torch.optim.Adam(shadow.parameters(), 0.05)
    for n in range(9):
        walked(model, optimizer, [n])
        (loss_of(shadow, n) / 3).backward()
        if n % 3 == 2:
            peer.step()
            peer.zero_grad()
        close(model, shadow)


def test_parameters_of_any_shape_and_order_in_memory_are_stepped() -> None:
    """Scalars, empty ones, channels last and transposed."""

    def odd() -> list[Any]:
        torch.manual_seed(0)
        images = nn.Conv2d(3, 4, 3).double().to(memory_format=torch.channels_last)
        more = (torch.tensor(0.5), torch.empty(0, 3), torch.randn(3, 4).t())
        return [images.weight, *(nn.Parameter(p.double()) for p in more)]

    mine, theirs = odd(), odd()
    optimizers = opt.TorchOptimizer(mine, opt.Adam(0.05)), torch.optim.Adam(theirs, 0.05)
    for n in range(5):
        for params, optimizer in zip((mine, theirs), optimizers, strict=True):
            torch.manual_seed(n)
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_step_is_seen_by_autograd() -> None:
    """A backward pass through weights that were overwritten in between raises, as it does for torch's."""
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Adam(0.05))
    walked(model, optimizer, [0])
    loss = loss_of(model, 1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings(
    "ignore:optimizer contains a parameter group with duplicate parameters:UserWarning"
)
def test_a_parameter_given_twice_takes_one_step() -> None:
    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer([*model.parameters(), model[0].weight], opt.Adam(0.05))
    walked(model, optimizer, range(4))
    walked(shadow, torch.optim.Adam(shadow.parameters(), 0.05), range(4))
    close(model, shadow)


def test_a_tied_parameter_takes_one_step() -> None:
    def tied() -> Model:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, dtype=torch.float64))
        model.insert(1, nn.Linear(4, 4, bias=False))
        model = model.double()
        model[1].weight = model[0].weight
        return model

    model, shadow = tied(), tied()
    walked(model, opt.TorchOptimizer(model, opt.Adam(0.05)), range(5))
    walked(shadow, torch.optim.Adam(shadow.parameters(), 0.05), range(5))
    close(model, shadow)

    assert model[1].weight is model[0].weight


def test_a_parameter_that_is_switched_on_later_trains_from_then_on() -> None:
    models = network(), network()
    for model in models:
        model[0].weight.requires_grad_(requires_grad=False)
    optimizers = (
        opt.TorchOptimizer(models[0].parameters(), opt.AdamW(0.05, lam=0.1)),
        torch.optim.AdamW(models[1].parameters(), 0.05, weight_decay=0.1),
    )
    for n in range(8):
        for model, optimizer in zip(models, optimizers, strict=True):
            if n in (3, 5):
                model[0].weight.requires_grad_(requires_grad=n == 3)
            walked(model, optimizer, [n])
        close(*models)


@pytest.mark.parametrize("when", [0, 3], ids=["before the first step", "on the way"])
def test_a_parameter_that_is_replaced_in_its_group_starts_anew(when: int) -> None:
    """As trainers do that shard a model after the optimiser was made; the others keep their state."""
    models = network(), network()
    optimizers = opt.TorchOptimizer(models[0], opt.Adam(0.05)), torch.optim.Adam(models[1].parameters(), 0.05)
    for n in range(7):
        for model, optimizer in zip(models, optimizers, strict=True):
            if n == when:
                model[2].weight = nn.Parameter(model[2].weight.detach() * 0.5)
                optimizer.param_groups[0]["params"][2] = model[2].weight
            walked(model, optimizer, [n])
        close(*models)
    state = optimizers[0].state_dict()["state"]

    assert sorted(state) == [0, 1, 2, 3]


def test_a_storage_that_is_replaced_is_the_one_that_is_written() -> None:
    models = network(), network()
    optimizers = opt.TorchOptimizer(models[0], opt.Adam(0.05)), torch.optim.Adam(models[1].parameters(), 0.05)
    for n in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            if n == 2:
                model[0].weight.data = model[0].weight.data.clone()
            if n == 4:
                model.load_state_dict(copy.deepcopy(model.state_dict()))
            walked(model, optimizer, [n])
        close(*models)


@pytest.mark.parametrize("by", ["clear", "pop"])
def test_state_that_the_user_deletes_starts_anew(by: str) -> None:
    models = network(), network()
    optimizers = opt.TorchOptimizer(models[0], opt.Adam(0.05)), torch.optim.Adam(models[1].parameters(), 0.05)
    for n in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            if n == 3 and by == "clear":
                optimizer.state.clear()
            elif n == 3:
                optimizer.state.pop(model[0].weight)
            walked(model, optimizer, [n])
        close(*models)


# -- hooks ---------------------------------------------------------------------------------------------------


def test_hooks_run_before_and_after_every_step() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Descent(0.1))
    seen: list[tuple[str, bool]] = []
    before = values(model)

    def noted(name: str) -> Callable[..., None]:
        return lambda *_: seen.append((name, torch.equal(model[0].weight, before["0.weight"])))

    handles = [
        optimizer.register_step_pre_hook(noted("pre")),
        optimizer.register_step_post_hook(noted("post")),
    ]
    everywhere = register_optimizer_step_post_hook(noted("global"))
    walked(model, optimizer, [0])
    for handle in (*handles, everywhere):
        handle.remove()
    walked(model, optimizer, [1])

    assert seen[0] == ("pre", True)
    assert sorted(seen[1:]) == [("global", False), ("post", False)]


def test_hooks_of_state_dict_run_and_may_change_it() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Adam(0.05))
    walked(model, optimizer, range(2))
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"more": 1})

    assert optimizer.state_dict()["more"] == 1
    assert seen == ["pre"]


def test_hooks_of_load_state_dict_run_and_may_change_it() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Momentum(0.05))
    walked(model, optimizer, range(2))
    state = saved(optimizer.state_dict())
    seen: list[str] = []

    def doubled(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        new = copy.deepcopy(given)
        for entry in new["state"].values():
            entry["v"] *= 2
        return new

    optimizer.register_load_state_dict_pre_hook(doubled)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.tree["0.weight"].state.v, 2 * state["state"][0]["v"], rtol=0, atol=0)

    assert seen == ["post"]


def test_a_hook_after_loading_may_change_the_state() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Momentum(0.05))
    walked(model, optimizer, range(2))
    state = saved(optimizer.state_dict())

    def emptied(o: Any) -> None:
        for entry in o.state.values():
            entry["v"].zero_()

    optimizer.register_load_state_dict_post_hook(emptied)
    optimizer.load_state_dict(state)

    assert not optimizer.tree["0.weight"].state.v.any()


# -- checkpoints ---------------------------------------------------------------------------------------------

ROUND_TRIPS: list[opt.Rule] = [
    opt.Descent(0.05),
    opt.Momentum(0.05),
    opt.Adam(0.05),
    opt.RAdam(0.05),
    opt.AdaDelta(),
    opt.Chain(opt.ClipGlobalNorm(0.1), opt.AdamW(0.05, lam=0.1)),
    opt.Chain(opt.AccumGrad(3), opt.Momentum(0.05)),
    opt.EMA(opt.Adam(0.05)),
    opt.SkipNonFinite(opt.Momentum(0.05)),
]


@pytest.mark.parametrize("rule", ROUND_TRIPS, ids=repr)
@pytest.mark.parametrize("into", ["fresh", "used"])
def test_training_goes_on_from_a_file_as_if_it_had_not_been_interrupted(rule: opt.Rule, into: str) -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, rule)
    walked(model, optimizer, range(4))
    file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = network(seed=1)
    new = opt.TorchOptimizer(other, rule)
    if into == "used":
        walked(other, new, range(5))
    other.load_state_dict(file["model"])
    new.load_state_dict(file["optimizer"])
    walked(model, optimizer, range(4, 9))
    walked(other, new, range(4, 9))
    equal(other, model)
    same_state(new, optimizer)


def test_a_scheduler_goes_on_with_the_optimiser() -> None:
    def made(model: Model) -> tuple[Any, Any]:
        optimizer = opt.TorchOptimizer(model, opt.Momentum(0.05))
        return optimizer, lr_scheduler.OneCycleLR(optimizer, 0.1, 12)

    model = network()
    optimizer, scheduler = made(model)
    walked(model, optimizer, range(5), scheduler)
    file = saved([optimizer.state_dict(), scheduler.state_dict()])
    other = copy.deepcopy(model)
    new, after = made(other)
    new.load_state_dict(file[0])
    after.load_state_dict(file[1])
    walked(model, optimizer, range(5, 11), scheduler)
    walked(other, new, range(5, 11), after)
    equal(other, model)


def test_a_schedule_of_ours_goes_on_from_a_file() -> None:
    def made(model: Model) -> Any:
        return opt.TorchOptimizer(model, opt.Adam(opt.Linear(0.1, 0.0, 10)))

    model = network()
    optimizer = made(model)
    walked(model, optimizer, range(4))
    other = copy.deepcopy(model)
    new = made(other)
    new.load_state_dict(saved(optimizer.state_dict()))
    for n in range(4, 9):
        walked(model, optimizer, [n])
        walked(other, new, [n])
        equal(other, model)

        assert new.param_groups[0]["eta"] == pytest.approx(0.1 * (1 - n / 10), rel=1e-12)


def test_settings_of_the_file_are_those_of_the_groups() -> None:
    """As in torch: a file holds the rate that was last set."""
    model, other = network(), network()
    optimizer = opt.TorchOptimizer(model, opt.Descent(0.1))
    walked(model, optimizer, [0])
    optimizer.param_groups[0]["lr"] = 0.3
    new = opt.TorchOptimizer(other, opt.Descent(0.7))
    new.load_state_dict(saved(optimizer.state_dict()))
    before = values(other)
    walked(other, new, [1])
    wanted = {name: before[name] - 0.3 * p.grad for name, p in other.named_parameters()}
    torch.testing.assert_close(values(other), wanted, rtol=1e-12, atol=1e-12)


def test_every_parameter_shows_its_state_where_torch_keeps_it() -> None:
    """The moments are those of Adam, and `step` is the tensor that torch's tools expect."""
    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer(model, opt.Adam(0.05))
    peer = torch.optim.Adam(shadow.parameters(), 0.05)
    walked(model, optimizer, range(3))
    walked(shadow, peer, range(3))
    ours, theirs = (o.state_dict()["state"] for o in (optimizer, peer))
    for n in range(4):
        torch.testing.assert_close(ours[n]["m"], theirs[n]["exp_avg"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours[n]["v"], theirs[n]["exp_avg_sq"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours[n]["step"], theirs[n]["step"])

    assert sorted(ours) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "rule",
    [opt.Adam(0.05), opt.MixedPrecision(opt.Adam(0.05)), opt.SplitPrecision(opt.Adam(0.05))],
    ids=repr,
)
@pytest.mark.parametrize("way", ["load_state_dict", "set_optimizer_state_dict"])
def test_state_in_float32_of_parameters_in_bfloat16_stays_so(rule: opt.Rule, way: str) -> None:
    """torch.optim casts it to the type of the parameters at loading."""
    from torch.distributed.checkpoint import state_dict as dcp

    model = network(torch.bfloat16)
    optimizer = opt.TorchOptimizer(model, rule)
    walked(model, optimizer, range(4))
    other = copy.deepcopy(model)
    new = opt.TorchOptimizer(other, rule)
    if way == "load_state_dict":
        new.load_state_dict(saved(optimizer.state_dict()))
    else:
        dcp.set_optimizer_state_dict(other, new, saved(dcp.get_optimizer_state_dict(model, optimizer)))
    state = new.state_dict()["state"][0]
    moments = [v for key, v in state.items() if key.split(".")[-1] in ("m", "v", "master")]

    assert {v.dtype for v in moments} == {torch.float32}
    walked(model, optimizer, range(4, 8))
    walked(other, new, range(4, 8))
    equal(other, model)
    same_state(new, optimizer)


def test_state_is_loaded_by_name_where_the_order_is_another() -> None:
    """torch.optim loads by place, and so the moments of one parameter into another."""
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Adam(0.05))
    walked(model, optimizer, range(4))
    other = copy.deepcopy(model)
    new = opt.TorchOptimizer(list(other.named_parameters())[::-1], opt.Adam(0.05))
    new.load_state_dict(saved(optimizer.state_dict()))
    for name in ("0.weight", "2.bias"):
        assert opt.Leaf.__eq__(new.tree[name], optimizer.tree[name])
    walked(model, optimizer, range(4, 8))
    walked(other, new, range(4, 8))
    equal(other, model)


def test_state_without_names_is_loaded_by_place() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Adam(0.05))
    walked(model, optimizer, range(4))
    other = copy.deepcopy(model)
    new = opt.TorchOptimizer(other.parameters(), opt.Adam(0.05))
    new.load_state_dict(saved(optimizer.state_dict()))
    walked(model, optimizer, range(4, 8))
    walked(other, new, range(4, 8))
    equal(other, model)


def wider() -> Model:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def renamed() -> Model:
    return nn.Sequential(nn.Tanh(), nn.Linear(4, 5), nn.Linear(5, 3)).double()


@pytest.mark.parametrize(
    ("model", "rule", "text"),
    [
        (wider, opt.Adam(), r"'m' of '0.weight' has shape \(5, 4\).*\(6, 4\)"),
        (renamed, opt.Adam(), r"'1.(weight|bias)' is on one side only"),
        (network, opt.Momentum(), r"'0.weight'.*Momentum\("),
        (network, opt.Chain(opt.WeightDecay(), opt.Adam()), "'0.weight'.*Chain"),
    ],
    ids=["other shapes", "other names", "another rule", "a chain"],
)
def test_a_state_that_does_not_fit_is_refused_by_name(
    model: Callable[[], Model], rule: opt.Rule, text: str
) -> None:
    source = network()
    optimizer = opt.TorchOptimizer(source, opt.Adam())
    walked(source, optimizer, range(2))
    with pytest.raises(opt.TreeMismatch, match=text):
        opt.TorchOptimizer(model(), rule).load_state_dict(saved(optimizer.state_dict()))


def test_a_state_of_other_groups_is_refused() -> None:
    model = network()
    state = opt.TorchOptimizer(model, opt.Adam()).state_dict()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.TorchOptimizer(groups, opt.Adam()).load_state_dict(state)
    with pytest.raises(ValueError, match="size of optimizer's group"):
        opt.TorchOptimizer(model[0].parameters(), opt.Adam()).load_state_dict(state)


def test_a_state_that_is_refused_leaves_the_old_one() -> None:
    source = wider()
    walked(source, optimizer := opt.TorchOptimizer(source, opt.Adam()), range(2))
    model, shadow = network(), network()
    mine, theirs = opt.TorchOptimizer(model, opt.Adam()), opt.TorchOptimizer(shadow, opt.Adam())
    for o, m in ((mine, model), (theirs, shadow)):
        walked(m, o, range(3))
    with pytest.raises(opt.TreeMismatch):
        mine.load_state_dict(saved(optimizer.state_dict()))
    for o, m in ((mine, model), (theirs, shadow)):
        walked(m, o, range(3, 6))
    equal(model, shadow)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("steps", [0, 4])
def test_a_copy_goes_the_same_way_apart_from_the_original(copied: Callable[[Any], Any], steps: int) -> None:
    model = network()
    rule = opt.Chain(opt.ClipGlobalNorm(0.5), opt.AdamW(opt.Linear(0.1, 0.0, 20), lam=0.1))
    optimizer = opt.TorchOptimizer(model, rule)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    walked(model, optimizer, range(steps))
    other, new = copied((model, optimizer))
    before = values(model)
    walked(other, new, range(steps, steps + 4))
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    walked(model, optimizer, range(steps, steps + 4))
    equal(other, model)

    assert new.param_groups[0]["params"][0] is other[0].weight


# -- the tree ------------------------------------------------------------------------------------------------


def test_leaves_of_the_tree_are_frozen_and_thawed() -> None:
    models = network(), network()
    optimizer = opt.TorchOptimizer(models[0], opt.AdamW(0.05, lam=0.1))
    peer = torch.optim.AdamW(models[1].parameters(), 0.05, weight_decay=0.1)
    for n in range(9):
        if n == 2:
            opt.freeze_(optimizer.tree["0.weight"])
        if n == 6:
            opt.thaw_(optimizer.tree)
        walked(models[0], optimizer, [n])
        models[1].zero_grad()
        loss_of(models[1], n).backward()
        models[1][0].weight.grad = None if 2 <= n < 6 else models[1][0].weight.grad
        peer.step()
        close(*models)


def test_settings_of_leaves_are_adjusted_beside_those_of_the_groups() -> None:
    """A scheduler that changes the rate of the group changes it for all its leaves, and nothing else."""
    models = network(), network()
    named = list(models[1].named_parameters())
    optimizer = opt.TorchOptimizer(models[0], opt.AdamW(0.05, lam=0.1))
    groups = [{"params": [p for name, p in named if last in name]} for last in ("weight", "bias")]
    peer = torch.optim.AdamW(groups, 0.05, weight_decay=0.1)
    for n in range(8):
        if n == 2:
            opt.adjust_(optimizer.tree, 0.01, lam=0.3, where="**.bias")
            peer.param_groups[1] |= {"lr": 0.01, "weight_decay": 0.3}
        if n == 5:
            optimizer.param_groups[0]["lr"] = 0.02
            for group in peer.param_groups:
                group["lr"] = 0.02
        walked(models[0], optimizer, [n])
        walked(models[1], peer, [n])
        close(*models)


@pytest.mark.parametrize("by", ["add_param_group", "deepcopy", "pickle"])
def test_what_is_frozen_stays_frozen(by: str) -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model.parameters(), opt.Adam(0.05))
    walked(model, optimizer, range(2))
    opt.freeze_(optimizer.tree["0.0"])
    if by == "add_param_group":
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(2, dtype=torch.float64))})
    elif by == "deepcopy":
        model, optimizer = copy.deepcopy((model, optimizer))
    else:
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    before = values(model)
    walked(model, optimizer, [2])
    torch.testing.assert_close(model[0].weight.detach(), before["0.weight"], rtol=0, atol=0)

    assert not torch.equal(model[0].bias, before["0.bias"])


def test_an_adjusted_leaf_stays_adjusted_when_a_group_is_added() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model.parameters(), opt.Descent(0.05))
    walked(model, optimizer, range(2))
    opt.adjust_(optimizer.tree["0.0"], 0.5)
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(2, dtype=torch.float64))})
    before = values(model)
    walked(model, optimizer, [2])
    wanted = before["0.weight"] - 0.5 * model[0].weight.grad
    torch.testing.assert_close(model[0].weight.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_the_tree_shows_the_state_and_the_parameters_by_name() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Momentum(0.05))
    walked(model, optimizer, [0])

    assert list(optimizer.tree) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(optimizer.parameters[name] is p for name, p in model.named_parameters())
    torch.testing.assert_close(
        optimizer.tree["2.bias"].state.v, 0.05 * model[2].bias.grad, rtol=1e-12, atol=1e-12
    )


# -- averages, scalers and other tools of torch --------------------------------------------------------------


def test_a_model_is_averaged_by_torch_with_its_scheduler() -> None:
    models = network(), network()
    optimizers = opt.TorchOptimizer(models[0], opt.Adam(0.05)), torch.optim.Adam(models[1].parameters(), 0.05)
    averages = [swa_utils.AveragedModel(model) for model in models]
    schedulers = [swa_utils.SWALR(o, 0.01, anneal_epochs=3) for o in optimizers]
    for n in range(8):
        for model, optimizer, average, scheduler in zip(
            models, optimizers, averages, schedulers, strict=True
        ):
            walked(model, optimizer, [n], scheduler)
            average.update_parameters(model)
    close(*averages)


def test_a_moving_average_beside_the_rule_is_that_of_torch() -> None:
    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer(model, opt.EMA(opt.Adam(0.05), 0.9))
    average = swa_utils.AveragedModel(shadow, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(shadow)  # the first call copies
    peer = torch.optim.Adam(shadow.parameters(), 0.05)
    for n in range(8):
        walked(model, optimizer, [n])
        walked(shadow, peer, [n])
        average.update_parameters(shadow)
    close(model, shadow)
    found = opt.averaged(optimizer.tree, optimizer.parameters)
    torch.testing.assert_close(
        {name: p.detach() for name, p in found.items()}, values(average.module), rtol=1e-12, atol=1e-12
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_steps_are_taken_within_the_backward_pass() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers

    models = network(), network()
    _apply_optimizer_in_backward(
        opt.TorchOptimizer, models[0].parameters(), {"rule": opt.AdamW(), "lr": 0.05, "weight_decay": 0.1}
    )
    peer = torch.optim.AdamW(models[1].parameters(), 0.05, weight_decay=0.1)
    for n in range(6):
        loss_of(models[0], n).backward()
        walked(models[1], peer, [n])
        close(*models)

    assert len(_get_in_backward_optimizers(models[0])) == 4
    assert all(p.grad is None for p in models[0].parameters())


@pytest.mark.parametrize("unscaled", ["by the user", "by the scaler", "by the user, then clipped"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
def test_a_scaler_scales_and_skips_as_it_does_for_torch(unscaled: str, bad: float) -> None:
    models = network(), network()
    optimizers = (
        opt.TorchOptimizer(models[0], opt.AdamW(0.05, lam=0.1)),
        torch.optim.AdamW(models[1].parameters(), 0.05, weight_decay=0.1),
    )
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in models]
    skipped: list[bool] = []
    for n in range(9):
        before = values(models[0])
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, n)).backward()
            if n in (0, 4):
                model[2].bias.grad[1] = bad
            if unscaled != "by the scaler":
                scaler.unscale_(optimizer)
            if "clipped" in unscaled and n not in (0, 4):
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        close(*models)
        skipped.append(torch.equal(models[0][0].weight, before["0.weight"]))

        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert [n for n, still in enumerate(skipped) if still] == [0, 4]
    ours, theirs = (o.state_dict()["state"][0] for o in optimizers)
    torch.testing.assert_close(ours["m"], theirs["exp_avg"], rtol=1e-12, atol=1e-12)


def test_a_scaler_that_finds_nothing_finite_leaves_the_state() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.AdamW(0.05, lam=0.1))
    walked(model, optimizer, range(3))
    before, other = values(model), copy.deepcopy(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 3)).backward()
    model[0].weight.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    same_state(optimizer, other)

    assert scaler.get_scale() == 4.0


# -- torch.distributed.checkpoint, one process ---------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


DECAYING: list[opt.Rule] = [
    opt.AdamW(0.05, lam=0.1),
    opt.AdamW(0.05, lam=0.1, couple=False),
    opt.Chain(opt.Momentum(0.05), opt.DecoupledDecay(0.1)),
    opt.Chain(opt.WeightDecay(0.1), opt.Momentum(0.05)),
    opt.Chain(opt.AdaDelta(), opt.DecoupledDecay(0.1)),
    opt.Chain(opt.Adam(opt.Linear(0.1, 0.0, 9)), opt.DecoupledDecay(0.1)),
]


@pytest.mark.parametrize("rule", DECAYING, ids=repr)
def test_a_state_that_is_asked_for_before_the_first_step_moves_nothing(rule: opt.Rule) -> None:
    """torch.distributed.checkpoint makes it by a step with rate 0 and gradients of zeros."""
    from torch.distributed.checkpoint import state_dict as dcp

    model, shadow = network(), network()
    optimizer = opt.TorchOptimizer(model, rule)
    rate = optimizer.param_groups[0].get("lr")
    state = dcp.get_optimizer_state_dict(model, optimizer)
    equal(model, shadow)

    assert sorted(state["state"]) == sorted(values(model))
    assert optimizer.param_groups[0].get("lr") == rate
    walked(model, optimizer, range(4))
    walked(shadow, opt.TorchOptimizer(shadow, rule), range(4))
    equal(model, shadow)


@pytest.mark.parametrize("rule", DECAYING[:3] + ROUND_TRIPS[5:8], ids=repr)
@pytest.mark.parametrize("form", ["nested", "flat", "full"])
@pytest.mark.usefixtures("one_process")
def test_the_state_goes_through_the_functions_of_distributed_checkpoints(rule: opt.Rule, form: str) -> None:
    """torch itself loads no state that is flat and full, nor a full one of a rule without state. Of a flat
    one it loads the keys of `state` alone: counters that follow from the step are worked out.
    """
    from torch.distributed.checkpoint import state_dict as dcp

    flat, full = form == "flat", form == "full"
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat, full_state_dict=full, cpu_offload=full)
    model = network()
    optimizer = opt.TorchOptimizer(model.parameters(), rule)
    walked(model, optimizer, range(4))
    state = saved(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    assert ("state.0.weight.step" in state) == flat
    other = copy.deepcopy(model)
    new = opt.TorchOptimizer(other.parameters(), rule)
    dcp.set_optimizer_state_dict(other, new, state, options=options)
    equal(other, model)
    walked(model, optimizer, range(4, 8))
    walked(other, new, range(4, 8))
    error = 1e-12 if flat else 0.0
    torch.testing.assert_close(values(other), values(model), rtol=error, atol=error)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.usefixtures("one_process")
def test_the_state_goes_through_a_folder_of_distributed_checkpoints(flat: bool, tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as dcp

    def made(model: Model) -> Any:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.0}]
        return opt.TorchOptimizer(groups, opt.AdamW(0.05, lam=0.1, couple=False))

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = network()
    optimizer = made(model)
    walked(model, optimizer, range(4))
    checkpoint.save(
        dict(zip("mo", dcp.get_state_dict(model, optimizer, options=options), strict=True)),
        checkpoint_id=tmp_path,
    )
    other = network(seed=1)
    new = made(other)
    found = dict(zip("mo", dcp.get_state_dict(other, new, options=options), strict=True))
    checkpoint.load(found, checkpoint_id=tmp_path)
    dcp.set_state_dict(other, new, model_state_dict=found["m"], optim_state_dict=found["o"], options=options)
    equal(other, model)
    walked(model, optimizer, range(4, 8))
    walked(other, new, range(4, 8))
    equal(other, model)


# -- Lightning -----------------------------------------------------------------------------------------------


def lightning_module(make: Callable[[Model], Any], cycle: bool) -> Any:
    """A network whose optimiser is made by `make`, under a cycle of rates where one is wanted."""
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, n: int) -> Any:
            x, y = batch
            return ((self.net(x) - y) ** 2).mean()

        def configure_optimizers(self) -> Any:
            optimizer = make(self.net)
            if not cycle:
                return optimizer
            scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, 12, cycle_momentum=False)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def train_dataloader(self) -> Any:
            batches = [data(n) for n in range(6)]
            return torch.utils.data.DataLoader(batches, batch_size=None)

    return Lit()


def lightning_fit(
    module: Any, where: Path, epochs: int, checkpoint: Path | None = None, **settings: Any
) -> Any:
    import lightning

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=where,
        **settings,
    )
    trainer.fit(module, ckpt_path=checkpoint)
    return trainer


treespec = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)


@pytest.mark.slow
@treespec
def test_lightning_trains_with_clipping_accumulation_and_a_schedule(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    settings = {"gradient_clip_val": 0.2, "accumulate_grad_batches": 2}
    mine = lightning_module(lambda m: opt.TorchOptimizer(m, opt.AdamW(0.05, lam=0.1)), cycle=True)
    theirs = lightning_module(lambda m: torch.optim.AdamW(m.parameters(), 0.05, weight_decay=0.1), cycle=True)
    for module in (mine, theirs):
        trainer = lightning_fit(module, tmp_path, 3, **settings)

        assert trainer.global_step == 9
    close(mine, theirs)

    assert not torch.equal(mine.net[0].weight, network()[0].weight)


@treespec
def test_lightning_goes_on_from_a_checkpoint_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("lightning")

    def made() -> Any:
        rule = opt.Chain(opt.ClipGlobalNorm(0.2), opt.AdamW(0.05, lam=0.1))
        return lightning_module(lambda m: opt.TorchOptimizer(m, rule), cycle=True)

    whole, first, second = made(), made(), made()
    lightning_fit(whole, tmp_path, 2)
    file = tmp_path / "first.ckpt"
    lightning_fit(first, tmp_path, 1).save_checkpoint(file)
    trainer = lightning_fit(second, tmp_path, 2, file)
    equal(second, whole)

    assert trainer.global_step == 12


# -- Accelerate ----------------------------------------------------------------------------------------------


def accelerated(make: Callable[[Model], Any], steps: range, where: Path, then: str = "") -> Any:
    """A network after these batches, two to a step, under Accelerate."""
    import accelerate
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = make(model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    loader = torch.utils.data.DataLoader([data(n) for n in steps], batch_size=None)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    if then == "load":
        accelerator.load_state(where)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(((model(x) - y) ** 2).mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    if then == "save":
        accelerator.save_state(where)
    return accelerator.unwrap_model(model)


def test_accelerate_prepares_accumulates_and_clips(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    mine = accelerated(lambda m: opt.TorchOptimizer(m, opt.AdamW(0.05, lam=0.1)), range(8), tmp_path)
    theirs = accelerated(
        lambda m: torch.optim.AdamW(m.parameters(), 0.05, weight_decay=0.1), range(8), tmp_path
    )
    close(mine, theirs)

    assert not torch.equal(mine[0].weight, network()[0].weight)


def test_accelerate_goes_on_from_a_folder_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    def made(model: Model) -> Any:
        return opt.TorchOptimizer(model, opt.AdamW(0.05, lam=0.1))

    whole = accelerated(made, range(8), tmp_path)
    accelerated(made, range(4), tmp_path, "save")
    resumed = accelerated(made, range(4, 8), tmp_path, "load")
    equal(resumed, whole)


# -- the Trainer of Hugging Face -----------------------------------------------------------------------------


def language_model() -> Model:
    """A transformer of one layer with 17 words."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    without_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, **without_dropout, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).double()


def hugging(where: Path, resume: Path | None = None, **given: Any) -> tuple[Any, Any]:
    """(model, trainer) after 8 steps of the Trainer, with a checkpoint at the fourth."""
    from transformers import Trainer, TrainingArguments

    words = torch.randint(0, 17, (32, 8), generator=torch.Generator().manual_seed(5))
    model = language_model()
    arguments = TrainingArguments(
        output_dir=str(where),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        weight_decay=0.1,
        warmup_steps=2,
        max_grad_norm=0.5,
        save_steps=4,
        save_strategy="steps",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    if "optimizers" in given:
        given["optimizers"] = (given["optimizers"](model), None)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": w, "labels": w} for w in words], **given)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    assert trainer.state.global_step == 8
    return model, trainer


@pytest.mark.slow
def test_the_trainer_of_hugging_face_takes_an_optimiser(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    mine, _ = hugging(tmp_path, optimizers=lambda m: opt.TorchOptimizer(m, opt.AdamW(0.02, lam=0.1)))
    theirs, _ = hugging(
        tmp_path, optimizers=lambda m: torch.optim.AdamW(m.parameters(), 0.02, weight_decay=0.1)
    )
    close(mine, theirs, 1e-10)

    assert not torch.equal(mine.transformer.wpe.weight, language_model().transformer.wpe.weight)


@pytest.mark.slow
def test_the_trainer_of_hugging_face_makes_the_optimiser_with_its_groups(tmp_path: Path) -> None:
    """Norms and biases do not decay; the rate is that of the rule, unless another is given."""
    pytest.importorskip("transformers")
    mine, trainer = hugging(
        tmp_path, optimizer_cls_and_kwargs=(opt.TorchOptimizer, {"rule": opt.AdamW(), "lr": 0.02})
    )
    theirs, _ = hugging(tmp_path, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 0.02}))
    close(mine, theirs, 1e-10)
    found = [(g["weight_decay"], g["lam"], g["initial_lr"]) for g in trainer.optimizer.optimizer.param_groups]

    assert found == [(0.1, 0.1, 0.02), (0.0, 0.0, 0.02)]


@pytest.mark.slow
def test_the_scheduler_of_a_trainer_scales_a_schedule_of_ours(tmp_path: Path) -> None:
    """The Trainer makes it around its own wrapper."""
    pytest.importorskip("transformers")
    mine, _ = hugging(
        tmp_path, optimizer_cls_and_kwargs=(opt.TorchOptimizer, {"rule": opt.AdamW(opt.Constant(0.02))})
    )
    theirs, _ = hugging(tmp_path, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 0.02}))
    close(mine, theirs, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [opt.AdamW(0.02), opt.Lion(0.002), opt.Adam(opt.Cosine(0.02, 12, warmup=3))],
    ids=lambda rule: type(rule).__name__,
)
def test_the_trainer_of_hugging_face_goes_on_from_its_checkpoint(rule: opt.Rule, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    made: Any = (opt.TorchOptimizer, {"rule": rule})
    whole, _ = hugging(tmp_path / "whole", optimizer_cls_and_kwargs=made)
    resumed, _ = hugging(
        tmp_path / "resumed",
        tmp_path / "whole" / "checkpoint-4",
        optimizer_cls_and_kwargs=made,
    )
    equal(resumed, whole)


# -- FSDP2: two processes that hold half of every parameter each ---------------------------------------------


def large(seed: int = 0) -> Model:
    """Two layers in float32 whose rows do not split evenly."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))


def large_loss(model: Model, n: int, rows: slice = slice(None)) -> Any:
    """A steep loss, so that the norm of the gradient is far above that to which it is clipped."""
    drawn = torch.randn(8, 11, generator=torch.Generator().manual_seed(200 + n))[rows]
    return 100 * (1 + n % 3) * ((model(drawn[:, :6]) - drawn[:, 6:]) ** 2).mean()


def sharded(rule: opt.Rule, seed: int = 0) -> tuple[Any, Any]:
    """(model, optimiser), the model in shards."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = large(seed)
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    return model, opt.TorchOptimizer(model, rule)


def trained_in_shards(model: Model, optimizer: Any, steps: range) -> dict[str, Any]:
    """The whole parameters after these steps, each process with its half of the batch."""
    rank = torch.distributed.get_rank()
    assert all(p.to_local().numel() < p.numel() for p in model.parameters())
    for n in steps:
        optimizer.zero_grad()
        large_loss(model, n, slice(4 * rank, 4 * rank + 4)).backward()
        optimizer.step()
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def goes_on_from_a_folder(folder: Path) -> dict[str, Any]:
    """The parameters without an interruption, and those after a save and a load into another model."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as dcp

    rule = opt.AdamW(0.01, lam=0.1, couple=False)
    model, optimizer = sharded(rule)
    trained_in_shards(model, optimizer, range(3))
    state = dict(zip("mo", dcp.get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=folder / "checkpoint")
    whole = trained_in_shards(model, optimizer, range(3, 6))
    other, new = sharded(rule, seed=1)
    found = dict(zip("mo", dcp.get_state_dict(other, new), strict=True))
    checkpoint.load(found, checkpoint_id=folder / "checkpoint")
    dcp.set_state_dict(other, new, model_state_dict=found["m"], optim_state_dict=found["o"])
    return {"whole": whole, "resumed": trained_in_shards(other, new, range(3, 6))}


def gathered() -> dict[str, Any]:
    """The whole parameters and the whole state after three steps, on the first process."""
    from torch.distributed.checkpoint import state_dict as dcp

    model, optimizer = sharded(opt.AdamW(0.01, lam=0.1))
    trained_in_shards(model, optimizer, range(3))
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(zip("mo", dcp.get_state_dict(model, optimizer, options=options), strict=True))


def clipped(rule: opt.Rule) -> opt.Rule:
    return opt.Chain(opt.ClipGlobalNorm(0.5), rule)


SHARDED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain": lambda _: trained_in_shards(*sharded(opt.AdamW(0.01, lam=0.1)), range(6)),
    "clipped": lambda _: trained_in_shards(*sharded(clipped(opt.Adam(0.01))), range(6)),
    "clipped descent": lambda _: trained_in_shards(*sharded(clipped(opt.Descent(0.1))), range(6)),
    "resumed": goes_on_from_a_folder,
    "gathered": lambda _: gathered(),
}


def one_of_two(rank: int, folder: Path) -> None:
    """Run all of them as one of the two processes; what goes wrong is kept as text."""
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for name, run in SHARDED.items():
        try:
            result: Any = run(folder)
        except Exception:  # noqa: BLE001 the test of this part shows it
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which both wrote what they found."""
    if sys.platform == "win32":
        pytest.skip("gloo meets in a file of a POSIX system")
    return ran_once(tmp_path_factory, "tests.torch.test_torch_optimizer", 100)


def unsharded(make: Callable[[Any], Any], norm: float | None) -> dict[str, Any]:
    """The parameters after the same steps of torch.optim on the whole batch in one process."""
    model = large()
    optimizer = make(model.parameters())
    for n in range(6):
        optimizer.zero_grad()
        large_loss(model, n).backward()
        if norm is not None:
            assert nn.utils.clip_grad_norm_(model.parameters(), norm) > 10 * norm
        optimizer.step()
    return values(model)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("name", "make", "norm"),
    [
        ("plain", lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1), None),
        ("clipped", lambda p: torch.optim.Adam(p, 0.01), 0.5),
        ("clipped descent", lambda p: torch.optim.SGD(p, 0.1), 0.5),
    ],
    ids=["plain", "clipped", "clipped descent"],
)
def test_a_model_in_shards_goes_the_way_of_a_whole_one(
    name: str, make: Callable[[Any], Any], norm: float | None, rank: int, two_processes: Path
) -> None:
    """The norm to which gradients are clipped goes over all shards."""
    mine, theirs = found_by(rank, name, two_processes), unsharded(make, norm)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_model_in_shards_goes_on_from_a_distributed_checkpoint(rank: int, two_processes: Path) -> None:
    found = found_by(rank, "resumed", two_processes)
    torch.testing.assert_close(found["resumed"], found["whole"], rtol=0, atol=0)


@pytest.mark.slow
def test_a_state_gathered_from_shards_goes_on_in_one_process(two_processes: Path) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    found = found_by(0, "gathered", two_processes)
    model = large(seed=1)
    optimizer = opt.TorchOptimizer(model, opt.AdamW(0.01, lam=0.1))
    dcp.set_state_dict(model, optimizer, model_state_dict=found["m"], optim_state_dict=found["o"])
    for n in range(3, 6):
        optimizer.zero_grad()
        large_loss(model, n).backward()
        optimizer.step()
    theirs = unsharded(lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1), None)
    torch.testing.assert_close(values(model), theirs, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]))
