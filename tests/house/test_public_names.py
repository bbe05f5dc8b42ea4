"""Which names may users rely on? Those in docs/public-names.txt, and a change there is one for them.

`__all__`, which a star import brings, leaves out those that need another library.
"""

from pathlib import Path

import optimisers
from tests.installed import loadable

LISTED = Path(__file__).parents[2] / "docs" / "public-names.txt"


def test_the_public_names_are_the_listed_ones() -> None:
    assert dir(optimisers) == LISTED.read_text().split()


def test_the_list_is_sorted_and_names_nothing_twice() -> None:
    assert optimisers.__all__ == sorted(set(optimisers.__all__))


def test_every_public_name_is_there() -> None:
    assert [n for n in loadable() if not hasattr(optimisers, n)] == []


def test_every_public_name_is_explained() -> None:
    assert [n for n in loadable() if not getattr(optimisers, n).__doc__] == []
