"""A network of MLX is trained by a back end from outside, which is the file `mlx_backend.py` beside this."""

from typing import Any

import mlx.core as mx
import mlx_backend  # noqa: F401 arrays of MLX are known from here on
from mlx import nn

import optimisers as opt


def main(steps: int = 300) -> tuple[float, float]:
    """(loss at first, loss at last) of fitting a sine: the hidden matrix by Muon, the rest by AdamW."""
    mx.random.seed(0)
    x = mx.linspace(-3, 3, 128)[:, None]
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss_of(model: Any) -> Any:
        return nn.losses.mse_loss(model(x), mx.sin(2 * x))

    parameters = model.trainable_parameters()
    falling = opt.Cosine(1.0, steps, warmup=steps // 10)
    muon, adamw = opt.Muon(opt.Scaled(falling, 0.02)), opt.AdamW(opt.Scaled(falling, 0.01))
    state = opt.setup({"layers.2.weight": muon, "**": adamw}, parameters)
    losses: list[float] = []
    for _ in range(steps):
        loss, grads = nn.value_and_grad(model, loss_of)(model)
        state, parameters = opt.update(state, parameters, grads)
        model.update(parameters)
        mx.eval(loss, parameters)
        losses.append(loss.item())
    print(opt.explain(state))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.6f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
