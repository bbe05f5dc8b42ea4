"""The rows of the tables: AdamW, the whole recipe, a rule of one's own."""

from collections.abc import Sequence
from typing import Any

import torch

import optimisers as opt
from benchmarks.cuda.cases import Belief
from benchmarks.cuda.place import SCALE
from benchmarks.cuda.ways import (
    Build,
    Given,
    Row,
    Running,
    Way,
    adamw,
    as_torch,
    in_graph,
    of_optax,
    of_torch,
    ours,
    running,
)
from benchmarks.torch_peers import BELIEF, BETA, EPSILON, ETA, LAM, NORM, RHO, belief_foreach, torch_adamw
from optimisers.state.leaf import parts
from optimisers.step.update import update_listed


def recipe(*, skips: bool) -> opt.Rule:
    """Float32 masters and their average behind bfloat16 parameters; with `skips` the rule itself looks for
    what is not finite.
    """
    inner = opt.Chain(opt.ClipGlobalNorm(NORM, throw=False), adamw())
    return opt.MixedPrecision(opt.EMA(opt.SkipNonFinite(inner) if skips else inner, RHO))


def masters(states: Sequence[Any], given: Given) -> list[torch.Tensor]:
    """Masters, averages and parameters."""
    return [*(s.master for s in states), *(s.inner.average for s in states), *given.xs]


def scaled(*, skips: bool, graph: bool = False) -> Build:
    """The whole recipe in one call, which divides by a scale on the device."""

    def build(given: Given) -> Running:
        state = given.setup(recipe(skips=skips), capturable=True)
        store = parts(state)[0]
        scale, found = (torch.full((1,), v, device=given.place.name) for v in (SCALE, 0.0))
        return (in_graph if graph else running)(
            given,
            lambda: update_listed(store, store.layout.root, given.xs, [given.dxs], (scale, found)),
            state=state,
            results=lambda: masters([state[i].state for i in range(len(given.xs))], given),
        )

    return build


def under_scaler(given: Given) -> Running:
    """The recipe as an optimiser of torch under a GradScaler, which reads and writes the gradients too."""
    optimizer = opt.TorchOptimizer(
        given.module, recipe(skips=False), engine=given.place.engine, capturable=True
    )
    scaler = torch.amp.GradScaler(given.place.kind, init_scale=SCALE, growth_interval=10**6)
    scaler.scale(torch.ones((), device=given.place.name))

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    def results() -> list[torch.Tensor]:
        return masters([optimizer.tree[name].state for name in optimizer.parameters], given)

    return running(given, step, results=results)


class TorchRecipe:
    """The recipe by torch's own calls for many tensors."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self.masters = torch.nn.ParameterList([x.float() for x in given.xs])
        self.parameters = list(self.masters.parameters())
        self.averages = [p.detach().clone() for p in self.parameters]
        self.slopes = [torch.empty_like(p) for p in self.averages]
        for p, g in zip(self.parameters, self.slopes, strict=True):
            p.grad = g
        self.optimizer: Any = torch_adamw(self.masters, fused=True)
        device = given.place.name
        self.inverse, self.found = torch.tensor(1 / SCALE, device=device), torch.zeros((), device=device)

    def results(self) -> list[torch.Tensor]:
        return [*(p.detach() for p in self.parameters), *self.averages, *self.given.xs]

    @torch.no_grad()
    def call_by_call(self) -> None:
        """As a train loop has it: each call reads and writes all."""
        torch._foreach_copy_(self.slopes, self.given.dxs)
        self.found.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(self.slopes, self.found, self.inverse)
        torch.nn.utils.clip_grad_norm_(self.parameters, NORM, foreach=True)
        self.finish(None)

    @torch.no_grad()
    def folded(self) -> None:
        """As an expert may have it: scale and clipping go into the fused step, as the scale of a GradScaler;
        the norm says whether all is finite.
        """
        torch._foreach_copy_(self.slopes, self.given.dxs)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.given.dxs, 2, torch.float32)))
        self.found.copy_(~norm.isfinite())
        self.finish(((norm * self.inverse + 1e-6) / NORM).clamp_(min=1.0) / self.inverse)

    def finish(self, scale: Any) -> None:
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, self.found
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, self.parameters, 1 - RHO)
        torch._foreach_copy_(self.given.xs, self.parameters)


def torch_recipe(name: str) -> Build:
    """One of the two; both step the same masters, for which a large model has room only once."""

    def build(given: Given) -> Running:
        made = given.masters = given.masters or TorchRecipe(given)
        return running(given, getattr(made, name), results=made.results)

    return build


def recipe_compiled(given: Given) -> Running:
    """The recipe in functions of many tensors, for torch.compile to fuse."""
    made = TorchRecipe(given)
    made.slopes.clear()
    for p in made.parameters:
        p.grad = None
    xs = [p.detach() for p in made.parameters]
    ms, vs = ([torch.zeros_like(x) for x in xs] for _ in range(2))
    t = torch.zeros((), device=given.place.name)

    @torch.compile
    def step(xs: Any, ms: Any, vs: Any, averages: Any, stored: Any, slopes: Any, t: Any) -> None:
        t.add_(1)
        gs = torch._foreach_mul([g.float() for g in slopes], 1 / SCALE)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gs)))
        gs = torch._foreach_mul(gs, (NORM / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_lerp_(ms, gs, 1 - BETA[0])
        torch._foreach_mul_(vs, BETA[1])
        torch._foreach_addcmul_(vs, gs, gs, 1 - BETA[1])
        roots = torch._foreach_div(torch._foreach_sqrt(vs), (1 - BETA[1] ** t).sqrt())
        torch._foreach_add_(roots, EPSILON)
        steps = torch._foreach_mul(torch._foreach_div(ms, roots), -ETA / (1 - BETA[0] ** t))
        torch._foreach_mul_(xs, 1 - ETA * LAM)
        torch._foreach_add_(xs, steps)
        torch._foreach_lerp_(averages, xs, 1 - RHO)
        torch._foreach_copy_(stored, xs)

    def call() -> None:
        with torch.no_grad():
            step(xs, ms, vs, made.averages, given.xs, given.dxs, t)

    return running(given, call, results=made.results)


# -- an own rule ---------------------------------------------------------------------------------------------
def belief(given: Given) -> Running:
    return running(given, belief_foreach(given.module))


def belief_compiled(given: Given) -> Running:
    """The same for torch.compile, with the count of steps on the device: a number would be compiled anew."""
    ms, ss = ([torch.zeros_like(x) for x in given.xs] for _ in range(2))
    t = torch.zeros((), device=given.place.name)

    @torch.compile
    def step(xs: Any, ms: Any, ss: Any, gs: Any, t: Any) -> None:
        t.add_(1)
        torch._foreach_lerp_(ms, gs, 1 - BETA[0])
        far = torch._foreach_sub(gs, ms)
        torch._foreach_mul_(ss, BETA[1])
        torch._foreach_addcmul_(ss, far, far, 1 - BETA[1])
        torch._foreach_add_(ss, BELIEF)
        roots = torch._foreach_div(torch._foreach_sqrt(ss), (1 - BETA[1] ** t).sqrt())
        torch._foreach_add_(roots, BELIEF)
        steps = torch._foreach_mul(torch._foreach_div(ms, roots), -ETA / (1 - BETA[0] ** t))
        torch._foreach_add_(xs, steps)

    def call() -> None:
        with torch.no_grad():
            step(given.xs, ms, ss, given.dxs, t)

    return running(given, call)


UPDATE, WHOLE, FUSED = "update_", "one call, and skips", "torch fused"

ROWS = {
    "adamw": Row(
        "AdamW, float32",
        torch.float32,
        1.0,
        UPDATE,
        {
            UPDATE: Way(ours(adamw()), 8, ours=True),
            FUSED: Way(of_torch(fused=True), 8),
            "torch foreach": Way(of_torch(foreach=True), 8, 8),
            "TorchOptimizer.step": Way(as_torch(adamw()), 8, ours=True),
            "update_ in a graph": Way(ours(adamw(), capturable=True, graph=True), 8, ours=True),
            "update_, capturable": Way(ours(adamw(), capturable=True), 8, ours=True),
            "torch fused in a graph": Way(of_torch(fused=True, capturable=True, graph=True), 8),
            "torch.compile": Way(
                lambda given: running(
                    given, torch.compile(torch_adamw(given.module, foreach=True, capturable=True).step)
                ),
                8,
                4,
                compiles=True,
            ),
            "Optax, jitted": Way(of_optax, 16, 4, traces=True),
        },
    ),
    "recipe": Row(
        "unscale, clip, AdamW, average, float32 masters",
        torch.bfloat16,
        SCALE,
        WHOLE,
        {
            WHOLE: Way(scaled(skips=True), 16, ours=True),
            "torch, call by call": Way(torch_recipe("call_by_call"), 20, 4),
            "torch, folded into fused": Way(torch_recipe("folded"), 0, 4),
            "one call, no look": Way(scaled(skips=False), 16, ours=True),
            "TorchOptimizer, GradScaler": Way(under_scaler, 16, ours=True),
            "one call in a graph": Way(scaled(skips=True, graph=True), 16, ours=True),
            "torch.compile": Way(recipe_compiled, 20, 8, compiles=True),
        },
    ),
    "own": Row(
        "an own rule, AdaBelief, float32",
        torch.float32,
        1.0,
        UPDATE,
        {
            UPDATE: Way(ours(Belief()), 8, ours=True),
            "foreach": Way(belief, 8, 12),
            "update_ in a graph": Way(ours(Belief(), capturable=True, graph=True), 8, ours=True),
            "torch.compile": Way(belief_compiled, 8, 4, compiles=True),
        },
    ),
}
