"""Rules that change the base: `flora` (Wang et al. 2024, FLoRA) and `fedex` (Singhal et al. 2024, FedEx-LoRA).

Both need the exact mean of what the clients' adapters do, Σ w_i s B_i A_i, which has a higher rank than any of them: what the global
adapter cannot hold is added to the frozen weight, W0. It is the product of the stacked factors, [w_1 s B_1 … w_n s B_n] and
[A_1; …; A_n], of which the sum is made as updates arrive, in 64 bits: memory for one matrix of W0's shape a layer.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from lichen.common.aggregation import MERGED, A, B, beside, cut, part_of
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import check_finite
from lichen.coordinator.aggregation.rule import Rule

if TYPE_CHECKING:
    from lichen.common.codec.codec import Payload
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan


_LARGEST = 1e30  # no model has such weights, and a mean of what is below it is finite in 32 bits


class _Products(Rule):
    """Sums, in 64 bits, the products of the clients' factors, and those of their tensors of which the mean is wanted too."""

    def __init__(self, plan: Plan, round: int, model: State) -> None:
        super().__init__(plan, round, model)
        self._scaling = plan.model.adapter.alpha / plan.model.adapter.rank
        self._weight = 0.0
        self._sum: State = {}

    def add(self, update: Payload, weight: float, rank: int) -> None:
        """Add one client's update."""
        tensors = update.decoded(self.layout(rank))
        found = self._products(tensors, rank) | {name: tensors[name].double() for name in self._averaged(tensors)}
        if any(bool(tensor.isfinite().all()) and float(tensor.abs().max()) > _LARGEST for tensor in found.values()):
            raise LichenError(Code.STATE_MISMATCH, f"a product of the update's factors is beyond {_LARGEST:g}")
        for name, tensor in found.items():
            if name in self._sum:
                self._sum[name].add_(tensor, alpha=weight)
            else:
                self._sum[name] = tensor.mul_(weight)
        self._weight += weight

    def finite(self) -> bool:
        """Whether every value so far is finite: infinities and NaN don't go away by multiplying and adding."""
        return all(math.isfinite(float(total.sum())) for total in self._sum.values())

    def _mean(self) -> State:
        """Of the products, by the names of what is merged, and of the rest, in 64 bits."""
        if self._weight <= 0:
            raise LichenError(Code.ROUND_FAILED, "no client returned a usable update")
        return {name: total / self._weight for name, total in self._sum.items()}

    @abstractmethod
    def _averaged(self, names: Iterable[str]) -> list[str]:
        """Which these are."""

    def _products(self, update: Mapping[str, torch.Tensor], rank: int) -> State:
        """Each layer's s B A, (d, k), in 64 bits, by the name of what is merged there."""
        start = cut({name: self.model[name] for name in update}, rank)
        now = {name: start[name].double() + update[name] for name in update if part_of(name) is not None}
        return {beside(a, MERGED): self._scaling * now[beside(a, B)] @ now[a] for a in now if part_of(a) == A}

    def _typed(self, change: State) -> State:
        """The change in the model's types, which a product of large values may leave. Raises STATE_MISMATCH, if a value is not finite."""
        found = {name: tensor.to(self.model[name].dtype) for name, tensor in change.items()}
        check_finite(found)
        return found


class Flora(_Products):
    """All that was learned goes into the base, and adapters start afresh; clients may have different ranks."""

    def _averaged(self, names: Iterable[str]) -> list[str]:
        """The head."""
        return [name for name in names if part_of(name) is None]

    def change(self) -> State:
        """The mean of the products, to be merged, and of the head."""
        return self._typed(self._mean())

    def restart(self) -> State:
        """Each A is drawn anew as PEFT does, uniformly in ±1/√k, from the plan's seed and the round; each B is zero, as it was before."""
        found = {}
        for name, tensor in self.model.items():
            if part_of(name) == A:
                digest = hashlib.sha256(f"{self.plan.seed}|{self.round}|{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                bound = 1 / math.sqrt(tensor.shape[1])
                found[name] = torch.empty_like(tensor).uniform_(-bound, bound, generator=generator) - tensor
        return found


class FedEx(_Products):
    """FedAvg, and into the base what the mean of products is more than the product of means: of rank (n - 1) r at most."""

    def _averaged(self, names: Iterable[str]) -> list[str]:
        """All."""
        return list(names)

    def change(self) -> State:
        """The mean of what was trained, and the residual, to be merged."""
        means = self._mean()
        of_means = self._products({name: tensor for name, tensor in means.items() if part_of(name) != MERGED}, self.plan.model.adapter.rank)
        return self._typed(means | {name: means[name] - product for name, product in of_means.items()})
