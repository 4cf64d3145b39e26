"""Writing a graph with exits in the form that its runtime needs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from eexform.backends import protos
from eexform.backends.lower_if import lower_if
from eexform.backends.lower_multi import lower_multi
from eexform.backends.lower_stages import save_stages
from eexform.errors import OptionError, suggest
from eexform.ir.graph import Graph

Form = Literal["if", "stages", "multi", "torch"]
FORMS: tuple[Form, ...] = ("if", "stages", "multi")
"""Those that are ONNX; beside them there is ``torch``."""


def export(graph: Graph, path: str | Path, form: str = "if", *, thresholds_as_input: bool = False) -> Path:
    """Lower ``graph`` and write it, whole or not at all.

    Args:
        graph: a graph with exits.
        path: the file; for ``stages`` the folder.
        form: ``if`` (one file that skips work), ``stages`` (one file per block), ``multi`` (all scores, no decisions),
            ``torch`` (a ``.pt2`` program of ``torch.export`` that skips work).
        thresholds_as_input: with ``if``: expose the thresholds as an input instead of baking them in.

    Returns:
        Where it was written: ``path``.

    Raises:
        OptionError: no such form, or thresholds asked for where there are none.
        GraphError: the graph cannot be lowered to this form; the message says why.
        StorageError: it cannot be written.
    """
    every = (*FORMS, "torch")
    if form not in every:
        raise OptionError(f"form {form!r} does not exist: {suggest(form, every)}")
    if thresholds_as_input and form != "if":
        raise OptionError(f"thresholds as an input exist in the form 'if' only, not in {form!r}")
    if form == "stages":
        save_stages(graph, path)
    elif form == "torch":
        from eexform.backends.torch_export import save_torch  # torch is slow to import, and no other form needs it

        save_torch(graph, path)
    elif form == "multi":
        protos.save(lower_multi(graph), path)
    else:
        protos.save(lower_if(graph, thresholds_as_input=thresholds_as_input), path)
    return Path(path)
