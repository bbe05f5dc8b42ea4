"""LoRA by `peft`: only the small matrices beside the frozen ones are trained, and only they have state."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import optimisers as opt


class Net(nn.Module):
    """A network that was trained before; its two layers stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def main(steps: int = 300) -> tuple[float, float]:
    """(loss before, loss after) of learning another function of the same inputs."""
    torch.manual_seed(0)
    before = Net()
    model: Any = get_peft_model(before, LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"]))
    kept = {name: x.detach().clone() for name, x in model.named_parameters() if not x.requires_grad}
    x = torch.randn(256, 16)
    wanted = torch.roll(before(x).detach(), 1, dims=1)

    # The paper on LoRA+ gives B, which begins at zero, a higher rate than A.
    rules = {"**.lora_B.**": opt.AdamW(2e-2), "**.lora_A.**": opt.AdamW(2e-3)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = opt.TorchOptimizer(list(trained.items()), rules)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)
    numbers = sum(p.numel() for p in trained.values())
    of = numbers + sum(p.numel() for p in kept.values())
    print(f"{numbers} of {of} numbers are trained; loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
