"""Write docs/scale.md: what a step costs for 1 B, 70 B and 1 T parameters on 8 to 4,096 devices.

Run as `python -m docs.make_scale`. Two runs give the same bytes.
"""

from pathlib import Path

from docs.make_scale.page import page

PAGE = Path(__file__).resolve().parents[1] / "scale.md"

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
