"""Write docs/benchmarks.md and its charts from the tables under benchmarks/results.

Run as `python -m docs.make_benchmarks`, or `make bench-page`, after a table was measured anew. It takes
seconds, and two runs give the same bytes.
"""

from docs.make_benchmarks.page import RESULTS, ROOT, made

PAGE, CHARTS = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "charts"


def main() -> None:
    page, charts = made(RESULTS)
    CHARTS.mkdir(exist_ok=True)
    for old in CHARTS.glob("*.svg"):
        old.unlink()
    for name, drawn in charts.items():
        (CHARTS / name).write_bytes(drawn)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
