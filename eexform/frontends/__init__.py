"""Ways in: a trained classifier from elsewhere becomes a :class:`eexform.ir.graph.Graph`."""

from eexform.frontends.door import load
from eexform.frontends.onnx import from_model, save, to_model

__all__ = ["from_model", "load", "save", "to_model"]
