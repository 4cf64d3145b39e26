"""The application: commands, exit codes, and how errors are shown.

Exit codes: 0 done; 1 a check failed (``verify``) or eexform itself is at fault; 2 something that the user can put right;
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback

import click
import typer

from eexform._version import __version__
from eexform.cli import checking, models, quick, searching
from eexform.cli.output import errors
from eexform.errors import EexformError

app = typer.Typer(
    name="eexform",
    help="Give a trained classifier early exits: search them, export an ONNX file that really skips work, verify it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_MODELS, _SEARCH, _CHECK = "Models", "Search", "Deploy"
app.command("quickstart", help=quick.quickstart.__doc__)(quick.quickstart)
app.command("inspect")(models.inspect)
app.command("search")(searching.search)
app.command("pareto")(searching.pareto)
app.command("export")(searching.export)
app.command("verify")(checking.verify)
app.command("bench")(checking.bench)
app.command("apply")(models.apply)
app.command("passes")(models.passes)
app.command("costs")(models.costs)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"eexform {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks.", envvar="EEXFORM_DEBUG"),
) -> None:
    if debug:
        os.environ["EEXFORM_DEBUG"] = "1"


def main() -> None:
    """Run the command line and exit."""
    sys.exit(_run())


def _run() -> int:
    try:
        result = app(standalone_mode=False)
        return int(result) if isinstance(result, int) else 0
    except EexformError as error:
        _traceback()
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        errors.print("interrupted", markup=False)
        return 130
    except BrokenPipeError:
        # whoever read our output has gone; point stdout elsewhere so that the interpreter's last flush does not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        _traceback()
        errors.print(
            f"eexform is at fault here: {type(error).__name__}: {error}\n"
            "please report it with the output of the same command after `eexform --debug`",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return 1


def _traceback() -> None:
    if os.environ.get("EEXFORM_DEBUG"):
        traceback.print_exc()
