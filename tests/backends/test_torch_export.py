"""The form ``torch``: the saved program decides like the module at any batch size, row by row."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from eexform.backends.export import export
from eexform.backends.multi_exit import to_torch
from eexform.backends.torch_export import DESCRIPTION, lower_torch
from eexform.errors import GraphError, ModelError, OptionError
from eexform.verification.deployed import Deployed
from tests import zoo
from tests.lowering import nets

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


def test_what_cannot_be_traced_or_opened_is_said(tmp_path):
    with pytest.raises(GraphError, match="has no exits"):
        lower_torch(nets.trunk("resnet"))
    with pytest.raises(GraphError, match=r"torch\.export cannot trace this network.*use the form 'if'"):
        lower_torch(nets.with_exits("bert", 1))
    with pytest.raises(OptionError, match="'pt3' does not exist"):
        export(nets.with_exits("resnet", 1), tmp_path / "x", "pt3")
    (tmp_path / "ee.pt2").write_bytes(b"anything")
    with pytest.raises(ModelError, match="may run code"):
        Deployed(tmp_path / "ee.pt2")
