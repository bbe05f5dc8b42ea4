"""Write docs/rules: a page per family of rules, with formulas printed from what each rule does when traced.

Run as `python docs/make_rules.py`. Two runs give the same bytes.
"""

import ast
import dataclasses
import inspect
import io
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  it teaches NumPy bfloat16
import numpy as np

import optimisers as opt
from optimisers.graph.expr import Expr, order
from optimisers.graph.trace import Program
from optimisers.nest import flatten
from optimisers.settings import fields, walk
from optimisers.state.group import Shape, program_of

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
    "of_torch": (
        "Formulas of torch.optim",
        (
            "For those who go on with a run of torch.optim, or compare with one. The others stand "
            "beside their kin: SGD, TorchAMSGrad, TorchNAdam, TorchRAdam and TorchAdaGrad."
        ),
    ),
    "sign": ("Steps by sign", "Every element moves by the same amount; only the direction is learned."),
    "gradient": (
        "Decay and clipping",
        "Rules for a `Chain`: they change the gradient, or the step, on its way.",
    ),
    "compose": ("Rules made of rules", "They join other rules, or decide whether and where these step."),
}
"""Title and introduction of a page; a family that is not listed gets its own name as the title."""

WHEN = {
    "Descent": (
        "For problems that are well scaled, and as the yardstick for everything else. It needs no memory."
    ),
    "Momentum": (
        "The usual choice for convolutional networks with a tuned schedule. It damps the zigzag of "
        "Descent in narrow valleys at the price of one array."
    ),
    "SGD": (
        "Where a run with torch.optim.SGD is to be gone on with, and wherever the rate follows a schedule: a "
        "new rate counts at once. Otherwise Momentum and Nesterov go the same way."
    ),
    "Nesterov": "Where Momentum overshoots: it brakes a little earlier. Otherwise the two are alike.",
    "RMSProp": (
        "For recurrent networks and reinforcement learning, where the size of gradients drifts. It never"
        " settles entirely while eta is constant."
    ),
    "Rprop": (
        "For full batches only: noise flips signs, and then its steps collapse. On small problems "
        "without noise it is hard to beat for so little tuning."
    ),
    "AdaGrad": (
        "For sparse gradients, such as those of embeddings. Its steps only shrink, so long runs stall."
    ),
    "TorchAdaGrad": (
        "Where a run with torch.optim.Adagrad is to be gone on with, or compared. Take AdaGrad otherwise."
    ),
    "AdaDelta": "Where no rate is known. It starts very slowly; a larger epsilon helps.",
    "Adam": "The safe first choice when little is known about the problem. With an L2 penalty take AdamW.",
    "AdamW": "The usual choice for transformers. Tune `lam` together with eta while `couple=True`.",
    "RAdam": "In place of Adam with warm-up: the first steps are damped by themselves.",
    "TorchRAdam": (
        "Where a run with torch.optim.RAdam is to be gone on with, or compared. Take RAdam otherwise."
    ),
    "AdaMax": (
        "Where single gradients are huge and rare: it is bounded by the largest one instead of the mean "
        "square. Seldom better than Adam elsewhere."
    ),
    "OAdam": "For games of two players, such as GANs, where Adam circles around the equilibrium.",
    "AMSGrad": (
        "Where Adam fails to converge because rare large gradients are forgotten. Mostly it behaves as "
        "Adam does and costs one more array."
    ),
    "TorchAMSGrad": (
        "Where AMSGrad is wanted with the first steps of Adam, as torch.optim.Adam(amsgrad=True) has it."
    ),
    "NAdam": "As Adam, a little quicker to turn. Worth a try where Nesterov beats Momentum.",
    "TorchNAdam": (
        "As NAdam, with a momentum that grows over the first thousands of steps, as torch.optim.NAdam has it."
    ),
    "AdaBelief": (
        "Where gradients are steady: it then takes longer steps than Adam. epsilon matters more than "
        "elsewhere."
    ),
    "Lion": (
        "For large batches and long runs; it needs one array of state where Adam needs two. Take a tenth"
        " to a third of the rate of AdamW, and a decay larger by as much."
    ),
    "WeightDecay": (
        "Before Descent or Momentum. Before Adam it is scaled away; take AdamW or DecoupledDecay there."
    ),
    "DecoupledDecay": (
        "Behind any rule that scales its gradient, to give it the decay of AdamW; with `couple=True` the "
        "decay follows the rate and its schedule, as `weight_decay` does in torch.optim.AdamW."
    ),
    "Maximise": "First in a chain, where the objective is to grow: rewards, likelihoods, one side of a game.",
    "TorchRMSProp": "Where a run with torch.optim.RMSprop and momentum is to be gone on with, or compared.",
    "TorchAdaMax": (
        "Where a run with torch.optim.Adamax is to be gone on with, or compared. Take AdaMax otherwise."
    ),
    "ASGD": (
        "Where noise keeps Descent from settling: the mean of many steps is nearer to the minimum than one "
        "of them."
    ),
    "SparseAdam": (
        "For embeddings with sparse gradients, where a step should cost only the rows that were used."
    ),
    "SignDecay": (
        "Where many parameters should be near zero. They jitter around zero by a step instead of staying"
        " on it."
    ),
    "ClipGrad": "Against single wild elements. It bends the direction of the gradient; ClipNorm does not.",
    "ClipNorm": (
        "Where layers should be limited one by one. For the usual clipping of a whole model take "
        "ClipGlobalNorm."
    ),
    "ClipGlobalNorm": (
        "The usual guard for recurrent networks and transformers: it keeps the direction of the whole "
        "gradient. It costs one more pass over the gradients."
    ),
    "AccumGrad": "Where the batch that you want does not fit into memory.",
    "EMA": (
        "To evaluate with smoother parameters than those that are trained, as is usual for image and "
        "diffusion models."
    ),
    "Chain": "Whenever one rule is not enough. The whole chain is still traced as one and fused.",
    "MixedPrecision": (
        "Whenever parameters are float16 or bfloat16: without it, small steps are rounded away."
    ),
    "SplitPrecision": "In the place of MixedPrecision for bfloat16, at half of its memory.",
    "SkipNonFinite": "Around the rule of any training in half precision, or where a rare batch overflows.",
}
"""When to use a rule, in a sentence or two."""

EXAMPLES: dict[str, Callable[[], opt.Rule]] = {
    "AccumGrad": lambda: opt.AccumGrad(4),
    "EMA": lambda: opt.EMA(opt.Momentum()),
    "Chain": lambda: opt.Chain(opt.ClipNorm(1.0), opt.WeightDecay(), opt.Momentum()),
    "MixedPrecision": lambda: opt.MixedPrecision(opt.Momentum()),
    "SplitPrecision": lambda: opt.SplitPrecision(opt.Momentum()),
    "SkipNonFinite": lambda: opt.SkipNonFinite(opt.Momentum()),
}
"""The rule whose formula is shown, where that made without arguments is not it."""

HALF = {"MixedPrecision": "float16", "SplitPrecision": "bfloat16"}
"""The element type of the parameters for which a rule is shown; all others are for float32."""

LETTERS = {
    "lam": r"\lambda",
    "lambd": r"\lambda",
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
    "size": "s",
    "step": r"\Delta",
}
"""Letters of the papers for names of settings, of state and of variables."""

OWN_LETTERS = {("Rprop", "g"): r"\tilde{g}"}
"""The same for single rules."""

GREEK = frozenset(
    ["alpha", "beta", "gamma", "delta", "epsilon", "eta", "ell", "kappa", "mu", "nu", "omega", "psi", "rho"]
).union(["sigma", "tau", "theta", "xi", "zeta"])


def family_of(cls: type[opt.Rule]) -> str:
    """The page of a rule: its module, or its package where that holds rules of rules."""
    package, _, module = cls.__module__.removeprefix("optimisers.").partition(".")
    return module if package == "rules" else package


def families() -> dict[str, list[type[opt.Rule]]]:
    """The public rules by page, in the order of their pages and modules."""
    public = [getattr(opt, name) for name in opt.__all__]
    rules = [c for c in public if isinstance(c, type) and issubclass(c, opt.Rule) and c is not opt.Rule]
    rules.sort(key=lambda c: (c.__module__, inspect.getsourcelines(c)[1]))
    names = [*FAMILIES, *sorted({family_of(c) for c in rules} - set(FAMILIES))]
    return {name: [c for c in rules if family_of(c) == name] for name in names}


def example(cls: type[opt.Rule]) -> opt.Rule:
    """The rule whose formula, state and costs are shown."""
    return EXAMPLES.get(cls.__name__, cls)()


# -- from a graph to equations -------------------------------------------------------------------------------

SUM, PRODUCT, POWER, ATOM = range(1, 5)
"""How tightly a printed formula holds together; 0 is looser than a sum: comparisons, cases."""

HANDED_ON = "g'_t"
"""What a rule of a chain gives the next one in place of the gradient."""

HANDS_ON = ("AccumGrad",)
"""Rules outside the family gradient whose answer is not meant as a step."""

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
    **{f"to_{kind}": rf"\operatorname{{{kind}}}" for kind in ("float16", "bfloat16", "float32")},
    "high_bits": r"\operatorname{high}",
    "low_bits": r"\operatorname{low}",
}
REDUCTIONS = {"sum": r"\sum", "max": r"\max", "min": r"\min"}
THROUGH = frozenset({"identity", "scheduled"})


def letter(name: str, owner: str = "") -> str:
    r"""`beta[0]` -> \beta_1."""
    base, _, index = name.partition("[")
    text = OWN_LETTERS.get((owner, base)) or LETTERS.get(base)
    if text is None:
        text = "\\" + base if base in GREEK else base if len(base) == 1 else rf"\mathit{{{base}}}"
    return text if not index else subscripted(text, str(int(index.rstrip("]").split("][")[0]) + 1))


def subscripted(text: str, *more: str) -> str:
    r"""A letter with more below it: (\beta_1, t) -> \beta_{1,t}."""
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
        self.slots = {s.name: letter(_short(s.path), self.owner) for s in program.slots}
        self.names: dict[int, str] = {}
        self.keys = Keys()
        self.variables: dict[int, str] = {}
        for name, e in variables:
            self.variables.setdefault(self.keys.of(e), name)
        self.counts_steps = [
            name == "t" and new.op == "add" and new.args[0] is not new.args[1] and _is(new.args[1], 1)
            for name, new in zip(shown(program), counted(program), strict=False)
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
        names = shown(self.program)
        return [letter(n, self.owner) for n in names]

    # -- choosing what gets an equation of its own --

    def equations(self) -> list[str]:
        """Every equation, each after those that it needs; conditions of `when` stand behind theirs."""
        program = self.program
        outputs: list[tuple[str, Expr]] = []
        for slot, new in zip(program.slots, program.new_slots, strict=True):
            outputs.append((subscripted(self.slots[slot.name], "t"), new))
        for i, new in enumerate(counted(program)):
            name = self.numbers[program.hypers + i]
            outputs.append(("t" if self.counts_steps[i] else subscripted(name, "t"), new))
        if program.new_x is not None:
            outputs.append(("x_t", program.new_x))
        checks = [c for c, _, _ in program.checks]
        bare = [(name, *self._bare(new)) for name, new in outputs]
        if self.hands_on:
            bare = [
                (HANDED_ON, e.args[1], g) if name == "x_t" and e.op == "subtract" else (name, e, g)
                for name, e, g in bare
            ]

        for name, e, _ in bare:
            if e.args and id(e) not in self.names:
                self.names[id(e)] = name
        roots = [*(part for _, e, guards in bare for part in (*guards, e)), *checks]
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
            least = 3 if e.type == "bool" else 2 if variable else 4
            shared = uses[id(e)] > 1 and weights[id(e)] >= least
            known = variable in LETTERS and weights[id(e)] >= 6
            if not hat and not shared and not known:
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
            above = self.text(a[1])
            return f"{self.text(a[0], ATOM)}^" + (above if len(above) == 1 else f"{{{above}}}"), POWER
        if e.op == "sqrt":
            return rf"\sqrt{{{self.text(a[0])}}}", ATOM
        if e.op in ("abs", "norm2"):
            inner = self.text(a[0])
            return bars(inner) if e.op == "abs" else rf"\lVert {inner} \rVert_2", ATOM
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
            return self._cases(e), 0
        if e.op == "total":
            return self._total(e)
        if e.op in REDUCTIONS and e.domain == "scalar":
            return f"{REDUCTIONS[e.op]} {self.text(a[0], PRODUCT)}", PRODUCT
        if e.op in ("floor", "ceil"):
            return rf"\l{e.op} {self.text(a[0])} \r{e.op}", ATOM
        name = FUNCTIONS.get(e.op, rf"\operatorname{{{e.op.replace('_', ' ')}}}")
        return f"{name}{parenthesised(', '.join(self.text(x) for x in a))}", ATOM

    def _total(self, e: Expr) -> tuple[str, int]:
        over = r"\sum_{\text{leaves}}"
        if dict(e.options)["join"] == "norm2":
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
        inner = r" \\ ".join(rows)
        return rf"\begin{{cases}} {inner} \end{{cases}}"

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
        if not _is(e, 1):
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
    x = parameters(rule) if x is None else x
    lines = Printer(rule, *traced(rule, x)).equations()
    return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"


# -- the rest of a section -----------------------------------------------------------------------------------


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


def hyper_parameters(rule: opt.Rule) -> str:
    rows: list[tuple[str, ...]] = []
    printed = Printer(rule, *traced(rule, parameters(rule)))
    signs = list(zip((path for path, _ in walk(rule)), printed.numbers, strict=False))
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
    for path, value in flatten(state):
        name, array = _short(path), hasattr(value, "shape")
        shape = (
            "that of x" if array and value.shape == x.shape else str(value.shape) if array else "one number"
        )
        where = "".join(f".{p}" if isinstance(p, str) else f"[{p}]" for p in path) or "."
        meaning = names.get(name.partition("[")[0], "")
        sign = letter(name, type(rule).__name__)
        dtype = str(value.dtype) if array else type(value).__name__
        meaning = linked(meaning)
        rows.append((f"`state{where}`", "" if name == "t" else f"${sign}$", shape, dtype, meaning))
    return table(("entry", "in the formula", "shape", "type", "what it is"), rows) if rows else "None."


def costs(rule: opt.Rule, x: Any) -> str:
    (group,) = opt.explain(opt.setup(rule, {"x": x})).groups
    passes = "one pass" if group.passes == 1 else f"{group.passes} passes"
    return (
        f"{group.state_bytes / x.size:g} bytes of state and {group.bytes_per_parameter} bytes moved per "
        f"parameter of {x.dtype}, in {passes} over memory."
    )


def linked(text: str) -> str:
    """A docstring with its papers as links; a star outside of code stays a star."""
    text = "`".join(re.sub(r"([*<])", r"\\\1", t) if i % 2 == 0 else t for i, t in enumerate(text.split("`")))
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def parameters(rule: opt.Rule) -> Any:
    """The array for which a rule is shown."""
    return np.zeros(ELEMENTS, HALF.get(type(rule).__name__, "float32"))


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
        hyper_parameters(rule),
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


def page(family: str, rules: list[type[opt.Rule]]) -> str:
    title, introduction = FAMILIES.get(family, (family.replace("_", " ").capitalize(), ""))
    note = (
        " $g'$ is what a rule of this page hands on to the rule behind it."
        if family == "gradient"
        else " $g'$ is what a rule hands on to the rule behind it."
        if any(c.__name__ in HANDS_ON for c in rules)
        else ""
    )
    text = "\n\n".join([f"# {title}", introduction, NOTATION + note, *map(section, rules)])
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    return {f"{family}.md": page(family, rules) for family, rules in families().items()}


# -- pictures ------------------------------------------------------------------------------------------------

START = (-1.2, 1.0)
VALLEY = 10.0
STEPS = 150


def loss(x: Any, y: Any) -> Any:
    """Rosenbrock's valley, not quite as steep as his; its minimum is at (1, 1)."""
    return (1 - x) ** 2 + VALLEY * (y - x * x) ** 2


def gradient(p: Any) -> Any:
    x, y = (float(v) for v in p)
    return np.array([-2 * (1 - x) - 4 * VALLEY * x * (y - x * x), 2 * VALLEY * (y - x * x)])


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a picture shows."""

    rule: opt.Rule
    other: opt.Rule | None = None
    """A second path, in grey, to compare with."""
    says: str = ""
    """What the second path is."""
    noise: float = 0.0
    dtype: str = "float64"
    spoilt: int = 0
    """Every how many steps a gradient is infinite."""
    average: bool = False
    """Whether the second path is the average that the rule keeps."""
    steps: int = STEPS


PLAIN = opt.Descent(0.01)
PATHS: dict[str, Drawn] = {
    "Descent": Drawn(opt.Descent(0.01)),
    "Momentum": Drawn(opt.Momentum(0.005, 0.9)),
    "Nesterov": Drawn(opt.Nesterov(0.005, 0.9)),
    "SGD": Drawn(opt.SGD(0.005, 0.9)),
    "TorchRMSProp": Drawn(opt.TorchRMSProp(0.005, 0.9)),
    "TorchAdaMax": Drawn(opt.TorchAdaMax(0.3)),
    "ASGD": Drawn(opt.ASGD(0.01, 1e-4)),
    "SparseAdam": Drawn(opt.SparseAdam(0.1)),
    "Maximise": Drawn(opt.Chain(opt.Maximise(), opt.Descent(0.0005)), PLAIN, "the way down", steps=60),
    "RMSProp": Drawn(opt.RMSProp(0.03)),
    "Rprop": Drawn(opt.Rprop(0.05)),
    "AdaGrad": Drawn(opt.AdaGrad(0.4)),
    "TorchAdaGrad": Drawn(opt.TorchAdaGrad(0.4)),
    "AdaDelta": Drawn(opt.AdaDelta(0.9, 1e-4), steps=300),
    "Adam": Drawn(opt.Adam(0.1)),
    "AdamW": Drawn(opt.AdamW(0.1, lam=0.3), opt.Adam(0.1), "Adam, without decay"),
    "RAdam": Drawn(opt.RAdam(0.015, (0.9, 0.99)), steps=300),
    "TorchRAdam": Drawn(opt.TorchRAdam(0.015, (0.9, 0.99)), steps=300),
    "AdaMax": Drawn(opt.AdaMax(0.3)),
    "OAdam": Drawn(opt.OAdam(0.05)),
    "AMSGrad": Drawn(opt.AMSGrad(0.1, (0.9, 0.99))),
    "TorchAMSGrad": Drawn(opt.TorchAMSGrad(0.1, (0.9, 0.99))),
    "NAdam": Drawn(opt.NAdam(0.1)),
    "TorchNAdam": Drawn(opt.TorchNAdam(0.1)),
    "AdaBelief": Drawn(opt.AdaBelief(0.1)),
    "Lion": Drawn(opt.Lion(0.03)),
    "WeightDecay": Drawn(opt.Chain(opt.WeightDecay(0.5), PLAIN), PLAIN, "without decay", steps=600),
    "DecoupledDecay": Drawn(
        opt.Chain(opt.Adam(0.1), opt.DecoupledDecay(0.02)), opt.Adam(0.1), "without decay"
    ),
    "SignDecay": Drawn(opt.Chain(opt.SignDecay(0.5), PLAIN), PLAIN, "without decay", steps=600),
    "ClipGrad": Drawn(opt.Chain(opt.ClipGrad(2.0), opt.Descent(0.03)), opt.Descent(0.03), "without clipping"),
    "ClipNorm": Drawn(opt.Chain(opt.ClipNorm(2.0), opt.Descent(0.03)), opt.Descent(0.03), "without clipping"),
    "ClipGlobalNorm": Drawn(
        opt.Chain(opt.ClipGlobalNorm(2.0), opt.Descent(0.03)), opt.Descent(0.03), "without clipping"
    ),
    "AccumGrad": Drawn(
        opt.Chain(opt.AccumGrad(8), opt.Descent(0.03)),
        opt.Descent(0.03),
        "every gradient by itself",
        noise=3.0,
        steps=400,
    ),
    "EMA": Drawn(opt.EMA(opt.RMSProp(0.1), 0.95), None, "the average", average=True),
    "Chain": Drawn(
        opt.Chain(opt.ClipNorm(2.0), opt.WeightDecay(0.1), opt.Momentum(0.02)),
        opt.Momentum(0.02),
        "Momentum alone",
    ),
    "MixedPrecision": Drawn(
        opt.MixedPrecision(opt.Descent(0.001)),
        opt.Descent(0.001),
        "without masters",
        dtype="float16",
        steps=4000,
    ),
    "SplitPrecision": Drawn(
        opt.SplitPrecision(opt.Descent(0.001)),
        opt.Descent(0.001),
        "without masters",
        dtype="bfloat16",
        steps=4000,
    ),
    "SkipNonFinite": Drawn(opt.SkipNonFinite(opt.Momentum(0.005)), spoilt=10),
}
"""The path of each rule, at a rate that shows its character; a rule that is not listed takes its defaults."""


def path_of(drawn: Drawn, rule: opt.Rule) -> tuple[Any, Any]:
    """(the points of a rule, those of its average), start included, until it is far outside."""
    rng = np.random.default_rng(0)
    p = np.array(START, drawn.dtype)
    state = opt.setup(rule, p, engine="interpret")
    points, averages = [np.array(p, float)], [np.array(p, float)]
    for i in range(drawn.steps):
        g = gradient(p) + drawn.noise * rng.standard_normal(2)
        if drawn.spoilt and i % drawn.spoilt == drawn.spoilt - 1:
            g[0] = np.inf
        state, p = opt.update(state, p, g.astype(drawn.dtype))
        points.append(np.array(p, float))
        if drawn.average:
            averages.append(np.array(opt.averaged(state, p), float))
        if not np.abs(p).max() < 10:
            break
    return np.array(points), np.array(averages)


def picture(cls: type[opt.Rule]) -> bytes:
    """The path of a rule, as a PNG of few colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    drawn = PATHS.get(cls.__name__) or Drawn(example(cls))
    points, averages = path_of(drawn, drawn.rule)
    figure = Figure(figsize=(5.2, 4.1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x, y = np.meshgrid(np.linspace(-1.8, 1.8, 181), np.linspace(-0.7, 2.1, 141))
    levels = np.geomspace(0.05, 120, 12)
    axes.contour(x, y, loss(x, y), levels, colors="#b9c4cf", linewidths=0.8)
    if drawn.other is not None or drawn.average:
        second = averages if drawn.average else path_of(drawn, drawn.other or drawn.rule)[0]
        colour = "#D55E00" if drawn.average else "#7a7a7a"
        axes.plot(
            *second.T, "-", color=colour, linewidth=1.0, label=drawn.says, zorder=4 if drawn.average else 2
        )
        axes.plot(*second[-1], "s", color=colour, markersize=6, zorder=5)
    many = len(points) > 1000
    hard = f", every {drawn.spoilt}th gradient infinite" if drawn.spoilt else ""
    hard = ", noisy gradients" if drawn.noise else hard
    axes.plot(*points.T, "-" if many else ".-", color="#0072B2", linewidth=1.3, markersize=4, zorder=3)
    axes.plot(*points[0], "o", color="black", markersize=7, label="start", zorder=6)
    axes.plot(
        *points[-1], "s", color="#0072B2", markersize=7, label=f"after {len(points) - 1} updates", zorder=6
    )
    axes.plot(1, 1, "*", color="#c03030", markersize=12, label="minimum", zorder=5)
    axes.set(
        xlim=(-1.8, 1.8),
        ylim=(-0.7, 2.1),
        xlabel="first parameter",
        ylabel="second parameter",
        aspect="equal",
    )
    axes.set_title(textwrap.fill(title_of(drawn.rule) + hard, 60), fontsize=9)
    axes.legend(loc="lower center", ncols=2, fontsize=8, framealpha=0.9)
    buffer, out = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    image = (
        Image.open(buffer).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    )
    image.save(out, format="png", optimize=True)
    return out.getvalue()


def title_of(rule: opt.Rule) -> str:
    """The rule as it is written, without what stands at its default."""
    if isinstance(rule, opt.Chain):
        return f"Chain({', '.join(map(title_of, rule.rules))})"
    said: list[str] = []
    for field in dataclasses.fields(rule):
        value, default = getattr(rule, field.name), getattr(type(rule), field.name, None)
        if isinstance(value, opt.Rule):
            said.append(title_of(value))
        elif value != default or field.name == "eta":
            said.append(f"{field.name}={value!r}")
    return f"{type(rule).__name__}({', '.join(said)})"


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (PAGES / name).write_text(text, encoding="utf-8")
    for rules in families().values():
        for cls in rules:
            (PICTURES / f"{cls.__name__}.png").write_bytes(picture(cls))


if __name__ == "__main__":
    main()
