"""The text of the page, with tables that `estimate` gives."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optimisers as opt
from optimisers.estimate import FLOPS, LATENCY, LINK, MEMORY, Estimate, amount

VOCABULARY = 128_256

MODELS = {
    "1 B": (16, 2048, 512, 8192),
    "70 B": (80, 8192, 1024, 28_672),
    "1 T": (120, 25_600, 3_200, 88_064),
}
"""Layers, width, width of keys and values, width of the feed-forward part."""

MESHES: tuple[Mapping[str, int], ...] = (
    {"shard": 8},
    {"shard": 64},
    {"data": 8, "shard": 64},
    {"data": 8, "shard": 512},
)

RULES: dict[str, Any] = {
    "AdamW, clipped": opt.MixedPrecision(opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW(3e-4, lam=0.1))),
    "Muon, and AdamW beside it": {
        opt.hidden_matrices: opt.MixedPrecision(opt.Muon(0.02)),
        "**": opt.MixedPrecision(opt.AdamW(3e-4, lam=0.1)),
    },
}

DEVICE = 80e9


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The arrays of a decoder of this size."""
    layers, width, keys, wide = MODELS[name]
    parts = {
        "norm.scale": (width,),
        "attention.query": (width, width),
        "attention.key": (keys, width),
        "attention.value": (keys, width),
        "attention.out": (width, width),
        "after.scale": (width,),
        "mlp.gate": (wide, width),
        "mlp.up": (wide, width),
        "mlp.down": (width, wide),
    }
    found: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY, width)}
    found |= {f"layers{i}.{part}": shape for i in range(layers) for part, shape in parts.items()}
    return found | {"norm.scale": (width,)} | ({} if name == "1 B" else {"head": (VOCABULARY, width)})


@functools.cache
def estimates(rule: str, model: str) -> list[Estimate]:
    """What a step costs on each mesh; parameters are of two bytes."""
    return [opt.estimate(RULES[rule], shapes(model), mesh, dtype="float16") for mesh in MESHES]


COLUMNS = (
    *("devices", "mesh", "held", "of it state", "workspace", "moved", "sent"),
    *("Gflop", "memory", "products", "links", "sum"),
)


def table(rule: str, model: str) -> Iterator[str]:
    """What each mesh costs."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---:|---|" + "---:|" * (len(COLUMNS) - 2)
    for e in estimates(rule, model):
        held = 2 * e.parameter_bytes + e.state_bytes + e.workspace
        bold = "" if held <= DEVICE else "**"
        cells = [
            f"{e.devices:,}",
            " x ".join(f"{n} {axis}" for axis, n in e.mesh.items()),
            f"{bold}{amount(held)}{bold}",
            *map(amount, (e.state_bytes, e.workspace, e.moved, e.sent)),
            f"{e.flops / 1e9:,.0f}",
            *(
                f"{1e3 * t:,.1f} ms"
                for t in (*(e.times[k] for k in ("memory", "products", "links")), e.seconds)
            ),
        ]
        yield f"| {' | '.join(cells)} |"


EXAMPLE = """import optimisers as opt

shapes = {f"layers{i}.mlp": (8192, 2048) for i in range(16)}
print(opt.estimate(opt.Muon(0.02), shapes, {"data": 2, "shard": 8}))"""

TEXT = (Path(__file__).parent / "page.txt").read_text("utf-8")


def page() -> str:
    """The page."""
    found: dict[str, Any] = {}
    exec(EXAMPLE.rsplit("\n", 1)[0], found)  # noqa: S102 the text above
    tables: list[str] = []
    for rule in RULES:
        tables += ["", f"## {rule}", ""]
        for model in MODELS:
            total = estimates(rule, model)[0].parameters
            tables += [f"### {model}: {total:,} parameters", "", *table(rule, model), ""]
    small, large = (e.seconds for e in estimates("Muon, and AdamW beside it", "1 T")[2:])
    return TEXT.format(
        example=EXAMPLE,
        printed=opt.estimate(opt.Muon(0.02), found["shapes"], {"data": 2, "shard": 8}),
        memory=amount(MEMORY),
        link=amount(LINK),
        flops=f"{FLOPS / 1e12:,.0f}",
        latency=f"{1e6 * LATENCY:.0f}",
        device=DEVICE / 1e9,
        tables="\n".join(tables),
        summed=estimates("AdamW, clipped", "1 T")[-1].summed,
        matrices=sum(len(s) > 1 and "layers" in path for path, s in shapes("1 T").items()),
        small=small,
        large=large,
    )
