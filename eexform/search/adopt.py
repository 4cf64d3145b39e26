"""Heads of another run: taken over where trunk, data and training options are the same, so that nothing trains twice.

Two searches over the same trunk differ in what they make small, in their limits, in their effort; their heads are the
same. Everything taken is copied (never linked: a run stays whole when another one is damaged or deleted), and checked
on the way: parameters against their digest, scores against shape, labels, accuracies and temperatures on record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eexform import files
from eexform.data.dataset import Dataset
from eexform.errors import OptionError, RunError, need
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import Site
from eexform.progress import Progress
from eexform.search.folder import RunFolder
from eexform.training.bank import FORMAT, SPLITS, Bank
from eexform.training.calibrate import fit_temperature
from eexform.training.options import TrainOptions

SAME_TEMPERATURE = 1e-3
"""Share by which a temperature fitted again may differ from the one on record; the fit itself stops at 1e-4."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Wanted:
    """The heads that a search needs for one trunk.

    Attributes:
        identity: what the bank is looked up by: the keyword arguments of :class:`eexform.training.bank.Bank`.
        heads: (site, head text) in the order in which a sample meets the sites, with the number of the site.
        rows: samples of each split that the bank keeps.
        classes: of the trunk.
        scores: kind of the trunk's scores.
        train: how heads are trained; to say what differs.
        described: the data set in plain values; to say what differs.
        origin: digest of the trunk as loaded; to say whether the model differs, or what passes make of it.
    """

    identity: Mapping[str, str]
    heads: Mapping[Pair, int]
    rows: Mapping[str, int]
    classes: int
    scores: str
    train: TrainOptions
    described: Mapping[str, Any]
    origin: str

    @classmethod
    def of(
        cls,
        graph: Graph,
        dataset: Dataset,
        sites: Sequence[Site],
        heads: Mapping[str, Sequence[HeadSpec]],
        identity: Mapping[str, str],
        train: TrainOptions,
        *,
        origin: str,
    ) -> Wanted:
        """What ``graph`` needs with ``heads`` at ``sites``; ``dataset`` is bound to it."""
        return cls(
            identity=identity,
            heads={
                (site.value, str(spec)): order for order, site in enumerate(sites) for spec in heads.get(site.value, ())
            },
            rows={split: dataset.size(split) for split in SPLITS},
            classes=graph.num_classes,
            scores=graph.scores,
            train=train,
            described={"source_digest": dataset.source.digest, **dataset.describe()},
            origin=origin,
        )


def check(folder: RunFolder, other: Path, wanted: Wanted) -> None:
    """Whether the other run has heads that this search needs and the run itself lacks; nothing is written.

    Args:
        folder: of this search's run; it need not be there yet.
        other: folder of the other run.
        wanted: what is needed.

    Raises:
        OptionError: there is nothing to take, and why; or the other run is this one.
        RunError: the other folder holds no run, or is damaged.
    """
    _lookup(folder, other, wanted, required=True)


def adopt(
    folder: RunFolder, other: Path, wanted: Wanted, *, required: bool, progress: Progress
) -> dict[str, Any] | None:
    """Copy the heads that the other run has and this one lacks, with their scores, into this run's bank.

    What the other run lacks, or has not finished, is left to training. An interruption leaves no half head behind: as
    in training a head is listed once all that belongs to it is stored.

    Args:
        folder: of this search's run; held for writing.
        other: folder of the other run; it is only read.
        wanted: what is needed.
        required: whether it is an error where nothing can be taken.
        progress: is told what was taken and what was not.

    Returns:
        What was taken, for the run's facts; ``None`` where nothing was.

    Raises:
        OptionError: ``required``, and there is nothing to take; the message says what differs.
        RunError: a file of the other run is damaged: a head's parameters do not match their digest, scores do not
            match what is on record about them.
    """
    donor, missing, reason = _lookup(folder, other, wanted, required=required)
    if donor is None:
        if reason:
            progress.say(f"heads of {other}: {reason}; the heads of this trunk are trained")
        return None
    taken = [pair for pair in missing if donor.has(*pair)]
    own = Bank(folder.bank, **wanted.identity)
    _check_trunk(donor, wanted)
    if not own.facts:
        _take_trunk(donor, own, wanted)
    with progress.task("taking heads over", len(taken)) as task:
        for pair in taken:
            _take_head(donor, own, pair, wanted)
            task.advance(1)
    rest = len(missing) - len(taken)
    tuned = any(donor.records[pair].epochs == 0 for pair in taken)
    said = f"{len(taken)} trained heads are those of {other}"
    said += ", fine-tuned there together with the trunk" if tuned else ""
    progress.say(said + (f"; {rest} more, which it lacks, are trained" if rest else ""))
    return {"run": str(other), "trunk": wanted.identity["trunk_digest"], "heads": len(taken), "lacking": rest}


# -- what there is -----------------------------------------------------------------------------------------------------


def _lookup(folder: RunFolder, other: Path, wanted: Wanted, *, required: bool) -> tuple[Bank | None, list[Pair], str]:
    """The other run's bank where there is something to take from it, the heads that this run lacks, or why not.

    A run that already has some of its heads is one that goes on: what it took is there, and the rest is its own to
    train. Then nothing to take is no error.
    """
    need(
        other.resolve() != folder.path.resolve(),
        f"heads_from: {other} is this run itself; what it has trained is used anyway",
        OptionError,
    )
    own = _bank(folder, wanted)
    missing = [pair for pair in wanted.heads if own is None or not own.has(*pair)]
    if not missing:
        return None, [], ""
    source = RunFolder(other)
    facts = source.read()
    donor = _bank(source, wanted)
    if donor is not None and donor.facts and any(donor.has(*pair) for pair in missing):
        return donor, missing, ""
    reason = _reason(source, facts, donor, wanted)
    if required and len(missing) == len(wanted.heads):
        raise OptionError(
            f"heads_from: nothing of {other} can be used here: {reason}. Use what it used, or leave heads_from out to "
            "train heads anew"
        )
    return None, missing, reason


def _bank(folder: RunFolder, wanted: Wanted) -> Bank | None:
    """A run's bank for what is wanted, if it has one; none is made."""
    identity = wanted.identity
    asked = (identity["trunk_digest"], identity["data_digest"], identity["options_digest"], FORMAT)
    if any(_parts(context) == asked for context in _contexts(folder)):
        return Bank(folder.bank, **identity)
    return None


def _contexts(folder: RunFolder) -> Iterator[Mapping[str, Any]]:
    """What each of a run's banks was made for."""
    for path in sorted(folder.bank.glob("*/context.json")):
        found = files.read_json(path)
        if not isinstance(found, dict):
            raise RunError(f"{path}: is not a description of a bank; it is damaged, delete {path.parent}")
        yield found


def _parts(context: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(context.get(part) for part in ("trunk", "data", "options", "format"))


# -- why there is nothing ----------------------------------------------------------------------------------------------


def _reason(other: RunFolder, facts: Mapping[str, Any], donor: Bank | None, wanted: Wanted) -> str:
    """Why nothing of the other run can be used, in words."""
    if donor is not None and donor.records:
        return f"its heads are others ({_named(donor.records)}; wanted: {_named(wanted.heads)})"
    contexts = list(_contexts(other))
    if donor is not None or not contexts:
        return f"it has no trained heads yet (state: {facts['state']})"
    identity = wanted.identity
    asked = (identity["trunk_digest"], identity["data_digest"], identity["options_digest"], FORMAT)
    closest = max(contexts, key=lambda context: sum(a == b for a, b in zip(_parts(context), asked, strict=True)))
    trunk, data, options, format_ = (a == b for a, b in zip(_parts(closest), asked, strict=True))
    reasons = []
    if not trunk:
        reasons.append(_trunk_reason(facts, wanted))
    if not data:
        reasons.append(f"the data differs ({_data_reason(other, wanted)})")
    if not options:
        reasons.append(f"the training options differ ({_options_reason(facts, wanted)})")
    if not format_:
        reasons.append("its bank was written by another version of eexform")
    return ", and ".join(reasons)


def _trunk_reason(facts: Mapping[str, Any], wanted: Wanted) -> str:
    if facts["trunk_digest"] == wanted.origin:
        return "the trunk differs (the model is the same, what the recipe's passes make of it is not)"
    return f"the trunk differs (digest {facts['trunk_digest'][:12]} there, {wanted.origin[:12]} here)"


def _data_reason(other: RunFolder, wanted: Wanted) -> str:
    stored = files.read_json(other.path / "data.json")
    for key in ("source_digest", "labels", "preprocess", "augment", "seed", "splits"):
        if stored.get(key) != wanted.described[key]:
            return f"{key.replace('_', ' ')}: {_difference(stored.get(key), wanted.described[key])}"
    return "which samples are in which split"


def _options_reason(facts: Mapping[str, Any], wanted: Wanted) -> str:
    there, here = facts.get("train"), wanted.train.to_json()
    if there == here:
        return "they are called the same, but another version of eexform wrote that run"
    return _difference(there, here)


def _difference(there: Any, here: Any) -> str:
    """The entries that differ, at most three."""
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return f"{_short(there)} there, {_short(here)} here"
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    shown = [f"{key} {_difference(there.get(key), here.get(key))}" for key in keys[:3]]
    return ", ".join([*shown, *(["..."] if len(keys) > 3 else [])])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _named(pairs: Mapping[Pair, Any]) -> str:
    texts = [f"{head} at {site}" for site, head in pairs]
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


# -- copying -----------------------------------------------------------------------------------------------------------


def _check_trunk(donor: Bank, wanted: Wanted) -> None:
    """The trunk's stored scores give the accuracies that were written down beside them."""
    facts = donor.facts
    for split, rows in wanted.rows.items():
        scores, labels = _checked(donor, donor.final(split), (rows, wanted.classes), split), donor.labels(split)
        stated = facts.get("accuracy", {}).get(split)
        found = float((scores.argmax(axis=1) == labels).sum()) / max(1, rows) if len(labels) == rows else None
        if facts.get("scores") != wanted.scores or stated is None or found is None or abs(found - stated) > 1e-9:
            raise RunError(
                f"{donor.folder}: the trunk's scores of {split} do not give the accuracy on record ({found} instead of "
                f"{stated}); the bank is damaged, delete it and train there again (--resume)"
            )


def _take_trunk(donor: Bank, own: Bank, wanted: Wanted) -> None:
    for split, rows in wanted.rows.items():
        store = own.new_scores("final", split, rows, wanted.classes)
        store[:] = donor.final(split)
        store.flush()
        own.put_labels(split, np.asarray(donor.labels(split)))
    own.put_facts(donor.facts)


def _take_head(donor: Bank, own: Bank, pair: Pair, wanted: Wanted) -> None:
    """Copy one head. Its place among the sites is that of this search, which may have others between them."""
    record = donor.records[pair]
    found = donor.trained(donor.trunk_digest, *pair)  # checks the parameters against their digest
    scores = {
        split: _checked(donor, donor.scores(*pair, split), (rows, wanted.classes), split, pair)
        for split, rows in wanted.rows.items()
    }
    gates = {}
    if HeadSpec.parse(pair[1]).gate:
        gates = {
            split: _checked(donor, donor.gates(*pair, split), (rows,), split, pair)
            for split, rows in wanted.rows.items()
        }
    if wanted.scores == "logits":
        again = fit_temperature(scores["calibrate"], np.asarray(donor.labels("calibrate")))
        if abs(again - record.temperature) > SAME_TEMPERATURE * record.temperature:
            raise RunError(
                f"{donor.folder}: head {pair[1]!r} at {pair[0]!r}: its scores of calibrate want the temperature "
                f"{again:.4f}, and {record.temperature:.4f} is on record; {_cure(donor, record.key)}"
            )
    for split, rows in wanted.rows.items():
        store = own.new_scores(record.key, split, rows, wanted.classes)
        store[:] = scores[split]
        store.flush()
        if gates:
            store = own.new_gates(record.key, split, rows)
            store[:] = gates[split]
            store.flush()
    own.put_head(
        *pair,
        found.parameters,
        order=wanted.heads[pair],
        temperature=record.temperature,
        epochs=record.epochs,
        loss=record.loss,
    )


def _checked(
    donor: Bank, found: np.ndarray, shape: tuple[int, ...], split: str, pair: Pair | None = None
) -> np.ndarray:
    """Scores of the shape that this search needs, without NaN."""
    if found.shape == shape and np.isfinite(found).all():
        return found
    whose = "the trunk" if pair is None else f"head {pair[1]!r} at {pair[0]!r}"
    what = f"hold {list(found.shape)}, expected {list(shape)}" if found.shape != shape else "hold NaN or infinity"
    cure = "delete the folder" if pair is None else _cure(donor, donor.records[pair].key)
    raise RunError(f"{donor.folder}: the scores of {whose} on {split} {what}; {cure}")


def _cure(donor: Bank, key: str) -> str:
    return f"delete {donor.folder / 'heads' / f'{key}.safetensors'}, and the head is trained again"
