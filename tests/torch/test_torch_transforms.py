"""Steps that are traced: gradients through a step, `torch.compile`, sparse gradients."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad, vmap

import optimisers as opt

Model = dict[str, Any]


def start() -> Model:
    draw = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(3, 2, dtype=torch.float64, generator=draw),
        "b": torch.randn(4, dtype=torch.float64, generator=draw),
    }


def loss(model: Model) -> torch.Tensor:
    return 0.5 * (model["a"] ** 2).sum() + (model["b"] ** 4).sum()


def trained(state: Any, model: Model, steps: int = 4) -> torch.Tensor:
    """The loss after some steps."""
    for _ in range(steps):
        state, model = opt.update(state, model, grad(loss)(model))
    return loss(model)


RULES: dict[str, Callable[[Any], opt.Rule]] = {
    "Adam": opt.Adam,
    "clipped Momentum": lambda e: opt.Chain(opt.ClipGlobalNorm(0.5), opt.Momentum(e)),
    "AdamW": lambda e: opt.AdamW(0.1, lam=e),
    "average": lambda e: opt.EMA(opt.RMSProp(e), 0.9),
    "every other": lambda e: opt.Chain(opt.AccumGrad(2), opt.Descent(e)),
    "beta": lambda e: opt.Adam(0.1, beta=(e, 0.99)),
}

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def slope(f: Callable[[Any], Any], at: torch.Tensor) -> float:
    """The derivative by central differences."""
    return ((f(at + 1e-6) - f(at - 1e-6)) / 2e-6).item()


# -- gradients through steps ---------------------------------------------------------------------------------


@each_rule
def test_a_loss_after_steps_is_differentiated_by_a_hyper_parameter(rule: Callable[[Any], opt.Rule]) -> None:
    def after(e: torch.Tensor) -> torch.Tensor:
        return trained(opt.setup(rule(e), start()), start())

    e = torch.tensor(0.1, dtype=torch.float64)
    assert grad(after)(e).item() == pytest.approx(slope(after, e), rel=1e-5, abs=1e-8)


def test_every_hyper_parameter_of_a_state_can_be_differentiated() -> None:
    state = opt.setup(opt.Chain(opt.ClipGlobalNorm(0.5), opt.AdamW(0.1, lam=0.01, epsilon=1e-3)), start())
    known = opt.hyperparameters(state)
    at = {name: torch.tensor(value, dtype=torch.float64) for name, value in known.items()}
    assert set(at) == {"omega", "eta", "beta[0]", "beta[1]", "lam", "epsilon"}

    def after(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return trained(opt.with_hyperparameters(state, values), start())

    found = grad(after)(at)
    for name, value in at.items():
        by_name = lambda v, name=name: after({**at, name: v})  # noqa: E731
        assert found[name].item() == pytest.approx(slope(by_name, value), rel=1e-3, abs=1e-5)


def test_a_gradient_of_zero_gives_a_finite_hyper_gradient() -> None:
    def after(e: torch.Tensor) -> torch.Tensor:
        model = {"a": torch.zeros(3, dtype=torch.float64)}
        state = opt.setup(opt.Adam(e), model)
        for _ in range(2):
            state, model = opt.update(state, model, model)
        return model["a"].sum()

    assert grad(after)(torch.tensor(0.1, dtype=torch.float64)) == 0


@each_rule
def test_autograd_follows_steps_from_the_start(rule: Callable[[Any], opt.Rule]) -> None:
    begin = {k: x.requires_grad_() for k, x in start().items()}
    state, model = opt.setup(rule(0.1), begin), begin
    for _ in range(3):
        slopes = torch.autograd.grad(loss(model), list(model.values()), create_graph=True)
        state, model = opt.update(state, model, dict(zip(model, slopes, strict=True)))
    found = torch.autograd.grad(loss(model), begin["b"])[0]

    def after(b: torch.Tensor) -> torch.Tensor:
        model = {"a": start()["a"], "b": b}
        return trained(opt.setup(rule(0.1), model), model, 3)

    torch.testing.assert_close(found, grad(after)(start()["b"]))
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 1e-6
        wanted = (after(start()["b"] + step) - after(start()["b"] - step)) / 2e-6
        assert found[i].item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-7)


def test_rates_are_vmapped() -> None:
    rates = torch.tensor([0.01, 0.1, 0.3], dtype=torch.float64)
    model = start()
    found = vmap(lambda e: trained(opt.setup(opt.Adam(e), model), model))(rates)
    alone = [trained(opt.setup(opt.Adam(e), start()), start()) for e in (0.01, 0.1, 0.3)]
    torch.testing.assert_close(found, torch.stack(alone))


def test_a_state_that_was_followed_trains_on_without() -> None:
    begin = {k: x.requires_grad_() for k, x in start().items()}
    state, model = opt.setup(opt.Adam(0.1), begin), begin
    plain, other = opt.setup(opt.Adam(0.1), start()), start()
    slopes = torch.autograd.grad(loss(model), list(model.values()), create_graph=True)
    state, model = opt.update(state, model, dict(zip(model, slopes, strict=True)))
    plain, other = opt.update(plain, other, grad(loss)(other))
    model = {k: x.detach() for k, x in model.items()}
    for _ in range(2):
        state, model = opt.update(state, model, grad(loss)(model))
        plain, other = opt.update(plain, other, grad(loss)(other))
    for k, x in model.items():
        torch.testing.assert_close(x, other[k], rtol=0, atol=1e-15)
        assert not x.requires_grad
    assert "unpacked state" in opt.explain(state).groups[0].reason


def test_a_step_in_place_that_is_followed_is_refused() -> None:
    def after(e: torch.Tensor) -> torch.Tensor:
        model = start()
        opt.update_(opt.setup(opt.Adam(e), model), model, grad(loss)(model))
        return loss(model)

    with pytest.raises(opt.BadState, match=r"update_ writes in place, which cannot be traced; write update"):
        grad(after)(torch.tensor(0.1, dtype=torch.float64))


# -- torch.compile -------------------------------------------------------------------------------------------


def stepped(state: Any, model: Model) -> Any:
    return opt.update(state, model, grad(loss)(model))


@each_rule
def test_a_compiled_train_step_has_no_break_and_the_same_numbers(rule: Callable[[Any], opt.Rule]) -> None:
    torch._dynamo.reset()
    backend = CompileCounter()
    compiled = torch.compile(stepped, fullgraph=True, backend=backend)
    state, model = opt.setup(rule(0.1), start()), start()
    plain, other = opt.setup(rule(0.1), start()), start()
    for _ in range(5):
        state, model = compiled(state, model)
        plain, other = stepped(plain, other)
    for k, x in model.items():
        torch.testing.assert_close(x, other[k], rtol=0, atol=0)
    assert state == plain
    assert backend.frame_count == 2  # a state of `setup`, then one that a compiled step gave


@pytest.mark.slow
def test_adjusting_does_not_compile_and_freezing_does() -> None:
    torch._dynamo.reset()
    backend = CompileCounter()
    compiled = torch.compile(stepped, fullgraph=True, backend=backend)
    state, model = opt.setup(opt.Adam(0.1), start()), start()
    plain, other = opt.setup(opt.Adam(0.1), start()), start()

    def both(change: Callable[[Any], None]) -> int:
        nonlocal state, model, plain, other
        change(state)
        change(plain)
        for _ in range(3):
            state, model = compiled(state, model)
            plain, other = stepped(plain, other)
        for k, x in model.items():
            torch.testing.assert_close(x, other[k], rtol=0, atol=0)
        return backend.frame_count

    before = both(opt.explain)
    after_looking = both(lambda s: opt.adjust_(s, 0.2))
    assert both(lambda s: opt.adjust_(s, 0.3)) == after_looking <= before + 1
    assert both(lambda s: opt.freeze_(s.a)) > after_looking


def test_the_whole_compiler_takes_the_step() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(stepped, fullgraph=True, backend="aot_eager")
    _, model = compiled(opt.setup(opt.AdamW(0.1), start()), start())
    _, other = stepped(opt.setup(opt.AdamW(0.1), start()), start())
    torch.testing.assert_close(model, other, rtol=0, atol=0)


def test_a_module_inside_a_compiled_step_is_answered_with_what_to_give() -> None:
    torch._dynamo.reset()
    net = nn.Linear(2, 2)
    state = opt.setup(opt.Adam(), net)
    grads = {k: torch.ones_like(p) for k, p in net.named_parameters()}
    with pytest.raises(Exception, match="instead of a module"):
        torch.compile(lambda s, g: opt.update(s, net, g), fullgraph=True, backend="eager")(state, grads)


# -- sparse gradients ----------------------------------------------------------------------------------------


def lookup() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Linear(4, 2))


@pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("rule", "peer"),
    [
        (opt.Descent(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (opt.TorchAdaGrad(0.1, 1e-10), lambda p: torch.optim.Adagrad(p, lr=0.1)),
        (opt.Adam(0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
    ],
    ids=["Descent", "AdaGrad", "Adam"],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_sparse_gradients_step_as_in_torch(step: Any, rule: opt.Rule, peer: Any) -> None:
    ours, theirs = lookup(), lookup()
    if isinstance(rule, opt.Adam):
        theirs[0].sparse = False  # torch's Adam takes dense gradients; so does ours, which makes them dense
    state, other = opt.setup(rule, ours), peer(theirs.parameters())
    for i in range(4):
        for net in (ours, theirs):
            net.zero_grad()
            net(torch.tensor([3, 5, 3, i])).square().sum().backward()
        state, ours = step(state, ours, opt.gradients(ours))
        other.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class LazyMomentum(opt.Rule):
    """Momentum of the rows that are touched, as torch.optim.SparseAdam has it for Adam."""

    eta: float = 0.1
    lazy = True

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        v = 0.9 * state + dx
        return v, self.eta * v


@pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)
def test_a_lazy_rule_leaves_other_rows_alone(step: Any) -> None:
    x = torch.ones(4, 2)
    rows = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2]]), torch.ones(3, 2), (4, 2), check_invariants=True)
    state, new = step(opt.setup(LazyMomentum(), x), x.clone(), rows)
    state, new = step(state, new, torch.sparse_coo_tensor([[0]], [[1.0, 1.0]], (4, 2), check_invariants=True))
    v = [1.9, 0.0, 2.0, 0.0]
    torch.testing.assert_close(state.state, torch.tensor(v)[:, None].expand(4, 2))
    torch.testing.assert_close(new[:, 0], torch.tensor([1 - 0.1 - 0.19, 1.0, 0.8, 1.0]))


def test_a_sparse_gradient_of_another_shape_is_refused() -> None:
    x = torch.ones(4, 2)
    rows = torch.sparse_coo_tensor([[0]], [[1.0]], (4, 1), check_invariants=True)
    with pytest.raises(opt.TreeMismatch, match=r"shape \(4, 1\) for parameters of shape \(4, 2\), at grads"):
        opt.update(opt.setup(opt.Descent(), x), x, rows)


def test_a_deep_copy_of_a_module_and_its_state_train_alike() -> None:
    net = lookup()
    state = opt.setup(opt.Adam(), net)
    twin_state, twin = copy.deepcopy((state, net))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (net, twin):
            n(torch.tensor([1, 2])).sum().backward()
    opt.update_(state, net, opt.gradients(net))
    opt.update_(twin_state, twin, opt.gradients(twin))
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# -- modules that hold each other, compiled modules ----------------------------------------------------------


class Aliased(nn.Module):
    """A module that reaches its parts by a list, an attribute and a bound method beside its children."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.order = [self.a, {"b": self.b}]
        self.__dict__["call"] = self.c.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(torch.tanh(self.order[1]["b"](torch.tanh(self.order[0](x)))))


def aliased() -> nn.Module:
    torch.manual_seed(0)
    return Aliased()


def losses(module: nn.Module, step: Any, count: int = 4) -> list[float]:
    x = torch.linspace(-1, 1, 24).reshape(8, 3)
    state = opt.setup(opt.Descent(0.1), module)
    found: list[float] = []
    for _ in range(count):
        value, grads = opt.value_and_grad(lambda m: (m(x) - 1).square().mean(), module)
        state, module = step(state, module, grads)
        found.append(value.item())
    return found


def test_a_new_module_computes_with_its_own_weights_however_it_reaches_them() -> None:
    wanted = losses(aliased(), opt.update_)
    assert wanted == sorted(wanted, reverse=True)
    assert losses(aliased(), opt.update) == pytest.approx(wanted)


@pytest.mark.parametrize("how", ["torch.compile", "compile"])
def test_a_compiled_module_computes_with_its_own_weights(how: str) -> None:
    def made() -> nn.Module:
        torch._dynamo.reset()
        module = aliased()
        if how == "torch.compile":
            return torch.compile(module, backend="eager")
        module.compile(backend="eager")
        return module

    assert losses(made(), opt.update) == pytest.approx(losses(aliased(), opt.update_), rel=1e-5)


def test_a_forward_that_holds_the_old_module_is_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    old = module[0].forward
    module[0].forward = lambda x: old(x) * 2
    with pytest.raises(opt.BadState, match=r"Linear has a forward of its own.*write update_"):
        losses(module, opt.update)


def in_place(state: Any, model: Any, grads: Any) -> Any:
    return opt.update_(state, model, grads)


@pytest.mark.parametrize("kind", ["a dict", "a module"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_step_in_place_runs_beside_a_compiled_graph(kind: str) -> None:
    torch._dynamo.reset()
    net = nn.Linear(2, 2, bias=False)
    model: Any = net if kind == "a module" else {"weight": net.weight}
    before = net.weight.detach().clone()
    state, grads = opt.setup(opt.Descent(0.5), model), {"weight": torch.ones(2, 2)}
    compiled = torch.compile(in_place, backend="eager")
    for i in range(3):
        compiled(state, model, grads)
        torch.testing.assert_close(net.weight.detach(), before - 0.5 * (i + 1))


def test_what_is_frozen_or_adjusted_comes_back_from_a_file() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ours = opt.TorchOptimizer(net, opt.Adam(0.01))
    net(torch.ones(1, 2)).sum().backward()
    ours.step()
    opt.freeze_(ours.tree["0.weight"])
    opt.adjust_(ours.tree["1.weight"], 0.5)
    again = opt.TorchOptimizer(torch.compile(net, backend="eager"), opt.Adam(0.01))
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert [leaf.frozen for leaf in map(again.tree.__getitem__, again.parameters)] == [
        True,
        False,
        False,
        False,
    ]
    assert again.tree["1.weight"].rule.eta == 0.5
    assert again.tree["1.bias"].rule.eta == 0.01


def test_a_schedule_that_ends_where_it_starts_goes_on_from_a_file() -> None:
    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        net = nn.Linear(2, 2)
        return net, opt.TorchOptimizer(net, opt.Adam(opt.Cosine(0.01, 50, warmup=5)))

    net, ours = made()
    other, again = made()
    for i in range(6):
        if i == 3:
            other.load_state_dict(net.state_dict())
            again.load_state_dict(copy.deepcopy(ours.state_dict()))
        for n, o in ((net, ours), (other, again)):
            o.zero_grad()
            n(torch.ones(1, 2)).square().sum().backward()
            o.step()
    assert again.param_groups[0]["lr"] == ours.param_groups[0]["lr"]
    torch.testing.assert_close(other.weight, net.weight, rtol=0, atol=0)


def test_exact_masters_bear_weights_that_are_set_to_zero() -> None:
    x = torch.full((4,), 0.3, dtype=torch.bfloat16)
    state = opt.setup(opt.SplitPrecision(opt.Adam(0.01)), x)
    for sign in (1.0, 1.0, -1.0, 1.0):
        state, x = opt.update_(state, x, torch.full((4,), sign, dtype=torch.bfloat16))
        x.zero_()
    opt.update_(state, x, torch.ones(4, dtype=torch.bfloat16))
    assert x.isfinite().all()
    assert (x.abs() < 0.02).all()
