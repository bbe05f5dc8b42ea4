"""Write docs/rules: a page per family of rules, the formulas printed from what each rule does when it is traced.

Run as `python docs/make_rules.py`. Two runs give the same bytes.
"""

import ast
import dataclasses
import inspect
import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import optimisers as opt
from optimisers.store import Shape, program_of
from optimisers.trace.expr import Expr, order
from optimisers.trace.program import Program, flatten
from optimisers.value import kind, walk

HERE = Path(__file__).resolve().parent
PAGES = HERE / "rules"
PICTURES = PAGES / "img"

ELEMENTS = 1000
"""The array by which memory is counted."""


# -- what a person has to say about each rule ----------------------------------------------------------------

FAMILIES = {
    "descent": ("Descent and momentum", "The step follows the gradient, or a running sum of gradients."),
    "adaptive": ("Adaptive steps", "Each element has a step size of its own, made of the gradients so far."),
    "adam": ("Adam and its kin", "A running mean of the gradient, scaled by a running size of it."),
    "sign": ("Steps by sign", "Every element moves by the same amount; only the direction is learned."),
    "gradient": (
        "Decay and clipping",
        "Rules for a `Chain`: they change the gradient, or the step, on its way.",
    ),
    "compose": ("Rules made of rules", "They join other rules, or decide whether and where these step."),
}
"""Title and introduction of a page; a family that is not listed gets its own name as the title."""

WHEN = {
    "Descent": "For problems that are well scaled, and as the yardstick for everything else. It needs no memory.",
    "Momentum": "The usual choice for convolutional networks with a tuned schedule. It damps the zigzag of "
    "Descent in narrow valleys at the price of one array.",
    "Nesterov": "Where Momentum overshoots: it brakes a little earlier. Otherwise the two are alike.",
    "RMSProp": "For recurrent networks and reinforcement learning, where the size of gradients drifts. "
    "It never settles entirely while eta is constant.",
    "Rprop": "For full batches only: noise flips signs, and then its steps collapse. On small problems without "
    "noise it is hard to beat for so little tuning.",
    "AdaGrad": "For sparse gradients, such as those of embeddings. Its steps only shrink, so long runs stall.",
    "AdaDelta": "Where no rate is known. It starts very slowly; a larger epsilon helps.",
    "Adam": "The safe first choice when little is known about the problem. With an L2 penalty take AdamW.",
    "AdamW": "The usual choice for transformers. Tune `lam` together with eta while `couple=True`.",
    "RAdam": "In place of Adam with warm-up: the first steps are damped by themselves.",
    "AdaMax": "Where single gradients are huge and rare: it is bounded by the largest one instead of the mean "
    "square. Seldom better than Adam elsewhere.",
    "OAdam": "For games of two players, such as GANs, where Adam circles around the equilibrium.",
    "AMSGrad": "Where Adam fails to converge because rare large gradients are forgotten. Mostly it behaves as "
    "Adam does and costs one more array.",
    "NAdam": "As Adam, a little quicker to turn. Worth a try where Nesterov beats Momentum.",
    "AdaBelief": "Where gradients are steady: it then takes longer steps than Adam. epsilon matters more than "
    "elsewhere.",
    "Lion": "For large batches and long runs; it needs one array of state where Adam needs two. "
    "Take a tenth to a third of the rate of AdamW, and a decay larger by as much.",
    "WeightDecay": "Before Descent or Momentum. Before Adam it is scaled away; take AdamW or DecoupledDecay there.",
    "DecoupledDecay": "Behind any rule that scales its gradient, to give it the decay of AdamW.",
    "SignDecay": "Where many parameters should be near zero. They jitter around zero by a step instead of "
    "staying on it.",
    "ClipGrad": "Against single wild elements. It bends the direction of the gradient; ClipNorm does not.",
    "ClipNorm": "Where layers should be limited one by one. For the usual clipping of a whole model take "
    "ClipGlobalNorm.",
    "ClipGlobalNorm": "The usual guard for recurrent networks and transformers: it keeps the direction of the "
    "whole gradient. It costs one more pass over the gradients.",
    "AccumGrad": "Where the batch that you want does not fit into memory.",
    "EMA": "To evaluate with smoother parameters than those that are trained, as is usual for image and "
    "diffusion models.",
    "Chain": "Whenever one rule is not enough. The whole chain is still traced as one and fused.",
    "MixedPrecision": "Whenever parameters are float16 or bfloat16: without it, small steps are rounded away.",
    "SkipNonFinite": "Around the rule of any training in half precision, or where a rare batch overflows.",
}
"""When to use a rule, in a sentence or two."""

EXAMPLES: dict[str, Callable[[], opt.Rule]] = {
    "AccumGrad": lambda: opt.AccumGrad(4),
    "EMA": lambda: opt.EMA(opt.Momentum()),
    "Chain": lambda: opt.Chain(opt.ClipNorm(1.0), opt.WeightDecay(), opt.Momentum()),
    "MixedPrecision": lambda: opt.MixedPrecision(opt.Momentum()),
    "SkipNonFinite": lambda: opt.SkipNonFinite(opt.Momentum()),
}
"""The rule whose formula is shown, where that made without arguments is not it."""

HALF = ("MixedPrecision",)
"""Rules that are shown for parameters of float16; all others are for float32."""

LETTERS = {
    "lam": r"\lambda",
    "weight": "w",
    "sum": "a",
    "average": "a",
    "most": r"\hat{v}",
    "mean": r"\bar{g}",
    "master": "M",
    "low": "L",
    "bound": r"\rho_\infty",
    "rectified": "r",
    "taken": "k",
    "skipped": "n",
    "term": "u",
    "product": r"\pi",
}
"""Letters of the papers for names of settings, of state and of variables."""

OWN_LETTERS = {("Rprop", "g"): r"\tilde{g}"}
"""The same for single rules."""

GREEK = frozenset(
    ["alpha", "beta", "gamma", "delta", "epsilon", "eta", "ell", "kappa", "mu", "nu"]
    + ["omega", "psi", "rho", "sigma", "tau", "theta", "xi", "zeta"]
)


# -- from a graph to equations -------------------------------------------------------------------------------

SUM, PRODUCT, POWER, ATOM = range(1, 5)
"""How tightly a printed formula holds together; 0 is looser than a sum: comparisons, cases."""

COMPARISONS = {
    "less": "<",
    "less_equal": r"\le",
    "greater": ">",
    "greater_equal": r"\ge",
    "equal": "=",
    "not_equal": r"\ne",
    "logical_and": r"\land",
    "logical_or": r"\lor",
}
FUNCTIONS = {
    "exp": r"\exp",
    "log": r"\log",
    "sin": r"\sin",
    "cos": r"\cos",
    "tanh": r"\tanh",
    "arctan": r"\arctan",
    "maximum": r"\max",
    "minimum": r"\min",
    "sign": r"\operatorname{sign}",
    "isfinite": r"\operatorname{finite}",
    "isnan": r"\operatorname{nan}",
    "real": r"\operatorname{Re}",
    "imag": r"\operatorname{Im}",
    "join_bits": r"\operatorname{join}",
    "high_bits": r"\operatorname{high}",
    "low_bits": r"\operatorname{low}",
}
REDUCTIONS = {"sum": r"\sum", "max": r"\max", "min": r"\min"}
THROUGH = frozenset({"identity", "scheduled"})


def letter(name: str, owner: str = "") -> str:
    """`beta[0]` -> \\beta_1."""
    base, _, index = name.partition("[")
    text = OWN_LETTERS.get((owner, base)) or LETTERS.get(base)
    if text is None:
        text = "\\" + base if base in GREEK else base if len(base) == 1 else rf"\mathit{{{base}}}"
    return text if not index else subscripted(text, str(int(index.rstrip("]").split("][")[0]) + 1))


def subscripted(text: str, *more: str) -> str:
    """A letter with more below it: (\\beta_1, t) -> \\beta_{1,t}."""
    found = re.fullmatch(r"(.*?)_(?:\{(.*)\}|(\\?\w+))", text)
    base, below = (found[1], [found[2] or found[3]]) if found else (text, [])
    inner = ",".join([*below, *more])
    return f"{base}_{inner}" if len(inner) == 1 else f"{base}_{{{inner}}}"


def number(value: Any) -> tuple[str, int]:
    """A constant, and how tightly it holds together."""
    if isinstance(value, bool):
        return rf"\text{{{str(value).lower()}}}", ATOM
    if isinstance(value, complex) or not isinstance(value, int | float):
        return rf"\text{{{value}}}", ATOM
    if math.isinf(value):
        return (r"\infty" if value > 0 else r"-\infty"), (ATOM if value > 0 else SUM)
    text = f"{value:g}"
    if "e" in text:
        digits, _, exponent = text.partition("e")
        power = f"10^{{{int(exponent)}}}"
        return (power, POWER) if digits == "1" else (rf"{digits} \cdot {power}", PRODUCT)
    return text, ATOM if value >= 0 else SUM


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
    rooms = {type(r).__module__ for _, r in owners(rule)}

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_globals.get("__name__") in rooms:
            found.extend((k, v) for k, v in frame.f_locals.items() if isinstance(v, Expr))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        program = program_of(rule, rule.init(x), Shape.of(x))
    finally:
        sys.setprofile(before)
    return program, found


def owners(rule: opt.Rule) -> list[tuple[tuple[Any, ...], opt.Rule]]:
    """(path, rule) for a rule and those that it is made of."""
    out: list[tuple[tuple[Any, ...], opt.Rule]] = [((), rule)]
    for field in dataclasses.fields(rule):  # pyright: ignore[reportArgumentType] its subclasses are dataclasses
        value = getattr(rule, field.name)
        inner = [((field.name,), value)] if not isinstance(value, tuple) else []
        inner += [((field.name, i), v) for i, v in enumerate(value)] if isinstance(value, tuple) else []
        for path, part in inner:
            if isinstance(part, opt.Rule):
                out += [((*path, *below), r) for below, r in owners(part)]
    return out


class Printer:
    """The equations of one program."""

    def __init__(self, rule: opt.Rule, program: Program, variables: list[tuple[str, Expr]]) -> None:
        self.rule, self.program = rule, program
        self.owner = type(rule).__name__
        self.numbers = [*self._settings(), *self._counters()]
        self.slots = {s.name: letter(_short(s.path), self.owner) for s in program.slots}
        self.names: dict[int, str] = {}
        self.keys = Keys()
        self.variables: dict[int, str] = {}
        for name, e in variables:
            self.variables.setdefault(self.keys.of(e), name)
        self.counts_steps = [
            name == "t" and new.op == "add" and new.args[0] is not new.args[1] and _is(new.args[1], 1)
            for name, new in zip(program.names[program.hypers :], program.new_counters, strict=True)
        ]

    def _settings(self) -> list[str]:
        """The letters of the hyper-parameters; where two rules share one, each names its rule."""
        by_path = dict(owners(self.rule))
        owned: list[tuple[str, str]] = []
        for path, _ in walk(self.rule):
            above = max((p for p in by_path if path[: len(p)] == p), key=len)
            owned.append((_short(path), type(by_path[above]).__name__))
        names = [n for n, _ in owned]
        return [
            letter(n, o) if names.count(n) == 1 else subscripted(letter(n, o), rf"\text{{{o}}}")
            for n, o in owned
        ]

    def _counters(self) -> list[str]:
        names = self.program.names[self.program.hypers :]
        return [letter(n, self.owner) for n in names]

    # -- choosing what gets an equation of its own --

    def equations(self) -> list[str]:
        """Every equation, each after those that it needs; conditions of `when` stand behind theirs."""
        program = self.program
        outputs: list[tuple[str, Expr]] = []
        for slot, new in zip(program.slots, program.new_slots, strict=True):
            outputs.append((subscripted(self.slots[slot.name], "t"), new))
        for i, new in enumerate(program.new_counters):
            name = self.numbers[program.hypers + i]
            outputs.append(("t" if self.counts_steps[i] else subscripted(name, "t"), new))
        if program.new_x is not None:
            outputs.append(("x_t", program.new_x))
        checks = [c for c, _, _ in program.checks]
        bare = [(name, *self._bare(new)) for name, new in outputs]

        for name, e, _ in bare:
            if e.args and id(e) not in self.names:
                self.names[id(e)] = name
        roots = [*(e for _, e, _ in bare), *(g for _, _, guards in bare for g in guards), *checks]
        self._name_parts(roots)

        guards_of = {name: guards for name, _, guards in bare}
        done: set[str] = set()
        out: list[str] = []
        for e in order(roots):
            if id(e) not in self.names:
                continue
            name = self.names[id(e)]
            if name != "t":
                out.append(self._equation(name, e, guards_of.get(name, [])))
            done.add(name)
        for name, e, guards in bare:
            if name not in done:
                out.append(self._equation(name, e, guards, own=False))
        out += [rf"&\text{{needs }} {self.text(c, 0)}" for c in checks]
        return out

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
        uses: dict[int, int] = {}
        for e in nodes:
            for a in e.args:
                uses[id(a)] = uses.get(id(a), 0) + 1
        for g in roots:
            uses[id(g)] = uses.get(id(g), 0) + 1
        weights: dict[int, int] = {}
        state = {self.slots[s.name] for s in self.program.slots}
        taken = {re.sub(r"_(\{.*\}|.)$", "", n) for n in self.names.values()}
        more = 0
        for e in nodes:
            weights[id(e)] = (
                0
                if not e.args
                else 1 + sum(1 if id(a) in self.names else weights[id(a)] for a in e.args if a.args)
            )
            if not e.args or id(e) in self.names or e.op in THROUGH:
                continue
            variable = self.variables.get(self.keys.of(e))
            name = letter(variable, self.owner) if variable else ""
            hat = name in state and len(variable or "") == 1
            shared = uses[id(e)] > 1 and weights[id(e)] >= (2 if variable else 4)
            if not hat and not shared:
                continue
            name = rf"\hat{{{name}}}" if hat else name
            if not name or name in taken:
                more += 1
                name = rf"c_{more}"
            taken.add(name)
            self.names[id(e)] = subscripted(name, "t") if self._moves(e) else name

    def _moves(self, e: Expr) -> bool:
        """Whether a value differs from step to step; settings alone do not."""
        leaves = [a for a in order([e]) if not a.args]
        return any(
            a.op in ("input", "clock") or (a.op == "number" and a.value >= self.program.hypers) for a in leaves
        )

    def _equation(self, name: str, e: Expr, guards: list[Expr], *, own: bool = True) -> str:
        right = self.text(e, 0, own=own)
        if not guards:
            return f"{name} &= {right}"
        condition = r" \land ".join(self.text(g, SUM) for g in guards)
        old = re.sub(r"t(\}?)$", r"{t-1}", name) if name.endswith("_t") else name.replace("t}", "t-1}")
        return rf"{name} &= \begin{{cases}} {right} & {condition} \\ {old} & \text{{else}} \end{{cases}}"

    # -- printing one node --

    def text(self, e: Expr, least: int = 0, *, own: bool = False) -> str:
        """A node, in parentheses where it holds together less tightly than needed; `own` looks behind its name."""
        text, level = self._node(e, own=own)
        return text if level >= least else parenthesised(text)

    def _node(self, e: Expr, *, own: bool = False) -> tuple[str, int]:
        while e.op in THROUGH and (own or id(e) not in self.names):
            e = e.args[0]
        if id(e) in self.names and not own:
            return self.names[id(e)], ATOM
        if e.op == "const":
            return number(e.value)
        if e.op == "input":
            return self._input(e), ATOM
        if e.op == "number":
            return self._number(e)
        if e.op in ("clock", "size"):
            return {"clock": r"\text{clock}", "size": "N"}[e.op], ATOM
        if e.op in ("add", "subtract"):
            return self._sum(e), SUM
        if e.op in ("multiply", "divide", "negative"):
            return self._product(e)
        return self._word(e)

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

    def _word(self, e: Expr) -> tuple[str, int]:
        a = e.args
        if e.op == "power":
            return f"{self.text(a[0], ATOM)}^{{{self.text(a[1])}}}", POWER
        if e.op == "sqrt":
            return rf"\sqrt{{{self.text(a[0])}}}", ATOM
        if e.op == "abs":
            return bars(self.text(a[0])), ATOM
        if e.op == "abs2":
            return f"{bars(self.text(a[0]))}^2", POWER
        if e.op == "conj":
            return rf"\overline{{{self.text(a[0])}}}", ATOM
        if e.op in COMPARISONS:
            inner = SUM if not e.op.startswith("logical") else 0
            return f"{self.text(a[0], inner)} {COMPARISONS[e.op]} {self.text(a[1], inner)}", 0
        if e.op == "logical_not":
            return rf"\lnot {self.text(a[0], ATOM)}", PRODUCT
        if e.op == "where":
            return self._cases(e), ATOM
        if e.op == "total":
            return rf"\sum_{{\text{{leaves}}}} {self.text(a[0], PRODUCT)}", PRODUCT
        if e.op in REDUCTIONS and e.domain == "scalar":
            return f"{REDUCTIONS[e.op]} {self.text(a[0], PRODUCT)}", PRODUCT
        if e.op in ("floor", "ceil"):
            return rf"\l{e.op} {self.text(a[0])} \r{e.op}", ATOM
        name = FUNCTIONS.get(e.op, rf"\operatorname{{{e.op.replace('_', ' ')}}}")
        return f"{name}{parenthesised(', '.join(self.text(x) for x in a))}", ATOM

    def _cases(self, e: Expr) -> str:
        rows: list[str] = []
        while e.op == "where":
            rows.append(f"{self.text(e.args[1])} & {self.text(e.args[0])}")
            e = e.args[2]
            if id(e) in self.names:
                break
        rows.append(rf"{self.text(e)} & \text{{else}}")
        inner = r" \\ ".join(rows)
        return rf"\begin{{cases}} {inner} \end{{cases}}"

    def _sum(self, e: Expr) -> str:
        out = ""
        for positive, term in self._terms(e, positive=True, first=True):
            text = self.text(term, PRODUCT)
            out += (" + " if positive else " - ") + text if out else ("" if positive else "-") + text
        return out

    def _terms(self, e: Expr, *, positive: bool, first: bool = False) -> Iterator[tuple[bool, Expr]]:
        """The summands of a sum with their signs; a - (b + c) keeps its parentheses."""
        if e.op in ("add", "subtract") and (first or (positive and id(e) not in self.names)):
            yield from self._terms(e.args[0], positive=positive)
            yield from self._terms(e.args[1], positive=positive == (e.op == "add"))
        elif _whole(e) is not None and _whole(e) < 0:  # pyright: ignore[reportOptionalOperand] looked at before
            yield not positive, Expr("const", value=-e.value)
        else:
            yield positive, e

    def _product(self, e: Expr) -> tuple[str, int]:
        above: list[Expr] = []
        below: list[Expr] = []
        sign = self._factors(e, above, below, first=True)
        # Cases stand last, where their brace does not swallow what follows.
        text = self._row(above)
        if below:
            text = rf"\frac{{{text or '1'}}}{{{self._row(below) or '1'}}}"
        level = ATOM if below else PRODUCT
        return (f"-{text or '1'}", SUM) if sign < 0 else (text or "1", level if len(above) > 1 or below else ATOM)

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
        if not _is(e, 1):
            above.append(e)
        return 1

    def _row(self, factors: list[Expr]) -> str:
        counted: dict[int, tuple[Expr, int]] = {}
        for e in factors:
            counted[id(e)] = (e, counted[id(e)][1] + 1 if id(e) in counted else 1)
        ordered = sorted(counted.values(), key=lambda item: (item[0].op == "where", item[0].op != "const"))
        if len(ordered) == 1 and ordered[0][1] == 1:
            return self.text(ordered[0][0])
        texts = [
            self.text(e, PRODUCT if e.op != "total" else ATOM) if n == 1 else f"{self.text(e, ATOM)}^{{{n}}}"
            for e, n in ordered
        ]
        return r" \cdot ".join(texts) if any(t[:1].isdigit() for t in texts[1:]) else r" \, ".join(texts)


def _is(e: Expr, value: float) -> bool:
    return e.op == "const" and isinstance(e.value, int | float) and e.value == value


def _whole(e: Expr) -> float | None:
    real = e.op == "const" and isinstance(e.value, int | float) and not isinstance(e.value, bool)
    return e.value if real else None


def _short(path: tuple[Any, ...]) -> str:
    """`beta[0]` for the path of a number or an array, without what is around it."""
    words = [i for i, p in enumerate(path) if isinstance(p, str)]
    at = words[-1] if words else -1
    return str(path[at] if words else "state") + "".join(f"[{p}]" for p in path[at + 1 :])


def parenthesised(text: str) -> str:
    tall = re.search(r"\\(frac|sum|sqrt|begin|left)", text)
    return rf"\left({text}\right)" if tall else f"({text})"


def bars(text: str) -> str:
    return rf"\left|{text}\right|" if "\\frac" in text else f"|{text}|"


def formula(rule: opt.Rule, x: Any = None) -> str:
    """What one step of a rule computes, as aligned LaTeX."""
    x = np.zeros(ELEMENTS, "float16" if type(rule).__name__ in HALF else "float32") if x is None else x
    lines = Printer(rule, *traced(rule, x)).equations()
    return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"
