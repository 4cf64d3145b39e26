"""Our multiply-accumulates against torch's own ``FlopCounterMode``, on every network of the torch zoo."""

from __future__ import annotations

from collections import Counter

import pytest

from eexform.cost_models import make
from eexform.ir import flops
from tests.cost_models.flop_table import BESIDE, FUSED, LAYERS, Row, row, table
from tests.zoo import doors, modules

ALL = [pytest.param(name, door, id=f"{name}-{door}") for name in modules.NAMES for door in doors.DOORS]


def unexplained(found: Row) -> list[str]:
    """Every difference between the two counts that :data:`FUSED` and :data:`BESIDE` do not account for."""
    problems = []
    for work in sorted(set(found.plain) | set(found.products)):
        if found.plain[work] != found.products[work]:
            problems.append(f"{work}: torch counts {found.plain[work]}, our products are {found.products[work]}")
    missing = found.products.total() - found.torch.total()
    fused = FUSED.get(found.name)
    if (missing > 0) != (fused is not None) or (fused is not None and fused not in found.kernels):
        problems.append(f"torch counts {missing} fewer; kernels {sorted(found.kernels)}, expected {fused}")
    problems += [f"{kind}: {count} operations" for kind, count in found.beside.items() if kind not in BESIDE]
    if found.flops != found.products.total() + found.beside.total():
        problems.append("products and the rest are not all")
    return problems


@pytest.mark.parametrize(("name", "door"), ALL)
def test_every_difference_is_explained(name, door):
    graph = doors.graph(name, door)
    found = row(name, graph)
    assert not unexplained(found)
    assert found.products.total() > 0
    macs, counted = make("macs").cost(graph), make("flops").cost(graph)
    assert macs.unknown == counted.unknown == ()
    assert (2 * macs.total, counted.total) == (found.products.total(), found.flops)


def test_the_table_of_differences_is_not_larger_than_needed():
    rows = [row(name, doors.graph(name, "torch")) for name in modules.NAMES]
    assert {item.name for item in rows if item.torch.total() != item.products.total()} == set(FUSED)
    met = sum((item.beside for item in rows), Counter())
    assert set(met) == set(BESIDE)
    assert set().union(*(item.products for item in rows)) == set(LAYERS.values())
    assert table(rows).count("\n") == len(rows) + 1


def test_a_wrong_rule_is_seen(monkeypatch):
    graph = doors.graph("mixer", "torch")
    real = flops.node_flops
    monkeypatch.setattr("tests.cost_models.flop_table.node_macs", lambda node, types: 7 if node.op == "Gemm" else 0)
    assert any(problem.startswith("product: torch counts 73848") for problem in unexplained(row("mixer", graph)))
    monkeypatch.undo()
    moved = ("Transpose", "Reshape")
    wrong = lambda node, types: 1 if node.op in moved else real(node, types)  # noqa: E731
    monkeypatch.setattr("tests.cost_models.flop_table.node_flops", wrong)
    assert any(problem.startswith("Transpose") for problem in unexplained(row("mixer", graph)))
