"""What settings are called elsewhere, and what to write here."""

from collections.abc import Iterable

ELSEWHERE = {
    "lr": "eta",
    "learning_rate": "eta",
    "betas": "beta",
    "eps": "epsilon",
    "weight_decay": "lam",
    "momentum": "rho",
    "alpha": "rho",
    "max_norm": "omega",
    "centered": "centred",
}
"""What settings are called in torch.optim, Optax and American English -> here."""

OF_CONSTRUCTORS = {
    "adjust_lr_fn": "scale",
    "b1": "beta",
    "b2": "beta",
    "beta1": "beta",
    "beta2": "beta",
    "clip_threshold": "clip",
    "clip_value": "delta",
    "clipping_threshold": "clip",
    "decay": "rho",
    "decay_rate": "decay",
    "coefficient_type": "coefficients",
    "decay_steps": "steps",
    "end_value": "end",
    "eta_min": "end",
    "max_lr": "eta",
    "min_dim_size_to_factor": "factor_from",
    "multiply_by_parameter_scale": "scaled",
    "ns_coeffs": "coefficients",
    "ns_coefficients": "coefficients",
    "ns_steps": "steps",
    "num_steps": "steps",
    "num_training_steps": "steps",
    "num_warmup_steps": "warmup",
    "peak_value": "eta",
    "relative_step": "relative",
    "scale_mode": "scale",
    "scale_parameter": "scaled",
    "total_iters": "steps",
    "total_steps": "steps",
    "transition_steps": "steps",
    "update_proj_gap": "every",
    "warmup_steps": "warmup",
    "T_0": "steps",
    "T_max": "steps",
    "T_mult": "steps_factor",
}
"""The same for names that mean it where a rule or a schedule is made, and not in a group of torch."""

BESIDE_A_RULE = {
    "capturable": "write TorchOptimizer(params, rule, capturable=True)",
    "differentiable": "write optimisers.update, whose steps autograd follows",
}
"""Keywords of torch whose matter is said elsewhere here -> what to write."""

OF_ANOTHER_RULE = {
    "amsgrad": "take TorchAMSGrad, or AMSGrad",
    "momentum": "take SGD(eta, rho), or TorchRMSProp(eta, rho, mu)",
    "nesterov": "take SGD(eta, rho, nesterov=True), or NAdam()",
    "centered": "take RMSProp(centred=True)",
    "decoupled_weight_decay": "take AdamW, or DecoupledDecay(lam, couple=True) behind the rule",
    **BESIDE_A_RULE,
    "dampening": "take SGD(eta, rho, dampening)",
    "momentum_decay": "take TorchNAdam(psi=...)",
    "lr_decay": "take TorchAdaGrad(decay=...)",
    "initial_accumulator_value": "take TorchAdaGrad(start=...)",
    "maximize": "put Maximise() first in the chain",
    "ns_steps": "take Muon(steps=...)",
    "ns_coefficients": "take Muon(coefficients=...)",
    "adjust_lr_fn": "take Muon(scale=...)",
    "beta2_decay": "take TorchAdafactor(decay=...)",
}
"""Keywords of torch that are a rule of its own here, or no matter of rules -> what to write."""

NOT_HERE = {
    "lbfgs": "it asks for the loss again within a step; keep torch.optim.LBFGS, or take "
    "from_optax(optax.lbfgs()) for arrays of JAX, or Adam()",
}
"""Rules that are known elsewhere, in small letters, and not here -> why, and what to take."""

DECAY = (
    "write Chain(WeightDecay(lam), {0}(...)), or Chain({0}(...), DecoupledDecay(lam)), as AdamW is for Adam"
)
"""What to write for a rule without decay of its own."""


def offered(owner: str, name: str, known: Iterable[str]) -> str:
    """The settings that a rule or schedule has, and what to write for the one that was meant."""
    names = list(known)
    has = f"it has {', '.join(names)}" if names else "it has none"
    here = ELSEWHERE.get(name) or OF_CONSTRUCTORS.get(name) or name
    if here in names:
        return f"{has}; write {here}="
    said = DECAY.format(owner) if here == "lam" else OF_ANOTHER_RULE.get(name)
    return f"{has}; {said}" if said else has
