"""FedAvg (McMahan et al. 2017): the weighted mean of the clients' updates, added as they arrive, a few at a time."""

from __future__ import annotations

import math

import torch

from lichen.common.codec.codec import Payload, placed, sums
from lichen.common.errors import Code, LichenError

GROUP = 16
"""Updates that are added together: the mean then passes through memory once for so many updates, not for each."""


class FedAvg:
    """A running weighted mean: memory for one model (in 32 bits) and `GROUP` open updates, whatever the number of clients.

    The updates of a group are summed in 64 bits in the order of the calls, a part at a time, and the mean so far is moved by that sum;
    it is rounded once a group. So it repeats bit for bit, and no weight and no number of clients makes it overflow.

    Args:
        dtype: of the mean.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.weight = 0.0
        """Of all that were added."""
        self._waiting: list[tuple[Payload, float]] = []
        self._mean: torch.Tensor | None = None
        self._dtype = dtype
        self._finite = True

    def add(self, update: Payload, weight: float) -> None:
        """Add one client's update; it is read with the next `GROUP`, so it must not change until then.

        Args:
            update: trained minus received values; all are of one codec and model.
            weight: above 0.
        """
        self._waiting.append((update, weight))
        if len(self._waiting) == GROUP:
            self._add_waiting()

    def finite(self) -> bool:
        """Whether every value of every update so far is finite. If not, the mean is of no use: add the others to a new one."""
        self._add_waiting()
        return self._finite

    def mean(self) -> torch.Tensor:
        """The weighted mean (shape (count)): this object's own, which later updates would move.

        Raises:
            LichenError: ROUND_FAILED, if nothing was added; STATE_MISMATCH, if a value of what was added is not finite.
        """
        if not self.finite():
            raise LichenError(Code.STATE_MISMATCH, "an update holds values that are not finite")
        if self._mean is None:
            raise LichenError(Code.ROUND_FAILED, "no client returned a usable update")
        return self._mean

    def _add_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting or not self._finite:
            return
        first, before = waiting[0][0], self.weight
        if self._mean is None:
            self._mean = torch.zeros(first.count, dtype=self._dtype)
        self.weight += sum(weight for _, weight in waiting)
        for part, total in sums(waiting):
            # 32-bit floats times counts can't overflow in 64 bits, and infinities and NaN don't go away by adding
            if not math.isfinite(float(total.sum())):
                self._finite = False
                return
            for mean, values in placed(first, self._mean, part, total):
                if before:
                    values.add_(mean.to(torch.float64), alpha=before)
                mean.copy_(values.mul_(1 / self.weight))
