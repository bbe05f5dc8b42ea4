"""What is meant by a name that the root of this package does not have? One that moved, or one of another
library.
"""

import difflib
from collections.abc import Sequence
from typing import Any

from optimisers import ops
from optimisers.errors import deprecated
from optimisers.spellings import NOT_HERE

CLOCK = "a function of the clock, such as lambda t: 0.1 / (1 + t)"

WHOLE = 'opt.setup({opt.hidden_matrices: opt.Muon(0.02), "**": opt.AdamW(3e-4)}, model)'

ELSEWHERE = {
    # torch
    "AveragedModel": "opt.averaged(state, model) of a state of opt.EMA(rule)",
    "ChainedScheduler": CLOCK,
    "ConstantLR": "opt.Constant, or opt.Step",
    "CosineAnnealingLR": "opt.Cosine",
    "CosineAnnealingWarmRestarts": "opt.Cosine(..., cycles=...)",
    "CyclicLR": CLOCK,
    "ExponentialLR": "opt.Exponential",
    "LambdaLR": CLOCK,
    "LinearLR": "opt.Linear",
    "MultiStepLR": "opt.Step",
    "MultiplicativeLR": CLOCK,
    "OneCycleLR": "opt.OneCycle",
    "Optimizer": "opt.TorchOptimizer, or opt.setup and opt.update",
    "PolynomialLR": "opt.Polynomial",
    "ReduceLROnPlateau": "opt.adjust(state, eta), or torch's class on an opt.TorchOptimizer",
    "SequentialLR": "opt.Join",
    "StepLR": "opt.Exponential(..., staircase=True)",
    "clip_grad_norm": "opt.Chain(opt.ClipGlobalNorm(), rule)",
    "clip_grad_norm_": "opt.Chain(opt.ClipGlobalNorm(), rule)",
    "clip_grad_value_": "opt.Chain(opt.ClipGrad(), rule)",
    "no_grad": "opt.update_, which writes past autograd",
    "step": "opt.update(state, model, grads)",
    "update_bn": "torch.optim.swa_utils.update_bn inside `with opt.averaged_(optimizer, module)`",
    "zero_grad": "opt.update(state, model, grads): gradients are arguments",
    # Optax
    "MultiSteps": "opt.AccumGrad",
    "add_decayed_weights": "opt.DecoupledDecay behind a rule, or opt.WeightDecay before it",
    "apply_if_finite": "opt.SkipNonFinite",
    "apply_updates": "opt.update(state, model, grads), which gives the new model",
    "clip_by_block_rms": "opt.ClipNorm",
    "clip_by_global_norm": "opt.ClipGlobalNorm",
    "constant_schedule": "opt.Constant",
    "cosine_decay_schedule": "opt.Cosine",
    "cosine_onecycle_schedule": "opt.OneCycle",
    "exponential_decay": "opt.Exponential",
    "init": "opt.setup(rule, model)",
    "inject_hyperparams": "opt.adjust(state, eta=...): every number may change",
    "join_schedules": "opt.Join",
    "linear_schedule": "opt.Linear",
    "masked": 'opt.setup({"**.bias": None, "**": rule}, model)',
    "multi_transform": 'opt.setup({"**.bias": one, "**": other}, model)',
    "optimistic_adam": "opt.OAdam",
    "partition": 'opt.setup({"**.bias": one, "**": other}, model)',
    "piecewise_constant_schedule": "opt.Step",
    "polynomial_schedule": "opt.Polynomial",
    "set_to_zero": "opt.freeze(state)",
    "sgdr_schedule": "opt.Cosine(..., cycles=...)",
    "skip_not_finite": "opt.SkipNonFinite",
    "warmup_constant_schedule": "opt.Join of opt.Linear and opt.Constant",
    "warmup_cosine_decay_schedule": "opt.Cosine(..., warmup=...)",
    # packages of one rule
    "MuonWithAuxAdam": WHOLE,
    "SingleDeviceMuon": "opt.Muon",
    "SingleDeviceMuonWithAuxAdam": WHOLE,
    "SingleDeviceNorMuon": "opt.NorMuon",
    "ScionLight": "opt.Scion",
    "DistributedShampoo": "opt.Shampoo",
    "ForeachSOAP": "opt.SOAP",
    "GaLoreAdamW": "opt.GaLore",
    "PSGDKron": "opt.Kron",
    # Optimisers.jl
    "OptimiserChain": "opt.Chain",
}
"""Names of torch, Optax, Optimisers.jl and others whose own name does not lead to ours -> what to write."""


def meant(name: str, known: Sequence[str]) -> Any:
    """The operation that once had this name in the root, with a DeprecationWarning.

    Raises AttributeError for every other name, with what is written in its place, as far as known.
    """
    if name not in ops.__all__:
        raise AttributeError(f"module 'optimisers' has no attribute {name!r}{_instead(name, known)}")
    deprecated(f"opt.{name} has moved; write opt.ops.{name}", since="0.2.0", depth=3)
    return getattr(ops, name)


def _instead(name: str, known: Sequence[str]) -> str:
    """What to write in place of a name, a semicolon before it; empty if nothing is alike."""
    asked = _plain(name)
    meant = {_plain(n): write for n, write in ELSEWHERE.items()}
    if asked in meant:
        return f"; write {meant[asked]}"
    if asked in NOT_HERE:
        return f": {NOT_HERE[asked]}"
    plain = {_plain(n): n for n in reversed(known)}
    alike = [n for n in (asked, f"torch{asked}") if n in plain]
    alike += difflib.get_close_matches(asked, plain, n=1, cutoff=0.8)
    return f"; write opt.{plain[alike[0]]}" if alike else ""


def _plain(name: str) -> str:
    """A name without its case and underscores: `rmsprop` of RMSProp."""
    return name.lower().replace("_", "")
