"""The audit's statistics: the paper's own figures, an oracle, the coverage on mechanisms whose ε is known, and the membership attack."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from lichen.common.privacy.audit import audit_canaries, epsilon_at_least, membership, p_value

DELTA = 1e-5
TRUE_EPSILON = 4.38
"""Of the Gaussian mechanism with σ = 1 at δ = 1e-5 (Balle and Wang 2018)."""


def test_the_papers_figures() -> None:
    # arXiv 2305.08846, Appendix D and Section 7
    assert p_value(100, 100, 75, math.log(3), 0.0) == pytest.approx(0.553, abs=5e-4)
    assert epsilon_at_least(1000, 100, 75, 1e-4, 0.95) == pytest.approx(0.673, abs=5e-4)
    assert epsilon_at_least(100_000, 1510, 1439, DELTA, 0.95) == pytest.approx(2.6755, abs=5e-4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_p_value_is_the_theorems(data: st.DataObject) -> None:
    canaries = data.draw(st.integers(1, 120))
    guesses = data.draw(st.integers(1, canaries))
    correct = data.draw(st.integers(0, guesses))
    epsilon, delta = data.draw(st.floats(0, 6)), data.draw(st.sampled_from([0.0, 1e-6, 1e-3]))
    binomial = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    alpha = max((sum(binomial.pmf(correct - j) for j in range(1, i + 1)) / i for i in range(1, correct + 1)), default=0.0)
    expected = min(1.0, binomial.sf(correct - 1) + 2 * canaries * delta * alpha)
    assert p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.integers(8, 200), st.floats(0.6, 0.99))
def test_the_bound_is_where_the_p_value_passes(guesses: int, confidence: float) -> None:
    bounds = [epsilon_at_least(400, guesses, correct, DELTA, confidence) for correct in range(guesses // 2, guesses + 1, 4)]
    assert bounds == sorted(bounds), "more right guesses prove more"
    for correct, bound in zip(range(guesses // 2, guesses + 1, 4), bounds, strict=True):
        if bound:
            assert p_value(400, guesses, correct, bound, DELTA) < 1 - confidence
        assert p_value(400, guesses, correct, bound + 1e-4, DELTA) >= 1 - confidence or not bound


def test_impossible_counts_are_refused() -> None:
    for counts in ((10, 11, 5), (10, 5, 6), (10, 5, -1)):
        with pytest.raises(ValueError, match="canaries"):
            p_value(*counts, 1.0, 0.0)
    assert p_value(10, 0, 0, 1.0, DELTA) == 1.0


def gaussian(canaries: int, generator: np.random.Generator) -> tuple[list[float], list[bool]]:
    """The best case for an auditor: each canary has a coordinate of its own, released with noise of σ = 1."""
    included = generator.random(canaries) < 0.5
    return (included + generator.normal(size=canaries)).tolist(), included.tolist()


def best(canaries: int, generator: np.random.Generator, confidence: float = 0.95) -> float:
    return max(found.epsilon for found in audit_canaries(*gaussian(canaries, generator), DELTA, confidence))


@pytest.mark.parametrize(("canaries", "expected"), [(100, 0.52), (1000, 1.57), (5000, 1.99)])
def test_an_ideal_mechanism_reads_no_less_than_the_design_says(canaries: int, expected: float) -> None:
    generator = np.random.default_rng(0)
    read = [best(canaries, generator) for _ in range(60)]
    assert expected - 0.12 < np.mean(read) < expected + 0.25
    assert max(read) < TRUE_EPSILON


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Randomised response of every canary is where the theorem is tight: with all numbers of guesses its bound may fail in 5 % of runs."""
    generator, epsilon, times = np.random.default_rng(1), 1.0, 400
    above = 0
    for _ in range(times):
        included = generator.random(256) < 0.5
        kept = generator.random(256) < 1 / (1 + math.exp(-epsilon))
        scores = np.where(kept, included, ~included) + 1e-3 * generator.random(256)  # ties broken by nothing
        above += max(found.epsilon for found in audit_canaries(scores.tolist(), included.tolist(), 0.0, 0.95)) > epsilon
    assert stats.binomtest(above, times, 0.05, alternative="greater").pvalue > 1e-3
    assert above > 0, "a bound that is never wrong would be too weak"


def test_scores_that_say_nothing_prove_nothing() -> None:
    generator = np.random.default_rng(2)
    read = [
        max(found.epsilon for found in audit_canaries([0.0] * 400, (generator.random(400) < 0.5).tolist(), DELTA, 0.95)) for _ in range(40)
    ]
    assert sum(bound > 0 for bound in read) <= 6


@pytest.mark.parametrize("count", [2, 3, 7, 8, 100])
def test_guesses_are_right_where_scores_are_perfect(count: int) -> None:
    included = [index % 2 == 0 for index in range(count)]
    for found in audit_canaries([1.0 if inside else 0.0 for inside in included], included, DELTA, 0.95):
        assert found.correct == found.guesses
        assert found.guesses % 2 == 0
        assert 0 < found.guesses <= count


# --- membership -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_the_auc_is_scikit_learns(members: list[int], others: list[int]) -> None:
    found = membership([float(loss) for loss in members], [float(loss) for loss in others], 0.95)
    expected = roc_auc_score([1] * len(members) + [0] * len(others), [-loss for loss in [*members, *others]])
    assert found.auc == pytest.approx(expected)


def test_training_rows_with_smaller_losses_are_found() -> None:
    generator = np.random.default_rng(3)
    apart = membership(generator.normal(-5, 1, 500).tolist(), generator.normal(5, 1, 500).tolist(), 0.95)
    assert (apart.auc, apart.tpr) == (1.0, 1.0)
    alike = membership(generator.normal(0, 1, 500).tolist(), generator.normal(0, 1, 500).tolist(), 0.999)
    assert alike.auc_interval[0] < 0.5 < alike.auc_interval[1]
    assert alike.tpr_interval[0] <= 0.01 <= alike.tpr_interval[1]
    turned = membership(generator.normal(5, 1, 500).tolist(), generator.normal(-5, 1, 500).tolist(), 0.95)
    assert (turned.auc, turned.tpr) == (0.0, 0.0)
    shares = [rate for rate, _ in apart.curve]
    assert shares == sorted(shares)
    assert (apart.curve[0], apart.curve[-1]) == ((0.0, 0.0), (1.0, 1.0))


def test_a_false_positive_rate_of_one_percent_is_not_passed() -> None:
    members, others = [0.5] * 100, [float(index) for index in range(100)]
    assert membership(members, others, 0.95).tpr == 1.0, "one of a hundred others, the one with loss 0, lies below"
    assert membership([1.5] * 100, others, 0.95).tpr == 0.0, "there two lie below"
    assert membership([0.0] * 100, [0.0] * 100, 0.95).tpr == pytest.approx(0.01), "equal losses tell nothing"
