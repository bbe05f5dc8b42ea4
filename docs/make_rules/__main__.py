"""Write docs/rules: a page per family of rules, with formulas printed from what each rule does when traced.

Run as `python -m docs.make_rules`. Two runs give the same bytes.
"""

from pathlib import Path

from docs.make_rules.pages import pages
from docs.make_rules.pictures import picture
from docs.make_rules.texts import families

PAGES = Path(__file__).resolve().parents[1] / "rules"
PICTURES = PAGES / "img"


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (PAGES / name).write_text(text, encoding="utf-8")
    for rules in families().values():
        for cls in rules:
            (PICTURES / f"{cls.__name__}.png").write_bytes(picture(cls))


if __name__ == "__main__":
    main()
