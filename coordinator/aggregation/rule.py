"""What an aggregation rule is: a round's updates go in, one after another, and a change of the model comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from lichen.coordinator.aggregation.fedavg import FedAvg

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan


class Rule(ABC):
    """One round's aggregation.

    Args:
        plan: whose rule it is.
        round: from 1.
        model: the state that the round began with; it is never changed.
    """

    def __init__(self, plan: Plan, round: int, model: State) -> None:
        self.plan, self.round, self.model = plan, round, model

    @abstractmethod
    def add(self, update: Mapping[str, torch.Tensor], weight: float, rank: int) -> None:
        """Add one client's update; it must not change until `change` or `finite` was called.

        Args:
            update: trained minus received tensors, as `aggregation.update_like` describes them.
            weight: above 0.
            rank: of the client.
        """

    @abstractmethod
    def finite(self) -> bool:
        """Whether every value of every update so far is finite. If not, add the others to a new rule."""

    @abstractmethod
    def change(self) -> State:
        """What the server optimizer is to add to the model: some of its tensors; those that are not among them stay as they are.

        Raises:
            LichenError: ROUND_FAILED, if nothing was added; STATE_MISMATCH, if a value of what was added is not finite.
        """

    def after_step(self, model: State) -> State:
        """The model that the next round begins with, from the one that the server optimizer made."""
        return model


class Summed(NamedTuple):
    """The updates of all clients of one rank."""

    mean: State
    """Weighted."""
    weight: float
    """In all."""


class SumRule(Rule):
    """A rule that needs nothing of the updates but their sum, for each rank."""

    def __init__(self, plan: Plan, round: int, model: State) -> None:
        super().__init__(plan, round, model)
        self._sums: dict[int, FedAvg] = {}

    def add(self, update: Mapping[str, torch.Tensor], weight: float, rank: int) -> None:
        """Add one client's update."""
        self._sums.setdefault(rank, FedAvg()).add(update, weight)

    def finite(self) -> bool:
        """Whether every value so far is finite."""
        return all(total.finite() for total in self._sums.values())

    def change(self) -> State:
        """What `combined` makes of the sums."""
        sums = self._sums or {self.plan.model.adapter.rank: FedAvg()}
        return self.combined({rank: Summed(total.mean(), total.weight) for rank, total in sorted(sums.items())})

    @abstractmethod
    def combined(self, sums: Mapping[int, Summed]) -> State:
        """The change of the model, from the mean of each rank."""
