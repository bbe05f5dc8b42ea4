"""What stands in `state` of one parameter, and by which names?"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, Self

from optimisers.rule import Rule
from optimisers.rules.adam import Adam, AdamW, TorchAMSGrad, TorchNAdam, TorchRAdam
from optimisers.rules.adaptive import AdaDelta, RMSProp, Rprop, TorchAdaGrad
from optimisers.rules.descent import SGD
from optimisers.rules.factored import TorchAdafactor
from optimisers.rules.matrix import Muon
from optimisers.rules.of_torch import ASGD, SparseAdam, TorchAdaMax, TorchRMSProp
from optimisers.settings import parts

ADAM = {"exp_avg": "m", "exp_avg_sq": "v"}

TORCH_STATE: dict[type[Any], dict[str, str]] = {
    Muon: {"momentum_buffer": "m"},
    AdaDelta: {"square_avg": "a", "acc_delta": "d"},
    Adam: ADAM,
    AdamW: ADAM,
    TorchRAdam: ADAM,
    SparseAdam: ADAM,
    TorchNAdam: ADAM | {"mu_product": "product"},
    TorchAMSGrad: ADAM | {"max_exp_avg_sq": "most"},
    TorchAdaMax: {"exp_avg": "m", "exp_inf": "u"},
    TorchAdafactor: {"variance": "v", "row_var": "rows", "col_var": "columns"},
    TorchAdaGrad: {"sum": "sum"},
    Rprop: {"prev": "g", "step_size": "eta"},
    ASGD: {"ax": "average", "eta": "rate", "mu": "share"},
    RMSProp: {"square_avg": "q", "grad_avg": "mean"},
    TorchRMSProp: {"square_avg": "q", "grad_avg": "mean", "momentum_buffer": "v"},
    SGD: {"momentum_buffer": "v"},
}
"""Rules that classes of torch are -> what torch keeps of a parameter -> the same in their state."""


def entry_name(path: tuple[Any, ...]) -> str:
    """Where in the state of a rule something stands, as torch's loaders take it."""
    return ".".join(map(str, path)) or "state"


def aliases(rule: Rule, paths: Iterable[tuple[Any, ...]]) -> dict[str, str]:
    """Torch's names for the entries at some paths of the state of a rule, where they mean one entry each."""
    listed = list(paths)
    last = Counter(str(path[-1]) for path in listed if path)
    entries = {str(path[-1]): entry_name(path) for path in listed if path and last[str(path[-1])] == 1}
    named = [pair for part in parts(rule) for pair in TORCH_STATE.get(type(part), {}).items()]
    found = {there: entries[here] for there, here in named if here in entries}
    own = set(map(entry_name, listed))
    return {there: entry for there, entry in found.items() if there not in own}


COME_TRUE = {"started": 1.0}
"""Counters of a state that say whether there was a step, as there was where torch keeps anything."""


class Home(Protocol):
    """Who shows the entries of some parameters."""

    def followed(self, i: int, found: dict[str, Any]) -> dict[str, Any]:
        """The entries of a member as they were left: counters follow a step that was written."""
        ...


class Entries(dict[str, Any]):
    """What `state` has of one parameter: a dict that notes when an entry of it is exchanged, and knows the
    entries of torch's classes by torch's names too.

    Counters that follow from the step, where torch keeps none, are found by name and are not among its keys:
    code that walks over all entries of a parameter, to cut or to clear them, meets those that torch has.
    """

    __slots__ = ("aliases", "hidden", "home", "notes")

    def __init__(
        self, held: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), notes: "list[Entries] | None" = None
    ) -> None:
        dict.__init__(self, held)
        self.notes: list[Entries] = [] if notes is None else notes
        self.aliases: dict[str, str] = {}
        self.hidden: dict[str, Any] = {}
        """The counters that follow from the step."""
        self.home: tuple[Home, int] | None = None
        """Who shows these entries, as which of its members."""

    def fill(self, held: Iterable[tuple[str, Any]], hidden: Iterable[tuple[str, Any]] = ()) -> None:
        """Put in entries, and note nothing."""
        dict.update(self, held)
        for name, value in hidden:
            dict.pop(self, name, None)
            self.hidden[name] = value

    def whole(self) -> dict[str, Any]:
        """All entries as a plain dict, as they were left; counters follow a step that was written."""
        return self.settled() if self.home is None else self.home[0].followed(self.home[1], self.settled())

    def settled(self) -> dict[str, Any]:
        """All entries as a plain dict, where nothing was written that is not followed yet."""
        return {**self.hidden, **self}

    def _own(self, key: str) -> str:
        """The key of an entry, by whatever name."""
        return key if dict.__contains__(self, key) else self.aliases.get(key, key)

    def __missing__(self, key: str) -> Any:
        own = self.aliases.get(key, key)
        return self.hidden[own] if own in self.hidden or own == key else dict.__getitem__(self, own)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (dict.__contains__(self, self._own(key)) or key in self.hidden)

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __setitem__(self, key: str, value: Any) -> None:
        self.notes.append(self)
        if key in self.hidden:
            self.hidden[key] = value
        else:
            dict.__setitem__(self, self._own(key), value)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def pop(self, key: str, *default: Any) -> Any:
        self.notes.append(self)
        if key in self.hidden:
            return self.hidden.pop(key)
        return dict.pop(self, self._own(key), *default)

    def popitem(self) -> Any:
        self.notes.append(self)
        return dict.popitem(self)

    def clear(self) -> None:
        self.notes.append(self)
        dict.clear(self)
        self.hidden, self.home = {}, None

    def update(self, *args: Any, **more: Any) -> None:
        for key, value in dict(*args, **more).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __reduce__(self) -> Any:
        """As torch.load takes it without being told: an OrderedDict."""
        return OrderedDict, (), None, None, iter(self.whole().items())


def plain(entries: Any) -> Any:
    """What stands in `state` under one key, the entries of a parameter as a plain dict."""
    return entries.whole() if isinstance(entries, Entries) else entries
