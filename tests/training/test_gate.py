"""Gates: trained beside the scores without touching them, stored with them, and worth something."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from eexform.backends import ort
from eexform.backends.lower_multi import lower_multi
from eexform.data.dataset import Batch
from eexform.errors import OptionError, RunError
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext
from eexform.passes.insert_exits import InsertExits
from eexform.training import TrainOptions
from eexform.training.losses import balanced_bce, gate_loss
from tests import tiny
from tests.training import support

GATED = tuple(f"{head}/gate" for head in support.HEADS)
N, K = 7, 4


@pytest.fixture(scope="module")
def trunk() -> Graph:
    return tiny.trained()


# -- the loss ---------------------------------------------------------------------------------------------------------


def batch(labels: list[int] | None, mix: tuple[list[int], list[float]] | None = None) -> Batch:
    rows = np.arange(N)
    other = None if mix is None else (np.array(mix[0]), np.array(mix[1], np.float32))
    return Batch(feeds={}, labels=None if labels is None else np.array(labels), indices=rows, positions=rows, mix=other)


def test_both_kinds_weigh_the_same() -> None:
    sure = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.4, 0.2, 0.1], dtype=torch.float64)
    right = torch.tensor([1, 1, 1, 1, 1, 1, 0])
    expected = (-sum(math.log(c) for c in (0.9, 0.8, 0.7, 0.6, 0.4, 0.2)) / 6 - math.log(0.9)) / 2
    assert balanced_bce(sure, right).item() == pytest.approx(expected)
    assert balanced_bce(sure, torch.ones(7)).item() == pytest.approx(-np.log(sure.numpy()).mean())
    assert balanced_bce(sure, torch.zeros(7)).item() == pytest.approx(-np.log(1 - sure.numpy()).mean())
    assert math.isfinite(balanced_bce(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])).item())


def test_gradient_against_finite_differences() -> None:
    rng = np.random.default_rng(0)
    sure, right = rng.uniform(0.05, 0.95, N), torch.from_numpy(rng.choice([0.0, 0.3, 1.0], N))
    free = torch.from_numpy(sure.copy()).requires_grad_()
    balanced_bce(free, right).backward()
    assert free.grad is not None
    for place in range(N):
        step = np.zeros(N)
        step[place] = 1e-6
        up, down = (balanced_bce(torch.from_numpy(sure + sign * step), right).item() for sign in (1, -1))
        assert free.grad[place].item() == pytest.approx((up - down) / 2e-6, rel=1e-5)


def test_what_counts_as_right() -> None:
    scores = torch.eye(K)[[0, 1, 2, 3, 0, 1, 2]].requires_grad_()
    teacher = torch.eye(K)[[0, 1, 2, 3, 1, 2, 3]]
    gate = torch.linspace(0.1, 0.9, N).requires_grad_()
    answered = [1, 1, 1, 1, 0, 0, 0]
    expected = balanced_bce(gate, torch.tensor(answered)).item()
    assert gate_loss(gate, scores, teacher, batch([0, 1, 2, 3, 1, 2, 3])).item() == pytest.approx(expected)
    assert gate_loss(gate, scores, teacher, batch(None)).item() == pytest.approx(expected)  # right: as the trunk
    shares = torch.tensor([1, 0.7, 1, 1, 0.3, 0, 0])  # sample 1 is 70 % its own label, sample 4 is 30 % the answer
    mixed = batch([0, 1, 2, 3, 1, 2, 3], ([0, 3, 2, 3, 0, 3, 1], [1, 0.7, 0.5, 1, 0.7, 1, 0.6]))
    loss = gate_loss(gate, scores, teacher, mixed)
    assert loss.item() == pytest.approx(balanced_bce(gate, shares).item())
    loss.backward()
    assert gate.grad is not None
    assert scores.grad is None


# -- in the bank ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_scores_are_bit_for_bit_those_without_gates(trunk: Graph, tmp_path: Path, ema: float) -> None:
    data, options = tiny.digits(), TrainOptions(epochs=3, batch_size=32, ema=ema)
    plain, _ = support.train(tmp_path / "plain", trunk, data, options=options)
    gated, _ = support.train(tmp_path / "gated", trunk, data, options=options, heads=GATED)
    for site, head in plain.records:
        ours = gated.trained(trunk.digest, site, f"{head}/gate")
        theirs = plain.trained(trunk.digest, site, head)
        assert set(ours.parameters) == {*theirs.parameters, "gate.weight", "gate.bias"}
        for name, values in theirs.parameters.items():
            np.testing.assert_array_equal(ours.parameters[name], values, err_msg=f"{site} {head} {name}")
        assert ours.temperature == theirs.temperature
        for split in ("calibrate", "select", "test"):
            np.testing.assert_array_equal(gated.scores(site, f"{head}/gate", split), plain.scores(site, head, split))
        with pytest.raises(OptionError, match=r"has no gate; train .*/gate"):
            plain.gates(site, head, "select")


@pytest.mark.parametrize("probabilities", [False, True])
def test_stored_gates_are_those_of_the_exported_network(tmp_path: Path, probabilities: bool) -> None:
    graph, data = tiny.trained(probabilities=probabilities), tiny.digits()
    bank, _ = support.train(tmp_path, graph, data, heads=GATED)
    sites = bank.sites(graph.digest)
    for head in GATED:
        step = InsertExits(
            sites=sites, heads=dict.fromkeys(sites, head), thresholds=dict.fromkeys(sites, 0.5), measure="gate"
        )
        whole = step(graph, PassContext(heads=bank)).graph
        session = ort.session(lower_multi(whole))
        for split in ("calibrate", "select", "test"):
            (samples,) = data.bind(graph).batches(split, 1000)
            found = ort.run(session, samples.feeds)
            for place, exit_ in enumerate(whole.exits):
                stored = bank.gates(exit_.site, head, split)
                assert stored.dtype == np.float32
                assert stored.shape == (len(samples),)
                np.testing.assert_allclose(found[f"confidence{place}"], stored, atol=1e-6)


def test_a_gate_knows_when_its_head_is_right(trunk: Graph, tmp_path: Path) -> None:
    data, site = tiny.digits(1797), find_sites(trunk).sites[0]
    options = TrainOptions(epochs=8, batch_size=32, learning_rate=0.02)
    bank, _ = support.train(tmp_path, trunk, data, heads=["conv:1x8/avg/gate"], options=options, at=[site])
    right = bank.scores(site.value, "conv:1x8/avg/gate", "test").argmax(axis=1) == bank.labels("test")
    gate = bank.gates(site.value, "conv:1x8/avg/gate", "test")
    assert roc_auc_score(right, gate) > 0.65
    # balanced: what it says is centred between right and wrong however often the head is right
    assert gate[right].mean() > 0.5 > gate[~right].mean()


def test_without_labels_the_trunk_is_right(trunk: Graph, tmp_path: Path) -> None:
    bank, _ = support.train(tmp_path, trunk, tiny.digits(labels="none"), heads=GATED)
    for site, head in bank.records:
        assert bank.gates(site, head, "select").std() > 0


def test_resume_equals_straight(trunk: Graph, tmp_path: Path) -> None:
    data = tiny.digits()
    straight, _ = support.train(tmp_path / "straight", trunk, data, heads=GATED)
    with pytest.raises(KeyboardInterrupt):
        support.train(tmp_path / "cut", trunk, data, heads=GATED, progress=tiny.Watch("training heads", 5))
    resumed, _ = support.train(tmp_path / "cut", trunk, data, heads=GATED)
    assert support.content(resumed) == support.content(straight)


def test_a_missing_gate_file_says_what_to_delete(trunk: Graph, tmp_path: Path) -> None:
    bank, _ = support.train(tmp_path, trunk, tiny.digits(), heads=GATED[:1])
    (site, head), record = next(iter(bank.records.items()))
    (bank.folder / "scores" / f"{record.key}.gate.select.npy").unlink()
    with pytest.raises(RunError, match=rf"is missing or damaged .* delete .*{record.key}\.safetensors"):
        bank.gates(site, head, "select")
