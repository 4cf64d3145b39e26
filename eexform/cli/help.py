"""Help as plain text: options in named groups, arguments without decoration, examples as they are typed."""

from __future__ import annotations

import textwrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

WIDTH = 100
"""Columns at most; fewer where the terminal is narrower."""

_NAMES = 30
_FIRST = ("Arguments", "Options", "Commands")


def examples(*commands: str) -> str:
    """Commands for the end of a help text; a long one goes on in the next line as a shell would take it."""
    return "\n".join(" \\\n      ".join(_wrapped(command, 72)) for command in commands)


def _wrapped(command: str, width: int) -> list[str]:
    pieces: list[str] = []
    for word in command.split():  # an option stays with its value
        if pieces and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) < width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines


def _write_rows(formatter: Any, rows: list[tuple[str, str]]) -> None:
    """A list of names and what they mean; unlike click's it breaks no option name at its hyphens."""
    indent = formatter.current_indent
    first = min(max(len(name) for name, _ in rows), _NAMES) + 2
    for name, text in rows:
        lines = textwrap.wrap(text, formatter.width - indent - first, break_on_hyphens=False, break_long_words=False)
        if len(name) + 2 > first:
            lines.insert(0, "")
        head, *rest = lines or [""]
        formatter.write(f"{'':{indent}}{name:{first}}{head}".rstrip() + "\n")
        for line in rest:
            formatter.write(f"{'':{indent + first}}{line}\n")


class _Plain:
    """What command and group have in common."""

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            group = "Options"
            if parameter.param_type_name == "argument":
                group, record = "Arguments", (parameter.metavar or parameter.name, parameter.help or "")
            groups.setdefault(getattr(parameter, "rich_help_panel", None) or group, []).append(record)
        if isinstance(self, TyperGroup):
            groups["Commands"] = [
                (name, (self.commands[name].help or "").split("\n\n")[0]) for name in self.list_commands(ctx)
            ]
        for title in sorted(groups, key=lambda title: _FIRST.index(title) if title in _FIRST else len(_FIRST)):
            with formatter.section(title):
                _write_rows(formatter, groups[title])

    def format_epilog(self: Any, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        if isinstance(self, TyperGroup):
            return ["COMMAND [ARGUMENTS] [OPTIONS]"]
        arguments = [p.metavar or p.name for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return [*arguments, self.options_metavar]


class PlainCommand(_Plain, TyperCommand):
    """A command."""


class PlainGroup(_Plain, TyperGroup):
    """The group of all commands."""
