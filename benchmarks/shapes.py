"""The models that are stepped: many small arrays, a network for images, a network for text."""

import math
from collections.abc import Iterator

import numpy as np

Shape = tuple[int, ...]


def small() -> Iterator[Shape]:
    """A thousand arrays of 32 x 32, where everything but the arithmetic counts."""
    yield from [(32, 32)] * 1000


def resnet18() -> Iterator[Shape]:
    """The 62 parameters of ResNet-18 for ImageNet: 11.7 million numbers."""
    yield from [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            yield from [(width, before if block == 0 else width, 3, 3), (width,), (width,)]
            yield from [(width, width, 3, 3), (width,), (width,)]
            if block == 0 and stage > 0:
                yield from [(width, before, 1, 1), (width,), (width,)]
        before = width
    yield from [(1000, 512), (1000,)]


def gpt2() -> Iterator[Shape]:
    """The 148 parameters of GPT-2 small: 124.4 million numbers."""
    yield from transformer(layers=12, width=768, positions=1024)


def xl() -> Iterator[Shape]:
    """The 292 parameters of a transformer of the size of GPT-3 XL: 1.3 billion numbers."""
    yield from transformer(layers=24, width=2048, positions=2048)


def transformer(layers: int, width: int, positions: int) -> Iterator[Shape]:
    """A network for text as GPT-2 is built, its output tied to its input."""
    yield from [(50257, width), (positions, width)]
    for _ in range(layers):
        yield from [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        yield from [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    yield from [(width,), (width,)]


def tiny() -> Iterator[Shape]:
    """Six arrays, to try a benchmark on."""
    yield from [(32, 32), (64,), (3, 4, 5), (1,), (1030,), (8, 130)]


MODELS = {"small": small, "resnet18": resnet18, "gpt2": gpt2}
"""What fits any machine."""

ALL = MODELS | {"xl": xl, "tiny": tiny}

TITLES = {
    "small": "1000 arrays of 32 x 32",
    "resnet18": "ResNet-18, 62 arrays",
    "gpt2": "GPT-2 small, 148 arrays",
    "xl": "a transformer of 1.3 B, 292 arrays",
    "tiny": "6 arrays",
}


def arrays(name: str, seed: int) -> dict[str, np.ndarray]:
    """A dict model of float32 arrays in [0, 0.01).

    Positive, so that any sum of gradients has a square root.
    """
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    for i, shape in enumerate(ALL[name]()):
        out[f"p{i}"] = rng.random(shape, np.float32)
        out[f"p{i}"] *= np.float32(0.01)
    return out


def count(name: str) -> int:
    """How many numbers a model has."""
    return sum(math.prod(s) for s in ALL[name]())
