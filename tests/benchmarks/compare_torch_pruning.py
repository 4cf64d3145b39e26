"""Our channel groups beside those of Torch-Pruning, on the networks of the zoo that it can trace. Run by hand.

Torch-Pruning (Fang et al., DepGraph, CVPR 2023) is no dependency of this project; give it a folder of its own:

    pip install --no-deps --target FOLDER torch-pruning
    PYTHONPATH=FOLDER python -m tests.benchmarks.compare_torch_pruning [--names vit swin ...] [--markdown]

Torch-Pruning is not asked what it means to cut, it is made to cut: every number of a copy of the module is replaced by
its own place, so that what is left says which positions of which axes went. That is done for every unit of every group
of ours, from the positions of one of the group's filters ("same": exactly the same positions of every parameter of
the state dict); then for a half of the units of all groups on which both agree, in one copy: parameter shapes, MACs
(torch's own counter on what Torch-Pruning leaves, our prediction), and outputs (its module, our graph in onnxruntime).

Columns: prunable groups of ours; on how many both agree, unit by unit; on how many they differ, with the reason below
the table; layers that only Torch-Pruning would cut, with our reason not to; MACs left after the common cut, ours and
its; the largest difference of the outputs, relative to the largest number. The last two are empty where the module's
own code holds sizes that the cut changes (a reshape to so many heads), so that it cannot run; the shapes are compared.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eexform.backends import ort
from eexform.ir.cut import cut, predicted
from eexform.ir.graph import Graph
from eexform.ir.groups import Group, find_groups
from tests.zoo import doors, modules

COLUMNS = ("network", "groups", "same", "differ", "theirs", "MACs ours", "MACs theirs", "outputs")
WIDTHS = (14, 7, 6, 7, 7, 12, 12, 9)
ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention)

Removed = dict[tuple[str, int], frozenset[int]]
"""Positions that are gone, by (name in the state dict, axis)."""

_PAD = "option A pads channels on both sides, so channel i meets i + 2 (i + 4); Torch-Pruning takes it for channel i"
_MHA = "Torch-Pruning cuts nn.MultiheadAttention by its embed_dim: width and heads at once; in the graph they are two"
REASONS: dict[tuple[str, str], str] = {
    ("resnet_a", ""): _PAD,
    ("shufflenet_v2", ""): "Torch-Pruning does not follow the transposition inside the channel shuffle",
    ("vit_encoder", ""): _MHA,
    ("swin", "patch_embed"): "Torch-Pruning follows two of the four slices that patch merging concatenates",
    ("swin", "attn"): "a head has one column of the position table; Torch-Pruning cuts as many as a head has channels",
    ("mixer", "stem"): "Torch-Pruning does not follow the transposition, and ties channels to the mixing of tokens",
}
"""Why the two differ, by network and part of the group's name; a difference that is not here is a finding."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", choices=modules.NAMES, nargs="+", default=modules.NAMES)
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # its one fused operator is not counted
    show(COLUMNS, asked.markdown)
    if asked.markdown:
        show(tuple("---" for _ in COLUMNS), True)
    remarks: list[str] = []
    for name in asked.names:
        show(compare(name, remarks), asked.markdown)
    print("\n".join(["", *remarks]))


def show(row: tuple[object, ...], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    else:
        print("".join(f"{cell!s:>{width}}" for cell, width in zip(row, WIDTHS, strict=True)), flush=True)


def compare(name: str, remarks: list[str]) -> tuple[object, ...]:
    """One row; differences are added to ``remarks``."""
    graph = doors.graph(name, "torch")
    groups = [group for group in find_groups(graph).groups if group.prunable]
    try:
        theirs = only_theirs(name, graph)
    except Exception as error:  # whatever their tracing raises is the answer
        remarks.append(f"{name}: Torch-Pruning cannot trace it ({type(error).__name__}: {error})")
        return (name, len(groups), *[""] * (len(COLUMNS) - 2))
    agreed, differing = [], []
    for group in groups:
        verdict = agrees(name, group)
        if verdict is None:
            agreed.append(group)
        else:
            differing.append(group)
            remarks.append(f"{name} {group.name} ({group.kind}, {group.size}): {reason(name, group.name)}: {verdict}")
    remarks += [f"{name} {layer}: cut by Torch-Pruning only: {why}" for layer, why in theirs.items()]
    return (name, len(groups), len(agreed), len(differing), len(theirs), *together(name, graph, agreed, remarks))


def reason(name: str, group: str) -> str:
    found = [text for (network, part), text in REASONS.items() if network == name and part in group]
    return found[0] if found else "NOT EXPLAINED"


@dataclass
class Theirs:
    """A copy of a network that Torch-Pruning has traced and cuts."""

    name: str
    model: nn.Module = field(init=False)
    gone: dict[str, set[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        import torch_pruning  # in a folder of its own, see above

        self.model = copy.deepcopy(doors.module(self.name))
        args = modules.inputs(self.name, 2, seed=2)
        self.graph: Any = torch_pruning.DependencyGraph().build_dependency(
            self.model, args if len(args) > 1 else args[0], output_transform=modules.logits, verbose=False
        )
        self.parts = dict(self.model.named_modules())
        self.names = {part: name for name, part in self.parts.items()}

    def mark(self) -> None:
        """Put its own place into every number."""
        with torch.no_grad():
            for array in self.model.state_dict().values():
                if array.is_floating_point():
                    array.copy_(torch.arange(array.numel()).reshape(array.shape))

    def removed(self, original: Mapping[str, torch.Tensor]) -> Removed:
        """What has been cut from the marked copy."""
        found: Removed = {}
        for key, array in self.model.state_dict().items():
            shape = tuple(original[key].shape)
            if tuple(array.shape) == shape:
                continue
            left = np.unravel_index(array.detach().numpy().astype(np.int64).ravel(), shape)
            for axis, size in enumerate(shape):
                lost = set(range(size)) - set(left[axis].tolist())
                if lost:
                    found[key, axis] = frozenset(lost)
        return found

    def cut(self, layer: str, positions: Iterable[int]) -> None:
        """Cut output channels of a layer, given by their places before any cut."""
        part = self.parts[layer]
        gone = self.gone.setdefault(layer, set())
        now = [position - sum(lost < position for lost in gone) for position in positions]
        pruner = self.graph.get_pruner_of_module(part)
        self.graph.get_pruning_group(part, pruner.prune_out_channels, now).prune()
        gone.update(positions)


def anchor(name: str, group: Group) -> tuple[str, np.ndarray] | None:
    """A layer of the module whose output channels are units of the group, and the channels of each unit."""
    parts = dict(doors.module(name).named_modules())
    for member in group.members:
        layer, _, kind = member.slot.value.rpartition(".")
        if member.constant and kind in ("weight", "in_proj_weight") and isinstance(parts.get(layer), ROOTS):
            axis = 1 if isinstance(parts[layer], nn.Embedding) else 0
            if member.slot.axis == axis and member.role in ("filter", "table"):
                return layer, member.units
    return None


def ours(name: str, group: Group, units: Iterable[int]) -> Removed:
    """What cutting units takes from the module's own arrays."""
    known = doors.module(name).state_dict()
    found: Removed = {}
    for member in group.members:
        if member.constant and member.slot.value in known:
            key = (member.slot.value, member.slot.axis)
            taken = {int(position) for unit in units for position in member.units[unit]}
            found[key] = found.get(key, frozenset()) | taken
    return found


def agrees(name: str, group: Group) -> str | None:
    """None where both cut the same for every unit of the group, else the first difference."""
    found = anchor(name, group)
    if found is None:
        return "it has no layer whose outputs Torch-Pruning could be told to cut"
    layer, positions = found
    original = doors.module(name).state_dict()
    for unit in range(group.size):
        copy_ = Theirs(name)
        copy_.mark()
        try:
            copy_.cut(layer, positions[unit].tolist())
        except Exception as error:  # theirs may fail anywhere
            return f"unit {unit}: Torch-Pruning fails: {type(error).__name__}: {error}"
        theirs, wanted = copy_.removed(original), ours(name, group, [unit])
        if theirs != wanted:
            return f"unit {unit}: {difference(wanted, theirs)}"
    return None


def difference(wanted: Removed, theirs: Removed) -> str:
    """The slots that differ, in words."""
    parts = []
    for key in sorted({*wanted, *theirs}):
        if wanted.get(key) != theirs.get(key):
            one, two = sorted(wanted.get(key, ())), sorted(theirs.get(key, ()))
            parts.append(f"{key[0]}|{key[1]}: ours {one}, theirs {two}")
    return "; ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def only_theirs(name: str, graph: Graph) -> dict[str, str]:
    """Layers whose output channels Torch-Pruning would cut and no prunable group of ours has, with our reason."""
    free, stuck = set(), {}
    for group in find_groups(graph).groups:
        for member in group.members:
            if group.prunable:
                free.add((member.slot.value, member.slot.axis))
            else:
                stuck[member.slot.value, member.slot.axis] = group.frozen or "it is one unit"
    traced = Theirs(name)
    found = {}
    for group in traced.graph.get_all_groups(root_module_types=ROOTS):
        for item in group:
            layer = traced.names.get(item.dep.target.module)
            if layer is None or not isinstance(item.dep.target.module, ROOTS):
                continue
            if traced.graph.is_out_channel_pruning_fn(item.dep.handler):
                axis = 1 if isinstance(item.dep.target.module, nn.Embedding) else 0
                kind = "in_proj_weight" if isinstance(item.dep.target.module, nn.MultiheadAttention) else "weight"
                key = (f"{layer}.{kind}", axis)
                if key not in free:
                    found[layer] = stuck.get(key, "it is not in any group")
    return found


def together(name: str, graph: Graph, groups: list[Group], remarks: list[str]) -> tuple[object, ...]:
    """Every other unit of all groups cut in one copy: MACs of both, and the difference of the outputs."""
    cuts = {group.name: list(range(0, group.size - 1, 2)) for group in groups}
    small, theirs = cut(graph, cuts), Theirs(name)
    for group in groups:
        found = anchor(name, group)
        assert found is not None
        theirs.cut(found[0], sorted({int(place) for unit in cuts[group.name] for place in found[1][unit]}))
    kept = {key: tuple(array.shape) for key, array in theirs.model.state_dict().items()}
    for key, array in small.parameters().items():
        if key in kept and tuple(array.shape) != kept[key]:
            remarks.append(f"{name} {key}: ours {list(array.shape)}, theirs {list(kept[key])}")
    wanted, whole = predicted(graph, cuts).macs, predicted(graph, {}).macs
    args = modules.inputs(name, 1, seed=4)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):  # other kernels of attention are not counted
            answers = modules.logits(theirs.model.eval()(*args)).numpy()
    except (RuntimeError, AssertionError) as error:  # sizes written down in the module's own code
        remarks.append(f"{name}: the shapes agree, but the module cannot run with them: {str(error).splitlines()[0]}")
        return (f"{wanted / whole:.4f}", "", "")
    found_ = ort.run(ort.session(small), doors.feeds(small, args))[small.final]
    error = float(np.abs(found_ - answers).max() / np.abs(answers).max())
    macs = counter.get_total_flops() // 2
    if macs != wanted:
        remarks.append(f"{name}: {wanted} MACs predicted, {macs} counted by torch on their module")
    return (f"{wanted / whole:.4f}", f"{macs / whole:.4f}", f"{error:.0e}")


if __name__ == "__main__":
    main()
