"""onnx's backend test suite on the fx backend: what passes, what does not, and why.

``python -m tests.backends.conformance`` prints the table; ``--write`` renews ``conformance.json`` beside this file,
the list of failing cases by reason that ``test_conformance.py`` holds every run against.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from eexform.backends.onnx_backend import EexformBackend
from tests.backends.conformance_reasons import reason

KINDS = ("node", "pytorch-converted", "pytorch-operator")
LIST = Path(__file__).with_name("conformance.json")


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        kind: which of the suite's collections.
        name: the case.
        operator: what it is about: the operator of a node case, ``model`` where there are several.
        outcome: ``pass``, ``unsupported`` (an operator has no rule), ``wrong`` (another result) or ``error``.
        detail: first line of the message, where it does not pass.
        reason: why, in the words of the list; empty where it passes.
    """

    kind: str
    name: str
    operator: str
    outcome: str
    detail: str = ""
    reason: str = ""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


def run_suite(kinds: Sequence[str] = KINDS, only: str = "") -> list[Verdict]:
    """Every case whose name contains ``only``, in one process, with the suite's own data, tolerance and comparison."""
    verdicts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:
            for case in sorted(load_model_tests(kind=kind), key=lambda case: case.name):
                if only in case.name:
                    verdicts.append(_judged(kind, case))
    return verdicts


def failing(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """Failing cases by reason."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.outcome != "pass":
            found[verdict.reason].append(verdict.key)
    return {why: sorted(found[why]) for why in sorted(found)}


def _judged(kind: str, case: Any) -> Verdict:
    model = case.model if case.model is not None else onnx.load(Path(case.model_dir) / "model.onnx")
    operators = {node.op_type for node in model.graph.node}
    operator = operators.pop() if len(operators) == 1 else "model"
    try:
        torch.manual_seed(0)
        prepared = EexformBackend.prepare(model, "CPU")
        for inputs, expected in _data_sets(case, model):
            found = prepared.run(inputs)
            Runner.assert_similar_outputs(expected, list(found), case.rtol, case.atol)
    except AssertionError as error:
        outcome, problem = "wrong", error
    except Exception as error:  # whatever an operator can raise is a verdict here, not a crash of the run
        outcome, problem = "unsupported" if "cannot be raised" in str(error) else "error", error
    else:
        return Verdict(kind, case.name, operator, "pass")
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    detail = f"{type(problem).__name__}: {' '.join(lines)[:200]}"
    return Verdict(kind, case.name, operator, outcome, detail, reason(case.name, model, outcome, detail))


def _data_sets(case: Any, model: onnx.ModelProto) -> Iterator[tuple[list[Any], list[Any]]]:
    if case.data_sets is not None:
        for inputs, outputs in case.data_sets:
            yield [_value(item) for item in inputs], [_value(item) for item in outputs]
        return
    for folder in sorted(Path(case.model_dir).glob("test_data_set*")):
        yield _stored(folder, "input", model.graph.input), _stored(folder, "output", model.graph.output)


def _stored(folder: Path, what: str, infos: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    values = []
    for number in range(len(list(folder.glob(f"{what}_*.pb")))):
        if not infos[number].type.HasField("tensor_type"):
            raise ValueError(f"{folder}: {what} {number} is no tensor")
        proto = onnx.TensorProto.FromString((folder / f"{what}_{number}.pb").read_bytes())
        values.append(onnx.numpy_helper.to_array(proto))
    return values


def _value(item: Any) -> Any:
    if isinstance(item, onnx.TensorProto):
        return onnx.numpy_helper.to_array(item)
    return item if item is None or isinstance(item, list) else np.asarray(item)


# -- the table -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.backends.conformance", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew conformance.json")
    parser.add_argument("--json", action="store_true", help="every verdict as JSON")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this collection (repeatable)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(arguments)
    if options.write and (options.kind or options.only):
        parser.error("--write needs the whole suite")
    verdicts = run_suite(options.kind or KINDS, options.only)
    if options.write:
        LIST.write_text(written(verdicts))
    if options.json:
        print(json.dumps([vars(verdict) for verdict in verdicts], indent=1))
    else:
        print(table(verdicts))
    return 0


def written(verdicts: Sequence[Verdict]) -> str:
    """Text of the list."""
    passed = Counter(verdict.kind for verdict in verdicts if verdict.outcome == "pass")
    cases = Counter(verdict.kind for verdict in verdicts)
    held = {
        "onnx": onnx.__version__,
        "passed": {kind: f"{passed[kind]} of {cases[kind]}" for kind in KINDS},
        "failing": failing(verdicts),
    }
    return json.dumps(held, indent=1) + "\n"


def table(verdicts: Sequence[Verdict]) -> str:
    """Counts by kind, by operator (those with a failure), and every failure with its message."""
    lines = [f"{'kind':<20}{'cases':>6}{'pass':>6}{'unsupported':>13}{'wrong':>7}{'error':>7}"]
    for kind in KINDS:
        found = Counter(verdict.outcome for verdict in verdicts if verdict.kind == kind)
        lines.append(
            f"{kind:<20}{found.total():>6}{found['pass']:>6}{found['unsupported']:>13}{found['wrong']:>7}"
            f"{found['error']:>7}"
        )
    by_operator: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        by_operator[verdict.operator][verdict.outcome] += 1
    lines += ["", f"{'operator':<32}{'cases':>6}{'pass':>6}"]
    for operator, found in sorted(by_operator.items()):
        if found["pass"] < found.total():
            lines.append(f"{operator:<32}{found.total():>6}{found['pass']:>6}")
    lines += ["", "reasons"]
    lines += [f"{len(cases):>5}  {why}" for why, cases in failing(verdicts).items()]
    lines += ["", "failures"]
    lines += [f"{v.key} [{v.operator}] {v.outcome}: {v.detail}" for v in verdicts if v.outcome != "pass"]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
