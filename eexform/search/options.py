"""What a search may choose from and how long it looks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eexform.errors import OptionError, need
from eexform.search.handling import Handling


@dataclass(frozen=True)
class SearchOptions:
    """Settings of a search.

    Attributes:
        sites: values of the trunk that are candidates; empty: chosen evenly over the trunk's cost.
        max_sites: how many, where they are chosen.
        heads: texts of the candidate heads at every site; empty: the default portfolio of each site.
        max_head_share: what a head of the portfolio may cost, as a share of the trunk's MACs.
        gates: give every head of the portfolio a gate: a learned confidence. Named heads say so themselves (``/gate``).
        max_live: how many tensors an exit may have to carry on.
        levels: threshold levels per head.
        trust: weight of the trunk's calibrated opinion beside the label when an answer is judged during the search,
            0-1. A finite selection split rewards plans that happen to be right on it; the expected correctness
            ``(1 - trust) * [answer = label] + trust * p_trunk(answer)`` varies less. Reported accuracies are never
            blended.
        exit_fee: what passing an exit counts during the search beside what the cost model says, as a share of the
            trunk's cost: a decision and a branch take time that MACs do not see, and every further exit follows the
            selection split more closely. Limits on the cost count it too; reported costs are without it, and what
            has a target is, too.
        population: individuals per generation.
        generations: how many.
        seed: of the search.
        threads: for head training and scoring; 0 is one per core.
        constraints: how plans that break a limit are compared with others while searching: ``feasible-first``,
            ``adaptive`` or ``penalty`` (see :mod:`eexform.search.handling`). The front keeps all limits in any case.
        penalty: weight of a violation with ``penalty``.
    """

    sites: tuple[str, ...] = ()
    max_sites: int = 8
    heads: tuple[str, ...] = ()
    max_head_share: float = 0.08
    max_live: int = 3
    levels: int = 128
    trust: float = 0.3
    exit_fee: float = 0.01
    population: int = 128
    generations: int = 60
    seed: int = 0
    threads: int = 0
    gates: bool = False
    constraints: str = Handling.kind
    penalty: float = Handling.weight

    def __post_init__(self) -> None:
        def check(holds: bool, text: str) -> None:
            need(holds, text, OptionError)

        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "heads", tuple(self.heads))
        check(self.max_sites >= 1, f"max_sites: {self.max_sites} must be at least 1")
        check(0 < self.max_head_share <= 1, f"max_head_share: {self.max_head_share} must be in (0, 1]")
        check(self.max_live >= 1, f"max_live: {self.max_live} must be at least 1")
        check(2 <= self.levels <= 4096, f"levels: {self.levels} must be between 2 and 4096")
        check(0 <= self.trust <= 1, f"trust: {self.trust} must be between 0 and 1")
        check(0 <= self.exit_fee < 1, f"exit_fee: {self.exit_fee} must be in [0, 1)")
        check(self.population >= 8, f"population: {self.population} must be at least 8")
        check(self.population % 4 == 0, f"population: {self.population} must be a multiple of 4 (tournament of pairs)")
        check(self.generations >= 0, f"generations: {self.generations} must not be negative")
        check(self.seed >= 0, f"seed: {self.seed} must not be negative")
        check(self.threads >= 0, f"threads: {self.threads} must not be negative")
        _ = self.handling  # refuses what does not exist

    @property
    def handling(self) -> Handling:
        """How constraints are handled."""
        return Handling(self.constraints, self.penalty)

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        plain["sites"], plain["heads"] = list(self.sites), list(self.heads)
        if not self.gates:  # as before there were gates, so that older runs can be resumed
            del plain["gates"]
        if self.handling == Handling():  # likewise, before there was a choice
            del plain["constraints"], plain["penalty"]
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> SearchOptions:
        return cls(**plain)
