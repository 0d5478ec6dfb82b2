"""`analytic`: the head is a ridge regression on the frozen base's features, solved from sums (Zhuang et al. 2022, ACIL; 2025, AFL).

A client sends Σ x xᵀ and Σ x yᵀ of a task's rows, once, where x is a row's mean-pooled feature, of length 1, and y its label, one-hot.
The coordinator adds them to those of all tasks before and solves (Σ x xᵀ + λ I) W = Σ x yᵀ: the head is that of joint training on all
rows, whatever the order of tasks and clients, so nothing is forgotten. Under differential privacy each client's sums are one release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lichen.common.aggregation import MEMORY, SUMS
from lichen.common.continual.method import Learned, Method, Refuse, check_sums, head_of, one_hot
from lichen.common.continual.stream import Stage, stages

if TYPE_CHECKING:
    import torch

    from lichen.common.model.adapter import State

_GRAM, _CROSS = f"{SUMS}.gram", f"{SUMS}.cross"
_ALL_GRAM, _ALL_CROSS = f"{MEMORY}.gram", f"{MEMORY}.cross"


class Analytic(Method):
    """Adds sums, and solves."""

    def check(self, refuse: Refuse) -> None:
        """It solves for a head, once a task, and exactly."""
        check_sums(self.plan, refuse)
        kind, transfer = self.plan.model.adapter.kind, self.plan.transfer
        if kind != "head":
            refuse(f"continual.method: analytic solves for the head, and model.adapter.kind is {kind}", "Set model.adapter.kind: head.")
        if any(stage.rounds != 1 for stage in stages(self.plan)):
            refuse("continual.method: analytic has one round a task: a second would count rows twice", "Set rounds to the number of tasks.")
        if (transfer.uplink.codec, transfer.downlink.codec) != ("none", "none"):
            refuse(
                "continual.method: analytic is exact, and codecs round what travels",
                "Set transfer.uplink.codec: none and transfer.downlink.codec: none.",
            )

    def gathers(self, round: int) -> bool:
        """Always."""
        return True

    def gathered_like(self, stage: Stage, state: Mapping[str, torch.Tensor]) -> State:
        """The Gram matrix' upper triangle, (d (d + 1) / 2), and the cross sums of the task's own c labels, (c, d)."""
        weight = state[head_of(state)]
        width = weight.shape[1]
        return {
            _GRAM: weight.new_empty(width * (width + 1) // 2),
            _CROSS: weight.new_empty(len(self.own_labels(stage.number)), width),
        }

    def gather(self, features: torch.Tensor, data: Any, weights: torch.Tensor, stage: Stage) -> State:
        """A row's x xᵀ has length γ, its x yᵀ length 1, and both together are scaled to length 1.

        The sums of labels that the task has not are zero, and nobody need add noise to tell that.
        """
        gram, cross = self._scales
        weighted = features * weights.unsqueeze(1)
        labels = one_hot(data.labels, self.own_places(stage.number))
        return {_GRAM: gram * _packed(features.T @ weighted), _CROSS: cross * (labels.T @ weighted)}

    def gathered(self, sums: State, model: State, memory: State, stage: Stage) -> Learned:
        """Add the sums to those before, and solve for the head."""
        import torch

        name, (gram_scale, cross_scale) = head_of(model), self._scales
        weight = model[name]
        gram = memory.get(_ALL_GRAM, torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)) + _unpacked(
            sums[_GRAM].double() / gram_scale, weight.shape[1]
        )
        cross = memory.get(_ALL_CROSS, torch.zeros(weight.shape, dtype=torch.float64)).clone()
        cross[self.own_places(stage.number)] += sums[_CROSS].double() / cross_scale
        solved = (cross @ self._inverse(gram)).to(weight.dtype)
        bias = {other: -tensor for other, tensor in model.items() if other.endswith(".bias")}  # the head has none
        return Learned({name: solved - weight} | bias, {_ALL_GRAM: gram, _ALL_CROSS: cross})

    def _inverse(self, gram: torch.Tensor) -> torch.Tensor:
        """(G + λ I)⁻¹. Noise makes directions of little weight negative: they count as none."""
        import torch

        values, vectors = torch.linalg.eigh(gram)
        found: torch.Tensor = vectors / (values.clamp(min=0) + self.plan.continual.analytic.ridge) @ vectors.T
        return found

    @property
    def _scales(self) -> tuple[float, float]:
        weight = self.plan.continual.analytic.gram_weight
        return weight / math.hypot(weight, 1), 1 / math.hypot(weight, 1)


def _packed(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangle of a symmetric matrix, off the diagonal times √2: so its ℓ2 norm is the matrix' Frobenius norm."""
    import torch

    row, column = torch.triu_indices(*matrix.shape)
    return matrix[row, column] * torch.where(row == column, 1.0, math.sqrt(2))


def _unpacked(values: torch.Tensor, width: int) -> torch.Tensor:
    """The symmetric matrix, (width, width), that was packed."""
    import torch

    row, column = torch.triu_indices(width, width)
    matrix = torch.zeros(width, width, dtype=values.dtype)
    matrix[row, column] = values / torch.where(row == column, 1.0, math.sqrt(2))
    matrix[column, row] = matrix[row, column]
    return matrix
