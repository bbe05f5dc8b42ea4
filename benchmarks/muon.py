"""Muon written as a user of the library would write it, and as plain NumPy in float64."""

from typing import Any

import numpy as np

import optimisers as opt

QUINTIC = (3.4445, -4.7750, 2.0315)
"""The coefficients of Newton-Schulz steps by Jordan et al. (2024)."""

STEPS = 5


class Muon(opt.Rule):
    """Momentum of matrices, made orthogonal: m = rho m + (1 - rho) dx, and eta times the nearest orthogonal
    matrix to (1 - rho) dx + rho m, by five Newton-Schulz steps on the short side.
    """

    eta: float = 0.02
    rho: float = 0.95
    lam: float = 0.0
    epsilon: float = 1e-7

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        rows, columns = x.shape
        m = self.rho * state + (1 - self.rho) * dx
        y = self.rho * m + (1 - self.rho) * dx
        y = y.T if rows > columns else y
        y = y / opt.maximum(opt.norm(y), self.epsilon)
        a, b, c = QUINTIC
        for _ in range(STEPS):
            g = y @ y.T
            y = a * y + (b * g + c * (g @ g)) @ y
        y = y.T if rows > columns else y
        scale = max(1.0, rows / columns) ** 0.5
        return m, self.eta * (scale * y + self.lam * x)


def stepped(x: Any, m: Any, dx: Any, rule: Muon) -> tuple[Any, Any]:
    """(x, m) after a step of the rule, by NumPy in float64."""
    x, m, dx = (np.asarray(v, np.float64) for v in (x, m, dx))
    rho, (rows, columns) = float(rule.rho), x.shape
    m = rho * m + (1 - rho) * dx
    y = rho * m + (1 - rho) * dx
    y = y.T if rows > columns else y
    y = y / max(np.sqrt((y * y).sum()), float(rule.epsilon))
    a, b, c = QUINTIC
    for _ in range(STEPS):
        g = y @ y.T
        y = a * y + (b * g + c * (g @ g)) @ y
    y = y.T if rows > columns else y
    scale = max(1.0, rows / columns) ** 0.5
    return x - float(rule.eta) * (scale * y + float(rule.lam) * x), m
