"""``package.module:attribute``: code of the user's own, named by text.

Nothing but the named module is imported; the current folder is searched as ``python -m`` would.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from eexform.errors import EexformError, suggest

_NAME = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


def is_reference(text: str) -> bool:
    """Whether ``text`` has the form ``package.module:attribute``."""
    return _NAME.match(text) is not None


def resolve(text: str, error: type[EexformError]) -> Any:
    """What ``text`` names.

    Args:
        text: ``package.module:attribute``, the attribute possibly dotted.
        error: kind of error to raise.

    Raises:
        EexformError: of the kind ``error``: no such module or attribute, or importing it failed.
    """
    if not is_reference(text):
        raise error(f"{text}: expected 'module:attribute'")
    module_name, _, path = text.partition(":")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as caught:  # importing runs the user's code
        raise error(
            f"{text}: module {module_name!r} cannot be imported: {type(caught).__name__}: {caught} (looked in the "
            "current folder and where Python looks)"
        ) from caught
    finally:
        if added:
            sys.path.remove(here)
    for piece in path.split("."):
        if not hasattr(found, piece):
            known = [name for name in dir(found) if not name.startswith("_")]
            raise error(f"{text}: module {module_name!r} has no {piece!r}: {suggest(piece, known)}")
        found = getattr(found, piece)
    return found
