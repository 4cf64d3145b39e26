"""Peak activation memory by hand: kernels, views, in-place operators, integers, exits, devices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from eexform.cost_models import exit_costs, make, parse, path_costs
from eexform.cost_models._contract import Crossing, Held, Routing
from eexform.cost_models._program import ELEMENTWISE, OVERWRITING
from eexform.cost_models.peak_ram_bytes import PeakRam, fits, segments
from eexform.errors import GraphError, OptionError
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import make as make_pass
from tests.passes.helpers import CHAIN, graph_of

PLAIN = PeakRam(fused=False, inplace="none", alignment=1)
RESIDUAL = """
<ir_version: 8, opset_import: ["": 17]>
residual (float[N, 3, 8, 8] image) => (float[N, 5] scores)
<float[4, 3, 3, 3] w0, float[4, 4, 3, 3] w1, float[4, 4, 3, 3] w3, float[4] scale, float[4] bias, float[4] mean,
 float[4] var, float[5, 4] w2>
{
    [stem] s = Conv<pads = [1, 1, 1, 1]>(image, w0)
    [norm] n = BatchNormalization(s, scale, bias, mean, var)
    [relu] r = Relu(n)
    [conv] d = Conv<pads = [1, 1, 1, 1]>(r, w1)
    [conv2] c = Conv<pads = [1, 1, 1, 1]>(d, w3)
    [sum] a = Add(c, r)
    [relu2] t = Relu(a)
    [pool] p = GlobalAveragePool(t)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w2)
}
"""
IMAGE, WIDE = 3 * 64 * 4, 4 * 64 * 4


def with_exits(graph: Graph, sites: Sequence[str]) -> Graph:
    return make_pass(
        "insert_exits",
        sites=list(sites),
        heads=dict.fromkeys(sites, "conv:1x4/avg"),
        thresholds=dict.fromkeys(sites, 0.5),
        untrained=True,
    )(graph).graph


def lower_bound(model: PeakRam, graph: Graph) -> int:
    return int(model.cost(graph).conditions["lower_bound"])


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_a_residual_block() -> None:
    graph = graph_of(RESIDUAL)
    # fused: stem+norm+relu is one kernel, sum+relu another; r is held for the sum while c is made of d
    cost = PeakRam().cost(graph)
    assert cost.total == cost.conditions["lower_bound"] == 3 * WIDE
    assert cost.conditions["node"] == "conv2"
    assert cost.conditions["alive"] == {"r": WIDE, "d": WIDE, "c": WIDE}
    assert cost.unknown == ()
    # c is written over r, as onnxruntime does; for sums over an operand it is too late
    assert PeakRam(residual=True).cost(graph).total == 2 * WIDE
    assert PeakRam(residual=True, inplace="none").cost(graph).total == 3 * WIDE
    assert PeakRam(inplace="elementwise").cost(graph).total == 3 * WIDE
    # not over what the convolution itself reads
    short = graph_of(RESIDUAL.replace("(d, w3)", "(r, w3)"))
    assert PeakRam(residual=True).cost(short).total == 2 * WIDE
    assert PeakRam(residual=True).cost(short).conditions["alive"] == {"r": WIDE, "t": WIDE}
    # node by node: normalisation is not done in place, sums are where that is asked for
    assert PeakRam(fused=False).cost(short).total == 3 * WIDE
    assert PeakRam(fused=False).cost(short).conditions["node"] == "sum"
    assert PeakRam(fused=False, inplace="elementwise").cost(short).total == 2 * WIDE


def test_a_chain_with_and_without_its_inputs() -> None:
    graph = graph_of(CHAIN)
    image, r1, r2 = 2 * 64 * 4, 3 * 64 * 4, 6 * 16 * 4
    assert PeakRam().cost(graph).total == image + r1
    assert PeakRam(inputs=False).cost(graph).total == max(r1 + r2, 2 * r2)
    # an input that belongs to the caller is not written over
    relu = graph_of(CHAIN.replace("Conv<pads = [1, 1, 1, 1]>(image, w1)", "Conv<pads = [1, 1, 1, 1]>(i, w1)").replace(
        "{\n", "{\n    [first] i = Relu(image)\n", 1
    ))  # fmt: skip
    assert PeakRam().cost(relu).total == image + r1
    assert PeakRam(inputs=False).cost(relu).total == image + r1
    assert PeakRam(inputs=False, inplace="none").cost(relu).total == image + r1
    assert lower_bound(PLAIN, relu) == max(2 * image, image + r1, 2 * r1)


def test_batch_type_and_alignment() -> None:
    graph = graph_of(RESIDUAL)
    assert PeakRam(batch=5).cost(graph).total == 5 * 3 * WIDE
    assert PeakRam(dtype="int8").cost(graph).total == 3 * WIDE / 4
    assert PeakRam(dtype="float16").cost(graph).total == 3 * WIDE / 2
    assert PeakRam(alignment=4096).cost(graph).total == 3 * 4096
    constants = make("model_bytes").cost(graph).total
    assert PeakRam(weights="ram").cost(graph).total == 3 * WIDE + constants
    small = PeakRam(weights="ram", dtype="int8").cost(graph)
    assert small.conditions["constants"] == make("model_bytes", dtype="int8").cost(graph).total < constants


def test_shape_arithmetic_and_constants_take_nothing_but_rows_of_samples_do() -> None:
    graph = graph_of(
        """
    <ir_version: 8, opset_import: ["": 17]>
    token (float[N, 3, 8] x) => (float[N, 5] scores) <float[8, 5] w, float[1, 1, 8] token, int64[2] rest = {1, 8},
     int64[1] zero = {0}, int64[1] target = {-1}, int64[1] first = {0}>
    {
        [size] s = Shape(x)
        [batch] b = Gather<axis = 0>(s, first)
        [shape] t = Concat<axis = 0>(b, rest)
        [token] e = Expand(token, t)
        [all] c = Concat<axis = 1>(e, x)
        [mean] m = ReduceMean<axes = [1], keepdims = 0>(c)
        [fc] scores = MatMul(m, w)
    }
    """,
        arrays={},
    )
    alive = PLAIN.cost(graph).conditions["alive"]
    assert alive == {"c": 4 * 32, "x": 3 * 32, "e": 32}
    assert PLAIN.cost(graph).total == 8 * 32


def test_integers_between_quantisation_are_stored_as_integers() -> None:
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    quantised (float[N, 3, 8, 8] image) => (float[N, 4] scores)
    <float[4, 3, 1, 1] w, float s = {0.1}, int8 z = {0}>
    {
        [q0] i = QuantizeLinear(image, s, z)
        [d0] x = DequantizeLinear(i, s, z)
        [conv] c = Conv(x, w)
        [relu] r = Relu(c)
        [q1] j = QuantizeLinear(r, s, z)
        [d1] y = DequantizeLinear(j, s, z)
        [pool] p = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(y)
        [q2] k = QuantizeLinear(p, s, z)
        [d2] o = DequantizeLinear(k, s, z)
        [mean] m = GlobalAveragePool(o)
        [flat] scores = Flatten(m)
    }
    """
    graph = graph_of(text)
    model = PeakRam(inputs=False)
    # o, which the mean reads as it is, exists as floats: 4x the integers it is made of
    cost = model.cost(graph)
    assert cost.conditions["alive"] == {"o": WIDE, "k": WIDE // 4}
    around = "GlobalAveragePool(o)\n [q3] n = QuantizeLinear(m, s, z)\n [d3] l = DequantizeLinear(n, s, z)"
    integers = graph_of(text.replace("GlobalAveragePool(o)", around).replace("Flatten(m)", "Flatten(l)"))
    assert model.cost(integers).total == 2 * WIDE // 4
    assert PeakRam(inputs=False, fused=False).cost(integers).total > WIDE


def test_what_cannot_be_counted_is_named() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17, "somebody": 1]>
    custom (float[N, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [odd] o = somebody.Odd(x)
        [relu] r = Relu(x)
        [m] scores = MatMul(r, w)
        [useless] u = Relu(o)
    }
    """)
    assert PeakRam().cost(graph).unknown == ()  # nothing needs it, so it does not run
    needed = graph_of("""
    <ir_version: 8, opset_import: ["": 17, "somebody": 1]>
    custom (float[N, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [odd] o = somebody.Odd(x)
        [m] scores = somebody.Even(o)
    }
    """)
    assert PeakRam().cost(needed).unknown == (("odd", "Odd"),)
    lowered = make_pass("lower")(with_exits(graph_of(CHAIN), ["r1"])).graph
    assert "If" in {op for _, op in PeakRam().cost(lowered).unknown}


def test_symbols_need_a_binding() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    tokens (float[N, seq, 4] x) => (float[N, 4] scores)
    {
        [relu] r = Relu(x)
        [mean] scores = ReduceMean<axes = [1], keepdims = 0>(r)
    }
    """)
    with pytest.raises(GraphError, match="seq"):
        PeakRam().cost(graph)
    assert PeakRam(bindings={"seq": 100}, alignment=1).cost(graph).total == 100 * 16 + 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("peak_ram_bytes:order=worst", "order: 'worst' is not a choice"),
        ("peak_ram_bytes:inplace=all", "inplace: 'all' is not a choice"),
        ("peak_ram_bytes:dtype=int3", "dtype: 'int3' is not a choice"),
        ("peak_ram_bytes:weights=rom", "weights: 'rom' is not a choice"),
        ("peak_ram_bytes:alignment=0", "alignment: 0 is less than 1"),
        ("peak_ram_bytes:batch=0", "batch: 0 is less than 1"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(text)
    assert message in str(caught.value)


# -- exits and devices -------------------------------------------------------------------------------------------------


def test_routing_holds_what_the_rest_needs() -> None:
    graph = graph_of(CHAIN)
    site, other = Held((3, 8, 8)), Held((10,), 8)
    crossing = Crossing("r1", site, (site, other), 4)
    model = PeakRam(alignment=1)
    assert model.routing(graph, crossing) == Routing(80, 2 * (768 + 80))
    assert model.routing(graph, Crossing("r1", site, (other,), 4)) == Routing(80, 160)
    like = Crossing("r1", site, (site,), 4, ("r0",))  # another value of the same shape is carried, the site is not
    assert model.routing(graph, like) == Routing(768, 2 * 768)
    assert model.routing(graph, Crossing("r1", site, (site,), 4, ("r1",))) == Routing(0, 2 * 768)
    assert PeakRam(alignment=1, inputs=False).routing(graph, crossing) == Routing(848, 2 * 848)
    assert PeakRam(alignment=1, inputs=False).routing(graph, Crossing("r1", site, (other,), 4)).decision == 848
    assert PeakRam(alignment=1, dtype="int8", batch=2).routing(graph, crossing) == Routing(160, 2 * (2 * 192 + 160))
    assert PeakRam().routing(graph, crossing).decision == 128


def test_segments_of_a_chain() -> None:
    graph = with_exits(graph_of(CHAIN), ["r1", "r2"])
    found = segments(graph)
    assert [part.name for part in found.parts] == ["trunk 0", "head 0", "trunk 1", "head 1", "trunk 2"]
    image, r1, r2, scores = 512, 768, 384, 64  # scores: 4 numbers, rounded up to 64 bytes
    assert found.parts[0].live == image + r1
    head = 4 * 64 * 4  # its convolution has 4 channels; r1 is held for the trunk while they are pooled
    assert (found.parts[1].live, found.parts[1].node) == (r1 + head + scores, "exit0.pool.avg")
    assert found.parts[2].live == r1 + r2 + scores
    assert found.parts[4].live == 2 * r2 + 2 * scores
    assert len(found.paths) == 3
    assert found.paths[-1] == PeakRam().cost(graph).total
    whole = segments(graph_of(CHAIN))
    assert [part.name for part in whole.parts] == ["trunk 0"]
    assert whole.paths == (image + r1,)


def test_path_costs_are_peaks() -> None:
    graph = with_exits(graph_of(CHAIN), ["r1", "r2"])
    paths = exit_costs(graph, PeakRam())
    assert len(paths) == 3
    assert paths[-1] == max(paths)
    assert paths[-1] >= PeakRam().cost(graph_of(CHAIN)).total
    trunk_only = exit_costs(graph, PeakRam(), heads_free=True)
    assert trunk_only[-1] == PeakRam().cost(graph_of(CHAIN)).total


def test_a_graph_is_held_to_a_device() -> None:
    graph = graph_of(RESIDUAL)
    constants = int(make("model_bytes").cost(graph).total)
    fit = fits(graph, 4096, 1000)
    assert fit.ok == (constants <= 1000)
    assert (fit.ram.needed, fit.ram.available, fit.ram.over) == (3 * WIDE, 4096, 0)
    assert fit.flash.over == max(0, constants - 1000)
    tight = fits(graph, 3000, 10_000, reserved_ram_bytes=100)
    assert not tight.ok
    assert tight.ram.over == 3 * WIDE + 100 - 3000
    text = str(tight)
    assert f"RAM: {3 * WIDE + 100:,} of 3,000 bytes: 172 too many" in text
    assert f"flash: {constants:,} of 10,000 bytes: {10_000 - constants:,} left" in text
    assert "the most is held at 'conv2'" in text
    no_flash = fits(graph, 1_000_000)
    assert no_flash.ok
    assert no_flash.ram.needed == 3 * WIDE + constants
    assert "flash" not in str(no_flash)
    small = fits(graph, 3000, 10_000, model=PeakRam(dtype="int8"))
    assert small.ok
    assert small.flash.needed == make("model_bytes", dtype="int8").cost(graph).total


def test_in_place_operators_do_their_elements_one_by_one() -> None:
    assert OVERWRITING["none"] < OVERWRITING["activations"] < OVERWRITING["elementwise"] == ELEMENTWISE
    assert {"Conv", "BatchNormalization", "Concat", "MaxPool", "MatMul", "Transpose"}.isdisjoint(ELEMENTWISE)


def test_parameters_in_memory_have_no_path() -> None:
    graph = graph_of(CHAIN)
    sites = [site for site in find_sites(graph).sites if site.value == "r1"]
    model = make("peak_ram_bytes", weights="ram")
    assert path_costs(model, graph, sites, {}).trunk == model.cost(graph).total
    with pytest.raises(OptionError, match=r"weights=flash, and a limit on model_bytes"):
        path_costs(model, graph, sites, {"r1": [HeadSpec.parse("none/avg")]})
