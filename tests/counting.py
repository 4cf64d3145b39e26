"""How much work a call does, in function calls: the same number on every machine, however busy."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable


def function_calls(work: Callable[[], object]) -> int:
    """Python and built-in function calls that ``work`` makes."""
    profile = cProfile.Profile()
    profile.runcall(work)
    return int(pstats.Stats(profile).total_calls)
