"""Replay a recipe or a plan on a model, without a search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eexform.backends.metadata import FORM, with_plan
from eexform.ir.graph import Graph
from eexform.passes import PassContext, PassResult, Recipe


def apply(graph: Graph, recipe: Recipe | str | Path, *, seed: int = 0) -> PassResult:
    """Apply every pass of a recipe.

    Args:
        graph: the model, as loaded.
        recipe: a recipe, or the file that holds one.
        seed: for passes that draw random numbers.

    Returns:
        The transformed graph, whether it changed, what was skipped and why. With exits, its metadata hold the recipe:
        verification makes the trunk that the heads belong to from the original with it.

    Raises:
        OptionError: the recipe cannot be read, leaves a required parameter open, or lacks trained heads.
        PassError: a pass cannot run on this graph.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    result = chosen.pipeline()(graph, PassContext(heads=chosen.store(), seed=seed))
    made = result.graph
    if not made.exits and FORM not in made.metadata:
        return result
    described = Recipe(chosen.steps).to_plain()
    return replace(result, graph=made.replace(metadata=with_plan(made.metadata, recipe=described)))
