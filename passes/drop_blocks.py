"""Leave whole blocks of the trunk out: residual branches, and stretches of a plain network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from eexform.errors import GraphError, OptionError, need
from eexform.ir.arithmetic import node_macs
from eexform.ir.blocks import Block, BlockReport, find_blocks, leave_out
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, PassResult, Skip
from eexform.pruning.block_change import Change, Output
from eexform.tunables import Subset, parameter, tunable


def _blocks(graph: Graph) -> Subset:
    return Subset(find_blocks(graph).names)


@dataclass(frozen=True)
class DropBlocks(Pass):
    """Leave blocks out: ``x + f(x)`` becomes ``x``, a stretch of a plain network goes where its ends agree in type.

    ``blocks`` go by name. With ``count`` or ``share``, further ones follow: each block is left out alone, the change of
    the output is measured on ``samples`` samples (mean Kullback-Leibler divergence of the class probabilities, then the
    relative L2 distance of the scores; no labels), and those that change it least go first, until ``count`` more
    blocks have gone and at least ``share`` of the multiply-accumulates. ``greedy`` measures again after each one, on
    what is left: after k blocks of n it has run the network about k * n times instead of n.

    The settled form names the blocks, so that replaying it needs no samples.
    """

    name: ClassVar[str] = "drop_blocks"

    blocks: tuple[str, ...] = tunable(
        _blocks,
        default=(),
        help="blocks to leave out, named by the value that each hands on",
        domain_help="subset of the residual branches and plain stretches",
    )
    count: int = parameter(default=0, help="how many more to leave out, those that change the output least first")
    share: float = parameter(default=0.0, help="leave out more until this share of the MACs (0..1) has gone")
    samples: int = parameter(default=256, help="on how many samples the change of the output is measured")
    greedy: bool = parameter(default=False, help="measure again after every block that went (slower)")

    def __post_init__(self) -> None:
        need(not isinstance(self.blocks, str), f"blocks: expected a list of values, found {self.blocks!r}", OptionError)
        names = tuple(map(str, self.blocks))
        need(len(set(names)) == len(names), f"blocks: an item is listed twice in {list(names)}", OptionError)
        need(self.count >= 0, f"count: {self.count} blocks cannot be left out; give 0 or more", OptionError)
        need(0 <= self.share <= 1, f"share: {self.share} is not a share of the MACs, 0..1", OptionError)
        need(self.samples > 0, f"samples: {self.samples} are too few to measure anything on", OptionError)
        object.__setattr__(self, "blocks", names)

    def requires(self, graph: Graph) -> None:
        need(
            not graph.exits,
            f"the graph has {len(graph.exits)} exits; put drop_blocks before insert_exits: heads behind a block would "
            "see other values than they were trained on",
        )
        if self.blocks:
            report = find_blocks(graph)
            for name in self.blocks:
                report.block(name)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        report = find_blocks(graph)
        skipped = [Skip(item.value, item.reason) for item in report.rejected]
        chosen = [report.block(name) for name in self.blocks]
        measured: dict[str, Change] = {}
        if self.count or self.share:
            chosen, kept = self._choose(graph, report, chosen, context, measured)
            skipped = [*kept, *skipped]
        if not chosen:
            why = "no blocks were chosen" if report.blocks else "it has no block that could be left out"
            nothing = () if self.count or self.share else None
            return PassResult(graph, changed=False, skipped=(Skip("graph", why), *skipped), replay=nothing)
        names = tuple(block.name for block in report.blocks if block in chosen)
        notes = [_note(block, measured.get(block.name)) for block in chosen]
        settled = None if not (self.count or self.share) else (DropBlocks(blocks=names),)
        return PassResult(leave_out(graph, chosen), True, tuple(skipped), tuple(notes), replay=settled)

    def ensures(self, graph: Graph) -> None:
        left = [name for name in self.blocks if name in graph.tensors]
        need(not left, f"what the blocks {left[:3]} hand on is still there")

    def _choose(
        self,
        graph: Graph,
        report: BlockReport,
        chosen: Sequence[Block],
        context: PassContext,
        measured: dict[str, Change],
    ) -> tuple[list[Block], list[Skip]]:
        """``chosen`` and the blocks that change the output least; and why each other one stays."""
        need(
            context.samples is not None,
            "count and share need samples on which the change of the output is measured: give data (--data on the "
            "command line), or name the blocks",
        )
        assert context.samples is not None
        costs = _costs(graph) if self.share else {}
        target = self.share * sum(costs.values())
        taken, wanted = list(chosen), len(chosen) + self.count
        output = Output(graph, context.samples, self.samples)
        while len(taken) < wanted or _spared(taken, costs) < target:
            left = _left(report.blocks, taken)
            if not left:
                return taken, [Skip("graph", f"no block is left to go after {len(taken)}")]
            for block in left:
                if self.greedy or block.name not in measured:
                    measured[block.name] = output.change(leave_out(graph, [*taken, block] if self.greedy else [block]))
            taken.append(min(left, key=lambda block: measured[block.name]))
        return taken, [
            Skip(block.name, f"others change the output less ({measured[block.name]})")
            for block in _left(report.blocks, taken)
            if block.name in measured
        ]


def _left(blocks: Iterable[Block], taken: Sequence[Block]) -> list[Block]:
    """The blocks that may still go: not gone, and not cut into by one that is.

    Of two stretches that overlap, what only the first holds must stay where the second one goes as well, so the two do
    not save what they save alone.
    """
    gone = {name for block in taken for name in block.nodes}

    def whole(block: Block) -> bool:
        mine = set(block.nodes)
        if mine.isdisjoint(gone):
            return True
        return not mine <= gone and all(mine.isdisjoint(one.nodes) or mine.issuperset(one.nodes) for one in taken)

    return [block for block in blocks if whole(block)]


def _costs(graph: Graph) -> dict[str, int]:
    try:
        return {node.name: node_macs(node, graph.types) or 0 for node in graph.nodes}
    except GraphError as error:
        raise OptionError(f"share: {error}; or give count") from error


def _spared(taken: Iterable[Block], costs: dict[str, int]) -> int:
    return sum(costs.get(name, 0) for name in {name for block in taken for name in block.nodes})


def _note(block: Block, change: Change | None) -> str:
    work = "" if block.macs is None else f", {block.macs:,} MACs"
    effect = "" if change is None else f"; {change}"
    return f"left out the {block.kind} from {block.entry} to {block.exit}: {len(block.nodes)} nodes{work}{effect}"
