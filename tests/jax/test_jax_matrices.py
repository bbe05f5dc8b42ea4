"""Whole models of Flax by several rules: hidden matrices by those for matrices, all else by AdamW."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import optimisers as opt

TOKENS = jnp.arange(12).reshape(2, 6)
RULES: dict[Any, Any] = {opt.hidden_matrices: opt.Muon(0.02, layout="columns"), "**": opt.AdamW(3e-3)}


class Network(linen.Module):
    """A small convolutional language model."""

    @linen.compact
    def __call__(self, tokens: Any) -> Any:
        x = linen.Embed(20, 8)(tokens)
        x = x + linen.Conv(8, (3,))(linen.LayerNorm()(x))
        x = x + linen.Dense(8)(linen.gelu(linen.Dense(32)(x)))
        return linen.Dense(20, name="head")(x)


class OfNNX(nnx.Module):
    """The same."""

    def __init__(self, rngs: Any) -> None:
        self.embed, self.norm = nnx.Embed(20, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.up, self.down = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)
        self.head = nnx.Linear(8, 20, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        x = x + self.conv(self.norm(x))
        return self.head(x + self.down(nnx.gelu(self.up(x))))


def cross_entropy(logits: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[..., None], -1).mean()


def kinds(explained: Any) -> dict[str, set[str]]:
    """Which paths the rules of each type train."""
    found: dict[str, set[str]] = {}
    for group in explained.groups:
        for rule, paths in group.trained:
            found.setdefault(rule.split("(", maxsplit=1)[0], set()).update(paths)
    return found


def test_linen_gives_its_kernels_to_muon_and_learns() -> None:
    network = Network()
    params = network.init(jax.random.key(0), TOKENS)
    state = opt.setup(RULES, params)

    def loss(params: Any) -> Any:
        return cross_entropy(network.apply(params, TOKENS))

    @jax.jit
    def step(state: Any, params: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        return *opt.update(state, params, grads), value

    losses: list[float] = []
    for _ in range(20):
        state, params, value = step(state, params)
        losses.append(float(value))

    found = kinds(opt.explain(state))
    assert found["Muon"] == {f"params.{name}.kernel" for name in ("Conv_0", "Dense_0", "Dense_1")}
    assert {"params.Embed_0.embedding", "params.head.kernel"} < found["AdamW"]
    assert losses[-1] < 0.5 * losses[0]


def test_nnx_gives_its_kernels_to_muon_and_learns() -> None:
    model = OfNNX(nnx.Rngs(0))
    state = opt.setup({**RULES, opt.hidden_matrices: opt.NorMuon(0.02, layout="columns")}, model)

    @nnx.jit
    def step(state: Any, model: Any) -> Any:
        value, grads = nnx.value_and_grad(lambda m: cross_entropy(m(TOKENS)))(model)
        return *opt.update(state, model, grads), value

    losses: list[float] = []
    for _ in range(20):
        state, model, value = step(state, model)
        losses.append(float(value))

    found = kinds(opt.explain(state))
    assert found["NorMuon"] == {"conv.kernel", "up.kernel", "down.kernel"}
    assert {"embed.embedding", "head.kernel", "norm.scale"} < found["AdamW"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("rule", [opt.Muon, opt.NorMuon, opt.AdaMuon], ids=lambda cls: cls.__name__)
def test_kernels_of_flax_step_as_the_same_weights_of_torch_do(rule: Any) -> None:
    """Of a layer, (in, out) against (out, in), and of a convolution, (3, in, out) against (out, in, 3)."""
    rng = np.random.default_rng(0)
    torchs = {"dense": rng.standard_normal((5, 4)), "conv": rng.standard_normal((6, 4, 3))}
    grads = [{name: rng.standard_normal(x.shape) for name, x in torchs.items()} for _ in range(3)]

    def turned(arrays: Any) -> Any:
        return {
            "dense": jnp.asarray(arrays["dense"].T, "float32"),
            "conv": jnp.asarray(arrays["conv"].transpose(2, 1, 0), "float32"),
        }

    flaxs, ours = turned(torchs), opt.setup(rule(0.1, layout="columns"), turned(torchs))
    theirs, step = opt.setup(rule(0.1), torchs), jax.jit(opt.update)
    for g in grads:
        theirs, torchs = opt.update(theirs, torchs, g)
        ours, flaxs = step(ours, flaxs, turned(g))

    np.testing.assert_allclose(flaxs["dense"].T, torchs["dense"], atol=2e-4)
    np.testing.assert_allclose(flaxs["conv"].transpose(2, 1, 0), torchs["conv"], atol=2e-4)
