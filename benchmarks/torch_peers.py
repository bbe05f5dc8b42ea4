"""What our steps of PyTorch are timed beside: its own, those of optimi and HeavyBall, and rules by hand."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

ETA, BETA, LAM, EPSILON = 1e-3, (0.9, 0.999), 0.01, 1e-8


DECAY, NORM, RHO = 0.001, 1.0, 0.999


BELIEF = 1e-16  # the epsilon of AdaBelief


Step = Callable[[], object]


Build = Callable[[torch.nn.Module], Step]


def torch_adamw(module: torch.nn.Module, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        module.parameters(), lr=ETA, betas=BETA, weight_decay=LAM, eps=EPSILON, **({"foreach": False} | how)
    )


def of_torch(**how: Any) -> Build:
    return lambda module: torch_adamw(module, **how).step


def of_optimi(*, foreach: bool) -> Build:
    """AdamW of optimi, which keeps low precision by Kahan summation."""

    def build(module: torch.nn.Module) -> Step:
        import optimi

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its foreach form is deprecated, and still the faster one here
            return optimi.AdamW(
                module.parameters(), lr=ETA, betas=BETA, weight_decay=LAM, eps=EPSILON, foreach=foreach
            ).step

    return build


def compiled(**how: Any) -> Build:
    """torch.compile around the step of torch, with the rate as a constant."""
    return lambda module: torch.compile(torch_adamw(module, **how).step)


def of_heavyball(module: torch.nn.Module) -> Step:
    import heavyball

    return heavyball.AdamW(
        module.parameters(), lr=ETA, betas=BETA, weight_decay=LAM, eps=EPSILON, consume_grad=False
    ).step


def torch_recipe(*, to_none: bool, **how: Any) -> Build:
    """Clipping, AdamW, the average of the weights and no gradients, each by torch's own fastest call."""

    def build(module: torch.nn.Module) -> Step:
        parameters = list(module.parameters())
        averages = [p.detach().clone() for p in parameters]
        optimizer = torch_adamw(module, **how)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, NORM)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - RHO)
            optimizer.zero_grad(set_to_none=to_none)

        return step

    return build


def belief_foreach(module: torch.nn.Module) -> Step:
    """AdaBelief with torch's functions of many tensors, in place where they can be."""
    xs = list(module.parameters())
    ms, ss = [torch.zeros_like(x) for x in xs], [torch.zeros_like(x) for x in xs]
    t = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal t
        t += 1
        gs = [x.grad for x in xs]
        torch._foreach_lerp_(ms, gs, 1 - BETA[0])
        far = torch._foreach_sub(gs, ms)
        torch._foreach_mul_(ss, BETA[1])
        torch._foreach_addcmul_(ss, far, far, 1 - BETA[1])
        torch._foreach_add_(ss, BELIEF)
        roots = torch._foreach_sqrt(ss)
        root = math.sqrt(1 - BETA[1] ** t)
        torch._foreach_div_(roots, root)
        torch._foreach_add_(roots, BELIEF)
        torch._foreach_addcdiv_(xs, ms, roots, -ETA / (1 - BETA[0] ** t))

    return step


def belief_loop(module: torch.nn.Module) -> Step:
    """The same, one tensor after the other, as papers publish it."""
    xs = list(module.parameters())
    ms, ss = [torch.zeros_like(x) for x in xs], [torch.zeros_like(x) for x in xs]
    t = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal t
        t += 1
        root, rate = math.sqrt(1 - BETA[1] ** t), -ETA / (1 - BETA[0] ** t)
        for x, m, s in zip(xs, ms, ss, strict=True):
            m.lerp_(x.grad, 1 - BETA[0])
            far = x.grad - m
            s.mul_(BETA[1]).addcmul_(far, far, value=1 - BETA[1]).add_(BELIEF)
            x.addcdiv_(m, (s.sqrt() / root).add_(BELIEF), value=rate)

    return step


def descent_foreach(module: torch.nn.Module) -> Step:
    """Weight decay and DecayDescent with torch's functions of many tensors."""
    xs = list(module.parameters())
    t = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal t
        t += 1
        gs = torch._foreach_add([x.grad for x in xs], xs, alpha=DECAY)
        torch._foreach_add_(xs, gs, alpha=-ETA / math.sqrt(t))

    return step


def descent_loop(module: torch.nn.Module) -> Step:
    xs = list(module.parameters())
    t = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal t
        t += 1
        for x in xs:
            x.add_(x.grad.add(x, alpha=DECAY), alpha=-ETA / math.sqrt(t))

    return step
