"""What a rule has learnt goes on in an optimiser of torch."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there
from tests.torch_classes import CASES  # noqa: E402 for the same reason

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


@pytest.mark.parametrize(("name", "given"), CASES, ids=str)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_torch_goes_on_with_the_numbers_of_its_own_run(name: str, given: dict[str, Any], steps: int) -> None:
    """The settings are those of the rule: the optimiser of torch is made with another rate."""
    mine, theirs = parameters(name), parameters(name)
    whole = getattr(torch.optim, name)(theirs, **given)
    ours = opt.TorchOptimizer(mine, opt.from_torch_class(name, **given))
    walked(mine, ours, range(steps))
    back = getattr(torch.optim, name)(mine, **{**given, "lr": 0.7})
    back.load_state_dict(opt.to_torch_state(ours, back))
    walked(mine, back, range(steps, steps + 6))
    walked(theirs, whole, range(steps + 6))
    close(mine, theirs)


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (opt.Momentum(0.1, 0.9), lambda ps: torch.optim.SGD(ps, 0.1, 0.9)),
        (opt.Nesterov(0.1, 0.9), lambda ps: torch.optim.SGD(ps, 0.1, 0.9, nesterov=True)),
        (opt.Adam(0.1), lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.0)),
        (
            opt.Chain(opt.Adam(0.1), opt.DecoupledDecay(0.2, couple=True)),
            lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.2),
        ),
    ],
    ids=["Momentum", "Nesterov", "Adam", "chain"],
)
def test_a_rule_that_says_it_otherwise_goes_on_too(rule: opt.Rule, make: Any) -> None:
    mine, theirs = parameters(), parameters()
    walked(mine, ours := opt.TorchOptimizer(mine, rule), range(3))
    back = make(mine)
    back.load_state_dict(opt.to_torch_state(ours, back))
    walked(mine, back, range(3, 7))
    walked(theirs, make(theirs), range(7))
    close(mine, theirs)


def test_single_precision_goes_on_within_its_rounding() -> None:
    torch.set_default_dtype(torch.float32)
    mine, theirs = parameters(), parameters()
    walked(mine, ours := opt.TorchOptimizer(mine, opt.AdamW(0.01, lam=0.1)), range(5))
    back = torch.optim.AdamW(mine)
    back.load_state_dict(opt.to_torch_state(ours, back))
    walked(mine, back, range(5, 10))
    walked(theirs, torch.optim.AdamW(theirs, 0.01, weight_decay=0.1), range(10))
    for p, q in zip(mine, theirs, strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_state_of_setup_goes_to_torch_by_the_names_of_a_module() -> None:
    module, peer = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    peer.load_state_dict(module.state_dict())
    state = opt.setup(opt.Adam(0.1), module)
    for n in range(3):
        gradient = {"weight": drawn(n, 2, 3), "bias": drawn(n + 50, 2)}
        state, module = opt.update_(state, module, gradient)
    back = torch.optim.Adam(reversed(list(module.named_parameters())), 0.1)
    back.load_state_dict(opt.to_torch_state(state, back))
    theirs = torch.optim.Adam(peer.parameters(), 0.1)
    for n in range(3):
        peer.weight.grad, peer.bias.grad = drawn(n, 2, 3), drawn(n + 50, 2)
        theirs.step()
    for model, optimizer in ((module, back), (peer, theirs)):
        model.weight.grad, model.bias.grad = drawn(9, 2, 3), drawn(59, 2)
        optimizer.step()
    close(list(module.parameters()), list(peer.parameters()))


def test_groups_a_schedule_and_what_is_adjusted_stand_in_the_groups_of_torch() -> None:
    a, b = parameters()
    rule = opt.AdamW(opt.Cosine(0.1, 10), lam=0.1)
    ours = opt.TorchOptimizer([{"params": [a]}, {"params": [b]}], rule)
    walked([a, b], ours, range(5))
    ours.param_groups[0]["weight_decay"] = 0.3
    back = torch.optim.AdamW([{"params": [b], "layer": "b"}, {"params": [a], "lr": torch.tensor(0.7)}])
    state = opt.to_torch_state(ours, back)
    learnt = state["state"][0]["exp_avg"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.3]
    assert state["param_groups"][0]["layer"] == "b"
    assert [float(group["lr"]) for group in state["param_groups"]] == pytest.approx([0.05, 0.05], rel=1e-12)
    assert isinstance(state["param_groups"][1]["lr"], torch.Tensor)
    assert torch.equal(learnt, ours.state[b]["exp_avg"])
    assert learnt.data_ptr() != ours.state[b]["exp_avg"].data_ptr()
    assert back.param_groups[0]["lr"] == 1e-3


def test_a_parameter_that_is_not_trained_keeps_what_the_optimiser_of_torch_has() -> None:
    a, b = parameters()
    back = torch.optim.Adam([a, b])
    walked([a, b], back, range(2))
    a.grad = b.grad = None
    walked([a], ours := opt.TorchOptimizer([a], opt.Adam()), range(5))
    state = opt.to_torch_state(ours, back)["state"]
    assert [int(state[n]["step"]) for n in (0, 1)] == [5, 2]
    assert torch.equal(state[1]["exp_avg"], back.state[b]["exp_avg"])


@pytest.mark.parametrize(
    ("rule", "name", "given", "says"),
    [
        (opt.Lion(), "Adam", {}, r"trained by Lion\(.*this Adam is.*Adam\("),
        (opt.Adam(), "SGD", {}, r"trained by Adam\(.*this SGD is.*Descent\("),
        (opt.Adam(), "AdamW", {}, r"trained by Adam\(.*AdamW\(.*lam=0.01"),
        (opt.Adam(), "Adam", {"amsgrad": True}, "TorchAMSGrad"),
        (opt.Adam(), "Adam", {"maximize": True}, "Maximise"),
        (opt.AdamW(lam=0.1, couple=False), "AdamW", {}, "couple=False"),
        (opt.AMSGrad(), "Adam", {"amsgrad": True}, r"trained by AMSGrad\("),
        (opt.AdaGrad(), "Adagrad", {}, r"trained by AdaGrad\("),
        (opt.Chain(opt.ClipGlobalNorm(1.0), opt.Adam()), "Adam", {}, "ClipGlobalNorm"),
        (opt.Lookahead(opt.Adam()), "Adam", {}, "Lookahead"),
        (opt.Momentum(opt.Cosine(0.1, 10)), "SGD", {"momentum": 0.9}, "velocity holds rates"),
    ],
    ids=str,
)
def test_another_formula_is_refused_by_name(rule: opt.Rule, name: str, given: Any, says: str) -> None:
    ps = parameters()
    walked(ps, ours := opt.TorchOptimizer(ps, rule), range(2))
    back = getattr(torch.optim, name)(ps, **given)
    with pytest.raises(opt.BadState, match=says):
        opt.to_torch_state(ours, back)


def test_other_parameters_and_other_things_are_refused() -> None:
    ps = parameters()
    ours = opt.TorchOptimizer(ps, opt.Adam())
    walked(ps, ours, range(1))
    named = opt.TorchOptimizer([("a", ps[0]), ("b", ps[1])], opt.Adam())
    with pytest.raises(opt.TreeMismatch, match=r"\[1\] parameters, and those here \[2\]"):
        opt.to_torch_state(ours, torch.optim.Adam(parameters()[:1]))
    with pytest.raises(opt.TreeMismatch, match=r"0.0 is an array of torch of shape \(4, 3\).*\(5,\)"):
        opt.to_torch_state(ours, torch.optim.Adam(parameters()[::-1]))
    with pytest.raises(opt.TreeMismatch, match="'b' is not among"):
        opt.to_torch_state(named, torch.optim.Adam([("a", parameters()[0])]))
    with pytest.raises(opt.TreeMismatch, match=r"'0.1' is not among"):
        opt.to_torch_state(ours, torch.optim.Adam(ps[:1]))
    with pytest.raises(opt.BadState, match="given a TorchOptimizer; it takes an optimiser"):
        opt.to_torch_state(ours, ours)


def test_a_group_of_torch_has_one_setting_for_all() -> None:
    a, b = parameters()
    ours = opt.TorchOptimizer([{"params": [a]}, {"params": [b], "lr": 0.5}], opt.Adam(0.1))
    with pytest.raises(opt.BadState, match=r"0.0 is trained by Adam\(eta=0.1.* and 1.0 by Adam\(eta=0.5"):
        opt.to_torch_state(ours, torch.optim.Adam([a, b]))
