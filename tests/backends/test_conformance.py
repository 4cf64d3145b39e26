"""onnx's backend test suite against the list of what is known to fail, and through onnx's own runner."""

import json
import unittest

import onnx
import pytest
import torch
from onnx.backend.test import BackendTest

from eexform.backends.onnx_backend import EexformBackend
from tests.backends.conformance import KINDS, LIST, failing, run_suite

RENEW = "renew the list: python -m tests.backends.conformance --write"


@pytest.fixture(scope="module")
def suite():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run_suite()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def held():
    return json.loads(LIST.read_text())


@pytest.mark.slow
def test_nothing_new_fails_and_the_list_is_up_to_date(suite, held):
    if held["onnx"] != onnx.__version__:
        pytest.skip(f"the list was written with onnx {held['onnx']}; {onnx.__version__} has other cases")
    known = {case: why for why, cases in held["failing"].items() for case in cases}
    seen = {case: why for why, cases in failing(suite).items() for case in cases}
    details = {verdict.key: f"{verdict.outcome}: {verdict.detail}" for verdict in suite}
    broken = [f"{case} {details[case]}" for case in seen if case not in known]
    assert not broken, "cases that passed before fail now:\n" + "\n".join(broken)
    mended = sorted(set(known) - set(seen))
    assert not mended, f"cases that failed before pass now, well done; {RENEW}:\n" + "\n".join(mended)
    moved = [f"{case}: {known[case]!r} is now {why!r}" for case, why in seen.items() if known[case] != why]
    assert not moved, f"cases fail for other reasons; {RENEW}:\n" + "\n".join(moved)
    for kind in KINDS:
        found = [verdict for verdict in suite if verdict.kind == kind]
        assert held["passed"][kind] == f"{sum(v.outcome == 'pass' for v in found)} of {len(found)}", RENEW


@pytest.mark.slow
def test_what_must_pass_passes(suite):
    """Everything that PyTorch exported, and far more than half of the single operators."""
    by_kind = {kind: [verdict for verdict in suite if verdict.kind == kind] for kind in KINDS}
    for kind in ("pytorch-converted", "pytorch-operator"):
        assert by_kind[kind], "the suite is not there"
        assert [verdict.name for verdict in by_kind[kind] if verdict.outcome != "pass"] == []
    assert sum(verdict.outcome == "pass" for verdict in by_kind["node"]) >= 1100


def test_through_the_runner_of_onnx():
    """The same cases, run by the class that onnx ships for it, so that no rule of ours stands between."""
    tests = BackendTest(EexformBackend, __name__).test_cases["OnnxBackendPyTorchOperatorModelTest"]
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(tests).run(result)
    skipped = [test for test, _ in result.skipped if not test.id().endswith("_cuda")]
    assert not skipped
    assert result.wasSuccessful(), [(str(test), trace[-300:]) for test, trace in (*result.failures, *result.errors)]
    assert result.testsRun - len(result.skipped) >= 35
