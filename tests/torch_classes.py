"""The classes of torch.optim that a rule speaks for, each with keywords that it understands."""

from typing import Any

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.05, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.05, "amsgrad": True}),
    ("AdamW", {"lr": 0.05, "betas": (0.8, 0.95)}),
    ("AdamW", {"lr": 0.05, "amsgrad": True, "maximize": True}),
    ("NAdam", {"momentum_decay": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"betas": (0.8, 0.8), "lr": 0.05}),
    ("Adamax", {"weight_decay": 0.1}),
    ("RMSprop", {"weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.7, "centered": True}),
    ("Adagrad", {"lr_decay": 0.3, "initial_accumulator_value": 0.4}),
    ("Adadelta", {"lr": 0.3}),
    ("Rprop", {"lr": 0.02}),
    ("ASGD", {"lambd": 0.1, "t0": 3.0}),
    ("Muon", {"lr": 0.05}),
    ("Muon", {"ns_steps": 3, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3, "nesterov": False}),
    ("Adafactor", {"lr": 0.5, "weight_decay": 0.1, "maximize": True}),
    ("Adafactor", {"beta2_decay": -0.5, "eps": (1e-3, 0.5), "d": 2.0}),
]
