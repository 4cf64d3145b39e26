"""How long work reports where it stands, without knowing who is watching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """``steps`` more units are done; ``note`` replaces the text shown beside the bar."""


class Progress(Protocol):
    """Something that shows tasks; the command line's is a set of bars with the time left."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]:
        """A context manager that yields a :class:`Task` of ``total`` units."""

    def say(self, message: str) -> None:
        """A line that stays."""


class _SilentTask:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass


class Silent:
    """Shows nothing; the default of the Python interface."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        yield _SilentTask()

    def say(self, message: str) -> None:
        pass
