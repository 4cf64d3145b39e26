"""Timing: every kind of file, interleaved, with stable JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eexform.backends.export import export
from eexform.errors import DataError, ModelError, OptionError
from eexform.ir.serialize import save
from eexform.verification.bench import bench, runner
from tests import zoo
from tests.lowering import nets


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    graph = nets.with_exits("resnet", 2)
    save(nets.trunk("resnet"), folder / "trunk.onnx")
    export(graph, folder / "if.onnx", "if")
    export(graph, folder / "input.onnx", "if", thresholds_as_input=True)
    export(graph, folder / "stages", "stages")
    return [folder / name for name in ("trunk.onnx", "if.onnx", "input.onnx", "stages")]


def test_results(files):
    told = []
    timings = bench(
        files, zoo.feeds("resnet", 8), batches=(1, 4), repeats=1, warmup=1, min_batches=10,
        progress=lambda *args: told.append(args),
    )  # fmt: skip
    plain = json.loads(json.dumps(timings.to_json()))
    assert [(row["file"], row["batch"]) for row in plain["results"]] == [(str(f), b) for b in (1, 4) for f in files]
    for row in plain["results"]:
        assert {"file", "batch", "threads", "median_ms", "mean_ms", "p95_ms"} <= set(row)
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["count"] == 10
    assert told == [("batch 1", 10, 10), ("batch 4", 10, 10)]
    assert timings.ratio(str(files[0]), str(files[0]), 1) == 1.0


def test_more_samples_than_needed_and_fewer(files):
    timings = bench(files[:1], zoo.feeds("resnet", 6), batches=(1, 32), repeats=2, min_batches=1, max_batches=5)
    assert [row.count for row in timings.results] == [5, 2]


def test_runners_take_what_they_need(files):
    feeds = {**zoo.feeds("resnet", 2), "other": np.zeros((2, 1), np.float32)}
    for file in files:
        assert runner(file)(feeds) is not None


def test_errors(files, tmp_path):
    feeds = zoo.feeds("resnet", 2)
    with pytest.raises(OptionError, match="at least one file"):
        bench([], feeds)
    with pytest.raises(OptionError, match="at least 1"):
        bench(files, feeds, batches=(0,))
    with pytest.raises(DataError, match="at least one"):
        bench(files, {"image": np.zeros((0, 3, 16, 16), np.float32)})
    with pytest.raises(DataError, match="no input 'image'"):
        bench(files[:1], {"picture": np.zeros((2, 3, 16, 16), np.float32)})
    with pytest.raises(ModelError, match="no such file"):
        bench([tmp_path / "nothing.onnx"], feeds)


def test_every_runner_names_its_file(files):
    for file in files:
        with pytest.raises(DataError, match=f"{file.name}: the samples have no input 'image'"):
            runner(file)({"picture": np.zeros((1, 3, 16, 16), np.float32)})
