"""Second gradients, and those of single examples, come to a TorchOptimizer as `update` takes them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there

pytestmark = pytest.mark.usefixtures("double")

ASKING = [opt.Sophia(0.01), opt.AdaHessian(0.1), opt.Chain(opt.ClipNorm(1.0), opt.SophiaG(0.1))]


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


def loss(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


def nested(given: dict[str, Any]) -> Any:
    out: dict[str, Any] = {}
    for name, value in given.items():
        layer, key = name.split(".")
        out.setdefault(layer, {})[key] = value
    return out


FORMS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "by name": lambda _, h: h,
    "by parameter": lambda model, h: {p: h[name] for name, p in model.named_parameters()},
    "a list": lambda _, h: list(h.values()),
    "a generator": lambda _, h: (v for v in h.values()),
    "nested": lambda _, h: nested(h),
    "a list with gaps": lambda _, h: [v if n % 2 else None for n, v in enumerate(h.values())],
    "a dict with gaps": lambda _, h: {k: v for n, (k, v) in enumerate(h.items()) if n % 2},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rule", ASKING, ids=lambda r: type(r).__name__)
def test_second_gradients_count_as_in_update(rule: opt.Rule, form: Callable[[Any, Any], Any]) -> None:
    mine, plain = network(), network()
    x = torch.linspace(-1, 1, 8).reshape(4, 2)
    optimizer, state = opt.TorchOptimizer(mine, rule), opt.setup(rule, plain)
    for n in range(6):
        hessian = opt.hutchinson(loss, plain, n, x) if n % 2 == 0 else None
        optimizer.zero_grad()
        loss(mine, x).backward()
        given = None if hessian is None else form(mine, hessian)
        second = hessian
        if hessian is not None and form in (FORMS["a list with gaps"], FORMS["a dict with gaps"]):
            second = {k: v if i % 2 else None for i, (k, v) in enumerate(hessian.items())}
        optimizer.step(hessians=given)
        _, grads = opt.value_and_grad(loss, plain, x)
        state, plain = opt.update_(state, plain, grads, second)
    torch.testing.assert_close(list(mine.parameters()), list(plain.parameters()), rtol=1e-13, atol=1e-13)


def test_what_is_not_given_or_does_not_fit_is_said() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Sophia(0.1))
    before = copy.deepcopy(list(model.parameters()))
    loss(model, torch.ones(4, 2)).backward()
    with pytest.raises(opt.BadState, match=r"Sophia asks for second gradients.*step\(hessians=\.\.\.\)"):
        optimizer.step()
    with pytest.raises(opt.TreeMismatch, match=r"hessians has 1 entries, and this optimiser has 4"):
        optimizer.step(hessians=[torch.ones(3, 2)])
    with pytest.raises(opt.TreeMismatch, match=r"hessians has '9.weight'.*there are 0.weight, 0.bias"):
        optimizer.step(hessians={"9.weight": torch.ones(3, 2)})
    with pytest.raises(opt.TreeMismatch, match=r"a tensor of shape \(5,\), which is no parameter"):
        optimizer.step(hessians={torch.ones(5): torch.ones(5)})
    with pytest.raises(opt.TreeMismatch, match=r"shape \(2,\) for parameters of shape \(3, 2\)"):
        optimizer.step(hessians={"0.weight": torch.ones(2)})
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


def test_those_that_no_rule_takes_are_refused() -> None:
    class Both(opt.Rule):
        def apply(self, state: Any, x: Any, dx: Any, dx2: Any = None) -> Any:
            return state, dx if dx2 is None else dx2

    for rule in (opt.Adam(0.1), opt.Chain(opt.ClipNorm(1.0), opt.Adam(0.1))):
        x = torch.nn.Parameter(torch.ones(2))
        optimizer = opt.TorchOptimizer([x], rule)
        x.grad = torch.ones(2)
        with pytest.raises(opt.BadState, match=r"no rule here takes second gradients; opt\.Sophia"):
            optimizer.step(hessians=[torch.ones(2)])
        assert x.tolist() == [1.0, 1.0]
        optimizer.step(hessians=None)
    optimizer = opt.TorchOptimizer([x], opt.Chain(opt.ClipNorm(9.0), Both()))
    before = x.detach().clone()
    optimizer.step(hessians=[torch.full((2,), 0.25)])
    torch.testing.assert_close(x.detach(), before - 0.25)


def test_a_closure_a_scheduler_and_a_hook_let_them_through() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Sophia(0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda _o, _args, keywords: seen.append(sorted(keywords)))

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(model, torch.ones(4, 2))
        value.backward()
        return value

    wanted = closure().item()
    assert optimizer.step(closure, hessians=None).item() == wanted
    scheduler.step()
    assert seen == [["hessians"]]


# -- gradients of single examples ----------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2])
def test_gradients_of_single_examples_come_from_where_opacus_keeps_them(pieces: int) -> None:
    """In one piece, or in a list of those of several backward passes."""
    rule = opt.Chain(opt.PrivateAggregate(0.5, 0.7, seed=3), opt.Descent(0.1))
    mine = network()
    plain = {name: p.detach().clone() for name, p in mine.named_parameters()}
    xs = torch.linspace(-1, 1, 12).reshape(6, 2)
    optimizer, state = opt.TorchOptimizer(mine, rule), opt.setup(rule, plain)

    def one(parameters: Any, x: Any) -> Any:
        return (torch.func.functional_call(mine, parameters, (x[None],)) ** 2).sum()

    for _ in range(3):
        parameters = {name: p.detach() for name, p in mine.named_parameters()}
        each = torch.func.vmap(torch.func.grad(one), (None, 0))(parameters, xs)
        loss(mine, xs).backward()  # the mean gradient stands there too
        for name, p in mine.named_parameters():
            p.grad_sample = each[name] if pieces == 1 else list(each[name].split(3))
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad_sample is None and p.grad is None for p in mine.parameters())
        state, plain = opt.update_(state, plain, each)
    torch.testing.assert_close(
        [p.detach() for p in mine.parameters()], [*plain.values()], rtol=1e-13, atol=1e-13
    )


def test_a_mean_gradient_is_not_taken_for_those_of_examples() -> None:
    model = network()
    optimizer = opt.TorchOptimizer(model, opt.Chain(opt.PrivateAggregate(), opt.Descent()))
    loss(model, torch.ones(4, 2)).backward()
    with pytest.raises(opt.TreeMismatch, match=r"gradients of single examples.*p\.grad_sample"):
        optimizer.step()
