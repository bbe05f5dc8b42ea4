"""Our rules go where torch.optim and Optax go, wherever the formulas agree.

`golden/peers.json` holds the paths, in float64, that the peers themselves went; `golden/make_peers.py` wrote
it and says which settings make two formulas the same. Where they cannot be made the same, the rule's own
documentation says so, and `golden/optimisers_jl.json` holds what it should do.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optimisers as opt

PEERS: dict[str, Any] = json.loads(
    Path(__file__).parents[1].joinpath("golden").joinpath("peers.json").read_text()
)
ROWS: list[dict[str, Any]] = PEERS["rows"]

OF_TORCH = {
    "SGD", "ASGD", "Momentum", "Nesterov", "WeightDecay", "Maximise", "DecoupledDecay",
    "Adam", "AdamW", "TorchAMSGrad", "TorchNAdam", "TorchRAdam",
    "AdaMax", "TorchAdaMax", "RMSProp", "TorchRMSProp", "TorchAdaGrad", "AdaDelta", "Rprop",
}  # fmt: skip
OF_OPTAX = {
    "Adam", "AdaBelief", "Lion", "NAdam", "RAdam", "AMSGrad", "TorchAMSGrad", "AdaMax", "DecoupledDecay",
}  # fmt: skip


def title_of(row: dict[str, Any]) -> str:
    settings = ",".join(f"{k}={v}" for k, v in row["settings"].items())
    return f"{row['peer']}({settings})-{row['gradients']}".replace(" ", "")


def rule_of(row: dict[str, Any]) -> opt.Rule:
    rules = [
        getattr(opt, part["rule"])(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in part["settings"].items()}
        )
        for part in row["rules"]
    ]
    return rules[0] if len(rules) == 1 else opt.Chain(*rules)


WAYS = (("interpret", opt.update), ("numba", opt.update_), ("interpret", opt.update_), ("numba", opt.update))


def by_turns() -> Iterator[Any]:
    """Every row, stepped in one way. The rows of a rule differ in numbers alone, which stand beside a kernel
    and not in it: so each rule, not each row, is stepped by both engines, into new arrays and in place.
    """
    taken: Counter[tuple[str, ...]] = Counter()
    for row in ROWS:
        rules = tuple(part["rule"] for part in row["rules"])
        engine, step = WAYS[taken[rules] % len(WAYS)]
        taken[rules] += 1
        yield pytest.param(row, engine, step, id=f"{title_of(row)}-{engine}-{step.__name__}")
    assert min(taken.values()) > 1


@pytest.mark.parametrize(("row", "engine", "step"), list(by_turns()))
def test_a_rule_goes_the_way_of_its_peer(row: dict[str, Any], engine: str, step: Callable[..., Any]) -> None:
    x = np.array(PEERS["x"])
    state = opt.setup(rule_of(row), x, engine=engine)
    gradients = PEERS["gradients"][row["gradients"]]
    for n, (g, wanted) in enumerate(zip(gradients, row["path"], strict=True)):
        state, x = step(state, x, np.array(g))
        np.testing.assert_allclose(x, wanted, rtol=1e-12, atol=0, err_msg=f"after step {n + 1}")


@pytest.mark.parametrize(("library", "rules"), [("torch", OF_TORCH), ("optax", OF_OPTAX)])
def test_there_is_a_row_for_every_rule_that_a_peer_writes_as_we_do(library: str, rules: set[str]) -> None:
    found = {part["rule"] for row in ROWS if row["peer"].startswith(library) for part in row["rules"]}

    assert found == rules


def test_both_forms_of_rmsprop_are_held_to_that_of_torch() -> None:
    found = {row["rules"][0]["settings"]["centred"] for row in ROWS if row["peer"] == "torch.optim.RMSprop"}

    assert found == {False, True}


def test_the_gradients_have_zeros_at_the_start_on_the_way_and_throughout() -> None:
    sparse = np.array(PEERS["gradients"]["sparse"])

    assert (sparse[0, :3] == 0).all()
    assert (sparse[:, 0] == 0).all()
    assert (sparse[1:, 1:] == 0).any()
    assert len({len(row["path"]) for row in ROWS} | {12}) == 1


def test_the_file_says_which_versions_went() -> None:
    assert PEERS["versions"]["torch"].startswith("2.13.0")
    assert set(PEERS["versions"]) == {"torch", "optax", "jax", "numpy", "python"}
