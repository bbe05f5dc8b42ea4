"""The two lanes of the tests, and what must be said before anything is imported.

`pytest` runs every case. `pytest --quick` runs `FEW` of each test, from the middle of its parameters, and
none of what is marked slow: programs in processes of their own, compilers, whole trainings.

Kernels for CUDA run on the CPU here, by Triton's interpreter, unless somebody says otherwise; Triton asks
once, when it is imported. So Keras asks once for its backend.
"""

import gc
import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")

FEW = 1
"""Cases of one test in the quick lane."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of each test, and nothing slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out of the quick lane")


def spread(cases: list[pytest.Item], most: int) -> list[pytest.Item]:
    """So many cases of one test, evenly spaced, so that they differ in every parameter that they can."""
    if len(cases) <= most:
        return cases
    return [cases[(2 * i + 1) * len(cases) // (2 * most)] for i in range(most)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = (item for cases in tests.values() for item in spread(cases, FEW))
    chosen = set(map(id, kept))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: it is looked through once, when all is there."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Nobody need look again through what stays for what is gone."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What ends with the process is told of leaks otherwise."""
    gc.unfreeze()


@pytest.fixture
def double() -> Iterator[None]:
    """The default type of torch is float64: some of its optimisers keep their numbers in it."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def wide_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon in the type of its gradients, where it takes bfloat16: by singular values."""
    import importlib

    import torch

    def polynomials(dx: Any, coefficients: Any, steps: int, epsilon: float) -> Any:
        a, b, c = coefficients
        u, s, v = torch.linalg.svd(dx, full_matrices=False)
        s = s / s.norm().clamp(min=epsilon)
        for _ in range(steps):
            s = a * s + b * s**3 + c * s**5
        return u * s @ v

    muon = importlib.import_module("torch.optim._muon")
    monkeypatch.setattr(muon, "_zeropower_via_newtonschulz", polynomials)
