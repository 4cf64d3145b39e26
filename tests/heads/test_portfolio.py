"""The default candidates stay within their budget and fit their site."""

from __future__ import annotations

import pytest

from eexform.heads import HeadSpec, head_graph, head_macs, portfolio
from tests.heads.support import SITES, site


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("trunk_macs", [1e3, 1e6, 1e8])
def test_within_budget_and_attachable(name, trunk_macs):
    where = SITES[name]
    found = portfolio(where, trunk_macs=trunk_macs, max_share=0.05, num_classes=4)
    assert len(set(found)) == len(found) > 0
    assert found[0].layer == "none"
    for spec in found:
        assert HeadSpec.parse(str(spec)) == spec
        head_graph(spec, where, num_classes=4)
        if spec.layer != "none" and name != "dynamic":
            assert head_macs(spec, where, num_classes=4) <= 0.05 * trunk_macs


def test_width_and_stride_follow_the_budget():
    where = site("spatial", 16, 1, (16, 32, 32), 1)  # first stage of a ResNet-56 on 32 x 32 images
    rich = portfolio(where, trunk_macs=125e6, num_classes=10)
    poor = portfolio(where, trunk_macs=4e6, num_classes=10)
    assert [(spec.layer, spec.depth) for spec in rich] == [("none", 0), ("conv", 2), ("conv", 3)]
    assert all(spec.pool == "avg+max" for spec in rich)
    two_layers = rich[1]
    assert two_layers.stride == 4, "each layer takes a stride of two"
    cheaper = next(spec for spec in poor if spec.depth == 2)
    assert (cheaper.stride, -cheaper.width) > (two_layers.stride, -two_layers.width)


def test_tokens_and_flat_features():
    assert {spec.pool for spec in portfolio(SITES["tokens"], trunk_macs=1e6, num_classes=4)} == {"cls", "mean"}
    assert {spec.layer for spec in portfolio(SITES["flat"], trunk_macs=1e6, num_classes=4)} == {"none", "mlp"}
