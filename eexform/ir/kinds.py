"""What the constants of a graph were in the module it came from: trained, kept, or only made by the exporter.

A graph from an ONNX file does not know this, and every array of floating-point numbers may be trained. A graph from a
torch module does: an attention mask is an array, too, and training it would be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, cast, get_args

from eexform.errors import GraphError

KINDS = "eexform.constants"
"""Key of ``Graph.metadata``: JSON ``{constant: kind}``; constants that passes add later are not listed."""

TIED = "eexform.tied"
"""Key of ``Graph.metadata``: JSON ``{alias: kept}``: other state-dict names of a tensor that the module shares."""

Kind = Literal["parameter", "buffer", "constant"]
"""``parameter``: trained. ``buffer``: in the state dict, not trained. ``constant``: neither."""


def kinds(metadata: Mapping[str, str]) -> dict[str, Kind]:
    """Kind of each constant that the metadata list.

    Raises:
        GraphError: the entry is damaged.
    """
    found = _table(metadata, KINDS)
    wrong = sorted(set(found.values()) - set(get_args(Kind)))
    if wrong:
        raise GraphError(f"metadata {KINDS}: kinds {wrong} do not exist; known are {', '.join(get_args(Kind))}")
    return cast(dict[str, Kind], found)


def with_kinds(metadata: Mapping[str, str], found: Mapping[str, Kind]) -> dict[str, str]:
    """Metadata that list these kinds."""
    return {**metadata, KINDS: json.dumps(dict(found), sort_keys=True)}


def tied(metadata: Mapping[str, str]) -> dict[str, str]:
    """Kept name of each alias.

    Raises:
        GraphError: the entry is damaged.
    """
    return _table(metadata, TIED)


def _table(metadata: Mapping[str, str], key: str) -> dict[str, str]:
    if key not in metadata:
        return {}
    try:
        found = json.loads(metadata[key])
    except ValueError as error:
        raise GraphError(f"metadata {key}: not JSON ({error}); the file is damaged") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise GraphError(f"metadata {key}: expected a table of name = text; the file is damaged")
    return found
