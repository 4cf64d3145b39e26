"""The torch module of a graph with exits decides like the simulator and the exported file, and trains."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

from eexform.backends import ort
from eexform.backends.lower_if import lower_if
from eexform.backends.multi_exit import MultiExitModule, to_torch
from eexform.errors import DataError, ModelError, OptionError
from eexform.ir import measures
from eexform.ir.policy import Decisions
from eexform.verification.simulate import take
from eexform.verification.verify import compare
from tests import zoo
from tests.lowering import nets

SAMPLES, COUNT = 32, 3


def tensors(feeds: dict[str, np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(value)) for value in feeds.values()]


def decisions(module: MultiExitModule, feeds: dict[str, np.ndarray]) -> Decisions:
    with torch.no_grad():
        found = module(*tensors(feeds))
    return Decisions(found.exit_index.numpy(), found.logits.numpy(), found.confidence.numpy())


def check(name: str, *, carry: float = 0.0, measure: str = "max_prob", sizes: tuple[int, ...] = (1, 7, 32)) -> None:
    """Against the simulator at every batch size, and against onnxruntime's run of the exported file."""
    expected = nets.scores(name, COUNT, SAMPLES, carry, measure)
    thresholds = nets.spread(expected)
    graph = nets.set_thresholds(nets.with_exits(name, COUNT, carry=carry, measure=measure), thresholds)
    expected = expected.with_thresholds(thresholds)
    assert len(set(expected.decisions().exit_index.tolist())) > 1
    module, feeds = to_torch(graph), zoo.feeds(name, SAMPLES, seed=3)
    assert isinstance(module, MultiExitModule)
    for size in sizes:
        for start in range(0, SAMPLES, size):
            rows = np.arange(start, min(start + size, SAMPLES))
            ok, detail = compare(expected.take(rows), decisions(module, take(graph, feeds, rows)))
            assert ok, f"batch {size}: {detail}"
    found = ort.run(ort.session(lower_if(graph)), feeds)
    mine, ties = decisions(module, feeds), expected.near_ties()
    np.testing.assert_array_equal(mine.exit_index[~ties], found["exit_index"][~ties])
    same = mine.exit_index == found["exit_index"]
    np.testing.assert_allclose(mine.scores[same], found[graph.final][same], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(mine.confidence[same], found["confidence"][same], atol=1e-4)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_it_agrees_with_simulator_and_exported_file(name):
    check(name)


@pytest.mark.parametrize("measure", [m for m in measures.names() if m != "max_prob"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_every_measure(name, measure):
    check(name, measure=measure, sizes=(7,))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_scores_carried_on(name):
    check(name, carry=0.5, sizes=(7,))


@pytest.mark.parametrize("threshold", [np.inf, -np.inf])
def test_nobody_and_everybody_leaves_and_only_what_is_needed_runs(threshold):
    graph = nets.set_thresholds(nets.with_exits("resnet", COUNT), [threshold] * COUNT)
    module = to_torch(graph)
    calls: dict[str, list[int]] = {}
    for name, part in module.named_modules():
        if not list(part.children()):
            part.register_forward_hook(lambda m, i, o, name=name: calls.setdefault(name, []).append(len(i[0])))
    inputs = tensors(zoo.feeds("resnet", 5, seed=1))
    found = module(*inputs)
    expected = module.all_exits(*inputs)
    place = COUNT if threshold > 0 else 0
    assert found.exit_index.tolist() == [place] * 5
    torch.testing.assert_close(found.logits, expected[place])
    assert any(name.startswith("exit0.") for name in calls)
    calls.clear()
    module(*inputs)
    assert any(name.startswith("exit2.") for name in calls) == (threshold > 0)
    assert all(rows == [5] for rows in calls.values())


def test_rows_that_left_are_not_computed_further():
    expected = nets.scores("resnet", COUNT, SAMPLES)
    thresholds = nets.spread(expected)
    index = expected.with_thresholds(thresholds).decisions().exit_index
    module = to_torch(nets.set_thresholds(nets.with_exits("resnet", COUNT), thresholds))
    seen: dict[str, int] = {}
    for name, part in module.named_modules():
        if name.startswith("exit") and not list(part.children()):
            part.register_forward_hook(lambda m, i, o, name=name: seen.update({name: len(i[0])}))
    module(*tensors(zoo.feeds("resnet", SAMPLES, seed=3)))
    for place in range(COUNT):
        rows = {count for name, count in seen.items() if name.startswith(f"exit{place}.")}
        assert rows == {int((index >= place).sum())}


def test_thresholds_can_be_set_and_empty_batches_run():
    module = to_torch(nets.with_exits("resnet", COUNT, threshold=0.5))
    inputs = tensors(zoo.feeds("resnet", 4, seed=1))
    module.thresholds = (2.0, 2.0, -1.0)
    assert module(*inputs).exit_index.tolist() == [2] * 4
    found = module(*(value[:0] for value in inputs))
    assert [len(values) for values in found] == [0, 0, 0]
    with pytest.raises(DataError, match="takes the inputs"):
        module(*inputs, *inputs)
    for wrong in ((), (0.5,), (0.5,) * (COUNT + 1)):
        with pytest.raises(OptionError, match=f"expected {COUNT}, one per exit, found {len(wrong)}"):
            module.thresholds = wrong
    assert module.thresholds == (2.0, 2.0, -1.0)


def test_pickling_is_refused_before_a_file_is_written_that_nobody_can_read():
    module = to_torch(nets.with_exits("resnet", 1))
    with pytest.raises(ModelError, match=r"save module\.state_dict\(\)"):
        torch.save(module, io.BytesIO())


def test_it_trains_through_all_exits_and_copies_are_whole():
    graph = nets.with_exits("resnet", COUNT)
    module = to_torch(graph)
    assert not module.training
    assert set(module.state_dict()) == set(module.graph_module.state_dict())
    inputs = tensors(zoo.feeds("resnet", 8, seed=1))
    copied = copy.deepcopy(module)
    before = [scores.detach().clone() for scores in copied.all_exits(*inputs)]
    module.train()
    assert module.graph_module.training
    optimiser = torch.optim.SGD(module.parameters(), 0.05)
    exits = module.all_exits(*inputs)
    assert len(exits) == COUNT + 1
    sum(scores.square().mean() for scores in exits).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    optimiser.step()
    module.eval()
    after = module.all_exits(*inputs)
    assert all((one - two).abs().max() > 1e-6 for one, two in zip(before, after, strict=True))
    for place in range(COUNT + 1):  # forward sees what was trained, and the copy does not
        module.thresholds = copied.thresholds = tuple([np.inf] * place + [-np.inf] * (COUNT - place))
        torch.testing.assert_close(module(*inputs).logits, after[place], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copied(*inputs).logits, before[place], rtol=1e-4, atol=1e-5)
    copied.load_state_dict(module.state_dict())
    torch.testing.assert_close(copied(*inputs).logits, module(*inputs).logits)
    with torch.no_grad():
        halved = copy.deepcopy(module).double()(*(value.double() for value in inputs))
    torch.testing.assert_close(halved.logits.float(), module(*inputs).logits, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_exit_at_which_a_sample_left():
    module = to_torch(nets.set_thresholds(nets.with_exits("resnet", COUNT), [-np.inf] * COUNT))
    module(*tensors(zoo.feeds("resnet", 4, seed=1))).logits.sum().backward()
    moved = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("exit0.") for name in moved)
    assert not any(name.startswith(("exit1.", "exit2.")) for name in moved)


def test_only_graphs_and_plans_become_modules() -> None:
    with pytest.raises(ModelError, match=r"takes a graph .* or a plan of a run .*, not str"):
        to_torch("model.onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [(np.nan, 0.5, 0.5), "abc", None, 0.5])
def test_thresholds_that_are_no_numbers_are_refused(wrong):
    module = to_torch(nets.with_exits("resnet", COUNT))
    with pytest.raises(OptionError, match="thresholds: "):
        module.thresholds = wrong
    assert module.thresholds == (0.5,) * COUNT


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "resnet",
            torch.zeros(2, 4, 16, 16),
            r"'image': expected the shape \['N', 3, 16, 16\], found \[2, 4, 16, 16\]",
        ),
        ("resnet", torch.zeros(3, 16, 16), "expected the shape"),
        ("resnet", torch.zeros(2, 3, 16, 16, dtype=torch.int64), "expected float32 numbers, found torch.int64"),
        ("resnet", np.zeros((2, 3, 16, 16), np.float32), "expected a tensor, found ndarray"),
        ("bert", torch.zeros(2, 7), "'input_ids': expected int64 numbers, found torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(name, value, says):
    module = to_torch(nets.with_exits(name, 2))
    inputs = [value, *tensors(zoo.feeds(name, 2, seed=1))[1:]]
    for called in (module, copy.deepcopy(module), module.all_exits):
        with pytest.raises(DataError, match=says):
            called(*inputs)


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "bert"])
def test_nothing_stays_behind_on_another_device(name):
    module = to_torch(nets.with_exits(name, 2)).to("meta")
    inputs = [value.to("meta") for value in tensors(zoo.feeds(name, 4, seed=1))]
    found = [*module.all_exits(*inputs)]
    pool = dict(zip(module.inputs, inputs, strict=True))
    for segment in module._segments:
        scores, confidence, *made = segment.module(*(pool[value] for value in segment.inputs))
        pool.update(zip(segment.hands_on, made, strict=True))
        found += [scores, confidence]
    assert {value.device.type for value in found} == {"meta"}


def test_it_runs_compiled_and_under_inference_mode():
    module = to_torch(nets.set_thresholds(nets.with_exits("resnet", 2), nets.spread(nets.scores("resnet", 2, SAMPLES))))
    inputs = tensors(zoo.feeds("resnet", SAMPLES, seed=3))
    expected = decisions(module, zoo.feeds("resnet", SAMPLES, seed=3))
    with torch.inference_mode():
        np.testing.assert_array_equal(module(*inputs).exit_index.numpy(), expected.exit_index)
    with torch.no_grad():
        found = torch.compile(module, backend="eager")(*inputs)
    np.testing.assert_array_equal(found.exit_index.numpy(), expected.exit_index)
    assert len(set(expected.exit_index.tolist())) > 1
