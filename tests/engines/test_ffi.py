"""Kernels run in place inside computations of XLA, and give the numbers of the interpreter."""

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.engines.addressed.text import kinds_of
from optimisers.engines.cpu import printer as kernels
from optimisers.engines.cpu import task as fused
from optimisers.engines.cpu.compiler import Unknown
from optimisers.state.leaf import parts

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 only where there is JAX

from optimisers.engines.xla import c_api  # noqa: E402 the same
from optimisers.engines.xla import call as ffi  # noqa: E402 the same

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="handlers have been tried there only")

RULE = opt.AdamW(1e-2)
SHAPES = [(300, 7), (5,), (), (0, 3), (17, 1, 2)]


# -- a step of our own, recorded call by call ----------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """What a kernel was called with on NumPy."""

    source: str
    columns: list[str]
    stored: list[str]
    ops: list[str]
    table: Any
    row: Any
    found: Any = None
    """The reductions of every leaf."""


@dataclasses.dataclass
class Steps:
    """A few steps on NumPy: the kernel calls of each; what there was before; what the interpreter gives."""

    calls: list[list[Call]]
    before: dict[str, list[Any]]
    after: dict[str, list[Any]]


def arrays(shapes: Sequence[tuple[int, ...]], dtype: Any, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    found = [rng.standard_normal(s) for s in shapes]
    if kind.kind == "c":
        found = [x + 1j * rng.standard_normal(x.shape) for x in found]
    return [np.asarray(x).astype(kind) for x in found]


def slots(state: Any) -> dict[str, list[Any]]:
    (group,) = parts(state)[0].groups
    leaves = range(len(group.leaves))
    return {f"s{j}": [np.array(slot[k]) for k in leaves] for j, slot in enumerate(group.slots)}


def steps(rule: opt.Rule, shapes: Sequence[tuple[int, ...]], dtype: Any = "float32", count: int = 1) -> Steps:
    """Take a few steps and write down how."""
    x, g = arrays(shapes, dtype, 1), arrays(shapes, dtype, 2)
    calls: list[list[Call]] = []
    whole = fused.launch

    def launch(step: Any, p: Any, chunks: Any, members: Any, new: Any, *partial: Any) -> None:
        name = step.library.type_name(step.kind.dtype)
        kinds = kinds_of(step.program, p, name, name)
        table, row = step.scalars.table(p.scalars)
        calls[-1].append(
            Call(
                fused.sources(step.program, p, kinds, name, inplace=True),
                kernels.columns(p, inplace=True),
                [slot for slot, _ in p.stores],
                [r.op for r in p.reductions],
                table.copy(),
                np.array(row),
            )
        )
        whole(step, p, chunks, members, new, *partial)
        if partial:
            pairs = zip(p.reductions, partial[0], strict=True)
            calls[-1][-1].found = [fused.gathered(r.op, part, chunks.leaf, len(row)) for r, part in pairs]

    own = [a.copy() for a in x]
    state = opt.setup(rule, own, engine="numba")
    before = {"x": x, "dx": g, **slots(state)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "launch", launch)
        for _ in range(count):
            calls.append([])
            state, own = opt.update_(state, own, g)
    plain = [a.copy() for a in x]
    state = opt.setup(rule, plain, engine="interpret")
    for _ in range(count):
        state, plain = opt.update(state, plain, g)
    return Steps(calls, before, {"x": plain, **slots(state)})


def run(call: Call, have: dict[str, list[Any]], table: Any = None, **more: Any) -> dict[str, list[Any]]:
    """The same call inside a computation; what there is after it."""
    leaves = len(call.row)
    inputs = [a for c in call.columns for a in have[c]]
    number = {c: i * leaves for i, c in enumerate(call.columns)}
    aliases: dict[int, int] = {}
    for c in call.stored:
        aliases |= {number[c] + k: len(aliases) + k for k in range(leaves)}
    places = np.zeros((len(call.columns), leaves, 2), np.int64)
    places[..., 0] = np.arange(len(inputs)).reshape(len(call.columns), leaves)
    found = ffi.launch(
        call.source,
        inputs,
        outputs=[jax.ShapeDtypeStruct(inputs[i].shape, inputs[i].dtype) for i in aliases],
        aliases=aliases,
        table=call.table if table is None else table,
        places=places,
        row=call.row,
        sizes=np.array([a.size for a in have["x"]], np.int64),
        sums=len(call.ops),
        ops=call.ops,
        **more,
    )
    new = {c: found[i * leaves : (i + 1) * leaves] for i, c in enumerate(call.stored)}
    return {**have, **new, **({"sums": found[-1:]} if call.ops else {})}


def on_device(have: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {c: [jnp.array(a) for a in found] for c, found in have.items()}


TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-6, "float64": 1e-13, "complex64": 2e-6}


def agree(found: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    """Compare what both have; raise AssertionError unless it is the same."""
    for name, expected in wanted.items():
        for a, b in zip(found[name], expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            rtol = TOLERANCE[str(b.dtype)]
            wide = np.complex128 if b.dtype.kind == "c" else np.float64
            np.testing.assert_allclose(np.asarray(a).astype(wide), b.astype(wide), rtol=rtol, atol=rtol)


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    with jax.enable_x64(request.param):
        yield request.param


# -- the numbers ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_a_jitted_call_takes_the_step_of_the_interpreter(dtype: str) -> None:
    seen = steps(RULE, SHAPES, jnp.dtype(dtype))
    ((call,),) = seen.calls
    agree(jax.jit(lambda have: run(call, have))(on_device(seen.before)), seen.after)


def test_a_jitted_call_steps_float64() -> None:
    seen = steps(RULE, SHAPES, "float64")
    ((call,),) = seen.calls
    with jax.enable_x64(True):
        agree(jax.jit(lambda have: run(call, have))(on_device(seen.before)), seen.after)


@pytest.mark.usefixtures("x64")
def test_a_call_outside_jit_takes_the_step_too() -> None:
    seen = steps(RULE, SHAPES)
    ((call,),) = seen.calls
    have = on_device(seen.before)
    agree(run(call, have), seen.after)
    agree(have, seen.before)


def test_a_scan_takes_many_steps_with_numbers_that_change() -> None:
    seen = steps(RULE, SHAPES, count=5)
    calls = [call for (call,) in seen.calls]
    tables = jnp.asarray(np.stack([c.table for c in calls]), jnp.float32)

    def step(have: Any, table: Any) -> Any:
        return run(calls[0], have, table), None

    found, _ = jax.jit(lambda have: jax.lax.scan(step, have, tables))(on_device(seen.before))
    agree(found, seen.after)


@pytest.mark.parametrize(
    "shapes",
    [[(1448, 1448)], [(5,)] * 3 + [(700, 700), (3,)] * 2, [(32, 32)] * 200],
    ids=["one of 2M", "mixed", "200 of 32x32"],
)
def test_large_and_many_leaves_are_stepped_alike(shapes: list[tuple[int, ...]]) -> None:
    seen = steps(RULE, shapes)
    ((call,),) = seen.calls
    step = jax.jit(lambda have: run(call, have))
    for _ in range(20):
        found = step(on_device(seen.before))
    agree(found, seen.after)


def test_one_thread_and_many_give_the_same_bits() -> None:
    seen = steps(RULE, [(700, 700), (3, 4)])
    ((call,),) = seen.calls
    one, many = (
        jax.jit(lambda have, n=n: run(call, have, helpers=n))(on_device(seen.before)) for n in (0, 15)
    )
    for c in call.stored:
        for a, b in zip(one[c], many[c], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shapes", [[(0,)], [(0, 3), (0,)], []], ids=str)
def test_leaves_without_elements_are_stepped_in_no_time(shapes: list[tuple[int, ...]]) -> None:
    ((call,),) = steps(RULE, [(2,)]).calls
    call = dataclasses.replace(call, row=np.zeros(len(shapes), np.int64))
    have = {c: [jnp.zeros(s) for s in shapes] for c in call.columns}
    found = jax.jit(lambda have: run(call, have))(have)
    assert [a.shape for a in found["x"]] == shapes


def test_leaves_may_share_a_buffer_and_have_rows_of_their_own() -> None:
    shapes = [(3, 5), (70, 1000), (1,)]
    tables = [steps(opt.AdamW(eta), shapes) for eta in (1e-1, 1e-3)]
    ((call,),) = tables[0].calls
    table = np.concatenate([seen.calls[0][0].table for seen in tables])
    sizes = np.array([15, 70000, 1])
    begin = np.array([0, 15, 70015])
    before = tables[0].before
    joined = {c: jnp.concatenate([a.ravel() for a in before[c]]) for c in call.columns}
    inputs = list(joined.values())
    stored = [call.columns.index(c) for c in call.stored]
    places = np.zeros((len(inputs), 3, 2), np.int64)
    places[..., 0], places[..., 1] = np.arange(len(inputs))[:, None], 4 * begin

    def step(inputs: list[Any]) -> list[Any]:
        return ffi.launch(
            call.source,
            inputs,
            outputs=[jax.ShapeDtypeStruct((70016,), "float32")] * len(stored),
            aliases={i: k for k, i in enumerate(stored)},
            table=table,
            places=places,
            row=np.array([0, 1, 0]),
            sizes=sizes,
        )

    found = dict(zip(call.stored, jax.jit(step)(inputs), strict=True))
    for k, which in enumerate((0, 1, 0)):
        for c in call.stored:
            part = found[c][begin[k] : begin[k] + sizes[k]]
            np.testing.assert_allclose(part, tables[which].after[c][k].ravel(), rtol=2e-6, atol=2e-6)


def test_a_place_outside_its_buffer_is_refused() -> None:
    ((call,),) = steps(RULE, [(2,)]).calls
    have = {c: [jnp.zeros(1 if c == "dx" else 2)] for c in call.columns}
    with pytest.raises(ValueError, match="ends outside its buffer"):
        run(call, have)
    with pytest.raises(ValueError, match="none of the 1 rows"):
        run(dataclasses.replace(call, row=np.array([1])), {c: [jnp.zeros(2)] for c in call.columns})


# -- reductions ----------------------------------------------------------------------------------------------


class Extremes(opt.Rule):
    """Steps by the largest and smallest element, and the sum."""

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, (opt.ops.max(dx) + opt.ops.min(dx) + opt.ops.sum(dx)) * dx


def test_the_pass_of_a_global_norm_gives_the_norms_of_every_leaf(x64: bool) -> None:
    seen = steps(opt.Chain(opt.ClipGlobalNorm(1.0), RULE), [(900, 300), (7,), (0,), ()])
    (first, second) = seen.calls[0]
    have = jax.jit(lambda have: run(first, have))(on_device(seen.before))
    (sums,) = have.pop("sums")
    assert sums.dtype == (jnp.float64 if x64 else jnp.float32)
    np.testing.assert_allclose(sums, first.found, rtol=1e-15 if x64 else 1e-7)
    norms = [[np.linalg.norm(g.astype(float)) for g in seen.before["dx"]]]
    np.testing.assert_allclose(sums, norms, rtol=1e-12 if x64 else 1e-6)
    agree(jax.jit(lambda have: run(second, have))(have), seen.after)


def test_maxima_and_minima_are_gathered_too_and_nan_spreads() -> None:
    seen = steps(Extremes(), [(900, 300), (7,), (3,)])
    first = seen.calls[0][0]
    assert sorted(first.ops) == ["max", "min", "sum"]
    grads = [g.copy() for g in seen.before["dx"]]
    grads[0][500, 7] = np.nan
    for dx in (seen.before["dx"], grads):
        have = on_device({**seen.before, "dx": dx})
        (sums,) = jax.jit(lambda have: run(first, have))(have)["sums"]
        for op, row in zip(first.ops, sums, strict=True):
            expected = [getattr(np, op)(g.astype(float)) for g in dx]
            np.testing.assert_allclose(row, expected, rtol=1e-5)


# -- whose memory --------------------------------------------------------------------------------------------


def donating(call: Call, way: Callable[..., Any] | None = None) -> Any:
    """A jitted step of (what is given away, what is kept), by a kernel call or another way."""
    way = both(call)[0] if way is None else way

    def step(given: dict[str, list[Any]], kept: dict[str, list[Any]]) -> dict[str, list[Any]]:
        names, flat = flattened(call, {**given, **kept})
        return gathered(names, way(flat), call)

    return jax.jit(step, donate_argnums=0)


def split(call: Call, have: dict[str, list[Any]]) -> tuple[Any, Any]:
    return {c: have[c] for c in call.stored}, {c: have[c] for c in call.columns if c not in call.stored}


def test_what_is_given_away_is_written_without_a_copy() -> None:
    shapes = [(300, 7), (5,), (4, 3, 2)]
    seen = steps(RULE, shapes, count=2)
    ((call,), (later,)) = seen.calls
    assert call.source == later.source
    step = donating(call)
    given, rest = split(call, on_device(seen.before))
    text = step.lower(given, rest).compile().as_text()
    assert text.count("custom-call(") == 1
    assert " copy(" not in text
    at = [a.unsafe_buffer_pointer() for a in given["x"]]
    new = step(given, rest)
    assert all(a.is_deleted() for c in call.stored for a in given[c])
    assert [a.unsafe_buffer_pointer() for a in new["x"]] == at
    agree(rest, {c: seen.before[c] for c in rest})


def test_what_is_kept_stays_as_it_was() -> None:
    seen = steps(RULE, SHAPES)
    ((call,),) = seen.calls
    have = on_device(seen.before)
    agree(jax.jit(lambda have: run(call, have))(have), seen.after)
    agree(have, seen.before)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [SHAPES, [(1000, 600), (5,)]], ids=["small", "large"])
def test_eight_threads_may_step_at_once(shapes: list[tuple[int, ...]]) -> None:
    seen = steps(RULE, shapes)
    ((call,),) = seen.calls
    step = jax.jit(lambda have: run(call, have))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(40 if shapes == SHAPES else 8):
                agree(step(on_device(seen.before)), seen.after)
        except BaseException as error:  # noqa: BLE001 reported by the test
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
    assert failures == []
    assert not any(w.is_alive() for w in workers)


def test_calls_of_one_computation_may_run_at_once() -> None:
    seen = steps(RULE, [(700, 700), (5,)])
    ((call,),) = seen.calls
    step = jax.jit(lambda haves: [run(call, have) for have in haves])
    for _ in range(5):
        for found in step([on_device(seen.before) for _ in range(12)]):
            agree(found, seen.after)


# -- fresh processes -----------------------------------------------------------------------------------------


def fresh(function: str, **environment: str) -> str:
    """Run a function of this file in a new process; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.engines import test_ffi\ntest_ffi.{function}()"],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_four_devices() -> None:
    """Rows of the parameters on four devices; every device steps its own."""
    from jax.sharding import NamedSharding, PartitionSpec

    seen = steps(RULE, [(4000, 70), (8,)])
    local = steps(RULE, [(1000, 70), (2,)]).calls[0][0]
    call = dataclasses.replace(local, table=seen.calls[0][0].table)
    mesh, rows = jax.make_mesh((4,), ("rows",)), PartitionSpec("rows")
    have = jax.device_put(on_device(seen.before), NamedSharding(mesh, rows))
    for table in (call.table, jnp.asarray(call.table, jnp.float32)):
        step = jax.shard_map(
            lambda have, table=table: run(call, have, table), mesh=mesh, in_specs=(rows,), out_specs=rows
        )
        jitted = jax.jit(step)
        for _ in range(50):
            agree(jitted(have), seen.after)
    whole = ffi.with_fallback(*both(call))
    step = jax.jit(jax.shard_map(whole, mesh=mesh, in_specs=(rows,), out_specs=rows))
    names, flat = flattened(call, have)
    agree(gathered(names, step(flat), call), {c: seen.after[c] for c in call.stored})
    sys.stdout.write(f"{jax.device_count()} devices")


@pytest.mark.slow
def test_four_devices_step_their_shards_at_once() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    assert fresh("on_four_devices", **flags) == "4 devices"


def with_one_thread() -> None:
    """XLA has no threads to lend."""
    seen = steps(RULE, [(1000, 600), (5,)])
    ((call,),) = seen.calls
    agree(jax.jit(lambda have: run(call, have, helpers=7))(on_device(seen.before)), seen.after)
    sys.stdout.write(f"{not ffi.refusal()}")


@pytest.mark.slow
def test_a_computation_without_threads_is_stepped_by_its_caller() -> None:
    assert fresh("with_one_thread", XLA_FLAGS="--xla_cpu_multi_thread_eigen=false") == "True"


def through_the_cache() -> None:
    """Step once with everything that is kept on disk kept; say how much XLA had to compile."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    seen = steps(RULE, SHAPES)
    ((call,),) = seen.calls
    have = on_device(seen.before)
    hits.clear()
    agree(jax.jit(lambda have: run(call, have))(have), seen.after)
    found, missed = (sum(f"cache_{what}" in h for h in hits) for what in ("hits", "misses"))
    sys.stdout.write(f"{found} found, {missed} not")


@pytest.mark.slow
def test_a_later_process_finds_the_compiled_computation_and_kernels(tmp_path: Path) -> None:
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "XDG_CACHE_HOME": str(tmp_path / "own")}
    assert fresh("through_the_cache", **kept) == "0 found, 1 not"
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "own").rglob("*.nb?")}
    assert files
    assert fresh("through_the_cache", **kept) == "1 found, 0 not"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "own").rglob("*.nb?")} == files


# -- where kernels do not run --------------------------------------------------------------------------------


def flattened(call: Call, have: dict[str, list[Any]]) -> tuple[dict[str, int], list[Any]]:
    return {c: len(have[c]) for c in call.columns}, [a for c in call.columns for a in have[c]]


def gathered(names: dict[str, int], found: list[Any], call: Call) -> dict[str, list[Any]]:
    n = names["x"]
    return {c: found[i * n : (i + 1) * n] for i, c in enumerate(call.stored)}


def both(call: Call) -> tuple[Any, Any]:
    """The step as a kernel call, and AdamW written out: both of all arrays, one after the other."""
    n = len(call.row)

    def have(flat: list[Any]) -> dict[str, list[Any]]:
        return {c: flat[i * n : (i + 1) * n] for i, c in enumerate(call.columns)}

    def fast(flat: list[Any]) -> list[Any]:
        found = run(call, have(flat))
        return [a for c in call.stored for a in found[c]]

    def plain(flat: list[Any]) -> list[Any]:
        given, new = have(flat), {c: [] for c in call.stored}
        for x, g, m0, v0 in zip(*(given[c] for c in ("x", "dx", "s0", "s1")), strict=True):
            m, v = 0.9 * m0 + 0.1 * g, 0.999 * v0 + 0.001 * g * g
            new["s0"].append(m)
            new["s1"].append(v)
            step = (m / 0.1) / (jnp.sqrt(v / 0.001) + RULE.epsilon)
            new["x"].append(x - 1e-2 * step - (1e-2 if RULE.couple else 1.0) * RULE.lam * x)
        return [a for c in call.stored for a in new[c]]

    return fast, plain


FALLBACK = [(30, 7), (5,)]


def test_both_ways_of_a_step_agree() -> None:
    seen = steps(RULE, FALLBACK)
    ((call,),) = seen.calls
    names, flat = flattened(call, on_device(seen.before))
    for way in (*both(call), ffi.with_fallback(*both(call)), jax.jit(ffi.with_fallback(*both(call)))):
        agree(gathered(names, way(flat), call), {c: seen.after[c] for c in call.stored})


def test_a_fallback_changes_nothing_on_a_cpu() -> None:
    seen = steps(RULE, FALLBACK)
    ((call,),) = seen.calls
    fast, plain = both(call)
    step = donating(call, ffi.with_fallback(fast, plain))
    text = step.lower(*split(call, on_device(seen.before))).compile().as_text()
    assert text.count("custom-call(") == 1
    assert " copy(" not in text
    assert "fusion" not in text


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_vmap_takes_the_plain_way(wrap: Any) -> None:
    seen = steps(RULE, FALLBACK)
    ((call,),) = seen.calls
    _, flat = flattened(call, on_device(seen.before))
    fast, plain = both(call)
    stacked = [jnp.stack([a, 2 * a, a + 1]) if i % 2 else a for i, a in enumerate(flat)]
    axes = [0 if i % 2 else None for i in range(len(flat))]
    found = wrap(jax.vmap(ffi.with_fallback(fast, plain), in_axes=(axes,)))(stacked)
    wanted = jax.vmap(plain, in_axes=(axes,))(stacked)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gradients_take_the_plain_way(wrap: Any) -> None:
    seen = steps(RULE, FALLBACK)
    ((call,),) = seen.calls
    _, flat = flattened(call, on_device(seen.before))
    fast, plain = both(call)

    def loss(way: Any, flat: list[Any]) -> Any:
        return sum((a**2).sum() for a in way(flat))

    found = wrap(jax.grad(lambda flat: loss(ffi.with_fallback(fast, plain), flat)))(flat)
    wanted = jax.grad(lambda flat: loss(plain, flat))(flat)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_take_the_plain_way(platform: str) -> None:
    seen = steps(RULE, FALLBACK)
    ((call,),) = seen.calls
    _, flat = flattened(call, on_device(seen.before))
    traced = jax.jit(ffi.with_fallback(*both(call))).trace(flat)
    assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call @optimisers_" in traced.lower(lowering_platforms=("cpu",)).as_text()


# -- whether it works here -----------------------------------------------------------------------------------


@pytest.fixture
def anew() -> Iterator[None]:
    """`refusal` finds out again, before and after."""

    def forget() -> None:
        for known in (ffi.refusal, ffi._handle, ffi._registered):
            known.cache_clear()

    forget()
    yield
    forget()


HEADER = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()


def test_kernels_run_in_this_jax() -> None:
    assert not ffi.refusal()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  const XLA_FFI_Api* api;\n", ""),
        ("XLA_FFI_API_MAJOR 0", "XLA_FFI_API_MAJOR 1"),
        ("XLA_FFI_Extension_Metadata = 1", "XLA_FFI_Extension_Metadata = 2"),
        ("_XLA_FFI_API_STRUCT_FIELD(XLA_FFI_State_Get);", ""),
        ("XLA_FFI_DataType dtype;\n  void* data;", "void* data;\n  XLA_FFI_DataType dtype;"),
        ("struct XLA_FFI_Attrs {", "struct XLA_FFI_Attributes {"),
    ],
)
@pytest.mark.usefixtures("anew")
def test_another_form_of_a_structure_is_not_available(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    path.parent.mkdir(parents=True)
    path.write_text(HEADER)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert not ffi.refusal()
    ffi.refusal.cache_clear()
    ffi._handle.cache_clear()
    ffi._registered.cache_clear()
    assert old in HEADER
    path.write_text(HEADER.replace(old, new))
    assert ffi.refusal()


@pytest.mark.usefixtures("anew")
def test_without_a_header_it_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert ffi.refusal()


def in_memory() -> None:
    """The directory of kernels belongs to everybody."""
    assert not ffi.refusal()
    seen = steps(RULE, SHAPES)
    ((call,),) = seen.calls
    agree(jax.jit(lambda have: run(call, have))(on_device(seen.before)), seen.after)
    sys.stdout.write("stepped")


@pytest.mark.slow
def test_without_a_trusted_directory_all_is_compiled_in_memory(tmp_path: Path) -> None:
    folder = tmp_path / "optimisers" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert fresh("in_memory", XDG_CACHE_HOME=str(tmp_path)) == "stepped"
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("anew")
def test_wrong_numbers_are_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffi, "TRIAL", ffi.TRIAL.replace("* table[row[k], 0]", "* table[0, 0]"))
    assert ffi.refusal()


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("mistake", ["store(at, i, load(at))", "store(at, i, unknown)", "store(at, i"])
def test_a_mistake_in_a_kernel_is_an_error(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ffi.TRIAL.replace("store(at, i, load(at, i) * table[row[k], 0])", mistake)
    monkeypatch.setattr(ffi, "TRIAL", text)
    with pytest.raises((Unknown, SyntaxError, TypeError)):
        ffi.refusal()


def show_available() -> None:
    sys.stdout.write(f"{not ffi.refusal()}")


@pytest.mark.slow
def test_without_compilation_there_are_no_kernels() -> None:
    assert fresh("show_available", NUMBA_DISABLE_JIT="1") == "False"


@pytest.mark.usefixtures("anew")
def test_the_trial_may_be_made_in_the_middle_of_a_trace() -> None:
    found: list[bool] = []

    def traced(x: Any) -> Any:
        ffi.refusal.cache_clear()
        found.append(not ffi.refusal())
        return x * 2

    jax.jit(traced)(1.0)
    jax.vmap(traced)(jnp.ones(3))
    jax.grad(traced)(1.0)
    jax.eval_shape(traced, jnp.ones(4))
    with jax.disable_jit():
        traced(1.0)
    assert found == [True] * 5


def test_the_header_of_this_jaxlib_is_read() -> None:
    assert c_api.agrees(HEADER)
    assert c_api.Header(HEADER).offsets("XLA_FFI_CallFrame")["attrs"] == 120


def test_no_address_stands_in_a_computation() -> None:
    seen = steps(RULE, SHAPES)
    ((call,),) = seen.calls
    text = jax.jit(lambda have: run(call, have)).lower(on_device(seen.before)).as_text()
    assert ffi.target(call.source) in text
    plan = text.split("plan = dense<[")[1].split("]")[0]
    assert max(int(n) for n in plan.split(", ")) < 1 << 20
