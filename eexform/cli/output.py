"""Where output goes: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType

# names of values and files are shown as they are: "[conv]" is no markup, ":key:" no emoji
console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


def show(plain: Any, as_json: bool, table: Callable[[Any], RenderableType]) -> None:
    """Print ``plain`` as JSON, or what ``table`` makes of it."""
    if as_json:
        print(json.dumps(plain, indent=2, allow_nan=False))
    else:
        console.print(table(plain), crop=False)
