"""Write `peers.json`: the paths of torch.optim and Optax, to which `tests/rules/test_peers.py` holds ours.

It needs, in an environment of its own (this package is not imported):

    pip install torch==2.13.0 optax==0.2.8 jax==0.10.2 numpy
    python tests/golden/make_peers.py

Everything is float64. A row says who went (`peer`, with the settings it was given), which rule of ours should
go the same way (`rules`, a chain), along which gradients, and the parameters after each of 12 steps. Where a
peer writes its formula otherwise, the settings of ours are the ones that make both the same:

- Optax's NAdam leaves out Dozat's factor beta[1] under the root: ours has eta and epsilon smaller by its
  root;
- Adamax of torch and Optax adds epsilon within the maximum: epsilon is 0, and no gradient is 0 at the start;
- Optax's AMSGrad with bias correction takes the largest corrected mean square, torch the corrected largest:
  one number where gradients grow;
- Optax's rprop takes each step one update late, so only that of torch is here;
- our AMSGrad starts at epsilon, Optax's at 0: epsilon is 0.
"""

import json
import math
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import torch

STEPS = 12
START = [1.5, -2.25, 3.0, 1.75, -4.0, 2.0]


def gradients() -> dict[str, Any]:
    """The gradients by name, each of shape (steps, elements)."""
    rng = np.random.default_rng(20)
    noisy = rng.standard_normal((STEPS, len(START)))
    sparse = rng.standard_normal(noisy.shape) * (rng.random(noisy.shape) < 0.5)
    sparse[0, :3] = 0  # an element that starts with nothing,
    sparse[:, 0] = 0  # one that never gets anything,
    sparse[5:9] = 0  # and steps at which nobody gets anything
    late = noisy.copy()
    late[3:, ::2] *= rng.random((STEPS - 3, 3)) < 0.5  # zeros, though not at the start
    scales = rng.standard_normal(noisy.shape) * np.array([1e-8, 1e-5, 1e-3, 1, 1e3, 1e6])
    growing = np.cumsum(0.1 + rng.random(noisy.shape), axis=0) * np.sign(noisy)
    return {"noisy": noisy, "sparse": sparse, "late zeros": late, "scales": scales, "growing": growing}


Rules = list[tuple[str, dict[str, Any]]]
Case = tuple[str, dict[str, Any], Rules, tuple[str, ...]]
"""(the peer, its settings, our rules with theirs, the names of the gradients)."""

ALL = ("noisy", "sparse", "scales")


def of_torch() -> Iterator[Case]:
    """Every optimiser of torch that has a rule here."""
    yield from descents()
    yield from adams()
    yield from adaptive()


def descents() -> Iterator[Case]:
    """SGD and ASGD."""
    for eta, lambd, alpha, t0 in ((0.1, 0.05, 0.75, 1e6), (0.02, 0.3, 0.5, 4.0)):
        ours: dict[str, Any] = {"eta": eta, "lambd": lambd, "alpha": alpha, "t0": t0}
        yield "ASGD", {"lr": eta, "lambd": lambd, "alpha": alpha, "t0": t0}, [("ASGD", ours)], ALL[:2]
    for eta, rho in ((0.1, 0.9), (0.01, 0.5), (0.003, 0.0)):
        yield "SGD", {"lr": eta, "momentum": rho}, [("Momentum", {"eta": eta, "rho": rho})], ALL[:2]
    for eta, rho in ((0.1, 0.9), (0.01, 0.5)):
        theirs: dict[str, Any] = {"lr": eta, "momentum": rho, "nesterov": True}
        yield "SGD", theirs, [("Nesterov", {"eta": eta, "rho": rho})], ALL[:2]
        yield "SGD", theirs, [("SGD", {"eta": eta, "rho": rho, "nesterov": True})], ALL[:2]
    for eta, rho, dampening in ((0.1, 0.9, 0.0), (0.05, 0.8, 0.4), (0.003, 0.0, 0.4)):
        theirs = {"lr": eta, "momentum": rho, "dampening": dampening}
        yield "SGD", theirs, [("SGD", {"eta": eta, "rho": rho, "dampening": dampening})], ALL[:2]
    decayed: Rules = [("WeightDecay", {"lam": 0.1}), ("Momentum", {"eta": 0.05, "rho": 0.8})]
    yield "SGD", {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}, decayed, ALL[:2]


def adams() -> Iterator[Case]:
    """Adam and its kin."""
    for eta, beta, epsilon in (
        (0.001, (0.9, 0.999), 1e-8),
        (0.1, (0.8, 0.95), 1e-6),
        (0.02, (0.0, 0.9), 1e-3),
        (0.05, (0.95, 0.9), 1e-10),
    ):
        theirs: dict[str, Any] = {"lr": eta, "betas": beta, "eps": epsilon}
        ours: dict[str, Any] = {"eta": eta, "beta": beta, "epsilon": epsilon}
        yield "Adam", theirs, [("Adam", ours)], ALL
        yield "Adam", theirs | {"amsgrad": True}, [("TorchAMSGrad", ours)], ALL
        yield "NAdam", theirs, [("TorchNAdam", ours)], ALL
        yield "NAdam", theirs | {"momentum_decay": 0.1}, [("TorchNAdam", ours | {"psi": 0.1})], ALL[:2]
        yield "RAdam", theirs, [("TorchRAdam", ours)], ALL
        up: Rules = [("Maximise", {}), ("Adam", ours), ("DecoupledDecay", {"lam": 0.1, "couple": True})]
        yield "AdamW", theirs | {"weight_decay": 0.1, "maximize": True}, up, ALL[:2]
        yield "AdamW", theirs | {"weight_decay": 0.1}, [("AdamW", ours | {"lam": 0.1})], ALL
        yield (
            "Adam",
            theirs | {"weight_decay": 0.05},
            [("WeightDecay", {"lam": 0.05}), ("Adam", ours)],
            ALL[:2],
        )
        exact = {"epsilon": 0.0}
        yield "Adamax", theirs, [("TorchAdaMax", ours)], ALL
        yield "Adamax", theirs | {"eps": 0.0}, [("AdaMax", ours | exact)], ("noisy", "late zeros", "scales")


def adaptive() -> Iterator[Case]:
    """Those with a step size for each element."""
    for eta, rho, epsilon in ((0.001, 0.9, 1e-8), (0.01, 0.99, 1e-8), (0.1, 0.5, 1e-3)):
        for centred in (False, True):
            theirs: dict[str, Any] = {"lr": eta, "alpha": rho, "eps": epsilon, "centered": centred}
            ours: dict[str, Any] = {"eta": eta, "rho": rho, "epsilon": epsilon, "centred": centred}
            yield "RMSprop", theirs, [("RMSProp", ours)], ALL
            yield "RMSprop", theirs | {"momentum": 0.8}, [("TorchRMSProp", ours | {"mu": 0.8})], ALL[:2]

    for eta, epsilon in ((0.01, 1e-10), (0.1, 1e-8), (0.3, 1e-2)):
        ours = {"eta": eta, "epsilon": epsilon}
        yield "Adagrad", {"lr": eta, "eps": epsilon}, [("TorchAdaGrad", ours)], ALL
        theirs = {"lr": eta, "eps": epsilon, "lr_decay": 0.2, "initial_accumulator_value": 0.3}
        yield "Adagrad", theirs, [("TorchAdaGrad", ours | {"decay": 0.2, "start": 0.3})], ALL[:2]

    for rho, epsilon in ((0.9, 1e-6), (0.95, 1e-8), (0.5, 1e-2)):
        theirs = {"lr": 1.0, "rho": rho, "eps": epsilon}
        yield "Adadelta", theirs, [("AdaDelta", {"rho": rho, "epsilon": epsilon})], ALL
        ours = {"rho": rho, "epsilon": epsilon, "eta": 0.3}
        yield "Adadelta", theirs | {"lr": 0.3}, [("AdaDelta", ours)], ALL[:2]

    for eta, ell, gamma in (
        (0.01, (0.5, 1.2), (1e-6, 50.0)),
        (0.001, (0.5, 1.2), (1e-6, 50.0)),
        (0.02, (0.4, 2.0), (0.01, 0.05)),
    ):
        theirs = {"lr": eta, "etas": ell, "step_sizes": gamma}
        yield (
            "Rprop",
            theirs,
            [("Rprop", {"eta": eta, "ell": ell, "gamma": gamma})],
            ("noisy", "sparse", "growing"),
        )


def of_optax() -> Iterator[Case]:
    """What torch does not have, and what Optax writes as we do."""
    for eta, beta, epsilon in (
        (0.001, (0.9, 0.999), 1e-16),
        (0.1, (0.8, 0.95), 1e-6),
        (0.02, (0.5, 0.9), 1e-3),
    ):
        theirs: dict[str, Any] = {"learning_rate": eta, "b1": beta[0], "b2": beta[1]}
        ours: dict[str, Any] = {"eta": eta, "beta": beta}
        same = {"epsilon": epsilon}
        yield "adabelief", theirs | {"eps": epsilon, "eps_root": epsilon}, [("AdaBelief", ours | same)], ALL
        yield "adam", theirs | {"eps": epsilon}, [("Adam", ours | same)], ALL
        root = math.sqrt(beta[1])
        smaller = {"eta": eta * root, "epsilon": epsilon * root}
        yield "nadam", theirs | {"eps": epsilon}, [("NAdam", ours | smaller)], ALL
        yield "radam", theirs | {"eps": epsilon, "threshold": 4.0}, [("RAdam", ours | same)], ALL
        yield (
            "amsgrad",
            theirs | {"eps": epsilon},
            [("TorchAMSGrad", ours | same)],
            ("growing",),
        )
        yield "adamax", theirs | {"eps": 0.0}, [("AdaMax", ours | {"epsilon": 0.0})], ("noisy", "late zeros")
        apart = {"eps": 0.0, "bias_correction_mu": False, "bias_correction_nu": False}
        yield (
            "scale_by_amsgrad",
            theirs | apart,
            [("AMSGrad", ours | {"epsilon": 0.0})],
            ("noisy", "late zeros"),
        )

    for eta, beta in ((1e-4, (0.9, 0.99)), (0.05, (0.8, 0.5)), (0.01, (0.0, 0.9))):
        theirs = {"learning_rate": eta, "b1": beta[0], "b2": beta[1]}
        yield "lion", theirs | {"weight_decay": 0.0}, [("Lion", {"eta": eta, "beta": beta})], ALL
        decayed: Rules = [
            ("Lion", {"eta": eta, "beta": beta}),
            ("DecoupledDecay", {"lam": eta * 0.1}),
        ]
        yield "lion", theirs | {"weight_decay": 0.1}, decayed, ALL[:2]
        coupled = [decayed[0], ("DecoupledDecay", {"lam": 0.1, "couple": True})]
        yield "lion", theirs | {"weight_decay": 0.1}, coupled, ALL[:2]


def gone_by_torch(name: str, settings: dict[str, Any], grads: Any) -> list[list[float]]:
    """The parameters after each step of an optimiser of torch."""
    x = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimiser = getattr(torch.optim, name)([x], **settings)
    path: list[list[float]] = []
    for g in grads:
        x.grad = torch.tensor(g, dtype=torch.float64)
        optimiser.step()
        path.append(x.detach().tolist())
    return path


def gone_by_optax(name: str, settings: dict[str, Any], grads: Any) -> list[list[float]]:
    """The parameters after each step of an optimiser of Optax; `scale_by_` ones are scaled by their rate."""
    make: Callable[..., Any] = getattr(optax, name)
    if name.startswith("scale_by_"):
        rest = {k: v for k, v in settings.items() if k != "learning_rate"}
        optimiser = optax.chain(make(**rest), optax.scale(-settings["learning_rate"]))
    else:
        optimiser = make(**settings)
    x = jax.numpy.asarray(START, jax.numpy.float64)
    state = optimiser.init(x)
    path: list[list[float]] = []
    for g in grads:
        step, state = optimiser.update(jax.numpy.asarray(g), state, x)
        x = optax.apply_updates(x, step)
        path.append(np.asarray(x).tolist())
    return path


def rows(library: str, cases: Iterator[Case], go: Callable[..., Any], given: dict[str, Any]) -> Iterator[Any]:
    """One row for each case and each of its gradients."""
    for name, settings, rules, kinds in cases:
        for kind in kinds:
            path = go(name, settings, given[kind])
            if not np.isfinite(path).all():
                raise ValueError(f"{name} {settings} leaves the finite numbers along {kind} gradients")
            yield {
                "peer": f"{library}.{name}",
                "settings": settings,
                "rules": [{"rule": rule, "settings": ours} for rule, ours in rules],
                "gradients": kind,
                "path": path,
            }


def main() -> None:
    torch.set_default_dtype(torch.float64)  # NAdam keeps its product of momenta in the default type
    jax.config.update("jax_enable_x64", val=True)  # pyright: ignore[reportUnknownMemberType]
    given = gradients()
    found = [
        *rows("torch.optim", of_torch(), gone_by_torch, given),
        *rows("optax", of_optax(), gone_by_optax, given),
    ]
    head = {
        "versions": {name: version(name) for name in ("torch", "optax", "jax", "numpy")}
        | {"python": platform.python_version()},
        "x": START,
        "gradients": {name: g.tolist() for name, g in given.items()},
    }
    lines = ",\n".join(json.dumps(row) for row in found)
    text = json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n'
    json.loads(text)
    Path(__file__).with_name("peers.json").write_text(text)


if __name__ == "__main__":
    main()
