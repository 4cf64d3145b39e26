"""Mend what a cut has moved, from samples and without labels, layer by layer.

A cut takes inputs away from every layer behind it. Three remedies, each in closed form:

* ``batch_norm``: new mean and variance of every BatchNormalization's input.
* ``bias``: the mean of every layer's result moves to that of the reference: ``b + E[y_ref] - E[y]`` per channel (Nagel
  et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.2, empirically).
* ``least_squares``: every layer's weights are fitted anew to say what the reference says (:mod:`.repair_squares`; He et
  al. 2017). Where the result is added to another branch, its target is what the reference holds *after* the sum,
  less what the other branch holds here, so that a layer also makes up for what went wrong beside it (He et al.,
  section 3.3).

The layers come in the order in which they are computed, and each sees its inputs as the repaired layers before it make
them, so that errors do not pile up unseen. For that, both networks are run piece by piece (:mod:`.repair_walk`), each
node once. What a channel is compared with is the same channel of the value of the same name in the reference; values
that the reference does not have, such as those of a dropped block's neighbours under new names, are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from eexform.errors import PassError, need
from eexform.ir.graph import Graph
from eexform.pruning.repair_layers import (
    Layer,
    Norm,
    as_stored,
    find_layers,
    find_norms,
    passes_on,
    rows,
    weights_of,
)
from eexform.pruning.repair_match import Match, touched
from eexform.pruning.repair_squares import Moments, solve
from eexform.pruning.repair_walk import Walk, peak
from eexform.pruning.samples import CalibrationData

METHODS = ("batch_norm", "bias", "least_squares", "all")

_CHUNK = 64
_CHUNK_BYTES = 64 << 20
_ROWS = 16
"""Rows per unknown of an output channel that a fit looks at."""
_FEWEST_ROWS, _MOST_ROWS = 1 << 13, 1 << 16
_WIDEST = 8192
"""Inputs per output channel up to which normal equations are set up (512 MiB at the most)."""
_STREAM = 0x4E9A


@dataclass(frozen=True)
class Repaired:
    """What a repair found.

    Attributes:
        arrays: new values of constants, by name.
        biases: node = name of the array that becomes its bias, where it had none.
        skipped: (node, reason) of what was left alone.
        notes: what was done, one line each.
    """

    arrays: Mapping[str, np.ndarray]
    biases: Mapping[str, str]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def repair(
    graph: Graph,
    reference: Graph,
    samples: CalibrationData,
    *,
    method: str = "all",
    most: int = 1024,
    ridge: float = 0.0,
    memory: int = 1024,
    seed: int = 0,
    threads: int = 1,
) -> Repaired:
    """New parameters for a graph that was cut.

    Args:
        graph: the cut graph, without exits.
        reference: the graph before, with the same names.
        samples: inputs; labels are not looked at.
        method: one of :data:`METHODS`. ``all``: least squares, bias where weights cannot be fitted, and statistics
            moved by what the cut has moved for normalisations that follow no layer directly.
        most: samples at most.
        ridge: of the least squares; 0: chosen per layer on held-out rows.
        memory: MiB that the samples' values may take; fewer samples are taken where they would not fit.
        seed: of the positions that are looked at.
        threads: of onnxruntime.

    Raises:
        PassError: a value holds NaN or infinity, or there are no samples.
    """
    work = _Repair(graph, reference, method, ridge, seed)
    work.open(samples, most, memory, threads)
    for name in work.order:
        work.mend(name)
    return work.done()


@dataclass
class _Tally:
    """Errors over the fitted layers, relative to the targets' spread."""

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    moved: int = 0
    shifted: int = 0
    normalised: int = 0


class _Repair:
    def __init__(self, graph: Graph, reference: Graph, method: str, ridge: float, seed: int) -> None:
        self.graph, self.reference, self.method, self.ridge, self.seed = graph, reference, method, ridge, seed
        self.match = Match(graph, reference)
        self.arrays: dict[str, np.ndarray] = {}
        self.biases: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []
        self.tally = _Tally()
        moved = touched(graph, reference, self.match)
        layers, refused = find_layers(graph) if method != "batch_norm" else ({}, {})
        norms, unset = find_norms(graph) if method in ("batch_norm", "all") else ({}, {})
        self.layers = {name: layer for name, layer in layers.items() if name in moved}
        behind = {name for name in norms if any(name in self._chain(layer) for layer in self.layers.values())}
        self.norms = {name: norm for name, norm in norms.items() if name in moved and name not in behind}
        self.skipped.update({name: why for name, why in {**refused, **unset}.items() if name in moved})
        self.order = [name for name in graph.flow.topological if name in self.layers or name in self.norms]
        self.mended: set[str] = set()
        self.busy: set[str] = set()

    def _chain(self, layer: Layer) -> set[str]:
        """Nodes between a layer's operator and its result, which a fit accounts for."""
        flow = self.graph.flow
        return set(flow.ancestors([layer.result])) - set(flow.ancestors([layer.linear]))

    # -- samples -------------------------------------------------------------------------------------------------------

    def open(self, samples: CalibrationData, most: int, memory: int, threads: int) -> None:
        """Take samples, as many as fit."""
        compares = bool(self.layers)
        each = max(1, peak(self.graph) + (peak(self.reference) if compares else 0))
        count = max(1, min(most, samples.size, (memory << 20) // each))
        if count < min(most, samples.size):
            self.notes.append(f"{count} samples, more would take over {memory} MiB")
        size = max(1, min(_CHUNK, _CHUNK_BYTES // each, count))
        chunks = list(_chunks(self.graph, samples, count, size))
        need(bool(chunks), "there are no samples: give some with --data")
        self.walk = Walk(self.graph, chunks, threads=threads)
        self.other = Walk(self.reference, chunks, threads=threads) if compares else None
        self.chunks = len(chunks)
        if self.other is not None:
            known = self.reference.flow.producer
            compared = {value for layer in self.layers.values() for value in (layer.result, layer.total)}
            compared |= {norm.source for norm in self.norms.values()}
            self.other.want(compared & set(known))

    # -- one step ------------------------------------------------------------------------------------------------------

    def mend(self, name: str) -> None:
        """Mend one layer or normalisation, and before it the layers that its target takes for done."""
        if name in self.mended or name in self.busy:
            return
        self.busy.add(name)
        layer = self.layers.get(name)
        if layer is not None and layer.other:
            for earlier in sorted(self._open_behind(layer.other), key=self.graph.flow.index):
                self.mend(earlier)
        self.busy.discard(name)
        self.mended.add(name)
        if layer is None:
            self._normalise(self.norms[name])
        else:
            self._mend_layer(layer)

    def _open_behind(self, value: str) -> set[str]:
        """Layers and normalisations that have yet to be mended before ``value`` is what it will be."""
        if value not in self.graph.flow.producer:
            return set()
        return {
            node for node in self.graph.flow.ancestors([value]) if node in self.layers or node in self.norms
        } - self.mended

    def _target(self, layer: Layer) -> tuple[str, str] | str:
        """(value of the reference, value of the graph to take off) for a layer's result; or why there is none."""
        if layer.total and not self.match.obstacle(layer.total) and not self._open_behind(layer.other):
            return layer.total, layer.other
        why = self.match.obstacle(layer.result)
        return (layer.result, "") if why is None else why

    def _mend_layer(self, layer: Layer) -> None:
        target = self._target(layer)
        assert self.other is not None
        if isinstance(target, str):
            self.other.drop([layer.result, layer.total])
            self.skipped[layer.node] = target
            return
        value, other = target
        self.other.drop({layer.result, layer.total} - {value})
        self.other.reach([value])
        fits = self.method in ("least_squares", "all")
        why = self._unfitted(layer)
        if fits and why is None:
            self.walk.reach([layer.source, *filter(None, [other])])
            self._fit(layer, value, other)
        else:
            if fits:
                self.skipped[layer.node] = why or ""
            if self.method in ("bias", "all"):
                self._move_mean(layer, value, other)
        self.other.drop([value])

    def _unfitted(self, layer: Layer) -> str | None:
        if layer.frozen is not None:
            return layer.frozen
        width = weights_of(self.graph.flow.nodes[layer.node]).shape[-1]
        if width > _WIDEST:
            return f"{width} inputs per channel are too many for normal equations (at most {_WIDEST})"
        return None

    def _targets(self, value: str, other: str) -> Iterator[np.ndarray]:
        assert self.other is not None
        theirs = self.other.arrays(value)
        ours = self.walk.arrays(other) if other else iter([None] * self.chunks)
        for reference, beside in zip(theirs, ours, strict=True):
            held = self.match.restrict(reference, value)
            yield held if beside is None else held - beside

    # -- least squares -------------------------------------------------------------------------------------------------

    def _fit(self, layer: Layer, value: str, other: str) -> None:
        node = self.graph.flow.nodes[layer.node]
        weight = weights_of(node)
        groups, outputs, inputs = weight.shape
        parts = Moments(groups, inputs, outputs), Moments(groups, inputs, outputs)
        wanted = min(max(_FEWEST_ROWS, _ROWS * inputs), _MOST_ROWS)
        each = math.ceil(wanted / self.chunks)
        usable = passes_on(layer.slope)
        slope = np.where(usable, layer.slope, 1.0)
        place = self.graph.flow.index(layer.node)
        for chunk, (read, said) in enumerate(
            zip(self.walk.arrays(layer.source), self._targets(value, other), strict=True)
        ):
            rng = np.random.default_rng([self.seed, _STREAM, place, chunk])
            for x, y in rows(layer, node, read, said, each, rng):
                _finite(x, layer.source)
                _finite(y, value)
                wished = (y.reshape(len(y), -1) - layer.offset) / slope
                _finite(wished, layer.result)
                wished = wished.reshape(y.shape)
                held_out = len(x) // 4  # the first samples of the chunk
                parts[1].add(x[:held_out], wished[:held_out])
                parts[0].add(x[held_out:], wished[held_out:])
        free = layer.knob is not None
        none = np.zeros((groups, outputs))
        found = solve(*parts, weight, none, ridge=self.ridge, free=free)
        keep = usable.reshape(groups, outputs)
        fitted = np.where(keep[..., None], found.weight, weight)
        shift = np.where(keep, found.intercept, 0.0).reshape(-1) * slope
        stored = as_stored(node, fitted)
        if not np.isfinite(stored).all():
            self.skipped[layer.node] = f"the fitted weights are too large for {stored.dtype}"
            return
        if found.spread > 0:
            self.tally.before.append(found.before / found.spread)
            self.tally.after.append(found.after / found.spread)
        self.tally.moved += 1
        self._set({node.inputs[1].name: stored})
        if layer.knob is not None:
            self._turn(layer, shift)

    # -- means ---------------------------------------------------------------------------------------------------------

    def _move_mean(self, layer: Layer, value: str, other: str) -> None:
        if layer.knob is None:
            self.skipped[layer.node] = layer.why
            return
        self.walk.reach([layer.result, *filter(None, [other])])
        total, count = np.zeros(len(layer.slope)), 0
        for said, wished in zip(self.walk.arrays(layer.result), self._targets(value, other), strict=True):
            _finite(said, layer.result)
            _finite(wished, value)
            away = wished.astype(np.float64) - said
            axes = tuple(axis for axis in range(away.ndim) if axis != layer.axis)
            total += away.sum(axis=axes)
            count += away.size // len(total)
        shift = total / max(count, 1)
        self.tally.shifted += 1
        self._turn(layer, shift)
        self.walk.shift(layer.result, layer.axis, shift)

    def _turn(self, layer: Layer, shift: np.ndarray) -> None:
        """Let the layer's result gain ``shift [channels]`` from now on."""
        knob = layer.knob
        assert knob is not None
        gain = np.broadcast_to(knob.gain, shift.shape)
        by = np.divide(shift, gain, out=np.zeros_like(shift), where=np.abs(gain) > 0)
        if knob.new:
            kind = self.graph.flow.nodes[layer.node].inputs[1].dtype
            self._set({knob.name: by.astype(kind)}, {knob.node: knob.name})
            return
        old = self.arrays.get(knob.name, self.graph.constants[knob.name].values)
        self._set({knob.name: (old.astype(np.float64) + by.reshape(old.shape)).astype(old.dtype)})

    # -- normalisations ------------------------------------------------------------------------------------------------

    def _normalise(self, norm: Norm) -> None:
        """Take the statistics of what the normalisation reads now.

        Method ``all`` moves the statistics that are there by what the cut has moved, ``m + E[x] - E[x_ref]`` and
        ``v Var[x] / Var[x_ref]``, where the reference has the same value: what the samples are like, and how few they
        are, then cancels out.
        """
        self.walk.reach([norm.source])
        mean, variance = _statistics(self.walk.arrays(norm.source), norm.source)
        constants = self.graph.constants
        if self.other is not None:
            if self.match.obstacle(norm.source) is None:
                self.other.reach([norm.source])
                held = (self.match.restrict(array, norm.source) for array in self.other.arrays(norm.source))
                before, spread = _statistics(held, norm.source)
                mean = mean - before + constants[norm.mean].values
                ratio = np.divide(variance, spread, out=np.ones_like(spread), where=spread > 0)
                variance = ratio * constants[norm.variance].values
            self.other.drop([norm.source])
        self.tally.normalised += 1
        found = {norm.mean: mean, norm.variance: variance}
        self._set({name: values.astype(constants[name].values.dtype) for name, values in found.items()})

    # -- the result ----------------------------------------------------------------------------------------------------

    def _set(self, arrays: Mapping[str, np.ndarray], biases: Mapping[str, str] | None = None) -> None:
        self.arrays.update(arrays)
        self.biases.update(biases or {})
        self.walk.change(arrays, biases)

    def done(self) -> Repaired:
        """All that was found."""
        tally = self.tally
        if tally.moved:
            before, after = (float(np.mean(errors)) if errors else 0.0 for errors in (tally.before, tally.after))
            self.notes.append(
                f"fitted the weights of {tally.moved} layers: squared error beside the reference's variance "
                f"{before:.3g} -> {after:.3g} on average"
            )
        if tally.shifted:
            self.notes.append(f"moved the means of {tally.shifted} layers")
        if tally.normalised:
            self.notes.append(f"took new statistics for {tally.normalised} normalisations")
        order = {name: place for place, name in enumerate(self.graph.flow.topological)}
        skipped = tuple(sorted(self.skipped.items(), key=lambda item: order.get(item[0], -1)))
        return Repaired(self.arrays, self.biases, skipped, tuple(self.notes))


def _chunks(graph: Graph, samples: CalibrationData, count: int, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Feeds of about ``count`` samples: whole batches until there are enough."""
    name = graph.inputs[0]
    axis = graph.types[name].batch_axis or 0
    taken = 0
    for feeds, _ in samples.batches(size):
        missing = [name for name in graph.inputs if name not in feeds]
        need(not missing, f"the samples feed no inputs {missing} of the model")
        for name in graph.inputs:
            _finite(feeds[name], name)
        yield {name: feeds[name] for name in graph.inputs}
        taken += feeds[name].shape[axis]
        if taken >= count:
            return


def _statistics(arrays: Iterable[np.ndarray], value: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (biased) variance per channel of axis 1, float64, merged chunk by chunk (Chan et al. 1983)."""
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for array in arrays:
        flat = np.moveaxis(array, 1, 0).reshape(array.shape[1], -1).astype(np.float64)
        _finite(flat, value)
        size, here = flat.shape[1], flat.mean(axis=1)
        away = here - mean
        spread = ((flat - here[:, None]) ** 2).sum(axis=1)
        squares = squares + spread + away**2 * count * size / (count + size)
        mean = mean + away * size / (count + size)
        count += size
    return mean, squares / max(count, 1)


def _finite(array: np.ndarray, value: str) -> None:
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise PassError(
            f"value {value!r} holds NaN or infinity on the samples: look at the model and the data; repair cannot "
            "take means of that"
        )
