"""Rates that fall with depth: against the formulas of BEiT and timm, torch's groups, Optax and schedules."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import optimisers as opt
from optimisers.errors import BadSetting, BadState, NoMatch

DECAY, LAYERS = 0.65, 3


class Block(nn.Module):
    """Its own numbers are not those of layers."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.mlp = nn.LayerNorm(d), nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))
        self.rel_pos_embed = nn.Parameter(torch.ones(2, d))


class Vision(nn.Module):
    """A vision transformer, with the names of BEiT and timm."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.ones(1, 1, d)), nn.Parameter(torch.ones(1, 5, d))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, d, 2)})
        self.blocks = nn.ModuleList([Block(d) for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)


class Residual(nn.Module):
    """A residual network with the names of torchvision: a stem that only its place tells from the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)) for _ in range(2))
        self.fc = nn.Linear(4, 2)


def beit_layer(name: str) -> int:
    """The layer of BEiT's code: tokens, positions and patches 0, block i is i + 1, all else is the last."""
    block = re.match(r"blocks\.(\d+)\.", name)
    first = name.startswith(("cls_token", "pos_embed", "patch_embed"))
    return 0 if first else int(block[1]) + 1 if block else LAYERS + 1


def timm_layer(name: object) -> int:
    """That of timm for a ViT: as BEiT, but the last norm belongs to the last block."""
    return LAYERS if str(name).startswith("norm.") else beit_layer(str(name))


def beit(name: str) -> float:
    """BEiT's scale of the rate: decay^(depth + 1 - layer)."""
    return DECAY ** (LAYERS + 1 - beit_layer(name))


def timm(name: str) -> float:
    """timm's: decay^(layer_max - layer)."""
    return DECAY ** (LAYERS + 1 - timm_layer(name))


def rates(state: Any) -> dict[str, float]:
    return {path: rule.eta for path, rule in opt.current(state).items()}


@pytest.mark.parametrize(("layer", "scale"), [(None, beit), (timm_layer, timm)])
def test_rates_are_those_of_beit_and_with_a_function_those_of_timm(layer: Any, scale: Any) -> None:
    module, rule = Vision(), opt.layer_decay(opt.AdamW(0.5, lam=0.1), DECAY, layer=layer)
    expected = {name: pytest.approx(0.5 * scale(name), rel=1e-12) for name, _ in module.named_parameters()}

    assert rates(opt.setup(rule, module)) == expected
    assert rates(opt.TorchOptimizer(module, rule).tree) == expected


def test_steps_are_those_of_torch_with_a_group_for_each_layer_under_its_scheduler() -> None:
    ours, theirs = Vision(), Vision()
    theirs.load_state_dict(ours.state_dict())
    groups = [
        {"params": [p], "lr": 0.1 * beit(name), "weight_decay": 0.5 if p.dim() > 1 else 0.0}
        for name, p in theirs.named_parameters()
    ]
    rules = {opt.vectors: opt.AdamW(0.1), "**": opt.AdamW(0.1, lam=0.5)}
    pair = opt.TorchOptimizer(ours, opt.layer_decay(rules, DECAY)), torch.optim.AdamW(groups)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in pair]

    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer, scheduler in zip(pair, schedulers, strict=True):
            optimizer.step()
            scheduler.step()

    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", [opt.Cosine(0.5, 10), lambda clock: 0.5 / (1 + clock)])
def test_a_schedule_of_the_rate_is_scaled_and_a_scheduler_of_torch_multiplies_both(schedule: Any) -> None:
    module = Vision()
    rule = opt.layer_decay(opt.Descent(schedule), DECAY)
    state = opt.setup(rule, module)
    optimizer = opt.TorchOptimizer(module, rule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))

    for t in range(4):
        assert rates(state) == {n: pytest.approx(beit(n) * schedule(t)) for n, _ in module.named_parameters()}
        assert rates(optimizer.tree) == {k: pytest.approx(r / (1 + t)) for k, r in rates(state).items()}
        state, _ = opt.update(state, module, dict.fromkeys(dict(module.named_parameters())))
        optimizer.step()
        scheduler.step()


def test_what_a_module_declares_before_its_layers_is_the_stem_and_what_behind_the_head() -> None:
    found = rates(opt.setup(opt.layer_decay(opt.Descent(1.0), 0.5), Residual()))

    by_first = {path.partition(".")[0]: rate for path, rate in found.items()}
    assert by_first == {"conv1": 0.125, "bn1": 0.125, "layer1": 0.25, "layer2": 0.5, "fc": 1}


def test_what_is_declared_between_two_layers_counts_with_the_one_before() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc1, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3)
            self.fc2, self.act, self.fc3, self.last = nn.Linear(3, 3), nn.PReLU(), nn.Linear(3, 1), nn.PReLU()

    found = rates(opt.setup(opt.layer_decay(opt.Adam(1.0), 0.5), Plain()))
    assert {k: v for k, v in found.items() if not k.endswith("bias")} == {
        "stem.weight": 1 / 16,
        "fc1.weight": 1 / 8,
        "norm.weight": 1 / 8,
        "fc2.weight": 1 / 4,
        "act.weight": 1 / 4,
        "fc3.weight": 1 / 2,
        "last.weight": 1,
    }


def test_layers_without_anything_behind_end_at_the_full_rate_and_are_counted_not_numbered() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    found = rates(opt.setup(opt.layer_decay(opt.Descent(1.0), 0.5), module))

    assert [found[f"{i}.weight"] for i in (0, 2, 4)] == [0.25, 0.5, 1]


class Flax(nnx.Module):
    """Flax sorts what a module has by name, so that order says nothing."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.wte, self.norm = nnx.Embed(7, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.a_head = nnx.Linear(4, 2, rngs=rngs)


def linen() -> dict[str, Any]:
    layer = {"Dense_0": {"kernel": jnp.ones((2, 2))}, "Dense_1": {"kernel": jnp.ones((2, 2))}}
    layers = {"encoderblock_0": layer, "encoderblock_1": layer}
    return layers | {
        "encoder_norm": jnp.ones(2),
        "Embed_0": jnp.ones((3, 2)),
        "head": {"w": jnp.ones((2, 2))},
    }


LINEN = {"encoderblock_0": 0.25, "encoderblock_1": 0.5, "encoder_norm": 1, "Embed_0": 0.125, "head": 1}
"""What half a rate a layer comes to."""


@pytest.mark.parametrize("library", [np, jnp])
def test_where_order_says_nothing_names_do(library: Any) -> None:
    found = rates(opt.setup(opt.layer_decay(opt.Descent(1.0), 0.5), Flax()))
    by_first = {path.partition(".")[0]: rate for path, rate in found.items() if "blocks" not in path}
    assert by_first == {"wte": 0.125, "norm": 1, "a_head": 1}
    assert (found["blocks.0.kernel"], found["blocks.1.bias"]) == (0.25, 0.5)

    model = jax.tree.map(library.array, linen())
    found = rates(opt.setup(opt.layer_decay(opt.Descent(1.0), 0.5), model))
    by_first = {path.partition(".")[0]: rate for path, rate in found.items()}
    assert by_first == {
        "encoderblock_0": 0.25,
        "encoderblock_1": 0.5,
        "encoder_norm": 1,
        "Embed_0": 0.125,
        "head": 1,
    }


def test_a_transformation_of_optax_scales_updates_as_optax_does_by_labels() -> None:
    params = linen()
    labels = {name: jax.tree.map(lambda _, name=name: name, part) for name, part in params.items()}
    theirs = optax.multi_transform(
        {n: optax.adamw(0.1 * s, weight_decay=0.2) for n, s in LINEN.items()}, labels
    )
    ours = opt.as_optax(opt.layer_decay(opt.AdamW(0.1, lam=0.2), 0.5))
    grads = jax.tree.map(lambda x: jnp.linspace(-1, 1, x.size).reshape(x.shape), params)

    states = [jax.jit(tx.init)(params) for tx in (ours, theirs)]
    for _ in range(2):
        found = [
            jax.jit(tx.update)(grads, state, params) for tx, state in zip((ours, theirs), states, strict=True)
        ]
        states = [state for _, state in found]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), *(step for step, _ in found))


@pytest.mark.parametrize(
    ("rule", "slow"),
    [
        (opt.Chain(opt.ClipGlobalNorm(), opt.AdamW(0.5)), opt.Chain(opt.ClipGlobalNorm(), opt.AdamW(0.125))),
        (opt.Chain(opt.Adam(0.5), opt.DecoupledDecay(0.1, couple=True)),
         opt.Chain(opt.Adam(0.125), opt.DecoupledDecay(0.1, couple=True))),
        (opt.Chain(opt.Momentum(0.5), opt.Descent(1.0)), opt.Chain(opt.Momentum(0.5), opt.Descent(0.25))),
        (opt.EMA(opt.Lion(0.5)), opt.EMA(opt.Lion(0.125))),
        (opt.Adam(opt.Constant(0.5)), opt.Adam(opt.Scaled(opt.Constant(0.5), 0.25))),
        (None, None),
    ],
)  # fmt: skip
def test_the_rate_that_falls_is_the_last_of_a_rule(rule: Any, slow: Any) -> None:
    model = {"l0": np.ones(2), "l1": np.ones(2), "head": np.ones(2)}
    state = opt.setup(opt.layer_decay({"l0": rule, "**": opt.Descent(1.0)}, 0.5), model)

    assert state["l1"].rule == opt.Descent(0.5)
    assert state["l0"] == () if rule is None else state["l0"].rule == slow


def test_settings_of_a_torch_optimizer_are_those_of_the_head() -> None:
    module = Vision()
    rules = {opt.vectors: opt.AdamW(9.0), "**": opt.AdamW(9.0, lam=0.1)}
    optimizer = opt.TorchOptimizer(module, opt.layer_decay(rules, DECAY), lr=0.5)
    pairs = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }

    assert len(optimizer.param_groups) == 2 * (LAYERS + 2)
    assert pairs == {
        n: (pytest.approx(0.5 * beit(n)), 0.1 * (p.dim() > 1)) for n, p in module.named_parameters()
    }
    with pytest.raises(BadState, match="needs its rule: write add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rule": opt.Adam(0.25)})
    assert optimizer.param_groups[-1]["lr"] == 0.25


ODD = {"l0": np.ones(2), "l1": np.ones(2), "z": np.ones(2)}
TWO = {"encoder": [np.ones(2), np.ones(2)], "decoder": [np.ones(2), np.ones(2)]}


def decayed(model: Any, layer: Any = None, rule: Any = opt.Adam()) -> Any:  # noqa: B008 a value
    make = opt.TorchOptimizer if isinstance(model, nn.Module) else lambda model, rule: opt.setup(rule, model)
    return make(model, opt.layer_decay(rule, layer=layer))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: opt.layer_decay(opt.Adam(), 1.5), BadSetting, "decay=1.5; it takes a number above 0, 1 at"),
        (lambda: opt.layer_decay(opt.Adam(), layer=3), BadSetting, "layer=3; it takes a function of a path"),
        (lambda: decayed(TWO, rule=opt.layer_decay(opt.Adam())), BadSetting, "write the rule, or a dict"),
        (lambda: decayed({"w": np.ones(2)}), NoMatch, "no path has the number of a layer; there are w; say"),
        (lambda: decayed(TWO), BadSetting, "several stacks of layers, encoder.* (2) and decoder.* (2); say"),
        (lambda: decayed(ODD), BadSetting, "z may lie before l* or behind it; say how deep"),
        (lambda: decayed(TWO, str), BadSetting, "layer gave 'encoder.0' for encoder.0; it takes a whole"),
        (lambda: decayed(TWO["encoder"], len, opt.ClipNorm()), BadSetting, "has no rate eta"),
        (lambda: decayed(Vision(), rule=3), BadState, "layer_decay(3); it takes a rule"),
        (lambda: opt.Scaled(0.5), BadSetting, "Scaled.schedule is 0.5; it takes a schedule"),
        (
            lambda: opt.TorchOptimizer(Vision().parameters(), opt.layer_decay(opt.Adam())),
            BadState,
            "takes a module or named parameters",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(make: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert text in str(caught.value)
