"""Does what is packed have what its tests run, and say which versions work?"""

import re
import tomllib
from pathlib import Path
from typing import Any

import optimisers

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_source_distribution_has_every_folder_that_tests_and_makefile_run() -> None:
    packed = {Path(name).name for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    texts = [p.read_text(encoding="utf-8") for p in [*ROOT.glob("tests/**/test_*.py"), ROOT / "Makefile"]]
    folders = {
        p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".") and any(p.rglob("*.py"))
    }
    used = {name for name in folders if any(re.search(rf'"{name}"|\b{name}[./]', text) for text in texts)}

    assert {"examples", "benchmarks", "docs", "tests"} <= used
    assert used - packed == set()


def test_an_extra_for_each_framework_has_a_lower_bound_that_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, said in {"torch": "PyTorch", "jax": "JAX"}.items():
        (wanted,) = PROJECT["project"]["optional-dependencies"][name]
        assert wanted.startswith(f"{name}>=")
        assert f"{said} {wanted.removeprefix(f'{name}>=')} or later" in readme


def test_the_classifiers_name_every_python_that_the_readme_names() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in PROJECT["project"]["classifiers"]
        assert version in readme.partition("## Install")[2][:200]


def test_the_version_is_the_same_wherever_it_stands() -> None:
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert optimisers.__version__ == PROJECT["project"]["version"]
    assert f"\nversion: {optimisers.__version__}\n" in cited


def test_every_kind_of_fragment_has_a_heading_in_the_changelog() -> None:
    kinds = {kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"]}
    fragments = [p for p in (ROOT / "changelog.d").glob("*.md") if p.name != "README.md"]

    assert {p.name.split(".")[-2] for p in fragments} <= kinds
    assert all(p.read_text(encoding="utf-8").strip() for p in fragments)
