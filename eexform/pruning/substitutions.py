"""What can stand in for an activation: functions as nodes, polynomials among them, and which ones come close."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.emit import Emitter
from eexform.pruning.activations import Function

_POINTS = 4096  # of the integrals: the kink of a ReLU costs them 1e-7


@dataclass(frozen=True)
class Fit:
    """How polynomials are fitted.

    Attributes:
        low: lower end of the interval on which inputs are taken to lie.
        high: upper end.
        degree: of the polynomial.
    """

    low: float = -4.0
    high: float = 4.0
    degree: int = 2


def polynomial(function: Function, fit: Fit) -> np.ndarray:
    """The polynomial closest to ``function`` in the mean square over the interval.

    The orthogonal projection on Legendre polynomials, with ``t = (x - middle) / half`` in [-1, 1]:

        c_k = (2 k + 1) / 2 * integral of f(middle + half t) P_k(t) dt from -1 to 1

    (Abramowitz and Stegun, 22.2.10). For a ReLU on [-a, a] and degree 2 that is ``3 a / 32 + x / 2 + 15 x^2 / (32 a)``.

    Returns:
        Coefficients of the powers of x, lowest first, [degree + 1] float64.
    """
    middle, half = (fit.high + fit.low) / 2, (fit.high - fit.low) / 2
    nodes, weights = np.polynomial.legendre.leggauss(64)
    edges = np.linspace(-1.0, 1.0, _POINTS // 64 + 1)  # piece by piece, so that a kink spoils one piece only
    centres, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    t = (centres[:, None] + width / 2 * nodes).ravel()
    w = np.tile(weights * width / 2, len(centres))
    values = np.asarray(function(middle + half * t), np.float64)
    coefficients = []
    for k in range(fit.degree + 1):
        basis = np.polynomial.legendre.Legendre.basis(k)(t)
        coefficients.append((2 * k + 1) / 2 * float((values * basis * w).sum()))
    series = np.polynomial.legendre.Legendre(coefficients, domain=[fit.low, fit.high])
    return np.asarray(series.convert(kind=np.polynomial.Polynomial).coef, np.float64)


Emit = Callable[[Emitter, gs.Variable, Function, Fit], gs.Variable]
"""Adds the nodes to a draft: (emitter, input, the function that is replaced, fit) -> result."""


@dataclass(frozen=True)
class Substitute:
    """A function that can stand in for an activation.

    Attributes:
        ops: the operators that it takes.
        emit: adds its nodes.
        since: first opset that has the operators.
    """

    ops: frozenset[str]
    emit: Emit
    since: int = 13


def _one(op: str, **attrs: Any) -> Emit:
    def emit(emitter: Emitter, value: gs.Variable, function: Function, fit: Fit) -> gs.Variable:
        return emitter.node(op, value, name=op.lower(), **attrs)

    return emit


def _clipped(low: float, high: float) -> Emit:
    def emit(emitter: Emitter, value: gs.Variable, function: Function, fit: Fit) -> gs.Variable:
        ends = [emitter.constant("clip.low", _like(value, low)), emitter.constant("clip.high", _like(value, high))]
        return emitter.node("Clip", value, *ends, name="clip")

    return emit


def _square(emitter: Emitter, value: gs.Variable, function: Function, fit: Fit) -> gs.Variable:
    return emitter.node("Mul", value, value, name="square")


def _horner(emitter: Emitter, value: gs.Variable, function: Function, fit: Fit) -> gs.Variable:
    """``(..(c_d x + c_(d-1)) x + ..) x + c_0``."""
    *rest, top = polynomial(function, fit)
    total = emitter.node("Mul", value, emitter.constant(f"c{fit.degree}", _like(value, top)), name="mul")
    for power in range(fit.degree - 1, -1, -1):
        constant = emitter.constant(f"c{power}", _like(value, rest[power]))
        total = emitter.node("Add", total, constant, name="add")
        if power:
            total = emitter.node("Mul", total, value, name="mul")
    return total


def _like(value: gs.Variable, number: float) -> np.ndarray:
    return np.asarray(number, dtype=value.dtype if value.dtype is not None else np.float32)


SUBSTITUTES: Mapping[str, Substitute] = {
    "relu": Substitute(frozenset({"Relu"}), _one("Relu")),
    "relu6": Substitute(frozenset({"Clip"}), _clipped(0.0, 6.0)),
    "hard_tanh": Substitute(frozenset({"Clip"}), _clipped(-1.0, 1.0)),
    "hard_sigmoid": Substitute(frozenset({"HardSigmoid"}), _one("HardSigmoid", alpha=1 / 6, beta=0.5)),
    "hard_swish": Substitute(frozenset({"HardSwish"}), _one("HardSwish"), since=14),
    "leaky_relu": Substitute(frozenset({"LeakyRelu"}), _one("LeakyRelu", alpha=0.01)),
    "sigmoid": Substitute(frozenset({"Sigmoid"}), _one("Sigmoid")),
    "tanh": Substitute(frozenset({"Tanh"}), _one("Tanh")),
    "identity": Substitute(frozenset({"Identity"}), _one("Identity")),
    "square": Substitute(frozenset({"Mul"}), _square),
    "polynomial": Substitute(frozenset({"Mul", "Add"}), _horner),
}
"""What can be put in place of an activation. ``square`` is the activation of CryptoNets (Gilad-Bachrach et al., ICML
2016), for networks that are then fine-tuned with it; ``polynomial`` is fitted to the function that it replaces."""

_UNBOUNDED = ("relu", "leaky_relu", "relu6", "polynomial")
_GATES = ("hard_sigmoid", "sigmoid", "polynomial")

CLOSEST: Mapping[str, tuple[str, ...]] = {
    "relu": ("relu6", "leaky_relu", "polynomial"),
    "relu6": ("relu", "polynomial"),
    "hard_sigmoid": ("sigmoid", "polynomial"),
    "hard_swish": _UNBOUNDED,
    "hard_tanh": ("tanh", "polynomial"),
    "sigmoid": _GATES[:1] + _GATES[2:],
    "silu": ("hard_swish", *_UNBOUNDED),
    "quick_gelu": _UNBOUNDED,
    "gelu": _UNBOUNDED,
    "tanh": ("hard_tanh", "polynomial"),
    "softplus": _UNBOUNDED,
    "mish": ("hard_swish", *_UNBOUNDED),
    "elu": ("leaky_relu", "relu", "polynomial"),
    "leaky_relu": ("relu", "polynomial"),
}
"""For each activation what a white-list takes instead, the first one whose operators it allows."""
