"""Rules that change the base: `flora` (after Wang et al. 2024, FLoRA) and `fedex` (Singhal et al. 2024, FedEx-LoRA).

Both need the exact mean of what the clients' adapters do, Σ w_i s B_i A_i, which has a higher rank than any of them: what the global
adapter cannot hold is added to the frozen weight, W0. It is the product of the stacked factors, [w_1 s B_1 … w_n s B_n] and
[A_1; …; A_n], of which the sum is made as updates arrive, in 64 bits: memory for one matrix of W0's shape a layer.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from lichen.common.aggregation import HELD_A, HELD_B, MERGED, A, B, beside, cut, part_of
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import check_finite
from lichen.coordinator.aggregation.rule import Rule

if TYPE_CHECKING:
    from lichen.common.codec.codec import Payload
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan


_LARGEST = 1e30  # no model has such weights, and a mean of what is below it is finite in 32 bits
_OVERSAMPLED = 8  # columns more than are wanted (Halko et al. 2011, section 4.2)
_ROW_NORM = 1 / math.sqrt(3)  # of a row of A as it is drawn


def folded(plan: Plan, model: State) -> State:
    """A state of the same model whose adapter does nothing: unlike adapters, of such the mean is the mean of what they do."""
    scaling, found = plan.model.adapter.alpha / plan.model.adapter.rank, dict(model)
    for name, tensor in model.items():
        if part_of(name) == MERGED:
            b, a = model[beside(name, B)], model[beside(name, A)]
            found[name] = tensor + scaling * b @ a
            found[beside(name, B)] = torch.zeros_like(b)
    return found


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
        """Each layer's s B A, (d, k), in 64 bits, by the name of what is merged there; with what a client of this rank holds."""
        now = cut(self.model, rank, hold=True)
        now |= {name: now[name].double() + tensor for name, tensor in update.items() if part_of(name) is not None}
        found = {}
        for a in (name for name in update if part_of(name) == A):
            product = now[beside(a, B)] @ now[a]
            if beside(a, HELD_A) in now:
                product += now[beside(a, HELD_B)].double() @ now[beside(a, HELD_A)].double()
            found[beside(a, MERGED)] = self._scaling * product
        return found

    def _typed(self, change: State) -> State:
        """The change in the model's types, which a product of large values may leave. Raises STATE_MISMATCH, if a value is not finite."""
        found = {name: tensor.to(self.model[name].dtype) for name, tensor in change.items()}
        check_finite(found)
        return found


class Flora(_Products):
    """All that was learned is kept exactly, whatever the clients' ranks: the adapter takes what it can, and the base the rest.

    FLoRA merges all into the base, draws A anew and sets B to zero. Here an adapter begins at the best approximation of all that was
    learned so far (Eckart and Young 1936), its largest directions first: a client of a small rank trains those, and holds the others.
    The model is the same, and what is learned next need not begin at nothing. Under privacy it is as in FLoRA: the largest directions
    may be noise, and noise in A changes nothing where B is zero.
    """

    def _averaged(self, names: Iterable[str]) -> list[str]:
        """The head."""
        return [name for name in names if part_of(name) is None]

    def change(self) -> State:
        """How the mean of the products differs from the model's own, to be merged, and the mean of the head."""
        return self._typed(self._mean() | {name: mean - own for name, mean, own in self._layers()})

    def restart(self) -> State:
        """The next round's adapter, less this one's; what is merged makes up for it."""
        found = {}
        for name, mean, own in self._layers():
            a, b = self._drawn(name) if self.plan.private else self._best(self.model[name].double() + mean, name)
            found[beside(name, A)] = a - self.model[beside(name, A)]
            found[beside(name, B)] = b - self.model[beside(name, B)]
            found[name] = own - self._scaling * b.double() @ a.double()
        return self._typed(found)

    def _layers(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Of each layer what is merged by name, the mean of the products, and the product that the round began with; (d, k) in 64 bits."""
        factors = {name: torch.zeros_like(tensor) for name, tensor in self.model.items() if part_of(name) in {A, B}}
        means = self._mean()
        for name, own in self._products(factors, self.plan.model.adapter.rank).items():
            yield name, means[name], own

    def _best(self, product: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of a layer's best approximation, (r, k) and (d, r); where it has fewer directions, the others do nothing."""
        a, b = self._drawn(name)
        count = min(len(a), *product.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(name))
            u, values, v = torch.svd_lowrank(product, q=min(count + _OVERSAMPLED, *product.shape))
        a[:count] = _ROW_NORM * v[:, :count].t()
        b[:, :count] = u[:, :count] * (values[:count] / (self._scaling * _ROW_NORM))
        return a, b

    def _drawn(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A as PEFT draws it, uniformly in ±1/√k, from the plan's seed and the round; and zero for B."""
        a, b = torch.empty_like(self.model[beside(name, A)]), torch.zeros_like(self.model[beside(name, B)])
        bound = 1 / math.sqrt(a.shape[1])
        return a.uniform_(-bound, bound, generator=torch.Generator().manual_seed(self._seed(name))), b

    def _seed(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.plan.seed}|{self.round}|{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


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
