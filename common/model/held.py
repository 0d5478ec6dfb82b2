"""What a client of a smaller rank holds of LoRA's factors and does not train: it is added by the frozen layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lichen.common.model.linear import times_weight

Held = tuple[torch.Tensor, torch.Tensor]
"""A (h, d) and s B (p, h)."""


def can_hold(layer: nn.Module) -> None:
    """Have a linear layer, (…, d) to (…, p), add what it holds, from now on: at first nothing. Whoever uses its weight calls `add_held`."""
    hold(layer, None)
    layer.register_forward_hook(_hook)


def hold(layer: Any, held: Held | None) -> None:
    """Let a layer hold this."""
    layer.held = held


def add_held(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A layer's output, (…, p), of its input, (…, d), with what it holds."""
    held: Held | None = getattr(layer, "held", None)
    return y if held is None else y + F.linear(F.linear(x, held[0]), held[1]).to(y.dtype)


def add_held_gradient(layer: nn.Module, g: torch.Tensor, gx: torch.Tensor) -> torch.Tensor:
    """The gradient of the input, (…, d), with that of what the layer holds, by its output's, (…, p)."""
    held: Held | None = getattr(layer, "held", None)
    return gx if held is None else gx + times_weight(times_weight(g, held[1], False), held[0], False).to(gx.dtype)


def _hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
    return add_held(layer, inputs[0], y)
