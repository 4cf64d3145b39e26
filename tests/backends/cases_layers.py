"""Random normalisation, products, recurrent layers, attention and quantisation (see ``random_ops``)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.backends.random_ops import BATCHES, Case, Draw

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
FUNCTIONS = ["Relu", "Tanh", "Sigmoid", "LeakyRelu", "HardSigmoid", "Elu", "Softsign", "Softplus", "ThresholdedRelu",
             "Affine", "ScaledTanh"]  # fmt: skip


def batch_norm(draw: Draw) -> Case:
    channels = draw.number(1, 4)
    value = draw.weights(draw.pick(BATCHES), channels, *draw.numbers(draw.number(0, 3), 1, 4))
    operands = [value, *(draw.weights(channels) for _ in range(3)), np.abs(draw.weights(channels)) + 0.1]
    return Case("BatchNormalization", operands, {"epsilon": draw.pick([1e-5, 1e-3]), "momentum": 0.8})


def instance_norm(draw: Draw) -> Case:
    channels = draw.number(1, 4)
    value = draw.weights(draw.pick(BATCHES), channels, *draw.numbers(draw.number(1, 3), 1, 4))
    operands = [value, draw.weights(channels), draw.weights(channels)]
    return Case("InstanceNormalization", operands, {"epsilon": draw.pick([1e-5, 1e-2])}, loose=20)


def group_norm(draw: Draw) -> Case:
    groups, each, old = draw.number(1, 3), draw.number(1, 3), draw.flag()
    value = draw.weights(draw.pick(BATCHES), groups * each, *draw.numbers(draw.number(1, 3), 1, 4))
    scale, bias = (draw.weights(groups if old else groups * each) for _ in range(2))
    attrs = {"num_groups": groups, "epsilon": draw.pick([1e-5, 1e-2])}
    return Case("GroupNormalization", [value, scale, bias], attrs, opset=18 if old else 21, loose=20)


def layer_norm(draw: Draw) -> Case:
    value = draw.array(draw.shape(2, 4), ["float32"])
    axis = draw.pick([axis for axis in range(-value.ndim, value.ndim) if axis % value.ndim])
    outputs = draw.pick([1, 1, 2, 3])
    sizes = value.shape[axis:]
    if outputs == 1 and draw.number(0, 3) == 0:
        sizes = (1,) * len(sizes)
    operands = [value, draw.weights(*sizes), *([draw.weights(*sizes)] if draw.flag() else [])]
    return Case("LayerNormalization", operands, {"axis": axis, "epsilon": 1e-3}, outputs, loose=20)


def rms_norm(draw: Draw) -> Case:
    value = draw.array(draw.shape(2, 4), ["float32"])
    axis = draw.pick([axis for axis in range(-value.ndim, value.ndim) if axis % value.ndim])
    operands = [value, draw.weights(*value.shape[axis:])]
    return Case("RMSNormalization", operands, {"axis": axis, "epsilon": 1e-3}, opset=23)


def local_response(draw: Draw) -> Case:
    value = draw.array(draw.shape(3, 4), ["float32"])
    attrs = {"size": draw.pick([1, 3, 5]), "alpha": 0.1, "beta": draw.pick([0.5, 0.75]), "bias": draw.pick([1.0, 2.0])}
    return Case("LRN", [value], attrs)


def other_norm(draw: Draw) -> Case:
    value = draw.array((draw.pick([1, 2, 7]), *draw.numbers(3, 2, 4)), ["float32"])
    if draw.flag():
        value = value[:, :1] * 0 if draw.flag() else value
        return Case("LpNormalization", [value], {"axis": draw.axis(4), "p": draw.number(1, 2)})
    axes = sorted({0, *(axis % 4 for axis in draw.axes(4).tolist())}) if draw.flag() else None
    return Case("MeanVarianceNormalization", [value], {} if axes is None else {"axes": axes}, loose=100)


def gemm(draw: Draw) -> Case:
    rows, inner, columns = draw.pick(BATCHES), draw.number(1, 4), draw.number(1, 4)
    left, right, kind = draw.flag(), draw.flag(), draw.pick([np.float32, np.float64])
    a = draw.weights(*((inner, rows) if left else (rows, inner)), kind=kind)
    b = draw.weights(*((columns, inner) if right else (inner, columns)), kind=kind)
    attrs = {"transA": int(left), "transB": int(right)}
    attrs |= {"alpha": draw.pick([0.0, 0.5, 1.0]), "beta": draw.pick([0.0, 0.5, 1.0])} if draw.flag() else {}
    shapes = [(), (1,), (columns,), (1, columns), (1, 1), (rows, 1), (rows, columns)]
    operands = [a, b, *([draw.weights(*draw.pick(shapes), kind=kind)] if draw.flag() else [])]
    return Case("Gemm", operands, attrs)


def matmul(draw: Draw) -> Case:
    inner, outer = draw.number(1, 4), tuple(draw.numbers(draw.number(0, 2), 1, 3))
    left = (*draw.broadcast(outer), *draw.pick([(), (draw.number(1, 3),)]), inner)
    right = (inner,) if draw.flag() else (*draw.broadcast(outer), inner, draw.number(1, 3))
    kind = draw.pick(["float32", "float64", "int32", "int64"])
    return Case("MatMul", [draw.array(left, [kind]), draw.array(right, [kind])])


def einsum(draw: Draw) -> Case:
    equation, *ranks = draw.pick([
        ("ij,jk->ik", "ij", "jk"), ("bij,bjk->bik", "bij", "bjk"), ("bhid,bhjd->bhij", "bhid", "bhjd"),
        ("ij->ji", "ij"), ("ij->", "ij"), ("i,j->ij", "i", "j"), ("ij,ij", "ij", "ij"), ("ii->i", "ii"),
        ("ii", "ii"), ("b i d, d e -> b i e", "bid", "de"), ("...ij,...jk->...ik", "bij", "bjk"),
        ("ji", "ij"), ("bij,bjk,kl->bil", "bij", "bjk", "kl"),
    ])  # fmt: skip
    sizes = {letter: draw.number(1, 4) for letter in "bcdehijkl"}
    arrays = [draw.weights(*(sizes[letter] for letter in rank)) for rank in ranks]
    return Case("Einsum", arrays, {"equation": equation})


def recurrent(draw: Draw) -> Case:
    kind, direction = draw.pick(GATES), draw.pick(["forward", "reverse", "bidirectional"])
    steps, batch, inputs, hidden = draw.number(1, 4), draw.pick([1, 2, 7]), draw.number(1, 3), draw.number(1, 3)
    directions, gates = 2 if direction == "bidirectional" else 1, GATES[kind]
    lengths = np.asarray(draw.random.integers(1, steps + 1, batch), np.int32) if draw.flag() else None
    operands = [
        draw.weights(steps, batch, inputs),
        draw.weights(directions, gates * hidden, inputs),
        draw.weights(directions, gates * hidden, hidden),
        draw.weights(directions, 2 * gates * hidden) if draw.flag() else None,
        lengths,
        draw.weights(directions, batch, hidden) if draw.flag() else None,
    ]
    if kind == "LSTM":
        operands.append(draw.weights(directions, batch, hidden) if draw.flag() else None)
        operands.append(draw.weights(directions, 3 * hidden) if draw.flag() else None)
    while operands[-1] is None:
        operands.pop()
    attrs: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if draw.flag():
        count = directions * {"RNN": 1, "GRU": 2, "LSTM": 3}[kind]
        given = draw.flag()  # onnxruntime has other defaults, or none, for some
        names = FUNCTIONS if given else FUNCTIONS[:-3]
        attrs["activations"] = [draw.pick(names) for _ in range(count)]
        if given:
            takes_alpha = ("LeakyRelu", "ThresholdedRelu", "HardSigmoid", "Elu", "Affine", "ScaledTanh")
            alphas = [0.3 for name in attrs["activations"] if name in takes_alpha]
            betas = [0.4 for name in attrs["activations"] if name in ("HardSigmoid", "Affine", "ScaledTanh")]
            attrs |= {"activation_alpha": alphas} if alphas else {}
            attrs |= {"activation_beta": betas} if betas else {}
    if kind == "GRU":
        attrs["linear_before_reset"] = draw.number(0, 1)
    if draw.number(0, 3) == 0:
        attrs["clip"] = 0.5
    if kind == "LSTM" and draw.number(0, 3) == 0:
        attrs["input_forget"] = 1
    return Case(kind, operands, attrs, 3 if kind == "LSTM" else 2, loose=20)


def attention(draw: Draw) -> Case:
    batch, heads, shared, size = draw.pick([1, 2, 7]), draw.number(1, 2), draw.number(1, 2), draw.pick([2, 4])
    queries, keys, width = draw.number(1, 4), draw.number(1, 4), draw.pick([2, 4])
    attrs: dict[str, Any] = {"is_causal": draw.number(0, 1)}
    if draw.flag():
        attrs["scale"] = 0.3
    if draw.flag():
        attrs["softcap"] = 2.0
    shapes = [(heads * shared, queries, size), (heads, keys, size), (heads, keys, width)]
    if draw.flag():
        attrs |= {"q_num_heads": heads * shared, "kv_num_heads": heads}
        parts = [draw.weights(batch, shape[1], shape[0] * shape[2]) for shape in shapes]
    else:
        parts = [draw.weights(batch, *shape) for shape in shapes]
    mask_shape = draw.pick([(queries, keys), (batch, 1, queries, keys), (1, heads * shared, queries, keys)])
    mask = draw.pick([None, np.float32, bool])
    if mask is bool:
        held = draw.random.random(mask_shape) < 0.7
        held[..., 0] = True
        parts.append(held)
    elif mask is not None:
        parts.append(draw.weights(*mask_shape))
    return Case("Attention", parts, attrs, opset=23, loose=10)


def quantize(draw: Draw) -> Case:
    value, axis, scale, block, zero = _scaled(draw, draw.pick(["float32"]))
    attrs = {"axis": axis} | ({"block_size": block} if block else {})
    operands = [value, scale, *([zero] if draw.flag() else [])]
    return Case("QuantizeLinear", operands, attrs)


def dequantize(draw: Draw) -> Case:
    value, axis, scale, block, zero = _scaled(draw, draw.pick(["int8", "uint8", "int16", "uint16"]))
    zero = np.asarray(zero, value.dtype)
    attrs = {"axis": axis} | ({"block_size": block} if block else {})
    operands = [value, scale, *([zero] if draw.flag() else [])]
    return Case("DequantizeLinear", operands, attrs)


def _scaled(draw: Draw, kind: str) -> tuple[np.ndarray, int, np.ndarray, int, np.ndarray]:
    """A value, an axis, scales for the whole, per place of the axis, or per block of it; its length; zero points."""
    value = draw.array(draw.shape(2, 3), [kind])
    value = np.asarray(value * (40 if kind == "float32" else 7), kind)
    axis, form = draw.axis(value.ndim), draw.pick(["whole", "axis", "block"])
    if form == "block" and axis % value.ndim == 0:
        form = "axis"
    block = draw.number(1, value.shape[axis]) if form == "block" else 0
    sizes: tuple[int, ...] = ()
    if form == "axis":
        sizes = (value.shape[axis],)
    if form == "block":
        blocks = [-(-size // block) if place == axis % value.ndim else size for place, size in enumerate(value.shape)]
        sizes = tuple(blocks)
    scale = np.asarray(draw.random.uniform(0.05, 1, sizes), np.float32)
    zero = np.asarray(draw.random.integers(0, 20, sizes), draw.pick([np.int8, np.uint8, np.int16, np.uint16]))
    return value, axis, scale, block, zero


def integer_products(draw: Draw) -> Case:
    kinds = draw.pick(["uint8", "int8"]), draw.pick(["uint8", "int8"])
    rows, inner, columns = draw.pick([1, 2, 7]), draw.number(1, 4), draw.number(1, 3)
    value, weight = draw.array((rows, inner), [kinds[0]]), draw.array((inner, columns), [kinds[1]])
    zeros = [np.asarray(draw.random.integers(0, 5, draw.pick([(), (1,)])), kinds[0]),
             np.asarray(draw.random.integers(0, 5, draw.pick([(), (columns,)])), kinds[1])]  # fmt: skip
    return Case("MatMulInteger", [value, weight, *zeros[: draw.number(0, 2)]])


def integer_conv(draw: Draw) -> Case:
    value = draw.array((draw.pick([1, 2, 7]), 2, 5, 4), ["uint8"])
    kernel, outputs = draw.numbers(2, 1, 3), draw.number(1, 3)
    weight = draw.array((outputs, 2, *kernel), ["uint8"])
    attrs: dict[str, Any] = {"strides": draw.numbers(2, 1, 2)}
    if draw.flag():
        attrs["pads"] = [draw.number(0, size - 1) for size in kernel * 2]
    elif draw.flag():
        attrs["auto_pad"] = draw.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])
    zeros = [np.array(draw.number(0, 5), np.uint8), np.array(draw.number(0, 5), np.uint8)]
    if draw.flag():
        return Case("ConvInteger", [value, weight, *zeros[: draw.number(0, 2)]], attrs)
    scales = [np.asarray(scale, np.float32) for scale in draw.random.uniform(0.1, 0.5, 3)]
    bias = [np.asarray(draw.random.integers(-20, 20, outputs), np.int32)] if draw.flag() else []
    end = np.array(draw.number(0, 100), np.uint8)
    operands = [value, scales[0], zeros[0], weight, scales[1], zeros[1], scales[2], end, *bias]
    return Case("QLinearConv", operands, attrs)


LAYERS = [
    batch_norm, instance_norm, group_norm, layer_norm, rms_norm, local_response, other_norm, gemm, matmul, einsum,
    recurrent, attention, quantize, dequantize, integer_products, integer_conv,
]  # fmt: skip
