"""How much memory does a step take whose gradients are freed as they come, and how long?

    python -m benchmarks.in_backward [--layers 12] [--width 512] [--tokens 128] [--device cpu] [--seconds 60]

A decoder of transformer layers, forward, backward and AdamW. Bytes are those of tensors that are alive at
once beside parameters and state: activations, gradients and what the step needs. It prints a table and never
asserts.
"""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import argparse
from collections.abc import Callable

import torch
from torch.distributed import optim

import optimisers as opt
from benchmarks.alive import Alive
from benchmarks.printing import show
from benchmarks.timing import interleaved

OURS, INSIDE = "TorchOptimizer.step", "step_in_backward"
FUSED, THEIRS = "torch fused, step", "torch fused, in backward"


class Decoder(torch.nn.Module):
    """Layers as GPT has them, over tied embeddings."""

    def __init__(self, layers: int, width: int, words: int = 8192) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(words, width)
        block = torch.nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(block, layers, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embed(tokens)) @ self.embed.weight.T


def way(name: str, net: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    """A step of one of the ways."""
    optimizer: torch.optim.Optimizer | None = None
    if name == THEIRS:
        optim.apply_optimizer_in_backward._apply_optimizer_in_backward(
            torch.optim.AdamW, net.parameters(), {"lr": 1e-4, "fused": True}
        )
    elif name == FUSED:
        optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    else:
        make = opt.TorchOptimizer if name == OURS else opt.step_in_backward
        optimizer = make(net, opt.AdamW(1e-4, lam=0.01))

    def run() -> None:
        net.zero_grad()
        scores = net(tokens)
        torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        if optimizer is not None:
            optimizer.step()

    return run


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    names = (OURS, INSIDE, FUSED, THEIRS)
    tokens = torch.arange(given.tokens, device=given.device).reshape(1, -1)
    nets = {name: Decoder(given.layers, given.width).to(given.device) for name in names}
    ways = {name: way(name, net, tokens) for name, net in nets.items()}
    for run in ways.values():  # the state is made in the first step
        run()
    peaks: dict[str, int] = {}
    for name, run in ways.items():
        with Alive() as alive:
            run()
        peaks[name] = alive.peak
    times = interleaved(ways, seconds=given.seconds, least=5)
    size = sum(p.nbytes for p in nets[OURS].parameters())
    rows = [
        [
            name,
            f"{peaks[name] / 1e6:.1f}",
            f"{(peaks[OURS] - peaks[name]) / size:.2f}",
            f"{1e3 * times.median(name):.0f}",
            f"{times.ratio(name, OURS):.2f}x",
        ]
        for name in names
    ]
    count = sum(1 for _ in nets[OURS].parameters())
    show(
        f"{count} arrays, gradients of {size / 1e6:.1f} MB",
        ["way", "peak MB", "saved, in sizes of the gradients", "median ms", "to ours"],
        rows,
    )


if __name__ == "__main__":
    main()
