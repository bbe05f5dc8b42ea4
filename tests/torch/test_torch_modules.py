"""Modules of PyTorch are models: every kind of them, every part of them, their ties, buffers and hooks."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import optimisers as opt

ENGINES = ("interpret", "numba")
STEPS = (opt.update, opt.update_)

both_engines = pytest.mark.parametrize("engine", ENGINES)
both_updates = pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)


# -- modules of every kind -----------------------------------------------------------------------------------


class Net(nn.Module):
    """A layer of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.layers(x))


class Blocks(nn.Module):
    """Every container of PyTorch, and parameters beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))])
        self.named = nn.ModuleDict({"left": nn.Linear(3, 2), "right": nn.Linear(3, 2, bias=False)})
        self.scales = nn.ParameterList([torch.ones(3), torch.ones(3)])
        self.shifts = nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(())})
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.ReLU()
        self.register_parameter("absent", None)

    def forward(self, x: Any) -> Any:
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = torch.tanh(block(x) * scale)
        return self.gain * (self.named.left(x) + self.named.right(x)) + self.shifts["a"] + self.shifts["b"]


class Tied(nn.Module):
    """A head that is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Any) -> Any:
        return self.head(torch.tanh(self.inner(self.embed(x))))


class Recurrent(nn.Module):
    """A recurrent layer, which keeps a list of its weights beside their dict."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell = kind(3, 4, num_layers=2, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.cell(x[None])[0]


class Attending(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.before = nn.Linear(3, 4)

    def forward(self, x: Any) -> Any:
        y = self.before(x)
        return self.attention(y, y, y)[0]


def named_sequence() -> nn.Module:
    net = nn.Sequential()
    net.add_module("first", nn.Linear(3, 4))
    net.add_module("second", nn.Linear(4, 2))
    return net


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


def images(net: nn.Module) -> nn.Module:
    """A module that sees its input as images."""
    return nn.Sequential(nn.Unflatten(1, (3, 1, 1)), net, nn.Flatten())


def last_channels() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return images(net.to(memory_format=torch.channels_last))


def partly_frozen() -> nn.Module:
    net = Net()
    net.layers.requires_grad_(False)
    return net


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(3, 2),
    "own classes": Net,
    "all containers": Blocks,
    "Sequential with names": named_sequence,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "BatchNorm without affine": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)),
    "MultiheadAttention": Attending,
    "weight norm": weight_normed,
    "channels last": last_channels,
    "partly frozen": partly_frozen,
}
"""Name -> how a module is made, which takes arrays of shape (6, 3)."""

every_module = pytest.mark.parametrize("what", MODULES)


def made(what: str, *, double: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = MODULES[what]()
    return net.double() if double else net


X = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 3)))


def loss(net: Any, x: Any = X) -> Any:
    return net(x).square().mean()


def backward(net: nn.Module, x: Any = X) -> Any:
    """The gradients of the loss, as autograd leaves them in the parameters."""
    net.zero_grad()
    loss(net, x).backward()
    return opt.gradients(net)


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def agree(got: Any, wanted: Any, **tolerance: float) -> None:
    """Equal in names, order, shapes and numbers."""
    assert list(got) == list(wanted)
    for name, x in wanted.items():
        torch.testing.assert_close(got[name], x, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def exactly(got: Any, wanted: Any) -> None:
    agree(got, wanted, rtol=0, atol=0)


# -- training ------------------------------------------------------------------------------------------------

PEERS: dict[str, tuple[opt.Rule, Callable[[Any], torch.optim.Optimizer]]] = {
    "SGD": (opt.Descent(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (opt.Momentum(0.1, 0.8), lambda p: torch.optim.SGD(p, 0.1, momentum=0.8)),
    "Adam": (opt.Adam(0.01, (0.8, 0.95), 1e-3), lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.95), 1e-3)),
    "AdamW": (
        opt.AdamW(0.01, lam=0.1, epsilon=1e-3),
        lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3, weight_decay=0.1),
    ),
    "L2": (
        opt.Chain(opt.WeightDecay(0.1), opt.Adam(0.01, epsilon=1e-3)),
        lambda p: torch.optim.Adam(p, 0.01, eps=1e-3, weight_decay=0.1),
    ),
}
"""Name -> (rule, optimiser). Epsilon is large: some gradients are zero but for rounding."""


@pytest.mark.parametrize(
    ("what", "peer", "engine", "step"),
    [
        pytest.param(what, peer, *way, id=f"{what}-{peer}-{way[0]}-{way[1].__name__}")
        for (i, what), (j, peer) in itertools.product(enumerate(MODULES), enumerate(PEERS))
        for way in [[*itertools.product(ENGINES, STEPS)][(i + j) % 4]]
    ],
)
def test_a_module_trains_as_by_torch_optim(
    what: str, peer: str, engine: str, step: Callable[..., Any]
) -> None:
    """Every module by every rule; both meet each engine and each kind of step."""
    rule, make = PEERS[peer]
    net, other = made(what), made(what)
    theirs = make(other.parameters())
    state = opt.setup(rule, net, engine=engine)
    for _ in range(3):
        state, net = step(state, net, backward(net))
        backward(other)
        theirs.step()

    agree(values(net), values(other), rtol=1e-11, atol=1e-12)
    agree(dict(net.named_buffers()), dict(other.named_buffers()), rtol=1e-11, atol=1e-12)


def test_clipping_by_the_global_norm_is_that_of_torch() -> None:
    net, other = made("all containers"), made("all containers")
    state = opt.setup(opt.Chain(opt.ClipGlobalNorm(0.01), opt.Descent(1.0)), net)
    theirs = torch.optim.SGD(other.parameters(), 1.0)
    for _ in range(3):
        state, net = opt.update(state, net, backward(net))
        backward(other)
        nn.utils.clip_grad_norm_(other.parameters(), 0.01)
        theirs.step()

    agree(values(net), values(other), rtol=1e-5, atol=1e-9)  # torch adds 1e-6 to the norm


@every_module
def test_both_engines_and_both_updates_walk_together_in_single_precision(what: str) -> None:
    found = []
    for engine in ENGINES:
        for step in STEPS:
            net = made(what, double=False)
            state = opt.setup(opt.AdamW(0.01, lam=0.1, epsilon=1e-3), net, engine=engine)
            for _ in range(3):
                state, net = step(state, net, backward(net, X.float()))
            found.append(values(net))
    for other in found[1:]:
        agree(other, found[0], rtol=1e-5, atol=1e-6)


@every_module
@both_engines
def test_update_leaves_the_old_module_as_it_was(what: str, engine: str) -> None:
    net = made(what)
    gradients = backward(net)
    net.eval()
    before, parameters = values(net), list(net.parameters())
    out = net(X).detach().clone()
    kept = [p.grad for p in parameters]
    state = opt.setup(opt.Adam(0.1), net, engine=engine)
    _, new = opt.update(state, net, gradients)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p, q in zip(other.parameters(), new.parameters(), strict=True):
            p.copy_(q)

    exactly(values(net), before)
    exactly({"": net(X)}, {"": out})
    exactly({"": new(X)}, {"": other(X)})
    assert not torch.equal(new(X), out)
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    assert [id(p.grad) for p in net.parameters()] == [id(g) for g in kept]
    assert all(p.requires_grad == q.requires_grad for p, q in zip(new.parameters(), parameters, strict=True))
    assert all(type(p) is nn.Parameter and p.is_leaf for p in new.parameters())
    assert type(new) is type(net)
    assert repr(new) == repr(net)


@every_module
@both_engines
def test_update_in_place_moves_no_parameter(what: str, engine: str) -> None:
    net = made(what)
    state = opt.setup(opt.Adam(0.1), net, engine=engine)
    gradients = backward(net)
    places = [(id(p), p.data_ptr(), p.stride()) for p in net.parameters()]
    versions = [p._version for p in net.parameters() if p.requires_grad]
    before = values(net)
    same, new = opt.update_(state, net, gradients)
    changed = [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]

    assert new is net
    assert same is state
    assert [(id(p), p.data_ptr(), p.stride()) for p in net.parameters()] == places
    assert changed == [
        n for n, p in net.named_parameters() if gradients[n] is not None and gradients[n].any()
    ]
    assert all(
        p._version > v
        for p, v in zip((p for p in net.parameters() if p.requires_grad), versions, strict=True)
    )


@both_engines
def test_a_later_backward_through_saved_weights_raises(engine: str) -> None:
    net = made("own classes")
    gradients = backward(net)
    value = loss(net)
    opt.update_(opt.setup(opt.Descent(), net, engine=engine), net, gradients)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_layouts_of_weights_survive_a_pure_step() -> None:
    net = made("channels last")
    _, new = opt.update(opt.setup(opt.Adam(), net), net, backward(net))

    assert new[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert new[1][0].weight.stride() == net[1][0].weight.stride() != (27, 9, 3, 1)


@both_updates
def test_part_of_a_module_is_updated_alone(step: Callable[..., Any]) -> None:
    net = made("own classes")
    gradients = {k.removeprefix("layers."): g for k, g in backward(net).items() if k.startswith("layers.")}
    before = values(net)
    state = opt.setup(opt.Descent(0.5), net)
    _, part = step(state.layers, net.layers, gradients)

    agree(values(part), {k: before[f"layers.{k}"] - 0.5 * g for k, g in gradients.items()})
    exactly(
        values(net.head), {k.removeprefix("head."): x for k, x in before.items() if k.startswith("head.")}
    )


# -- addresses -----------------------------------------------------------------------------------------------


def test_every_part_of_the_state_of_a_module_is_an_address() -> None:
    net = made("own classes")
    state = opt.setup(opt.Adam(), net)
    leaf = state.layers[2].weight

    assert leaf is state["layers.2.weight"] is state["layers"][2]["weight"]
    assert leaf is state[opt.KeyPath("layers", 2, "weight")]
    assert leaf.path.code() == "model.layers[2].weight"
    assert leaf.path.get(net) is net.layers[2].weight
    assert leaf.state.m.shape == (3, 4)
    assert state.layers[1] == ()
    assert [len(part) for part in (state, state.layers, state.head)] == [2, 3, 2]
    assert repr(state).startswith(
        "Net(\n  layers=Sequential(\n    Sequential" if False else "Net(\n  layers="
    )


def test_the_state_of_every_container_is_an_address() -> None:
    net = made("all containers")
    state = opt.setup(opt.Adam(), net)
    places = {
        "model.gain": state.gain,
        "model.blocks[0].weight": state.blocks[0].weight,
        "model.blocks[1][0].bias": state.blocks[1][0].bias,
        "model.named['left'].weight": state.named["left"].weight,
        "model.named['right'].weight": state["named.right.weight"],
        "model.scales[1]": state.scales[1],
        "model.shifts['a']": state.shifts["a"],
        "model.shifts['b']": state["shifts.b"],
    }

    for code, leaf in places.items():
        assert isinstance(leaf, opt.Leaf)
        assert leaf.path.code() == code
        assert leaf.path.get(net) is eval(code, {"model": net})  # noqa: S307 the code that the path shows
    assert "absent" not in state


@every_module
def test_trainables_are_the_parameters_that_require_grad_in_their_order(what: str) -> None:
    net = made(what)
    found = opt.trainables(net, path=True)
    wanted = [(name, id(p)) for name, p in net.named_parameters() if p.requires_grad]

    assert [(str(path), id(x)) for path, x in found] == wanted
    assert [path.get(net) is x for path, x in found] == [True] * len(found)


@pytest.mark.parametrize("kind", [nn.ModuleDict, nn.Module])
def test_a_path_through_a_name_of_digits_is_code_that_reaches_the_parameter(kind: Any) -> None:
    net = kind()
    net.add_module("0", nn.Linear(2, 2))
    for path, x in opt.trainables(net, path=True):
        assert path.get(net) is x


def test_what_does_not_require_grad_is_not_trained() -> None:
    net = made("own classes")
    net.layers[0].requires_grad_(False)
    net.head.bias.requires_grad_(False)
    gradients = backward(net)
    state = opt.setup(opt.AdamW(0.1, lam=0.1), net)
    _, new = opt.update(state, net, gradients)

    assert state.layers[0] == ()
    assert state.head.bias == ()
    assert [n for n, p in new.named_parameters() if p is dict(net.named_parameters())[n]] == [
        "layers.0.weight", "layers.0.bias", "head.bias",
    ]  # fmt: skip
    assert new.layers[0] is net.layers[0]


def test_batch_norm_gives_weight_and_bias_and_no_statistics() -> None:
    state = opt.setup(opt.Adam(), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    assert list(map(str, (leaf.path for leaf in state[1]))) == ["1.weight", "1.bias"]

    state = opt.setup(opt.Adam(), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)))
    assert state[1] == ()


def test_a_module_may_stand_in_a_dict_and_beside_tensors() -> None:
    net = made("own classes")
    model = {"net": net, "scale": torch.ones(2, requires_grad=True), "steps": 3}
    (net(X) * model["scale"]).sum().backward()
    gradients = opt.gradients(model)
    state = opt.setup(opt.Descent(0.5), model)
    before, scale = values(net), model["scale"].detach().clone()
    _, new = opt.update(state, model, gradients)

    assert list(gradients["net"]) == list(before)
    assert gradients["steps"] is None
    agree(values(new["net"]), {k: before[k] - 0.5 * g for k, g in gradients["net"].items()})
    torch.testing.assert_close(new["scale"].detach(), scale - 0.5 * model["scale"].grad)


# -- freeze, adjust, averages --------------------------------------------------------------------------------


@both_engines
@both_updates
def test_parts_of_a_module_are_frozen_and_adjusted(engine: str, step: Callable[..., Any]) -> None:
    """As torch.optim does it with groups of parameters and their rates."""
    net, other = made("own classes"), made("own classes")
    state = opt.setup(opt.Momentum(0.1, 0.5), net, engine=engine)
    groups = [{"params": m.parameters(), "lr": 0.1} for m in (other.layers[0], other.layers[2], other.head)]
    theirs = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    for n in range(4):
        if n == 1:
            opt.freeze_(state.layers[0])
            opt.adjust_(state["layers.2"], 0.05)
            opt.adjust_(state, 0.2, where="head.*")
            theirs.param_groups[1]["lr"], theirs.param_groups[2]["lr"] = 0.05, 0.2
        if n == 3:
            state = opt.thaw(state)
        state, net = step(state, net, backward(net))
        backward(other)
        if n in (1, 2):
            other.layers[0].zero_grad()
        with torch.no_grad():  # eta stands inside our velocity, and outside theirs
            for group, factor in zip(theirs.param_groups, (1.0, 0.5, 2.0), strict=True):
                for p in group["params"] if n == 1 else []:
                    if "momentum_buffer" in theirs.state[p] and p.grad is not None:
                        theirs.state[p]["momentum_buffer"].div_(factor)
        theirs.step()

    agree(values(net), values(other), rtol=1e-11, atol=1e-12)


def test_rules_may_differ_by_glob() -> None:
    net, other = made("all containers"), made("all containers")
    state = opt.setup({"**.bias": opt.Descent(0.1), "blocks.**": None, "**": opt.AdamW(0.1, lam=0.1)}, net)
    bias = [p for n, p in other.named_parameters() if n.endswith("bias")]
    rest = [p for n, p in other.named_parameters() if not n.endswith("bias") and not n.startswith("blocks")]
    theirs = [torch.optim.SGD(bias, 0.1), torch.optim.AdamW(rest, 0.1, weight_decay=0.1)]
    for _ in range(3):
        state, net = opt.update_(state, net, backward(net))
        backward(other)
        for t in theirs:
            t.step()

    agree(values(net), values(other), rtol=1e-11, atol=1e-12)
    assert state.blocks[0].weight == ()


@both_engines
def test_averaged_gives_the_module_of_averages(engine: str) -> None:
    net = made("BatchNorm")
    other = copy.deepcopy(net)
    theirs = torch.optim.SGD(other.parameters(), 0.1)
    average = torch.optim.swa_utils.AveragedModel(
        other, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    )
    average.update_parameters(other)
    state = opt.setup(opt.EMA(opt.Descent(0.1), 0.8), net, engine=engine)
    for _ in range(4):
        state, net = opt.update_(state, net, backward(net))
        backward(other)
        theirs.step()
        average.update_parameters(other)
    before = values(net)
    mean = opt.averaged(state, net)

    agree(values(mean), values(average.module), rtol=1e-11, atol=1e-12)
    exactly(values(net), before)
    assert type(mean) is type(net)
    assert mean[1].running_mean is net[1].running_mean
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in mean.parameters())


# -- one vector ----------------------------------------------------------------------------------------------


@every_module
def test_a_module_is_one_vector_and_back(what: str) -> None:
    net = made(what)
    net.eval()
    flat, re = opt.destructure(net)
    wanted = torch.cat([p.reshape(-1) for p in net.parameters() if p.requires_grad])
    exactly({"": flat}, {"": wanted})

    other = re(2 * flat.detach())
    exactly(
        {k: x.detach() for k, x in other.named_parameters()},
        {k: (2 if p.requires_grad else 1) * p.detach() for k, p in net.named_parameters()},
    )
    exactly({"": re(flat)(X)}, {"": net(X)})
    assert len(re) == flat.numel()


def test_a_vector_of_a_module_is_differentiable_both_ways() -> None:
    net = made("own classes")
    flat, re = opt.destructure(net)
    wanted = torch.cat([g.reshape(-1) for g in backward(net).values()])
    start = flat.detach()
    exactly({"": torch.func.grad(lambda v: loss(re(v)))(start)}, {"": wanted})

    start.requires_grad_()
    loss(re(start)).backward()
    exactly({"": start.grad}, {"": wanted})

    net.zero_grad()
    opt.destructure(net)[0].square().sum().backward()
    agree({n: p.grad for n, p in net.named_parameters()}, {n: 2 * x for n, x in values(net).items()})


@both_engines
def test_a_module_trains_as_one_vector(engine: str) -> None:
    net, other = made("own classes"), made("own classes")
    flat, re = opt.destructure(net)
    flat = flat.detach()
    state, whole = opt.setup(opt.Adam(0.1), flat, engine=engine), opt.setup(opt.Adam(0.1), other)
    for _ in range(3):
        _, g = opt.value_and_grad(lambda v: loss(re(v)), flat)
        state, flat = opt.update_(state, flat, g)
        whole, other = opt.update_(whole, other, backward(other))

    agree({k: x.detach() for k, x in re(flat).named_parameters()}, values(other), rtol=1e-11, atol=1e-12)


# -- gradients -----------------------------------------------------------------------------------------------


@every_module
def test_gradients_are_those_of_the_parameters_by_name(what: str) -> None:
    net = made(what)
    found = backward(net)

    assert list(found) == [name for name, _ in net.named_parameters()]
    assert all(found[name] is p.grad for name, p in net.named_parameters())


def test_gradients_follow_the_module_as_it_changes() -> None:
    net = Net()
    opt.gradients(net)
    net.layers.append(nn.Linear(3, 3))
    net.head = nn.Linear(3, 1, bias=False)
    assert list(opt.gradients(net)) == [name for name, _ in net.named_parameters()]

    net.layers[0].weight = nn.Parameter(torch.ones(4, 3))
    net.layers[0].weight.grad = torch.ones(4, 3)
    assert opt.gradients(net)["layers.0.weight"] is net.layers[0].weight.grad


@pytest.mark.parametrize("change", ["taken away", "given", "renamed", "tied"])
def test_gradients_follow_a_parameter_as_it_changes(change: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    opt.gradients(net)
    if change == "taken away":
        net[0].bias = None
    elif change == "given":
        net[2].bias = nn.Parameter(torch.ones(3))
    elif change == "renamed":
        net[0].register_parameter("shift", net[0].bias)
        del net[0].bias
    else:
        net[1].weight = net[0].weight

    assert list(opt.gradients(net)) == [name for name, _ in net.named_parameters()]


def nested(gradients: dict[str, Any]) -> dict[Any, Any]:
    """A dict by name as a dict of dicts."""
    out: dict[Any, Any] = {}
    for name, g in gradients.items():
        *above, last = (int(k) if k.isdigit() else k for k in name.split("."))
        inner = out
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = g
    return out


def like(net: nn.Module, gradients: dict[str, Any]) -> nn.Module:
    """A copy of a module whose parameters are its gradients."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(gradients[name])
    return other


FORMS: dict[str, Callable[[nn.Module, dict[str, Any]], Any]] = {
    "by name": lambda _, g: g,
    "in another order": lambda _, g: dict(reversed(g.items())),
    "nested": lambda _, g: nested(g),
    "a module": like,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["Linear", "own classes", "all containers", "BatchNorm"])
@both_updates
def test_gradients_are_taken_in_every_form(what: str, form: str, step: Callable[..., Any]) -> None:
    net = made(what)
    gradients = backward(net)
    before = values(net)
    wanted = {k: x - 0.5 * gradients[k] for k, x in before.items()}
    with torch.no_grad():
        _, new = step(opt.setup(opt.Descent(0.5), net), net, FORMS[form](net, gradients))

    agree(values(new), wanted)


@both_updates
@both_engines
def test_a_parameter_without_gradient_takes_no_step(engine: str, step: Callable[..., Any]) -> None:
    net = made("own classes")
    net.head(X).sum().backward()
    gradients = opt.gradients(net)
    before, parts = values(net), dict(net.named_parameters())
    state = opt.setup(opt.AdamW(0.1, lam=0.1), net, engine=engine)
    state, new = step(state, net, gradients)

    assert {name for name, g in gradients.items() if g is None} == {n for n in before if n[0] == "l"}
    for name, p in new.named_parameters():
        assert torch.equal(p, before[name]) == (name[0] == "l")
        assert (p is parts[name]) == (name[0] == "l" or step is opt.update_)
    assert not state.layers[0].weight.state.m.any()
    assert new.layers is net.layers


# -- value and gradients -------------------------------------------------------------------------------------


@every_module
def test_value_and_grad_gives_what_backward_gives(what: str) -> None:
    net, other = made(what), made(what)
    with_graph = {n: b.clone() for n, b in other.named_buffers()}
    for _ in range(2):
        _, found = opt.value_and_grad(loss, net, X)
        wanted = backward(other)
        assert list(found) == list(wanted)
        found = {k: g for k, g in found.items() if g is not None}
        agree(found, {k: g for k, g in wanted.items() if g is not None}, rtol=1e-12, atol=1e-14)
        agree(dict(net.named_buffers()), dict(other.named_buffers()))
    changed = [n for n, b in net.named_buffers() if not torch.equal(b, with_graph[n])]

    assert changed == [n for n in with_graph if net.training]
    assert all(p.grad is None for p in net.parameters())
    assert not any(g.requires_grad for g in found.values())


def test_value_and_grad_gives_the_value() -> None:
    net = made("own classes")
    value, _ = opt.value_and_grad(loss, net, X)

    torch.testing.assert_close(value, loss(net).detach())
    assert not value.requires_grad


def test_value_and_grad_trains_a_module_with_batch_norm() -> None:
    net, other = made("BatchNorm"), made("BatchNorm")
    state, theirs = opt.setup(opt.Momentum(0.1), net), torch.optim.SGD(other.parameters(), 0.1, 0.9)
    for _ in range(3):
        _, gradients = opt.value_and_grad(loss, net, X)
        state, net = opt.update(state, net, gradients)
        backward(other)
        theirs.step()

    agree(values(net), values(other), rtol=1e-10, atol=1e-12)
    agree(dict(net.named_buffers()), dict(other.named_buffers()), rtol=1e-10, atol=1e-12)


def test_statistics_stay_as_they_are_in_evaluation() -> None:
    net = made("BatchNorm").eval()
    before = {n: b.clone() for n, b in net.named_buffers()}
    saved = loss(net)
    opt.value_and_grad(loss, net, X)

    exactly(dict(net.named_buffers()), before)
    saved.backward()  # what was saved for it has not been written


class Report(NamedTuple):
    """What a loss tells beside its value."""

    outputs: Any
    note: Any


AUX: dict[str, Callable[[Any], Any]] = {
    "None": lambda _: None,
    "a string": lambda _: "text",
    "a tensor": lambda out: out,
    "a nest": lambda out: {"a": [None, out, 3], "b": ("text", 2 * out, None), "c": Report(out, None)},
    "nothing": lambda _: (),
}


@pytest.mark.parametrize("what", AUX)
@pytest.mark.parametrize("of", ["a module", "a dict"])
def test_a_loss_may_tell_more_than_its_value(what: str, of: str) -> None:
    net = made("Linear")
    model: Any = net if of == "a module" else {k: p.detach() for k, p in net.named_parameters()}

    def told(model: Any, x: Any) -> Any:
        out = model(x) if of == "a module" else x @ model["weight"].T + model["bias"]
        return out.square().mean(), AUX[what](out)

    (value, aux), gradients = opt.value_and_grad(told, model, X, has_aux=True)
    out = net(X)
    torch.testing.assert_close(value, out.square().mean().detach())
    agree(gradients, backward(net))
    wanted = AUX[what](out.detach())

    assert torch.utils._pytree.tree_structure(aux) == torch.utils._pytree.tree_structure(wanted)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (aux, wanted)), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a.detach(), b)
        else:
            assert a == b


@pytest.mark.parametrize("model", ["a tensor", "a dict", "a list"])
def test_value_and_grad_of_tensors_is_that_of_finite_differences(model: str) -> None:
    w, b = X[0].clone(), X[1].clone()
    nests = {"a tensor": w, "a dict": {"w": w, "b": b, "n": 2}, "a list": [w, (b,)]}
    made_of = {
        "a tensor": lambda m: (m, 0.5),
        "a dict": lambda m: (m["w"], m["b"]),
        "a list": lambda m: (m[0], m[1][0]),
    }

    def cost(m: Any, x: Any) -> Any:
        w, b = made_of[model](m)
        return (torch.tanh(x @ w) + (w * b).sum()).square().sum()

    value, gradients = opt.value_and_grad(cost, nests[model], X)
    torch.testing.assert_close(value, cost(nests[model], X))
    found = made_of[model](gradients)
    for x, g in zip((w, b)[: len(opt.trainables(nests[model]))], found, strict=False):
        for i in range(3):
            h = torch.zeros(3, dtype=torch.float64)
            h[i] = 1e-6
            x.add_(h)
            above = cost(nests[model], X)
            x.sub_(2 * h)
            below = cost(nests[model], X)
            x.add_(h)
            torch.testing.assert_close(g[i], (above - below) / 2e-6, rtol=1e-6, atol=1e-7)


def test_value_and_grad_may_be_vmapped() -> None:
    """A gradient for each example: their mean is the gradient of the mean."""
    net = made("own classes")
    each = torch.vmap(lambda x: opt.value_and_grad(loss, net, x)[1])(X)

    agree({k: g.mean(0) for k, g in each.items()}, backward(net))


def test_value_and_grad_may_be_differentiated() -> None:
    """The gradient of a sum of a gradient, against autograd twice over."""
    net = made("own classes")
    found = torch.func.grad(lambda x: opt.value_and_grad(loss, net, x)[1]["head.weight"].sum())(X)
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(net, x), net.head.weight, create_graph=True)
    (wanted,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(found, wanted)


# -- ties ----------------------------------------------------------------------------------------------------

WORDS = torch.tensor([0, 2, 4, 1])


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().double()


@pytest.mark.parametrize("source", ["grad", "value_and_grad", "every name"])
@both_engines
@both_updates
def test_a_tied_module_trains_as_by_torch_optim(source: str, engine: str, step: Callable[..., Any]) -> None:
    net, other = tied(), tied()
    state, theirs = opt.setup(opt.Adam(0.1), net, engine=engine), torch.optim.Adam(other.parameters(), 0.1)
    for _ in range(3):
        if source == "value_and_grad":
            _, gradients = opt.value_and_grad(loss, net, WORDS)
        else:
            gradients = backward(net, WORDS)
        if source == "every name":
            gradients |= {"head.weight": gradients["embed.weight"]}
        state, net = step(state, net, gradients)
        backward(other, WORDS)
        theirs.step()

        assert net.head.weight is net.embed.weight
    agree(values(net), values(other), rtol=1e-10, atol=1e-12)
    assert state.head.weight is state.embed.weight
    assert len(opt.trainables(net)) == 3


def test_gradients_of_a_tie_stand_once_under_the_first_name() -> None:
    net = tied()

    assert list(backward(net, WORDS)) == ["embed.weight", "inner.weight", "inner.bias"]
    assert list(opt.value_and_grad(loss, net, WORDS)[1]) == ["embed.weight", "inner.weight", "inner.bias"]


def test_a_module_that_stands_twice_is_shared_in_the_new_one() -> None:
    layer = nn.Linear(3, 3).double()
    net = nn.Sequential(layer, nn.Tanh(), layer)
    gradients, before = backward(net), values(layer)
    state = opt.setup(opt.Descent(0.5), net)
    _, new = opt.update(state, net, gradients)

    assert new[0] is new[2]
    assert list(gradients) == ["0.weight", "0.bias"]
    agree(values(new[0]), {k: x - 0.5 * gradients[f"0.{k}"] for k, x in before.items()})
    exactly({"": new(X)}, {"": new[0](torch.tanh(new[0](X)))})


def test_gradients_at_both_places_of_a_tie_are_summed() -> None:
    net = tied()
    before, g = values(net), torch.ones(5, 3, dtype=torch.float64)
    gradients = {"embed.weight": g, "head.weight": 2 * g, "inner.weight": None, "inner.bias": None}
    _, new = opt.update(opt.setup(opt.Descent(1.0), net), net, gradients)

    torch.testing.assert_close(new.embed.weight.detach(), before["embed.weight"] - 3 * g)


# -- what is beside the parameters ---------------------------------------------------------------------------


def test_a_new_module_shares_buffers_and_attributes_and_has_hooks_of_its_own() -> None:
    net = made("BatchNorm")
    net.note = ["kept"]
    calls: list[Any] = []
    net.register_forward_hook(lambda module, *_: calls.append(module))
    net[0].register_forward_pre_hook(lambda module, _: calls.append(module))
    net[0].register_full_backward_hook(lambda module, *_: calls.append(module))
    _, new = opt.update(opt.setup(opt.Adam(), net), net, backward(net, X.clone().requires_grad_()))
    calls.clear()
    loss(new, X.clone().requires_grad_()).backward()

    assert calls == [new[0], new, new[0]]
    assert new.note is net.note
    assert new[1].running_mean is net[1].running_mean
    assert new[1].num_batches_tracked is net[1].num_batches_tracked
    new.register_forward_hook(lambda *_: calls.append("new"))
    new.register_buffer("own", torch.ones(1))
    new[0].extra = nn.Linear(1, 1)
    net(X.clone().requires_grad_())
    assert "new" not in calls
    assert "own" not in net._buffers
    assert "extra" not in net[0]._modules


def test_a_new_module_saves_and_loads_like_the_old() -> None:
    for what in ("all containers", "BatchNorm", "LSTM", "weight norm"):
        net = made(what)
        _, new = opt.update(opt.setup(opt.Adam(0.1), net), net, backward(net))
        saved = {k: v.clone() for k, v in new.state_dict().items()}
        other = made(what)
        other.load_state_dict(saved)

        assert list(saved) == list(net.state_dict())
        exactly({"": other.eval()(X)}, {"": new.eval()(X)})


def test_a_new_module_keeps_its_mode_and_moves_alone() -> None:
    net = made("LSTM").eval()
    _, new = opt.update(opt.setup(opt.Adam(0.1), net), net, backward(net))
    out = net(X)
    new.float().train()

    assert not net.training
    assert not net.cell.training
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    exactly({"": net(X)}, {"": out})


@every_module
@both_engines
def test_state_and_module_are_copied_together(what: str, engine: str) -> None:
    net = made(what)
    gradients = backward(net)
    state = opt.setup(opt.Adam(0.1), net, engine=engine)
    state, net = opt.update_(state, net, gradients)
    other_state, other = copy.deepcopy((state, net))
    assert other_state == state

    before = values(net)
    other_state, other = opt.update_(other_state, other, gradients)
    exactly(values(net), before)
    state, net = opt.update_(state, net, gradients)
    exactly(values(other), values(net))
    assert other_state == state


@pytest.mark.parametrize("what", ["own classes", "all containers", "LSTM", "BatchNorm", "tied"])
def test_state_and_module_are_pickled_together(what: str) -> None:
    net, x = (tied(), WORDS) if what == "tied" else (made(what), X)
    gradients = {k: g.clone() for k, g in backward(net, x).items()}
    state = opt.setup(opt.Adam(opt.Cosine(0.1, 10)), net)
    state, net = opt.update_(state, net, gradients)
    other_state, other = pickle.loads(pickle.dumps((state, net)))
    assert other_state == state

    other_state, other = opt.update_(other_state, other, gradients)
    state, net = opt.update_(state, net, gradients)
    exactly(values(other), values(net))
    assert other_state == state
    assert what != "tied" or other.head.weight is other.embed.weight


def test_a_module_is_forgotten_with_its_last_name() -> None:
    """The way through a module is remembered, and must not keep it alive."""
    import gc
    import weakref

    net = Net()
    state = opt.setup(opt.Adam(), net)
    opt.update_(state, net, opt.gradients(net))
    gone = weakref.ref(net.layers[0].weight), weakref.ref(net)
    del net
    gc.collect()

    assert [ref() for ref in gone] == [None, None]


# -- random nests --------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Children by name: parameters and modules."""

    def __init__(self, children: dict[str, Any]) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


arrays = st.tuples(
    st.sampled_from([(), (2,), (2, 3), (0,), (1, 2, 2)]), st.sampled_from(["float32", "float64", "complex64"])
)
nests = st.recursive(
    arrays,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "weight"]), inner, min_size=1)
    ),
    max_leaves=8,
).filter(lambda nest: not isinstance(nest, tuple))


def filled(nest: Any, rng: Any) -> Any:
    """A nest of shapes and types as a nest of arrays of NumPy."""
    if isinstance(nest, list):
        return [filled(n, rng) for n in nest]
    if isinstance(nest, dict):
        return {k: filled(n, rng) for k, n in nest.items()}
    return np.asarray(rng.standard_normal(nest[0])).astype(nest[1])


def as_tensors(nest: Any) -> Any:
    if isinstance(nest, list):
        return [as_tensors(n) for n in nest]
    if isinstance(nest, dict):
        return {k: as_tensors(n) for k, n in nest.items()}
    return torch.from_numpy(nest.copy())


def as_module(nest: Any) -> Any:
    """The same nest of modules; lists are the lists of PyTorch where these can hold what they hold."""
    if isinstance(nest, np.ndarray):
        return nn.Parameter(torch.from_numpy(nest.copy()))
    items = nest if isinstance(nest, dict) else {str(i): n for i, n in enumerate(nest)}
    children = {k: as_module(n) for k, n in items.items()}
    if isinstance(nest, list) and all(isinstance(n, np.ndarray) for n in nest):
        return nn.ParameterList(children.values())
    if isinstance(nest, list) and not any(isinstance(n, np.ndarray) for n in nest):
        return nn.ModuleList(children.values())
    return Holder(children)


def by_name(nest: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(nest, list | dict):
        items = nest.items() if isinstance(nest, dict) else enumerate(nest)
        return {name: x for k, n in items for name, x in by_name(n, f"{prefix}{k}.").items()}
    return {prefix.removesuffix("."): nest}


@pytest.mark.slow
@given(nest=nests, seed=st.integers(0, 99), engine=st.sampled_from(ENGINES), step=st.sampled_from(STEPS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_nests_of_modules_train_like_nests_of_arrays(
    nest: Any, seed: int, engine: str, step: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(seed)
    rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.Momentum(0.1))
    model = filled(nest, rng)
    tensors, net = as_tensors(model), as_module(model)
    states = [opt.setup(rule, m, engine=engine) for m in (model, tensors, net)]
    for _ in range(2):
        grads = filled(nest, rng)
        of_net = {name: torch.from_numpy(g.copy()) for name, g in by_name(grads).items()}
        if rng.random() < 0.5 and len(of_net) > 1:
            missing = min(of_net)
            of_net[missing] = None
            grads = without(grads, missing.split("."))
        states[0], model = step(states[0], model, grads)
        states[1], tensors = step(states[1], tensors, as_gradients(grads))
        states[2], net = step(states[2], net, of_net)

    wanted = by_name(model)
    found = dict(net.named_parameters())
    assert sorted(found) == sorted(wanted)
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name].detach(), x, rtol=2e-6, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(by_name(tensors)[name], x, rtol=2e-6, atol=1e-7, err_msg=name)
        assert str(states[2][name].path) == name


def without(grads: Any, keys: list[str]) -> Any:
    """The same gradients with None at one place."""
    if not keys:
        return None
    key = keys[0] if isinstance(grads, dict) else int(keys[0])
    items = dict(grads) if isinstance(grads, dict) else list(grads)
    items[key] = without(items[key], keys[1:])
    return items


def as_gradients(grads: Any) -> Any:
    if isinstance(grads, list):
        return [as_gradients(g) for g in grads]
    if isinstance(grads, dict):
        return {k: as_gradients(g) for k, g in grads.items()}
    return None if grads is None else torch.from_numpy(grads.copy())


# -- mistakes ------------------------------------------------------------------------------------------------

MISTAKES: list[Any] = []
Mistake = Callable[[Any], object]
ANOTHER = "call `setup` again for another model"


class Case(NamedTuple):
    """What a mistake is made with."""

    net: Any
    state: Any
    grads: dict[str, Any]


def answers(kind: type[BaseException], text: str) -> Callable[[Mistake], Mistake]:
    """The decorated function makes a mistake; this is the error, and its whole text."""

    def note(mistake: Mistake) -> Mistake:
        MISTAKES.append(pytest.param(mistake, kind, text, id=mistake.__name__))
        return mistake

    return note


@answers(
    opt.TreeMismatch,
    f"model.layers[0].weight has type torch.float16; `setup` saw torch.float64; {ANOTHER}",
)
def a_module_halved_after_setup(m: Case) -> None:
    opt.update_(m.state, m.net.half(), m.grads)


@answers(
    opt.TreeMismatch,
    f"model.head.bias has type torch.float32; `setup` saw torch.float64; {ANOTHER}",
)
def a_parameter_of_another_type(m: Case) -> None:
    m.net.head.bias = nn.Parameter(m.net.head.bias.float())
    opt.update_(m.state, m.net, m.grads)


@answers(
    opt.TreeMismatch,
    "model.layers[0].weight is on meta; `setup` saw it on cpu, where its state is; call `setup` again after "
    "moving a model",
)
def a_module_moved_after_setup(m: Case) -> None:
    opt.update_(m.state, m.net.to("meta"), m.grads)


@answers(opt.TreeMismatch, f"model.layers[2].weight has shape (5, 4); `setup` saw (3, 4); {ANOTHER}")
def a_layer_replaced_by_a_larger_one(m: Case) -> None:
    m.net.layers[2] = nn.Linear(4, 5).double()
    opt.update_(m.state, m.net, m.grads)


@answers(opt.TreeMismatch, f"model.layers[2] is a Identity; `setup` saw a Linear; {ANOTHER}")
def a_layer_replaced_by_another_kind(m: Case) -> None:
    m.net.layers[2] = nn.Identity()
    opt.update_(m.state, m.net, m.grads)


@answers(opt.TreeMismatch, f"model.layers has 3, which `setup` did not see; {ANOTHER}")
def a_layer_added_after_setup(m: Case) -> None:
    m.net.layers.append(nn.Linear(3, 3).double())
    opt.update_(m.state, m.net, m.grads)


@answers(opt.TreeMismatch, f"model has 'extra', which `setup` did not see; {ANOTHER}")
def a_layer_added_at_the_top_after_setup(m: Case) -> None:
    m.net.extra = nn.Linear(3, 3).double()
    opt.update_(m.state, m.net, m.grads)


@answers(opt.TreeMismatch, f"model.layers has no 2, which `setup` saw; {ANOTHER}")
def a_layer_taken_away_after_setup(m: Case) -> None:
    del m.net.layers[2]
    opt.update_(m.state, m.net, m.grads)


@answers(opt.TreeMismatch, f"model.head has no 'bias', which `setup` saw; {ANOTHER}")
def a_bias_set_to_none_after_setup(m: Case) -> None:
    m.net.head.bias = None
    opt.update_(m.state, m.net, m.grads)


@answers(opt.TreeMismatch, "grads has no 'head.bias' (None means no step there)")
def a_missing_gradient(m: Case) -> None:
    opt.update_(m.state, m.net, {k: g for k, g in m.grads.items() if k != "head.bias"})


@answers(
    opt.TreeMismatch,
    "grads has a gradient for 'head.scale', which the state does not train; it was no trainable parameter at "
    "`setup`: let it be one there, and freeze_ it for as long as it shall wait",
)
def a_gradient_of_an_unknown_name(m: Case) -> None:
    opt.update_(m.state, m.net, m.grads | {"head.scale": torch.ones(2)})


@answers(
    opt.TreeMismatch, "gradient of shape (4, 3) for parameters of shape (3, 4), at grads.layers[2].weight"
)
def a_gradient_of_another_shape(m: Case) -> None:
    opt.update_(m.state, m.net, m.grads | {"layers.2.weight": m.grads["layers.2.weight"].T})


@answers(opt.TreeMismatch, "grads.head.bias is complex for real parameters; take its real part")
def a_complex_gradient(m: Case) -> None:
    opt.update_(m.state, m.net, m.grads | {"head.bias": torch.ones(2, dtype=torch.complex128)})


@answers(opt.TreeMismatch, "grads.head.bias is of type ndarray; the parameters are arrays of torch")
def a_gradient_of_numpy(m: Case) -> None:
    opt.update_(m.state, m.net, m.grads | {"head.bias": np.ones(2)})


@answers(opt.TreeMismatch, "grads.layers[0].weight is of type ndarray; the parameters are arrays of torch")
def gradients_of_numpy(m: Case) -> None:
    opt.update_(m.state, m.net, {k: g.numpy() for k, g in m.grads.items()})


@answers(opt.BadState, "the second argument is a state; the order is update(state, model, grads)")
def a_state_for_a_module(m: Case) -> None:
    opt.update_(m.net, m.state, m.grads)


@answers(opt.BadState, "setup was given a state where the model goes; write setup(rule, model)")
def a_set_up_of_a_state(m: Case) -> None:
    opt.setup(opt.Adam(), m.state)


@answers(
    opt.BadState,
    "a state was wanted and a Net came; a state is what `setup(rule, model)` returns, or a part of it",
)
def a_module_for_a_state(m: Case) -> None:
    opt.freeze_(m.net)


@answers(opt.BadState, "gradients was given a state where the model goes; write gradients(model)")
def the_gradients_of_a_state(m: Case) -> None:
    opt.gradients(m.state)


@answers(
    opt.BadState, "value_and_grad was given a state where the model goes; write value_and_grad(loss, model)"
)
def the_value_and_grad_of_a_state(m: Case) -> None:
    opt.value_and_grad(loss, m.state, X)


@answers(opt.BadState, "setup was given the class Net where the model goes; write setup(rule, Net(...))")
def a_module_class_for_a_module(_: Case) -> None:
    opt.setup(opt.Adam(), Net)


@answers(
    opt.BadState,
    "setup was given a generator where the model goes; write setup(rule, module), or a list of tensors",
)
def the_parameters_of_a_module_for_a_module(m: Case) -> None:
    opt.setup(opt.Adam(), m.net.parameters())


@answers(
    opt.BadState, "setup was given <class 'optimisers.rules.adam.Adam'> where the rule goes; write Adam()"
)
def a_rule_class_for_a_rule(m: Case) -> None:
    opt.setup(opt.Adam, m.net)


@answers(
    opt.BadState,
    "setup was given the rule Adam(eta=0.001, beta=(0.9, 0.999), epsilon=1e-08) where the model goes; write "
    "setup(rule, model)",
)
def module_and_rule_swapped(m: Case) -> None:
    opt.setup(m.net, opt.Adam())


@answers(
    opt.BadState,
    "arrays of numpy keep no gradients; work them out, and give them to update(state, model, grads)",
)
def the_gradients_of_arrays(_: Case) -> None:
    opt.gradients({"a": np.ones(2)})


@answers(
    opt.BadState,
    "value_and_grad takes models of tensors; for arrays of numpy use its own, and give the gradients to "
    "update(state, model, grads)",
)
def the_value_and_grad_of_arrays(_: Case) -> None:
    opt.value_and_grad(loss, {"a": np.ones(2)}, X)


@answers(
    opt.TreeMismatch,
    "model.embed.weight and model.head.weight were one array at `setup` and are not now; tie them again, or "
    "call `setup` again",
)
def a_tie_that_was_cut(_: Case) -> None:
    net = tied()
    state = opt.setup(opt.Adam(), net)
    gradients = backward(net, WORDS)
    net.head.weight = nn.Parameter(net.head.weight.detach().clone())
    opt.update_(state, net, gradients)


@answers(
    opt.TreeMismatch,
    "model[0].weight is not initialized yet; call the module with an input before `setup`",
)
def a_lazy_layer_that_has_seen_no_input(_: Case) -> None:
    opt.setup(opt.Adam(), nn.Sequential(nn.LazyLinear(3)))


@answers(opt.NoMatch, "'**.gamma' matches no parameter; there are layers.0.weight, layers.0.bias, "
         "layers.2.weight, layers.2.bias, head.weight, head.bias")  # fmt: skip
def a_glob_that_matches_nothing(m: Case) -> None:
    opt.setup({"**.gamma": opt.Adam(), "**": opt.Adam()}, m.net)


@answers(KeyError, "state.layers has no 5; it has 0, 1, 2")
def an_index_that_is_not_there(m: Case) -> None:
    assert m.state.layers[5]


@answers(
    opt.BadState,
    "update_ writes in place, which cannot be traced; write update for a step that is differentiated or "
    "compiled",
)
def a_step_in_place_inside_a_transform(_: Case) -> None:
    x = torch.ones(2)

    def stepped(g: Any) -> Any:
        return opt.update_(opt.setup(opt.Descent(), x), x, g)[1].sum()

    torch.func.grad(stepped)(torch.ones(2))


@pytest.mark.parametrize(("mistake", "kind", "text"), MISTAKES)
@pytest.mark.parametrize("stepped", [False, True], ids=["at once", "after a step"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_mistake_is_answered_with_what_to_do(
    mistake: Any, kind: Any, text: str, stepped: bool, engine: str
) -> None:
    """Also after a step, when the way to every parameter is known."""
    net = made("own classes")
    gradients = {k: g.clone() for k, g in backward(net).items()}
    state = opt.setup(opt.Adam(), net, engine=engine)
    if stepped:
        opt.update_(state, net, gradients)
    with pytest.raises(kind) as caught:
        mistake(Case(net, state, gradients))
    assert caught.value.args[0] == text


NOT_TRAINED = (
    "which the state does not train; it was no trainable parameter at `setup`: let it be one there, and "
    "freeze_ it for as long as it shall wait"
)


@pytest.mark.parametrize(
    ("frozen", "form", "text"),
    [
        ("head.bias", lambda g: g, f"grads has a gradient for 'head.bias', {NOT_TRAINED}"),
        ("head.bias", nested, f"grads.head has a gradient for 'bias', {NOT_TRAINED}"),
        ("bias", lambda g: g, f"grads has a gradient for 'bias', {NOT_TRAINED}"),
    ],
    ids=["by name", "nested", "of one layer"],
)
def test_a_gradient_for_what_was_frozen_at_setup_is_refused(frozen: str, form: Any, text: str) -> None:
    net = made("own classes" if "." in frozen else "Linear")
    gradients = backward(net)
    net.get_parameter(frozen).requires_grad_(False)
    state = opt.setup(opt.Adam(), net)
    with pytest.raises(opt.TreeMismatch) as caught:
        opt.update_(state, net, form(gradients))
    assert caught.value.args[0] == text

    opt.update_(state, net, form(gradients | {frozen: None}))


def test_a_module_with_nothing_to_train_is_pointed_out() -> None:
    with pytest.warns(opt.NoParameters, match="nothing will be trained"):
        assert opt.setup(opt.Adam(), Net().requires_grad_(False)) == ()
