"""What ``groups`` reports: shares of work, reasons, words for members; and its table."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from eexform.cost_models.macs import Macs
from eexform.frontends.onnx import from_model
from eexform.ir.coupling import Slot
from eexform.ir.cut import cut
from eexform.ir.graph import Graph
from eexform.ir.groups import Member
from eexform.report import tables_groups
from eexform.report.groups import Grouping, groups, summary
from tests import text
from tests.tiny import network

SIDE = 8 * 8


def two_layers() -> Graph:
    """image -> conv 3 to 6 -> relu -> conv 6 to 4 -> mean -> 5 classes."""
    body = """
        a = Conv<pads=[1,1,1,1]>(image, first.weight, first.bias)
        b = Relu(a)
        c = Conv<pads=[1,1,1,1]>(b, second.weight)
        d = GlobalAveragePool(c)
        e = Flatten(d)
        y = Gemm<transB=1>(e, fc.weight, fc.bias)
    """.replace(".", "_")
    weights = {
        "first_weight": text.normal(6, 3, 3, 3),
        "first_bias": text.normal(6),
        "second_weight": text.normal(4, 6, 3, 3),
        "fc_weight": text.normal(5, 4),
        "fc_bias": text.normal(5),
    }
    return from_model(text.model(body, weights, inputs="float[N,3,8,8] image", outputs="float[N,5] y"))


@pytest.fixture(scope="module")
def found() -> Grouping:
    return groups(two_layers())


def entry(found: Grouping, size: int) -> dict:
    (chosen,) = [group for group in found.to_json()["groups"] if group["size"] == size and group["prunable"]]
    return chosen


def test_members_and_shares(found: Grouping) -> None:
    first, second = SIDE * 6 * 27, SIDE * 4 * 54
    assert found.macs == first + second + 20
    group = entry(found, 6)
    assert group["summary"] == "1 filter, 1 reader, 1 vector"
    assert group["macs"] == first + second
    assert group["share"] == pytest.approx((first + second) / found.macs)
    constants = {(m["value"], m["axis"], m["role"]) for m in group["members"] if m["role"] != "activation"}
    assert constants == {("first_weight", 0, "filter"), ("first_bias", 0, "bias"), ("second_weight", 1, "reader")}
    assert all(member["per_unit"] == 1 for member in group["members"])
    assert entry(found, 4)["macs"] == second + 20


def test_the_prunable_share_is_what_a_cut_to_one_unit_saves(found: Grouping) -> None:
    cuts = {group.name: range(1, group.size) for group in found.groups.groups if group.prunable}
    small = cut(found.graph, cuts)
    assert found.least.macs == Macs().cost(small).total == SIDE * 27 + SIDE * 9 + 5
    assert found.prunable == 1 - found.least.macs / found.macs
    plain = found.to_json()["prunable"]
    assert plain["groups"] == 2
    assert plain["macs"] == found.macs - found.least.macs
    left = sum(array.size for array in small.parameters().values())
    assert plain["params"] == found.params - left


def test_the_classifier_is_frozen_with_a_reason(found: Grouping) -> None:
    entering, leaving = [group for group in found.to_json()["groups"] if not group["prunable"]]
    assert (entering["size"], leaving["size"]) == (3, 5)
    assert entering["why_not"] == "graph input 'image'"
    assert leaving["why_not"] == "graph output 'y'"
    assert {"fc_weight", "fc_bias"} <= {member["value"] for member in leaving["members"]}


def test_it_is_plain_and_finite(found: Grouping) -> None:
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [group["name"] for group in plain["groups"]] == [group.name for group in found.groups.groups]


def test_nothing_to_prune() -> None:
    plain = groups(from_model(text.linear())).to_json()
    assert plain["prunable"] == {"groups": 0, "macs": 0, "params": 0, "share": 0.0}
    assert "0 groups to prune" in rendered(plain)


def test_uncounted_operators_are_named() -> None:
    body = "a = Det(x)\n b = Unsqueeze(a, one)\n y = Gemm(b, w)"
    weights = {"w": text.normal(1, 3), "one": np.array([1])}
    plain = groups(from_model(text.model(body, weights, inputs="float[N,4,4] x"))).to_json()
    plain["uncounted"] = [{"node": "node_7", "operator": "acme.Conv"}]
    assert "not counted in MACs, no rule for the operator: node_7 (acme.Conv)" in rendered(plain)


def test_families_have_letters() -> None:
    plain = groups(network(widths=(4, 8, 8, 8))).to_json()
    shown = rendered(plain, frozen=True)
    families = {group["family"] for group in plain["groups"] if group["prunable"]}
    assert families
    for family in families:
        assert family in shown
    assert "why it stays" in shown
    for group in plain["groups"]:
        assert group["name"] in shown.replace("\n", "")


def test_the_table_hides_what_is_frozen_until_asked(found: Grouping) -> None:
    plain = found.to_json()
    assert "--frozen says why" in rendered(plain)
    assert "why it stays" not in rendered(plain)
    assert "--frozen" not in rendered(plain, frozen=True)


def test_the_table_fits_a_narrow_terminal(found: Grouping) -> None:
    for line in rendered(found.to_json(), frozen=True, width=80).splitlines():
        if "─" in line:
            assert len(line) <= 80


def rendered(plain: dict, *, frozen: bool = False, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(tables_groups.groups(plain, frozen), crop=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_summary_counts_constants() -> None:
    def member(role: str, constant: bool = True) -> Member:
        return Member(Slot("v", 0), role, "node", constant, np.zeros((2, 1), np.int64))

    roles = ["filter", "filter", "bias", "mean", "table", "other", "other"]
    members = [*map(member, roles), member("activation", False)]
    assert summary(members) == "2 filters, 2 vectors, 1 table, 2 other"
