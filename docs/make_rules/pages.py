"""What stands on a page of rules? A section for each: its docstring, formula, settings, state and costs."""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

import numpy as np

import optimisers as opt
from docs.make_rules.formulas import Printer, formula, owners, traced
from docs.make_rules.letters import letters_of, short
from docs.make_rules.texts import (
    EXAMPLES,
    FAMILIES,
    HANDS_ON,
    OF_MATRICES,
    WHEN,
    example,
    families,
    parameters,
)
from optimisers.nest import flatten, values
from optimisers.settings import fields, walk


def said(cls: type) -> dict[str, str]:
    """The sentences below the fields of a state, by name."""
    found: dict[str, str] = {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    for field, text in zip(body.body, body.body[1:], strict=False):
        named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if named and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(inspect.cleandoc(str(text.value.value)).split())
    return found


def explained(state: Any) -> dict[str, str]:
    """What is said of every name in a nest of states."""
    out: dict[str, str] = {}
    if isinstance(state, tuple):
        out = said(type(state)) if hasattr(state, "_fields") else {}
        for item in state:
            out |= explained(item)
    return out


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _holds_rules(rule: opt.Rule, field: str) -> bool:
    return any(path[:1] == (field,) for path, _ in owners(rule))


def own_of(cls: type[opt.Rule], shown: opt.Rule) -> tuple[opt.Rule, int]:
    """(the rule of a class in what is shown for it, how deep it stands there): the last of a chain."""
    chained = isinstance(shown, opt.Chain) and cls is not opt.Chain
    return (shown.rules[-1], 2) if chained else (shown, 0)


def hyper_parameters(cls: type[opt.Rule], shown: opt.Rule) -> str:
    rows: list[tuple[str, ...]] = []
    printed = Printer(shown, *traced(shown, parameters(shown)))
    rule, depth = own_of(cls, shown)
    known = zip((path for path, _ in walk(shown)), printed.numbers, strict=False)
    within = ("rules", len(shown.rules) - 1) if isinstance(shown, opt.Chain) and depth else ()
    signs = [(path[depth:], sign) for path, sign in known if path[:depth] == within]
    for field in fields(rule):
        value = getattr(type(rule), field.name, dataclasses.MISSING)
        default = "none: must be given" if value is dataclasses.MISSING else f"`{value!r}`"
        letters = [
            sign for path, sign in signs if path[0] == field.name and not _holds_rules(rule, field.name)
        ]
        rows.append(
            (
                f"`{field.name}`",
                ", ".join(f"${t}$" for t in letters),
                default,
                "its settings do"
                if _holds_rules(rule, field.name)
                else "at any step, or a schedule"
                if field.kind is not None
                else "never",
            )
        )
    return table(("name", "in the formula", "default", "changes"), rows) if rows else "None."


def state_of(rule: opt.Rule, x: Any) -> str:
    state, names, rows = rule.init(x), explained(rule.init(x)), []
    listed = list(flatten(state))
    signs = letters_of([path for path, _ in listed], type(rule).__name__)
    for (path, value), sign in zip(listed, signs, strict=True):
        name, array = short(path), hasattr(value, "shape")
        shape = (
            "that of x" if array and value.shape == x.shape else str(value.shape) if array else "one number"
        )
        where = "".join(f".{p}" if isinstance(p, str) else f"[{p}]" for p in path) or "."
        meaning = names.get(name.partition("[")[0], "")
        dtype = str(value.dtype) if array else type(value).__name__
        meaning = linked(meaning)
        rows.append((f"`state{where}`", "" if name == "t" else f"${sign}$", shape, dtype, meaning))
    return table(("entry", "in the formula", "shape", "type", "what it is"), rows) if rows else "None."


def costs(rule: opt.Rule, x: Any) -> str:
    state = opt.setup(rule, {"x": x})
    (group,) = opt.explain(state).groups
    shapes = {np.shape(value) for value in values(state["x"].state)} - {(), x.shape}
    of = f"; these are the figures of an array of shape {x.shape}" if shapes else ""
    passes = "one pass" if group.passes == 1 else f"{group.passes} passes"
    return (
        f"{group.state_bytes / x.size:g} bytes of state and {group.bytes_per_parameter} bytes moved per "
        f"parameter of {x.dtype}, in {passes} over memory{of}."
    )


def linked(text: str) -> str:
    """A docstring with its papers as links; a star outside of code stays a star."""
    text = "`".join(re.sub(r"([*<])", r"\\\1", t) if i % 2 == 0 else t for i, t in enumerate(text.split("`")))
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def section(cls: type[opt.Rule]) -> str:
    rule, name = example(cls), cls.__name__
    x = parameters(rule)
    shown = f"Shown for `{rule!r}`.\n\n" if name in EXAMPLES else ""
    papers = sorted(set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", inspect.getdoc(cls) or "")))
    parts = [
        f"## {name}",
        linked(inspect.getdoc(cls) or ""),
        *([f"**When to use it.** {WHEN[name]}"] if name in WHEN else []),
        f"### Formula of {name}",
        f"{shown}$$\n{formula(rule)}\n$$",
        f"### Hyper-parameters of {name}",
        hyper_parameters(cls, rule),
        f"### State and cost of {name}",
        state_of(rule, x),
        costs(rule, x),
        *(["Paper: " + ", ".join(linked(f"arXiv:{p}") for p in papers) + "."] if papers else []),
        f"![Path of {name} on a curved valley](img/{name}.png)",
    ]
    return "\n\n".join(parts)


NOTATION = """\
In the formulas $x$ is the parameter, $g$ the gradient, and $t$ counts the steps: $v_{t-1}$ is the old value,
$v_t$ the new one. Products, roots and comparisons go element by element; $\\sum$ goes over all of one
array. A line with "needs" is checked before anything is written. The formulas are printed from what a rule
does when it is traced."""


MATRICES = (
    r" $A \mathbin{@} B$ is a product of matrices, $A^\top$ a transpose; $\sum_j$ goes along rows, "
    r"$\sum_i$ along columns."
)


def page(family: str, rules: list[type[opt.Rule]]) -> str:
    title, introduction = FAMILIES.get(family, (family.replace("_", " ").capitalize(), ""))
    note = (
        " $g'$ is what a rule of this page hands on to the rule behind it."
        if family == "gradient"
        else " $g'$ is what a rule hands on to the rule behind it."
        if any(c.__name__ in HANDS_ON for c in rules)
        else MATRICES
        if family in OF_MATRICES
        else ""
    )
    text = "\n\n".join([f"# {title}", introduction, NOTATION + note, *map(section, rules)])
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    return {f"{family}.md": page(family, rules) for family, rules in families().items()}
