"""From a picked plan to a network that can be trained, and from the trained network back to trunk and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eexform.errors import EexformError, OptionError
from eexform.heads import with_parameters
from eexform.ir.exit_nodes import head_digest
from eexform.ir.graph import Graph
from eexform.passes import PassContext, PlanStore, TrainedHead, make
from eexform.search.front import Plan
from eexform.search.run import Run
from eexform.search.settling import BoundRecipe, replay_passes, trainable
from eexform.search.space import EXITS

_REFITTED = ("sites", "heads", "thresholds", "final_temperature")
"""What a recipe gives ``insert_exits`` that belongs to the heads as they were: it is chosen or fitted anew."""


@dataclass(frozen=True)
class Tuning:
    """A plan's network, ready for training.

    Attributes:
        plan: that was picked.
        trunk: without exits, and without the passes that only make it faster: normalisation is still there to be
            trained.
        graph: the trunk with the plan's exits and the bank's parameters, scores not carried on.
        steps: recipe of the search that follows: the passes left out, then ``insert_exits`` with the plan's heads as
            the only candidates, then what stood behind it.
        left_out: names of the passes that are applied after training instead of before.
    """

    plan: Plan
    trunk: Graph
    graph: Graph
    steps: BoundRecipe
    left_out: tuple[str, ...]


def tuning_of(run: Run, plan: Plan) -> Tuning:
    """What training a plan of a run starts from.

    Raises:
        OptionError: the plan is the model as it was given: without exits and with nothing changed.
        RunError: a site of the plan is none in the trunk without the passes that are left out, or its heads are gone.
    """
    names = [name for name, _ in plan.recipe]
    before = plan.recipe[: names.index(EXITS)]
    kept, later = trainable(before)
    if not plan.exits and not kept:
        raise OptionError(
            f"plan {plan.index} is the model alone without any exit, and there is nothing to train for exits; pick "
            "another one (see `eexform pareto`)"
        )
    trunk = replay_passes(kept, run.graph, run.context().arrays)[-1]
    if not plan.exits:  # a smaller network, all of which is its final exit
        return Tuning(plan, trunk, trunk, _steps(run, later, {}), tuple(name for name, _ in later))
    heads = {exit_.site: exit_.head for exit_ in plan.exits}
    moved = run.heads(plan, trunk)
    inserted = make(
        EXITS,
        sites=tuple(heads),
        heads=heads,
        thresholds={exit_.site: exit_.threshold for exit_ in plan.exits},
        measure=plan.exits[0].measure,  # the thresholds are on its scale
    )
    graph = inserted(trunk, PassContext(heads=moved)).graph
    return Tuning(plan, trunk, graph, _steps(run, later, heads), tuple(name for name, _ in later))


def _steps(run: Run, later: BoundRecipe, heads: Mapping[str, str]) -> BoundRecipe:
    """The recipe of the search after training."""
    recipe = run.recipe
    place = [step.name for step in recipe.steps].index(EXITS)
    given = {name: value for name, value in recipe.steps[place].given.items() if name not in _REFITTED}
    behind = [(step.name, dict(step.given)) for step in recipe.steps[place + 1 :]]
    chosen: dict[str, Any] = {"heads": dict(heads)} if heads else {"sites": (), "heads": {}, "thresholds": {}}
    return (*later, (EXITS, {**given, **chosen}), *behind)


def split(tuning: Tuning, trained: Graph) -> tuple[Graph, PlanStore]:
    """Trunk and heads of the trained network.

    Args:
        tuning: what training started from.
        trained: its graph with other parameters.

    Returns:
        The trunk with its names and metadata, and the heads by site and text; temperatures are yet to be fitted.

    Raises:
        EexformError: the network is another one.
    """
    arrays = trained.parameters()
    old = tuning.trunk.parameters()
    absent = sorted(set(old) - set(arrays))
    if absent or len(trained.exits) != len(tuning.graph.exits):
        raise EexformError(f"the trained network is not the one that was to be trained: {absent[:3]} are gone")
    changed = {name: arrays[name] for name, before in old.items() if not np.array_equal(arrays[name], before)}
    trunk = with_parameters(tuning.trunk, changed)
    heads: dict[tuple[str, str], TrainedHead] = {}
    for place, exit_ in enumerate(trained.exits):
        prefix = f"exit{place}."
        parameters = {name.removeprefix(prefix): np.asarray(arrays[name]) for name in exit_.parameters}
        heads[exit_.site, exit_.head] = TrainedHead(parameters, 1.0, head_digest(parameters))
    return trunk, PlanStore(trunk.digest, heads)


def parameters_of(store: PlanStore, heads: Mapping[str, str]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The parameters of heads by (site, head text)."""
    return {pair: store.trained(store.trunk_digest, *pair).parameters for pair in heads.items()}
