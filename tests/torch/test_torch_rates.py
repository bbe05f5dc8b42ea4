"""A schedule of ours under a scheduler of torch: the rate is their product, or the mix is refused when it is
made.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.optim import lr_scheduler  # noqa: E402 torch may not be there

import optimisers as opt  # noqa: E402 the same

OURS = opt.Linear(0.0, 0.5, 10)


def ours(clock: int) -> float:
    return 0.05 * min(clock, 10)


def made(rate: Any = OURS, rule: Any = opt.Descent) -> tuple[Any, Any]:
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return p, opt.TorchOptimizer([p], rule(rate))


def rates(p: Any, optimizer: Any, scheduler: Any, steps: int = 8) -> list[float]:
    """How far each step went along a gradient of 1."""
    found: list[float] = []
    for _ in range(steps):
        before = p.item()
        p.grad = torch.ones_like(p)
        optimizer.step()
        if scheduler is not None:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*((1.0,) if plateau else ()))
        found.append(before - p.item())
    return found


SCALING: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCALING)
def test_the_rate_is_the_schedule_times_the_factor_of_the_scheduler(name: str) -> None:
    q = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    peer = torch.optim.SGD([q], 1.0)
    factors = rates(q, peer, SCALING[name](peer))
    p, optimizer = made()
    found = rates(p, optimizer, SCALING[name](optimizer))

    assert found == pytest.approx([ours(n) * f for n, f in enumerate(factors)], abs=1e-14)


def test_a_group_shows_the_present_rate_and_the_factor_on_it() -> None:
    p, optimizer = made()

    assert rates(p, optimizer, None) == pytest.approx([ours(n) for n in range(8)], abs=1e-14)
    assert optimizer.param_groups[0]["eta"] == pytest.approx(ours(7))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_rate_that_is_written_as_eta_ends_the_schedule() -> None:
    p, optimizer = made()
    rates(p, optimizer, None, 3)
    optimizer.param_groups[0]["eta"] = 0.3

    assert rates(p, optimizer, None, 3) == pytest.approx([0.3] * 3)
    assert "eta" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_a_number_that_nobody_but_the_user_writes_is_said_to_be_a_factor() -> None:
    p, optimizer = made()
    rates(p, optimizer, None, 3)
    optimizer.param_groups[0]["lr"] *= 0.5
    with pytest.warns(UserWarning, match=r"group 0 sets lr to 0.5, which is a factor on Linear.*as the eta"):
        found = rates(p, optimizer, None, 1)

    assert found + rates(p, optimizer, None, 1) == pytest.approx([ours(3) / 2, ours(4) / 2])


def test_a_scheduler_made_on_the_way_starts_at_a_factor_of_1() -> None:
    p, optimizer = made()
    rates(p, optimizer, None, 3)
    found = rates(p, optimizer, lr_scheduler.StepLR(optimizer, 2, 0.5), 4)

    assert found == pytest.approx([ours(3), ours(4), ours(5) / 2, ours(6) / 2])


with_rates_of_its_own = pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, 12, cycle_momentum=False),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
    ],
    ids=["OneCycleLR", "CyclicLR", "SWALR"],
)
"""Schedulers that set rates, and scale none."""


@with_rates_of_its_own
def test_a_scheduler_with_rates_of_its_own_is_refused_when_it_is_made(make: Callable[[Any], Any]) -> None:
    _, optimizer = made()
    with pytest.raises(opt.BadSetting, match=r"sets rates of its own.*follows Linear.*write a number as eta"):
        make(optimizer)


class FactorScheduler:
    """As schedulers of other packages: no class of torch, and it notes the first rate by itself."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.base = [g.setdefault("initial_lr", g["lr"]) for g in optimizer.param_groups]

    def step(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * 0.5


def test_a_scheduler_of_another_package_scales_what_it_finds() -> None:
    p, optimizer = made()
    scheduler = FactorScheduler(optimizer)
    scheduler.step()

    assert rates(p, optimizer, None, 4) == pytest.approx([ours(n) / 2 for n in range(4)])


def test_training_goes_on_from_a_file_at_the_same_rates() -> None:
    p, optimizer = made()
    scheduler = SCALING["StepLR"](optimizer)
    rates(p, optimizer, scheduler, 5)
    states = copy.deepcopy([optimizer.state_dict(), scheduler.state_dict()])
    q, again = made()
    after = SCALING["StepLR"](again)
    again.load_state_dict(states[0])
    after.load_state_dict(states[1])

    assert rates(q, again, after, 4) == pytest.approx(rates(p, optimizer, scheduler, 4), abs=1e-14)


def test_copies_go_on_at_the_same_rates() -> None:
    p, optimizer = made()
    scheduler = SCALING["LambdaLR"](optimizer)
    rates(p, optimizer, scheduler, 4)
    q, again, after = copy.deepcopy((p, optimizer, scheduler))

    assert rates(q, again, after, 3) == pytest.approx(rates(p, optimizer, scheduler, 3), abs=1e-14)


def test_coupled_decay_follows_the_product() -> None:
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = opt.TorchOptimizer([p], opt.AdamW(opt.Linear(0.2, 0.0, 10), lam=0.5))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    wanted = 1.0
    for n in range(4):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        scheduler.step()
        wanted *= 1 - 0.5 * (0.2 - 0.02 * n) / (1 + n)

    assert p.item() == pytest.approx(wanted, rel=1e-13)


# -- cycles of momentum, where rules go by glob --------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Parameter(torch.ones(2).double()) for _ in range(3))


CYCLES: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
}


@pytest.mark.parametrize("name", CYCLES)
@pytest.mark.parametrize(
    "rules",
    [
        {"a": opt.Adam(), "b": opt.AdamW(lam=0.1), "c": opt.Adam()},
        {"a": opt.Adam(), "b": opt.SGD(0.1, 0.9), "c": opt.Descent()},
        {"a": opt.Momentum(), "b": opt.Descent(), "c": opt.Momentum()},
        {"a": opt.Adam(), "b": None, "c": opt.Descent()},
    ],
    ids=lambda rules: "-".join(type(rule).__name__ for rule in rules.values()),
)
def test_a_cycle_of_momentum_reaches_every_rule_by_glob(name: str, rules: dict[str, Any]) -> None:
    net = Net()
    optimizer = opt.TorchOptimizer(net, rules)
    scheduler = CYCLES[name](optimizer)
    peer = torch.optim.Adam(Net().parameters())
    cycle = CYCLES[name](peer)
    for _ in range(6):
        for p in (*net.parameters(), *peer.param_groups[0]["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()
        peer.step()
        rate, momentum = (peer.param_groups[0][key] for key in ("lr", "betas"))
        for key, rule in rules.items():
            if rule is not None:
                here = optimizer.tree[key].rule

                assert here.eta == rate
                assert getattr(here, "beta", momentum)[0] == momentum[0]
                assert getattr(here, "rho", momentum[0]) == momentum[0]
        scheduler.step()
        cycle.step()


def test_a_cycle_over_globs_goes_on_from_a_file() -> None:
    def walked(net: Net, optimizer: Any, scheduler: Any) -> None:
        for n in range(3):
            for p in net.parameters():
                p.grad = torch.full_like(p, 1.0 + n)
            optimizer.step()
            scheduler.step()

    rules = {"a": opt.Adam(), "b": opt.SGD(0.1, 0.9), "c": opt.Descent()}
    net = Net()
    optimizer = opt.TorchOptimizer(net, rules)
    scheduler = CYCLES["OneCycleLR"](optimizer)
    walked(net, optimizer, scheduler)
    other = copy.deepcopy(net)
    again = opt.TorchOptimizer(other, rules)
    after = CYCLES["OneCycleLR"](again)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    after.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    walked(net, optimizer, scheduler)
    walked(other, again, after)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# -- schedulers that do not say that they are there ----------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """An optimiser around another, as Accelerate makes it: a scheduler replaces the `step` of this one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.inner.defaults

    def step(self, closure: Any = None) -> None:
        self.inner.step()

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


def wrapped(schedule: Any) -> tuple[Any, Any]:
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return p, Wrapper(opt.TorchOptimizer([p], opt.Descent(schedule)))


SCHEDULES = {
    "falling": opt.Linear(0.1, 0.0, 10),
    "rising from 0": opt.Linear(0.0, 0.1, 10),
    "at 1": opt.Constant(1.0),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", SCALING)
def test_a_scheduler_around_a_wrapper_scales_too(name: str, schedule: Any) -> None:
    q = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    peer = torch.optim.SGD([q], 1.0)
    factors = rates(q, peer, SCALING[name](peer))
    p, optimizer = wrapped(schedule)
    found = rates(p, optimizer, SCALING[name](optimizer))

    assert found == pytest.approx([schedule(n) * f for n, f in enumerate(factors)], abs=1e-14)


@with_rates_of_its_own
def test_rates_of_its_own_around_a_wrapper_are_refused_at_the_next_step(make: Callable[[Any], Any]) -> None:
    p, optimizer = wrapped(opt.Linear(0.1, 0.0, 10))
    scheduler = make(optimizer)
    with pytest.raises(opt.BadSetting, match=r"a scheduler sets rates of its own.*follows Linear"):
        rates(p, optimizer, scheduler, 2)


@pytest.mark.parametrize("kind", ["plain", "wrapped"])
@pytest.mark.parametrize("first", ["optimizer", "scheduler"], ids=lambda made: f"{made} first")
@pytest.mark.parametrize("name", ["LambdaLR", "StepLR", "CosineAnnealingLR", "ReduceLROnPlateau"])
def test_factors_go_on_from_a_file_whatever_is_made_first(name: str, first: str, kind: str) -> None:
    """The rates of a run that was not interrupted, from the second step of a scheduler on: the one that is
    made before it is loaded sets its first factor anew, as over optimisers of torch.
    """

    def both() -> tuple[Any, Any]:
        return made() if kind == "plain" else wrapped(opt.Linear(0.1, 0.0, 10))

    p, optimizer = both()
    scheduler = SCALING[name](optimizer)
    rates(p, optimizer, scheduler, 5)
    states = copy.deepcopy([optimizer.state_dict(), scheduler.state_dict()])
    q, again = both()
    if first == "optimizer":
        again.load_state_dict(states[0])
        after = SCALING[name](again)
    else:
        after = SCALING[name](again)
        again.load_state_dict(states[0])
    after.load_state_dict(states[1])
    anew = int(first == "optimizer" and name in ("LambdaLR", "CosineAnnealingLR"))
    if anew:
        after.step()
        again.param_groups[0]["lr"] = states[0]["param_groups"][0]["lr"]
        after.load_state_dict(states[1])

    assert rates(q, again, after, 4) == pytest.approx(rates(p, optimizer, scheduler, 4), abs=1e-14)


def test_a_number_that_is_written_after_a_load_is_said_to_be_a_factor_too() -> None:
    p, optimizer = made()
    rates(p, optimizer, None, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.warns(UserWarning, match="which is a factor"):
        rates(p, optimizer, None, 1)


def test_a_copied_group_goes_on_with_its_schedule_and_factor() -> None:
    p, optimizer = made()
    scheduler = SCALING["StepLR"](optimizer)
    rates(p, optimizer, scheduler, 4)
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])

    assert rates(p, optimizer, None, 2) == pytest.approx([ours(4) / 2, ours(5) / 2])


def test_a_factor_is_no_rate_of_a_rule_without_a_schedule() -> None:
    p, optimizer = made()
    rates(p, optimizer, SCALING["StepLR"](optimizer), 4)
    saved = optimizer.state_dict()
    q = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    other = opt.TorchOptimizer([q], opt.Descent(0.25))
    with pytest.raises(opt.BadSetting, match=r"has lr=0.5 as a factor on a schedule.*take the rule with its"):
        other.load_state_dict(saved)
    other.load_state_dict(saved, strict=False)

    assert other.tree["0.0"].rule == opt.Descent(0.25)


def test_a_schedule_that_was_alone_goes_on_under_a_scheduler() -> None:
    p, optimizer = made()
    rates(p, optimizer, None, 3)
    q, again = made()
    scheduler = SCALING["StepLR"](again)
    again.load_state_dict(optimizer.state_dict())

    assert rates(q, again, scheduler, 4) == pytest.approx([ours(3), ours(4), ours(5), ours(6) / 2])


def test_a_scheduler_that_comes_behind_another_starts_at_the_factor_there() -> None:
    p, optimizer = made()
    plateau = SCALING["ReduceLROnPlateau"](optimizer)
    found = rates(p, optimizer, plateau, 4)
    found += rates(p, optimizer, lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)), 3)

    assert found[:4] == pytest.approx([ours(0), ours(1), ours(2), ours(3) / 2])
    assert found[4:] == pytest.approx([ours(4) / 2, ours(5) / 4, ours(6) / 6])


def test_state_is_written_after_a_rule_was_exchanged_in_the_tree() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = opt.TorchOptimizer([p], opt.Adam(0.1))
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.tree["0.0"].rule = opt.AdamW(0.1)
    optimizer.state[p]["m"] = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["m"], torch.full((3,), 0.1))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.array])
def test_a_rate_may_be_a_number_of_numpy(kind: Any) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = opt.TorchOptimizer([p], opt.Descent(0.1))
    p.grad = torch.ones(2)
    optimizer.param_groups[0]["lr"] = kind(0.25)
    optimizer.step()
    assert p.tolist() == [-0.25, -0.25]
