"""eexform: a compiler for early exits."""

__version__ = "0.1.0"
