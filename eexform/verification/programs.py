"""Verification of what lives in memory: a program of ``torch.export``, or a module that ``to_torch`` made.

Neither says what it should do, so both are held against the graph with exits that they were made from, which the
simulator runs in onnxruntime. Files are not opened here: torch's loader runs what a file tells it to.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode

from eexform.backends.fx import raise_to_fx
from eexform.backends.multi_exit import MultiExitModule
from eexform.backends.planned import Planned
from eexform.backends.write_back import write_back
from eexform.errors import EexformError, ModelError, OptionError
from eexform.ir.graph import Graph
from eexform.ir.policy import Decisions
from eexform.verification.behaviour import Behaviour, Report, middles
from eexform.verification.simulate import simulate, take

_HEAVY = frozenset(
    (
        *("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "einsum", "convolution", "_convolution"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"),
        *("mkldnn_rnn_layer", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell"),
    )
)
"""Operators whose results are counted as work."""

_TIE = 1e-5
"""As :data:`eexform.ir.policy.TIE`, between torch and onnxruntime: other kernels, so the last digits differ by more
(2e-6 in the confidences of a network of 20 layers)."""

_SAMPLES = 24
"""How many samples are run one by one to see what each costs."""


def expected(made: object, against: Graph | Planned) -> Graph:
    """The graph with exits that ``made`` is held against.

    Raises:
        ModelError: ``made`` is nothing that can be verified.
        OptionError: ``against`` has no exits, or is no graph and no plan.
    """
    if not isinstance(made, ExportedProgram | MultiExitModule):
        hint = "; a program is verified itself, not its .module()" if isinstance(made, fx.GraphModule) else ""
        raise ModelError(
            "verify takes the path of an exported file, a program of torch.export that eexform lowered, or a module "
            f"with exits that to_torch made, not {type(made).__name__}{hint}"
        )
    if not isinstance(against, Graph):
        if not hasattr(against, "materialise") or hasattr(against, "front"):
            raise OptionError(
                "against: expected the plan (run.front.pick) or the graph with exits that this was made from, found "
                f"{type(against).__name__}"
            )
        against = against.materialise(lean=isinstance(made, ExportedProgram))  # as to_torch and export raise a plan
    if not against.exits:
        raise OptionError(
            "against: this graph has no exits. A program or module does not say what it should do: give the plan "
            "(run.front.pick), or the graph with exits that it was made from"
        )
    return against


def verify_torch(
    made: ExportedProgram | MultiExitModule,
    graph: Graph,
    feeds: Mapping[str, np.ndarray],
    threads: int = 1,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    progress: Callable[[str, int, int], None] = lambda name, made, total: None,
) -> Report:
    """Verify against the graph with exits that it was made from (see :func:`expected`); it is not changed.

    Raises:
        DataError: the samples do not fit.
        ModelError: the program has not the structure that eexform writes.
    """
    network: _Network = _Program(made, graph) if isinstance(made, ExportedProgram) else _Module(made, graph)
    verifier = _TorchVerifier(network, graph, feeds, atol, rtol, progress)
    verifier.run(threads)
    return Report(tuple(verifier.checks), network.form, verifier.count, verifier.ties)


class _Network:
    """What both have in common: they run on tensors, and can be put under other thresholds."""

    form = ""

    def __init__(self, graph: Graph, state: Mapping[str, torch.Tensor]) -> None:
        self.graph, self.state = graph, state

    def thresholds(self) -> list[float]:
        """As they stand there."""
        raise NotImplementedError

    def place(self, thresholds: Sequence[float]) -> nn.Module:
        """Something to call, under these thresholds."""
        raise NotImplementedError

    def tensors(self, feeds: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        """The inputs in order; copies, since arrays may be read-only."""
        return [torch.from_numpy(np.array(feeds[name])) for name in self.graph.inputs]

    def run(
        self, feeds: Mapping[str, np.ndarray], thresholds: Sequence[float] | None = None, *, optimize: bool = True
    ) -> Decisions:
        """Run a batch; ``optimize`` means nothing here.

        Raises:
            ModelError: it cannot run.
        """
        called = self.place(self.thresholds() if thresholds is None else thresholds)
        inputs = self.tensors(feeds)
        try:
            with torch.no_grad():
                scores, index, confidence = called(*inputs)
        except EexformError:
            raise
        except Exception as error:  # torch raises whatever it raises
            raise ModelError(f"it cannot run a batch of {len(inputs[0])}: {_first(error)}") from error
        return Decisions(*(value.detach().cpu().numpy() for value in (index, scores, confidence)))


class _Module(_Network):
    """A module with exits."""

    form = "module"

    def __init__(self, module: MultiExitModule, graph: Graph) -> None:
        super().__init__(graph, module.state_dict())
        self.module = copy.deepcopy(module).cpu().eval()  # its thresholds are changed
        self.own = list(module.thresholds)

    def thresholds(self) -> list[float]:
        return self.own

    def place(self, thresholds: Sequence[float]) -> nn.Module:
        self.module.thresholds = tuple(thresholds)
        return self.module


class _Program(_Network):
    """A program with one conditional inside the other."""

    form = "torch"

    def __init__(self, program: ExportedProgram, graph: Graph) -> None:
        super().__init__(graph, program.state_dict)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own parts as they are copied
            self.module = copy.deepcopy(program.module())  # its thresholds are changed; branches are the program's own
        self.levels = _levels(self.module)
        self.own = [float(str(node.args[1])) for _, node in self.levels]

    def thresholds(self) -> list[float]:
        return self.own

    def place(self, thresholds: Sequence[float]) -> nn.Module:
        if len(thresholds) != len(self.levels):
            raise ModelError(f"the program has {len(self.levels)} exits, expected {len(thresholds)}")
        for (level, node), threshold in zip(self.levels, thresholds, strict=True):
            if node.args[1] != float(np.float32(threshold)):
                node.args = (node.args[0], float(np.float32(threshold)))
                level.recompile()
        return self.module


def _levels(module: nn.Module) -> list[tuple[fx.GraphModule, fx.Node]]:
    """Of each exit, outermost first: the graph that decides there, and the comparison with the threshold."""
    found: list[tuple[fx.GraphModule, fx.Node]] = []
    level: Any = module
    while isinstance(level, fx.GraphModule):
        forks = [node for node in level.graph.nodes if node.target is torch.ops.higher_order.cond]
        if not forks:
            break
        node: Any = forks[0].args[0]
        while isinstance(node, fx.Node) and node.target is not torch.ops.aten.ge.Scalar:
            node = node.args[0] if node.op == "call_function" and node.args else None
        branch: Any = forks[0].args[1]
        if len(forks) > 1 or not isinstance(node, fx.Node) or not isinstance(branch, fx.Node):
            raise ModelError("the program has a conditional that eexform does not write; was it exported by eexform?")
        found.append((level, node))
        level = level.get_submodule(str(branch.target))
    return found


class _TorchVerifier(Behaviour):
    def __init__(
        self,
        network: _Network,
        graph: Graph,
        feeds: Mapping[str, np.ndarray],
        atol: float,
        rtol: float,
        progress: Callable[[str, int, int], None],
    ) -> None:
        super().__init__(network, len(graph.exits), graph, feeds, atol, rtol, progress, 4)
        self.made, self.graph = network, graph

    def run(self, threads: int) -> None:
        """Ask everything."""
        if not self.ask("exits", self._exits):
            return
        self.ask("thresholds", self._thresholds)
        self.ask("parameters", self._parameters)
        simulated = replace(simulate(self.graph, self.feeds, threads=threads), tie=_TIE)
        self.behaves(simulated)
        self.ask("skipped work", lambda: self._skipped(middles(simulated)))

    def _exits(self) -> tuple[bool, str]:
        found = len(self.made.thresholds())
        if found != self.places:
            return False, f"{found} exits, the graph has {self.places}: was it made from this graph?"
        return True, f"{found}"

    def _thresholds(self) -> tuple[bool, str]:
        wrong = [
            f"exit {place} compares with {found:.8g}, planned is {item.threshold:.8g}"
            for place, (item, found) in enumerate(zip(self.graph.exits, self.made.thresholds(), strict=True))
            if np.float32(found) != np.float32(item.threshold)
        ]
        return not wrong, "; ".join(wrong) or "as planned"

    def _parameters(self) -> tuple[bool, str]:
        same = write_back(self.graph, self.made.state).parameters()
        ours = self.graph.parameters()
        wrong = [name for name, values in ours.items() if not np.array_equal(values, same[name], equal_nan=True)]
        if wrong:
            return False, (
                f"{len(wrong)} of {len(ours)} parameters are not the graph's (first {wrong[0]!r}); of a module that "
                "was trained, verify against write_back(graph, module)"
            )
        return True, f"all {len(ours)} as in the graph"

    def _skipped(self, thresholds: Sequence[float]) -> tuple[bool, str]:
        """Work of heavy operators: of who leaves at an exit no more than the flat graph needs to get there, and of a
        batch no more than of its samples alone."""
        first = take(self.graph, self.feeds, np.arange(1))
        for place, needed in enumerate(_needed(self.graph, first)):
            found = self._work(first, [np.inf] * place + [-np.inf] * (self.places - place))
            if found > needed:
                return False, (
                    f"a sample that leaves at {self._label(place)} costs {found / max(needed, 1):.2f} times what the "
                    "way there needs: something is computed that it does not use"
                )
        rows = np.arange(min(self.count, _SAMPLES))
        alone = sum(self._work(take(self.graph, self.feeds, rows[place : place + 1]), thresholds) for place in rows)
        together = self._work(take(self.graph, self.feeds, rows), thresholds)
        if together > alone:
            return False, f"a batch of {len(rows)} costs {together / alone:.2f} times what its samples cost alone"
        return (
            True,
            f"rows that left are not computed further ({len(rows)} samples cost {together / alone:.2f} together)",
        )

    def _work(self, feeds: Mapping[str, np.ndarray], thresholds: Sequence[float]) -> int:
        with _Work() as counted:
            self.made.run(feeds, thresholds)
        return counted.elements


class _Work(TorchDispatchMode):
    """Counts the elements that heavy operators give; of a conditional it runs the branch that is taken."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.higher_order.cond:
            condition, taken, left, operands = args
            with self:
                return (taken if bool(condition) else left)(*operands)
        found = func(*args, **(kwargs or {}))
        if getattr(func, "overloadpacket", None) is not None and func.overloadpacket.__name__ in _HEAVY:
            self.elements += (found if isinstance(found, torch.Tensor) else found[0]).numel()
        return found


class _Counting(fx.Interpreter):
    """Runs a flat module, and keeps the work of each of its nodes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.work: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with _Work() as counted:
            found = super().run_node(n)
        self.work[n] = counted.elements
        return found


def _needed(graph: Graph, feeds: Mapping[str, np.ndarray]) -> list[int]:
    """Work that a sample cannot leave at each exit without, the final classifier last; read off the flat graph."""
    module = raise_to_fx(graph)
    counting = _Counting(module)
    with torch.no_grad():
        counting.run(*(torch.from_numpy(np.array(feeds[name])) for name in graph.inputs))
    (given,) = module.graph.output_node().args
    assert isinstance(given, Sequence)
    by_name = dict(zip(graph.outputs, given, strict=True))
    reached: set[fx.Node] = set()
    work = []
    for values in (*(item.values for item in graph.exits), (graph.final,)):
        waiting: list[Any] = [by_name[value] for value in values]
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting += node.all_input_nodes
        work.append(sum(counting.work[node] for node in reached))
    return work


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
