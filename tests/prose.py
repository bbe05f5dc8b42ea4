"""Code in prose: the blocks of a page."""

import re


def blocks(text: str) -> list[tuple[str, int, str]]:
    """(language, line, content) of every block that names its language."""
    found = re.finditer(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(m[1], text.count("\n", 0, m.start(2)), m[2]) for m in found]
