"""Rules for spectra: windows, Fourier transforms, mel weights (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs
import torch
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.torch_types import torch_type

Number = float | torch.Tensor

# a window is the sum of c[k] cos(2 pi k n / length) with these c
_WINDOWS = {
    "HannWindow": [0.5, -0.5],
    "HammingWindow": [25 / 46, -21 / 46],
    "BlackmanWindow": [0.42, -0.5, 0.08],
}


@op(*_WINDOWS)
def _window(raiser: Raiser, node: gs.Node) -> fx.Node:
    kind, periodic = torch_type(int(node.attrs.get("output_datatype", 1))), bool(node.attrs.get("periodic", 1))
    return raiser.call(cosine_window, raiser.number(node, 0), _WINDOWS[node.op], periodic, kind)


@op("MelWeightMatrix")
def _mel(raiser: Raiser, node: gs.Node) -> fx.Node:
    kind = torch_type(int(node.attrs.get("output_datatype", 1)))
    return raiser.call(mel_weights, *(raiser.number(node, place) for place in range(5)), kind)


@op("DFT")
def _dft(raiser: Raiser, node: gs.Node) -> fx.Node:
    length = raiser.number(node, 1)
    axis = raiser.number(node, 2, -2) if raiser.source.opset >= 20 else int(node.attrs.get("axis", 1))
    inverse, onesided = bool(node.attrs.get("inverse", 0)), bool(node.attrs.get("onesided", 0))
    return raiser.call(fourier, raiser.value(node, 0), length, axis, inverse, onesided)


@op("STFT")
def _stft(raiser: Raiser, node: gs.Node) -> fx.Node:
    window = raiser.value(node, 2) if raiser.has(node, 2) else None
    step, length = raiser.number(node, 1), raiser.number(node, 3)
    onesided = bool(node.attrs.get("onesided", 1))
    return raiser.call(short_time_fourier, raiser.value(node, 0), step, window, length, onesided)


# -- torch functions -----------------------------------------------------------------------------------------------


def cosine_window(size: Number, terms: list[float], periodic: bool, kind: torch.dtype) -> torch.Tensor:
    """A window of cosines; one that is not periodic ends as it begins."""
    count = int(size)
    at = torch.arange(count, dtype=torch.float64) * (2 * math.pi / (count if periodic else max(count - 1, 1)))
    total = torch.zeros(count, dtype=torch.float64)
    for order, factor in enumerate(terms):
        total = total + factor * torch.cos(order * at)
    return total.to(kind)


def mel_weights(
    bins: Number, length: Number, rate: Number, lowest: Number, highest: Number, kind: torch.dtype
) -> torch.Tensor:
    """``[length/2 + 1, bins]``: triangles of height 1 whose corners are spaced evenly on the mel scale.

    ``mel(f) = 2595 log10(1 + f/700)``; corners lie on whole bins of the spectrum, as the operator has it.
    """
    count, size = int(bins), int(length)
    mels = [2595 * math.log10(1 + float(edge) / 700) for edge in (lowest, highest)]
    step = (mels[1] - mels[0]) / (count + 2)
    hertz = [700 * (10 ** ((mels[0] + step * place) / 2595) - 1) for place in range(count + 2)]
    corners = [int((size + 1) * frequency // float(rate)) for frequency in hertz]
    weights = torch.zeros(size // 2 + 1, count)
    for place in range(count):
        low, middle, high = corners[place : place + 3]
        for at in range(low, middle + 1):
            weights[at, place] = 1.0 if middle == low else (at - low) / (middle - low)
        for at in range(middle, high):
            weights[at, place] = (high - at) / (high - middle)
    return weights.to(kind)


def fourier(
    value: torch.Tensor, length: Number | None, axis: int | torch.Tensor, inverse: bool, onesided: bool
) -> torch.Tensor:
    """Discrete Fourier transform along ``axis`` of a signal whose last axis is (real) or (real, imaginary).

    ``onesided``: only the non-redundant half of a real signal's spectrum comes out, or goes in where ``inverse``.
    """
    along = int(axis)
    along = along if along >= 0 else along + value.dim()
    size = None if length is None else int(length)
    signal = torch.view_as_complex(value.contiguous()) if value.shape[-1] == 2 else value.squeeze(-1)
    if onesided and inverse:
        return torch.fft.irfft(signal, size, along).unsqueeze(-1)
    if onesided:
        found = torch.fft.rfft(signal.real if signal.is_complex() else signal, size, along)
    else:
        found = (torch.fft.ifft if inverse else torch.fft.fft)(signal, size, along)
    return torch.view_as_real(found.resolve_conj())


def short_time_fourier(
    value: torch.Tensor, step: Number, window: torch.Tensor | None, length: Number | None, onesided: bool
) -> torch.Tensor:
    """Spectra ``[N, frames, bins, 2]`` of frames of a signal ``[N, T, 1 or 2]``."""
    size = int(length) if length is not None else value.shape[1] if window is None else window.shape[0]
    frames = value.unfold(1, size, int(step)).transpose(2, 3)  # [N, frames, size, 1 or 2]
    if window is not None:
        frames = frames * window.to(value.dtype).unsqueeze(-1)
    return fourier(frames, None, 2, False, onesided)
