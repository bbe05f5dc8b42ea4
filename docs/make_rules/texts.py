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
    "matrix": (
        "Steps by matrices",
        (
            "An array of two axes is a matrix, whose step is made orthogonal. On a whole model: "
            '`opt.setup({opt.hidden_matrices: opt.Muon(0.02), "**": opt.AdamW(3e-4)}, model)`.'
        ),
    ),
    "preconditioned": (
        "Steps in eigenvectors",
        (
            "The correlations of gradients along each axis are learned, and steps are taken in their "
            "eigenvectors, which are renewed now and then."
        ),
    ),
    "kron": (
        "Fitted preconditioners",
        "The correlations of gradients along each axis are fitted step by step, without eigenvectors.",
    ),
    "lowrank": ("Steps of low rank", "A matrix is stepped in its strongest directions alone, for memory."),
    "factored": (
        "Little memory",
        "Second moments are kept for rows and columns, for axes or for blocks, not for every element.",
    ),
    "sketched": (
        "Random directions",
        "What a rule learns of a matrix, it learns of its projection on a few random directions.",
    ),
    "momenta": (
        "Other momenta",
        "Adam's frame, with a momentum that looks ahead, remembers longer, or comes after the scaling.",
    ),
    "scaled": (
        "Other scalings",
        "Each element has a step size of its own, found in another way than Adam's quotient.",
    ),
    "trust": ("Trust ratios", "The length of a step follows from the norm of its array, for large batches."),
    "variance": ("Less variance", "The gradient is corrected by how it changed since the step before."),
    "rateless": (
        "Without a rate",
        "The size of the steps is found from how far the parameters have come; eta stays 1.",
    ),
    "direction": (
        "Gradients on their way",
        "Rules for the front of a `Chain`: they change the gradient by its units, norms and history.",
    ),
    "projected": ("Projected steps", "For weights before a normalisation, whose scale does not matter."),
    "losses": (
        "Steps by the loss",
        "The length of a step follows from how far the loss is above the best that there can be.",
    ),
    "curvature": (
        "Diagonal curvature",
        (
            "Steps scaled by estimates of the second derivative, which come as second gradients: "
            "`opt.hutchinson(loss, model, seed)` makes them for PyTorch and JAX."
        ),
    ),
    "noise": (
        "Noise",
        "Steps with random numbers, which follow from a seed: to explore, to sample, to keep data private.",
    ),
    "decay": ("Decay beside the step", "Rules for the place behind the one that steps; they take its rate."),
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
    "MoMo": "Where a rate is known to be good but not how good: eta may be several times too large.",
    "MoMoAdam": "The same for Adam. Most losses are never negative: leave `lower` at 0.",
    "PolyakSPS": (
        "For problems that can be fitted exactly, whose best loss is known. It needs no rate at all; `most` "
        "guards against the first steps."
    ),
    "NAdamW": (
        "In place of AdamW where there is time to tune nothing: the baseline of AlgoPerf, and among the "
        "best element-wise rules at equal tuning."
    ),
    "Adan": (
        "For vision transformers and diffusion models, with rates several times those of AdamW. It costs "
        "two more arrays."
    ),
    "ADOPT": (
        "Where Adam diverges unless beta[1] is tuned: it converges with any. Otherwise it is close to AdamW."
    ),
    "AdEMAMix": (
        "For long runs, where old gradients still help: at many steps per parameter it leads the element- "
        "wise rules. Set `warmup` to the length of the run."
    ),
    "SimplifiedAdEMAMix": "As AdEMAMix with one momentum fewer, for small batches and large beta[0].",
    "LaProp": (
        "Where Adam's beta[0] and beta[1] must be tuned against each other, as in reinforcement learning "
        "and GANs: here they are independent."
    ),
    "QHM": "Where Momentum with a large rho is too slow to turn: a part of each gradient counts at once.",
    "QHAdam": "The same for Adam. nu of 1 is Adam, 0 is RMSProp.",
    "StableAdamW": (
        "For large models at low precision, in place of AdamW with clipping of gradients: spikes of the "
        "loss are damped array by array."
    ),
    "Yogi": (
        "Where Adam's mean square rises too fast for rare large gradients. Take a larger epsilon and rate "
        "than Adam's."
    ),
    "AdamAtan2": "In place of AdamW where no epsilon is wanted: it steps alike at any scale of the loss.",
    "MADGRAD": (
        "For sparse problems and where AdaGrad shines but generalises badly. Take a smaller decay than "
        "for other rules."
    ),
    "FTRL": (
        "For linear models with many sparse features, whose weights should be exactly 0 where they do not "
        "help."
    ),
    "LARS": (
        "For convolutional networks at batches of thousands. Leave biases and normalisations to Momentum."
    ),
    "Muon": (
        "For the hidden matrices of transformers and the kernels of convolutions; embeddings, heads, biases "
        "and scales go to AdamW, by a dict of selectors. Half of Adam's state. With the rate and decay of "
        'AdamW write `scale="rms"`; for Flax `layout="columns"`, since it keeps weights as (in, out).'
    ),
    "NorMuon": (
        "In place of Muon, at its rate, where some outputs of a layer learn much faster than others: for one "
        "number more an output every one of them steps alike."
    ),
    "AdaMuon": (
        "In place of Muon with the rate and decay of AdamW, where one array more is no matter. Try Muon with "
        '`scale="rms"` first.'
    ),
    "Scion": (
        "For a whole model with one rate, which carries over from narrow models to wide ones: hidden layers "
        'by `Scion(rho=50)`, heads by `Scion(rho=3000, norm="sign")`. Half of Adam\'s state.'
    ),
    "APOLLO": (
        "For language models, at ten times the rate of AdamW, where the state must be small and a factored "
        "one is too rough: `rank=256` up to a billion parameters, or one number a matrix by "
        '`APOLLO(rank=1, scale=128.0, per="array")`. Embeddings, heads and vectors go to AdamW.'
    ),
    "PolarGrad": (
        "In place of Muon where steps are to fall with the gradient, without a schedule. The exact factor is "
        'dear on GPUs: write `coefficients="polar_express"` there.'
    ),
    "SOAP": (
        "In place of AdamW, at its rate or three times that, where steps are dear and memory is not: two "
        "matrices more for each axis. The best at much data in comparisons at equal tuning."
    ),
    "Shampoo": (
        "For large runs whose rate is tuned for Adam, which gives the length of its steps. Renew the roots "
        "less often (`every=100`) where they cost too much."
    ),
    "SPlus": (
        "As Shampoo, with eigenvectors that may be old and steps that cannot explode. Evaluate what "
        "`averaged` gives."
    ),
    "Kron": (
        "In place of AdamW, at a third of its rate, where memory for two matrices is there but no time for "
        "eigenvectors."
    ),
    "GaLore": (
        "To train large models where the state of Adam does not fit, at its rate: the moments are those of "
        "`rank` directions. Give embeddings and vectors to AdamW."
    ),
    "Dion": (
        "In place of Muon for matrices that are spread over devices: a few columns stand for each. Take a "
        "rank of a quarter of the shorter side or more."
    ),
    "Adafactor": (
        "Where the state of Adam does not fit: it keeps a row and a column for each matrix. With a rate and "
        "a schedule of your own write `relative=False, scaled=False`; with Adam's rates also `rho=0.9`."
    ),
    "TorchAdafactor": (
        "Where a run with torch.optim.Adafactor is to be gone on with, or compared. Take Adafactor otherwise."
    ),
    "CAME": (
        "In place of AdamW for large models, at half of its memory: as Adafactor with momentum, and "
        "steadier. Take the rate of AdamW or less."
    ),
    "SM3": (
        "For large embeddings and sparse gradients, where AdaGrad is good and its memory is not there. Warm "
        "the rate up."
    ),
    "AdamMini": (
        "In place of AdamW, at its rate, for half of its memory. Choose blocks by a dict of globs: the heads "
        'of query and key by their number, `"rows"` for value, output, embedding and head.'
    ),
    "LAMB": "For transformers at batches of thousands. At ordinary batches AdamW is as good.",
    "NovoGrad": (
        "For speech and language models where Adam's second moment is too much memory: it keeps one "
        "number for each array."
    ),
    "SignDescent": "For large batches with no memory at all, and as what Lion and Signum are made of.",
    "Signum": (
        "Where Adam's memory is too much: half of it, with a tenth of its rate. With decay behind it: Tiger."
    ),
    "Grams": "In place of AdamW where the momentum turns too late: only the size of the step comes from it.",
    "MARS": (
        "For language models in place of AdamW, at the price of one more array; among the best element- "
        "wise rules at equal tuning. Give vectors to AdamW."
    ),
    "MARSLion": "As MARS, with the memory of Momentum and one more array.",
    "Prodigy": (
        "For fine-tuning (LoRA, diffusion), where nobody wants to look for a rate. Leave eta at 1; use a "
        "cosine schedule without restarts; set `d0` to 1e-5 or more if d does not rise."
    ),
    "DAdaptAdam": "The forerunner of Prodigy, more careful: take that one first.",
    "DAdaptSGD": "The same for descent with momentum.",
    "DAdaptLion": "The same for Lion.",
    "DoG": "For fine-tuning without a rate, evaluated with averages: EMA(DoG()).",
    "LDoG": (
        "As DoG, for models whose arrays need very different steps, such as transformers trained from "
        "scratch."
    ),
    "DoWG": "As DoG, bolder: it forgets the first gradients.",
    "AdaptiveClip": "For networks without normalisation (NFNets) at large batches. Not for the last layer.",
    "Centralize": (
        "Before any rule in convolutional networks; cheap, and seldom harmful. With RAdam and Lookahead: "
        "Ranger."
    ),
    "ZeroNonFinite": (
        "Where single elements of a gradient overflow and the rest is worth stepping. To leave out the "
        "whole step take SkipNonFinite."
    ),
    "ClipRMS": "Where arrays should be limited one by one, whatever their size.",
    "NormalizeGrad": (
        "Where only the direction of the whole gradient should count, as in adversarial training."
    ),
    "NormGrowthCap": "Against single spikes, array by array, without a norm to choose.",
    "GrokFast": "On small algorithmic tasks, to generalise long before plain training does.",
    "OrthoGrad": "Where the loss is at 0 and the logits only grow. Otherwise leave it out.",
    "ZClip": (
        "In place of ClipGlobalNorm in long runs, where the usual norm drifts: only outliers are clipped."
    ),
    "AdamP": (
        "For networks with normalisations, in place of AdamW, where the weights grow along with the training."
    ),
    "SGDP": "The same for descent with momentum.",
    "Sophia": (
        "Where estimates of the curvature are cheap. At equal tuning it did not beat AdamW on language "
        "models."
    ),
    "SophiaG": "As Sophia, with the authors' estimate from sampled labels.",
    "AdaHessian": "For small models, where a Hessian product at every step can be paid.",
    "AddNoise": (
        "For deep networks that start badly: some noise at first, less later. With good initialisations "
        "and normalisations it seldom helps."
    ),
    "SGLD": (
        "To sample from a posterior, not to find its peak: keep parameters now and then, after the walk has "
        "settled. The loss is the sum over all data, or its estimate from a batch."
    ),
    "PrivateAggregate": (
        "For training with differential privacy, in front of Descent, Momentum or Adam. The gradients of "
        "all examples of a step are in memory at once. Behind it `AccumGrad(k)` takes the mean of k such "
        "batches, each with noise of its own."
    ),
    "CautiousDecay": "In place of DecoupledDecay behind Adam, Lion or Momentum; no further tuning.",
    "CorrectedDecay": (
        "For layers that a normalisation follows, under a schedule whose rate falls: gradients then do "
        "not grow at the end."
    ),
    "Cautious": "Around Adam, Lion or Momentum: one line, no setting. It costs one more pass.",
    "ScheduleFree": (
        "Where the length of the run is not known: no schedule, and the average is as good as the end of "
        "one. Evaluate and save what `averaged` gives."
    ),
    "GPA": "As ScheduleFree with two constants, for runs with a schedule of their own.",
    "Lookahead": "Around a rule with a large rate, to damp it.",
    "SWA": (
        "For the last part of a run at a constant rate: the mean is flatter than its end. Recompute the "
        "statistics of BatchNorm for it."
    ),
    "Mechanic": "Around a rule whose schedule is known but not its scale.",
}
"""When to use a rule, in a sentence or two."""

EXAMPLES: dict[str, Callable[[], opt.Rule]] = {
    "AccumGrad": lambda: opt.AccumGrad(4),
    "EMA": lambda: opt.EMA(opt.Momentum()),
    "Muon": lambda: opt.Muon(steps=1),
    "NorMuon": lambda: opt.NorMuon(steps=1),
    "AdaMuon": lambda: opt.AdaMuon(steps=1),
    "Scion": lambda: opt.Scion(steps=1),
    "APOLLO": lambda: opt.APOLLO(rank=4),
    "Chain": lambda: opt.Chain(opt.ClipNorm(1.0), opt.WeightDecay(), opt.Momentum()),
    "MixedPrecision": lambda: opt.MixedPrecision(opt.Momentum()),
    "SplitPrecision": lambda: opt.SplitPrecision(opt.Momentum()),
    "SkipNonFinite": lambda: opt.SkipNonFinite(opt.Momentum()),
    "Cautious": lambda: opt.Cautious(opt.Momentum()),
    "CautiousDecay": lambda: opt.Chain(opt.Descent(), opt.CautiousDecay()),
    "CorrectedDecay": lambda: opt.Chain(opt.Descent(), opt.CorrectedDecay()),
    "ScheduleFree": lambda: opt.ScheduleFree(opt.Descent()),
    "GPA": lambda: opt.GPA(opt.Descent()),
    "Lookahead": lambda: opt.Lookahead(opt.Descent()),
    "SWA": lambda: opt.SWA(opt.Descent()),
    "Mechanic": lambda: opt.Mechanic(opt.Descent(), betas=1),
}
"""The rule whose formula is shown, where that made without arguments is not it."""

HALF = {"MixedPrecision": "float16", "SplitPrecision": "bfloat16"}
"""The element type of the parameters for which a rule is shown; all others are for float32."""


BEFORE = {"PrivateAggregate": r"g_t &= \sum_{i=1}^{n} \min(1, \omega / \|g_{t,i}\|) \, g_{t,i}"}
"""What is done to gradients before a rule is given them."""

HANDS_ON = ("AccumGrad", "AddNoise", "PrivateAggregate")
"""Rules outside the family gradient whose answer is not meant as a step."""


OF_MATRICES = ("matrix", "factored", "sketched", "preconditioned", "kron", "lowrank")
"""Families that are shown for a matrix."""


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
    shape = (20, ELEMENTS // 20) if family_of(type(rule)) in OF_MATRICES else (ELEMENTS,)
    return np.zeros(shape, HALF.get(type(rule).__name__, "float32"))
