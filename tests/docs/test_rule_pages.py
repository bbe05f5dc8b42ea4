"""Do the pages of the rules say what the rules do? They equal what their generator writes now."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from docs.make_rules.formulas import formula
from docs.make_rules.pages import pages
from docs.make_rules.texts import WHEN, family_of

ROOT = Path(__file__).parents[2]
RULES = ROOT / "docs" / "rules"


PAGES = pages()
PUBLIC = [c for n in opt.__all__ if isinstance(c := getattr(opt, n), type) and issubclass(c, opt.Rule)]


def lines(formula: str) -> list[str]:
    """The equations of a formula, without what only lays them out."""
    inner = formula.removeprefix("\\begin{aligned}\n").removesuffix("\n\\end{aligned}")
    return [line.replace("&", "").replace(r"\,", "") for line in re.split(r" \\\\\n", inner)]


def plain(text: str) -> str:
    """Text whose spaces do not count."""
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_generator_writes_now(name: str) -> None:
    assert (RULES / name).read_text(encoding="utf-8") == PAGES[name], "write it anew: make docs"


def test_there_are_no_pages_beside_those_of_the_generator() -> None:
    assert {p.name for p in RULES.glob("*.md")} == set(PAGES)


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [name for name in PAGES if f"rules/{name}" not in menu] == []


@pytest.mark.parametrize("cls", [c for c in PUBLIC if c is not opt.Rule], ids=lambda c: c.__name__)
def test_every_public_rule_has_a_section_a_picture_and_advice(cls: type[opt.Rule]) -> None:
    name = cls.__name__
    text = (RULES / f"{family_of(cls)}.md").read_text(encoding="utf-8")
    assert f"\n## {name}\n" in text
    assert f"(img/{name}.png)" in text
    assert f"### Formula of {name}\n" in text
    assert name in WHEN
    picture = RULES / "img" / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 40_000


def test_there_are_no_pictures_of_rules_that_are_gone() -> None:
    assert {p.stem for p in (RULES / "img").glob("*.png")} == {c.__name__ for c in PUBLIC} - {"Rule"}


EXPECTED: list[tuple[opt.Rule, list[str]]] = [
    (opt.Descent(), [r"x_t = x_{t-1} - \eta g_t"]),
    (opt.Momentum(), [r"v_t = \rho v_{t-1} + \eta g_t", r"x_t = x_{t-1} - v_t"]),
    (
        opt.Adam(),
        [
            r"m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t",
            r"v_t = \beta_2 v_{t-1} + (1 - \beta_2) |g_t|^2",
            r"w_{1,t} = \beta_1 w_{1,t-1} + 1 - \beta_1",
            r"w_{2,t} = \beta_2 w_{2,t-1} + 1 - \beta_2",
            r"\hat{m}_t = \frac{m_t}{w_{1,t}}",
            r"\hat{v}_t = \frac{v_t}{w_{2,t}}",
            r"x_t = x_{t-1} - \frac{\eta \hat{m}_t}{\sqrt{\hat{v}_t} + \epsilon}",
        ],
    ),
]


@pytest.mark.parametrize(("rule", "expected"), EXPECTED, ids=lambda v: type(v).__name__)
def test_a_formula_is_that_of_the_paper(rule: opt.Rule, expected: list[str]) -> None:
    assert [plain(line) for line in lines(formula(rule))] == [plain(line) for line in expected]


class Awkward(opt.Rule):
    """Every way in which a formula may need parentheses."""

    eta: float = 0.1
    rho: float = 0.9

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        a = dx - (x - (dx + 1))
        b = -(dx + x) * self.eta / (x / dx)
        c = (dx + 1) ** 3 - abs(x - 1) * -2.0
        return state, opt.where((a > 0) & ~(x < 1), a / (self.rho / (b - c)), c)


def test_parentheses_stand_where_the_meaning_needs_them() -> None:
    assert [plain(line) for line in lines(formula(Awkward()))] == [
        r"a_t=g_t-(x_{t-1}-(g_t+1))",
        r"c_t=(g_t+1)^3-(-2)|x_{t-1}-1|",
        (
            r"x_t=x_{t-1}-\left(\begin{cases}"
            r"\frac{a_t\left(-\frac{\eta(g_t+x_{t-1})g_t}{x_{t-1}}-c_t\right)}{\rho}"
            r"\text{if}a_t>0\land\lnot(x_{t-1}<1)\\c_t\text{else}\end{cases}\right)"
        ),
    ]


def test_what_when_asks_for_is_shown() -> None:
    shown = formula(opt.Chain(opt.AccumGrad(2), opt.Momentum()), np.zeros(3))
    assert r"\text{if } \mathit{full}_t \\ v_{t-1} & \text{else}" in shown
    assert r"x_{t-1} - v_t & \text{if } \mathit{full}_t \\ x_{t-1} & \text{else}" in shown
