"""What the kernels of one network take together: each kernel's time, and what it pays for being one among others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from eexform.cost_models._interpolate import Estimate, Lookup
from eexform.cost_models._kernels import Class, Kernel
from eexform.cost_models._measure_kernels import parallel

CLASSES: tuple[Class, ...] = ("conv", "depthwise", "matmul", "elementwise")
_DRAWN = 1.0
"""Weight of the common figure: that of a network of which every class makes a kernel per microsecond."""


@dataclass(frozen=True, eq=False)
class Prices:
    """Times of kernels inside a network.

    Attributes:
        lookup: times of kernels as they were measured: one kind beside itself.
        between_us: what a kernel of each class takes longer among others than among its like.
        curve: float64 [points, 2]: KiB of parameters in a network, ascending, and microseconds that it takes longer to
            have a KiB of them where the processor needs it; empty: nothing.
    """

    lookup: Lookup
    between_us: Mapping[str, float]
    curve: np.ndarray

    @classmethod
    def of(cls, lookup: Lookup, runtime: Mapping[str, Any]) -> Prices:
        """With the figures that a calibration's ``runtime`` gives."""
        curve = np.array(runtime.get("weights", []), dtype=np.float64).reshape(-1, 2)
        return cls(lookup, dict(runtime.get("between_us", {})), curve)

    def estimates(self, kernels: Sequence[Kernel], among: Sequence[Kernel] = ()) -> list[Estimate | None]:
        """Microseconds of each kernel of a network; ``None`` for an operator that the table does not know.

        Args:
            kernels: what is asked about.
            among: the network that they are a part of, where they are not all of it.
        """
        weights = sum(kernel.weight_bytes for kernel in among or kernels) / 1024
        found: list[Estimate | None] = []
        for kernel in kernels:
            alone = self.lookup.estimate(kernel.op, kernel.variant, kernel.sizes)
            if alone is not None:
                more = self.between_us.get(kernel.kind, 0.0) + self.fetching_us(kernel, weights)
                alone = Estimate(alone.us + more, alone.why)
            found.append(alone)
        return found

    def total_us(self, kernels: Sequence[Kernel]) -> float:
        """Microseconds of those that the table knows, together."""
        return sum(estimate.us for estimate in self.estimates(kernels) if estimate is not None)

    def fetching_us(self, kernel: Kernel, weights_kib: float) -> float:
        """What a kernel takes longer than when it was measured, because a network's parameters do not all stay in the
        cache in which its own were."""
        if not len(self.curve) or not kernel.weight_bytes:
            return 0.0
        own = kernel.weight_bytes / 1024
        slower = self._per_kib(weights_kib) - self._per_kib(own * parallel(kernel.weight_bytes))
        return max(0.0, slower) * own

    def _per_kib(self, kib: float) -> float:
        return float(np.interp(kib, self.curve[:, 0], self.curve[:, 1]))


@dataclass(frozen=True)
class Residual:
    """What the times of its kernels leave of a network's time.

    Attributes:
        us: left, in microseconds.
        kinds: number of kernels per class.
        whole_us: the network's time.
    """

    us: float
    kinds: Mapping[str, int]
    whole_us: float


def surcharges(residuals: Iterable[Residual]) -> dict[str, float]:
    """What a kernel of each class takes longer in a network than among its like, in microseconds, never below 0.

    First one figure for all classes, by least absolute relative errors over networks (a weighted median). Then one per
    class, by least squares under the condition that none is negative, drawn to the common figure: networks of one kind
    alone cannot tell the classes apart, and then all have it.
    """
    rows = [(row, sum(row.kinds.values())) for row in residuals]
    rows = [(row, count) for row, count in rows if count and row.whole_us > 0]
    if not rows:
        return dict.fromkeys(CLASSES, 0.0)
    rates, weights = np.array(sorted((row.us / count, count / row.whole_us) for row, count in rows)).T
    half = int(np.searchsorted(np.cumsum(weights), weights.sum() / 2))
    common = max(0.0, float(rates[min(half, len(rates) - 1)]))
    counts = np.array([[row.kinds.get(kind, 0) / row.whole_us for kind in CLASSES] for row, _ in rows])
    shares = np.array([row.us / row.whole_us for row, _ in rows])
    drawn = np.sqrt(_DRAWN) * np.eye(len(CLASSES))
    found, _ = nnls(np.vstack([counts, drawn]), np.concatenate([shares, common * drawn.sum(0)]))
    return {kind: float(us) for kind, us in zip(CLASSES, found, strict=True)}
