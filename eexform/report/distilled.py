"""What `eexform distill` shows on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from eexform.report.layout import count, paragraphs


def distilled(plain: Mapping[str, Any]) -> RenderableType:
    """The file, the training, and what came of it."""
    lines = [
        f"wrote {plain['out']}: {count(plain['epochs'], 'epoch')} in {plain['seconds'] / 60:.1f} min on "
        f"{plain['device']}, the best one was {plain['best_epoch']}"
    ]
    test = plain["test"]
    if test:
        before, after = test["before"], test["after"]
        lines.append(
            f"agreement with the teacher on {count(test['samples'], 'sample')} of test: "
            f"{_percent(before['agreement'])} before, {_percent(after['agreement'])} after"
        )
        if "teacher_accuracy" in test:
            lines.append(
                f"accuracy there: {_percent(before['accuracy'])} before, {_percent(after['accuracy'])} after, "
                f"the teacher {_percent(test['teacher_accuracy'])}"
            )
    return Group(*paragraphs(lines))


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
