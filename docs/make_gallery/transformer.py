"""How does a small transformer train under each rule? The losses are kept, and drawn from what was kept."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import optimisers as opt
from docs.make_rules.pictures import png
from optimisers.curves import COLOURS, DASHES, smooth, spread

DOCS = Path(__file__).resolve().parents[1]
LOSSES = DOCS / "gallery" / "transformer.json"


def example() -> ModuleType:
    """examples/06_transformer.py."""
    spec = importlib.util.spec_from_file_location(
        "transformer", DOCS.parent / "examples" / "06_transformer.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(steps: int = 300) -> None:
    """Train the transformer of the example by each rule, at three rates, and keep the losses of the best."""
    module = example()
    import torch

    whole, characters = module.text()
    held = module.batches(whole[-len(whole) // 10 :], 8, 0)

    def start(seed: int) -> Any:
        torch.manual_seed(seed)
        return module.Transformer(characters)

    def validate(model: Any) -> float:
        with torch.no_grad():
            return sum(module.loss(model, batch).item() for batch in held) / len(held)

    rules = {
        **module.RULES,
        "SGD": opt.SGD(0.1, 0.9),
        "Lion": opt.Lion(3e-4),
        "Prodigy": opt.Prodigy(),
        "AdEMAMix": opt.AdEMAMix(1e-3),
        "MARS": opt.MARS(3e-3),
        "Adan": opt.Adan(3e-3),
        "NorMuon": module.with_adamw(opt.NorMuon(0.02)),
    }
    found = opt.race(
        rules,
        module.loss,
        start,
        lambda seed: module.batches(whole[: -len(whole) // 10], steps, 1000 + seed),
        factors=(0.3, 1.0, 3.0),
        seeds=(0,),
        steps=steps,
        validate=validate,
    )
    kept = {
        e.name: {
            "factor": e.factor,
            "edge": e.at_edge,
            "score": round(e.score, 3),
            "losses": [round(float(x), 3) for x in e.trials[0].losses],
        }
        for e in found.entries
    }
    LOSSES.write_text(
        "{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(k)}" for n, k in kept.items()) + "\n}\n"
    )


def curves(kept: dict[str, dict[str, Any]]) -> bytes:
    """The losses of the transformer under each rule, smoothed; a label where each curve ends."""
    figure = Figure(figsize=(8.6, 5.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    lines = [smooth(np.array(one["losses"]), 8.0) for one in kept.values()]
    low, high = min(line.min() for line in lines) / 1.02, 3.6
    ends = spread(np.log10([line[-1] for line in lines]), 0.042 * np.log10(high / low))
    for n, (name, line, end) in enumerate(zip(kept, lines, ends, strict=True)):
        colour, dash = COLOURS[n % len(COLOURS)], DASHES[n // len(COLOURS)]
        axes.plot(line, dash, color=colour, linewidth=1.6)
        axes.annotate(
            f"{name}  {kept[name]['score']:.2f}",
            (len(line) - 1, 10**end),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            verticalalignment="center",
            annotation_clip=False,
        )
    axes.set(xlim=(0, len(lines[0]) - 1), ylim=(low, high), xlabel="step", ylabel="training loss, nats")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
    axes.grid(visible=True, which="both", color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure, 64)
