"""The command line. Every command is one call of the Python interface."""

from eexform.cli.app import main

__all__ = ["main"]
