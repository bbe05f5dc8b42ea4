"""A package that only likes one array: SciPy's L-BFGS trains a network through `destructure`."""

from typing import Any

import numpy as np
from scipy.optimize import minimize

import optimisers as opt

INPUTS = np.linspace(-3, 3, 100)[:, None]
TARGETS = np.sin(INPUTS)


def loss_and_gradient(model: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The mean squared error of a network with one hidden layer of tanh, and its gradient by hand."""
    hidden = np.tanh(INPUTS @ model["in"] + model["bias"])
    error = hidden @ model["out"] - TARGETS
    back = (error @ model["out"].T) * (1 - hidden**2) * (2 / error.size)
    grads = {"in": INPUTS.T @ back, "bias": back.sum(0), "out": hidden.T @ error * (2 / error.size)}
    return float(np.mean(error**2)), grads


def main() -> float:
    """Train from one vector and back; the loss that was reached."""
    rng = np.random.default_rng(0)
    model = {
        "in": rng.standard_normal((1, 20)),
        "bias": np.zeros(20),
        "out": rng.standard_normal((20, 1)) * 0.1,
    }
    flat, rebuild = opt.destructure(model)

    def of_vector(vector: Any) -> tuple[float, Any]:
        loss, grads = loss_and_gradient(rebuild(vector, copy=False))
        return loss, opt.destructure(grads)[0]

    found = minimize(of_vector, flat, jac=True, method="L-BFGS-B", options={"maxiter": 300})
    model = rebuild(found.x)
    loss, _ = loss_and_gradient(model)
    print(
        f"loss {loss:.2e} after {found.nit} iterations, parameters {[(k, v.shape) for k, v in model.items()]}"
    )
    return loss


if __name__ == "__main__":
    main()
