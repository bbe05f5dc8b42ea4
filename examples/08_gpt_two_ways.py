"""One small GPT, written in PyTorch and in JAX: the same text, the same rules, the same losses.

The text is what Python's own help says of the language. The matrices of the blocks are stepped by Muon, all
else by AdamW; rates rise, and fall along a cosine.
"""

from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

import optimisers as opt

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 32, 16

Numbers = dict[str, Any]


def rules(steps: int) -> dict[str, opt.Rule]:
    """Muon for the matrices of the blocks, which have (out, in) here; AdamW for the rest."""
    falling = opt.Cosine(1.0, steps, warmup=steps // 10)
    return {
        "blocks.*.*.weight": opt.Chain(opt.ClipNorm(1.0), opt.Muon(opt.Scaled(falling, 0.02))),
        "**": opt.AdamW(opt.Scaled(falling, 3e-3), (0.9, 0.95), lam=0.01),
    }


def text() -> tuple[Any, int]:
    """(the text as numbers of characters, how many characters there are)."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    known = sorted(set(whole))
    number = {c: i for i, c in enumerate(known)}
    return np.array([number[c] for c in whole]), len(known)


def start(characters: int) -> Numbers:
    """The numbers that both begin with: a nest of dicts and lists."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    ones = np.ones(WIDTH, np.float32)
    shapes = {"query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)}
    shapes |= {"up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
    blocks = [
        {"norm1": {"scale": ones.copy()}, "norm2": {"scale": ones.copy()}}
        | {name: {"weight": normal(*shape)} for name, shape in shapes.items()}
        for _ in range(LAYERS)
    ]
    ends = {"token": normal(characters, WIDTH), "place": normal(CONTEXT, WIDTH), "norm": ones.copy()}
    return {**ends, "blocks": blocks, "head": normal(characters, WIDTH)}


def batches(whole: Any, steps: int) -> Any:
    """(steps, batch, context + 1) pieces of the text."""
    starts = np.random.default_rng(1).integers(len(whole) - CONTEXT - 1, size=(steps, BATCH, 1))
    return whole[starts + np.arange(CONTEXT + 1)]


# -- PyTorch -------------------------------------------------------------------------------------------------


def torch_loss(model: Numbers, batch: torch.Tensor) -> torch.Tensor:
    """The mean surprise at the next character, in nats."""

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (WIDTH,), scale, eps=1e-6)

    x = model["token"][batch[:, :-1]] + model["place"]
    for block in model["blocks"]:
        y = norm(x, block["norm1"]["scale"])
        q, k, v = (
            (y @ block[name]["weight"].T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + y @ block["out"]["weight"].T
        y = functional.gelu(norm(x, block["norm2"]["scale"]) @ block["up"]["weight"].T)
        x = x + y @ block["down"]["weight"].T
    logits = norm(x, model["norm"]) @ model["head"].T
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def in_torch(numbers: Numbers, pieces: Any) -> list[float]:
    """The loss at every step."""
    leaves, form = jax.tree.flatten(numbers)
    model = jax.tree.unflatten(form, [torch.tensor(x, requires_grad=True) for x in leaves])
    state = opt.setup(rules(len(pieces)), model)
    losses: list[float] = []
    for piece in torch.tensor(pieces):
        value, grads = opt.value_and_grad(torch_loss, model, piece)
        state, model = opt.update_(state, model, grads)
        losses.append(value.item())
    return losses


# -- JAX -----------------------------------------------------------------------------------------------------


def jax_loss(model: Numbers, batch: jax.Array) -> jax.Array:
    """The mean surprise at the next character, in nats."""

    def norm(x: Any, scale: Any) -> Any:
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    x = model["token"][batch[:, :-1]] + model["place"]
    for block in model["blocks"]:
        y = norm(x, block["norm1"]["scale"])
        q, k, v = (
            (y @ block[name]["weight"].T).reshape(*y.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(y.shape)
        x = x + y @ block["out"]["weight"].T
        y = jax.nn.gelu(norm(x, block["norm2"]["scale"]) @ block["up"]["weight"].T, approximate=False)
        x = x + y @ block["down"]["weight"].T
    logits = jax.nn.log_softmax(norm(x, model["norm"]) @ model["head"].T)
    return -jnp.mean(jnp.take_along_axis(logits, batch[:, 1:, None], -1))


def in_jax(numbers: Numbers, pieces: Any) -> list[float]:
    """The loss at every step."""
    model = jax.tree.map(jnp.asarray, numbers)
    state = opt.setup(rules(len(pieces)), model)

    @jax.jit
    def step(state: opt.State, model: Numbers, piece: jax.Array) -> Any:
        value, grads = jax.value_and_grad(jax_loss)(model, piece)
        return *opt.update(state, model, grads), value

    losses: list[float] = []
    for piece in jnp.asarray(pieces):
        state, model, value = step(state, model, piece)
        losses.append(value.item())
    return losses


def main(steps: int = 60) -> dict[str, list[float]]:
    """Train both, and print their losses side by side."""
    whole, characters = text()
    pieces = batches(whole, steps)
    found = {"torch": in_torch(start(characters), pieces), "jax": in_jax(start(characters), pieces)}
    print("step  PyTorch     JAX")
    for n in sorted({0, *range(9, steps, 10), steps - 1}):
        print(f"{n + 1:4}  {found['torch'][n]:7.4f} {found['jax'][n]:7.4f}")
    return found


if __name__ == "__main__":
    main()
