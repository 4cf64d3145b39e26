"""The form ``torch``: the saved program decides like the module at any batch size, row by row."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from eexform.backends import ort
from eexform.backends.export import export
from eexform.backends.fx import raise_to_fx
from eexform.backends.multi_exit import to_torch
from eexform.backends.settled import settled
from eexform.backends.torch_export import DESCRIPTION, lower_torch, packed, unpacked
from eexform.errors import GraphError, ModelError, OptionError
from eexform.ir import kinds
from eexform.ir.sites import find_sites
from eexform.verification.deployed import Deployed
from eexform.verification.simulate import simulate
from eexform.verification.verify import verify
from tests import zoo
from tests.lowering import nets
from tests.zoo import doors, modules

SAMPLES = 32


def spread(name: str, count: int, **how):
    thresholds = nets.spread(nets.scores(name, count, SAMPLES, **how))
    return nets.set_thresholds(nets.with_exits(name, count, **how), thresholds)


@pytest.mark.parametrize(
    ("name", "count", "how"), [("resnet", 2, {"measure": "entropy"}), ("vit", 1, {}), ("resnet", 1, {"carry": 0.5})]
)
def test_the_saved_program_is_the_module(name, count, how, tmp_path):
    graph = spread(name, count, **how)
    module = to_torch(graph)
    path = export(graph, tmp_path / "ee.pt2", "torch")
    assert [file.name for file in tmp_path.iterdir()] == ["ee.pt2"]
    extra = {DESCRIPTION: ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra[DESCRIPTION])["eexform.form"] == "torch"
    assert set(program.state_dict) <= set(module.state_dict())
    run, feeds = program.module(), zoo.feeds(name, SAMPLES, seed=3)
    inputs = [torch.from_numpy(np.array(value)) for value in feeds.values()]
    left = set()
    for rows in (1, 7, SAMPLES):
        with torch.no_grad():
            logits, index, confidence = run(*(value[:rows] for value in inputs))
            expected = module(*(value[:rows] for value in inputs))
        torch.testing.assert_close(index, expected.exit_index)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(confidence, expected.confidence, rtol=1e-4, atol=1e-4)
        left |= set(index.tolist())
    assert len(left) > 1
    if name == "resnet":
        text = str(program.graph_module.print_readable(print_output=False))
        assert "higher_order.cond" in text, "work is not skipped"
        assert "nonzero" in text, "rows that left are computed further"


def test_the_file_tells_nothing_of_the_machine(tmp_path):
    path = export(spread("resnet", 1), tmp_path / "ee.pt2", "torch")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("model.json") for name in parts)
    for name, content in parts.items():
        for word in (b"stack_trace", b"site-packages", b"torch_export.py", str(Path.cwd()).encode()):
            assert word not in content, name


@pytest.mark.parametrize("name", ["bert", "swin"])
def test_sizes_are_settled_before_tracing(name):
    """Positions made by ``Range`` for a free length, windows merged into the batch."""
    graph = spread(name, 2)
    module, program = to_torch(graph), unpacked(packed(lower_torch(graph), graph))
    run, feeds = program.module(), zoo.feeds(name, SAMPLES, seed=3)
    inputs = [torch.from_numpy(np.array(value)) for value in feeds.values()]
    for thresholds in ((np.inf, np.inf), (-np.inf, -np.inf), None):
        if thresholds is not None:
            placed = nets.set_thresholds(graph, thresholds)
            run, module = lower_torch(placed).module(), to_torch(placed)
        else:
            run, module = program.module(), to_torch(graph)
        for rows in (1, 7, SAMPLES):
            with torch.no_grad():
                found, expected = run(*(value[:rows] for value in inputs)), module(*(value[:rows] for value in inputs))
            for one, other in zip(found, (expected.logits, expected.exit_index, expected.confidence), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "bert", "mixer", "shufflenet_v2"])
@pytest.mark.parametrize("door", doors.DOORS)
def test_modules_of_the_zoo_become_programs(name, door):
    graph = doors.graph(name, door)
    found = find_sites(graph, max_live=20).sites
    graph = nets.attach(graph, [found[len(found) // 3], found[2 * len(found) // 3]])
    feeds = doors.feeds(graph, modules.inputs(name, 8, seed=3))
    graph = nets.set_thresholds(graph, nets.spread(simulate(graph, feeds)))
    report = verify(unpacked(packed(lower_torch(graph), graph)), graph, feeds)
    assert report.ok, [check for check in report.checks if not check.ok]


def test_what_does_not_follow_the_batch_is_settled():
    graph = nets.trunk("swin")
    fixed = settled(graph)
    assert len(fixed.nodes) < len(graph.nodes)
    assert fixed.outputs == graph.outputs
    assert len(graph.nodes) == len(nets.trunk("swin").nodes)
    feeds = zoo.feeds("swin", 5, seed=1)
    one, other = (ort.run(ort.session(item), feeds)["logits"] for item in (graph, fixed))
    np.testing.assert_array_equal(one, other)
    new = set(fixed.constants) - set(graph.constants)
    assert new
    assert {kinds.kinds(fixed.metadata)[name] for name in new} == {"constant"}
    assert settled(nets.trunk("resnet")).digest == nets.trunk("resnet").digest
    before, after = to_torch(nets.with_exits("swin", 2)), set(raise_to_fx(nets.with_exits("swin", 2)).state_dict())
    assert set(before.state_dict()) == after, "settled numbers are no keys of the state dict"


def test_what_cannot_be_traced_or_opened_is_said(tmp_path, monkeypatch):
    with pytest.raises(GraphError, match="has no exits"):
        lower_torch(nets.trunk("resnet"))
    with monkeypatch.context() as patched:
        patched.setattr(
            torch, "cond", lambda decides, one, other, given: one(*given) if bool(decides) else other(*given)
        )
        with pytest.raises(GraphError, match=r"torch\.export cannot trace this network.*use the form 'if'"):
            lower_torch(nets.with_exits("resnet", 1))
    with pytest.raises(OptionError, match="'pt3' does not exist"):
        export(nets.with_exits("resnet", 1), tmp_path / "x", "pt3")
    export(nets.with_exits("resnet", 1), tmp_path / "ee.pt2", "torch")
    with pytest.raises(ModelError, match=r"a program of torch\.export .*never opens one.*eexform\.verify"):
        Deployed(tmp_path / "ee.pt2")
