"""The bank: found by what heads were trained from, complete or absent, and every damage named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eexform.errors import OptionError, RunError, StorageError
from eexform.heads import HeadSpec, head_graph
from eexform.ir.digest import digest_arrays
from eexform.ir.graph import Graph
from eexform.training import Bank, TrainOptions
from eexform.training.bank import head_key
from tests import tiny
from tests.training import support


@pytest.fixture(scope="module")
def trunk() -> Graph:
    return tiny.trained()


@pytest.fixture(scope="module")
def full(trunk: Graph, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return support.train(tmp_path_factory.mktemp("full"), trunk, tiny.digits())[0]


@pytest.fixture
def bank(full: Bank, tmp_path: Path) -> Bank:
    """A copy that a test may damage."""
    shutil.copytree(full.folder, tmp_path / full.folder.name)
    context = json.loads((full.folder / "context.json").read_text())
    return Bank(tmp_path, trunk_digest=context["trunk"], data_digest=context["data"], options_digest=context["options"])


def first(bank: Bank) -> tuple[str, str, Path]:
    """A head's site and text, and its file."""
    (site, head), record = next(iter(bank.records.items()))
    return site, head, bank.folder / "heads" / f"{record.key}.safetensors"


# -- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["trunk_digest", "data_digest", "options_digest"])
def test_other_trunk_data_or_options_share_nothing(tmp_path: Path, part: str) -> None:
    same = {"trunk_digest": "a" * 64, "data_digest": "b" * 64, "options_digest": "c" * 64}
    one, other = Bank(tmp_path, **same), Bank(tmp_path, **{**same, part: "d" * 64})
    assert one.folder != other.folder
    assert Bank(tmp_path, **same).folder == one.folder
    one.put_head("here", "none/avg", {"w": np.ones(3, np.float32)}, order=0, temperature=1.0, epochs=1, loss=0.0)
    assert one.has("here", "none/avg")
    assert not Bank(tmp_path, **{**same, part: "d" * 64}).records


def test_digests_of_data_and_options_tell_apart_what_matters(trunk: Graph) -> None:
    plain = tiny.digits()
    others = [tiny.digits(first=1), tiny.digits(seed=1), tiny.digits(augment="crop:1"), tiny.digits(labels="none")]
    assert len({plain.digest, *(other.digest for other in others)}) == 5
    assert tiny.digits().bind(trunk).digest == plain.digest
    options = [TrainOptions(epochs=3), TrainOptions(seed=1), TrainOptions(ema=0.5), TrainOptions(distill=1.0)]
    assert len({TrainOptions().digest, *(one.digest for one in options)}) == 5
    assert tiny.network(seed=1).digest != trunk.digest


def test_sites_and_heads_in_the_order_of_the_trunk(full: Bank, trunk: Graph) -> None:
    expected = tuple(site.value for site in support.sites(trunk))
    assert full.sites(trunk.digest) == expected
    assert all(set(full.heads(trunk.digest, site)) == set(support.HEADS) for site in expected)
    assert full.sites("0" * 64) == ()
    assert full.heads("0" * 64, expected[0]) == ()
    with pytest.raises(OptionError, match="another trunk"):
        full.trained("0" * 64, expected[0], "none/avg")


def test_trained_head_fits_its_graph(full: Bank, trunk: Graph) -> None:
    for site in support.sites(trunk):
        for text in support.HEADS:
            found = full.trained(trunk.digest, site.value, text)
            wanted = head_graph(HeadSpec.parse(text), site, num_classes=10).parameters()
            assert {name: array.shape for name, array in found.parameters.items()} == {
                name: array.shape for name, array in wanted.items()
            }
            assert found.digest == digest_arrays(found.parameters)
            assert found.temperature > 0


def test_unknown_head_site_and_split_are_named(full: Bank, trunk: Graph) -> None:
    site = support.sites(trunk)[0].value
    with pytest.raises(OptionError, match=r"no head 'none/max' is trained at .*did you mean 'none/avg'"):
        full.trained(trunk.digest, site, "none/max")
    with pytest.raises(OptionError, match="no head is trained at 'nowhere'"):
        full.scores("nowhere", "none/avg", "select")
    with pytest.raises(OptionError, match="the bank has no split 'head_train'"):
        full.scores(site, "none/avg", "head_train")


def test_heads_already_there_are_not_trained_again(trunk: Graph, tmp_path: Path) -> None:
    data = tiny.digits(200)
    bank, report = support.train(tmp_path, trunk, data, heads=["none/avg"])
    assert (report.trained, report.reused) == (2, 0)
    before = support.content(bank)
    watch = tiny.Watch()
    bank, report = support.train(tmp_path, trunk, data, heads=["none/avg"], progress=watch)
    assert (report.trained, report.reused, report.epochs) == (0, 2, 0)
    assert not watch.steps  # no pass over the data at all
    assert support.content(bank) == before
    bank, report = support.train(tmp_path, trunk, data)
    assert (report.trained, report.reused) == (2, 2)
    assert {name: data for name, data in support.content(bank).items() if name in before} == before


def test_a_head_is_listed_only_when_it_is_complete(trunk: Graph, tmp_path: Path) -> None:
    """Ctrl-C while scores are written: they are on disk in part, the heads are not listed."""
    with pytest.raises(KeyboardInterrupt):
        support.train(tmp_path, trunk, tiny.digits(200), progress=tiny.Watch("scoring heads", after=1))
    bank = support.open_bank(tmp_path, trunk, tiny.digits(200))
    assert list((bank.folder / "scores").glob("*.calibrate.npy"))
    assert not bank.records
    bank, report = support.train(tmp_path, trunk, tiny.digits(200))
    assert report.trained == len(bank.records) == 4


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 200, -4])
def test_truncated_head_is_named(bank: Bank, trunk: Graph, size: int) -> None:
    site, head, path = first(bank)
    path.write_bytes(path.read_bytes()[:size])
    bank._records = None
    with pytest.raises(RunError, match=rf"{path.name}.*delete it to train the head again"):
        bank.trained(trunk.digest, site, head)


def test_parameters_that_do_not_match_their_digest(bank: Bank, trunk: Graph) -> None:
    site, head, path = first(bank)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=rf"{path.name}: its parameters do not match their digest"):
        bank.trained(trunk.digest, site, head)


def test_a_file_that_is_no_head(bank: Bank) -> None:
    path = bank.folder / "heads" / "stray.safetensors"
    save_file({"w": np.ones(2, np.float32)}, path)
    bank._records = None
    with pytest.raises(RunError, match=r"stray\.safetensors: is not a head of this version"):
        bank.sites(bank.trunk_digest)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "no array", "other type"])
@pytest.mark.parametrize("what", ["head", "final", "labels"])
def test_damaged_scores_are_named_with_the_cure(bank: Bank, what: str, damage: str) -> None:
    site, head, head_path = first(bank)
    key = head_key(site, head) if what == "head" else what
    path = bank.folder / "scores" / f"{key}.select.npy"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other type":
        np.save(path, np.zeros(7, np.float16))
    else:
        path.write_bytes({"empty": b"", "truncated": whole[:-20], "no array": b"junk" * 50}[damage])
    read = {"head": lambda: bank.scores(site, head, "select"), "final": lambda: bank.final("select")}
    cure = head_path if what == "head" else bank.folder / "facts.json"
    with pytest.raises(RunError, match=rf"{path.name}: is missing or damaged .*delete .*{cure.name} and train again"):
        read.get(what, lambda: bank.labels("select"))()


@pytest.mark.parametrize("what", ["head", "final"])
def test_the_cure_cures(bank: Bank, trunk: Graph, what: str) -> None:
    site, head, path = first(bank)
    key = head_key(site, head) if what == "head" else "final"
    scores = bank.folder / "scores" / f"{key}.select.npy"
    whole = scores.read_bytes()
    scores.write_bytes(b"")
    (path if what == "head" else bank.folder / "facts.json").unlink()
    bank, report = support.train(bank.folder.parent, trunk, tiny.digits())
    assert report.trained == (what == "head")
    np.testing.assert_allclose(np.load(scores), np.load(_written(scores.parent / "whole.npy", whole)), atol=1e-5)
    assert len(bank.records) == 4


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_damaged_facts_and_context(bank: Bank) -> None:
    (bank.folder / "facts.json").write_text("{")
    with pytest.raises(RunError, match=r"facts\.json: cannot be read as JSON"):
        _ = bank.facts
    context = json.loads((bank.folder / "context.json").read_text())
    (bank.folder / "context.json").write_text(json.dumps({**context, "trunk": "0" * 64}))
    with pytest.raises(RunError, match=r"context\.json: is of another trunk or data set"):
        Bank(
            bank.folder.parent,
            trunk_digest=context["trunk"],
            data_digest=context["data"],
            options_digest=context["options"],
        )


def test_full_disk_is_found_before_scores_are_written(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file without room behind it would kill the process at the first write."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system cannot reserve room for a file")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match=r"new\.select\.npy: cannot be written: No space left on device"):
        bank.new_scores("new", "select", 1000, 10)
    assert not (bank.folder / "scores" / "new.select.npy").exists()


def test_header_says_what_the_head_is(full: Bank) -> None:
    site, head, path = first(full)
    record = full.records[site, head]
    assert record.epochs == support.OPTIONS.epochs
    assert np.isfinite(record.loss)
    assert record.digest == digest_arrays(load_file(path))
