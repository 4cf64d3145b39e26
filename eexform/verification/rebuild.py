"""The flat reference of an exported network, rebuilt from the original model and the exported heads' parameters.

Nothing is taken from the exported file but the plan and the numbers of the heads: trunk, wiring and head structure come
from the original and from the plan's text, so a head on the wrong site or with another head's numbers shows. Where the
trunk itself holds numbers that were computed from data (repaired, distilled), those too come from the file unless the
run is at hand; see :func:`trunk_of`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.backends.metadata import Exported
from eexform.errors import EexformError, VerificationError
from eexform.heads import HeadSpec, fold_head, head_graph, with_parameters
from eexform.heads.build import GATE
from eexform.ir import measures
from eexform.ir.emit import Emitter
from eexform.ir.exits import Exit
from eexform.ir.extract import graft
from eexform.ir.graph import Graph
from eexform.ir.policy import emit_carry
from eexform.ir.sites import SiteReport, find_sites
from eexform.passes import PassContext
from eexform.passes.recipe import Recipe
from eexform.passes.set_parameters import SetParameters, empty_bias, put

_ANY_LIVE = 1000


@dataclass(frozen=True)
class Replayed:
    """The trunk that the heads were attached to.

    Attributes:
        graph: the original after the recipe's passes in front of ``insert_exits``.
        stored: the plan stores numbers that are not at hand, so the exported file's were taken. Nodes, wiring and
            shapes never are.
        taken: how many parameters are not those that the recipe makes of the original's.
    """

    graph: Graph
    stored: bool = False
    taken: int = 0


def trunk_of(
    against: Graph,
    exported: Exported,
    parameters: Mapping[str, np.ndarray] | None = None,
    arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Replayed:
    """The trunk that the heads were attached to.

    A plan from a trunk that was repaired or trained names stored numbers (``set_parameters``). Where they are not in
    ``arrays`` the passes are replayed with the original's own numbers in their place, which gives the structure, and
    then every parameter takes the value that it has in the exported file. So what was cut, and how all is connected, is
    still derived from the original; of the numbers it is only known that all together have the recorded digest, and
    which of them differ from what the recipe makes of the original's.

    Args:
        against: the original.
        exported: the plan.
        parameters: of the exported file, by name.
        arrays: stored numbers by digest, such as those of a run.

    Raises:
        VerificationError: the recipe cannot be replayed on this model.
    """
    before = []
    for entry in _recipe(exported):
        if entry.get("name") in ("insert_exits", "lower"):
            break
        before.append(entry)
    graph, known, missing = against, arrays or {}, False
    try:
        for step in Recipe.parse({"pass": before}).passes():
            if isinstance(step, SetParameters) and step.digest not in known:
                graph, missing = _with_empty_biases(graph, step), True
                continue
            step.requires(graph)
            graph = step.run(graph, PassContext(arrays=known)).graph
        if not missing:
            return Replayed(graph)
        found = _fitting(graph, parameters or {})
        own = graph.parameters()
        differ = sum(not np.array_equal(own[name], values) for name, values in found.items())
        return Replayed(put(graph, found)[0], True, differ)
    except EexformError as error:
        raise VerificationError(
            f"the recipe in the exported file cannot be replayed on the model it is verified against: {error}; is it "
            "the model that was exported?"
        ) from error


def _with_empty_biases(graph: Graph, step: SetParameters) -> Graph:
    """``graph`` with the biases that ``step`` would add, their numbers still to come."""
    nodes = {node.name: node for node in graph.nodes}
    arrays = {}
    for name, bias in step.biases.items():
        if name in nodes and bias not in graph.constants:
            arrays[bias] = empty_bias(nodes[name])
    return put(graph, arrays, {node: name for node, name in step.biases.items() if name in arrays})[0]


def _fitting(graph: Graph, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of ``parameters`` that a parameter of ``graph`` can take: same name, shape and type."""
    return {
        name: parameters[name]
        for name, own in graph.parameters().items()
        if name in parameters and parameters[name].shape == own.shape and parameters[name].dtype == own.dtype
    }


@dataclass(frozen=True)
class Reference:
    """What an exported network is held against.

    Attributes:
        graph: trunk and heads, flat, with exits.
        gates: per exit, the value that holds what its gate says; empty where its head has none. Confidences are
            computed from these outside the network, so that a wrong sum of gates inside an exported one shows.
    """

    graph: Graph
    gates: tuple[str, ...]


def reference(trunk: Graph, exported: Exported, parameters: Mapping[str, np.ndarray]) -> Reference:
    """Trunk and heads as one flat graph with exits.

    Args:
        trunk: see :func:`trunk_of`.
        exported: the plan.
        parameters: of the exported file, by name.

    Raises:
        VerificationError: a site, a head or a parameter of the plan does not exist, or a measure does not go with its
            head.
    """
    sites = find_sites(trunk, max_live=_ANY_LIVE)
    draft = trunk.copy().gs
    values = {tensor.name: tensor for node in draft.nodes for tensor in node.outputs}
    taken = {node.name for node in draft.nodes} | set(trunk.tensors)
    scores, gates = [], []
    for place, leaving in enumerate(exported.exits):
        head = _head(trunk, sites, leaving, place, parameters)
        prefix = f"verify{place}."
        while any(name.startswith(prefix) for name in taken):
            prefix = f"_{prefix}"
        planted = graft(draft, head, feeds={head.inputs[0]: values[leaving.site]}, prefix=prefix)
        scores.append(planted[head.final])
        gates.append(planted.get(GATE))
        _check_measure(leaving, place, gated=gates[-1] is not None)
    exits = exported.exits
    carry, final_temperature = _carry(exported)
    emitter, inner, name = Emitter(draft), draft.outputs[0], draft.outputs[0].name
    tail = _tail(exported)
    if tail is not None:
        emitter.rename(inner, f"verify.{name}")
        inner = _planted_tail(draft, trunk, sites, tail, values, parameters)
        final_temperature = _constant(parameters, f"{tail.prefix}carry{len(exits)}.temperature")
    if carry:
        if tail is None:
            emitter.rename(inner, f"verify.{name}")
        temperatures = [_constant(parameters, f"carry{place}.temperature") for place in range(len(exits))]
        *scores, inner = emit_carry(
            emitter, [*scores, inner], [*temperatures, final_temperature], carry, exported.scores
        )
    if inner.name != name:
        emitter.rename(inner, name)
    draft.outputs[0] = inner
    sure = _confidences(Emitter(draft), exits, gates)
    draft.outputs = [draft.outputs[0], *scores, *(value for value in sure if value is not None)]
    rewired = tuple(
        replace(item, logits=score.name, confidence=value.name if value is not None else "")
        for item, score, value in zip(exits, scores, sure, strict=True)
    )
    said = tuple(gate.name if gate is not None else "" for gate in gates)
    if tail is not None:  # nothing behind the new final classifier is there to be run, or skipped
        kept = list(draft.outputs)
        draft.outputs = [*kept, *(gate for gate in gates if gate is not None)]
        draft.cleanup(remove_unused_graph_inputs=False, remove_unused_node_outputs=False)
        draft.outputs = kept
    return Reference(trunk.replace(draft, exits=rewired), said)


@dataclass(frozen=True)
class _Tail:
    """The head that ``drop_tail`` made the final classifier.

    Attributes:
        site: where it is attached.
        head: canonical text, without a gate.
        prefix: of its parameters' names in the exported file.
    """

    site: str
    head: str
    prefix: str


def _tail(exported: Exported) -> _Tail | None:
    given = exported.plan.get("tail")
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(isinstance(given.get(key), str) for key in ("site", "head", "prefix")):
        raise VerificationError(f"the plan's description of its last classifier is damaged: {given!r}; export it again")
    return _Tail(given["site"], given["head"], given["prefix"])


def _planted_tail(
    draft: gs.Graph,
    trunk: Graph,
    sites: SiteReport,
    tail: _Tail,
    values: Mapping[str, gs.Tensor],
    parameters: Mapping[str, np.ndarray],
) -> gs.Variable:
    """The scores of the head that is the final classifier, put onto the trunk."""
    carried = f"{tail.prefix}carry"
    names = [name for name in parameters if name.startswith(tail.prefix) and not name.startswith(carried)]
    built = _head(trunk, sites, Exit(tail.site, tail.head, "", parameters=tuple(names)), len(values), parameters)
    prefix = "verify.tail."
    while any(name.startswith(prefix) for name in trunk.tensors):
        prefix = f"_{prefix}"
    return graft(draft, built, feeds={built.inputs[0]: values[tail.site]}, prefix=prefix)[built.final]


def _check_measure(leaving: Exit, place: int, *, gated: bool) -> None:
    try:
        learned = measures.is_learned(leaving.measure)
    except EexformError as error:
        raise VerificationError(f"exit {place} at {leaving.site!r}: {error}") from error
    if learned != gated or gated != bool(leaving.confidence):
        raise VerificationError(
            f"exit {place} at {leaving.site!r}: measure {leaving.measure!r}, head {leaving.head!r} and confidence "
            f"{leaving.confidence!r} do not go together; the plan in the file is damaged, export it again"
        )


def _confidences(
    emitter: Emitter, exits: Sequence[Exit], gates: Sequence[gs.Variable | None]
) -> list[gs.Variable | None]:
    """The learned confidence of each exit, from its gate and the exit before; ``None`` where it has none."""
    found: list[gs.Variable | None] = []
    for place, (leaving, gate) in enumerate(zip(exits, gates, strict=True)):
        scope, before = emitter.scoped(f"verify.sure{place}."), found[-1] if found else None
        found.append(None if gate is None else measures.get_gate(leaving.measure).emit(scope, before, gate))
    return found


def _head(trunk: Graph, sites: SiteReport, leaving: Exit, place: int, parameters: Mapping[str, np.ndarray]) -> Graph:
    try:
        built = head_graph(
            HeadSpec.parse(leaving.head),
            sites.site(leaving.site),
            num_classes=trunk.num_classes,
            scores=trunk.scores,
            opset=trunk.opset,
        )
        found = head_parameters(leaving, parameters)
        if not set(found) <= set(built.constants):
            built = fold_head(built)  # batch normalisation was folded after the head was trained
        unset = set(built.parameters()) - set(found) if found else set()
        trained = with_parameters(built, found)
    except EexformError as error:
        raise VerificationError(f"exit {place} at {leaving.site!r} cannot be rebuilt: {error}") from error
    weights = [name for name in unset if built.constants[name].values.ndim > 0]
    if weights or not found:
        raise VerificationError(
            f"exit {place} at {leaving.site!r}: the plan names no values for {sorted(weights)[:3] or 'any parameter'}"
        )
    return trained


def head_parameters(leaving: Exit, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The head's arrays by the name they have in the stand-alone head.

    Raises:
        VerificationError: the exported file lacks one.
    """
    missing = [name for name in leaving.parameters if name not in parameters]
    if missing:
        raise VerificationError(f"exit at {leaving.site!r}: the exported file has no parameters {missing[:3]}")
    return {name.split(".", 1)[1]: parameters[name] for name in leaving.parameters}


def _carry(exported: Exported) -> tuple[float, float]:
    """Weight of earlier scores and the final classifier's temperature, from the recipe."""
    given: Mapping[str, Any] = exported.plan
    for step in _recipe(exported):
        if step.get("name") == "insert_exits":
            given = step
    carry, temperature = given.get("carry") or 0.0, given.get("final_temperature") or 1.0
    for name, value, most in (("carry", carry, 1.0), ("final_temperature", temperature, math.inf)):
        if not isinstance(value, (int, float)) or not 0.0 <= value <= most:
            raise VerificationError(f"the plan's {name} is {value!r}, expected a number 0..{most:g}; export it again")
    return float(carry), float(temperature)


def _recipe(exported: Exported) -> list[Mapping[str, Any]]:
    """The passes that the file says it was made with; none where it does not say.

    Raises:
        VerificationError: what it says is no recipe.
    """
    recipe = exported.plan.get("recipe") or {}
    steps = recipe.get("pass", []) if isinstance(recipe, Mapping) else None
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise VerificationError("the recipe in the exported file is damaged: it is no list of passes; export it again")
    return steps


def _constant(parameters: Mapping[str, np.ndarray], name: str) -> float:
    """A temperature that became part of the network; 1 where it was left out."""
    return float(parameters[name]) if name in parameters else 1.0
