"""Every operator that classifiers use, with random attributes, ranks, axes, types and batch sizes.

``EEXFORM_EXAMPLES=2000 pytest tests/backends/test_random.py -k conv`` looks longer, at other examples every time.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eexform.backends import fx, fx_shapes
from tests.backends.cases_data import DATA
from tests.backends.cases_layers import LAYERS, local_response
from tests.backends.cases_math import MATH
from tests.backends.cases_spatial import SPATIAL, rearranged
from tests.backends.random_ops import check

ASKED = os.environ.get("EEXFORM_EXAMPLES")
EXAMPLES = settings(
    max_examples=int(ASKED or 30),
    deadline=None,
    derandomize=ASKED is None,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@pytest.mark.parametrize("family", [*SPATIAL, *LAYERS, *MATH, *DATA], ids=lambda family: family.__name__)
@EXAMPLES
@given(data=st.data())
def test_operators_compute_what_onnxruntime_computes(family, data):
    check(family, data)


@pytest.mark.parametrize(("op", "family", "wrong"), [
    ("LRN", local_response, "size"), ("DepthToSpace", rearranged, "mode"),
])  # fmt: skip
def test_a_wrong_rule_is_caught(monkeypatch, op, family, wrong):
    fx.supported()
    right = fx._OPS[op]

    def planted(raiser, node):
        if wrong == "size":
            node.attrs["size"] = 1
            return right(raiser, node)
        return raiser.call(fx_shapes.depth_to_space, raiser.value(node, 0), int(node.attrs["blocksize"]), True)

    @settings(EXAMPLES, max_examples=60, phases=[Phase.generate])
    @given(data=st.data())
    def look(data):
        check(family, data)

    monkeypatch.setitem(fx._OPS, op, planted)
    with pytest.raises(AssertionError, match=op):
        look()
