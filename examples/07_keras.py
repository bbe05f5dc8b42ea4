"""A Keras model is trained by Muon and AdamW, once with each backend: the same data, the same rules, and the
same losses.
"""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np

import optimisers as opt

EPOCHS = 12


def spirals() -> tuple[Any, Any]:
    """Points on three noisy spirals, and which spiral each is on."""
    rng = np.random.default_rng(0)
    kind = np.arange(300) % 3
    turn = rng.uniform(0.5, 3, 300)
    angle = 2 * turn + 2 * np.pi / 3 * kind + 0.1 * rng.standard_normal(300)
    return np.stack([turn * np.cos(angle), turn * np.sin(angle)], 1).astype(np.float32), kind


def losses() -> list[float]:
    """The loss of every epoch, with the backend of this process."""
    import keras

    x, kind = spirals()
    layers = keras.layers
    hidden = [layers.Dense(32, activation="tanh", name=f"dense_{n}") for n in range(3)]
    model = keras.Sequential([layers.Input((2,)), *hidden, layers.Dense(3, name="head")])
    rng = np.random.default_rng(0)
    model.set_weights(
        [rng.standard_normal(w.shape) / np.sqrt(max(w.shape[0], 1)) for w in model.get_weights()]
    )
    rules = {opt.hidden_matrices: opt.Muon(0.02, layout="columns"), "**": opt.AdamW(0.01)}
    falling = keras.optimizers.schedules.CosineDecay(1.0, EPOCHS * 10)
    model.compile(
        optimizer=opt.KerasOptimizer(rules, falling, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model.fit(x, kind, batch_size=30, epochs=EPOCHS, shuffle=False, verbose=0).history["loss"]


def main() -> dict[str, list[float]]:
    """Train with both backends, each in a process of its own: Keras has one in a process."""
    found: dict[str, list[float]] = {}
    for backend in ("torch", "jax"):
        there = os.environ | {"KERAS_BACKEND": backend}
        done = subprocess.run(  # noqa: S603 this file, by this Python
            [sys.executable, __file__, "--losses"], env=there, check=True, capture_output=True, text=True
        )
        found[backend] = json.loads(done.stdout.splitlines()[-1])
        first, *_, last = found[backend]
        print(f"{backend:6} loss {first:.4f} at the first epoch, {last:.4f} at the last")
    return found


if __name__ == "__main__":
    if "--losses" in sys.argv:
        print(json.dumps(losses()))
    else:
        main()
