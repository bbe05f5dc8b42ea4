"""What is no array of numbers is refused where it is put into a state, and changes nothing."""

from typing import Any

import numpy as np
import pytest

import optimisers as opt

ODD: dict[str, Any] = {
    "objects": np.array([1.0, None, 2.0], object),
    "masked": np.ma.masked_array([1.0, 2.0, 3.0], [False, True, False]),
    "dates": np.array(["2020-01-01"] * 3, "datetime64[D]"),
    "durations": np.array([1, 2, 3], "timedelta64[s]"),
    "words": np.array(["a", "b", "c"]),
    "bytes": np.array([b"a", b"b", b"c"]),
    "records": np.zeros(3, [("a", float)]),
    "complex for real": np.ones(3, complex),
    "another shape": np.ones(4),
    "none": None,
}


def made() -> Any:
    model = {"w": np.ones(3)}
    state = opt.setup(opt.Momentum(0.1), model)
    return opt.update(state, model, {"w": np.full(3, 0.5)})[0]


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_array_is_refused_by_the_name_of_its_leaf(odd: Any) -> None:
    state = made()
    before = state["w"].state.v.copy()
    with pytest.raises(opt.OptimiserError, match="w"):
        state["w"].state = state["w"].state._replace(v=odd)

    assert np.array_equal(state["w"].state.v, before)


@pytest.mark.parametrize("odd", [odd for name, odd in ODD.items() if name != "none"], ids=str)
def test_an_odd_tensor_of_torchs_state_is_refused_too(odd: Any) -> None:
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = opt.TorchOptimizer([p], opt.Momentum(0.1))
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["v"] = odd
    with pytest.raises(opt.OptimiserError, match=r"'v'"):
        optimizer.step()

    assert torch.equal(p, before)
