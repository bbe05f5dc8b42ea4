"""What MkDocs calls while it builds the site: pages from the root of the project, formulas."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.make_site.mathml import rendered
from docs.make_site.pages import generated


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what stands outside of this folder."""
    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Draw the formulas of a page."""
    return rendered(html)
