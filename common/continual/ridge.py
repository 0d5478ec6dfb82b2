"""Sums over rows from which a ridge regression follows, whoever had which row: Σ x xᵀ and Σ x yᵀ.

x is a row's feature, (d), of length 1, and y its class, one-hot. A row's x xᵀ has length γ in what is sent, its x yᵀ length 1, and both
together are scaled to length 1: so a row moves the sums by 1 in ℓ2 norm, whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lichen.common.aggregation import SUMS

if TYPE_CHECKING:
    import torch

    from lichen.common.model.adapter import State

GRAM, CROSS = f"{SUMS}.gram", f"{SUMS}.cross"
NOISE_SHARE = 0.7
"""Of the noise's size, which is added to λ: chosen on validation rows (docs/design.md, *Streams of tasks*)."""


class Sums(NamedTuple):
    """How rows are summed."""

    gram_weight: float
    """γ; 0: only Σ x yᵀ is sent."""

    def like(self, weight: torch.Tensor, classes: int) -> State:
        """Tensors as they are sent: the Gram matrix' upper triangle, (d (d + 1) / 2), and the cross sums, (c, d).

        Args:
            weight: of the head, (C, d).
            classes: c.
        """
        width = weight.shape[1]
        gram = {GRAM: weight.new_empty(width * (width + 1) // 2)} if self.gram_weight else {}
        return gram | {CROSS: weight.new_empty(classes, width)}

    def of(self, features: torch.Tensor, classes: torch.Tensor, weights: torch.Tensor) -> State:
        """The sums of rows, of which each moves them by its weight.

        Args:
            features: (N, d), float64.
            classes: one-hot, (N, c), float64.
            weights: (N,), float64.
        """
        weighted = features * weights.unsqueeze(1)
        gram = {GRAM: self._scale * self.gram_weight * _packed(features.T @ weighted)} if self.gram_weight else {}
        return gram | {CROSS: self._scale * (classes.T @ weighted)}

    def read(self, sums: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ x xᵀ, (d, d), zero where it is not sent, and Σ x yᵀ, (c, d), in 64 bits."""
        import torch

        cross = sums[CROSS].double() / self._scale
        width = cross.shape[1]
        if not self.gram_weight:
            return torch.zeros(width, width, dtype=torch.float64), cross
        return _unpacked(sums[GRAM].double() / (self._scale * self.gram_weight), width), cross

    @property
    def _scale(self) -> float:
        return 1 / math.hypot(self.gram_weight, 1)


def solved(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """W, (c, d), with W (Σ x xᵀ + λ I) = (Σ x yᵀ)ᵀ.

    A sum that is below zero somewhere has noise on it. Noise is as large in all directions, so the lowest eigenvalue tells its size, and
    λ grows by a share of that. Directions that noise made negative count as none.
    """
    import torch

    values, vectors = torch.linalg.eigh(gram)
    ridge += NOISE_SHARE * max(0.0, -float(values[0]))
    weight: torch.Tensor = cross @ (vectors / (values.clamp(min=0) + ridge)) @ vectors.T
    return weight


def one_hot(labels: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Which of some classes each row is of, (N, c), float64.

    Args:
        labels: the rows' classes, (N,), int64.
        places: the classes.
    """
    import torch

    return (labels.unsqueeze(1) == torch.tensor(places)).double()


def _packed(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangle of a symmetric matrix, off the diagonal times √2: so its ℓ2 norm is the matrix' Frobenius norm."""
    import torch

    row, column = torch.triu_indices(*matrix.shape)
    return matrix[row, column] * _lengths(row, column)


def _unpacked(values: torch.Tensor, width: int) -> torch.Tensor:
    """The symmetric matrix, (width, width), that was packed."""
    import torch

    row, column = torch.triu_indices(width, width)
    matrix = torch.zeros(width, width, dtype=values.dtype)
    matrix[row, column] = values / _lengths(row, column)
    matrix[column, row] = matrix[row, column]
    return matrix


def _lengths(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Of what a packed entry stands for, by its place: one entry, or two."""
    return (1 + (row != column).double()).sqrt()
