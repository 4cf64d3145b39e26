"""Pooling, transposed convolution, resizing and normalisation in all their forms against onnxruntime."""

import itertools

import numpy as np
import pytest
import torch

from eexform.backends.fx import fx_parameters, raise_to_fx
from eexform.backends.fx_conv import conv_transpose, deformable_conv
from eexform.backends.fx_norm import batch_norm_training, layer_norm_parts
from eexform.backends.fx_resize import resize
from tests.backends.test_fx import one_node, reference

RNG = np.random.default_rng(2)


def weights(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def compare(name, inputs, outputs=1, opset=20, **attrs):
    graph, value = one_node(name, inputs, outputs=outputs, opset=opset, **attrs)
    found = raise_to_fx(graph).eval()(torch.from_numpy(value))
    for mine, theirs in zip(found if isinstance(found, tuple) else (found,), reference(graph, value), strict=True):
        assert mine.detach().numpy().dtype == theirs.dtype
        np.testing.assert_allclose(mine.detach().numpy(), theirs, atol=2e-5, rtol=1e-4)


PADS = {
    "none": {},
    "even": {"pads": [1, 1, 1, 1]},
    "uneven": {"pads": [0, 1, 2, 0]},
    "same": {"auto_pad": "SAME_UPPER"},
    "lower": {"auto_pad": "SAME_LOWER"},
    "valid": {"auto_pad": "VALID"},
}
STEPS = {"by 1": {}, "by 2": {"strides": [2, 2]}, "by 2, 3": {"strides": [2, 3]}}
POOLS = [
    (name, pads, steps, ceil, dilated)
    for name, pads, steps, ceil, dilated in itertools.product(
        ("MaxPool", "AveragePool", "LpPool"), PADS, STEPS, (0, 1), (False, True)
    )
    # with both, onnxruntime pads for a window without gaps, which the standard does not say
    if not (dilated and pads in ("same", "lower"))
]


@pytest.mark.parametrize(("name", "pads", "steps", "ceil", "dilated"), POOLS)
def test_pooling(name, pads, steps, ceil, dilated):
    attrs = {"kernel_shape": [3, 2], "ceil_mode": ceil, **PADS[pads], **STEPS[steps]}
    if dilated:
        attrs["dilations"] = [1, 2]
    compare(name, [weights(2, 3, 9, 8)], **attrs)


@pytest.mark.parametrize(("pads", "include"), [*itertools.product(("even", "uneven"), (0, 1))])
def test_padding_counts_in_averages_where_told(pads, include):
    compare("AveragePool", [weights(2, 3, 9, 8)], kernel_shape=[3, 3], count_include_pad=include, **PADS[pads])


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("columns", [0, 1])
def test_places_of_maxima(pads, columns):
    compare(
        "MaxPool", [weights(2, 3, 9, 8)], 2, kernel_shape=[3, 2], strides=[2, 2], storage_order=columns, **PADS[pads]
    )


def test_unpooling_puts_back():
    graph, value = one_node("MaxPool", [weights(2, 3, 8, 8)], outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    found, places = raise_to_fx(graph)(torch.from_numpy(value))
    graph, _ = one_node("MaxUnpool", [found.numpy(), places.numpy()], kernel_shape=[2, 2], strides=[2, 2])
    back = raise_to_fx(graph)(found)
    kept = back != 0
    assert kept.sum() == found.numel()
    torch.testing.assert_close(back[kept], torch.from_numpy(value)[kept])


@pytest.mark.parametrize("more", [{}, {"output_padding": [1, 1], "strides": [2, 2]}, {"dilations": [2, 1]}])
@pytest.mark.parametrize("pads", [*PADS, "shape"])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(more, pads, groups):
    where = {"output_shape": [11, 9], "strides": [2, 2]} if pads == "shape" else PADS[pads]
    compare(
        "ConvTranspose", [weights(2, 4, 5, 4), weights(4, 3, 3, 3), weights(3 * groups)], group=groups, **(more | where)
    )


def test_a_transposed_convolution_trains():
    graph, value = one_node("ConvTranspose", [weights(2, 4, 5, 4), weights(4, 3, 3, 3)], auto_pad="SAME_UPPER")
    module = raise_to_fx(graph)
    module(torch.from_numpy(value)).square().sum().backward()
    assert list(fx_parameters(module)) == ["c0"]
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


MODES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")


@pytest.mark.parametrize(("mode", "coordinates"), [*itertools.product(("linear", "cubic"), MODES)])
@pytest.mark.parametrize("scales", [(2.0, 3.0), (0.5, 0.5), (1.5, 1.0)])
def test_resizing(mode, coordinates, scales):
    wanted = np.array([1, 1, *scales], np.float32)
    inputs = [weights(2, 3, 8, 6), None, wanted]
    compare("Resize", inputs, mode=mode, coordinate_transformation_mode=coordinates)


@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("sizes", [(16, 9), (5, 3)])
def test_resizing_to_the_nearest(coordinates, nearest, sizes):
    inputs = [weights(2, 3, 8, 6), None, None, np.array([2, 3, *sizes])]
    compare("Resize", inputs, coordinate_transformation_mode=coordinates, nearest_mode=nearest)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resizing_without_aliases(mode):
    compare("Resize", [weights(1, 2, 12, 10), None, None, np.array([1, 2, 5, 4])], mode=mode, antialias=1)


def test_torchs_own_resizing_is_the_same_as_ours():
    """The quick way and the general one."""
    value = torch.randn(2, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    for coordinates in ("half_pixel", "align_corners"):
        quick = resize(value, None, None, [2, 3, 16, 9], mode="linear", coordinates=coordinates, nearest="")
        # on the last two axes of three batches of one: no shape that torch's function takes
        general = resize(
            value[None, None], None, None, [1, 1, 2, 3, 16, 9], mode="linear", coordinates=coordinates, nearest=""
        )
        torch.testing.assert_close(quick, general[0, 0])
        assert torch.autograd.gradcheck(
            lambda part, kind=coordinates: resize(
                part, None, None, [1, 1, 3, 5], mode="cubic", coordinates=kind, nearest=""
            ),
            value[:1, :1, :4, :3].detach().requires_grad_(),
        )


@pytest.mark.parametrize(
    ("name", "inputs", "attrs"),
    [
        ("LayerNormalization", [weights(2, 5, 8), weights(8), weights(8)], {"axis": -1}),
        ("InstanceNormalization", [weights(2, 3, 5), weights(3), weights(3)], {}),
        ("LRN", [weights(2, 7, 4, 3)], {"size": 5, "alpha": 0.3, "bias": 0.5}),
        ("LpNormalization", [weights(2, 7, 4)], {"axis": 1, "p": 1}),
        ("MeanVarianceNormalization", [weights(2, 7, 4, 3)], {"axes": [0, 2, 3]}),
        ("GlobalLpPool", [weights(2, 3, 4, 5)], {"p": 3}),
        ("Hardmax", [weights(2, 3, 4)], {"axis": 1}),
        ("Celu", [weights(2, 3)], {"alpha": 2.0}),
        ("ThresholdedRelu", [weights(2, 3)], {"alpha": 0.2}),
        ("Shrink", [weights(2, 9)], {"lambd": 0.3, "bias": 0.1}),
        ("PRelu", [weights(2, 3, 4), weights(3, 1)], {}),
    ],
)
def test_others(name, inputs, attrs):
    compare(name, inputs, **attrs)


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_of_old_operator_sets_works_on_a_matrix(name, axis):
    compare(name, [weights(2, 3, 4)], opset=11, axis=axis)


def test_groups_have_scales_of_their_own_before_opset_21():
    value, scale, bias = weights(2, 6, 4), weights(3), weights(3)
    graph, _ = one_node("GroupNormalization", [value, scale, bias], opset=18, num_groups=3)
    found = raise_to_fx(graph)(torch.from_numpy(value)).detach().numpy()
    parts = value.reshape(2, 3, -1)
    normal = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, (normal * scale[:, None] + bias[:, None]).reshape(2, 6, 4), atol=1e-5)
    graph, _ = one_node("GroupNormalization", [value, np.repeat(scale, 2), np.repeat(bias, 2)], opset=21, num_groups=3)
    np.testing.assert_allclose(raise_to_fx(graph)(torch.from_numpy(value)).detach().numpy(), found, atol=1e-6)


def test_gradients_of_what_we_compute_ourselves():
    torch.manual_seed(0)

    def double(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    value, weight = double(1, 2, 3, 3), double(2, 2, 2, 2)
    assert torch.autograd.gradcheck(
        lambda x, w: conv_transpose(x, w, None, [2, 2], [0] * 4, [1, 0], 1, [1, 1], "SAME_LOWER", None), (value, weight)
    )
    offset = (0.3 * torch.randn(1, 8, 2, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, o: deformable_conv(x, w, o, None, None, [1, 1], [1, 1], [0] * 4, 1, 1), (value, weight, offset)
    )
    scale, bias = double(2), double(2)
    still = torch.zeros(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, s, b: batch_norm_training(x, s, b, still, still + 1, 1e-5, 0.9), (value, scale, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x, s: layer_norm_parts(x, s, None, -1, 1e-5, torch.float64), (double(2, 3, 4), double(4))
    )
