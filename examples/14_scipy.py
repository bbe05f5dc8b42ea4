"""SciPy's L-BFGS finishes what Adam began: a model of arrays is one vector, and back, by `destructure`."""

from typing import Any

import numpy as np
from scipy.optimize import minimize

import optimisers as opt

X = np.linspace(-3, 3, 60)[:, None]
Y = np.sin(X)


def loss_and_gradient(model: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The mean square error of a layer of tanh, and its gradients by hand."""
    hidden = np.tanh(X @ model["in"] + model["bias"])
    error = hidden @ model["out"] - Y
    back = 2 / len(X) * error
    inner = (back @ model["out"].T) * (1 - hidden**2)
    grads = {"in": X.T @ inner, "bias": inner.sum(0), "out": hidden.T @ back}
    return float(np.mean(error**2)), grads


def main() -> tuple[float, float]:
    """(loss after Adam, loss after L-BFGS)."""
    rng = np.random.default_rng(0)
    model = {
        "in": rng.standard_normal((1, 12)),
        "bias": rng.standard_normal(12),
        "out": rng.standard_normal((12, 1)) / 4,
    }
    state = opt.setup(opt.Adam(0.02), model)
    for _ in range(300):
        state, model = opt.update_(state, model, loss_and_gradient(model)[1])
    after_adam = loss_and_gradient(model)[0]

    start, rebuild = opt.destructure(model)

    def of_vector(vector: Any) -> tuple[float, Any]:
        loss, grads = loss_and_gradient(rebuild(vector))
        return loss, opt.destructure(grads)[0]

    done = minimize(of_vector, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-15})
    after_lbfgs = loss_and_gradient(rebuild(done.x))[0]
    print(f"loss after 300 steps of Adam {after_adam:.2e}, after {done.nit} of L-BFGS {after_lbfgs:.2e}")
    return after_adam, after_lbfgs


if __name__ == "__main__":
    main()
