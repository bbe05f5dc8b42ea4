"""The golden trajectories, and the rules that walk them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

import optimisers as opt

ROWS: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("golden").joinpath("optimisers_jl.json").read_text()
)


REDUCING = {"ClipNorm"}
"""Rules that sum over an array, whose order of summation is free."""


def names_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(part["rule"] for part in row["chain"])


def exists(row: dict[str, Any]) -> bool:
    return all(hasattr(opt, name) for name in names_of(row))


def title_of(row: dict[str, Any]) -> str:
    parts = [f"{p['rule']}({','.join(f'{k}={v}' for k, v in p['hyper'].items())})" for p in row["chain"]]
    return f"{'-'.join(parts) or 'empty'}-{row['dtype']}".replace(" ", "")


def rule_of(row: dict[str, Any]) -> opt.Rule:
    """The row's rule: alone if there is one, as a chain if there are several or none."""
    rules = [getattr(opt, p["rule"])(**{k: setting(v) for k, v in p["hyper"].items()}) for p in row["chain"]]
    return rules[0] if len(rules) == 1 else opt.Chain(*rules)


def setting(value: Any) -> Any:
    return math.inf if value == "inf" else tuple(value) if isinstance(value, list) else value


def array_of(value: Any, dtype: str) -> Any:
    """The numbers of one array; complex ones are written as pairs."""
    a = np.array(value, np.float64)
    return a[..., 0] + 1j * a[..., 1] if dtype.startswith("complex") else a


PRESENT = [row for row in ROWS if exists(row)]
