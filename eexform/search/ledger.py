"""What a run's folder says about the run: laid down, agreed with on resuming, closed with whatever came of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from eexform.data import Dataset, save_dataset
from eexform.errors import EexformError, RunError, StorageError, TrainingError
from eexform.ir.graph import Graph
from eexform.ir.serialize import save
from eexform.progress import Progress
from eexform.search.folder import RunFolder
from eexform.search.stored_costs import same_settings

WORDS = {"trained_from": "settings of the training", "cost_files": "contents of the files that costs are read from"}
"""How a message calls a part of ``run.json``, where its name does not read well."""


def begin(
    folder: RunFolder,
    graph: Graph,
    dataset: Dataset,
    settings: Mapping[str, Any],
    resume: bool,
    show: Progress,
) -> dict[str, Any]:
    """Lay down a new run, or check that an old one is the same search. Returns the facts to go on from."""
    if not resume:
        folder.fresh()
        save(graph, folder.trunk)
        save_dataset(dataset, folder.path)
        facts = {"state": "training", **settings}
        folder.write(facts)
        return facts
    facts = folder.read()
    if "trained_from" in facts:
        raise RunError(f"{folder.path}: this run came out of `eexform train`; go on with that command and --resume")
    agree(folder, facts, settings, show)
    facts["state"] = "training"
    folder.write(facts)
    return facts


def agree(folder: RunFolder, facts: dict[str, Any], settings: Mapping[str, Any], show: Progress) -> None:
    """Take ``settings`` over into the ``facts`` of a run that goes on.

    Raises:
        RunError: one of them differs from the run's; the message says which and how.
    """
    for key, value in settings.items():
        if key not in facts or _same(key, facts[key], value):
            continue
        if key == "limits" and not folder.front.exists():
            # no head depends on them, and limits that nothing could keep must not cost the training
            if folder.forget_search():
                show.say("the limits have changed: the search starts anew, with the heads that are trained")
            continue
        what = WORDS.get(key, key.replace("_", " "))
        raise RunError(
            f"{folder.path}: cannot resume with other {what} than the run's: "
            f"{_difference(facts[key], value)}; use the same options or another --out"
        )
    failed = facts.pop("error", None)
    facts.pop("diverged", None)
    if failed:
        show.say(f"going on with a run that failed: {failed}")
    facts.update(settings)


@contextlib.contextmanager
def outcome(folder: RunFolder, facts: dict[str, Any]) -> Iterator[None]:
    """Write down how the search ended, with all that is known by then, whichever way that is."""
    begun, earlier = time.perf_counter(), facts.get("seconds", 0.0)

    def close(state: str) -> None:
        facts.update(state=state, seconds=round(earlier + time.perf_counter() - begun, 2))
        folder.write(facts)

    try:
        yield
    except KeyboardInterrupt:
        close("interrupted")
        raise
    except EexformError as error:
        facts["error"] = str(error)
        if isinstance(error, TrainingError):
            facts["diverged"] = True  # what is put right by other options alone, and a resume has the same
        with contextlib.suppress(StorageError):  # a full disk may be what the error is about
            close("failed")
        raise
    close(facts["state"])


@contextlib.contextmanager
def timed(facts: dict[str, Any], key: str) -> Iterator[None]:
    """Add the seconds spent inside to ``facts[key]``, interrupted or not: those of a resumed run add up."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        facts[key] = round(facts.get(key, 0.0) + time.perf_counter() - begun, 2)


def _same(key: str, old: Any, new: Any) -> bool:
    if key == "cost":
        return same_settings(old, new)
    if key == "models" and isinstance(old, Mapping):
        return set(old) == set(new) and all(same_settings(old[model], new[model]) for model in new)
    return bool(old == new)


def _difference(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in new:
            if old.get(key) != new[key]:
                return _difference(old.get(key), new[key], f"{where}.{key}" if where else str(key))
    if where:
        return f"{where} was {_short(old)}, now {_short(new)}"
    return f"was {str(old)[:80]!r}, now {str(new)[:80]!r}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
