"""Write the maths of an optimisation rule once, for one array; train any model with it, in one fused pass."""

from optimisers import ops as _ops
from optimisers.arrays.registry import isnumeric, maywrite
from optimisers.compose.accumulate import AccumGrad
from optimisers.compose.chain import Chain
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
from optimisers.leaf import Branch, Leaf, adjust, adjust_, freeze, freeze_, thaw, thaw_
from optimisers.rule import Rule, static
from optimisers.rules.adam import Adam, AdamW
from optimisers.rules.descent import Descent, Momentum, Nesterov
from optimisers.rules.gradient import ClipGlobalNorm, ClipGrad, ClipNorm, SignDecay, WeightDecay
from optimisers.tree.children import register
from optimisers.tree.path import KeyPath
from optimisers.update import setup, update, update_

globals().update(_ops.exported())
