"""Rules that change the base: `flora` (Wang et al. 2024, FLoRA) and `fedex` (Singhal et al. 2024, FedEx-LoRA).

Both need the exact mean of what the clients' adapters do, Σ w_i s B_i A_i, which has a higher rank than any of them: what the global
adapter cannot hold is added to the frozen weight, W0. It is the product of the stacked factors, [w_1 s B_1 … w_n s B_n] and
[A_1; …; A_n], of which the sum is made as updates arrive, in 64 bits: memory for one matrix of W0's shape a layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lichen.common.aggregation import MERGED, A, B, beside, cut, part_of
from lichen.common.model.adapter import check_finite
from lichen.coordinator.aggregation.fedavg import FedAvg
from lichen.coordinator.aggregation.rule import Rule

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan


class _Products(Rule):
    """Sums the products of the clients' factors."""

    def __init__(self, plan: Plan, round: int, model: State) -> None:
        super().__init__(plan, round, model)
        self._scaling = plan.model.adapter.alpha / plan.model.adapter.rank
        self._weight = 0.0
        self._sum: State = {}

    def add(self, update: Mapping[str, torch.Tensor], weight: float, rank: int) -> None:
        """Add one client's update."""
        for name, product in self._products(update, rank).items():
            if name in self._sum:
                self._sum[name].add_(product, alpha=weight)
            else:
                self._sum[name] = product.mul_(weight)
        self._weight += weight

    def finite(self) -> bool:
        """Whether every value so far is finite: infinities and NaN don't go away by multiplying and adding."""
        return all(math.isfinite(float(total.sum())) for total in self._sum.values())

    def _products(self, update: Mapping[str, torch.Tensor], rank: int) -> State:
        """S B A of each layer, (d, k), in 64 bits, by the name of what is merged there."""
        start = cut({name: self.model[name] for name in update}, rank)
        now = {name: start[name].double() + update[name] for name in update if part_of(name) is not None}
        return {beside(a, MERGED): self._scaling * now[beside(a, B)] @ now[a] for a in now if part_of(a) == A}

    def _typed(self, change: State) -> State:
        """The change in the model's types, which a product of large values may leave."""
        found = {name: tensor.to(self.model[name].dtype) for name, tensor in change.items()}
        check_finite(found)
        return found


class Flora(_Products):
    """All that was learned goes into the base, and adapters start afresh; clients may have different ranks."""

    def __init__(self, plan: Plan, round: int, model: State) -> None:
        super().__init__(plan, round, model)
        self._rest = FedAvg()

    def add(self, update: Mapping[str, torch.Tensor], weight: float, rank: int) -> None:
        """Add one client's update."""
        super().add(update, weight, rank)
        self._rest.add({name: tensor for name, tensor in update.items() if part_of(name) is None}, weight)

    def finite(self) -> bool:
        """Whether every value so far is finite."""
        return super().finite() and self._rest.finite()

    def change(self) -> State:
        """The mean of the products, to be merged, and of the head."""
        rest = self._rest.mean()
        return self._typed(rest | {name: total / self._weight for name, total in self._sum.items()})

    def after_step(self, model: State) -> State:
        """Each A drawn anew as PEFT does, uniformly in ±1/√k, from the plan's seed and the round; each B zero."""
        found = dict(model)
        for name, tensor in model.items():
            if part_of(name) == B:
                found[name] = torch.zeros_like(tensor)
            elif part_of(name) == A:
                digest = hashlib.sha256(f"{self.plan.seed}|{self.round}|{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                bound = 1 / math.sqrt(tensor.shape[1])
                found[name] = torch.empty_like(tensor).uniform_(-bound, bound, generator=generator)
        return found


class FedEx(_Products):
    """FedAvg, and into the base what the mean of products is more than the product of means: of rank (n - 1) r at most."""

    def __init__(self, plan: Plan, round: int, model: State) -> None:
        super().__init__(plan, round, model)
        self._mean = FedAvg()

    def add(self, update: Mapping[str, torch.Tensor], weight: float, rank: int) -> None:
        """Add one client's update."""
        super().add(update, weight, rank)
        self._mean.add(update, weight)

    def finite(self) -> bool:
        """Whether every value so far is finite."""
        return super().finite() and self._mean.finite()

    def change(self) -> State:
        """The mean of what was trained, and the residual, to be merged."""
        mean = self._mean.mean()
        of_means = self._products(mean, self.plan.model.adapter.rank)
        return self._typed(mean | {name: total / self._weight - of_means[name] for name, total in self._sum.items()})
