"""What does training look like? A classifier of handwritten digits, in NumPy alone, under four rules."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits

import optimisers as opt

RULES: dict[str, opt.Rule] = {
    "Descent": opt.Descent(0.3),
    "Momentum": opt.Momentum(0.1, 0.9),
    "Adam": opt.Adam(0.003),
    "ClipGlobalNorm, AdamW": opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.005, lam=0.01)),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499")
"""Told apart by people with any kind of colour vision; the first three are Okabe and Ito's."""

EPOCHS = 60
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


# -- training ------------------------------------------------------------------------------------------------


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


class Result(NamedTuple):
    """How one rule fared."""

    name: str
    losses: Array
    """The loss of each mini-batch, before its step."""
    loss: float
    accuracy: float
    seconds: float


def train(
    name: str, rule: opt.Rule, data: Digits, epochs: int, report: Callable[[float], None], seed: int = 1
) -> Result:
    """Train a fresh network. One seed gives every rule the same first weights and the same mini-batches."""
    rng = np.random.default_rng(seed)
    net = network((data.train_x.shape[1], HIDDEN, CLASSES), rng, np.float32)
    start = time.perf_counter()
    state = opt.setup(rule, net)
    losses: list[float] = []
    for _ in range(epochs):
        order = rng.permutation(len(data.train_x))
        for rows in np.split(order, range(BATCH, len(order), BATCH)):
            loss, gradient = loss_and_gradient(net, data.train_x[rows], data.train_y[rows])
            state, net = opt.update_(state, net, gradient)
            losses.append(loss)
        report(losses[-1])
    return Result(
        name,
        np.array(losses),
        loss_of(net, data.train_x, data.train_y),
        accuracy(net, data.test_x, data.test_y),
        time.perf_counter() - start,
    )


def run(epochs: int = EPOCHS, picture: Path = Path("demo.png")) -> list[Result]:
    """Train under every rule, with a progress bar; print the table and save the picture."""
    console = Console()
    data = digits()
    results: list[Result] = []
    columns = (TextColumn("{task.description:<21}"), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name, rule in RULES.items():
            bar = progress.add_task(name, total=epochs, loss=np.log(CLASSES))
            results.append(
                train(name, rule, data, epochs, lambda x, bar=bar: progress.update(bar, advance=1, loss=x))
            )
    console.print(table(results))
    draw(results, picture)
    console.print(f"The loss curves are in {picture}.")
    return results


# -- what is shown -------------------------------------------------------------------------------------------


def table(results: list[Result]) -> Table:
    best = max(r.accuracy for r in results)
    shown = Table(caption="Seconds include compiling, once on a machine.")
    shown.add_column("rule")
    for heading in ("training loss", "test accuracy", "seconds"):
        shown.add_column(heading, justify="right")
    for r in results:
        style = "bold" if r.accuracy == best else ""
        shown.add_row(r.name, f"{r.loss:.5f}", f"{r.accuracy:.2%}", f"{r.seconds:.2f}", style=style)
    return shown


def smooth(losses: Array, steps: float = 12.0) -> Array:
    """The geometric mean over about so many steps to either side; it follows a curve drawn on a log scale."""
    reach = np.arange(-3 * steps, 3 * steps + 1)
    window = np.exp(-0.5 * (reach / steps) ** 2)
    total, weight = (_blurred(v, window) for v in (np.log(np.maximum(losses, 1e-12)), np.ones(len(losses))))
    return np.exp(total / weight)


def _blurred(values: Array, window: Array) -> Array:
    """The sum over a window around each value, as far as there are values."""
    half = len(window) // 2
    return np.convolve(values, window)[half : half + len(values)]


def spread(heights: Array, gap: float) -> Array:
    """The heights moved apart so that labels at them keep the gap, in the order they had."""
    order = np.argsort(heights)
    placed = heights[order].astype(float)
    for _ in range(100):
        lack = gap - np.diff(placed)
        if (lack <= 1e-9).all():
            break
        for i in np.flatnonzero(lack > 0):
            lack = gap - (placed[i + 1] - placed[i])
            placed[i] -= max(lack, 0) / 2
            placed[i + 1] += max(lack, 0) / 2
    out = np.empty_like(placed)
    out[order] = placed
    return out


def draw(results: list[Result], path: Path) -> None:
    """Save the loss curves: mini-batches faint, the mean around each on top, a label where the curve ends."""
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    curves = [smooth(r.losses) for r in results]
    for r, curve, colour in zip(results, curves, COLOURS, strict=True):
        axes.plot(r.losses, color=colour, alpha=0.15, linewidth=0.6)
        axes.plot(curve, color=colour, linewidth=2.2, solid_capstyle="round")

    steps = max(len(r.losses) for r in results)
    low, high = min(c.min() for c in curves) / 3, 4.0
    axes.set_xlim(0, steps)
    axes.set_ylim(low, high)
    ends = np.array([np.log10(c[-1]) for c in curves])
    for r, colour, end in zip(results, COLOURS, spread(ends, 0.1 * np.log10(high / low)), strict=True):
        axes.annotate(
            f"{r.name}\n{r.accuracy:.1%} of the test right",
            (steps, 10**end),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            linespacing=1.3,
            verticalalignment="center",
            annotation_clip=False,
        )
    axes.set_xlabel(f"step (mini-batches of {BATCH} digits)")
    axes.set_ylabel("training loss (cross entropy, nats)")
    axes.set_title("Handwritten digits, one network, four rules", loc="left", fontsize=13, pad=12)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.grid(visible=True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
