"""What an auditor can prove from one run: a lower bound on ε from canaries, and how well rows are told from rows never seen.

Both can show that a claim is false; neither can show that it is true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GUESSED = (1 / 2, 1 / 8, 1 / 32)
"""Shares of the canaries that are guessed, chosen before a score is seen; the others are abstained from. Many guesses find a small
leak in all canaries, few a large one in some."""
LEAST_GUESSES = 8
"""Fewer, all of them right, prove next to nothing."""
RESAMPLES = 1000


class Guesses(NamedTuple):
    """What one number of guesses proves."""

    guesses: int
    correct: int
    epsilon: float
    """Lower bound on ε, at a confidence that holds for all numbers of guesses together."""


class Attack(NamedTuple):
    """How well a threshold on the loss tells rows that were trained on from rows that were not (Yeom et al. 2018)."""

    members: int
    others: int
    auc: float
    """Chance that a training row has the smaller loss: ½ is no better than a coin."""
    auc_interval: tuple[float, float]
    tpr: float
    """Training rows found where one in a hundred others is taken for one (Carlini et al. 2022)."""
    tpr_interval: tuple[float, float]
    curve: tuple[tuple[float, float], ...]
    """False and true positive rates."""


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How probable so many right guesses are at most, if the mechanism is (ε, δ) differentially private.

    Steinke, Nasr, Jagielski 2023, «Privacy auditing with one (1) training run», Theorem 5.2 and Corollary 5.4 (Appendix D): right guesses
    are no more than a binomial's, of success e^ε / (1 + e^ε), but for a term in δ.

    Args:
        canaries: m, each in the training data by a fair coin of its own.
        guesses: r, canaries that were not abstained from.
        correct: v, right ones among them.
        epsilon: of the claim that is tested.
        delta: of that claim.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses on {canaries} canaries")
    if guesses == 0:
        return 1.0
    # log(k!) by sums of logarithms: exact enough, and it needs no further library
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, guesses + 1)))])
    hits = np.arange(guesses + 1)
    log_right, log_wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    mass = np.exp(factorial[-1] - factorial - factorial[::-1] + hits * log_right + (guesses - hits) * log_wrong)
    beta = float(mass[correct:].sum())
    below = np.cumsum(mass[:correct][::-1]) / np.arange(1, correct + 1)  # P[v > W ≥ v - i] / i
    return min(1.0, beta + 2 * canaries * delta * float(below.max(initial=0.0)))


def epsilon_at_least(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest ε that so many right guesses refute at ``confidence``; 0 where they refute none.

    Args:
        canaries: m.
        guesses: r.
        correct: v.
        delta: of the claim.
        confidence: 1 less the chance that the bound is above the true ε.
    """

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
        if high > 1e3:
            return low
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audit_canaries(scores: Sequence[float], included: Sequence[bool], delta: float, confidence: float) -> list[Guesses]:
    """Guess the canaries with the largest scores as trained on and those with the smallest as not, and see what it proves.

    The numbers of guesses are fixed beforehand, and the confidence is shared among them (Bonferroni), so that the largest of the bounds
    holds at ``confidence``.

    Args:
        scores: of each canary; larger where it looks trained on. Made without looking at ``included``.
        included: whether each was in the training data.
        delta: of the claim.
        confidence: of all bounds together.
    """
    order = np.argsort(np.asarray(scores, dtype=np.float64), kind="stable")
    truth = np.asarray(included, dtype=bool)[order]
    count = len(truth)
    numbers = [2 * round(count * share / 2) for share in GUESSED]
    numbers = [number for number in numbers if number >= LEAST_GUESSES] or [count - count % 2]
    each = 1 - (1 - confidence) / len(numbers)
    found = []
    for number in numbers:
        half = number // 2
        correct = int((~truth[:half]).sum() + truth[count - half :].sum())
        found.append(Guesses(number, correct, epsilon_at_least(count, number, correct, delta, each)))
    return found


def membership(members: Sequence[float], others: Sequence[float], confidence: float) -> Attack:
    """The loss-threshold attack, with intervals by a stratified bootstrap (too narrow for a few dozen rows).

    Args:
        members: losses of rows that were trained on.
        others: losses of rows that were not.
        confidence: of each interval.
    """
    inside, outside = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(RESAMPLES):
        drawn = generator.choice(inside, len(inside)), generator.choice(outside, len(outside))
        samples.append((_auc(*drawn), _tpr(*drawn)))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(np.array(samples), [tail, 100 - tail], axis=0)
    rates = np.linspace(0, 1, 101)
    curve = tuple((float(rate), float((inside <= np.quantile(outside, rate)).mean())) for rate in rates)
    return Attack(
        len(inside),
        len(outside),
        _auc(inside, outside),
        (float(low[0]), float(high[0])),
        _tpr(inside, outside),
        (float(low[1]), float(high[1])),
        ((0.0, 0.0), *curve[1:]),
    )


def _auc(members: np.ndarray, others: np.ndarray) -> float:
    """Mann and Whitney's statistic over its largest value; ties count a half."""
    ordered = np.sort(others)
    above = len(ordered) - np.searchsorted(ordered, members, side="right")
    ties = np.searchsorted(ordered, members, side="right") - np.searchsorted(ordered, members, side="left")
    return float((above + ties / 2).mean() / len(ordered))


def _tpr(members: np.ndarray, others: np.ndarray, fpr: float = 0.01) -> float:
    """Share of members below the threshold that takes ``fpr`` of the others; of those that lie on it a share is taken by lot."""
    allowed = fpr * len(others)
    threshold = np.sort(others)[int(allowed)]
    lot = (allowed - (others < threshold).sum()) / (others == threshold).sum()
    return float((members < threshold).mean() + lot * (members == threshold).mean())
