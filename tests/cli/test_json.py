"""The JSON of every command is documented, key by key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import fine

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "json.md"
FREE = ("cost", "cost_heads_free", "p50", "p90", "p95", "p99", "samples", "recipe", "default")
"""What these hold has names of the user's: cost models, splits, passes, parameters."""


def keys(value: Any) -> Iterator[str]:
    """Every key in a JSON value, lists and tables inside included."""
    if isinstance(value, list):
        for entry in value:
            yield from keys(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield key
            if key not in FREE:
                yield from keys(entry)


def section(title: str) -> set[str]:
    """The words set as code in a section, and those inside braces there."""
    text = DOCUMENT.read_text(encoding="utf-8")
    body = re.split(r"\n## ", text.split(f"\n## {title}\n")[1])[0]
    return {word for code in re.findall(r"`([^`]*)`", body) for word in re.findall(r"\w+", code)}


@pytest.fixture(scope="module")
def commands(place: Path, run: Path, model: Path, exported: Path) -> dict[str, Any]:
    fine("export", run, "--pick", "3", "--form", "plan", "-o", place / "json" / "plan.toml")
    arguments: dict[str, tuple[object, ...]] = {
        "`inspect`": ("inspect", model),
        "`groups`": ("groups", model),
        "`search` and `pareto`": ("pareto", run),
        "`export`": ("export", run, "--pick", "3", "-o", place / "json" / "x.onnx"),
        "`verify`": ("verify", exported, "--against", model, "--run", run, "--samples", "8"),
        "`bench`": ("bench", exported, "--run", run, "--samples", "8", "--batch", "8"),
        "`apply`": ("apply", model, place / "json" / "plan.toml", "-o", place / "json" / "y.onnx"),
        "`passes`, `costs` and `losses`": ("passes",),
    }
    found = {title: fine(*given, "--json").json for title, given in arguments.items()}
    for more in ("costs", "losses"):
        found["`passes`, `costs` and `losses`"] |= fine(more, "--json").json
    return found


def test_every_key_is_documented(commands: dict[str, Any]) -> None:
    plan = section("`search` and `pareto`")
    for title, value in commands.items():
        known = section(title) | (plan if title == "`export`" else set())
        missing = set(keys(value)) - known
        if title == "`inspect`":
            missing -= {"exits"}
        assert not missing, f"docs/json.md, {title}: {sorted(missing)}"


def test_every_documented_key_is_there(commands: dict[str, Any]) -> None:
    """In the tables, whose first column names keys."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for title in ("`inspect`", "`groups`", "`search` and `pareto`", "`apply`"):
        body = re.split(r"\n## ", text.split(f"\n## {title}\n")[1])[0]
        named = {
            key.split(".")[-1]
            for row in re.findall(r"^\| (`.*?) \|", body, re.M)
            for key in re.findall(r"`([\w.]+)`", row)
        }
        missing = named - set(keys(commands[title]))
        assert not missing, f"{title}: {sorted(missing)}"


def test_numbers_are_numbers(commands: dict[str, Any]) -> None:
    for value in commands.values():
        assert not any(text in str(value) for text in ("nan", "inf,", "Infinity"))
