"""How the search for trunks is run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eexform.errors import OptionError, need


@dataclass(frozen=True)
class TrunkOptions:
    """Settings of the search over what stands in front of ``insert_exits``.

    Attributes:
        survivors: trunks that get exits, besides the original one.
        epochs: passes over head-train that all trunks are trained for together, in all rungs; 0: they are only
            repaired.
        rungs: of successive halving, at most.
        population: trunks kept from generation to generation; a multiple of 4.
        generations: how many after the first. At most ``population * (generations + 1)`` trunks are tried.
        samples: of head-train that criteria and repair may look at, and at most so many of calibrate that trunks are
            ranked by.
        exits: attach exits; without, the front is one of trunks alone.
        learning_rate: peak, while a trunk is trained; ``None``: the usual one of ``eexform distill``.
        batch_size: samples per step, while a trunk is trained; ``None``: the usual one.
    """

    survivors: int = 4
    epochs: int = 0
    rungs: int = 3
    population: int = 24
    generations: int = 4
    samples: int = 1024
    exits: bool = True
    learning_rate: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        def check(holds: bool, text: str) -> None:
            need(holds, text, OptionError)

        check(self.survivors >= 1, f"trunks: {self.survivors} must be at least 1")
        check(self.epochs >= 0, f"trunk_epochs: {self.epochs} must not be negative")
        check(
            not 0 < self.epochs < self.survivors,
            f"trunk_epochs: {self.epochs} is not an epoch for each of {self.survivors} trunks; give at least "
            f"{self.survivors}, fewer trunks, or 0",
        )
        check(self.rungs >= 1, f"rungs: {self.rungs} must be at least 1")
        check(
            self.population >= 4 and self.population % 4 == 0,
            f"trunk_population: {self.population} must be a multiple of 4",
        )
        check(self.generations >= 0, f"trunk_generations: {self.generations} must not be negative")
        check(self.samples >= 2, f"proxy_samples: {self.samples} must be at least 2")
        check(self.learning_rate is None or self.learning_rate > 0, "trunk_learning_rate must be positive")
        check(self.batch_size is None or self.batch_size >= 2, "trunk_batch_size must be at least 2")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
