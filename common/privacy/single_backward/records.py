"""What a backward pass books of a weight: enough for each unit's gradient norm, and for the clipped sum afterwards.

Rows are what passes through the model, units are what is clipped: a unit has one row or several, which lie next to each other.
B is rows, U units, T tokens of a row, d and p a layer's input and output width. All sums are made in 32 bits or more: a norm that
16 bits had rounded would be no bound, and neither would a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch

from lichen.common.device import sent


class Units:
    """Which rows belong to which unit.

    Args:
        sizes: rows of each unit, in the order of the batch; each at least 1.
        device: where the batch is.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.count, self.rows = len(sizes), sum(sizes)
        self._single = self.count == self.rows
        self._parts: list[slice] = []
        start = 0
        for size in sizes:
            self._parts.append(slice(start, start + size))
            start += size
        self.owners = sent(torch.repeat_interleave(torch.arange(self.count), torch.tensor(sizes)), device)
        """The unit of each row, shape (B,)."""

    def of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over each unit's rows: (B, …) to (U, …)."""
        if self._single:
            return values
        return values.new_zeros((self.count, *values.shape[1:])).index_add_(0, self.owners, values)

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Each row gets its unit's value: (U, …) to (B, …)."""
        return values if self._single else values[self.owners]

    def each(self, formula: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """A formula of (N, S, …) tensors with N results, where a unit of several rows is one row that is as many times longer."""
        if self._single:
            return formula(*tensors)
        return torch.cat([formula(*(tensor[part].flatten(0, 1).unsqueeze(0) for tensor in tensors)) for part in self._parts])


def wide(values: torch.Tensor, at_least: torch.dtype = torch.float32) -> torch.Tensor:
    """At least 32 bits."""
    return values.to(torch.promote_types(values.dtype, at_least))


def dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Scalar products over the last axis."""
    found: torch.Tensor = torch.linalg.vecdot(left, right)
    return found


Squares = tuple[torch.Tensor, torch.Tensor]
"""Squared norms, shape (U,), and what they would be, or more, if all tokens' gradients pointed the same way: what rounding goes by."""


class Whole:
    """Each unit's gradient itself.

    Args:
        gradients: shape (U, …parameter).
    """

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients = gradients

    def squares(self, units: Units) -> Squares:
        """Squared norms; the gradient is there, so nothing can cancel any more."""
        squares = torch.linalg.vector_norm(wide(self.gradients.flatten(1)), dim=1).square()
        return squares, squares

    def drop(self, units: Units, bad: torch.Tensor) -> None:
        """Make the gradients of some units, shape (U,), zero, whatever they were."""
        self.gradients = self.gradients.masked_fill(bad.view(-1, *[1] * (self.gradients.dim() - 1)), 0)

    def summed(self, units: Units, factors: torch.Tensor) -> torch.Tensor:
        """The sum of the units' gradients times their factors, shape (U,)."""
        flat = wide(self.gradients.flatten(1), factors.dtype)
        return torch.mv(flat.t(), factors.to(flat.dtype)).view(self.gradients.shape[1:])


class Outer:
    """A linear layer's input and output gradient, from which norms follow without making the gradients.

    ⟨Σ g_t x_tᵀ, Σ g_t x_tᵀ⟩ = Σ_st ⟨x_s, x_t⟩ ⟨g_s, g_t⟩ (Li et al. 2022, «ghost clipping»).

    Args:
        inputs: (B, T, d).
        backprops: (B, T, p).
        transposed: whether the weight is (d, p), as GPT-2's are, not (p, d).
    """

    def __init__(self, inputs: torch.Tensor, backprops: torch.Tensor, transposed: bool) -> None:
        self.inputs, self.backprops, self.transposed = inputs, backprops, transposed

    def squares(self, units: Units) -> Squares:
        """Squared norms, and what they would be if no token cancelled another."""
        squares, lengths = units.each(_outer_squares, self.inputs, self.backprops).unbind(1)
        return squares, lengths.square()

    def drop(self, units: Units, bad: torch.Tensor) -> None:
        """Make the gradients of some units, shape (U,), zero, whatever they were."""
        rows = units.to_rows(bad).view(-1, 1, 1)
        self.inputs, self.backprops = self.inputs.masked_fill(rows, 0), self.backprops.masked_fill(rows, 0)

    def summed(self, units: Units, factors: torch.Tensor) -> torch.Tensor:
        """The sum of the units' gradients times their factors, shape (U,): one product of matrices."""
        inputs, backprops = wide(self.inputs, factors.dtype), wide(self.backprops, factors.dtype)
        # the narrower side is the cheaper one to scale
        rows = units.to_rows(factors).to(inputs.dtype).view(-1, 1, 1)
        if inputs.shape[2] < backprops.shape[2]:
            inputs = inputs * rows
        else:
            backprops = backprops * rows
        left, right = (inputs, backprops) if self.transposed else (backprops, inputs)
        return left.flatten(0, 1).t() @ right.flatten(0, 1)


class Looked:
    """Rows of an embedding that were looked up, and their gradients.

    Args:
        ids: (B, T).
        backprops: (B, T, d), zero at padding.
        entries: of the embedding.
    """

    def __init__(self, ids: torch.Tensor, backprops: torch.Tensor, entries: int) -> None:
        self.ids, self.backprops, self._entries = ids, backprops, entries

    def squares(self, units: Units) -> Squares:
        """Squared norms, where a unit's tokens of one id share a row of the gradient, and what they would be if none cancelled."""
        keys = self.ids + units.owners.view(-1, 1) * self._entries
        different, places = torch.unique(keys, return_inverse=True)
        backprops = wide(self.backprops.flatten(0, 1))
        sums = backprops.new_zeros((len(different), backprops.shape[1])).index_add_(0, places.flatten(), backprops)
        owners = torch.div(different, self._entries, rounding_mode="floor")
        squares = sums.new_zeros(units.count).index_add_(0, owners, dot(sums, sums))
        lengths = torch.linalg.vector_norm(wide(self.backprops), dim=2).sum(1)
        return squares, units.of_rows(lengths).square()

    def drop(self, units: Units, bad: torch.Tensor) -> None:
        """Make the gradients of some units, shape (U,), zero, whatever they were."""
        self.backprops = self.backprops.masked_fill(units.to_rows(bad).view(-1, 1, 1), 0)

    def summed(self, units: Units, factors: torch.Tensor) -> torch.Tensor:
        """The sum of the units' gradients times their factors, shape (U,)."""
        backprops = wide(self.backprops, factors.dtype)
        backprops = backprops * units.to_rows(factors).to(backprops.dtype).view(-1, 1, 1)
        total = backprops.new_zeros((self._entries, backprops.shape[2]))
        return total.index_add_(0, self.ids.flatten(), backprops.flatten(0, 1))

    @classmethod
    def merged(cls, records: Sequence[Looked]) -> Looked:
        """Several look-ups in one embedding as one: a row's gradient is the sum over all its tokens."""
        if len(records) == 1:
            return records[0]
        ids = torch.cat([record.ids for record in records], 1)
        return cls(ids, torch.cat([wide(record.backprops) for record in records], 1), records[0]._entries)


Record = Whole | Outer | Looked


def squared_norms(records: Sequence[Record], units: Units) -> Squares:
    """Of the gradients of one parameter that was used in several places: |Σ g|² = Σ |g|² + 2 Σ ⟨g, h⟩."""
    total = torch.zeros(units.count, device=units.owners.device)
    lengths = torch.zeros_like(total)
    for record in records:
        squares, uncancelled = record.squares(units)
        total, lengths = total + squares, lengths + uncancelled.sqrt()
    for left, right in combinations(records, 2):
        total = total + 2 * _product(left, right, units)
    return total, lengths.square()


def _product(left: Record, right: Record, units: Units) -> torch.Tensor:
    """⟨g, h⟩ of each unit, shape (U,); at most one of the two is a `Looked`, since those are merged."""
    if isinstance(right, Looked) or (isinstance(right, Outer) and isinstance(left, Whole)):
        left, right = right, left
    match left, right:
        case Whole(), Whole():
            return dot(wide(left.gradients.flatten(1)), wide(right.gradients.flatten(1)))
        case Outer(), Outer():
            return units.each(_outer_product, left.inputs, left.backprops, right.inputs, right.backprops)
        case Outer(), Whole():
            gradients = units.to_rows(wide(right.gradients))
            projected = torch.bmm(wide(left.inputs), gradients if left.transposed else gradients.mT)
            return units.of_rows((projected * wide(left.backprops)).sum((1, 2)))
        case Looked(), Outer():
            return units.each(_looked_times_outer, left.ids.unsqueeze(2), left.backprops, right.inputs, right.backprops)
        case Looked(), Whole():
            gradients = units.to_rows(wide(right.gradients))
            rows = torch.gather(gradients, 1, left.ids.unsqueeze(2).expand(-1, -1, gradients.shape[2]))
            return units.of_rows((rows * wide(left.backprops)).sum((1, 2)))
    raise TypeError(f"{type(left).__name__}, {type(right).__name__}")


def _outer_squares(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """|Σ g_t x_tᵀ|² and Σ |g_t| |x_t|, shape (N, 2), of inputs (N, T, d) and output gradients (N, T, p)."""
    x, g = wide(x), wide(g)
    (tokens, d), p = x.shape[1:], g.shape[2]
    if tokens * (d + p) <= 2 * d * p:
        grams = torch.bmm(x, x.mT).mul_(torch.bmm(g, g.mT))
        return torch.stack([grams.sum((1, 2)), grams.diagonal(dim1=1, dim2=2).sqrt().sum(1)], 1)
    # long rows: the gradients, one at a time, cost less
    squares = torch.stack([torch.linalg.vector_norm(b.t() @ a).square() for a, b in zip(x, g, strict=True)])
    return torch.stack([squares, (torch.linalg.vector_norm(x, dim=2) * torch.linalg.vector_norm(g, dim=2)).sum(1)], 1)


def _outer_product(x: torch.Tensor, g: torch.Tensor, y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """⟨Σ g_s x_sᵀ, Σ h_t y_tᵀ⟩, shape (N,), of inputs (N, S, d), (N, T, d) and output gradients (N, S, p), (N, T, p)."""
    x, g, y, h = wide(x), wide(g), wide(y), wide(h)
    (s, d), (t, p) = x.shape[1:], h.shape[1:]
    if s == t == 1:
        return dot(x, y)[:, 0] * dot(g, h)[:, 0]
    if s * t * (d + p) <= (s + t) * d * p:
        return (torch.bmm(x, y.mT) * torch.bmm(g, h.mT)).sum((1, 2))
    # long rows: the gradients, one at a time, cost less
    return torch.stack([((b.t() @ a) * (e.t() @ c)).sum() for a, b, c, e in zip(x, g, y, h, strict=True)])


def _looked_times_outer(ids: torch.Tensor, e: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """⟨embedding's gradient, tied head's gradient⟩, shape (N,): Σ_st ⟨e_t, x_s⟩ g_s[id_t].

    Of ids (N, T, 1), their gradients (N, T, d), the head's inputs (N, S, d) and output gradients (N, S, V).
    """
    chosen = torch.gather(wide(g), 2, ids.mT.expand(-1, g.shape[1], -1))
    return (chosen * torch.bmm(wide(x), wide(e).mT)).sum((1, 2))
