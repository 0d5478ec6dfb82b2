"""The product of a linear layer, and its gradient: `nn.Linear`, or `Conv1D`, whose weight is transposed."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    """A linear layer as it runs without us, `Conv1D` where it is transposed: (…, d) to (…, p)."""
    bias = None if bias is None else bias.detach()
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    found = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return found.view(*x.shape[:-1], weight.shape[1])


def times_weight(g: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The gradient of a linear layer's input, (…, p) to (…, d), in the type of ``g``."""
    weight = weight.to(g.dtype)
    return g @ (weight.t() if transposed else weight)
