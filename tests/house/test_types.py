"""How much do signatures say? The share of parameters that may be anything only falls."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimisers

SOURCE = Path(optimisers.__file__).parent

CEILING = 13.0
"""Of a hundred parameters, those annotated `Any`; to be lowered whenever the code allows it."""


def annotations(text: str) -> Iterator[str]:
    """What the parameters of all functions in a file are annotated with; self and cls are left out."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            rest = [a for a in (given.vararg, given.kwarg) if a is not None]
            for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, *rest):
                if a.arg not in ("self", "cls"):
                    yield "" if a.annotation is None else ast.unparse(a.annotation).strip("'\"")


def aliases(text: str) -> list[str]:
    """Names that a file gives to `Any`: they would hide it."""
    found: list[str] = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value) in ("Any", "typing.Any"):
            found += [ast.unparse(t) for t in node.targets]
        if isinstance(node, ast.ImportFrom):
            found += [a.asname for a in node.names if a.name == "Any" and a.asname]
    return found


def share(texts: list[str]) -> float:
    found = [a for text in texts for a in annotations(text)]
    return 100 * sum(a in ("Any", "typing.Any") for a in found) / len(found)


FILES = sorted(SOURCE.rglob("*.py"))
TEXTS = [file.read_text() for file in FILES]

OF_TRITON = {"device_functions.py"}
"""Functions that Triton compiles: their arguments have the types of a launch, and no others."""


def test_the_share_of_any_does_not_rise() -> None:
    assert share(TEXTS) <= CEILING


def test_every_parameter_has_a_type() -> None:
    found = {file.name for file, text in zip(FILES, TEXTS, strict=True) if "" in list(annotations(text))}

    assert found == OF_TRITON


def test_nothing_is_another_name_of_any() -> None:
    assert [name for text in TEXTS for name in aliases(text)] == []


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        ("def f(x: Any, *rest: int) -> None: ...", 50),
        ("class C:\n    def f(self, x: 'Any') -> Any: ...", 100),
        ("def f(x: list[Any], *, y: object, **z: typing.Any): ...", pytest.approx(100 / 3)),
    ],
)
def test_the_share_counts_parameters(text: str, percent: float) -> None:
    assert share([text]) == percent


def test_another_name_of_any_is_found() -> None:
    assert aliases("from typing import Any as Loose\nArray = Any") == ["Loose", "Array"]
