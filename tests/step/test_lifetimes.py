"""What is gone is freed: rules, their classes, structures and whatever was worked out for them."""

import gc
import importlib.util
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optimisers as opt


@pytest.fixture(autouse=True)
def _only_what_comes_is_collected() -> None:
    """What other tests have left in this process need not be looked through each time."""
    gc.collect()
    gc.freeze()


def in_numpy(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def in_torch(*shape: int) -> Any:
    torch = pytest.importorskip("torch")
    return torch.ones(shape)


def in_jax(*shape: int) -> Any:
    jnp = pytest.importorskip("jax.numpy")
    return jnp.ones(shape)


def by_both(state: Any, model: Any) -> None:
    state, model = opt.update(state, model, model)
    opt.freeze_(state, where="b")
    state, model = opt.update_(state, model, model)
    opt.thaw_(state)
    opt.update_(state, model, model)


def by_jit(state: Any, model: Any) -> None:
    import jax

    jax.jit(lambda state, model: opt.update(state, model, model))(state, model)


def by_compiler(state: Any, model: Any) -> None:
    import torch

    torch.compile(lambda s, m: opt.update(s, m, m), backend="eager", fullgraph=True)(state, model)


def collect() -> None:
    for _ in range(3):
        gc.collect()


def one_class(arrays: Callable[..., Any], step: Callable[[Any, Any], None], i: int) -> list[Any]:
    """Weak references to the class of a rule and a schedule, both used and deleted."""

    class Passing(opt.Rule):
        eta: float = 0.1

        def init(self, x: Any) -> Any:
            return 0 * x, 1

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            m, count = state
            m = 0.5 * m + dx
            return (m, count + 1), self.eta / opt.sqrt(opt.total(opt.ops.sum(m * m)) + count) * m

    def schedule(clock: Any) -> Any:
        return 0.5 / (clock + 1)

    model = {f"n{i}": arrays(3), "b": arrays(2, 2)}
    step(opt.setup(Passing(), model), model)
    step(opt.setup(Passing(schedule), model), model)
    return [weakref.ref(Passing), weakref.ref(schedule)]


@pytest.mark.slow
@pytest.mark.parametrize("arrays", [in_numpy, in_torch, in_jax])
def test_classes_of_rules_and_schedules_are_freed(arrays: Callable[..., Any]) -> None:
    arrays(1)
    known = [ref for i in range(20 if arrays is in_numpy else 4) for ref in one_class(arrays, by_both, i)]
    collect()

    assert sum(ref() is not None for ref in known) == 0


@pytest.mark.slow
def test_a_jitted_step_keeps_them_no_longer_than_jax_keeps_what_it_compiled() -> None:
    jax = pytest.importorskip("jax")
    known = [ref for i in range(5) for ref in one_class(in_jax, by_jit, i)]
    jax.clear_caches()
    collect()

    assert sum(ref() is not None for ref in known) == 0


@pytest.mark.slow
def test_a_graph_of_the_compiler_keeps_them_no_longer_than_torch_keeps_it() -> None:
    torch = pytest.importorskip("torch")
    known = [ref for i in range(3) for ref in one_class(in_torch, by_compiler, i)]
    torch.compiler.reset()
    collect()

    assert sum(ref() is not None for ref in known) == 0


def many_models(arrays: Callable[..., Any], first: int, count: int) -> None:
    for i in range(first, first + count):
        model = {f"a{i}": arrays(3), "b": arrays(2)}
        state = opt.setup(opt.AdamW(0.1), model)
        opt.update_(state, model, model)


def frozen_patterns(arrays: Callable[..., Any], first: int, count: int) -> None:
    model = {f"a{i}": arrays(3) for i in range(10)}
    state = opt.setup(opt.AdamW(0.1), model)
    for n in range(first, first + count):
        opt.thaw_(state)
        opt.freeze_(state, where=tuple(f"a{i}" for i in range(10) if n % 997 >> i & 1) or "a0")
        opt.update_(state, model, model)


@pytest.mark.slow
@pytest.mark.parametrize("arrays", [in_numpy, in_torch])
@pytest.mark.parametrize("what", [many_models, frozen_patterns])
def test_memory_does_not_grow_with_what_is_gone(
    what: Callable[..., None], arrays: Callable[..., Any]
) -> None:
    tracemalloc.start()  # before the first round: memory that Python and NumPy use again is theirs of then
    try:
        what(arrays, 0, 20)  # whatever is kept once, or a bounded number of times
        collect()
        objects, before = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
        what(arrays, 1000, 30)
        collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()

    assert len(gc.get_objects()) - objects < 30
    assert grown < 30 * 1000  # bytes each; a structure has 16,000 and more


@pytest.mark.slow
def test_equal_states_share_what_was_compiled_for_them() -> None:
    """A sweep that makes its state anew compiles once, also when nobody holds the state of before."""
    torch = pytest.importorskip("torch")
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    stepped = torch.compile(lambda s, m: opt.update(s, m, m), backend=backend, fullgraph=True)
    for eta in (0.1, 0.2, 0.4):
        model = {"w": torch.ones(3)}
        state = opt.setup(opt.Descent(eta), model)
        _, model = stepped(state, model)
        np.testing.assert_allclose(model["w"].numpy(), 1 - eta, rtol=1e-6)
        del state, model
        collect()

    assert len(graphs) == 1


@pytest.mark.slow
def test_eager_steps_of_states_made_anew_are_compiled_once() -> None:
    jax = pytest.importorskip("jax")
    traced: list[Any] = []

    class Counted(opt.Rule):
        eta: float = 0.1

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, self.eta * dx

    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda name, *_, **__: traced.append(name) if "backend_compile" in name else None)
    counts: list[int] = []
    for eta in (0.1, 0.2, 0.4):
        model = {"w": in_jax(3)}
        state = opt.setup(Counted(eta), model)
        _, model = opt.update(state, model, model)
        np.testing.assert_allclose(np.asarray(model["w"]), 1 - eta, rtol=1e-6)
        counts.append(len(traced))
        del state, model
        collect()

    assert counts[0] > 0
    assert counts[1] == counts[2]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_rates_in_tensors_are_freed() -> None:
    import torch

    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = opt.TorchOptimizer([p], opt.Descent(0.1))
    known: list[Any] = []
    for i in range(50):
        rate = torch.tensor(0.1 / (i + 1), dtype=torch.float64)
        known.append(weakref.ref(rate))
        optimizer.param_groups[0]["lr"] = rate
        del rate
        optimizer.step()
    collect()

    assert sum(ref() is not None for ref in known) == 1
    np.testing.assert_allclose(p.detach().numpy(), 1 - sum(0.1 / (i + 1) for i in range(50)), rtol=1e-5)


def test_kernels_go_with_the_last_state_that_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimisers.engines import cache

    monkeypatch.setattr(cache, "KEPT", 0)
    monkeypatch.setattr(cache, "_recent", {})
    monkeypatch.setattr(cache, "_loaded", weakref.WeakValueDictionary[str, Any]())
    rule = opt.Chain(opt.ClipNorm(), opt.AdaBelief())
    model = [np.ones(5, np.float32)]

    def states() -> tuple[Any, Any, list[Any]]:
        first, second = opt.setup(rule, model), opt.setup(rule, model)
        for state in (first, second):
            opt.update_(state, model, model)
        kernels = [m for m in cache._loaded.values() if "One pass" in (m.__doc__ or "")]
        return first, second, [weakref.ref(m) for m in kernels]

    first, second, modules = states()
    assert len(modules) == 2
    del first
    collect()
    assert all(module() is not None for module in modules)
    opt.update_(second, model, model)
    del second
    collect()
    assert all(module() is None for module in modules)
    assert not [name for name in sys.modules if name.startswith(cache.PREFIX)]


def test_the_kernels_asked_for_last_stay_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from optimisers.engines import cache

    monkeypatch.setattr(cache, "KEPT", 3)
    monkeypatch.setattr(cache, "_recent", {})
    texts = [f'"""{i}"""\nkernel = [{i}]\n' for i in range(5)]
    first = cache.load(texts[0], tmp_path)
    modules = [weakref.ref(cache.load(text, tmp_path)) for text in texts]
    cache.load(texts[2], tmp_path)
    collect()
    assert [m() is not None for m in modules] == [True, False, True, True, True]
    assert first.kernel == [0]
    assert cache.load(texts[0], tmp_path) is first
    assert cache.load(texts[1], tmp_path).kernel == [1]
