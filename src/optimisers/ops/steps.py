"""What may a rule say of its step, beside the maths? That there is none, what it lands on, that it must not
be; and what it knows of the steps of others.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from optimisers.arrays import registry
from optimisers.arrays.protocol import Operand
from optimisers.errors import DomainError, TraceError
from optimisers.nest import unflatten, values
from optimisers.ops.dispatch import OPERATIONS, Primitive
from optimisers.ops.primitives import abs, where


def total(s: Operand, p: float = 1) -> Any:
    """The sum of the scalar `s` over all leaves stepped together whose rule asks for it too; with p = 2 the
    root of the sum of its squares: `total(norm(dx), p=2)` is the norm of all gradients together; with p = inf
    the largest of its absolute values.

    The first total of a type of rule is one sum, whatever stands before and behind that rule and whatever its
    settings are; its second total is another. Called on a plain number, outside any update, there is one
    leaf, and the total is `s` itself.
    """
    if p not in (1, 2, inf):
        raise TraceError(
            f"total(..., p={p!r}); it takes 1 for the sum, 2 for the root of the sum of squares, or inf for "
            "the largest absolute value"
        )
    write = getattr(type(s), "__total__", None)
    if write is None and getattr(s, "shape", ()) != ():
        raise TraceError("total() was given an array; it takes a scalar: total(sum(...))")
    if write is None:
        return s if p == 1 else abs(s)
    return write(s, p)


def latest(t: Operand, *numbers: Operand) -> tuple[Any, ...]:
    """(the most steps t that an array took, then numbers that arrays have together), as those know them that
    took the most: one without a gradient for a while is behind.
    """
    most = total(t, p=inf)
    known = t == most
    count = total(where(known, 1.0, 0.0))
    return most, *(total(where(known, n, 0.0)) / count for n in numbers)


def when(condition: Operand, dx: Operand) -> Any:
    """The answer of a rule that steps only where the scalar condition holds.

    Elsewhere the rest of the chain does not run, its state stays, and so does the parameter. Inside a trace
    the result is a symbol; for plain values it is `dx` itself, or None, which means "no step".
    """
    for a in (condition, dx):
        if (write := getattr(type(a), "__when__", None)) is not None:
            return write(condition, dx)
    if getattr(condition, "shape", ()) != ():
        raise TraceError(
            "when() was given a condition for each element; it takes a scalar one: use where() for single "
            "elements"
        )
    return dx if condition else None


def every(condition: Operand, compute: Callable[[], Any], old: Any) -> Any:
    """`compute()` where the scalar condition holds, else `old`: for work done at some steps alone, such as
    `every(state.t % 10 == 0, lambda: eigh(state.left)[1], state.basis)`.

    `compute` takes nothing and gives a value, or values in tuples and dicts, of the form and the shapes of
    `old`. What the array library has to do for them, and what is summed, is done only where the condition
    holds: for those arrays of a group for which it does, and under `jax.jit` behind `lax.cond`; inside
    `jax.vmap` and the transforms of torch both sides are computed, and one is chosen. What is made element by
    element is chosen in the pass that reads it. Unlike after `when` the rest of the step goes on, and clocks
    advance.

    A captured graph cannot leave anything out: such a rule is refused where `capturable=True`. Raises
    TraceError for a condition for each element, and for another number of values than there are old ones.
    """
    olds = values(old)
    if not olds:
        return old

    def computed() -> Any:
        found = values(compute())
        if len(found) != len(olds):
            raise TraceError(f"every() computes {len(found)} values where there are {len(olds)} old ones")
        return found

    for a in (condition, *olds):
        if (write := getattr(type(a), "__every__", None)) is not None:
            return unflatten(old, iter(write(condition, computed, olds)))
    if getattr(condition, "shape", ()) != ():
        raise TraceError(
            "every() was given a condition for each element; it takes a scalar one: use where() for single "
            "elements"
        )
    library = registry.library(*olds, condition)
    return unflatten(old, iter(library.operations["every"](condition, computed, lambda: olds)))


OPERATIONS["every"] = Primitive("every", "choice", "same")


def clock(dx: Any, otherwise: Any) -> Any:
    """How many updates have covered the array whose gradient is `dx`; behind a rule that answers `when`, how
    many steps were taken there. Where `apply` is called outside any update, there is no count: `otherwise`.
    """
    read = getattr(type(dx), "__clock__", None)
    return otherwise if read is None else read()


def loss(dx: Any) -> Any:
    """The loss of this step, one number for all arrays: what `update(state, model, grads, loss=value)` was
    given.

    `dx` is the gradient that the rule was given. Raises TraceError where `apply` is called outside any
    update.
    """
    read = getattr(type(dx), "__loss__", None)
    if read is None:
        raise TraceError("a rule asked for the loss outside of an update, which alone is given one")
    return read()


def examples(dx: Any) -> Any:
    """How many examples the gradients of this step are of, where the rule takes those of single examples.

    Raises TraceError where `apply` is called outside any update.
    """
    read = getattr(type(dx), "__examples__", None)
    if read is None:
        raise TraceError(
            "a rule asked how many examples there are outside of an update, which alone knows it"
        )
    return read()


@dataclass(frozen=True)
class Becomes:
    """The answer of a rule that knows the new value of x, not the step to it; x is that value, rounded
    once.
    """

    value: Any
    exact: Any = None
    """The value before it was rounded, for those who keep averages; None for the value itself."""


def updated(x: Operand, dx: Operand) -> Any:
    """The new value of x after a rule answered `dx`, as exactly as it is known."""
    if isinstance(dx, Becomes):
        return dx.value if dx.exact is None else dx.exact
    return x - dx


def under(dx: Operand) -> contextlib.AbstractContextManager[Any]:
    """The scope in which the rest of a chain runs after a rule answered `dx`: what is made in it holds only
    with it.
    """
    enter = getattr(type(dx), "__under__", None)
    return contextlib.nullcontext() if enter is None else enter(dx)


def check(condition: Operand, message: str, *values: Operand) -> None:
    """Raise DomainError where the scalar condition fails, before anything of the step is written.

    `message` is a format string for `values`, which are scalars too; the path of the leaf is added to it.
    """
    for a in (condition, *values):
        if (write := getattr(type(a), "__check__", None)) is not None:
            write(condition, message, values)
            return
    if not condition:
        raise DomainError(message.format(*values))
