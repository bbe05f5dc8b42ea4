"""Does the demo train, and are its gradients, written by hand, the right ones?"""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import optimisers as opt
from optimisers import demo


def small_problem() -> tuple[demo.Network, demo.Array, demo.Array]:
    rng = np.random.default_rng(0)
    return demo.network((6, 5, 4), rng, np.float64), rng.standard_normal((7, 6)), rng.integers(0, 4, 7)


def test_the_gradient_is_that_of_finite_differences() -> None:
    net, x, labels = small_problem()
    loss, gradient = demo.loss_and_gradient(net, x, labels)
    assert loss == demo.loss_of(net, x, labels)
    for w, dw in zip(opt.trainables(net), opt.trainables(gradient), strict=True):
        numeric = np.zeros_like(w)
        for i in np.ndindex(w.shape):
            kept, h = w[i], 1e-6
            w[i] = kept + h
            above = demo.loss_of(net, x, labels)
            w[i] = kept - h
            numeric[i] = (above - demo.loss_of(net, x, labels)) / (2 * h)
            w[i] = kept

        np.testing.assert_allclose(dw, numeric, rtol=1e-6, atol=1e-9)


def test_the_loss_of_a_network_that_knows_nothing_is_the_entropy_of_a_guess() -> None:
    net, x, labels = small_problem()
    net.head.weight[:] = 0
    assert demo.loss_of(net, x, labels) == pytest.approx(np.log(4))


def test_the_split_is_fixed_and_keeps_every_digit_once() -> None:
    first, second = demo.digits(), demo.digits()
    assert (len(first.train_y), len(first.test_y)) == (1438, 359)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    other = demo.digits(seed=1)
    assert np.sort(np.concatenate([first.train_y, first.test_y])).tolist() == sorted(
        [*other.train_y.tolist(), *other.test_y.tolist()]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[demo.Result], Path]:
    picture = tmp_path_factory.mktemp("demo") / "demo.png"
    return demo.run(epochs=20, picture=picture), picture


def test_every_rule_learns_the_digits(trained: tuple[list[demo.Result], Path]) -> None:
    results, _ = trained
    assert [r.name for r in results] == list(demo.RULES)
    assert min(r.accuracy for r in results) > 0.93
    assert max(r.accuracy for r in results) >= 0.96
    for r in results:
        assert r.losses[0] == results[0].losses[0]  # the same weights and the same digits
        assert r.loss < 0.2


def test_the_picture_is_a_picture_in_four_colours(trained: tuple[list[demo.Result], Path]) -> None:
    _, path = trained
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    assert min(pixels.shape[:2]) > 400
    for colour in demo.COLOURS:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) < 8).sum() > 500, colour


def test_labels_are_spread_in_the_order_of_the_curves() -> None:
    placed = demo.spread(np.array([0.0, 5.0, 0.1, 0.05]), 1.0)
    assert np.argsort(placed).tolist() == [0, 3, 2, 1]
    assert np.diff(np.sort(placed)).min() >= 1 - 1e-6


def test_smoothing_leaves_a_constant_as_it_is() -> None:
    np.testing.assert_allclose(demo.smooth(np.full(50, 0.3)), 0.3)
