"""Sums that clients have gathered, added: nobody's counts for more than another's, since each is a sum already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lichen.coordinator.aggregation.fedavg import FedAvg
from lichen.coordinator.aggregation.rule import Rule

if TYPE_CHECKING:
    from lichen.common.codec.codec import Payload
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan


class Total(Rule):
    """The plain sum, in 64 bits."""

    def __init__(self, plan: Plan, round: int, model: State) -> None:
        super().__init__(plan, round, model)
        self._mean = FedAvg(torch.float64)

    def add(self, update: Payload, weight: float, rank: int) -> None:
        """Add one client's sums; its weight is not asked for."""
        self._mean.add(update, 1.0)

    def finite(self) -> bool:
        """Whether every value so far is finite."""
        return self._mean.finite()

    def change(self) -> State:
        """The sums of all, for the continual method."""
        mean = self._mean.mean()
        return self.layout(self.plan.model.adapter.rank).split(mean.mul_(self._mean.weight))
