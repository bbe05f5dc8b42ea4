"""What is timed: a model's arrays, and the ways to step them."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import optimisers as opt
from benchmarks import shapes
from benchmarks.cuda.device import graphed
from benchmarks.cuda.place import WARM, Place, Step
from benchmarks.torch_peers import BETA, EPSILON, ETA, LAM, torch_adamw


# -- what is timed -------------------------------------------------------------------------------------------
class Given:
    """The parameters of a model with their gradients, all in [0, 0.01); those of a recipe times `SCALE`."""

    def __init__(self, name: str, dtype: torch.dtype, place: Place, scale: float = 1.0) -> None:
        draw = torch.Generator(place.name).manual_seed(0)

        def drawn(size: float) -> list[torch.Tensor]:
            new = (torch.rand(s, generator=draw, device=place.name) for s in shapes.ALL[name]())
            return [a.mul_(size).to(dtype) for a in new]

        self.place, self.xs, self.dxs = place, drawn(0.01), drawn(0.01 * scale)
        self.count = sum(x.numel() for x in self.xs)
        self.module = torch.nn.ParameterList(self.xs)
        self.masters: Any = None
        """Those of torch, once they are made."""
        for p, g in zip(self.module.parameters(), self.dxs, strict=True):
            p.grad = g

    def setup(self, rule: opt.Rule, **how: Any) -> Any:
        return opt.setup(rule, self.xs, engine=self.place.engine, **how)


@dataclasses.dataclass
class Running:
    """A way to step, on its arrays."""

    step: Step
    wait: Step
    of_torch: bool = True
    """Whether CUDA events of torch see it."""
    taken: int = 0
    """Steps that were taken while it was built."""
    results: Callable[[], list[torch.Tensor]] | None = None
    """What must be the same for all ways; the parameters, if nothing is said."""
    state: Any = None
    """Ours, for `explain`."""
    held: Any = None
    """What must not be freed while a graph writes to it."""
    repeats: int = 1
    """Steps in a burst."""
    host: float = 0.0
    """Seconds until a call returns."""

    def __call__(self) -> None:
        self.step()

    def burst(self) -> float:
        """Seconds of a step among several."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(self.repeats):
            self.step()
        self.wait()
        return (time.perf_counter() - begin) / self.repeats

    def call(self) -> float:
        """Seconds until a call returns, with nothing before it in the queue."""
        self.wait()
        begin = time.perf_counter()
        self.step()
        end = time.perf_counter()
        self.wait()
        return end - begin

    def on_device(self) -> float:
        """Seconds of the device for a step that the host has put into its queue beforehand."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        torch.cuda._sleep(int(2e9 * (2 * self.host + 1e-4)))
        begin.record()
        self.step()
        end.record()
        self.wait()
        return begin.elapsed_time(end) * 1e-3


Build = Callable[[Given], Running]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to take the step of a row."""

    build: Build
    keeps: int
    """Bytes per parameter that it needs beside parameters and gradients."""
    spare: int = 0
    """And those that it needs only while it steps."""
    ours: bool = False
    compiles: bool = False
    """Whether torch.compile has its time first; not for many tensors, unless asked for."""
    traces: bool = False
    """Whether XLA has its time first."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Ways to take the same step."""

    title: str
    dtype: torch.dtype
    scale: float
    judged: str
    """Which of ours the targets are about."""
    ways: dict[str, Way]


def running(given: Given, step: Step, **more: Any) -> Running:
    return Running(step, given.place.wait, **more)


def in_graph(given: Given, step: Step, **more: Any) -> Running:
    return running(given, graphed(step, given.place), taken=WARM, held=step, **more)


def ours(rule: opt.Rule, *, capturable: bool = False, graph: bool = False) -> Build:
    """`update_` on lists of tensors."""

    def build(given: Given) -> Running:
        state = given.setup(rule, capturable=capturable)
        make = in_graph if graph else running
        return make(given, lambda: opt.update_(state, given.xs, given.dxs), state=state)

    return build


def as_torch(rule: opt.Rule) -> Build:
    def build(given: Given) -> Running:
        return running(given, opt.TorchOptimizer(given.module, rule, engine=given.place.engine).step)

    return build


def of_torch(*, graph: bool = False, **how: Any) -> Build:
    def build(given: Given) -> Running:
        return (in_graph if graph else running)(given, torch_adamw(given.module, **how).step)

    return build


def of_optax(given: Given) -> Running:
    """Jitted Optax on the same device, its parameters and state given away at every step."""
    import jax
    import optax

    device = jax.devices("cpu" if given.place.rehearse else "gpu")[0]
    tx = optax.adamw(ETA, *BETA, eps=EPSILON, weight_decay=LAM)
    x, dx = ([jax.device_put(a.cpu().numpy(), device) for a in arrays] for arrays in (given.xs, given.dxs))
    kept: dict[str, Any] = {"x": x, "dx": dx, "state": tx.init(x)}

    def one(x: Any, state: Any, dx: Any) -> Any:
        updates, state = tx.update(dx, state, x)
        return optax.apply_updates(x, updates), state

    jitted = jax.jit(one, donate_argnums=(0, 1))

    def step() -> None:
        kept["x"], kept["state"] = jitted(kept["x"], kept["state"], kept["dx"])

    return Running(
        step,
        lambda: jax.block_until_ready(kept["x"]),
        of_torch=False,
        results=lambda: [torch.tensor(np.asarray(x)) for x in kept["x"]],
    )


# -- the recipe ----------------------------------------------------------------------------------------------
def adamw() -> opt.Rule:
    return opt.AdamW(ETA, BETA, LAM, EPSILON)
