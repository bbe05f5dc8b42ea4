"""What an optimiser of torch has learnt goes on here: whole optimisers, and their checkpoints."""

import copy
import io
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there
from tests.torch_classes import CASES  # noqa: E402 for the same reason

every_class = pytest.mark.parametrize(("name", "given"), CASES, ids=str)


pytestmark = pytest.mark.usefixtures("double", "wide_muon")


def drawn(seed: int, *shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(name: str = "") -> list[Any]:
    shape = (2, 5) if name == "Muon" else (5,)
    return [torch.nn.Parameter(drawn(0, 4, 3)), torch.nn.Parameter(drawn(1, *shape))]


def walked(ps: list[Any], optimizer: Any, steps: Any) -> None:
    for n in steps:
        for i, p in enumerate(ps):
            p.grad = drawn(10 * n + i + 2, *p.shape)
        optimizer.step()


def close(mine: list[Any], theirs: list[Any]) -> None:
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_class
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_optimiser_goes_on_with_the_same_numbers(name: str, given: dict[str, Any], steps: int) -> None:
    mine, theirs = parameters(name), parameters(name)
    peer = getattr(torch.optim, name)(theirs, **given)
    old = getattr(torch.optim, name)(mine, **given)
    walked(mine, old, range(steps))
    new = opt.TorchOptimizer.of(old)
    walked(theirs, peer, range(steps + 6))
    walked(mine, new, range(steps, steps + 6))
    close(mine, theirs)


@every_class
def test_a_checkpoint_of_torch_is_loaded(name: str, given: dict[str, Any]) -> None:
    mine, theirs = parameters(name), parameters(name)
    peer = getattr(torch.optim, name)(theirs, **given)
    walked(theirs, peer, range(4))
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
    new = opt.TorchOptimizer(mine, opt.from_torch_class(name, **given))
    new.load_state_dict(through_a_file(peer.state_dict()))
    walked(theirs, peer, range(4, 9))
    walked(mine, new, range(4, 9))
    close(mine, theirs)


def test_the_settings_of_a_loaded_group_are_those_of_the_file() -> None:
    mine, theirs = parameters(), parameters()
    peer = torch.optim.AdamW(theirs, 0.1, (0.7, 0.9), 1e-4, weight_decay=0.3)
    walked(theirs, peer, range(2))
    new = opt.TorchOptimizer(mine, opt.AdamW())
    new.load_state_dict(peer.state_dict())

    assert new.tree["0.0"].rule == opt.AdamW(0.1, (0.7, 0.9), 0.3, 1e-4)
    assert new.param_groups[0]["weight_decay"] == 0.3
    assert "amsgrad" not in new.param_groups[0]


@pytest.mark.parametrize("rule", [opt.Momentum(0.1, 0.9), opt.Nesterov(0.1, 0.9)], ids=repr)
def test_momentum_with_the_rate_inside_takes_a_velocity_of_torch(rule: opt.Rule) -> None:
    mine, theirs = parameters(), parameters()
    nesterov = isinstance(rule, opt.Nesterov)
    peer = torch.optim.SGD(theirs, 0.1, 0.9)
    ahead = torch.optim.SGD(theirs, 0.1, 0.9, nesterov=True)
    peer = ahead if nesterov else peer
    walked(theirs, peer, range(3))
    saved = peer.state_dict()
    saved["param_groups"][0]["nesterov"] = False
    new = opt.TorchOptimizer(mine, rule)
    new.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
    peer.param_groups[0]["nesterov"] = nesterov
    walked(theirs, peer, range(3, 7))
    walked(mine, new, range(3, 7))
    close(mine, theirs)


def test_a_checkpoint_of_adamw_goes_into_a_chain_that_says_the_same() -> None:
    mine, theirs = parameters(), parameters()
    peer = torch.optim.AdamW(theirs, 0.1, weight_decay=0.3)
    walked(theirs, peer, range(3))
    rule = opt.Chain(opt.ClipGlobalNorm(1e9), opt.Adam(0.1), opt.DecoupledDecay(0.0, couple=True))
    new = opt.TorchOptimizer(mine, rule)
    new.load_state_dict(peer.state_dict())
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
    walked(theirs, peer, range(3, 7))
    walked(mine, new, range(3, 7))
    close(mine, theirs)


@pytest.mark.parametrize(
    ("given", "rule", "says"),
    [
        ({"amsgrad": True}, opt.Adam(), "sets amsgrad=True.*take TorchAMSGrad"),
        ({"maximize": True}, opt.Adam(), r"sets maximize=True.*put Maximise\(\) first"),
        ({"weight_decay": 0.1}, opt.Adam(), r"decays by weight_decay=0.1.*from_torch_class"),
        ({"weight_decay": 0.1}, opt.AdamW(), "sets decoupled_weight_decay=False"),
        ({}, opt.Lion(), "sets eps=1e-08, and Lion"),
        ({}, opt.OAdam(), "'exp_avg'.*keeps 'adam.m'"),
        ({}, opt.RMSProp(), "betas"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_formula_is_refused(given: Any, rule: opt.Rule, says: str) -> None:
    ps = parameters()
    peer = torch.optim.Adam(ps, **given)
    walked(ps, peer, range(2))
    with pytest.raises((opt.BadSetting, opt.TreeMismatch), match=says):
        opt.TorchOptimizer(parameters(), rule).load_state_dict(peer.state_dict())


def test_groups_hooks_names_and_what_other_tools_wrote_come_along() -> None:
    a, b = parameters()
    rate = torch.tensor(0.05)
    old = torch.optim.Adam(
        [
            {"params": [("a", a)], "weight_decay": 0.1, "layer": "first"},
            {"params": [("b", b)], "lr": rate, "amsgrad": True},
        ],
        0.1,
    )
    calls: list[str] = []
    handle = old.register_step_post_hook(lambda *_: calls.append("after"))
    walked([a, b], old, range(2))
    torch.optim.lr_scheduler.StepLR(old, 1)
    peers = copy.deepcopy([a, b])
    peer = torch.optim.Adam(
        [{"params": [peers[0]], "weight_decay": 0.1}, {"params": [peers[1]], "lr": 0.05, "amsgrad": True}],
        0.1,
    )
    peer.load_state_dict(old.state_dict())
    new = opt.TorchOptimizer.of(old)

    assert new.param_groups[0]["layer"] == "first"
    assert new.param_groups[0]["initial_lr"] == 0.1
    assert new.param_groups[1]["lr"] is rate
    assert list(new.tree) == ["a", "b"]

    rate.fill_(0.01)
    peer.param_groups[1]["lr"] = 0.01
    walked([a, b], new, range(2, 5))
    walked(peers, peer, range(2, 5))
    close([a, b], peers)

    assert calls == ["after"] * 5

    handle.remove()
    walked([a, b], new, range(1))

    assert calls == ["after"] * 5


def test_a_class_of_the_user_is_that_which_it_is_made_of() -> None:
    class Mine(torch.optim.SGD):
        pass

    assert opt.TorchOptimizer.of(Mine(parameters(), 0.1)).tree["0.0"].rule == opt.Chain(
        opt.WeightDecay(0.0), opt.Descent(0.1)
    )


def test_what_is_no_rule_is_refused_by_name() -> None:
    with pytest.raises(opt.UnknownField, match="no rule is torch's LBFGS: it asks for the loss again"):
        opt.TorchOptimizer.of(torch.optim.LBFGS(parameters()))
    with pytest.raises(opt.BadState, match="takes an optimiser of torch"):
        opt.TorchOptimizer.of(opt.Adam())  # type: ignore[arg-type]
