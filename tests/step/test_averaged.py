"""Evaluating in place: parameters hold averages inside `averaged_`, and are what they were behind it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import optimisers as opt
from optimisers.errors import BadState, NoMatch

BATCHES = [torch.randn(8, 3, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Ties, buffers, and a parameter that does not want to be trained."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3), nn.Linear(3, 2))
    net[3].weight = net[0].weight
    net[4].bias.requires_grad_(False)
    return net.to(dtype)


def backward(net: nn.Module, batch: Any) -> None:
    net.zero_grad()
    net.eval()(batch.to(net[0].weight.dtype)).square().sum().backward()
    net.train()


def trained(rule: opt.Rule, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, opt.TorchOptimizer]:
    net = network(dtype)
    optimizer = opt.TorchOptimizer(net, rule)
    for batch in BATCHES:
        backward(net, batch)
        optimizer.step()
    return net, optimizer


def bits(net: nn.Module) -> dict[str, bytes]:
    """Parameters and buffers to the last bit."""
    return {
        k: v.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()
        for k, v in net.state_dict().items()
    }


@pytest.mark.parametrize(
    ("rule", "average"),
    [
        (opt.EMA(opt.Descent(0.01), 0.8), {"multi_avg_fn": get_ema_multi_avg_fn(0.8)}),
        (opt.SWA(opt.Descent(0.01)), {}),
    ],
)
def test_inside_parameters_are_the_averages_of_torch_and_statistics_those_of_update_bn(
    rule: opt.Rule, average: dict[str, Any]
) -> None:
    net, theirs = network(), network()
    optimizer, descent = opt.TorchOptimizer(net, rule), torch.optim.SGD(theirs.parameters(), 0.01)
    mean = AveragedModel(theirs, **average)
    if average:
        mean.update_parameters(theirs)  # ours starts at the first parameters too
    for batch in BATCHES:
        for module, each in ((net, optimizer), (theirs, descent)):
            backward(module, batch)
            each.step()
        mean.update_parameters(theirs)
    torch.manual_seed(1)
    update_bn(BATCHES, mean)
    before = bits(net)

    with opt.averaged_(optimizer, net) as same:
        assert same is net
        torch.manual_seed(1)
        update_bn(BATCHES, net)
        inside = copy.deepcopy(net.state_dict())

    for name, value in mean.module.state_dict().items():
        torch.testing.assert_close(inside[name], value, rtol=1e-6, atol=1e-7)
    assert bits(net) == before


def test_schedule_free_is_evaluated_at_x_and_trained_at_y() -> None:
    """The paper's three sequences for descent at a constant rate, gradients at y: z = z - eta g; x is the
    mean of all z; y = (1 - beta) z + beta x.
    """
    eta, beta = 0.1, 0.9
    y = np.array([1.0, -2.0])
    x, z = y.copy(), y.copy()
    model = {"w": y.copy()}
    state = opt.setup(opt.ScheduleFree(opt.Descent(eta), beta), model)
    for t in range(5):
        state, model = opt.update_(state, model, {"w": 2 * model["w"]})
        z = z - eta * 2 * y
        x = x + (z - x) / (t + 1)
        y = (1 - beta) * z + beta * x

        with opt.averaged_(state, model):
            np.testing.assert_allclose(model["w"], x, rtol=1e-14)
        np.testing.assert_allclose(model["w"], y, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rule",
    [
        opt.EMA(opt.Adam(0.1), 0.5),
        opt.EMA(opt.MixedPrecision(opt.Adam(0.1)), 0.5),
        opt.ScheduleFree(opt.Adam(0.1, (0.0, 0.999))),
        opt.Lookahead(opt.Descent(0.01)),
    ],
)
def test_training_goes_on_as_if_nothing_had_been_evaluated(rule: opt.Rule, dtype: torch.dtype) -> None:
    net, optimizer = trained(rule, dtype)
    other, alone = trained(rule, dtype)
    net[1].eval()
    before, modes = bits(net), [m.training for m in net.modules()]
    homes = [p.data_ptr() for p in net.parameters()]

    def evaluate() -> None:
        with opt.averaged_(optimizer, net):
            inside.update(bits(net))
            assert net[3].weight is net[0].weight
            assert [p.data_ptr() for p in net.parameters()] == homes
            assert [m.training for m in net.modules()] == modes
            raise KeyboardInterrupt

    inside: dict[str, bytes] = {}
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert inside["0.weight"] != before["0.weight"]
    assert inside["4.bias"] == before["4.bias"]
    assert bits(net) == before

    for module, each in ((net, optimizer), (other, alone)):
        backward(module, BATCHES[0])
        each.step()
    assert bits(net) == bits(other)


def test_nan_keeps_its_bits_and_frozen_leaves_are_evaluated_as_averaged_does() -> None:
    model = {"a": np.array([1.0, 2.0]), "b": np.array([3.0])}
    state = opt.setup(opt.EMA(opt.Descent(0.5), 0.5), model)
    state, model = opt.update_(state, model, {"a": np.ones(2), "b": np.ones(1)})
    opt.freeze_(state["b"])
    model["a"].view(np.uint64)[0] = 0x7FF8DEADBEEF0001
    expected, before = opt.averaged(state, model), model["a"].tobytes()

    with opt.averaged_(state, model):
        np.testing.assert_array_equal(model["b"], expected["b"])
        np.testing.assert_array_equal(model["a"], expected["a"])
    assert model["a"].tobytes() == before
    assert model["b"] == 2.5


def test_a_module_with_some_of_the_parameters_is_evaluated_alone() -> None:
    net, optimizer = trained(opt.EMA(opt.Descent(0.01), 0.5))
    before = bits(net)

    with opt.averaged_(optimizer, net[4]):
        changed = {name for name, value in bits(net).items() if value != before[name]}
    assert changed == {"4.weight"}
    with opt.averaged_(optimizer):
        changed = {name for name, value in bits(net).items() if value != before[name]}
    assert changed == {name for name, p in net.named_parameters(remove_duplicate=False) if p.requires_grad}
    with (
        pytest.raises(NoMatch, match="the model has no parameter of this optimiser"),
        opt.averaged_(optimizer, nn.Linear(1, 1)),
    ):
        pass


def test_a_part_of_a_state_is_evaluated_alone() -> None:
    model = [np.ones(2), np.ones(2)]
    state = opt.setup(opt.EMA(opt.Descent(0.5), 0.5), model)
    state, model = opt.update_(state, model, model)
    with opt.averaged_(state[0], model[0]):
        assert (model[0] == 0.75).all()
        assert (model[1] == 0.5).all()


class Flax(nnx.Module):
    """A module of Flax with statistics of batches."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.inner, self.norm = nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        self.again, self.drop = self.inner, nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.drop(self.norm(self.again(self.inner(x))))


def contents(net: Any) -> list[bytes]:
    """All variables of a module to the last bit, keys of random numbers too."""
    arrays = jax.tree.leaves(nnx.state(net))
    plain = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in arrays]
    return [np.asarray(x).tobytes() for x in plain]


@pytest.mark.parametrize("held", [lambda net: net, lambda net: {"net": net, "name": "mine"}])
def test_modules_of_flax_are_written_and_their_variables_put_back(held: Callable[[Any], Any]) -> None:
    model = held(net := Flax())
    state = opt.setup(opt.EMA(opt.Descent(0.5), 0.5), model)
    grads = jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param))
    state, model = opt.update_(state, model, held(grads) if model is net else {"net": grads, "name": None})
    before = contents(net)

    with opt.averaged_(state, model) as same:
        assert same is model
        np.testing.assert_allclose(net.inner.bias[...], -0.25)
        assert net.again is net.inner
        net(jnp.ones((4, 2)))
        assert float(net.norm.mean[0]) != 0
    assert contents(net) == before
    state, model = opt.update_(state, model, held(grads) if model is net else {"net": grads, "name": None})


def test_averages_of_a_transformation_of_optax_are_those_of_optax() -> None:
    params = {"net": {"w": jnp.array([1.0, 2.0])}, "b": jnp.array(3.0)}
    tx = optax.chain(optax.scale(0.5), opt.as_optax(opt.EMA(opt.Descent(0.5), 0.5)))
    state, means = tx.init(params), params
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        means = optax.incremental_update(params, means, 0.5)

    found = opt.averaged(state[1], params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, means)


def test_averages_of_an_optimizer_of_flax_come_as_its_state() -> None:
    net = Flax()
    optimizer = nnx.Optimizer(net, opt.as_optax(opt.EMA(opt.Descent(0.5), 0.5)), wrt=nnx.Param)
    start = jax.tree.map(jnp.copy, nnx.state(net, nnx.Param))
    optimizer.update(net, jax.tree.map(jnp.ones_like, start))
    mean = opt.averaged(optimizer.opt_state, nnx.state(net, nnx.Param))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b - 0.25, rtol=1e-6), mean, start)
    np.testing.assert_allclose(net.inner.bias[...], -0.5)
    nnx.update(net, mean)
    np.testing.assert_allclose(net.inner.bias[...], -0.25)


def actions(net: nn.Module, optimizer: opt.TorchOptimizer) -> dict[str, Callable[[], Any]]:
    tree = optimizer.tree
    named = dict(optimizer.parameters)
    return {
        "step": optimizer.step,
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict({}),
        "pickle": lambda: pickle.dumps(optimizer),
        "update": lambda: opt.update(tree, named, named),
        "update_": lambda: opt.update_(opt.adjust(tree, 0.5), named, named),
        "averaged": lambda: opt.averaged(optimizer, net),
    }


@pytest.mark.parametrize(
    "name", ["step", "state_dict", "load_state_dict", "pickle", "update", "update_", "averaged"]
)
def test_inside_what_would_take_averages_for_parameters_is_refused(name: str) -> None:
    net, optimizer = trained(opt.EMA(opt.Descent(0.01), 0.5))
    saved, before = optimizer.state_dict(), bits(net)
    with opt.averaged_(optimizer, net):
        inside = bits(net)
        with pytest.raises(BadState, match=f"^{name} was called inside averaged_, where parameters hold"):
            actions(net, optimizer)[name]()
        with pytest.raises(BadState, match="averaged was called inside"), opt.averaged_(optimizer):
            pass
        with pytest.raises(BadState, match="arrays was called inside"):
            opt.arrays(optimizer.tree)
        with pytest.raises(BadState, match="pickle was called inside"):
            pickle.dumps(optimizer.tree)
        optimizer.param_groups[0]["params"].pop()
        with pytest.raises(BadState, match="a change of groups or state was called inside"):
            optimizer.step()
        optimizer.param_groups[0]["params"].append(net[4].bias)
        assert bits(net) == inside
        within = opt.adjust(optimizer.tree, 0.5)
    assert bits(net) == before

    optimizer.load_state_dict(saved)
    optimizer.step()
    opt.update(within, dict(optimizer.parameters), dict(optimizer.parameters))
    with opt.averaged_(optimizer, net):
        pass


def read_only() -> dict[str, Any]:
    w = np.ones(2)
    w.setflags(write=False)
    return {"v": np.ones(2), "w": w}


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            lambda: {"w": jnp.ones(2)},
            "model['w'] is an array of jax that averaged_ cannot write; write averaged(",
        ),
        (lambda: jnp.ones(2), "model is an array of jax that averaged_ cannot write"),
        (read_only, "model['w'] is an array of numpy that averaged_ cannot write"),
    ],
)
def test_where_arrays_cannot_be_written_the_error_names_the_pure_way(
    model: Callable[[], Any], text: str
) -> None:
    start = model()
    state = opt.setup(opt.EMA(opt.Descent(0.5), 0.5), start)
    state, now = opt.update(state, start, start)
    if isinstance(now, dict) and isinstance(now["w"], np.ndarray):
        now["w"].setflags(write=False)
    with pytest.raises(BadState) as caught, opt.averaged_(state, now):
        pass

    assert text in str(caught.value)
    for x in jax.tree.leaves(now):
        np.testing.assert_array_equal(x, 0.5)
    opt.update(state, now, now)


def test_a_state_without_its_model_says_that_it_is_missing() -> None:
    state = opt.setup(opt.EMA(opt.Descent()), np.ones(2))
    with pytest.raises(BadState, match=r"the model is missing; write averaged\(state, model\)"):
        opt.averaged(state)


def test_without_an_average_there_is_nothing_to_evaluate() -> None:
    net = network()
    with (
        pytest.raises(NoMatch, match="no rule here keeps an average"),
        opt.averaged_(opt.TorchOptimizer(net, opt.Adam())),
    ):
        pass
