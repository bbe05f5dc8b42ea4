"""Which rule reads handwritten digits best? A race of four, on a classifier in NumPy alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

import optimisers as opt

RULES: dict[str, opt.Rule] = {
    "Descent": opt.Descent(0.3),
    "Momentum": opt.Momentum(0.1, 0.9),
    "Adam": opt.Adam(0.003),
    "ClipGlobalNorm, AdamW": opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.005, lam=0.01)),
}
EPOCHS = 20
BATCH = 64
HIDDEN = 128
CLASSES = 10

Array = NDArray[Any]


# -- the model and its gradient, by hand ---------------------------------------------------------------------


@dataclass
class Layer:
    """x -> x weight + bias."""

    weight: Array
    bias: Array


@dataclass
class Network:
    """Two layers with tanh between them. A gradient of it is a Network too."""

    hidden: Layer
    head: Layer


def network(sizes: tuple[int, int, int], rng: np.random.Generator, dtype: type[np.floating[Any]]) -> Network:
    """A fresh network, its weights scaled so that every layer starts with outputs of variance one."""

    def layer(n: int, m: int) -> Layer:
        return Layer((rng.standard_normal((n, m)) / np.sqrt(n)).astype(dtype), np.zeros(m, dtype))

    n, m, k = sizes
    return Network(layer(n, m), layer(m, k))


def log_probabilities(net: Network, x: Array) -> tuple[Array, Array]:
    """(activity of the hidden layer, log softmax of the outputs), one row for each row of `x`."""
    h = np.tanh(x @ net.hidden.weight + net.hidden.bias)
    z = h @ net.head.weight + net.head.bias
    z -= z.max(axis=1, keepdims=True)
    return h, z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def loss_of(net: Network, x: Array, labels: Array) -> float:
    """Mean cross entropy, in nats."""
    _, logp = log_probabilities(net, x)
    return -float(logp[np.arange(len(labels)), labels].mean())


def loss_and_gradient(net: Network, x: Array, labels: Array) -> tuple[float, Network]:
    """Mean cross entropy and what it changes by, per unit of each parameter."""
    h, logp = log_probabilities(net, x)
    rows = np.arange(len(labels))
    dz = np.exp(logp)
    dz[rows, labels] -= 1
    dz /= len(labels)
    dh = (dz @ net.head.weight.T) * (1 - h * h)
    gradient = Network(Layer(x.T @ dh, dh.sum(axis=0)), Layer(h.T @ dz, dz.sum(axis=0)))
    return -float(logp[rows, labels].mean()), gradient


def accuracy(net: Network, x: Array, labels: Array) -> float:
    """The share of rows whose likeliest class is the right one."""
    _, logp = log_probabilities(net, x)
    return float((logp.argmax(axis=1) == labels).mean())


# -- the race ------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images of 8 x 8 pixels in [0, 1], as rows, and the digits they show."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


def digits(seed: int = 0) -> Digits:
    """The 1797 digits of scikit-learn; a fifth of them, drawn by the seed, is kept for the test."""
    pixels, y = load_digits(return_X_y=True)
    x = np.asarray(pixels, np.float32) / 16
    order = np.random.default_rng(seed).permutation(len(x))
    test, train = np.split(order, [len(x) // 5])
    return Digits(x[train], y[train], x[test], y[test])


def mini_batches(data: Digits, epochs: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """Every digit once an epoch, in an order that the seed draws."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(data.train_x))
        for rows in np.split(order, range(BATCH, len(order), BATCH)):
            yield data.train_x[rows], data.train_y[rows]


def run(epochs: int = EPOCHS, picture: Path = Path("demo.png")) -> opt.Race:
    """Let the rules race, with a progress bar; print the table, save the picture, and train once more by the
    winner.
    """
    data = digits()

    def made(seed: int) -> Network:
        sizes = data.train_x.shape[1], HIDDEN, CLASSES
        return network(sizes, np.random.default_rng(seed), np.float32)

    def loss(net: Network, batch: tuple[Array, Array]) -> tuple[float, Network]:
        return loss_and_gradient(net, *batch)

    found = opt.race(
        RULES,
        loss,
        made,
        lambda seed: mini_batches(data, epochs, seed),
        steps=epochs * -(-len(data.train_x) // BATCH),
        validate=lambda net: loss_of(net, data.test_x, data.test_y),
    )
    print(found)
    found.picture(picture, "Handwritten digits: four rules, each at the best of five rates")
    print(f"The loss curves are in {picture}.")
    net = made(3)
    state = opt.setup(found.winner, net)
    for batch in mini_batches(data, epochs, 3):
        state, net = opt.update_(state, net, loss(net, batch)[1])
    print(
        f"Trained by the winner once more: {accuracy(net, data.test_x, data.test_y):.1%} of the test right."
    )
    return found
