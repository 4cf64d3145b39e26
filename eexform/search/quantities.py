"""Amounts as a person writes them: ``0.7x`` of the original's, ``24.4e6``, ``256KiB``, ``20M``, ``3ms``."""

from __future__ import annotations

import math
import re

from eexform.errors import OptionError

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def amount_of(text: str, whole: float, name: str, unit: str = "") -> float:
    """An amount as a number.

    Args:
        text: as written.
        whole: what ``1x`` is: the original's.
        name: of the option, for messages.
        unit: that the number is in, and that may be written behind it (``B`` for bytes).

    Raises:
        OptionError: it is none.
    """
    found = _NUMBER.match(text.strip())
    rest = text.strip()[found.end() :].strip() if found else ""
    if found and rest == "x":
        return float(found[0]) * whole
    for ending in sorted({"B", "bytes"} if unit == "bytes" else {unit}, key=len, reverse=True):
        if ending and rest.endswith(ending):
            rest = rest.removesuffix(ending).strip()
            break
    if not found or rest not in PREFIXES or not math.isfinite(float(found[0])):
        counted = f" {unit}" if unit else ""
        raise OptionError(
            f"{name}: {text!r} is not a number{counted} (write 0.7x for a share of the original's; k, M, G, Ki, Mi and "
            "Gi may stand behind a number)"
        )
    return float(found[0]) * PREFIXES[rest]
