"""Gradients of every differentiable rule, of inputs and of parameters, against finite differences."""

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from eexform.backends.fx import raise_to_fx
from eexform.backends.torch_types import to_tensor
from tests.backends import cases_data, cases_layers, cases_math, cases_spatial
from tests.backends.random_ops import Draw, built

ASKED = os.environ.get("EEXFORM_EXAMPLES")
EXAMPLES = settings(
    max_examples=int(ASKED or 8),
    deadline=None,
    derandomize=ASKED is None,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
_WITHOUT = {
    "max_pool_of_integers", "quantize", "dequantize", "integer_products", "integer_conv", "whole_unary", "logical",
    "bits", "infinities", "cast", "arg", "shape", "count_up", "filled", "eye", "non_zero", "one_hot",
    "unique", "reduction_of_an_empty_batch",
}  # fmt: skip
FAMILIES = [
    family
    for family in (*cases_spatial.SPATIAL, *cases_layers.LAYERS, *cases_math.MATH, *cases_data.DATA)
    if family.__name__ not in _WITHOUT
]
_STEPS = {"Ceil", "Floor", "Round", "Sign", "IsNaN", "Hardmax", "Mod"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@EXAMPLES
@given(data=st.data())
def test_gradients_are_those_of_finite_differences(family, data):
    draw = Draw(data)
    case = family(draw)
    operands = [None if array is None else np.asarray(array) for array in case.operands]
    assume(operands[0].dtype.kind != "i" or any(array is not None and array.dtype.kind == "f" for array in operands))
    assume(case.op not in _STEPS and all(array is None or array.size for array in operands))
    operands = case.operands = [
        array if place in case.fixed else _moved(array, draw) for place, array in enumerate(operands)
    ]
    note(f"{case.op} {case.attrs} of {[None if array is None else array.shape for array in operands]}")
    computed = [place == 0 or (place not in case.fixed and draw.flag()) for place in range(len(operands))]
    module = raise_to_fx(built(case, computed)).double().eval()
    values = [_wide(array) for array, fed in zip(operands, computed, strict=True) if fed and array is not None]
    parameters = dict(module.named_parameters())
    count = len(values)

    def forward(*tensors):
        named = dict(zip(parameters, tensors[count:], strict=True))
        found = torch.func.functional_call(module, named, tensors[:count])
        held = found if isinstance(found, tuple) else (found,)
        return tuple(part for part in held if part.is_floating_point() and bool(torch.isfinite(part).all()))

    given = [*values, *(parameter.detach().clone().requires_grad_() for parameter in parameters.values())]
    shown = forward(*given)
    assume(shown and any(tensor.requires_grad for tensor in given))
    assert all(part.requires_grad for part in shown), f"{case.op}: the gradient is cut"
    assert torch.autograd.gradcheck(forward, given, eps=1e-7, atol=1e-4, rtol=1e-3, fast_mode=True)


def _moved(array: np.ndarray | None, draw: Draw) -> np.ndarray | None:
    """Away from ties and zeros, where rules have corners."""
    if array is None or array.dtype.kind != "f":
        return array
    return np.asarray(array + draw.random.uniform(0.01, 0.09, array.shape), array.dtype)


def _wide(array: np.ndarray) -> torch.Tensor:
    tensor = to_tensor(array)
    return tensor.double().requires_grad_() if tensor.is_floating_point() else tensor
