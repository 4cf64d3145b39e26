"""Has the trunk seen the data on which thresholds are to be chosen?

A trunk is (nearly) always better on what it was trained on. So, if head-train is its training data and select is
not, its accuracy on select is lower, and a one-sided two-proportion z-test says whether the gap is more than
chance:

    z = (a - b) / sqrt(p (1 - p) (1/n_a + 1/n_b)),  p = pooled accuracy

(Any statistics text; see e.g. Wald's test for the equality of two binomial proportions.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from eexform.errors import OptionError

Verdict = Literal["unseen", "undecided", "memorised"]


@dataclass(frozen=True)
class Memorisation:
    """What the trunk's accuracies say.

    Attributes:
        verdict: ``unseen``: select looks unseen while head-train was seen, as it should be; ``memorised``: select looks
            like training data; ``undecided``: no gap that the test could see, so it cannot tell.
        message: for the user.
        z_train: z of head-train against select.
        z_test: z of select against test, where test is known.
    """

    verdict: Verdict
    message: str
    z_train: float
    z_test: float | None

    @property
    def suspicious(self) -> bool:
        return self.verdict == "memorised"


def z_score(right: float, n_right: int, left: float, n_left: int) -> float:
    """z of the two-proportion test; positive where ``right`` is higher, 0 where both are all or nothing."""
    if n_right < 1 or n_left < 1 or not (0 <= right <= 1 and 0 <= left <= 1):
        raise OptionError(f"z-test: expected accuracies in 0..1 of one sample or more, found {right}, {left}")
    pooled = (right * n_right + left * n_left) / (n_right + n_left)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / n_right + 1 / n_left))
    return (right - left) / spread if spread > 0 else 0.0


def memorisation(
    trunk_correct_train: float,
    trunk_correct_select: float,
    *,
    n_train: int,
    n_select: int,
    trunk_correct_test: float | None = None,
    n_test: int | None = None,
    same_part: bool = False,
    z: float = 2.33,
) -> Memorisation:
    """Judge select by the trunk's share of correct answers on head-train, select and, where known, test.

    Select against test shows something only where the two come from different parts (``--test-from``): drawn from one
    part, they are memorised together or not at all.

    Args:
        trunk_correct_train: share of head-train that the trunk gets right, in 0..1.
        trunk_correct_select: the same on select.
        n_train: samples behind the first share.
        n_select: samples behind the second.
        trunk_correct_test: the same on test.
        n_test: samples behind it.
        same_part: head-train and select were drawn from one part, so that whoever saw one has likely seen the other.
        z: how many standard errors count as a gap; 2.33 is one chance in a hundred, one-sided.
    """
    z_train = z_score(trunk_correct_train, n_train, trunk_correct_select, n_select)
    z_test = None
    if trunk_correct_test is not None and n_test is not None:
        z_test = z_score(trunk_correct_select, n_select, trunk_correct_test, n_test)
    shares = f"{100 * trunk_correct_train:.2f} % right on head-train, {100 * trunk_correct_select:.2f} % on select"
    if trunk_correct_test is not None:
        shares += f", {100 * trunk_correct_test:.2f} % on test"
    if z_train <= -z:
        return Memorisation(
            "memorised",
            f"select looks memorised: the trunk is better there than on head-train ({shares}; {-z_train:.1f} standard "
            "errors). Thresholds chosen on it will not hold: are --select-from and --train-from exchanged?",
            z_train,
            z_test,
        )
    if z_train < z and z_test is not None and z_test > z:
        return Memorisation(
            "memorised",
            "select looks memorised: the trunk is as good there as on head-train and better than on test "
            f"({shares}; {z_test:.1f} standard errors). Thresholds chosen on it will not hold: take select and "
            "calibrate from data that the trunk was not trained on (--select-from)",
            z_train,
            z_test,
        )
    if z_train >= z:
        return Memorisation(
            "unseen",
            "the trunk was trained on head-train and select looks unseen, as it should "
            f"({shares}; {z_train:.1f} standard errors)",
            z_train,
            z_test,
        )
    why = (
        "both were drawn from one part: if the trunk was trained on that part, thresholds chosen here will not hold"
        if same_part
        else "make sure that the trunk was not trained on the part given with --select-from"
    )
    return Memorisation(
        "undecided", f"no gap between head-train and select ({shares}): seen both or neither; {why}", z_train, z_test
    )
