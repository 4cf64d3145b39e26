"""The application: commands, exit codes, and how errors are shown.

Exit codes: 0 done; 1 a check failed (``verify``) or eexform itself is at fault; 2 something that the user can put
right; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

import eexform
from eexform.cli import calibrating, checking, costing, distilling, models, plans, quick, searching, training
from eexform.cli.help import WIDTH, PlainCommand, PlainGroup, examples
from eexform.cli.output import errors
from eexform.errors import EexformError

DEBUG = "EEXFORM_DEBUG"

app = typer.Typer(
    name="eexform",
    cls=PlainGroup,
    help="Give a trained classifier early exits: search them, export an ONNX file that really skips work, verify it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)


def _register(function: Any, *lines: str) -> None:
    app.command(function.__name__, cls=PlainCommand, epilog=examples(*lines))(function)


_register(quick.quickstart, "eexform quickstart", "eexform quickstart --out first-try --seed 1")
_register(models.inspect, "eexform inspect model.onnx", "eexform inspect model.onnx --rejected --json")
_register(
    costing.cost,
    "eexform cost model.onnx --model roofline --device rpi5",
    "eexform cost model.onnx --compare macs,roofline:device=xeon,latency_ort:threads=1",
    "eexform cost --run runs/r1 --pick knee --model roofline --device cortex-m7 --model peak_ram_bytes",
)
_register(models.groups, "eexform groups model.onnx", "eexform groups model.onnx --frozen --json")
_register(
    searching.search,
    "eexform search model.onnx --data digits --out runs/r1",
    "eexform search model.onnx --data digits --prune --trunks 3 --trunk-epochs 30 --out runs/r1-pruned",
    "eexform search resnet.onnx --data cifar.npz --layout nhwc --scale 1/255 --select-from test --augment flip,crop:4 "
    "--out runs/r2",
    "eexform search resnet.onnx --data images/ --preset imagenet --resize 256 --crop 224x224 "
    "--cost latency_ort:threads=1 --out runs/r3",
    "eexform search bert.onnx --data hf:sst2/ --inputs input_ids=ids,attention_mask=mask --labels none --out runs/r4",
    "eexform search model.onnx --data digits --out runs/r1 --resume",
)
_register(plans.pareto, "eexform pareto runs/r1", "eexform pareto runs/r1 --all", "eexform pareto runs/r1 --json")
_register(
    plans.export,
    "eexform export runs/r1 -o ee.onnx",
    "eexform export runs/r1 --pick 3 --form stages -o stages/",
    "eexform export runs/r1 --pick max-cost=0.6x -o ee.onnx",
    "eexform export runs/r1 --pick min-accuracy=-0.5 --form plan -o plan.toml",
)
_register(
    training.train,
    "eexform train runs/r1 --pick knee --strategy joint --epochs 20 --out runs/r1-joint",
    "eexform train runs/r2 --pick min-accuracy=-0.5 --strategy mixed --epochs 40 --optimiser adamw --lr 1e-3 "
    "--trunk-lr 3e-4 --ema 0.999 --loss cross_entropy --loss distill:weight=1,temperature=4 --out runs/r2-mixed",
    "eexform train runs/r1 --pick knee --strategy joint --epochs 20 --out runs/r1-joint --resume",
)
_register(
    distilling.distill,
    "eexform distill small.onnx --teacher model.onnx --data digits --epochs 20 --out taught.onnx",
    "eexform distill small.onnx --teacher resnet.onnx --data cifar.npz --layout nhwc --scale 1/255 --select-from test "
    "--augment flip,crop:4 --epochs 60 --lr 0.05 --out taught.onnx",
    "eexform distill small.onnx --teacher model.onnx --data images/ --preset imagenet --resize 256 --crop 224x224 "
    "--labels none --out taught.onnx --resume",
)
_register(
    checking.verify,
    "eexform verify ee.onnx --against model.onnx --run runs/r1",
    "eexform verify stages/ --against model.onnx --data test.npz --layout nhwc --scale 1/255 --samples 1000",
)
_register(
    checking.bench,
    "eexform bench ee.onnx --vs model.onnx --run runs/r1",
    "eexform bench ee.onnx stages/ --vs model.onnx --data digits --batch 1 --batch 32 --threads 2",
)
_register(
    models.apply,
    "eexform apply model.onnx plan.toml -o ee.onnx",
    "eexform apply model.onnx recipe.toml --form none -o folded.onnx",
)
_register(models.passes, "eexform passes", "eexform passes --json")
_register(
    calibrating.calibrate,
    "eexform calibrate model.onnx -o machine.json",
    "eexform calibrate model.onnx small.onnx --threads 2 --no-grid -o machine.json --resume",
)
_register(costing.costs, "eexform costs", "eexform costs --device", "eexform costs --device rpi5 --json")
_register(training.losses, "eexform losses", "eexform losses --json")
_register(models.criteria, "eexform criteria", "eexform criteria --json")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"eexform {eexform.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help=f"Show tracebacks; so does {DEBUG}=1 in the environment."),
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


def main() -> None:
    """Run the command line and exit."""
    sys.exit(_run())


def _run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and say what went wrong, if anything; returns the exit code.

    Args:
        arguments: without the program's name; default those of the process.
    """
    before = os.environ.get(DEBUG)
    try:
        return _invoke(list(sys.argv[1:] if arguments is None else arguments))
    except EexformError as error:
        _traceback()
        _say(f"error: {error}")
        return 2
    except _USAGE as error:
        _say(_usage(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _traceback()
        _say("interrupted")
        return 130
    except BrokenPipeError:
        _forget_output()
        return 1
    except OSError as error:  # what no module has put into words of its own, such as a full disk under standard output
        _traceback()
        _forget_output()
        _say(f"error: {error.filename or 'standard output'}: {error.strerror or error}")
        return 2
    except Exception as error:
        _traceback()
        _say(
            f"eexform is at fault here: {type(error).__name__}: {error}\n"
            "please report it with the output of the same command after `eexform --debug`"
        )
        return 1
    finally:
        if before is None:
            os.environ.pop(DEBUG, None)


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    code = 0
    try:
        with command.make_context("eexform", arguments) as context:
            command.invoke(context)
    except typer.Exit as stop:
        code = stop.exit_code
    sys.stdout.flush()  # here and not when the interpreter ends: whoever read our output may have gone
    return code


# Newer versions of typer carry click inside, older ones depend on it; in both, this is the root of usage errors.
_USAGE: type[Any] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error.format_message())
    where = f"; see `{context.command_path} --help`" if context is not None else ""
    return f"error: {str(error.format_message()).rstrip('.')}{where}"


def _say(text: str) -> None:
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


def _forget_output() -> None:
    """Point stdout elsewhere, so that the interpreter's last flush into the closed pipe does not fail too."""
    with contextlib.suppress(OSError, ValueError):  # not a real file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _traceback() -> None:
    if os.environ.get(DEBUG):
        traceback.print_exc()
