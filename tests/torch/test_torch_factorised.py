"""Rules with factorisations, and of little memory, behind the faces of torch: schedulers, checkpoints, frozen
parameters, wrappers; and what `hidden_matrices` gives them of models of other kinds.
"""

import copy
import io
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there
from tests.table import FACTORISED, LITTLE  # noqa: E402

nn = torch.nn

RULES: dict[str, opt.Rule] = {**FACTORISED, **LITTLE}

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def weights(dtype: Any = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 4), (4, 4), (5, 4))]


def stepped(optimizer: Any, params: list[Any], seeds: range, then: Any = bool) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()
        then()


@every_rule
def test_a_run_goes_on_from_what_torch_saved(rule: opt.Rule) -> None:
    """With a scheduler, through `torch.save` and `torch.load(weights_only=True)`, to the bit."""
    params = weights()
    optimizer = opt.TorchOptimizer(params, rule)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rate = optimizer.param_groups[0]["lr"]
    stepped(optimizer, params, range(1, 4), scheduler.step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate / 8)
    written = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict(), list(params)], written)
    written.seek(0)
    state, schedule, again = torch.load(written, weights_only=True)
    fresh = opt.TorchOptimizer(again, rule)
    later = torch.optim.lr_scheduler.ExponentialLR(fresh, 0.5)
    fresh.load_state_dict(state)
    later.load_state_dict(schedule)
    stepped(optimizer, params, range(4, 8), scheduler.step)
    stepped(fresh, again, range(4, 8), later.step)

    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@every_rule
def test_pure_steps_frozen_parameters_and_threads_change_no_number(rule: opt.Rule) -> None:
    found = []
    threads = torch.get_num_threads()
    for step, count in ((opt.update, 1), (opt.update_, 1), (opt.update_, 2)):
        torch.set_num_threads(count)
        try:
            model = [p.detach().clone() for p in weights()]
            state: Any = opt.freeze(opt.setup(rule, model), where="1")
            before = copy.deepcopy(model[1])
            for seed in range(4):
                torch.manual_seed(seed)
                state, model = step(state, model, [torch.randn(x.shape) for x in model])
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(model[1], before)
        found.append(model)

    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@every_rule
def test_masters_and_averages_stand_around_them(rule: opt.Rule) -> None:
    """Halves with masters follow float32 to their rounding, by the same gradients."""
    wide, half = weights(torch.bfloat16), weights(torch.bfloat16)
    wide = [p.detach().float() for p in wide]
    half = [p.detach() for p in half]
    plain: Any = opt.setup(opt.EMA(rule, 0.5), wide)
    masters: Any = opt.setup(opt.MixedPrecision(opt.EMA(rule, 0.5)), half)
    for seed in range(4):
        torch.manual_seed(seed)
        grads = [torch.randn(x.shape).to(torch.bfloat16) for x in half]
        plain, wide = opt.update_(plain, wide, [g.float() for g in grads])
        masters, half = opt.update_(masters, half, grads)

    for a, b in zip(wide, half, strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)
    for a, b in zip(opt.averaged(plain, wide), opt.averaged(masters, half), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-2, atol=1e-2)


# -- models of other kinds -----------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """A layer whose weight is (in, out), as in GPT-2."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(rows, columns)), nn.Parameter(torch.zeros(columns))


class GPT2(nn.Module):
    """Its parts, with a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.h = nn.ModuleList([nn.ModuleDict({"c_attn": Conv1D(24, 8), "c_fc": Conv1D(32, 8)})])
        self.ln_f, self.lm_head = nn.LayerNorm(8), nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.wte.weight


class ViT(nn.Module):
    """Patches, a token for the class, positions, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj, self.class_token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 5, 8))
        self.attention, self.mlp = nn.MultiheadAttention(8, 2), nn.Linear(8, 16)
        self.heads = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 10))


class ConvNet(nn.Module):
    """Convolutions, norms, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.layer1, self.fc = nn.Conv2d(8, 8, 3, groups=1), nn.Linear(8, 10)


PICKED = {
    "GPT2": (GPT2, {"h.0.c_attn.weight", "h.0.c_fc.weight"}),
    "ViT": (ViT, {"conv_proj.weight", "attention.in_proj_weight", "attention.out_proj.weight", "mlp.weight"}),
    "ConvNet": (ConvNet, {"conv1.weight", "layer1.weight"}),
}


@pytest.mark.parametrize("name", PICKED)
def test_hidden_matrices_of_a_model_are_picked_and_said(name: str) -> None:
    """Kernels of a first convolution among them, as everything that is no embedding, head or vector."""
    cls, wanted = PICKED[name]
    model = cls()
    state = opt.setup({opt.hidden_matrices: opt.SOAP(), "**": opt.AdamW()}, model)
    found: dict[str, set[str]] = {}
    for group in opt.explain(state).groups:
        for rule, paths in group.trained:
            found.setdefault(rule.split("(", maxsplit=1)[0], set()).update(paths)

    assert found["SOAP"] == wanted
