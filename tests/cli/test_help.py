"""Help texts are complete, true and readable; usage errors say what to do."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest
import typer

from eexform.cli.app import app
from eexform.cli.help import WIDTH
from eexform.search.options import SearchOptions
from eexform.training.options import TrainOptions
from tests.cli.support import cli, fine, refused

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("columns", ["80", "160"])
def test_help(name: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    shown = fine(*name.split(), "--help").out
    assert shown == fine(*name.split(), "-h").out
    assert shown.startswith(f"Usage: eexform {name}".rstrip())
    assert max(map(len, shown.splitlines())) <= min(int(columns), WIDTH)
    for ugly in ("<str>", "<int>", "list[", "{", "…", "...]", "None"):
        assert ugly not in shown
    assert not re.search(r"[a-z]-\n", shown)  # no option name is broken at a hyphen


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = COMMANDS[name]
    for parameter in command.params:
        assert parameter.help, parameter.name
        assert getattr(parameter, "is_flag", False) or parameter.metavar, parameter.name
    assert command.epilog


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands(name: str) -> None:
    command = COMMANDS[name]
    lines = [line for line in command.epilog.replace("\\\n", " ").splitlines() if line]
    assert lines
    for line in lines:
        program, first, *rest = shlex.split(line)
        assert (program, first) == ("eexform", name)
        command.make_context(name, rest)  # parses


@pytest.mark.parametrize("settings", [SearchOptions, TrainOptions])
def test_every_setting_of_a_search_has_an_option(settings: type) -> None:
    options = {parameter.name: parameter.default for parameter in COMMANDS["search"].params}
    for field in dataclasses.fields(settings):
        if field.name == "warmup":
            continue  # not worth an option
        known = field.name.removesuffix("s") if field.name in ("sites", "heads") else field.name
        assert known in options
        if known == field.name:
            assert options[known] == field.default, known


def test_usage_errors() -> None:
    refused("search", says=["Missing argument 'MODEL'", "eexform search --help"])
    refused("export", "r1", says=["Missing option '--out' / '-o'", "eexform export --help"])
    refused("inspct", says=["No such command 'inspct'", "eexform --help"])
    refused("inspect", "--scors", "x", "m.onnx", says=["--scors", "--scores"])
    refused("inspect", "m.onnx", "--max-live", "0", says=["--max-live", "greater than or equal to 1"])
    refused("pareto", "a", "b", says=["unexpected extra argument", "b"])
    done = cli()
    assert done.code == 2
    assert done.out == ""
    assert "Commands:" in done.err


def test_version() -> None:
    assert re.fullmatch(r"eexform \d+\.\d+\.\d+\S*\n", fine("--version").out)
