"""Head training with the trunk frozen, temperatures, and the bank that keeps the results."""

from eexform.training.bank import Bank, HeadRecord
from eexform.training.calibrate import expected_calibration_error, fit_temperature, negative_log_likelihood
from eexform.training.memory import step_memory
from eexform.training.options import TrainOptions
from eexform.training.trainer import TrainReport, train_bank

__all__ = [
    "Bank",
    "HeadRecord",
    "TrainOptions",
    "TrainReport",
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihood",
    "step_memory",
    "train_bank",
]
