"""Parameters kept more exactly than they are stored."""

from typing import Any, ClassVar, NamedTuple

from optimisers.errors import BadSetting
from optimisers.ops import (
    Becomes,
    abs_,
    copy,
    high_bits,
    join_bits,
    landing,
    low_bits,
    typed_zeros_like,
    under,
    where,
)
from optimisers.rule import Rule, static, stepped


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

    `MixedPrecision(Adam())` keeps float32 masters, `MixedPrecision("float64", Adam())` float64 ones, for
    parameters of float16, bfloat16 and float32. Steps too small for the stored type so add up instead of
    being rounded away: Micikevicius et al., "Mixed precision training", 2018, arXiv:1710.03740. `split=True`
    keeps, beside each bfloat16 weight, only the 16 bits that it lacks of an exact float32 master; parameters
    are then rounded with halves up. It must wrap a whole chain. There is no loss scaling.
    """

    whole: ClassVar[bool] = True

    rule: Rule
    dtype: str = static("float32")
    split: bool = static(False)

    def __init__(self, *given: Any, split: bool = False) -> None:
        dtype, rule = ("float32", *given) if len(given) == 1 else given if len(given) == 2 else (None, None)
        if not isinstance(rule, Rule):
            raise BadSetting(
                f"MixedPrecision was given {', '.join(map(repr, given)) or 'nothing'}; write "
                "MixedPrecision(Adam()) or "
                f'MixedPrecision("float64", Adam())'
            )
        for name, value in (("rule", rule), ("dtype", str(dtype)), ("split", split)):
            object.__setattr__(self, name, value)
        self.__post_init__()

    def check(self) -> None:
        if self.dtype not in ("float32", "float64"):
            raise BadSetting(f"MixedPrecision.dtype is {self.dtype!r}; it takes 'float32' or 'float64'")
        if self.split and self.dtype != "float32":
            raise BadSetting("MixedPrecision.split completes bfloat16 to float32; leave out the dtype")

    def init(self, x: Any) -> Any:
        if "complex" in str(x.dtype) or x.dtype.itemsize > int(self.dtype[5:]) // 8:
            raise BadSetting(f"MixedPrecision keeps {self.dtype} masters; the parameters are {x.dtype}")
        master = copy(x, self.dtype)
        if not self.split:
            return MasterState(master, self.rule.init(master))
        if "bfloat16" not in str(x.dtype):
            raise BadSetting(
                f"MixedPrecision.split completes bfloat16 to float32; the parameters are {x.dtype}"
            )
        return SplitState(typed_zeros_like(x, "int16"), self.rule.init(master))

    def apply(self, state: Any, x: Any, dx: Any, *more: Any) -> Any:
        master = join_bits(x, fitting(x, state.low)) if self.split else state.master
        inner, step = stepped(self.rule, state.inner, master, dx, more)
        if step is None:
            return (SplitState(state.low, inner) if self.split else MasterState(master, inner)), None
        with under(step):
            new = landing(master, step)
            if self.split:
                return SplitState(low_bits(new), inner), Becomes(high_bits(new), new)
            return MasterState(new, inner), Becomes(new)

    def __repr__(self) -> str:
        dtype = "" if self.dtype == "float32" else f"{self.dtype!r}, "
        return f"MixedPrecision({dtype}{self.rule!r}{', split=True' if self.split else ''})"


def fitting(high: Any, low: Any) -> Any:
    """The low bits of a master; 0 where somebody has written a weight to which they cannot belong: nothing is
    rounded up to 0, or beyond infinity, and their bits together would be no number.
    """
    zero, infinite = (high == 0) & (low < 0), (abs_(high) == float("inf")) & (low > 0)
    return where(zero | infinite, 0.0, low)
