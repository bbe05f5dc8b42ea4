"""Is every example of the README true? They are run in order, in one namespace."""

from pathlib import Path

import pytest

from tests.prose import blocks

README = Path(__file__).parents[2] / "README.md"


def test_every_example_of_the_readme_runs_and_prints_what_stands_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    seen = set[str]()
    said = ""
    for language, line, content in blocks(README.read_text()):
        seen.add(language)
        if language == "python":
            exec(compile("\n" * line + content, str(README), "exec"), namespace)
            said = capsys.readouterr().out
        else:
            assert content in said

    assert seen == {"python", "text"}


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n```python\nx = 1\n```\n```\nno\n```\n```text\ny\n```\n"
    assert blocks(text) == [("python", 2, "x = 1\n"), ("text", 8, "y\n")]
