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


def offered(name: str, known: Iterable[str]) -> str:
    """The settings there are, and the one that was meant."""
    names = list(known)
    here = ELSEWHERE.get(name, "")
    has = f"it has {', '.join(names)}" if names else "it has none"
    return f"{has}; write {here}=" if here in names else has
