"""Turn exits into control flow, as the last pass of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from eexform.errors import OptionError, need, suggest
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, PassResult
from eexform.tunables import parameter

FORMS = ("if", "multi")


@dataclass(frozen=True)
class Lower(Pass):
    """Turn exits into control flow: nested ``If`` nodes, or all scores as outputs.

    The result is for a runtime: it has no exits any more, and no pass takes it further. (The third form, one file per
    segment, is a folder and no graph: ``eexform export --form stages`` writes it.)
    """

    name: ClassVar[str] = "lower"

    form: str = parameter(default="if", help="if | multi")
    thresholds_as_input: bool = parameter(default=False, help="make the thresholds an input of the model")

    def __post_init__(self) -> None:
        need(self.form in FORMS, f"form: {self.form!r} does not exist: {suggest(self.form, FORMS)}", OptionError)
        whole = self.form == "if" or not self.thresholds_as_input
        need(whole, "thresholds_as_input: form 'multi' decides nothing, so it takes no thresholds", OptionError)

    def requires(self, graph: Graph) -> None:
        need(not graph.metadata.get("eexform.form"), "the graph is lowered already")
        need(graph.exits, "the graph has no exits to lower; put insert_exits in front of it")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        from eexform.backends.lower_if import lower_if
        from eexform.backends.lower_multi import lower_multi

        if self.form == "if":
            model = lower_if(graph, thresholds_as_input=self.thresholds_as_input)
        else:
            model = lower_multi(graph)
        metadata = {item.key: item.value for item in model.metadata_props}
        lowered = Graph(gs.import_onnx(model), scores=graph.scores, metadata=metadata)
        return PassResult(lowered, changed=True, notes=(f"{len(graph.exits)} exits lowered to form {self.form!r}",))

    def ensures(self, graph: Graph) -> None:
        need(graph.metadata.get("eexform.form") == self.form, f"the result is not marked as form {self.form!r}")
