"""ResNet-18 of PyTorch, trained whole and then with its first stage frozen; what the state costs."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import optimisers as opt


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """He et al., "Deep residual learning for image recognition", 2015, arXiv:1512.03385, table 1."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.stages = nn.Sequential(
            nn.Sequential(Block(64, 64, 1), Block(64, 64, 1)),
            nn.Sequential(Block(64, 128, 2), Block(128, 128, 1)),
            nn.Sequential(Block(128, 256, 2), Block(256, 256, 1)),
            nn.Sequential(Block(256, 512, 2), Block(512, 512, 1)),
        )
        self.head = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def digits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images of 32 x 32 in three colours, what they show), from handwritten digits of 8 x 8."""
    data = load_digits()
    images = torch.tensor(data.images[:count] / 16, dtype=torch.float32)[:, None]
    images = functional.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous(), torch.tensor(data.target[:count])


def train(
    state: opt.State, model: ResNet18, images: torch.Tensor, shown: torch.Tensor, steps: int
) -> list[float]:
    """Some steps in place, always on the same images; the loss before each."""
    losses: list[float] = []
    for _ in range(steps):
        model.zero_grad()
        loss = functional.cross_entropy(model(images), shown)
        loss.backward()
        opt.update_(state, model, opt.gradients(model))
        losses.append(loss.item())
    return losses


def main() -> list[float]:
    """Train, freeze the first stage, train on; all losses."""
    torch.manual_seed(0)
    images, shown = digits(8)
    model = ResNet18()
    state = opt.setup(opt.Adam(), model)
    size = sum(p.numel() * p.itemsize for p in opt.trainables(model))
    print(f"model {size / 1e6:.1f} MB")
    losses = train(state, model, images, shown, 4)
    print(opt.explain(state))

    opt.freeze_(state.stages[0])
    before = [p.detach().clone() for p in model.stages[0].parameters()]
    losses += train(state, model, images, shown, 4)
    assert all(map(torch.equal, before, model.stages[0].parameters()))
    print(opt.explain(state))
    print(f"loss {losses[0]:.2f}, then {losses[4]:.2f}, with a frozen stage {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
