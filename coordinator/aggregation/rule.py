"""What an aggregation rule is: a round's updates go in, one after another, and a change of the model comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from lichen.common.aggregation import update_like
from lichen.common.codec.layout import Layout

if TYPE_CHECKING:
    import torch

    from lichen.common.codec.codec import Payload
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
        self.room: torch.Tensor | None = None
        """After `change`: a flat vector (shape (count)) that it may lie in, and that may be overwritten when it is used up."""
        self._layouts: dict[int, Layout] = {}

    def layout(self, rank: int) -> Layout:
        """Of the update of a client of this rank."""
        if rank not in self._layouts:
            self._layouts[rank] = Layout.of(update_like(self.plan, self.round, rank, self.model))
        return self._layouts[rank]

    @abstractmethod
    def add(self, update: Payload, weight: float, rank: int) -> None:
        """Add one client's update; it must not change until `change` or `finite` was called.

        Args:
            update: trained minus received tensors, of `layout`.
            weight: above 0.
            rank: of the client.

        Raises:
            LichenError: STATE_MISMATCH, if what a rule makes of this update is beyond the model's type; nothing is added then.
        """

    @abstractmethod
    def finite(self) -> bool:
        """Whether every value of every update so far is finite. If not, add the others to a new rule."""

    @abstractmethod
    def change(self) -> State:
        """What the server optimizer is to move the model by: some of its tensors; those that are not among them stay as they are.

        Raises:
            LichenError: ROUND_FAILED, if nothing was added; STATE_MISMATCH, if a value of what was added is not finite.
        """

    def restart(self) -> State:
        """What is added as well, past the server optimizer: the next round starts elsewhere by it, from the same model."""
        return {}
