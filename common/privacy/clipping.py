"""The ℓ2 bound on a client's whole update: what client-level privacy rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def clipped(update: Mapping[str, torch.Tensor], bound: float) -> tuple[dict[str, torch.Tensor], float]:
    """An update scaled down, where it must be, to one ℓ2 norm over all its tensors of at most ``bound``.

    Args:
        update: named tensors.
        bound: C, above 0.

    Returns:
        The scaled tensors in 64-bit floats, and the norm before. An update that is not finite becomes zero, with an infinite norm: it
        would otherwise undo the bound on everybody's.
    """
    wide = {name: tensor.to(torch.float64) for name, tensor in update.items()}
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in wide.values()))
    if not math.isfinite(norm):
        return {name: torch.zeros_like(tensor) for name, tensor in wide.items()}, math.inf
    factor = min(1.0, bound / norm) if norm > 0 else 1.0
    return {name: tensor * factor for name, tensor in wide.items()}, norm
