"""A graph with or without exits as a torch module under training: its outputs by exit, its trunk and its heads."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import fx, nn

from eexform.backends.fx import fx_parameters, raise_to_fx
from eexform.errors import ModelError, OptionError, TrainingError
from eexform.heads import with_parameters
from eexform.heads.build import GATE
from eexform.ir import measures
from eexform.ir.exits import Exit
from eexform.ir.extract import extract
from eexform.ir.graph import Graph
from eexform.training.finetune_heads import head_prefix, with_head_digests
from eexform.training.finetune_options import FinetuneOptions

TINY = 1e-12
"""Probabilities are raised to this before their logarithm is taken as a score."""


@dataclass(frozen=True)
class Arithmetic:
    """Where and in what precision a network is computed.

    Attributes:
        device: of parameters and inputs.
        half: type of the forward pass under autocast; ``None`` is float32 throughout.
        channels_last: whether images lie with their channels last, which convolutions on CPUs and tensor cores like.
    """

    device: torch.device
    half: torch.dtype | None
    channels_last: bool

    @classmethod
    def choose(cls, graph: Graph, device: str, amp: str) -> Arithmetic:
        """What ``device`` (``auto`` or a name that torch knows) and ``amp`` mean for this graph on this machine.

        Raises:
            OptionError: there is no such device here, or it has no such arithmetic.
        """
        try:
            wanted = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            found = torch.device(wanted)
            torch.zeros(1, device=found).item()  # "meta" takes tensors, too, and computes nothing
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OptionError(
                f"device {device!r} cannot be used here: {reason}; leave it at auto, or say cpu"
            ) from None
        images = any(node.op in ("Conv", "ConvTranspose") and _image(graph, node) for node in graph.nodes)
        half: torch.dtype | None = None
        if amp == "auto" and found.type == "cuda":
            with torch.cuda.device(found):  # what is asked next is asked of the current one
                half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        elif amp == "auto" and found.type == "cpu":
            half = torch.bfloat16 if images and _cpu_has_bfloat16() else None
        elif amp in ("bfloat16", "float16"):
            half = getattr(torch, amp)
        if half is torch.float16 and found.type != "cuda":
            raise OptionError(
                "amp: float16 needs a CUDA device (small gradients vanish without loss scaling there); use "
                "bfloat16 or off"
            )
        return cls(found, half, images)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return nullcontext() if self.half is None else torch.autocast(self.device.type, dtype=self.half)

    def place(self, module: fx.GraphModule) -> fx.GraphModule:
        """``module`` on the device, in the layout."""
        module.to(self.device)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """An array on the device; images in the layout."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        if self.channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        kind = (
            "float32" if self.half is None else f"{str(self.half).removeprefix('torch.')} forward, float32 parameters"
        )
        return f"{name}, {kind}" + (", channels last" if self.channels_last else "")


@dataclass(frozen=True)
class Outputs:
    """What a network says about a batch.

    Attributes:
        logits: per exit, final last, float32 [B, classes]; the logarithm where the graph's scores are probabilities.
        gates: per early exit its own learned confidence, float32 [B], or ``None``.
        learned: per early exit the confidence its policy uses where that is a value of the graph, or ``None``.
    """

    logits: tuple[torch.Tensor, ...]
    gates: tuple[torch.Tensor | None, ...]
    learned: tuple[torch.Tensor | None, ...]


class Network:
    """The graph's module with its trunk and heads told apart.

    Attributes:
        graph: as given, with exits or without.
        module: the trainable torch module.
        average: a copy that follows the parameters, where they are averaged; it is what is evaluated then.
    """

    def __init__(self, graph: Graph, arithmetic: Arithmetic, *, ema: float = 0.0) -> None:
        self.graph = graph
        self.arithmetic = arithmetic
        self._own = [_gate(graph, item) for item in graph.exits]
        wanted = [graph.final, *(value for item in graph.exits for value in item.values), *filter(None, self._own)]
        self._outputs = list(dict.fromkeys(wanted))
        self.module = arithmetic.place(raise_to_fx(extract(graph, graph.inputs, self._outputs)))
        if arithmetic.half is not None and any(self._own):
            self._widen_gates()
        state = self._state(self.module)
        targets: dict[str, str] = self.module.meta["eexform.parameters"]
        heads = {id(state[targets[name]]) for item in graph.exits for name in item.parameters if name in targets}
        trainable = [(name, tensor) for name, tensor in self.module.named_parameters() if tensor.requires_grad]
        wrong = [name for name, parameter in trainable if parameter.dtype != torch.float32]
        if wrong:
            raise ModelError(
                f"parameter {wrong[0]!r} is {dict(trainable)[wrong[0]].dtype}: a network is trained in float32; load "
                "the float32 model"
            )
        self.heads = [(name, parameter) for name, parameter in trainable if id(parameter) in heads]
        self.trunk = [(name, parameter) for name, parameter in trainable if id(parameter) not in heads]
        if not self.heads and (graph.exits or not self.trunk):
            what = "none of the heads" if graph.exits else "the network has no exits, and no part of it"
            raise ModelError(f"{what} has a parameter that can be trained")
        moving = self._called_with(heads)
        self._still = [
            module
            for module in self.module.modules()
            if module not in moving
            and not any(id(tensor) in heads for tensor in (*module.parameters(), *module.buffers()))
        ]
        self._decay, self._updates = ema, 0
        self.average: fx.GraphModule | None = None
        if ema:
            self.average = copy.deepcopy(self.module)
            self.average.eval().requires_grad_(False)

    # -- running -----------------------------------------------------------------------------------------------------

    def __call__(self, feeds: Sequence[torch.Tensor], *, judged: bool = False) -> Outputs:
        """All exits on a batch.

        Args:
            feeds: the graph's inputs in order.
            judged: as the network will be deployed: in float32, with the averaged parameters where there are any.
        """
        module = self.average if judged and self.average is not None else self.module
        with nullcontext() if judged else self.arithmetic.autocast():
            found = module(*feeds)
        values = dict(zip(self._outputs, found if isinstance(found, tuple) else (found,), strict=True))
        exits = self.graph.exits
        scores = [values[name].float() for name in (*(item.logits for item in exits), self.graph.final)]
        if self.graph.scores == "probabilities":
            scores = [score.clamp_min(TINY).log() for score in scores]
        gates = [values[name].float() if name else None for name in self._own]
        learned = [values[item.confidence].float() if item.confidence else None for item in exits]
        return Outputs(tuple(scores), tuple(gates), tuple(learned))

    def measured(self, outputs: Outputs) -> tuple[torch.Tensor, ...]:
        """The confidence that each early exit's policy looks at, float32 [B] each, without gradient."""
        found = []
        for item, scores, learned in zip(self.graph.exits, outputs.logits, outputs.learned, strict=False):
            if learned is not None:
                found.append(learned.detach())
                continue
            # of probabilities, the logarithm: its softmax are the probabilities, and they have no temperature
            temperature = item.temperature if self.graph.scores == "logits" else 1.0
            probabilities = measures.to_probabilities(scores.detach().cpu().numpy(), "logits", temperature)
            confidence = measures.get(item.measure).confidence(probabilities)
            found.append(torch.from_numpy(confidence).to(scores.device))
        return tuple(found)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, *, heads_only: bool) -> None:
        """Training mode; with ``heads_only`` the trunk stands still, its normalisation statistics included."""
        for _, parameter in self.trunk:
            parameter.requires_grad_(not heads_only)
        self.module.train()
        if heads_only:
            for module in self._still:
                module.training = False

    def groups(self, options: FinetuneOptions, *, heads_only: bool) -> Iterator[dict[str, Any]]:
        """Parameter groups of an optimiser: trunk and heads, with and without decay."""
        kinds = [(self.heads, options.learning_rate)]
        if not heads_only:
            kinds.insert(0, (self.trunk, options.trunk_learning_rate))
        bare = {str(node.target) for node in self.module.graph.nodes if node.op == "get_attr"}
        for members, rate in kinds:
            for decayed in (True, False):
                chosen = [parameter for name, parameter in members if _decays(parameter, name in bare) == decayed]
                if chosen:
                    decay = options.weight_decay if decayed else 0.0
                    yield {"params": chosen, "lr": rate, "weight_decay": decay}

    def names(self, optimiser: torch.optim.Optimizer) -> list[str]:
        """State-dict keys of an optimiser's parameters in its order."""
        known = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return [known[id(parameter)] for group in optimiser.param_groups for parameter in group["params"]]

    def follow(self) -> None:
        """Move the averaged parameters one step towards the current ones."""
        if self.average is None:
            return
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        with torch.no_grad():
            now, old = self._state(self.module, unique=True), self._state(self.average, unique=True)
            floating = [name for name, value in now.items() if value.is_floating_point()]
            torch._foreach_lerp_([old[name] for name in floating], [now[name] for name in floating], 1 - decay)
            for name in now.keys() - set(floating):
                old[name].copy_(now[name])

    def _widen_gates(self) -> None:
        """Let gates take their sigmoid in float32: in half precision those that are surest are 1, and never learn."""
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        for value, node in zip(self._outputs, output.args[0], strict=True):
            if value in self._own and node.target is torch.sigmoid:
                with self.module.graph.inserting_before(node):
                    node.args = (self.module.graph.call_method("float", node.args), *node.args[1:])
        self.module.recompile()

    def _called_with(self, tensors: set[int]) -> set[nn.Module]:
        """Modules that are given one of these tensors (by id) where they are called, instead of owning it."""
        state = self._state(self.module)
        found = set()
        for node in self.module.graph.nodes:
            given = (arg for arg in node.args if node.op == "call_module" and isinstance(arg, fx.Node))
            if any(arg.op == "get_attr" and id(state.get(str(arg.target))) in tensors for arg in given):
                found.add(self.module.get_submodule(str(node.target)))
        return found

    # -- parameters --------------------------------------------------------------------------------------------------

    def state(self, *, averaged: bool = False) -> dict[str, torch.Tensor]:
        """Copies of all parameters and buffers by state-dict key; those of the average where there is one."""
        source = self.average if averaged and self.average is not None else self.module
        return {name: value.detach().clone() for name, value in source.state_dict().items()}

    def load(self, state: dict[str, torch.Tensor], average: dict[str, torch.Tensor] | None = None) -> None:
        """Put parameters and buffers in place."""
        self.module.load_state_dict(state)
        if self.average is not None and average is not None:
            self.average.load_state_dict(average)

    @property
    def updates(self) -> int:
        """How often the average has moved."""
        return self._updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates = count

    def written_back(self) -> Graph:
        """The graph with the module's present parameters; every exit's digest is that of its head.

        Raises:
            TrainingError: a parameter is not finite.
        """
        arrays = fx_parameters(self.module)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise TrainingError(f"parameter {name!r} is not finite after training; lower the learning rates")
        return with_head_digests(with_parameters(self.graph, arrays))

    @staticmethod
    def _state(module: nn.Module, *, unique: bool = False) -> dict[str, torch.Tensor]:
        return {
            **dict(module.named_parameters(remove_duplicate=unique)),
            **dict(module.named_buffers(remove_duplicate=unique)),
        }


def _gate(graph: Graph, item: Exit) -> str:
    """Name of the value that holds an exit's own learned confidence; empty where it has none."""
    if not item.confidence:
        return ""
    own = head_prefix(item) + GATE
    return own if own in graph.tensors else item.confidence


def _decays(parameter: torch.Tensor, bare: bool) -> bool:
    """Whether a parameter is a weight; ``bare`` ones are given to an operation as they are.

    Scales and shifts of shape [C, 1, 1] are none.
    """
    return parameter.ndim > 1 and (not bare or sum(size > 1 for size in parameter.shape) > 1)


def _image(graph: Graph, node: gs.Node) -> bool:
    known = graph.types.get(node.inputs[0].name)
    return known is not None and known.shape is not None and len(known.shape) == 4


def _cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16; others only emulate it, slower than float32."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)
