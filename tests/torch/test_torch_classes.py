"""Every class of torch.optim, with every keyword that a rule can say, is a rule that takes the same steps."""

import inspect
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there

BETAS = {"betas": (0.8, 0.95), "eps": 1e-3}
DECAYS: tuple[dict[str, Any], ...] = ({}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True})

KEYWORDS: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": (
        *DECAYS,
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
        {"dampening": 0.5},
    ),
    "Adam": (*DECAYS, BETAS, {"amsgrad": True, "weight_decay": 0.1, "lr": 0.05},
             {"decoupled_weight_decay": True, "weight_decay": 0.1, "lr": 0.05}),
    "AdamW": (*DECAYS, BETAS, {"amsgrad": True, "lr": 0.05}),
    "NAdam": (*DECAYS, BETAS, {"momentum_decay": 0.1},
              {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    "RAdam": (*DECAYS, {"betas": (0.8, 0.8), "eps": 1e-3, "lr": 0.05},
              {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Adamax": (*DECAYS, BETAS),
    "SparseAdam": ({}, BETAS, {"maximize": True}),
    "RMSprop": (
        *DECAYS,
        {"alpha": 0.8, "eps": 1e-3},
        {"momentum": 0.7},
        {"momentum": 0.7, "centered": True, "alpha": 0.8, "eps": 1e-3, "weight_decay": 0.1},
        {"centered": True, "maximize": True},
    ),
    "Adagrad": (*DECAYS, {"lr_decay": 0.3}, {"initial_accumulator_value": 0.4, "eps": 1e-3}),
    "Adadelta": (*DECAYS, {"rho": 0.7, "eps": 1e-3, "lr": 0.3}),
    "Rprop": ({}, {"maximize": True}, {"etas": (0.4, 2.0), "step_sizes": (0.01, 0.05), "lr": 0.02}),
    "Muon": (
        {},
        {"weight_decay": 0.3, "momentum": 0.8, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
        {"lr": 0.05, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 4, "adjust_lr_fn": "original"},
        {"eps": 10.0, "lr": 0.05},
    ),
    "Adafactor": (*DECAYS, {"lr": 0.5, "beta2_decay": -0.6, "eps": (1e-3, 0.5), "d": 1.5}),
    "ASGD": (*DECAYS, {"lambd": 0.1, "alpha": 0.5, "t0": 3.0, "lr": 0.1}),
}  # fmt: skip
WITHOUT_RULE = {"LBFGS", "Optimizer"}
SAID_ELSEWHERE = {"params", "self", "foreach", "fused", "capturable", "differentiable"}

CASES = [(name, given) for name, rows in KEYWORDS.items() for given in rows]
every_case = pytest.mark.parametrize(("name", "given"), CASES, ids=str)


pytestmark = pytest.mark.usefixtures("double", "wide_muon")


def drawn(seed: int) -> Any:
    return torch.randn((4, 3), generator=torch.Generator().manual_seed(seed))


@every_case
def test_a_class_with_keywords_is_a_rule_that_takes_its_steps(name: str, given: Any) -> None:
    mine, theirs = (torch.nn.Parameter(drawn(0)) for _ in range(2))
    peer = getattr(torch.optim, name)([theirs], **given)
    optimizer = opt.TorchOptimizer([mine], opt.from_torch_class(name.lower(), **given))
    for n in range(12):
        mine.grad, theirs.grad = drawn(n + 1), drawn(n + 1)
        if name == "SparseAdam":
            theirs.grad = theirs.grad.to_sparse(1)
        optimizer.step()
        peer.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_matrices_in_float32_follow_torch(name: str) -> None:
    mine, theirs = (torch.nn.Parameter(drawn(0).float()) for _ in range(2))
    peer = getattr(torch.optim, name)([theirs], lr=0.05, weight_decay=0.1)
    optimizer = opt.TorchOptimizer([mine], opt.from_torch_class(name, lr=0.05, weight_decay=0.1))
    for n in range(6):
        mine.grad, theirs.grad = drawn(n + 1).float(), drawn(n + 1).float()
        optimizer.step()
        peer.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_there_is_a_case_for_every_class_and_every_keyword() -> None:
    there = {
        name: set(inspect.signature(value.__init__).parameters) - SAID_ELSEWHERE
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in WITHOUT_RULE
    }
    used = {name: {key for given in rows for key in given} for name, rows in KEYWORDS.items()}

    assert {name: keys - used[name] - {"lr", "betas"} for name, keys in there.items()} == {
        name: set() for name in KEYWORDS
    }


def test_the_defaults_are_those_of_torch() -> None:
    for name in KEYWORDS:
        theirs = {
            k: p.default
            for k, p in inspect.signature(getattr(torch.optim, name).__init__).parameters.items()
            if k not in SAID_ELSEWHERE
        }

        decay = {"weight_decay": 0.5} if "weight_decay" in theirs else {}

        assert opt.from_torch_class(name, **theirs | decay) == opt.from_torch_class(name, **decay)


def test_the_rule_is_the_shortest_that_says_it() -> None:
    made = opt.from_torch_class

    assert made("sgd", lr=0.1) == opt.Descent(0.1)
    assert made("SGD", lr=0.1, momentum=0.9) == opt.SGD(0.1, 0.9)
    assert made(torch.optim.AdamW, lr=torch.tensor(0.5)) == opt.AdamW(0.5, lam=0.01)
    assert made("adam", maximize=True, weight_decay=0.1) == opt.Chain(
        opt.Maximise(), opt.WeightDecay(0.1), opt.Adam()
    )
    assert made("adamw", amsgrad=True) == opt.Chain(opt.TorchAMSGrad(), opt.DecoupledDecay(0.01, couple=True))


def test_keywords_of_how_torch_computes_change_nothing() -> None:
    assert opt.from_torch_class("adam", foreach=True, capturable=False) == opt.Adam()
    assert opt.from_torch_class("adam", fused=True, differentiable=False) == opt.Adam()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (("lbfgs",), opt.UnknownField, "asks for the loss again.*there are sgd, adam"),
        (("adan",), opt.UnknownField, "no rule is torch's adan; there are sgd, adam"),
        (
            ("adam", {"momentum": 0.9}),
            opt.UnknownField,
            "adam has no keyword momentum; it has lr, betas, eps",
        ),
        (("adam", {"capturable": True}), opt.BadSetting, "write TorchOptimizer.*capturable=True"),
        (("adam", {"differentiable": True}), opt.BadSetting, "write optimisers.update"),
        (("sgd", {"nesterov": True}), opt.BadSetting, "takes a rho above 0 and no dampening"),
        (("adam", {"lr": [0.1, 0.1]}), opt.BadSetting, "takes a real number"),
    ],
)
def test_what_no_rule_says_is_refused(call: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        opt.from_torch_class(call[0], **(call[1] if len(call) > 1 else {}))


def test_a_rate_of_many_elements_is_refused_with_its_shape() -> None:
    with pytest.raises(opt.BadSetting, match=r"shape \(2,\); it takes one number"):
        opt.from_torch_class("adam", lr=torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_torch_under_a_schedule_where_momentum_does_not(nesterov: bool) -> None:
    rates = (0.1, 0.1, 0.001, 0.05, 0.05)

    def gone(make: Any) -> Any:
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = make([p])
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            p.grad = torch.ones(3)
            optimizer.step()
        return p.detach()

    theirs = gone(lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, nesterov=nesterov))
    mine = gone(lambda ps: opt.TorchOptimizer(ps, opt.SGD(0.1, 0.9, nesterov=nesterov)))
    inside = gone(lambda ps: opt.TorchOptimizer(ps, (opt.Nesterov if nesterov else opt.Momentum)(0.1, 0.9)))
    torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=0)

    assert (inside - theirs).abs().min() > 0.01


def test_sgd_whose_momentum_is_switched_on_later_starts_as_torch_does() -> None:
    mine, theirs = (torch.nn.Parameter(drawn(0)) for _ in range(2))
    optimizer = opt.TorchOptimizer([mine], opt.SGD(0.1, dampening=0.5))
    peer = torch.optim.SGD([theirs], 0.1, dampening=0.5)
    for n, momentum in enumerate((0.0, 0.0, 0.9, 0.9, 0.0, 0.9)):
        for p, o in ((mine, optimizer), (theirs, peer)):
            o.param_groups[0]["momentum" if o is peer else "rho"] = momentum
            p.grad = drawn(n + 1)
            o.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


def test_the_page_for_those_who_come_from_torch_has_every_class_and_keyword() -> None:
    page = (Path(__file__).parents[2] / "docs" / "coming-from-torch.md").read_text()
    keywords = {key for rows in KEYWORDS.values() for given in rows for key in given}
    keywords -= {
        "etas",
        "step_sizes",
        "rho",
        "lambd",
        "t0",
    }  # the names are the same, or are in the table of groups

    assert [name for name in (*KEYWORDS, *WITHOUT_RULE - {"Optimizer"}) if f"`{name}" not in page] == []
    assert [key for key in (*keywords, *SAID_ELSEWHERE - {"params", "self"}) if f"`{key}" not in page] == []
