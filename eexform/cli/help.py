"""Help as plain text: options in named groups, arguments without decoration, examples as they are typed."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

WIDTH = 100
"""Columns at most; less where the terminal is narrower."""

_CONTINUED = " \\\n      "


def examples(*commands: str) -> str:
    """Commands for the end of a help text; a long one goes on in a second line as a shell would take it."""
    return "\n".join(_broken(command) for command in commands)


def _broken(command: str, width: int = 72) -> str:
    lines: list[str] = []
    line = ""
    for word in _options(command):
        if line and len(line) + len(word) + 1 > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return _CONTINUED.join([*lines, line])


def _options(command: str) -> list[str]:
    """The command cut before every option, so that an option stays with its value."""
    pieces: list[str] = []
    for word in command.split():
        if pieces and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    return pieces


class _Plain:
    """What command and group have in common."""

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                record = (parameter.metavar or parameter.name, parameter.help or "")
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            groups.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title in sorted(groups, key=lambda title: ("Arguments", "Options").index(title) if title in _FIRST else 2):
            with formatter.section(title):
                formatter.write_dl(groups[title], col_max=32)
        if hasattr(self, "format_commands"):
            self.format_commands(ctx, formatter)

    def format_epilog(self: Any, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        arguments = [p.metavar or p.name for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return [*arguments, self.options_metavar]


_FIRST = ("Arguments", "Options")


class PlainCommand(_Plain, TyperCommand):
    """A command."""


class PlainGroup(_Plain, TyperGroup):
    """The group of all commands."""

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        return ["COMMAND", "[ARGUMENTS]", "[OPTIONS]"]

    def format_commands(self: Any, ctx: Any, formatter: Any) -> None:
        """Like the inherited one, with whole sentences instead of their first 45 characters."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                rows.append((name, (command.help or "").split("\n\n")[0]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)
