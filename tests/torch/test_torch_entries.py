"""What torch's classes keep of a parameter is found in `state` by torch's names, and counts when it is
written by them.
"""

import copy
import io
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there

pytestmark = pytest.mark.usefixtures("double", "wide_muon")

CLASSES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {"weight_decay": 0.1},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {"maximize": True},
    "Adadelta": {},
    "Rprop": {},
    "ASGD": {"weight_decay": 0.1},
    "Muon": {},
    "Adafactor": {},
}
COUNTED_OTHERWISE = {"ASGD": {"mu"}}
"""What torch keeps and rules here work out from the number of steps."""


def drawn(seed: int, *shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walked(p: Any, optimizer: Any, steps: range) -> None:
    for n in steps:
        p.grad = drawn(n + 1, *p.shape)
        optimizer.step()


def adam(*shape: int) -> tuple[Any, Any]:
    p = torch.nn.Parameter(drawn(0, *shape))
    return p, opt.TorchOptimizer([p], opt.Adam(0.1))


@pytest.mark.parametrize("name", CLASSES)
def test_entries_of_torch_are_found_by_its_names(name: str) -> None:
    p, q = (torch.nn.Parameter(drawn(0, 4, 3)) for _ in range(2))
    optimizer = opt.TorchOptimizer([p], opt.from_torch_class(name, **CLASSES[name]))
    peer = getattr(torch.optim, name)([q], **CLASSES[name])
    walked(p, optimizer, range(3))
    walked(q, peer, range(3))
    state = optimizer.state[p]
    for key, value in peer.state[q].items():
        if key not in COUNTED_OTHERWISE.get(name, ()):
            assert key in state
            assert state.get(key) is state[key]
            wanted = value.double() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
            torch.testing.assert_close(state[key].double(), wanted, rtol=1e-6, atol=1e-9)


def test_what_torch_does_not_keep_of_a_class_is_not_there() -> None:
    p = torch.nn.Parameter(drawn(0, 3))
    optimizer = opt.TorchOptimizer([p], opt.SGD(0.1, 0.9))
    walked(p, optimizer, range(1))

    assert "exp_avg_sq" not in optimizer.state[p]
    with pytest.raises(KeyError, match="exp_avg_sq"):
        optimizer.state[p]["exp_avg_sq"]
    assert optimizer.state[p].get("exp_avg_sq", 7) == 7


def test_what_is_written_by_a_name_of_torch_counts() -> None:
    (p, mine), (q, wanted) = adam(3), adam(3)
    walked(p, mine, range(2))
    walked(q, wanted, range(2))
    mine.state[p]["exp_avg"] = torch.ones(3)
    mine.state[p].update(exp_avg_sq=torch.full((3,), 2.0))
    wanted.state[q]["m"], wanted.state[q]["v"] = torch.ones(3), torch.full((3,), 2.0)
    walked(p, mine, range(2, 5))
    walked(q, wanted, range(2, 5))

    assert torch.equal(p, q)
    assert set(mine.state[p]) == set(wanted.state[q])


def test_points_are_cloned_and_pruned_as_trainers_of_splats_do() -> None:
    """The state moves to a larger or smaller parameter, with its counters, by torch's names."""

    def split(group: Any, optimizer: Any, more: Any) -> Any:
        (old,) = group["params"]
        kept = optimizer.state.get(old)
        for key in ("exp_avg", "exp_avg_sq"):
            kept[key] = torch.cat((kept[key], torch.zeros_like(more)))
        del optimizer.state[old]
        new = torch.nn.Parameter(torch.cat((old.detach(), more)))
        group["params"][0] = new
        optimizer.state[new] = kept
        return new

    def pruned(group: Any, optimizer: Any) -> Any:
        (old,) = group["params"]
        kept = optimizer.state.pop(old)
        kept["exp_avg"], kept["exp_avg_sq"] = kept["exp_avg"][::2], kept["exp_avg_sq"][::2]
        new = group["params"][0] = torch.nn.Parameter(old.detach()[::2].clone())
        optimizer.state[new] = kept
        return new

    ends: list[Any] = []
    for make in (lambda ps: opt.TorchOptimizer(ps, opt.Adam(0.1)), lambda ps: torch.optim.Adam(ps, 0.1)):
        p = torch.nn.Parameter(drawn(0, 4, 3))
        optimizer = make([p])
        walked(p, optimizer, range(3))
        p = split(optimizer.param_groups[0], optimizer, drawn(9, 2, 3))
        walked(p, optimizer, range(3, 6))
        p = pruned(optimizer.param_groups[0], optimizer)
        walked(p, optimizer, range(6, 9))
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_a_dict_of_torchs_names_alone_is_no_new_start() -> None:
    """It lacks the sums of weights by which biases are corrected."""
    p, optimizer = adam(3)
    walked(p, optimizer, range(2))
    optimizer.state[p] = {"step": 2, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    with pytest.raises(opt.TreeMismatch, match=r"Adam\(.* keeps 'm', 'v', 'weight.0', 'weight.1'"):
        walked(p, optimizer, range(2, 3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
def test_entries_are_copied_as_plain_dicts(copied: Any) -> None:
    p, optimizer = adam(3)
    walked(p, optimizer, range(2))
    found = copied(optimizer.state[p])

    assert dict(found).keys() == dict(optimizer.state[p]).keys()
    assert torch.equal(found["m"], optimizer.state[p]["m"])


def test_entries_are_loaded_without_trusting_anybody() -> None:
    p, optimizer = adam(3)
    walked(p, optimizer, range(2))
    file = io.BytesIO()
    torch.save(list(optimizer.state.values()), file)
    file.seek(0)
    (found,) = torch.load(file, weights_only=True)

    assert torch.equal(found["m"], optimizer.state[p]["m"])
