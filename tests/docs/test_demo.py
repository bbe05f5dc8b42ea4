"""Does the demo train, and are its gradients, written by hand, the right ones?"""

import re
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


def test_an_epoch_has_every_digit_once_in_the_order_of_its_seed() -> None:
    data = demo.digits()
    first, again, other = (np.concatenate([y for _, y in demo.mini_batches(data, 1, s)]) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert np.sort(first).tolist() == np.sort(data.train_y).tolist()


@pytest.mark.slow
def test_every_rule_learns_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = demo.run(epochs=4, picture=tmp_path / "demo.png")
    said = capsys.readouterr().out
    assert {e.name for e in found.entries} == set(demo.RULES)
    assert max(e.score for e in found.entries) < 0.35  # nats; a guess is 2.3
    assert len({t.losses[0] for t in found.trials if t.seed == 0}) == 1  # the same weights and digits
    right = re.search(r"once more: ([0-9.]+)% of the test right", said)
    assert right is not None
    assert float(right[1]) > 93
    assert matplotlib.image.imread(tmp_path / "demo.png").shape[0] > 400
