"""Recurrent layers: torch's kernels and our loop against onnxruntime, torch's modules and finite differences."""

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from torch import nn

from eexform.backends.fx import fx_parameters, raise_to_fx
from eexform.backends.fx_rnn import recurrent
from eexform.errors import ModelError
from eexform.ir.graph import Graph

STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 6
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
RNG = np.random.default_rng(5)


def normal(*shape):
    return (0.5 * RNG.normal(size=shape)).astype(np.float32)


def layer(kind, *, directions=1, bias=True, lengths=None, start=False, holes=False, **attrs):
    """A graph of one layer; ``x`` is its input, everything else is constant."""
    gates, size = GATES[kind], HIDDEN
    operands = [gs.Variable("x", np.float32, [STEPS, BATCH, INPUTS])]
    arrays = {
        "w": normal(directions, gates * size, INPUTS),
        "r": normal(directions, gates * size, size),
        "b": normal(directions, 2 * gates * size) if bias else None,
        "lengths": lengths,
        "h": normal(directions, BATCH, size) if start else None,
    }
    if kind == "LSTM":
        arrays["c"] = normal(directions, BATCH, size) if start else None
        arrays["p"] = normal(directions, 3 * size) if holes else None
    while list(arrays.values())[-1] is None:
        arrays.popitem()
    operands += [gs.Variable.empty() if a is None else gs.Constant(name, a) for name, a in arrays.items()]
    results = [gs.Variable(name, np.float32) for name in ("y", "last", "cells")[: 3 if kind == "LSTM" else 2]]
    node = gs.Node(kind, name="layer", attrs={"hidden_size": size, **attrs}, inputs=operands, outputs=results)
    return Graph(gs.Graph(nodes=[node], inputs=operands[:1], outputs=results, opset=20))


CASES = {
    "plain": {},
    "no bias": {"bias": False},
    "reverse": {"direction": "reverse"},
    "both": {"direction": "bidirectional", "directions": 2},
    "start": {"direction": "bidirectional", "directions": 2, "start": True},
    "lengths": {"lengths": np.array([5, 2, 3], np.int32)},
    "lengths, both": {"lengths": np.array([1, 5, 4], np.int32), "direction": "bidirectional", "directions": 2},
    "clipped": {"clip": 0.3},
}
ONLY = {
    "RNN": {"relu": {"activations": ["Relu"]}, "affine": {"activations": ["HardSigmoid"], "activation_alpha": [0.3]}},
    "GRU": {
        "torch's form": {"linear_before_reset": 1},
        "torch's form, both": {"linear_before_reset": 1, "direction": "bidirectional", "directions": 2, "start": True},
        "others": {"activations": ["HardSigmoid", "Softsign"]},
    },
    "LSTM": {
        "peepholes": {"holes": True},
        "others": {"activations": ["HardSigmoid", "ScaledTanh", "Softsign"], "activation_alpha": [0.25, 0.9],
                   "activation_beta": [0.5, 0.7]},
    },
}  # fmt: skip
ALL = [(kind, name) for kind in GATES for name in (*CASES, *ONLY[kind])]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_form_is_what_onnxruntime_does(kind, name):
    graph = layer(kind, **(CASES | ONLY[kind])[name])
    value = normal(STEPS, BATCH, INPUTS)
    model = gs.export_onnx(graph.gs, do_type_check=False)
    model.ir_version = 10
    expected = ort.InferenceSession(model.SerializeToString()).run(None, {"x": value})
    found = raise_to_fx(graph).eval()(torch.from_numpy(value))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "module"),
    [("GRU", nn.GRU), ("LSTM", nn.LSTM), ("RNN", nn.RNN)],
)
@pytest.mark.parametrize("looped", [False, True])
def test_torch_modules_and_their_gradients(kind, module, looped):
    """Outputs and gradients of torch's own bidirectional module, by its kernel and by our loop."""
    torch.manual_seed(0)
    theirs = module(INPUTS, HIDDEN, bidirectional=True)
    order = {"RNN": [0], "GRU": [1, 0, 2], "LSTM": [0, 3, 1, 2]}[kind]  # torch's gates to ONNX's

    def gates(name):
        parts = getattr(theirs, name).detach().split(HIDDEN)
        return torch.cat([parts[place] for place in order])

    ends = ("l0", "l0_reverse")
    w = torch.stack([gates(f"weight_ih_{end}") for end in ends]).requires_grad_()
    r = torch.stack([gates(f"weight_hh_{end}") for end in ends]).requires_grad_()
    b = torch.stack([torch.cat([gates(f"bias_ih_{end}"), gates(f"bias_hh_{end}")]) for end in ends]).requires_grad_()
    functions = {"RNN": ["tanh"], "GRU": ["sigmoid", "tanh"], "LSTM": ["sigmoid", "tanh", "tanh"]}[kind] * 2
    x = torch.randn(STEPS, BATCH, INPUTS)
    lengths = torch.full((BATCH,), STEPS) if looped else None  # with lengths given, the loop runs
    y, *states = recurrent(
        x, w, r, b, lengths, None, None, None, kind=kind, direction="bidirectional",
        functions=[(name, 0.0, 0.0) for name in functions], clip=0.0, batch_first=False, coupled=False,
        reset_after=True,
    )  # fmt: skip
    expected, state = theirs(x)
    torch.testing.assert_close(y.transpose(1, 2).flatten(2), expected)
    for mine, other in zip(states, state if kind == "LSTM" else [state], strict=True):
        torch.testing.assert_close(mine, other)

    (y.square().sum() + states[0].sum()).backward()
    (expected.square().sum() + (state[0] if kind == "LSTM" else state).sum()).backward()
    for place, end in enumerate(ends):
        for mine, name in ((w.grad[place], "weight_ih"), (r.grad[place], "weight_hh")):
            other = getattr(theirs, f"{name}_{end}").grad.split(HIDDEN)
            torch.testing.assert_close(mine, torch.cat([other[place] for place in order]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", GATES)
def test_gradients_of_the_odd_forms(kind):
    """Finite differences through several lengths, peepholes, clipping and other activations."""
    torch.manual_seed(1)
    gates, size = GATES[kind], 2
    functions = [("softsign", 0.0, 0.0), ("softplus", 0.0, 0.0), ("scaledtanh", 0.8, 1.1)][
        : {"RNN": 1, "GRU": 2, "LSTM": 3}[kind]
    ]
    shapes = [(3, 2, 2), (1, gates * size, 2), (1, gates * size, size), (1, 2 * gates * size)]
    values = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    holes = torch.randn(1, 3 * size, dtype=torch.float64, requires_grad=True) if kind == "LSTM" else None

    def run(x, w, r, b, *peepholes):
        return recurrent(
            x, w, r, b, torch.tensor([3, 1]), None, None, peepholes[0] if peepholes else None, kind=kind,
            direction="reverse", functions=functions, clip=4.0, batch_first=False, coupled=kind == "LSTM",
            reset_after=False,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (*values, *([] if holes is None else [holes])))


def test_weights_train_and_come_back():
    graph = layer("GRU", linear_before_reset=1)
    module = raise_to_fx(graph)
    assert set(fx_parameters(module)) == {"w", "r", "b"}
    y, _ = module(torch.from_numpy(normal(STEPS, BATCH, INPUTS)))
    y.square().sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            assert parameter.grad.abs().max() > 0
            parameter -= 0.1 * parameter.grad
    for name, values in fx_parameters(module).items():
        assert (values != graph.parameters()[name]).any()


def test_unknown_activations_are_named():
    with pytest.raises(ModelError, match=r"node 'layer' \(RNN\): activation 'cosine'"):
        raise_to_fx(layer("RNN", activations=["Cosine"]))
