"""python -m benchmarks.pointers: what does a step cost without looking into other libraries' objects?

AdamW on a thousand arrays of 32 x 32, and on ten of a million elements: by raw reads, by the public road with
gradients that stay where they are, and with new ones at every step (as `zero_grad` leaves them).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import optimisers as opt
from benchmarks.timing import interleaved
from optimisers.engines.addressed import pointers

TARGET = 1.6
SHAPES = {"1,000 of 32 x 32": [(32, 32)] * 1000, "10 of 1,000 x 1,000": [(1000, 1000)] * 10}


def arrays(library: str, shapes: list[tuple[int, ...]], *, parameters: bool) -> dict[str, Any]:
    """Arrays of a library by name."""
    rng = np.random.default_rng(0)
    made = {f"p{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}
    if library == "numpy":
        return made
    import torch

    wrap = torch.nn.Parameter if parameters else torch.Tensor
    return {name: wrap(torch.from_numpy(x)) for name, x in made.items()}


def stepper(library: str, shapes: list[tuple[int, ...]], *, fresh: bool) -> Callable[[], object]:
    """Takes one step of a model of its own."""
    model, grads = (arrays(library, shapes, parameters=p) for p in (True, False))
    state = opt.setup(opt.AdamW(1e-3), model)
    copy = np.copy if library == "numpy" else lambda g: g.clone()
    several: Iterator[dict[str, Any]] = iter(
        [{k: copy(g) for k, g in grads.items()} for _ in range(200)] if fresh else []
    )
    return lambda: opt.update_(state, model, next(several, grads))


def main() -> None:
    """Print the median of each, and how many times that of raw reads it is."""
    for library in ("torch", "numpy"):
        raw = pointers.road(library, "cpu")
        assert raw is not None
        public = dataclasses.replace(raw, look=None, reason="asked for")
        roads = {
            "raw": raw,
            "public": public,
            "raw, new gradients": raw,
            "public, new gradients": public,
        }
        print(f"{library}: {raw}")
        for title, shapes in SHAPES.items():
            steps = {
                name: stepper(library, shapes, fresh=name.endswith("gradients") and len(shapes) > 10)
                for name in roads
            }

            def take(road: str) -> None:
                pointers.choose(library, "cpu", roads[road])  # noqa: B023 called at once

            timings = interleaved(steps, seconds=6, most=180, before=take)
            for name in roads:
                beside = name.replace("public", "raw")
                ratio = timings.ratio(name, beside)
                verdict = "" if name == beside else " (target met)" if ratio <= TARGET else " (MISSED)"
                ms = 1e3 * timings.median(name)
                print(f"  {title:22} {name:24} {ms:8.3f} ms {ratio:6.2f} x {beside}{verdict}")
        pointers.choose(library, "cpu", raw)


if __name__ == "__main__":
    main()
