"""What may a rule say of matrices, beside products? Their factors, parts of them, and orthogonal ones.

Matrices are the last two axes; those before count them. Arrays of float16 and bfloat16 are widened to float32
first. Nothing here raises for the numbers that a matrix holds, since inside `jax.jit` nothing can: what has
no answer is NaN, for that matrix alone. A rule that wants to raise says so with `check`.
"""

from typing import Any

from optimisers.arrays.protocol import Array, Operand
from optimisers.errors import BadSetting, ShapeError
from optimisers.ops.derived import is_complex
from optimisers.ops.dispatch import primitive
from optimisers.ops.primitives import conj, matmul, maximum, norm2, transpose
from optimisers.ops.state import widened

# -- factors -------------------------------------------------------------------------------------------------


@primitive("shape")
def eigh(a: Array) -> Any:
    """(w, q): the eigenvalues of symmetric or Hermitian matrices (..., n, n), the smallest first, and their
    eigenvectors, the columns of q: a = q diag(w) q^H. The signs of eigenvectors are those that the library
    gives.

    The lower triangle is read alone. NaN where a matrix holds what is not finite, or the library finds no
    answer. Raises TraceError for what is not square.
    """


@primitive("shape")
def qr(a: Array) -> Any:
    """(q, r): matrices (..., m, n) as q r, q (..., m, k) with orthonormal columns and r (..., k, n) upper
    triangular, k = min(m, n). The signs are those that the library gives.

    NaN where a matrix holds what is not finite. Raises TraceError for an array of fewer axes than two.
    """


@primitive("shape")
def svd(a: Array) -> Any:
    """(u, s, vh): matrices (..., m, n) as u diag(s) vh, u (..., m, k) and vh (..., k, n) with orthonormal
    columns and rows, and the singular values s (..., k), the largest first, k = min(m, n). The signs are
    those that the library gives.

    NaN where a matrix holds what is not finite, or the library finds no answer. Raises TraceError for an
    array of fewer axes than two.
    """


@primitive("shape")
def cholesky(a: Array) -> Any:
    """The lower triangular c with c c^H = a, for positive definite matrices (..., n, n).

    The lower triangle is read alone. NaN where a matrix is not positive definite. Raises TraceError for what
    is not square.
    """


@primitive("shape")
def solve_triangular(a: Array, b: Array, *, upper: bool = True, transposed: bool = False) -> Any:
    """The x of a x = b, or of a^T x = b if `transposed`, for triangular a (..., n, n) and b (..., n, k).

    Of a one triangle is read, the upper one, or the lower one if `upper` is False. What is not finite where
    its diagonal holds a zero. Raises TraceError for shapes that do not fit.
    """


@primitive("shape")
def item(found: Any, index: int) -> Any:
    """One of several results of an operation."""


# -- parts ---------------------------------------------------------------------------------------------------


@primitive("shape")
def triu(a: Array, k: int = 0) -> Any:
    """The matrices with zeros below diagonal k; 0 is the main one, 1 that above it."""


@primitive("shape")
def diagonal(a: Array) -> Any:
    """The main diagonal of matrices (..., m, n), of shape (..., min(m, n))."""


@primitive("shape", gives="real")
def argsort(x: Array, axis: int = -1) -> Any:
    """The places of the elements along an axis in ascending order, for `take`: whole numbers from 0 on, in
    the type of the arithmetic. Equal elements stay in order; NaN comes last.
    """


@primitive("shape")
def take(x: Array, index: Array, axis: int = -1) -> Any:
    """The elements at these places along an axis: `take(q, argsort(-w), axis=-1)` are columns in the order of
    falling w.

    `index` holds whole numbers along its last axis; what lies outside of x is taken from its nearest end.
    Axes before it are those before `axis` in x, for places that differ from matrix to matrix.
    """


# -- orthogonal ----------------------------------------------------------------------------------------------

Coefficients = tuple[tuple[float, float, float], ...]
"""Triples (a, b, c) of polynomials a s + b s^3 + c s^5."""

NEWTON_SCHULZ: dict[str, tuple[Coefficients, int]] = {
    "jordan": (((3.4445, -4.7750, 2.0315),), 5),
    "you": (
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        5,
    ),
    "polar_express": (
        (
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.8750, -1.2500, 0.3750),
        ),
        8,
    ),
    "exact": (((2.0, -1.5, 0.5),), 20),
}
"""(coefficients, how many steps) by name."""

PRODUCTS = ("bfloat16", "float32")
"""The types in which `orthogonal` may be told to multiply."""


def adjoint(y: Array) -> Any:
    """The transpose of a matrix, conjugated."""
    turned = transpose(y)
    return conj(turned) if is_complex(y) else turned


def coefficients_of(coefficients: str | Coefficients, where: str) -> tuple[Coefficients, int]:
    """(the triples, how many steps) that are meant; BadSetting, saying `where`, for what means none."""
    if isinstance(coefficients, str):
        if coefficients not in NEWTON_SCHULZ:
            raise BadSetting(
                f"{where} is {coefficients!r}; it takes {', '.join(map(repr, NEWTON_SCHULZ))}, or triples"
            )
        return NEWTON_SCHULZ[coefficients]
    if not coefficients or any(not isinstance(t, tuple | list) or len(t) != 3 for t in coefficients):
        raise BadSetting(f"{where} is {coefficients!r}; it takes triples: write ((a, b, c),)")
    return coefficients, max(5, len(coefficients))


def orthogonal(
    m: Array,
    coefficients: str | Coefficients = "jordan",
    steps: int | None = None,
    epsilon: Operand = 1e-7,
    dtype: str | None = None,
) -> Any:
    """The matrices of the last two axes made orthogonal: U p(S) V^H for a matrix U S V^H of norm 1, where the
    polynomials p(s) = a s + b s^3 + c s^5 of Newton-Schulz, one a step and the last one repeated, bring every
    singular value near 1.

    Axes before the last two count matrices. A matrix is divided by its norm first, or by `epsilon` where that
    is larger: zeros stay zeros. `coefficients` are triples (a, b, c), or a name: `jordan`, 5 steps of one
    polynomial that is steepest at 0, after which singular values lie between 0.68 and 1.13 (Jordan et al.,
    2024); `you`, 5 steps, of Jiacheng You; `polar_express`, 8 steps (Amsel et al., 2025, arXiv:2505.16932);
    `exact`, 20 steps of (2, -1.5, 0.5), which converge to the polar factor where singular values are above
    1e-5 of the norm. Triples alone take as many steps as there are, 5 at least.

    `dtype` is the type of the products: `bfloat16` or `float32`; None is bfloat16 on devices that have units
    for it, where the arithmetic is in float32, and else that of the arithmetic (see `matmul`). In float16
    they would overflow.

    Raises TraceError for an array of fewer axes than two, BadSetting for other coefficients, steps and types.
    """
    polynomials, usual = coefficients_of(coefficients, "orthogonal(coefficients=)")
    steps = usual if steps is None else steps
    if steps < 1:
        raise BadSetting(f"orthogonal(steps={steps!r}); it takes 1 and more")
    if dtype is not None and dtype not in PRODUCTS:
        raise BadSetting(f"orthogonal(dtype={dtype!r}); it takes None, 'bfloat16' or 'float32'")
    if m.ndim < 2:
        raise ShapeError(f"orthogonal() of an array of shape {tuple(m.shape)}; it takes two axes and more")
    m = widened(m)
    kind = None if is_complex(m) else dtype or "fast"
    tall = m.shape[-2] > m.shape[-1]
    y = adjoint(m) if tall else m
    y = y / maximum(norm2(y) if m.ndim == 2 else norm2(y, axis=(-2, -1), keepdims=True), epsilon)
    for n in range(steps):
        a, b, c = polynomials[min(n, len(polynomials) - 1)]
        gram = matmul(y, adjoint(y), dtype=kind)
        y = a * y + matmul(b * gram + c * matmul(gram, gram, dtype=kind), y, dtype=kind)
    return adjoint(y) if tall else y
