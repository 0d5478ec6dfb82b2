"""The weighted mean of what was trained: `fedavg` (McMahan et al. 2017), `ffa` (Sun et al. 2024), `rolora` (Chen et al. 2024).

Which factors were trained, and so are in the updates, follows from the rule's phases (common/aggregation.py). Of both factors at once the
mean is not the mean of the products; of one, while the other is the same for all, it is: Σ w_i B_i A = (Σ w_i B_i) A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lichen.coordinator.aggregation.rule import Summed, SumRule

if TYPE_CHECKING:
    from lichen.common.model.adapter import State


class Mean(SumRule):
    """The mean; all clients have one rank."""

    def combined(self, sums: Mapping[int, Summed]) -> State:
        """The mean of the only rank."""
        (only,) = sums.values()
        return only.mean
