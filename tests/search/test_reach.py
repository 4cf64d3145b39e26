"""What no plan can cost less than, against all plans of small spaces: a limit that can be kept is never refused."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from eexform.cost_models import PathCosts, parse, path_costs
from eexform.heads import HeadSpec
from eexform.ir.sites import find_sites
from eexform.search.genome import Limit
from eexform.search.reach import cheapest
from eexform.search.terms import STATISTICS, Amount, Term, statistic
from tests.lowering import nets

SITES, HEADS, SAMPLES = ("a", "b", "c"), ("h0", "h1"), 4
PAIRS = tuple(product(SITES, HEADS))


def invented(rng: np.random.Generator, kind: str) -> PathCosts:
    """Costs of all kinds: heads dearer than what is left of the trunk, branches that are dearer cut in the middle."""

    def price(most: float = 10.0) -> float:
        return float(rng.integers(0, most + 1)) * float(rng.random() < 0.7)

    cells = {int(mask): price() for mask in rng.integers(1, 1 << len(SITES), 5)}
    prefix = {site: sum(c for mask, c in cells.items() if mask >> place & 1) for place, site in enumerate(SITES)}
    if kind == "max":
        prefix = dict(zip(SITES, np.maximum.accumulate(list(prefix.values())).tolist(), strict=True))
    ends = [(one, other) for place, one in enumerate(("", *SITES)) for other in (*SITES[place:], "") if one or other]
    return PathCosts(
        trunk=max(prefix.values()) if kind == "max" else sum(cells.values()) + price(),
        prefix=prefix,
        head={pair: price(30) for pair in PAIRS},
        decision={site: price() for site in SITES},
        onward={site: price() for site in SITES},
        between={pair: price(20) for pair in ends} if kind == "between" else {},
        per_sample=kind != "size",
        combine="max" if kind == "max" else "sum",
        sites=SITES,
        cells=() if kind == "max" else tuple(sorted(cells.items())),
    )


def amounts(*models: str) -> list[Amount]:
    """Every statistic of the first model, and sums of any two terms."""
    terms = [Term(model, name) for model in models for name in ("mean", "p50", "max")]
    single = [Amount(((1.0, Term(models[0], name)),)) for name in STATISTICS]
    return [*single, *(Amount(((0.7, one), (0.3, other))) for one, other in combinations(terms, 2))]


def leaving(exits: int) -> list[tuple[int, ...]]:
    """Every way in which the samples can be spread over the exits."""
    return [found for found in product(range(SAMPLES + 1), repeat=exits) if sum(found) == SAMPLES]


def reached(costs: dict[str, PathCosts], pairs: list[tuple[str, str]], asked: list[Amount]) -> list[float]:
    """The least that any plan comes to, by amount, found by trying all of them."""
    by_site: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        by_site.setdefault(pair[0], []).append(pair)
    least = [np.inf] * len(asked)
    for count in range(len(by_site) + 1):
        for sites in combinations(by_site, count):
            for exits in product(*(by_site[site] for site in sites)):
                left = np.array(leaving(count + 1))
                vectors = {key: np.broadcast_to(np.array(part.path(exits)), left.shape) for key, part in costs.items()}
                for place, amount in enumerate(asked):
                    spent = amount(lambda term: statistic(term.statistic, vectors[term.model], left))  # noqa: B023
                    least[place] = min(least[place], float(spent.min()))
    return least


@pytest.mark.parametrize("kind", ["sum", "between", "max", "size"])
def test_no_plan_is_below_the_bound(kind: str) -> None:
    exact = 0
    asked = amounts("one", "other")
    for seed in range(12):
        rng = np.random.default_rng(seed)
        costs = {"one": invented(rng, kind), "other": invented(rng, ("sum", "max", "between")[seed % 3])}
        for amount, least in zip(asked, reached(costs, list(PAIRS), asked), strict=True):
            found = cheapest(Limit("x", amount, 1.0), costs, PAIRS)
            assert found is not None
            assert found[0] <= least + 1e-9, (kind, seed, amount)
            exact += found[0] == pytest.approx(least)
    assert exact > 0.6 * 12 * len(asked), "a bound that is far below says nothing"


@pytest.mark.parametrize("name", ["resnet", "inception", "densenet"])
def test_no_plan_of_a_network_is_below_the_bound(name: str) -> None:
    graph = nets.trunk(name)
    sites = find_sites(graph, max_live=20).sites
    sites = [sites[place] for place in sorted({0, len(sites) // 3, len(sites) // 2})]
    heads = {site.value: (HeadSpec.parse("none/avg"), HeadSpec.parse("conv:1x8/avg/s2/gate")) for site in sites}
    pairs = [(site.value, str(spec)) for site in sites for spec in heads[site.value]]
    texts = (
        "macs",
        "params",
        "model_bytes",
        "peak_ram_bytes",
        "roofline:device=cortex-m7",
        "energy:device=rpi4,by=power,power_w=5",
    )
    costs = {text.partition(":")[0]: path_costs(parse(text), graph, sites, heads) for text in texts}
    asked = [Amount(((1.0, Term(key, one)),)) for key in costs for one in ("mean", "p95", "max")]
    asked.append(Amount(((0.5, Term("macs")), (0.5, Term("roofline", "max")))))
    for amount, least in zip(asked, reached(costs, pairs, asked), strict=True):
        found = cheapest(Limit("x", amount, 1.0), costs, pairs)
        assert found is not None
        assert found[0] <= least * (1 + 1e-12), amount
        if len(amount.parts) == 1:
            assert found[0] == pytest.approx(least), amount


def test_nothing_is_said_where_a_further_exit_saves_something() -> None:
    costs = {"one": PathCosts(10.0, {"a": 4.0}, {("a", "h0"): 1.0}, between={("a", ""): -3.0}, sites=("a",))}
    assert cheapest(Limit("x", Amount.of("one"), 1.0), costs, [("a", "h0")]) is None
