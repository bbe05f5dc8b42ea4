"""The page of the gallery."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

import optimisers as opt
from docs.make_gallery.functions import FUNCTIONS, RATES, RULES, STEPS
from docs.make_rules.pictures import png
from docs.make_rules.texts import FAMILIES, families
from optimisers.curves import COLOURS

SCHEDULES = {
    "Cosine": opt.Cosine(1.0, 1000, warmup=100),
    "WarmupStableDecay": opt.WarmupStableDecay(1.0, 1000, 100, 250),
    "OneCycle": opt.OneCycle(1.0, 1000),
    "InverseSqrt": opt.InverseSqrt(1.0, 100),
    "Linear": opt.Linear(1.0, 0.0, 1000),
    "Polynomial": opt.Polynomial(1.0, 0.0, 1000, power=2.0),
    "Exponential": opt.Exponential(1.0, 0.5, steps=200),
    "Step": opt.Step(1.0, (400, 800), (0.3, 0.3)),
    "Cosine with cycles": opt.Cosine(1.0, 250, cycles=4, eta_factor=0.7),
}


def schedules() -> bytes:
    """The curve of each schedule."""
    clock = np.arange(1000)
    figure = Figure(figsize=(8.6, 4.6), dpi=100, layout="constrained")
    for axes, (name, schedule) in zip(
        figure.subplots(3, 3, sharex=True, sharey=True).flat, SCHEDULES.items(), strict=True
    ):
        axes.fill_between(clock, schedule(clock), color=COLOURS[0], alpha=0.15, linewidth=0)
        axes.plot(clock, schedule(clock), color=COLOURS[0], linewidth=1.6)
        axes.set_title(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def every_rule() -> str:
    """The picture of each rule, by family, each a link to its section."""
    lines: list[str] = []
    for family, rules in families().items():
        title = FAMILIES.get(family, (family.capitalize(), ""))[0]
        shown = "\n".join(
            f"[![{c.__name__}](rules/img/{c.__name__}.png){{ loading=lazy }} {c.__name__}]"
            f"(rules/{family}.md#{c.__name__.lower()})"
            for c in rules
        )
        lines.append(f'### {title}\n\n<div class="gallery" markdown>\n\n{shown}\n\n</div>')
    return "\n\n".join(lines)


def on_functions(rates: dict[str, dict[str, float]]) -> str:
    """A section for each function."""
    return "\n\n".join(
        f"### {function.name}\n\n{function.says}\n\n"
        f"![Paths of {len(RULES)} rules on {function.name.lower()}, and their losses](gallery/{key}.png)\n\n"
        f"Rates: {', '.join(f'{name} {rate:g}' for name, rate in rates[key].items())}."
        for key, function in FUNCTIONS.items()
    )


def page(rates: dict[str, dict[str, float]], kept: dict[str, dict[str, Any]]) -> str:
    ranked = sorted(kept.items(), key=lambda pair: pair[1]["score"])
    rows = "\n".join(
        f"| {name} | {one['score']:.3f} | {one['factor']:g}"
        f"{', the ' + one['edge'] + ' tried' if one['edge'] else ''} |"
        for name, one in ranked
    )
    return f"""# Gallery

Pictures of what rules do. They are drawn by `python -m docs.make_gallery`.

## On test functions

Six rules start at one point of a function of two numbers, and take {STEPS} steps. Each is shown at the best
of {len(RATES)} rates from {RATES[0]:g} to {RATES[-1]:g}, by the mean loss of the last quarter. Two numbers
are no network: read these pictures for how a rule moves, not for which is best.

{on_functions(rates)}

## On a small transformer

Two layers, characters of Python's own help, 300 steps, three rates for each rule, one seed: the model of
`examples/06_transformer.py`. Rules of matrices step the hidden matrices there, AdamW all else. The number
behind each name is the loss on held-out text, in nats.

![Training losses of {len(kept)} rules, each at the best of three rates](gallery/transformer.png)

| rule | score | times the rate that was given |
|---|---|---|
{rows}

One seed and three rates say little about rules that are near each other, and where the best rate is at the
edge, a better one may lie outside. [Which rule should I use?](choosing.md) says how to let rules race on
your own model.

## Schedules

![Curves of {len(SCHEDULES)} schedules over a thousand updates](gallery/schedules.png)

[Schedules](schedules.md) has the formulas.

## Every rule

The path of each rule on the curved valley, at a rate that shows its character. Each picture leads to the
formula, the cost and the paper.

{every_rule()}
"""
