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


def written(o: Any, p: Any, step: float) -> Any:
    """Write a step count as a number or a tensor of its own."""
    o.state[p]["step"] = torch.tensor(step)
    return p


def overwritten(o: Any, p: Any, step: float) -> Any:
    o.state[p]["step"].fill_(step)
    return p


def emptied(o: Any, p: Any, step: float) -> Any:
    """Clear whatever stands there, as code does that walks over all entries."""
    for value in o.state[p].values():
        value.zero_()
    o.state[p]["step"].fill_(step)
    return p


def given_memory(o: Any, p: Any, step: float) -> Any:
    """Put every entry into other memory, as code does that moves optimisers between devices."""
    for value in o.state[p].values():
        value.data = value.data.clone()
    o.state[p]["step"].fill_(step)
    return p


def moved(o: Any, p: Any, step: float) -> Any:
    """Hand the state on to a parameter that was cut, with another step count."""
    kept = o.state.pop(p)
    for key in kept:
        if key != "step":
            kept[key] = kept[key][::2] if kept[key].ndim else kept[key]
    kept["step"] = torch.tensor(step)
    new = o.param_groups[0]["params"][0] = torch.nn.Parameter(p.detach()[::2].clone())
    o.state[new] = kept
    return new


def exchanged(o: Any, p: Any, step: float) -> Any:
    """Put a dict of what torch keeps in the place of all."""
    keys = {*torch_keys(o, p)}
    o.state[p] = {k: o.state[p][k].clone() for k in keys} | {"step": torch.tensor(step)}
    return p


def torch_keys(o: Any, p: Any) -> list[str]:
    known = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "mu_product", "eta", "mu", "ax")
    return [key for key in known if key in o.state[p]]


COUNTING: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {"betas": (0.8, 0.95)}),
    "AMSGrad": ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW": ("AdamW", {}),
    "NAdam": ("NAdam", {}),
    "RAdam": ("RAdam", {"betas": (0.9, 0.7)}),
    "Adamax": ("Adamax", {}),
    "ASGD": ("ASGD", {"t0": 2.0, "lambd": 0.1}),
    "Adagrad": ("Adagrad", {"lr_decay": 0.1}),
    "Adafactor": ("Adafactor", {}),
    "Rprop": ("Rprop", {}),
}
"""Classes whose step depends on how many there were."""


@pytest.mark.parametrize("step", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("write", [written, overwritten, emptied, given_memory, moved, exchanged])
@pytest.mark.parametrize("name", COUNTING)
def test_a_step_that_is_written_corrects_biases_as_in_torch(name: str, write: Any, step: float) -> None:
    title, keywords = COUNTING[name]
    if write is exchanged and name in ("Adagrad", "Adafactor", "Rprop"):
        return
    ends: list[Any] = []
    for of in (opt.TorchOptimizer, None):
        p = torch.nn.Parameter(drawn(0, 6, 4))
        other = torch.nn.Parameter(drawn(1, 2))
        cls: Any = getattr(torch.optim, title)
        optimizer = (
            cls([p, other], **keywords)
            if of is None
            else opt.TorchOptimizer([p, other], opt.from_torch_class(title, **keywords))
        )
        for n in range(12):
            p = write(optimizer, p, step) if n == 6 else p
            p.grad, other.grad = drawn(n + 1, 6, 4)[: p.shape[0]], drawn(n + 30, 2)
            optimizer.step()
        ends.append((p.detach(), other.detach(), float(optimizer.state[p]["step"])))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_what_torch_does_not_keep_is_found_by_name_alone() -> None:
    """Code that cuts every entry along the first axis meets arrays only."""
    p, optimizer = adam(3)
    walked(p, optimizer, range(2))
    state = optimizer.state[p]

    assert sorted(state) == ["m", "step", "v"]
    assert "weight.0" in state
    assert state["weight.0"].item() == pytest.approx(1 - 0.9**2, rel=1e-15)
    assert "weight.0" in optimizer.state_dict()["state"][0]


@pytest.mark.parametrize("key", ["step", "weight.0"])
def test_a_counter_that_is_taken_out_is_as_it_was(key: str) -> None:
    (p, mine), (q, wanted) = adam(3), adam(3)
    walked(p, mine, range(3))
    walked(q, wanted, range(3))
    del mine.state[p][key]
    walked(p, mine, range(3, 6))
    walked(q, wanted, range(3, 6))

    assert torch.equal(p, q)
    assert mine.state[p]["step"] == 6


def test_steps_behind_a_condition_correct_what_follows_them() -> None:
    """Under AccumGrad the moments follow the steps that were taken."""
    ends: list[Any] = []
    for write in (True, False):
        p = torch.nn.Parameter(drawn(0, 3))
        optimizer = opt.TorchOptimizer([p], opt.Chain(opt.AccumGrad(2), opt.Adam(0.1, (0.5, 0.9))))
        walked(p, optimizer, range(4))
        if write:
            optimizer.state[p]["steps_taken"].fill_(1)
        else:
            optimizer.state[p].update({"steps_taken": 1, "1.weight.0": 0.5, "1.weight.1": 0.1})
        walked(p, optimizer, range(4, 8))
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_a_counter_that_is_written_beside_the_step_counts_itself() -> None:
    p, optimizer = adam(3)
    walked(p, optimizer, range(3))
    optimizer.state[p]["step"].zero_()
    optimizer.state[p]["weight.0"].fill_(0.25)
    weight = optimizer.tree["0.0"].state.weight

    assert weight[0] == 0.25
    assert weight[1] == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
def test_entries_are_copied_as_plain_dicts(copied: Any) -> None:
    p, optimizer = adam(3)
    walked(p, optimizer, range(2))
    found = copied(optimizer.state[p])

    assert found.keys() >= {"step", "m", "v", "weight.0", "weight.1"}
    assert torch.equal(found["m"], optimizer.state[p]["m"])


def test_entries_are_loaded_without_trusting_anybody() -> None:
    p, optimizer = adam(3)
    walked(p, optimizer, range(2))
    file = io.BytesIO()
    torch.save(list(optimizer.state.values()), file)
    file.seek(0)
    (found,) = torch.load(file, weights_only=True)

    assert torch.equal(found["m"], optimizer.state[p]["m"])


def test_a_step_that_is_written_on_a_device_counts_as_on_the_host() -> None:
    """Kernels are interpreted here; the counters stand where a graph would read them."""
    pytest.importorskip("triton")
    ends: list[Any] = []
    for captured in (False, True):
        p, q = (torch.nn.Parameter(drawn(n, 3).float()) for n in range(2))
        engine = "triton" if captured else None
        optimizer = opt.TorchOptimizer([p, q], opt.Adam(0.1), engine=engine, capturable=captured)
        for n in range(6):
            if n == 3:
                optimizer.state[p]["step"].zero_()
            p.grad, q.grad = drawn(n + 1, 3).float(), drawn(n + 20, 3).float()
            optimizer.step()
        ends.append((p.detach(), q.detach()))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)
