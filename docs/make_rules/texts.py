"""What does a person say about the rules? Their families, when to use them, how they are shown."""

import inspect
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  it teaches NumPy bfloat16
import numpy as np

import optimisers as opt

ELEMENTS = 1000
"""The array by which memory is counted."""


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


HANDS_ON = ("AccumGrad",)
"""Rules outside the family gradient whose answer is not meant as a step."""


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


def parameters(rule: opt.Rule) -> Any:
    """The array for which a rule is shown."""
    return np.zeros(ELEMENTS, HALF.get(type(rule).__name__, "float32"))
