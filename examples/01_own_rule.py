"""A rule of one's own, written once for one array, trains a whole model in one fused pass."""

from typing import Any, NamedTuple

import numpy as np

import optimisers as opt


class SignumState(NamedTuple):
    m: Any
    """The mean gradient."""


class Signum(opt.Rule):
    """Steps by the sign of a momentum: m = rho m + (1 - rho) dx; dx' = eta sign(m).

    Bernstein et al., "signSGD: compressed optimisation for non-convex problems", 2018, arXiv:1802.04434,
    algorithm 2.
    """

    eta: float = 0.01
    rho: float = 0.9

    def init(self, x: Any) -> Any:
        return SignumState(opt.zeros_like(x))

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        m = opt.ema(self.rho, state.m, dx)
        return SignumState(m), self.eta * opt.sign(m)


def main() -> dict[str, Any]:
    """Fit a line to noisy points, with the rate falling to zero."""
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, 200)
    targets = 3 * inputs - 1 + 0.1 * rng.standard_normal(200)
    model = {"slope": np.zeros(1), "offset": np.zeros(1)}
    state = opt.setup(Signum(eta=opt.Linear(0.05, 0.0, 300)), model)
    for _ in range(300):
        error = model["slope"] * inputs + model["offset"] - targets
        grads = {"slope": np.mean(error * inputs, keepdims=True), "offset": np.mean(error, keepdims=True)}
        state, model = opt.update_(state, model, grads)
    print(f"slope {model['slope'][0]:.3f}, offset {model['offset'][0]:.3f}")
    print(opt.explain(state))
    return model


if __name__ == "__main__":
    main()
