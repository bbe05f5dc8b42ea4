"""Which libraries are installed here? What needs one that is not there is left out of a test."""

from importlib.util import find_spec

import pytest

import optimisers as opt
from optimisers.arrays.registry import public_names


def needs(library: str) -> pytest.MarkDecorator:
    """Leaves a test out where the library isn't there."""
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


NEEDS_KERAS = needs("keras")


def loadable() -> list[str]:
    """The public names whose library is there."""
    package = {name: module.split(".")[1] for name, module in public_names().items()}
    return [name for name in dir(opt) if name not in package or find_spec(package[name]) is not None]
