"""What is right to a type checker where PyTorch is used: read by pyright and mypy, and never run."""

from typing import assert_type

import torch

import optimisers as opt

module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
data = torch.zeros(4, 3)


def closure() -> torch.Tensor:
    loss: torch.Tensor = module(data).square().sum()
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    return loss


optimizer = opt.TorchOptimizer(module, opt.AdamW(opt.Cosine(1e-3, 100), lam=0.1), engine="numba")
opt.TorchOptimizer(module.parameters(), opt.Lion(1e-4), lr=3e-4)
opt.TorchOptimizer(list(module.named_parameters()), {"*.bias": None, "**": opt.Adam()})
opt.TorchOptimizer([{"params": list(module.parameters()), "lr": 0.1}], opt.Momentum())
opt.TorchOptimizer(module, {opt.hidden_matrices: opt.Muon(0.02), "**": opt.AdamW(3e-4)})
opt.TorchOptimizer(module, opt.layer_decay(opt.AdamW(), 0.75))
assert_type(opt.TorchOptimizer.of(torch.optim.Adam(module.parameters())), opt.TorchOptimizer)

assert_type(optimizer.step(closure), torch.Tensor)
optimizer.step()
optimizer.step(hessians=[torch.zeros(2, 3), None])
optimizer.zero_grad()
torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
opt.save("run.safetensors", optimizer.tree, module, epoch=3)

state = opt.setup(opt.Adam(), module)
assert_type(opt.update_(state, module, None), tuple[opt.State, torch.nn.Sequential])
