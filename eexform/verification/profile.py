"""Proof of skipping: the runtime's own trace of a run in which every sample leaves at one exit.

The session is opened without optimisation, so kernels keep the names of their nodes, and the trace is held against two
lists: names of nodes that only run behind the exit, and how many heavy operators the network needs up to it. The second
does not depend on names: a lowering that computes both sides and selects (``Where``) is found by its work.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from eexform.backends import ort
from eexform.backends.blocks import split
from eexform.backends.protos import subgraphs
from eexform.ir.graph import Graph
from eexform.verification.deployed import Deployed

HEAVY = frozenset(
    (
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Attention", "Einsum"),
        *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    )
)


@dataclass(frozen=True)
class Trace:
    """What one run executed.

    Attributes:
        nodes: names of the nodes whose kernels ran.
        operators: how often each operator ran.
    """

    nodes: frozenset[str]
    operators: Mapping[str, int]

    @property
    def heavy(self) -> int:
        return sum(count for op, count in self.operators.items() if op in HEAVY)


def traces(model: onnx.ModelProto | Path, runs: Sequence[Mapping[str, np.ndarray]]) -> list[Trace]:
    """Run ``model`` once per entry of ``runs`` without optimisation and return what each run executed."""
    with tempfile.TemporaryDirectory(prefix="eexform-trace-") as folder:
        session = ort.session(model, optimize=False, profile=Path(folder) / "trace")
        for feeds in runs:
            ort.run(session, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    windows = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "model_run"]
    windows.sort()
    found: list[tuple[set[str], Counter[str]]] = [(set(), Counter()) for _ in windows]
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        for place, (start, end) in enumerate(windows):
            if start <= event["ts"] <= end:
                found[place][0].add(event["name"].removesuffix("_kernel_time"))
                found[place][1][event["args"]["op_name"]] += 1
                break
    return [Trace(frozenset(names), dict(counts)) for names, counts in found]


def unskipped(deployed: Deployed, reference: Graph, feeds: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Per exit, what was executed behind it although every sample left there (empty lists: proven).

    Args:
        deployed: an export of the form ``if`` or ``stages``.
        reference: the flat graph with exits.
        feeds: a batch.
    """
    exits = len(reference.exits)
    policies = [[np.inf] * place + [-np.inf] * (exits - place) for place in range(exits)]
    if deployed.form == "stages":
        return [_later_stages(deployed, feeds, policy, place) for place, policy in enumerate(policies)]
    blocks = split(reference)
    in_file = {node.name for graph in subgraphs(deployed.model.graph) for node in graph.node}
    runs = [{**feeds, **deployed.probe_feeds(policy)} for policy in policies]
    found = []
    for place, trace in enumerate(traces(deployed.probe_source, runs)):
        later = {name for block in blocks[place + 1 :] for name in block.nodes} & in_file
        if deployed.levels:
            later |= {node.name for graph in subgraphs(deployed.levels[place].rest) for node in graph.node}
        allowed = sum(_heavy(reference, block.nodes) for block in blocks[: place + 1])
        wrong = sorted(trace.nodes & later)
        if trace.heavy > allowed:
            wrong.append(f"{trace.heavy} heavy operators where {allowed} are needed")
        if not trace.nodes:
            wrong.append("the trace is empty, so it proves nothing")
        found.append(wrong)
    return found


def _heavy(reference: Graph, nodes: Collection[str]) -> int:
    """Heavy operators among ``nodes`` and the shape arithmetic they need: the first state of a recurrent network, all
    zeros, is multiplied by weights as well."""
    flow = reference.flow
    needed = set(nodes)
    shapes = {value for name in nodes for value in flow.reads(name) if flow.producer.get(value) in flow.shape_nodes}
    needed |= flow.ancestors(shapes) & flow.shape_nodes
    return sum(flow.nodes[name].op in HEAVY for name in needed)


def _later_stages(
    deployed: Deployed, feeds: Mapping[str, np.ndarray], policy: Sequence[float], place: int
) -> list[str]:
    session = deployed.staged(policy)
    session.run(feeds)
    return [f"stage {later}" for later in range(place + 1, session.stages) if session.runs[later]]
