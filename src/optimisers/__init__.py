"""Write the maths of an optimisation rule once, for one array; train any model with it, in one fused pass."""

from typing import TYPE_CHECKING, Any

from optimisers import ops
from optimisers.arrays.registry import (
    Backend,
    isnumeric,
    load_public,
    maywrite,
    public_names,
    register_backend,
)
from optimisers.averaged import averaged, averaged_
from optimisers.checkpoint.folder import Checkpoints, Resumed
from optimisers.checkpoint.layouts import from_flax, from_torch
from optimisers.checkpoint.save import (
    Saved,
    arrays,
    from_arrays,
    load,
    load_state_dict,
    save,
    saved,
    state_dict,
)
from optimisers.compose.accumulate import AccumGrad
from optimisers.compose.average import EMA
from optimisers.compose.cautious import Cautious
from optimisers.compose.chain import Chain
from optimisers.compose.free import GPA, SWA, Lookahead, ScheduleFree
from optimisers.compose.mechanic import Mechanic
from optimisers.compose.precision import MixedPrecision, SplitPrecision
from optimisers.compose.skip import SkipNonFinite
from optimisers.engines.cpu.limits import get_num_threads, set_num_threads
from optimisers.errors import (
    BadFile,
    BadSetting,
    BadState,
    CacheRefused,
    DomainError,
    FloatParameter,
    NoMatch,
    NoParameters,
    OptimiserError,
    ProcessLost,
    TraceError,
    TreeMismatch,
    UnknownField,
)
from optimisers.estimate import estimate
from optimisers.explain import explain, kernel
from optimisers.flat import Restructure, destructure, trainable, trainables
from optimisers.grads import gradients, hutchinson, value_and_grad
from optimisers.names import meant
from optimisers.ops import abs2, copy, ema, maximum, minimum, norm, sign, sqrt, total, when, where, zeros_like
from optimisers.race import Race, race
from optimisers.rule import Pair, Rule, Setting, setting, static
from optimisers.rules.adam import (
    AdaBelief,
    Adam,
    AdaMax,
    AdamW,
    AMSGrad,
    NAdam,
    OAdam,
    RAdam,
    TorchAMSGrad,
    TorchNAdam,
    TorchRAdam,
)
from optimisers.rules.adaptive import AdaDelta, AdaGrad, RMSProp, Rprop, TorchAdaGrad
from optimisers.rules.curvature import AdaHessian, Sophia, SophiaG
from optimisers.rules.decay import CautiousDecay, CorrectedDecay
from optimisers.rules.descent import SGD, Descent, Momentum, Nesterov
from optimisers.rules.direction import (
    AdaptiveClip,
    Centralize,
    ClipRMS,
    GrokFast,
    NormalizeGrad,
    NormGrowthCap,
    OrthoGrad,
    ZClip,
    ZeroNonFinite,
)
from optimisers.rules.factored import CAME, SM3, Adafactor, AdamMini, TorchAdafactor
from optimisers.rules.gradient import (
    ClipGlobalNorm,
    ClipGrad,
    ClipNorm,
    DecoupledDecay,
    Maximise,
    SignDecay,
    WeightDecay,
)
from optimisers.rules.kron import Kron
from optimisers.rules.losses import MoMo, MoMoAdam, PolyakSPS
from optimisers.rules.lowrank import Dion, GaLore
from optimisers.rules.matrix import AdaMuon, Muon, NorMuon, PolarGrad, Scion
from optimisers.rules.momenta import ADOPT, QHM, Adan, AdEMAMix, LaProp, NAdamW, QHAdam, SimplifiedAdEMAMix
from optimisers.rules.noise import SGLD, AddNoise, PrivateAggregate
from optimisers.rules.of_torch import ASGD, SparseAdam, TorchAdaMax, TorchRMSProp
from optimisers.rules.preconditioned import SOAP, Shampoo, SPlus
from optimisers.rules.projected import SGDP, AdamP
from optimisers.rules.rateless import DAdaptAdam, DAdaptLion, DAdaptSGD, DoG, DoWG, LDoG, Prodigy
from optimisers.rules.scaled import FTRL, MADGRAD, AdamAtan2, StableAdamW, Yogi
from optimisers.rules.sign import Grams, Lion, SignDescent, Signum
from optimisers.rules.sketched import APOLLO
from optimisers.rules.trust import LAMB, LARS, NovoGrad
from optimisers.rules.variance import MARS, MARSLion
from optimisers.schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    Join,
    Linear,
    OneCycle,
    Polynomial,
    Scaled,
    Schedule,
    Step,
    WarmupStableDecay,
)
from optimisers.state.edit import (
    adjust,
    adjust_,
    current,
    freeze,
    freeze_,
    hyperparameters,
    thaw,
    thaw_,
    with_hyperparameters,
)
from optimisers.state.leaf import Branch, Leaf, State
from optimisers.step.layers import layer_decay
from optimisers.step.update import setup, update, update_
from optimisers.tree.children import register
from optimisers.tree.path import KeyPath
from optimisers.tree.selectors import Selector, by_path, by_type, hidden_matrices, matrices, vectors

if TYPE_CHECKING:
    from optimisers.jax.optax import as_optax as as_optax
    from optimisers.jax.optax import from_optax as from_optax
    from optimisers.jax.optax_states import from_optax_state as from_optax_state
    from optimisers.jax.optax_states import to_optax_state as to_optax_state
    from optimisers.jax.pytree import vmap_axes as vmap_axes
    from optimisers.keras.optimizer import KerasOptimizer as KerasOptimizer
    from optimisers.torch.classes import from_torch_class as from_torch_class
    from optimisers.torch.in_backward import step_in_backward as step_in_backward
    from optimisers.torch.optimizer import TorchOptimizer as TorchOptimizer
    from optimisers.torch.to_torch import to_torch_state as to_torch_state
    from optimisers.trainers import lightning_callback as lightning_callback
    from optimisers.trainers import trainer_callback as trainer_callback

__version__ = "0.2.0"


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What needs another library is imported when it is first asked for; a star import leaves it out."""
        return load_public(name) if name in public_names() else meant(name, __dir__())


def __dir__() -> list[str]:
    return sorted([*__all__, *public_names()])


__all__ = [
    "ADOPT",
    "AMSGrad",
    "APOLLO",
    "ASGD",
    "AccumGrad",
    "AdEMAMix",
    "AdaBelief",
    "AdaDelta",
    "AdaGrad",
    "AdaHessian",
    "AdaMax",
    "AdaMuon",
    "Adafactor",
    "Adam",
    "AdamAtan2",
    "AdamMini",
    "AdamP",
    "AdamW",
    "Adan",
    "AdaptiveClip",
    "AddNoise",
    "Backend",
    "BadFile",
    "BadSetting",
    "BadState",
    "Branch",
    "CAME",
    "CacheRefused",
    "Cautious",
    "CautiousDecay",
    "Centralize",
    "Chain",
    "Checkpoints",
    "ClipGlobalNorm",
    "ClipGrad",
    "ClipNorm",
    "ClipRMS",
    "Constant",
    "CorrectedDecay",
    "Cosine",
    "DAdaptAdam",
    "DAdaptLion",
    "DAdaptSGD",
    "DecoupledDecay",
    "Descent",
    "Dion",
    "DoG",
    "DoWG",
    "DomainError",
    "EMA",
    "Exponential",
    "FTRL",
    "FloatParameter",
    "GPA",
    "GaLore",
    "Grams",
    "GrokFast",
    "InverseSqrt",
    "Join",
    "KeyPath",
    "Kron",
    "LAMB",
    "LARS",
    "LDoG",
    "LaProp",
    "Leaf",
    "Linear",
    "Lion",
    "Lookahead",
    "MADGRAD",
    "MARS",
    "MARSLion",
    "Maximise",
    "Mechanic",
    "MixedPrecision",
    "MoMo",
    "MoMoAdam",
    "Momentum",
    "Muon",
    "NAdam",
    "NAdamW",
    "Nesterov",
    "NoMatch",
    "NoParameters",
    "NorMuon",
    "NormGrowthCap",
    "NormalizeGrad",
    "NovoGrad",
    "OAdam",
    "OneCycle",
    "OptimiserError",
    "OrthoGrad",
    "Pair",
    "PolarGrad",
    "PolyakSPS",
    "Polynomial",
    "PrivateAggregate",
    "ProcessLost",
    "Prodigy",
    "QHAdam",
    "QHM",
    "RAdam",
    "RMSProp",
    "Race",
    "Restructure",
    "Resumed",
    "Rprop",
    "Rule",
    "SGD",
    "SGDP",
    "SGLD",
    "SM3",
    "SOAP",
    "SPlus",
    "SWA",
    "Saved",
    "Scaled",
    "Schedule",
    "ScheduleFree",
    "Scion",
    "Selector",
    "Setting",
    "Shampoo",
    "SignDecay",
    "SignDescent",
    "Signum",
    "SimplifiedAdEMAMix",
    "SkipNonFinite",
    "Sophia",
    "SophiaG",
    "SparseAdam",
    "SplitPrecision",
    "StableAdamW",
    "State",
    "Step",
    "TorchAMSGrad",
    "TorchAdaGrad",
    "TorchAdaMax",
    "TorchAdafactor",
    "TorchNAdam",
    "TorchRAdam",
    "TorchRMSProp",
    "TraceError",
    "TreeMismatch",
    "UnknownField",
    "WarmupStableDecay",
    "WeightDecay",
    "Yogi",
    "ZClip",
    "ZeroNonFinite",
    "abs2",
    "adjust",
    "adjust_",
    "arrays",
    "averaged",
    "averaged_",
    "by_path",
    "by_type",
    "copy",
    "current",
    "destructure",
    "ema",
    "estimate",
    "explain",
    "freeze",
    "freeze_",
    "from_arrays",
    "from_flax",
    "from_torch",
    "get_num_threads",
    "gradients",
    "hidden_matrices",
    "hutchinson",
    "hyperparameters",
    "isnumeric",
    "kernel",
    "layer_decay",
    "load",
    "load_state_dict",
    "matrices",
    "maximum",
    "maywrite",
    "minimum",
    "norm",
    "ops",
    "race",
    "register",
    "register_backend",
    "save",
    "saved",
    "set_num_threads",
    "setting",
    "setup",
    "sign",
    "sqrt",
    "state_dict",
    "static",
    "thaw",
    "thaw_",
    "total",
    "trainable",
    "trainables",
    "update",
    "update_",
    "value_and_grad",
    "vectors",
    "when",
    "where",
    "with_hyperparameters",
    "zeros_like",
]
