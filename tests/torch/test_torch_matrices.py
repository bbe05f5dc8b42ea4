"""Whole modules of torch by several rules: matrices by one, embeddings, heads and vectors by another."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there

nn = torch.nn


class Block(nn.Module):  # type: ignore[name-defined,misc]
    """Attention with query, key and value in one matrix, and a layer of experts in one stack."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / 8)

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + torch.tanh(torch.einsum("btd,edf->btf", x, self.experts))


class Network(nn.Module):  # type: ignore[name-defined,misc]
    """A small transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(20, 8), nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 20)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


RULES: dict[Any, Any] = {
    opt.by_path("**.qkv.weight"): opt.Muon(0.02, blocks=3),
    opt.by_path("**.experts"): opt.NorMuon(0.02, axes=2),
    opt.hidden_matrices: opt.Muon(0.02),
    "**": opt.AdamW(3e-3),
}


def network() -> Any:
    torch.manual_seed(0)
    return Network()


def loss_of(module: Any, seed: int = 0) -> Any:
    tokens = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(module(tokens).flatten(0, 1), tokens.flatten())


def trained(module: Any, optimizer: Any, steps: int = 5, then: Callable[[], Any] = bool) -> list[float]:
    """The losses on the way."""
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        optimizer.step()
        then()
        losses.append(loss.item())
    return losses


def test_a_selector_gives_hidden_matrices_to_muon_and_explain_says_which() -> None:
    module = network()
    state = opt.setup({opt.hidden_matrices: opt.Muon(0.02), "**": opt.AdamW(3e-4)}, module)
    kinds = {str(path): type(rule).__name__ for path, rule in rules_of(state, module).items()}
    said = str(opt.explain(state))

    muons = {path for path, kind in kinds.items() if kind == "Muon"}
    assert muons == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv.weight", "out.weight", "experts")}
    assert {kind for path, kind in kinds.items() if path not in muons} == {"AdamW"}
    assert "trains blocks.*.qkv.weight (2)" in said
    assert "trains embed.weight" in said
    assert "head.weight" in said.split("Muon(", maxsplit=1)[0]


def rules_of(state: Any, module: Any) -> dict[str, Any]:
    """The rule of every parameter, by its name."""
    found: dict[str, Any] = {}
    for name, _ in module.named_parameters():
        leaf = state
        for key in name.split("."):
            leaf = leaf[int(key)] if key.isdigit() else getattr(leaf, key)
        found[name] = leaf.rule
    return found


def test_a_transformer_learns_by_several_rules() -> None:
    module = network()
    losses = trained(module, opt.TorchOptimizer(module, RULES), 30)

    assert losses[-1] < 0.6 * losses[0]


def test_an_optimiser_steps_as_updates_of_the_module_do() -> None:
    module, other = network(), network()
    trained(module, opt.TorchOptimizer(module, RULES))
    state = opt.setup(RULES, other)
    for _ in range(5):
        value, grads = opt.value_and_grad(loss_of, other)
        state, other = opt.update_(state, other, grads)
        assert float(value) > 0

    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_schedulers_find_one_rate_for_each_rule() -> None:
    module = network()
    optimizer = opt.TorchOptimizer(module, RULES)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02, 0.02, 3e-3]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5**t] * 3 + [lambda t: 1 / (1 + t)])
    trained(module, optimizer, 3, scheduler.step)

    assert [group["lr"] for group in optimizer.param_groups] == [
        0.0025,
        0.0025,
        0.0025,
        pytest.approx(7.5e-4),
    ]


def test_a_run_goes_on_from_the_checkpoint_of_a_whole_module() -> None:
    module = network()
    optimizer = opt.TorchOptimizer(module, RULES)
    trained(module, optimizer, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module.state_dict())
    trained(module, optimizer, 3)
    again = network()
    again.load_state_dict(weights)
    fresh = opt.TorchOptimizer(again, RULES)
    fresh.load_state_dict(saved)
    trained(again, fresh, 3)

    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "rule", [opt.Muon(), opt.EMA(opt.Chain(opt.ClipNorm(), opt.NorMuon()), 0.9), opt.AdaMuon()], ids=str
)
def test_vectors_are_refused_when_an_optimiser_is_made(rule: opt.Rule) -> None:
    linear = nn.Linear(3, 4)
    says = r"model\['bias'\]: \w+ steps matrices, and this array has shape \(4,\).*hidden_matrices: .*AdamW"
    with pytest.raises(opt.BadSetting, match=says):
        opt.TorchOptimizer(linear, rule)
    with pytest.raises(opt.BadSetting, match=r"model\['1.0'\]: \w+ steps matrices"):
        opt.TorchOptimizer([{"params": [linear.weight]}, {"params": linear.bias}], rule)
    optimizer = opt.TorchOptimizer([("w", linear.weight)], rule)
    with pytest.raises(opt.BadSetting, match=r"model\['b'\]: \w+ steps matrices"):
        optimizer.add_param_group({"params": [("b", linear.bias)]})
    assert len(optimizer.param_groups) == 1
    linear.bias.requires_grad_(False)  # what is not trained is no matter

    assert len(opt.TorchOptimizer(linear, rule).param_groups[0]["params"]) == 2
