"""What does the site make of files at the root, of fragments, and of formulas?"""

from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.make_site.pages import changelog, generated, moved

NEEDS_CONVERTER = pytest.mark.skipif(
    find_spec("latex2mathml") is None, reason="latex2mathml is not installed"
)


def test_links_of_a_file_at_the_root_go_from_the_site() -> None:
    text = "[a](docs/jax.md#optax) ![b](docs/demo.png) [c](ARCHITECTURE.md) [d](https://example.org/docs/x)"
    assert moved(text) == (
        "[a](jax.md#optax) ![b](demo.png) [c](architecture.md) [d](https://example.org/docs/x)"
    )


def test_every_page_from_elsewhere_begins_with_a_title() -> None:
    for name, text in generated().items():
        body = text.partition("---\n\n")[2] if text.startswith("---\n") else text
        assert body.startswith("# "), name
        assert "](docs/" not in text


def test_the_changelog_has_fragments_by_kind_and_then_what_was_released(tmp_path: Path) -> None:
    folder = tmp_path / "changelog.d"
    folder.mkdir()
    (folder / "README.md").write_text("How to write one.\n")
    (folder / "b.fixed.md").write_text("One sentence,\nover two lines.\n")
    (folder / "a.added.md").write_text("Added `x`.\nIt is new.\n")
    released = tmp_path / "CHANGELOG.md"
    released.write_text("# Changelog\n\n## 0.1.0\n\n- The first.\n")
    assert changelog(folder, released) == (
        "# Changelog\n\n## Not yet released\n\n### Added\n\n- Added `x`. It is new.\n\n### Fixed\n\n"
        "- One sentence, over two lines.\n\n## 0.1.0\n\n- The first.\n"
    )


@NEEDS_CONVERTER
def test_formulas_become_mathml_of_two_columns_and_words_stay_words() -> None:
    from docs.make_site.mathml import rendered

    page = (
        '<p>Of <span class="arithmatex">\\(\\beta_1\\)</span>:</p><div class="arithmatex">\\[\n'
        "\\begin{aligned}\nm_t &amp;= \\mathit{gram}_t \\\\\nx_t &amp;= "
        "\\begin{cases} a &amp; \\text{if } b \\\\ "
        "c &amp; \\text{else} \\end{cases}\n\\end{aligned}\n\\]</div>"
    )
    drawn = rendered(page)
    assert drawn.count("<math") == 2
    assert '<mi class="word">gram</mi>' in drawn
    assert drawn.count('<mtd class="left">') == drawn.count('<mtd class="right">') == 2
    assert "\\" not in drawn
    assert "&amp;" not in drawn
    assert rendered("<p>no formula \\(x\\)</p>") == "<p>no formula \\(x\\)</p>"
