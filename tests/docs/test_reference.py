"""Does the site say of every public name what it is?"""

import re
from pathlib import Path

import pytest

import optimisers as opt

DOCS = Path(__file__).parents[2] / "docs"

TEXT = "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md")))

PRINTED = set(re.findall(r"^::: optimisers\.(\S+)", TEXT, re.MULTILINE))
"""What the site prints the docstrings of: names of the root, and whole modules."""


@pytest.mark.parametrize("name", dir(opt))
def test_every_public_name_has_an_entry(name: str) -> None:
    rule = re.search(rf"^## {name}$", TEXT, re.MULTILINE) is not None
    module = name == "ops" or name in opt.ops.__all__ or name in vars(opt.schedules)

    assert name in PRINTED or rule or module


def test_the_reference_prints_nothing_that_is_not_there() -> None:
    assert PRINTED - {"ops", "schedules"} - set(dir(opt)) == set()
    assert {"ops", "schedules"} <= PRINTED
