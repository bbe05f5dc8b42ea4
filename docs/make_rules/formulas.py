"""What does one step of a rule compute? Equations, printed from what the rule does when it is traced."""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

import optimisers as opt
from docs.make_rules.letters import (
    ALONG,
    AROUND,
    ATOM,
    COMPARISONS,
    FUNCTIONS,
    GIVEN,
    LETTERS,
    POWER,
    PRODUCT,
    RANDOM,
    REDUCTIONS,
    RESULTS,
    SEVERAL,
    SUM,
    bars,
    letter,
    letters_of,
    number,
    parenthesised,
    short,
    subscripted,
)
from docs.make_rules.meant import as_meant, is_const
from docs.make_rules.texts import BEFORE, HANDS_ON, family_of, parameters
from optimisers.graph.expr import Expr, news_of, olds_of, order
from optimisers.graph.trace import Program
from optimisers.ops import orthogonal
from optimisers.settings import walk
from optimisers.state.group import Shape, program_of

HANDED_ON = "g'_t"
"""What a rule of a chain gives the next one in place of the gradient."""


THROUGH = frozenset({"identity", "scheduled"})


class Keys:
    """One number for all graphs that are the same formula."""

    def __init__(self) -> None:
        self.table: dict[Any, int] = {}
        self.known: dict[int, tuple[Expr, int]] = {}

    def of(self, root: Expr) -> int:
        for e in order([root]):
            if id(e) in self.known:
                continue
            args = tuple(self.known[id(a)][1] for a in e.args)
            if e.op in THROUGH:
                key = args[0]
            else:
                op = e.op
                if op == "power" and e.args[1].op == "const" and e.args[1].value == 2:
                    op, args = "multiply", (args[0], args[0])
                whole = (op, args, repr(e.value) if np.ndim(e.value) == 0 else id(e.value), repr(e.options))
                key = self.table.setdefault(whole, len(self.table))
            self.known[id(e)] = (e, key)
        return self.known[id(root)][1]


def traced(rule: opt.Rule, x: Any) -> tuple[Program, list[tuple[str, Expr]]]:
    """The program of a rule, and the variables of its `apply`: what their author called the parts."""
    found: list[tuple[str, Expr]] = []
    rooms = {orthogonal.__module__, *(type(r).__module__ for _, r in owners(rule))}

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_globals.get("__name__") in rooms:
            found.extend((k, v) for k, v in frame.f_locals.items() if isinstance(v, Expr))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        program = program_of(rule, rule.init(x), Shape.of(x), 1 if rule.second_order else None)
    finally:
        sys.setprofile(before)
    return as_meant(program, found)


def owners(rule: opt.Rule) -> list[tuple[tuple[Any, ...], opt.Rule]]:
    """(path, rule) for a rule and those that it is made of."""
    out: list[tuple[tuple[Any, ...], opt.Rule]] = [((), rule)]
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        inner = [((field.name,), value)] if not isinstance(value, tuple) else []
        inner += [((field.name, i), v) for i, v in enumerate(value)] if isinstance(value, tuple) else []
        for path, part in inner:
            if isinstance(part, opt.Rule):
                out += [((*path, *below), r) for below, r in owners(part)]
    return out


def counted(program: Program) -> tuple[Expr, ...]:
    """The new values of the counters in the state of a rule."""
    return program.new_counters[: len(shown(program))]


def shown(program: Program) -> tuple[str, ...]:
    """The names of the counters in the state of a rule."""
    return program.names[program.hypers : len(program.names) - program.hidden]


class Printer:
    """The equations of one program."""

    def __init__(self, rule: opt.Rule, program: Program, variables: list[tuple[str, Expr]]) -> None:
        self.rule, self.program = rule, program
        self.owner = type(rule).__name__
        self.hands_on = family_of(type(rule)) == "gradient" or self.owner in HANDS_ON
        self.numbers = [*self._settings(), *self._counters()]
        letters = letters_of([s.path for s in program.slots], self.owner)
        self.slots = dict(zip([s.name for s in program.slots], letters, strict=True))
        self.names: dict[int, str] = {}
        self.keys = Keys()
        self.variables: dict[int, str] = {}
        for name, e in variables:
            self.variables.setdefault(self.keys.of(e), name)
        self.counts_steps = [
            name == "t" and new.op == "add" and new.args[0] is not new.args[1] and is_const(new.args[1], 1)
            for name, new in zip(shown(program), counted(program), strict=False)
        ]

    def _settings(self) -> list[str]:
        """The letters of the hyper-parameters; where two rules share one, each names its rule."""
        by_path = dict(owners(self.rule))
        owned: list[tuple[str, str]] = []
        for path, _ in walk(self.rule):
            above = max((p for p in by_path if path[: len(p)] == p), key=len)
            owned.append((short(path), type(by_path[above]).__name__))
        names = [n for n, _ in owned]
        return [
            letter(n, o) if names.count(n) == 1 else subscripted(letter(n, o), rf"\text{{{o}}}")
            for n, o in owned
        ]

    def _counters(self) -> list[str]:
        names = shown(self.program)
        return [letter(n, self.owner) for n in names]

    # -- choosing what gets an equation of its own --

    def equations(self) -> list[str]:
        """Every equation, each after those that it needs; conditions of `when` stand behind theirs."""
        outputs = self._outputs()
        checks = [c for c, _, _ in self.program.checks]
        for name, e, _ in outputs:
            if e.args and id(e) not in self.names:
                self.names[id(e)] = name
        roots = [*(part for _, e, guards in outputs for part in (*guards, e)), *checks]
        self._name_parts(roots)

        guards_of = {name: guards for name, _, guards in outputs}
        named = [(self.names[id(e)], e) for e in order(roots) if id(e) in self.names]
        out = [self._equation(name, e, guards_of.get(name, [])) for name, e in named if name != "t"]
        done = {name for name, _ in named}
        out += [self._equation(name, e, guards, own=False) for name, e, guards in outputs if name not in done]
        out = [BEFORE[self.owner], *out] if self.owner in BEFORE else out
        kinds = dict.fromkeys(dict(e.options)["kind"] for e in order(roots) if e.op == "random")
        out += [rf"{name} &\sim {law}" for name, law in (RANDOM[kind] for kind in kinds)]
        return out + [rf"&\text{{needs }} {self.text(c, 0)}" for c in checks]

    def _outputs(self) -> list[tuple[str, Expr, list[Expr]]]:
        """What a step writes: its name, its value without conditions, and the conditions."""
        program = self.program
        found: list[tuple[str, Expr]] = []
        for slot, new in zip(program.slots, program.new_slots, strict=True):
            found.append((subscripted(self.slots[slot.name], "t"), new))
        for i, new in enumerate(counted(program)):
            name = self.numbers[program.hypers + i]
            found.append(("t" if self.counts_steps[i] else subscripted(name, "t"), new))
        if program.new_x is not None:
            found.append(("x_t", program.new_x))
        outputs = [(name, *self._bare(new)) for name, new in found]
        if not self.hands_on:
            return outputs
        return [
            (HANDED_ON, e.args[1], g) if name == "x_t" and e.op == "subtract" else (name, e, g)
            for name, e, g in outputs
        ]

    def _bare(self, e: Expr) -> tuple[Expr, list[Expr]]:
        """An output without the conditions that `when` put around it, and these conditions."""
        guards: list[Expr] = []
        steers = {id(g) for g in self.program.guards}
        while e.op == "where" and id(e.args[0]) in steers and e.args[2].op in ("input", "number"):
            guards.append(e.args[0])
            e = e.args[1]
        return e, guards

    def _name_parts(self, roots: list[Expr]) -> None:
        """Names for what stands in several places, and for what the author calls by a hat."""
        nodes = order(roots)
        uses = Counter(id(a) for e in nodes for a in e.args) + Counter(map(id, roots))
        weights: dict[int, int] = {}
        taken = {re.sub(r"_(\{.*\}|.)$", "", n) for n in self.names.values()}
        more = 0
        for e in nodes:
            inner = (1 if id(a) in self.names else weights[id(a)] for a in e.args if a.args)
            weights[id(e)] = 1 + sum(inner) if e.args else 0
            if not e.args or id(e) in self.names or e.op in (*THROUGH, *SEVERAL, "random"):
                continue
            name = self._called(e, weights[id(e)], shared=uses[id(e)] > 1)
            if name is None:
                continue
            if not name or name in taken:
                more += 1
                name = rf"c_{more}"
            taken.add(name)
            self.names[id(e)] = subscripted(name, "t") if self._moves(e) else name

    def _called(self, e: Expr, weight: int, *, shared: bool) -> str | None:
        """The name of a part that gets an equation, empty where its author has none; None for no equation."""
        variable = self.variables.get(self.keys.of(e))
        name = letter(variable, self.owner) if variable else ""
        if len(variable or "") == 1 and name in {self.slots[s.name] for s in self.program.slots}:
            return rf"\hat{{{name}}}"
        least = 3 if e.type == "bool" else 2 if variable else 4
        known = variable in LETTERS and weight >= 6
        return name if known or (shared and weight >= least) else None

    def _moves(self, e: Expr) -> bool:
        """Whether a value differs from step to step; settings alone do not."""
        leaves = [a for a in order([e]) if not a.args]
        return any(
            a.op in ("input", "clock") or (a.op == "number" and a.value >= self.program.hypers)
            for a in leaves
        )

    def _equation(self, name: str, e: Expr, guards: list[Expr], *, own: bool = True) -> str:
        right = self.text(e, 0, own=own)
        if not guards:
            return f"{name} &= {right}"
        condition = r" \land ".join(self.text(g, SUM if len(guards) > 1 else 0) for g in guards)
        old = name.removesuffix("t") + "{t-1}" if name.endswith("_t") else name.replace("t}", "t-1}")
        old = r"\text{no step}" if name == HANDED_ON else old
        rows = rf"{right} & \text{{if }} {condition} \\ {old} & \text{{else}}"
        return rf"{name} &= \begin{{cases}} {rows} \end{{cases}}"

    # -- printing one node --

    def text(self, e: Expr, least: int = 0, *, own: bool = False) -> str:
        """A node, in parentheses where it holds together too loosely; `own` looks behind its name."""
        text, level = self._node(e, own=own)
        return text if level >= least else parenthesised(text)

    def _node(self, e: Expr, *, own: bool = False) -> tuple[str, int]:
        while e.op in THROUGH and (own or id(e) not in self.names):
            e = e.args[0]
        if id(e) in self.names and not own:
            return self.names[id(e)], ATOM
        if e.op == "const":
            return number(e.value) if np.ndim(e.value) == 0 else (rf"1 \dots {len(e.value)}", ATOM)
        if e.op == "input":
            return self._input(e), ATOM
        if e.op == "number":
            return self._number(e)
        if e.op in GIVEN:
            return GIVEN[e.op], ATOM
        if e.op == "random":
            return RANDOM[dict(e.options)["kind"]][0], ATOM
        if e.op in ("add", "subtract"):
            return self._sum(e), SUM
        if e.op in ("multiply", "divide", "negative"):
            return self._product(e)
        return self._operation(e)

    def _input(self, e: Expr) -> str:
        name = str(e.value)
        if name in self.slots:
            return subscripted(self.slots[name], "t-1")
        if name == "x":
            return "x_{t-1}"
        return subscripted("g", "t") if name == "dx" else rf"g^{{({name[2:]})}}_t"

    def _number(self, e: Expr) -> tuple[str, int]:
        i = int(e.value)
        if i < self.program.hypers:
            return self.numbers[i], ATOM
        if self.counts_steps[i - self.program.hypers]:
            return "t - 1", SUM
        return subscripted(self.numbers[i], "t-1"), ATOM

    def _operation(self, e: Expr) -> tuple[str, int]:
        a = e.args
        if e.op == "power":
            above = self.text(a[1])
            return f"{self.text(a[0], ATOM)}^" + (above if len(above) == 1 else f"{{{above}}}"), POWER
        if e.op in AROUND:
            return AROUND[e.op](self.text(a[0])), ATOM
        if e.op == "abs2":
            return f"{bars(self.text(a[0]))}^2", POWER
        if e.op in COMPARISONS:
            inner = SUM if not e.op.startswith("logical") else 0
            return f"{self.text(a[0], inner)} {COMPARISONS[e.op]} {self.text(a[1], inner)}", 0
        if e.op == "logical_not":
            return rf"\lnot {self.text(a[0], ATOM)}", PRODUCT
        if e.op == "where":
            return self._cases(e), 0
        if e.op == "total":
            return self._total(e)
        if e.op in REDUCTIONS or e.op in ("matmul", "transpose", "item"):
            return self._of_whole(e)
        name = FUNCTIONS.get(e.op, rf"\operatorname{{{e.op.replace('_', ' ')}}}")
        return f"{name}{parenthesised(', '.join(self.text(x) for x in a))}", ATOM

    def _of_whole(self, e: Expr) -> tuple[str, int]:
        """What is made of a whole array, or of a matrix."""
        a = e.args
        if e.op == "matmul":
            return rf"{self.text(a[0], ATOM)} \mathbin{{@}} {self.text(a[1], ATOM)}", PRODUCT
        if e.op == "transpose":
            return rf"{self.text(a[0], ATOM)}^\top", ATOM
        if e.op == "item":
            return self._item(a[0], dict(e.options)["index"])
        along = "" if e.domain == "scalar" else "_" + ALONG[dict(e.options)["axis"]]
        return f"{REDUCTIONS[e.op]}{along} {self.text(a[0], PRODUCT)}", PRODUCT

    def _item(self, e: Expr, index: int) -> tuple[str, int]:
        """One of several results of an operation."""
        if e.op == "every":
            new, old = (self.text(of(e)[index]) for of in (news_of, olds_of))
            return _either([rf"{new} & \text{{if }} {self.text(e.args[0])}", rf"{old} & \text{{else}}"]), 0
        given = ", ".join(self.text(x) for x in e.args)
        return rf"\operatorname{{{e.op}}}_{{{RESULTS[e.op][index]}}}{parenthesised(given)}", ATOM

    def _total(self, e: Expr) -> tuple[str, int]:
        join = dict(e.options)["join"]
        over = rf"\{'max' if join == 'max' else 'sum'}_{{\text{{leaves}}}}"
        if join == "norm2":
            return rf"\sqrt{{{over} {self.text(e.args[0], ATOM)}^2}}", ATOM
        return rf"{over} {self.text(e.args[0], PRODUCT)}", PRODUCT

    def _cases(self, e: Expr) -> str:
        rows: list[str] = []
        while e.op == "where":
            rows.append(rf"{self.text(e.args[1])} & \text{{if }} {self.text(e.args[0])}")
            e = e.args[2]
            if id(e) in self.names:
                break
        rows.append(rf"{self.text(e)} & \text{{else}}")
        return _either(rows)

    def _sum(self, e: Expr) -> str:
        out = ""
        for positive, term in self._terms(e, positive=True, first=True):
            text = self.text(term, PRODUCT if out or not positive else SUM)
            out += (" + " if positive else " - ") + text if out else ("" if positive else "-") + text
        return out

    def _terms(self, e: Expr, *, positive: bool, first: bool = False) -> Iterator[tuple[bool, Expr]]:
        """The summands of a sum with their signs; a - (b + c) keeps its parentheses."""
        if e.op in ("add", "subtract") and (first or (positive and id(e) not in self.names)):
            yield from self._terms(e.args[0], positive=positive)
            yield from self._terms(e.args[1], positive=positive == (e.op == "add"))
        elif _whole(e) is not None and _whole(e) < 0:
            yield not positive, Expr("const", value=-e.value)
        else:
            yield positive, e

    def _product(self, e: Expr) -> tuple[str, int]:
        above: list[Expr] = []
        below: list[Expr] = []
        sign = self._factors(e, above, below, first=True)
        text = self._row(above)
        if below:
            text = rf"\frac{{{text or '1'}}}{{{self._row(below) or '1'}}}"
        level = ATOM if below else PRODUCT
        return (
            (f"-{text or '1'}", SUM)
            if sign < 0
            else (text or "1", level if len(above) > 1 or below else ATOM)
        )

    def _factors(self, e: Expr, above: list[Expr], below: list[Expr], *, first: bool = False) -> int:
        """Sort the factors of a product into those above and below the line; the sign of the rest."""
        if not first and id(e) in self.names:
            above.append(e)
            return 1
        if e.op in THROUGH:
            return self._factors(e.args[0], above, below)
        if e.op == "multiply":
            return self._factors(e.args[0], above, below) * self._factors(e.args[1], above, below)
        if e.op == "divide":
            return self._factors(e.args[0], above, below) * self._factors(e.args[1], below, above)
        if e.op == "negative":
            return -self._factors(e.args[0], above, below)
        if not is_const(e, 1):
            above.append(e)
        return 1

    def _place(self, e: Expr) -> int:
        """Where a factor stands: numbers, settings, everything else, cases."""
        if e.op == "const":
            return 0
        setting = e.op == "number" and e.value < self.program.hypers
        return 1 if setting else 3 if e.op == "where" and id(e) not in self.names else 2

    def _row(self, factors: list[Expr]) -> str:
        counted: dict[int, tuple[Expr, int]] = {}
        for e in factors:
            counted[id(e)] = (e, counted[id(e)][1] + 1 if id(e) in counted else 1)
        ordered = sorted(counted.values(), key=lambda item: self._place(item[0]))
        if len(ordered) == 1 and ordered[0][1] == 1:
            return self.text(ordered[0][0])
        texts = [
            self.text(e, PRODUCT if e.op != "total" else ATOM) if n == 1 else f"{self.text(e, ATOM)}^{n}"
            for e, n in ordered
        ]
        return r" \cdot ".join(texts) if any(t[:1].isdigit() for t in texts[1:]) else r" \, ".join(texts)


def _either(rows: list[str]) -> str:
    inner = r" \\ ".join(rows)
    return rf"\begin{{cases}} {inner} \end{{cases}}"


def _whole(e: Expr) -> float | None:
    real = e.op == "const" and isinstance(e.value, int | float) and not isinstance(e.value, bool)
    return e.value if real else None


def formula(rule: opt.Rule, x: Any = None) -> str:
    """What one step of a rule computes, as aligned LaTeX."""
    x = parameters(rule) if x is None else x
    lines = Printer(rule, *traced(rule, x)).equations()
    return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"
