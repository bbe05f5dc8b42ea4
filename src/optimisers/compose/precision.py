"""Parameters kept more exactly than they are stored."""

from typing import Any, ClassVar, NamedTuple

from optimisers import ops
from optimisers.arrays import registry
from optimisers.arrays.protocol import Array
from optimisers.arrays.types import bytes_of, is_complex
from optimisers.errors import BadSetting, deprecated
from optimisers.ops import (
    Becomes,
    copy,
    high_bits,
    join_bits,
    low_bits,
    typed_zeros_like,
    under,
    updated,
    where,
)
from optimisers.ops.state import rounded, stored_as
from optimisers.rule import Rule, a_rule, static, stepped
from optimisers.settings import parts


class MasterState(NamedTuple):
    master: Any
    """The parameters in the wider type."""
    inner: Any


class SplitState(NamedTuple):
    low: Any
    """The 16 bits of each float32 master that its bfloat16 parameter lacks."""
    inner: Any


class MixedPrecision(Rule):
    """Steps a master copy of the parameters in a wider type; the parameters are the master, rounded.

    `MixedPrecision(Adam())` keeps float32 masters, `MixedPrecision(Adam(), "float64")` float64 ones, for
    parameters of float16, bfloat16 and float32. Steps too small for the stored type so add up instead of
    being rounded away: Micikevicius et al., "Mixed precision training", 2018, arXiv:1710.03740. A parameter
    that was written between two steps (clamped, projected, loaded) is its own master from then on. It must
    wrap a whole chain. There is no loss scaling.
    """

    whole: ClassVar[bool] = True

    rule: Rule
    dtype: str = static("float32")

    @classmethod
    def formerly(
        cls, given: tuple[Any, ...], settings: dict[str, Any]
    ) -> "MixedPrecision | SplitPrecision | None":
        if "split" not in settings:
            return None
        whole = cls(*given, **{k: v for k, v in settings.items() if k != "split"})
        split = settings["split"]
        if split and whole.dtype != "float32":
            raise BadSetting("SplitPrecision completes bfloat16 to float32; leave out the dtype")
        instead = "a rule of its own; write SplitPrecision(rule)" if split else "the default; leave it out"
        deprecated(f"MixedPrecision(rule, split={split}) is now {instead}", since="0.2.0", depth=4)
        return SplitPrecision(whole.rule) if split else whole

    def check(self) -> None:
        if isinstance(self.dtype, Rule):
            raise BadSetting(
                f"MixedPrecision takes its rule first; write MixedPrecision({self.dtype!r}, {self.rule!r})"
            )
        a_rule(self, self.rule)
        one_master(self)
        if self.dtype not in ("float32", "float64"):
            raise BadSetting(f"MixedPrecision.dtype is {self.dtype!r}; it takes 'float32' or 'float64'")

    def init(self, x: Array) -> MasterState:
        own = registry.type_name(x)
        if is_complex(own) or bytes_of(own) > bytes_of(self.dtype):
            raise BadSetting(f"MixedPrecision keeps {self.dtype} masters; the parameters are {x.dtype}")
        master = copy(x, self.dtype)
        return MasterState(master, self.rule.init(master))

    def apply(self, state: MasterState, x: Array, dx: Array, *more: Array) -> Any:
        master = where(stored_as(x, state.master) == x, state.master, x)
        inner, step = stepped(self.rule, state.inner, master, dx, more)
        if step is None:
            return MasterState(state.master, inner), None
        with under(step):
            new = rounded(updated(master, step), self.dtype)
            return MasterState(new, inner), Becomes(new)

    def evaluate(self, state: MasterState, x: Array) -> Any:
        return self.rule.evaluate(state.inner, where(stored_as(x, state.master) == x, state.master, x))

    def __repr__(self) -> str:
        dtype = "" if self.dtype == "float32" else f", {self.dtype!r}"
        return f"MixedPrecision({self.rule!r}{dtype})"


class SplitPrecision(Rule):
    """Steps exact float32 masters of bfloat16 parameters, and keeps only the bits that a parameter lacks.

    It steps as `MixedPrecision` does, with less memory; parameters are the master, rounded with halves up. A
    parameter that was written between two steps counts, to within its own rounding. It must wrap a whole
    chain.
    """

    whole: ClassVar[bool] = True

    rule: Rule

    def check(self) -> None:
        a_rule(self, self.rule)
        one_master(self)

    def init(self, x: Array) -> SplitState:
        if "bfloat16" not in str(x.dtype):
            raise BadSetting(f"SplitPrecision completes bfloat16 to float32; the parameters are {x.dtype}")
        return SplitState(typed_zeros_like(x, "int16"), self.rule.init(copy(x, "float32")))

    def apply(self, state: SplitState, x: Array, dx: Array, *more: Array) -> Any:
        master = join_bits(x, fitting(x, state.low))
        inner, step = stepped(self.rule, state.inner, master, dx, more)
        if step is None:
            return SplitState(state.low, inner), None
        with under(step):
            new = updated(master, step)
            return SplitState(low_bits(new), inner), Becomes(high_bits(new), new)

    def evaluate(self, state: SplitState, x: Array) -> Any:
        return self.rule.evaluate(state.inner, join_bits(x, fitting(x, state.low)))

    def __repr__(self) -> str:
        return f"SplitPrecision({self.rule!r})"


def one_master(outer: Rule) -> None:
    """Raise BadSetting where a rule that keeps masters wraps another."""
    for part in parts(outer):
        if part is not outer and isinstance(part, MixedPrecision | SplitPrecision):
            name, inner = type(outer).__name__, type(part).__name__
            raise BadSetting(f"{name} was given an {inner}, and both keep masters; write one of them")


def fitting(high: Any, low: Any) -> Any:
    """The low bits of a master; 0 where a weight was written to which they cannot belong: nothing is
    rounded up to 0, or beyond infinity, and their bits together would be no number.
    """
    zero, infinite = (high == 0) & (low < 0), (ops.abs(high) == float("inf")) & (low > 0)
    return where(zero | infinite, 0.0, low)
