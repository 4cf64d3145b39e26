"""The samples run: each script as a person starts it, with small settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[1] / "samples"


def _run(script: str, *arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(SAMPLES / script), *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def retrofitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the first sample wrote and printed; the model and data that it made serve the others."""
    folder = tmp_path_factory.mktemp("samples") / "retrofit"
    return folder, _run("retrofit_onnx.py", "--out", folder, "--epochs", "3", "--generations", "4", "--pick", "knee")


def test_retrofit_onnx(retrofitted: tuple[Path, str]) -> None:
    folder, printed = retrofitted
    assert (folder / "model.ee.onnx").is_file()
    assert "the model alone: 9" in printed  # per cent
    assert "checks passed on 256 samples" in printed
    assert "mean time at batch 32" in printed


def test_retrofit_onnx_says_what_is_missing(retrofitted: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = retrofitted
    printed = _run("retrofit_onnx.py", folder / "model.onnx", folder / "digits.npz", "--out", tmp_path / "x", code=1)
    assert "say with --select-from which one the model was NOT trained on" in printed


def test_retrofit_torch(tmp_path: Path) -> None:
    printed = _run("retrofit_torch.py", "--out", tmp_path, "--epochs", "3", "--generations", "4")
    assert "exits can be attached at blocks.0.2, blocks.1.2, blocks.2.2" in printed
    assert "the module alone: 9" in printed  # per cent
    assert "checks passed on 256 samples" in printed
    assert (tmp_path / "ee.onnx").is_file()


def test_python_api(retrofitted: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = retrofitted
    small = ("--out", tmp_path, "--epochs", "3", "--generations", "4")
    printed = _run("python_api.py", folder / "model.onnx", folder / "digits.npz", *small)
    assert "state done" in printed
    assert printed.count(": verified") == 2
    assert (tmp_path / "stages" / "manifest.json").is_file()


def test_prune_onnx(retrofitted: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = retrofitted
    given = (folder / "model.onnx", folder / "digits.npz", "--select-from", "test")
    printed = _run("prune_onnx.py", *given, "--out", tmp_path, "--epochs", "2")
    assert "layer0: 512 width, prunable" in printed
    assert "the plan alone gives the same network: True" in printed
    figures = dict(re.findall(r"^(.+): ([\d,]+) MACs, 9\d", printed, re.MULTILINE))  # per cent right
    macs = {name: int(count.replace(",", "")) for name, count in figures.items()}
    assert macs["pruned"] == macs["taught"] <= 0.5 * macs["the model"]
    assert {"plan.json", "plan.safetensors", "small.onnx", "taught.onnx"} <= {p.name for p in tmp_path.iterdir()}


def test_own_pass(retrofitted: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = retrofitted
    printed = _run("own_pass.py", folder / "model.onnx", "--bits", "3", "--out", tmp_path)
    assert "round_weights: layer0.weight: 7 values left" in printed
    assert sorted(path.name for path in (tmp_path / "graphs").iterdir()) == ["00-input.onnx", "02-round_weights.onnx"]
    assert (tmp_path / "rounded.onnx").is_file()


def test_samples_are_short_and_listed() -> None:
    listed = (SAMPLES / "README.md").read_text(encoding="utf-8")
    for script in SAMPLES.glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) < 80, script.name
        assert f"({script.name})" in listed
    assert "third_party_pass" in listed
    assert "external_cost_model" in listed
