"""Networks that do nothing but route, and what routing costs on them as a formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from scipy.optimize import nnls

from eexform.backends.lower_if import lower_if
from eexform.backends.lower_multi import lower_multi
from eexform.cost_models._contract import Crossing, Held, Routing
from eexform.cost_models._probe import time_exit
from eexform.errors import OptionError, need
from eexform.ir.emit import Emitter
from eexform.ir.exits import Exit
from eexform.ir.graph import BATCH, Graph
from eexform.progress import Progress, Silent

OPSET = 17
SHAPES = ((16, 8, 8), (16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 32, 32), (128, 14, 14), (64, 56, 56))
"""Live values on which routing is measured, channels first: 4 to 784 KiB of float32."""
CLASSES = (2, 10, 100, 1000)


# -- stand-ins --------------------------------------------------------------------------------------------------------


def idle_network() -> Graph:
    """A network that hands back its input, ``input`` [N, 1]."""
    value = gs.Variable("input", dtype=np.dtype(np.float32), shape=[BATCH, 1])
    draft = gs.Graph(inputs=[value], outputs=[], name="idle", opset=OPSET)
    draft.outputs = [Emitter(draft).node("Relu", value, name="idle", shape=value.shape)]
    return Graph(draft)


def stand_in(classes: int, shape: Sequence[int]) -> Graph:
    """A tiny network with one exit, at a value of this sample shape: nothing but activations, pooling and scores.

    Its one input is ``input`` [N, *shape]. The exit's threshold is infinite: nobody leaves there.
    """
    value, emitter = _draft(shape, "routing")
    site = emitter.node("Relu", value, name="before", shape=value.shape)
    after = emitter.node("Relu", site, name="after", shape=value.shape)
    return _with_scores(emitter, site, after, classes, shape)


def convolutional_stand_in(classes: int, shape: Sequence[int]) -> Graph:
    """A small residual network with one exit, at a value of this sample shape (channels first, two axes of space).

    Convolutions 1x1 stand before and behind the site and a sum goes around the latter, so what onnxruntime does to the
    layout of convolutions' values it does here as well. Its one input is ``input`` [N, *shape].
    """
    value, emitter = _draft(shape, "routing_conv")
    site = emitter.node("Relu", _mixed(emitter, value, "stem", shape), name="before", shape=value.shape)
    inner = emitter.node("Relu", _mixed(emitter, site, "conv0", shape), name="inner", shape=value.shape)
    added = emitter.node("Add", _mixed(emitter, inner, "conv1", shape), site, name="add", shape=value.shape)
    after = emitter.node("Relu", added, name="after", shape=value.shape)
    return _with_scores(emitter, site, after, classes, shape)


def routing_pair(classes: int, shape: Sequence[int]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """:func:`stand_in` without and with control flow; what the second has more is what lowering adds.

    Returns:
        Models with one input ``input`` [N, *shape]: all scores as outputs; and the lowered one with its ``If``.
    """
    graph = stand_in(classes, shape)
    return lower_multi(graph), lower_if(graph)


def _draft(shape: Sequence[int], name: str) -> tuple[gs.Variable, Emitter]:
    value = gs.Variable("input", dtype=np.dtype(np.float32), shape=[BATCH, *shape])
    return value, Emitter(gs.Graph(inputs=[value], outputs=[], name=name, opset=OPSET))


def _mixed(emitter: Emitter, value: gs.Variable, name: str, shape: Sequence[int]) -> gs.Variable:
    """A convolution 1x1 with as many channels out as in."""
    weight = np.random.default_rng(0).standard_normal((shape[0], shape[0], *(1,) * len(shape[1:]))) / shape[0] ** 0.5
    constant = emitter.constant(f"{name}.weight", weight.astype(np.float32))
    return emitter.node("Conv", value, constant, name=name, shape=value.shape)


def _with_scores(emitter: Emitter, site: gs.Variable, last: gs.Variable, classes: int, shape: Sequence[int]) -> Graph:
    early = _scores(emitter.scoped("exit0."), site, classes, shape)
    final = _scores(emitter, last, classes, shape)
    emitter.draft.outputs = [final, early]
    item = Exit(site=site.name, head="none/avg", logits=early.name, threshold=math.inf)
    return Graph(emitter.draft, exits=[item])


def _scores(emitter: Emitter, value: gs.Variable, classes: int, shape: Sequence[int]) -> gs.Variable:
    """[N, *shape] -> mean over all but the channels -> [N, classes]."""
    channels = shape[0]
    if len(shape) > 1:  # pooled as heads do it: an operator that takes blocked values
        pooled = emitter.node("GlobalAveragePool", value, name="pool", shape=[BATCH, channels, *(1,) * len(shape[1:])])
        value = emitter.node("Flatten", pooled, name="flat", shape=[BATCH, channels], axis=1)
    weight = np.random.default_rng(0).standard_normal((channels, classes)).astype(np.float32)
    constant = emitter.constant("weight", weight)
    return emitter.node("MatMul", value, constant, name="scores", shape=[BATCH, classes])


# -- routing as a formula ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutingPoint:
    """One measurement and what the fit says of it, in microseconds.

    Attributes:
        shape: of the site's value, one sample; nothing else is carried.
        classes: of the classifier.
        decision_us: measured.
        onward_us: measured.
        decision_fitted_us: by the formula.
        onward_fitted_us: by the formula.
    """

    shape: tuple[int, ...]
    classes: int
    decision_us: float
    onward_us: float
    decision_fitted_us: float
    onward_fitted_us: float

    @property
    def live_kib(self) -> float:
        return Held(self.shape).bytes / 1024


@dataclass(frozen=True)
class RoutingFit:
    """Routing at batch 1 as a formula; every coefficient is at least 0.

    ``decision = decision_us + decision_us_per_class * classes + decision_us_per_kib * KiB of the site's value``: a
    head that pools reads a blocked value as it is, while a branch wants it in the network's own layout.
    ``onward = onward_us + onward_us_per_kib * KiB of all live values``.
    """

    decision_us: float
    decision_us_per_class: float
    onward_us: float
    onward_us_per_kib: float
    decision_us_per_kib: float = 0.0
    residuals: tuple[RoutingPoint, ...] = ()

    def routing(self, crossing: Crossing) -> Routing:
        """What an exit at ``crossing`` costs beside its head, in microseconds."""
        carried = sum(held.bytes for held in crossing.live) / 1024
        decision = self.decision_us + self.decision_us_per_class * crossing.classes
        return Routing(
            decision + self.decision_us_per_kib * crossing.value.bytes / 1024,
            self.onward_us + self.onward_us_per_kib * carried,
        )

    def to_json(self) -> dict[str, float]:
        """The coefficients, by the names they have in a device file's ``[routing]``."""
        return {name: value for name, value in vars(self).items() if name != "residuals"}


def measure_routing(
    *,
    threads: int = 1,
    repeats: int = 30,
    shapes: Sequence[Sequence[int]] = SHAPES,
    classes: Sequence[int] = CLASSES,
    layouts: bool = True,
    progress: Progress | None = None,
) -> RoutingFit:
    """Measure small lowered networks on onnxruntime and this machine's CPU at batch 1, and fit.

    Every shape is measured with one number of classes in turn, and the middle shape with all of them: coefficients are
    found by least squares of relative errors under the condition that none is negative (Lawson and Hanson, Solving
    Least Squares Problems, 1974, ch. 23).

    Args:
        threads: of onnxruntime.
        repeats: timed rounds per point.
        shapes: of the site's value, one sample, ``(channels, height, width)``.
        classes: numbers of classes, each at least 2.
        layouts: with what a branch does to the layout of convolutions' values (:func:`convolutional_stand_in`);
            without, it is that of :func:`stand_in`, for models that price layouts themselves.
        progress: told about every point.

    Raises:
        OptionError: no shapes, no classes, or of the wrong kind.
    """
    need(shapes and classes, "routing is measured on at least one shape and one number of classes", OptionError)
    for shape in shapes:
        fits = len(shape) == 3 and min(shape) >= 1
        need(fits, f"shape {tuple(shape)}: expected channels, height and width", OptionError)
    need(min(classes) >= 2, f"classes {list(classes)}: a classifier needs at least 2", OptionError)
    need(threads >= 1 and repeats >= 1, f"threads {threads}, repeats {repeats}: expected at least 1", OptionError)
    middle = tuple(shapes[len(shapes) // 2])
    grid = dict.fromkeys((tuple(shape), classes[place % len(classes)]) for place, shape in enumerate(shapes))
    grid.update(dict.fromkeys((middle, count) for count in classes))
    points = []
    with (progress or Silent()).task("routing", len(grid)) as task:
        for shape, count in grid:
            task.advance(0, f"{'x'.join(map(str, shape))}, {count} classes")
            points.append((shape, count, *_measured(shape, count, threads, repeats, layouts)))
            task.advance()
    return fit_routing(points)


def fit_routing(points: Sequence[tuple[tuple[int, ...], int, float, float]]) -> RoutingFit:
    """The formula closest to measurements ``(shape, classes, decision in us, onward in us)``."""
    kib = [Held(shape).bytes / 1024 for shape, *_ in points]
    decisions, onwards = [point[2] for point in points], [point[3] for point in points]
    ones = [1.0] * len(points)
    decision = _fitted([ones, [float(point[1]) for point in points], kib], decisions)
    onward = _fitted([ones, kib], onwards)
    fit = RoutingFit(decision[0], decision[1], onward[0], onward[1], decision[2])
    residuals = []
    for shape, count, took, went in points:
        said = fit.routing(Crossing("site", Held(shape), (Held(shape),), count))
        residuals.append(RoutingPoint(shape, count, took, went, said.decision, said.onward))
    return RoutingFit(**fit.to_json(), residuals=tuple(residuals))


def _measured(shape: tuple[int, ...], classes: int, threads: int, repeats: int, layouts: bool) -> tuple[float, float]:
    """Decision and onward in microseconds."""
    feeds = {"input": np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)}
    graph = (convolutional_stand_in if layouts else stand_in)(classes, shape)
    times = time_exit(graph, feeds, threads=threads, repeats=repeats, warmup=5, providers=("CPUExecutionProvider",))
    return times.decision * 1e3, times.onward * 1e3


def _fitted(columns: Sequence[Sequence[float]], measured: Sequence[float]) -> list[float]:
    """Coefficients, none below 0, of the least relative error; errors below a microsecond count as absolute ones."""
    target = np.asarray(measured, dtype=np.float64)
    weights = 1.0 / np.maximum(target, 1.0)
    matrix = np.asarray(columns, dtype=np.float64).T  # [points, coefficients]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1.0)
    found, _ = nnls(matrix / scale * weights[:, None], target * weights)
    return [float(value) for value in found / scale]
