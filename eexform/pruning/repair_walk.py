"""Run a graph piece by piece on all samples, so that what lies ahead can still be changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from eexform.backends import ort
from eexform.errors import GraphError
from eexform.ir.arithmetic import size_of
from eexform.ir.extract import extract
from eexform.ir.graph import Graph
from eexform.ir.types import TensorType

Feeds = Mapping[str, np.ndarray]
_UNKNOWN = 4  # bytes of an element of unknown type


class Walk:
    """Executes a graph from its inputs onwards, no node twice, and holds only what is still needed.

    Memory: the live set (see :meth:`eexform.ir.flow.DataFlow.live`) of all samples, plus the values that were asked
    for ahead (:meth:`want`). Samples stay in the chunks in which they came, so no axis has to be the batch.

    Attributes:
        graph: as it was given; :meth:`change` does not touch it.
    """

    def __init__(self, graph: Graph, chunks: Sequence[Feeds], *, threads: int = 1) -> None:
        self.graph = graph
        self._flow = graph.flow
        self._held: list[dict[str, np.ndarray]] = [dict(feeds) for feeds in chunks]
        self._done: set[str] = set()
        self._wanted: set[str] = set()
        self._changed: dict[str, np.ndarray] = {}
        self._biases: dict[str, str] = {}
        self._threads = threads

    def want(self, values: Iterable[str]) -> None:
        """Keep these values, once they are there, until they are dropped."""
        self._wanted.update(values)

    def drop(self, values: Iterable[str]) -> None:
        """Values that were wanted are no longer."""
        self._wanted.difference_update(values)

    def change(self, arrays: Mapping[str, np.ndarray], biases: Mapping[str, str] | None = None) -> None:
        """From here on nodes compute with ``arrays`` in place of constants; ``biases``: node = array that it adds."""
        self._changed.update(arrays)
        self._biases.update(biases or {})

    def unmade(self, value: str) -> frozenset[str]:
        """The nodes that have to run yet before ``value`` is there."""
        return self._flow.ancestors([value]) - self._done

    def reach(self, values: Sequence[str]) -> None:
        """Run what is missing for ``values`` and hold them; what nobody needs any more is let go.

        Raises:
            GraphError: a value was let go before, because nobody had wanted it.
        """
        missing = [name for name in dict.fromkeys(values) if name not in self._held[0]]
        if missing:
            self._run(missing)
        keep = {*self._flow.live(self._done), *self._wanted, *values}
        for held in self._held:
            for name in [name for name in held if name not in keep]:
                del held[name]

    def arrays(self, value: str) -> Iterator[np.ndarray]:
        """What ``value`` holds, chunk by chunk."""
        return (held[value] for held in self._held)

    def shift(self, value: str, axis: int, by: np.ndarray) -> None:
        """Add one number per position of ``axis`` to a value that is held, as a change of its producer would have."""
        for held in self._held:
            array = held[value]
            shape = [1] * array.ndim
            shape[axis] = len(by)
            held[value] = array + by.reshape(shape).astype(array.dtype)

    def _run(self, missing: Sequence[str]) -> None:
        ahead = self._flow.ancestors(missing) - self._done
        if not ahead:
            raise GraphError(f"the values {list(missing)} were computed and let go; want them beforehand")
        done = self._done | ahead
        held = set(self._held[0])
        made = {tensor.name for name in ahead for tensor in self._flow.nodes[name].outputs if tensor.name}
        behind = [name for name in self._flow.live(done) if name in made]
        outputs = list(dict.fromkeys([*missing, *behind, *sorted(self._wanted & made)]))
        part = self._with_changes(extract(self.graph, sorted(held), outputs))
        session = ort.session(part, threads=self._threads)
        taken = {value.name for value in session.get_inputs()}
        for values in self._held:
            values.update(ort.run(session, {name: array for name, array in values.items() if name in taken}, outputs))
        self._done = done

    def _with_changes(self, part: Graph) -> Graph:
        """The part (whose tensors are its own) with the changed arrays in place."""
        for node in part.nodes:
            if node.name in self._biases and (len(node.inputs) < 3 or node.inputs[2].is_empty()):
                name = self._biases[node.name]
                node.inputs = [*node.inputs[:2], gs.Constant(name, self._changed[name])]
            for place, tensor in enumerate(node.inputs):
                if isinstance(tensor, gs.Constant) and tensor.name in self._changed:
                    node.inputs[place] = gs.Constant(tensor.name, self._changed[tensor.name])
        return part


def bytes_of(kind: TensorType | None) -> int:
    """Bytes of one sample of a value; 0 where its size is not known."""
    if kind is None or kind.shape is None:
        return 0
    try:
        count = int(np.prod([size_of(dim, "") for dim in kind.shape], dtype=np.float64))
    except GraphError:
        return 0
    return count * (_UNKNOWN if kind.dtype is None else np.dtype(kind.dtype).itemsize)


def peak(graph: Graph) -> int:
    """Bytes per sample that a :class:`Walk` holds at most, where it stops behind every node, in order."""
    flow = graph.flow
    last: dict[str, int] = {}
    for place, name in enumerate(flow.topological):
        for value in flow.data_inputs(name):
            last[value] = place
    held = sum(bytes_of(graph.types.get(name)) for name in graph.inputs)
    most = held
    ending: dict[int, list[str]] = {}
    for value, place in last.items():
        ending.setdefault(place, []).append(value)
    for place, name in enumerate(flow.topological):
        made = [tensor.name for tensor in flow.nodes[name].outputs if flow.is_data(tensor.name)]
        held += sum(bytes_of(graph.types.get(value)) for value in made)
        most = max(most, held)
        held -= sum(bytes_of(graph.types.get(value)) for value in (*ending.get(place, ()),))
        held -= sum(bytes_of(graph.types.get(value)) for value in made if value not in last)
    return most
