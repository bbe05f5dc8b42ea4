"""Write the maths of an optimisation rule once, for one array; train any model with it, in one fused pass."""

from typing import TYPE_CHECKING, Any

from optimisers.arrays.registry import isnumeric, maywrite
from optimisers.averaged import averaged
from optimisers.compose.accumulate import AccumGrad
from optimisers.compose.average import EMA
from optimisers.compose.chain import Chain
from optimisers.compose.precision import MixedPrecision, SplitPrecision
from optimisers.compose.skip import SkipNonFinite
from optimisers.errors import (
    BadSetting,
    BadState,
    CacheRefused,
    DomainError,
    FloatParameter,
    NoMatch,
    NoParameters,
    OptimiserError,
    TraceError,
    TreeMismatch,
    UnknownField,
)
from optimisers.explain import explain, kernel
from optimisers.flat import Restructure, destructure, trainable, trainables
from optimisers.grads import gradients, value_and_grad
from optimisers.ops import (
    Becomes,
    abs2,
    add,
    arctan,
    call,
    ceil,
    check,
    clip,
    conj,
    copy,
    cos,
    divide,
    dot,
    ema,
    equal,
    exp,
    expm1,
    floor,
    full_like,
    greater,
    greater_equal,
    high_bits,
    imag,
    isfinite,
    isnan,
    join_bits,
    landing,
    less,
    less_equal,
    log,
    log1p,
    logical_and,
    logical_not,
    logical_or,
    low_bits,
    matmul,
    maximum,
    mean,
    minimum,
    multiply,
    negative,
    norm,
    not_equal,
    ones_like,
    power,
    real,
    real_zeros_like,
    reshape,
    sign,
    sin,
    sqrt,
    square,
    subtract,
    tanh,
    total,
    transpose,
    typed_zeros_like,
    under,
    when,
    where,
    zeros_like,
)
from optimisers.ops import (
    abs_ as abs,
)
from optimisers.ops import (
    max_ as max,
)
from optimisers.ops import (
    min_ as min,
)
from optimisers.ops import (
    sum_ as sum,
)
from optimisers.rule import Rule, static
from optimisers.rules.adam import AdaBelief, Adam, AdaMax, AdamW, AMSGrad, NAdam, OAdam, RAdam
from optimisers.rules.adaptive import AdaDelta, AdaGrad, RMSProp, Rprop
from optimisers.rules.descent import Descent, Momentum, Nesterov
from optimisers.rules.gradient import (
    ClipGlobalNorm,
    ClipGrad,
    ClipNorm,
    DecoupledDecay,
    SignDecay,
    WeightDecay,
)
from optimisers.rules.sign import Lion
from optimisers.schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    Join,
    Linear,
    OneCycle,
    Polynomial,
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
from optimisers.state.leaf import Branch, Leaf
from optimisers.step.update import setup, update, update_
from optimisers.tree.children import register
from optimisers.tree.path import KeyPath

if TYPE_CHECKING:
    from optimisers.jax.optax import as_optax, from_optax
    from optimisers.jax.pytree import vmap_axes
    from optimisers.torch.optimizer import TorchOptimizer

__version__ = "0.1.0"

_LATER = {
    "TorchOptimizer": "optimisers.torch.optimizer",
    "as_optax": "optimisers.jax.optax",
    "from_optax": "optimisers.jax.optax",
    "vmap_axes": "optimisers.jax.pytree",
}


def __getattr__(name: str) -> Any:
    """What needs another library is imported when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module 'optimisers' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)


__all__ = [
    "AMSGrad",
    "AccumGrad",
    "AdaBelief",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adam",
    "AdamW",
    "BadSetting",
    "BadState",
    "Becomes",
    "Branch",
    "CacheRefused",
    "Chain",
    "ClipGlobalNorm",
    "ClipGrad",
    "ClipNorm",
    "Constant",
    "Cosine",
    "DecoupledDecay",
    "Descent",
    "DomainError",
    "EMA",
    "Exponential",
    "FloatParameter",
    "InverseSqrt",
    "Join",
    "KeyPath",
    "Leaf",
    "Linear",
    "Lion",
    "MixedPrecision",
    "Momentum",
    "NAdam",
    "Nesterov",
    "NoMatch",
    "NoParameters",
    "OAdam",
    "OneCycle",
    "OptimiserError",
    "Polynomial",
    "RAdam",
    "RMSProp",
    "Restructure",
    "Rprop",
    "Rule",
    "Schedule",
    "SignDecay",
    "SkipNonFinite",
    "SplitPrecision",
    "Step",
    "TorchOptimizer",
    "TraceError",
    "TreeMismatch",
    "UnknownField",
    "WarmupStableDecay",
    "WeightDecay",
    "abs",
    "abs2",
    "add",
    "adjust",
    "adjust_",
    "arctan",
    "as_optax",
    "averaged",
    "call",
    "ceil",
    "check",
    "clip",
    "conj",
    "copy",
    "cos",
    "current",
    "destructure",
    "divide",
    "dot",
    "ema",
    "equal",
    "exp",
    "explain",
    "expm1",
    "floor",
    "freeze",
    "freeze_",
    "from_optax",
    "full_like",
    "gradients",
    "greater",
    "greater_equal",
    "high_bits",
    "hyperparameters",
    "imag",
    "isfinite",
    "isnan",
    "isnumeric",
    "join_bits",
    "kernel",
    "landing",
    "less",
    "less_equal",
    "log",
    "log1p",
    "logical_and",
    "logical_not",
    "logical_or",
    "low_bits",
    "matmul",
    "max",
    "maximum",
    "maywrite",
    "mean",
    "min",
    "minimum",
    "multiply",
    "negative",
    "norm",
    "not_equal",
    "ones_like",
    "power",
    "real",
    "real_zeros_like",
    "register",
    "reshape",
    "setup",
    "sign",
    "sin",
    "sqrt",
    "square",
    "static",
    "subtract",
    "sum",
    "tanh",
    "thaw",
    "thaw_",
    "total",
    "trainable",
    "trainables",
    "transpose",
    "typed_zeros_like",
    "under",
    "update",
    "update_",
    "value_and_grad",
    "vmap_axes",
    "when",
    "where",
    "with_hyperparameters",
    "zeros_like",
]
