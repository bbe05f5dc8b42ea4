"""What is written into `state`, `param_groups` and gradients of an optimiser of torch counts, whoever wrote
it.

The right numbers are those of torch.optim under the same edits, or formulas written here.
"""

# ruff: noqa: ARG005 edits take what they are given

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402 torch may be missing

NAMES = {"m": "exp_avg", "v": "exp_avg_sq"}
"""Entries of Adam -> their names in torch."""


def ours(params: Any) -> Any:
    return opt.TorchOptimizer(params, opt.Adam(0.1))


def theirs(params: Any) -> Any:
    return torch.optim.Adam(params, 0.1)


def parameters(*shapes: tuple[int, ...]) -> list[Any]:
    made = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=made, dtype=torch.float64)) for s in shapes or ((3,), (2,))]


def stepped(optimizer: Any, steps: range, scale: float = 1.0) -> None:
    """Steps whose gradients are the parameters, turned by the number of the step."""
    for n in steps:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = scale * (p.detach() + (-1) ** n)
        optimizer.step()


def side_by_side(act: Callable[[Any, list[Any], dict[str, str]], None]) -> None:
    """Both optimisers with the same act between two steps, equal after each."""
    runs = [(make, parameters(), names) for make, names in ((ours, {"m": "m", "v": "v"}), (theirs, NAMES))]
    ends: list[list[Any]] = []
    for make, params, names in runs:
        optimizer = make(params)
        stepped(optimizer, range(5))
        act(optimizer, params, names)
        stepped(optimizer, range(5, 9))
        ends.append([p for group in optimizer.param_groups for p in group["params"]])
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)


def renewed(optimizer: Any, p: Any, key: str) -> None:
    """Give an entry other memory, as code does that moves optimisers between devices."""
    entry = optimizer.state[p][key]
    entry.data = 2 * entry.data.clone()


EDITS: dict[str, Callable[[Any, list[Any], dict[str, str]], object]] = {
    "emptied": lambda o, ps, k: o.state.__setitem__(ps[0], {}),
    "cleared": lambda o, ps, k: o.state[ps[0]].clear(),
    "taken out": lambda o, ps, k: o.state.pop(ps[1]),
    "exchanged": lambda o, ps, k: o.state[ps[0]].update({k["m"]: torch.ones(3, dtype=torch.float64)}),
    "set": lambda o, ps, k: o.state[ps[0]].__setitem__(k["v"], torch.ones(3, dtype=torch.float64)),
    "in place": lambda o, ps, k: o.state[ps[0]][k["m"]].zero_(),
    "other memory": lambda o, ps, k: renewed(o, ps[1], k["v"]),
    "another dict": lambda o, ps, k: o.state.__setitem__(ps[0], dict(o.state[ps[0]])),
    "joined": lambda o, ps, k: o.state[ps[0]].__ior__({k["v"]: torch.ones(3, dtype=torch.float64)}),
    "all of it": lambda o, ps, k: o.state.clear(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_is_written_into_the_state_counts_as_in_torch(edit: Callable[..., None]) -> None:
    side_by_side(edit)


def test_the_dict_that_was_put_in_goes_on_to_count() -> None:
    """An entry that stands there after an exchange is the array of the state, and so is its dict."""

    def act(optimizer: Any, params: list[Any], names: dict[str, str]) -> None:
        p = params[0]
        optimizer.state[p] = dict(optimizer.state[p])
        stepped(optimizer, range(1))
        optimizer.state[p][names["m"]].zero_()

    side_by_side(act)


def test_counters_are_live_and_may_be_written() -> None:
    p, q = parameters()
    optimizer = opt.TorchOptimizer([p, q], opt.Adam(0.1, (0.5, 0.9)))
    stepped(optimizer, range(3))
    step, weight = optimizer.state[p]["step"], optimizer.state[p]["weight.0"]

    assert (step.item(), weight.item()) == (3, 1 - 0.5**3)
    stepped(optimizer, range(2))
    assert (step.item(), weight.item()) == (5, 1 - 0.5**5)

    step.fill_(7)
    weight.fill_(0.25)
    leaf = optimizer.tree["0.0"]

    assert leaf.state.weight[0] == 0.25
    assert optimizer.state_dict()["state"][0]["step"] == 7
    assert optimizer.state[q]["step"] == 5
    step.fill_(-1)
    with pytest.raises(opt.TreeMismatch, match=r"step is negative"):
        optimizer.step()


def test_state_that_is_moved_to_another_parameter_takes_its_counters_along() -> None:
    """As trainers of point clouds do that prune and clone."""

    def act(optimizer: Any, params: list[Any], names: dict[str, str]) -> None:
        keep = torch.tensor([True, False, True])
        kept = optimizer.state.pop(params[0])
        for key in names.values():
            kept[key] = torch.cat([kept[key][keep], torch.zeros(2, dtype=torch.float64)])
        old = params[0].detach()
        new = nn.Parameter(torch.cat([old[keep], old[:2]]))
        optimizer.param_groups[0]["params"][0] = new
        optimizer.state[new] = kept

    side_by_side(act)


def test_a_parameter_that_is_taken_out_and_put_back_goes_on() -> None:
    def act(optimizer: Any, _: Any, __: Any) -> None:
        last = optimizer.param_groups[0]["params"].pop()
        stepped(optimizer, range(2))
        optimizer.param_groups[0]["params"].append(last)

    side_by_side(act)


def test_a_shape_that_does_not_fit_is_refused_by_name() -> None:
    params = parameters()
    optimizer = opt.TorchOptimizer([("a", params[0]), ("b", params[1])], opt.Adam(0.1))
    stepped(optimizer, range(2))
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["m"] = torch.zeros(7, dtype=torch.float64)
    with pytest.raises(opt.TreeMismatch, match=r"'m' of 'b' has shape \(7,\).*\(2,\)"):
        optimizer.step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)


# -- entries of other tools ----------------------------------------------------------------------------------


def test_entries_of_other_tools_stay_through_a_checkpoint_and_more_parameters() -> None:
    p, q = parameters()
    optimizer = opt.TorchOptimizer([p], opt.Momentum(0.1))
    stepped(optimizer, range(2))
    slow = torch.ones(3, dtype=torch.float64)
    optimizer.state[p]["slow"] = slow
    optimizer.state["epoch"] = 4
    optimizer.add_param_group({"params": [q]})
    stepped(optimizer, range(2))

    assert optimizer.state[p]["slow"] is slow
    saved = copy.deepcopy(optimizer.state_dict())
    assert type(saved["state"][0]) is dict
    new = opt.TorchOptimizer([{"params": [p]}, {"params": [q]}], opt.Momentum(0.1))
    new.load_state_dict(saved)

    assert torch.equal(new.state[p]["slow"], slow)
    assert new.state["epoch"] == 4
    del saved["others"]
    with pytest.raises(opt.TreeMismatch, match=r"'slow'.*Momentum"):
        opt.TorchOptimizer([{"params": [p]}, {"params": [q]}], opt.Momentum(0.1)).load_state_dict(saved)


def test_what_a_hook_puts_into_a_loaded_state_counts() -> None:
    (p, _) = parameters()
    optimizer = opt.TorchOptimizer([p], opt.Momentum(0.1))
    stepped(optimizer, range(2))

    def emptied(o: Any) -> None:
        o.state[p]["v"] = torch.zeros(3, dtype=torch.float64)

    optimizer.register_load_state_dict_post_hook(emptied)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()

    assert torch.equal(p.detach(), before)


# -- groups --------------------------------------------------------------------------------------------------


def two_groups(make: Callable[[Any], Any]) -> tuple[list[Any], Any]:
    params = parameters((3,), (2,), (4,))
    return params, make([{"params": params[:1]}, {"params": params[1:2], "lr": 0.3}])


GROUP_EDITS: dict[str, Callable[[Any, list[Any]], object]] = {
    "popped": lambda o, ps: o.param_groups.pop(),
    "popped first": lambda o, ps: o.param_groups.pop(0),
    "appended": lambda o, ps: o.param_groups.append({**o.param_groups[1], "params": [ps[2]]}),
    "grown": lambda o, ps: o.param_groups[0]["params"].append(ps[2]),
    "moved": lambda o, ps: o.param_groups[1]["params"].append(o.param_groups[0]["params"].pop()),
    "added": lambda o, ps: o.add_param_group({"params": [ps[2]], "lr": 0.05}),
    "cleared": lambda o, ps: (o.param_groups.clear(), o.add_param_group({"params": [ps[2]], "lr": 0.05})),
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("edit", GROUP_EDITS.values(), ids=GROUP_EDITS)
def test_groups_that_are_edited_are_followed_as_in_torch(edit: Callable[..., None], steps: int) -> None:
    ends: list[Any] = []
    for make in (ours, theirs):
        params, optimizer = two_groups(make)
        stepped(optimizer, range(steps))
        edit(optimizer, params)
        stepped(optimizer, range(4))
        ends.append(params)
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)


def test_many_added_groups_go_the_way_of_torch() -> None:
    """Each is put behind the others; now and then all are laid out anew."""
    ends: list[Any] = []
    for make in (ours, theirs):
        params = parameters(*[(n,) for n in range(1, 14)])
        optimizer = make(params[:1])
        for n, p in enumerate(params[1:]):
            stepped(optimizer, range(2))
            optimizer.add_param_group({"params": [p], "lr": 0.01 * (n + 1)})
        stepped(optimizer, range(3))
        ends.append(params)
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("by", ["add_param_group", "append"])
def test_an_optimiser_made_from_a_module_grows(by: str) -> None:
    module = nn.Linear(2, 2)
    optimizer = opt.TorchOptimizer(module, opt.Descent(0.5))
    more = nn.Parameter(torch.ones(3))
    if by == "append":
        optimizer.param_groups[0]["params"].append(more)
    else:
        optimizer.add_param_group({"params": more})
    more.grad = torch.ones(3)
    optimizer.step()

    assert more.tolist() == [0.5] * 3
    assert list(optimizer.parameters)[:2] == ["weight", "bias"]
    assert [p.shape[0] for p in optimizer.parameters.values()] == [2, 2, 3]
    assert [len(g["param_names"]) for g in optimizer.param_groups] == [
        len(g["params"]) for g in optimizer.param_groups
    ]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("maximize", True, "Maximise"),
        ("amsgrad", True, "TorchAMSGrad"),
        ("differentiable", True, "optimisers.update"),
        ("capturable", True, r"capturable=True"),
        ("momentum", 0.9, "no such setting"),
        ("weight_decay", 0.1, "no such setting"),
        ("lam", 0.1, "no such setting"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_setting_that_the_rule_lacks_is_refused_also_later(
    key: str, value: Any, says: str, steps: int
) -> None:
    params = parameters()
    optimizer = ours(params)
    stepped(optimizer, range(steps))
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0][key] = value
    with pytest.raises(opt.BadSetting, match=rf"group 0 sets {key}={value}.*{says}"):
        stepped(optimizer, range(1))
    torch.testing.assert_close(params, before, rtol=0, atol=0)


def test_a_setting_that_is_gone_or_says_two_things_is_refused() -> None:
    optimizer = ours(parameters())
    stepped(optimizer, range(1))
    group = optimizer.param_groups[0]
    group |= {"eps": 1e-3, "epsilon": 1e-4}
    with pytest.raises(opt.BadSetting, match=r"group 0 sets epsilon to .* and, by its name"):
        optimizer.step()
    group |= {"eps": 1e-3, "epsilon": 1e-3}
    optimizer.step()
    del group["lr"]
    with pytest.raises(opt.BadSetting, match=r"group 0 has no lr any more; write it again: it was 0.1"):
        optimizer.step()


def test_flags_of_how_torch_computes_are_no_matter() -> None:
    optimizer = opt.TorchOptimizer(parameters(), opt.Adam(0.1), fused=True, foreach=False)
    stepped(optimizer, range(2))
    optimizer.param_groups[0]["foreach"] = True
    stepped(optimizer, range(2))


@pytest.mark.parametrize("write", ["data", "numpy"])
def test_a_rate_in_a_tensor_is_read_whatever_wrote_it(write: str) -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = opt.TorchOptimizer([p], opt.Descent(), lr=rate)
    p.grad = torch.ones_like(p)
    optimizer.step()
    if write == "data":
        rate.data.fill_(0.25)
    else:
        rate.numpy()[...] = 0.25
    optimizer.step()

    assert p.item() == -0.75


# -- gradients -----------------------------------------------------------------------------------------------


def test_a_gradient_made_by_hand_steps_a_parameter_that_does_not_ask_for_it() -> None:
    """As evolution strategies do."""
    p, q = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    optimizer = opt.TorchOptimizer([p, q], opt.Descent(0.5))
    q.grad = torch.ones(2)
    optimizer.step()

    assert p.tolist() == [1, 1]
    assert p not in optimizer.state
    p.grad = torch.ones(2)
    optimizer.step()

    assert (p.tolist(), q.tolist()) == ([0.5, 0.5], [0, 0])


@pytest.mark.parametrize("kind", ["expanded", "inference", "float8"])
def test_a_parameter_that_cannot_be_stepped_is_named_and_nothing_changes(kind: str) -> None:
    other = nn.Parameter(torch.ones(2))
    if kind == "expanded":
        p = nn.Parameter(torch.ones(1).expand(3))
    elif kind == "inference":
        with torch.inference_mode():
            p = nn.Parameter(torch.ones(3), requires_grad=False)
    else:
        p = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    optimizer = opt.TorchOptimizer([("other", other), ("odd", p)], opt.Descent(0.5))
    other.grad = torch.ones(2)
    with torch.inference_mode(kind == "inference"):
        p.grad = torch.ones(3).to(p.dtype)
    with pytest.raises(opt.BadState, match=r"'odd'.*cannot be"):
        optimizer.step()

    assert other.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_gradients_under_a_scaler_are_divided_in_float32(dtype: str) -> None:
    """A gradient of 3e-8 is none in float16, and is scaled so that it is one; torch.optim.SGD, fused."""
    moved: list[float] = []
    for make in (
        lambda ps: opt.TorchOptimizer(ps, opt.Descent(1e6)),
        lambda ps: torch.optim.SGD(ps, 1e6, fused=True),
    ):
        p = nn.Parameter(torch.ones(4, dtype=getattr(torch, dtype)))
        optimizer, scaler = make([p]), torch.amp.GradScaler("cpu", init_scale=2.0**16)
        p.grad = torch.full((4,), 3e-8 * 2**16).to(p.dtype)
        scaler.scale(torch.ones(1))
        scaler.step(optimizer)
        moved.append(1 - p[0].float().item())

    assert moved[0] == pytest.approx(moved[1], rel=0.01)


def test_a_step_that_raises_leaves_scaled_gradients_as_they_were() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer, scaler = opt.TorchOptimizer([p], opt.Adam(0.1)), torch.amp.GradScaler("cpu", init_scale=8.0)
    p.grad = torch.full((4,), 16, dtype=torch.float16)
    scaler.scale(torch.ones(1))
    optimizer.param_groups[0]["betas"] = (0.9, 2.0)
    with pytest.raises(opt.BadSetting, match=r"Adam.beta"):
        scaler.step(optimizer)

    assert p.grad.tolist() == [16] * 4
    assert p.tolist() == [1] * 4


def test_only_half_and_capturable_steps_divide_by_the_scale_themselves() -> None:
    """Trainers refuse to clip gradients of an optimiser that does."""
    assert not opt.TorchOptimizer(parameters(), opt.Adam())._step_supports_amp_scaling
    half = [nn.Parameter(torch.ones(2, dtype=torch.float16))]
    assert opt.TorchOptimizer(half, opt.Adam())._step_supports_amp_scaling


# -- loading -------------------------------------------------------------------------------------------------


def trained(names: dict[str, Any], **more: Any) -> Any:
    optimizer = opt.TorchOptimizer([{"params": list(names.items()), **more}], opt.Adam(0.1))
    stepped(optimizer, range(3))
    return optimizer


def test_state_is_found_by_name_in_other_groups_and_under_a_compiled_module() -> None:
    a, b = parameters()
    saved = copy.deepcopy(trained({"_orig_mod.a": a, "_orig_mod.b": b}).state_dict())
    new = opt.TorchOptimizer([{"params": [("b", b)]}, {"params": [("a", a)]}], opt.Adam(0.5))
    new.load_state_dict(saved)

    assert torch.equal(new.state[a]["m"], saved["state"][0]["m"])
    assert torch.equal(new.state[b]["m"], saved["state"][1]["m"])
    assert [group["lr"] for group in new.param_groups] == [0.1, 0.1]
    assert [group["param_names"] for group in new.param_groups] == [["b"], ["a"]]


def test_groups_that_were_put_together_must_have_had_one_setting() -> None:
    a, b = parameters()
    old = opt.TorchOptimizer([{"params": [("a", a)]}, {"params": [("b", b)], "lr": 0.7}], opt.Adam(0.1))
    new = opt.TorchOptimizer([("a", a), ("b", b)], opt.Adam(0.2))
    with pytest.raises(opt.TreeMismatch, match=r"groups 0 and 1 of the saved state, whose lr differ"):
        new.load_state_dict(old.state_dict())


def test_what_fits_is_taken_where_not_all_has_to() -> None:
    a, b = parameters()
    saved = copy.deepcopy(trained({"a": a, "b": b}).state_dict())
    saved["state"][1]["m"] = torch.zeros(9)
    c = nn.Parameter(torch.ones(2, dtype=torch.float64))
    new = opt.TorchOptimizer([("a", a), ("b", b), ("c", c)], opt.Adam(0.5))
    with pytest.raises(opt.TreeMismatch, match=r"'c' is on one side only"):
        new.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"not loaded: 'c' is on one side only; 'm' of 'b' has shape \(9,\)"):
        new.load_state_dict(saved, strict=False)

    assert torch.equal(new.state[a]["m"], saved["state"][0]["m"])
    assert (new.state[a]["step"], new.state[b]["step"], new.state[c]["step"]) == (3, 0, 0)
    assert new.param_groups[0]["lr"] == 0.1


def test_a_hook_may_rename_what_is_loaded() -> None:
    """It is asked before names are compared."""
    a, b = parameters()
    saved = copy.deepcopy(trained({"module.a": a, "module.b": b}).state_dict())
    new = opt.TorchOptimizer([("a", a), ("b", b)], opt.Adam(0.1))

    def renamed(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        for group in given["param_groups"]:
            group["param_names"] = [name.removeprefix("module.") for name in group["param_names"]]
        return given

    new.register_load_state_dict_pre_hook(renamed)
    new.load_state_dict(saved)

    assert new.state[b]["step"] == 3


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "a counter is None": lambda s: s["state"][0].update({"weight.0": None}),
    "complex": lambda s: s["state"][0].update(m=s["state"][0]["m"] * 1j),
    "integers": lambda s: s["state"][0].update(m=s["state"][0]["m"].long()),
    "a list": lambda s: s["state"][0].update(m=[1.0, 2.0, 3.0]),
    "no entry": lambda s: s["state"][0].pop("v"),
    "steps of NaN": lambda s: s["state"][0].update(step=float("nan")),
    "a number for a dict": lambda s: s["state"].update({0: 3}),
    "a number that no parameter has": lambda s: s["state"].update({77: s["state"].pop(1)}),
    "no rate": lambda s: s["param_groups"][0].pop("lr"),
    "a rate below 0": lambda s: s["param_groups"][0].update(lr=-1.0),
    "a text": lambda s: s["param_groups"][0].update(lr="fast"),
    "another formula": lambda s: s["param_groups"][0].update(amsgrad=True),
    "no groups": lambda s: s.pop("param_groups"),
}


@pytest.mark.parametrize("breaking", BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_and_changes_nothing(breaking: Callable[..., None]) -> None:
    names = dict(zip("ab", parameters(), strict=True))
    optimizer = trained(names)
    before = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(before)
    breaking(broken)
    with pytest.raises((opt.OptimiserError, ValueError)):
        optimizer.load_state_dict(broken)
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)

    assert after["param_groups"] == before["param_groups"]
    stepped(optimizer, range(1))


# -- what stands for the state -------------------------------------------------------------------------------


def test_a_module_with_its_averages_and_buffers_comes_from_the_optimiser() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = opt.TorchOptimizer(module, opt.EMA(opt.Descent(0.5), 0.5))
    module(torch.randn(8, 2)).sum().backward()
    optimizer.step()
    found = opt.averaged(optimizer, module)

    for name, p in found.named_parameters():
        assert torch.equal(p.detach(), optimizer.tree[name].state.average)
    assert torch.equal(found[1].running_mean, module[1].running_mean)
    assert opt.averaged(optimizer).keys() == dict(module.named_parameters()).keys()
    with pytest.raises(opt.NoMatch, match=r"no parameter of this optimiser"):
        opt.averaged(optimizer, nn.Linear(2, 2))


def test_an_optimiser_explains_its_steps() -> None:
    optimizer = ours(parameters())

    assert str(opt.explain(optimizer)) == str(opt.explain(optimizer.tree))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    "edit", [lambda s: opt.adjust(s, 0.5), opt.freeze, opt.thaw], ids=["adjust", "freeze", "thaw"]
)
def test_an_array_that_is_shown_is_that_of_the_state_or_read_only(library: str, edit: Any) -> None:
    x = np.ones(3) if library == "numpy" else torch.ones(3, dtype=torch.float64)
    old = opt.setup(opt.Momentum(0.1), {"w": x})
    new = edit(old)
    v = new["w"].state.v
    if library == "numpy":
        with pytest.raises(ValueError, match=r"read-only"):
            v[:] = 1
        return
    v.fill_(1)

    assert new["w"].state.v.tolist() == [1, 1, 1]
    assert old["w"].state.v.tolist() == [0, 0, 0]
