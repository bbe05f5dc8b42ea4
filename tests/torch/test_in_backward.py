"""Parameters that are stepped in the backward pass go the way of those that are stepped behind it, and their
gradients are never all there.
"""

import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there
from benchmarks.alive import Alive  # noqa: E402 it needs torch

Build = Callable[[Any, Any], opt.TorchOptimizer]


class Network(torch.nn.Module):
    """Tied weights, a part that every second forward leaves out, and a part that does not train."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(12, 8), torch.nn.Linear(8, 12)
        self.head.weight = self.embed.weight
        self.between, self.sometimes = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.still = torch.nn.Linear(8, 8).requires_grad_(False)
        self.count = 0

    def forward(self, tokens: Any) -> Any:
        self.count += 1
        h = self.still(self.between(self.embed(tokens)).tanh())
        return self.head(self.sometimes(h) if self.count % 2 else h)


def loss_of(net: Any, step: int) -> Any:
    tokens = torch.arange(6).reshape(2, 3) + step % 6
    return torch.nn.functional.cross_entropy(net(tokens).reshape(-1, 12), tokens.reshape(-1))


def trained(
    build: Build, rule: Any, edit: Callable[[opt.TorchOptimizer, int], object] = lambda *_: None
) -> tuple[Any, opt.TorchOptimizer]:
    """A network after six steps."""
    net = Network().bfloat16() if isinstance(rule, opt.MixedPrecision) else Network()
    optimizer = build(net, rule)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for n in range(6):
        optimizer.zero_grad()
        loss_of(net, n).backward()
        if build is opt.step_in_backward:
            assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        scheduler.step()
        edit(optimizer, n)
    return net, optimizer


RULES: dict[str, Any] = {
    "schedule": opt.AdamW(opt.Cosine(0.01, 6, warmup=2), lam=0.1),
    "average": opt.EMA(opt.Momentum(0.1)),
    "norm of an array": opt.Chain(opt.ClipNorm(0.1), opt.Adam(0.01)),
    "every second": opt.Chain(opt.AccumGrad(2), opt.SGD(0.1, 0.9)),
    "masters": opt.MixedPrecision(opt.AdamW(0.01)),
    "selectors": {opt.vectors: opt.Lion(0.001), "embed.*": opt.AdamW(0.01), "**": opt.Descent(0.1)},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_numbers_are_those_of_steps_behind_backward(rule: Any) -> None:
    (net, optimizer), (wanted, behind) = (
        trained(opt.step_in_backward, rule),
        trained(opt.TorchOptimizer, rule),
    )

    for (name, p), q in zip(net.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, q), name
    saved, other = optimizer.state_dict(), behind.state_dict()
    assert saved["param_groups"] == other["param_groups"]
    for n, entries in other["state"].items():
        assert all(torch.equal(saved["state"][n][k], v) for k, v in entries.items())


def test_matrices_are_stepped_one_by_one() -> None:
    rule = {opt.hidden_matrices: opt.Muon(0.02), "**": opt.AdamW(0.01)}
    net, wanted = trained(opt.step_in_backward, rule)[0], trained(opt.TorchOptimizer, rule)[0]

    for p, q in zip(net.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)


def test_edits_count_from_the_next_backward_on() -> None:
    def edit(optimizer: opt.TorchOptimizer, n: int) -> None:
        tree = optimizer.tree
        if n == 1:
            opt.freeze_(tree["between.weight"])
            optimizer.param_groups[0]["momentum"] = 0.5
        elif n == 2:
            opt.adjust_(tree["embed.weight"], 0.01)
            optimizer.state[optimizer.parameters["sometimes.bias"]]["v"].zero_()
        elif n == 3:
            opt.thaw_(tree["between.weight"])

    rule = opt.Momentum(0.1)
    net, wanted = trained(opt.step_in_backward, rule, edit)[0], trained(opt.TorchOptimizer, rule, edit)[0]

    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize("builds", [(0, 1), (1, 0)], ids=["to backward", "from backward"])
def test_saved_states_go_on_in_the_other_way(builds: tuple[int, int]) -> None:
    first, second = ((opt.TorchOptimizer, opt.step_in_backward)[n] for n in builds)
    net, optimizer = trained(first, opt.Adam(0.01))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Network()
    again.load_state_dict(saved["net"])
    again.count = net.count
    other = second(again, opt.Adam(0.5))
    other.load_state_dict(saved["optimizer"])
    for which, its in ((net, optimizer), (again, other)):
        its.zero_grad()
        loss_of(which, 6).backward()
        its.step()

    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


# -- memory --------------------------------------------------------------------------------------------------


def deep() -> Any:
    return torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(16)])


def peak(build: Build) -> float:
    """The most that was alive at once in a step, beside parameters and state, in sizes of all gradients."""
    net = deep()
    optimizer = build(net, opt.AdamW(0.01))
    alive = Alive()
    for _ in range(2):  # the state is made in the first
        optimizer.zero_grad()
        alive = Alive()
        with alive:
            net(torch.ones(1, 64)).square().sum().backward()
            optimizer.step()
    return alive.peak / sum(p.nbytes for p in net.parameters())


def test_the_peak_of_memory_falls_by_the_size_of_the_gradients() -> None:
    behind, inside = peak(opt.TorchOptimizer), peak(opt.step_in_backward)

    assert behind >= 1
    assert behind - inside >= 14 / 16
    assert inside <= 3 / 16


@pytest.mark.parametrize("rule", [opt.AdamW(), opt.Muon(), opt.Chain(opt.ClipNorm(), opt.SOAP())], ids=repr)
@pytest.mark.parametrize("build", [opt.TorchOptimizer, opt.step_in_backward], ids=["behind", "inside"])
def test_gradients_are_freed_where_no_garbage_collector_runs(build: Build, rule: opt.Rule) -> None:
    net, held = deep()[:2], []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: held.append(weakref.ref(p.grad.untyped_storage())))
    optimizer = build(net, rule)
    gc.disable()
    try:
        for _ in range(2):
            net(torch.ones(1, 64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        gc.enable()

    assert len(held) == 4
    assert all(storage() is None for storage in held)


# -- what is refused -----------------------------------------------------------------------------------------


class ByLoss(opt.Rule):
    """A step as long as the loss is high."""

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, opt.ops.loss(dx) * dx


TOTALS = r"sums over all parameters, and in backward there is one gradient at a time; "
REFUSED: dict[str, tuple[Any, str]] = {
    "norm": (opt.Chain(opt.ClipGlobalNorm(1.0), opt.Adam()), TOTALS + "write ClipNorm, .* or write Torch"),
    "skips": (opt.SkipNonFinite(opt.Adam()), TOTALS + "write TorchOptimizer"),
    "rateless": (opt.Prodigy(), TOTALS + "write TorchOptimizer"),
    "loss": (ByLoss(), "asks for the loss, which is not there in backward"),
    "hessians": (opt.Sophia(), "takes second gradients, which are not there in backward"),
    "examples": (opt.Chain(opt.PrivateAggregate(), opt.Adam()), "takes gradients of single examples"),
    "a part": ({"embed.*": opt.Adam(), "**": opt.Prodigy()}, "Prodigy.*" + TOTALS),
}


@pytest.mark.parametrize(("rule", "said"), REFUSED.values(), ids=REFUSED)
def test_rules_that_need_more_than_one_gradient_are_refused(rule: Any, said: str) -> None:
    net = Network()
    with pytest.raises(opt.BadSetting, match=said):
        opt.step_in_backward(net, rule)

    loss_of(net, 0).backward()
    assert net.between.weight.grad is not None


def test_a_second_gradient_in_one_step_is_refused_before_it_counts() -> None:
    net = Network()
    optimizer = opt.step_in_backward(net, opt.Momentum(0.1))
    loss_of(net, 0).backward()
    after = {name: p.clone() for name, p in net.named_parameters()}

    with pytest.raises(opt.BadState, match=r"second gradient in one step.*optimizer.step\(\) behind every"):
        loss_of(net, 1).backward()

    assert all(torch.equal(p, after[name]) for name, p in net.named_parameters())
    optimizer.zero_grad()
    optimizer.step()
    loss_of(net, 1).backward()
    assert not torch.equal(net.between.weight, after["between.weight"])


def test_a_gradient_that_a_rule_refuses_stays_and_changes_nothing() -> None:
    net = torch.nn.Linear(2, 1)
    opt.step_in_backward(net, opt.Chain(opt.ClipNorm(1.0), opt.Descent(0.1)))
    before = net.weight.detach().clone()

    with pytest.raises(opt.DomainError, match=r"2-norm inf.*, at grads\['weight'\]"):
        (net.weight * torch.inf).sum().backward()

    assert torch.equal(net.weight, before)
    assert net.weight.grad is not None


def test_gradients_that_are_set_by_hand_are_taken_by_step() -> None:
    net = torch.nn.Linear(2, 1)
    optimizer = opt.step_in_backward(net, opt.Descent(0.5))
    before = net.weight.detach().clone()
    net.weight.grad = torch.ones(1, 2)
    optimizer.step()

    assert torch.equal(net.weight, before - 0.5)
    assert net.weight.grad is None


def test_a_scaler_of_losses_is_refused() -> None:
    net = Network()
    optimizer = opt.step_in_backward(net, opt.Adam())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, 0)).backward()

    with pytest.raises(opt.BadState, match="a GradScaler has scaled the loss"):
        scaler.step(optimizer)


def test_a_parameter_is_stepped_by_one_optimiser_until_its_hooks_are_taken_out() -> None:
    net = Network()
    optimizer = opt.step_in_backward(net, opt.Descent(0.1))
    with pytest.raises(opt.BadState, match=r"by another optimiser; write optimizer.in_backward.remove\(\)"):
        opt.step_in_backward(net.between, opt.Adam())
    assert optimizer.in_backward is not None

    optimizer.in_backward.remove()
    loss_of(net, 0).backward()
    assert net.between.weight.grad is not None
    optimizer.step()
    opt.step_in_backward(net.between, opt.Adam())


def test_it_is_explained_as_one() -> None:
    net = Network()
    optimizer = opt.step_in_backward(net, opt.Adam())

    assert "6 arrays of float32, 252 parameters" in str(opt.explain(optimizer))
