"""What an exported file says about itself: ``eexform.*`` keys of the ONNX metadata.

    eexform.version       version that wrote the file
    eexform.form          if | stages | multi
    eexform.plan          JSON: exits, what the scores hold, number of classes, recipe, carry, thresholds' place
    eexform.trunk_digest  sha-256 of the trunk without heads, where it is known

Other keys of the graph's own metadata travel along. No path is ever written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from eexform._version import __version__
from eexform.errors import GraphError, ModelError, RunError
from eexform.ir.exits import Exit, Scores
from eexform.ir.graph import Graph
from eexform.ir.kinds import KINDS, TIED
from eexform.ir.provenance import PROVENANCE

VERSION = "eexform.version"
FORM = "eexform.form"
PLAN = "eexform.plan"
TRUNK = "eexform.trunk_digest"
FORMS = ("if", "stages", "multi")
_ABOUT_MODULE = (PROVENANCE, KINDS, TIED)
"""Keys by node and parameter names of the flat graph, which mean nothing in a lowered one."""


@dataclass(frozen=True)
class Exported:
    """What the metadata of an exported file say.

    Attributes:
        version: of eexform that wrote it.
        form: ``if``, ``stages`` or ``multi``.
        exits: sites, heads, measures, thresholds, temperatures.
        scores: what the class scores hold.
        num_classes: number of classes.
        trunk_digest: of the trunk; empty where unknown.
        plan: everything else that the plan holds (recipe, carry, ...), as plain values.
    """

    version: str
    form: str
    exits: tuple[Exit, ...]
    scores: Scores
    num_classes: int
    trunk_digest: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)


def build(graph: Graph, form: str) -> dict[str, str]:
    """The metadata of ``graph`` lowered to ``form``; what the graph carried itself (recipe, trunk digest) is kept."""
    kept = {key: value for key, value in graph.metadata.items() if key not in (VERSION, FORM, *_ABOUT_MODULE)}
    plan = _object(kept.get(PLAN, "{}"))
    plan["exits"] = [leaving.to_json() for leaving in graph.exits]
    plan["scores"] = graph.scores
    plan["num_classes"] = graph.num_classes
    kept[PLAN] = json.dumps(plan, allow_nan=False, sort_keys=True)
    return {VERSION: __version__, FORM: form, **kept}


def with_plan(entries: Mapping[str, str], **more: Any) -> dict[str, str]:
    """Metadata whose plan says ``more``, too."""
    return {**entries, PLAN: json.dumps({**_object(entries.get(PLAN, "{}")), **more}, allow_nan=False, sort_keys=True)}


def read(model: onnx.ModelProto) -> Exported:
    """Read and validate the metadata of an exported model.

    Raises:
        ModelError: the file was not exported by eexform, or its description is damaged.
        RunError: it was written by a newer version.
    """
    return parse({entry.key: entry.value for entry in model.metadata_props})


def parse(entries: Mapping[str, str]) -> Exported:
    """Like :func:`read`, from key-value pairs."""
    missing = [key for key in (VERSION, FORM, PLAN) if key not in entries]
    if missing:
        raise ModelError(
            f"the model has no metadata {', '.join(missing)}: it was not exported by eexform; give the file that "
            "'eexform export' or 'eexform apply' wrote"
        )
    check_version(entries[VERSION], "the model")
    if entries[FORM] not in FORMS:
        raise ModelError(f"the model's metadata give the form {entries[FORM]!r}; known are {', '.join(FORMS)}")
    plan = _object(entries[PLAN])
    try:
        exits = tuple(Exit.from_json(plain) for plain in plan.pop("exits"))
        scores = plan.pop("scores")
        classes = int(plan.pop("num_classes"))
    except (KeyError, TypeError, ValueError, GraphError) as error:
        raise ModelError(f"the model's description of its plan is damaged: {error!r}; export it again") from error
    if scores not in ("logits", "probabilities"):
        raise ModelError(f"the model's plan says its scores are {scores!r}; known are logits and probabilities")
    return Exported(entries[VERSION], entries[FORM], exits, scores, classes, entries.get(TRUNK, ""), plan)


def check_version(written: str, what: str) -> None:
    """Raise ``RunError`` where ``what`` was written by a newer version (major or minor) than this one."""
    try:
        ours = tuple(int(part) for part in __version__.split(".")[:2])
        theirs = tuple(int(part) for part in written.split(".")[:2])
    except ValueError as error:
        raise ModelError(f"{what} says it was written by version {written!r}, which is no version") from error
    if theirs > ours:
        raise RunError(
            f"{what} was written by eexform {written}, this is {__version__}: install that version or a newer"
        )


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ModelError(f"the metadata {PLAN} are not JSON ({error}); the file is damaged") from error
    if not isinstance(found, dict):
        raise ModelError(f"the metadata {PLAN} hold {type(found).__name__}, expected an object")
    return found
