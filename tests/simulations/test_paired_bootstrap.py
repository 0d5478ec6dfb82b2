"""The paired bootstrap: its bounds where they are known, that it pairs, and that seeds count as well as items."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from lichen.simulations.benchmarks.paired_bootstrap import paired_bootstrap


def test_the_bounds_of_one_seed_are_those_of_the_mean_of_many_items() -> None:
    draws = np.random.default_rng(3)
    first, second = draws.random((1, 4000)) < 0.9, draws.random((1, 4000)) < 0.88
    found = paired_bootstrap(first, second)
    differences = first.astype(float) - second
    margin = NormalDist().inv_cdf(0.95) * differences.std() / math.sqrt(differences.size)
    assert found.mean == differences.mean()
    assert found.upper - found.mean == pytest.approx(margin, rel=0.05)
    assert found.mean - found.lower == pytest.approx(margin, rel=0.05)


def test_pairs_are_kept() -> None:
    """Two ways that fail on nearly the same items differ little, however hard the items are."""
    draws = np.random.default_rng(0)
    first = draws.random((3, 2000)) < 0.5
    second = first.copy()
    second[:, :10] = ~second[:, :10]
    paired, apart = paired_bootstrap(first, second), paired_bootstrap(first, draws.permuted(second, axis=1))
    assert paired.upper - paired.lower < 0.3 * (apart.upper - apart.lower)


def test_seeds_that_differ_widen_the_bounds() -> None:
    first = np.zeros((3, 1000))
    second = np.repeat([[-0.02], [0.0], [0.02]], 1000, axis=1)  # every item alike: all that differs is the seed
    found = paired_bootstrap(first, second)
    assert found.mean == pytest.approx(0)
    assert found.upper > 0.01
    assert found.lower < -0.01


def test_equal_ways_do_not_differ_and_the_same_values_give_the_same_bounds() -> None:
    values = np.random.default_rng(1).random((2, 50))
    same = paired_bootstrap(values, values)
    assert (same.mean, same.lower, same.upper) == (0, 0, 0)
    other = np.random.default_rng(2).random((2, 50))
    assert paired_bootstrap(values, other) == paired_bootstrap(values, other)
    assert paired_bootstrap(values, other) != paired_bootstrap(values, other, seed=1)
    assert paired_bootstrap(values, other, confidence=0.99).upper > paired_bootstrap(values, other, confidence=0.9).upper


@pytest.mark.parametrize("shape", [(2, 9), (2, 10, 1), (20,), (0, 10)])
def test_values_of_other_items_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="same seeds and items"):
        paired_bootstrap(np.zeros(shape if shape[0] == 0 else (2, 10)), np.zeros(shape))
