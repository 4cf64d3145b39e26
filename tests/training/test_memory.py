"""Memory while heads train: the same for any number of samples, and within what is announced."""

from __future__ import annotations

import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from eexform.data import Dataset
from eexform.data.dataset import Batch
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.training import TrainOptions, memory, step_memory, trainer
from tests import tiny
from tests.training import support

OPTIONS = TrainOptions(epochs=1, batch_size=32)


def entries(graph: Graph, *heads: str) -> list[tuple[int, Any, HeadSpec]]:
    return [(place, site, HeadSpec.parse(head)) for place, site in enumerate(find_sites(graph).sites) for head in heads]


def bound(graph: Graph, *heads: str, batch: int = 32) -> int:
    return step_memory(graph, find_sites(graph).sites, entries(graph, *heads), batch)


def test_peak_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Everything numpy holds, which is all but the heads themselves; the samples are there before."""
    graph = tiny.trained()
    peaks: dict[int, int] = {}
    # the least of several: how far the threads run ahead of each other is luck, and the first run warms up
    for place, count in enumerate((600, 600, 600, 1797, 1797, 1797)):
        data = tiny.digits(count)
        folder = tmp_path / f"{count}-{place}"
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        _, report = support.train(folder, graph, data, options=replace(OPTIONS, batch_size=64))
        peak = tracemalloc.get_traced_memory()[1] - before
        peaks[count] = min(peak, peaks.get(count, peak))
        tracemalloc.stop()
    labels_and_order = 3 * 8 * 1797
    # three times the samples would be three times as much
    assert peaks[1797] < 1.4 * peaks[600] + labels_and_order
    assert peaks[1797] < report.memory_bytes


@pytest.mark.parametrize("count", [200, 1700])
def test_batches_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Never more than the bound allows for, however many there are."""
    alive: weakref.WeakSet[Batch] = weakref.WeakSet()
    most = made = 0
    batch = Dataset.batch

    def counted(self: Dataset, *args: Any, **kwargs: Any) -> Batch:
        nonlocal most, made
        result = batch(self, *args, **kwargs)
        alive.add(result)
        most, made = max(most, len(alive)), made + 1
        return result

    monkeypatch.setattr(Dataset, "batch", counted)
    # by identity: batches hold arrays, which have no truth value
    monkeypatch.setattr(Batch, "__hash__", object.__hash__)
    monkeypatch.setattr(Batch, "__eq__", object.__eq__)
    support.train(tmp_path, tiny.trained(), tiny.digits(count), options=OPTIONS)
    assert made > 1.5 * count / 32
    assert most <= memory.INPUTS - 2  # of one batch under preparation two forms


def test_bound_grows_with_batch_and_heads_and_not_with_the_data() -> None:
    graph = tiny.trained()
    small, large = bound(graph, "none/avg", batch=32), bound(graph, "none/avg", batch=64)
    assert large == pytest.approx(2 * small, rel=0.1)
    one, two = bound(graph, "conv:1x8/avg"), bound(graph, "conv:1x8/avg", "conv:2x8/avg")
    assert small < one < two
    assert step_memory(graph, (), [], 32) < small


def test_a_wide_head_counts_for_what_it_holds() -> None:
    """64 channels on a site of 4: sixteen times the site, before and after normalisation and after the ReLU."""
    graph = tiny.network()
    site = find_sites(graph).sites[0]
    wide = HeadSpec.parse("conv:1x64/avg")
    assert site.shape == (4, 8, 8)
    without = step_memory(graph, (site,), [(0, site, HeadSpec.parse("none/avg"))], 1)
    found = step_memory(graph, (site,), [(0, site, wide)], 1)
    assert found - without >= 2 * 3 * 64 * 8 * 8 * 4


def test_the_trunk_counts_where_it_is_widest() -> None:
    """[N, 1, 8, 8] -> 32 channels -> 32 channels -> scores: two maps of 32 channels live at once, none is a site."""
    image = gs.Variable("image", np.dtype(np.float32), ["N", 1, 8, 8])
    values = [image]
    draft = gs.Graph(inputs=[image], opset=17)
    rng = np.random.default_rng(0)
    for place, (channels, width) in enumerate([(1, 32), (32, 32)]):
        weight = gs.Constant(f"w{place}", rng.standard_normal((width, channels, 1, 1)).astype(np.float32))
        values.append(gs.Variable(f"v{place}", np.dtype(np.float32), ["N", width, 8, 8]))
        draft.nodes.append(gs.Node("Conv", f"conv{place}", inputs=[values[-2], weight], outputs=[values[-1]]))
    for place, (op, shape) in enumerate([("GlobalAveragePool", [32, 1, 1]), ("Flatten", [32])]):
        values.append(gs.Variable(f"t{place}", np.dtype(np.float32), ["N", *shape]))
        draft.nodes.append(gs.Node(op, f"n{place}", inputs=[values[-2]], outputs=[values[-1]]))
    draft.outputs = [values[-1]]
    graph = Graph(draft)
    size, map_ = 8 * 8 * 4, 32 * 8 * 8 * 4
    expected = memory.INPUTS * size + memory.VALUES * 32 * 4 + 2 * map_
    assert step_memory(graph, (), [], 1) == expected
    assert step_memory(graph, (), [], 10) == 10 * expected


def test_a_small_batch_is_kept_where_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = trainer.ort.run

    def measured(session: Any, feeds: Any, *args: Any) -> Any:
        sizes.extend(len(array) for array in feeds.values())
        return run(session, feeds, *args)

    monkeypatch.setattr(trainer.ort, "run", measured)
    support.train(tmp_path / "8", tiny.trained(), tiny.digits(200), options=replace(OPTIONS, batch_size=8))
    assert max(sizes) == 8
    sizes.clear()
    support.train(tmp_path / "512", tiny.trained(), tiny.digits(1700), options=replace(OPTIONS, batch_size=512))
    assert sorted(set(sizes), reverse=True)[:2] == [512, trainer.EVALUATION_BATCH]
