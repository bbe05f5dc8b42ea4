"""Does the gallery show every rule, and do its pictures stay small?"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import optimisers as opt
from docs.make_gallery.functions import FUNCTIONS, RATES, STEPS, walk
from docs.make_gallery.page import SCHEDULES, every_rule, page
from docs.make_gallery.transformer import LOSSES

DOCS = Path(__file__).parents[2] / "docs"

PAGE = (DOCS / "gallery.md").read_text(encoding="utf-8")

MOST = 1_500_000
"""Bytes of all pictures together."""


def test_every_rule_is_there_with_its_picture_and_a_link_to_its_section() -> None:
    names = {n for n in opt.__all__ if isinstance(c := getattr(opt, n), type) and issubclass(c, opt.Rule)}
    shown = re.findall(r"\[!\[(\w+)\]\((rules/img/\w+\.png)\)\{[^}]*\} \w+\]\((rules/\w+\.md)#(\w+)\)", PAGE)

    assert {name for name, *_ in shown} == names - {"Rule"}
    for name, picture, to, anchor in shown:
        assert (DOCS / picture).exists()
        assert anchor == name.lower()
        assert f"\n## {name}\n" in (DOCS / to).read_text(encoding="utf-8")


def test_the_page_is_what_its_generator_writes() -> None:
    rates = {
        key: {n: float(r) for n, r in re.findall(r"(\w+) ([\d.e-]+)", said)}
        for key, said in zip(FUNCTIONS, re.findall(r"^Rates: (.*)\.$", PAGE, re.MULTILINE), strict=True)
    }
    assert page(rates, json.loads(LOSSES.read_text(encoding="utf-8"))) == PAGE, "write it anew: make docs"


@pytest.mark.parametrize("key", FUNCTIONS)
def test_the_slope_of_a_function_is_that_of_finite_differences(key: str) -> None:
    function, (x, y), h = FUNCTIONS[key], (0.3, -0.7), 1e-6
    numeric = (
        (function.value(x + h, y) - function.value(x - h, y)) / (2 * h),
        (function.value(x, y + h) - function.value(x, y - h)) / (2 * h),
    )
    np.testing.assert_allclose(function.slope(x, y), numeric, rtol=1e-6)


def test_a_path_of_descent_is_the_one_by_hand_and_ends_where_it_goes_far() -> None:
    bowl = FUNCTIONS["bowl"]
    points = walk(opt.Descent(0.01), bowl)
    t = np.arange(STEPS + 1)[:, None]
    np.testing.assert_allclose(points, np.array(bowl.start) * [0.99, 0.0] ** t, atol=1e-12)
    assert len(walk(opt.Descent(1.0), bowl)) < STEPS
    assert (RATES[0], RATES[-1]) == (1e-4, 5.0)


def test_losses_of_the_transformer_are_whole_and_begin_at_a_guess() -> None:
    kept = json.loads(LOSSES.read_text(encoding="utf-8"))
    assert {"AdamW", "Muon", "SOAP"} <= set(kept)
    assert {len(one["losses"]) for one in kept.values()} == {300}
    assert {one["losses"][0] for one in kept.values()} == {kept["AdamW"]["losses"][0]}


def test_every_schedule_is_drawn() -> None:
    made = (getattr(opt, name) for name in opt.__all__)
    named = {c.__name__ for c in made if isinstance(c, type) and issubclass(c, opt.Schedule)}
    of_others = {"Schedule", "Constant", "Join", "Scaled"}
    assert {name.split(" ")[0] for name in SCHEDULES} == named - of_others


def test_pictures_of_the_site_are_small_together() -> None:
    pictures = [f for kind in ("png", "svg") for f in DOCS.rglob(f"*.{kind}")]
    assert len(pictures) > 100
    assert sum(f.stat().st_size for f in pictures) < MOST


def test_links_to_sections_are_written_by_the_families() -> None:
    assert every_rule().count("### ") == len(
        re.findall(r"^### ", PAGE.split("## Every rule")[1], re.MULTILINE)
    )
