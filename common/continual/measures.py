"""How well a stream of tasks was learned, and how much was forgotten (Lopez-Paz and Ranzato 2017, section 2; Chaudhry et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

Row = Sequence[float | None]
"""Scores of one model on each task; None where a task has no rows to score."""


class Measures(NamedTuple):
    """Of the tasks that were learned so far; None where there are no scores to tell from."""

    acc: float | None
    """Mean over tasks of the last model's score."""
    bwt: float | None
    """Backward transfer: mean over all but the last task of what its score has changed by since it was learned."""
    fwt: float | None
    """Forward transfer: mean over all but the first task of how much better the model before it was than that at the start."""
    forgetting: float | None
    """Mean over all but the last task of how much the last model lacks of the best score of any before it."""


def measures(matrix: Sequence[Row], start: Row | None = None) -> Measures:
    """What R tells, where R[t][i] is the score on task i after task t.

    Args:
        matrix: a row for each task that was learned, in order.
        start: the same of the model before the first.
    """
    last = len(matrix) - 1
    if last < 0:
        return Measures(None, None, None, None)
    end = matrix[last]
    forgotten = [_less(_most(row[task] for row in matrix[:last]), end[task]) for task in range(last)]
    return Measures(
        acc=_mean(end[: last + 1]),
        bwt=_mean([_less(end[task], matrix[task][task]) for task in range(last)]),
        fwt=_mean([_less(matrix[task - 1][task], start[task]) for task in range(1, last + 1)]) if start else None,
        forgetting=_mean(forgotten),
    )


def drift(matrix: Sequence[Row]) -> list[float | None]:
    """How much new data differ from what was learned, by task; None for the first, and where there are no scores.

    It is what a model lacks on a task's rows, before it is trained on them, of its mean score on the tasks before.

    Args:
        matrix: as in `measures`.
    """
    found: list[float | None] = [None]
    found += [drift_of(matrix[task - 1][: task + 1]) for task in range(1, len(matrix))]
    return found[: len(matrix)]


def drift_of(scores: Row) -> float | None:
    """How much lower the last score, of new data, is than the mean of those before; None where there is none of either."""
    return _less(_mean(scores[:-1]), scores[-1])


def _less(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
