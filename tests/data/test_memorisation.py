import pytest

from eexform.data import memorisation
from eexform.data.memorisation import z_score
from eexform.errors import OptionError


def test_z_against_a_worked_example() -> None:
    # pooled p = 0.75; standard error = sqrt(0.75 * 0.25 * (1/100 + 1/100)) = 0.061237
    assert z_score(0.8, 100, 0.7, 100) == pytest.approx(1.63299, abs=1e-4)
    assert z_score(1.0, 100, 1.0, 50) == 0.0
    with pytest.raises(OptionError, match=r"expected accuracies in 0..1"):
        z_score(91.7, 100, 99.7, 100)


def test_a_trunk_trained_on_head_train_only() -> None:
    found = memorisation(0.997, 0.917, n_train=50000, n_select=4000, trunk_correct_test=0.916, n_test=5000)
    assert found.verdict == "unseen"
    assert not found.suspicious
    assert "99.70 % right on head-train, 91.70 % on select" in found.message


def test_select_was_in_the_training_data() -> None:
    found = memorisation(0.997, 0.996, n_train=40000, n_select=4000, trunk_correct_test=0.917, n_test=10000)
    assert found.verdict == "memorised"
    assert found.suspicious
    assert "select looks memorised" in found.message
    assert "--select-from" in found.message


def test_parts_exchanged() -> None:
    found = memorisation(0.917, 0.997, n_train=10000, n_select=4000)
    assert found.verdict == "memorised"
    assert "exchanged" in found.message


def test_no_gap_says_so() -> None:
    found = memorisation(0.95, 0.95, n_train=1000, n_select=300)
    assert found.verdict == "undecided"
    assert found.z_test is None
    assert "make sure" in found.message
    one_part = memorisation(0.999, 0.998, n_train=1000, n_select=300, same_part=True)
    assert "drawn from one part" in one_part.message


def test_few_samples_prove_nothing() -> None:
    assert memorisation(0.95, 0.90, n_train=40, n_select=20).verdict == "undecided"


def test_worse_than_head_train_is_unseen_whatever_test_says() -> None:
    found = memorisation(0.99, 0.93, n_train=5000, n_select=5000, trunk_correct_test=0.90, n_test=5000)
    assert found.verdict == "unseen"
    assert found.z_test is not None
    assert found.z_test > 2.33
