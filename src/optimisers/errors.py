"""Every exception of the package.

    OptimiserError
    ├── BadSetting      a hyper-parameter of the wrong kind or outside its range        (also a ValueError)
    ├── UnknownField    a name that no rule here has                                    (also a TypeError)
    ├── BadState        a state was wanted and something else came, or the reverse      (also a TypeError)
    ├── TreeMismatch    model, state and gradients differ in structure, shape or dtype  (also a ValueError)
    ├── NoMatch         a selector that matches nothing, a leaf that no selector takes  (also a LookupError)
    ├── DomainError     a rule met a value that it cannot step with, such as a NaN norm (also a ValueError)
    ├── TraceError      a rule did what cannot be traced                                (also a TypeError)
    ├── BadFile         a file that is no checkpoint, or a damaged one                  (also a ValueError)
    ├── ProcessLost     another process did not answer in a step                        (also a RuntimeError)
    └── CacheRefused    the cache directory cannot be trusted (a warning, not an error)

A message has up to four parts, in this order: where, what was there, what is accepted, what to write instead.
"""

import warnings


class OptimiserError(Exception):
    """The root of the errors raised by this package."""

    def __init_subclass__(cls) -> None:
        cls.__module__ = "optimisers"


class BadSetting(OptimiserError, ValueError):
    """A hyper-parameter of the wrong kind or outside its range."""


class UnknownField(OptimiserError, TypeError):
    """A hyper-parameter name that no rule here has."""


class BadState(OptimiserError, TypeError):
    """A state tree was wanted and something else came, or the reverse."""


class TreeMismatch(OptimiserError, ValueError):
    """Model, state and gradients differ in structure, shape or dtype."""


class NoMatch(OptimiserError, LookupError):
    """A selector that matches nothing, or a parameter that no selector takes."""


class DomainError(OptimiserError, ValueError):
    """A rule met a value that it cannot step with, such as a norm that is not finite."""


class TraceError(OptimiserError, TypeError):
    """A rule did something whose result is not known until the step runs."""


class BadFile(OptimiserError, ValueError):
    """A file that is no checkpoint, was damaged, or was written by a later version."""


class ProcessLost(OptimiserError, RuntimeError):
    """Another process did not answer in a step: it has died, or the time limit of the group has run out."""


class ShapeError(TraceError):
    """An operation of a rule met an array whose shape it does not take; its place is added to the message."""


class FloatParameter(UserWarning):
    """A Python float stands where an array would train."""


class NoParameters(UserWarning):
    """A model without a single array to train."""


class CacheRefused(UserWarning):
    """The cache directory cannot be trusted; kernels are compiled anew in each process."""


def deprecated(said: str, *, since: str, depth: int) -> None:
    """Warn of something that still works until the next release but one: what to write instead, since
    which version. `depth` counts callers from here to the user's line.
    """
    warnings.warn(f"{said} (deprecated since {since})", DeprecationWarning, stacklevel=depth + 1)
