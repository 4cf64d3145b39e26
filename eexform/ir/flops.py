"""Floating-point operations (FLOPs) of one ONNX node, for one sample.

Conventions:

* A multiply-accumulate is 2 operations (the count is :func:`~eexform.ir.arithmetic.node_macs`'); a bias is 1 more per
  output element. 2 per multiply-accumulate is what torch's ``FlopCounterMode`` counts, too, and all it counts.
* Every other addition, multiplication, division, comparison, rounding and elementary function (exp, log, erf, tanh,
  power, root, sine) is 1 operation, however long a processor takes over it. Formulas follow the operator's definition;
  softmax and its kin subtract the maximum first. What is computed from attributes and parameters alone, such as the
  factors of a batch normalisation or the real numbers of quantised weights, happens once and counts 0.
* Selecting, moving, converting, bit-wise work and drawing random numbers count 0.
* Numbers are floating-point numbers and the integers of 8 bits or less that stand for them in a quantised network.
  Element-wise arithmetic on wider integers and booleans (shapes, indices, masks) is none of these: 0.
* The batch counts as 1; padding counts as data; a window at the border as a full one; sequences have full length.
* Operators without a rule, or in a mode where the work depends on the data, give ``None``, never 0.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from eexform.ir.arithmetic import MICROSOFT, Bindings, NodeSizes, Types
from eexform.ir.elements import bits, dtype_of, is_float
from eexform.ir.flop_fused import MICROSOFT_RULES, ZERO_FLOPS_MICROSOFT
from eexform.ir.flop_layers import LAYER_RULES
from eexform.ir.flop_rules import FLOP_RULES, ZERO_FLOPS


def node_flops(node: gs.Node, types: Types, bindings: Bindings | None = None) -> int | None:
    """Floating-point operations of one node for one sample; ``None`` where there is no rule for its operator.

    Args:
        node: the node.
        types: type of every value it reads and writes (``Graph.types``).
        bindings: sizes of symbolic dimensions other than the batch.

    Raises:
        GraphError: a shape that the count needs is unknown, or holds a symbol without a binding.
    """
    sizes = NodeSizes(node, types, bindings)
    if node.domain == MICROSOFT:
        fused = MICROSOFT_RULES.get(node.op)
        return fused(sizes) if fused is not None else 0 if node.op in ZERO_FLOPS_MICROSOFT else None
    if node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op in ZERO_FLOPS:
        return 0
    layer = LAYER_RULES.get(node.op)
    if layer is not None:
        return layer(sizes)
    rule = FLOP_RULES.get(node.op)
    if rule is None:
        return None
    return rule(sizes) if _on_numbers(node, types) and not _on_parameters_alone(node) else 0


def _on_numbers(node: gs.Node, types: Types) -> bool:
    """Whether the node reads or writes numbers in the sense of this module; what is not known is taken to be some."""
    for tensor in (*node.inputs[:1], *node.outputs[:1]):
        if isinstance(tensor, gs.Constant):
            dtype = dtype_of(tensor.dtype)
        else:
            found = types.get(tensor.name)
            dtype = None if found is None else found.dtype
        if dtype is None or is_float(dtype) or (dtype.kind != "b" and 0 < bits(dtype) <= 8):
            return True
    return False


def _on_parameters_alone(node: gs.Node) -> bool:
    """Whether a node reads nothing but constants: a runtime computes it once, when the model is loaded."""
    return bool(node.inputs) and all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in node.inputs)
