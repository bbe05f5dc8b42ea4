"""What does it cost to make a model of a vector, beside copying the vector?

    python -m benchmarks.flat [--seconds 3]

Prints a table: milliseconds (medians, in turn) for the copy, for `re(flat)` and for `re(flat, copy=False)`,
and their ratios to the copy. Below some 10 000 elements an array, making the array objects is what takes the
time.
"""

import argparse
from collections.abc import Callable

import numpy as np

import optimisers as opt
from benchmarks.timing import interleaved

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "1000 x (32, 32)": [(32, 32)] * 1000,
    "1000 x (100, 100)": [(100, 100)] * 1000,
    "500 x (64, 64), (64,)": [(64, 64), (64,)] * 500,
    "1000 different, about 300 elements": [(3, i % 97 + 1, 2 + i % 3) for i in range(1000)],
}


def candidates(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    flat, re = opt.destructure({f"p{i}": np.ones(s, np.float32) for i, s in enumerate(shapes)})
    return {"copy": flat.copy, "re(flat)": lambda: re(flat), "views": lambda: re(flat, copy=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row")
    seconds = parser.parse_args().seconds
    print(f"{'model':36}{'copy ms':>9}{'re(flat)':>10}{'ratio':>7}{'views':>8}{'ratio':>7}")
    for name, shapes in SHAPES.items():
        found = interleaved(candidates(shapes), seconds=seconds)
        copy, full, views = (found.median(k) * 1e3 for k in ("copy", "re(flat)", "views"))
        print(f"{name:36}{copy:9.3f}{full:10.3f}{full / copy:7.2f}{views:8.3f}{views / copy:7.2f}")


if __name__ == "__main__":
    main()
