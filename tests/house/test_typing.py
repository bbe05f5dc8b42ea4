"""What does a type checker know of the public functions? Asked of pyright and mypy, in files of a user.

`tests/typing` has what is right to both, strict, and what is wrong to both. The README has functions without
annotations, as users write them: it is right to both as they are by default.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[1] / "typing"
README = Path(__file__).parents[2] / "README.md"

UNTYPED = ("optax", "scipy")
"""Libraries that have no types."""


def pyright(folder: Path, mode: str) -> list[tuple[str, int, str]]:
    """(file, line, message) of what pyright finds in a folder."""
    settings = {"typeCheckingMode": mode, "reportMissingTypeStubs": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "."]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    found: list[dict[str, Any]] = json.loads(done.stdout)["generalDiagnostics"]
    return [(Path(e["file"]).name, e["range"]["start"]["line"] + 1, e["message"]) for e in found]


def mypy(folder: Path, *flags: str) -> list[tuple[str, int, str]]:
    """The same of mypy."""
    unknown = "".join(f"[mypy-{name}.*]\nignore_missing_imports = true\n" for name in UNTYPED)
    (folder / "mypy.ini").write_text(f"[mypy]\n{unknown}")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file", "mypy.ini", *flags]
    done = subprocess.run(
        [*command, *sorted(p.name for p in folder.glob("*.py"))],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert not done.stderr
    found = re.findall(r"^(\S+?):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    return [(file, int(line), message) for file, line, message in found]


def copied(folder: Path) -> Path:
    for file in HERE.glob("*.py"):
        (folder / file.name).write_text(file.read_text())
    return folder


WRONG = [
    ("wrong.py", n)
    for n, line in enumerate((HERE / "wrong.py").read_text().splitlines(), 1)
    if line.startswith("opt.")
]


@pytest.mark.slow
def test_pyright_finds_all_right_that_is_right_and_every_line_wrong_that_is_wrong(tmp_path: Path) -> None:
    found = pyright(copied(tmp_path), "strict")

    assert sorted({(file, line) for file, line, _ in found}) == WRONG, found


@pytest.mark.slow
def test_mypy_finds_the_same(tmp_path: Path) -> None:
    found = mypy(copied(tmp_path), "--strict")

    assert sorted({(file, line) for file, line, _ in found}) == WRONG, found


@pytest.mark.slow
def test_the_readme_is_right_to_both(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) > 5
    (tmp_path / "readme.py").write_text("\n".join(blocks))

    assert pyright(tmp_path, "basic") == []
    assert mypy(tmp_path) == []
