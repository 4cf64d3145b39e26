"""The bank: trained heads and their scores, looked up by what they were trained from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from eexform import files
from eexform.errors import OptionError, RunError, suggest
from eexform.heads import HeadSpec
from eexform.heads.build import GATE
from eexform.ir.digest import digest_arrays
from eexform.passes import TrainedHead

FORMAT = 1
SPLITS = ("calibrate", "select", "test")
"""Splits whose scores the bank keeps; head-train is only ever streamed."""


@dataclass(frozen=True)
class HeadRecord:
    """What the bank knows about one trained head, without its arrays."""

    site: str
    head: str
    order: int
    temperature: float
    digest: str
    epochs: int
    loss: float
    key: str


class Bank:
    """Heads of one trunk, trained on one data set with one set of options.

    The folder is ``root/<identity>``, where the identity is the sha-256 of trunk digest, data digest, options and
    format: another trunk, other data or other options never find each other's heads. Per head there is
    ``heads/<key>.safetensors`` (parameters, with the facts in its header) and ``scores/<key>.<split>.npy`` (float32
    [samples, classes]), with a gate also ``scores/<key>.gate.<split>.npy`` ([samples]); the first is written last, so a
    head that is listed is complete.
    """

    def __init__(self, root: str | Path, *, trunk_digest: str, data_digest: str, options_digest: str) -> None:
        self.trunk_digest = trunk_digest
        identity = {"trunk": trunk_digest, "data": data_digest, "options": options_digest, "format": FORMAT}
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = Path(root) / self.identity
        context = self.folder / "context.json"
        if not context.exists():
            for part in ("heads", "scores"):
                try:
                    (self.folder / part).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise files.storage_error(self.folder / part, error) from error
            files.write_json(context, identity)
        elif files.read_json(context) != identity:
            raise RunError(f"{context}: is of another trunk or data set; the bank is damaged, delete {self.folder}")
        self._records: dict[tuple[str, str], HeadRecord] | None = None

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def records(self) -> Mapping[tuple[str, str], HeadRecord]:
        """Every complete head by (site, head text), in the order in which a sample meets the sites."""
        if self._records is None:
            found = [self._read_record(path) for path in sorted((self.folder / "heads").glob("*.safetensors"))]
            found.sort(key=lambda record: (record.order, record.site, record.head))
            self._records = {(record.site, record.head): record for record in found}
        return self._records

    def has(self, site: str, head: str) -> bool:
        """Whether the head is trained and its scores are stored."""
        return (site, head) in self.records

    def sites(self, trunk_digest: str) -> tuple[str, ...]:
        """Sites with a trained head, in order; none for another trunk."""
        if trunk_digest != self.trunk_digest:
            return ()
        return tuple(dict.fromkeys(site for site, _ in self.records))

    def heads(self, trunk_digest: str, site: str) -> tuple[str, ...]:
        """Heads trained at ``site``."""
        return tuple(head for at, head in self.records if at == site) if trunk_digest == self.trunk_digest else ()

    def trained(self, trunk_digest: str, site: str, head: str) -> TrainedHead:
        """Parameters of a head.

        Raises:
            OptionError: this bank has no such head.
            RunError: the file is damaged.
        """
        if trunk_digest != self.trunk_digest:
            raise OptionError("the bank's heads were trained for another trunk; train heads for this one first")
        record = self._record(site, head)
        with _opened(self._head_path(record.key)) as stored:
            parameters = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if digest_arrays(parameters) != record.digest:
            raise RunError(f"{self._head_path(record.key)}: its parameters do not match their digest; delete the file")
        return TrainedHead(parameters, record.temperature, record.digest)

    # -- scores --------------------------------------------------------------------------------------------------------

    def scores(self, site: str, head: str, split: str) -> np.ndarray:
        """Scores of a head on a split, float32 [samples, classes], memory-mapped and read-only.

        Raises:
            OptionError: no such head or split.
            RunError: the file is missing or damaged.
        """
        key = self._record(site, head).key
        return _array(self._score_path(key, split), np.float32, cure=self._head_path(key), dimensions=2)

    def gates(self, site: str, head: str, split: str) -> np.ndarray:
        """What a head's gate says on a split, float32 [samples] in [0, 1], memory-mapped and read-only.

        Raises:
            OptionError: no such head or split, or a head without a gate.
            RunError: the file is missing or damaged.
        """
        key = self._record(site, head).key
        if not HeadSpec.parse(head).gate:
            raise OptionError(f"head {head!r} at {site!r} has no gate; train {head + '/gate'!r}")
        return _array(self._score_path(f"{key}.{GATE}", split), np.float32, cure=self._head_path(key), dimensions=1)

    def final(self, split: str) -> np.ndarray:
        """The trunk's own scores on a split, float32 [samples, classes]."""
        return _array(self._score_path("final", split), np.float32, cure=self._facts_path, dimensions=2)

    def labels(self, split: str) -> np.ndarray:
        """Labels of a split, int64 [samples]: the given ones or, in label-free mode, the trunk's own answers."""
        return _array(self._score_path("labels", split), np.int64, cure=self._facts_path, dimensions=1)

    @property
    def facts(self) -> dict[str, Any]:
        """Accuracy per split, samples, temperature and kind of scores of the trunk; empty before training."""
        return dict(files.read_json(self._facts_path)) if self._facts_path.exists() else {}

    # -- writing -------------------------------------------------------------------------------------------------------

    def new_scores(self, key: str, split: str, rows: int, classes: int) -> np.memmap:
        """A zeroed array on disk for scores under way; it is not listed before its head is stored."""
        return self._new(self._score_path(key, split), (rows, classes))

    def new_gates(self, key: str, split: str, rows: int) -> np.memmap:
        """Like :meth:`new_scores` for what a head's gate says, float32 [rows]."""
        return self._new(self._score_path(f"{key}.{GATE}", split), (rows,))

    @staticmethod
    def _new(path: Path, shape: tuple[int, ...]) -> np.memmap:
        try:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):
                # a mapped file that has no place on a full disk kills the process when it is written to; ask beforehand
                with open(path, "r+b") as stream:
                    os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
            return array
        except OSError as error:
            path.unlink(missing_ok=True)
            raise files.storage_error(path, error) from error

    def put_labels(self, split: str, labels: np.ndarray) -> None:
        """Store a split's labels."""
        with files.writing(self._score_path("labels", split)) as temporary, open(temporary, "wb") as stream:
            np.save(stream, np.asarray(labels, np.int64), allow_pickle=False)

    def put_facts(self, facts: Mapping[str, Any]) -> None:
        """Store the facts about the trunk; from here on the trunk's own scores count as complete."""
        files.write_json(self._facts_path, dict(facts))

    def put_head(
        self,
        site: str,
        head: str,
        parameters: Mapping[str, np.ndarray],
        *,
        order: int,
        temperature: float,
        epochs: int,
        loss: float,
    ) -> None:
        """Store a trained head whose scores are already on disk."""
        facts = {
            "site": site,
            "head": head,
            "order": order,
            "temperature": temperature,
            "digest": digest_arrays(parameters),
            "epochs": epochs,
            "loss": loss,
        }
        data = save_tensors(dict(parameters), metadata={"eexform.head": json.dumps(facts)})
        files.write_bytes(self._head_path(head_key(site, head)), data)
        self._records = None

    # -- paths ---------------------------------------------------------------------------------------------------------

    def _record(self, site: str, head: str) -> HeadRecord:
        if (site, head) not in self.records:
            at_site = [text for where, text in self.records if where == site]
            if at_site:
                raise OptionError(f"no head {head!r} is trained at {site!r}: {suggest(head, at_site)}")
            sites = {where for where, _ in self.records}
            raise OptionError(f"no head is trained at {site!r}: {suggest(site, sites)}")
        return self.records[site, head]

    @property
    def _facts_path(self) -> Path:
        return self.folder / "facts.json"

    def _head_path(self, key: str) -> Path:
        return self.folder / "heads" / f"{key}.safetensors"

    def _score_path(self, key: str, split: str) -> Path:
        if split not in SPLITS:
            raise OptionError(f"the bank has no split {split!r}: {suggest(split, SPLITS)}")
        return self.folder / "scores" / f"{key}.{split}.npy"

    def _read_record(self, path: Path) -> HeadRecord:
        with _opened(path) as stored:
            try:
                facts = json.loads((stored.metadata() or {})["eexform.head"])
                return HeadRecord(**facts, key=path.stem)
            except (KeyError, ValueError, TypeError) as error:
                raise RunError(
                    f"{path}: is not a head of this version ({error!r}); delete it to train it again"
                ) from error


def head_key(site: str, head: str) -> str:
    """File name of a head: sha-256 of site and head text (value names may hold any character)."""
    return hashlib.sha256(json.dumps([site, head]).encode()).hexdigest()[:32]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read ({error}); delete it to train the head again") from error


def _array(path: Path, dtype: type[np.generic], *, cure: Path, dimensions: int) -> np.ndarray:
    """A stored array, memory-mapped; without the file ``cure`` the next training makes it anew."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.dtype != dtype or found.ndim != dimensions:
            raise ValueError(f"it holds {found.dtype} {list(found.shape)}")
        return found
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{path}: is missing or damaged ({error}); delete {cure} and train again (--resume)") from error
