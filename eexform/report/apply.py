"""Replay a recipe or a plan on a model, without a search."""

from __future__ import annotations

from pathlib import Path

from eexform.ir.graph import Graph
from eexform.passes import PassContext, PassResult, Recipe


def apply(graph: Graph, recipe: Recipe | str | Path, *, seed: int = 0) -> PassResult:
    """Apply every pass of a recipe.

    Args:
        graph: the model, as loaded.
        recipe: a recipe, or the file that holds one.
        seed: for passes that draw random numbers.

    Returns:
        The transformed graph, whether it changed, what was skipped and why.

    Raises:
        OptionError: the recipe cannot be read, leaves a required parameter open, or lacks trained heads.
        PassError: a pass cannot run on this graph.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return chosen.pipeline()(graph, PassContext(heads=chosen.store(), seed=seed))
