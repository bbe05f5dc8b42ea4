"""The rules that people train with today, and who else has each of them."""

from typing import Any, Literal, NamedTuple

import optimisers as opt

ETA = 1e-3


class Row(NamedTuple):
    """A rule, and who else has it."""

    rule: opt.Rule
    peers: dict[str, dict[str, Any]] = {}  # noqa: RUF012 never written to
    """Path of a class or function -> its settings; `OVER` and `THEN` are no settings."""
    given: Literal["", "loss", "second", "examples"] = ""
    """What a step is given beside the gradients: the loss, or second gradients; or each example's."""
    elementwise: bool = True
    """Whether each element is stepped by itself, in one pass."""


OVER, THEN = "over", "then"
"""In settings: the optimizer that a wrapper wraps; what takes the step behind a transform of gradients."""

TIMM, PO, CONTRIB, DADAPT = "timm.optim.", "pytorch_optimizer.", "optax.contrib.", "dadaptation."
FOREACH = {"foreach": True, "triton": False}
ADAPTED = {"always_adapt": True}
"""Else timm leaves out the ratio of the norms where nothing decays."""
ADAMW, DESCENT = "torch.optim.AdamW", {THEN: "optax.sgd"}


def before_descent(rule: opt.Rule) -> opt.Rule:
    """A rule that prepares gradients, with the plainest step behind it."""
    return opt.Chain(rule, opt.Descent(ETA))


ROWS = {
    # adaptive
    "NAdamW": Row(opt.NAdamW(ETA), {TIMM + "NAdamW": {}, "optax.nadamw": {}}),
    "Adan": Row(opt.Adan(ETA), {TIMM + "Adan": {}, "optimi.Adan": FOREACH, "optax.adan": {}}),
    "ADOPT": Row(opt.ADOPT(ETA), {TIMM + "Adopt": {}, CONTRIB + "adopt": {}}),
    "AdEMAMix": Row(opt.AdEMAMix(ETA), {PO + "AdEMAMix": {}, CONTRIB + "ademamix": {}}),
    "SimplifiedAdEMAMix": Row(
        opt.SimplifiedAdEMAMix(ETA), {PO + "SimplifiedAdEMAMix": {}, CONTRIB + "simplified_ademamix": {}}
    ),
    "StableAdamW": Row(
        opt.StableAdamW(ETA), {PO + "StableAdamW": {}, "optimi.StableAdamW": FOREACH}, elementwise=False
    ),
    "LaProp": Row(opt.LaProp(ETA), {TIMM + "LaProp": {}, PO + "LaProp": {}}),
    "Yogi": Row(opt.Yogi(ETA), {PO + "Yogi": {}, "optax.yogi": {}}),
    "QHM": Row(opt.QHM(ETA), {PO + "QHM": {}}),
    "QHAdam": Row(opt.QHAdam(ETA), {PO + "QHAdam": {}}),
    "MADGRAD": Row(opt.MADGRAD(ETA), {TIMM + "MADGRAD": {}, PO + "MADGRAD": {}}),
    "AdamP": Row(opt.AdamP(ETA), {TIMM + "AdamP": {}, PO + "AdamP": {}}, elementwise=False),
    "SGDP": Row(opt.SGDP(ETA), {TIMM + "SGDP": {}, PO + "SGDP": {}}, elementwise=False),
    "AdamAtan2": Row(opt.AdamAtan2(ETA)),
    "CorrectedDecay": Row(
        opt.Chain(opt.Adam(ETA), opt.CorrectedDecay(0.1)), {PO + "AdamC": {"weight_decay": 0.1}}
    ),
    "FTRL": Row(opt.FTRL(ETA), {PO + "FTRL": {}}),
    "ASGD": Row(opt.ASGD(ETA), {"torch.optim.ASGD": {}}),
    # signs, trust, variance
    "SignDescent": Row(opt.SignDescent(ETA), {"optax.sign_sgd": {}}),
    "Signum": Row(opt.Signum(ETA), {PO + "SignSGD": {}, "optax.signum": {}}),
    "Lion": Row(opt.Lion(ETA), {TIMM + "Lion": {}, PO + "Lion": {}, "optax.lion": {}}),
    "Grams": Row(opt.Grams(ETA), {PO + "Grams": {}}),
    "MARS": Row(opt.MARS(ETA), {TIMM + "Mars": {}, PO + "MARS": {}}, elementwise=False),
    "LARS": Row(
        opt.LARS(ETA),
        {TIMM + "Lars": ADAPTED | {"momentum": 0.9}, PO + "LARS": {}, "optax.lars": {}},
        elementwise=False,
    ),
    "LAMB": Row(
        opt.LAMB(ETA), {TIMM + "Lamb": ADAPTED, PO + "Lamb": {}, "optax.lamb": {}}, elementwise=False
    ),
    "NovoGrad": Row(
        opt.NovoGrad(ETA),
        {TIMM + "NvNovoGrad": {}, PO + "NovoGrad": {}, "optax.novograd": {}},
        elementwise=False,
    ),
    # without a rate
    "Prodigy": Row(
        opt.Prodigy(), {"prodigyopt.Prodigy": {"lr": 1.0}, CONTRIB + "prodigy": {}}, elementwise=False
    ),
    "DAdaptAdam": Row(
        opt.DAdaptAdam(),
        {DADAPT + "DAdaptAdam": {"lr": 1.0}, CONTRIB + "dadapt_adamw": {}},
        elementwise=False,
    ),
    "DAdaptSGD": Row(opt.DAdaptSGD(), {DADAPT + "DAdaptSGD": {"lr": 1.0}}, elementwise=False),
    "DAdaptLion": Row(opt.DAdaptLion(), {DADAPT + "DAdaptLion": {"lr": 1.0}}, elementwise=False),
    "DoG": Row(opt.DoG(), {CONTRIB + "dog": {}}, elementwise=False),
    "LDoG": Row(opt.LDoG(), elementwise=False),
    "DoWG": Row(opt.DoWG(), {CONTRIB + "dowg": {}}, elementwise=False),
    "Mechanic": Row(
        opt.Mechanic(opt.Adam(ETA)), {CONTRIB + "mechanize": {OVER: "optax.adam"}}, elementwise=False
    ),
    "MoMo": Row(opt.MoMo(), {CONTRIB + "momo": {}}, "loss", elementwise=False),
    "MoMoAdam": Row(opt.MoMoAdam(), {CONTRIB + "momo_adam": {}}, "loss", elementwise=False),
    "PolyakSPS": Row(opt.PolyakSPS(), {"optax.polyak_sgd": {}}, "loss", elementwise=False),
    # second order
    "Sophia": Row(opt.Sophia(ETA), {PO + "SophiaH": {}}, "second"),
    "AdaHessian": Row(opt.AdaHessian(ETA), {PO + "AdaHessian": {}}, "second", elementwise=False),
    # around other rules
    "ScheduleFree": Row(
        opt.ScheduleFree(opt.Descent(ETA)),
        {"schedulefree.SGDScheduleFree": {}, CONTRIB + "schedule_free_sgd": {}},
    ),
    "GPA": Row(opt.GPA(opt.Descent(ETA))),
    "Lookahead": Row(
        opt.Lookahead(opt.AdamW(ETA)), {TIMM + "Lookahead": {OVER: ADAMW}, PO + "Lookahead": {OVER: ADAMW}}
    ),
    "SWA": Row(opt.SWA(opt.AdamW(ETA))),
    "Cautious": Row(
        opt.Cautious(opt.AdamW(ETA)), {TIMM + "AdamWLegacy": {"caution": True}}, elementwise=False
    ),
    "CautiousDecay": Row(opt.Chain(opt.Adam(ETA), opt.CautiousDecay(0.1))),
    # gradients on their way
    "AdaptiveClip": Row(
        before_descent(opt.AdaptiveClip(0.01)),
        {"optax.adaptive_grad_clip": {"clipping": 0.01} | DESCENT},
        elementwise=False,
    ),
    "Centralize": Row(before_descent(opt.Centralize()), {"optax.centralize": DESCENT}, elementwise=False),
    "ZeroNonFinite": Row(before_descent(opt.ZeroNonFinite()), {"optax.zero_nans": DESCENT}),
    "ClipRMS": Row(
        before_descent(opt.ClipRMS(1.0)),
        {"optax.clip_by_block_rms": {"threshold": 1.0} | DESCENT},
        elementwise=False,
    ),
    "NormalizeGrad": Row(
        before_descent(opt.NormalizeGrad()), {"optax.normalize_by_update_norm": DESCENT}, elementwise=False
    ),
    "GrokFast": Row(opt.Chain(opt.GrokFast(), opt.AdamW(ETA)), {PO + "GrokFastAdamW": {"grokfast": True}}),
    "OrthoGrad": Row(
        before_descent(opt.OrthoGrad()), {PO + "OrthoGrad": {OVER: "torch.optim.SGD"}}, elementwise=False
    ),
    "ZClip": Row(before_descent(opt.ZClip()), elementwise=False),
    # noise
    "AddNoise": Row(
        before_descent(opt.AddNoise(0.01, 0.55)),
        {"optax.add_noise": {"eta": 0.01, "gamma": 0.55, "seed": 0} | DESCENT},
    ),
    "SGLD": Row(opt.SGLD(ETA)),
    "PrivateAggregate": Row(
        before_descent(opt.PrivateAggregate()),
        {
            CONTRIB + "differentially_private_aggregate": {
                "l2_norm_clip": 1.0,
                "noise_multiplier": 1.0,
                "seed": 0,
            }
            | DESCENT
        },
        "examples",
        elementwise=False,
    ),
}
"""The rules; those with a norm, a mean or a total take two passes or more."""
