"""Asking a program what a graph costs: one JSON object on its standard input, one on its standard output.

For cost models that are somebody else's: a vendor's compiler, a simulator, a script that talks to a board. A program is
only ever started by :func:`ask`, so by computing a cost; making a model and reading its settings start nothing.

The request is ``{"format": 1, "model": PATH, "batch": 1}``; the ``.onnx`` file is there until the answer has come. The
answer is ``{"format": 1, "unit": "ms", "nodes": {NAME: NUMBER}, "total": NUMBER, "unknown": [[NAME, OPERATOR], ...]}``.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eexform.cost_models._contract import Cost
from eexform.errors import EexformError, OptionError, need, suggest
from eexform.ir.graph import Graph
from eexform.ir.serialize import save

FORMAT = 1
"""Version of request and answer."""

TOLERANCE = 0.001
"""How far, as a share, the total may be from the sum of the nodes: what rounding in the answer may make of it."""

_SHOWN = 200  # characters of what a program said that a message repeats
_LONGEST_S = 1e6  # systems wait no longer than some weeks


def words(command: str) -> list[str]:
    """A command taken apart as a shell would, though no shell ever sees it: no variables, pipes or wildcards.

    Raises:
        OptionError: it is empty, or a quote is not closed.
    """
    try:
        found = shlex.split(command)
    except ValueError as error:
        raise OptionError(f"the command {command!r} cannot be taken apart: {error}") from error
    need(found, "the command is empty; give the program and its arguments", OptionError)
    return found


def ask(command: str, request: Mapping[str, Any], timeout_s: float) -> Any:
    """Start a program, hand it ``request`` as JSON, and return what it answers.

    Args:
        command: program and arguments (see :func:`words`).
        request: plain values.
        timeout_s: seconds after which the program and everything that it started are stopped.

    Returns:
        The answer as plain values.

    Raises:
        OptionError: the command is none, or there is no such program.
        EexformError: it took too long, failed (with the last line it wrote to standard error), or wrote no JSON.
    """
    parts = words(command)
    name = parts[0]
    try:
        # a session of its own: what it starts in turn is stopped with it
        process = subprocess.Popen(
            parts, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except FileNotFoundError as error:
        raise OptionError(
            f"there is no program {name!r}: check the command {command!r}, or give the full path"
        ) from error
    except OSError as error:
        raise OptionError(f"the program {name!r} cannot be started: {error.strerror or error}") from error
    with process:
        try:
            answer, said = process.communicate(json.dumps(request).encode(), timeout=min(timeout_s, _LONGEST_S))
        except subprocess.TimeoutExpired:
            _stop(process)
            raise EexformError(
                f"the program {name!r} gave no answer within {timeout_s:g} s and was stopped; raise timeout_s if it "
                "needs longer"
            ) from None
        except BaseException:  # Ctrl-C goes to our own group of processes, and this one is in another
            _stop(process)
            raise
    if process.returncode:
        raise EexformError(f"the program {name!r} {_ended(process.returncode)}: {_last_line(said)}")
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise EexformError(
            f"the program {name!r} did not answer in JSON ({error}); its output begins with {_beginning(answer)}"
        ) from error


def ask_cost(command: str, graph: Graph, *, unit: str, timeout_s: float) -> Cost:
    """What a program says that a graph costs, checked.

    Every node is in ``nodes`` (0 where it is fused into another) or in ``unknown``; one that the answer forgets counts
    as unknown. The total is the sum of the nodes.

    Args:
        command: program and arguments.
        graph: written to a temporary ``.onnx`` file for it.
        unit: that the answer must be in.
        timeout_s: seconds that it may take.

    Raises:
        OptionError: the command is none, or there is no such program.
        EexformError: it failed, or its answer is not as described above.
    """
    name = words(command)[0]
    with TemporaryDirectory(prefix="eexform-") as folder:
        path = Path(folder) / "model.onnx"
        save(graph, path)
        answer = ask(command, {"format": FORMAT, "model": str(path), "batch": 1}, timeout_s)
    try:
        return _checked(answer, {node.name: node.op for node in graph.nodes}, unit)
    except _WrongAnswerError as error:
        raise EexformError(f"the answer of the program {name!r} cannot be used: {error}") from error


class _WrongAnswerError(Exception):
    """What is wrong with an answer; becomes a message with the program's name."""


def _checked(answer: Any, operators: Mapping[str, str], unit: str) -> Cost:
    if not isinstance(answer, dict):
        raise _WrongAnswerError(f"expected a JSON object, found {_short(answer)}")
    if answer.get("format") != FORMAT:
        raise _WrongAnswerError(f"expected format {FORMAT}, found {_short(answer.get('format'))}")
    if answer.get("unit") != unit:
        raise _WrongAnswerError(f"expected figures in {unit!r}, found the unit {_short(answer.get('unit'))}")
    nodes, listed = answer.get("nodes"), answer.get("unknown", [])
    if not isinstance(nodes, dict):
        raise _WrongAnswerError(f"'nodes' must be an object with a number per node, found {_short(nodes)}")
    if not isinstance(listed, list) or not all(_is_pair(pair) for pair in listed):
        raise _WrongAnswerError(f"'unknown' must be a list of [node, operator], found {_short(listed)}")
    unknown: dict[str, str] = dict(listed)
    for node in (*nodes, *unknown):
        if node not in operators:
            raise _WrongAnswerError(f"the model has no node {node!r}: {suggest(node, operators)}")
        if node in nodes and node in unknown:
            raise _WrongAnswerError(f"node {node!r} has a figure and is unknown at once")
    figures = {node: _number(value, f"node {node!r}") for node, value in nodes.items()}
    total, added = _number(answer.get("total"), "'total'"), math.fsum(figures.values())
    if abs(total - added) > TOLERANCE * max(total, added):
        raise _WrongAnswerError(
            f"the total is {total:g} {unit}, but the nodes add up to {added:g}: paths are sums of nodes, so what "
            "belongs to none of them has to be left out or divided between them"
        )
    unknown |= {node: operator for node, operator in operators.items() if node not in figures and node not in unknown}
    return Cost(added, {node: figures.get(node, 0.0) for node in operators}, tuple(unknown.items()))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _number(value: Any, where: str) -> float:
    try:
        usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= float(value) < math.inf
    except OverflowError:  # JSON has whole numbers of any length
        usable = False
    if not usable:
        raise _WrongAnswerError(f"{where}: expected a number of at least 0, found {_short(value)}")
    return float(value)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a program and everything that it started."""
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _ended(code: int) -> str:
    if code > 0:
        return f"failed with exit code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def _last_line(said: bytes) -> str:
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:_SHOWN] if lines else "it wrote nothing to standard error"


def _beginning(answer: bytes) -> str:
    text = answer.decode(errors="replace").strip()
    return repr(text[:60] + ("..." if len(text) > 60 else "")) if text else "nothing: it is empty"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
