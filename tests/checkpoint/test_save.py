"""Does training go on from a file as if it had never stopped: states of every kind, with the model beside?"""

import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optimisers as opt
from tests.worlds import RULES, SCHEDULES, WORLDS, World, by_engine, worlds, worlds_with

STORIES = {**RULES, "scheduled": opt.Momentum(SCHEDULES["Cosine"], 0.5), "noisy": opt.SGLD(0.1, seed=3)}


def stepped(world: World, state: Any, model: Any, seeds: range) -> tuple[Any, Any]:
    for seed in seeds:
        state, model = world.step(state, model, world.model("float32", seed))
    return state, model


@worlds_with("rule", STORIES, *by_engine([w for w in WORLDS if w.library != "jax"]))
def test_a_state_goes_on_to_the_bit_where_arrays_are_written(world: World, rule: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    with world.open():
        model = world.model("float32")
        state, model = stepped(world, world.setup(rule, model), model, range(1, 4))
        opt.freeze_(state["b"])
        opt.save(file, state, model)
        again = world.model("float32", 9)
        fresh = world.setup(rule, again)
        back = opt.load(file, fresh, again)
        assert back[0] is fresh
        assert back[1] is again
        assert world.snapshot(fresh, again) == world.snapshot(state, model)

        wanted = stepped(world, state, model, range(5, 8))
        found = stepped(world, fresh, again, range(5, 8))
        assert world.snapshot(*found) == world.snapshot(*wanted)


@worlds(*[w for w in WORLDS if w.library == "jax"])
def test_arrays_that_cannot_be_written_come_back_in_new_ones(world: World, tmp_path: Path) -> None:
    file, rule = tmp_path / "run.safetensors", RULES["skipping"]
    with world.open():
        model = world.model("float32")
        state, model = stepped(world, world.setup(rule, model), model, range(1, 4))
        opt.save(file, state, model)
        first = world.model("float32", 9)
        fresh = world.setup(rule, first)
        before = world.snapshot(fresh, first)
        back = opt.load(file, fresh, first)

        assert world.snapshot(fresh, first) == before
        assert world.snapshot(*back) == world.snapshot(state, model)
        wanted = stepped(world, state, model, range(5, 8))
        found = stepped(world, *back, range(5, 8))
        assert world.snapshot(*found) == world.snapshot(*wanted)


def test_a_state_alone_is_loaded_alone(tmp_path: Path) -> None:
    model = {"w": np.ones(3)}
    state: Any = opt.setup(opt.Adam(), model)
    opt.update_(state, model, model)
    opt.save(tmp_path / "run", state, model)
    other = {"w": np.zeros(3)}
    fresh: Any = opt.setup(opt.Adam(), other)

    assert opt.load(tmp_path / "run", fresh) is fresh
    assert fresh == state
    assert not other["w"].any()


def test_a_part_takes_its_part_of_the_file(tmp_path: Path) -> None:
    def made(start: float) -> Any:
        return {"enc": {"w": np.full(3, start)}, "head": {"w": np.full(2, start)}}

    model = made(1.0)
    state: Any = opt.setup(opt.Adam(), model)
    opt.update_(state, model, model)
    opt.save(tmp_path / "whole", state, model)
    opt.save(tmp_path / "part", state["enc"], model["enc"])
    for file in ("whole", "part"):
        again = made(2.0)
        fresh: Any = opt.setup(opt.Adam(), again)
        opt.load(tmp_path / file, fresh["enc"], again["enc"])
        assert fresh["enc"] == state["enc"]
        assert fresh["head"] == opt.setup(opt.Adam(), made(2.0))["head"]
        np.testing.assert_array_equal(again["enc"]["w"], model["enc"]["w"])
        assert (again["head"]["w"] == 2).all()


def test_buffers_and_frozen_parameters_of_a_module_are_kept(tmp_path: Path) -> None:
    def made() -> Any:
        net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        net[0].requires_grad_(False)
        return net

    module = made()
    module(torch.randn(8, 4))
    opt.save(tmp_path / "run", opt.setup(opt.Adam(), module), module)
    again = made()
    opt.load(tmp_path / "run", opt.setup(opt.Adam(), again), again)

    for name, x in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name


def test_statistics_and_random_keys_of_a_module_of_flax_are_kept(tmp_path: Path) -> None:
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, seed: int) -> None:
            rngs = nnx.Rngs(seed, dropout=seed)
            self.linear = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.drop(self.norm(self.linear(x)))

    net, other = Net(0), Net(1)
    net(jnp.ones((5, 4)))
    opt.save(tmp_path / "run", opt.setup(opt.Adam(), net), net)
    _, back = opt.load(tmp_path / "run", opt.setup(opt.Adam(), other), other)

    assert back is other
    assert (other.norm.mean[...] == net.norm.mean[...]).all()
    x = jnp.arange(20.0).reshape(5, 4)
    np.testing.assert_array_equal(other(x), net(x))


def test_masters_and_averages_come_back_bit_by_bit(tmp_path: Path) -> None:
    rule = opt.MixedPrecision(opt.EMA(opt.Adam(0.1)))
    model = {"w": torch.randn(7).bfloat16()}
    state: Any = opt.setup(rule, model)
    opt.update_(state, model, {"w": torch.randn(7).bfloat16()})
    opt.save(tmp_path / "run", state, model)
    again = {"w": torch.zeros(7).bfloat16()}
    fresh: Any = opt.setup(rule, again)
    opt.load(tmp_path / "run", fresh, again)

    assert fresh == state
    assert torch.equal(again["w"], model["w"])


def test_what_else_is_given_comes_back(tmp_path: Path) -> None:
    model = {"w": np.ones(3)}
    rng = np.random.default_rng(0)
    more = {
        "epoch": 3,
        "best": 0.1 + 0.2,
        "worst": float("inf"),
        "log": [1, {"a": None, "b": True}],
        "rng": rng.bit_generator.state,
        "seed": torch.get_rng_state(),
        "half": np.float32(0.1),
    }
    opt.save(tmp_path / "run", opt.setup(opt.Adam(), model), model, **more)
    back = opt.saved(tmp_path / "run").more

    np.testing.assert_array_equal(back.pop("seed"), more.pop("seed").numpy())
    assert back == more


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": [{2}]}, 1j])
def test_what_no_file_holds_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(opt.BadSetting, match="epoch"):
        opt.save(tmp_path / "run", (), epoch=value)
    assert not [*tmp_path.iterdir()]


def test_nothing_to_train_is_no_state_to_speak_of(tmp_path: Path) -> None:
    with pytest.warns(opt.NoParameters):
        state = opt.setup(opt.Adam(), {"n": np.ones(2, int)})
    opt.save(tmp_path / "run", state, {"n": np.arange(2)})
    model = {"n": np.zeros(2, int)}

    assert opt.load(tmp_path / "run", (), model) == ((), model)
    assert model["n"].tolist() == [0, 1]


# -- what does not fit ---------------------------------------------------------------------------------------


def unfit(tmp_path: Path, rule: opt.Rule, model: Any, saved_rule: opt.Rule | None = None) -> str:
    """What is said of a state that does not fit; nothing has changed."""
    old: Any = {"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)}
    opt.save(tmp_path / "run", opt.setup(saved_rule or opt.Adam(), old), old)
    state: Any = opt.setup(rule, model)
    before = {k: x.copy() for k, x in model.items()}
    with pytest.raises(opt.TreeMismatch) as error:
        opt.load(tmp_path / "run", state, model)
    assert state == opt.setup(rule, model)
    assert all((model[k] == x).all() for k, x in before.items())
    return str(error.value)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    w, b = np.zeros((3, 2), np.float32), np.zeros(2, np.float32)

    assert "'w' was trained by Adam(eta=#" in unfit(tmp_path, opt.AdamW(), {"w": w, "b": b})
    assert "by Nesterov" in unfit(tmp_path, opt.Momentum(), {"w": w, "b": b}, opt.Nesterov())
    assert "there is no state of 'c'" in unfit(tmp_path, opt.Adam(), {"w": w, "b": b, "c": b.copy()})
    assert "'b' was saved, and is not here" in unfit(tmp_path, opt.Adam(), {"w": w})
    text = unfit(tmp_path, opt.Adam(), {"w": w.T.copy(), "b": b})
    assert "'w/m' has shape (3, 2); this state takes (2, 3), and 1 more do not fit" in text
    text = unfit(tmp_path, opt.Adam(), {"w": w.astype(float), "b": b})
    assert "'w/m' is float32; this state takes float64" in text
    assert str(tmp_path / "run") in text


def test_the_rest_is_taken_where_that_is_wanted(tmp_path: Path) -> None:
    old: Any = {"w": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
    opt.save(tmp_path / "run", opt.setup(opt.Adam(), old), old)
    model: Any = {"w": np.zeros(3), "c": np.zeros(2)}
    state: Any = opt.setup(opt.Adam(), model)
    with pytest.warns(UserWarning, match="not loaded: there is no state of 'c'.*'b' was saved"):
        opt.load(tmp_path / "run", state, model, strict=False)

    assert model["w"].tolist() == [1, 1, 1]
    assert model["w"].dtype == float


def test_ties_are_compared(tmp_path: Path) -> None:
    x, y = np.ones(3), np.ones(3)
    tied, apart = {"a": x, "b": x}, {"a": x, "b": y}
    opt.save(tmp_path / "tied", opt.setup(opt.Adam(), tied), tied)
    opt.save(tmp_path / "apart", opt.setup(opt.Adam(), apart), apart)
    with pytest.raises(opt.TreeMismatch, match="'b' was saved tied to 'a', and stands alone here"):
        opt.load(tmp_path / "tied", opt.setup(opt.Adam(), apart), apart)
    with pytest.raises(opt.TreeMismatch, match="'a' and 'b' were saved apart, and are tied here"):
        opt.load(tmp_path / "apart", opt.setup(opt.Adam(), tied), tied)


def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    model = {"a.b": np.ones(2), "a": {"b": np.ones(3)}}
    with pytest.raises(opt.BadState, match=r"two arrays would both be called 'a\.b"):
        opt.save(tmp_path / "run", opt.setup(opt.Adam(), model), model)


def test_read_only_arrays_are_found_before_anything_is_written(tmp_path: Path) -> None:
    model = {"a": np.ones(2), "b": np.ones(2)}
    state: Any = opt.setup(opt.Adam(), model)
    opt.save(tmp_path / "run", state, {"a": np.zeros(2), "b": np.zeros(2)})
    model["b"].flags.writeable = False
    with pytest.raises(opt.BadState, match="b cannot be written"):
        opt.load(tmp_path / "run", state, model)
    assert model["a"].all()


# -- optimisers of torch -------------------------------------------------------------------------------------


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))


OPTIMISERS = {
    "plain": lambda net: opt.TorchOptimizer(net, opt.AdamW(0.1)),
    "unnamed": lambda net: opt.TorchOptimizer(net.parameters(), opt.AdamW(0.1)),
    "scheduled": lambda net: opt.TorchOptimizer(net, opt.AdamW(opt.Cosine(0.1, 20))),
    "globs": lambda net: opt.TorchOptimizer(net, {"**.bias": opt.Adam(0.1), "**": opt.Momentum(0.1)}),
    "accumulated": lambda net: opt.TorchOptimizer(net, opt.Chain(opt.AccumGrad(2), opt.AdamW(0.1))),
}


def train(net: Any, optimizer: Any, scheduler: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).pow(2).mean().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_an_optimiser_of_torch_goes_on_with_its_groups(make: Any, tmp_path: Path) -> None:
    def made() -> Any:
        net = network()
        optimizer = make(net)
        return net, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))

    net, optimizer, scheduler = made()
    train(net, optimizer, scheduler, 1)
    first = next(iter(optimizer.parameters))
    opt.freeze_(optimizer.tree[first])
    if make is OPTIMISERS["plain"]:
        opt.adjust_(optimizer.tree["2.weight"], 0.03)
    opt.save(tmp_path / "run", optimizer, net, scheduler={"last_epoch": scheduler.last_epoch})
    net2, optimizer2, scheduler2 = made()
    assert opt.load(tmp_path / "run", optimizer2, net2) == (optimizer2, net2)
    scheduler2.load_state_dict(
        {**opt.saved(tmp_path / "run").more["scheduler"], "lr_lambdas": [None] * len(optimizer2.param_groups)}
    )
    assert optimizer2.tree == optimizer.tree
    assert optimizer2.tree[first].frozen

    train(net, optimizer, scheduler, 2)
    train(net2, optimizer2, scheduler2, 2)
    for a, b in zip(net.state_dict().values(), net2.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_groups_show_the_settings_of_a_file_that_has_none(tmp_path: Path) -> None:
    model = {n: p.detach().numpy().copy() for n, p in network().named_parameters()}
    state: Any = opt.setup(opt.AdamW(0.3, lam=0.2), model)
    opt.update_(state, model, model)
    opt.save(tmp_path / "run", state)
    net = network()
    optimizer = opt.TorchOptimizer(net, opt.AdamW(0.1))
    opt.load(tmp_path / "run", optimizer)

    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert optimizer.state[net[0].weight]["step"] == 1
    np.testing.assert_array_equal(optimizer.tree["0.weight"].state.m, state["0.weight"].state.m)


def test_other_tools_entries_are_not_lost_in_silence(tmp_path: Path) -> None:
    net = network()
    optimizer = opt.TorchOptimizer(net, opt.AdamW(0.1))
    optimizer.state[net[0].weight]["theirs"] = torch.ones(1)
    with pytest.raises(opt.BadState, match="other tools keep 'theirs'"):
        opt.save(tmp_path / "run", optimizer)


def test_the_former_names_still_work() -> None:
    model = {"w": np.ones(3)}
    state: Any = opt.setup(opt.Adam(), model)
    with pytest.warns(DeprecationWarning, match=r"opt\.state_dict\(state\) is called opt\.arrays\(state\)"):
        kept = opt.state_dict(state)
    with pytest.warns(DeprecationWarning, match="from_arrays"):
        assert opt.load_state_dict(state, kept) == state


def test_nothing_is_saved_inside_a_transform(tmp_path: Path) -> None:
    import jax

    def step(state: Any) -> Any:
        opt.save(tmp_path / "run", state)
        return state

    with pytest.raises(opt.BadState, match="save was called inside a transform"):
        jax.jit(step)(opt.setup(opt.Adam(), {"w": jnp.ones(3)}))
    assert not [*tmp_path.iterdir()]


def test_nothing_is_saved_while_parameters_hold_their_averages(tmp_path: Path) -> None:
    model = {"w": np.ones(3)}
    state: Any = opt.setup(opt.EMA(opt.Adam()), model)
    with opt.averaged_(state, model), pytest.raises(opt.BadState, match="save was called inside averaged_"):
        opt.save(tmp_path / "run", state, model)
    with warnings.catch_warnings():
        opt.save(tmp_path / "run", state, model)
