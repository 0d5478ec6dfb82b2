"""Batches without padding inside an encoder: the real tokens of all rows in one row, where rows of one length attend together.

Everything but attention works on single tokens, so packing changes no value (as in «effective transformers» and varlen attention).
B is rows, L tokens of the longest, T real tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention


class Padded:
    """A batch as it came, (B, L, …).

    Args:
        mask: of attention, true at real keys, (B, 1, 1 or L, L); None: all are real.
    """

    def __init__(self, mask: torch.Tensor | None = None) -> None:
        self._mask = mask

    def holds(self, values: torch.Tensor) -> bool:
        """Whether these are packed values of this batch."""
        return False

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the layers work on it: (B, L, d), packed already or not, to (1, T, d)."""
        return hidden

    def leave(self, values: torch.Tensor) -> torch.Tensor:
        """(1, T, k) to (B, L, k), zero at padding; what is not packed as it is."""
        return values

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        """The first token of each row, (B, 1, d)."""
        return hidden[:, :1]

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float | None = None
    ) -> torch.Tensor:
        """Attention within rows, of all tokens' keys and values; queries are all tokens' or some (B, S, d) of each row."""
        return _attention(query, key, value, heads, scale, None if self._mask is None else self._mask[..., :1, :])

    def by_rows(self, formula: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
        """A formula of (N, S, …) tensors with N results, for each row's tokens; N and S are any rows of one length."""
        return formula(*(tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]) for tensor in values))


class Packed(Padded):
    """A batch whose real tokens lie one after another, (1, T, …), rows by length.

    Args:
        real: which tokens are, (B, L); each row's first is.
    """

    def __init__(self, real: torch.Tensor) -> None:
        super().__init__()
        self._shape = real.shape
        lengths, self._order = real.sum(1).sort(stable=True)
        self._ranks = self._order.argsort()
        self._firsts = (lengths.cumsum(0) - lengths)[self._ranks]
        self._places = torch.arange(real.numel(), device=real.device).view(real.shape)[self._order][real[self._order]]
        self._runs = list(zip(*(found.tolist() for found in torch.unique_consecutive(lengths, return_counts=True)), strict=True))
        self._sizes = [length * rows for length, rows in self._runs]

    def holds(self, values: torch.Tensor) -> bool:
        """Whether these are packed values of this batch."""
        return values.shape[:2] == (1, len(self._places))

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the layers work on it: (B, L, d), packed already or not, to (1, T, d)."""
        if self.holds(hidden):
            return hidden
        return hidden.flatten(0, 1).index_select(0, self._places).unsqueeze(0)

    def leave(self, values: torch.Tensor) -> torch.Tensor:
        """(1, T, k) to (B, L, k), zero at padding; what is not packed as it is."""
        if not self.holds(values):
            return values
        return values.new_zeros((self._shape.numel(), values.shape[2])).index_copy(0, self._places, values[0]).view(*self._shape, -1)

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        """The first token of each row, (B, 1, d)."""
        return hidden[0, self._firsts].unsqueeze(1)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float | None = None
    ) -> torch.Tensor:
        """Attention within rows, of all tokens' keys and values; queries are all tokens' or some (B, S, d) of each row."""
        whole = self.holds(query)
        sizes = self._sizes if whole else [rows * query.shape[1] for _, rows in self._runs]
        # not `key[0]`, whose backward pass fills a tensor with zeros and copies into it
        queries = torch.split((query if whole else query[self._order]).flatten(0, 1), sizes)
        keys, values = (torch.split(tensor.flatten(0, 1), self._sizes) for tensor in (key, value))
        found = []
        for (_, rows), *run in zip(self._runs, queries, keys, values, strict=True):
            q, k, v = (part.view(rows, -1, part.shape[1]) for part in run)
            found.append(_attention(q, k, v, heads, scale).flatten(0, 1))
        context = torch.cat(found).view(query.shape)
        return context if whole else context[self._ranks]

    def by_rows(self, formula: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
        """A formula of (N, S, …) tensors with N results, for each row's tokens; N and S are any rows of one length."""
        if not self.holds(values[0]):
            return super().by_rows(formula, *values)
        runs = zip(self._runs, *(torch.split(tensor[0], self._sizes) for tensor in values), strict=True)
        return torch.cat([formula(*(part.view(rows, -1, part.shape[1]) for part in run)) for (_, rows), *run in runs])[self._ranks]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of several heads (Vaswani et al. 2017): queries (N, S, d), keys and values (N, R, d), to (N, S, d)."""
    q, k, v = (values.view(*values.shape[:2], heads, -1).transpose(1, 2) for values in (query, key, value))
    if torch.is_grad_enabled() and q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # on the CPU the backward pass of attention takes ten times as long in 16 bits as in 32
        with torch.autocast("cpu", enabled=False):
            found = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=scale)
        return found.transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


class Packing:
    """How the batch in flight lies in the model.

    Args:
        on: whether batches are packed where they can be; else they stay as they came.
    """

    def __init__(self, *, on: bool) -> None:
        self.on = on
        self.layout = Padded()
        """Of the batch in flight."""
        self._mask: torch.Tensor | None = None

    def of(self, mask: torch.Tensor | None) -> Padded:
        """The layout of a batch, the same for all layers, by their attention mask: (B, 1, L, L), true at real keys."""
        if mask is None or mask is not self._mask:
            self._mask, self.layout = mask, self._layout(mask)
        return self.layout

    def forget(self) -> None:
        """No batch is in flight."""
        self._mask, self.layout = None, Padded()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave batches as they come within."""
        before, self.on = self.on, False
        self.forget()
        try:
            yield
        finally:
            self.on = before
            self.forget()

    def _layout(self, mask: torch.Tensor | None) -> Padded:
        # in a batch of one row, packed values could not be told from others by their shape
        if self.on and mask is not None and mask.dtype == torch.bool and mask.dim() == 4 and len(mask) > 1:
            real = mask[:, 0, 0]
            if bool(real[:, 0].all()):
                return Packed(real)
        return Padded(mask)
