"""How much does one read at a time? Functions that branch little, files of a few pages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimisers

SOURCE = Path(optimisers.__file__).parent

FILES = sorted(SOURCE.rglob("*.py"))

BRANCHES = 15
"""The most ways through one function: its cyclomatic complexity (McCabe 1976)."""

LINES = 500
"""The most lines of one file."""

ONE = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.Assert, ast.ExceptHandler, ast.match_case)
"""What adds one way through."""

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
"""What is counted for itself, also inside a function."""


def ways(function: ast.AST) -> int:
    """The cyclomatic complexity of a function: one, and one more for every branch, loop, condition of a
    comprehension, and further part of a condition.
    """
    return 1 + sum(map(_more, ast.iter_child_nodes(function)))


def _more(node: ast.AST) -> int:
    """The ways that a part of a function adds."""
    if isinstance(node, FUNCTION):
        return 0
    found = sum(map(_more, ast.iter_child_nodes(node))) + isinstance(node, ONE)
    if isinstance(node, ast.BoolOp):
        found += len(node.values) - 1
    if isinstance(node, ast.comprehension):
        found += 1 + len(node.ifs)
    if isinstance(node, ast.For | ast.AsyncFor | ast.While | ast.Try):
        found += bool(node.orelse)
    return found


def functions(text: str) -> Iterator[tuple[str, int]]:
    """(name, ways through it) of all functions in a text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, ways(node)


def test_no_function_branches_more_than_a_reader_can_hold() -> None:
    found = [(str(file.relative_to(SOURCE)), *each) for file in FILES for each in functions(file.read_text())]

    assert [each for each in found if each[-1] > BRANCHES] == []


def test_no_file_is_longer_than_a_few_pages() -> None:
    lengths = {str(file.relative_to(SOURCE)): len(file.read_text().splitlines()) for file in FILES}

    assert {name: n for name, n in lengths.items() if n > LINES} == {}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return a", 1),
        ("if a: return b", 2),
        ("return b if a and b or c else d", 4),
        ("for x in a: b\n    else: c", 3),
        ("while a: b", 2),
        ("return [x for row in a if row for x in row if x if b]", 6),
        ("try: a\n    except E: b\n    except F: c\n    else: d", 4),
        ("assert a", 2),
        ("match a:\n        case 1: b\n        case _: c", 3),
        ("return lambda: a and b", 2),
        ("def g():\n        if a: b", 1),
    ],
)
def test_the_ways_through_a_function_are_counted(body: str, expected: int) -> None:
    ((_, found), *_) = functions(f"def f():\n    {body}\n")

    assert found == expected
