"""What the tables are made of: short labels for long names, columns of numbers, lines that suit terminal and file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from string import ascii_uppercase
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


class Labels(Mapping[str, str]):
    """Short labels A, B, C, ... for long names, in the order in which they come.

    Args:
        names: may repeat.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._labels = {name: _letters(place) for place, name in enumerate(dict.fromkeys(names))}

    def __getitem__(self, name: str) -> str:
        return self._labels[name]

    def __iter__(self) -> Any:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def legend(self, title: str) -> list[RenderableType]:
        """What the labels stand for; nothing where there are none."""
        if not self._labels:
            return []
        grid = Table.grid(padding=(0, 2))
        grid.add_column(justify="right")
        grid.add_column(overflow="fold")
        for name, label in self._labels.items():
            grid.add_row(label, Text(name))
        return [Text(title), indented(grid)]


class Fitting:
    """The first of several renderings that the terminal is wide enough for, else the last."""

    def __init__(self, *choices: RenderableType) -> None:
        self.choices = choices

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        endless = options.update(width=10_000)
        for choice in self.choices[:-1]:
            if Measurement.get(console, endless, choice).maximum <= options.max_width:
                yield choice
                return
        yield self.choices[-1]


def table_of(*columns: str, gap: int = 2) -> Table:
    """A table without lines around it; a column whose name starts with ``>`` holds numbers, to the right, unbroken."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0), header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(Text(column.removeprefix(">")), justify=justify, overflow="fold", no_wrap=justify == "right")
    return table


def title(text: str) -> Text:
    return Text(text, style="bold")


def named(name: str, rest: str) -> Text:
    return Text.assemble((name, "bold"), rest)


def indented(what: RenderableType) -> RenderableType:
    return Padding(what, (0, 0, 0, 2), expand=False)


class Line:
    """A sentence: wrapped on a terminal, whole in a file or a pipe, where lines are searched and cut by others."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text) if console.is_terminal else Text(self.text, no_wrap=True, overflow="ignore")


def paragraphs(lines: Iterable[str]) -> list[RenderableType]:
    return [Line(line) for line in lines]


def amount(number: float) -> str:
    """A count with a suffix: ``40.6 M``."""
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{suffix}" if abs(number) < 999.5 * size else f"{number / size:.0f}{suffix}"
    return f"{number:.4g}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _letters(place: int) -> str:
    text = ""
    while place >= 0:
        place, letter = divmod(place, 26)
        text = ascii_uppercase[letter] + text
        place -= 1
    return text
