"""Which room may import which? The table of ARCHITECTURE.md, held against the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimisers

SOURCE = Path(optimisers.__file__).parent

FLOORS = (
    ("errors",),
    ("typed",),
    ("spellings",),
    ("settings",),
    ("arrays",),
    ("nest",),
    ("ops",),
    ("tree",),
    ("rule",),
    ("rules", "compose", "schedules"),
    ("graph",),
    ("state",),
    ("engines",),
    ("step",),
    ("flat", "averaged", "checkpoint", "explain", "estimate", "grads", "names", "torch", "jax"),
    ("keras", "trainers", "training", "curves"),
    ("race",),
    ("__init__",),
    ("demo",),
    ("__main__",),
)
"""Lowest first. A room imports from lower floors only; rooms on one floor do not know each other."""

BY_NAME = {"arrays.registry"}
"""Modules that name others in strings, to be imported when an array of their library comes."""

LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}

FILES = sorted(SOURCE.rglob("*.py"))


def module_of(file: Path) -> str:
    """`graph.expr` for src/optimisers/graph/expr.py; a package's own `__init__` keeps its name."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imported(module: str, text: str) -> Iterator[str]:
    """The modules of this package that a file imports, wherever in it, or names in a string."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"{'.' * node.level}{node.module or ''}"
                continue
            whole = node.module == "optimisers"
            names = [f"optimisers.{a.name}" for a in node.names] if whole else [str(node.module)]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"optimisers(\.\w+)+(:\w+)?", str(node.value)):
            names = [] if module in BY_NAME else [str(node.value).partition(":")[0]]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "optimisers":
                yield rest if room_of(rest) in LEVEL else "__init__"


def faults(module: str, text: str) -> list[str]:
    """What this file imports and may not."""
    room = room_of(module)
    found: list[str] = []
    for name in imported(module, text):
        if name.startswith("."):
            found.append(f"{module} imports {name}; write the absolute name")
        elif room_of(name) != room and LEVEL[room_of(name)] >= LEVEL[room]:
            found.append(f"{module} imports {name}, which is not on a lower floor")
    return found


def more_than_names(text: str) -> list[str]:
    """What an `__init__` has beside docstring, imports, `__version__`, `__all__`, and the way to names that
    need another library.
    """
    extra: list[str] = []
    for i, node in enumerate(ast.parse(text).body):
        docstring = i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        passed = {"__all__", "__version__"}
        listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in passed
        typed = isinstance(node, ast.If) and all(
            isinstance(n, ast.ImportFrom) or (isinstance(n, ast.FunctionDef) and n.name == "__getattr__")
            for n in node.body
        )
        later = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        if not (docstring or listed or typed or later or isinstance(node, ast.ImportFrom)):
            extra.append(ast.unparse(node))
    return extra


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_room_imports_from_lower_floors_only(file: Path) -> None:
    assert faults(module_of(file), file.read_text()) == []


def test_every_file_is_in_a_room_of_the_table() -> None:
    assert {room_of(module_of(f)) for f in FILES} <= set(LEVEL)


def test_every_room_of_the_table_is_there() -> None:
    assert set(LEVEL) <= {room_of(module_of(f)) for f in FILES}


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=module_of)
def test_an_init_only_passes_names_on(file: Path) -> None:
    assert more_than_names(file.read_text()) == []


def test_the_page_on_architecture_names_every_room() -> None:
    page = (SOURCE.parents[1] / "ARCHITECTURE.md").read_text()
    assert [r for r in LEVEL if r != "__init__" and f"`{r}`" not in page] == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("ops", "from optimisers.graph import expr"),
        ("ops", "from optimisers import graph"),
        ("ops", "import optimisers.engines.cpu.task"),
        ("ops", "import optimisers"),
        ("ops", "def late():\n    from optimisers.rule import Rule"),
        ("ops", "importlib.import_module('optimisers.graph.expr')"),
        ("rules.adam", "from optimisers.compose.chain import Chain"),
        ("rules.adam", "from .descent import Descent"),
        ("state.leaf", "from optimisers import setup"),
        ("flat", "from optimisers.explain import explain"),
        ("flat", "ENGINE = 'optimisers.explain:explain'"),
        ("arrays.registry", "from optimisers.torch import compiler"),
    ],
)
def test_the_check_finds_a_forbidden_import(module: str, text: str) -> None:
    assert faults(module, text) != []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("rules.adam", "from optimisers.rules.descent import Descent"),
        ("rules.adam", "from optimisers import ops"),
        ("demo", "import optimisers as opt"),
        ("ops", "import numpy, optimisers_of_others"),
        ("arrays.registry", "HOOKS = 'optimisers.torch.compiler:HOOKS'"),
    ],
)
def test_the_check_lets_an_allowed_import_pass(module: str, text: str) -> None:
    assert faults(module, text) == []


def test_the_check_finds_code_in_an_init() -> None:
    assert more_than_names('"""Words."""\nfrom a import b\n__all__ = ["b"]\nb()') == ["b()"]
