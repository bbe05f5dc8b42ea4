"""What torch calls the settings of a rule, and what it knows that a rule does not: used, or refused with what
to write.
"""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there


def parameter() -> Any:
    return torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))


def moved(rule: opt.Rule, gradient: Any = None, **settings: Any) -> Any:
    """A parameter after one step with the settings of a group."""
    p = parameter()
    optimizer = opt.TorchOptimizer([{"params": [p], **settings}], rule)
    p.grad = torch.zeros_like(p) if gradient is None else gradient
    optimizer.step()
    return p.detach()


@pytest.mark.parametrize(
    "rule",
    [
        opt.Lion(),
        opt.Adam(),
        opt.Momentum(),
        opt.SGD(),
        opt.AdaDelta(),
        opt.Chain(opt.ClipGlobalNorm(1.0), opt.Adam()),
        opt.EMA(opt.Adam()),
        opt.EMA(opt.MixedPrecision(opt.Chain(opt.Lion()), "float64")),
        opt.Chain(opt.Lion(), opt.DecoupledDecay(0.0, couple=True)),
        opt.AdamW(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("by", ["group", "keyword"])
def test_the_decay_of_a_group_is_times_its_rate_for_every_rule(rule: opt.Rule, by: str) -> None:
    p = parameter()
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.25}
    optimizer = (
        opt.TorchOptimizer([{"params": [p], **settings}], rule)
        if by == "group"
        else opt.TorchOptimizer([p], rule, **settings)
    )
    for rate in (0.1, 0.02):  # a gradient of 0 leaves the decay alone
        before = p.detach().clone()
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.zeros_like(p)
        optimizer.step()
        torch.testing.assert_close(p.detach(), before * (1 - rate * 0.25), rtol=1e-6, atol=0)


def test_decay_beside_lion_is_that_of_its_authors() -> None:
    # x - eta (sign(...) + lam x), by hand
    found = moved(opt.Lion(), torch.ones(2, dtype=torch.float64), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(found, torch.tensor([1 - 0.1 * 1.5, -2 - 0.1 * 0.0], dtype=torch.float64))


def test_two_groups_of_a_trainer_decay_and_do_not() -> None:
    p, q = parameter(), parameter()
    groups = [{"params": [p], "weight_decay": 0.5}, {"params": [q], "weight_decay": 0.0}]
    optimizer = opt.TorchOptimizer(groups, opt.Lion(), lr=0.1)
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    optimizer.step()
    torch.testing.assert_close(p.detach(), parameter().detach() * 0.95)

    assert torch.equal(q, parameter())


@pytest.mark.parametrize(
    "rule",
    [opt.AdamW(lam=0.1, couple=False), opt.Chain(opt.Momentum(), opt.DecoupledDecay(0.1))],
    ids=repr,
)
def test_decay_that_is_not_times_the_rate_takes_lam_and_a_weight_decay_of_0(rule: opt.Rule) -> None:
    assert torch.equal(moved(rule, weight_decay=0.0), parameter().detach())
    torch.testing.assert_close(moved(rule, lam=0.5), parameter().detach() * 0.5)
    with pytest.raises(opt.BadSetting, match=r"weight_decay=0.1, which is times the rate.*write lam="):
        moved(rule, weight_decay=0.1)


def test_a_rule_without_a_rate_has_no_decay_that_follows_it() -> None:
    with pytest.raises(opt.BadSetting, match="has no rate that it could follow"):
        moved(opt.Rprop(), weight_decay=0.1)


@pytest.mark.parametrize(
    ("key", "value", "rule", "says"),
    [
        ("maximize", True, opt.Adam(), r"put Maximise\(\) first"),
        ("maximize", False, opt.Chain(opt.Maximise(), opt.Adam()), r"put Maximise\(\) first"),
        ("amsgrad", True, opt.Adam(), "take TorchAMSGrad"),
        ("nesterov", True, opt.Momentum(), r"take SGD\(eta, rho, nesterov=True\)"),
        ("nesterov", False, opt.SGD(0.1, 0.9, nesterov=True), "take SGD"),
        ("dampening", 0.5, opt.Momentum(), r"take SGD\(eta, rho, dampening\)"),
        ("centered", True, opt.RMSProp(), r"take RMSProp\(centred=True\)"),
        ("lr_decay", 0.1, opt.AdaGrad(), r"take TorchAdaGrad\(decay="),
        ("initial_accumulator_value", 0.1, opt.TorchAdaGrad(), r"take TorchAdaGrad\(start="),
        ("momentum_decay", 0.1, opt.NAdam(), r"take TorchNAdam\(psi="),
        ("decoupled_weight_decay", True, opt.Adam(), "take AdamW"),
        ("differentiable", True, opt.Adam(), "write optimisers.update"),
        ("capturable", True, opt.Adam(), r"write TorchOptimizer\(params, rule, capturable=True\)"),
        ("momentum", 0.9, opt.Adam(), "it has lr, beta, betas, epsilon, eps"),
        ("momentum", 0.9, opt.RMSProp(), "take .*TorchRMSProp"),
        ("alpha", 0.9, opt.Momentum(), "it has lr, rho, momentum"),
        ("ns_steps", 3, opt.Muon(), r"take Muon\(steps="),
        ("adjust_lr_fn", "match_rms_adamw", opt.Muon(), r"take Muon\(scale="),
        ("beta2_decay", -0.5, opt.Adam(), r"take TorchAdafactor\(decay="),
    ],
)
def test_what_the_rule_does_not_say_is_refused_with_what_to_write(
    key: str, value: Any, rule: opt.Rule, says: str
) -> None:
    with pytest.raises(opt.BadSetting, match=rf"group 0 sets {key}={value!r}.*{says}"):
        moved(rule, **{key: value})


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (opt.Chain(opt.Maximise(), opt.Adam()), {"maximize": True}),
        (opt.Adam(), {"maximize": False, "amsgrad": False, "foreach": True, "fused": None}),
        (opt.TorchAMSGrad(), {"amsgrad": True}),
        (opt.SGD(0.1, 0.9, nesterov=True), {"nesterov": True, "dampening": 0}),
        (opt.RMSProp(centred=True), {"centered": True}),
        (opt.RMSProp(), {"momentum": 0, "alpha": 0.9}),
        (opt.TorchAdafactor(), {"beta2_decay": -0.8, "d": 1.0, "maximize": False}),
        (opt.AdamW(), {"decoupled_weight_decay": True}),
    ],
    ids=repr,
)
def test_what_the_rule_says_already_is_taken(rule: opt.Rule, settings: dict[str, Any]) -> None:
    torch.testing.assert_close(
        moved(rule, torch.ones(2).double(), **settings), moved(rule, torch.ones(2).double())
    )


@pytest.mark.parametrize(
    ("rule", "shown"),
    [
        (opt.SGD(0.1, 0.9), {"lr": 0.1, "momentum": 0.9, "dampening": 0.0}),
        (opt.RMSProp(), {"alpha": 0.9, "eps": 1e-8}),
        (opt.TorchRMSProp(), {"alpha": 0.99, "momentum": 0.9}),
        (opt.TorchAdafactor(0.1, -0.5, 2.0), {"lr": 0.1, "beta2_decay": -0.5, "d": 2.0}),
        (opt.TorchNAdam(), {"momentum_decay": 0.004}),
        (opt.TorchAdaGrad(decay=0.1), {"lr_decay": 0.1}),
        (opt.Rprop(0.02), {"lr": 0.02, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)}),
        (opt.AdaDelta(), {"lr": 1.0, "rho": 0.9}),
        (opt.Chain(opt.Lion(), opt.DecoupledDecay(0.1, couple=True)), {"weight_decay": 0.1}),
    ],
    ids=repr,
)
def test_settings_stand_in_the_group_by_torchs_name(rule: opt.Rule, shown: dict[str, Any]) -> None:
    group = opt.TorchOptimizer([parameter()], rule).param_groups[0]

    assert {key: group[key] for key in shown} == shown


def test_the_momentum_of_rmsprop_is_not_its_alpha() -> None:
    p = parameter()
    optimizer = opt.TorchOptimizer([p], opt.TorchRMSProp())
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.read_groups()

    assert optimizer.tree["0.0"].rule == opt.TorchRMSProp(mu=0.5)


@pytest.mark.parametrize("by", ["group", "keyword"])
def test_the_rate_of_rprop_is_its_first_size(by: str) -> None:
    p = parameter()
    optimizer = (
        opt.TorchOptimizer([p], opt.Rprop(), lr=0.5)
        if by == "keyword"
        else opt.TorchOptimizer([{"params": [p], "lr": 0.5}], opt.Rprop())
    )
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), parameter().detach() - 0.5)


def test_complex_gradients_are_clipped_by_parts() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    p.grad = torch.tensor([3 - 0.1j, -0.2 + 5j, 0.1j], dtype=torch.complex128)
    wanted = torch.view_as_complex(-torch.view_as_real(p.grad).clamp(-0.5, 0.5))
    opt.TorchOptimizer([p], opt.Chain(opt.ClipGrad(0.5), opt.Descent(1.0))).step()
    torch.testing.assert_close(p.detach(), wanted)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"bias": opt.Adam(), "**": opt.Descent()}, r"'bias' matches no parameter; .* write '\*\*\.bias'"),
        (
            {"**": opt.Descent(), "**.bias": opt.Adam()},
            "'\\*\\*.bias' takes no parameter, since keys before it",
        ),
        ({"**.bias": opt.Adam()}, "no rule for model.*weight"),
    ],
)
def test_globs_that_do_not_fit_are_refused_as_by_setup(rules: dict[str, opt.Rule], text: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 1))
    for make in (lambda: opt.TorchOptimizer(module, rules), lambda: opt.setup(rules, module)):
        with pytest.raises(opt.NoMatch, match=text):
            make()


@pytest.mark.parametrize("rule", [3, "adam", opt.Adam, object()], ids=["number", "text", "class", "object"])
def test_what_is_no_rule_makes_no_group(rule: Any) -> None:
    optimizer = opt.TorchOptimizer([parameter()], opt.Adam())
    with pytest.raises(opt.BadState, match=r"group 1 has .* as its rule; it takes a rule"):
        optimizer.add_param_group({"params": [parameter()], "rule": rule})

    assert len(optimizer.param_groups) == 1
    optimizer.step()
