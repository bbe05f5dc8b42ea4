"""What may arrays be called in the text of a kernel? As the reader knows them, where no name is taken."""

import builtins
import io
import keyword
import tokenize
import unicodedata


def identifiers(text: str) -> frozenset[str]:
    """The names in a Python text."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return frozenset(token.string for token in tokens if token.type == tokenize.NAME)


def fitting(labels: dict[str, str], plain: str) -> dict[str, str]:
    """The reader's labels of arrays, as far as no name that is made of one is used already.

    `plain` is the text in which arrays go by their own names, so it uses every name that its template and its
    maths ever do; an array whose label does not fit keeps its own.
    """
    taken = identifiers(plain) | set(keyword.kwlist) | set(dir(builtins))
    fit: dict[str, str] = {}
    for array, label in labels.items():
        label = unicodedata.normalize("NFKC", label)  # noqa: PLW2901 as Python reads it
        made = {f"{role}{new}{label}" for role in ROLES for new in ("", "new_")}
        if label.isidentifier() and not made & taken:
            fit[array] = label
            taken |= made
    return fit


ROLES = ("", "load_", "store_", "at_", "wide_at_")
"""What stands before the label of an array in the names that a kernel makes of it."""
