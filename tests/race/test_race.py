"""A race tries every rule at every rate with the same seeds, and tells who won."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import torch
from flax import nnx

import optimisers as opt
from optimisers.curves import COLOURS, Curve, draw, smooth, spread
from optimisers.race import written
from optimisers.training import rated

RNG = np.random.default_rng(0)
X = RNG.standard_normal((32, 3))
Y = X @ np.array([1.0, -2.0, 0.5])
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]
RULES = {"sgd": opt.Descent(0.05), "adam": opt.Adam(0.05)}


def by_numpy(model: dict[str, Any], batch: tuple[Any, Any]) -> tuple[float, dict[str, Any]]:
    x, y = batch
    e = x @ model["w"] - y
    return float((e * e).mean()), {"w": 2 * x.T @ e / len(y)}


def by_jax(model: dict[str, Any], batch: tuple[Any, Any]) -> Any:
    x, y = batch
    return ((x @ model["w"] - y) ** 2).mean()


def by_torch(model: torch.nn.Module, batch: tuple[Any, Any]) -> Any:
    x, y = (torch.from_numpy(part) for part in batch)
    return ((model(x)[:, 0] - y) ** 2).mean()


def walked(seed: int, steps: int) -> Iterator[tuple[Any, Any]]:
    """The batches of a seed, each pass in an order of its own."""
    rng = np.random.default_rng(seed)
    while steps:
        for k in rng.permutation(len(BATCHES)).tolist()[:steps]:
            steps -= 1
            yield BATCHES[k]


def descended(rate: float, seed: int, steps: int) -> list[float]:
    """The losses of plain descent, by hand."""
    w, losses = np.zeros(3), list[float]()
    for batch in walked(seed, steps):
        loss, grads = by_numpy({"w": w}, batch)
        losses.append(loss)
        w = w - rate * grads["w"]
    return losses


def linear(_seed: int) -> torch.nn.Module:
    model = torch.nn.Linear(3, 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    return model


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_every_training_is_the_one_by_hand(library: str) -> None:
    loss: Any = {"numpy": by_numpy, "torch": by_torch, "jax": by_jax}[library]
    model: Any = {"numpy": {"w": np.zeros(3)}, "torch": linear, "jax": {"w": jnp.zeros(3)}}[library]
    found = opt.race(RULES, loss, model, BATCHES, factors=(0.5, 2), seeds=(0, 7), steps=10)

    assert len(found.trials) == 2 * 2 * 2
    for trial in found.trials:
        if trial.name == "sgd":
            expected = descended(0.05 * trial.factor, trial.seed, 10)
            np.testing.assert_allclose(trial.losses, expected, rtol=2e-6 if library == "jax" else 1e-12)
            assert trial.score == trial.losses[-1]
    if library == "numpy":
        assert not model["w"].any()


def test_the_best_rate_of_the_best_rule_wins() -> None:
    found = opt.race(
        RULES, by_numpy, {"w": np.zeros(3)}, BATCHES, factors=(1, 0.1, 1e30), seeds=(0,), steps=20
    )
    scores = {(t.name, t.factor): t.score for t in found.trials}
    best = min(scores, key=lambda key: scores[key])
    assert (found.entries[0].name, found.entries[0].factor) == best
    assert found.winner.eta == pytest.approx(0.05 * best[1], rel=1e-12)
    assert found.winner == RULES[best[0]].adjust(eta=found.winner.eta)
    assert eval(found.code) == found.winner  # noqa: S307 it is ours
    assert scores["sgd", 1e30] == float("inf")
    sgd = next(e for e in found.entries if e.name == "sgd")
    assert (sgd.diverged, sgd.tried) == (1, 3)
    assert "1 of 3" in str(found)


def test_a_best_rate_at_the_edge_is_said() -> None:
    said = str(opt.race([opt.Descent(1e-4)], by_numpy, {"w": np.zeros(3)}, BATCHES, seeds=(0,)))
    assert "best at the largest rate tried" in said
    assert "each rule: 5 rates, 1 seed, 4 steps a training" in said


def test_validation_sees_the_parameters_that_the_rule_evaluates_with() -> None:
    seen: list[Any] = []

    def validate(model: dict[str, Any]) -> float:
        seen.append(model["w"].copy())
        return float(np.abs(model["w"]).sum())

    rule = opt.EMA(opt.Descent(0.05), 0.5)
    found = opt.race(
        [rule], by_numpy, {"w": np.zeros(3)}, BATCHES, factors=(1,), seeds=(3,), validate=validate
    )
    state, model = opt.setup(rule, {"w": np.zeros(3)}), {"w": np.zeros(3)}
    for batch in walked(3, 4):
        state, model = opt.update(state, model, by_numpy(model, batch)[1])
    np.testing.assert_allclose(seen, [opt.averaged(state, model)["w"]], rtol=1e-12)
    assert found.entries[0].score == np.abs(seen[0]).sum()


def test_validation_under_jax_sees_each_rate_apart() -> None:
    rule = opt.EMA(opt.Descent(0.05), 0.5)
    given: Any = {"w": jnp.zeros(3)}
    found = opt.race(
        [rule],
        by_jax,
        given,
        BATCHES,
        factors=(1, 2),
        seeds=(3,),
        validate=lambda m: float(abs(m["w"]).sum()),
    )
    for trial in found.trials:
        state, model = opt.setup(trial.rule, {"w": np.zeros(3)}), {"w": np.zeros(3)}
        for batch in walked(3, 4):
            state, model = opt.update(state, model, by_numpy(model, batch)[1])
        assert trial.score == pytest.approx(np.abs(opt.averaged(state, model)["w"]).sum(), rel=1e-5)


def test_a_loader_is_shuffled_by_the_seed_and_dropout_drops_the_same() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)

    def loss(model: torch.nn.Module, batch: tuple[Any, Any]) -> Any:
        return ((torch.nn.functional.dropout(model(batch[0])[:, 0]) - batch[1]) ** 2).mean()

    found = opt.race([opt.Descent(0.0), opt.Adam(0.0)], loss, linear, loader, factors=(1,), seeds=(0, 1))
    by = {(t.name, t.seed): t.losses for t in found.trials}
    np.testing.assert_array_equal(by["Descent", 0], by["Adam", 0])
    assert (by["Descent", 0] != by["Descent", 1]).any()
    assert torch.equal(before, torch.get_rng_state())


def test_rates_are_multiplied_once_and_schedules_keep_their_shape() -> None:
    chain = opt.Chain(opt.ClipNorm(1.0), opt.Adam(0.1), opt.Descent(0.5))
    assert rated(chain, 3.0) == opt.Chain(opt.ClipNorm(1.0), opt.Adam(0.1), opt.Descent(1.5))
    joined = opt.Join((opt.Linear(0.0, 0.1, 5), opt.Cosine(0.1, 10, end=0.01)), (5,))
    for schedule in (opt.OneCycle(0.1, 20), opt.Step(0.1, (3,), (0.5,)), joined, lambda t: 0.1 / (1 + t)):
        new = rated(opt.Descent(schedule), 3.0).eta
        for t in range(12):
            assert new(t) == pytest.approx(3 * schedule(t), rel=1e-12)
    assert rated({"w": opt.Adam(0.1), "**": None}, 2.0) == {"w": opt.Adam(0.2), "**": None}
    assert rated(opt.layer_decay(opt.Adam(0.1), 0.5), 2.0) == opt.layer_decay(opt.Adam(0.2), 0.5)
    assert rated(opt.Cautious(opt.Lion(0.1)), 2.0) == opt.Cautious(opt.Lion(0.2))


def test_jax_steps_all_rates_of_a_rule_in_one_call() -> None:
    traced = 0

    def loss(model: dict[str, Any], batch: tuple[Any, Any]) -> Any:
        nonlocal traced
        traced += 1
        return by_jax(model, batch)

    given: Any = {"w": jnp.zeros(3)}
    opt.race([opt.Adam(0.1)], loss, given, BATCHES, seeds=(0,))
    assert traced == 1
    found = opt.race([opt.Adam(lambda t: 0.1 / (1 + t))], by_jax, given, BATCHES, factors=(1, 2), seeds=(0,))
    slow, fast = (t.losses for t in found.trials)
    assert slow[0] == fast[0]
    assert slow[1] > fast[1]


def test_what_is_no_race_is_refused() -> None:
    model = {"w": np.zeros(3)}
    for message, arguments in (
        ("takes rules by name", ([], by_numpy, model, BATCHES)),
        (r"write opt.Adam\(\)", ([opt.Adam], by_numpy, model, BATCHES)),
        ('write {"mine"', ({opt.vectors: opt.Adam(), "**": opt.Adam()}, by_numpy, model, BATCHES)),
        ("no arrays to train", (RULES, by_numpy, {"w": 3}, BATCHES)),
        ("walked once", (RULES, by_numpy, model, iter(BATCHES))),
        ("steps=1000", (RULES, by_numpy, model, lambda seed: walked(seed, 3))),
        ("gave float", (RULES, lambda m, b: by_numpy(m, b)[0], model, BATCHES)),
    ):
        with pytest.raises(opt.BadSetting, match=message):
            opt.race(*arguments)  # pyright: ignore[reportArgumentType] wrong on purpose
    for settings in (
        {"factors": ()},
        {"factors": (0,)},
        {"factors": 0.1},
        {"seeds": 3},
        {"seeds": (-1,)},
        {"steps": 0},
    ):
        with pytest.raises(opt.BadSetting, match=next(iter(settings))):
            opt.race(RULES, by_numpy, model, BATCHES, **settings)  # pyright: ignore[reportArgumentType] the same
    with pytest.raises(opt.BadSetting, match="no batch"):
        opt.race(RULES, by_numpy, model, lambda _: iter([]), steps=3)


def test_modules_of_flax_and_equinox_are_trained_with_all_that_they_hold() -> None:
    def of_flax(seed: int) -> Any:
        model = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(seed))
        model.kernel = nnx.Param(jnp.zeros((3, 1)))
        return model

    def of_equinox(seed: int) -> Any:
        net = equinox.nn.MLP(3, "scalar", 8, 0, use_final_bias=False, key=jax.random.key(seed))
        return equinox.tree_at(lambda m: m.layers[0].weight, net, jnp.zeros((1, 3)))

    for made, call, gradient in (
        (of_flax, lambda m, x: m(x)[:, 0], nnx.value_and_grad),
        (of_equinox, lambda m, x: jax.vmap(m)(x), equinox.filter_value_and_grad),
    ):

        def loss(model: Any, batch: tuple[Any, Any], call: Any = call) -> Any:
            return ((call(model, jnp.asarray(batch[0], jnp.float32)) - batch[1]) ** 2).mean()

        found = opt.race(
            {"sgd": opt.Descent(0.05)}, loss, made, BATCHES, factors=(1, 2), seeds=(4,), steps=6,
            value_and_grad=gradient, validate=lambda m, loss=loss: float(loss(m, BATCHES[0])),
        )  # fmt: skip
        for trial in found.trials:
            np.testing.assert_allclose(trial.losses, descended(0.05 * trial.factor, 4, 6), rtol=3e-6)
            assert 0 < trial.score < trial.losses[0]


def test_statistics_that_a_module_keeps_are_those_of_its_training() -> None:
    def made(seed: int) -> Any:
        rngs = nnx.Rngs(seed)
        return nnx.Sequential(nnx.BatchNorm(3, rngs=rngs, momentum=0.5), nnx.Linear(3, 1, rngs=rngs))

    def loss(model: Any, batch: tuple[Any, Any]) -> Any:
        return ((model(jnp.asarray(batch[0], jnp.float32))[:, 0] - batch[1]) ** 2).mean()

    seen: list[Any] = []
    opt.race(
        [opt.Descent(0.0)], loss, made, BATCHES, factors=(1, 2), seeds=(2,), steps=4,
        validate=lambda m: seen.append(np.array(m.layers[0].mean[...])) or 0.0,
    )  # fmt: skip
    mean = np.zeros(3)
    for x, _ in walked(2, 4):
        mean = 0.5 * mean + 0.5 * x.mean(axis=0)
    np.testing.assert_allclose(seen, [mean, mean], rtol=1e-5)


def test_the_winner_is_written_as_python() -> None:
    for rule in (
        {opt.hidden_matrices & ~opt.by_path("**.matrices"): opt.Muon(0.02), "**": opt.AdamW(0.01)},
        opt.Prodigy(),
        opt.Chain(opt.ClipNorm(1.0), opt.Adam(opt.Scaled(opt.Cosine(0.1, 10), 2.0))),
        opt.layer_decay(opt.Adam(0.1), 0.5),
    ):
        assert eval(written(rule), {"opt": opt}) == rule  # noqa: S307 it is ours

    class Mine(opt.Rule):
        eta: float = 0.1

    assert written(Mine()) == "Mine(eta=0.1)"


def test_nobody_wins_where_all_diverge() -> None:
    found = opt.race([opt.Descent(1e30)], by_numpy, {"w": np.zeros(3)}, BATCHES, factors=(1,), steps=20)
    assert "no winner: every training diverged" in str(found)
    with pytest.raises(opt.BadState, match="every training diverged"):
        assert found.winner


def test_gradients_of_another_making_may_be_given() -> None:
    def value_and_grad(loss: Any) -> Any:
        return jax.value_and_grad(lambda model, batch: 2 * loss(model, batch))

    given: Any = {"w": jnp.zeros(3)}
    found = opt.race(RULES, by_jax, given, BATCHES, factors=(1,), seeds=(0,), value_and_grad=value_and_grad)
    np.testing.assert_allclose(found.trials[0].losses[0], 2 * descended(0.05, 0, 1)[0], rtol=1e-6)


def test_the_picture_has_a_band_and_a_line_for_each_rule(tmp_path: Path) -> None:
    found = opt.race(RULES, by_numpy, {"w": np.zeros(3)}, BATCHES, factors=(1,), steps=40)
    pixels = (matplotlib.image.imread(found.picture(tmp_path / "a.png"))[..., :3] * 255).round().astype(int)
    for colour in COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) < 8).sum() > 300, colour
    nothing = draw([Curve("lost", np.full((2, 5), np.nan))], tmp_path / "b.png", title="", measure="loss")
    assert nothing.exists()


def test_labels_are_spread_in_the_order_of_the_curves() -> None:
    placed = spread(np.array([0.0, 5.0, 0.1, 0.05]), 1.0)
    assert np.argsort(placed).tolist() == [0, 3, 2, 1]
    assert np.diff(np.sort(placed)).min() >= 1 - 1e-6


def test_smoothing_leaves_a_constant_as_it_is() -> None:
    np.testing.assert_allclose(smooth(np.full(50, 0.3)), 0.3)
