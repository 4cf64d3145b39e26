"""What the time of one executed operator depends on, read off its attributes and the shapes of its values.

Every rule gives *tokens* (what sizes cannot be interpolated across: window, strides, fused activation, pattern of axes)
and *sizes* (what time grows with). Sizes are chosen such that time grows with their product, to first order: that is
how a figure is scaled where a table has no neighbours. Axes of size 1 are left out and axes that behave alike are put
together, so that equal work gets equal sizes whatever the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eexform.cost_models._kernels import Class


@dataclass(frozen=True)
class Value:
    """A value at run time.

    Attributes:
        dtype: as numpy calls it.
        shape: with the batch.
        constant: whether it is a parameter.
        whole: the content of a short vector of whole numbers (axes, shapes), else ``None``.
        subnormal: whether numbers below the smallest normal one are in it: processors take many times longer for them.
        blocked: whether it is in onnxruntime's layout of channel blocks, padded to whole blocks.
    """

    dtype: str
    shape: tuple[int, ...]
    constant: bool = False
    whole: tuple[int, ...] | None = None
    subnormal: bool = False
    blocked: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """One operator as it is executed: inputs and outputs that are absent are ``None``."""

    op: str
    attributes: Mapping[str, Any]
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value | None, ...]

    def input(self, place: int) -> Value | None:
        return self.inputs[place] if place < len(self.inputs) else None

    @property
    def main(self) -> Value:
        """The first input, or the first output of an operator without inputs."""
        return next((value for value in (*self.inputs, *self.outputs) if value is not None), Value("float32", ()))

    @property
    def result(self) -> Value:
        return next((value for value in (*self.outputs, *self.inputs) if value is not None), Value("float32", ()))


@dataclass(frozen=True)
class Description:
    """What a rule finds; ``channels`` as in :class:`eexform.cost_models._kernels.Kernel`."""

    sizes: tuple[int, ...]
    tokens: tuple[str, ...] = ()
    kind: Class = "elementwise"
    macs: int = 0
    channels: tuple[int, int] | None = None


def describe(call: Call) -> Description:
    """Sizes and tokens of a call; element type, activation and subnormal numbers are among the tokens."""
    rule = _RULES.get(call.op, _generic)
    try:
        found = rule(call)
    except (IndexError, KeyError, TypeError, ValueError):  # a form of the operator that the rule does not know
        found = _generic(call)
    tokens = [call.result.dtype, *found.tokens, *_activation(call.attributes)]
    if any(value is not None and value.subnormal for value in (*call.inputs, *call.outputs)):
        tokens.append("subnormal")
    sizes = tuple(max(1, int(size)) for size in found.sizes)
    return Description(sizes or (1,), tuple(tokens), found.kind, int(found.macs), found.channels)


def _activation(attributes: Mapping[str, Any]) -> list[str]:
    name = _text(attributes.get("activation", b""))
    return [name] if name else []


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _need(value: Value | None) -> Value:
    if value is None:
        raise ValueError("an operand is absent")
    return value


def _window(attributes: Mapping[str, Any], window: Sequence[int]) -> list[str]:
    """``3x3``, then strides, pads and dilations where they are not the plain ones."""
    rank = len(window)
    tokens = ["x".join(map(str, window))]
    for key, letter, plain in (("strides", "s", 1), ("pads", "p", 0), ("dilations", "d", 1)):
        numbers = list(attributes.get(key) or [plain] * rank)
        if any(number != plain for number in numbers):
            same = len(set(numbers)) == 1
            tokens.append(letter + (str(numbers[0]) if same else ".".join(map(str, numbers))))
    if _text(attributes.get("auto_pad", "NOTSET")) not in ("NOTSET", ""):
        tokens.append(_text(attributes["auto_pad"]).lower())
    return tokens


# -- convolutions and products ---------------------------------------------------------------------------------------


def _convolution(call: Call, weights: int = 1) -> Description:
    weight, made = _need(call.input(weights)), call.result
    group = int(call.attributes.get("group", 1))
    out, per_group, *window = weight.shape
    pixels = math.prod(made.shape[2:])
    tokens = _window(call.attributes, window)
    for place, label in ((weights + 1, "bias"), (weights + 2, "sum")):
        if weights == 1 and call.input(place) is not None:
            tokens.append(label)
    macs = made.elements * per_group * math.prod(window)
    channels = (per_group, out)
    if group > 1 and per_group == 1:
        return Description((out, pixels), ("depthwise", *tokens), "depthwise", macs, channels)
    if group > 1:
        tokens.insert(0, f"groups{group}")
    elif call.op.startswith("nchwc.") and not call.main.blocked:
        tokens.insert(0, "plain-input")
    return Description((per_group, out, pixels), tuple(tokens), "conv", macs, channels)


def _transposed_convolution(call: Call) -> Description:
    read, weight = call.main, _need(call.input(1))
    group = int(call.attributes.get("group", 1))
    into, per_group, *window = weight.shape
    tokens = _window(call.attributes, window) + ([f"groups{group}"] if group > 1 else [])
    sizes = (into // group, per_group * group, math.prod(read.shape[2:]))
    return Description(sizes, tuple(tokens), "conv", read.elements * per_group * math.prod(window), sizes[:2])


def _product(call: Call, second: int = 1) -> Description:
    left, right, made = call.main, _need(call.input(second)), call.result
    flips = [bool(call.attributes.get(key, 0)) for key in ("transA", "transB")]
    tokens = [label for label, flip in zip(("left-transposed", "right-transposed"), flips, strict=True) if flip]
    tokens += [key for key in ("transBatchA", "transBatchB") if call.attributes.get(key, 0)]
    if right.constant:
        tokens.append("weights")
    if call.op.endswith("Gemm") and call.input(2) is not None:
        tokens.append("bias")
    inner = left.shape[-2 if flips[0] and len(left.shape) > 1 else -1]
    columns = made.shape[-1] if len(right.shape) > 1 else 1
    macs = made.elements * inner
    if len(right.shape) <= 2:  # one matrix: all that is in front of it are rows
        return Description(
            (1, macs // max(1, inner * columns), columns, inner), tuple(tokens), "matmul", macs, (inner, columns)
        )
    rows = made.shape[-2]
    return Description((macs // max(1, inner * columns * rows), rows, columns, inner), tuple(tokens), "matmul", macs)


def _recurrent(call: Call) -> Description:
    read, weight = call.main, _need(call.input(1))
    directions, gates, features = weight.shape
    steps = read.shape[1 if call.attributes.get("layout", 0) else 0]
    hidden = int(call.attributes.get("hidden_size", 1))
    sizes = (steps * directions, gates, features + hidden)
    tokens = [f"{key}={call.attributes[key]}" for key in ("linear_before_reset", "layout") if call.attributes.get(key)]
    tokens += [_text(name) for name in call.attributes.get("activations", [])] + [f"directions{directions}"]
    return Description(sizes, tuple(tokens), "matmul", math.prod(sizes))


# -- axes ------------------------------------------------------------------------------------------------------------


def _merged(shape: Sequence[int], marks: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """Axes of size 1 left out; neighbours with the same mark put together."""
    sizes: list[int] = []
    kept: list[Any] = []
    for size, mark in zip(shape, marks, strict=True):
        if size == 1:
            continue
        if kept and kept[-1] == mark:
            sizes[-1] *= size
        else:
            sizes.append(size)
            kept.append(mark)
    return sizes, kept


def _transpose(call: Call) -> Description:
    shape = call.main.shape
    order = [int(axis) for axis in call.attributes.get("perm", range(len(shape))[::-1]) if shape[axis] > 1]
    runs: list[list[int]] = []  # axes that stay side by side move as one
    rank = {axis: place for place, axis in enumerate(sorted(order))}
    for axis in order:
        if runs and rank[axis] == rank[runs[-1][-1]] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    before = sorted(range(len(runs)), key=lambda place: runs[place][0])
    sizes = [math.prod(shape[axis] for axis in run) for run in (runs[place] for place in before)]
    return Description(tuple(sizes), ("order" + "".join(str(before.index(place)) for place in range(len(runs))),))


def _axes(call: Call, rank: int) -> set[int]:
    given = call.attributes.get("axes")
    if given is None:
        second = call.input(1)
        given = second.whole if second is not None and second.whole is not None else None
    if not given:
        return set() if call.attributes.get("noop_with_empty_axes", 0) else set(range(rank))
    return {int(axis) % rank for axis in given}


def _reduction(call: Call) -> Description:
    shape = call.main.shape
    axes = _axes(call, len(shape))
    sizes, marks = _merged(shape, ["reduced" if axis in axes else "kept" for axis in range(len(shape))])
    return Description(tuple(sizes), ("-".join(marks) or "none",))


def _arg_reduction(call: Call) -> Description:
    shape = call.main.shape
    axis = int(call.attributes.get("axis", 0)) % max(1, len(shape))
    sizes, marks = _merged(shape, ["reduced" if place == axis else "kept" for place in range(len(shape))])
    return Description(tuple(sizes), ("-".join(marks) or "none",))


def _along(default: int, *, behind: bool) -> Callable[[Call], Description]:
    """Softmax and normalisations: lines along an axis, or over it and all axes behind it."""

    def rule(call: Call) -> Description:
        shape = call.main.shape
        axis = int(call.attributes.get("axis", default)) % max(1, len(shape))
        line = math.prod(shape[axis:]) if behind else shape[axis]
        inner = 1 if behind else math.prod(shape[axis + 1 :])
        tokens = ("inner",) if inner > 1 else ()
        return Description((call.main.elements // max(1, line), line), tokens)

    return rule


def _elementwise(call: Call) -> Description:
    made = call.result.shape
    operands = [value for value in call.inputs if value is not None]
    marks = []
    for place in range(len(made)):
        dims = [value.shape[place - len(made)] if len(made) - place <= len(value.shape) else 1 for value in operands]
        marks.append("".join("x" if dim == made[place] else "." for dim in dims))
    sizes, kept = _merged(made, marks)
    return Description(tuple(sizes), ("|".join(kept) or "scalars",) if len(operands) > 1 else ())


def _per_element(call: Call) -> Description:
    return Description((call.main.elements,))


def _per_result(call: Call) -> Description:
    mode = _text(call.attributes.get("mode", ""))
    return Description((call.result.elements,), (mode,) if mode else ())


def _pool(call: Call) -> Description:
    made = call.result.shape
    window = call.attributes.get("kernel_shape")
    if not window:  # global pooling
        shape = call.main.shape
        return Description((math.prod(shape[:2]), math.prod(shape[2:])))
    return Description((math.prod(made[:2]), math.prod(made[2:])), tuple(_window(call.attributes, window)))


def _batch_norm(call: Call) -> Description:
    shape = call.main.shape
    return Description((math.prod(shape[:2]), math.prod(shape[2:])))


def _reorder(call: Call) -> Description:
    """Between plain and blocked layout; a last block that is not full takes another way."""
    plain, blocked = call.main, call.result
    if blocked.blocked is False:
        plain, blocked = blocked, plain
    last = bool(call.attributes.get("channels_last", 0))
    channels = plain.shape[-1 if last else 1]
    tokens = [
        *(["channels-last"] if last else []),
        *(["partial-block"] if channels != blocked.shape[1] else []),
    ]
    return Description((channels, plain.elements // max(1, channels)), tuple(tokens))


# -- moving data -----------------------------------------------------------------------------------------------------


def _concat(call: Call) -> Description:
    made = call.result.shape
    axis = int(call.attributes.get("axis", 0)) % max(1, len(made))
    parts = sum(value is not None for value in call.inputs)
    return Description((math.prod(made[:axis]), math.prod(made[axis:])), (f"parts{parts}",))


def _split(call: Call) -> Description:
    shape = call.main.shape
    axis = int(call.attributes.get("axis", 0)) % max(1, len(shape))
    return Description((math.prod(shape[:axis]), math.prod(shape[axis:])), (f"parts{len(call.outputs)}",))


def _slice(call: Call) -> Description:
    """Rows that are copied, and how long one is: as much as lies side by side."""
    before, after = call.main.shape, call.result.shape
    steps = call.input(4)
    stepped = steps is not None and steps.whole is not None and any(step != 1 for step in steps.whole)
    run = 1
    for old, new in zip(reversed(before), reversed(after), strict=True):
        if stepped and old != new:
            break
        run *= new
        if old != new:
            break
    return Description((call.result.elements // max(1, run), run), ("steps",) if stepped else ())


def _gather(call: Call) -> Description:
    shape, picked = call.main.shape, _need(call.input(1))
    axis = int(call.attributes.get("axis", 0)) % max(1, len(shape))
    return Description((math.prod(shape[:axis]) * picked.elements, math.prod(shape[axis + 1 :])))


def _alias(call: Call) -> Description:
    """Nothing is copied: a call is all that it costs."""
    return Description((1,), ("alias",))


def _generic(call: Call) -> Description:
    """An operator without a rule of its own: its plain attributes, and the larger of what is read and written."""
    tokens = [
        f"{key}={_text(value)}"
        for key, value in sorted(call.attributes.items())
        if isinstance(value, int | float | bytes)
    ]
    reads = sum(value.elements for value in call.inputs if value is not None)
    writes = sum(value.elements for value in call.outputs if value is not None)
    return Description((max(reads, writes),), (*tokens, f"inputs{sum(value is not None for value in call.inputs)}"))


def _quantised(rule: Callable[[Call, int], Description], place: int) -> Callable[[Call], Description]:
    return lambda call: rule(call, place)


_RULES: dict[str, Callable[[Call], Description]] = {
    **dict.fromkeys(("Conv", "microsoft.FusedConv", "nchwc.Conv", "ConvInteger"), _convolution),
    "QLinearConv": _quantised(_convolution, 3),
    "ConvTranspose": _transposed_convolution,
    **dict.fromkeys(
        ("MatMul", "Gemm", "microsoft.FusedMatMul", "microsoft.FusedGemm", "MatMulInteger",
         "microsoft.MatMulIntegerToFloat", "microsoft.DynamicQuantizeMatMul"), _product,
    ),
    **dict.fromkeys(("QLinearMatMul", "microsoft.QGemm"), _quantised(_product, 3)),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    "Transpose": _transpose,
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
         "ReduceLogSumExp", "ReduceSumSquare"), _reduction,
    ),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg_reduction),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _along(-1, behind=False)),
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
         "microsoft.SkipLayerNormalization", "microsoft.SkipSimplifiedLayerNormalization"), _along(-1, behind=True),
    ),
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Mean", "Sum", "Where", "Equal", "Less", "LessOrEqual",
         "Greater", "GreaterOrEqual", "And", "Or", "Xor", "PRelu", "BitShift", "microsoft.BiasGelu",
         "microsoft.FastGelu", "microsoft.QLinearAdd", "microsoft.QLinearMul"), _elementwise,
    ),
    **dict.fromkeys(
        ("Abs", "Acos", "Asin", "Atan", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu",
         "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu",
         "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "microsoft.Gelu",
         "microsoft.QuickGelu", "QuantizeLinear", "DequantizeLinear"), _per_element,
    ),
    **dict.fromkeys(("Expand", "Tile", "Pad", "Resize", "Upsample", "DepthToSpace", "SpaceToDepth"), _per_result),
    **dict.fromkeys(
        ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "nchwc.MaxPool", "nchwc.AveragePool",
         "nchwc.GlobalAveragePool", "nchwc.GlobalMaxPool"), _pool,
    ),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _batch_norm),
    **dict.fromkeys(("nchwc.ReorderInput", "nchwc.ReorderOutput"), _reorder),
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Shape", "Size", "Identity"), _alias),
}  # fmt: skip
