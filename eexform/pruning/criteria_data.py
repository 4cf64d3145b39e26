"""Criteria that run the network on samples: activation-weighted magnitude and the Taylor expansion of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from eexform.backends import ort
from eexform.errors import OptionError, need
from eexform.ir.coupling import positions_of
from eexform.ir.graph import Graph
from eexform.ir.groups import Group, Member
from eexform.pruning.criteria import NEEDS, Criterion, balanced, by_unit, constants, rows, values_of
from eexform.pruning.samples import Batch, CalibrationData, first
from eexform.tunables import parameter

if TYPE_CHECKING:
    import torch

Feeds = Mapping[str, np.ndarray]

TRAINED = ("filter", "table", "reader", "scale", "bias", "other")
"""Roles that gradients reach; statistics of a normalisation are not trained."""

LABELS = ("auto", "given", "none")


@dataclass(frozen=True)
class _Sampled(Criterion):
    """A criterion that runs the network on some samples."""

    needs: ClassVar[tuple[str, ...]] = ("samples",)

    samples: int = parameter(default=256, help="samples to look at, at most")
    batch: int = parameter(default=32, help="samples at a time")

    def __post_init__(self) -> None:
        need(self.samples > 0 and self.batch > 0, "samples and batch must be positive", OptionError)

    def batches(self, data: CalibrationData) -> Iterator[Batch]:
        """Feeds and labels of the first ``samples`` samples."""
        return first(data, self.samples, self.batch)


@dataclass(frozen=True)
class Activation(_Sampled):
    """Norm of the weights that read a unit times the size of what they read.

    Over the weights W of the group that read the unit from a value X: ``s_u = mean_W( a_u / mean_v a_v )`` with
    ``a_u = |W_u|_2 · rms(X_u)``, the root mean square over samples and positions. This is the score of Wanda (Sun et
    al. 2023, ``|W_ij| · |X_j|_2`` for single weights), taken over all that reads a unit: an estimate of how much
    the next layers' results change without it.
    """

    name: ClassVar[str] = "activation"

    def obstacle(self, graph: Graph, group: Group) -> str | None:
        if any(_reading(graph, group)):
            return None
        return "no weights read it from a value of the group, so nothing says how large what they read is"

    def scores(self, graph: Graph, groups: Sequence[Group], samples: CalibrationData | None) -> dict[str, np.ndarray]:
        assert samples is not None  # ``needs`` has been asked
        pairs = {group.name: list(_reading(graph, group)) for group in groups}
        axes: dict[tuple[str, int], Member] = {
            (value.slot.value, value.slot.axis): value for found in pairs.values() for _, value in found
        }
        squares = self._mean_squares(graph, sorted(axes), samples)
        return {
            group.name: balanced(
                [
                    np.linalg.norm(rows(values_of(graph, reader), reader), axis=1)
                    * np.sqrt(by_unit(squares[value.slot.value, value.slot.axis], value) / value.units.shape[1])
                    for reader, value in pairs[group.name]
                ],
                group.size,
            )
            for group in groups
        }

    def _mean_squares(
        self, graph: Graph, slots: Sequence[tuple[str, int]], samples: CalibrationData
    ) -> dict[tuple[str, int], np.ndarray]:
        """Mean square of every position of the slots (value, axis), float64 [axis size]."""
        values = sorted({value for value, _ in slots if value not in graph.inputs})
        wanted = [value for value in values if value not in graph.outputs]
        session = ort.session(ort.tap(graph, wanted))
        total: dict[tuple[str, int], Any] = dict.fromkeys(slots, 0.0)
        count: dict[tuple[str, int], int] = dict.fromkeys(slots, 0)
        for feeds, _ in self.batches(samples):
            found = {**feeds, **(ort.run(session, feeds, values) if values else {})}
            for value, axis in slots:
                dim = (graph.types[value].shape or ())[axis]
                array = np.moveaxis(found[value], axis, -1).astype(np.float64)
                array = array.reshape(-1, positions_of(dim) or array.shape[-1])  # an axis "3*N" holds 3 per sample
                total[value, axis] = total[value, axis] + np.einsum("nc,nc->c", array, array)
                count[value, axis] += len(array)
        return {slot: total[slot] / max(count[slot], 1) for slot in slots}


@dataclass(frozen=True)
class Taylor(_Sampled):
    """How much the loss changes without a unit, by its gradient (needs no labels).

    With ``t_u = Σ θ ∂L/∂θ`` over all trained numbers θ of the unit in every constant of the group: the first-order
    change of the loss when the unit is scaled towards zero (Molchanov et al. 2019, "Importance Estimation for Neural
    Network Pruning"). The score is the mean of ``n · t_u²`` over batches of n samples.

    With labels, L is the cross-entropy with them. Without, the gradient of the divergence from the network's own
    answers p is zero, and what counts is its second order, the Fisher information F of the answers:
    ``KL(p ‖ p without the unit) ≈ ½ Σ θ_i θ_j F_ij``. So L is ``-Σ_y r_y √p_y log p_y`` over the classes y, with random
    signs r for every sample and the factors ``√p_y`` held fixed: then the mean of ``n · t_u²`` is that sum over i and j
    (Hutchinson's estimator; a label drawn from p would do, too, but sure answers need very many of them).
    """

    name: ClassVar[str] = "taylor"

    labels: str = parameter(
        default="auto", help="given: by the data; none: the network's own answers; auto: given where there are any"
    )
    draws: int = parameter(default=1, help="without labels, how often signs are drawn for each batch")
    seed: int = parameter(default=0, help="of the signs")

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.labels in LABELS, f"labels: {self.labels!r} is none of {', '.join(LABELS)}", OptionError)
        need(self.draws > 0 and self.seed >= 0, "draws must be positive and seed not negative", OptionError)

    def obstacle(self, graph: Graph, group: Group) -> str | None:
        found = [values_of(graph, member) for member in constants(group, TRAINED)]
        if any(np.issubdtype(array.dtype, np.floating) for array in found):
            return None
        return "it has no constants that a gradient could reach"

    def scores(self, graph: Graph, groups: Sequence[Group], samples: CalibrationData | None) -> dict[str, np.ndarray]:
        assert samples is not None  # ``needs`` has been asked
        network = Gradients(graph, groups)
        total = {group.name: np.zeros(group.size) for group in groups}
        seen = 0
        for feeds, labels in self.batches(samples):
            if labels is None and self.labels == "given":
                raise OptionError(f"criterion {self.name!r} {NEEDS['labels']}")
            given = labels if self.labels != "none" else None
            count = len(next(iter(feeds.values())))
            for draw in range(1 if given is not None else self.draws):
                rng = np.random.default_rng([self.seed, seen, draw])
                changes = network.changes(feeds, given, rng)
                for name, change in changes.items():
                    total[name] += count * count * change**2  # batches weigh by their samples
                seen += count
        return {name: array / max(seen, 1) for name, array in total.items()}


class Gradients:
    """The network as a torch module that tells first-order changes of the loss, unit by unit."""

    def __init__(self, graph: Graph, groups: Sequence[Group]) -> None:
        """Raise the graph.

        Raises:
            ModelError: an operator cannot be raised to torch.
        """
        from eexform.backends.fx import raise_to_fx

        self._graph = graph
        self._groups = groups
        self._module = raise_to_fx(graph).eval()  # statistics of normalisations stay as they are
        targets: dict[str, str] = self._module.meta["eexform.parameters"]
        state = {
            **dict(self._module.named_parameters(remove_duplicate=False)),
            **dict(self._module.named_buffers(remove_duplicate=False)),
        }
        wanted = {member.slot.value for group in groups for member in constants(group, TRAINED)}
        self._tensors: dict[str, torch.Tensor] = {
            name: state[targets[name]] for name in sorted(wanted) if name in targets
        }
        for tensor in self._tensors.values():
            tensor.requires_grad_(True)

    def changes(self, feeds: Feeds, labels: np.ndarray | None, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``Σ θ ∂L/∂θ`` per unit and group, float64 [size]; L is a mean over the batch, summed over the exits if any.

        Args:
            feeds: arrays by input.
            labels: int [batch]; ``None`` looks at the network's own answers, see :class:`Taylor`.
            rng: for signs.
        """
        import torch

        loss = self.loss(feeds, labels, rng)
        names = list(self._tensors)
        found = torch.autograd.grad(loss, [self._tensors[name] for name in names], allow_unused=True)
        with torch.no_grad():
            products = {
                name: (self._tensors[name] * gradient).to(torch.float64)
                for name, gradient in zip(names, found, strict=True)
                if gradient is not None
            }
        changes = {}
        for group in self._groups:
            total = np.zeros(group.size)
            for member in constants(group, TRAINED):
                product = products.get(member.slot.value)
                if product is not None:
                    axes = [axis for axis in range(product.ndim) if axis != member.slot.axis]
                    total += by_unit((product.sum(dim=axes) if axes else product).numpy(), member)
            changes[group.name] = total
        return changes

    def loss(self, feeds: Feeds, labels: np.ndarray | None, rng: np.random.Generator) -> torch.Tensor:
        """The loss of :meth:`changes`, a scalar with gradient."""
        import torch

        outputs = self._module(*(torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self._graph.inputs))
        scores = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        total = torch.zeros(())
        for answer in scores[: 1 + len(self._graph.exits)]:
            likely = torch.log_softmax(answer, 1) if self._graph.scores == "logits" else answer.clamp_min(1e-12).log()
            if labels is None:
                signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=tuple(likely.shape))).to(likely.dtype)
                total = total - (signs * (likely.detach() / 2).exp() * likely).sum(dim=1).mean()
            else:
                targets = torch.from_numpy(np.asarray(labels).astype(np.int64))
                total = total - likely.gather(1, targets[:, None]).mean()
        return total


def _reading(graph: Graph, group: Group) -> Iterator[tuple[Member, Member]]:
    """Every weight of the group that reads the units, with the value of the group that it reads them from."""
    values = {member.slot.value: member for member in group.members if not member.constant}
    for reader in constants(group, ("reader",)):
        if reader.node not in graph.flow.nodes:
            continue
        for name in graph.flow.data_inputs(reader.node):
            if name in values and values[name].units.shape[0] == reader.units.shape[0]:
                yield reader, values[name]
                break
