"""ResNet-18 of Flax Linen: its loss returns the statistics of BatchNorm, which go beside the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from sklearn.datasets import load_digits

import optimisers as opt


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def conv(size: int, stride: int) -> nn.Conv:
            return nn.Conv(self.width, (size, size), stride, padding=size // 2, use_bias=False)

        def norm() -> nn.BatchNorm:
            return nn.BatchNorm(use_running_average=False, momentum=0.9)

        y = nn.relu(norm()(conv(3, self.stride)(x)))
        y = norm()(conv(3, 1)(y))
        if x.shape != y.shape:
            x = norm()(conv(1, self.stride)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """He et al., "Deep residual learning for image recognition", 2015, arXiv:1512.03385, table 1."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(64, (7, 7), 2, padding=3, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, width in enumerate((64, 128, 256, 512)):
            for block in range(2):
                x = Block(width, 2 if stage and not block else 1)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


NET = ResNet18()


def digits(count: int) -> tuple[Any, Any]:
    """(images of 32 x 32 in three colours, what they show), from handwritten digits of 8 x 8."""
    data = load_digits()
    images = jax.image.resize(jnp.asarray(data.images[:count] / 16), (count, 32, 32), "bilinear")
    return jnp.repeat(images[..., None], 3, axis=-1), jnp.asarray(data.target[:count])


def error(params: Any, statistics: Any, images: Any, shown: Any) -> tuple[Any, Any]:
    """(the cross entropy, the statistics after this batch)."""
    given = {"params": params, "batch_stats": statistics}
    scores, new = NET.apply(given, images, mutable=["batch_stats"])
    right = jnp.take_along_axis(jax.nn.log_softmax(scores), shown[:, None], axis=1)
    return -right.mean(), new["batch_stats"]


@jax.jit
def step(state: Any, params: Any, statistics: Any, images: Any, shown: Any) -> Any:
    """One step: what trains, what is only carried on, and the loss before."""
    slopes = jax.value_and_grad(error, has_aux=True)
    (loss, statistics), grads = slopes(params, statistics, images, shown)
    state, params = opt.update(state, params, grads)
    return state, params, statistics, loss


def main() -> list[float]:
    """Train on the same images for some steps; the loss before each."""
    images, shown = digits(16)
    variables = jax.jit(NET.init)(jax.random.key(0), images)
    params, statistics = variables["params"], variables["batch_stats"]
    state = opt.setup(opt.Chain(opt.ClipGlobalNorm(1.0), opt.Adam()), params)
    size = sum(x.nbytes for x in opt.trainables(params))
    print(f"model {size / 1e6:.1f} MB, in {len(opt.trainables(params))} arrays")
    losses: list[float] = []
    for _ in range(8):
        state, params, statistics, loss = step(state, params, statistics, images, shown)
        losses.append(float(loss))
    print(opt.explain(state))
    assert losses[-1] < 0.5 * losses[0]
    print(f"loss {losses[0]:.3f}, then {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
