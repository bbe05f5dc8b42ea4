"""A small transformer on characters: do rules of matrices need fewer steps than AdamW? At equal budgets.

The text is what Python's own help says of the language (`pydoc_data.topics`). Every rule is tried at the same
number of rates, from the same start, on the same batches. Writes transformer.png.
"""

import math
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional

import optimisers as opt

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 96, 4, 2, 64, 16


class Block(nn.Module):
    """Attention and a layer of neurons, each behind a normalisation and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Logits of the next character at every place."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.token(text) + self.place.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def text() -> tuple[torch.Tensor, int]:
    """(the text as numbers of characters, how many characters there are)."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    known = sorted(set(whole))
    number = {c: i for i, c in enumerate(known)}
    return torch.tensor([number[c] for c in whole]), len(known)


def batches(whole: torch.Tensor, count: int, seed: int) -> list[torch.Tensor]:
    """Pieces of the text, (batch, context + 1) each."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(whole) - CONTEXT - 1, (count, BATCH, 1), generator=generator)
    return list(whole[starts + torch.arange(CONTEXT + 1)])


def loss(model: Transformer, batch: torch.Tensor) -> torch.Tensor:
    """The mean surprise at the next character, in nats."""
    return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def with_adamw(rule: opt.Rule) -> dict[object, opt.Rule]:
    """A rule for the hidden matrices; embeddings, head, biases and scales are stepped by AdamW."""
    return {opt.hidden_matrices: rule, "**": opt.AdamW(3e-3)}


RULES = {
    "AdamW": opt.AdamW(3e-3),
    "Adafactor": opt.Adafactor(3e-3, rho=0.9, relative=False, scaled=False),
    "Muon": with_adamw(opt.Muon(0.02)),
    "SOAP": with_adamw(opt.SOAP(3e-3, lam=0.0)),
    "Shampoo": with_adamw(opt.Shampoo(3e-3)),
    "Kron": with_adamw(opt.Kron(1e-3)),
}


def reached(curve: Sequence[float], bar: float, over: int = 20) -> int | None:
    """After how many steps the mean of the last `over` losses is at the bar; None for never."""
    means = [sum(curve[max(0, n - over) : n]) / min(n, over) for n in range(1, len(curve) + 1)]
    return next((n for n, mean in enumerate(means, 1) if mean <= bar), None)


def main(steps: int = 300, factors: Sequence[float] = (0.3, 1.0, 3.0), seeds: Sequence[int] = (0, 1)) -> None:
    whole, characters = text()
    held = batches(whole[-len(whole) // 10 :], 8, 0)

    def validate(model: Transformer) -> float:
        with torch.no_grad():
            return sum(loss(model, batch).item() for batch in held) / len(held)

    def start(seed: int) -> Transformer:
        torch.manual_seed(seed)
        return Transformer(characters)

    def given(seed: int) -> list[torch.Tensor]:
        return batches(whole[: -len(whole) // 10], steps, 1000 + seed)

    result = opt.race(RULES, loss, start, given, factors=factors, seeds=seeds, steps=steps, validate=validate)
    print(result)
    curves = {
        e.name: [sum(t.losses[n] for t in e.trials) / len(e.trials) for n in range(steps)]
        for e in result.entries
    }
    bar = sum(curves["AdamW"][-20:]) / len(curves["AdamW"][-20:])
    print(f"steps to the last training loss of AdamW, {bar:.3f} (guessing: {math.log(characters):.3f}):")
    for name, curve in curves.items():
        print(f"  {name}: {reached(curve, bar) or 'not reached'}")
    print("curves in", result.picture("transformer.png"))


if __name__ == "__main__":
    main()
