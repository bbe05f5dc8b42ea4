"""Which libraries are installed here? What needs one that is not there is left out of a test."""

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import optimisers as opt
from optimisers.arrays import registry
from optimisers.arrays.registry import public_names


def needs(library: str) -> pytest.MarkDecorator:
    """Leaves a test out where the library isn't there."""
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


NEEDS_KERAS = needs("keras")


@contextlib.contextmanager
def from_outside() -> Iterator[None]:
    """A scope in which back ends of the examples can be imported, and are known; none is after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
        patch.setattr(registry, "BACKENDS", dict(registry.BACKENDS))
        yield
        sys.modules.pop("mlx_backend", None)
    registry.forget()


def loadable() -> list[str]:
    """The public names whose library is there."""
    package = {name: module.split(".")[1] for name, module in public_names().items()}
    return [name for name in dir(opt) if name not in package or find_spec(package[name]) is not None]
