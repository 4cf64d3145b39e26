"""Fine-tuning in half precision with loss scaling, which is for CUDA: the same code, made to run on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from eexform.errors import OptionError
from eexform.training import finetune as module
from eexform.training.finetune_state import FILE
from eexform.training.network import Arithmetic
from tests import tiny
from tests.training.multi_exit import flat, gated, tune
from tests.training.test_finetune_resume import STEPS, alike

GATED = ("cross_entropy", "stick_breaking", "confidence_bce", "expected_cost:limit=0.5", "support")


@contextmanager
def computed_in(half: torch.dtype | None) -> Iterator[None]:
    """Fine-tuning takes this precision, whatever it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        fixed = Arithmetic(torch.device("cpu"), half, channels_last=True)
        patch.setattr(module.Arithmetic, "choose", classmethod(lambda cls, graph, device, amp: fixed))
        yield


def scaling(folder: Path) -> dict[str, Any]:
    """The loss scaling in a checkpoint."""
    with safe_open(folder / FILE, framework="pt") as opened:
        return dict(json.loads(opened.metadata()["eexform.finetune"])["standing"]["scaler"])


def test_it_learns_and_clips_what_the_loss_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are cut after the scaling has been taken off: their norms are those of single precision."""
    norms: dict[torch.dtype | None, list[float]] = {}
    cut = torch.nn.utils.clip_grad_norm_
    for half in (torch.float16, None):
        seen = norms[half] = []

        def noted(parameters: Any, most: float, seen: list[float] = seen) -> torch.Tensor:
            found = cut(parameters, most)
            seen.append(float(found))
            return found

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
        with computed_in(half):
            report = tune(tmp_path / str(half), flat(), epochs=6)
        losses = [sum(entry["losses"].values()) for entry in report.history[1:]]
        assert losses[-1] < 0.9 * losses[0]
    # a first scale of 65,536 may be too much for a step or two, which are left out and the scale halved
    finite = [norm for norm in norms[torch.float16] if norm < float("inf")]
    assert len(finite) >= len(norms[torch.float16]) - 4
    assert 0.3 < sum(finite) / len(finite) / (sum(norms[None]) / len(norms[None])) < 3


def test_gates_and_every_term(tmp_path: Path) -> None:
    with computed_in(torch.float16):
        report = tune(tmp_path, gated("stick"), losses=GATED, ema=0.5)
    assert set(report.history[-1]["losses"]) == {text.partition(":")[0] for text in GATED}


def test_resume_equals_straight(tmp_path: Path) -> None:
    with computed_in(torch.float16):
        straight = tune(tmp_path / "straight", flat(), epochs=4)
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "stopped", flat(), epochs=4, progress=tiny.Watch("fine-tuning", 2 * STEPS + 3))
        assert scaling(tmp_path / "stopped")["scale"] > 0
        alike(tune(tmp_path / "stopped", flat(), epochs=4), straight)


@pytest.mark.parametrize("pair", [(None, torch.float16), (torch.float16, None), (torch.bfloat16, torch.float16)])
def test_it_goes_on_in_another_precision(pair: tuple[torch.dtype | None, ...], tmp_path: Path) -> None:
    """As where a training that was begun on a CPU goes on on a GPU, or the other way round."""
    first, then = pair
    with computed_in(first), pytest.raises(KeyboardInterrupt):
        tune(tmp_path, flat(), epochs=4, progress=tiny.Watch("fine-tuning", 2 * STEPS + 3))
    assert bool(scaling(tmp_path)) == (first is torch.float16)
    watch = tiny.Watch()
    with computed_in(then):
        report = tune(tmp_path, flat(), epochs=4, progress=watch)
    assert any("going on after epoch 2 of" in line for line in watch.said)
    assert report.epochs == 4


def test_a_device_that_computes_nothing() -> None:
    with pytest.raises(OptionError, match="device 'meta' cannot be used here"):
        Arithmetic.choose(flat(), "meta", "off")
