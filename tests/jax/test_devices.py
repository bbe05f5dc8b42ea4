"""Eight devices: explicit and automatic sharding of arrays with any number of axes; restoring from one device
to eight and back. Each program runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import optimisers as opt

START = """
import sys, tempfile
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import optimisers as opt

def put(mesh, x, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))

def placed(mesh, of=1.0):
    whole = {"w": ((8, 4), ("a", "b")), "v": ((8,), ("a",)), "c": ((4, 8, 2), (None, "a", "b")),
             "d": ((3, 3, 2, 8), (None, None, "b", "a")), "s": ((), ())}
    numbers = {k: of * jnp.arange(1.0, 1 + np.prod(s)).reshape(s) for k, (s, _) in whole.items()}
    return {k: put(mesh, numbers[k], *axes) for k, (_, axes) in whole.items()}
"""

SHARDED = (
    START
    + """
def steps_of(step, init, params, grads):
    state = init(params)
    for _ in range(3):
        state, params = step(state, params, grads)
    return state, params, step._cache_size() if hasattr(step, "_cache_size") else 0

def by_optax(tx):
    def step(state, params, grads):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)
    return jax.jit(step)

RULES = (
    (opt.Adam(0.1), optax.adam(0.1)),
    (opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.1, lam=0.1)),
     optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))),
)

def checked(kind, rules):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType[kind],) * 2)
    with jax.set_mesh(mesh):
        steps_on(mesh, rules)

def steps_on(mesh, rules):
    params, grads = placed(mesh), placed(mesh, 0.5)
    for (rule, theirs), every in rules:
        tx = opt.as_optax(rule)
        roads = {
            "jit": (jax.jit(lambda *a: opt.update(*a)), lambda p: opt.setup(rule, p)),
            "eager": (opt.update, lambda p: opt.setup(rule, p)),
            "in place": (opt.update_, lambda p: opt.setup(rule, p)),
            "set up in jit": (jax.jit(lambda *a: opt.update(*a)), jax.jit(lambda p: opt.setup(rule, p))),
            "as_optax": (by_optax(tx), tx.init),
        }
        roads = roads if every else {"jit": roads["jit"]}
        _, wanted, count = steps_of(by_optax(theirs), theirs.init, params, grads)
        later = every and steps_of(by_optax(theirs), jax.jit(theirs.init), params, grads)[2]
        for road, (step, init) in roads.items():
            state, new, compiled = steps_of(step, init, params, grads)
            for k in params:
                np.testing.assert_allclose(new[k], wanted[k], rtol=1e-4, atol=1e-5)
                assert new[k].sharding.is_equivalent_to(params[k].sharding, new[k].ndim), (road, k)
            sides = [x.sharding for x in jax.tree.leaves(state) if x.shape == (4, 8, 2)]
            assert all(s.is_equivalent_to(params["c"].sharding, 3) for s in sides) and sides, road
            assert compiled <= (later if road == "set up in jit" else count), (road, compiled, count)
        state = opt.setup(rule, params)
        text = jax.jit(lambda *a: opt.update(*a)).lower(state, params, grads).compile().as_text()
        assert "all-gather" not in text
        try:
            opt.setup(rule, params, packed=True)
        except opt.BadSetting as error:
            assert "is cut into parts on several devices; leave packed out" in str(error)
        else:
            raise AssertionError("packed")
        opt.setup(rule, {k: put(mesh, x) for k, x in params.items()}, packed=True)

checked("Explicit", [*zip(RULES, (True, False))])
checked("Auto", [*zip(RULES, (False, True))])
print("right")
"""
)

MATRICES = (
    START
    + """
import re

COLLECTIVE = r"= \\(?(f32\\[[^]]*\\]).*? (all-gather|all-to-all|all-reduce)\\("

def drawn(i, *shape):
    return jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32)

WHOLE = {f"w{i}": (drawn(i, 16, 8), ("a", "b")) for i in range(12)} | {
    f"v{i}": (drawn(40 + i, 8, 8), ("b", None)) for i in range(3)}
WHOLE |= {"r": (drawn(61, 8, 4), (None, None))}

def model_on(mesh, factor):
    return {k: put(mesh, factor * x, *axes) for k, (x, axes) in WHOLE.items()}

def train(step, rule, params, grads):
    state, model = opt.setup(rule, params), params
    for _ in range(3):
        state, model = step(state, model, grads)
    return state, model

alone = {k: x for k, (x, _) in WHOLE.items()}
clipped = opt.Chain(opt.ClipGlobalNorm(1.0), opt.Muon(0.02))
_, wanted = train(opt.update, clipped, alone, {k: 0.5 * x for k, x in alone.items()})
text = jax.jit(opt.update).lower(opt.setup(clipped, alone), alone, alone).compile()
whole = text.cost_analysis()["flops"]
for kind in ("Explicit", "Auto"):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType[kind],) * 2)
    params, grads = model_on(mesh, 1.0), model_on(mesh, 0.5)
    for road, step in (("jit", jax.jit(lambda *a: opt.update(*a))), ("eager", opt.update)):
        state, model = train(step, clipped, params, grads)
        for k in wanted:
            np.testing.assert_allclose(model[k], wanted[k], 1e-4, 1e-5, err_msg=f"{kind} {road} {k}")
            assert model[k].sharding.is_equivalent_to(params[k].sharding, 2), (kind, road, k)
        if (kind, road) == ("Explicit", "jit"):
            compiled = step.lower(state, model, grads).compile()
            moved = re.findall(COLLECTIVE, compiled.as_text())
            shapes = {name: [s for s, n in moved if n == name] for _, name in moved}
            assert step._cache_size() == 1
            assert set(shapes) == {"all-gather", "all-to-all", "all-reduce"}, shapes
            assert set(shapes["all-reduce"]) == {"f32[]"}, shapes
            assert shapes["all-gather"] == ["f32[4,8,8]"], shapes  # results of those that lie on "a" twice
            assert compiled.cost_analysis()["flops"] < 0.3 * whole, (compiled.cost_analysis()["flops"], whole)

mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
for rule in (opt.SOAP(0.01), opt.Shampoo(0.01)):
    ways = []
    for place in (lambda x: x, lambda x: put(mesh, x, "a", "b")):
        start = {"w": place(drawn(7, 8, 8))}
        state, model = opt.setup(rule, start), start
        for i in range(3):
            state, model = jax.jit(lambda *a: opt.update(*a))(state, model, {"w": place(drawn(70 + i, 8, 8))})
        assert model["w"].sharding.is_equivalent_to(start["w"].sharding, 2)
        ways.append(model["w"])
    np.testing.assert_allclose(*ways, 1e-3, 1e-4)
print("right")
"""
)

SPREAD_STATE = (
    START
    + """
import re

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.1, lam=0.1))
start = {"w": np.ones((64, 32), np.float32), "b": np.ones(16, np.float32)}
data = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)

def loss(model, data):
    return jnp.mean(jnp.tanh(data @ model["w"]) ** 2) + jnp.sum(model["b"] ** 2)

def step(state, model, data):
    return opt.update(state, model, jax.grad(loss)(model, data))

alone = jax.tree.map(jnp.asarray, start)
own = opt.setup(rule, alone)
model = jax.tree.map(lambda x: put(mesh, x), start)
state = opt.setup(rule, model)
state = jax.tree.map(lambda x: put(mesh, x, "data") if x.shape[0] % 8 == 0 else x, state)
there = jax.tree.map(lambda x: x.sharding, (state, model))
zero = jax.jit(step, donate_argnums=(0, 1), out_shardings=there)
batch = put(mesh, data, "data")
compiled = zero.lower(state, model, batch).compile()
memory = compiled.memory_analysis()
given = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state, model)))
assert memory.alias_size_in_bytes == given, (memory, given)
for _ in range(3):
    old = jax.tree.leaves((state, model))
    state, model = zero(state, model, batch)
    own, alone = jax.jit(step)(own, alone, data)
    assert all(x.is_deleted() for x in old)
for k in start:
    np.testing.assert_allclose(model[k], alone[k], rtol=1e-5, atol=1e-6)
    assert model[k].sharding.is_fully_replicated
held = {k: x.addressable_shards[0].data.size for k, x in zip(opt.arrays(state), jax.tree.leaves(state))}
assert sorted(held.values()) == [1, 2, 2, 8, 256, 256], held
assert zero._cache_size() == 1
print("right")
"""
)

APART = (
    START
    + """
one, other = jax.devices()[:2]
model = {"a": jax.device_put(jnp.ones(3), one), "b": jax.device_put(jnp.ones(3), other)}
for rule in (opt.Descent(0.5), opt.Momentum(0.5)):
    state = opt.setup(rule, model)
    for step in (opt.update, opt.update_):
        _, new = step(state, model, model)
        assert all((x == 0.5).all() for x in new.values())
        assert new["b"].devices() == {other}
    state = opt.setup(rule, model)
    assert (opt.update(state["b"], model["b"], model["b"])[1] == 0.5).all()
print("right")
"""
)

RESTORED = (
    START
    + """
from pathlib import Path
import orbax.checkpoint as ocp

rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.1, lam=0.1))
tx = opt.as_optax(rule)
many = jax.device_count() > 1
if many:
    params = placed(jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2))
else:
    params = {k: jnp.asarray(np.asarray(x)) for k, x in placed(jax.make_mesh((1, 1), ("a", "b"))).items()}
empty = {"params": params, "native": opt.setup(rule, params), "optax": tx.init(params)}
with ocp.StandardCheckpointer() as files:
    for folder, into in zip(map(Path, sys.argv[1:]), map(Path, sys.argv[2:])):
        held = files.restore(folder, empty) if folder.name != "none" else empty
        new = dict(held)
        new["native"], new["params"] = jax.jit(opt.update)(held["native"], held["params"], params)
        _, new["optax"] = tx.update(params, held["optax"], held["params"])
        if many:
            assert all(len(x.devices()) == 8 for x in jax.tree.leaves((new["native"], new["params"])))
        files.save(into, new)
        files.wait_until_finished()
        total = sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(new["params"]))
        print(float(total), int(optax.tree.get(new["optax"], "count")))
"""
)


def said(program: str, *arguments: str, devices: int = 8) -> str:
    """What a program prints in a process that has so many devices."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_sharded_arrays_are_stepped_where_they_lie() -> None:
    """With the numbers of Optax, no gathering, and no compilation that Optax has not. Rules and kinds of axes
    meet inside `jit`, and each takes every road.
    """
    assert said(SHARDED) == "right"


@pytest.mark.slow
def test_matrices_on_a_mesh_are_shared_out_to_its_devices() -> None:
    """Each device multiplies some whole matrices, which come and go by all-to-all; no product is gathered.
    Where axes are explicit, products need not say how they lie.
    """
    assert said(MATRICES) == "right"


@pytest.mark.slow
def test_state_may_be_spread_over_copies_of_its_parameters() -> None:
    """And all of it is given away: a step takes no other memory for it."""
    assert said(SPREAD_STATE) == "right"


@pytest.mark.slow
def test_arrays_on_different_devices_are_stepped_each_on_its_own() -> None:
    assert said(APART) == "right"


@pytest.mark.slow
def test_a_state_is_restored_from_one_device_to_eight_and_back(tmp_path: Path) -> None:
    """The same three steps, wherever they are made."""
    moved = [str(tmp_path / name) for name in ("none", "first", "second", "third")]
    stayed = [*moved[:2], *(str(tmp_path / name) for name in ("second alone", "third alone"))]
    alone = said(RESTORED, *stayed, devices=1).splitlines()
    told = [
        [alone[0], said(RESTORED, *moved[1:3], devices=8), said(RESTORED, *moved[2:], devices=1)],
        alone,
    ]
    totals = [[float(line.split()[0]) for line in lines] for lines in told]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    assert [line.split()[1] for line in told[0]] == ["1", "2", "3"]


# -- many in one ---------------------------------------------------------------------------------------------


def test_a_state_of_several_says_so_and_its_members_are_read() -> None:
    model = {"w": jnp.ones(2), "b": jnp.ones(1)}

    def trained(rate: object) -> object:
        state = opt.setup(opt.Momentum(0.5), model)
        return opt.update(opt.adjust(state, rate), model, model)[0]

    for states in (
        jax.vmap(trained)(jnp.array([0.5, 0.25, 0.125])),
        jax.tree.map(lambda *a: jnp.stack(a), *(trained(r) for r in (0.5, 0.25, 0.125))),
    ):
        for act in (
            opt.hyperparameters,
            lambda s: opt.with_hyperparameters(s, {"eta": 0.1}),
            lambda s: opt.adjust(s, 0.1),
            lambda s: opt.adjust_(s, 0.1),
            opt.freeze,
            opt.current,
            opt.explain,
            lambda s: s["w"].rule,
            lambda s: s["w"].state,
            lambda s: opt.update(s, model, model),
        ):
            with pytest.raises(opt.BadState, match="3 states in one, from a map or a stack"):
                act(states)
        assert repr(states).startswith("<state with")
        assert opt.hyperparameters(jax.tree.map(lambda a: a[1], states))["eta"] == 0.25
        rates = jax.vmap(opt.hyperparameters)(states)["eta"]
        assert rates.tolist() == [0.5, 0.25, 0.125]
        halved = jax.vmap(opt.with_hyperparameters)(states, {"eta": rates / 2})
        assert jax.vmap(opt.hyperparameters)(halved)["eta"].tolist() == [0.25, 0.125, 0.0625]
