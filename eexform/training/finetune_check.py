"""Whether a fine-tuning can begin, asked before anything is written."""

from __future__ import annotations

from eexform.backends.fx import raise_to_fx
from eexform.ir.graph import Graph
from eexform.training.finetune import terms_of
from eexform.training.finetune_heads import with_new_heads
from eexform.training.finetune_options import FinetuneOptions
from eexform.training.network import Arithmetic
from eexform.training.objectives import exit_weights


def check_finetuning(graph: Graph, options: FinetuneOptions, *, labelled: bool, device: str) -> str:
    """Where, and in what arithmetic, :func:`eexform.training.finetune.finetune` would train.

    Args:
        graph: flat, with exits or without.
        options: how to train.
        labelled: whether the data set has labels.
        device: ``auto`` or a name that torch knows.

    Raises:
        OptionError: the device or its arithmetic is not there, a term of the loss needs what graph or data do not have,
            or the exits' weights are not as many as the exits.
        ModelError: torch has no rule for an operator of the graph.
        EexformError: the heads cannot start anew.
    """
    place = str(Arithmetic.choose(graph, device, options.amp))
    terms = terms_of(options, graph, labelled=labelled)
    for weights in (options.exit_weights, *(getattr(term, "exits", "") for _, term in terms)):
        if weights:
            exit_weights(weights, [1.0] * (len(graph.exits) + 1))
    raise_to_fx(with_new_heads(graph, options.seed) if options.new_heads else graph)
    return place
