"""Estimates of the diagonal of the Hessian: exact for diagonal ones, right in the mean for all, and handed on
to the rules that ask for second gradients.
"""

from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.tensors import tensor

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy


def vector(tree: Any) -> Any:
    """All numbers of a nest, one after the other."""
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.fixture(autouse=True)
def _x64() -> Any:
    with jax.enable_x64(True):
        yield


SHAPES = {"w": (2, 3), "b": (3,), "s": ()}


def plain(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(shape) for k, shape in SHAPES.items()}


LIBRARIES = pytest.mark.parametrize("put", [tensor, jnp.array], ids=["torch", "jax"])


@LIBRARIES
def test_a_diagonal_second_derivative_is_found_exactly(put: Any) -> None:
    a, x = plain(1), {k: put(v) for k, v in plain().items()}
    weights = {k: put(v) for k, v in a.items()}

    def loss(model: Any, scale: float) -> Any:
        return scale * sum((weights[k] * model[k] ** 2).sum() + model[k].sum() ** 1 for k in model)

    for seed in (0, 1):
        found = opt.hutchinson(loss, x, seed, 0.5)
        for k, v in a.items():
            assert np.allclose(np.asarray(found[k]), v, atol=1e-12)


@LIBRARIES
def test_of_a_quadratic_it_is_z_times_h_z(put: Any) -> None:
    rng = np.random.default_rng(3)
    h = rng.standard_normal((6, 6))
    h = h + h.T
    matrix, x = put(h), {"w": put(rng.standard_normal((2, 3)))}
    signs = [opt.ops.rademacher(np.zeros((2, 3)), 7, step=k, leaf=("w",)).ravel() for k in range(3)]
    wanted = sum(z * (h @ z) for z in signs) / 3

    def loss(model: Any) -> Any:
        flat = model["w"].reshape(-1)
        return flat @ matrix @ flat / 2

    found = np.asarray(opt.hutchinson(loss, x, 7, samples=3)["w"])
    assert np.allclose(found.ravel(), wanted, atol=1e-12)


def net(model: Any, x: Any, y: Any, tanh: Any) -> Any:
    return ((tanh(x @ model["w"] + model["b"]).sum(1) * model["s"] - y) ** 2).mean()


@pytest.mark.slow
def test_in_the_mean_it_is_the_diagonal_of_the_hessian_of_a_net() -> None:
    rng = np.random.default_rng(5)
    data, model = (rng.standard_normal((20, 2)), rng.standard_normal(20)), plain()
    x = {k: jnp.array(v) for k, v in model.items()}
    x = {"layers": [x["w"], x["b"]], "s": x["s"]}

    def loss(m: Any, *batch: Any) -> Any:
        return net({"w": m["layers"][0], "b": m["layers"][1], "s": m["s"]}, *map(jnp.array, batch), jnp.tanh)

    flat = vector(x)

    def of(v: Any) -> Any:
        return loss({"layers": [v[:6].reshape(2, 3), v[6:9]], "s": v[9]}, *data)

    exact = jnp.diag(jax.hessian(of)(flat))
    estimate = jax.jit(lambda seed: vector(opt.hutchinson(loss, x, seed, *data)))
    found = np.asarray(jax.vmap(estimate)(jnp.arange(4000)))
    error = found.std(0) / np.sqrt(len(found))

    assert (np.abs(found.mean(0) - exact) < 5 * error + 1e-12).all()
    assert np.corrcoef(found[:-1].sum(1), found[1:].sum(1))[0, 1] < 0.1
    tensors = {"layers": [tensor(model["w"]), tensor(model["b"])], "s": tensor(model["s"])}

    def same(m: Any) -> Any:
        parts = {"w": m["layers"][0], "b": m["layers"][1], "s": m["s"]}
        return net(parts, *map(tensor, data), torch.tanh)

    got = opt.hutchinson(same, tensors, 11)
    mine = np.concatenate([np.ravel(v) for v in (got["layers"][0], got["layers"][1], got["s"])])
    assert np.allclose(mine, found[11], atol=1e-10)


def test_a_module_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    module[0].bias.requires_grad_(False)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x, y = torch.randn(8, 3), torch.randn(8, 1)

    def loss(m: Any, x: Any, y: Any) -> Any:
        return ((m(x) - y) ** 2).mean()

    found = opt.hutchinson(loss, module, 3, x, y)
    assert found["0.bias"] is None
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())

    named = {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
    signs = {k: opt.ops.rademacher(p, 3, leaf=k.split(".")) for k, p in named.items()}

    def of(parameters: Any) -> Any:
        return loss(lambda x: torch.func.functional_call(module, parameters, (x,)), x, y)

    _, products = torch.autograd.functional.hvp(
        lambda *p: of(dict(zip(named, p, strict=True))), tuple(named.values()), tuple(signs.values())
    )
    for (k, z), h in zip(signs.items(), products, strict=True):
        assert torch.allclose(found[k], z * h, atol=1e-6)


@LIBRARIES
@pytest.mark.parametrize("rule", [opt.Sophia(0.1), opt.AdaHessian(0.1)], ids=lambda r: type(r).__name__)
def test_rules_take_it_as_second_gradients(put: Any, rule: opt.Rule) -> None:
    x = {k: put(v) for k, v in plain().items()}
    state = opt.setup(rule, x)

    def loss(model: Any) -> Any:
        return sum(((k + 1) * v**2).sum() for k, v in enumerate(model.values()))

    first = float(loss(x))
    for step in range(20):
        grads = {k: 2 * (i + 1) * v for i, (k, v) in enumerate(x.items())}
        state, x = opt.update(state, x, grads, opt.hutchinson(loss, x, step) if step % 2 == 0 else None)
    assert float(loss(x)) < first / 2


def test_half_precision_keeps_its_type() -> None:
    x = {"w": torch.ones(4, dtype=torch.bfloat16)}
    found = opt.hutchinson(lambda m: (m["w"] ** 3).sum(), x, 0)["w"]

    assert found.dtype == torch.bfloat16
    assert (found == 6).all()


def test_what_has_no_such_estimate_is_refused() -> None:
    def loss(model: Any) -> Any:
        return model["w"].sum()

    with pytest.raises(opt.BadState, match="arrays of numpy cannot be differentiated"):
        opt.hutchinson(loss, {"w": np.ones(2)}, 0)
    with pytest.raises(opt.BadState, match=r"real parameters; model\['w'\] is complex"):
        opt.hutchinson(loss, {"w": jnp.ones(2, complex)}, 0)
    with pytest.raises(opt.BadSetting, match="from 0 to 16777215"):
        opt.hutchinson(loss, {"w": jnp.ones(2)}, -1)
    with pytest.raises(opt.BadState, match="samples=0"):
        opt.hutchinson(loss, {"w": jnp.ones(2)}, 0, samples=0)
    with pytest.raises(opt.BadState, match="state where the model goes"):
        opt.hutchinson(loss, opt.setup(opt.Adam(), {"w": jnp.ones(2)}), 0)
    assert (np.asarray(opt.hutchinson(loss, {"w": jnp.ones(2)}, 0)["w"]) == 0).all()
    assert (np.asarray(opt.hutchinson(loss, {"w": torch.ones(2)}, 0)["w"]) == 0).all()
