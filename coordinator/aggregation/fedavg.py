"""FedAvg (McMahan et al. 2017): the weighted mean of the clients' updates, added as they arrive."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State


class FedAvg:
    """A running weighted sum in 64-bit floats: memory for one model, whatever the number of clients."""

    def __init__(self) -> None:
        self._sum: State = {}
        self._weight = 0.0

    def add(self, update: Mapping[str, torch.Tensor], weight: float) -> None:
        """Add one client's update.

        Args:
            update: trained minus received tensors.
            weight: above 0.
        """
        for name, tensor in update.items():
            if name in self._sum:
                self._sum[name].add_(tensor, alpha=weight)
            else:
                self._sum[name] = tensor.to(torch.float64) * weight
        self._weight += weight

    def mean(self) -> State:
        """The weighted mean, in 32-bit floats.

        Raises:
            LichenError: ROUND_FAILED, if nothing was added.
        """
        if self._weight <= 0:
            raise LichenError(Code.ROUND_FAILED, "no client returned a usable update")
        return {name: (tensor / self._weight).to(torch.float32) for name, tensor in self._sum.items()}
