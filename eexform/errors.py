"""Every error that eexform raises on purpose.

A message says what was expected, what was found, where (file, node or value name) and what to do about it. The command
line prints the message alone and exits with code 2; anything that is not an ``EexformError`` is a bug in eexform.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class EexformError(Exception):
    """Root of the tree: something the user can put right."""


class ModelError(EexformError):
    """The model file or graph cannot be used: corrupt, unsupported, not a classifier, NaN weights."""


class GraphError(EexformError):
    """A graph is not well formed, or a name in it does not exist."""


class DataError(EexformError):
    """The data set cannot be used: missing, wrong shape, labels out of range, NaN."""


class OptionError(EexformError):
    """An option, recipe or tunable value is not valid."""


class PassError(EexformError):
    """A pass was refused by its own ``requires`` or broke what it ``ensures``."""


class RunError(EexformError):
    """A run directory is locked, damaged, incomplete or from a newer version."""


class StorageError(EexformError):
    """Writing failed: disk full, no permission, path in use."""


class TrainingError(EexformError):
    """Training diverged: a loss, scores or parameters are not finite. The same again would come to the same."""


class VerificationError(EexformError):
    """An exported network does not do what its plan says."""


def need(condition: object, message: str, error: type[EexformError] = PassError) -> None:
    """Raise ``error(message)`` unless ``condition`` holds."""
    if not condition:
        raise error(message)


def suggest(wrong: str, known: Iterable[str]) -> str:
    """A sentence that lists near matches of ``wrong`` (or every choice when there are few)."""
    names = sorted(known)
    close = get_close_matches(wrong, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    if 0 < len(names) <= 12:
        return "choose from " + ", ".join(repr(name) for name in names)
    return f"there are {len(names)} names, none similar"
