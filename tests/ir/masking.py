"""What a cut must equal: the whole graph, in which nobody reads a position that was cut.

The masked graph keeps all its weights. In front of every operator that mixes positions of an axis (a contraction, a
sum) the positions that were cut are put to zero; where an operator counts or compares positions (a mean, a softmax, a
layer normalisation) the statistic is taken over those that are left. Everything else works position by position, so
what it makes of positions that were cut does not matter. The rules of :mod:`eexform.ir.coupling` take no part in this:
only which axis an operator mixes is known here, so a wrong index map shows as a difference.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from eexform.backends import ort
from eexform.cost_models.macs import Macs
from eexform.cost_models.params import Params
from eexform.ir.checks import check
from eexform.ir.coupling import Cut, Slot, positions_of
from eexform.ir.cut import Cuts, cut, kept_positions, kept_since, predicted
from eexform.ir.emit import Emitter
from eexform.ir.graph import BATCH, Graph
from eexform.ir.inference import infer_types, split_dim
from eexform.ir.serialize import to_model

FAR = 1e30
"""Below everything that a softmax or a maximum compares."""

_CONTRACTIONS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
_CONTRACTIONS |= {"LpNormalization", "Attention", "MultiHeadAttention", "GRU", "LSTM", "RNN"}
_RECURRENT = {"GRU", "LSTM", "RNN"}
_COMPARING = {"Softmax", "LogSoftmax", "ReduceMax", "ReduceLogSumExp"}


class Masker:
    """Builds the masked graph of a cut."""

    def __init__(self, graph: Graph, kept: Mapping[Slot, np.ndarray]) -> None:
        self.graph = graph
        self.kept = kept
        self.draft = graph.copy().gs
        self.emitter = Emitter(self.draft, "masked.")

    def masked(self) -> Graph:
        nodes = list(self.draft.nodes)
        self.draft.nodes.clear()
        for node in nodes:
            rule = getattr(self, "_" + node.op.lower(), None)
            if node.op in _CONTRACTIONS:
                for place, tensor in enumerate(node.inputs):
                    node.inputs[place] = self.mask(tensor)
                if node.op in _RECURRENT:
                    self._recurrent(node)
            elif node.op in _COMPARING:
                node.inputs[0] = self.mask(node.inputs[0], -FAR)
            elif rule is not None and rule(node):
                continue
            self.draft.nodes.append(node)
        return self.graph.replace(self.draft)

    # -- masks ---------------------------------------------------------------------------------------------------------

    def cut_axes(self, tensor: gs.Tensor) -> list[int]:
        rank = len(self.graph.types[tensor.name].shape or ()) if tensor.name in self.graph.types else 0
        return [axis for axis in range(rank) if Slot(tensor.name, axis) in self.kept]

    def mask(self, tensor: gs.Tensor, fill: float = 0.0) -> gs.Tensor:
        """``tensor`` with ``fill`` at the positions that were cut."""
        if isinstance(tensor, gs.Constant):
            return tensor
        masked = tensor
        for axis in self.cut_axes(tensor):
            value = self.emitter.constant("fill", np.float32(fill))
            masked = self.emitter.node("Where", self.stays(tensor, axis), masked, value, dtype=np.float32)
        return masked

    def stays(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        """Which positions of an axis are left, in a shape that is broadcast to the tensor."""
        shape = self.graph.types[tensor.name].shape or ()
        size = positions_of(shape[axis])
        assert size is not None
        stays = np.zeros(size, bool)
        stays[self.kept[Slot(tensor.name, axis)]] = True
        mask = self.emitter.constant("stays", stays.reshape(-1, *[1] * (len(shape) - axis - 1)))
        if isinstance(shape[axis], int):
            return mask
        sizes = self.emitter.node("Shape", tensor, start=axis, end=axis + 1)  # "3*N": the same three for each sample
        times = self.emitter.node("Div", sizes, self.emitter.constant("size", [size]))
        ones = self.emitter.constant("ones", [1] * (len(shape) - axis - 1))
        return self.emitter.node("Tile", mask, self.emitter.node("Concat", times, ones, axis=0))

    def count(self, tensor: gs.Tensor, axes: list[int]) -> float:
        """Positions that are left of some axes, as a share of all."""
        share = 1.0
        for axis in axes:
            if Slot(tensor.name, axis) in self.kept:
                dim = positions_of((self.graph.types[tensor.name].shape or ())[axis])
                share *= len(self.kept[Slot(tensor.name, axis)]) / (dim or 1)
        return share

    def _recurrent(self, node: gs.Node) -> None:
        """Nobody reads a hidden unit that was cut at the next step: zeros in its column of R [D, gates*H, H]."""
        tensor = node.inputs[2]
        slot = Slot(tensor.name, 2)
        if isinstance(tensor, gs.Constant) and slot in self.kept:
            values = np.zeros_like(tensor.values)
            values[:, :, self.kept[slot]] = tensor.values[:, :, self.kept[slot]]
            node.inputs[2] = self.emitter.constant("recurrent", values)

    # -- operators that count ------------------------------------------------------------------------------------------

    def _reducemean(self, node: gs.Node) -> bool:
        """The mean of what is left: the mean with zeros, divided by the share that is left."""
        data = node.inputs[0]
        given = node.attrs.get("axes")
        if given is None and len(node.inputs) > 1:
            given = node.inputs[1].values.reshape(-1).tolist()
        rank = len(self.graph.types[data.name].shape or ())
        axes = [int(axis) % rank for axis in given] if given is not None else list(range(rank))
        share = self.count(data, axes)
        if share == 1.0:
            return False
        node.inputs[0] = self.mask(data)
        output = node.outputs[0]
        whole = gs.Variable(self.emitter.unique("mean"))
        node.outputs = [whole]
        self.draft.nodes.append(node)
        factor = self.emitter.constant("factor", np.float32(1 / share))
        self.draft.nodes.append(gs.Node("Mul", self.emitter.unique("mean"), {}, [whole, factor], [output]))
        return True

    def _layernormalization(self, node: gs.Node) -> bool:
        return self._normalised(node, centred=True)

    def _rmsnormalization(self, node: gs.Node) -> bool:
        return self._normalised(node, centred=False)

    def _normalised(self, node: gs.Node, *, centred: bool) -> bool:
        """Mean and mean square over what is left."""
        data, output = node.inputs[0], node.outputs[0]
        rank = len(self.graph.types[data.name].shape or ())
        axes = list(range(int(node.attrs.get("axis", -1)) % rank, rank))
        share = self.count(data, axes)
        if share == 1.0:
            return False
        node.outputs.clear()
        factor = self.emitter.constant("factor", np.float32(1 / share))

        def mean(value: gs.Tensor) -> gs.Tensor:
            return self.emitter.node("Mul", self.emitter.reduce("ReduceMean", value, axes, keepdims=True), factor)

        def masked(value: gs.Tensor) -> gs.Tensor:
            for axis in self.cut_axes(data):
                zero = self.emitter.constant("zero", np.float32(0))
                value = self.emitter.node("Where", self.stays(data, axis), value, zero, dtype=np.float32)
            return value

        left = masked(data)
        if centred:
            left = masked(self.emitter.node("Sub", left, mean(left)))
        spread = mean(self.emitter.node("Mul", left, left))
        epsilon = self.emitter.constant("epsilon", np.float32(node.attrs.get("epsilon", 1e-5)))
        scaled = self.emitter.node("Div", left, self.emitter.node("Sqrt", self.emitter.node("Add", spread, epsilon)))
        scaled = self.emitter.node("Mul", scaled, node.inputs[1])
        shift = node.inputs[2] if len(node.inputs) > 2 else self.emitter.constant("none", np.float32(0))
        self.draft.nodes.append(gs.Node("Add", self.emitter.unique("norm"), {}, [scaled, shift], [output]))
        return True


def masked(graph: Graph, cuts: Cuts) -> Graph:
    """``graph`` in which nobody reads what ``cuts`` removes."""
    return Masker(graph, kept_positions(graph, cuts)).masked()


def assert_cut(graph: Graph, cuts: Cuts, feeds: Mapping[str, np.ndarray], *, tolerance: float = 1e-5) -> Graph:
    """Cut, and hold the result to everything that is promised of it; gives it back.

    Every value of the cut graph equals that of the masked graph at the positions that are left, to ``tolerance`` of
    the largest number in it.
    """
    small = cut(graph, cuts)
    check(small)
    kept = kept_positions(graph, cuts)
    assert [node.name for node in small.nodes] == [node.name for node in graph.nodes]
    assert small.exits == graph.exits
    assert set(small.parameters()) == set(graph.parameters())
    _assert_types(graph, small, kept)
    _assert_metadata(graph, small, kept)
    bindings = dict.fromkeys(_symbols(graph), 16)
    figures = predicted(graph, cuts, bindings=bindings)
    assert figures == (Macs(bindings=bindings).cost(small).total, Params().cost(small).total), figures
    model = to_model(small)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    values = [
        tensor.name for node in graph.nodes for tensor in node.outputs if tensor.name and _floating(graph, tensor)
    ]
    whole = ort.tap(Masker(graph, kept).masked(), values)
    ours = ort.run(ort.session(ort.tap(small, values), optimize=False), feeds)
    expected = ort.run(ort.session(whole, optimize=False), feeds)
    for name in ours:
        wanted = expected[name]
        for slot, left in kept.items():
            if slot.value == name:
                dim = (graph.types[name].shape or ())[slot.axis]
                size = positions_of(dim) or 1
                times = wanted.shape[slot.axis] // size
                wanted = np.take(wanted, (np.arange(times)[:, None] * size + left).reshape(-1), axis=slot.axis)
        assert ours[name].shape == wanted.shape, (name, ours[name].shape, wanted.shape)
        scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
        worst = float(np.abs(ours[name] - wanted).max(initial=0.0))
        assert worst <= tolerance * scale, f"{name}: differs by {worst} of {scale}"
    optimised = ort.run(ort.session(small), feeds)
    for name, array in optimised.items():
        np.testing.assert_allclose(array, ours[name], rtol=1e-4, atol=1e-4)
    return small


def _symbols(graph: Graph) -> set[str]:
    dims = [dim for tensor in graph.gs.inputs for dim in tensor.shape or () if isinstance(dim, str)]
    return {split_dim(dim)[1] for dim in dims} - {BATCH}


def _floating(graph: Graph, tensor: gs.Tensor) -> bool:
    dtype = graph.types[tensor.name].dtype
    return dtype is not None and np.issubdtype(dtype, np.floating)


def _assert_types(graph: Graph, small: Graph, kept: Mapping[Slot, np.ndarray]) -> None:
    """Inference from the inputs alone finds the sizes that the cut intended."""
    state = Cut(graph, kept)
    found = infer_types(small)
    for value in graph.tensors:
        if value in found and value in graph.types and graph.types[value].shape is not None:
            if value in small.constants:
                assert tuple(small.constants[value].shape) == found[value].shape
            assert found[value].shape == state.shape(value), (value, found[value].shape, state.shape(value))


def _assert_metadata(graph: Graph, small: Graph, kept: Mapping[Slot, np.ndarray]) -> None:
    before, after = kept_since(graph), kept_since(small)
    assert set(after) == set(before) | set(kept)
    for slot, left in kept.items():
        np.testing.assert_array_equal(after[slot], before[slot][left] if slot in before else left)


def some(graph: Graph, share: float = 0.5, seed: int = 0, only: tuple[str, ...] | None = None) -> dict[str, list[int]]:
    """Random units of every prunable group, at least one of each."""
    rng = np.random.default_rng(seed)
    return {
        group.name: sorted(
            rng.choice(group.size, max(1, min(group.size - 1, round(group.size * share))), False).tolist()
        )
        for group in graph.groups.prunable
        if only is None or group.name in only
    }
