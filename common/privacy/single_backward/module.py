"""The grad-sample mode: a network whose backward pass books what clipping needs, as an Opacus module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import nn

from lichen.common.errors import Code, LichenError
from lichen.common.model.packing import Packing
from lichen.common.privacy.single_backward.book import Book
from lichen.common.privacy.single_backward.rules import replacements


class SingleBackwardModule(AbstractGradSampleModule):  # type: ignore[misc]
    """Clipped sums of per-unit gradients from one ordinary backward pass, by book-keeping (Bu et al. 2023, and LoRA fused).

    Methods of single layers are replaced, none of a class; outside `clipped_sum` they call the layer's own.

    Args:
        network: what is trained.
        packing: tells how a batch lies in the network, where it may be packed.

    Raises:
        LichenError: MODEL_DP_UNSUPPORTED, if a trainable layer has no rule.
    """

    def __init__(self, network: nn.Module, packing: Packing | None = None) -> None:
        super().__init__(network, loss_reduction="sum")
        self._book = Book(packing)
        self._names, self._trained = [], []
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                self._names.append(name)
                self._trained.append(parameter)
        self._replaced = replacements(network, self._book)
        self._before = [layer.__dict__.get(method) for layer, method, _ in self._replaced]
        for layer, method, ours in self._replaced:
            setattr(layer, method, ours)

    def clipped_sum(self, sizes: Sequence[int], loss: Callable[[nn.Module], torch.Tensor], clip: float) -> dict[nn.Parameter, torch.Tensor]:
        """One forward and one backward pass, for those of the parameters that are trained now.

        Args:
            sizes: rows of each unit; a unit's rows lie next to each other in the batch.
            loss: the scalar loss of the batch, by this module: a sum of terms of single rows.
            clip: each unit's gradient, over all parameters, is scaled to a norm of at most this.

        Returns:
            Of each trainable parameter the sum over units, in at least 32 bits. Parameters are left without ``grad``.

        Raises:
            LichenError: MODEL_DP_UNSUPPORTED, if a weight is used where nothing was booked, or rows can't be told apart.
        """
        for parameter in self._trained:
            parameter.grad = None
        trained = [parameter for parameter in self._trained if parameter.requires_grad]
        device = self._trained[0].device
        try:
            with self._book.of(sizes, device):
                value = loss(self)
                with torch.autocast(device.type, enabled=False):
                    torch.autograd.backward(value)
                    self._refuse_leaks()
                    return dict(zip(trained, self._book.clipped_sum(trained, clip), strict=True))
        finally:
            for parameter in self._trained:
                parameter.grad = None

    def _refuse_leaks(self) -> None:
        """What is booked never reaches ``grad``: where there is one, a weight was used past its layer, and nobody clipped that."""
        for name, parameter in zip(self._names, self._trained, strict=True):
            if parameter.grad is not None:
                raise LichenError(
                    Code.MODEL_DP_UNSUPPORTED,
                    f"{name} is used outside its own layer, where its per-example gradient is not known",
                    where="model.base",
                    fix="Use adapter kind lora on linear modules, or privacy.gradients: hooks.",
                )

    def remove_hooks(self) -> None:
        """Give the layers their own methods back."""
        for (layer, method, _), before in zip(self._replaced, self._before, strict=True):
            if before is None:
                delattr(layer, method)
            else:
                setattr(layer, method, before)
        self._replaced, self._before = [], []
