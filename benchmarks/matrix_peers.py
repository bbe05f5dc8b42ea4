"""Who else has the rules of matrices, as each package steps them: torch, HeavyBall, pytorch_optimizer, timm,
came_pytorch, Optax.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.muon import QUINTIC, STEPS

Shape = tuple[int, ...]
Step = Callable[[], object]

PERIOD = 10
"""Steps between two factorisations, of ours and of every peer."""


class Peer(NamedTuple):
    """A class or function, with its settings."""

    path: str
    settings: Mapping[str, Any] = MappingProxyType({})
    note: str = ""


PO, HB = "pytorch_optimizer.", "heavyball."

PLAIN = {"lr": 0.02, "weight_decay": 0.0}

LIKE_JORDAN = {"learning_rate": 0.02, "ns_coeffs": QUINTIC, "ns_steps": STEPS}

PEERS: dict[str, tuple[Peer, ...]] = {
    "Muon": (
        Peer("torch.optim.Muon", PLAIN, "float32 formula"),
        Peer("torch.optim.Muon", PLAIN, "bfloat16"),
        Peer(PO + "Muon", {"lr": 0.02}, "float32"),
        Peer(PO + "Muon", {"lr": 0.02}, "bfloat16"),
        Peer(HB + "Muon", {"lr": 0.02, "consume_grad": False}, "bfloat16"),
        Peer("timm.optim.Muon", {"lr": 0.02}, "bfloat16"),
        Peer("optax.contrib.muon", LIKE_JORDAN, "jitted"),
    ),
    "NorMuon": (Peer(PO + "NorMuon", {"lr": 0.02}, "bfloat16"),),
    "Scion": (
        Peer(PO + "SCION", {"lr": 0.01}, "bfloat16"),
        Peer(HB + "Scion", {"lr": 0.01, "consume_grad": False}),
    ),
    "SOAP": (
        Peer(PO + "SOAP", {"precondition_frequency": PERIOD}),
        Peer(
            HB + "SOAP",
            {
                "precondition_frequency": PERIOD,
                "use_precond_schedule": False,
                "max_precond_dim": 10000,
                "merge_dims": False,
                "consume_grad": False,
            },
        ),
    ),
    "Shampoo": (
        Peer(
            PO + "ScalableShampoo",
            {
                "preconditioning_compute_steps": PERIOD,
                "statistics_compute_steps": 1,
                "start_preconditioning_step": 1,
            },
        ),
    ),
    "SPlus": (Peer(PO + "SPlus", {"inverse_steps": PERIOD}),),
    "Kron": (
        Peer(PO + "Kron", {"lr": 3e-4}),
        Peer("timm.optim.kron.Kron", {"lr": 3e-4}),
        Peer(HB + "PSGDKron", {"lr": 3e-4, "consume_grad": False}),
    ),
    "Adafactor": (
        Peer("torch.optim.Adafactor", {"lr": 1e-2}),
        Peer("timm.optim.Adafactor"),
        Peer(PO + "AdaFactor", {"lr": 1e-2}),
        Peer("optax.adafactor", {"learning_rate": 1e-2}, "jitted"),
    ),
    "CAME": (Peer("came_pytorch.CAME", {"lr": 2e-4}), Peer(PO + "CAME", {"lr": 2e-4})),
    "SM3": (Peer(PO + "SM3", {"lr": 0.1}), Peer("optax.sm3", {"learning_rate": 0.1}, "jitted")),
}


def parameters(shapes: Sequence[Shape]) -> list[torch.nn.Parameter]:
    """Parameters of torch with gradients."""
    held = [torch.nn.Parameter(torch.from_numpy(x)) for x in arrays(shapes, 0)]
    for p, g in zip(held, arrays(shapes, 1), strict=True):
        p.grad = torch.from_numpy(g)
    return held


def arrays(shapes: Sequence[Shape], seed: int) -> list[Any]:
    """Random numbers in these shapes, in float32."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(np.float32) / 16 for s in shapes]


def step_of(peer: Peer, shapes: Sequence[Shape]) -> Step:
    """The step of a peer; raises what it raises where it is not there, or does not take these shapes."""
    module, name = peer.path.rsplit(".", 1)
    made = getattr(importlib.import_module(module), name)
    if peer.path.startswith("optax"):
        return _jitted(made(**peer.settings), shapes)
    if peer.path.startswith("heavyball"):
        importlib.import_module("heavyball").utils.compile_mode = None
    held: Any = parameters(shapes)
    if peer.path in ("pytorch_optimizer.Muon", "pytorch_optimizer.NorMuon"):
        held = [{"params": held, "use_muon": True}]
    step = made(held, **peer.settings).step
    if peer.path == "torch.optim.Muon" and peer.note == "float32 formula":
        return patched("torch.optim._muon", "_zeropower_via_newtonschulz", torch_formula, step)
    if peer.path == "pytorch_optimizer.Muon":
        own = importlib.import_module("pytorch_optimizer.optimizer.muon.base")
        kind = functools.partial(own.zero_power_via_newton_schulz_5, dtype=getattr(torch, peer.note))
        return patched(own.__name__, "zero_power_via_newton_schulz_5", kind, step)
    return step


def patched(module: str, name: str, function: Callable[..., Any], step: Step) -> Step:
    """A step during which a function of a package is another one, in a type that nobody else gives."""
    own: Any = importlib.import_module(module)
    there = getattr(own, name)

    def run() -> None:
        setattr(own, name, function)
        try:
            step()
        finally:
            setattr(own, name, there)

    return run


def torch_formula(x: torch.Tensor, *_settings: Any) -> torch.Tensor:
    """The Newton-Schulz steps of torch.optim.Muon, in the type of the gradient."""
    a, b, c = QUINTIC
    y = x.mT if x.size(0) > x.size(1) else x
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        g = y @ y.mT
        y = torch.addmm(y, torch.addmm(g, g, g, beta=b, alpha=c), y, beta=a)
    return y.mT if x.size(0) > x.size(1) else y


def _jitted(rule: Any, shapes: Sequence[Shape]) -> Step:
    """A step of Optax in one jit whose arguments are given up."""
    jax: Any = importlib.import_module("jax")
    optax: Any = importlib.import_module("optax")
    model, grads = (list(map(jax.numpy.asarray, arrays(shapes, k))) for k in (0, 1))

    def step(state: Any, model: Any, grads: Any) -> Any:
        updates, state = rule.update(grads, state, model)
        return state, optax.apply_updates(model, updates)

    jitted = jax.jit(step, donate_argnums=(0, 1))
    held = [rule.init(model), model]

    def run() -> None:
        held[:] = jitted(*held, grads)
        jax.block_until_ready(held[1])

    return run
