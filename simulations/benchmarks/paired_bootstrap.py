"""The paired bootstrap: how sure it is that one way is better than another, of two that met the same seeds and the same test items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

AT_ONCE = 500
"""Resamples that are made at once."""


@dataclass(frozen=True)
class Difference:
    """A mean difference, and a bound for it on either side."""

    mean: float
    lower: float
    """The true difference is above, with the confidence that was asked for (one-sided)."""
    upper: float
    """It is below, with that confidence."""


def paired_bootstrap(
    first: np.ndarray[Any, Any],
    second: np.ndarray[Any, Any],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """The mean of ``first`` less the mean of ``second``, with percentile bounds (Efron and Tibshirani 1993, section 13.3).

    Items and seeds are both drawn anew with replacement, each on its own and the same for both ways, since another test set and other
    seeds would have been others (Owen 2007, «The pigeonhole bootstrap»): a bound that is rather too wide than too narrow.

    Args:
        first: a value (1 and 0 where an answer is right or wrong, a loss, …) for each seed and item, shape (S, N).
        second: of the same seeds and items, in the same order.
        confidence: of each bound alone; for an interval that holds with 95 % take .975.
        resamples: how many.
        seed: of the draws: the same values give the same bounds.

    Raises:
        ValueError: if the shapes differ, or there is nothing.
    """
    if first.shape != second.shape or first.ndim != 2 or first.size == 0:
        raise ValueError(f"{first.shape} and {second.shape} are no values of the same seeds and items")
    differences = first.astype(np.float64) - second
    seeds, items = differences.shape
    draws = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, AT_ONCE):
        count = min(AT_ONCE, resamples - start)
        by_item = draws.multinomial(seeds, np.full(seeds, 1 / seeds), count) @ differences
        means.append((by_item * draws.multinomial(items, np.full(items, 1 / items), count)).sum(1) / differences.size)
    lower, upper = np.quantile(np.concatenate(means), [1 - confidence, confidence])
    return Difference(float(differences.mean()), float(lower), float(upper))
