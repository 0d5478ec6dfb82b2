"""The same nodes without clipping: LoRA's forward and backward pass fused with the frozen layer's, for training without privacy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lichen.common.privacy.single_backward.book import Book
from lichen.common.privacy.single_backward.rules import replacements


class Sums(Book):
    """A book that keeps nothing: what a layer writes is summed over the batch at once, into the parameter's ``grad``."""

    @property
    def open(self) -> bool:
        """Whether the fused nodes are in use."""
        return self._open

    def __init__(self) -> None:
        super().__init__()
        self._open = False
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Use the fused nodes within."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def rows_first(self, values: torch.Tensor, layer: str) -> torch.Tensor:
        """As they are: nobody asks which row is whose."""
        return values

    def add_tokens(self, parameter: nn.Parameter, gradients: torch.Tensor) -> None:
        """Add a vector's gradient, given for each token: (…, k)."""
        if parameter.requires_grad:
            self._add(parameter, gradients.flatten(0, -2).sum(0))

    def add_linear(self, parameter: nn.Parameter, inputs: torch.Tensor, backprops: torch.Tensor, *, transposed: bool = False) -> None:
        """Add a matrix's gradient, of its inputs (…, d) and its outputs' gradients (…, p)."""
        if parameter.requires_grad:
            x, g = inputs.detach().flatten(0, -2), backprops.flatten(0, -2)
            self._add(parameter, x.t() @ g if transposed else g.t() @ x)

    @staticmethod
    def _add(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        gradient = gradient.to(parameter.dtype)  # passes may be in 16 bits
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def fuse_lora(network: nn.Module) -> Sums:
    """Put the fused nodes under a network whose trained weights are LoRA's and linear layers'; they are used within `Sums.use`.

    Raises:
        LichenError: MODEL_DP_UNSUPPORTED, if a trainable layer has no rule.
    """
    sums = Sums()
    for layer, method, ours in replacements(network, sums):
        setattr(layer, method, ours)
    return sums
