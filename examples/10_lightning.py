"""Lightning trains a classifier: a rule, a scheduler of torch, and a checkpoint to go on from."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import optimisers as opt


def moons(count: int = 256) -> TensorDataset:
    """Two half circles, one in the other."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(count) % 2
    turn = torch.pi * torch.rand(count, generator=generator)
    x = torch.stack([torch.cos(turn) + kind, torch.sin(turn) * (1 - 2 * kind) + 0.5 * kind], 1)
    return TensorDataset(x + 0.1 * torch.randn(count, 2, generator=generator), kind)


class Classifier(lightning.LightningModule):
    """Two layers, trained by NAdamW with a rate that falls along a cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, kind = batch
        loss = nn.functional.cross_entropy(self.net(x), kind)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = opt.TorchOptimizer(self, opt.NAdamW(0.02, lam=0.01))
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]


def main() -> tuple[list[float], list[float]]:
    """The losses of twenty epochs, at once and in two halves with a checkpoint between them: the same."""
    warnings.filterwarnings("ignore", module="lightning.*")
    loader = DataLoader(moons(), 32)

    def fit(model: Classifier, epochs: int, folder: str, after: str | None = None) -> str:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, loader, ckpt_path=after, weights_only=False)
        path = str(Path(folder) / f"after_{epochs}.ckpt")
        trainer.save_checkpoint(path)
        return path

    with tempfile.TemporaryDirectory() as folder:
        lightning.seed_everything(0, verbose=False)
        whole = Classifier()
        fit(whole, 20, folder)
        lightning.seed_everything(0, verbose=False)
        first, second = Classifier(), Classifier()
        fit(second, 20, folder, after=fit(first, 10, folder))
    halves = first.losses + second.losses
    print(
        f"loss {whole.losses[0]:.4f} at first, {whole.losses[-1]:.4f} at last; in two halves {halves[-1]:.4f}"
    )
    return whole.losses, halves


if __name__ == "__main__":
    main()
