"""Which way do rules go on a function of two numbers, each at its best rate?"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import optimisers as opt
from docs.make_rules.pictures import png
from optimisers.curves import COLOURS

RATES = tuple(float(f"{m}e{p}") for p in range(-4, 1) for m in (1, 2, 5))
"""What each rule is tried at on each function; the best is shown."""

STEPS = 120

FAR = 3.0
"""A path that goes farther than this is none of the best."""

RULES: dict[str, Callable[[float], opt.Rule]] = {
    "Descent": opt.Descent,
    "Momentum": lambda eta: opt.Momentum(eta, 0.9),
    "RMSProp": opt.RMSProp,
    "Adam": opt.Adam,
    "Lion": opt.Lion,
    "AdaGrad": opt.AdaGrad,
}


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of two numbers, with its gradient, and what it shows."""

    name: str
    says: str
    value: Callable[[Any, Any], Any]
    slope: Callable[[float, float], tuple[float, float]]
    start: tuple[float, float]
    window: tuple[float, float, float, float]
    """Left, right, bottom, top."""
    noise: float = 0.0


FUNCTIONS = {
    "valley": Function(
        "A curved valley",
        "Rosenbrock's valley, not quite as steep as his. The way along its floor is slow for plain "
        "descent: the rate that the walls allow is small. Momentum gathers speed, and rules that scale "
        "each coordinate see a flatter floor.",
        lambda x, y: (1 - x) ** 2 + 10 * (y - x * x) ** 2,
        lambda x, y: (-2 * (1 - x) - 40 * x * (y - x * x), 20 * (y - x * x)),
        (-1.2, 1.0),
        (-1.7, 1.7, -0.6, 1.9),
    ),
    "bowl": Function(
        "A long bowl, along the axes",
        "One direction is a hundred times as steep as the other. Scaling by coordinates takes that away "
        "at once; turned by 45 degrees it would not, and there rules with matrices would be needed.",
        lambda x, y: 0.5 * (x * x + 100 * y * y),
        lambda x, y: (x, 100 * y),
        (-1.5, 0.9),
        (-1.8, 1.0, -1.1, 1.1),
    ),
    "saddle": Function(
        "A saddle",
        "The start lies almost on the ridge, where the gradient is nearly flat to the side. Rules that "
        "scale by the size of past gradients leave it soon; descent stays long.",
        lambda x, y: 0.5 * x * x - 0.5 * y * y + 0.25 * y**4 + 0.25,
        lambda x, y: (x, y**3 - y),
        (-1.4, 0.001),
        (-1.7, 1.0, -1.5, 1.5),
    ),
    "noisy": Function(
        "A bowl with noisy gradients",
        "Each gradient has noise of about its own size, as one of a small batch has. Averages help; rules "
        "of signs step as far near the end as at the start, so they need a rate that falls.",
        lambda x, y: 0.5 * (x * x + 10 * y * y),
        lambda x, y: (x, 10 * y),
        (-1.5, 0.9),
        (-1.8, 0.8, -1.1, 1.1),
        noise=3.0,
    ),
}


def walk(rule: opt.Rule, function: Function) -> np.ndarray:
    """The points that a rule goes through, as far as they are near."""
    rng = np.random.default_rng(0)
    p = np.array(function.start)
    state = opt.setup(rule, p, engine="interpret")
    points = [p]
    for _ in range(STEPS):
        g = np.array(function.slope(float(p[0]), float(p[1]))) + function.noise * rng.standard_normal(2)
        state, p = opt.update(state, p, g)
        if not np.abs(p).max() < FAR:
            break
        points.append(p)
    return np.array(points)


def best(make: Callable[[float], opt.Rule], function: Function) -> tuple[float, np.ndarray]:
    """(the rate, the points) of least mean loss over the last quarter, of those that stay in sight."""
    tried = [(rate, walk(make(rate), function)) for rate in RATES]
    whole = [(rate, points) for rate, points in tried if len(points) == STEPS + 1]
    return min(whole, key=lambda pair: float(function.value(*pair[1][-STEPS // 4 :].T).mean()))


def landscape(function: Function) -> tuple[bytes, dict[str, float]]:
    """(a picture of paths and losses, the rate of each rule)."""
    found = {name: best(make, function) for name, make in RULES.items()}
    figure = Figure(figsize=(8.6, 3.6), dpi=100, layout="constrained")
    paths, losses = figure.subplots(1, 2, width_ratios=(1.15, 1))
    left, right, bottom, top = function.window
    x, y = np.meshgrid(np.linspace(left, right, 201), np.linspace(bottom, top, 201))
    z = function.value(x, y)
    z = z - z.min()
    paths.contour(x, y, z, np.geomspace(z.max() / 3e3, z.max(), 9), colors="#c3ccd5", linewidths=0.8)
    for n, (name, (rate, points)) in enumerate(found.items()):
        paths.plot(*points.T, "-", color=COLOURS[n], linewidth=1.4, label=f"{name} {rate:g}")
        value = function.value(*points.T) - min(0.0, float(function.value(*points.T).min()))
        losses.plot(np.maximum(value, 1e-9), color=COLOURS[n], linewidth=1.1)
    paths.plot(*function.start, "o", color="black", markersize=5)
    paths.set(xlim=(left, right), ylim=(bottom, top), xlabel="first parameter", ylabel="second parameter")
    losses.set(yscale="log", xlabel="step", ylabel="loss", ylim=(max(losses.get_ylim()[0], 1e-6), None))
    losses.grid(visible=True, color="#e4e4e4", linewidth=0.7)
    losses.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return png(figure, 64), {name: rate for name, (rate, _) in found.items()}
