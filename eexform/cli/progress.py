"""Progress bars with the time left, on standard error so that ``--json`` output stays clean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eexform.progress import Task


class _Bar:
    def __init__(self, bars: Progress, identity: TaskID) -> None:
        self.bars = bars
        self.identity = identity

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.bars.update(self.identity, advance=steps, **({"note": note} if note else {}))


class Bars:
    """:class:`eexform.progress.Progress` on a terminal; where there is none, a line at the end of each task."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        bars = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[note]}", markup=False),
            console=self.console,
            disable=self.quiet,
            refresh_per_second=4,
        )
        with bars:
            yield _Bar(bars, bars.add_task(label, total=total, note=""))

    def say(self, message: str) -> None:
        if not self.quiet:
            self.console.print(message, markup=False, highlight=False)
