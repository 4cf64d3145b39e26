"""Figures of a device file from measured kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from eexform.cost_models._kernels import Class, Kernel, kernels
from eexform.cost_models._routing import RoutingFit
from eexform.cost_models._timing import machine
from eexform.cost_models.roofline import computed_in, padded_macs
from eexform.errors import OptionError, need
from eexform.ir.graph import Graph

_CLASSES: tuple[Class, ...] = ("conv", "depthwise", "matmul")
_NARROW = ("float16", "int8")
_BLOCKS = (None, 4, 8, 16)
_BETTER = 0.98
"""A channel block is believed where it lowers the loss to this share of what it is without one."""

_SOFT = 0.3
"""Relative errors beyond this count linearly and not squared, so that odd kernels do not pull the figures."""

_PRIOR = 1.0
"""Weight of the prior, in kernels: a figure that one odd kernel alone depends on stays near where it begins (a small
network's only pooling would have all element-wise work thirty times too dear), one that many depend on does not."""


def onto_kernels(
    graph: Graph, times: Mapping[str, float], bindings: Mapping[str, int] | None = None
) -> tuple[list[tuple[Kernel, float]], float]:
    """Times that a runtime took for nodes, as times of this package's kernels.

    A runtime's own kernels are others: it changes layouts in between, and leaves some patterns apart. What it takes for
    them is a part of what the network takes, so it is added to the kernel whose nodes they belong to.

    Args:
        graph: the network.
        times: microseconds by node; several of the runtime's kernels may belong to one node.
        bindings: sizes of symbolic dimensions other than the batch.

    Returns:
        Kernels with the microseconds of their nodes, those of views behind them included; and what was taken for nodes
        of none (shape arithmetic), which is shared out among the kernels in equal parts.
    """
    known = kernels(graph, bindings)
    place = {name: place for place, kernel in enumerate(known) for name in kernel.nodes}
    taken, rest = [0.0] * len(known), 0.0
    for name, us in times.items():
        owner: str | None = name
        while owner is not None and owner not in place:  # a view: who made what it looks at
            read = graph.flow.data_inputs(owner)
            owner = graph.flow.producer.get(read[0]) if read else None
        if owner is None:
            rest += us
        else:
            taken[place[owner]] += us
    pairs = [(kernel, us) for kernel, us in zip(known, taken, strict=True) if us > 0]
    return [(kernel, us + rest / len(pairs)) for kernel, us in pairs], rest


def fit(
    pairs: Sequence[tuple[Kernel, float]],
    *,
    routing: RoutingFit | None = None,
    call_us: float = 0.0,
    threads: int = 1,
    name: str = "calibrated",
    title: str = "",
) -> dict[str, Any]:
    """A device whose rooflines come closest to measured kernels.

    Peaks and efficiencies are those of the roofline model: with c the class of a kernel, ``launch + max(operations /
    (peak x efficiency_c), bytes / bandwidth)``. Only the product of peak and efficiency can be measured, so the peak is
    the rate of the fastest class. Robust least squares (soft l1) of the logarithms of predicted to measured time.

    Args:
        pairs: kernels for one sample, and microseconds that each takes in a network.
        routing: what exits cost, as measured.
        call_us: what one run of a network costs beside its kernels.
        threads: that everything was measured with.
        name: of the device.
        title: of the device; by default this machine's processor.

    Returns:
        Plain values as in a device file (:meth:`eexform.cost_models._device.Device.from_json`).

    Raises:
        OptionError: fewer than eight kernels took any time.
    """
    known = [(kernel, us) for kernel, us in pairs if us > 0 and kernel.read_bytes + kernel.write_bytes > 0]
    need(
        len(known) >= 8, f"{len(known)} measured kernels are too few to fit a device to; give more models", OptionError
    )
    fits = {block: _Data.of(known, block).solve() for block in _BLOCKS}
    block = min(_BLOCKS, key=lambda candidate: fits[candidate].loss)
    if fits[block].loss > _BETTER * fits[None].loss:
        block = None
    best = fits[block]
    return _device(best, block, len(known), routing, call_us, threads, name, title)


@dataclass(frozen=True)
class _Solution:
    """Rates in 10^3 operations or bytes per microsecond (10^9 per second), ``launch`` in microseconds."""

    launch: float
    rates: Mapping[str, float]
    bandwidth: float
    elementwise: float
    faster: Mapping[str, float]
    loss: float
    error: float


@dataclass(frozen=True, eq=False)
class _Data:
    """Kernels as arrays, one entry each."""

    operations: np.ndarray
    moved: np.ndarray
    us: np.ndarray
    kind: np.ndarray  # place in _CLASSES; -1 element-wise
    narrow: np.ndarray  # place in _NARROW; -1 for wider types

    @classmethod
    def of(cls, pairs: Sequence[tuple[Kernel, float]], block: int | None) -> _Data:
        found = [kernel for kernel, _ in pairs]
        return cls(
            np.array([2.0 * padded_macs(kernel, block) + kernel.flops for kernel in found]),
            np.array([float(kernel.read_bytes + kernel.write_bytes + kernel.weight_bytes) for kernel in found]),
            np.array([us for _, us in pairs]),
            np.array([_CLASSES.index(k.kind) if k.kind in _CLASSES else -1 for k in found]),
            np.array([_NARROW.index(t) if (t := computed_in(kernel, "")) in _NARROW else -1 for kernel in found]),
        )

    def predict(self, logs: np.ndarray) -> np.ndarray:
        """Microseconds by figures as :meth:`begin` orders them."""
        launch, elementwise, above, *rest = np.exp(logs)
        bandwidth = elementwise * (1.0 + above)  # whatever moves bytes and nothing else sees at most the bandwidth
        rates, faster = np.array(rest[: len(_CLASSES)]), np.array([*rest[len(_CLASSES) :], 1.0])
        peak = np.append(rates, rates.max())  # the last one: what is no product reaches the peak
        compute = self.operations / (peak[self.kind] * faster[self.narrow]) / 1e3
        moving = self.moved / np.where(self.kind < 0, elementwise, bandwidth) / 1e3
        return launch + np.maximum(compute, moving)

    def begin(self) -> np.ndarray:
        """Logarithms of launch, element-wise bandwidth, share by which the bandwidth is above that, a rate per class, a
        factor per narrow type."""
        launch = max(1e-3, float(np.quantile(self.us, 0.05)) / 2)
        rest = np.maximum(self.us - launch, 0.2 * self.us)
        plain = self.kind < 0
        bandwidth = _typical(self.moved, rest, plain if plain.any() else np.ones_like(plain))
        products = _typical(self.operations, rest, ~plain) if (~plain).any() else 10 * bandwidth
        rates = [
            _typical(self.operations, rest, self.kind == place) if (self.kind == place).any() else products
            for place in range(len(_CLASSES))
        ]
        return np.log([launch, bandwidth, 0.1, *rates, *([1.0] * len(_NARROW))])

    def solve(self) -> _Solution:
        start, target = self.begin(), np.log(self.us)
        share = 1.0 / np.sqrt(len(self.us))

        def residuals(logs: np.ndarray) -> np.ndarray:
            return np.concatenate(
                [share * (np.log(self.predict(logs)) - target), _PRIOR * share.mean() * (logs - start)]
            )

        found = least_squares(residuals, start, loss="soft_l1", f_scale=_SOFT * float(share.mean()), x_scale="jac")
        launch, elementwise, above, *rest = (float(value) for value in np.exp(found.x))
        error = np.abs(self.predict(found.x) / self.us - 1.0)
        return _Solution(
            launch=launch,
            rates={kind: rest[place] for place, kind in enumerate(_CLASSES) if (self.kind == place).any()},
            bandwidth=elementwise * (1.0 + above),
            elementwise=elementwise,
            faster={
                dtype: rest[len(_CLASSES) + place]
                for place, dtype in enumerate(_NARROW)
                if ((self.narrow == place) & (self.kind >= 0)).any()
            },
            loss=float(found.cost),
            error=float(np.median(error)),
        )


def _typical(amount: np.ndarray, us: np.ndarray, chosen: np.ndarray) -> float:
    """Amount per nanosecond of the chosen kernels together."""
    return max(1e-6, float(amount[chosen].sum() / us[chosen].sum()) / 1e3)


def _device(
    found: _Solution,
    block: int | None,
    count: int,
    routing: RoutingFit | None,
    call_us: float,
    threads: int,
    name: str,
    title: str,
) -> dict[str, Any]:
    rates = dict(found.rates)
    peak = max(rates.values(), default=found.bandwidth)
    compute: dict[str, Any] = {"peak_gflops_float32": _round(peak)}
    for dtype, key in (("float16", "peak_gflops_float16"), ("int8", "peak_gops_int8")):
        if dtype in found.faster:
            compute[key] = _round(peak * found.faster[dtype])
    sections: dict[str, dict[str, Any]] = {
        "compute": {**compute, "threads": threads},
        "memory": {"bandwidth_gb_per_s": _round(found.bandwidth)},
        "kernel": {"launch_us": _round(found.launch), "call_us": _round(call_us)},
        "efficiency": {
            **{kind: _round(rate / peak) for kind, rate in rates.items()},
            "elementwise": _round(found.elementwise / found.bandwidth),
        },
    }
    if block is not None:
        sections["kernel"]["channel_block"] = block
    how = f"calibrated: fitted to {count} measured kernels, half of them within {found.error:.0%}"
    why = dict.fromkeys(sections, how)
    if routing is not None:
        sections["routing"] = {key: float(value) for key, value in routing.to_json().items()}
        why["routing"] = "calibrated: fitted to lowered networks with one exit"
    sources = {f"{section}.{key}": why[section] for section, values in sections.items() for key in values}
    sources["kernel.call_us"] = "calibrated: measured"
    del sources["compute.threads"]
    return {"name": name, "title": title or f"{machine()['device']}, calibrated", **sections, "sources": sources}


def _round(value: float) -> float:
    """Four digits: more would only pretend."""
    return float(f"{value:.4g}")
