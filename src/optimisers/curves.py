"""Curves of losses, as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

Floats = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#E69F00", "#332288", "#882255")
"""Told apart by people with any kind of colour vision: most are Okabe and Ito's."""

DASHES = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    """The losses of some trainings that differ by their seed."""

    label: str
    losses: Floats
    """(trainings, steps); NaN where there is none."""


def smooth(losses: Floats, steps: float = 12.0) -> Floats:
    """The geometric mean over about so many steps to either side; it follows a curve drawn on a log scale."""
    reach = np.arange(-3 * steps, 3 * steps + 1)
    window = np.exp(-0.5 * (reach / steps) ** 2)
    total, weight = (_blurred(v, window) for v in (np.log(np.maximum(losses, 1e-12)), np.ones(len(losses))))
    return np.exp(total / weight)


def _blurred(values: Floats, window: Floats) -> Floats:
    """The sum over a window around each value, as far as there are values."""
    half = len(window) // 2
    return np.convolve(values, window)[half : half + len(values)]


def spread(heights: Floats, gap: float) -> Floats:
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


def draw(curves: Sequence[Curve], file: Path, *, title: str, measure: str, step: str = "step") -> Path:
    """Save curves: the median of the trainings, in a band from the least to the largest, a label where each
    ends. Those that diverged everywhere are left out. Needs Matplotlib.
    """
    shown = [c for c in curves if np.isfinite(c.losses).all()]
    count = max((c.losses.shape[1] for c in curves), default=1)
    width = max(1.0, min(12.0, count / 60))
    smoothed = [np.stack([smooth(each, width) for each in c.losses]) for c in shown]
    middles = [np.median(each, axis=0) for each in smoothed]
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    for n, (each, middle) in enumerate(zip(smoothed, middles, strict=True)):
        colour, dash = COLOURS[n % len(COLOURS)], DASHES[n // len(COLOURS) % len(DASHES)]
        axes.fill_between(range(len(middle)), each.min(0), each.max(0), color=colour, alpha=0.18, linewidth=0)
        axes.plot(middle, dash, color=colour, linewidth=2.0, solid_capstyle="round")
    if shown:
        low, high = min(e.min() for e in smoothed), max(m[0] for m in middles)
        low, high = low / 1.3, max(high * 1.3, low * 2)
        axes.set_ylim(low, high)
        gap = 0.075 * np.log10(high / low)
        ends = spread(np.array([np.log10(m[-1]) for m in middles]), gap)
        for n, (curve, end) in enumerate(zip(shown, ends, strict=True)):
            axes.annotate(
                curve.label,
                (count - 1, 10**end),
                xytext=(8, 0),
                textcoords="offset points",
                color=COLOURS[n % len(COLOURS)],
                fontsize=9,
                linespacing=1.2,
                verticalalignment="center",
                annotation_clip=False,
            )
    axes.set_xlim(0, max(count - 1, 1))
    axes.set_xlabel(step)
    axes.set_ylabel(measure)
    axes.set_title(title, loc="left", fontsize=12, pad=10)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.grid(visible=True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
    return file
