"""Replay a recipe or a plan on a model, without a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eexform.backends.metadata import FORM, with_plan
from eexform.data import Calibration, Dataset
from eexform.errors import OptionError, need
from eexform.ir.graph import Graph
from eexform.passes import PassContext, PassResult, PlanStore, Recipe
from eexform.pruning.samples import CalibrationData


def apply(
    graph: Graph,
    recipe: Recipe | str | Path,
    *,
    data: Dataset | CalibrationData | None = None,
    reference: Graph | None = None,
    seed: int = 0,
    plan_out: str | Path | None = None,
) -> PassResult:
    """Apply every pass of a recipe.

    Args:
        graph: the model, as loaded.
        recipe: a recipe, or the file that holds one.
        data: what passes that look at samples get: a data set, of whose head-train split they see 1024 at most, or
            samples chosen otherwise (:class:`eexform.data.Calibration`).
        reference: the model before anything was cut, where ``graph`` is not that.
        seed: for passes that draw random numbers.
        plan_out: where to write the settled recipe, ``.toml`` or ``.json``: every choice and number that came from
            the samples or the seed is in it, or in the ``.safetensors`` beside it. It gives the same graph again,
            without data.

    Returns:
        The transformed graph, whether it changed, what was skipped and why, and the passes that replay it. With
        exits, its metadata hold that settled recipe: verification makes the trunk that the heads belong to from the
        original with it.

    Raises:
        OptionError: the recipe cannot be read, leaves a required parameter open, or lacks trained heads.
        PassError: a pass cannot run on this graph, or lacks samples.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    store = chosen.store()
    if plan_out is not None:
        check_plan_target(Path(plan_out))
    samples = Calibration(data if data.feeds else data.bind(graph)) if isinstance(data, Dataset) else data
    context = PassContext(
        heads=store,
        arrays={} if store is None else store.arrays,
        samples=samples,
        reference=reference,
        seed=seed,
    )
    result = chosen.pipeline()(graph, context)
    settled = Recipe.of(result.replay or ())
    if plan_out is not None:
        save_settled(result, plan_out, store)
    made = result.graph
    if not made.exits and FORM not in made.metadata:
        return result
    described: dict[str, Any] = {
        "recipe": settled.to_plain(),
        **({"original": graph.digest} if result.arrays or context.arrays else {}),
    }
    return replace(result, graph=made.replace(metadata=with_plan(made.metadata, **described)))


def save_settled(result: PassResult, path: str | Path, store: PlanStore | None = None) -> Recipe:
    """Write the recipe that replays ``result`` and, beside it, the heads and parameters that it needs.

    Args:
        result: of a pipeline.
        path: ``.toml`` or ``.json``; the parameters go to the same name with ``.safetensors``, where there are any.
        store: heads and parameters that the recipe came with.

    Raises:
        OptionError: ``path`` has another suffix.
    """
    path = Path(path)
    check_plan_target(path)
    arrays: dict[str, Mapping[str, np.ndarray]] = {} if store is None else dict(store.arrays)
    arrays.update(result.arrays)
    recipe = Recipe.of(result.replay or ())
    wanted = [step.given["digest"] for step in recipe.steps if "digest" in step.given]
    kept = (store or PlanStore()).with_arrays({digest: arrays[digest] for digest in wanted if digest in arrays})
    if not kept.empty:
        beside = path.with_suffix(".safetensors")
        kept.save(beside)  # before the recipe: one that is there has its weights
        recipe = replace(recipe, weights=beside.name)
    recipe.save(path)
    return recipe


def check_plan_target(path: Path) -> None:
    """Raise ``OptionError`` where ``path`` cannot hold a plan, before any work is done."""
    need(not path.is_dir(), f"{path}: is a folder; give the name of a file, such as {path / 'plan.toml'}", OptionError)
    need(path.suffix.lower() in (".toml", ".json"), f"{path}: a plan is a .toml or a .json file", OptionError)
