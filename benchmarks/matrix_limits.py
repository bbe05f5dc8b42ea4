"""What must every step of a rule that multiplies matrices do? Its products and factorisations, bare.

Each function here gives steps on stacks that lie ready, without momentum, copies or the step of x: the
products of every step, and the factorisations that a rule takes once in so many.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.muon import STEPS
from optimisers.rules.kron import folded

Shape = tuple[int, ...]
Run = Callable[[], object]


class Axes(NamedTuple):
    """A rule that keeps a Gram matrix for each axis."""

    products: int
    """Products a step beside the Gram matrix itself: every array once along every axis it is turned."""
    factor: Callable[[Any], Any]
    """What is taken of every Gram matrix, once a period."""
    more: int
    """Products of square matrices that belong to that."""


AXES = {
    "SOAP": Axes(3, torch.linalg.qr, 1),
    "Shampoo": Axes(1, torch.linalg.eigh, 1),
    "SPlus": Axes(2, torch.linalg.eigh, 0),
}


def matrices(shapes: Sequence[Shape]) -> list[tuple[int, int, int]]:
    """(how many, short side, long side) of every stack of equal shape; kernels as rows and all else."""
    flat = [(s[0], math.prod(s[1:])) for s in shapes]
    short = [(min(s), max(s)) for s in flat]
    return [(short.count(s), *s) for s in dict.fromkeys(short)]


def unfolded(shapes: Sequence[Shape], max_dim: int) -> list[tuple[int, int, int]]:
    """(how many, n, all else) of every axis up to `max_dim` long."""
    found = [(shapes.count(s), n, math.prod(s) // n) for s in dict.fromkeys(shapes) for n in s]
    return [axis for axis in found if axis[1] <= max_dim]


def orthogonal_torch(shapes: Sequence[Shape]) -> Run:
    """Fifteen products of Newton-Schulz by torch.bmm."""
    held = [
        (torch.randn(b, n, m) / 16, torch.empty(b, n, n), torch.empty(b, n, n), torch.empty(b, n, m))
        for b, n, m in matrices(shapes)
    ]

    def products() -> None:
        for x, g, h, y in held:
            for _ in range(STEPS):
                torch.bmm(x, x.mT, out=g)
                torch.bmm(g, g, out=h)
                torch.bmm(h, x, out=y)

    return products


def orthogonal_numpy(shapes: Sequence[Shape]) -> Run:
    """The same by numpy.matmul."""
    rng = np.random.default_rng(0)
    held = [
        (
            rng.standard_normal((b, n, m), np.float32) / 16,
            *(np.empty((b, n, k), np.float32) for k in (n, n, m)),
        )
        for b, n, m in matrices(shapes)
    ]

    def products() -> None:
        for x, g, h, y in held:
            for _ in range(STEPS):
                np.matmul(x, x.swapaxes(1, 2), out=g)
                np.matmul(g, g, out=h)
                np.matmul(h, x, out=y)

    return products


def orthogonal_jax(shapes: Sequence[Shape]) -> Run:
    """The same under `jit`; each product is made of the one before, so that none is left out."""
    jax: Any = importlib.import_module("jax")
    held = [jax.numpy.ones((b, n, m)) / 16 for b, n, m in matrices(shapes)]

    @jax.jit
    def products(held: list[Any]) -> list[Any]:
        for _ in range(STEPS):
            grams = [x @ x.mT for x in held]
            held = [(g @ g) @ x for g, x in zip(grams, held, strict=True)]
        return held

    return lambda: jax.block_until_ready(products(held))


def along_axes(rule: str, shapes: Sequence[Shape], max_dim: int) -> tuple[Run, Run]:
    """(the products of a step, the factorisations of a period) of a rule with a basis for every axis."""
    kind = AXES[rule]
    held = [
        (torch.randn(b, n, m) / 16, torch.randn(b, n, n) / 16, torch.empty(b, n, n), torch.empty(b, n, m))
        for b, n, m in unfolded(shapes, max_dim)
    ]
    grams = [q @ q.mT + torch.eye(q.shape[-1]) for _, q, _, _ in held]

    def products() -> None:
        for x, q, g, y in held:
            torch.bmm(x, x.mT, out=g)
            for _ in range(kind.products):
                torch.bmm(q, x, out=y)

    def factorisations() -> None:
        for c, (_, q, g, _) in zip(grams, held, strict=True):
            kind.factor(c)
            for _ in range(kind.more):
                torch.bmm(c, q, out=g)

    return products, factorisations


def kron(shapes: Sequence[Shape]) -> Run:
    """The products and the two triangular solves of a step of Kron that fits its factors."""
    sizes = [folded(s) for s in shapes]
    held = [
        (
            torch.randn(sizes.count(s), *s) / 16,
            *(torch.randn(sizes.count(s), n, n).triu() / 16 + torch.eye(n) for n in s),
        )
        for s in dict.fromkeys(sizes)
    ]

    def step() -> None:
        for x, left, right in held:
            a = torch.bmm(torch.bmm(left, x), right.mT)
            b = torch.linalg.solve_triangular(right, x, upper=True, left=False)
            b = torch.linalg.solve_triangular(left, b.mT, upper=True, left=False).mT
            for y in (a, b):
                torch.bmm(y, y.mT)
                torch.bmm(y.mT, y)
            for q in (left, right):
                torch.bmm(q, q)
            u = torch.bmm(left.mT, torch.bmm(left, x))
            torch.bmm(torch.bmm(u, right.mT), right)

    return step
