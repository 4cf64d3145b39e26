"""Coupling rules of recurrent layers: what they read and the width of their hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.coupling import Coupler, Cut, Rule, Slot, rule

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@rule(*_GATES)
class Recurrent(Rule):
    """X [T, N, I], W [D, gates*H, I], R [D, gates*H, H], B [D, 2*gates*H], states [D, N, H], Y [T, D, N, H].

    A hidden unit is one position of H in the states, one row per gate in W, R and B and one column of R, in both
    directions (they have one width). With ``layout`` 1 the batch comes first. Formulas: ONNX operators RNN, GRU, LSTM.
    """

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        gates = _GATES[node.op]
        names = [tensor.name for tensor in node.inputs] + [""] * (8 - len(node.inputs))
        data, weight, recurrent, bias, _, state, cell, peephole = names
        width = coupler.size(recurrent, 2)
        if width is None:
            return coupler.freeze_all(node, "its width is not known")
        hidden = Slot(recurrent, 2)
        coupler.same(Slot(data, 2), Slot(weight, 2))
        coupler.role(Slot(weight, 2), "reader")
        coupler.role(hidden, "reader")
        coupler.kind(hidden, "width")
        for value, blocks, role in ((weight, gates, "filter"), (recurrent, gates, "filter"), (bias, 2 * gates, "bias")):
            if value:
                positions = np.arange(blocks * width)
                coupler.tie(Slot(value, 1), positions, hidden, positions % width)
                coupler.role(Slot(value, 1), role)  # type: ignore[arg-type]
        if peephole:
            positions = np.arange(3 * width)
            coupler.tie(Slot(peephole, 1), positions, hidden, positions % width)
        for value in (state, cell, *(tensor.name for tensor in node.outputs)):
            if value:
                coupler.same(Slot(value, coupler.rank(value) - 1), hidden)
        for slot in coupler.slots(data)[:2]:
            coupler.freeze(slot, "positions in time, not channels")
        for value in (weight, recurrent, bias):
            coupler.freeze(Slot(value, 0), "directions")

    def attributes(self, node: gs.Node, cut: Cut) -> Mapping[str, Any]:
        hidden = Slot(node.inputs[2].name, 2)
        return {"hidden_size": len(cut.kept(hidden))} if cut.is_cut(hidden) else {}
