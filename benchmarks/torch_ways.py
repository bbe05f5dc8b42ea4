"""The models of the benchmark on CPU tensors, and our ways to step them."""

from typing import Any

import torch

import optimisers as opt
from benchmarks import shapes
from benchmarks.torch_peers import (
    BETA,
    EPSILON,
    ETA,
    LAM,
    NORM,
    RHO,
    Build,
    Step,
)


class Layer(torch.nn.Module):
    """One weight, as layers have them."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


def model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A module with a layer for every array, and gradients: all in [0, 0.01), far from subnormal numbers."""
    weights, grads = (shapes.arrays(name, seed).values() for seed in (1, 2))
    module = torch.nn.ModuleList(Layer(torch.from_numpy(w).to(dtype)) for w in weights)
    for p, g in zip(module.parameters(), grads, strict=True):
        p.grad = torch.from_numpy(g).to(dtype)
    return module


class DecayDescent(opt.Rule):
    """The rule of the README: descent whose rate falls with the square root of the step."""

    eta: float = 0.1

    def init(self, x: Any) -> Any:
        return 1

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state + 1, (self.eta / opt.sqrt(state)) * dx


def adamw() -> opt.Rule:
    return opt.AdamW(eta=ETA, beta=BETA, lam=LAM, epsilon=EPSILON)


def recipe() -> opt.Rule:
    return opt.EMA(opt.Chain(opt.ClipGlobalNorm(NORM), adamw()), rho=RHO)


def as_torch(rule: opt.Rule) -> Build:
    """The rule as an optimiser of torch."""
    return lambda module: opt.TorchOptimizer(module, rule).step


def as_tree(rule: opt.Rule) -> Build:
    """The functional step of the whole module, with the gradients that its parameters keep."""

    def build(module: torch.nn.Module) -> Step:
        state = opt.setup(rule, module)
        return lambda: opt.update_(state, module, opt.gradients(module))

    return build


def recipe_as_torch(*, to_none: bool) -> Build:
    def build(module: torch.nn.Module) -> Step:
        optimizer = opt.TorchOptimizer(module, recipe())

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)

        return step

    return build


def recipe_as_tree(*, to_none: bool) -> Build:
    def build(module: torch.nn.Module) -> Step:
        state = opt.setup(recipe(), module)

        def step() -> None:
            opt.update_(state, module, opt.gradients(module))
            module.zero_grad(set_to_none=to_none)

        return step

    return build
