"""Formulas as MathML, which browsers draw by themselves: the site needs no script and no network for them."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[\[(]\n?(?P<tex>.*?)\n?\\[\])]</(?P=tag)>', re.DOTALL
)
"""What the extension arithmatex leaves of a formula: inline in a span, on lines of its own in a div."""

ALIGNED = re.compile(r"\\begin\{aligned\}\n(?P<lines>.*)\n\\end\{aligned\}", re.DOTALL)

WORD = re.compile(r'(?:<mi mathvariant="italic">[^<]*</mi>){2,}')
"""A name of several letters, of which the converter makes a product."""


def rendered(page: str) -> str:
    """A page of HTML with MathML in the place of its formulas."""
    return FORMULA.sub(lambda m: _drawn(html.unescape(m["tex"]), block=m["tag"] == "div"), page)


def _drawn(tex: str, *, block: bool) -> str:
    """A formula; what is aligned becomes a table of two columns, split in front of the relation."""
    aligned = ALIGNED.fullmatch(tex)
    if aligned is None:
        return f'<math display="{"block" if block else "inline"}">{_inner(tex)}</math>'
    rows = "".join(
        f'<mtr><mtd class="left">{_inner(left)}</mtd><mtd class="right">{_inner(right)}</mtd></mtr>'
        for left, _, right in (line.partition("&") for line in re.split(r" \\\\\n", aligned["lines"]))
    )
    return (
        f'<div class="formula"><math display="block"><mtable displaystyle="true">{rows}</mtable></math></div>'
    )


def _inner(tex: str) -> str:
    """What stands within the root of a formula; its letters of one name are one word."""
    if not tex.strip():
        return ""
    drawn = re.sub(r"^<math[^>]*>|</math>$", "", convert(tex))
    drawn = drawn.replace("<mover>", '<mover accent="true">')
    return WORD.sub(lambda m: f'<mi class="word">{re.sub("<[^>]*>", "", m[0])}</mi>', drawn)
