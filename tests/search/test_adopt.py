"""Heads of another run: taken where trunk, data and training options are the same; else it is said what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.errors import OptionError, RunError
from eexform.heads import HeadSpec
from eexform.ir.sites import find_sites
from eexform.search.adopt import Wanted, adopt, check
from eexform.search.folder import RunFolder
from eexform.search.run import Run
from eexform.search.variants import bank_of
from eexform.training import TrainOptions
from eexform.training.bank import SPLITS, Bank
from eexform.training.trainer import train_bank
from tests import tiny
from tests.search.pruning import prune
from tests.search.retraining import content
from tests.search.running import HEADS, TRAIN, busiest, facts_of, front_of, options, start


@pytest.fixture
def wanted(done: Run) -> Wanted:
    """What a second search like the finished one needs."""
    return wanted_of(done)


def wanted_of(run: Run) -> Wanted:
    trunk = run.materialise(run.front.trunk)
    bank, dataset = run.bank(trunk), tiny.digits(1797).bind(trunk)
    return Wanted(
        identity={
            "trunk_digest": trunk.digest,
            "data_digest": run.facts["data_digest"],
            "options_digest": run.facts["train_digest"],
        },
        heads={pair: record.order for pair, record in bank.records.items()},
        rows={split: dataset.size(split) for split in SPLITS},
        classes=10,
        scores="logits",
        train=TRAIN,
        described={"source_digest": dataset.source.digest, **dataset.describe()},
        origin=run.facts["trunk_digest"],
    )


def take(folder: Path, other: Path, wanted: Wanted, **given: Any) -> dict[str, Any] | None:
    return adopt(RunFolder(folder), other, wanted, **{"required": True, "progress": tiny.Watch(), **given})


def bank_in(folder: Path) -> Path:
    (found,) = (folder / "bank").iterdir()
    return found


# -- taking ------------------------------------------------------------------------------------------------------------


def test_everything_is_copied_and_nothing_is_shared(done: Run, wanted: Wanted, tmp_path: Path) -> None:
    before = content(done.folder.path)
    taken = take(tmp_path / "new", done.folder.path, wanted)
    trunk = wanted.identity["trunk_digest"]
    assert taken == {"run": str(done.folder.path), "trunk": trunk, "heads": len(wanted.heads), "lacking": 0}
    assert content(bank_in(tmp_path / "new")) == content(bank_in(done.folder.path))
    assert content(done.folder.path) == before
    for path in (tmp_path / "new").rglob("*"):
        assert path.is_dir() or (path.stat().st_nlink == 1 and not path.is_symlink())


def test_nothing_is_left_to_train(done: Run, wanted: Wanted, tmp_path: Path) -> None:
    take(tmp_path / "new", done.folder.path, wanted)
    trunk = done.materialise(done.front.trunk)
    data = tiny.digits(1797).bind(trunk)
    bank = Bank(tmp_path / "new" / "bank", **wanted.identity)
    sites = [site for site in find_sites(trunk).sites if bank.heads(trunk.digest, site.value)]
    heads = {site.value: [HeadSpec.parse(text) for text in bank.heads(trunk.digest, site.value)] for site in sites}
    report = train_bank(trunk, data, sites, heads, bank, TRAIN, threads=1)
    assert (report.trained, report.reused) == (0, len(wanted.heads))


def test_only_heads_that_are_wanted_are_taken(done: Run, wanted: Wanted, tmp_path: Path) -> None:
    pairs = list(wanted.heads)
    chosen = {pairs[3]: 0, pairs[1]: 1, ("another site", HEADS[0]): 2}
    watch = tiny.Watch()
    taken = take(tmp_path / "new", done.folder.path, replace(wanted, heads=chosen), progress=watch)
    assert taken is not None
    assert (taken["heads"], taken["lacking"]) == (2, 1)
    assert watch.said == [f"2 trained heads are those of {done.folder.path}; 1 more, which it lacks, are trained"]
    bank = Bank(tmp_path / "new" / "bank", **wanted.identity)
    assert list(bank.records) == [pairs[3], pairs[1]]  # in the order of this search, not of that one
    source = done.bank(done.materialise(done.front.trunk))
    for pair in (pairs[3], pairs[1]):
        assert replace(bank.records[pair], order=0) == replace(source.records[pair], order=0)
        for split in SPLITS:
            np.testing.assert_array_equal(bank.scores(*pair, split), source.scores(*pair, split))


def test_gates_come_along(tmp_path: Path) -> None:
    old = start(tmp_path / "old", options=options(heads=("conv:1x8/avg/gate",), generations=0, population=8))
    wanted = wanted_of(old)
    take(tmp_path / "new", old.folder.path, wanted)
    assert content(bank_in(tmp_path / "new")) == content(bank_in(tmp_path / "old"))
    assert len(list((tmp_path / "new").rglob("*.gate.*.npy"))) == len(SPLITS) * len(wanted.heads)


def test_heads_that_are_not_finished_are_not_taken(copy: Path, wanted: Wanted, tmp_path: Path) -> None:
    pair = next(iter(wanted.heads))
    key = Bank(copy / "bank", **wanted.identity).records[pair].key
    (bank_in(copy) / "heads" / f"{key}.safetensors").unlink()  # its scores are there, as when training is interrupted
    taken = take(tmp_path / "new", copy, wanted)
    assert taken is not None
    assert (taken["heads"], taken["lacking"]) == (len(wanted.heads) - 1, 1)
    assert not Bank(tmp_path / "new" / "bank", **wanted.identity).has(*pair)
    assert not list((tmp_path / "new").rglob(f"{key}*"))


def test_interrupted_taking_goes_on(done: Run, wanted: Wanted, tmp_path: Path) -> None:
    new = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        take(new, done.folder.path, wanted, progress=tiny.Watch("taking heads over", after=2))
    bank = Bank(new / "bank", **wanted.identity)
    assert len(bank.records) == 2
    assert bank.facts
    taken = take(new, done.folder.path, wanted)
    assert taken is not None
    assert taken["heads"] == len(wanted.heads) - 2
    assert content(bank_in(new)) == content(bank_in(done.folder.path))


def test_a_run_that_has_its_heads_needs_no_other(done: Run, wanted: Wanted, tmp_path: Path) -> None:
    take(tmp_path / "new", done.folder.path, wanted)
    assert take(tmp_path / "new", tmp_path / "deleted since", wanted) is None
    check(RunFolder(tmp_path / "new"), tmp_path / "deleted since", wanted)


def test_a_run_that_took_what_there_was_trains_the_rest(done: Run, wanted: Wanted, tmp_path: Path) -> None:
    more = replace(wanted, heads={**wanted.heads, ("another site", HEADS[0]): 9})
    take(tmp_path / "new", done.folder.path, more)
    assert take(tmp_path / "new", done.folder.path, more) is None
    check(RunFolder(tmp_path / "new"), done.folder.path, more)


# -- nothing to take ---------------------------------------------------------------------------------------------------


def _other_identity(part: str) -> Callable[[Wanted], Wanted]:
    return lambda wanted: replace(wanted, identity={**wanted.identity, part: "0" * 64})


MISMATCHES: list[tuple[Callable[[Wanted], Wanted], str]] = [
    (
        _other_identity("trunk_digest"),
        r"the trunk differs \(the model is the same, what the recipe's passes make of it is not\)\. Use",
    ),
    (
        lambda wanted: replace(_other_identity("trunk_digest")(wanted), origin="1" * 64),
        r"the trunk differs \(digest [0-9a-f]{12} there, 111111111111 here\)\. Use",
    ),
    (
        lambda wanted: replace(
            _other_identity("options_digest")(wanted), train=replace(TRAIN, epochs=7, learning_rate=0.1)
        ),
        r"the training options differ \(epochs 2 there, 7 here, learning_rate 0\.02 there, 0\.1 here\)\. Use",
    ),
    (
        lambda wanted: replace(
            _other_identity("data_digest")(wanted), described={**wanted.described, "augment": "crop:2"}
        ),
        r"the data differs \(augment: none there, crop:2 here\)\. Use",
    ),
    (_other_identity("data_digest"), r"the data differs \(which samples are in which split\)\. Use"),
    (
        lambda wanted: _other_identity("trunk_digest")(
            replace(_other_identity("options_digest")(wanted), train=replace(TRAIN, seed=1))
        ),
        r"the trunk differs \(.*\), and the training options differ \(seed 0 there, 1 here\)\. Use",
    ),
    (
        lambda wanted: replace(wanted, heads={("somewhere", "none/avg"): 0}),
        r"its heads are others \(conv:1x8/avg at .* more; wanted: none/avg at somewhere\)\. Use",
    ),
]


@pytest.mark.parametrize(("change", "message"), MISMATCHES)
def test_what_differs_is_said(
    done: Run, wanted: Wanted, tmp_path: Path, change: Callable[[Wanted], Wanted], message: str
) -> None:
    before = content(done.folder.path)
    for use in (check, take_into):
        with pytest.raises(OptionError, match=rf"^heads_from: nothing of .* can be used here: {message}"):
            use(RunFolder(tmp_path / "new"), done.folder.path, change(wanted))
    assert not (tmp_path / "new").exists()
    assert content(done.folder.path) == before
    watch = tiny.Watch()
    assert take(tmp_path / "new", done.folder.path, change(wanted), required=False, progress=watch) is None
    assert len(watch.said) == 1
    assert watch.said[0].endswith("; the heads of this trunk are trained")


def take_into(folder: RunFolder, other: Path, wanted: Wanted) -> None:
    take(folder.path, other, wanted)


def test_a_run_without_heads(copy: Path, wanted: Wanted, tmp_path: Path) -> None:
    shutil.rmtree(bank_in(copy) / "heads")
    with pytest.raises(OptionError, match=r"it has no trained heads yet \(state: done\)"):
        check(RunFolder(tmp_path / "new"), copy, wanted)
    shutil.rmtree(copy / "bank")
    with pytest.raises(OptionError, match=r"it has no trained heads yet \(state: done\)"):
        check(RunFolder(tmp_path / "new"), copy, wanted)
    assert not (copy / "bank").exists()


def test_a_bank_of_another_version(copy: Path, wanted: Wanted, tmp_path: Path) -> None:
    path = bank_in(copy) / "context.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(OptionError, match="here: its bank was written by another version of eexform"):
        check(RunFolder(tmp_path / "new"), copy, wanted)


def test_no_run_and_the_run_itself(copy: Path, wanted: Wanted, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nowhere: holds no run \(no run\.json\)"):
        check(RunFolder(tmp_path / "new"), tmp_path / "nowhere", wanted)
    with pytest.raises(OptionError, match="is this run itself"):
        check(RunFolder(copy), copy.parent / "copy", wanted)


# -- damage ------------------------------------------------------------------------------------------------------------


def _of_head(wanted: Wanted, bank: Path, ending: str) -> Path:
    pair = list(wanted.heads)[2]
    key = Bank(bank.parent, **wanted.identity).records[pair].key
    return bank / ("heads" if ending == "safetensors" else "scores") / f"{key}.{ending}"


def _changed_parameters(wanted: Wanted, bank: Path) -> None:
    path = _of_head(wanted, bank, "safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


def _rewritten(name: str, change: Callable[[np.ndarray], np.ndarray], head: bool = True) -> Callable[..., None]:
    def damage(wanted: Wanted, bank: Path) -> None:
        path = _of_head(wanted, bank, name) if head else bank / "scores" / name
        np.save(path, change(np.load(path)))

    return damage


def _cut(wanted: Wanted, bank: Path) -> None:
    path = _of_head(wanted, bank, "select.npy")
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: list[tuple[Callable[..., None], str]] = [
    (_changed_parameters, "its parameters do not match their digest; delete the file"),
    (_cut, r"select\.npy: is missing or damaged"),
    (
        _rewritten("test.npy", lambda rows: rows[:-1]),
        r"on test hold \[\d+, 10\], expected \[\d+, 10\]; delete .*trained",
    ),
    (_rewritten("select.npy", lambda rows: rows * np.float32("nan")), "on select hold NaN or infinity; delete"),
    (_rewritten("calibrate.npy", lambda rows: rows[::-1]), "its scores of calibrate want the temperature"),
    (_rewritten("final.select.npy", lambda rows: rows[:, ::-1], False), "do not give the accuracy on record"),
    (_rewritten("labels.test.npy", lambda rows: rows[::-1], False), "do not give the accuracy on record"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_does_not_spread(
    copy: Path, wanted: Wanted, tmp_path: Path, damage: Callable[..., None], message: str
) -> None:
    damage(wanted, bank_in(copy))
    with pytest.raises(RunError, match=message):
        take(tmp_path / "new", copy, wanted)
    pair = list(wanted.heads)[2]
    own = Bank(tmp_path / "new" / "bank", **wanted.identity)
    assert not own.has(*pair)  # what stands before it may have been taken, and is whole
    for record in own.records:
        own.trained(wanted.identity["trunk_digest"], *record)


def test_damaged_context(copy: Path, wanted: Wanted, tmp_path: Path) -> None:
    (bank_in(copy) / "context.json").write_text("[]")
    with pytest.raises(RunError, match=r"context\.json: is not a description of a bank; it is damaged"):
        check(RunFolder(tmp_path / "new"), copy, wanted)


# -- whole searches ----------------------------------------------------------------------------------------------------


def test_search_with_another_objective_trains_nothing(done: Run, tmp_path: Path) -> None:
    watch = tiny.Watch()
    run = start(tmp_path / "new", cost="params", heads_from=done.folder.path, progress=watch)
    assert run.state == "done"
    assert run.front.objective == "params"
    assert not {"training heads", "scoring heads", "scoring the trunk"} & set(watch.steps)
    (taken,) = run.facts["heads_from"]
    assert (taken["run"], taken["lacking"]) == (str(done.folder.path), 0)


def test_same_search_gives_the_same_front_and_stands_alone(copy: Path, done: Run, tmp_path: Path) -> None:
    run = start(tmp_path / "new", heads_from=copy)
    shutil.rmtree(copy)
    assert front_of(tmp_path / "new") == front_of(done.folder.path)
    assert busiest(run).materialise().digest == busiest(done).materialise().digest


def test_mismatch_shows_before_anything_is_written(done: Run, tmp_path: Path) -> None:
    other = TrainOptions(**{**TRAIN.to_json(), "epochs": 3})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"train": other}, "epochs 2 there, 3 here"),
        ({"graph": tiny.network(seed=9)}, "the trunk differs"),
        ({"data": tiny.digits(1000)}, "the data differs"),
        ({"options": options(heads=("conv:1x16/avg",))}, "its heads are others"),
    ]
    for given, message in cases:
        with pytest.raises(OptionError, match=message):
            start(tmp_path / "new", heads_from=str(done.folder.path), **given)
        assert not (tmp_path / "new").exists()


def test_more_heads_than_the_other_run_has(done: Run, tmp_path: Path) -> None:
    watch = tiny.Watch()
    more = options(heads=(*HEADS, "conv:1x16/avg"), generations=0)
    run = start(tmp_path / "new", options=more, heads_from=done.folder.path, progress=watch)
    (taken,) = run.facts["heads_from"]
    assert taken["heads"] > 0
    assert taken["lacking"] > 0
    assert any(line.startswith(f"training {taken['lacking']} heads") for line in watch.said)


def test_what_was_taken_is_known_after_an_interruption(done: Run, tmp_path: Path) -> None:
    out, more = tmp_path / "new", options(heads=(*HEADS, "conv:1x16/avg"), generations=0)
    with pytest.raises(KeyboardInterrupt):
        start(out, options=more, heads_from=done.folder.path, progress=tiny.Watch("training heads", after=1))
    (taken,) = facts_of(out)["heads_from"]
    run = start(out, options=more, heads_from=done.folder.path, resume=True)
    assert run.facts["heads_from"] == [taken]


def test_interrupted_while_taking_and_resumed_without_the_other(done: Run, tmp_path: Path) -> None:
    out = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        start(out, heads_from=done.folder.path, progress=tiny.Watch("taking heads over", after=2))
    assert facts_of(out)["state"] == "interrupted"
    run = start(out, heads_from=done.folder.path, resume=True)
    assert front_of(out) == front_of(done.folder.path)
    assert run.facts["heads_from"][0]["heads"] > 0
    (out / "front.json").unlink()
    start(out, heads_from=tmp_path / "gone", resume=True)
    assert front_of(out) == front_of(done.folder.path)


def test_heads_that_were_fine_tuned_with_their_trunk(tuned: Run, tmp_path: Path) -> None:
    watch = tiny.Watch()
    run = start(tmp_path / "new", graph=tuned.graph, heads_from=tuned.folder.path, progress=watch)
    (taken,) = run.facts["heads_from"]
    assert taken["heads"] == len(list(tuned.folder.bank.glob("*/heads/*.safetensors"))) > 0
    assert any("fine-tuned there together with the trunk" in line for line in watch.said)


def test_label_free(tmp_path: Path) -> None:
    data = tiny.digits(1797, labels="none")
    old = start(tmp_path / "old", data=data)
    watch = tiny.Watch()
    start(tmp_path / "new", data=data, heads_from=old.folder.path, progress=watch)
    assert "training heads" not in watch.steps
    with pytest.raises(OptionError, match=r"the data differs \(labels: none there, given here\)"):
        start(tmp_path / "given", heads_from=old.folder.path)


def test_trunks_that_the_other_run_lacks_are_trained(done: Run, tmp_path: Path) -> None:
    watch = tiny.Watch()
    run = prune(tmp_path / "new", heads_from=done.folder.path, progress=watch)
    (taken,) = run.facts["heads_from"]
    assert taken["trunk"] == done.materialise(done.front.trunk).digest
    assert any("the trunk differs" in line and "are trained" in line for line in watch.said)
    banks = list((tmp_path / "new" / "bank").iterdir())
    assert len(banks) > 1
    assert bank_of(
        run.folder.bank,
        taken["trunk"],
        origin=run.facts["trunk_digest"],
        data_digest=run.facts["data_digest"],
        train_digest=run.facts["train_digest"],
    ).records
