"""Do older releases of PyTorch get along with what newer ones know? Told by what they lack."""

from collections.abc import Callable
from typing import Any

import torch

from optimisers.torch.compiler import SCHEMA, disabling, step


def old_disable(fn: Callable[..., Any] | None = None, recursive: bool = True) -> Any:
    """`torch.compiler.disable` as PyTorch 2.6 has it: without a reason."""
    return fn if recursive else None


def test_a_disable_without_reasons_is_used_as_it_is() -> None:
    def function() -> int:
        return 1

    assert disabling(old_disable)(function) is function


def test_a_disable_with_reasons_is_given_one() -> None:
    given: dict[str, Any] = {}

    def disable(*, reason: str | None = None) -> Any:
        given.update(reason=reason)
        return lambda f: f

    assert disabling(disable)(max) is max
    assert "write update for a step inside it" in given["reason"]


def test_the_schema_of_the_operator_is_that_of_its_annotations() -> None:
    inferred = torch.library.infer_schema(step._init_fn, mutates_args=())

    assert inferred == SCHEMA
