"""Clients of several ranks, by sums alone: `nested`, and `zero-padding`, which it is held against.

A client of rank r trains A's first r rows or B's first r columns. With one factor a round, as `nested` has it, the product of the means
is the mean of the products, but for the weights, which differ from column to column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lichen.common.aggregation import A, B, part_of, update_like
from lichen.coordinator.aggregation.rule import Summed, SumRule

if TYPE_CHECKING:
    from lichen.common.model.adapter import State

LEAST = 0.25
"""Under privacy a column's weight counts as at least this part of the whole: its noise is over its weight, and few clients have much."""


class ZeroPadding(SumRule):
    """The mean of updates that are zero where a client has no column: columns that few clients have hardly move."""

    def combined(self, sums: Mapping[int, Summed]) -> State:
        """The sum of all updates, each column of a factor over its weight, the head over the weight of all."""
        rank, total = self.plan.model.adapter.rank, sum(summed.weight for summed in sums.values())
        of_columns = self._weights({rank: summed.weight for rank, summed in sums.items()}, rank)
        found = {}
        for name, like in update_like(self.plan, self.round, rank, self.model).items():
            part = part_of(name)
            added = torch.zeros(like.shape, dtype=torch.float64)
            for own, summed in sums.items():
                here = added[:own] if part == A else added[:, :own] if part == B else added
                here.add_(summed.mean[name], alpha=summed.weight)
            over = of_columns.unsqueeze(1) if part == A else of_columns if part == B else total
            found[name] = (added / over).to(like.dtype)
        return found

    def _weights(self, by_rank: Mapping[int, float], rank: int) -> torch.Tensor:
        """What the sum in each of ``rank`` columns is divided by, from the weight of the clients of each rank."""
        return torch.full((rank,), sum(by_rank.values()), dtype=torch.float64)


class Nested(ZeroPadding):
    """Each column is the mean over those that have it; one that nobody has stays as it is."""

    def _weights(self, by_rank: Mapping[int, float], rank: int) -> torch.Tensor:
        """The weight of those that have a column."""
        found = torch.zeros(rank, dtype=torch.float64)
        for own, weight in by_rank.items():
            found[:own] += weight
        if self.plan.private:
            found.clamp_(min=LEAST * sum(by_rank.values()))
        return found.masked_fill(found == 0, 1.0)
