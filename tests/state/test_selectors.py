"""Selectors: what they pick by shape, type and path, in dicts of rules and in edits, in every library."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as linen_nn
from flax import nnx
from torch import nn

import optimisers as opt
from optimisers.errors import BadState, NoMatch

FAST, SLOW = opt.Descent(1.0), opt.Descent(0.5)


class Block(nn.Module):
    """Attention and a perceptron, with the names of nanoGPT."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, 1)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))


class GPT(nn.Module):
    """A small GPT, whose head is tied to the embedding if it is `tied`."""

    def __init__(self, *, tied: bool = False, d: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(7, d), nn.Embedding(5, d)
        self.h = nn.ModuleList([Block(d) for _ in range(2)])
        self.ln_f, self.lm_head = nn.LayerNorm(d), nn.Linear(d, 7, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


HIDDEN = {
    f"h.{i}.{name}"
    for i in range(2)
    for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.0.weight", "mlp.2.weight")
}


class Patches(nn.Module):
    """A vision transformer as timm names its parts."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.zeros(2, 1, d)),
            nn.Parameter(torch.zeros(1, 5, d)),
        )
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, d, 2)})
        self.blocks = nn.ModuleList([nn.Linear(d, d) for _ in range(2)])
        self.head = nn.Linear(d, 3)


class Tokens(nn.Module):
    """An embedding of a class that is called so, under a name that is not."""

    class TokenEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(7, 4))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.fc = Tokens.TokenEmbedding(), nn.Linear(4, 4), nn.Linear(4, 2)


class Flax(nnx.Module):
    """The same in Flax NNX."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.norm = nnx.Embed(7, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs)


def linen() -> dict[str, Any]:
    """Parameters as Linen names them; those of a scan have the layers first."""
    square, row = np.zeros((4, 4)), np.zeros(4)
    attention = {"query": {"kernel": np.zeros((4, 2, 2)), "bias": np.zeros((2, 2))}}
    return {
        "params": {
            "Embed_0": {"embedding": np.zeros((7, 4))},
            "Block_0": {
                "MultiHeadDotProductAttention_0": attention,
                "Dense_0": {"kernel": square, "bias": row},
            },
            "scanned": {"LayerNorm_0": {"scale": np.zeros((2, 4)), "bias": np.zeros((2, 4))}},
            "lm_head": {"kernel": np.zeros((4, 7))},
        }
    }


def dense(head: str | None) -> Any:
    """What Linen itself makes of three layers, of which the last has this name, or none of its own."""

    class Layers(linen_nn.Module):
        @linen_nn.compact
        def __call__(self, x: Any) -> Any:
            for width in (5, 6):
                x = linen_nn.relu(linen_nn.Dense(width)(x))
            return linen_nn.Dense(2, name=head)(x)

    return Layers().init(jax.random.key(0), jnp.ones((1, 4)))


class Sheets(nnx.Module):
    """Layers of NNX under names of their own, and a head."""

    def __init__(self, layer: Any) -> None:
        rngs = nnx.Rngs(0)
        self.filters = nnx.Conv(3, 4, (2, 2), rngs=rngs)
        self.up, self.down = layer(4, 8, rngs=rngs), layer(8, 4, rngs=rngs)
        self.norm, self.classifier = nnx.LayerNorm(4, rngs=rngs), layer(4, 2, rngs=rngs)


def picked(model: Any, selector: Any) -> set[str]:
    """The paths that a selector picks where it is a key of a dict of rules."""
    state = opt.setup({selector: FAST, "**": SLOW}, model)
    return {path for path, rule in opt.current(state).items() if rule == FAST}


MODELS: list[tuple[str, Callable[[], Any], set[str]]] = [
    ("GPT", GPT, HIDDEN),
    ("tied GPT", lambda: GPT(tied=True), HIDDEN),
    ("vision transformer", Patches, {"blocks.0.weight", "blocks.1.weight"}),
    ("class of an embedding", Tokens, {"middle.weight"}),
    ("Flax", Flax, {"layers.0.kernel", "layers.1.kernel"}),
    (
        "Linen",
        linen,
        {"params.Block_0.Dense_0.kernel", "params.Block_0.MultiHeadDotProductAttention_0.query.kernel"},
    ),
    ("Linen with a named head", lambda: dense("head"), {"params.Dense_0.kernel", "params.Dense_1.kernel"}),
    ("Linen without one", lambda: dense(None), {"params.Dense_0.kernel", "params.Dense_1.kernel"}),
    ("NNX with a named head", lambda: Sheets(nnx.Linear), {"up.kernel", "down.kernel", "filters.kernel"}),
    ("counted by Linen", lambda: {"params": {f"Dense_{i}": {"kernel": np.zeros((3, 3))} for i in (0, 1, 10)}},
     {"params.Dense_0.kernel", "params.Dense_1.kernel"}),
    ("sequence", lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)),
     {"0.weight", "2.weight"}),
    ("list", lambda: [{"w": np.zeros((2, 3)), "b": np.zeros(3)}, {"w": np.zeros((3, 3))}], {"0.w"}),
    ("one row", lambda: {"a": np.zeros((1, 8)), "b": np.zeros((8, 8)), "c": np.zeros((8, 1, 1))}, {"b"}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "hidden"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_hidden_matrices_are_no_embedding_no_head_and_no_vector(model: Any, hidden: set[str]) -> None:
    assert picked(model(), opt.hidden_matrices) == hidden


def test_arrays_of_two_axes_are_matrices_and_all_others_vectors() -> None:
    model = {
        "number": np.zeros(()),
        "row": np.zeros(3),
        "matrix": np.zeros((2, 3)),
        "kernel": np.zeros((2, 3, 1)),
    }

    assert picked(model, opt.matrices) == {"matrix", "kernel"}
    assert picked(model, opt.vectors) == picked(model, ~opt.matrices) == {"number", "row"}


def test_by_type_picks_what_stands_in_a_module_at_any_depth_and_at_any_place_of_a_tie() -> None:
    tied = GPT(tied=True)
    embeddings = {"wte.weight", "wpe.weight"}

    assert picked(tied, opt.by_type(nn.Embedding)) == embeddings
    assert "wte.weight" in picked(tied, opt.by_type(nn.Linear))
    assert picked(tied, opt.by_type(nn.Embedding, nn.ModuleList)) - embeddings == {
        name for name, _ in tied.named_parameters() if name.startswith("h.")
    }
    assert picked(Flax(), opt.by_type(nnx.Embed)) == {"first.embedding"}
    assert picked(Flax(), opt.by_type(nnx.Param) & opt.vectors) == picked(Flax(), opt.vectors)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (opt.matrices & "h.0.**", {n for n in HIDDEN if n.startswith("h.0.")}),
        ("h.0.**" & opt.matrices & ~opt.by_path("**.mlp.*.weight"),
         {"h.0.attn.in_proj_weight", "h.0.attn.out_proj.weight"}),
        (opt.by_type(nn.Embedding) | "lm_head.*", {"wte.weight", "wpe.weight", "lm_head.weight"}),
        ("ln_f.*" | opt.by_path("wpe.*"), {"ln_f.weight", "ln_f.bias", "wpe.weight"}),
        (~(opt.vectors | "h.**") & ~opt.by_type(nn.Embedding), {"lm_head.weight"}),
    ],
)  # fmt: skip
def test_selectors_compose_with_each_other_and_with_globs(selector: Any, expected: set[str]) -> None:
    assert picked(GPT(), selector) == expected


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (opt.matrices, "matrices"),
        (opt.hidden_matrices & ~opt.by_path("head.**"), "hidden_matrices & ~by_path('head.**')"),
        (
            (opt.vectors | "a") & opt.by_type(nn.Linear, nn.Conv2d),
            "(vectors | by_path('a')) & by_type(Linear, Conv2d)",
        ),
        (~(opt.vectors & "a"), "~(vectors & by_path('a'))"),
    ],
)
def test_selectors_are_values(selector: Any, text: str) -> None:
    again = pickle.loads(pickle.dumps(selector))

    assert repr(selector) == text
    assert again == selector
    assert hash(again) == hash(selector)
    assert copy.deepcopy(selector) == selector
    assert selector not in (opt.vectors, opt.by_path("a"), ~selector)
    with pytest.raises(AttributeError):
        selector.types = ()


@pytest.mark.parametrize("edit", [opt.freeze_, opt.thaw_, lambda s, w: opt.adjust_(s, 0.25, where=w)])
def test_edits_take_selectors_alone_and_in_lists(edit: Any) -> None:
    state = opt.setup(FAST, GPT())
    opt.freeze_(state.h[1])
    edit(state, [opt.by_type(nn.Embedding), opt.hidden_matrices])

    before = opt.setup(FAST, GPT())
    opt.freeze_(before.h[1])
    edit(before, [*HIDDEN, "wte.weight", "wpe.weight"])
    assert state == before


def test_below_a_handle_globs_begin_there_and_shapes_and_types_are_those_of_the_model() -> None:
    state = opt.setup(FAST, GPT())
    opt.freeze_(state.h[0], opt.hidden_matrices & "mlp.**")
    opt.freeze_(state.h[1].attn, opt.by_type(Block) & opt.vectors)

    found = {path for path in opt.current(state) if opt.setup(FAST, GPT())[path] != state[path]}
    assert found == {
        "h.0.mlp.0.weight",
        "h.0.mlp.2.weight",
        "h.1.attn.in_proj_bias",
        "h.1.attn.out_proj.bias",
    }


def test_a_torch_optimizer_makes_groups_by_selectors_and_picks_by_them_afterwards() -> None:
    module = torch.compile(GPT(tied=True), backend="eager")
    rules = {opt.hidden_matrices: FAST, opt.by_type(nn.Embedding): opt.Adam(), "**": SLOW}
    optimizer = opt.TorchOptimizer(module, rules)

    names = [set(group["param_names"]) for group in optimizer.param_groups]
    assert names[:2] == [HIDDEN, {"wte.weight", "wpe.weight"}]
    assert all(name.startswith(("h.", "ln_f.")) for name in names[2])

    opt.freeze_(optimizer.tree, opt.by_type(nn.LayerNorm))
    frozen = {name for name in optimizer.tree if optimizer.tree[name].frozen}
    assert frozen == {name for name in names[2] if ".ln_" in f".{name}"}


def test_a_group_that_is_added_gets_the_rule_of_the_selector_that_takes_all_of_it() -> None:
    optimizer = opt.TorchOptimizer(GPT(), {opt.vectors: opt.Adam(0.5), "**": opt.AdamW(0.25)})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    optimizer.add_param_group({"params": [("new.weight", nn.Parameter(torch.zeros(3, 3)))]})

    assert [group["lr"] for group in optimizer.param_groups[2:]] == [0.5, 0.25]


def test_named_parameters_have_shapes_and_names_but_no_types() -> None:
    module = GPT()
    optimizer = opt.TorchOptimizer(module.named_parameters(), {opt.hidden_matrices: FAST, "**": SLOW})
    assert set(optimizer.param_groups[0]["param_names"]) == HIDDEN

    with pytest.raises(NoMatch, match="in no module: give the module itself, or write by_path"):
        opt.TorchOptimizer(module.named_parameters(), {opt.by_type(nn.Linear): FAST, "**": SLOW})


def test_no_decay_for_vectors_is_the_two_groups_that_people_write_for_torch() -> None:
    ours, theirs = GPT(), GPT()
    theirs.load_state_dict(ours.state_dict())
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    theirs_optimizer = torch.optim.AdamW(groups, lr=0.01)
    state = opt.setup({opt.vectors: opt.AdamW(0.01), "**": opt.AdamW(0.01, lam=0.5)}, ours)

    for _ in range(3):
        grads = {name: torch.ones_like(p) for name, p in ours.named_parameters()}
        for name, p in theirs.named_parameters():
            p.grad = grads[name]
        theirs_optimizer.step()
        state, ours = opt.update_(state, ours, grads)

    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_explain_says_which_rule_trains_what() -> None:
    state = opt.setup({opt.hidden_matrices: opt.Momentum(0.02), "**": opt.AdamW(1e-3)}, GPT())
    opt.adjust_(state, 0.5, where=opt.by_type(nn.Embedding))
    text = str(opt.explain(state))

    assert "trains h.*.attn.in_proj_weight (2), h.*.attn.out_proj.weight (2), h.*.mlp.*.weight (4)" in text
    assert f"  {opt.AdamW(0.5)}: wte.weight, wpe.weight\n" in text
    assert "trains" not in str(opt.explain(opt.setup(opt.AdamW(), GPT())))


@pytest.mark.parametrize(
    ("model", "selector", "text"),
    [
        (GPT, opt.by_type(nn.Conv2d), "by_type(Conv2d) matches no parameter; the modules there are GPT"),
        (lambda: {"head": {"w": np.zeros((2, 2))}, "b": np.zeros(2)}, opt.hidden_matrices,
         "hidden_matrices matches no parameter; of the matrices, head.w is a head"),
        (lambda: {"b": np.zeros(2)}, opt.matrices, "matches no parameter; there are b, all of one axis"),
        (lambda: {"w": np.zeros((2, 2))}, opt.vectors, "there are w, all of two axes or more"),
        (GPT, opt.by_path("wtf.*"), "by_path('wtf.*') matches no parameter; there are wte.weight"),
        (GPT, opt.matrices & "q.*", "matrices & by_path('q.*') matches no parameter; there are wte.weight"),
    ],
)  # fmt: skip
def test_a_selector_that_picks_nothing_says_what_there_is(model: Any, selector: Any, text: str) -> None:
    with pytest.raises(NoMatch) as caught:
        opt.setup({selector: FAST, "**": SLOW}, model())
    assert text in str(caught.value)

    with pytest.raises(NoMatch) as caught:
        opt.freeze(opt.setup(FAST, model()), where=selector)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        (lambda: bool(opt.vectors), TypeError, "vectors is no condition; write & for `and`"),
        (lambda: opt.by_type("Linear"), NoMatch, "by_type was given 'Linear'; it takes types"),
        (opt.by_type, NoMatch, "by_type() picks nothing; it takes types"),
        (lambda: opt.by_path(3), NoMatch, "by_path was given 3; it takes globs"),
        (opt.by_path, NoMatch, "by_path() picks nothing; it takes globs"),
        (lambda: opt.vectors & 3, NoMatch, "3 is no selector"),
    ],
)
def test_what_is_no_selector_is_refused(wrong: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        wrong()
    assert text in str(caught.value)


class Perceptron(eqx.Module):
    """An Equinox model, whose modules Optax hands on."""

    embed: eqx.nn.Embedding
    layers: list[eqx.nn.Linear]

    def __init__(self) -> None:
        a, b, c = jax.random.split(jax.random.key(0), 3)
        self.embed = eqx.nn.Embedding(7, 4, key=a)
        self.layers = [eqx.nn.Linear(4, 4, key=b), eqx.nn.Linear(4, 4, key=c)]


@pytest.mark.parametrize(
    ("model", "selector", "moved"),
    [
        (Perceptron, opt.by_type(eqx.nn.Embedding), {"embed.weight"}),
        (Perceptron, opt.hidden_matrices, {"layers.0.weight", "layers.1.weight"}),
        (lambda: nnx.state(Flax(), nnx.Param), opt.hidden_matrices, {"layers.0.kernel", "layers.1.kernel"}),
        (lambda: jax.tree.map(jnp.array, linen()), opt.matrices & "**.lm_head.*", {"params.lm_head.kernel"}),
    ],
)  # fmt: skip
def test_a_transformation_of_optax_goes_by_selectors_in_and_out_of_jit(
    model: Callable[[], Any], selector: Any, moved: set[str]
) -> None:
    params = model()
    tx = opt.as_optax({selector: FAST, "**": None})
    grads = jax.tree.map(jnp.ones_like, params)

    updates, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    updates, _ = tx.update(grads, state, params)

    found = jax.tree_util.tree_leaves_with_path(updates)
    names = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for path, step in found
        if float(jnp.abs(step).max()) == 1
    }
    assert names == moved
    assert opt.current(opt.freeze(state, where=selector)).keys() == moved


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    """A dataclass that JAX knows."""

    w: Any


def test_states_of_models_whose_classes_pickle_does_not_find_are_pickled_without_them() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

    optimizer = opt.TorchOptimizer(Inner(), opt.Adam())
    again = pickle.loads(pickle.dumps(optimizer.tree))
    assert again == optimizer.tree
    with pytest.raises(NoMatch, match="in no module"):
        opt.freeze(again, opt.by_type(Inner))

    state = opt.as_optax(opt.Adam()).init(Pair(jnp.ones(2)))
    assert jax.tree.structure(pickle.loads(pickle.dumps(state))) == jax.tree.structure(state)
    assert opt.freeze(state, opt.by_type(Pair))["w"].frozen


def test_lazy_modules_go_by_names_until_they_know_their_shapes() -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    optimizer = opt.TorchOptimizer(module, {"**.bias": FAST, "**": SLOW})
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    with pytest.raises(
        BadState, match=r"'0.weight' has no shape yet, by which a selector picks; call the module"
    ):
        opt.TorchOptimizer(module, {opt.vectors: FAST, "**": SLOW})

    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    names = opt.TorchOptimizer(module, {opt.vectors: FAST, "**": SLOW}).param_groups[0]["param_names"]
    assert names == ["0.bias", "1.bias"]
