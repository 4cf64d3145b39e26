"""The rule of an operator, and how it is found: what every file of coupling rules is written against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import onnx_graphsurgeon as gs

from eexform.errors import GraphError, need
from eexform.ir.coupling_cut import Cut

if TYPE_CHECKING:
    from eexform.ir.coupling import Coupler
    from eexform.ir.emit import Emitter

Role = Literal["filter", "reader", "bias", "scale", "mean", "variance", "table", "other"]
"""What a constant's axis is to the operator that reads it: ``filter`` makes output channels, ``reader`` meets input
channels, ``table`` is the width of an embedding, ``bias``, ``scale``, ``mean`` and ``variance`` follow a channel."""

STRONG: frozenset[str] = frozenset({"filter", "reader", "table"})
"""Roles that make a group: units that touch none of them are nobody's channels and are not listed."""

Kind = Literal["channels", "heads", "width", "embedding"]
"""What a group's units are: channels of a convolution, attention heads, features of a matrix product, features of an
embedding."""

_STANDARD = ("", "ai.onnx", None)


class Rule:
    """How one kind of operator couples slots, and what it needs after they were cut.

    Attributes:
        follows_sizes: the rule looks after operands that are computed from sizes (see
            :func:`eexform.ir.coupling_sizes.guard`); for the others every axis whose size is read is frozen.
    """

    follows_sizes: ClassVar[bool] = False

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        """Tell ``coupler`` which positions of the node's operands and results go together; nodes come in order."""
        raise NotImplementedError

    def attributes(self, node: gs.Node, cut: Cut) -> Mapping[str, Any]:
        """Attributes that have other values after the cut, such as ``group``; they are set before :meth:`rewrite`.

        ``node`` may be the node of the uncut graph (for predicted figures) or that of the draft: look at attributes and
        names only.
        """
        return {}

    def rewrite(self, node: gs.Node, cut: Cut, emitter: Emitter) -> None:
        """Mend the draft's ``node`` after constants were sliced: shape operands, through :meth:`Cut.replace`.

        Called for every node with an operand or a result that lost positions, producers before consumers.
        """


_RULES: dict[tuple[str, str], Rule] = {}
_R = TypeVar("_R", bound=type[Rule])


def rule(*ops: str, domain: str = "") -> Callable[[_R], _R]:
    """Register a :class:`Rule` for operators of one domain (ONNX's own by default).

    Raises:
        GraphError: an operator has a rule already.
    """

    def register(made: _R) -> _R:
        instance = made()
        for op in ops:
            taken = _RULES.get((domain, op))
            need(taken is None, f"operator {op!r} has two coupling rules: {taken!r} and {made!r}", GraphError)
            _RULES[domain, op] = instance
        return made

    return register


def find_rule(node: gs.Node) -> Rule | None:
    """The rule of a node's operator; ``None`` where there is none."""
    import eexform.ir.coupling_rules  # noqa: F401  (registers the rules)

    return _RULES.get(("" if node.domain in _STANDARD else node.domain, node.op))
