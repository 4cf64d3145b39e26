"""Plug-ins: everything selectable by name is found through ``importlib.metadata`` entry points, built-in or not."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from eexform.errors import OptionError, suggest

GROUPS = (
    "eexform.passes",
    "eexform.cost_models",
    "eexform.head_layers",
    "eexform.measures",
    "eexform.data_sources",
    "eexform.losses",
    "eexform.criteria",
)


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def names(group: str) -> tuple[str, ...]:
    """The names registered in ``group``, sorted."""
    return tuple(_points(group))


def load(group: str, name: str) -> Any:
    """The object registered as ``name`` in ``group``.

    Raises:
        OptionError: no such name, or the distribution that registered it cannot be imported.
    """
    points = _points(group)
    kind = group.removeprefix("eexform.").replace("_", " ").removesuffix("s")
    kind = {"passe": "pass", "losse": "loss"}.get(kind, kind)
    if name not in points:
        raise OptionError(f"no {kind} is called {name!r}: {suggest(name, points)}")
    point = points[name]
    try:
        return point.load()
    except Exception as error:  # whatever happens while a stranger's module is imported
        owner = point.dist.name if point.dist else "an unknown distribution"
        raise OptionError(
            f"{kind} {name!r} ({point.value}, from {owner}) cannot be imported: {type(error).__name__}: {error}"
        ) from error


def available(group: str) -> tuple[str, ...]:
    """Those of :func:`names` that can be imported: a broken plug-in is no candidate, and an error only by its name."""
    found = []
    for name in names(group):
        try:
            load(group, name)
        except OptionError:
            continue
        found.append(name)
    return tuple(found)


def origin(group: str, name: str) -> str:
    """``distribution version`` that registered ``name``; empty where the metadata does not say."""
    dist = _points(group)[name].dist
    return f"{dist.name} {dist.version}" if dist else ""


def refresh() -> None:
    """Forget the cached listing, for distributions installed while the process runs."""
    _points.cache_clear()
