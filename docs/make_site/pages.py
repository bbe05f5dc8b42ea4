"""Pages of the site that stand elsewhere: the files at the root, and the changelog from its fragments."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

AT_ROOT = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Files at the root, and what they are called on the site."""

KINDS = {"added": "Added", "changed": "Changed", "fixed": "Fixed", "removed": "Removed"}
"""The kinds of fragments, and the headings over them."""


def generated() -> dict[str, str]:
    """Pages by the name that they have on the site, as Markdown."""
    pages = {page: moved((ROOT / file).read_text(encoding="utf-8")) for file, page in AT_ROOT.items()}
    pages["index.md"] = "---\nhide:\n  - navigation\n---\n\n" + pages["index.md"]
    return pages | {"changelog.md": changelog(ROOT / "changelog.d", ROOT / "CHANGELOG.md")}


def moved(text: str) -> str:
    """The text of a file at the root, with links as they go from the site."""
    text = re.sub(r"\]\(docs/", "](", text).replace("<!-- fmt: off -->\n\n", "")
    for file, page in AT_ROOT.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text


def changelog(fragments: Path, released: Path) -> str:
    """What changed since the last release, by kind, and what was written of the releases."""
    lines = ["# Changelog"]
    files = {file: file.name.split(".")[-2] for file in sorted(fragments.glob("*.*.md"))}
    if files:
        lines.append("## Not yet released")
    for kind, heading in KINDS.items():
        said = [
            "- " + " ".join(file.read_text(encoding="utf-8").split())
            for file, its in files.items()
            if its == kind
        ]
        if said:
            lines += [f"### {heading}", "\n".join(said)]
    if released.exists():
        lines.append(released.read_text(encoding="utf-8").partition("\n")[2].strip())
    return "\n\n".join(lines) + "\n"
