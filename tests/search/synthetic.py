"""Made-up head scores that behave like real ones: samples of differing difficulty, heads of growing ability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eexform.cost_models.paths import PathCosts
from eexform.search.bits import BitScorer
from eexform.search.evaluation import Evaluation
from eexform.search.genome import Constraints
from eexform.search.goals import Goals
from eexform.search.limits import Limits
from eexform.search.objectives import Objectives
from eexform.search.scorer import HeadScores
from eexform.search.space import EXITS, Gene, Space
from eexform.tunables import Choice, Domain, Each, Integer, Subset

MEASURES = ("max_prob", "margin", "entropy")
LEARNED = ("gate", "stick")
CARRIES = (0.0, 0.25, 0.5, 0.75, 1.0)

Places = list[tuple[str, list[str]]]


def places(sites: int, heads: int) -> Places:
    """Sites ``s0``, ``s1``, ... with heads ``h0``, ``h1``, ... each."""
    return [(f"s{site}", [f"h{head}" for head in range(heads)]) for site in range(sites)]


def scores(
    where: Places, samples: int = 400, classes: int = 10, seed: int = 0, kind: str = "logits", coarse: bool = False
) -> HeadScores:
    """Scores whose accuracy grows along the trunk and with the head's place; errors of different heads are correlated.

    Args:
        where: sites and heads.
        samples: how many.
        classes: how many.
        seed: of the noise.
        kind: ``logits`` or ``probabilities``.
        coarse: few distinct values, so that confidences repeat and rows tie.

    Every head has a gate besides, which measures that read gates can be tried with.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    difficulty = rng.gamma(2.0, 0.5, samples)
    confusion = rng.normal(0, 1, (samples, classes))
    hit = np.eye(classes)[labels]

    def logits(ability: float) -> np.ndarray:
        own = rng.normal(0, 0.7, (samples, classes))
        signal = np.clip(ability * 2.2 - difficulty, -1.0, None)[:, None] * hit * 2.5
        raw = signal + 0.8 * confusion + own
        return (np.round(raw) if coarse else raw * 1.3).astype(np.float32)

    def as_kind(raw: np.ndarray) -> np.ndarray:
        if kind == "logits":
            return raw
        powers = np.exp(raw - raw.max(axis=1, keepdims=True))
        return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)

    def says(raw: np.ndarray) -> np.ndarray:
        """What a gate says: surer where the head is right; drawn apart, so that scores stay as they are."""
        sure = own.normal(np.where(raw.argmax(axis=1) == labels, 1.0, -1.0), 1.5)
        return (1 / (1 + np.exp(-(np.round(sure) if coarse else sure)))).astype(np.float32)

    own = np.random.default_rng([seed, 1])
    heads, gates = {}, {}
    for place, (site, texts) in enumerate(where):
        for rank, text in enumerate(texts):
            ability = 0.45 + 0.6 * (place + 1) / (len(where) + 1) + 0.12 * rank / max(1, len(texts))
            raw = logits(ability)
            heads[site, text] = as_kind(raw)
            gates[site, text] = says(raw)
    temperatures = {pair: 0.8 + 0.1 * (number % 5) for number, pair in enumerate(heads)}
    final = as_kind(logits(1.25))
    return HeadScores(final, labels.astype(np.int64), heads, temperatures, kind, 1.25, gates)  # type: ignore[arg-type]


def costs(where: Places, trunk: float = 40e6, routing: float = 0.0) -> dict[str, PathCosts]:
    """MACs and parameters: the trunk's spread evenly over the sites, heads a few per cent of it.

    Deciding costs ``routing``, going on twice that at the first site and less at later ones, and the trunk between two
    exits somewhat more or less than without them.
    """
    count = len(where)
    prefix = {site: trunk * (place + 1) / (count + 1) for place, (site, _) in enumerate(where)}
    head = {(site, text): trunk * 0.002 * 3**rank for site, texts in where for rank, text in enumerate(texts)}
    sites = tuple(site for site, _ in where)
    params = {pair: 1000.0 * (rank % 3 + 1) for rank, pair in enumerate(head)}
    decision = dict.fromkeys(sites, routing)
    onward = {site: 2 * routing / (place + 1) for place, site in enumerate(sites)}
    ends = [*range(count), count]
    between = {
        (sites[start] if start >= 0 else "", sites[stop] if stop < count else ""): routing
        * (1.0 - 0.3 * (stop - start))
        for start in range(-1, count)
        for stop in ends[start + 1 :]
        if routing and (start >= 0 or stop < count)
    }
    return {
        "macs": PathCosts(trunk, prefix, head, decision, onward, between, unit="MACs", sites=sites),
        "params": PathCosts(270e3, dict.fromkeys(sites, 0.0), params, unit="parameters", per_sample=False, sites=sites),
    }


def space(
    where: Places,
    levels: int = 32,
    measures: Sequence[str] = MEASURES,
    carries: Sequence[float] = CARRIES,
    extra: Domain | None = None,
) -> Space:
    """The space of ``insert_exits`` over these sites; with ``extra``, behind a made-up pass with that tunable."""
    sites = [site for site, _ in where]
    domains: dict[str, Domain] = {
        "sites": Subset(sites),
        "heads": Each("sites", {site: Choice(heads) for site, heads in where}),
        "thresholds": Each("sites", dict.fromkeys(sites, Integer(0, levels - 1))),
        "measure": Choice(measures),
        "carry": Choice(carries),
    }
    recipe = [(EXITS, {})] if extra is None else [("narrow", {}), (EXITS, {})]
    place = len(recipe) - 1
    genes = {(place, name): Gene((place, name), EXITS, domain) for name, domain in domains.items()}
    if extra is not None:
        genes = {(0, "width"): Gene((0, "width"), "narrow", extra), **genes}
    return Space(tuple(recipe), genes, levels)


def evaluation(
    where: Places,
    data: HeadScores | None = None,
    levels: int = 32,
    constraints: Constraints | None = None,
    goals: Goals | None = None,
    **options: object,
) -> Evaluation:
    """A space with a scorer over made-up scores."""
    found = space(where, levels, **options)  # type: ignore[arg-type]
    measures = next(gene.domain.values for key, gene in found.genes.items() if key[1] == "measure")  # type: ignore
    scorer = BitScorer(data or scores(where), costs(where), where, measures=measures, levels=levels)
    return Evaluation(found, scorer, goals or Goals.of("macs"), constraints or Constraints())


def limits(min_accuracy: float | None = None, *terms: str, **most: float) -> Constraints:
    """Limits in numbers: ``max_cost``, ``max_worst``, ``max_params`` of MACs and parameters, and further terms."""
    texts = {name: str(value) for name, value in most.items()}
    accuracy = None if min_accuracy is None else str(min_accuracy)
    asked = Objectives.parse("macs")
    given = Limits(**texts, min_accuracy=accuracy, max_terms=terms)  # type: ignore[arg-type]
    whole = {"macs": 40e6, "params": 270e3}
    return given.bind(asked, asked.goals(whole), whole, 0.9)
