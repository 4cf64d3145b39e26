"""Progress on standard error, so that what a command prints stays clean: bars with the time left, or plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from eexform.progress import Task

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class _Bar:
    def __init__(self, bars: Progress, identity: TaskID) -> None:
        self.bars = bars
        self.identity = identity

    def advance(self, steps: int = 1, note: str = "") -> None:
        fields: dict[str, Any] = {"note": note} if note else {}
        self.bars.update(self.identity, advance=steps, **fields)
        if self.bars.tasks[self.identity].finished:
            self.bars.update(self.identity, state="used")


class _Lines:
    """A line now and then, for logs."""

    def __init__(self, write: Callable[[str], None], label: str, total: int, clock: Callable[[], float]) -> None:
        self.write, self.label, self.total, self.clock = write, label, total, clock
        self.begun = self.written = clock()
        self.done = self.first = 0
        self.note = ""

    def advance(self, steps: int = 1, note: str = "") -> None:
        now = self.clock()
        if not self.done and now - self.begun < 1.0:
            self.first = steps if steps > 1 else 0  # what a resumed task finds done says nothing about its speed
        self.done += steps
        self.note = note or self.note
        if now - self.written >= EVERY and self.done < self.total:
            self.written = now
            fresh, elapsed = self.done - self.first, now - self.begun
            left = f", about {duration(elapsed / fresh * (self.total - self.done))} left" if fresh > 0 else ""
            self.write(f"{self.label}: {self.done}/{self.total} after {duration(elapsed)}{left}{self._noted()}")

    def end(self) -> None:
        word = "done" if self.done >= self.total else f"ended at {self.done}/{self.total}"
        self.write(f"{self.label}: {word} in {duration(self.clock() - self.begun)}{self._noted()}")

    def _noted(self) -> str:
        return f"; {self.note}" if self.note else ""


class _Nothing:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass


class Bars:
    """:class:`eexform.progress.Progress`: a bar per task on a terminal; elsewhere a line every 30 s and at its end."""

    def __init__(self, console: Console, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.quiet = quiet
        self.clock = clock

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        if self.quiet:
            yield _Nothing()
        elif not self.console.is_terminal:
            lines = _Lines(self.say, label, total, self.clock)
            yield lines
            lines.end()
        else:
            whole = Column(no_wrap=True, min_width=8)
            bars = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=16),
                MofNCompleteColumn(table_column=whole),
                TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
                TextColumn("{task.fields[state]}", markup=False, table_column=Column(no_wrap=True, min_width=4)),
                TextColumn(
                    "{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
                ),
                expand=True,
                console=self.console,
                refresh_per_second=4,
            )
            with bars:
                yield _Bar(bars, bars.add_task(label, total=total, note="", state="left"))

    def say(self, message: str) -> None:
        if not self.quiet:
            self.console.print(message, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)


def duration(seconds: float) -> str:
    """``42 s``, ``6 min 12 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
