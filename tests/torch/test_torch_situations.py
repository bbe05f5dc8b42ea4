"""What trainers do to an optimiser of torch between its steps ends for ours where it ends for torch's."""

import copy
import math
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there

pytestmark = pytest.mark.usefixtures("double")

Make = Callable[..., Any]
nn: Any = torch.nn
schedulers: Any = torch.optim.lr_scheduler


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def groups(model: Any) -> list[dict[str, Any]]:
    second = {"params": list(model[2].parameters()), "lr": 0.01, "weight_decay": 0.3}
    return [{"params": list(model[0].parameters()), "lr": 0.1}, second]


def trained(model: Any, optimizer: Any, steps: range, scheduler: Any = None) -> None:
    for n in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(n))
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def started(make: Make) -> tuple[Any, Any]:
    model = network()
    optimizer = make(groups(model))
    trained(model, optimizer, range(3))
    return model, optimizer


def a_parameter_moves_to_another_group(make: Make) -> Any:
    model, optimizer = started(make)
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop(0))
    trained(model, optimizer, range(3, 6))
    return model


def groups_change_places(make: Make) -> Any:
    model, optimizer = started(make)
    optimizer.param_groups.reverse()
    trained(model, optimizer, range(3, 6))
    return model


def groups_are_copies(make: Make) -> Any:
    model, optimizer = started(make)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.02
    trained(model, optimizer, range(3, 6))
    return model


def a_group_is_another_dict(make: Make) -> Any:
    model, optimizer = started(make)
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.2}
    trained(model, optimizer, range(3, 6))
    return model


def groups_are_cleared_and_one_comes_back(make: Make) -> Any:
    model, optimizer = started(make)
    kept = optimizer.param_groups[0]
    optimizer.param_groups.clear()
    optimizer.param_groups.append(kept)
    trained(model, optimizer, range(3, 6))
    return model


def the_state_is_another_dict(make: Make) -> Any:
    model, optimizer = started(make)
    optimizer.state = defaultdict(dict)
    trained(model, optimizer, range(3, 6))
    return model


def model_and_optimiser_are_copied_together(make: Make) -> Any:
    before = started(make)
    model, optimizer = copy.deepcopy(before)
    trained(*before, range(9, 11))
    trained(model, optimizer, range(3, 6))
    return model


def model_and_optimiser_are_pickled_together(make: Make) -> Any:
    model, optimizer = pickle.loads(pickle.dumps(started(make)))
    trained(model, optimizer, range(3, 6))
    return model


def weights_are_loaded_by_assignment(make: Make) -> Any:
    model, optimizer = started(make)
    saved, learnt = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model = network()
    model.load_state_dict(saved, assign=True)
    optimizer = make(groups(model))
    optimizer.load_state_dict(learnt)
    trained(model, optimizer, range(3, 6))
    return model


def a_weight_lies_in_other_strides(make: Make) -> Any:
    model, optimizer = started(make)
    weight = model[0].weight
    weight.data = weight.data.t().contiguous().t()
    weight.grad = torch.ones(1, 1).expand(4, 3)
    optimizer.step()
    trained(model, optimizer, range(3, 6))
    return model


def gradients_are_zeroed_in_place(make: Make) -> Any:
    model, optimizer = started(make)
    optimizer.zero_grad(set_to_none=False)
    model[0](torch.ones(2, 3)).sum().backward()
    optimizer.step()
    trained(model, optimizer, range(3, 6))
    return model


def a_scaler_skips_one_of_two(make: Make) -> Any:
    model = network()
    first, second = make(list(model[0].parameters())), make(list(model[2].parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for n in range(6):
        first.zero_grad()
        second.zero_grad()
        scaler.scale((model(torch.ones(2, 3) * n) ** 2).mean()).backward()
        if n == 2:
            model[0].weight.grad[0, 0] = math.inf
        if n == 4:
            scaler.unscale_(first)
            nn.utils.clip_grad_norm_(model[0].parameters(), 0.1)
        scaler.step(first)
        scaler.step(second)
        scaler.update()
    return model


def schedules_follow_each_other(make: Make) -> Any:
    model = network()
    optimizer = make(groups(model))
    warm = schedulers.LinearLR(optimizer, 0.1, 1.0, 3)
    restarts = schedulers.CosineAnnealingWarmRestarts(optimizer, 3)
    trained(model, optimizer, range(9), schedulers.SequentialLR(optimizer, [warm, restarts], [3]))
    return model


def a_cycle_is_resumed(make: Make) -> Any:
    model = network()

    def cycle(optimizer: Any) -> Any:
        return schedulers.OneCycleLR(optimizer, [0.1, 0.2], total_steps=12, cycle_momentum=False)

    optimizer = make(groups(model))
    scheduler = cycle(optimizer)
    trained(model, optimizer, range(5), scheduler)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    optimizer = make(groups(model))
    scheduler = cycle(optimizer)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    trained(model, optimizer, range(5, 10), scheduler)
    return model


def a_group_is_added_under_a_scheduler(make: Make) -> Any:
    model = network()
    optimizer = make(list(model[0].parameters()))
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    trained(model, optimizer, range(2), scheduler)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.2, "initial_lr": 0.2})
    scheduler.base_lrs.append(0.2)
    trained(model, optimizer, range(2, 5), scheduler)
    return model


def a_rate_is_one_tensor_for_two_groups(make: Make) -> Any:
    model, optimizer = started(make)
    rate = torch.tensor(0.1)
    for group in optimizer.param_groups:
        group["lr"] = rate
    trained(model, optimizer, range(3, 5))
    rate.mul_(0.1)
    trained(model, optimizer, range(5, 7))
    return model


def weights_are_projected_by_a_hook(make: Make) -> Any:
    model, optimizer = started(make)

    def clamped(o: Any, *_: object) -> None:
        for group in o.param_groups:
            for p in group["params"]:
                p.data.clamp_(-0.3, 0.3)

    optimizer.register_step_post_hook(clamped)
    trained(model, optimizer, range(3, 6))
    return model


def points_are_cloned_pruned_and_reset(make: Make) -> Any:
    """By a walk over all entries of a parameter, as libraries for splats do it."""
    points = nn.Parameter(torch.arange(12.0).reshape(4, 3))
    optimizer = make([{"params": [points], "lr": 0.1, "name": "means"}])

    def stepped(p: Any) -> None:
        for n in range(3):
            p.grad = torch.cos(p.detach() + n)
            optimizer.step()

    def replaced(change: Callable[[Any], Any], of_state: Callable[[Any], Any]) -> Any:
        (group,) = optimizer.param_groups
        (p,) = group["params"]
        kept = optimizer.state[p]
        del optimizer.state[p]
        for key in kept.keys():  # noqa: SIM118 as they write it
            if key != "step":
                kept[key] = of_state(kept[key])
        new = nn.Parameter(change(p.detach()))
        group["params"] = [new]
        optimizer.state[new] = kept
        stepped(new)
        return new

    stepped(points)
    replaced(lambda p: torch.cat([p, p[:2]]), lambda v: torch.cat([v, torch.zeros(2, *v.shape[1:])]))
    replaced(lambda p: p[[0, 2, 5]], lambda v: v[[0, 2, 5]])
    points = replaced(lambda p: p.clone(), torch.zeros_like)
    return nn.ParameterList([points])


SITUATIONS = [
    a_parameter_moves_to_another_group,
    groups_change_places,
    groups_are_copies,
    a_group_is_another_dict,
    groups_are_cleared_and_one_comes_back,
    the_state_is_another_dict,
    model_and_optimiser_are_copied_together,
    model_and_optimiser_are_pickled_together,
    weights_are_loaded_by_assignment,
    a_weight_lies_in_other_strides,
    gradients_are_zeroed_in_place,
    a_scaler_skips_one_of_two,
    schedules_follow_each_other,
    a_cycle_is_resumed,
    a_group_is_added_under_a_scheduler,
    a_rate_is_one_tensor_for_two_groups,
    weights_are_projected_by_a_hook,
    points_are_cloned_pruned_and_reset,
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("title", ["AdamW", "RAdam", "Adamax"])
def test_it_ends_where_torch_ends(situation: Callable[[Make], Any], title: str) -> None:
    rule = opt.from_torch_class(title, weight_decay=0.0)
    ours = situation(lambda params: opt.TorchOptimizer(params, rule))
    theirs = situation(lambda params: getattr(torch.optim, title)(params, weight_decay=0.0))
    ends = [[p.detach() for p in model.parameters()] for model in (ours, theirs)]
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)


def test_entries_are_rebuilt_by_who_maps_over_containers() -> None:
    """Lightning makes a new container of the class it finds, from pairs of key and value."""
    ends: list[Any] = []
    for make in (
        lambda ps: opt.TorchOptimizer(ps, opt.AdamW(0.1, lam=0.01)),
        lambda ps: torch.optim.AdamW(ps, 0.1),
    ):
        model = network()
        optimizer = make(model.parameters())
        trained(model, optimizer, range(3))
        for p, entries in optimizer.state.items():
            pairs = [(key, value.clone()) for key, value in entries.items()]
            optimizer.state[p] = type(entries)(dict(pairs))
        trained(model, optimizer, range(3, 6))
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)
