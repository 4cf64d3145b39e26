"""Head training with the trunk frozen, fine-tuning of both, temperatures, and the bank that keeps the results."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eexform.training.bank import Bank, HeadRecord
    from eexform.training.calibrate import expected_calibration_error, fit_temperature, negative_log_likelihood
    from eexform.training.distill import DistillReport, distill_options, distill_trunk
    from eexform.training.finetune import FinetuneReport
    from eexform.training.finetune_options import FinetuneOptions
    from eexform.training.memory import step_memory
    from eexform.training.options import TrainOptions
    from eexform.training.trainer import TrainReport, train_bank

# Loaded when first used: looking at a run needs the bank, and no torch.
_HOME = {
    "Bank": "bank",
    "DistillReport": "distill",
    "FinetuneOptions": "finetune_options",
    "FinetuneReport": "finetune",
    "HeadRecord": "bank",
    "TrainOptions": "options",
    "TrainReport": "trainer",
    "distill_options": "distill",
    "distill_trunk": "distill",
    "expected_calibration_error": "calibrate",
    "fit_temperature": "calibrate",
    "negative_log_likelihood": "calibrate",
    "step_memory": "memory",
    "train_bank": "trainer",
}

__all__ = [
    "Bank",
    "DistillReport",
    "FinetuneOptions",
    "FinetuneReport",
    "HeadRecord",
    "TrainOptions",
    "TrainReport",
    "distill_options",
    "distill_trunk",
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihood",
    "step_memory",
    "train_bank",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
