"""Write docs/gallery.md and its pictures.

Run as `python -m docs.make_gallery`; two runs give the same bytes. With `--train` the transformer is
trained anew first, for half an hour on two cores, and its losses are kept in docs/gallery/transformer.json.
"""

import json
import sys

from docs.make_gallery.functions import FUNCTIONS, landscape
from docs.make_gallery.page import page, schedules
from docs.make_gallery.transformer import DOCS, LOSSES, curves, train

PAGE, PICTURES = DOCS / "gallery.md", DOCS / "gallery"


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    if "--train" in sys.argv[1:]:
        train()
    rates: dict[str, dict[str, float]] = {}
    for key, function in FUNCTIONS.items():
        drawn, rates[key] = landscape(function)
        (PICTURES / f"{key}.png").write_bytes(drawn)
    (PICTURES / "schedules.png").write_bytes(schedules())
    kept = json.loads(LOSSES.read_text(encoding="utf-8"))
    (PICTURES / "transformer.png").write_bytes(curves(kept))
    PAGE.write_text(page(rates, kept), encoding="utf-8")


if __name__ == "__main__":
    main()
