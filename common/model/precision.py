"""Forward and backward passes in 16 bits: weights, updates, losses and what is summed over rows stay in 32.

It is torch's autocast to bfloat16 (Micikevicius et al. 2018 for the idea; Kalamkar et al. 2019 for the format, which needs no scaling of
the loss). What is booked of a private step is as it comes out of these passes, and its norm is taken of that: clipping bounds the same
numbers that are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def has_bfloat16(where: torch.device) -> bool:
    """Whether a device multiplies bfloat16 by instructions of its own; where it has none, 32 bits are faster."""
    if where.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities() if where.type == "cpu" else {}
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


class _Lowered:
    """A network's forward pass, by autocast."""

    def __init__(self, forward: Callable[..., Any], where: torch.device) -> None:
        self._forward, self._where = forward, where
        self.on = True

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self.on:
            return self._forward(*arguments, **named)
        with torch.autocast(self._where.type, torch.bfloat16):
            found = self._forward(*arguments, **named)
        found.logits = found.logits.float()
        return found


def compute_in_bfloat16(network: nn.Module, where: torch.device) -> None:
    """Let the network's passes compute in 16 bits, where the device has instructions for it, and give logits in 32."""
    if has_bfloat16(where):
        network.forward = _Lowered(network.forward, where)


@contextmanager
def full_precision(network: nn.Module) -> Iterator[None]:
    """Compute in 32 bits within: where results are held against each other, to tell whether they are the same."""
    forward = network.forward
    if not isinstance(forward, _Lowered):
        yield
        return
    forward.on = False
    try:
        yield
    finally:
        forward.on = True
