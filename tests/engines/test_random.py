"""Random numbers of a counter: the bits that are published, the same in every library and by every engine,
however arrays are cut, ordered and moved; and distributed as they should be.
"""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.arrays import philox
from optimisers.ops.random import number_of_leaf
from tests.worlds import WORLDS, World, bits, worlds

MASK = 0xFFFFFFFF


def words_of(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 with Python's whole numbers, which have no width."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        one, two = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (two >> 32) ^ b ^ k, two & MASK, (one >> 32) ^ d ^ m, one & MASK
        k, m = (k + 0x9E3779B9) & MASK, (m + 0xBB67AE85) & MASK
    return [a, b, c, d]


def words_at(seed: int, step: int, path: tuple[Any, ...], place: int, draw: int) -> list[int]:
    """The four words of one place of an array."""
    first, last = number_of_leaf(path)
    return words_of([place & MASK, place >> 32, step, last + (draw << 24)], [seed, first])


UNIFORM, SIGN, COMPLEX = 16, 32, 48
"""The first draw of each kind that is not real normal numbers."""


def shared(element: int) -> tuple[int, int]:
    """(the place whose four words an element shares, which of the four is its own)."""
    block, inside = divmod(element, 256)
    return 64 * block + inside % 64, inside // 64


PUBLISHED = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
"""(counter, key, words) of the file of known answers that comes with the authors' Random123."""


@pytest.mark.parametrize(("counter", "key", "wanted"), PUBLISHED)
def test_the_words_are_those_that_the_authors_publish(
    counter: list[int], key: list[int], wanted: list[int]
) -> None:
    def found(made: Any, constant: Any) -> list[int]:
        four = philox.words([made(v) for v in counter], [made(v) for v in key], constant)
        return [int(w[0]) & MASK for w in four]

    assert words_of(counter, key) == wanted
    assert found(lambda v: np.array([v], np.uint32), np.uint32) == wanted
    assert found(lambda v: np.array([v], np.int64), np.int64) == wanted


# -- every engine --------------------------------------------------------------------------------------------


class Draws(opt.Rule):
    """Keeps random numbers of every kind, and steps nowhere."""

    seed: int = 0

    def init(self, x: Any) -> Any:
        real = opt.ops.real_zeros_like
        return {"normal": opt.zeros_like(x), "other": opt.zeros_like(x), "uniform": real(x), "sign": real(x)}

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        kept = {
            "normal": opt.ops.normal(x, self.seed),
            "other": opt.ops.normal(dx, self.seed, draw=3),
            "uniform": opt.ops.uniform(x, self.seed),
            "sign": opt.ops.rademacher(x, self.seed),
        }
        return kept, None


class Noise(opt.Rule):
    """Adds normal numbers to the gradient."""

    seed: int = 0

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, dx + opt.ops.normal(x, self.seed)


SHAPES = {"w": (5, 3), "b": (7,), "s": (), "e": (0, 2), "m": (9, 65)}


def drawn(world: World, dtype: str, seed: int = 5, steps: int = 2) -> dict[str, dict[str, Any]]:
    """What is drawn at the last of some steps, by path."""
    with world.open():
        model = world.put({k: np.zeros(shape, dtype) for k, shape in SHAPES.items()})
        state = world.setup(Draws(seed), model)
        for _ in range(steps):
            state, model = world.step(state, model, model)
        return {k: {n: world.get(v) for n, v in state[k].state.items()} for k in SHAPES}


@worlds(*WORLDS)
def test_every_engine_draws_the_same_bits(world: World) -> None:
    found = drawn(world, "float64")
    for path, shape in SHAPES.items():
        size = int(np.prod(shape))
        at = [shared(i) for i in range(size)]
        uniform, sign = (
            np.array([words_at(5, 1, (path,), place, draw)[own] for place, own in at])
            for draw in (UNIFORM, SIGN)
        )

        assert (found[path]["uniform"].reshape(-1) * 2.0**32 - 0.5 == uniform).all()
        assert (found[path]["sign"].reshape(-1) == np.where(sign >= 1 << 31, 1, -1)).all()


@worlds(*WORLDS)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_every_engine_makes_the_same_normal_numbers_of_them(world: World, dtype: str) -> None:
    if dtype == "complex64" and world.engine == "triton":
        pytest.skip("kernels of CUDA are real")
    found = drawn(world, dtype)
    for path, shape in SHAPES.items():
        zeros = np.zeros(shape, {"float32": "float64", "complex64": "complex128"}[dtype])
        for name, draw in (("normal", 0), ("other", 3)):
            exact = opt.ops.normal(zeros, 5, draw=draw, step=1, leaf=(path,))
            assert np.abs(found[path][name] - exact).max(initial=0) < 3e-6


def test_normal_numbers_are_those_of_box_and_muller() -> None:
    got = opt.ops.normal(np.zeros(600), 9, step=4, leaf=("a", 0))
    both = opt.ops.normal(np.zeros(600, complex), 9, step=4, leaf=("a", 0))
    for i in range(600):
        place, own = shared(i)
        pair = (np.array(words_at(9, 4, ("a", 0), place, 0)) + 0.5) / 2**32
        one, two = pair[:2] if own < 2 else pair[2:]
        wave = np.sin if own % 2 else np.cos
        assert got[i] == pytest.approx(np.sqrt(-2 * np.log(one)) * wave(2 * np.pi * two), abs=1e-14)
        one, two, *_ = (np.array(words_at(9, 4, ("a", 0), i, COMPLEX)) + 0.5) / 2**32
        assert both[i] == pytest.approx(np.sqrt(-np.log(one)) * np.exp(2j * np.pi * two), abs=1e-14)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_operations_on_arrays_of_a_library_are_its_own(name: str) -> None:
    library = pytest.importorskip({"torch": "torch", "jax": "jax.numpy"}[name])
    x = library.zeros((4, 5))
    for kind in (opt.ops.normal, opt.ops.uniform, opt.ops.rademacher):
        got, want = kind(x, 3, step=7, leaf=("w",)), kind(np.zeros((4, 5)), 3, step=7, leaf=("w",))

        assert type(got) is type(x)
        assert np.abs(np.asarray(got) - want).max() < 3e-6


# -- however arrays are cut, ordered and moved ---------------------------------------------------------------


def stepped(rule: opt.Rule, model: Any, steps: int = 1, engine: str | None = None) -> Any:
    state = opt.setup(rule, model, engine=engine)
    for _ in range(steps):
        state, model = opt.update(state, model, model)
    return model


def test_threads_and_chunks_change_no_number() -> None:
    x = {"w": np.zeros((700, 500), "float32")}
    try:
        found = []
        for n in (1, 2):
            opt.set_num_threads(n)
            found.append(bits(stepped(Noise(1), x)["w"]))
    finally:
        opt.set_num_threads(None)
    exact = -opt.ops.normal(x["w"], 1, leaf=("w",))

    assert found[0] == found[1]
    assert np.abs(np.frombuffer(found[0][-x["w"].nbytes :], "float32") - exact.ravel()).max() < 3e-6


def test_neither_order_nor_other_arrays_nor_frozen_ones_change_a_number() -> None:
    model = {k: np.zeros(5) for k in "abc"}
    whole = stepped(Noise(1), model)
    assert bits(stepped(Noise(1), {"c": model["c"], "a": model["a"]})["c"]) == bits(whole["c"])

    state = opt.freeze(opt.setup(Noise(1), model), "a")
    _, frozen = opt.update(state, model, model)
    assert (frozen["a"] == 0).all()
    assert bits(frozen["b"]) == bits(whole["b"])

    state = opt.setup(Noise(1), model)
    _, part = opt.update(state["b"], model["b"], model["b"])
    assert bits(part) == bits(whole["b"])


def test_elements_are_counted_in_their_order_wherever_they_lie() -> None:
    plain = stepped(Noise(1), {"w": np.zeros((6, 4))})
    turned = stepped(Noise(1), {"w": np.asfortranarray(np.zeros((6, 4)))})

    assert np.allclose(plain["w"], turned["w"], atol=1e-14)
    state = opt.setup(Noise(1), {"w": np.asfortranarray(np.zeros((6, 4)))})
    assert "do not lie in order" in repr(opt.explain(state))


def test_sums_over_rows_see_the_numbers_that_the_step_sees() -> None:
    class Rows(opt.Rule):
        seed: int = 0

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            noise = opt.ops.normal(x, self.seed)
            return state, noise - opt.ops.sum(noise, axis=-1, keepdims=True)

    x = np.zeros((30, 300), "float32")
    noise = opt.ops.normal(x.astype(float), 4)
    wanted = noise.sum(-1, keepdims=True) - noise
    for engine in ("numba", "interpret"):
        assert np.abs(stepped(Rows(4), x, engine=engine) - wanted).max() < 1e-3


@pytest.mark.slow
def test_packed_state_and_jit_and_vmap_draw_what_numpy_draws() -> None:
    jax = pytest.importorskip("jax")
    model = {k: jax.numpy.zeros(shape) for k, shape in SHAPES.items()}
    wanted = {k: opt.ops.normal(np.zeros(shape), 2, step=1, leaf=(k,)) for k, shape in SHAPES.items()}

    @jax.jit
    def twice(state: Any) -> Any:
        state, _ = opt.update(state, model, model)
        return opt.update(state, model, model)[0]

    for packed in (False, True):
        state = twice(opt.setup(Draws(2), model, packed=packed))
        for k in SHAPES:
            assert np.abs(np.asarray(state[k].state["normal"]) - wanted[k]).max(initial=0) < 3e-6

    def moved(seed: Any) -> Any:
        state = opt.setup(Noise(seed), model)
        return opt.update(state, model, model)[1]["w"]

    for seed, got in enumerate(jax.jit(jax.vmap(moved))(jax.numpy.arange(3.0))):
        assert np.abs(np.asarray(got) + opt.ops.normal(np.zeros((5, 3)), seed, leaf=("w",))).max() < 3e-6


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optimisers as opt
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.engines.test_random import Noise
want = -opt.ops.normal(np.zeros((8, 4), "float32"), 3, leaf=("w",))
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        m = {"w": jax.device_put(jnp.zeros((8, 4)), NamedSharding(mesh, P("a", "b")))}
        for step in (opt.update, jax.jit(lambda *a: opt.update(*a))):
            _, new = step(opt.setup(Noise(3), m), m, m)
            assert np.abs(np.asarray(new["w"]) - want).max() < 3e-6
            assert new["w"].sharding.spec == P("a", "b")
        spec = {"w": P("a", "b")}
        inside = jax.shard_map(lambda s, m: opt.update(s, m, m)[1], in_specs=(P(), spec), out_specs=spec)
        try:
            inside(opt.setup(Noise(3), m), m)
        except opt.BadState as error:
            assert "take the step outside it" in str(error)
        else:
            raise AssertionError("no error")
"""

DISTRIBUTED = """
import numpy as np, torch, optimisers as opt
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from tests.engines.test_random import Noise
torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
want = -opt.ops.normal(np.zeros((5, 4), "float32"), 3, leaf=("w",))
for how, part in ((Shard(0), np.s_[3:]), (Shard(1), np.s_[:, 2:]), (Replicate(), np.s_[:])):
    mine = torch.zeros(want[part].shape)
    x = DTensor.from_local(mine, mesh, [how], run_check=False, shape=torch.Size((5, 4)), stride=(4, 1))
    _, new = opt.update(opt.setup(Noise(3), {"w": x}), {"w": x}, {"w": torch.zeros_like(x)})
    assert np.abs(new["w"].to_local().numpy() - want[part]).max() < 3e-6
"""


@pytest.mark.slow
@pytest.mark.parametrize(("program", "library"), [(SHARDED, "jax"), (DISTRIBUTED, "torch")])
def test_every_shard_has_the_numbers_of_its_place_in_the_whole(program: str, library: str) -> None:
    pytest.importorskip(library)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# -- seeds, steps, rules -------------------------------------------------------------------------------------


def test_steps_draws_seeds_and_arrays_have_numbers_of_their_own() -> None:
    x = np.zeros(20_000)
    rows = [
        opt.ops.normal(x, seed, draw=draw, step=step, leaf=leaf)
        for seed, draw, step, leaf in (
            (0, 0, 0, ("a",)),
            (1, 0, 0, ("a",)),
            (0, 1, 0, ("a",)),
            (0, 0, 1, ("a",)),
            (0, 0, 0, ("b",)),
            (0, 0, 0, ("a", 0)),
        )
    ]
    rows += [np.roll(rows[0], by) for by in (1, 64, 128, 192, 256)]
    off = np.corrcoef(rows) - np.eye(len(rows))

    assert np.abs(off).max() < 5 / np.sqrt(x.size)


def test_the_moments_are_those_of_their_distributions() -> None:
    n = 1_000_000
    z = opt.ops.normal(np.zeros(n, "float32"), 12).astype(float)
    u = opt.ops.uniform(np.zeros(n, "float32"), 12).astype(float)
    s = opt.ops.rademacher(np.zeros(n, "float32"), 12)
    c = opt.ops.normal(np.zeros(n, "complex64"), 12).astype(complex)
    near = 5 / np.sqrt(n)

    assert abs(z.mean()) < near
    assert abs((z**2).mean() - 1) < near * np.sqrt(2)
    assert abs((z**3).mean()) < near * np.sqrt(15)
    assert abs((z**4).mean() - 3) < near * np.sqrt(96)
    for edge, share in ((1.0, 0.158655), (2.0, 0.0227501), (3.0, 0.00134990)):
        assert abs((z > edge).mean() - share) < near * np.sqrt(share)
    assert u.min() > 0
    assert u.max() <= 1
    assert abs(u.mean() - 0.5) < near * np.sqrt(1 / 12)
    assert abs(u.var() - 1 / 12) < near * np.sqrt(1 / 180)
    assert set(np.unique(s)) == {-1, 1}
    assert abs(s.mean()) < near
    assert abs((np.abs(c) ** 2).mean() - 1) < near
    assert abs((c * c).mean()) < 2 * near
    for a, b in ((z, u), (z, s), (u, s), (z**2, u), (z**2, s), (c.real, c.imag)):
        assert abs(np.corrcoef(a, b)[0, 1]) < near


def test_two_rules_of_a_chain_with_one_seed_draw_apart() -> None:
    x = np.zeros(10_000)
    one, both = stepped(Noise(1), x), stepped(opt.Chain(Noise(1), Noise(1)), x)

    assert np.abs(np.corrcoef(one, both - one)[0, 1]) < 0.05


def test_behind_accumulated_gradients_the_step_is_that_which_was_taken() -> None:
    x = np.zeros(4)
    zeros = np.zeros(4)
    state = opt.setup(opt.Chain(opt.AccumGrad(2), Noise(1)), x)
    for taken in (0, 1):
        for half in (0, 1):
            before = x
            state, x = opt.update(state, x, zeros)
            moved = -opt.ops.normal(zeros, 1, step=taken) if half else 0
            assert np.allclose(x - before, moved, atol=1e-14)


def test_a_run_that_is_stored_goes_on_bit_by_bit() -> None:
    model = {"w": np.zeros(9, "float32")}
    state = opt.setup(Noise(7), model)
    for _ in range(3):
        state, model = opt.update(state, model, model)
    kept = opt.arrays(state)
    again = opt.from_arrays(opt.setup(Noise(0), model), kept)

    assert again["w"].rule == Noise(7)
    _, there = opt.update(again, model, model)
    _, here = opt.update(state, model, model)
    assert bits(there["w"]) == bits(here["w"])


def test_a_seed_is_a_number_like_any_other() -> None:
    assert opt.kernel(Noise(1)) == opt.kernel(Noise(2))
    assert Noise(1) == Noise(1)
    assert Noise(1) != Noise(2)
    x = np.zeros(5)
    _, new = opt.update(opt.adjust(opt.setup(Noise(1), x), seed=2), x, x)
    assert bits(new) == bits(stepped(Noise(2), x))


def test_what_cannot_be_drawn_is_refused() -> None:
    class Wrong(opt.Rule):
        how: str = opt.static("")

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            if self.how == "shape":
                return state, dx + opt.ops.normal(opt.ops.transpose(dx), 0)
            if self.how == "step":
                return state, dx + opt.ops.normal(dx, 0, step=1)
            return state, dx + opt.ops.normal(dx, 0, draw=16)

    for how, says in (("shape", "in the shape of"), ("step", "no step and no leaf"), ("", "draw=16")):
        with pytest.raises(opt.TraceError, match=says):
            opt.setup(Wrong(how), np.zeros((2, 2)))
