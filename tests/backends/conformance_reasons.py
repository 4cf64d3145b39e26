"""Why cases of onnx's suite fail, in words; what no rule here explains stays as what was seen."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx

_TYPE = onnx.TensorProto.DataType

_DOMAINS = {
    "ai.onnx.ml": "domain ai.onnx.ml: trees, label encoders and the like are no neural operators",
    "ai.onnx.preview.training": "training operators of ONNX: gradients and optimisers are torch's here",
}
_OPERATORS = {
    "ImageDecoder": "decoding image files is no part of a network",
    "TfIdfVectorizer": "n-gram counts of text are prepared before a network",
    "StringNormalizer": "strings: torch has no such tensors",
    "StringConcat": "strings: torch has no such tensors",
    "StringSplit": "strings: torch has no such tensors",
    "RegexFullMatch": "strings: torch has no such tensors",
    "Bernoulli": "generators of random numbers have no rule: no classifier draws any",
    "RandomUniformLike": "generators of random numbers have no rule: no classifier draws any",
}
_CASES = {
    "test_training_dropout": "random numbers: the expected ones are those of numpy's generator",
    "test_training_dropout_mask": "random numbers: the expected ones are those of numpy's generator",
    "test_training_dropout_default": "random numbers: the expected ones are those of numpy's generator",
    "test_training_dropout_default_mask": "random numbers: the expected ones are those of numpy's generator",
    "test_attention_4d_causal_fp16": "half precision: one or two elements of 192 are rounded to the other neighbour",
    "test_attention_4d_causal_fp16_expanded": (
        "half precision: one or two elements of 192 are rounded to the other neighbour"
    ),
    "test_loop16_seq_none": "the result is equal, but the suite's comparison stops at a scalar inside a sequence",
    "test_dft_inverse": "the expected value is rounding noise (2e-7) where the exact one, ours, is 0",
    "test_dft_inverse_opset19": "the expected value is rounding noise (2e-7) where the exact one, ours, is 0",
}
_NARROW = {
    _TYPE.UINT4, _TYPE.INT4, _TYPE.UINT2, _TYPE.INT2, _TYPE.FLOAT4E2M1, _TYPE.FLOAT8E8M0, _TYPE.FLOAT6E2M3,
    _TYPE.FLOAT6E3M2,
}  # fmt: skip
_MISSING = re.compile(r"operator '([^']+)' cannot be raised")


def reason(name: str, model: onnx.ModelProto, outcome: str, detail: str) -> str:
    """Why a case fails.

    Args:
        name: the case.
        model: its model.
        outcome: see ``conformance.Verdict``.
        detail: first line of the message.
    """
    if name in _CASES:
        return _CASES[name]
    for node in model.graph.node:
        found = _DOMAINS.get(node.domain) or _OPERATORS.get(node.op_type)
        if found:
            return found
    elements = set(_elements(model.graph))
    if _TYPE.STRING in elements:
        return "strings: torch has no such tensors"
    if elements & _NARROW:
        return "numbers of 2, 4 or 6 bits and float8e8m0: torch cannot compute with them"
    missing = _MISSING.search(detail)
    if missing:
        return f"operator {missing[1]} has no rule"
    operators = sorted({node.op_type for node in model.graph.node})
    return f"{', '.join(operators[:3])}: {outcome}"


def _elements(graph: onnx.GraphProto) -> Iterator[int]:
    """Element types of all that is written down in a graph."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type"):
            yield value.type.tensor_type.elem_type
        elif value.type.HasField("sequence_type"):
            yield value.type.sequence_type.elem_type.tensor_type.elem_type
    yield from (tensor.data_type for tensor in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t.data_type
            if attribute.name == "to":
                yield attribute.i
