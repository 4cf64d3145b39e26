"""Least squares from streamed sums: what a linear operator should compute, given samples of what it reads and says.

For targets y and inputs x, with weights W and intercept b, the problem

    minimise  sum ||y - W x - b||^2 + ridge * s * ||W - W0||^2 ,   s = mean variance of the inputs times the rows

is solved by the normal equations of the centred sums (b drops out, ``b = mean(y) - W mean(x)``):

    (S_xx + ridge * s * I) (W - W0)^T = S_xy - S_xx W0^T

The ridge pulls towards the weights that are there, W0, not towards zero: with little evidence nothing moves. This is
the reconstruction step of channel pruning (He, Zhang and Sun 2017, "Channel pruning for accelerating very deep neural
networks", eq. 1 and section 3.2 (ii)), of all output channels at once, with the ridge added.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
"""What is tried, largest last, where the ridge is chosen on held-out rows."""

_BLOCK = 1 << 22
"""Numbers of a block of rows in float64 at most (32 MiB)."""


@dataclass
class Moments:
    """Sums over rows, in float64, for each group of channels on its own.

    Attributes:
        count: rows.
        x, y: sums, ``[groups, in]`` and ``[groups, out]``.
        xx, xy: sums of products, ``[groups, in, in]`` and ``[groups, in, out]``.
        yy: sum of squares, ``[groups, out]``.
    """

    groups: int
    inputs: int
    outputs: int
    count: int = 0
    x: np.ndarray = field(init=False)
    y: np.ndarray = field(init=False)
    xx: np.ndarray = field(init=False)
    xy: np.ndarray = field(init=False)
    yy: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        groups, inputs, outputs = self.groups, self.inputs, self.outputs
        self.x, self.y = np.zeros((groups, inputs)), np.zeros((groups, outputs))
        self.xx, self.xy = np.zeros((groups, inputs, inputs)), np.zeros((groups, inputs, outputs))
        self.yy = np.zeros((groups, outputs))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Count rows ``x [rows, groups, in]`` and ``y [rows, groups, out]``."""
        step = max(1, _BLOCK // max(1, self.groups * (self.inputs + self.outputs)))
        for start in range(0, len(x), step):
            read = x[start : start + step].astype(np.float64).transpose(1, 0, 2)
            said = y[start : start + step].astype(np.float64).transpose(1, 0, 2)
            across = read.transpose(0, 2, 1)
            self.count += read.shape[1]
            self.x += read.sum(axis=1)
            self.y += said.sum(axis=1)
            self.xx += across @ read
            self.xy += across @ said
            self.yy += (said * said).sum(axis=1)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.groups, self.inputs, self.outputs, self.count + other.count)
        for name in ("x", "y", "xx", "xy", "yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def error(self, weight: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        """Sum of squared residuals ``[groups, out]`` of ``weight [groups, out, in]``, ``intercept [groups, out]``."""
        through = np.matmul(weight, self.x[..., None])[..., 0]
        squares = np.einsum("goi,goi->go", weight @ self.xx, weight)
        crossed = np.einsum("goi,gio->go", weight, self.xy)
        found = self.yy - 2 * crossed - 2 * intercept * self.y + squares + 2 * intercept * through
        return np.maximum(found + self.count * intercept**2, 0.0)

    def intercept(self, weight: np.ndarray) -> np.ndarray:
        """The best intercept ``[groups, out]`` for these weights: means then agree."""
        return (self.y - np.matmul(weight, self.x[..., None])[..., 0]) / max(self.count, 1)

    def spread(self) -> np.ndarray:
        """Sum of squares of y about its mean, ``[groups, out]``."""
        return np.maximum(self.yy - self.y**2 / max(self.count, 1), 0.0)


@dataclass(frozen=True)
class Solution:
    """Weights and intercept that fit best.

    Attributes:
        weight: ``[groups, out, in]``.
        intercept: ``[groups, out]``.
        before, after: sum of squared residuals over all outputs, as it was and as it is, on all rows.
        spread: sum of squares of the targets about their means; residuals are small or large beside this.
        ridge: that was taken; infinite where only the intercept was fitted.
    """

    weight: np.ndarray
    intercept: np.ndarray
    before: float
    after: float
    spread: float
    ridge: float


def solve(
    fit: Moments, check: Moments, weight: np.ndarray, intercept: np.ndarray, *, ridge: float = 0.0, free: bool = True
) -> Solution:
    """The best weights and intercept.

    Args:
        fit: most of the rows.
        check: the others. They choose the ridge, and whether the weights move at all; then all rows count.
        weight: as it is, ``[groups, out, in]``.
        intercept: as it is, ``[groups, out]``.
        ridge: fixed; 0: chosen among :data:`RIDGES`.
        free: whether the intercept may move.
    """
    whole = fit + check
    chosen = ridge
    if not chosen:
        kept = fit.intercept(weight) if free else intercept
        errors = {np.inf: float(check.error(weight, kept).sum())}
        for value in RIDGES:
            moved, offset = _solved(fit, weight, intercept, value, free)
            errors[value] = float(check.error(moved, offset).sum())
        chosen = min(errors, key=lambda value: errors[value])
    if np.isinf(chosen):
        moved, offset = weight, whole.intercept(weight) if free else intercept
    else:
        moved, offset = _solved(whole, weight, intercept, chosen, free)
    before, after = float(whole.error(weight, intercept).sum()), float(whole.error(moved, offset).sum())
    return Solution(moved, offset, before, after, float(whole.spread().sum()), chosen)


def _solved(
    sums: Moments, weight: np.ndarray, intercept: np.ndarray, ridge: float, free: bool
) -> tuple[np.ndarray, np.ndarray]:
    count = max(sums.count, 1)
    if free:
        xx = sums.xx - sums.x[:, :, None] * sums.x[:, None, :] / count
        xy = sums.xy - sums.x[:, :, None] * sums.y[:, None, :] / count
    else:
        xx, xy = sums.xx.copy(), sums.xy - sums.x[:, :, None] * intercept[:, None, :]
    wanted = xy - xx @ weight.transpose(0, 2, 1)
    scale = np.trace(xx, axis1=1, axis2=2) / sums.inputs
    # an input that never moves leaves the matrix singular: the floor keeps it solvable and its weights where they are
    amount = np.maximum(ridge * scale, np.finfo(np.float64).tiny * 1e20)
    xx[:, np.arange(sums.inputs), np.arange(sums.inputs)] += amount[:, None]
    moved = weight + np.linalg.solve(xx, wanted).transpose(0, 2, 1)
    return moved, (sums.intercept(moved) if free else intercept)
