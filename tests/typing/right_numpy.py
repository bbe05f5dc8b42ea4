"""What is right to a type checker: read by pyright and mypy, both strict, and never run."""

from typing import Any, assert_type

import numpy as np

import optimisers as opt


class Net:
    w: Any

    def forward(self) -> float:
        return 0.0


class Mine(opt.Rule):
    eta: float = 0.1

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, self.eta * dx


class Scheduled(opt.Rule):
    eta: opt.Setting = opt.setting(0.1)
    beta: opt.Pair = opt.setting((0.9, 0.999))


model = Net()
state = opt.setup(opt.AdamW(opt.Cosine(0.01, 1000, warmup=100), lam=0.1), model)
assert_type(state, opt.State)
assert_type(opt.update(state, model, model), tuple[opt.State, Net])
assert_type(opt.update_(state, model, model), tuple[opt.State, Net])
assert_type(opt.freeze(opt.adjust(state, 0.1), where="w"), opt.State)
assert_type(opt.adjust(opt.Adam(), 0.1), opt.Adam)
opt.freeze_(state.layers[3])
opt.adjust_(state["w"], lam=0.0)
shown = state.frozen, state.layers[0].rule.eta

opt.Descent(lambda clock: 0.1 / opt.sqrt(clock + 1))
opt.Adam(0.1, beta=(opt.Linear(0.8, 0.9, 100), 0.999))
opt.Adam(np.float32(0.1))
opt.setup({"**.b": opt.Descent(1), "**": None}, model)
opt.setup({opt.vectors: opt.Adam(), opt.matrices & ~opt.by_path("a"): None, "**": opt.Descent()}, model)
assert_type(opt.hidden_matrices | "head.**", opt.Selector)
opt.freeze_(state, opt.by_type(Net))
with opt.averaged_(state, model) as evaluated:
    shown = evaluated, state
opt.setup(opt.layer_decay({opt.vectors: opt.Adam(), "**": None}, 0.75, layer=len), model)
opt.setup(lambda path, _: opt.Adam() if len(path) else None, model)
Mine(0.1)
Scheduled(opt.Cosine(0.1, 10), (0.9, opt.Linear(0.8, 0.9, 100)))
assert_type(Scheduled().eta, float)
assert_type(Scheduled().beta, tuple[float, float])
