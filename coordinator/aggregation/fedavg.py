"""FedAvg (McMahan et al. 2017): the weighted mean of the clients' updates, added as they arrive, a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State

GROUP = 8
"""Updates that are added together: the sum, at 64 bits, then passes through memory once for so many updates, not for each."""
BLOCK = 32_000
"""Values of a tensor that are summed at a time: 256 kB at 64 bits stay in a core's cache. From 32,768 on torch would wake threads."""


class FedAvg:
    """A running weighted sum in 64-bit floats: memory for one model and `GROUP` updates, whatever the number of clients.

    Each value is summed in the order of the calls, whatever the blocks: sums repeat bit for bit. (A weight that counts rows below 2^29
    times a 32-bit float is exact in 64 bits, so not even a fused multiply-add makes a difference.)
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Mapping[str, torch.Tensor], float]] = []
        self._sum: State = {}
        self._types: dict[str, torch.dtype] = {}
        self.weight = 0.0
        """Of all that were added."""
        self._finite = True

    def add(self, update: Mapping[str, torch.Tensor], weight: float) -> None:
        """Add one client's update; it is read with the next `GROUP`, so it must not change until then.

        Args:
            update: trained minus received tensors; all clients' have the same names and shapes.
            weight: above 0.
        """
        self._waiting.append((update, weight))
        if len(self._waiting) == GROUP:
            self._add_waiting()

    def finite(self) -> bool:
        """Whether every value of every update so far is finite. If not, the sum is of no use: add the others to a new one."""
        self._add_waiting()
        return self._finite

    def mean(self) -> State:
        """The weighted mean, in the updates' own type (a plan's is of 32-bit floats).

        Raises:
            LichenError: ROUND_FAILED, if nothing was added; STATE_MISMATCH, if a value of what was added is not finite.
        """
        if not self.finite():
            raise LichenError(Code.STATE_MISMATCH, "an update holds values that are not finite")
        if self.weight <= 0:
            raise LichenError(Code.ROUND_FAILED, "no client returned a usable update")
        found = {name: torch.empty_like(total, dtype=self._types[name]) for name, total in self._sum.items()}
        for name, total in self._sum.items():
            for mean, block in zip(_blocks(found[name]), _blocks(total), strict=True):
                mean.copy_(block / self.weight)
        return found

    def _add_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting or not self._finite:
            return
        if not self._sum:
            self._sum = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in waiting[0][0].items()}
            self._types = {name: tensor.dtype for name, tensor in waiting[0][0].items()}
        weights = [weight for _, weight in waiting]
        for name, total in self._sum.items():
            for block, *parts in zip(_blocks(total), *(_blocks(update[name]) for update, _ in waiting), strict=True):
                for part, weight in zip(parts, weights, strict=True):
                    block.add_(part, alpha=weight)
                # 32-bit floats times counts can't overflow in 64 bits, and infinities and NaN don't go away by adding
                if not math.isfinite(float(block.sum())):
                    self._finite = False
                    return
        self.weight += sum(weights)


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(torch.split(tensor.reshape(-1), BLOCK))
