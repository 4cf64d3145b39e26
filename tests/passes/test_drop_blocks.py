"""drop_blocks: by name, by the change of the output, replayed without samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from eexform.backends import ort
from eexform.errors import GraphError, OptionError, PassError
from eexform.frontends.onnx import from_model
from eexform.ir.arithmetic import node_macs
from eexform.ir.blocks import find_blocks
from eexform.ir.graph import Graph
from eexform.passes import PassContext, Pipeline, Recipe, make
from eexform.pruning.block_change import Output
from tests import zoo
from tests.passes.helpers import CHAIN, assert_same_outputs, graph_of

BEFORE = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N, 3, 6, 6] image) => (float[N, 3] scores)
<float[3, 3, 3, 3] w1, float[3, 3, 3, 3] w2, float[3, 3, 3, 3] w3, float[3, 3] w>
{
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
    [relu1] r1 = Relu(c1)
    [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)
    [relu2] r2 = Relu(c2)
    [conv3] c3 = Conv<pads = [1, 1, 1, 1]>(r2, w3)
    [add1] a1 = Add(c3, r1)
    [relu3] r3 = Relu(a1)
    [pool] p = GlobalAveragePool(r3)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w)
}
"""

AFTER = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N, 3, 6, 6] image) => (float[N, 3] scores)
<float[3, 3, 3, 3] w1, float[3, 3] w>
{
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
    [relu1] r1 = Relu(c1)
    [pool] p = GlobalAveragePool(r1)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w)
}
"""


@dataclass(frozen=True)
class Samples:
    """Random inputs for a zoo network."""

    name: str
    size: int = 24
    digest: str = "random"

    def batches(self, batch_size: int) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray | None]]:
        feeds = zoo.feeds(self.name, self.size, seed=5)
        for start in range(0, self.size, batch_size):
            yield {name: array[start : start + batch_size] for name, array in feeds.items()}, None


def weakened(name: str, block: str, factor: float = 1e-3) -> Graph:
    """A zoo network one of whose blocks gives next to nothing."""
    graph = from_model(zoo.build(name)).copy()
    add = next(node for node in graph.nodes if node.outputs[0].name == block)
    entry = find_blocks(graph).block(block).entry
    last = next(tensor for tensor in add.inputs if tensor.name != entry).inputs[0]
    for tensor in last.inputs[1:3]:
        tensor.values = (tensor.values * factor).astype(np.float32)
    return graph


def test_before_and_after() -> None:
    before = graph_of(BEFORE)
    result = make("drop_blocks", blocks=["a1"])(before)
    after = graph_of(AFTER, arrays={name: before.constants[name].values for name in ("w1", "w")})
    assert result.graph.digest == after.digest
    assert_same_outputs(after, result.graph)
    assert result.replay is None, "it is settled as it is"
    assert result.notes == ("left out the branch from r1 to a1: 4 nodes, 5,832 MACs",)


@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_the_one_that_changes_least_goes_first(name: str) -> None:
    blocks = find_blocks(from_model(zoo.build(name))).names
    for weak in blocks[1:3]:
        graph = weakened(name, weak) if name == "resnet" else from_model(zoo.build(name))
        result = make("drop_blocks", count=1)(graph, PassContext(samples=Samples(name)))
        (settled,) = result.replay or ()
        if name == "resnet":
            assert settled.blocks == (weak,)
        changes = {skip.where: skip.why for skip in result.skipped}
        assert set(blocks) - set(settled.blocks) <= set(changes)
        assert (
            "others change the output less (KL divergence"
            in changes[next(b for b in blocks if b not in settled.blocks)]
        )
        assert settled(graph).graph.digest == result.graph.digest, "the replay needs no samples"


def test_the_change_by_hand() -> None:
    graph = weakened("resnet", "add_2", 0.5)
    samples = Samples("resnet")
    variant = make("drop_blocks", blocks=["add_2"])(graph).graph
    change = Output(graph, samples, 16).change(variant)
    feeds = {"image": zoo.feeds("resnet", 24, seed=5)["image"][:16]}
    before, after = (ort.run(ort.session(each), feeds)["logits"].astype(np.float64) for each in (graph, variant))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (before, after))
    assert change.divergence == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-3)
    assert change.distance == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-4)
    same = Output(graph, samples, 16).change(graph)
    assert (same.divergence, same.distance) == (0.0, 0.0)


def macs(graph: Graph) -> int:
    return sum(node_macs(node, graph.types) or 0 for node in graph.nodes)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_share_of_the_work(share: float, greedy: bool) -> None:
    graph = from_model(zoo.build("resnet"))
    result = make("drop_blocks", share=share, samples=8, greedy=greedy)(graph, PassContext(samples=Samples("resnet")))
    assert macs(result.graph) <= (1 - share) * macs(graph)
    assert len(result.notes) == {0.1: 1, 0.3: 2, 0.5: 3}[share], "no more than it takes"


OVERLAPPING = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N, 8, 6, 6] image) => (float[N, 3] scores)
<float[8, 8, 3, 3] w0, float[16, 8, 3, 3] w1, float[8, 16, 3, 3] w2, float[16, 8, 3, 3] w3, float[3, 16] w>
{
    [conv0] z0 = Conv<pads = [1, 1, 1, 1]>(image, w0)
    [conv1] z1 = Conv<pads = [1, 1, 1, 1]>(z0, w1)
    [conv2] z2 = Conv<pads = [1, 1, 1, 1]>(z1, w2)
    [conv3] z3 = Conv<pads = [1, 1, 1, 1]>(z2, w3)
    [pool] p = GlobalAveragePool(z3)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w)
}
"""


@dataclass(frozen=True)
class Images:
    """Random inputs for the network above."""

    size: int = 8
    digest: str = "images"

    def batches(self, batch_size: int) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray | None]]:
        yield {"image": np.random.default_rng(0).normal(size=(self.size, 8, 6, 6)).astype(np.float32)}, None


def test_of_two_stretches_that_overlap_one_goes() -> None:
    """Conv 1 and 2 lead from z0 to z2, conv 2 and 3 from z1 to z3: without both, conv 1 or 3 would have to stay."""
    graph = graph_of(OVERLAPPING)
    assert {"z2", "z3"} <= {block.name for block in find_blocks(graph).blocks}
    result = make("drop_blocks", share=0.95)(graph, PassContext(samples=Images()))
    (settled,) = result.replay or ()
    assert {"z2", "z3"} & set(settled.blocks) in ({"z2"}, {"z3"})  # type: ignore[attr-defined]
    gone = {node.name for node in graph.nodes} - {node.name for node in result.graph.nodes}
    spared = sum(node_macs(node, graph.types) or 0 for node in graph.nodes if node.name in gone)
    assert macs(result.graph) == macs(graph) - spared


def test_names_and_count_together_and_too_many() -> None:
    graph = from_model(zoo.build("preact"))
    context = PassContext(samples=Samples("preact"))
    result = make("drop_blocks", blocks=["add_2"], count=1)(graph, context)
    (settled,) = result.replay or ()
    assert "add_2" in settled.blocks
    assert len(settled.blocks) == 2
    every = make("drop_blocks", count=9)(graph, context)
    assert len(every.notes) == 3
    assert every.skipped[0].why == "no block is left to go after 3"


def test_in_a_recipe() -> None:
    graph = from_model(zoo.build("resnet"))
    recipe = Recipe.of([make("drop_blocks", blocks=["add_4", "add_1"]), make("fold_batch_norm")])
    again = Recipe.parse(recipe.to_plain())
    assert Pipeline(again.passes())(graph).graph.digest == Pipeline(recipe.passes())(graph).graph.digest
    domain = make("drop_blocks").space(graph, PassContext())["blocks"]
    assert domain.validate(["add_4", "add_1"], "blocks") == ("add_1", "add_4")


def test_blocks_whose_shapes_differ_are_named_with_the_reason() -> None:
    graph = from_model(zoo.build("resnet"))
    result = make("drop_blocks")(graph)
    assert result.graph is graph
    why = {skip.where: skip.why for skip in result.skipped}
    assert why["graph"] == "no blocks were chosen"
    assert "changes the shape" in why["add_3"]
    with pytest.raises(GraphError, match="no block that could be left out ends at 'add_3': a layer on its shortcut"):
        make("drop_blocks", blocks=["add_3"])(graph)
    nothing = make("drop_blocks", count=1)(from_model(zoo.build("densenet")), PassContext(samples=Samples("densenet")))
    assert {"it has no block that could be left out", "no block is left to go after 0"} <= {
        skip.why for skip in nothing.skipped
    }


def test_what_is_missing_is_said() -> None:
    graph = from_model(zoo.build("resnet"))
    with pytest.raises(PassError, match="count and share need samples"):
        make("drop_blocks", count=1)(graph)
    with pytest.raises(GraphError, match=r"no block 'add1': did you mean"):
        make("drop_blocks", blocks=["add1"])(graph)
    insert = make("insert_exits", sites=["r1"], heads={"r1": "none/avg"}, thresholds={"r1": 0.5}, untrained=True)
    with pytest.raises(PassError, match="before insert_exits"):
        make("drop_blocks", count=1)(insert(graph_of(CHAIN)).graph)
    for wrong in ({"count": -1}, {"share": 1.5}, {"samples": 0}, {"blocks": ["a", "a"]}):
        with pytest.raises(OptionError):
            make("drop_blocks", **wrong)
