"""Data: sources, preprocessing, splits, augmentation, batches."""

from eexform.data.arrays import ArraySource
from eexform.data.augment import Augment
from eexform.data.calibration import Calibration
from eexform.data.dataset import Batch, Dataset, LabelMode
from eexform.data.duplicates import describe_duplicates, find_duplicates
from eexform.data.memorisation import Memorisation, memorisation
from eexform.data.preprocess import Preprocess
from eexform.data.source import DataSource, Samples, SourceOptions, open_source
from eexform.data.splits import SPLITS, Split, Splits, make_splits
from eexform.data.storing import load_dataset, open_dataset, save_dataset

__all__ = [
    "SPLITS",
    "ArraySource",
    "Augment",
    "Batch",
    "Calibration",
    "DataSource",
    "Dataset",
    "LabelMode",
    "Memorisation",
    "Preprocess",
    "Samples",
    "SourceOptions",
    "Split",
    "Splits",
    "describe_duplicates",
    "find_duplicates",
    "load_dataset",
    "make_splits",
    "memorisation",
    "open_dataset",
    "open_source",
    "save_dataset",
]
