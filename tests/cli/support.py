"""A small trained network, and ways to call the command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from eexform.cli import app
from tests import text

FRACTIONS = "0.3,0.1,0.3,0.3"
SEARCH = (
    *("--data", "digits", "--fractions", FRACTIONS, "--epochs", "6", "--batch-size", "32", "--learning-rate", "0.03"),
    *("--head", "none/avg+max", "--head", "conv:1x24/avg+max", "--max-sites", "2", "--threads", "1"),
    *("--population", "16", "--generations", "6"),
)

BODY = """
    stem = Conv<pads=[1,1,1,1]>(image, stem_w)
    stem_relu_out = Relu(stem)
    a = Conv<pads=[1,1,1,1]>(stem_relu_out, a_w)
    stage0_block0_relu_out = Relu(a)
    b = Conv<pads=[1,1,1,1], strides=[2,2]>(stage0_block0_relu_out, b_w)
    stage1_block0_relu_out = Relu(b)
    c = Conv<pads=[1,1,1,1]>(stage1_block0_relu_out, c_w)
    stage1_block1_relu_out = Relu(c)
    flat = Flatten(stage1_block1_relu_out)
"""
SITES = ("stem_relu_out", "stage0_block0_relu_out", "stage1_block0_relu_out", "stage1_block1_relu_out")


def network(
    ending: str = "logits = Gemm<transB=1>(flat, w, bias)", outputs: str = "float[N,10] logits", **more: Any
) -> onnx.ModelProto:
    """A network for 8x8 digits: random convolutions, the classifier fitted to their features in closed form."""
    more.setdefault("inputs", "float[N,1,8,8] image")
    weights = {
        "stem_w": text.normal(4, 1, 3, 3, seed=1) / 20,
        "a_w": text.normal(6, 4, 3, 3, seed=2) / 5,
        "b_w": text.normal(12, 6, 3, 3, seed=3) / 6,
        "c_w": text.normal(12, 12, 3, 3, seed=4) / 8,
    }
    weights["w"], weights["bias"] = _classifier(weights)
    used = {name: array for name, array in weights.items() if f" {name}" in BODY + ending}
    return text.model(BODY + ending, used, outputs=outputs, **more)


def _classifier(weights: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import RidgeClassifier

    pixels, labels = load_digits(return_X_y=True)
    trunk = text.model(BODY, weights, inputs="float[N,1,8,8] image", outputs="float[N,192] flat")
    session = onnxruntime.InferenceSession(trunk.SerializeToString(), providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"image": pixels.reshape(-1, 1, 8, 8).astype(np.float32)})
    fitted = RidgeClassifier(alpha=1.0).fit(features[:700], labels[:700])
    return (8 * fitted.coef_).astype(np.float32), (8 * fitted.intercept_).astype(np.float32)


def save_network(path: Path, *arguments: Any, **named: Any) -> Path:
    """:func:`network` as a file."""
    onnx.save(network(*arguments, **named), path)
    return path


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be JSON and nothing else."""
        return json.loads(self.out)


def cli(*arguments: object) -> Done:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app._run([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def fine(*arguments: object) -> Done:
    """Run a command that must succeed."""
    done = cli(*arguments)
    assert done.code == 0, done.err
    return done


def refused(*arguments: object, says: Sequence[str]) -> str:
    """Run a command that must be refused: code 2, one message with all of ``says``, nothing on standard output."""
    done = cli(*arguments)
    return check_refused(done, says)


def check_refused(done: Done, says: Sequence[str]) -> str:
    assert done.code == 2, (done.code, done.err)
    assert done.out == ""
    said = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.err
    assert "Traceback" not in done.err
    for part in says:
        assert part in said[0], f"{part!r} is not in: {said[0]}"
    return said[0]


def command(*arguments: object) -> list[str]:
    """A command of its own process."""
    return [sys.executable, "-m", "eexform.cli", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """Of a child process: one thread, so that tests do not crowd each other out."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **more}


def shell(*arguments: object, **more: str) -> Done:
    """Run a command in a process of its own, ``more`` in its environment."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(**more), check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def listing(folder: Path) -> list[str]:
    """Every file below a folder, to see that nothing was left behind."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
