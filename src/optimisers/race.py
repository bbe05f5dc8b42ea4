"""Which rule, at which rate, trains this model best? Tried out, with the same budget for each."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import re
import sys
import time
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from optimisers.errors import BadSetting, BadState
from optimisers.rule import Rule
from optimisers.settings import is_number
from optimisers.step.layers import LayerDecay
from optimisers.training import guarded, rated, trainer
from optimisers.training import rates as rates_of

Rules = Rule | Mapping[Any, Any] | LayerDecay
Losses = NDArray[np.float64]

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""What each rate is multiplied by unless told: about three tries for a power of ten."""

LAST = 10
"""The score is the mean loss of the last tenth of the steps, or what `validate` gives."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training."""

    name: str
    rule: Rules
    """With the rate that was tried."""
    factor: float
    """How many times the rate that was given."""
    seed: int
    losses: Losses
    """The loss of each mini-batch, before its step; NaN once it diverged."""
    score: float
    """Lower is better; infinite where training diverged."""
    seconds: float
    """Of the whole training; of trainings that ran together, the share of each."""


class Entry(NamedTuple):
    """How one rule fared at its best rate."""

    name: str
    rule: Rules
    factor: float
    trials: list[Trial]
    """One a seed."""
    score: float
    """The median over the seeds."""
    diverged: int
    """How many of all its trials diverged."""
    tried: int
    seconds: float
    """Of all its trials."""
    at_edge: str
    """`smallest` or `largest` where no rate beyond the best one was tried; empty otherwise."""


@final
@dataclasses.dataclass(frozen=True)
class Race:
    """What a race showed: print it, look at its `picture`, and go on with its `winner`."""

    trials: list[Trial]
    entries: list[Entry]
    """The best rate of each rule, the best rule first."""
    measure: str
    """What the scores are."""

    @property
    def winner(self) -> Any:
        """The rule, or the dict of rules, that did best, with its rate.

        Raises BadState where every training diverged.
        """
        if self.entries[0].score == float("inf"):
            raise BadState(
                "no rule has won: every training diverged; give smaller factors, or clip gradients"
            )
        return self.entries[0].rule

    @property
    def code(self) -> str:
        """The winner as it is written in Python, after `import optimisers as opt`; functions and classes of
        yours that stand in it are there by name at most.
        """
        return written(self.winner)

    def picture(self, file: str | Path = "race.png", title: str = "") -> Path:
        """Save a picture: for each rule at its best rate, the median loss over the seeds, in a band from the
        least to the largest. Needs Matplotlib.
        """
        try:
            from optimisers.curves import Curve, draw
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'a picture needs {error.name}, which is not installed; write pip install "optimisers[demo]"'
            ) from error
        curves = [
            Curve(f"{e.name}\nrate {_rate(e)}, score {e.score:.3g}", np.stack([t.losses for t in e.trials]))
            for e in self.entries
        ]
        return draw(
            curves,
            Path(file),
            title=f"{title or self._budget}\nscore: {self.measure}",
            measure="training loss",
        )

    @property
    def _budget(self) -> str:
        seeds = len({t.seed for t in self.trials})
        rates = len({t.factor for t in self.trials})
        steps = len(self.trials[0].losses)
        return (
            f"each rule: {rates} rate{'s' * (rates > 1)}, {seeds} seed{'s' * (seeds > 1)}, "
            f"{steps:,} steps a training"
        )

    def __str__(self) -> str:
        head = ("rule", "rate", "score", "from", "to", "diverged", "seconds", "")
        rows = [
            (
                e.name,
                _rate(e),
                f"{e.score:.4g}",
                f"{min(t.score for t in e.trials):.4g}",
                f"{max(t.score for t in e.trials):.4g}",
                f"{e.diverged} of {e.tried}",
                f"{e.seconds:.1f}",
                f"best at the {e.at_edge} rate tried" if e.at_edge else "",
            )
            for e in self.entries
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        left = (0, len(head) - 1)
        lines = [
            "  ".join(
                cell.ljust(width) if n in left else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        ]
        said = f"{self._budget}; score: {self.measure}, median over the seeds"
        lost = self.entries[0].score == float("inf")
        last = "no winner: every training diverged" if lost else f"winner: {self.code}"
        return "\n".join([*lines, said, last])

    __repr__ = __str__


def race(
    rules: Mapping[str, Rules] | Sequence[Rule],
    loss: Callable[[Any, Any], Any],
    model: object,
    batches: object,
    *,
    factors: Sequence[float] = FACTORS,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None,
    validate: Callable[[Any], Any] | None = None,
    value_and_grad: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    progress: bool | None = None,
) -> Race:
    """Train copies of a model under several rules at several rates, all with the same seeds and batches.

    `rules`: rules by name, or a list of them; a rule may be a dict of rules by glob or selector. Each is
    tried at its own rate times every one of `factors`, so that all have the same budget.
    `loss(model, batch)`: a number; for NumPy, (the number, its gradients).
    `model`: stays as it is. A function of a seed makes another one for every seed.
    `batches`: a sequence, which every seed shuffles anew at each pass; or what can be walked several times,
    such as a `DataLoader`, whose shuffling follows the seed of PyTorch, which is set; or a function of a seed
    that gives batches. `steps` are taken, one pass unless told.
    `validate(model)`: a number, the lower the better, asked at the end of each training with the parameters
    that the rule evaluates with (`averaged`). Without it the score is the mean training loss of the last
    tenth of the steps.
    `value_and_grad(loss)`: gives (loss, gradients) when called like `loss`; unless told that of
    `optimisers` for PyTorch and that of `jax`; Equinox and Flax bring their own.

    Rules that ask for second gradients are given those of `hutchinson` at every tenth step, from the first
    on; for NumPy there are none. Trainings run one after the other; under JAX the rates of a rule in one
    vmapped, jitted step, unless they follow a schedule. With PyTorch the seed is that of `torch.manual_seed`
    too, and the random state is put back at the end. `progress` shows a bar, unless told where there is a
    terminal and Rich is installed.

    Raises BadSetting for what is no budget, UnknownField and others as `setup` and `update` do.
    """
    named, tried, starts = _named(rules), _positive(factors), _whole(seeds)
    count = _steps(batches, steps)
    total = len(named) * len(starts) * len(tried) * count
    trials: list[Trial] = []
    with guarded(), _bar(total, progress) as advance:
        ways = trainer(_made(model, starts[0]), loss, value_and_grad)
        for (name, rule), seed in itertools.product(named.items(), starts):
            start = _made(model, seed)
            for run in ways.runs(rule, tried):
                ways.seed(seed)
                began = time.perf_counter()
                given = itertools.islice(_batches(batches, seed), count)
                losses, model_of = run.train(start, given, functools.partial(advance, len(run.factors), name))
                seconds = (time.perf_counter() - began) / len(run.factors)
                for k, factor in enumerate(run.factors):
                    curve = np.full(count, np.nan)
                    curve[: len(losses[k])] = losses[k]
                    score = _score(curve, None if validate is None else (validate, model_of(k)))
                    trials.append(Trial(name, rated(rule, factor), factor, seed, curve, score, seconds))
    last = max(1, count // LAST)
    mean = "loss of the last step" if last == 1 else f"mean loss of the last {last} steps"
    measure = mean if validate is None else "validate(model)"
    return Race(trials, _entries(trials, tried), measure)


# -- what is given -------------------------------------------------------------------------------------------


def _named(rules: object) -> dict[str, Rules]:
    """The rules by name."""
    named: dict[str, Any] = {}
    if isinstance(rules, Mapping):
        parts_of_one = [key for key in rules if not isinstance(key, str) or "*" in key]
        if parts_of_one:
            raise BadSetting(
                f"race takes rules by name; {parts_of_one[0]!r} chooses a part of a model: write "
                '{"mine": {...}} for one that is a dict'
            )
        named = dict(rules)
    elif isinstance(rules, Sequence) and not isinstance(rules, str):
        for rule in rules:
            name = type(rule).__name__
            named[name if name not in named else f"{name} {len(named) + 1}"] = rule
    if not named:
        raise BadSetting(
            f'race takes rules by name, such as {{"AdamW": opt.AdamW()}}, or a list of rules; it was given '
            f"{rules!r}"
        )
    for name, rule in named.items():
        if not isinstance(rule, Rule | Mapping | LayerDecay):
            instead = f"write opt.{rule.__name__}()" if isinstance(rule, type) else "it takes rules"
            raise BadSetting(f"race was given {rule!r} as {name!r}; {instead}")
    return named


def _positive(factors: object) -> list[float]:
    """The numbers that rates are multiplied by, smallest first."""
    given = list(factors) if isinstance(factors, Iterable) else []
    if not given or not all(is_number(factor) and 0 < factor < float("inf") for factor in given):
        raise BadSetting(
            f"race(factors={factors!r}) takes positive numbers, which rates are multiplied by, such as "
            "(0.3, 1, 3)"
        )
    return sorted({float(factor) for factor in given})


def _whole(seeds: object) -> list[int]:
    given = list(seeds) if isinstance(seeds, Iterable) else []
    if not given or not all(isinstance(seed, int) and seed >= 0 for seed in given):
        raise BadSetting(f"race(seeds={seeds!r}) takes whole numbers from 0 on, such as (0, 1, 2)")
    return list(dict.fromkeys(given))


MAKERS = (types.FunctionType, types.MethodType, functools.partial, type)
"""What is no model itself, though models may be called."""


def _made(model: object, seed: int) -> Any:
    """The model to begin with: itself, or what a function makes of the seed."""
    return model(seed) if isinstance(model, MAKERS) else model


def _steps(batches: object, steps: int | None) -> int:
    """How many steps each training takes."""
    given: Any = batches
    if isinstance(batches, Iterator) or not (callable(batches) or hasattr(batches, "__iter__")):
        raise BadSetting(
            f"race was given {type(batches).__name__} as batches, which can be walked once at most; give a "
            "list, a DataLoader, or a function of a seed"
        )
    if steps is None and not hasattr(batches, "__len__"):
        raise BadSetting("race cannot know how many batches there are; write steps=1000")
    count = len(given) if steps is None else steps
    if count < 1:
        raise BadSetting(f"race(steps={count!r}) takes a whole number from 1 on, and a batch at least")
    return count


def _batches(batches: object, seed: int) -> Iterator[Any]:
    """Batches without end: the same for every rule and rate."""
    rng = np.random.default_rng(seed)
    while True:
        walked: Any = batches(seed) if callable(batches) else batches
        if isinstance(batches, Sequence):
            walked = map(batches.__getitem__, rng.permutation(len(batches)).tolist())
        empty = True
        for batch in walked:
            empty = False
            yield batch
        if empty:
            raise BadSetting("race was given no batch")


# -- what is found -------------------------------------------------------------------------------------------


def _score(curve: Losses, validation: tuple[Callable[[Any], Any], Any] | None) -> float:
    """Lower is better; infinite where training diverged."""
    if not np.isfinite(curve).all():
        return float("inf")
    if validation is None:
        return float(curve[-max(1, len(curve) // LAST) :].mean())
    validate, model = validation
    found = float(validate(model))
    return found if np.isfinite(found) else float("inf")


def _entries(trials: Sequence[Trial], factors: Sequence[float]) -> list[Entry]:
    """Each rule at its best rate, the best one first."""
    entries: list[Entry] = []
    for name in dict.fromkeys(t.name for t in trials):
        mine = [t for t in trials if t.name == name]
        by_rate = {f: [t for t in mine if t.factor == f] for f in factors}
        scores = {f: float(np.median([t.score for t in each])) for f, each in by_rate.items()}
        best = min(scores, key=lambda f: (scores[f], abs(np.log(f))))
        edges = {factors[0]: "smallest", factors[-1]: "largest"} if rates_of(mine[0].rule) else {}
        entries.append(
            Entry(
                name,
                by_rate[best][0].rule,
                best,
                by_rate[best],
                scores[best],
                sum(t.score == float("inf") for t in mine),
                len(mine),
                sum(t.seconds for t in mine),
                edges.get(best, "") if len(factors) > 1 else "",
            )
        )
    return sorted(entries, key=lambda e: e.score)


def _rate(entry: Entry) -> str:
    """The rate of an entry, where it is one number, or how many times what was given it is."""
    found = rates_of(entry.rule)
    if not found:
        return "none"
    one = len(found) == 1 and isinstance(found[0], float)
    return f"{found[0]:.3g}" if one else f"{entry.factor:g} x given"


def written(rule: Rules) -> str:
    """A rule as it is written in Python, after `import optimisers as opt`."""
    said = repr(dict(rule) if isinstance(rule, Mapping) else rule)
    quoted = re.split(r"('[^']*'|\"[^\"]*\")", said)
    return "".join(text if n % 2 else _WORD.sub(_written, text) for n, text in enumerate(quoted))


_WORD = re.compile(r"(?<![\w.])[A-Za-z]\w*")


def _written(word: re.Match[str]) -> str:
    """A name of this package as users write it; a number that Python prints without being able to read it."""
    name = word[0]
    if name in ("inf", "nan"):
        return f'float("{name}")'
    if name == LayerDecay.__name__:
        return "opt.layer_decay"
    ours = name in dir(sys.modules["optimisers"]) and not word.string[word.end() :].startswith("=")
    return f"opt.{name}" if ours else name


@contextlib.contextmanager
def _bar(total: int, wanted: bool | None) -> Generator[Callable[[int, str], object]]:
    """What is called after some steps of a rule; shows a bar if that is wanted, or there is a terminal."""
    installed = importlib.util.find_spec("rich") is not None
    if not (installed and sys.stderr.isatty() if wanted is None else wanted):
        yield lambda _count, _name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=total)
        yield lambda count, name: shown.update(task, advance=count, description=name)
