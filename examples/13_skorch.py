"""skorch makes an estimator of scikit-learn from a module of PyTorch, and any rule its optimiser."""

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler
from torch import nn

import optimisers as opt


def main() -> float:
    """The mean share of digits that are right, over three folds."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    net = NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)),
        criterion=nn.CrossEntropyLoss,
        # skorch hands on groups and lr=; the rule is the rest of the call.
        optimizer=partial(opt.TorchOptimizer, rule=opt.Chain(opt.ClipNorm(1.0), opt.AdamW(lam=0.01))),
        lr=0.01,
        max_epochs=10,
        batch_size=64,
        train_split=None,
        callbacks=[("falling", LRScheduler("CosineAnnealingLR", T_max=10))],
        verbose=0,
    )
    scores = cross_val_score(net, (x / 16).astype(np.float32), y, cv=3)
    print(f"right: {scores.mean():.3f} of the digits, over three folds")
    return float(scores.mean())


if __name__ == "__main__":
    main()
