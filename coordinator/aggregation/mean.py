"""The weighted mean of what was trained.

Rules: `fedavg` (McMahan et al. 2017), `ffa` (Sun et al. 2024), `rolora` (Chen et al. 2024); for several ranks `nested` and `zero-padding`.
Which factors were trained, and so are in the updates, follows from the rule's phases (common/aggregation.py). Of both factors at once the
mean is not the mean of the products; of one, while the other is the same for all, it is: Σ w_i B_i A = (Σ w_i B_i) A. A client of rank r
trains A's first r rows or B's first r columns: the others it leaves as they are, which is an update of zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lichen.common.aggregation import A, B, part_of, update_like
from lichen.coordinator.aggregation.fedavg import FedAvg
from lichen.coordinator.aggregation.rule import Rule

if TYPE_CHECKING:
    from lichen.common.codec.codec import Payload
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan


class Mean(Rule):
    """The mean over all clients, of whatever rank: it needs nothing of the updates but their sum, for each rank."""

    def __init__(self, plan: Plan, round: int, model: State) -> None:
        super().__init__(plan, round, model)
        self._sums: dict[int, FedAvg] = {}

    def add(self, update: Payload, weight: float, rank: int) -> None:
        """Add one client's update."""
        if rank not in self._sums:
            self._sums[rank] = FedAvg(self.layout(rank).dtype)
        self._sums[rank].add(update, weight)

    def finite(self) -> bool:
        """Whether every value so far is finite."""
        return all(total.finite() for total in self._sums.values())

    def change(self) -> State:
        """The mean of each rank by its weight; zero where a rank has no row or column."""
        whole = self.plan.model.adapter.rank
        sums = self._sums or {whole: FedAvg()}
        self.room = next(iter(sums.values())).mean()
        means = {rank: self.layout(rank).split(total.mean()) for rank, total in sorted(sums.items())}
        if means.keys() == {whole}:
            return means[whole]
        weight = sum(total.weight for total in sums.values())
        found = {}
        for name, like in update_like(self.plan, self.round, whole, self.model).items():
            part = part_of(name)
            added = torch.zeros(like.shape, dtype=torch.float64)
            for rank, mean in means.items():
                here = added[:rank] if part == A else added[:, :rank] if part == B else added
                here.add_(mean[name], alpha=sums[rank].weight / weight)
            found[name] = added.to(like.dtype)
        return found
