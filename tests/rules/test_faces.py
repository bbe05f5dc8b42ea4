"""Do rules whose state has other shapes than the parameters work behind every face? Frozen, adjusted, saved,
averaged, in low precision, as optimisers of torch and of Optax.
"""

from typing import Any

import numpy as np
import pytest

import optimisers as opt

RULES: list[opt.Rule] = [
    opt.Muon(0.1, lam=0.1, axes=2),
    opt.NorMuon(0.1, lam=0.1),
    opt.AdaMuon(0.1, lam=0.1),
    opt.Scion(0.1, 2.0),
    opt.Adafactor(0.1, lam=0.1, factor="largest"),
    opt.Adafactor(0.1, lam=0.1, rho=0.8, relative=False),
    opt.CAME(0.1, lam=0.1),
    opt.SM3(0.1),
    opt.AdamMini(0.1, lam=0.1),
    opt.AdamMini(0.1, blocks=2),
    opt.APOLLO(0.1, lam=0.1, rank=2, every=2),
]
every = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
drawing_nothing = pytest.mark.parametrize("rule", RULES[:-1], ids=lambda rule: type(rule).__name__)
"""Without the last, whose random numbers follow from the clock and the path of an array."""
SHAPES = [(4, 6), (2, 4, 3), (6, 6)]
RATE_AFTER = 0.03


def drawn(seed: int, kind: str = "float64") -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(kind) for shape in SHAPES]


def after(rule: opt.Rule, model: list[Any], steps: int = 4) -> list[Any]:
    """Where a rule leads in NumPy."""
    state = opt.setup(rule, model)
    for t in range(steps):
        state, model = opt.update(state, model, drawn(t + 1, str(model[0].dtype)))
    return model


@drawing_nothing
def test_a_frozen_array_stays_and_goes_on_where_it_was(rule: opt.Rule) -> None:
    model, alone = drawn(0), [drawn(0)[0]]
    state, apart = opt.setup(rule, model), opt.setup(rule, alone)
    for t in range(4):
        (opt.freeze_ if t == 1 else opt.thaw_)(state[0])
        state, new = opt.update(state, model, drawn(t + 1))
        assert np.array_equal(new[0], model[0]) == (t == 1)
        model = new
        if t != 1:
            apart, alone = opt.update(apart, alone, drawn(t + 1)[:1])

    np.testing.assert_allclose(model[0], alone[0], rtol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [r for r in RULES if not isinstance(r, opt.Adafactor) or r.rho is None],
    ids=lambda rule: type(rule).__name__,
)
def test_a_rate_that_is_adjusted_counts_from_the_next_step_on(rule: opt.Rule) -> None:
    start = drawn(0)
    state, model = opt.update(opt.setup(rule, start), start, drawn(1))
    wanted = opt.update(state, model, drawn(2))[1]
    found = opt.update(opt.adjust(state, RATE_AFTER), model, drawn(2))[1]

    for x, a, b in zip(model, wanted, found, strict=True):
        np.testing.assert_allclose(b - x, RATE_AFTER / 0.1 * (a - x), rtol=1e-9)


LIBRARIES = ("numpy", "torch", "jax")


@pytest.mark.parametrize(
    ("rule", "library"),
    [pytest.param(r, LIBRARIES[i % 3], id=type(r).__name__) for i, r in enumerate(RULES)],
)
def test_a_run_goes_on_from_a_checkpoint(rule: opt.Rule, library: str) -> None:
    make = np.array
    if library != "numpy":
        module = pytest.importorskip(library)
        make = module.tensor if library == "torch" else module.numpy.asarray

    def of(seed: int) -> list[Any]:
        return [make(a) for a in drawn(seed, "float32")]

    state, model = opt.setup(rule, of(0)), of(0)
    for t in range(2):
        state, model = opt.update(state, model, of(t + 1))
    saved = opt.arrays(state)
    again = opt.from_arrays(opt.setup(rule, model), saved)
    _, wanted = opt.update(state, model, of(3))
    _, found = opt.update(again, model, of(3))

    for a, b in zip(wanted, found, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@every
def test_averages_masters_and_skips_stand_around_them(rule: opt.Rule) -> None:
    torch = pytest.importorskip("torch")
    model = [torch.tensor(a).to(torch.bfloat16) for a in drawn(0)]
    wrapped = opt.EMA(opt.SkipNonFinite(opt.MixedPrecision(opt.Chain(opt.ClipNorm(10.0), rule))), 0.5)
    state, plain = opt.setup(wrapped, model), [x.double().numpy() for x in model]
    inner, mean = opt.setup(opt.Chain(opt.ClipNorm(10.0), rule), plain), plain
    for t in range(5):
        grads = [torch.tensor(g).to(torch.bfloat16) for g in drawn(t + 1)]
        if t != 2:
            inner, plain = opt.update(inner, plain, [g.double().numpy() for g in grads])
            mean = [0.5 * a + 0.5 * x for a, x in zip(mean, plain, strict=True)]
        else:
            grads = [g * float("inf") for g in grads]
        state, model = opt.update(state, model, grads)

    for x, a, b, wide in zip(model, opt.averaged(state, model), mean, plain, strict=True):
        np.testing.assert_allclose(x.double().numpy(), wide, rtol=2**-7, atol=2e-3)
        np.testing.assert_allclose(a.double().numpy(), b, rtol=2**-7, atol=2e-3)


@drawing_nothing
def test_it_is_an_optimiser_of_torch(rule: opt.Rule) -> None:
    torch = pytest.importorskip("torch")
    params = [torch.nn.Parameter(torch.tensor(a)) for a in drawn(0)]
    optimizer = opt.TorchOptimizer(params, rule)
    for t in range(4):
        for p, g in zip(params, drawn(t + 1), strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        if t == 1:
            saved = optimizer.state_dict()
            optimizer = opt.TorchOptimizer(params, rule)
            optimizer.load_state_dict(saved)

    for p, x in zip(params, after(rule, drawn(0)), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-12)


@every
def test_it_is_a_transformation_of_optax(rule: opt.Rule) -> None:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    ours, params = opt.as_optax(rule), [jax.numpy.asarray(a) for a in drawn(0, "float32")]
    state = ours.init(params)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = ours.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(4):
        params, state = step(params, state, [jax.numpy.asarray(g) for g in drawn(t + 1, "float32")])

    for x, wanted in zip(params, after(rule, drawn(0)), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=2e-4, atol=2e-4)
